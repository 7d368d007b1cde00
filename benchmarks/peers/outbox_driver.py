"""Shared by the drivers of the outboxes: what each of them does, and the protocol with the runner.

A driver is a separate program, run by the Python of its peer's virtual environment::

    python peers/outbox_faststream_driver.py relay '{"url": "amqp://...", "database": {...}, ...}'

As in ``driver``, it prints a line of JSON when it is ready, and waits for a line on its standard
input before it does what is measured.
"""

from __future__ import annotations

import ctypes
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from driver import ROUTING_KEY, Data, envelope, say, wait_for_runner

#: The events are about so many objects, in turn.
OBJECTS = 1000
ORDERS = "CREATE TABLE orders (id integer NOT NULL, customer varchar(50) NOT NULL)"
INSERT = "INSERT INTO orders (id, customer) VALUES"

#: What a transaction does about its event.
WITHOUT, AFTER, OUTBOX = "without", "after", "outbox"
# Events of one transaction while the outbox is filled.
_FILLED_AT_ONCE = 100
# Transactions of one kind before the next kind has its turn, and at first, for warming up.
_BLOCK = 25


def event_of(number: int) -> Data:
    """An envelope of about 200 bytes."""
    return {
        **envelope({"n": number, "text": "x" * 8}, ROUTING_KEY),
        "domain_object_id": about(number),
    }


def about(number: int) -> str:
    return f"user-{number % OBJECTS}"


class Outbox:
    """What a driver implements, in the way that its library documents."""

    #: The kinds of transactions that it knows.
    kinds: Sequence[str] = (WITHOUT, OUTBOX)

    def __init__(self, options: Data) -> None:
        self.options = options
        self.url: str = options["url"]
        #: host, port, user, password, name
        self.database: Data = options["database"]

    def load(self) -> None:
        """Import the library, and prepare what does not belong to a transaction."""

    def create(self) -> None:
        """Make the library's tables, and `ORDERS`."""
        raise NotImplementedError

    def write(self, numbers: Sequence[int]) -> None:
        """Write these events in one transaction; nothing is sent."""
        raise NotImplementedError

    def transact(self, number: int, kind: str) -> None:
        """One transaction: an order, and its event."""
        raise NotImplementedError

    def settle(self) -> None:
        """Wait until what this process sends by itself is sent."""

    def relay(self, ready: Callable[[], None]) -> None:
        """Send what is in the outbox, and what comes, forever; first call `ready`."""
        raise NotImplementedError

    def handle(self, handle: Callable[[int], None]) -> None:
        """Handle events forever; only this library's driver does."""
        raise NotImplementedError


def main(kind: type[Outbox]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a relay would run forever
    role, options = sys.argv[1], json.loads(sys.argv[2])
    outbox = kind(options)
    outbox.load()
    _ROLES[role](outbox, options)


def _fill(outbox: Outbox, options: Data) -> None:
    outbox.create()
    count: int = options["count"]
    for first in range(0, count, _FILLED_AT_ONCE):
        outbox.write(range(first, min(count, first + _FILLED_AT_ONCE)))
    say(count=count)


def _relay(outbox: Outbox, _options: Data) -> None:
    def ready() -> None:
        say(ready=True)
        wait_for_runner()

    outbox.relay(ready)


def _at_rate(outbox: Outbox, options: Data) -> None:
    """Transactions at a steady rate; when each of them was committed, on the machine's clock."""
    count, rate = options["count"], options["rate"]
    say(ready=True)
    wait_for_runner()
    committed = []
    begun = time.monotonic()
    for number in range(count):
        pause = begun + number / rate - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        outbox.transact(number, OUTBOX)
        committed.append(time.monotonic())
    outbox.settle()
    say(times=dict(enumerate(committed)))


def _handle(outbox: Outbox, options: Data) -> None:
    """When each event was handled first."""
    count: int = options["count"]
    handled: dict[int, float] = {}

    def handle(number: int) -> None:
        handled.setdefault(number, time.monotonic())
        if len(handled) == count:
            say(times=handled)

    outbox.handle(handle)


def _cost(outbox: Outbox, options: Data) -> None:
    """Seconds of a transaction of each kind, in turn."""
    say(ready=True)
    wait_for_runner()
    taken: dict[str, list[float]] = {each: [] for each in outbox.kinds}
    number = 0
    for turn in range(options["count"] // _BLOCK + 1):
        for each in outbox.kinds:
            for _ in range(_BLOCK):
                number += 1
                begun = time.perf_counter()
                outbox.transact(number, each)
                if turn:
                    taken[each].append(time.perf_counter() - begun)
            outbox.settle()
    say(**{each: statistics.median(times) for each, times in taken.items()})


_ROLES: dict[str, Callable[[Outbox, Data], None]] = {
    "fill": _fill,
    "relay": _relay,
    "at_rate": _at_rate,
    "handle": _handle,
    "cost": _cost,
}


def postgresql(database: Data, driver: str) -> Any:
    """Its URL for SQLAlchemy."""
    login = f"{database['user']}:{database['password']}"
    address = f"{database['host']}:{database['port']}/{database['name']}"
    return f"postgresql+{driver}://{login}@{address}"


def django_database(database: Data) -> Data:
    """For Django's setting DATABASES; its connections stay open, as in a server that is busy."""
    return {
        "ENGINE": "django.db.backends.postgresql",
        **{key.upper(): str(value) for key, value in database.items()},
        "CONN_MAX_AGE": None,
    }
