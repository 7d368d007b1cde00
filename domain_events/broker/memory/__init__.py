"""The embedded broker, ``memory://``: RabbitMQ's meaning, in this process, with no set-up.

**For trying and for testing.** Its queues live in this process and end with it: no other process
sees them, and nothing is on a disk. Everything else is as with RabbitMQ, and one suite of tests
holds for both.

``memory://`` is one broker, ``memory://NAME`` another for each name.

``store``: the broker. ``routing``: exchanges and bindings. ``queues``: one queue. ``deaths``: what
a dead letter tells. ``clock``: real and virtual time. ``publishing``, ``consuming``: the two kinds
of connection.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

from domain_events.broker.memory.clock import Clock
from domain_events.broker.memory.consuming import MemoryConsuming
from domain_events.broker.memory.publishing import MemoryPublishing
from domain_events.broker.memory.store import Store
from domain_events.errors import ConfigurationError
from domain_events.log import Log
from domain_events.process import check_fork, on_fork
from domain_events.topology import Topology

log = Log("domain_events")

_URL = re.compile(r"memory://(?P<name>[\w.-]*)/?", re.IGNORECASE)

_stores: dict[str, Store] = {}
# Re-entrant: a finalizer may make a `Publisher` while this is held.
_stores_lock = threading.RLock()


class Memory:
    """An embedded broker; see `domain_events.broker.Broker`."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        found = _URL.fullmatch(urls[0])
        if found is None or len(urls) > 1:
            raise ConfigurationError(
                "The embedded broker's URL is memory:// or memory://NAME, and only one."
            )
        self._store = store(found["name"])

    def publishing(self, declare: Topology, name: str) -> MemoryPublishing:
        return MemoryPublishing(self._store, declare)

    def consuming(self, name: str, on_failure: Callable[[], None]) -> MemoryConsuming:
        return MemoryConsuming(self._store)


def store(name: str, clock: Clock | None = None) -> Store:
    """The embedded broker of that name, made when it is first asked for."""
    check_fork()
    with _stores_lock:
        found = _stores.get(name)
        if found is not None:
            return found
        found = _stores[name] = Store(name, clock)
    log.debug("memory://%s: its events stay in this process, and end with it.", name)
    return found


def forget(name: str) -> None:
    """Let go of the embedded broker of that name, and of all that is in it."""
    check_fork()
    with _stores_lock:
        forgotten = _stores.pop(name, None)
    if forgotten is not None:
        forgotten.stop_clock()


def _after_fork() -> None:
    # Another thread may have held the lock when the process forked; it is not in the child.
    global _stores_lock
    _stores_lock = threading.RLock()
    for each in list(_stores.values()):
        each.begin_anew()


on_fork(_after_fork)
