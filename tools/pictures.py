"""Draws the pictures of the documentation: ``python tools/pictures.py`` writes docs/pictures/*.svg.

Each is an SVG of 350 units, the room of a phone of 390 pixels, light or dark as the reader's screen
is, with a title and a description of what one sees. tests/test_pictures.py compares the files with
what this draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
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
_LETTER, _CODE_LETTER = 7.0, 7.3


class Sheet:
    """A drawing: shapes and texts in the order in which they were added."""

    def __init__(self, title: str, description: str) -> None:
        self.title = title
        self.description = description
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
        light = " ".join(f"{name} {{ {rule} }}" for name, rule, _ in _RULES)
        dark = " ".join(f"{name} {{ {rule} }}" for name, _, rule in _RULES)
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


# --- the pictures --------------------------------------------------------------------------------


def life_of_an_event() -> str:
    """The whole way, from a publisher to two subscribers, a retry and a dead letter."""
    sheet = Sheet(
        "The life of an event",
        "A shop publishes user.registered to the exchange domain-events. It reaches the queues of "
        "two subscribers, mailer and ledger. The mailer's handler requests a retry, and the event "
        "returns to the mailer alone after 30 seconds. The ledger's handler fails, and the event "
        "is kept among the ledger's dead letters, from where it is replayed.",
    )
    sheet.box(70, 10, 210, 44, "box", "publish_domain_event(", "'user.registered', ...)", code=2)
    sheet.arrow((175, 54), (175, 84))
    sheet.text(182, 74, "confirmed: on disk", "faint")
    sheet.box(85, 86, 180, 34, "box round", "domain-events", code=1)
    for x, key, name, handler in (
        (85, "user.*", "mailer", "send_mail"),
        (265, "#", "ledger", "book"),
    ):
        sheet.arrow((175 + (x - 175) / 2, 120), (x, 158))
        sheet.text(x + (-34 if x < 175 else 24), 142, key, "mid code")
        sheet.box(x - 65, 160, 130, 34, "queue", name, code=1)
        sheet.arrow((x, 194), (x, 220))
        sheet.box(x - 65, 222, 130, 34, "box", f"{handler}(event)", code=1)
    sheet.arrow((60, 256), (60, 298))
    sheet.text(66, 282, "Retry(30)", "code")
    sheet.box(20, 300, 110, 46, "queue", "waits 30 s, for", "mailer alone")
    sheet.arrow((20, 322), (10, 322), (10, 177), (18, 177), again=True)
    sheet.arrow((290, 256), (290, 298))
    sheet.text(284, 282, "any exception", "end")
    sheet.box(176, 300, 154, 46, "kept", "ledger-dl", "kept, with the reason", code=1)
    sheet.arrow((330, 322), (341, 322), (341, 177), (332, 177), again=True)
    sheet.text(336, 364, "replay, by an operator", "end faint")
    return sheet.svg()


def delay_levels() -> str:
    """How 1.3 seconds are waited for in levels."""
    sheet = Sheet(
        "A retry after 1.3 seconds",
        "1.3 seconds are 13 tenths, in binary 1101. The event waits 0.8 seconds in level 3 and 0.4 "
        "seconds in level 2, passes level 1 without waiting, waits 0.1 seconds in level 0, and "
        "returns through domain-events.due to the queue of its own subscriber.",
    )
    sheet.text(175, 24, "1.3 s = 13 tenths of a second = 1101", "mid bold")
    sheet.text(14, 52, "level", "faint")
    sheet.text(112, 52, "bit", "mid faint")
    sheet.text(336, 52, "still to wait", "end faint")
    left = 1.3
    y = 62
    for level, bit in ((3, 1), (2, 1), (1, 0), (0, 1)):
        seconds = 2**level / 10
        sheet.text(14, y + 22, f"{level}: {seconds:g} s")
        sheet.text(112, y + 22, str(bit), "mid code")
        sheet.text(336, y + 22, f"{left:.1f} s", "end")
        if bit:
            sheet.box(140, y, 130, 34, "queue", f"waits {seconds:g} s")
        else:
            sheet.text(205, y + 22, "passes", "mid faint")
        left = round(left - seconds * bit, 1)
        sheet.arrow((205, y + (34 if bit else 26)), (205, y + 48))
        y += 50
    sheet.text(14, y + 22, "domain-events.due", "code")
    sheet.box(152, y, 106, 34, "box round", "is due")
    sheet.text(336, y + 22, "0.0 s", "end")
    sheet.arrow((205, y + 34), (205, y + 48))
    sheet.box(140, y + 50, 130, 34, "queue", "mailer", code=1)
    return sheet.svg()


def publishing() -> str:
    """What a crash leaves, before and after the confirm."""
    return (
        Timeline(
            "Publishing: what a crash leaves",
            "A program publishes an event, RabbitMQ stores it on disk in every bound queue and "
            "confirms it, and the call returns. If the program or the broker dies before the "
            "confirm, nobody knows whether the event is stored, and the call raises or sends it "
            "again with the same id. After the confirm it is stored.",
            ["Your thread", "RabbitMQ"],
        )
        .send("Your thread", "RabbitMQ", "publish the event")
        .work("RabbitMQ", "on disk, in each queue")
        .kill("Killed here: perhaps stored.", "Connection lost: sent again, same id")
        .send("RabbitMQ", "Your thread", "confirm")
        .kill("The call has returned: stored,", "whoever is killed now")
        .svg()
    )


def handling() -> str:
    """What a crash leaves, before and after the ack."""
    return (
        Timeline(
            "Handling: what a crash leaves",
            "RabbitMQ delivers an event, the handler runs and returns, and the event is acked. If "
            "the process is killed at any moment before the ack has arrived, the event is "
            "delivered again with the same id.",
            ["RabbitMQ", "Handler"],
        )
        .send("RabbitMQ", "Handler", "event")
        .work("Handler", "runs, and returns", 36)
        .kill("Killed before the ack: it comes again,", "with the same id")
        .send("Handler", "RabbitMQ", "ack")
        .send("RabbitMQ", "Handler", "next event")
        .svg()
    )


def moving() -> str:
    """A retry, a dead letter, a replay."""
    return (
        Timeline(
            "Retry, dead letter, replay: one movement",
            "The event is published to its new queue, the broker confirms it there, and only then "
            "is the original acked. If the process is killed before the confirm, the original is "
            "delivered again. If it is killed between the confirm and the ack, there are two "
            "copies, never none.",
            ["Its queue", "Subscriber", "New queue"],
        )
        .send("Its queue", "Subscriber", "event")
        .send("Subscriber", "New queue", "publish")
        .kill("Killed here: the event comes again")
        .send("New queue", "Subscriber", "confirm")
        .kill("Killed here: two copies, never none")
        .send("Subscriber", "Its queue", "ack")
        .svg()
    )


PICTURES: dict[str, Callable[[], str]] = {
    "life-of-an-event.svg": life_of_an_event,
    "delay-levels.svg": delay_levels,
    "publishing.svg": publishing,
    "handling.svg": handling,
    "moving.svg": moving,
}


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())
        print(FOLDER / name)


if __name__ == "__main__":
    main()
