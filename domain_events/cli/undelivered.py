"""``undelivered``: retries whose subscriber's queue was gone when they were due."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from domain_events.cli import archive, output
from domain_events.cli.choosing import (
    Choice,
    acting_options,
    approved,
    choice_options,
    place_of,
    rate_option,
    status_of,
    walked,
    when,
)
from domain_events.cli.dead_letters import default_path, discard_all
from domain_events.cli.options import (
    broker_option,
    exchange_option,
    json_option,
    timeout_option,
)
from domain_events.cli.pace import Pace
from domain_events.cli.selection import Selection
from domain_events.settings import ConnectionSettings
from domain_events.undelivered import Undelivered, UndeliveredEvent

_COLUMNS = ("EVENT OF", "SUBSCRIBER", "ROUTING KEY", "RETRIES", "ID")


@click.group("undelivered")
def commands() -> None:
    """Retries whose subscriber's queue was gone when they were due: list, return, discard.

    They wait for somebody to decide, since a subscriber that was deleted may come back.
    """


@commands.command("list")
@choice_options(errors=False)
@json_option
@exchange_option
@broker_option
@timeout_option
def list_events(
    choice: Choice, as_json: bool, exchange: str, broker: ConnectionSettings, timeout: float
) -> None:
    """List them, the oldest first."""
    with Undelivered(exchange, broker, timeout=timeout) as undelivered:
        entries = choice.of(walked(undelivered, undelivered, exchange))
        if not as_json:
            _print(entries)
            return
        for entry in entries:
            output.record(archive.as_json(entry, entry.subscriber))


def _print(entries: Iterator[UndeliveredEvent]) -> int:
    rows = [
        (when(each), each.subscriber, each.routing_key, each.delivery.retries, each.id)
        for each in entries
    ]
    output.table(_COLUMNS, rows)
    return len(rows)


@commands.command("return")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@choice_options(errors=False)
@acting_options
@rate_option
@exchange_option
@broker_option
@timeout_option
def return_events(
    names: Sequence[str],
    choice: Choice,
    dry_run: bool,
    yes: bool,
    rate: float | None,
    exchange: str,
    broker: ConnectionSettings,
    timeout: float,
) -> int:
    """Return them to their subscribers.

    To the queue of each subscriber NAME, which must have registered again.
    """
    with Undelivered(exchange, broker, timeout=timeout) as undelivered:

        def theirs() -> Iterator[UndeliveredEvent]:
            entries = walked(undelivered, undelivered, exchange)
            return (each for each in entries if each.subscriber in names)

        if dry_run:
            number = _print(choice.of(theirs()))
            output.remark(f"{number:,} would be returned; nothing was changed.")
            return status_of(choice, number)
        wanted: Choice | None = choice
        if not yes:
            wanted = approved(choice, undelivered, theirs, "Return", place_of(undelivered))
        if wanted is None:
            return status_of(choice, 0)
        if wanted.newest:
            ids = frozenset(each.id for each in wanted.of(theirs()) if each.id is not None)
            # With this limit, since no ids at all would choose everything.
            wanted = Choice(Selection(ids=ids), len(ids))
        number = undelivered.hand_back_all(names, _is_chosen(wanted, Pace(rate)))
        output.remark(f"{number:,} returned.")
    return status_of(choice, number)


def _is_chosen(choice: Choice, pace: Pace) -> Callable[[UndeliveredEvent], bool]:
    """Whether an event is among the first that are chosen, as soon as it is its turn."""
    left = choice.limit

    def check(entry: UndeliveredEvent) -> bool:
        nonlocal left
        if left == 0 or not choice.selection(entry):
            return False
        if left is not None:
            left -= 1
        pace.step()
        return True

    return check


@commands.command()
@choice_options(errors=False)
@acting_options
@click.option(
    "--to",
    "path",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Add the copies to this file; if left out, to EXCHANGE-undelivered-TIME.jsonl here.",
)
@click.option("--no-copy", is_flag=True, help="Keep no copy.")
@exchange_option
@broker_option
@timeout_option
def discard(
    choice: Choice,
    dry_run: bool,
    yes: bool,
    path: Path | None,
    no_copy: bool,
    exchange: str,
    broker: ConnectionSettings,
    timeout: float,
) -> int:
    """Delete them, and keep a copy.

    Each is deleted after its copy is on the disk; `dead-letters import` reads the copies.
    """
    if path and no_copy:
        raise click.UsageError("--to and --no-copy exclude each other.")
    with Undelivered(exchange, broker, timeout=timeout) as undelivered, ExitStack() as stack:

        def entries() -> Iterator[UndeliveredEvent]:
            return walked(undelivered, undelivered, exchange)

        if dry_run:
            number = _print(choice.of(entries()))
            output.remark(f"{number:,} would be discarded; nothing was changed.")
            return status_of(choice, number)
        wanted: Choice | None = choice
        if not yes:
            wanted = approved(choice, undelivered, entries, "Discard", place_of(undelivered))
        if wanted is None:
            return status_of(choice, 0)
        copies = None
        if not no_copy:
            target = path or default_path(exchange, "undelivered")
            copies = stack.enter_context(archive.Archive(target))
        number = discard_all(
            undelivered,
            wanted.of(entries()),
            lambda each: archive.entry(each, each.subscriber),
            copies,
        )
        where = f"; a copy is in {copies.path}" if copies is not None and number else ""
        output.remark(f"{number:,} discarded{where}.")
    return status_of(choice, number)
