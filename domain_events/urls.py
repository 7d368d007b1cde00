"""What is wrong with a broker's URL, in words for whoever wrote it. Pure.

pika takes some mistakes without a word (of the vhost ``a/b`` it takes ``a``), and turns others into
a connection to somewhere else: in ``amqp://user:12/34@host``, whose password is not
percent-encoded, ``user`` is the host. Nothing that may be a password is repeated here.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

_FORM = "amqp://user:password@host:5672/vhost"

# What the query may set, as in pika's URLParameters; those that are numbers, and from where on.
_NUMBERS = {
    "blocked_connection_timeout": 0,
    "channel_max": 1,
    "connection_attempts": 1,
    "frame_max": 4096,
    "heartbeat": 0,
    "retry_delay": 0,
    "socket_timeout": 0,
    "stack_timeout": 0,
}
_OPTIONS = (
    *_NUMBERS,
    "client_properties",
    "locale",
    "ssl_options",
    "tcp_options",
    "tls_verify",  # our own
)

_PARTS = re.compile(
    r"(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?", re.DOTALL
)


def trouble(url: str) -> str:
    """What is wrong with the URL and what would be right; empty if nothing is.

    Whether there is such a broker, or anything at all that depends on one, is not looked at.
    """
    scheme, colon, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme == "memory" and colon:
        return ""
    if why := _scheme_trouble(scheme if colon else ""):
        return why
    found = _PARTS.fullmatch(rest)
    assert found is not None
    if any(
        character.isspace() or character in "'\""
        for character in found["authority"] + found["path"]
    ):
        return "it has a space or a quotation mark in it; leave it out, or percent-encode it."
    return (
        _encoding_trouble(found)
        or _host_trouble(found["authority"].rpartition("@")[2])
        or _vhost_trouble(found["path"])
        or _query_trouble(found["query"] or "")
    )


def _scheme_trouble(scheme: str) -> str:
    if scheme in ("amqp", "amqps"):
        return ""
    right = f"it must begin with amqp:// (or amqps:// for TLS), as in {_FORM}."
    if not scheme:
        return f"it has no scheme; {right}"
    if scheme in ("http", "https"):
        return f"http:// is for the management interface (port 15672); {right}"
    # "Known" as in: the embedded broker is not for production, and so comes last.
    return f"its scheme is unknown; {right} (memory:// is the embedded broker.)"


def _encoding_trouble(found: re.Match[str]) -> str:
    """Characters that end a part of a URL, within a user, a password or a vhost."""
    authority, path, query = found["authority"], found["path"], found["query"] or ""
    fragment = found["fragment"] or ""
    if "@" in path or fragment or ("@" in query and "@" not in authority):
        return (
            "it has a '/', '?', '#' or '@' where none can be; within the user, the password or "
            "the vhost write %2F, %3F, %23, %40 (urllib.parse.quote(password, safe=''))."
        )
    user, at, _ = authority.rpartition("@")
    if at and ":" not in user:
        return f"it has a user and no password; write user:password@, as in {_FORM}."
    return ""


def _host_trouble(address: str) -> str:
    if "," in address:
        return "it names several hosts; write a whole URL for each: amqp://one,amqp://two."
    host, colon, port = address.rpartition(":")
    if address.startswith("[") or address.endswith("]"):  # IPv6
        host, _, port = address.partition("]")
        if not host.startswith("[") or "]" not in address or (port and not port.startswith(":")):
            return "its IPv6 address must be in brackets: amqp://[::1]:5672."
        colon, port = port[:1], port[1:]
    elif ":" in host:
        return "an IPv6 address must be in brackets: amqp://[::1]:5672."
    # Not shown: of a URL that lacks its host, it is the password.
    if colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        return f"its port must be a number from 1 to 65,535, as in {_FORM}."
    return ""


def _vhost_trouble(path: str) -> str:
    if "/" not in path[1:]:
        return ""
    if path == "//":
        return (
            "its vhost is '//', which is how Celery writes the vhost '/'; write %2F "
            "(amqp://host/%2F), or nothing."
        )
    return "its vhost has a '/' in it; write %2F if it belongs to the name, else leave it out."


def _query_trouble(query: str) -> str:
    seen: set[str] = set()
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            import difflib  # noqa: PLC0415 - for this mistake only

            close = difflib.get_close_matches(name, _OPTIONS, 1)
            # Anything else may be the rest of a password with a '?' in it.
            what = f"{name[:40]!r}; did you mean {close[0]!r}?" if close else "(or a bare '?')."
            return f"it has an unknown option {what} There are {', '.join(_OPTIONS)}."
        if name in seen:
            return f"it has the option {name!r} twice."
        seen.add(name)
        if name in _NUMBERS and not _is_number(value, _NUMBERS[name]):
            return f"its option {name!r} must be a number from {_NUMBERS[name]} up."
        if not value:
            return f"its option {name!r} has no value."
    return ""


def _is_number(text: str, least: float) -> bool:
    try:
        return least <= float(text) < float("inf")
    except ValueError:
        return False
