"""Small helpers that tests import: waiting for a condition, and names that are cleaned up."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import onlooker
import pytest

T = TypeVar("T")

#: For tests that take minutes.
thorough = pytest.mark.skipif(
    not os.environ.get("DOMAIN_EVENTS_TEST_FAULTS"),
    reason="takes minutes: set DOMAIN_EVENTS_TEST_FAULTS=1",
)

DELAY_LEVELS = 24


def wait_until(
    condition: Callable[[], T], timeout: float = 30.0, message: str = "", interval: float = 0.01
) -> T:
    """Poll `condition` until it is true and return its value; fail after `timeout` seconds.

    Tests wait with this and never sleep for a fixed time. The timeout is for the test that fails:
    it is far above what any condition takes on a machine that runs other tests meanwhile.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            what = message or getattr(condition, "__name__", "the condition")
            raise AssertionError(f"not within {timeout:g} s: {what} (last value: {value!r})")
        time.sleep(interval)


@contextmanager
def sooner_than(seconds: float) -> Iterator[None]:
    """Fail if the block takes half of `seconds` or longer.

    For promises not to wait: `seconds` is how long the block would take if it did wait - a timeout
    that the test has chosen, or a heartbeat. Half of that also holds on a busy machine, which a
    bound just above the time on an idle one does not.
    """
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    assert took < seconds / 2, f"took {took:.1f} s; to wait would have taken {seconds:g} s"


class Names:
    """Names of queues and exchanges of one test, deleted from its broker when the test is over.

    `queue()` covers the subscriber's queue and its dead letters (`<name>-dl`). `exchange()` covers
    what an exchange brings with it: `.due`, `.undelivered` and the delay levels.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self.url = url
        self.prefix = prefix
        self._queues: list[str] = []
        self._exchanges: list[str] = []

    def queue(self, label: str = "q") -> str:
        name = f"{self.prefix}-{label}"
        self._queues += [name, f"{name}-dl"]
        return name

    def exchange(self, label: str = "x") -> str:
        name = f"{self.prefix}-{label}"
        levels = [f"{name}.delay.{level:02}" for level in range(DELAY_LEVELS)]
        self._queues += [f"{name}.undelivered", *levels]
        self._exchanges += [name, f"{name}.due", f"{name}.undelivered", *levels]
        return name

    def add(self, *, queue: str | None = None, exchange: str | None = None) -> None:
        """Delete a name that was not made here as well."""
        if queue is not None:
            self._queues.append(queue)
        if exchange is not None:
            self._exchanges.append(exchange)

    def delete(self) -> None:
        """Delete them; to delete what is not there is no error. A few ms, also for an exchange."""
        if not self._queues and not self._exchanges:
            return
        onlooker.delete(
            self.url,
            queues=dict.fromkeys(self._queues),
            exchanges=dict.fromkeys(self._exchanges),
        )
        self._queues.clear()
        self._exchanges.clear()


def prefix_of(nodeid: str, token: str) -> str:
    """A short prefix for a test's names that says whose they are, as `a-restart-3f9a2c`."""
    function = nodeid.rpartition("::")[2].partition("[")[0]
    words = re.sub(r"[^a-z0-9]+", "-", function.lower()).removeprefix("test-")
    return f"{words[:24].strip('-')}-{token}"
