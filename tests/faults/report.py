"""Formats a result: a table for the terminal, an RST fragment for the docs, JSON for programs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from faults.evidence import Usage
from faults.harness import Result
from faults.verdict import LATEST, Verdict

# A process with a shorter life does not show whether resources pile up.
_LONG_ENOUGH = 15.0

Row = tuple[str, str]

#: The stored result of a run.
Kept: TypeAlias = dict[str, Any]


def figures(result: Result) -> list[Row]:
    """The figures of a run, each with its name, which states whether it must be 0."""
    verdict = result.verdict
    share = verdict.duplicates / verdict.calls if verdict.calls else 0.0
    errors = {name: n for name, n in sorted(result.outcomes.items()) if name != "returned"}
    rows = [
        ("events whose publish returned", f"{verdict.published:,}"),
        ("publishes that raised", _listed(errors)),
        ("events handled, by subscriber", _listed(verdict.handled)),
        ("dead-lettered, by subscriber", _listed(verdict.dead_lettered)),
        ("still waiting (must be 0)", f"{verdict.waiting:,}"),
        ("LOST (must be 0)", f"{len(verdict.lost):,}"),
        ("duplicates", f"{verdict.duplicates:,} of {verdict.calls:,} calls, {share:.2%}"),
        ("handled, surely not sent (must be 0)", f"{len(verdict.forbidden):,}"),
        ("retried beyond their limit (must be 0)", f"{len(verdict.beyond_limit):,}"),
        ("given up below their limit (must be 0)", f"{len(verdict.below_limit):,}"),
        ("handled, and dead letters all the same (must be 0)", f"{len(verdict.innocent):,}"),
        *_rolled(verdict),
        (
            f"latest publish after its deadline (must be under {LATEST:g} s)",
            f"{max(0.0, verdict.latest_publish):.2f} s",
        ),
        ("longest silence after faults", _longest_silence(result)),
        ("processes started; ended by a handler", f"{result.starts:,}; {result.deaths:,}"),
        ("programs that misbehaved (must be 0)", f"{len(verdict.misbehaved):,}"),
    ]
    return [*rows, *_usage(result)]


def _rolled(verdict: Verdict) -> Iterator[Row]:
    if verdict.rolled:
        yield "events that a release had bound", f"{verdict.rolled:,}"
        yield "of all, dead letters as no process listed them", f"{verdict.unlisted:,}"
        yield "those that do not say so (must be 0)", f"{len(verdict.unexplained):,}"
        yield (
            "handled by a process that does not list them (must be 0)",
            f"{len(verdict.strayed):,}",
        )


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items()) or "none"


def _longest_silence(result: Result) -> str:
    if not result.verdict.silences:
        return "none"
    group, (seconds, name) = max(result.verdict.silences.items(), key=lambda item: item[1])
    kinds = " + ".join(fault.kind for fault in result.faults if fault.group == group)
    return f"{seconds:.1f} s, {name} after {kinds}"


def _usage(result: Result) -> Iterator[Row]:
    """At the start and at the end, of the process of each program that lived longest."""
    longest: dict[str, str] = {}
    for name, (first, last) in sorted(result.usage.items(), key=lambda item: _lifetime(item[1])):
        if last.time - first.time >= _LONG_ENOUGH:
            longest[_program(name)] = name
    for name in sorted(longest.values()):
        first, last = result.usage[name]
        grown = (
            f"{first.threads} → {last.threads}, {first.descriptors} → {last.descriptors}, "
            f"{first.kilobytes / 1024:.0f} → {last.kilobytes / 1024:.0f} MB "
            f"({last.time - first.time:.0f} s)"
        )
        yield f"{_program(name)}: threads, descriptors, memory", grown


def _program(process: str) -> str:
    """The name without the number of its start and of its release."""
    return re.split("[-.]", process)[0]


def _lifetime(usage: tuple[Usage, Usage]) -> float:
    return usage[1].time - usage[0].time


def faults(result: Result) -> list[tuple[str, str, str, str]]:
    """Each kind of fault: its number, the events lost in it, the longest silence after it."""
    rows = []
    counts = Counter(fault.kind for fault in result.faults)
    for kind in sorted(counts):
        groups = {fault.group for fault in result.faults if fault.kind == kind}
        lost = sum(result.verdict.lost_in[group] for group in groups)
        silence = max(result.verdict.silences.get(group, (0.0, ""))[0] for group in groups)
        rows.append((kind, f"{counts[kind]:,}", f"{lost:,}", f"{silence:.1f} s"))
    return rows


# What was lost in a group of faults counts for each of them.
_HEAD = ("Fault", "Injected", "Lost", "Longest silence after it")


def text(result: Result) -> str:
    """For the terminal."""
    lines = ["", *columns([_HEAD, *faults(result)]), "", *columns(figures(result))]
    lines += [f"left out: {each}" for each in result.left_out]
    lines += [
        f"lost: {event} ({key}) at {name}" for name, event, key, _ in result.verdict.lost[:10]
    ]
    for events in (
        result.verdict.forbidden,
        result.verdict.beyond_limit,
        result.verdict.below_limit,
        result.verdict.innocent,
        result.verdict.strayed,
        result.verdict.unexplained,
        result.verdict.misbehaved,
    ):
        lines += [f"wrong: {each}" for each in events[:10]]
    lines.append("")
    lines += [f"NOT AS PROMISED: {each}." for each in result.verdict.violations()]
    return "\n".join(lines if result.verdict.violations() else [*lines, "As promised."])


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def rst(kept: Sequence[Kept]) -> str:
    """A fragment for the documentation, of `as_json` results: runs of a scenario side by side."""
    scenarios = dict.fromkeys(run["scenario"] for run in kept)
    return "\n".join(
        _rst_of_scenario([run for run in kept if run["scenario"] == name]) for name in scenarios
    )


def _rst_of_scenario(runs: Sequence[Kept]) -> str:
    versions = [f"RabbitMQ {run['version']}" for run in runs]
    lines = [
        f"**{runs[0]['scenario']}**: {runs[0]['about']}. To reproduce:",
        "",
        ".. code-block:: sh",
        "",
        *(f"    {run['command']}" for run in runs),
        "",
        "Each kind of fault: how often it was injected / events lost / longest silence afterwards.",
        "",
        *_table(["Fault", *versions], [run["by_fault"] for run in runs]),
        "",
        *_table(["In all", *versions], [run["figures"] for run in runs]),
        "",
    ]
    for version, run in zip(versions, runs, strict=True):
        if run["left_out"]:
            lines += [f"Left out with {version}: " + "; ".join(run["left_out"]) + ".", ""]
        for violation in run["violations"]:
            lines += [f"**Not as promised** with {version}: {violation}.", ""]
    return "\n".join(lines)


def _table(head: Sequence[str], columns: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows by their names, in the order of first appearance; a dash where one has no value."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [head, *([name, *(column.get(name, "-") for column in columns)] for name in names)]
    lines = [".. list-table::", "   :header-rows: 1", "   :class: long-words", ""]
    for row in rows:
        lines.append(f"   * - {row[0]}")
        lines += [f"     - {cell}" for cell in row[1:]]
    return lines


def as_json(result: Result, command: str) -> str:
    """For programs, and for `rst`: the figures that are judged, and the tables."""
    settings, verdict = result.settings, result.verdict
    by_fault = {
        kind: f"{injected} / {lost} / {silence}" for kind, injected, lost, silence in faults(result)
    }
    run = {"seconds of faults; in all": f"{settings.seconds:g}; {result.seconds:.0f}"}
    kept: Kept = {
        "version": result.version,
        "scenario": settings.scenario.name,
        "about": settings.scenario.about,
        "command": command,
        "published": verdict.published,
        "handled": verdict.handled,
        "dead_lettered": verdict.dead_lettered,
        "waiting": verdict.waiting,
        "lost": len(verdict.lost),
        "duplicates": verdict.duplicates,
        "forbidden": len(verdict.forbidden),
        "beyond_limit": len(verdict.beyond_limit),
        "below_limit": len(verdict.below_limit),
        "latest_publish": verdict.latest_publish,
        "longest_silence": verdict.longest_silence,
        "misbehaved": verdict.misbehaved,
        "faults": dict(Counter(fault.kind for fault in result.faults)),
        "left_out": result.left_out,
        "violations": verdict.violations(),
        "by_fault": by_fault,
        "figures": {**run, **dict(figures(result))},
    }
    return json.dumps(kept, indent=2)
