"""The kinds of events: what their handler does, and the required outcome. Pure.

The kind is in the routing key, ``<topic>.<kind>``, so that a record of the key is sufficient.
The topic decides which subscribers get the event; it is ``event`` for most.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

RETURNED = "returned"
DEAD_LETTER = "dead letter"

POISON = "poison"  # it kills its process, each time

#: The weight with which each kind is published.
MIXED: Mapping[str, float] = {
    "ok": 850,
    "slow": 40,  # the handler sleeps
    "raise": 20,  # it raises: a dead letter
    "reject": 10,  # it raises Reject: the same
    "retry.1": 40,  # it raises Retry this many times, then returns
    "retry.2": 20,
    "exhaust": 15,  # it always raises Retry
    "die": 0.5,  # it kills its process, the first time
}


class Fate(NamedTuple):
    """The required outcome of an event at one subscriber."""

    end: str
    last_retry: int  # the handler sees retries from 0 to this, never more


def fate(routing_key: str, max_retries: int) -> Fate:
    """The required outcome at a subscriber with ``max_retries``."""
    kind = routing_key.split(".")[1]
    if kind in ("raise", "reject", POISON):
        return Fate(DEAD_LETTER, 0)
    if kind == "exhaust":
        return Fate(DEAD_LETTER, max_retries)
    if kind == "retry":
        wanted = int(routing_key.split(".")[2])
        return Fate(RETURNED, wanted) if wanted <= max_retries else Fate(DEAD_LETTER, max_retries)
    if kind == "later":
        return Fate(RETURNED, 1)
    return Fate(RETURNED, 0)


class Mix:
    """Draws topics and kinds of events, according to their weights."""

    def __init__(
        self, topics: Mapping[str, float], kinds: Mapping[str, float], source: random.Random
    ) -> None:
        self._topics = topics
        self._kinds = kinds
        self._source = source

    def routing_key(self) -> str:
        return f"{self._draw(self._topics)}.{self._draw(self._kinds)}"

    def _draw(self, weights: Mapping[str, float]) -> str:
        return self._source.choices(list(weights), list(weights.values()))[0]
