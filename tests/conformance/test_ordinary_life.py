"""Nothing is lost in an ordinary week: releases side by side, poison, exits, forged messages."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import multiprocessing.pool
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any
from unittest.mock import MagicMock, Mock

import onlooker
import pytest
from bench import Bench, Events, running, stops_after
from support import sooner_than, wait_until

from conformance.peer import Peer
from domain_events import DeadLetter, DeadLetters, DomainEvent, Reject, Retry
from domain_events.broker import Exchange, Queue
from domain_events.message import ToExchange

SHORT_DELAYS = (0.1, 0.2, 0.2)


@pytest.fixture
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifteen minutes in half a second."""
    monkeypatch.setattr("domain_events.handling._HAND_BACK_DELAYS", SHORT_DELAYS)


def letters_of(bench: Bench, name: str) -> list[DeadLetter]:
    with DeadLetters(name, bench.url) as dead_letters:
        return list(dead_letters)


def is_empty(bench: Bench, queue: str) -> Callable[[], bool]:
    return lambda: onlooker.count(bench.url, queue) == 0


# ------------------------------------------------------------------ two releases side by side


def test_event_that_only_the_new_release_lists_is_handled_by_it(bench: Bench) -> None:
    """The old one hands it back, however often it gets it; nothing is acked unhandled."""
    queue = bench.names.queue()
    old, new = bench.subscriber(), bench.subscriber()
    handled: dict[str, Events] = {"old": [], "new": []}
    old.register(handled["old"].append, queue, ["user.registered"])
    new.register(handled["new"].append, queue, ["user.registered", "user.deleted"])
    with running(old, new):
        events = [bench.publish("user.deleted", n) for n in range(40)]
        wait_until(lambda: len(handled["new"]) >= 40, timeout=45)
    assert sorted(event.data for event in handled["new"]) == [event.data for event in events]
    assert {event.retries for event in handled["new"]} == {0}
    assert handled["old"] == []
    assert onlooker.count(bench.url, queue) == 0
    assert letters_of(bench, queue) == []


@pytest.mark.usefixtures("short_delays")
@pytest.mark.parametrize("max_retries", [0, 1])
def test_event_that_no_process_lists_is_a_dead_letter_that_says_so(
    bench: Bench, max_retries: int, caplog: pytest.LogCaptureFixture
) -> None:
    """After a roll-back, for example; one line in the log for each routing key."""
    queue = bench.names.queue()
    with bench.subscriber() as new:
        new.register(print, queue, ["user.*"])
    seen: Events = []
    old = bench.subscriber()
    old.register(seen.append, queue, ["user.registered"], max_retries=max_retries)
    with running(old):
        events = [bench.publish("user.deleted", n) for n in range(3)]
        handled = bench.publish("user.registered")
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 3)
    assert seen == [handled]
    letters = letters_of(bench, queue)
    assert sorted(letter.event.data for letter in letters if letter.event) == [0, 1, 2]
    assert {letter.error_type for letter in letters} == {"unlisted routing key"}
    assert all("user.deleted" in str(letter.error_message) for letter in letters)
    assert {letter.routing_key for letter in letters} == {events[0].routing_key}
    assert caplog.text.count("matches none of the binding keys") == 1
    assert "retired_keys=['user.deleted']" in caplog.text


@pytest.mark.usefixtures("short_delays")
def test_without_dead_letters_an_event_that_is_not_listed_goes_on_waiting(bench: Bench) -> None:
    """Whoever keeps no dead letters has not asked for another release's events to be dropped."""
    queue = bench.names.queue()
    with bench.subscriber() as new:
        new.register(print, queue, ["user.*"], dead_letter=False)
    old = bench.subscriber()
    old.register(print, queue, ["user.registered"], dead_letter=False)
    bench.publish("user.deleted", "waits")
    with running(old):
        wait_until(is_empty(bench, queue))
        # It must wait: after all delays together, the event is to be still on its way.
        time.sleep(3 * sum(SHORT_DELAYS))
    seen: Events = []
    new = bench.subscriber()
    new.register(stops_after(1, new, seen), queue, ["user.*"], dead_letter=False)
    new.start_consuming(timeout=20)
    assert [event.data for event in seen] == ["waits"]


def test_retry_and_replay_that_return_to_another_release_are_handed_back(bench: Bench) -> None:
    """Whatever way an event comes by: only who lists its key handles it."""
    queue = bench.names.queue()
    new = bench.subscriber()
    seen: list[tuple[object, int]] = []

    def handle(event: DomainEvent) -> None:
        seen.append((event.data, event.retries))
        if event.data == "retry" and event.retries == 0:
            raise Retry(3)  # by then the new release must have stopped
        if event.data == "replay" and len(seen) <= 2:
            raise Reject

    new.register(handle, queue, ["user.*"], max_retries=1)
    with running(new):
        bench.publish("user.deleted", "retry")
        bench.publish("user.deleted", "replay")
        wait_until(lambda: len(seen) == 2)
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    with DeadLetters(queue, bench.url) as dead_letters:
        assert dead_letters.replay_all() == 1
    old = bench.subscriber()
    handled_by_old: Events = []
    old.register(handled_by_old.append, queue, ["user.registered"], max_retries=1)
    with running(old):
        wait_until(is_empty(bench, queue))
    with running(new):
        wait_until(lambda: len(seen) == 4)
    assert sorted(map(str, seen[2:])) == ["('replay', 0)", "('retry', 1)"]
    assert handled_by_old == []


def test_retired_key_is_unbound_and_what_still_comes_by_it_is_acked(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """The way to say that nobody wants such events any more."""
    queue = bench.names.queue()
    with bench.subscriber() as before:
        before.register(print, queue, ["old.*", "new.*"])
    bench.publish("old.thing", "bound still")
    seen: Events = []
    after = bench.subscriber()
    after.register(seen.append, queue, ["new.*"], retired_keys=["old.*"])
    bench.publish("old.thing", "unbound")
    with running(after):
        event = bench.publish("new.thing")
        wait_until(lambda: event in seen)
        wait_until(is_empty(bench, queue))
    assert seen == [event]
    assert letters_of(bench, queue) == []
    assert caplog.text.count("has retired old.thing") == 1


def test_event_by_a_binding_of_another_exchange_is_handled_if_its_key_is_listed(
    bench: Bench, peer: Peer
) -> None:
    """Of two services that use one name on two exchanges, neither may ack the other's events."""
    queue = bench.names.queue()
    seen: Events = []
    subscriber = bench.subscriber()
    subscriber.register(stops_after(1, subscriber, seen), queue, ["user.*", "legacy.*"])
    other = bench.names.exchange("other")
    peer.declare(Queue(queue, Exchange(other), ("#",), dead_letters=True))
    for key in ("payment.made", "legacy.thing"):
        peer.publish(ToExchange(other), DomainEvent(key, "x").to_json().encode(), key=key)
    subscriber.start_consuming(timeout=10)
    assert [event.routing_key for event in seen] == ["legacy.thing"]
    other_service = bench.subscriber()
    other_service.register(stops_after(1, other_service, seen), queue, ["payment.*"])
    other_service.start_consuming(timeout=20)
    assert [event.routing_key for event in seen] == ["legacy.thing", "payment.made"]


# ------------------------------------------------------------------ handlers that did nothing


def returns(value: Callable[[], object]) -> Callable[[DomainEvent], object]:
    return lambda _event: value()


async def nothing() -> None: ...


def generated() -> Iterator[int]:
    yield 1


def pooled() -> object:
    with multiprocessing.pool.ThreadPool(1) as pool:
        return pool.apply_async(print)


UNFINISHED: dict[str, Callable[[], object]] = {
    "coroutine": nothing,
    "generator": generated,
    "map": lambda: map(print, [1]),
    "Retry returned": Retry,
    "Retry class returned": lambda: Retry,
    "error returned": lambda: ValueError("x"),
    "future not done": Future,
    "function returned": lambda: nothing,
    "partial returned": lambda: functools.partial(print),
    "context manager": contextlib.contextmanager(generated),
    "lazy iterator": lambda: itertools.starmap(print, [(1,)]),
    "coroutines in a list": lambda: [nothing()],
    "futures in a dict": lambda: {1: Future()},
    "thread not started": lambda: threading.Thread(target=print),
    "pool": pooled,
}


@pytest.mark.parametrize("value", UNFINISHED.values(), ids=list(UNFINISHED))
def test_handler_whose_work_is_yet_to_be_done_has_failed(
    bench: Bench, value: Callable[[], object]
) -> None:
    """What it returns shows it: the event is a dead letter, and not acked as handled."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()
    subscriber.register(returns(value), queue, ["#"])
    event = bench.publish("user.registered")
    with running(subscriber):
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    (letter,) = letters_of(bench, queue)
    assert letter.event == event
    assert letter.error_type == "TypeError"
    assert "The handler returned" in str(letter.error_message)


@pytest.mark.parametrize(
    "value", [7, "text", [1, None], {"a": 1}, False, object(), print, Mock(), MagicMock()]
)
def test_handler_may_return_what_it_likes_otherwise(bench: Bench, value: object) -> None:
    """Its value is of no interest."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()
    seen: Events = []

    def handle(event: DomainEvent) -> object:
        seen.append(event)
        return value

    subscriber.register(handle, queue, ["#"])
    bench.publish("user.registered")
    with running(subscriber):
        wait_until(lambda: seen and onlooker.count(bench.url, queue) == 0)
    assert letters_of(bench, queue) == []


# ------------------------------------------------------------------ handlers that exit


class Timeout(BaseException):
    """As gevent's, which is not an Exception."""


@pytest.mark.parametrize("kind", [asyncio.CancelledError, Timeout, GeneratorExit])
def test_base_exception_that_does_not_end_the_process_is_a_failure(
    bench: Bench, kind: type[BaseException]
) -> None:
    """A dead letter with its reason; the subscriber goes on."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()
    seen: Events = []

    def handle(event: DomainEvent) -> None:
        if event.data == "bad":
            raise kind("stopped")
        seen.append(event)

    subscriber.register(handle, queue, ["#"])
    with running(subscriber):
        bench.publish("user.registered", "bad")
        good = bench.publish("user.registered", "good")
        wait_until(lambda: seen == [good])
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    (letter,) = letters_of(bench, queue)
    assert str(letter.error_type).endswith(kind.__name__)
    assert letter.error_message == "stopped"


@pytest.mark.parametrize("workers", [1, 2])
def test_handler_that_always_exits_ends_among_the_dead_letters(bench: Bench, workers: int) -> None:
    """Each exit ends the run and counts; at last its reason is known. The next event goes on."""
    queue = bench.names.queue()
    runs: list[object] = []
    seen: Events = []

    def handle(event: DomainEvent) -> None:
        if event.data == "exit":
            runs.append(event)
            raise SystemExit("cannot go on")
        seen.append(event)

    bench.publish("user.registered", "before")
    subscriber = bench.subscriber(workers=workers)
    subscriber.register(handle, queue, ["#"])
    bad = bench.publish("user.registered", "exit")
    good = bench.publish("user.registered", "good")
    while not letters_of(bench, queue):
        assert len(runs) < 40
        with pytest.raises(SystemExit):
            subscriber.start_consuming(timeout=20)
    assert 1 < len(runs) <= 20
    (letter,) = letters_of(bench, queue)
    assert letter.event == bad
    assert (letter.error_type, letter.error_message) == ("SystemExit", "cannot go on")
    with running(subscriber):
        wait_until(lambda: good in seen)


# ------------------------------------------------------------------ poison, and its neighbours


def subscribed(bench: Bench, queue: str) -> Queue:
    """What a subscriber of this name declares."""
    return Queue(queue, Exchange(bench.exchange), dead_letters=True)


def process_that_dies_of(poison: DomainEvent, peer: Peer, queue: Queue) -> list[str | None]:
    """Handle one event after the other, until the poison comes; the ids of what was handled."""
    connection = peer.another_connection()
    inbox = peer.consume(queue, 200, connection)
    handled: list[str | None] = []
    while True:
        delivery = inbox.wait(len(handled) + 1)[len(handled)]
        if delivery.message_id == poison.uuid_string:
            connection.close(10)
            return handled
        handled.append(delivery.message_id)
        inbox.settle(delivery)


def test_only_the_event_that_kills_every_process_becomes_a_dead_letter(
    bench: Bench, peer: Peer
) -> None:
    """It is delivered alone after the first time; those behind it are handled."""
    queue = bench.names.queue()
    seen: Events = []
    subscriber = bench.subscriber()
    subscriber.register(seen.append, queue, ["user.#"])
    poison = bench.publish("user.registered", "poison")
    handled = {bench.publish("user.registered", n).uuid_string for n in range(20)}
    for _ in range(20):
        ready = onlooker.count(bench.url, queue)
        gone = process_that_dies_of(poison, peer, subscribed(bench, queue))
        assert handled.issuperset(gone)
        handled.difference_update(gone)
        wait_until(lambda: onlooker.count(bench.url, queue) == ready - len(gone))  # noqa: B023
    last = bench.publish("user.registered", "last")
    with running(subscriber):
        wait_until(lambda: last in seen)
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    assert handled == {event.uuid_string for event in seen if event != last}
    (letter,) = letters_of(bench, queue)
    assert letter.event == poison
    assert (letter.error_type, letter.subscriber) == ("delivery limit", queue)
    assert "Delivered 21 times" in str(letter.error_message)
    assert letter.routing_key == "user.registered"


def test_orderly_stops_never_move_an_event_that_was_not_begun(bench: Bench) -> None:
    """However many, and however many events are held each time."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()
    entered = threading.Event()
    release = threading.Event()
    handled: Events = []

    def handle(event: DomainEvent) -> None:
        entered.set()
        release.wait(10)
        handled.append(event)

    subscriber.register(handle, queue, ["#"], prefetch_count=30)
    events = [bench.publish("n.n", n) for n in range(60)]
    for _ in range(25):
        entered.clear()
        release.clear()
        thread = threading.Thread(target=subscriber.start_consuming)
        thread.start()
        assert entered.wait(20)
        subscriber.stop_consuming()
        release.set()
        thread.join(20)
        assert not thread.is_alive()
    assert letters_of(bench, queue) == []
    with running(subscriber):
        wait_until(lambda: len({event.data for event in handled}) == len(events))
    assert letters_of(bench, queue) == []


def test_event_that_was_given_back_often_does_not_come_nearer_to_the_limit(
    bench: Bench, peer: Peer
) -> None:
    """RabbitMQ counts it up to 4.2: there the count begins anew, and the event stays the same."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()
    entered, release = threading.Event(), threading.Event()

    def handle(_event: DomainEvent) -> None:
        entered.set()
        release.wait(20)

    subscriber.register(handle, queue, ["#"])
    often = bench.publish("n.n", "often")
    connection = peer.another_connection()
    inbox = peer.consume(subscribed(bench, queue), 1, connection)
    for number in range(1, 13):
        delivery = inbox.wait(number)[-1]
        if number < 12:
            inbox.give_back(delivery)
    bench.publish("n.n", "first")
    with running(subscriber):
        assert entered.wait(20)
        inbox.consumer.stop(10)
        inbox.give_back(delivery)
        # Not that the queue is empty, which it is until the broker has requeued the delivery.
        worker = subscriber._worker
        assert worker is not None
        wait_until(worker._inbox.qsize, message="it is held by the subscriber")
        subscriber.stop_consuming()
        release.set()
    (again,) = peer.consume(subscribed(bench, queue)).wait(1)
    assert again.message_id == often.uuid_string
    assert again.original_routing_key == "n.n"
    assert again.failures == 0


def test_orderly_stops_bring_no_event_nearer_to_the_limit(bench: Bench, peer: Peer) -> None:
    """However many a process holds: a quorum queue forgets some of very many nacks."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()
    gate = threading.Event()
    subscriber.register(lambda _event: gate.wait(20), queue, ["#"])
    bench.publisher.publish_many([DomainEvent("n.n", n) for n in range(180)])
    for _ in range(2):  # of three, up to RabbitMQ 4.2, each comes alone
        gate.clear()
        with running(subscriber):
            wait_until(is_empty(bench, queue), message="all are held")
            subscriber.stop_consuming()
            gate.set()
    deliveries = peer.consume(subscribed(bench, queue), 200).wait(178)
    for delivery in deliveries:
        assert delivery.failures <= (2 if delivery.give_back_counts else 0)


def test_all_workers_are_busy_after_an_orderly_stop(bench: Bench) -> None:
    """What was merely given back is not suspected of having killed anybody."""
    queue = bench.names.queue()
    subscriber = bench.subscriber(workers=4)
    together: list[int] = []
    running_now: set[int] = set()
    gate = threading.Event()

    def handle(event: DomainEvent) -> None:
        running_now.add(event.data)
        together.append(len(running_now))
        gate.wait(20)
        running_now.discard(event.data)

    subscriber.register(handle, queue, ["#"])
    for n in range(40):
        bench.publish("n.n", n)
    for _ in range(2):
        gate.clear()
        together.clear()
        with running(subscriber):
            try:
                wait_until(lambda: max(together, default=0) == 4)
                wait_until(is_empty(bench, queue), message="the rest is held")
            finally:
                subscriber.stop_consuming()
                gate.set()


def test_event_that_takes_long_after_crashes_does_not_hold_up_the_others(
    bench: Bench, peer: Peer
) -> None:
    """It is suspected, and handled alone for a while; then the others go on beside it."""
    queue = bench.names.queue()
    subscriber = bench.subscriber(workers=2)
    gate = threading.Event()
    seen: Events = []

    def handle(event: DomainEvent) -> None:
        if event.data == "slow":
            gate.wait(60)
        seen.append(event)

    subscriber.register(handle, queue, ["#"])
    slow = bench.publish("n.n", "slow")
    for _ in range(3):
        process_that_dies_of(slow, peer, subscribed(bench, queue))
        wait_until(lambda: onlooker.count(bench.url, queue) == 1)
    events = [bench.publish("n.n", n) for n in range(20)]
    with running(subscriber):
        try:
            wait_until(lambda: len(seen) == len(events))
        finally:
            gate.set()


def test_what_is_held_is_never_more_than_the_prefetch_count(bench: Bench) -> None:
    """From the first delivery on, before and after it is settled."""
    queue = bench.names.queue()
    subscriber = bench.subscriber(workers=4)
    gates = {n: threading.Event() for n in range(30)}
    begun: list[int] = []

    def handle(event: DomainEvent) -> None:
        begun.append(event.data)
        gates[event.data].wait(20)

    subscriber.register(handle, queue, ["#"], prefetch_count=4)
    for n in range(30):
        bench.publish("n.n", n)
    with running(subscriber):
        try:
            wait_until(lambda: len(begun) == 4)
            for settled in range(1, 10):
                assert onlooker.count(bench.url, queue) >= 30 - 4 - settled + 1
                gates[begun[settled - 1]].set()
                wait_until(lambda: len(begun) == 4 + settled)  # noqa: B023
        finally:
            for gate in gates.values():
                gate.set()


class NotPayable(Reject):
    """A subclass that forgets its base, as many do."""

    def __init__(self, order: int) -> None:
        self.order = order


def test_reject_without_a_reason_settles_its_event_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice would close the channel, under the events that are handled beside it."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()
    seen: Events = []

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if event.data == 0:
            raise NotPayable(7)

    subscriber.register(handle, queue, ["#"])
    with running(subscriber):
        for n in range(2):
            bench.publish("n.n", n)
        wait_until(lambda: len(seen) == 2)
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
        wait_until(is_empty(bench, queue))
    assert "Internal error" not in caplog.text
    assert [event.data for event in seen] == [0, 1]


def test_delivery_that_is_settled_twice_does_no_harm(bench: Bench, peer: Peer) -> None:
    """The broker would close the channel over it."""
    queue = bench.names.queue()
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["#"])
    inbox = peer.consume(subscribed(bench, queue))
    for n in range(3):
        bench.publish("n.n", n)
    for delivery in inbox.wait(3):
        inbox.settle(delivery)
        inbox.give_back(delivery)
        inbox.settle(delivery, delivery)
    bench.publish("n.n", 3)
    assert len(inbox.wait(4)) == 4


def test_stop_before_any_start_is_not_lost(bench: Bench) -> None:
    """Not only before the first one."""
    subscriber = bench.subscriber()
    subscriber.register(print, bench.names.queue(), ["#"])
    for _ in range(3):
        subscriber.stop_consuming()
        with sooner_than(60):
            subscriber.start_consuming(timeout=60)


# ------------------------------------------------------------------ what a dead letter says


class Broken(Exception):
    """What the handler really fails on."""


def test_dead_letter_of_used_up_retries_names_the_cause_and_the_first_failure(bench: Bench) -> None:
    """Not the `Retry` that was raised for it."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        try:
            raise (KeyError("first") if event.retries == 0 else Broken("last"))
        except KeyError as error:
            raise Retry(0.1) from error
        except Broken:
            raise Retry(0.1)  # noqa: B904 - without a word, as many would write it

    subscriber.register(handle, queue, ["#"], max_retries=2)
    bench.publish("user.registered")
    with running(subscriber):
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    (letter,) = letters_of(bench, queue)
    assert (letter.error_type, letter.error_message) == (f"{Broken.__module__}.Broken", "last")
    assert (letter.first_error_type, letter.first_error_message) == ("KeyError", "'first'")
    assert letter.retries == 2
    assert "Retry" in str(letter.traceback)


# ------------------------------------------------------------------ what a sender says


def forged(key: str, /, **headers: Any) -> tuple[bytes, dict[str, Any]]:
    body = DomainEvent(key, {"amount": 1}).to_json().encode()
    return body, {
        f"domain-events-{name.replace('_', '-')}": value for name, value in headers.items()
    }


def test_event_has_the_routing_key_that_the_broker_has_routed_it_by(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the one in its envelope: its publisher may not be allowed to publish that."""
    queue = bench.names.queue()
    seen: Events = []
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if len(seen) <= 2:
            raise Reject("no")

    subscriber.register(handle, queue, ["user.*", "payment.*"])
    body, headers = forged("payment.approved", routing_key="payment.approved")
    for _ in range(2):
        onlooker.publish(bench.url, bench.exchange, "user.x", body, headers=headers)
    with running(subscriber):
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 2)
        letters = letters_of(bench, queue)
        with DeadLetters(queue, bench.url) as dead_letters:
            dead_letters.replay_all()
        wait_until(lambda: len(seen) == 4)
    assert {event.routing_key for event in seen} == {"user.x"}
    assert {letter.routing_key for letter in letters} == {"user.x"}
    assert {letter.event and letter.event.routing_key for letter in letters} == {"user.x"}
    assert caplog.text.count("payment.approved") == 1


def test_forged_headers_are_neither_believed_nor_carried_on(bench: Bench) -> None:
    """The library's own headers, on what its publisher sent."""
    queue = bench.names.queue()
    seen: list[int] = []
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        seen.append(event.retries)
        if len(seen) == 1:
            raise Retry(0.1)
        raise Broken("really")

    subscriber.register(handle, queue, ["#"], max_retries=1)
    body, headers = forged(
        "user.x",
        retries=7,
        subscriber="other",
        error_type="Forged",
        error_message="forged",
        traceback="forged" * 100,
        first_error_type="Forged",
        hand_backs=99,
        filler="x" * 1000,
    )
    headers["filler"] = "x" * 120_000
    headers["domain-events-cause"] = "a cause"
    headers["trace"] = "kept"
    onlooker.publish(bench.url, bench.exchange, "user.x", body, headers=headers)
    with running(subscriber):
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    assert seen == [0, 1]
    (letter,) = letters_of(bench, queue)
    assert (letter.subscriber, letter.retries) == (queue, 1)
    assert letter.error_type == f"{Broken.__module__}.Broken"
    assert "forged" not in str(letter.traceback)
    assert str(letter.traceback).rstrip().endswith("Broken: really")
    assert letter.first_error_type == "domain_events.retry.Retry"


# ------------------------------------------------------------------ one run at a time


def test_registering_while_consuming_begins_gives_one_consumer(bench: Bench) -> None:
    """Whichever thread comes first."""
    for number in range(10):
        queue = bench.names.queue(f"late{number}")
        subscriber = bench.subscriber()
        subscriber.register(print, bench.names.queue(f"early{number}"), ["early"])
        seen: Events = []
        thread = threading.Thread(target=subscriber.start_consuming)
        thread.start()
        subscriber.register(seen.append, queue, ["late"], prefetch_count=1)
        event = bench.publish("late")
        wait_until(lambda: seen == [event])  # noqa: B023
        if bench.url.startswith("amqp"):
            assert onlooker.consumers(bench.url, queue) == 1
        subscriber.stop_consuming()
        thread.join(30)
        assert not thread.is_alive()
