"""Which dead letters, or undelivered events: filters and groups. Pure; also for use in Python.

::

    last_day = Selection(error_type='*Timeout*', since=parse_time('24h'))
    with DeadLetters('mailer') as dead_letters:
        for letter in filter(last_day, dead_letters):
            letter.replay()
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from typing import Any, Protocol

from domain_events.errors import ConfigurationError
from domain_events.events import DomainEvent
from domain_events.names import matches
from domain_events.text import printable


class Letter(Protocol):
    """What a dead letter and an undelivered event have in common."""

    @property
    def id(self) -> str | None:
        """The event's id."""

    @property
    def event(self) -> DomainEvent[Any] | None:
        """The event, if the body is one."""

    @property
    def routing_key(self) -> str:
        """The routing key that it was published with."""

    @property
    def subscriber(self) -> str | None:
        """Whose it is."""


def failed_at(letter: Letter) -> datetime | None:
    """When it failed; if that is unknown, when the event happened."""
    at: datetime | None = getattr(letter, "failed_at", None)
    if at is None and letter.event is not None:
        try:
            at = datetime.fromtimestamp(letter.event.timestamp, timezone.utc)
        except (ValueError, OverflowError, OSError):
            return None
    if at is not None and at.tzinfo is None:
        at = at.replace(tzinfo=timezone.utc)
    return at


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_time(text: str, now: datetime | None = None) -> datetime:
    """A time such as ``2026-11-26T10:00``, ``2026-11-26``, or ``2h``, which is two hours ago.

    Without a time zone it is the local one.

    :raises ConfigurationError: it is neither.
    """
    if ago := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip()):
        now = now or datetime.now(timezone.utc)
        try:
            return now - timedelta(seconds=float(ago[1]) * _UNITS[ago[2]])
        except OverflowError:
            pass
    else:
        try:
            # Python 3.10 does not know the Z.
            return datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text.strip())).astimezone()
        except (ValueError, OverflowError):
            pass
    raise ConfigurationError(
        f"{printable(text)!r} is not a time; write 2026-11-26T10:00, or 2h for two hours ago "
        "(s, m, h, d, w)."
    )


_MISSING = object()
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Where:
    """A condition on a value in an event's data, such as ``user.country=DE``.

    A text is compared as it stands; a number, true, false and null by their value.
    """

    path: tuple[str, ...]
    comparison: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Where:
        """Read one.

        :raises ConfigurationError: it does not have the form PATH=VALUE.
        """
        found = re.fullmatch(r"([^=!<>]+?)\s*(!=|<=|>=|=|<|>)\s*(.*)", text, re.DOTALL)
        if found is None:
            raise ConfigurationError(
                f"{printable(text)!r} is not a condition; write user.country=DE (or !=, <, <=, >, "
                ">=), with dots between the names in the data."
            )
        return cls(tuple(found[1].strip().split(".")), found[2], found[3])

    def holds(self, data: object) -> bool:
        """Whether the data meets it; a value that is missing differs from every other one."""
        value = _at(data, self.path)
        if value is _MISSING or isinstance(value, dict | list):
            return self.comparison == "!="
        given: object = self.value
        if not isinstance(value, str):
            try:
                given = json.loads(self.value)
            except ValueError:
                return self.comparison == "!="
            if isinstance(value, bool) != isinstance(given, bool):
                return self.comparison == "!="
        try:
            return _COMPARISONS[self.comparison](value, given)
        except TypeError:
            return False


def _at(data: object, path: tuple[str, ...]) -> object:
    for name in path:
        if isinstance(data, dict) and name in data:
            data = data[name]
        elif isinstance(data, list) and name.isdecimal() and int(name) < len(data):
            data = data[int(name)]
        else:
            return _MISSING
    return data


@dataclass(frozen=True)
class Selection:
    """Whether a dead letter is meant: it must meet each condition that is given.

    :param error_type: a pattern for the exception's class, with or without its module; ``*``
        stands for any characters.
    :param routing_key: a binding key.
    :param since: not failed before.
    :param until: not failed after.
    :param ids: one of these.
    :param where: each of these.
    :param subscriber: a pattern for the subscriber's name.
    """

    error_type: str | None = None
    routing_key: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    ids: frozenset[str] = frozenset()
    where: tuple[Where, ...] = ()
    subscriber: str | None = None

    def __call__(self, letter: Letter) -> bool:
        return (
            (not self.ids or letter.id in self.ids)
            and (self.routing_key is None or matches(self.routing_key, letter.routing_key))
            and (self.error_type is None or self._is_of_type(letter))
            and (
                self.subscriber is None
                or fnmatchcase(str(letter.subscriber or ""), self.subscriber)
            )
            and self._is_in_time(letter)
            and (
                not self.where
                or (
                    letter.event is not None
                    and all(each.holds(letter.event.data) for each in self.where)
                )
            )
        )

    def _is_of_type(self, letter: Letter) -> bool:
        assert self.error_type is not None
        full: str = getattr(letter, "error_type", None) or ""
        return any(fnmatchcase(name, self.error_type) for name in (full, full.rpartition(".")[2]))

    def _is_in_time(self, letter: Letter) -> bool:
        if self.since is None and self.until is None:
            return True
        at = failed_at(letter)
        return (
            at is not None
            and (self.since is None or self.since <= at)
            and (self.until is None or at <= self.until)
        )


# --- groups --------------------------------------------------------------------------------------

_FRAME = re.compile(r'^[ |+]*File "(.+)", line (\d+), in (.+)$', re.MULTILINE)
_OF_OTHERS = re.compile(
    r"site-packages|dist-packages|[/\\]lib[/\\]python\d|[/\\]Lib[/\\]|^<"
    r"|[/\\]domain_events[/\\]handling\.py"
)


def innermost_frame(traceback: str | None) -> str | None:
    """Where in the application it failed: ``/srv/mailer.py:12 in send``.

    The innermost frame that is not in a package or in Python itself, if there is one. Without the
    error's message, which may differ each time.
    """
    frames: list[tuple[str, str, str]] = _FRAME.findall(traceback or "")
    own = [frame for frame in frames if not _OF_OTHERS.search(frame[0])]
    if not frames:
        return None
    file, line, function = (own or frames)[-1]
    return f"{file}:{line} in {function}"


#: What groups can be made by.
KEYS: dict[str, Callable[[Any], str | None]] = {
    "error": lambda letter: letter.error_type,
    "frame": lambda letter: innermost_frame(letter.traceback),
    "routing-key": lambda letter: letter.routing_key,
    "subscriber": lambda letter: letter.subscriber,
}


@dataclass
class Group:
    """The dead letters that have these values in common."""

    values: tuple[str | None, ...]
    count: int = 0
    oldest: datetime | None = None
    newest: datetime | None = None

    def add(self, letter: Letter) -> None:
        """Count one more."""
        self.count += 1
        if (at := failed_at(letter)) is not None:
            self.oldest = at if self.oldest is None else min(self.oldest, at)
            self.newest = at if self.newest is None else max(self.newest, at)


def grouped(letters: Iterable[Letter], keys: Iterable[str]) -> list[Group]:
    """The groups, largest first.

    :param keys: of `KEYS`.
    """
    functions = [KEYS[key] for key in keys]
    groups: dict[tuple[str | None, ...], Group] = {}
    for letter in letters:
        values = tuple(function(letter) for function in functions)
        groups.setdefault(values, Group(values)).add(letter)
    return sorted(groups.values(), key=lambda group: -group.count)
