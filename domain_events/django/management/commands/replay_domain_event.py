"""``manage.py replay_domain_event``, as domain-event-broker has it."""

from __future__ import annotations

import json
import select
import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from domain_events import (
    DISCARD,
    LEAVE,
    RETRY,
    DomainEventsError,
    printable,
    replay_all,
    replay_event,
)

# Seconds for an answer.
_PATIENCE = 30.0


class Command(BaseCommand):
    help = "Return dead letters to the queue of their subscriber."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "queue", nargs="+", metavar="NAME", help="the subscriber's name, which its queue has"
        )
        parser.add_argument(
            "--all",
            action="store_true",
            dest="replay_all",
            help="all dead letters that there are now, and not only the oldest",
        )
        parser.add_argument(
            "--interactive",
            action="store_true",
            help="show each event, and decide what becomes of it",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        decide = self._decide if options["interactive"] else _replay
        replay = replay_all if options["replay_all"] else replay_event
        for queue in options["queue"]:
            try:
                remaining = replay(queue, decide)
            except DomainEventsError as error:
                raise CommandError(f"{queue}: {type(error).__name__}: {error}") from error
            self.stdout.write(f"{remaining} dead-lettered events remaining for {queue}")

    def _decide(self, body: bytes, **_: Any) -> str:
        self.stdout.write("Please specify action for:")
        self.stdout.write(_shown(body))
        self.stdout.write("(R)eplay, (D)iscard or (L)eave? ", ending="")
        self.stdout.flush()
        readable, *_others = select.select([sys.stdin], [], [], _PATIENCE)
        if not readable:
            self.stdout.write("Timed out. Message left in queue.")
            return LEAVE
        answer = sys.stdin.readline().strip()[:1].upper()
        if answer == "R":
            self.stdout.write("Message is returned to worker queue.")
            return RETRY
        if answer == "D":
            self.stdout.write("Message has been discarded.")
            return DISCARD
        self.stdout.write("Message left in queue.")
        return LEAVE


def _replay(**_: Any) -> str:
    return RETRY


def _shown(body: bytes) -> str:
    """The event's JSON, readable; of what is not JSON, what can be shown."""
    try:
        # ASCII only, so that nothing another program sent moves the cursor.
        return json.dumps(json.loads(body), indent=4, sort_keys=True)
    except (ValueError, RecursionError):
        return printable(body.decode(errors="replace"), 10_000)
