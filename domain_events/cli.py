"""The command ``domain-events``, also ``python -m domain_events``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from domain_events import __version__, demo, settings
from domain_events.errors import DomainEventsError

_BROKER_HELP = f"""
    run it on RabbitMQ: at URL (whose password other users of this machine may see for a moment),
    else at the URL in the environment ({", ".join(settings.ENVIRONMENT)}), else on localhost.
    Without this option, run it on an embedded broker, which needs no set-up
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an error prints one line, not a traceback, with exit status 1 or 2."""
    parser = argparse.ArgumentParser(
        prog="domain-events", description="Domain events over RabbitMQ."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demonstrate = commands.add_parser(
        "demo",
        help="see it work: publish, subscribe, a retry, a dead letter, its replay",
        description=demo.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demonstrate.add_argument("--broker", metavar="URL", nargs="?", const="", help=_BROKER_HELP)
    options = parser.parse_args(arguments)
    if options.broker and arguments is None and os.name == "posix":
        _hide(options.broker)
    try:
        if options.broker is None:
            demo.run()
        else:
            demo.run(settings.resolve(options.broker) or demo.EMBEDDED)
    except DomainEventsError as error:
        print(f"domain-events: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _hide(url: str) -> None:
    """Re-execute with the URL in the environment: all users can read a process's arguments."""
    words = sys.orig_argv[1:]
    # It is the value of the last option, after a space or "=".
    for at in reversed(range(len(words))):
        if words[at] == url:
            del words[at]
            break
        if words[at].endswith(f"={url}"):
            words[at] = words[at].removesuffix(f"={url}")
            break
    else:
        return
    with contextlib.suppress(OSError):
        os.execve(
            sys.executable, [sys.executable, *words], {**os.environ, settings.ENVIRONMENT[0]: url}
        )
