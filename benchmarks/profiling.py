"""Profiles every thread of this library with cProfile, while publishing or consuming.

cProfile slows down the program, and small functions most; compare the order, not the seconds. The
real cost of an event, step by step, is in `pieces`.
"""

from __future__ import annotations

import cProfile
import pstats
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import brokerside
from benchmarks.peers.driver import ROUTING_KEY, data_of
from domain_events import DomainEvent, Publisher, Subscriber

WHAT = ("publish", "consume")

_LINES = 25
_QUEUE = "bench-profile"


def profile(what: str, url: str, count: int = 20_000) -> None:
    """Print, for each thread, the functions with the highest own time."""
    brokerside.delete(url, _QUEUE)
    threads: dict[str, cProfile.Profile] = {}
    try:
        with _every_thread(threads):
            (_publish if what == "publish" else _consume)(url, count)
    finally:
        brokerside.delete(url, _QUEUE)
    for name, watched in threads.items():
        print(f"--- {name}: {what} {count:,} events")
        pstats.Stats(watched).sort_stats("tottime").print_stats(_LINES)


def _publish(url: str, count: int) -> None:
    brokerside.declare(url, _QUEUE, "quorum")
    with Publisher(url) as publisher:
        begun = time.perf_counter()
        publisher.publish_many(DomainEvent(ROUTING_KEY, data_of(n)) for n in range(count))
        print(f"{count / (time.perf_counter() - begun):,.0f} events/s under the profiler")


def _consume(url: str, count: int) -> None:
    subscriber = Subscriber(url)
    left = count

    def handle(_event: DomainEvent) -> None:
        nonlocal left
        left -= 1
        if not left:
            subscriber.stop_consuming()

    subscriber.register(handle, _QUEUE, ["bench.*"])
    brokerside.fill(url, [_QUEUE], brokerside.Letter(brokerside.event_template()), count)
    begun = time.perf_counter()
    subscriber.start_consuming(timeout=120)
    print(f"{count / (time.perf_counter() - begun):,.0f} events/s under the profiler")


@contextmanager
def _every_thread(threads: dict[str, cProfile.Profile]) -> Iterator[None]:
    """Profile this thread, and each that is started meanwhile."""
    run = threading.Thread.run

    def watched_run(self: threading.Thread) -> None:
        _watched(threads, self.name, lambda: run(self))

    threading.Thread.run = watched_run  # type: ignore[method-assign]
    watching = threads["the caller's thread"] = cProfile.Profile()
    watching.enable()
    try:
        yield
    finally:
        watching.disable()
        threading.Thread.run = run  # type: ignore[method-assign]


def _watched(threads: dict[str, cProfile.Profile], name: str, work: Callable[[], Any]) -> None:
    watching = threads[name] = cProfile.Profile()
    watching.enable()
    try:
        work()
    finally:
        watching.disable()
