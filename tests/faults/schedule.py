"""The schedule of faults. Pure: the same seed gives the same schedule.

A schedule is a series of groups. A group's faults start at offsets from its beginning, singly or
together; the next group begins some seconds after the last fault of this one is over.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Needs = Literal["", "node", "cluster"]


@dataclass(frozen=True)
class Kind:
    """A kind of fault. Two in one lane never overlap: they would undo each other."""

    lane: str
    shortest: float = 0.0  # seconds from its beginning to its end
    longest: float = 0.0
    needs: Needs = ""  # control over the broker's process, or over those of a cluster


KINDS = {
    "broker-killed": Kind("broker", 0, 2, "node"),
    "broker-restarted": Kind("broker", 0, 2, "node"),
    "broker-paused": Kind("broker", 1, 8, "node"),
    "memory-alarm": Kind("broker", 2, 6, "node"),
    "connections-closed": Kind("broker", needs="node"),
    # Together in this order, whatever time the broker takes for the first.
    "killed-in-alarm": Kind("broker", 2, 4, "node"),
    "killed-after-close": Kind("broker", 1, 3, "node"),
    "queue-deleted": Kind("broker"),
    "exchange-deleted": Kind("broker"),
    "wire-cut": Kind("cut"),
    "wire-stalled": Kind("wire", 1, 7),
    "wire-slow": Kind("wire", 2, 6),
    "wire-half-open": Kind("cut"),
    "subscriber-killed": Kind("programs"),
    "subscribers-killed": Kind("programs"),
    "subscriber-terminated": Kind("programs"),
    "publisher-killed": Kind("programs"),
    "publisher-terminated": Kind("programs"),
    "publisher-forked": Kind("programs"),
    "rolled-forward": Kind("programs", 0.2, 1.5),  # seconds that old and new are side by side
    "rolled-back": Kind("programs", 0.2, 1.5),
    "poisoned": Kind("programs"),
    "stopped-in-a-row": Kind("programs"),
    "node-killed": Kind("broker", 1, 5, "cluster"),
    "majority-killed": Kind("broker", 1, 5, "cluster"),
}

MIXED = [name for name, kind in KINDS.items() if kind.needs != "cluster"]
# Here the fault of a single node does not stop the broker; they have to happen in turn.
CLUSTER = [
    "node-killed",
    "node-killed",
    "node-killed",
    "majority-killed",
    "wire-cut",
    "wire-stalled",
    "subscribers-killed",
    "subscriber-terminated",
    "publisher-killed",
    "publisher-forked",
]

_TOGETHER = 0.4


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, offset and duration, and a number that selects the target."""

    kind: str
    offset: float = 0.0
    seconds: float = 0.0
    choice: int = 0


@dataclass(frozen=True)
class Group:
    """Faults that belong together, and the quiet seconds before the first."""

    gap: float
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        return " + ".join(fault.kind for fault in self.faults)


def mixed(seed: int, kinds: Sequence[str]) -> Iterator[Group]:
    """All of these kinds, in random order, again and again; some of them in pairs."""
    source = random.Random(seed)
    bag: list[str] = []
    while True:
        if not bag:
            bag = source.sample(kinds, len(kinds))
        first = _fault(bag.pop(), source, 0.0)
        faults = [first]
        others = [name for name in bag if KINDS[name].lane != KINDS[first.kind].lane]
        if others and source.random() < _TOGETHER:
            bag.remove(others[-1])
            # While the first one lasts, or during the recovery from it.
            faults.append(_fault(others[-1], source, source.uniform(0, first.seconds + 1)))
        yield Group(round(source.uniform(0.5, 2.5), 2), tuple(faults))


def _fault(name: str, source: random.Random, offset: float) -> Fault:
    kind = KINDS[name]
    seconds = source.uniform(kind.shortest, kind.longest)
    return Fault(name, round(offset, 2), round(seconds, 2), source.randrange(10_000))


def repeated(
    seed: int, faults: Sequence[Fault], shortest: float, longest: float
) -> Iterator[Group]:
    """The same faults again and again, after random gaps."""
    source = random.Random(seed)
    while True:
        gap = round(source.uniform(shortest, longest), 2)
        yield Group(gap, tuple(_chosen(fault, source) for fault in faults))


def _chosen(fault: Fault, source: random.Random) -> Fault:
    return Fault(fault.kind, fault.offset, fault.seconds, source.randrange(10_000))
