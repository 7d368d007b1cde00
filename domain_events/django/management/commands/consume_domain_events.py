"""``manage.py consume_domain_events``: handle domain events, until it is stopped."""

from __future__ import annotations

import threading
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils import autoreload

from domain_events import DomainEventsError, Subscriber
from domain_events.django.handlers import make_subscriber
from domain_events.probes import HealthBeat, HealthServer

# Seconds that the handlers that run have to finish, when a source file was changed.
_PATIENCE = 5.0


class Command(BaseCommand):
    help = (
        "Handle domain events with the handlers in the subscribers.py of the installed apps, until "
        "SIGTERM or Ctrl-C: handlers that run are waited for."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "names",
            nargs="*",
            metavar="NAME",
            help="only the handlers of these subscribers' names; all, if left out",
        )
        parser.add_argument(
            "--workers",
            type=int,
            default=1,
            metavar="N",
            help="how many handlers run at the same time, each in a thread (default: 1)",
        )
        parser.add_argument(
            "--timeout",
            type=float,
            metavar="SECONDS",
            help="stop after about so many seconds; never, if left out",
        )
        parser.add_argument(
            "--health-port",
            type=int,
            metavar="PORT",
            help="answer probes over HTTP on this port: /live, /ready, /health",
        )
        parser.add_argument(
            "--health-file",
            metavar="FILE",
            help="write the health to this file, for python -m domain_events.probes",
        )
        parser.add_argument(
            "--systemd", action="store_true", help="notify systemd, and its watchdog"
        )
        parser.add_argument(
            "--reload",
            action="store_true",
            help="start again whenever a source file is changed, as runserver does",
        )

    def handle(self, *names: str, **options: Any) -> None:
        names = (*names, *options.pop("names", ()))
        if options["reload"]:
            autoreload.run_with_reloader(self._consume, names, options)
        else:
            self._consume(names, options)

    def _consume(self, names: tuple[str, ...], options: dict[str, Any]) -> None:
        if options["reload"]:
            autoreload.raise_last_exception()
        try:
            subscriber = make_subscriber(*names, workers=options["workers"])
        except DomainEventsError as error:
            raise CommandError(f"{type(error).__name__}: {error}") from error
        finished = threading.Event()
        if options["reload"]:
            _stop_before_reload(subscriber, finished)
        if options["verbosity"]:
            listed = ", ".join(each.options.name for each in subscriber.subscriptions)
            self.stdout.write(f"Consuming: {listed}.")
            self.stdout.flush()
        try:
            with _probes(subscriber, options):
                subscriber.start_consuming(options["timeout"])
        except DomainEventsError as error:
            raise CommandError(f"{type(error).__name__}: {error}") from error
        finally:
            finished.set()


@contextmanager
def _probes(subscriber: Subscriber, options: dict[str, Any]) -> Iterator[None]:
    port, file, systemd = options["health_port"], options["health_file"], options["systemd"]
    with ExitStack() as started:
        if port is not None:
            started.enter_context(HealthServer(subscriber, port=port))
        if file or systemd:
            started.enter_context(HealthBeat(subscriber, file=file, systemd=systemd))
        yield


def _stop_before_reload(subscriber: Subscriber, finished: threading.Event) -> None:
    def stop(**_: Any) -> None:
        subscriber.stop_consuming()
        finished.wait(_PATIENCE)

    autoreload.file_changed.connect(stop, weak=False)
