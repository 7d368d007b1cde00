"""Nothing piles up: not with reconnects, not with retries, not with days of idling.

Threads and descriptors must be as few as before; memory is judged by its growth per item, after
a warm-up. DOMAIN_EVENTS_TEST_LONG=1 makes long forms of these, of some minutes; their bounds are
the same.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from urllib.parse import urlsplit

import pytest
from bench import Bench
from faults.proxy import Proxy
from footprint import Allowed, assert_flat, footprint, tracing
from live import consuming
from support import wait_until

from domain_events import DomainEvent, Publisher, Retry, Subscriber
from domain_events.broker.rabbitmq import link

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

LONG = bool(os.environ.get("DOMAIN_EVENTS_TEST_LONG"))

# A connection that is not let go of takes 7,000 bytes and more. Timers that were cancelled are kept
# until their time, at most 30 s: hence the slack, in which the short form would miss what is
# smaller than that; the long form finds it.
RECONNECTS = 1000 if LONG else 150
PER_RECONNECT = {"traced": Allowed(700_000, 100), "resident": Allowed(4_000_000, 1_000)}

# A message that is not let go of takes some 1,000 bytes, a number 32.
ROUND = 500
RETRIES_EACH = 5
ROUNDS = 40 if LONG else 3
PER_RETRY = {"traced": Allowed(150_000, 5), "resident": Allowed(4_000_000, 50)}

# RabbitMQ's heartbeat is a minute, so pika sends one every half; here one a second each.
HEARTBEATS_OF_A_DAY = 24 * 3600 // 30
IDLE_CONNECTIONS = 40
SECONDS_OF_IDLING = HEARTBEATS_OF_A_DAY // IDLE_CONNECTIONS if LONG else 12
PER_HEARTBEAT = {"traced": Allowed(20_000, 10), "resident": Allowed(2_000_000, 100)}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No log lines, which pytest would keep, and nothing but them would grow."""
    log = logging.getLogger("domain_events")
    log.disabled = True
    yield
    log.disabled = False


def test_reconnects_leave_nothing_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both connections are cut again and again; each time, an event goes through afterwards."""
    # Each connection counts as one that had lasted: without this the pauses would grow.
    monkeypatch.setattr(link, "_LASTING", 0.0)
    queue = bench.names.queue()
    handled = threading.Semaphore(0)
    broker = urlsplit(bench.url)
    assert broker.hostname is not None
    assert broker.port is not None
    with (
        closing(Proxy(broker.hostname, broker.port)) as proxy,
        tracing(),
        Publisher(
            url := bench.url.replace(f":{broker.port}/", f":{proxy.port}/"), bench.exchange
        ) as publisher,
    ):
        subscriber = Subscriber(url, bench.exchange)
        subscriber.register(lambda _event: handled.release(), queue, ["#"])

        def cut(times: int) -> None:
            for number in range(times):
                proxy.cut()
                publisher.publish(DomainEvent("a.b", number), timeout=30)
                assert handled.acquire(timeout=60)
                while handled.acquire(blocking=False):
                    pass  # those that came twice

        with consuming(subscriber, bench.url, queue):
            cut(RECONNECTS // 5)
            before = footprint()
            cut(RECONNECTS)
            assert_flat(before, RECONNECTS, **PER_RECONNECT)


def test_retries_leave_nothing_behind(bench: Bench) -> None:
    """Also those of events that are given up in the end."""
    queue = bench.names.queue()
    done = threading.Semaphore(0)
    retries = 0

    def handle(event: DomainEvent) -> None:
        nonlocal retries
        if event.retries == RETRIES_EACH:
            done.release()
            return
        retries += 1
        raise Retry(0.1)

    subscriber = bench.subscriber()
    subscriber.register(handle, queue, ["#"], max_retries=RETRIES_EACH)

    def play() -> None:
        bench.publisher.publish_many(DomainEvent("a.b", n) for n in range(ROUND))
        for _ in range(ROUND):
            assert done.acquire(timeout=300)

    with tracing(), consuming(subscriber, bench.url, queue):
        play()
        before = footprint()
        retries = 0
        for _ in range(ROUNDS):
            play()
        assert retries >= ROUNDS * ROUND * RETRIES_EACH
        assert_flat(before, retries, **PER_RETRY)


def test_a_day_of_idling_leaves_nothing_behind(bench: Bench) -> None:
    """As many heartbeats as a connection has in a day, shared out among several connections.

    (The short form: a part of them.) What grows with heartbeats grows with all of them.
    """
    url = f"{bench.url}?heartbeat=2"
    queue = bench.names.queue()
    seen: list[DomainEvent] = []
    subscriber = Subscriber(url, bench.exchange)
    subscriber.register(seen.append, queue, ["last.#"])
    publishers = [Publisher(url, bench.exchange) for _ in range(IDLE_CONNECTIONS)]

    def frames() -> int:
        connections = [each._publishing()._link.connection for each in publishers]  # type: ignore[union-attr]
        return sum(each.frames_sent for each in connections)

    with tracing(), ExitStack() as closing, consuming(subscriber, url, queue):
        for publisher in publishers:
            closing.enter_context(publisher).publish(DomainEvent("first.one", {}))
        first = frames()
        wait_until(lambda: frames() >= first + 3 * IDLE_CONNECTIONS, timeout=60)  # warm
        before, first, begun = footprint(), frames(), time.monotonic()
        wanted = SECONDS_OF_IDLING * IDLE_CONNECTIONS
        wait_until(lambda: frames() >= first + wanted, SECONDS_OF_IDLING * 10, interval=0.5)
        print(f"{wanted} heartbeats in {time.monotonic() - begun:.0f} s")
        assert_flat(before, wanted, **PER_HEARTBEAT)
        for publisher in publishers:
            publisher.publish(DomainEvent("last.one", {}))
        wait_until(lambda: len(seen) == len(publishers))
