"""``domain-events run``: a subscriber in one or several processes, and what keeps them running."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

import click

from domain_events import settings
from domain_events.cli.options import broker_option
from domain_events.errors import ConfigurationError
from domain_events.settings import ConnectionSettings

_MEBIBYTE = 1024 * 1024


@click.command("run")
@click.argument("target", metavar="PACKAGE.MODULE:SUBSCRIBER")
@click.option(
    "--processes",
    type=click.IntRange(min=1, max=1000),
    default=1,
    show_default=True,
    metavar="N",
    help="How many processes consume.",
)
@click.option(
    "--reload",
    is_flag=True,
    help="Replace the processes whenever a Python file below the current directory changes.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    metavar="N",
    help="How many crashes within a minute are followed by a new start; one more ends it all.",
)
@click.option(
    "--max-events",
    type=click.IntRange(min=1),
    metavar="N",
    help="Replace a process when it has handled about so many events.",
)
@click.option(
    "--max-memory",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="Replace a process when it uses about so many MiB.",
)
@click.option(
    "--health-port",
    type=click.IntRange(min=0, max=65_535),
    metavar="PORT",
    help="Answer probes over HTTP on this port: /live, /ready, /health.",
)
@click.option(
    "--health-file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write the health to this file, for python -m domain_events.probes.",
)
@broker_option
def command(
    target: str,
    processes: int,
    reload: bool,
    max_restarts: int,
    max_events: int | None,
    max_memory: int | None,
    health_port: int | None,
    health_file: str | None,
    broker: ConnectionSettings,
) -> int:
    """Run a Subscriber, or what a function without parameters returns, until SIGTERM or Ctrl-C.

    Handlers that run are waited for; a second signal kills them, and their events come again.
    SIGHUP replaces the processes one by one, each when the new one consumes. A process that
    crashes is started again; one that waits for the broker is left alone.

    Under systemd with Type=notify, systemd is notified, and its watchdog.
    """
    if os.name != "posix":
        raise ConfigurationError(
            "domain-events run needs a POSIX system, for its signals and pipes; call "
            "start_consuming() in a program of your own instead."
        )
    from domain_events.cli import reloading  # noqa: PLC0415 - so that --help is quick
    from domain_events.cli.supervisor import Plan, Supervisor  # noqa: PLC0415

    _check(target)
    logging.basicConfig(
        format="%(asctime)s %(process)d %(levelname)s %(message)s", level=logging.INFO, force=True
    )
    environment: dict[str, str] = {}
    if isinstance(broker, str):
        settings.resolve(broker)
        environment[settings.ENVIRONMENT[0]] = broker
    supervisor = Supervisor(
        Plan(
            [sys.executable, "-m", "domain_events.cli.child", target],
            environment,
            processes=processes,
            max_restarts=max_restarts,
            max_events=max_events,
            max_memory=None if max_memory is None else max_memory * _MEBIBYTE,
            health_port=health_port,
            health_file=health_file,
            waits_for_changes=reload,
        )
    )
    with contextlib.ExitStack() as stack:
        if reload:
            stack.enter_context(reloading.watching(Path.cwd(), supervisor.replace_all))
        return supervisor.run()


def _check(target: str) -> None:
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise click.UsageError(
            f"{target!r} does not name a subscriber; write package.module:subscriber."
        )
