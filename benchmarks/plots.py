"""Results as SVG plots: bars and lines, in the style of the documentation's other pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sheet import WIDTH, Sheet

from benchmarks.registry import BY_NAME, OURS, PEERS, Peer
from benchmarks.results import Results
from benchmarks.scenarios import Scenario, scenarios
from benchmarks.summary import Summary, short

_LABELS = 150  # space for the names on the left
_BAR = 16
_APART = 42  # between the numbers of an axis
_FLAT = 4  # times the lowest figure: a logarithmic axis would have hardly a number
_LINES = (
    ("#c0392b", "#ff8a7a"),
    ("#2563eb", "#6ea8fe"),
    ("#15803d", "#4ade80"),
    ("#b7791f", "#e0b35c"),
    ("#7d3c98", "#c99be0"),
    ("#0e7c86", "#4fd1d9"),
    ("#6b7280", "#b3bac5"),
    ("#a0522d", "#d99b73"),
)
_RULES = (
    (".ours", "fill: #c0392b", "fill: #e0604f"),
    (".other", "fill: #9aa4b2", "fill: #5b6470"),
    (".line", "stroke: #1f2937; fill: none", "stroke: #e5e7eb"),
    (".grid", "stroke: #dfe3e8; fill: none", "stroke: #2b313a"),
    *(
        (f".c{number}", f"stroke: {light}; fill: none; stroke-width: 2", f"stroke: {dark}")
        for number, (light, dark) in enumerate(_LINES)
    ),
    *(
        (f".dot.c{number}", f"fill: {light}", f"fill: {dark}")
        for number, (light, dark) in enumerate(_LINES)
    ),
)


@dataclass(frozen=True)
class Bar:
    """A peer's figure, with the range of its samples."""

    peer: Peer
    summary: Summary


@dataclass(frozen=True)
class Line:
    """A peer's figures along an axis."""

    label: str
    points: tuple[tuple[float, float], ...]


def write(results: Results, folder: Path) -> dict[str, str]:
    """Write one plot for each scenario and kind of queue, and those of the headlines.

    :return: in words, what each shows, by its file's name; those of the headlines come first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = {}
    for name, sheet in (*headlines(results), *pictures(results)):
        (folder / name).write_text(sheet.svg())
        words[name] = f"{sheet.title}. {sheet.description}"
    return words


def headlines(results: Results) -> Iterator[tuple[str, Sheet]]:
    """Three that state their point in the title, by the names of their files.

    From quorum queues, which are the default, and without the clients that promise less.
    """
    for name, point in (
        ("publish", "Publishing in bulk: {:.2g} times the best synchronous client"),
        ("threads", "Publishing from 16 threads: {:.2g} times the best client with threads"),
        ("consume", "Consuming: {:.2g} times the best Python client"),
    ):
        scenario = next(each for each in scenarios() if each.name == name)
        bars = [
            bar
            for bar in _bars_of(results, scenario, "quorum")
            if bar.peer.is_ours or bar.peer.is_c or not bar.peer.lacks
        ]
        ours = [bar.summary.median for bar in bars if bar.peer.is_ours]
        theirs = [bar.summary.median for bar in bars if _competes(bar.peer, name)]
        if ours and theirs:
            title = point.format(ours[0] / max(theirs))
            unit = "Events/s" if name == "consume" else "Confirmed events/s"
            yield f"headline-{name}.svg", bar_chart(title, bars, unit)


def _competes(peer: Peer, scenario: str) -> bool:
    if peer.is_ours or peer.is_c:
        return False
    return {"publish": peer.synchronous, "threads": peer.has_threads}.get(scenario, True)


def pictures(results: Results) -> Iterator[tuple[str, Sheet]]:
    """All others, by the names of their files."""
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
                title = f"{scenario.title}{where} ({unit})"
                yield name, bar_chart(title, bars)


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
            bars.append(Bar(peer, scaled))
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


def bar_chart(title: str, bars: Sequence[Bar], unit: str = "") -> Sheet:
    """Horizontal bars from the best to the worst; a thin line is the range of the samples.

    :param unit: a line below the title.
    """
    order = ", ".join(f"{bar.peer.title} {short(bar.summary.median)}" for bar in bars)
    sheet = Sheet(title, f"From the best to the worst: {order}.", _RULES)
    top = sheet.heading(title)
    if unit:
        sheet.text(12, top + 6, unit, "faint")
        top += 18
    room = WIDTH - _LABELS - 64
    longest = max(bar.summary.high for bar in bars) or 1.0
    for number, bar in enumerate(bars):
        y = top + number * (_BAR + 8)
        middle = y + _BAR / 2
        width = bar.summary.median / longest * room
        low, high = (
            _LABELS + edge / longest * room for edge in (bar.summary.low, bar.summary.high)
        )
        kind = "ours" if bar.peer.is_ours else "other"
        sheet.text(
            _LABELS - 8, middle + 4, bar.peer.title, "end bold" if bar.peer.is_ours else "end"
        )
        sheet.shape(
            f'<rect class="{kind}" x="{_LABELS}" y="{y:g}" width="{width:.1f}" height="{_BAR}"/>'
            f'<path class="line" d="M{low:.1f} {middle:g}H{high:.1f}"/>',
            y + _BAR,
        )
        sheet.text(max(high, _LABELS + width) + 6, middle + 4, short(bar.summary.median))
    return sheet


def line_chart(title: str, axis: str, lines: Sequence[Line]) -> Sheet:
    """Lines over a logarithmic axis; where they hardly rise or fall, theirs begins with 0."""
    courses = "; ".join(
        f"{line.label} from {short(line.points[0][1])} to {short(line.points[-1][1])}"
        for line in lines
    )
    first, last_one = lines[0].points[0][0], lines[0].points[-1][0]
    description = f"From {_on_axis(first)} to {_on_axis(last_one)}, {axis}: {courses}."
    sheet = Sheet(title, description, _RULES)
    top = sheet.heading(title) + 6
    bottom, left, right = top + 190, 62, WIDTH - 26
    across = _Scale([x for line in lines for x, _ in line.points], left, right)
    heights = [y for line in lines for _, y in line.points]
    flat = max(heights) < _FLAT * min(heights)
    up = (_FromZero if flat else _Scale)(heights, bottom, top)
    for tick in up.ticks():
        sheet.shape(f'<path class="grid" d="M{left} {up(tick):.1f}H{right}"/>', up(tick))
        sheet.text(left - 6, up(tick) + 4, _on_axis(tick), "end faint")
    last = -math.inf
    for x in sorted({x for line in lines for x, _ in line.points}):
        if across(x) - last > _APART:
            last = across(x)
            sheet.text(last, bottom + 16, _on_axis(x), "mid faint")
    sheet.text((left + right) / 2, bottom + 34, axis, "mid faint")
    for number, line in enumerate(lines):
        colour = f"c{number % len(_LINES)}"
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        dots = "".join(
            f'<circle class="dot {colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>'
            for x, y in line.points
        )
        sheet.shape(f'<polyline class="{colour}" points="{path}"/>{dots}', bottom)
        y = bottom + 56 + number * 18
        sheet.shape(f'<path class="{colour}" d="M14 {y - 4:g}H34"/>', y)
        sheet.text(40, y, line.label, "bold" if number == 0 else "")
    return sheet


def _on_axis(number: float) -> str:
    return f"{number:,.0f}" if number == round(number) else f"{number:g}"


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


class _FromZero(_Scale):
    """Maps values to coordinates in proportion, from zero."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self._low, self._high = 0.0, 1.05 * max(values)
        self._begin, self._end = begin, end

    def __call__(self, value: float) -> float:
        return self._begin + value / self._high * (self._end - self._begin)

    def ticks(self) -> list[float]:
        """At most six multiples of 1, 2 or 5 times a power of ten."""
        power = 10.0 ** math.floor(math.log10(self._high / 5))
        step = next(digit * power for digit in (1, 2, 5, 10) if self._high < 6 * digit * power)
        return [step * number for number in range(int(self._high / step) + 1)]
