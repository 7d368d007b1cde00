"""Who gets what, as a picture: SVG, light and dark, as narrow as a phone. Pure.

An exchange stands above a line from which a branch leads to each subscriber: its binding keys, then
its queue with the handler, then its dead letters.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from xml.sax.saxutils import escape

from domain_events.broker.rabbitmq.topology import dead_letter_name
from domain_events.cli import survey
from domain_events.cli.registrations import Registration
from domain_events.text import printable

#: Pixels; of the 390 of a phone, a page's margins take 40.
WIDTH = 350
#: Of the monospaced font, which every browser has in about the same width.
SIZE, ADVANCE = 12, 7.25
_LINE = 17
_MOST_KEYS = 20

_BUS, _KEYS, _CARD = 22, 44, 44
_INSET = 10

_STYLE = f"""
    .paper {{ fill: #fff }} .line {{ stroke: #6b7280; stroke-width: 1.5; fill: none }}
    .head {{ fill: #6b7280 }} .exchange {{ fill: #dbeafe; stroke: #2563eb }}
    .queue {{ fill: #f3f4f6; stroke: #9aa4b2 }}
    .dead {{ fill: none; stroke: #b42318; stroke-dasharray: 4 3 }}
    text {{ font: {SIZE}px ui-monospace, monospace; fill: #1f2937 }}
    .name {{ font-weight: 600 }} .soft {{ fill: #4b5563 }} .key {{ fill: #1d4ed8 }}
    .bad {{ fill: #b42318 }}
    @media (prefers-color-scheme: dark) {{
      .paper {{ fill: #131416 }} .line {{ stroke: #9aa4b2 }} .head {{ fill: #9aa4b2 }}
      .exchange {{ fill: #172554; stroke: #6ea8fe }} .queue {{ fill: #22252a; stroke: #5b6470 }}
      .dead {{ stroke: #ff9d94 }} text {{ fill: #e5e7eb }} .soft {{ fill: #b6bec9 }}
      .key {{ fill: #93c0ff }} .bad {{ fill: #ff9d94 }}
    }}
"""


def svg(registrations: Sequence[Registration]) -> str:
    """The picture; ends with a newline."""
    drawing = _Drawing()
    several = len({each.target for each in registrations}) > 1
    for exchange, group in survey.by_exchange(registrations):
        drawing.exchange(f"{exchange.name} ({exchange.type} exchange)")
        target = ""
        for each in group:
            if several and each.target != target:
                target = each.target
                drawing.heading(target)
            drawing.subscriber(each)
        drawing.end_of_exchange()
    height = drawing.y
    body = "\n".join(f"  {each}" for each in drawing.parts)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" \
height="{height}" role="img" aria-labelledby="t d">
  <title id="t">Who gets which events</title>
  <desc id="d">{_safe(_described(registrations), 100_000)}</desc>
  <style>{_STYLE}  </style>
  <defs><marker id="h" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" \
orient="auto"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>
  <rect class="paper" width="{WIDTH}" height="{height}" rx="6"/>
{body}
</svg>
"""


class _Drawing:
    """Grows downwards."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = 12
        self._branches: list[int] = []
        self._from = 0

    def exchange(self, text: str) -> None:
        self._box("exchange", 12, WIDTH - 24, [("name", text)])
        self._from, self._branches = self.y, []
        self.y += 6

    def end_of_exchange(self) -> None:
        """The line from the exchange, down to the last branch, and the branches."""
        if self._branches:
            path = f"M{_BUS} {self._from}V{self._branches[-1]}"
            self.parts.append(f'<path class="line" d="{path}"/>')
        for y in self._branches:
            path = f"M{_BUS} {y}H{_KEYS - 4}"
            self.parts.append(f'<path class="line" marker-end="url(#h)" d="{path}"/>')
        self.y += 8

    def heading(self, text: str) -> None:
        """Whose subscribers follow."""
        self.y += 6
        self._texts("soft", _KEYS, WIDTH - 12 - _KEYS, text)

    def subscriber(self, each: Registration) -> None:
        self.y += 6
        queue = each.queue
        for key in queue.binding_keys[:_MOST_KEYS]:
            self._branches.append(self.y + 9)
            self._texts("key", _KEYS, WIDTH - 12 - _KEYS, key)
        more = len(queue.binding_keys) - _MOST_KEYS
        if more > 0:
            self._texts("soft", _KEYS, WIDTH - 12 - _KEYS, f"and {more} more")
        self._arrow_down()
        lines = [("name", each.name), ("soft", survey.kind_of(queue)), ("", each.handler)]
        if each.payload is not None:
            lines.append(("soft", f"takes {each.payload}"))
        if each.options.max_retries:
            lines.append(("soft", f"retries: {survey.retries(each)}"))
        if each.options.ordered:
            lines.append(("soft", "ordered by domain_object_id"))
        self._box("queue", _CARD, WIDTH - 12 - _CARD, lines)
        if queue.dead_letters:
            self._arrow_down()
            name = dead_letter_name(each.name)
            self._box("dead", _CARD, WIDTH - 12 - _CARD, [("bad", name), ("soft", "dead letters")])
        self.y += 6

    def _arrow_down(self) -> None:
        x = _CARD + 16
        path = f"M{x} {self.y}V{self.y + 14}"
        self.parts.append(f'<path class="line" marker-end="url(#h)" d="{path}"/>')
        self.y += 15

    def _box(self, kind: str, x: int, width: int, lines: Sequence[tuple[str, str]]) -> None:
        top, at = self.y, len(self.parts)
        self.y += 5
        for style, text in lines:
            self._texts(style, x + _INSET, width - 2 * _INSET, text)
        self.y += 6
        rect = f'x="{x}" y="{top}" width="{width}" height="{self.y - top}"'
        self.parts.insert(at, f'<rect class="{kind}" {rect} rx="4"/>')

    def _texts(self, style: str, x: int, width: int, text: str) -> None:
        """A text on as many lines as it takes."""
        kind = f' class="{style}"' if style else ""
        for line in _wrapped(printable(text, 300), int(width / ADVANCE)):
            self.parts.append(f'<text{kind} x="{x}" y="{self.y + 13}">{_safe(line)}</text>')
            self.y += _LINE


def _wrapped(text: str, most: int) -> list[str]:
    return textwrap.wrap(text, most, break_on_hyphens=False) or [""]


def _described(registrations: Sequence[Registration]) -> str:
    """The picture in words."""
    sentences = []
    for exchange, group in survey.by_exchange(registrations):
        for each in group:
            sentence = (
                f"{each.name} gets {survey.keys(each.queue.binding_keys)} from the exchange "
                f"{exchange.name}, handled by {each.handler}"
            )
            if each.queue.dead_letters:
                sentence += f"; what it fails on is kept in {dead_letter_name(each.name)}"
            sentences.append(sentence + ".")
    return " ".join(sentences)


def _safe(text: str, most: int = 300) -> str:
    return escape(printable(text, most))
