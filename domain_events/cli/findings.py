"""What a check has found: data, and how it is printed. Pure, apart from printing."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import click

from domain_events.text import printable

_DOCS = "https://github.com/domain-events/domain-events-rabbitmq/blob/main/docs/"
_MOST_NAMES = 4
# Of lines of text, in characters.
_NARROWEST, _WIDEST = 40, 100


class Severity(Enum):
    """How bad it is."""

    #: Events are lost or stand still, now or at the next occasion.
    ERROR = "error"
    #: It harms in certain cases, or waits for somebody.
    WARNING = "warning"
    #: Good to know; nothing is wrong.
    NOTE = "note"
    #: It could not be read.
    UNKNOWN = "unknown"


_COLOURS = {
    Severity.ERROR: "red",
    Severity.WARNING: "yellow",
    Severity.NOTE: "cyan",
    Severity.UNKNOWN: "magenta",
}


@dataclass(frozen=True)
class Finding:
    """One finding."""

    severity: Severity
    what: str
    #: The queue, exchange, node or subscriber.
    where: str
    #: Why it harms.
    why: str
    #: What to do.
    do: str
    #: The section of the documentation: the file, and the anchor of its title.
    see: str
    #: The check that has found it.
    check: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether something is wrong."""
        return self.severity in (Severity.ERROR, Severity.WARNING)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "severity": self.severity.value,
            "check": self.check,
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "do": self.do,
            "docs": self.see and _DOCS + self.see,
        }

    def show(self) -> None:
        """Print it, a label on each line; in colour on a terminal."""
        label = self.severity.value.upper()
        click.secho(f"{label:8}", fg=_COLOURS[self.severity], bold=True, nl=False)
        click.secho(f"{self.check}: {printable(self.what, 1000)}", bold=True)
        for name, text in (("where", self.where), ("why", self.why), ("do", self.do)):
            if text:
                begin = f"        {name + ':':7}"
                click.echo(_filled(printable(text, 4000), begin))
        if self.see:
            click.echo(f"        docs:  {_DOCS}{self.see}")


def show_unknown(findings: Iterable[Finding]) -> None:
    """Print what could not be read, those of one reason together."""
    together: dict[tuple[str, str], list[Finding]] = {}
    for each in findings:
        together.setdefault((each.why, each.do), []).append(each)
    for those in together.values():
        checks = ", ".join(each.check for each in those)
        replace(those[0], check="could not be read", what=checks).show()


def _filled(text: str, begin: str) -> str:
    return textwrap.fill(
        text,
        _width(),
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        # A command, or a URL, is to be copied.
        break_long_words=False,
        break_on_hyphens=False,
    )


def _width() -> int:
    """That of the terminal, at most 100 characters."""
    if not sys.stdout.isatty():
        return _WIDEST
    return min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size().columns))


def listed(names: Iterable[str]) -> str:
    """The names of what a finding is about: the first few, and how many more there are."""
    found = list(names)
    few = ", ".join(printable(name) for name in found[:_MOST_NAMES])
    more = len(found) - _MOST_NAMES
    return f"{few} and {more} more" if more > 0 else few


def plainly(answer: str) -> str:
    """A broker's answer, without what it did to a channel of this program."""
    return answer.removeprefix("closed by the broker: ")


def summary(findings: Iterable[Finding], checks: int) -> str:
    """One line about all of it."""
    found = [each.severity for each in findings]
    counts = {kind: found.count(kind) for kind in Severity}
    parts = [
        f"{number} {kind.value}{'s' if number != 1 else ''}"
        for kind, number in counts.items()
        if number and kind is not Severity.UNKNOWN
    ]
    unknown = counts[Severity.UNKNOWN]
    text = ", ".join(parts) or "nothing found"
    return f"{checks} checks: {text}" + (f"; {unknown} could not be read" if unknown else "")
