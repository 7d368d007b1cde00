"""Spreads work over time: at most so many steps a second."""

from __future__ import annotations

import time

# Seconds: what was late for a moment is made up for, and a long wait is not.
_MADE_UP_FOR = 1.0


class Pace:
    """Waits before each step; without a rate it does not wait.

    :param rate: at most so many steps a second, or None.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._next_at = time.monotonic()

    def step(self) -> None:
        """Wait until the next step may begin."""
        if not self._rate:
            return
        time.sleep(max(0.0, self._next_at - time.monotonic()))
        self._next_at = max(self._next_at, time.monotonic() - _MADE_UP_FOR) + 1.0 / self._rate
