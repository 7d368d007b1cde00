"""A broker's URL, shown without its password. Pure."""

from __future__ import annotations

import re

from domain_events.text import printable

# A URL may contain a comma (in ssl_options); one that separates URLs is followed by a scheme.
BETWEEN_URLS = re.compile(r"\s*,\s*(?=[a-z]+://)", re.IGNORECASE)


# A URL that does not match may have its password anywhere, so nothing of it is shown.
_WELL_FORMED = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?:(?P<user>[^:/?#@]*)(?::[^/?#@]*)?@)?"
    r"(?P<rest>(?:[^:/?#@\[\]]*|\[[0-9a-f:.]+\])(?::[0-9]+)?(?:/[^?#@]*)?)(?:[?#][^@]*)?",
    re.IGNORECASE,
)


class Address(str):
    """A broker's URL, or several, whose repr has no password.

    Debuggers, pytest and error trackers show the arguments and variables of every function in a
    traceback.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(", ".join(map(shown, BETWEEN_URLS.split(self.strip()))))


def shown(url: str) -> str:
    """The address without the password and the options, for logs and errors."""
    found = _WELL_FORMED.fullmatch(url)
    if found is None:
        return "a malformed URL"
    user = f"{found['user']}@" if found["user"] else ""
    return printable(f"{found['scheme']}{user}{found['rest']}")
