"""Releases of one subscriber, deployed one after the other while another still runs. Pure.

A release lists some topics: the first words of routing keys. The next one adds a topic, or removes
one that the last one listed, or switches ``max_retries`` or ``dead_letter``; or everything is
rolled back. Old and new processes of one name share a queue meanwhile, so each receives events that
only the other one lists. Such an event must be handled by a process that lists it, or become a dead
letter with that reason; only events of *retired* topics may be dropped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

#: The subscriber's name in the records, the report and the queue.
LABEL = "rolling"

ALWAYS = "t0"  # in each release: its events must not stop
# Listed by some releases.
TOPICS = (ALWAYS, "t1", "t2", "t3")
# Listed by some releases, and retired by those that no longer list it.
RETIRABLE = ("t4", "t5")

#: All published topics, whether listed or not.
PUBLISHED = (*TOPICS, *RETIRABLE)

MAX_RETRIES = 3
#: For the library's `_HAND_BACK_DELAYS`: seconds, instead of some fifteen minutes.
HAND_BACK_DELAYS = (0.2, 0.4, 0.8, 1.5, 2.5, 4.0)

# A release that retires a topic may drop its events for this long after they were published,
# including their retries and hand-backs.
RETIREMENT = 30.0


@dataclass(frozen=True)
class Release:
    """The options with which a process of the subscriber registers."""

    topics: tuple[str, ...]
    retired: tuple[str, ...] = ()
    max_retries: int = MAX_RETRIES
    dead_letter: bool = True

    def __str__(self) -> str:
        words = ["+".join(self.topics)]
        if self.retired:
            words.append("without " + "+".join(self.retired))
        if not self.max_retries:
            words.append("no retries")
        if not self.dead_letter:
            words.append("no dead letters")
        return " ".join(words)


#: The last release, which drains the queue.
LAST = Release(PUBLISHED)


def releases(seed: int) -> Iterator[Release]:
    """An endless series of releases: each changes something of the one before it."""
    source = random.Random(f"releases {seed}")
    release = Release((ALWAYS, "t1", "t4"))
    while True:
        yield release
        topics, retired = set(release.topics), set(release.retired)
        others = [topic for topic in PUBLISHED if topic not in topics]
        removable = sorted(topics - {ALWAYS})
        # About half of the topics are listed at a time.
        if source.random() < len(others) / (len(others) + len(removable)):
            added = source.choice(others)
            topics.add(added)
            retired.discard(added)
        else:
            removed = source.choice(removable)
            topics.discard(removed)
            if removed in RETIRABLE:
                retired.add(removed)
        release = Release(
            tuple(sorted(topics)),
            tuple(sorted(retired)),
            source.choice((0, MAX_RETRIES, MAX_RETRIES)),
            source.random() < 0.8,
        )


class Plan:
    """The next and the previous release; a rollback is followed by another release."""

    def __init__(self, seed: int) -> None:
        self._releases = releases(seed)
        self.current = next(self._releases)
        self._before = [self.current]

    def forward(self) -> Release:
        self._before = [*self._before[-3:], self.current]
        self.current = next(self._releases)
        return self.current

    def back(self) -> Release:
        if self._before:
            self.current = self._before.pop()
        return self.current

    def next(self) -> Release:
        """A release whose deployment is started, and abandoned."""
        return next(self._releases)


# --- the judgement -------------------------------------------------------------------------------


@dataclass
class Announced:
    """A process, and the release that it registered."""

    release: Release
    begun: float
    ready: float = float("inf")  # when `register` had returned
    last: float = 0.0  # when it was last seen alive


@dataclass
class Ended:
    """How a handler ended."""

    process: str
    retries: int
    outcome: str


def required(processes: Sequence[Announced], topic: str, published: float) -> bool:
    """Whether an event must be handled, or be a dead letter.

    It must if a process that lists its topic had bound it, and no process that retires the topic
    ran from then on until the time of the event was over.
    """
    until = published + RETIREMENT
    retiring = [each for each in processes if topic in each.release.retired]
    return any(
        not any(other.begun <= until and other.last >= each.ready for other in retiring)
        for each in processes
        if topic in each.release.topics and each.ready <= published
    )


def finished(ends: Sequence[Ended], processes: Mapping[str, Announced]) -> bool:
    """Whether a handler returned; or failed finally where no dead letters were kept."""
    for end in ends:
        if end.outcome == "returned":
            return True
        release = processes[end.process].release
        final = end.outcome != "Retry" or end.retries >= release.max_retries
        if final and not release.dead_letter:
            return True
    return False
