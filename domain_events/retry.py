"""The signals of a handler, and the delays of retries: ``Retry``, ``Reject``, ``Backoff``. Pure."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from domain_events.checks import shown

#: Delays are counted in units of a tenth of a second, by 24 binary levels (`topology`).
SHORTEST_DELAY = 0.1
LONGEST_DELAY = SHORTEST_DELAY * (2**24 - 1)


class Retry(Exception):
    """A handler raises it: try this event again in ``delay`` seconds.

    The event comes back to this subscriber only, with ``event.retries`` one higher, at most
    ``max_retries`` times (see ``Subscriber.register``); after that it is a dead letter.

    :param delay: seconds, up to 19 days; less than 0.1 counts as 0.1.
    :raises ValueError: for a negative delay, a longer one, or one that is not a number.
    """

    def __init__(self, delay: float = 10.0) -> None:
        super().__init__(delay)
        self.delay: float = checked_delay(delay, "Retry")

    def __str__(self) -> str:
        return f"try again in {self.delay:g} s"


class Reject(Exception):
    """A handler raises it: no retry can help; move the event to the dead letters at once.

    :param reason: for the person who reads the dead letter.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason: str = reason


@dataclass(frozen=True)
class Backoff:
    """How long to wait before each retry: ever longer, up to a maximum, with jitter.

    The n-th retry waits ``first * factor ** (n - 1)`` seconds, at most ``maximum``. The share
    ``jitter`` of that is random, so that events which failed together do not all return
    together: a delay of 10 s with a jitter of 0.2 lies between 8 and 10 s.
    """

    #: Seconds before the first retry.
    first: float = 1.0
    #: How many times as long each further delay is; at least 1.
    factor: float = 2.0
    #: The longest delay, in seconds.
    maximum: float = 600.0
    #: The share of each delay that is random; from 0 to 1.
    jitter: float = 0.2

    def __post_init__(self) -> None:
        checked_delay(self.first, "Backoff.first")
        checked_delay(self.maximum, "Backoff.maximum")
        # A NaN compares false.
        if not _is_number(self.factor) or not self.factor >= 1:
            raise ValueError(f"Backoff.factor must be 1 or more, not {shown(self.factor)}.")
        if not _is_number(self.jitter) or not 0 <= self.jitter <= 1:
            raise ValueError(f"Backoff.jitter must be from 0 to 1, not {shown(self.jitter)}.")

    def delay(self, retry: int) -> float:
        """Seconds to wait before the ``retry``-th retry, counted from 1."""
        try:
            longest = min(self.maximum, self.first * self.factor ** (retry - 1))
        except OverflowError:
            longest = self.maximum if self.first else 0.0
        return longest * (1 - self.jitter * random.random())


def units_of(delay: float) -> int:
    """The delay in tenths of a second, rounded up, since a retry must not come early."""
    # A whole number of tenths is seldom exact in binary: 0.3 / 0.1 is 2.9999999999999996.
    return max(1, math.ceil(round(delay / SHORTEST_DELAY, 6)))


def checked_delay(delay: float, name: str) -> float:
    """The delay, if the delay levels can hold it.

    :raises ValueError: it is out of bounds, or not a number.
    """
    # A NaN compares false.
    if not _is_number(delay) or not 0 <= delay <= LONGEST_DELAY:
        what = shown(delay)
        if hasattr(delay, "total_seconds"):
            what += "; give its total_seconds()"
        raise ValueError(f"{name} must be 0 to {LONGEST_DELAY:.0f} seconds (19 days), not {what}.")
    return delay


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
