"""``domain-events migrate`` and ``domain-events rename``; `moving` does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from domain_events.cli import exits
from domain_events.cli.options import (
    Number,
    broker_option,
    exchange_option,
    json_option,
    management_option,
    timeout_option,
)
from domain_events.cli.output import record, remark
from domain_events.names import check_name
from domain_events.settings import ConnectionSettings
from domain_events.text import printable

if TYPE_CHECKING:
    from domain_events.cli.moving import Bindings

# Seconds between two lines of progress.
_INTERVAL = 5.0


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of both commands."""
    for option in (
        click.argument("targets", nargs=-1, metavar="[PACKAGE.MODULE:SUBSCRIBER]..."),
        click.option(
            "--binding-key",
            "binding_keys",
            multiple=True,
            metavar="KEY",
            help="A key by which the queue is bound; for each of them. They can be left out where "
            "a subscriber is named, or the broker's bindings can be read.",
        ),
        click.option(
            "--held-for",
            type=Number(min=0),
            metavar="SECONDS",
            help="The longest that a process holds an event. Only where the broker's statistics "
            "cannot be read. Without consumers: 30.",
        ),
        click.option(
            "--wait",
            "patience",
            type=Number(min=0, min_open=True),
            default=600.0,
            show_default=True,
            metavar="SECONDS",
            help="Stop when it has made no progress for so long.",
        ),
        click.option(
            "--stale", is_flag=True, help="Events by other keys are left from removed bindings."
        ),
        click.option(
            "--dry-run", is_flag=True, help="Show the stage and the plan, change nothing."
        ),
        management_option,
        json_option,
        exchange_option,
        timeout_option,
        broker_option,
    ):
        command = option(command)
    return command


@click.command("migrate")
@click.argument("name")
@_options
def command(name: str, **options: Any) -> int:
    """Turn the classic queue of subscriber NAME into a quorum queue, in operation.

    Publishers and consumers go on. If it is killed, or stops, run it again: it goes on. The
    processes of the subscriber must use queue_type='classic' until it is done;
    docs/operating-migrate.rst has the steps of a deployment.
    """
    return _run(name, None, **options)


@click.command("rename")
@click.argument("name", metavar="OLD")
@click.argument("new", metavar="NEW")
@_options
def rename(name: str, new: str, **options: Any) -> int:
    """Give subscriber OLD the name NEW: move its events, retries and dead letters.

    Run it, then deploy the processes with the new name; it ends when those with the old name have
    ended. If it is killed, or stops, run it again: it goes on.
    """
    return _run(name, new, **options)


def _run(
    name: str,
    new: str | None,
    *,
    targets: Sequence[str],
    binding_keys: Sequence[str],
    held_for: float | None,
    patience: float,
    stale: bool,
    dry_run: bool,
    management: str | None,
    as_json: bool,
    exchange: str,
    timeout: float,
    broker: ConnectionSettings,
) -> int:
    from domain_events.broker.rabbitmq import topology  # noqa: PLC0415 - quick help
    from domain_events.broker.rabbitmq.administration import Administration  # noqa: PLC0415
    from domain_events.cli import management as sources  # noqa: PLC0415
    from domain_events.cli import migration, moving, renaming  # noqa: PLC0415

    for each in filter(None, (name, new)):
        check_name(each, "subscriber", exchange)
    if name == new:
        raise click.UsageError("OLD and NEW are the same.")
    names = [name] if new is None else [name, new]
    given = {(exchange, key) for key in binding_keys}
    given |= moving.registered_keys(targets, names)

    show = _Show(name, as_json)
    with Administration(broker, timeout=timeout) as administration:
        kind = migration.Migration if new is None else partial(renaming.Renaming, new)
        work: moving.Work = kind(
            administration,
            name,
            exchange,
            report=show.step,
            watch=show.progress,
            timeout=timeout,
            patience=patience,
            stale=stale,
        )
        stage = work.stage()
        if stage is not moving.Stage.DONE:
            source, reasons = sources.find(management, administration.urls, administration.cluster)
            others = [new] if new else [topology.Moving(name).waiting.name]
            bindings = moving.find_bindings(
                administration, name, others, exchange, given, source, reasons
            )
            unheld = moving.Unheld(source, held_for)
            work.check(unheld)
            for line in (*bindings.remarks, *work.check_policies(source)):
                remark(line)
            if dry_run:
                show.plan(stage.value, bindings, work.plan(stage))
                return exits.OK
            try:
                work.run(bindings, unheld)
            except moving.Stopped as error:
                remark(f"domain-events: {printable(error, 1000)}")
                return exits.PARTIAL
    show.done(new)
    return exits.OK


class _Show:
    """Prints what is done: lines for a person to stderr, or JSON lines."""

    def __init__(self, name: str, as_json: bool) -> None:
        self._name = name
        self._as_json = as_json
        self._shown_at = time.monotonic()

    def step(self, line: str) -> None:
        if self._as_json:
            record({"subscriber": self._name, "step": line})
        else:
            remark(line)

    def progress(self, what: str, left: int) -> None:
        """Not more often than every few seconds."""
        now = time.monotonic()
        if now - self._shown_at < _INTERVAL:
            return
        self._shown_at = now
        if self._as_json:
            record({"subscriber": self._name, "doing": what, "left": left})
        else:
            remark(f"{what}: {left:,} left")

    def plan(self, stage: str, bindings: Bindings, steps: Sequence[str]) -> None:
        if self._as_json:
            record(
                {
                    "subscriber": self._name,
                    "stage": stage,
                    "bindings": [
                        {"exchange": exchange, "binding_key": key}
                        for exchange, key in bindings.keys
                    ],
                    "read_from_the_broker": bindings.read,
                    "steps": list(steps),
                }
            )
            return
        click.echo(f"Stage: {stage}")
        where = "read from the broker" if bindings.read else "as named"
        click.echo(f"Bindings ({where}):")
        for exchange, key in bindings.keys:
            click.echo(f"  {printable(exchange)}  {printable(key)}")
        click.echo("To do:")
        for number, step in enumerate(steps, 1):
            click.echo(f"  {number}. {printable(step, 400)}")

    def done(self, new: str | None) -> None:
        if self._as_json:
            record({"subscriber": self._name, "stage": "done"})
        elif new is None:
            remark(
                f"{self._name}: done; its queue is a quorum queue. Now deploy the release without "
                "queue_type='classic'."
            )
        else:
            remark(f"{self._name}: done; everything of it belongs to {new}.")
