"""``manage.py parked_domain_events``: list, retry or discard parked events of the outbox."""

from __future__ import annotations

from argparse import ArgumentParser
from datetime import datetime, timezone
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import DEFAULT_DB_ALIAS, connections, transaction

from domain_events import outbox, printable
from domain_events.django.database import executing
from domain_events.django.management.commands.relay_domain_events import aliases_with_outbox


class Command(BaseCommand):
    help = (
        "List the parked events of the outbox: those that the broker refuses, or that cannot be "
        "sent. Each holds up later events of its own object, until it is retried or discarded."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--database", default=DEFAULT_DB_ALIAS, metavar="ALIAS")
        what = parser.add_mutually_exclusive_group()
        what.add_argument(
            "--retry", nargs="+", type=int, metavar="ID", help="send these events again"
        )
        what.add_argument("--retry-all", action="store_true", help="send all of them again")
        what.add_argument(
            "--discard",
            nargs="+",
            type=int,
            metavar="ID",
            help="delete these events, for good; they are printed",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        (alias,) = aliases_with_outbox([options["database"]])
        with transaction.atomic(using=alias):
            execute = executing(connections[alias])
            if options["retry"] or options["retry_all"]:
                number = outbox.retry(execute, options["retry"])
                self.stdout.write(f"{number} to be sent again by the next relay.")
            elif options["discard"]:
                for each in outbox.discard(execute, options["discard"]):
                    self.stdout.write(each.row.body)
            else:
                self._list(execute)
        if options["retry"] and number < len(set(options["retry"])):
            raise CommandError("The others of these ids are not parked.")

    def _list(self, execute: outbox.Execute) -> None:
        after = 0
        while found := outbox.parked(execute, after=after):
            for each in found:
                since = datetime.fromtimestamp(each.parked, timezone.utc)
                about = f" (object {printable(each.row.object_key)})" if each.row.object_key else ""
                self.stdout.write(
                    f"{each.id}: {printable(each.row.routing_key)} "
                    f"{printable(each.row.event_id)}{about}, parked since "
                    f"{since:%Y-%m-%d %H:%M:%S} UTC: {printable(each.error)}"
                )
            after = found[-1].id
