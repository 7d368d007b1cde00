"""One queue of the embedded broker: what is ready, in order, and who takes it. Knows no threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from domain_events.broker.memory.clock import SECOND
from domain_events.message import Message
from domain_events.topology import Queue


@dataclass(eq=False, slots=True)
class Entry:
    """A message in a queue."""

    message: Message
    position: int
    expires: int | None = None
    redelivered: bool = False
    #: How often a consumer was lost while it held this.
    failures: int = 0
    #: How often it came back in all.
    returns: int = 0


class Taker(Protocol):
    """A consumer, as its queue sees it."""

    def has_room(self) -> bool:
        """Whether it takes another entry."""

    def take(self, entry: Entry) -> None:
        """Take it."""

    def cancelled(self) -> None:
        """The queue is no more."""


@dataclass(eq=False)
class QueueState:
    """A queue: its declaration, its entries that are ready, its consumers."""

    declaration: Queue
    #: The connection that an exclusive queue belongs to.
    owner: object = None
    ready: deque[Entry] = field(default_factory=deque)
    #: How many of those that are ready were given back to a quorum queue: they stand in front.
    returned: int = 0
    takers: deque[Taker] = field(default_factory=deque)
    #: Entries that could not be handed to where dead letters go: there is no queue yet.
    parked: list[tuple[Entry, str]] = field(default_factory=list)
    #: When it goes, if nobody uses it until then.
    unused_until: int | None = None
    deleted: bool = False

    @property
    def name(self) -> str:
        return self.declaration.name

    def argument(self, name: str) -> Any:
        return self.declaration.arguments.get(name)

    @property
    def lifetime(self) -> int | None:
        """How long an entry is kept, in nanoseconds."""
        return _from_milliseconds(self.argument("x-message-ttl"))

    @property
    def patience(self) -> int | None:
        """How long the queue is kept while nobody uses it, in nanoseconds."""
        return _from_milliseconds(self.argument("x-expires"))

    @property
    def keeps_what_it_cannot_move(self) -> bool:
        return bool(self.argument("x-dead-letter-strategy") == "at-least-once")

    def get(self) -> Entry:
        """Take out the first entry that is ready."""
        self.returned = max(0, self.returned - 1)
        return self.ready.popleft()

    def put_back(self, entries: Iterable[Entry]) -> None:
        """Return entries that were held, in the order in which they were delivered.

        A classic queue has them where they were. A quorum queue has them in front, behind those
        that were given back before.
        """
        entries = list(entries)
        for entry in entries:
            entry.redelivered = True
        if self.argument("x-queue-type") == "quorum":
            self.ready.rotate(-self.returned)
            self.ready.extendleft(reversed(entries))
            self.ready.rotate(self.returned)
            self.returned += len(entries)
            return
        for entry in sorted(entries, key=_position, reverse=True):
            if not self.ready or entry.position < self.ready[0].position:
                self.ready.appendleft(entry)
            else:
                self.ready = deque(sorted([entry, *self.ready], key=_position))

    def next_taker(self) -> Taker | None:
        """Whose turn it is, among those that have room."""
        for _ in range(len(self.takers)):
            taker = self.takers[0]
            self.takers.rotate(-1)
            if taker.has_room():
                return taker
        return None

    def same_as(self, declaration: Queue) -> str:
        """Empty if the declaration describes this queue, else the difference, as AMQP says it."""
        mine = self.declaration
        for flag in ("durable", "auto_delete", "exclusive"):
            if getattr(mine, flag) != getattr(declaration, flag):
                return _inequivalent(flag, declaration, getattr(mine, flag))
        here, asked = _compared(mine), _compared(declaration)
        for name in sorted({*here, *asked}):
            if here.get(name) != asked.get(name):
                return _inequivalent(name, declaration, here.get(name))
        return ""


def _position(entry: Entry) -> int:
    return entry.position


def _from_milliseconds(value: int | None) -> int | None:
    return None if value is None else value * SECOND // 1000


def _compared(declaration: Queue) -> dict[str, object]:
    # No type is the same as this one.
    return {"x-queue-type": "classic", **declaration.arguments}


def _inequivalent(argument: str, declaration: Queue, current: object) -> str:
    return f"inequivalent arg {argument!r} for queue {declaration.name!r}: current is {current!r}"
