"""The prefetch of a subscriber that leaves it to us: few events, and many for a fast handler."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import onlooker
import pytest
from bench import Bench
from live import consuming
from support import wait_until

from domain_events import DomainEvent, Subscriber
from domain_events.broker import Prefetch
from domain_events.broker.rabbitmq import consumer, opening
from domain_events.broker.rabbitmq.consumer import prefetch_count
from domain_events.broker.rabbitmq.consuming import RabbitConsuming
from domain_events.broker.rabbitmq.link import Link
from domain_events.options import make_options

FEW, MANY = 50, 2000


def held(bench: Bench, queue: str, published: int, seen: list[int]) -> int:
    """How many events the subscriber has and has not handled."""
    return published - len(seen) - onlooker.count(bench.url, queue)


def publish(bench: Bench, number: int) -> None:
    bench.publisher.publish_many(DomainEvent("n.n", n) for n in range(number))


@pytest.mark.parametrize(
    ("now", "rate", "unsettled", "size", "expected"),
    [
        (FEW, 0, FEW, 200, FEW),
        (FEW, 4999, FEW, 200, FEW),
        (FEW, 5000, FEW, 200, MANY),
        (FEW, 5000, FEW, 30_000, MANY),
        (FEW, 5000, FEW, 40_000, FEW),  # 2,000 of them would be 80 MB
        (MANY, 5000, MANY, 200, MANY),
        (MANY, 2100, MANY, 200, MANY),  # less than a second's work
        (MANY, 1900, MANY, 200, FEW),
        (MANY, 0, FEW, 200, MANY),  # there is just not much to do
        (MANY, 0, 0, 0, MANY),
        (MANY, 0, FEW + 1, 200, FEW),
    ],
)
def test_handler_gets_many_while_it_is_fast(
    now: int, rate: float, unsettled: int, size: int, expected: int
) -> None:
    """And few when what it holds is more than a second's work; no to and fro between them."""
    assert prefetch_count(Prefetch(FEW, MANY), now, rate, unsettled, size) == expected
    assert prefetch_count(Prefetch(7, 7), 7, rate, unsettled, size) == 7


@pytest.mark.parametrize(
    ("options", "workers", "expected"),
    [
        ({}, 1, (50, 2000)),
        ({}, 16, (64, 2000)),
        ({}, 600, (2400, 2400)),
        ({"prefetch_count": 10}, 16, (10, 10)),
        ({"auto_delete": True}, 1, (200, 200)),
        ({"queue_type": "classic"}, 1, (200, 200)),
        ({"queue_type": "classic"}, 100, (400, 400)),
    ],
)
def test_there_is_enough_for_all_workers(
    options: dict[str, int], workers: int, expected: tuple[int, int]
) -> None:
    """And an auto-delete queue, which would go at a change, stays at one number.

    So does a classic one, which may have been found and be one.
    """
    defaults: dict[str, Any] = {
        "exchange": "x",
        "exchange_type": "topic",
        "durable": True,
        "exclusive": False,
        "auto_delete": False,
        "max_retries": 0,
        "queue_type": "quorum",
        "prefetch_count": None,
        "ordered": False,
    }
    made = make_options("name", ["#"], None, (), None, **{**defaults, **options})
    assert made.prefetch(workers) == expected


def test_slow_handler_leaves_the_rest_to_others(bench: Bench) -> None:
    """By default a process holds 50 events."""
    subscriber, queue = bench.subscriber(), bench.names.queue()
    seen: list[int] = []
    go_on = threading.Event()

    def handle(event: DomainEvent) -> None:
        go_on.wait(30)
        seen.append(event.data)

    subscriber.register(handle, queue, ["#"])
    publish(bench, 500)
    with consuming(subscriber, bench.url, queue):
        wait_until(lambda: held(bench, queue, 500, seen) == FEW)
        go_on.set()
        wait_until(lambda: len(seen) == 500)
    assert seen == list(range(500))


def test_handler_that_becomes_fast_and_slow_again_holds_many_and_few(bench: Bench) -> None:
    """Each event is handled once and in its order meanwhile."""
    number = 12_000
    subscriber, queue = bench.subscriber(), bench.names.queue()
    seen: list[int] = []
    slow = threading.Event()
    go_on = threading.Event()

    def handle(event: DomainEvent) -> None:
        seen.append(event.data)
        if slow.is_set():
            time.sleep(0.001)  # the slow handler that this is about; nothing is waited for
        elif len(seen) == number // 2:
            go_on.wait(30)

    subscriber.register(handle, queue, ["#"])
    publish(bench, number)
    with consuming(subscriber, bench.url, queue):
        wait_until(lambda: len(seen) == number // 2)
        # The one that is being handled is seen, and held.
        wait_until(lambda: held(bench, queue, number, seen) == MANY - 1)
        slow.set()
        go_on.set()
        wait_until(lambda: 0 <= held(bench, queue, number, seen) <= FEW, timeout=30)
        slow.clear()
        wait_until(lambda: len(seen) == number, timeout=30)
    assert seen == list(range(number))


def test_handler_that_is_fast_by_fits_does_not_hoard(bench: Bench) -> None:
    """One that collects a thousand and writes them together, for example."""
    number = 12_000
    subscriber, queue = bench.subscriber(), bench.names.queue()
    seen: list[int] = []
    most = 0

    def handle(event: DomainEvent) -> None:
        nonlocal most
        seen.append(event.data)
        if len(seen) % 1000 == 0:
            time.sleep(0.45)  # the writing of a batch; nothing is waited for
            most = max(most, held(bench, queue, number, seen))
        if len(seen) == number:
            subscriber.stop_consuming()

    subscriber.register(handle, queue, ["#"])
    publish(bench, number)
    subscriber.start_consuming(timeout=60)
    assert seen == list(range(number))
    assert MANY - FEW <= most <= MANY + FEW


def test_classic_queue_that_goes_with_its_consumer_is_not_lost_by_a_change(bench: Bench) -> None:
    """It was found as it is, and nobody can see what it is."""
    number = 10_000
    subscriber, queue = bench.subscriber(), bench.names.queue()
    seen: list[int] = []

    def handle(event: DomainEvent) -> None:
        seen.append(event.data)
        if len(seen) == number:
            subscriber.stop_consuming()

    with onlooker.channel(bench.url) as channel:
        channel.queue_declare(queue, durable=True, auto_delete=True)
    subscriber.register(handle, queue, ["#"], queue_type="classic", dead_letter=False)
    publish(bench, number)
    subscriber.start_consuming(timeout=30)
    assert seen == list(range(number))


# --- while it changes ----------------------------------------------------------------------------


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Another prefetch every few milliseconds; which were asked for."""
    counts = itertools.cycle([3, 40, 1, 150])
    asked_for: list[int] = []
    limit = consumer.RabbitConsumer._limit

    def count(self: consumer.RabbitConsumer, *arguments: Any) -> None:
        asked_for.append(self._prefetch_count)
        limit(self, *arguments)

    monkeypatch.setattr(consumer, "prefetch_count", lambda *_: next(counts))
    monkeypatch.setattr(consumer, "_LONGEST_WITHHELD", 0.02)
    monkeypatch.setattr(consumer.RabbitConsumer, "_limit", count)
    return asked_for


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
@pytest.mark.parametrize("size", [0, 200_000])
def test_nothing_is_lost_nor_comes_twice_nor_out_of_order_at_a_change(
    bench: Bench, restless: list[int], queue_type: str, size: int
) -> None:
    """Also events of several frames, of which pika would give back what comes meanwhile."""
    number = 600 if size else 20_000
    subscriber, queue = bench.subscriber(), bench.names.queue()
    seen: list[int] = []

    def handle(event: DomainEvent) -> None:
        seen.append(event.data[0])
        if size:
            time.sleep(0.002)  # or it is over before there is a change
        if len(seen) == number:
            subscriber.stop_consuming()

    subscriber.register(handle, queue, ["#"], queue_type=queue_type)  # type: ignore[arg-type]
    bench.publisher.publish_many(DomainEvent("n.n", (n, "x" * size)) for n in range(number))
    subscriber.start_consuming(timeout=60)
    assert seen == list(range(number))
    assert len(restless) > 5
    wait_until(lambda: onlooker.count(bench.url, queue) == 0)


def test_stop_in_the_middle_of_a_change_gives_back_the_rest(
    bench: Bench, restless: list[int]
) -> None:
    """At once: no wait runs into its deadline. Each run goes on where the last one ended."""
    number, seen = 5000, set[int]()

    def handle(subscriber: Subscriber, last: int, event: DomainEvent) -> None:
        seen.add(event.data)
        time.sleep(0.0005)  # a handler's work, so that a run lasts for some changes
        if len(seen) >= min(last, number):
            subscriber.stop_consuming()

    queue = bench.names.queue()
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["#"])
    publish(bench, number)
    begun = time.monotonic()
    runs = 0
    while len(seen) < number:
        runs += 1
        with bench.subscriber() as subscriber:
            subscriber.register(partial(handle, subscriber, 97 * runs), queue, ["#"])
            subscriber.start_consuming(timeout=10)
    assert runs > 40
    assert time.monotonic() - begun < runs  # 10 s would be the deadline
    assert len(restless) > 1.2 * runs  # not only the first of each run
    assert onlooker.count(bench.url, queue) == 0


def test_change_goes_on_over_lost_connections(bench: Bench, restless: list[int]) -> None:
    """Cut by us; what was unsettled comes again, and nothing is lost."""
    number = 20_000
    subscriber, queue = bench.subscriber(), bench.names.queue()
    seen: set[int] = set()
    subscriber.register(lambda event: seen.add(event.data), queue, ["#"])
    publish(bench, number)
    with consuming(subscriber, bench.url, queue):
        link = subscriber._consuming._link  # type: ignore[union-attr]
        for part in range(1, 10):
            wait_until(lambda part=part: len(seen) >= number * part // 10, timeout=30)  # type: ignore[misc]
            link.wake(link.cut)
        wait_until(lambda: len(seen) == number, timeout=30)
        wait_until(lambda: onlooker.count(bench.url, queue) == 0)
    assert len(restless) > 10


STEPS = ["cancelled", "limited", "consumes"]


class Halfway:
    """A consumer whose change can be interrupted when it has come to a step.

    Its handler is held up by its first event, and its window is full.
    """

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bench = bench
        self.queue, self.other = bench.names.queue("changing"), bench.names.queue("other")
        self.go_on = threading.Event()
        self.seen: set[int] = set()
        self.subscriber = bench.subscriber(workers=2)
        for queue in (self.queue, self.other):
            self.subscriber.register(partial(self._handle, queue), queue, ["#"])
        publish(bench, 200)
        # So that nothing is done but what the test does.
        monkeypatch.setattr(consumer, "prefetch_count", lambda _prefetch, now, *_: now)

    def _handle(self, queue: str, event: DomainEvent) -> None:
        self.go_on.wait(30)
        if queue == self.queue:
            self.seen.add(event.data)

    def change(self, step: str, interrupt: Callable[[], object], *, answered: bool = True) -> None:
        """Take another prefetch; interrupt it at the broker's answer to a step.

        That is on the I/O thread.
        """
        consuming = cast(RabbitConsuming, self.subscriber._consuming)
        [self.consumer] = (each for each in consuming._consumers if each._queue == self.queue)
        wait_until(lambda: self.consumer._unsettled == self.consumer._prefetch_count)
        name = {"cancelled": "_limit", "limited": "_consume", "consumes": "_consumes"}[step]
        method = getattr(self.consumer, name)
        interrupted = threading.Event()

        def once(*arguments: Any) -> None:
            setattr(self.consumer, name, method)
            interrupt()
            if answered:
                method(*arguments)
            interrupted.set()

        def begin() -> None:
            setattr(self.consumer, name, once)
            self.consumer._wanted, self.consumer._filling = 100, True
            self.consumer._change_if_full()

        self.link.wake(begin)
        assert interrupted.wait(10)

    @property
    def link(self) -> Link:
        return self.consumer._link

    def cut(self) -> None:
        """Break the connection."""
        self.link.cut()


@pytest.fixture
def halfway(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Halfway:
    return Halfway(bench, monkeypatch)


@pytest.mark.parametrize("step", STEPS)
def test_change_that_the_connection_breaks_off_is_forgotten(halfway: Halfway, step: str) -> None:
    """On the next one it begins with few."""
    with consuming(halfway.subscriber, halfway.bench.url, halfway.queue):
        halfway.change(step, halfway.cut)
        halfway.go_on.set()
        wait_until(lambda: len(halfway.seen) == 200)
        assert halfway.consumer._prefetch_count == FEW


@pytest.mark.parametrize("step", STEPS)
def test_change_that_the_broker_s_cancel_crosses_costs_no_connection(
    halfway: Halfway, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its queue was deleted; it is declared again, and the other one does not notice."""
    with consuming(halfway.subscriber, halfway.bench.url, halfway.queue):

        def delete() -> None:
            onlooker.delete(halfway.bench.url, queues=[halfway.queue])
            time.sleep(0.2)  # by then the broker's word is in our socket, if it sends one

        halfway.change(step, delete)
        connection = halfway.link.connection
        halfway.go_on.set()
        url, queue = halfway.bench.url, halfway.queue
        wait_until(lambda: onlooker.exists(url, queue) and onlooker.consumers(url, queue) == 1)
        halfway.seen.clear()
        publish(halfway.bench, 200)
        wait_until(lambda: len(halfway.seen) == 200)
        assert halfway.link.connection is connection
    assert "Internal error" not in caplog.text


@pytest.mark.parametrize("step", STEPS)
def test_stop_at_any_step_of_a_change_gives_back_the_rest_at_once(
    halfway: Halfway, step: str
) -> None:
    """And takes no more."""
    thread = threading.Thread(target=halfway.subscriber.start_consuming)
    thread.start()
    wait_until(lambda: onlooker.consumers(halfway.bench.url, halfway.queue) == 1)
    begun = time.monotonic()
    halfway.change(step, halfway.subscriber.stop_consuming)
    halfway.go_on.set()
    thread.join(30)
    assert time.monotonic() - begun < 4  # 5 s would be the deadline
    halfway.subscriber.close()
    wait_until(lambda: onlooker.count(halfway.bench.url, halfway.queue) == 200 - len(halfway.seen))


@pytest.mark.parametrize("step", STEPS)
def test_stop_does_not_wait_for_a_connection_that_is_gone(halfway: Halfway, step: str) -> None:
    """What it would wait for never comes."""
    with consuming(halfway.subscriber, halfway.bench.url, halfway.queue):

        def stop_and_cut() -> None:
            threading.Thread(target=halfway.consumer.stop, args=(5.0,)).start()
            halfway.link.cut()

        halfway.change(step, stop_and_cut)
        assert halfway.consumer._stopped.wait(2)
        halfway.go_on.set()


@pytest.mark.parametrize("step", STEPS)
def test_change_without_an_answer_ends_in_a_new_connection(
    halfway: Halfway, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for ever, and nothing is lost."""
    with consuming(halfway.subscriber, halfway.bench.url, halfway.queue):
        monkeypatch.setattr(opening, "_ANSWER_TIMEOUT", 0.5)
        halfway.change(step, lambda: None, answered=False)
        connection = halfway.link.connection
        wait_until(lambda: halfway.link.connection not in (None, connection))
        halfway.go_on.set()
        wait_until(lambda: len(halfway.seen) == 200)
