"""``dead-letters``: list, show, replay, discard, export and import what subscribers failed on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import IO, Any

import click

from domain_events.cli import archive, exits, output
from domain_events.cli.choosing import (
    COLUMNS,
    AnyLetter,
    Choice,
    acting_options,
    approved,
    choice_options,
    rate_option,
    row,
    status_of,
    walked,
    when,
)
from domain_events.cli.importing import Import
from domain_events.cli.options import (
    InputFile,
    Number,
    broker_option,
    json_option,
    timeout_option,
)
from domain_events.cli.replaying import Replay
from domain_events.cli.selection import KEYS, grouped
from domain_events.dead_letters import DeadLetter, DeadLetters
from domain_events.settings import ConnectionSettings
from domain_events.text import printable
from domain_events.walks import Walks

# So many are copied to the file before they are deleted, or so many bytes.
_MOST_IN_A_COPY, _MOST_BYTES_IN_A_COPY = 100, 2**20

names_argument = click.argument("names", metavar="NAME...", nargs=-1, required=True)


@click.group("dead-letters")
def commands() -> None:
    """What subscribers failed on: list, show, replay, discard, export, import.

    NAME is the name of a subscriber. Nothing but replay and discard removes a dead letter; both
    ask first. Whenever a command is interrupted, what it held is given back.
    """


@commands.command("list")
@names_argument
@choice_options()
@click.option(
    "--group-by",
    metavar="KEYS",
    help=f"Count them by these, separated by commas: {', '.join(KEYS)}.",
)
@json_option
@broker_option
@timeout_option
def list_letters(
    names: Sequence[str],
    choice: Choice,
    group_by: str | None,
    as_json: bool,
    broker: ConnectionSettings,
    timeout: float,
) -> None:
    """List the dead letters of each NAME, the oldest first."""
    keys = _keys(group_by)
    letters = _chosen(names, choice, broker, timeout)
    if keys:
        groups = grouped((letter for _, letter in letters), keys)
        if as_json:
            for group in groups:
                times = {"count": group.count, "oldest": group.oldest, "newest": group.newest}
                output.record({**dict(zip(keys, group.values, strict=True)), **times})
            return
        columns = [*(key.upper().replace("-", " ") for key in keys), "COUNT", "OLDEST", "NEWEST"]
        output.table(
            columns,
            (
                (*group.values, group.count, *map(_local, (group.oldest, group.newest)))
                for group in groups
            ),
        )
    elif as_json:
        for name, letter in letters:
            output.record(archive.as_json(letter, name))
    else:
        # All of them first: a reader that pauses must not keep them from others.
        output.table(COLUMNS, [row(letter, name) for name, letter in letters])


def _keys(group_by: str | None) -> list[str]:
    keys = group_by.split(",") if group_by else []
    if unknown := [key for key in keys if key not in KEYS]:
        raise click.UsageError(
            f"--group-by: {printable(unknown[0])!r} is not one of {', '.join(KEYS)}."
        )
    return keys


def _local(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone().isoformat(" ", "seconds")


def _chosen(
    names: Sequence[str], choice: Choice, broker: ConnectionSettings, timeout: float
) -> Iterator[tuple[str, DeadLetter]]:
    for name in names:
        with DeadLetters(name, broker, timeout=timeout) as dead_letters:
            for letter in choice.of(walked(dead_letters, dead_letters, name)):
                yield name, letter


# --- show ----------------------------------------------------------------------------------------


@commands.command()
@click.argument("name")
@click.argument("only", metavar="[ID]...", nargs=-1)
@choice_options(limit=1)
@click.option(
    "--interactive", "-i", is_flag=True, help="Ask after each one: replay, discard, leave, quit."
)
@click.option(
    "--to",
    "path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="With --interactive: the file for copies of what is discarded.",
)
@json_option
@broker_option
@timeout_option
def show(
    name: str,
    only: Sequence[str],
    choice: Choice,
    interactive: bool,
    path: Path | None,
    as_json: bool,
    broker: ConnectionSettings,
    timeout: float,
) -> int:
    """Show all of a dead letter.

    The event, its headers, the errors and the traceback; by default of the oldest one.
    """
    source = click.get_current_context().get_parameter_source("limit")
    if source is click.core.ParameterSource.DEFAULT and not choice.newest and (only or interactive):
        choice = replace(choice, limit=None)  # all of them
    if only:
        ids = choice.selection.ids | set(only)
        choice = replace(choice, selection=replace(choice.selection, ids=ids))
    if not interactive:
        found = False
        for _, letter in _chosen([name], choice, broker, timeout):
            found = True
            if as_json:
                output.record(archive.as_json(letter, name))
            else:
                click.echo("\n".join(_shown(letter, name)) + "\n")
        if not found:
            output.remark(f"Nothing matches among the dead letters of {printable(name)}.")
        return exits.OK if found else exits.PARTIAL
    if not sys.stdin.isatty():
        raise click.UsageError("--interactive needs a terminal.")
    with (
        DeadLetters(name, broker, timeout=timeout) as dead_letters,
        archive.Archive(path or default_path(name)) as copies,
    ):
        _ask_about_each(choice.of(dead_letters), name, copies)
    return exits.OK


def _ask_about_each(letters: Iterator[DeadLetter], name: str, copies: archive.Archive) -> None:
    for letter in letters:
        click.echo("\n".join(_shown(letter, name)))
        answer = click.prompt(
            "replay, discard, leave, quit",
            type=click.Choice(["r", "d", "l", "q"]),
            default="l",
            err=True,
        )
        if answer == "r":
            letter.replay()
            output.remark("Replayed.")
        elif answer == "d":
            copies.add([archive.entry(letter, name)])
            letter.discard()
            output.remark(f"Discarded; a copy is in {copies.path}.")
        elif answer == "q":
            return
        click.echo()
    output.remark(f"These were all of {name}.")


def _shown(letter: DeadLetter, name: str) -> Iterator[str]:
    """The lines that show it."""
    delivery = letter.delivery
    first = None
    if letter.first_error_type is not None:
        first = f"{letter.first_error_type}: {letter.first_error_message}"
    fields = {
        "subscriber": name,
        "id": letter.id,
        "routing key": letter.routing_key,
        "failed at": when(letter) if letter.failed_at else None,
        "on host": letter.host,
        "error": f"{letter.error_type}: {letter.error_message}" if letter.error_type else None,
        "first error": first,
        "retries": letter.retries,
        "replays": letter.replays,
        "published by": delivery.app_id,
        "correlation id": delivery.correlation_id,
        "caused by": delivery.cause,
        "version": delivery.version,
    }
    for label, value in fields.items():
        if value is not None:
            yield f"{label + ':':<16}{printable(value, 2000)}"
    for header, value in delivery.foreign_headers.items():
        yield f"{'header:':<16}{printable(header)} = {printable(value, 2000)}"
    if letter.event is None:
        text = printable(letter.body, 500)
        yield f"{'body:':<16}{len(letter.body):,} bytes that are not an event: {text}"
    else:
        yield f"{'data:':<16}{printable(_data(letter.event.data), 10_000)}"
    for line in (letter.traceback or "").splitlines():
        yield f"    {printable(line, 1000)}"


def _data(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, default=str)


# --- replay and discard --------------------------------------------------------------------------


@commands.command()
@names_argument
@choice_options()
@acting_options
@rate_option
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    metavar="N",
    help="At most so many before it looks whether they fail again.",
)
@click.option(
    "--stop-after-failures",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="Stop when so many have failed again; 0: never.",
)
@click.option(
    "--patience",
    type=Number(min=0),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait after a batch for the subscriber to take its events.",
)
@json_option
@broker_option
@timeout_option
def replay(
    names: Sequence[str],
    choice: Choice,
    dry_run: bool,
    yes: bool,
    rate: float | None,
    batch: int,
    stop_after_failures: int,
    patience: float,
    as_json: bool,
    broker: ConnectionSettings,
    timeout: float,
) -> int:
    """Return dead letters to their subscriber.

    The oldest first. Begins with one event, then two, four and so on; after each batch it looks
    which of them are dead letters again, and stops when these are too many (exit status 3).
    """
    if dry_run:
        return _dry_run("replayed", names, choice, broker, timeout)
    found = 0
    for name in names:
        with DeadLetters(name, broker, timeout=timeout) as dead_letters:
            wanted = _approved(dead_letters, choice, "Replay", yes=yes)
            if wanted is None:
                continue
            total = wanted.limit if sys.stderr.isatty() else None
            with output.progress(f"replaying {name}", total) as bar:
                replaying = Replay(
                    dead_letters,
                    rate=rate,
                    batch=batch,
                    stop_after=stop_after_failures,
                    patience=patience,
                    on_replayed=lambda: None if bar is None else bar.advance(bar.task_ids[0]),
                )
                try:
                    replaying.run(partial(_rest, wanted, replaying))
                except BaseException:
                    output.remark(f"{name}: {replaying.result.number:,} replayed.")
                    raise
        if _report(name, replaying, as_json=as_json):
            return exits.PARTIAL
        found += replaying.result.number
    return status_of(choice, found)


def _rest(wanted: Choice, replaying: Replay, letters: Iterable[DeadLetter]) -> Iterator[DeadLetter]:
    return wanted.less(replaying.result.number).of(letters)


def _report(name: str, replaying: Replay, *, as_json: bool) -> bool:
    """Say what became of it; returns whether it was stopped."""
    result = replaying.result
    again = len(result.failed_again)
    if as_json:
        output.record(
            {
                "subscriber": name,
                "replayed": result.number,
                "failed_again": result.failed_again,
                "waiting": result.waiting,
                "stopped": result.stopped,
            }
        )
    text = f"{name}: {result.number:,} replayed"
    if again:
        kinds = ", ".join(sorted(set(result.failed_again.values())))
        text += f"; {again:,} of them failed again ({printable(kinds)})"
    if result.stopped:
        text += ". Stopped, the rest is left: mend the cause, then replay them"
    elif result.waiting:
        text += f"; {result.waiting:,} wait in its queue (is the subscriber running?)"
    output.remark(f"{text}.")
    return result.stopped


@commands.command()
@names_argument
@choice_options()
@acting_options
@click.option(
    "--to",
    "path",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Add the copies to this file; if left out, to NAME-dead-letters-TIME.jsonl here.",
)
@click.option("--no-copy", is_flag=True, help="Keep no copy.")
@broker_option
@timeout_option
def discard(
    names: Sequence[str],
    choice: Choice,
    dry_run: bool,
    yes: bool,
    path: Path | None,
    no_copy: bool,
    broker: ConnectionSettings,
    timeout: float,
) -> int:
    """Delete dead letters, and keep a copy.

    Each is deleted after its copy is on the disk; `import` reads the copies.
    """
    if path and no_copy:
        raise click.UsageError("--to and --no-copy exclude each other.")
    if dry_run:
        return _dry_run("discarded", names, choice, broker, timeout)
    found = 0
    for name in names:
        with DeadLetters(name, broker, timeout=timeout) as dead_letters, ExitStack() as stack:
            wanted = _approved(dead_letters, choice, "Discard", yes=yes)
            if wanted is None:
                continue
            copies = None
            if not no_copy:
                copies = stack.enter_context(archive.Archive(path or default_path(name)))
            letters = wanted.of(walked(dead_letters, dead_letters, f"discarding {name}"))
            number = discard_all(dead_letters, letters, partial(archive.entry, queue=name), copies)
        where = f"; a copy is in {copies.path}" if copies is not None and number else ""
        output.remark(f"{name}: {number:,} discarded{where}.")
        found += number
    return status_of(choice, found)


def discard_all(
    walks: Walks,
    letters: Iterable[AnyLetter],
    entry: Callable[[AnyLetter], dict[str, Any]],
    copies: archive.Archive | None,
) -> int:
    """Delete them, each one after its copy is on the disk. Returns how many.

    When it is interrupted, it prints how many.
    """
    number = size = 0
    batch: list[AnyLetter] = []

    def settle() -> None:
        nonlocal number, size
        if copies is not None:
            copies.add(map(entry, batch))
        number += walks.discard_many(batch)
        batch.clear()
        size = 0

    try:
        for letter in letters:
            batch.append(letter)
            size += len(letter.body)
            if len(batch) >= _MOST_IN_A_COPY or size >= _MOST_BYTES_IN_A_COPY:
                settle()
        if batch:
            settle()
    except BaseException:
        if number:
            where = f"; a copy is in {printable(copies.path)}" if copies is not None else ""
            output.remark(f"{number:,} discarded{where}.")
        raise
    return number


def default_path(name: str, what: str = "dead-letters") -> Path:
    """Where copies go, if nobody has named a file."""
    safe = "".join(each if each.isalnum() or each in "-_." else "_" for each in name)
    return Path(f"{safe}-{what}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.jsonl").absolute()


def _approved(
    dead_letters: DeadLetters, choice: Choice, question: str, *, yes: bool
) -> Choice | None:
    if yes:
        return choice
    name = dead_letters.name
    return approved(
        choice,
        dead_letters,
        lambda: walked(dead_letters, dead_letters, name),
        question,
        f"the dead letters of {name}",
    )


def _dry_run(
    done: str, names: Sequence[str], choice: Choice, broker: ConnectionSettings, timeout: float
) -> int:
    rows = [row(letter, name) for name, letter in _chosen(names, choice, broker, timeout)]
    output.table(COLUMNS, rows)
    output.remark(f"{len(rows):,} would be {done}; nothing was changed.")
    return status_of(choice, len(rows))


# --- export and import ---------------------------------------------------------------------------


@commands.command("export")
@names_argument
@choice_options()
@click.option(
    "--to",
    "path",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A new file; if left out, stdout.",
)
@broker_option
@timeout_option
def export(
    names: Sequence[str],
    choice: Choice,
    path: Path | None,
    broker: ConnectionSettings,
    timeout: float,
) -> int:
    """Write copies as JSON lines.

    The dead letters are left where they are.
    """
    letters = _chosen(names, choice, broker, timeout)
    if path is None:
        for name, letter in letters:
            output.record(archive.entry(letter, name))
        return exits.OK
    if path.exists():
        raise click.UsageError(f"{path} exists; name a new file.")
    number = 0
    # Under its name it is complete.
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    with archive.Archive(part.absolute()) as copies:
        batch: list[dict[str, Any]] = []
        for name, letter in letters:
            batch.append(archive.entry(letter, name))
            number += 1
            if len(batch) >= _MOST_IN_A_COPY or len(letter.body) >= _MOST_BYTES_IN_A_COPY:
                copies.add(batch)
                batch.clear()
        copies.add(batch)
    part.rename(path)
    output.remark(f"{number:,} copied to {path}.")
    return exits.OK


@commands.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=InputFile())
@click.option("--subscriber", metavar="NAME", help="Whose they become; else whose they were.")
@click.option("--replay", is_flag=True, help="Into the queue of the subscriber, to be handled.")
@json_option
@broker_option
@timeout_option
def import_letters(
    files: Sequence[IO[bytes]],
    subscriber: str | None,
    replay: bool,
    as_json: bool,
    broker: ConnectionSettings,
    timeout: float,
) -> int:
    """Make dead letters of copies again.

    Of those in each FILE; - is stdin. Those whose ids are among the dead letters already are left
    out, so that an import can be repeated after an interruption.
    """
    where, broken = "", 0

    def copies() -> Iterator[dict[str, Any] | None]:
        nonlocal where
        for file in files:
            for line, saved in output.tracked(archive.read(file), "importing", None):
                where = f"{printable(file.name)}:{line}"
                yield saved

    def report(event_id: str | None, what: str) -> None:
        nonlocal broken
        if event_id is None and what != "imported":
            broken += 1
            output.remark(f"{where} was left out: {printable(what)}")
        elif as_json:
            output.record({"id": event_id, "is": what})

    importing = Import(broker, timeout, subscriber=subscriber, replay=replay, report=report)
    try:
        importing.run(copies())
    finally:
        numbers = importing.number, importing.skipped
        output.remark("{:,} imported; {:,} there already.".format(*numbers))
    return exits.PARTIAL if broken else exits.OK
