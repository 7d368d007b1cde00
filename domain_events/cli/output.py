"""What commands print: tables for people, JSON lines for programs, remarks to stderr.

Text of events and of the broker is foreign: it is shown by `printable`, so that it cannot move a
terminal's cursor. On a terminal a table has lines and colours; elsewhere it has one row on each
line, with tabs between its fields.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from domain_events.text import printable

Item = TypeVar("Item")

#: Columns whose values are not broken into lines.
_WHOLE = {"id", "event"}
# The longest other values that are not broken into lines.
_UNBROKEN = 28


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under these columns."""
    if not sys.stdout.isatty():
        click.echo("\t".join(columns))
        for row in rows:
            click.echo("\t".join(_cell(value) for value in row))
        return
    console = Console()
    cells = [[_cell(value) for value in row] for row in rows]
    drawn = Table(box=box.SIMPLE_HEAD, header_style="bold")
    needed = 0
    for number, name in enumerate(columns):
        longest = max((len(name), *(len(row[number]) for row in cells)))
        # What is longer may be broken into lines, but not an id: it is copied into a command.
        is_whole = name.lower() in _WHOLE or longest <= _UNBROKEN
        needed += (longest if is_whole else _UNBROKEN) + 3
        drawn.add_column(name, overflow="fold", no_wrap=is_whole)
    if needed > console.width:  # as psql does it: a block for each row
        _print_blocks(console, columns, cells)
        return
    for row in cells:
        drawn.add_row(*map(Text, row))
    console.print(drawn)


def _print_blocks(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    indent = max(map(len, columns)) + 2
    for row in rows:
        console.print()
        for name, value in zip(columns, row, strict=True):
            line = Text.assemble((f"{name:<{indent}}", "bold"), value)
            console.print(line, soft_wrap=True)


def _cell(value: object) -> str:
    return "" if value is None else printable(value, 1000)


def record(value: Mapping[str, Any]) -> None:
    """Print a JSON object on a line of its own, ASCII only, and at once."""
    click.echo(json.dumps(value, default=str))
    sys.stdout.flush()


def remark(text: str) -> None:
    """A line for the user that does not belong to the data: to stderr."""
    click.echo(text, err=True)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Progress | None]:
    """A bar on stderr, if that is a terminal; advance it with ``advance(task_id=0)``.

    Nothing is drawn elsewhere, and None is returned.
    """
    if not sys.stderr.isatty():
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    # What goes to stdout meanwhile: above the bar on the same terminal, else where it belongs.
    console, on_terminal = Console(stderr=True), sys.stdout.isatty()
    with Progress(
        *columns, TimeElapsedColumn(), console=console, redirect_stdout=on_terminal
    ) as bar:
        bar.add_task(what, total=total)
        yield bar


def tracked(items: Iterable[Item], what: str, total: int | None) -> Iterator[Item]:
    """The items, with a bar of `progress`."""
    with progress(what, total) as bar:
        for item in items:
            yield item
            if bar is not None:
                bar.advance(bar.task_ids[0])


def confirm(question: str, *, yes: bool) -> None:
    """Ask for a yes, unless ``--yes`` was given.

    :raises click.UsageError: there is nobody to answer, since stdin is not a terminal.
    :raises click.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody is here to answer; give --yes to go on.")
    click.confirm(question, abort=True, err=True)
