"""``manage.py consume_domain_events``: handle domain events, until it is stopped."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils import autoreload

from domain_events import DomainEventsError, Subscriber
from domain_events.cli import exits
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

        parser.add_argument(
            "--processes",
            type=int,
            metavar="N",
            help=(
                "consume in so many processes, which are started again when they crash, and "
                "replaced one by one on SIGHUP; if left out, in this one"
            ),
        )
        parser.add_argument(
            "--max-restarts",
            type=int,
            default=10,
            metavar="N",
            help="with --processes: end when more crash within a minute (default: 10)",
        )
        parser.add_argument(
            "--max-events",
            type=int,
            metavar="N",
            help="with --processes: replace one when it has handled about so many events",
        )
        parser.add_argument(
            "--max-memory",
            type=int,
            metavar="MIB",
            help="with --processes: replace one when it uses about so many MiB",
        )

    def handle(self, *names: str, **options: Any) -> None:
        names = (*names, *options.pop("names", ()))
        if options["processes"] is not None:
            self._consume_in_processes(names, options)
        elif options["reload"]:
            autoreload.run_with_reloader(self._consume, names, options)
        else:
            self._consume(names, options)

    def _consume_in_processes(self, names: tuple[str, ...], options: dict[str, Any]) -> None:
        if os.name != "posix":
            raise CommandError("--processes needs a POSIX system, for its signals and pipes.")
        for option in ("reload", "timeout"):
            if options[option]:
                raise CommandError(f"--{option} and --processes cannot be given together.")
        from domain_events.cli import child  # noqa: PLC0415 - imports what Windows has not

        try:
            if child.is_supervised():
                child.serve(lambda: self._made(names, options))
            elif status := _supervise(options):
                raise SystemExit(status)
        except DomainEventsError as error:
            raise CommandError(
                f"{type(error).__name__}: {error}", returncode=exits.of(error)
            ) from error

    def _made(self, names: tuple[str, ...], options: dict[str, Any]) -> Subscriber:
        """In a process of `_supervise`: what it is to consume."""
        try:
            subscriber = make_subscriber(*names, workers=options["workers"])
        except DomainEventsError:
            raise
        except Exception as error:
            traceback.print_exc()
            raise CommandError(
                "The handlers cannot be imported.", returncode=exits.NOT_IMPORTED
            ) from error
        self._show(subscriber, options)
        return subscriber

    def _show(self, subscriber: Subscriber, options: dict[str, Any]) -> None:
        if options["verbosity"]:
            listed = ", ".join(each.options.name for each in subscriber.subscriptions)
            self.stdout.write(f"Consuming: {listed}.")
            self.stdout.flush()

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
        self._show(subscriber, options)
        try:
            with _probes(subscriber, options):
                subscriber.start_consuming(options["timeout"])
        except DomainEventsError as error:
            raise CommandError(f"{type(error).__name__}: {error}") from error
        finally:
            finished.set()


def _supervise(options: dict[str, Any]) -> int:
    """Run this command in processes; returns the exit status."""
    if sys.argv[1:2] != ["consume_domain_events"]:
        raise CommandError(
            "--processes starts this command anew, so it can only be given on the command line, as "
            "manage.py consume_domain_events --processes N."
        )
    for option, least in (("processes", 1), ("max_restarts", 0), ("max_events", 1)):
        if options[option] is not None and options[option] < least:
            name = option.replace("_", "-")
            raise CommandError(f"--{name} must be {least} or more, not {options[option]}.")
    from domain_events.cli.supervisor import Plan, Supervisor  # noqa: PLC0415 - see `child`

    mebibytes = options["max_memory"]
    return Supervisor(
        Plan(
            [sys.executable, *sys.orig_argv[1:]],
            processes=options["processes"],
            max_restarts=options["max_restarts"],
            max_events=options["max_events"],
            max_memory=None if mebibytes is None else mebibytes * 1024 * 1024,
            health_port=options["health_port"],
            health_file=options["health_file"],
        )
    ).run()


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
