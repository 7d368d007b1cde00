"""The evidence about each event, gathered from the records as they are written. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from faults import rolling
from faults.records import USAGE_EVERY
from faults.rolling import Announced, Ended, Release

#: After these errors an event was definitely not sent.
SURELY_NOT_SENT = frozenset({"BrokerUnavailable", "InvalidEvent"})


@dataclass
class Publication:
    """One event, and the outcome of each attempt to publish it."""

    routing_key: str
    taken: int = 0
    outcomes: list[str] = field(default_factory=list)
    first: float = 0.0  # when it was first taken
    last: float = 0.0

    @property
    def returned(self) -> bool:
        return "returned" in self.outcomes

    @property
    def surely_not_sent(self) -> bool:
        """Every attempt has ended, each with an error that guarantees it."""
        return self.taken == len(self.outcomes) and SURELY_NOT_SENT.issuperset(self.outcomes)


@dataclass
class Handling:
    """One event at one subscriber."""

    begun: Counter[int] = field(default_factory=Counter)  # how often, by the number of retries
    returned: set[int] = field(default_factory=set)
    last: float = 0.0
    # For the subscriber with several releases.
    begun_by: set[str] = field(default_factory=set)
    ends: list[Ended] = field(default_factory=list)


class Usage(NamedTuple):
    """Resources of a process: threads, descriptors, kilobytes; and the time."""

    threads: int
    descriptors: int
    kilobytes: int
    time: float


class Evidence:
    """All records of a run."""

    def __init__(self) -> None:
        self.publications: dict[str, Publication] = {}
        self.handlings: dict[tuple[str, str], Handling] = defaultdict(Handling)
        self.published = 0  # events whose publish returned
        self.handled = 0  # handlers that ended, however
        self.outcomes: Counter[str] = Counter()
        self.latest_publish = float("-inf")  # most seconds that one took beyond its deadline
        #: When handlers ended, of each subscriber.
        self.ended_at: dict[str, list[float]] = defaultdict(list)
        #: The first and the last of each process.
        self.usage: dict[str, tuple[Usage, Usage]] = {}
        self._warm: set[str] = set()
        self.ready: set[str] = set()
        #: Processes that have a release, and when they were last seen.
        self.announced: dict[str, Announced] = {}
        self.latest = 0.0  # when a handler last started or ended

    def add(self, process: str, words: list[str]) -> None:
        """Add one record."""
        word, *rest = words
        at = float(rest.pop())
        if process in self.announced:
            # Another record follows within seconds, unless the process has died.
            self.announced[process].last = at + USAGE_EVERY + 1
        if word == "take":
            publication = self.publications.setdefault(rest[0], Publication(rest[1], first=at))
            publication.taken += 1
        elif word == "done":
            self._done(self.publications[rest[0]], rest[1], float(rest[2]), at)
        elif word == "begin":
            handling = self.handlings[rest[0], rest[1]]
            handling.begun[int(rest[2])] += 1
            handling.last = at
            self.latest = max(self.latest, at)
            if rest[0] == rolling.LABEL:
                handling.begun_by.add(process)
        elif word == "ended":
            self._ended(rest[0], rest[1], Ended(process, int(rest[2]), rest[3]), at)
        elif word == "release":
            topics, retired = (tuple(filter(None, each.strip("-").split(","))) for each in rest[:2])
            release = Release(topics, retired, int(rest[2]), rest[3] == "True")
            self.announced[process] = Announced(release, at, last=at + USAGE_EVERY + 1)
        elif word == "usage":
            self._used(process, Usage(int(rest[0]), int(rest[1]), int(rest[2]), at))
        elif word == "ready":
            self.ready.add(process)
            if process in self.announced:
                self.announced[process].ready = at

    def _used(self, process: str, usage: Usage) -> None:
        # The very first is written before the program starts working; the second is the start.
        first = self.usage[process][0] if process in self._warm else usage
        if process in self.usage:
            self._warm.add(process)
        self.usage[process] = (first, usage)

    def _done(self, publication: Publication, outcome: str, beyond: float, at: float) -> None:
        if outcome == "returned" and not publication.returned:
            self.published += 1
        publication.outcomes.append(outcome)
        publication.last = at
        self.outcomes[outcome] += 1
        self.latest_publish = max(self.latest_publish, beyond)

    def _ended(self, subscriber: str, event: str, ended: Ended, at: float) -> None:
        self.handled += 1
        handling = self.handlings[subscriber, event]
        handling.last = at
        if ended.outcome == "returned":
            handling.returned.add(ended.retries)
        if subscriber == rolling.LABEL:
            handling.ends.append(ended)
        self.ended_at[subscriber].append(at)
        self.latest = max(self.latest, at)
