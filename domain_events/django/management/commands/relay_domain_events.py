"""``manage.py relay_domain_events``: send what is in the outboxes, until it is stopped."""

from __future__ import annotations

import logging
import signal
import threading
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from domain_events import DomainEventsError
from domain_events.django.database import has_table, outbox_database
from domain_events.outbox import OUTBOX, Relay, prune_all

log = logging.getLogger("domain_events")

# Seconds between two prunings of the inbox.
_PRUNE_EVERY = 3600.0


class Command(BaseCommand):
    help = (
        "Send the events that are in the outbox, and those that come, until SIGTERM or Ctrl-C. Any "
        "number of these may run. Processes send what they have written themselves, as soon as it "
        "is committed; this sends what they leave behind, and prunes the inbox."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--database",
            action="append",
            metavar="ALIAS",
            help="of this database only; may be repeated. If left out, of all that have the table",
        )
        parser.add_argument(
            "--once",
            action="store_true",
            help="send what is there now, prune the inbox, and end",
        )
        parser.add_argument(
            "--status", action="store_true", help="show how many wait, and end; nothing is sent"
        )
        parser.add_argument(
            "--batch", type=int, default=1000, metavar="N", help="rows to lease at a time"
        )
        parser.add_argument(
            "--idle",
            type=float,
            default=1.0,
            metavar="SECONDS",
            help="between two looks at an outbox without events",
        )
        parser.add_argument(
            "--metrics-port",
            type=int,
            metavar="PORT",
            help="serve metrics to Prometheus on this port: events that wait, and are parked",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        aliases = aliases_with_outbox(options["database"])
        try:
            relays = {
                alias: Relay(outbox_database(alias), batch=options["batch"], idle=options["idle"])
                for alias in aliases
            }
            if options["status"]:
                self._show(relays)
            elif options["once"]:
                self._sweep(relays)
            else:
                with _metrics(relays, options["metrics_port"]):
                    self._run(relays)
        except DomainEventsError as error:
            raise CommandError(f"{type(error).__name__}: {error}") from error

    def _show(self, relays: dict[str, Relay]) -> None:
        for alias, relay in relays.items():
            found = relay.status()
            self.stdout.write(
                f"{alias}: {found.waiting} waiting, the oldest for {found.oldest:.0f} s; "
                f"{found.parked} parked"
            )

    def _sweep(self, relays: dict[str, Relay]) -> None:
        try:
            for alias, relay in relays.items():
                self.stdout.write(f"{alias}: {relay.sweep()} sent")
        finally:
            for relay in relays.values():
                relay.close()
            for alias in relays:
                _prune(alias)

    def _run(self, relays: dict[str, Relay]) -> None:
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        for relay in relays.values():
            relay.start()
        self.stdout.write(f"Relaying: {', '.join(relays)}.")
        self.stdout.flush()
        try:
            while not stopping.is_set():
                for alias in relays:
                    _prune(alias, stopping)
                stopping.wait(_PRUNE_EVERY)
        finally:
            for relay in relays.values():
                relay.stop()
            for relay in relays.values():
                relay.close()


@contextmanager
def _metrics(relays: dict[str, Relay], port: int | None) -> Iterator[None]:
    if port is None:
        yield
        return
    try:
        from domain_events.prometheus import OutboxMetrics, serve  # noqa: PLC0415
    except ImportError as error:
        raise CommandError(f"--metrics-port: {error}") from error
    OutboxMetrics(relays)
    with serve(port):
        yield


def aliases_with_outbox(given: list[str] | None) -> list[str]:
    """Those that were given, or all databases that have the table.

    :raises CommandError: there is none.
    """
    for alias in given or ():
        if alias not in connections:
            raise CommandError(
                f"There is no database {alias!r} in the settings; there are "
                f"{', '.join(connections)}."
            )
    aliases = given or [alias for alias in connections if has_table(alias)]
    without = [alias for alias in aliases if not has_table(alias)]
    if without or not aliases:
        where = ", ".join(without) or "any database"
        raise CommandError(
            f"There is no table {OUTBOX} in {where}; run manage.py migrate, with --database for "
            "others than the default."
        )
    return aliases


def _prune(alias: str, stopping: threading.Event | None = None) -> None:
    try:
        prune_all(outbox_database(alias), stopping=stopping)
    except Exception:
        log.exception("The inbox in %s cannot be pruned; it is tried again later.", alias)
