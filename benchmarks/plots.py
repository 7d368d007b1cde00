"""Results as SVG plots, written by hand, because they consist only of bars and lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks.registry import BY_NAME, OURS, PEERS
from benchmarks.results import Results
from benchmarks.scenarios import Scenario, scenarios
from benchmarks.summary import Summary, short

_WIDTH = 760
_LABELS = 170  # space for the names on the left
_BAR = 16
_FONT = "font-family='sans-serif' font-size='12'"
_OURS, _OTHERS, _INK, _GRID = "#c0392b", "#7f8c9b", "#333", "#ddd"
_LINES = ("#c0392b", "#2c6fbb", "#3a8f4d", "#b8860b", "#7d3c98", "#16858a", "#777", "#a0522d")


@dataclass(frozen=True)
class Bar:
    """A peer's figure, with the range of its samples."""

    label: str
    summary: Summary
    is_ours: bool = False


@dataclass(frozen=True)
class Line:
    """A peer's figures along an axis."""

    label: str
    points: tuple[tuple[float, float], ...]


def write(results: Results, folder: Path) -> list[str]:
    """Write one plot for each scenario and kind of queue; returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, picture in pictures(results):
        (folder / name).write_text(picture)
        names.append(name)
    return names


def pictures(results: Results) -> Iterator[tuple[str, str]]:
    """Name and content of each."""
    for scenario in scenarios(quick=results.quick):
        figure = scenario.figures[0]
        unit = f"{figure.title}{'' if figure.unit[:1] == '/' else ', '}{figure.unit}"
        if scenario.series:
            lines = _lines_of(results, scenario)
            if lines:
                title = f"{scenario.title} ({unit})"
                yield f"{scenario.name}.svg", line_chart(title, scenario.series, lines)
            continue
        for variant in results.variants(scenario.name):
            bars = _bars_of(results, scenario, variant)
            if bars:
                name = f"{scenario.name}-{variant}.svg" if variant else f"{scenario.name}.svg"
                where = f", {variant} queue" if variant else ""
                yield name, bar_chart(f"{scenario.title}{where} ({unit})", bars)


def _bars_of(results: Results, scenario: Scenario, variant: str) -> list[Bar]:
    figure = scenario.figures[0]
    bars = []
    for peer in PEERS:
        summary = results.summary(scenario.name, variant, peer.name, figure.key)
        if summary is not None:
            scaled = Summary(
                summary.median * figure.scale,
                summary.low * figure.scale,
                summary.high * figure.scale,
                summary.samples,
            )
            bars.append(Bar(peer.title, scaled, peer.is_ours))
    bars.sort(key=lambda bar: bar.summary.median, reverse=figure.more_is_better)
    return bars


def _lines_of(results: Results, scenario: Scenario) -> list[Line]:
    figure = scenario.figures[0]
    names = [peer.name for peer in PEERS if peer.name in results.peers(scenario.name)]
    lines = []
    for name in sorted(names, key=lambda name: name != OURS):
        points = []
        for label in results.variants(scenario.name):
            median = results.median(scenario.name, label, name, figure.key)
            if median is not None:
                points.append((float(label.replace(",", "")), median * figure.scale))
        if points:
            lines.append(Line(BY_NAME[name].title, tuple(points)))
    return lines


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars from the best to the worst; a thin line is the range of the samples."""
    height = 40 + len(bars) * (_BAR + 8)
    room = _WIDTH - _LABELS - 90
    longest = max(bar.summary.high for bar in bars) or 1.0
    parts = [_text(10, 20, title, weight="bold")]
    for number, bar in enumerate(bars):
        top = 34 + number * (_BAR + 8)
        middle = top + _BAR / 2
        width = bar.summary.median / longest * room
        low, high = (
            _LABELS + edge / longest * room for edge in (bar.summary.low, bar.summary.high)
        )
        colour = _OURS if bar.is_ours else _OTHERS
        parts += [
            _text(_LABELS - 8, middle + 4, bar.label, anchor="end"),
            f"<rect x='{_LABELS}' y='{top}' width='{width:.1f}' height='{_BAR}' fill='{colour}'/>",
            _stroke(low, middle, high, middle, _INK),
            _text(max(high, _LABELS + width) + 6, middle + 4, short(bar.summary.median)),
        ]
    return _svg(height, title, parts)


def line_chart(title: str, axis: str, lines: Sequence[Line]) -> str:
    """Lines over two logarithmic axes."""
    height, top, bottom, left, right = 340, 36, 290, 70, _WIDTH - 170
    across = _Scale([x for line in lines for x, _ in line.points], left, right)
    up = _Scale([y for line in lines for _, y in line.points], bottom, top)
    parts = [_text(10, 20, title, weight="bold"), _text(left, bottom + 38, axis)]
    for tick in up.ticks():
        parts += [
            _stroke(left, up(tick), right, up(tick), _GRID),
            _text(left - 6, up(tick) + 4, short(tick), anchor="end"),
        ]
    for x in sorted({x for line in lines for x, _ in line.points}):
        parts.append(_text(across(x), bottom + 18, short(x), anchor="middle"))
    for number, line in enumerate(lines):
        colour = _LINES[number % len(_LINES)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts += [
            f"<circle cx='{across(x):.1f}' cy='{up(y):.1f}' r='3' fill='{colour}'/>"
            for x, y in line.points
        ]
        parts.append(_text(right + 12, top + 14 + number * 18, line.label, colour=colour))
    return _svg(height, title, parts)


class _Scale:
    """Maps values to coordinates, logarithmically, with a margin on both ends."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        logs = [math.log10(max(value, 1e-9)) for value in values]
        room = 0.05 * (max(logs) - min(logs)) or 0.3
        self._low, self._high = min(logs) - room, max(logs) + room
        self._begin, self._end = begin, end

    def __call__(self, value: float) -> float:
        part = (math.log10(max(value, 1e-9)) - self._low) / (self._high - self._low)
        return self._begin + part * (self._end - self._begin)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times each power of ten in the range."""
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        candidates = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        return [each for each in candidates if self._low <= math.log10(each) <= self._high]


def _text(
    x: float, y: float, text: str, anchor: str = "start", weight: str = "normal", colour: str = _INK
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {_FONT} text-anchor='{anchor}' font-weight='{weight}' "
        f"fill='{colour}'>{escape(text)}</text>"
    )


def _stroke(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}'/>"


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{height}' "
        f"viewBox='0 0 {_WIDTH} {height}' role='img'>"
    )
    return "\n".join(
        [
            head,
            f"<title>{escape(title)}</title>",
            "<rect width='100%' height='100%' fill='white'/>",
            *parts,
            "</svg>\n",
        ]
    )
