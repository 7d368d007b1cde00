"""The embedded broker's clock, for delays and expiry: real time, or moved by hand.

Times are whole nanoseconds, so that delays add up exactly.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from domain_events.log import Log

log = Log("domain_events")

SECOND = 1_000_000_000
_PAUSE_AFTER_AN_ERROR = SECOND // 10


class RealTime:
    """Real time. Its thread runs only while a timer is pending."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next: int | None = None
        self._thread: threading.Thread | None = None

    def now(self) -> int:
        return time.monotonic_ns()

    def wake_at(self, when: int, tick: Callable[[], int | None]) -> None:
        """Call ``tick`` then; it runs the timers that are due, and returns when the next one is."""
        with self._changed:
            self._next = when if self._next is None else min(self._next, when)
            self._changed.notify()
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, args=(tick,), name="domain-events-memory-clock", daemon=True
                )
                # From Python 3.12 on, no thread can start during interpreter shutdown, when no
                # retry matters any more. Out of resources: the next call tries again.
                with contextlib.suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    def stop(self) -> None:
        """End the thread: no timer is pending any more."""
        with self._changed:
            self._next = None
            self._changed.notify()

    def _run(self, tick: Callable[[], int | None]) -> None:
        while True:
            with self._changed:
                while self._next is not None and (left := self._next - self.now()) > 0:
                    self._changed.wait(left / SECOND)
                if self._next is None:
                    self._thread = None
                    return
                self._next = None
            # Without the lock: the store has its own, and calls `wake_at` under it.
            try:
                due = tick()
            except BaseException:
                # Injected by another thread, for example. The timers are still in the heap.
                log.exception("Internal error in the embedded broker's clock.")
                due = self.now() + _PAUSE_AFTER_AN_ERROR
            if due is not None:
                self.wake_at(due, tick)


class VirtualTime:
    """Time that stands still until `memory.Store.advance` moves it."""

    def __init__(self) -> None:
        self._now = 0

    def now(self) -> int:
        return self._now

    def move_to(self, now: int) -> None:
        self._now = max(self._now, now)

    def wake_at(self, when: int, tick: Callable[[], int | None]) -> None:
        """Nothing to do: `memory.Store.advance` calls ``tick``."""

    def stop(self) -> None:
        """Nothing to do."""


Clock: TypeAlias = RealTime | VirtualTime
