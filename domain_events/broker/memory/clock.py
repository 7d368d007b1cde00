"""The time by which an embedded broker delays and expires: real, or moved by hand.

Times are whole nanoseconds, so that delays add up to what they should.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from domain_events.log import Log

log = Log("domain_events")

SECOND = 1_000_000_000
# After an error.
_AGAIN = SECOND // 10


class Clock(Protocol):
    """What a broker asks of its clock. ``tick`` does what is due, and says what is due next."""

    def now(self) -> int:
        """The time."""

    def wake_at(self, when: int, tick: Callable[[], int | None]) -> None:
        """Have ``tick`` called when it is ``when``, or soon after."""

    def stop(self) -> None:
        """Nothing is due any more."""


class RealTime:
    """Time that passes. A thread waits while something is due one day, and only then."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next: int | None = None
        self._thread: threading.Thread | None = None

    def now(self) -> int:
        return time.monotonic_ns()

    def wake_at(self, when: int, tick: Callable[[], int | None]) -> None:
        with self._changed:
            if self._next is not None and self._next <= when:
                return
            self._next = when
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, args=(tick,), name="domain-events-memory-clock", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    # From 3.12 on, none can be started while the interpreter shuts down; nobody
                    # is left then to wait for a retry. If it was for want of resources, the next
                    # who asks tries again.
                    self._next = None
                else:
                    self._thread = thread
            else:
                self._changed.notify()

    def stop(self) -> None:
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
            # Without the lock: the broker has its own, and calls `wake_at` under it.
            try:
                due = tick()
            except BaseException:
                # Injected by another thread, for example. What was due is still so.
                log.exception("Internal error in the embedded broker's clock.")
                due = self.now() + _AGAIN
            if due is not None:
                self.wake_at(due, tick)


class VirtualTime:
    """Time that stands still until somebody moves it: see `Store.advance`."""

    def __init__(self) -> None:
        self._now = 0

    def now(self) -> int:
        return self._now

    def move_to(self, now: int) -> None:
        """Let it be later."""
        self._now = max(self._now, now)

    def wake_at(self, when: int, tick: Callable[[], int | None]) -> None:
        pass  # whoever moves the time calls `tick`

    def stop(self) -> None:
        pass
