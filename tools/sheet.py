"""Draws SVG pictures of 350 units: the room of a phone of 390 pixels.

They are light or dark as the reader's screen is, and have a title and a description of what one
sees. Text that does not fit is an error.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape

WIDTH = 350

# Class, its rule on a light screen, its rule on a dark one.
_RULES = (
    (".paper", "fill: #fff", "fill: #131416"),
    (".box", "fill: #f3f6fb; stroke: #9aa4b2", "fill: #1d2430; stroke: #5b6470"),
    (".queue", "fill: #e3edff; stroke: #2563eb", "fill: #16294a; stroke: #6ea8fe"),
    (".kept", "fill: #fdf0d5; stroke: #b7791f", "fill: #3a2c10; stroke: #e0b35c"),
    (".life", "stroke: #9aa4b2", "stroke: #5b6470"),
    (".span", "fill: #2563eb", "fill: #6ea8fe"),
    (".lost", "fill: #fde2e1", "fill: #4a1d1b"),
    (".safe", "fill: #dcf5e3", "fill: #12351f"),
    (".arrow", "stroke: #1f2937; fill: none", "stroke: #e5e7eb"),
    (".head", "fill: #1f2937", "fill: #e5e7eb"),
    ("text", "fill: #1f2937", "fill: #e5e7eb"),
    ("text.faint", "fill: #5b6470", "fill: #a3adba"),
    ("text.bad", "fill: #b42318", "fill: #ff9d94"),
    ("text.good", "fill: #166534", "fill: #86efac"),
)
_STYLE = (
    "text { font: 13px system-ui, sans-serif } .mid { text-anchor: middle } "
    ".end { text-anchor: end } .bold, .bad, .good { font-weight: 600 } "
    ".code { font-family: ui-monospace, monospace; font-size: 12px } "
    ".arrow { stroke-width: 1.5 } .again { stroke-dasharray: 4 3 } "
)

# Of the fonts that `system-ui` may stand for, none is wider than this on average, in units.
_LETTER, _CODE_LETTER, _BOLD_LETTER = 7.4, 7.3, 7.7


class Sheet:
    """A drawing: shapes and texts in the order in which they were added.

    :param rules: further classes, each with its rule on a light screen and on a dark one.
    """

    def __init__(
        self, title: str, description: str, rules: Sequence[tuple[str, str, str]] = ()
    ) -> None:
        self.title = title
        self.description = description
        self._rules = (*_RULES, *rules)
        self._parts: list[str] = []
        self._bottom = 0.0

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """One line of text; it must fit on the paper."""
        letter = _CODE_LETTER if "code" in kind else _LETTER
        size = len(text) * letter
        left = x - size / 2 if "mid" in kind else x - size if "end" in kind else x
        if left < 0 or left + size > WIDTH:
            raise ValueError(f"{self.title}: {text!r} does not fit at {x:g} ({size:.0f} wide)")
        self._parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>')
        self._reach(y + 4)

    def heading(self, text: str) -> float:
        """The text in bold, on as many lines as it takes; returns where the rest may begin."""
        y = 8.0
        for line in textwrap.wrap(text, int((WIDTH - 24) / _BOLD_LETTER)):
            y += 17
            self.text(12, y, line, "bold")
        return y + 10

    def box(
        self, x: float, y: float, width: float, height: float, kind: str, *lines: str, code: int = 0
    ) -> None:
        """A box with lines of text in its middle; the first ``code`` of them are names."""
        for number, line in enumerate(lines):
            if len(line) * (_CODE_LETTER if number < code else _LETTER) > width - 4:
                raise ValueError(f"{self.title}: {line!r} does not fit into its box")
        corner = 14 if kind == "box round" else 4
        self._parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'rx="{corner}"/>'
        )
        first = y + height / 2 - 8 * (len(lines) - 1) + 4.5
        for number, line in enumerate(lines):
            names = "mid code" if number < code else "mid"
            self.text(x + width / 2, first + 16 * number, line, names)
        self._reach(y + height)

    def arrow(self, *points: tuple[float, float], again: bool = False) -> None:
        """A line with an arrow's head at its end."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        kind = "arrow again" if again else "arrow"
        self._parts.append(f'<path class="{kind}" marker-end="url(#head)" d="M{path}"/>')
        self._reach(max(y for _, y in points))

    def shape(self, text: str, bottom: float) -> None:
        """Anything else, as SVG."""
        self._parts.append(text)
        self._reach(bottom)

    def behind(self, text: str) -> None:
        """A shape behind all others."""
        self._parts.insert(0, text)

    def _reach(self, bottom: float) -> None:
        self._bottom = max(self._bottom, bottom)

    @property
    def height(self) -> float:
        """How far down it reaches, with a margin."""
        return self._bottom + 12

    def svg(self) -> str:
        """The whole file."""
        light = " ".join(f"{name} {{ {rule} }}" for name, rule, _ in self._rules)
        dark = " ".join(f"{name} {{ {rule} }}" for name, _, rule in self._rules)
        height = f"{self.height:g}"
        style = f"{_STYLE}{light} @media (prefers-color-scheme: dark) {{ {dark} }}"
        parts = "\n".join(self._parts)
        return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" \
height="{height}" role="img" aria-labelledby="t d">
<title id="t">{escape(self.title)}</title>
<desc id="d">{escape(self.description)}</desc>
<style>{style}</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" \
orient="auto"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>
<rect class="paper" width="{WIDTH}" height="{height}" rx="6"/>
{parts}
</svg>
"""


class Timeline:
    """Who sends what to whom, from top to bottom."""

    def __init__(self, title: str, description: str, lanes: Sequence[str]) -> None:
        self.sheet = Sheet(title, description)
        room = (WIDTH - 110) / (len(lanes) - 1)
        self._x = {lane: 55 + room * number for number, lane in enumerate(lanes)}
        for lane, x in self._x.items():
            self.sheet.text(x, 24, lane, "mid bold")
        self._y = 34.0

    def send(self, source: str, target: str, text: str, *, again: bool = False) -> Timeline:
        """An arrow from one lane to another, with its text above it."""
        self._y += 30
        begin, end = self._x[source], self._x[target]
        self.sheet.text((begin + end) / 2, self._y - 6, text, "mid")
        step = 2 if end > begin else -2
        self.sheet.arrow((begin + step, self._y), (end - step, self._y), again=again)
        return self

    def work(self, lane: str, text: str, height: float = 30) -> Timeline:
        """Something that takes a while."""
        self._y += 8
        x = self._x[lane]
        self.sheet.shape(
            f'<rect class="span" x="{x - 4:g}" y="{self._y:g}" width="8" height="{height:g}"/>',
            self._y + height,
        )
        right = x > WIDTH / 2
        at, kind = (x - 10, "end") if right else (x + 10, "")
        self.sheet.text(at, self._y + height / 2 + 4, text, kind)
        self._y += height - 12
        return self

    def kill(self, what: str, *outcome: str, lost: bool = False) -> Timeline:
        """What a crash at this moment leaves behind."""
        kind, ink = ("lost", "bad") if lost else ("safe", "good")
        height = 10 + 18 * (1 + len(outcome))
        self._y += 12
        self.sheet.behind(
            f'<rect class="{kind}" x="8" y="{self._y:g}" width="{WIDTH - 16}" '
            f'height="{height}" rx="4"/>'
        )
        for number, line in enumerate((what, *outcome)):
            self.sheet.text(WIDTH / 2, self._y + 18 + 18 * number, line, f"mid {ink}")
        self._y += height - 8
        return self

    def svg(self) -> str:
        """The whole file."""
        bottom = self.sheet.height - 4
        for x in self._x.values():
            self.sheet.behind(
                f'<path class="life" d="M{x:g} 32V{bottom:g}" stroke-dasharray="2 3"/>'
            )
        return self.sheet.svg()
