"""``domain-events relay`` and ``domain-events outbox``: for outboxes of SQLAlchemy.

Django's projects have ``manage.py relay_domain_events`` and ``manage.py parked_domain_events``,
which know the settings.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from domain_events.cli import exits, options, output
from domain_events.cli.app import Terminated
from domain_events.cli.lines import record_of
from domain_events.cli.targets import load
from domain_events.errors import ConfigurationError, DomainEventsError, InvalidEvent
from domain_events.log import Log
from domain_events.outbox import INBOX, Parked, prune
from domain_events.settings import ConnectionSettings
from domain_events.text import printable

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from domain_events.sqlalchemy import Outbox

log = Log("domain_events.outbox")

# Seconds between two prunings of the inbox, and between two of its batches.
_PRUNE_EVERY = 3600.0
_BETWEEN_BATCHES = 0.1
_PRUNED_AT_ONCE = 1000
_LISTED_AT_ONCE = 100

_TARGET_HELP = (
    "TARGET is package.module:outbox - an Outbox, an Engine, or a function that returns one -, a "
    "database's URL as SQLAlchemy takes it, or env:NAME for the URL in an environment variable, "
    "where no list of processes shows its password. For Django: manage.py relay_domain_events and "
    "manage.py parked_domain_events."
)


class DatabaseError(click.ClickException):
    """The database cannot be used."""

    exit_code = exits.DATABASE


# --- the relay -----------------------------------------------------------------------------------


@click.command("relay", epilog=_TARGET_HELP)
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--once", is_flag=True, help="Send what is there now, and end.")
@click.option("--status", is_flag=True, help="Show how many wait, and end; nothing is sent.")
@click.option(
    "--batch",
    type=click.IntRange(1, 10_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="Rows to lease at a time.",
)
@click.option(
    "--idle",
    type=options.Number(min=0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks at an outbox without events.",
)
@click.option("--no-prune", is_flag=True, help="Leave old notes in the inbox.")
@options.json_option
@options.broker_option
@options.timeout_option
def relay(
    targets: Sequence[str],
    once: bool,
    status: bool,
    batch: int,
    idle: float,
    no_prune: bool,
    as_json: bool,
    broker: ConnectionSettings,
    timeout: float,
) -> int | None:
    """Send the events that are in outboxes, and those that come, until SIGTERM or Ctrl-C.

    Any number of these may run. Processes send what they have written themselves, as soon as it is
    committed; this sends what they leave behind. Old notes of an inbox in the same database are
    deleted, once an hour, where TARGET is a URL or an Engine; where it is an Outbox, once() does
    that.
    """
    if once and status:
        raise click.UsageError("--once and --status exclude each other.")
    if not status:
        options.rabbitmq(broker)
    outboxes = [_Target(target) for target in targets]
    if status:
        _show(outboxes, as_json)
        return None
    # A relay's timeout must be shorter than its lease.
    relaying = [
        each.outbox.relay(broker, batch=batch, idle=idle, timeout=min(timeout, 50.0))
        for each in outboxes
    ]
    with ExitStack() as stack:
        for each in relaying:
            stack.enter_context(each)
        if once:
            return _sweep(outboxes, [each.sweep for each in relaying], as_json)
        try:
            for each in relaying:
                each.start()
            output.remark(f"Relaying: {', '.join(each.name for each in outboxes)}.")
            while True:
                for target in () if no_prune else outboxes:
                    target.prune()
                threading.Event().wait(_PRUNE_EVERY)
        except (KeyboardInterrupt, Terminated):
            for each in relaying:
                each.stop()  # all of them, before the first one is waited for
    return None


def _show(outboxes: Sequence[_Target], as_json: bool) -> None:
    rows = []
    for each in outboxes:
        with _database_errors(each.name):
            found = each.outbox.status()
        rows.append((each.name, found.waiting, found.oldest, found.parked))
    if as_json:
        for name, waiting, oldest, parked in rows:
            output.record({"outbox": name, "waiting": waiting, "oldest": oldest, "parked": parked})
        return
    output.table(
        ("outbox", "waiting", "oldest", "parked"),
        [(name, waiting, f"{oldest:.0f} s", parked) for name, waiting, oldest, parked in rows],
    )


def _sweep(outboxes: Sequence[_Target], sweeps: Sequence[Callable[[], int]], as_json: bool) -> int:
    """Sweep all of them, also after one that fails; the status is that of the first failure."""
    status = exits.OK
    for each, sweep in zip(outboxes, sweeps, strict=True):
        try:
            with _database_errors(each.name):
                sent = sweep()
        except (DomainEventsError, DatabaseError) as error:
            failed = exits.of(error) if isinstance(error, DomainEventsError) else exits.DATABASE
            status = status or failed
            output.remark(f"{each.name}: {printable(error, 1000)}")
        else:
            if as_json:
                output.record({"outbox": each.name, "sent": sent})
            else:
                click.echo(f"{each.name}: {sent:,} sent")
    return status


# --- parked events -------------------------------------------------------------------------------


@click.group("outbox", epilog=_TARGET_HELP)
def commands() -> None:
    """List, retry, discard parked events of an outbox.

    Parked are those that the broker refuses, or that cannot be sent. Each holds up later events of
    its own object, until it is retried or discarded.
    """


@commands.command("list", epilog=_TARGET_HELP)
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Of each, only the oldest N."
)
@options.json_option
def list_parked(targets: Sequence[str], limit: int | None, as_json: bool) -> None:
    """List parked events, the oldest first."""
    rows: list[tuple[object, ...]] = []
    for each in map(_Target, targets):
        for parked in _parked(each, limit):
            if as_json:
                output.record(_record(each.name, parked))
            else:
                row = parked.row
                since = datetime.fromtimestamp(parked.parked, timezone.utc)
                rows.append(
                    (
                        *([each.name] if len(targets) > 1 else []),
                        parked.id,
                        f"{since:%Y-%m-%d %H:%M:%S}",
                        row.routing_key,
                        row.event_id,
                        row.object_key,
                        parked.error,
                    )
                )
    if not as_json:
        columns = ("id", "parked (UTC)", "routing key", "event", "object", "error")
        output.table((*(["outbox"] if len(targets) > 1 else []), *columns), rows)


@commands.command("retry", epilog=_TARGET_HELP)
@click.argument("target")
@click.argument("ids", nargs=-1, type=int, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All that are parked.")
def retry(target: str, ids: Sequence[int], everything: bool) -> int:
    """Let parked events be sent again, after what was wrong has been put right."""
    if everything == bool(ids):
        raise click.UsageError("Give the ids that `outbox list` shows, or --all.")
    found = _Target(target)
    with _database_errors(found.name):
        number = found.outbox.retry(None if everything else ids)
    output.remark(f"{number:,} to be sent again by the next relay.")
    return _all_of(ids, number)


@commands.command("discard", epilog=_TARGET_HELP)
@click.argument("target")
@click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def discard(target: str, ids: Sequence[int], yes: bool) -> int:
    """Delete parked events, for good: they are never sent, and later ones of their objects are.

    Prints them, as lines that publish --lines reads.
    """
    found = _Target(target)
    output.confirm(f"Delete {len(set(ids)):,} parked events of {found.name}?", yes=yes)
    wanted = sorted(set(ids))
    with _database_errors(found.name):
        rows = [each for one in wanted for each in found.outbox.parked(1, one - 1)]
        # Printed before they are deleted: whatever happens in between, they are somewhere.
        for each in (each for each in rows if each.id in wanted):
            try:
                output.record(record_of(each.event))
            except InvalidEvent:
                click.echo(printable(each.row.body, len(each.row.body)))
        number = len(found.outbox.discard(wanted))
    output.remark(f"{number:,} deleted.")
    return _all_of(ids, number)


def _all_of(ids: Sequence[int], number: int) -> int:
    if number < len(set(ids)):
        output.remark("The others of these ids are not parked.")
        return exits.PARTIAL
    return exits.OK


def _parked(target: _Target, limit: int | None) -> Iterator[Parked]:
    after, left = 0, limit
    while left is None or left > 0:
        most = _LISTED_AT_ONCE if left is None else min(_LISTED_AT_ONCE, left)
        with _database_errors(target.name):
            found = target.outbox.parked(most, after)
        yield from found
        if len(found) < most:
            return
        after = found[-1].id
        left = None if left is None else left - len(found)


def _record(name: str, parked: Parked) -> dict[str, Any]:
    try:
        event: Any = record_of(parked.event)
    except InvalidEvent:
        event = parked.row.body
    return {
        "outbox": name,
        "id": parked.id,
        "created": parked.created,
        "parked": parked.parked,
        "exchange": parked.row.exchange,
        "error": parked.error,
        "event": event,
    }


# --- targets -------------------------------------------------------------------------------------


class _Target:
    """An outbox of the command line.

    :raises ConfigurationError: it has no table, or is something else.
    :raises DatabaseError: its database cannot be used.
    """

    def __init__(self, target: str) -> None:
        self.outbox, self._engine = _found(target)
        self.name = printable(repr(self.outbox)).removeprefix("<Outbox in ").removesuffix(">")
        with _database_errors(self.name):
            self.outbox.validate()

    def prune(self) -> None:
        """Delete old notes of the inbox; what prevents that is logged."""
        if self._engine is None:
            return
        from sqlalchemy import inspect  # noqa: PLC0415 - an extra of its own

        from domain_events.sqlalchemy.outbox import executing  # noqa: PLC0415

        pause = threading.Event()
        try:
            if not inspect(self._engine).has_table(INBOX):
                return
            while True:
                with self._engine.begin() as connection:
                    number = prune(
                        executing(connection), self._engine.dialect.name, most=_PRUNED_AT_ONCE
                    )
                if number < _PRUNED_AT_ONCE:
                    return
                pause.wait(_BETWEEN_BATCHES)
        except Exception as error:  # noqa: BLE001 - of any driver; the relay goes on
            log.warning(
                "The inbox in %s cannot be pruned; it is tried again later. %s",
                self.name,
                _first_line(error),
            )


def _found(target: str) -> tuple[Outbox, Engine | None]:
    try:
        from sqlalchemy import Engine, create_engine  # noqa: PLC0415
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError  # noqa: PLC0415

        from domain_events.sqlalchemy import Outbox  # noqa: PLC0415
    except ImportError:
        raise click.UsageError(
            "Outboxes need SQLAlchemy: pip install 'domain-events-rabbitmq[cli,sqlalchemy]'"
        ) from None
    url = _url_in(target)
    if url is None:
        found = load(target, (Outbox, Engine), "an Outbox or an Engine")
        return (found, None) if isinstance(found, Outbox) else (Outbox(found), found)
    try:
        engine = create_engine(url)
    except (ArgumentError, NoSuchModuleError):
        raise click.UsageError(
            "A database's URL is not one that SQLAlchemy knows; it is like "
            "postgresql+psycopg://user@host/database."
        ) from None
    except ImportError as error:
        raise click.UsageError(
            f"The driver for this database is not installed: {printable(error)}"
        ) from None
    file = engine.url.database if engine.dialect.name == "sqlite" else None
    if file and not file.startswith(("file:", ":memory:")) and not Path(file).exists():
        # A connection would make it.
        raise DatabaseError(f"{printable(engine.url)}: there is no file {printable(file)}.")
    return Outbox(engine), engine


def _url_in(target: str) -> str | None:
    """The database's URL, if the target is one, or names the variable that has it."""
    scheme, colon, name = target.partition(":")
    if scheme == "env" and colon:
        value = os.environ.get(name, "").strip()
        if not value:
            raise ConfigurationError(f"The environment variable {printable(name)} is not set.")
        return value
    return target if "://" in target else None


@contextmanager
def _database_errors(name: str) -> Iterator[None]:
    """An error of the database in one line."""
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415 - an extra of its own

    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        raise DatabaseError(f"{name} cannot be used: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    return printable(str(cause).strip().partition("\n")[0], 300)
