"""The command ``domain-events``, also ``python -m domain_events``: run, look, mend.

An optional room, which the core does not import. `app` lists the commands; each has a module of its
own, that is imported when it is used. Every command has the same `options` for the broker, prints
through `output`, and ends with one of the `exits`.

It takes the extra ``[cli]``; without that, ``demo`` works, and everything else names what to
install.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from domain_events import settings

_INSTALL = (
    "domain-events: this command needs two more packages: pip install "
    "'domain-events-rabbitmq[cli]'. Without them, there is only: domain-events demo"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. A user's mistake prints one line, no traceback."""
    if arguments is None:
        _hide_password()
        arguments = sys.argv[1:]
    try:
        from domain_events.cli.app import run  # noqa: PLC0415 - without the extra, it is not there
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        from domain_events import demo  # noqa: PLC0415

        if arguments[:1] == ["demo"]:
            return demo.main(arguments[1:])
        print(_INSTALL, file=sys.stderr)
        return 2
    return run(arguments)


def _hide_password() -> None:
    """Re-execute with ``--broker URL`` in the environment, if it has a password.

    All users of a machine can read the arguments of a process; like this, for a moment only.
    """
    words = sys.orig_argv[1:]
    url = ""
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name != "--broker":
            continue
        if equals:
            url = value
            del words[at]
        elif at + 1 < len(words) and "://" in words[at + 1]:
            url = words[at + 1]
            del words[at : at + 2]
        else:
            continue
        # The broker in the environment is meant: `demo` has the option alone for that.
        words.insert(at, "--broker" if "demo" in words[:at] else "--broker=")
        break
    if "@" not in url or os.name != "posix":
        return
    try:
        os.execve(
            sys.executable, [sys.executable, *words], {**os.environ, settings.ENVIRONMENT[0]: url}
        )
    except OSError:
        return
