"""The command ``domain-events``, also ``python -m domain_events``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from domain_events import __version__, demo, settings
from domain_events.errors import DomainEventsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is a line and exit status 1 or 2, no traceback."""
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
    demonstrate.add_argument(
        "--broker",
        metavar="URL",
        help="the URL of a RabbitMQ; without it, the embedded broker, which needs no set-up",
    )
    options = parser.parse_args(arguments)
    try:
        urls = settings.resolve(options.broker) if options.broker else None
        demo.run(",".join(urls) if urls else demo.EMBEDDED)
    except DomainEventsError as error:
        print(f"domain-events: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0
