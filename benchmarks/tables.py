"""Results as tables: for the terminal and for the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.registry import BY_NAME, PEERS
from benchmarks.results import Results
from benchmarks.scenarios import Figure, Scenario, scenarios
from benchmarks.summary import Summary, short
from benchmarks.targets import Verdict, verdicts


@dataclass(frozen=True)
class Table:
    """Rows of text under a title.

    :ivar scenario: the name of the scenario that it is about, as the files of its plots have it.
    :ivar groups: what each column but the first belongs to: a kind of queue, or a figure.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    scenario: str = ""
    groups: tuple[str, ...] = ()


def value(number: float, figure: Figure) -> str:
    """One figure with its unit."""
    text = short(number * figure.scale)
    return f"{text}{figure.unit}" if figure.unit.startswith("/") else f"{text} {figure.unit}"


def spread(summary: Summary, figure: Figure) -> str:
    """Median (lowest-highest), in the figure's unit, which is in the table's head."""
    median, low, high = (
        short(number * figure.scale) for number in (summary.median, summary.low, summary.high)
    )
    return median if summary.samples == 1 else f"{median} ({low}-{high})"


def tables(results: Results) -> list[Table]:
    """All results, as tables."""
    shown = [
        _of_scenario(results, scenario)
        for scenario in scenarios(quick=results.quick)
        if results.peers(scenario.name)
    ]
    return [*shown, _of_targets(verdicts(results)), _of_peers(results)]


def _of_scenario(results: Results, scenario: Scenario) -> Table:
    names = [peer.name for peer in PEERS if peer.name in results.peers(scenario.name)]
    variants = results.variants(scenario.name)
    notes = [scenario.note] if scenario.note else []
    if scenario.series and len(names) == 1:
        # One peer along an axis: the axis is vertical, the figures are horizontal.
        head = (scenario.series, *(f"{each.title}, {each.unit}" for each in scenario.figures))
        rows = [
            (label, *(_cell(results, scenario, label, names[0], each) for each in scenario.figures))
            for label in variants
        ]
        title = f"{scenario.title} (this library)"
        return Table(title, head, tuple(rows), tuple(notes), scenario.name)
    columns = [(label, figure) for label in variants for figure in scenario.figures]
    head = ("", *(_column(scenario, label, figure) for label, figure in columns))
    rows = []
    for name in names:
        cells = (_cell(results, scenario, label, name, figure) for label, figure in columns)
        mark = " [*]" if BY_NAME[name].lacks else ""
        rows.append((BY_NAME[name].title + mark, *cells))
        errors = {results.error(scenario.name, label, name) for label in variants} - {""}
        notes += [f"{BY_NAME[name].title}: failed: {error}" for error in sorted(errors)]
    left_out = [peer for peer in PEERS if scenario.name in peer.cannot and not scenario.peers]
    notes += [f"{peer.title}: {peer.cannot[scenario.name]}" for peer in left_out]
    groups = tuple(figure.title if scenario.series else label for label, figure in columns)
    return Table(scenario.title, head, tuple(rows), tuple(notes), scenario.name, groups)


def _column(scenario: Scenario, label: str, figure: Figure) -> str:
    unit = figure.unit.lstrip("/") if figure.more_is_better else figure.unit
    what = f"{figure.title}/{unit}" if figure.unit.startswith("/") else f"{figure.title}, {unit}"
    where = f"{scenario.series} {label}" if scenario.series else label
    return f"{where}: {what}" if where else what


def _cell(results: Results, scenario: Scenario, label: str, name: str, figure: Figure) -> str:
    summary = results.summary(scenario.name, label, name, figure.key)
    if summary is not None:
        return spread(summary, figure)
    return "failed" if results.error(scenario.name, label, name) else "-"


def _of_targets(found: Sequence[Verdict]) -> Table:
    rows = tuple((each.text, each.variant, each.wanted, each.measured, each.word) for each in found)
    return Table("Targets", ("", "", "target", "measured", ""), rows)


def _of_peers(results: Results) -> Table:
    rows = []
    notes = []
    for peer in PEERS:
        if peer.name in results.versions:
            rows.append((peer.title, results.versions[peer.name], peer.way))
            if peer.lacks:
                notes.append(f"[*] {peer.title} {peer.lacks}.")
        elif peer.name in results.missing:
            rows.append((peer.title, "left out", results.missing[peer.name]))
    return Table("Who was measured, and how", ("", "version", "way"), tuple(rows), tuple(notes))


def heading(results: Results) -> str:
    """Where and how these figures were measured."""
    machine = results.machine
    rounds = max((sample.round for sample in results.samples), default=0)
    return (
        f"RabbitMQ {results.rabbitmq}, Python {machine.get('python', '?')}, "
        f"{machine.get('cores', '?')} cores of {machine.get('processor', '?')}, broker and "
        f"clients on the same machine. Events of about 200 bytes, persistent. "
        f"Median (lowest-highest) of at most {rounds} interleaved rounds"
        f"{', short samples' if results.quick else ''}; {results.seconds / 60:.0f} minutes in all."
    )


# --- for the terminal --------------------------------------------------------------------------


def as_text(results: Results) -> str:
    parts = [heading(results)]
    parts += [
        f"{table.title}\n{'-' * len(table.title)}\n{aligned(table)}" for table in tables(results)
    ]
    return "\n\n".join(parts) + "\n"


def aligned(table: Table) -> str:
    columns = list(zip(table.head, *table.rows, strict=True))
    shown = [_column_of(cells) for cells in columns]
    lines = ["  ".join(cells).rstrip() for cells in zip(*shown, strict=True)]
    return "\n".join([*lines, *(f"  {note}" for note in table.notes)])


def _column_of(cells: Sequence[str]) -> list[str]:
    """Cells of one width: figures to the right, words to the left."""
    width = max(len(cell) for cell in cells)
    figures = all(cell[:1].isdigit() or cell in ("-", "failed") for cell in cells[1:])
    return [cell.rjust(width) if figures else cell.ljust(width) for cell in cells]


# --- for the documentation -----------------------------------------------------------------------


def as_rst(results: Results, plots: Mapping[str, str] | None = None) -> str:
    """Sections for a page of the documentation: of each scenario its plots and its tables.

    :param plots: in words, what each image shows, by the path of its file.
    """
    parts = [heading(results)]
    for table in tables(results):
        parts.append(f"\n{table.title}\n{'-' * len(table.title)}")
        images = {
            path: f".. image:: {path}\n   :alt: {words}"
            for path, words in (plots or {}).items()
            if _scenario_of(path) == table.scenario
        }
        for group, part in _narrow(table):
            about = [path for path in images if f"-{group}." in path or len(images) == 1]
            parts += [images.pop(path) for path in about]
            parts.append(list_table(part, titled=False))
        parts += ["\n".join(f"- {_escaped(note)}" for note in table.notes)] if table.notes else []
    return "\n\n".join(parts) + "\n"


def _narrow(table: Table) -> list[tuple[str, Table]]:
    """A table for each group of columns, with its name: all of them do not fit on a phone."""
    made = []
    for group in dict.fromkeys(table.groups):
        kept = [0, *(number for number, each in enumerate(table.groups, 1) if each == group)]
        head, *rows = (tuple(row[number] for number in kept) for row in (table.head, *table.rows))
        where, _, what = head[1].partition(": ")
        if what and where != group:  # along an axis, which is named once
            labels = [cell.partition(": ")[0].rpartition(" ")[2] for cell in head[1:]]
            head = (f"{what} by {where.rpartition(' ')[0]}", *labels)
        made.append((group, replace(table, head=head, rows=tuple(rows))))
    return made or [("", table)]


def _scenario_of(path: str) -> str:
    return re.split("[-.]", path.rpartition("/")[2])[0]


def list_table(table: Table, *, titled: bool = True) -> str:
    title = f" {table.title}" if titled else ""
    lines = [f".. list-table::{title}", "   :header-rows: 1", "   :stub-columns: 1", ""]
    for row in (table.head, *table.rows):
        for number, cell in enumerate(row):
            mark = "   * -" if number == 0 else "     -"
            lines.append(f"{mark} {_escaped(cell)}".rstrip())
    return "\n".join(lines)


def _escaped(cell: str) -> str:
    text = cell.replace("*", r"\*").replace("_", r"\_")
    return r"\-" if text == "-" else text  # it would begin a list
