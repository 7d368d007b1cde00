"""The command ``domain-events``, also ``python -m domain_events``: run, look, mend.

An optional room, which the core does not import. `app` lists the commands; each has a module of its
own, that is imported when it is used. Every command has the same `options` for the broker, prints
through `output`, and ends with one of the `exits`.

It takes the extra ``[cli]``; without that, ``demo`` works, and everything else names what to
install.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence

from domain_events import settings

_INSTALL = (
    "domain-events: this command needs two more packages: pip install "
    "'domain-events-rabbitmq[cli]'. Without them, there is only: domain-events demo"
)

# Options whose value may contain a password, and the environment variables that stand for them.
_SECRETS = {"--broker": settings.ENVIRONMENT[0], "--management": "DOMAIN_EVENTS_MANAGEMENT_URL"}
# Commands whose arguments may be a database's URL; `env:NAME` stands for that.
_WITH_DATABASE = ("relay", "outbox")
_HAS_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#]*:[^/?#]*@", re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. A user's mistake prints one line, no traceback."""
    _open_standard_streams()
    if arguments is None:
        _hide_passwords()
        arguments = sys.argv[1:]
    if importlib.util.find_spec("click") and importlib.util.find_spec("rich"):
        try:
            from domain_events.cli.app import run  # noqa: PLC0415 - it imports click

            return run(arguments)
        except KeyboardInterrupt:  # while it was being imported; later, `run` handles it
            print("domain-events: interrupted", file=sys.stderr)
            return 130
    from domain_events import demo  # noqa: PLC0415

    if arguments[:1] == ["demo"]:
        return demo.main(arguments[1:])
    print(_INSTALL, file=sys.stderr)
    return 2


def _open_standard_streams() -> None:
    """Open those that are closed (``>&-``), or the next socket would be the standard output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _hide_passwords() -> None:
    """Re-execute with URLs that contain a password in the environment.

    All users of a machine can read the arguments of a process; like this, for a moment only.
    """
    hidden: dict[str, str] = {}
    words = list(_without_passwords(sys.orig_argv[1:], hidden))
    if not hidden or os.name != "posix":
        return
    try:
        os.execve(sys.executable, [sys.executable, *words], {**os.environ, **hidden})
    except OSError:
        return


def _without_passwords(words: Sequence[str], hidden: dict[str, str]) -> Iterator[str]:
    """The words of a command line; what is replaced in them goes into ``hidden``."""
    rest = iter(words)
    commands: set[str] = set()
    for word in rest:
        name, equals, value = word.partition("=")
        if "demo" in commands and name.startswith("--b") and "--broker".startswith(name):
            name = "--broker"  # which its parser lets a user shorten
        if name in _SECRETS:
            if not equals:
                value = next(rest, "")
            if "@" in value:
                hidden[_SECRETS[name]] = value
                # That in the environment is meant: `demo` has the option alone for that.
                if name == "--broker":
                    yield name if "demo" in commands else f"{name}="
                continue
            yield word
            if not equals and value:
                yield value
            continue
        if commands.intersection(_WITH_DATABASE) and _HAS_PASSWORD.search(word):
            variable = f"DOMAIN_EVENTS_DATABASE_{len(hidden)}"
            hidden[variable] = word
            yield f"env:{variable}"
            continue
        commands.add(word)
        yield word
