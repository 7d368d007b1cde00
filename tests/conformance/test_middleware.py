"""Middleware: what it sees of every event, and that no event is lost by it."""

from __future__ import annotations

import contextvars
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onlooker
import pytest
from bench import Bench, running
from support import wait_until

from domain_events import (
    DeadLetters,
    Delivered,
    DomainEvent,
    EventUnroutable,
    InvalidEvent,
    Middleware,
    Operation,
    Outcome,
    Outgoing,
    Publisher,
    Reject,
    Retry,
    Subscriber,
    configure,
)

Callback = Callable[[BaseException | None], object]

current: contextvars.ContextVar[str] = contextvars.ContextVar("current", default="")


class Recorder(Middleware):
    """Notes all that it sees, under its name, in a list that several may share."""

    def __init__(self, name: str = "", notes: list[tuple[Any, ...]] | None = None) -> None:
        self.name = name
        self.notes: list[tuple[Any, ...]] = [] if notes is None else notes
        self.outgoing: list[Outgoing] = []
        self.delivered_: list[Delivered] = []
        self.results: list[tuple[Operation, BaseException | None]] = []

    def publishing(self, outgoing: Outgoing) -> Callback:
        self.outgoing.append(outgoing)
        self.notes.append((self.name, "publishing", outgoing.operation))

        def done(error: BaseException | None) -> None:
            self.results.append((outgoing.operation, error))
            self.notes.append((self.name, "done", outgoing.operation))

        return done

    @contextmanager
    def handling(self, event: DomainEvent) -> Iterator[None]:
        self.notes.append((self.name, "enter"))
        try:
            yield
        finally:
            self.notes.append((self.name, "exit"))

    def delivered(self, delivered: Delivered) -> None:
        self.delivered_.append(delivered)
        self.notes.append((self.name, "delivered", delivered.outcome))

    def outcomes(self) -> list[Outcome]:
        return [each.outcome for each in self.delivered_]


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    """No middleware of one test is left for the next."""
    yield
    configure()


def subscriber_of(bench: Bench, *middleware: Middleware, workers: int = 1) -> Subscriber:
    return Subscriber(bench.url, bench.exchange, workers=workers, middleware=middleware)


def publisher_of(bench: Bench, *middleware: Middleware) -> Publisher:
    return Publisher(bench.url, bench.exchange, middleware=middleware)


def declare(bench: Bench, queue: str, *binding_keys: str) -> None:
    """By a subscriber that does not run any more."""
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, binding_keys)


def stopping(subscriber: Subscriber, handler: Callable[[DomainEvent], None]) -> Any:
    """The handler, and then the end of consuming."""

    def handle(event: DomainEvent) -> None:
        try:
            handler(event)
        finally:
            subscriber.stop_consuming()

    return handle


def test_first_is_outermost_and_those_of_configure_are_outside(bench: Bench) -> None:
    notes: list[tuple[Any, ...]] = []
    of_process, first, second = (Recorder(name, notes) for name in ("process", "first", "second"))
    # One that is in both lists is called once.
    configure(middleware=[of_process])
    subscriber = subscriber_of(bench, first, of_process, second)
    subscriber.register(stopping(subscriber, lambda _: None), bench.names.queue(), ["#"])
    with publisher_of(bench, first) as publisher:
        publisher.publish(DomainEvent("user.registered"))
    subscriber.start_consuming(timeout=20)
    assert notes == [
        ("process", "publishing", "publish"),
        ("first", "publishing", "publish"),
        ("first", "done", "publish"),
        ("process", "done", "publish"),
        *[(name, "enter") for name in ("process", "first", "second")],
        *[(name, "exit") for name in ("second", "first", "process")],
        *[(name, "delivered", "handled") for name in ("second", "first", "process")],
    ]


def test_every_way_out_is_announced_and_its_outcome_reported_once(bench: Bench) -> None:
    """A publish, a retry, a dead letter, a replay."""
    recorder = Recorder()
    configure(middleware=[recorder])
    subscriber = bench.subscriber()
    queue = bench.names.queue()

    def handle(event: DomainEvent) -> None:
        if event.replayed:
            subscriber.stop_consuming()
            return
        raise Retry(0.1) if not event.retries else ValueError("no")

    subscriber.register(handle, queue, ["#"], max_retries=1)
    event = bench.publish("user.registered")
    with running(subscriber):
        wait_until(lambda: len(recorder.results) == 3)
        with DeadLetters(queue, bench.url) as dead_letters:
            assert dead_letters.replay_all() == 1
        wait_until(lambda: len(recorder.delivered_) == 3)
    operations = ["publish", "retry", "dead letter", "replay"]
    assert recorder.results == [(operation, None) for operation in operations]
    assert [each.event for each in recorder.outgoing] == [event] * 4
    assert [each.subscriber for each in recorder.outgoing] == [None, queue, queue, queue]
    assert [each.exchange for each in recorder.outgoing] == [bench.exchange, None, None, None]
    assert [each.delay for each in recorder.outgoing] == [None, 0.1, None, None]
    assert recorder.outcomes() == [Outcome.RETRY, Outcome.DEAD_LETTER, Outcome.HANDLED]
    retry, failed, handled = recorder.delivered_
    assert isinstance(retry.error, Retry)
    assert isinstance(failed.error, ValueError)
    assert retry.delay == 0.1
    assert all(0 <= (each.seconds or -1) < 20 for each in (retry, failed, handled))


def test_each_event_of_a_batch_is_announced_and_reported(bench: Bench) -> None:
    recorder = Recorder()
    declare(bench, bench.names.queue(), "known")
    with publisher_of(bench, recorder) as publisher:
        assert publisher.publish_many(DomainEvent("known") for _ in range(500)) == 500
        assert recorder.results == [(Operation.PUBLISH, None)] * 500
        assert all(each.batch for each in recorder.outgoing)
        recorder.results.clear()
        keys = ["known", "unknown", "known"]
        with pytest.raises(EventUnroutable):
            publisher.publish_many(map(DomainEvent, keys), mandatory=True)
        errors = [error for _, error in recorder.results]
        assert [type(error) for error in errors[:2]] == [type(None), EventUnroutable]
        assert len(recorder.results) == len(recorder.outgoing) - 500


def test_headers_travel_through_retry_dead_letter_and_replay(bench: Bench) -> None:
    """The publisher's, and those that a middleware adds on each way."""

    class Adds(Middleware):
        def publishing(self, outgoing: Outgoing) -> None:
            outgoing.headers[f"via-{outgoing.operation}"] = True

    configure(middleware=[Adds()])
    subscriber = bench.subscriber()
    queue = bench.names.queue()
    seen: list[dict[str, object]] = []

    def handle(event: DomainEvent) -> None:
        seen.append(dict(event.headers))
        if event.replayed:
            return
        raise Retry(0.1) if not event.retries else Reject("no")

    subscriber.register(handle, queue, ["#"], max_retries=1)
    bench.publisher.publish(DomainEvent("a", headers={"mine": "ü", "number": 2**63 - 1}))
    with running(subscriber):
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl"))
        with DeadLetters(queue, bench.url) as dead_letters:
            (letter,) = dead_letters
            assert letter.event is not None
            assert letter.event.headers["via-dead letter"] is True
            letter.replay()
        wait_until(lambda: len(seen) == 3)
    published = {"mine": "ü", "number": 2**63 - 1, "via-publish": True}
    retried = {**published, "via-retry": True}
    replayed = {**retried, "via-dead letter": True, "via-replay": True}
    assert seen == [published, retried, replayed]


def test_what_an_event_knows_besides_its_envelope(bench: Bench) -> None:
    """Who got it, what it belongs to, what caused it, and its version; not part of equality."""
    subscriber = bench.subscriber()
    queue = bench.names.queue()
    seen: list[DomainEvent] = []

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if event.routing_key == "first":
            bench.publisher.publish(DomainEvent("second"))
        else:
            subscriber.stop_consuming()

    subscriber.register(handle, queue, ["#"])
    sent = bench.publisher.publish(
        DomainEvent("first", correlation_id="order-7", cause="click", version=2)
    )
    subscriber.start_consuming(timeout=20)
    first, second = seen
    assert first == sent
    assert (first.subscriber, sent.subscriber) == (queue, None)
    assert (first.exchange, sent.exchange) == (bench.exchange, None)
    assert (first.correlation_id, first.cause, first.version) == ("order-7", "click", 2)
    assert (second.correlation_id, second.cause, second.version) == (
        "order-7",
        first.uuid_string,
        1,
    )
    assert not any((each.redelivered or each.replayed) for each in seen)


def test_redelivery_is_known(bench: Bench) -> None:
    """After a run that ended in the middle of the handler."""
    seen: list[bool] = []
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        seen.append(event.redelivered)
        if len(seen) == 1:
            sys.exit("in the middle")
        subscriber.stop_consuming()

    subscriber.register(handle, bench.names.queue(), ["#"])
    bench.publish("a")
    with pytest.raises(SystemExit):
        subscriber.start_consuming(timeout=20)
    subscriber.start_consuming(timeout=20)
    assert seen == [False, True]


@pytest.mark.parametrize("workers", [1, 3])
def test_context_variables_are_seen_in_the_handler_and_end_with_the_event(
    bench: Bench, workers: int
) -> None:
    """In each worker thread, and with what the caller of ``start_consuming`` has set."""
    outside: contextvars.ContextVar[str] = contextvars.ContextVar("outside", default="")

    class Sets(Middleware):
        def __init__(self) -> None:
            self.seen: list[tuple[str, ...]] = []

        def publishing(self, outgoing: Outgoing) -> None:
            assert outgoing.event is not None
            if outgoing.operation != "publish":
                self.seen.append((outgoing.operation, current.get(), outgoing.event.uuid_string))

        def handling(self, event: DomainEvent) -> None:
            self.seen.append(("before", current.get() or event.uuid_string, event.uuid_string))
            current.set(event.uuid_string)  # and never resets it

        def delivered(self, delivered: Delivered) -> None:
            assert delivered.event is not None
            self.seen.append(("delivered", current.get(), delivered.event.uuid_string))

    sets = Sets()
    subscriber = subscriber_of(bench, sets, workers=workers)
    handled: list[tuple[str, str, str]] = []

    def handle(event: DomainEvent) -> None:
        handled.append((current.get(), event.uuid_string, outside.get()))
        raise Reject("to see where its dead letter is announced")

    subscriber.register(handle, bench.names.queue(), ["#"])
    bench.publisher.publish_many(DomainEvent("a") for _ in range(20))

    def consume() -> None:
        outside.set("outside")
        subscriber.start_consuming(timeout=60)

    thread = threading.Thread(target=consume)
    thread.start()
    wait_until(lambda: len(sets.seen) == 3 * 20)
    subscriber.stop_consuming()
    thread.join(30)
    assert all(seen == own for _, seen, own in sets.seen)
    assert all(seen == own for seen, own, _ in handled)
    assert {each for _, _, each in handled} == {"outside"}


class Failing(Middleware):
    """Raises at one place."""

    def __init__(self, place: str) -> None:
        self.place = place

    def _fail(self, place: str) -> None:
        if place == self.place:
            raise ValueError(f"at {place}")

    def publishing(self, outgoing: Outgoing) -> Callback:
        self._fail(outgoing.operation)
        return lambda _error: self._fail(f"after {outgoing.operation}")

    @contextmanager
    def handling(self, event: DomainEvent) -> Iterator[None]:
        self._fail("enter")
        yield
        self._fail("exit")

    def delivered(self, delivered: Delivered) -> None:
        self._fail("delivered")


@pytest.mark.parametrize("place", ["enter", "exit"])
def test_exception_around_a_handler_counts_as_the_handlers(bench: Bench, place: str) -> None:
    """A transaction that could not be committed: the event is tried again."""
    recorder = Recorder()
    subscriber = subscriber_of(bench, recorder, Failing(place))
    queue = bench.names.queue()
    called: list[DomainEvent] = []
    subscriber.register(called.append, queue, ["#"])
    bench.publish("a")
    with running(subscriber):
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl"))
    assert recorder.outcomes() == [Outcome.DEAD_LETTER]
    assert repr(recorder.delivered_[0].error) == repr(ValueError(f"at {place}"))
    assert len(called) == (place == "exit")


@pytest.mark.parametrize("place", ["retry", "after retry", "dead letter", "delivered"])
def test_exception_elsewhere_loses_no_event(
    bench: Bench, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the retry and the dead letter go their way."""
    subscriber = subscriber_of(bench, Failing(place))
    queue = bench.names.queue()
    times: list[int] = []

    def handle(event: DomainEvent) -> None:
        times.append(event.retries)
        raise Retry(0.1)

    subscriber.register(handle, queue, ["#"], max_retries=1)
    bench.publish("a")
    with running(subscriber):
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl"))
    assert times == [0, 1]
    assert onlooker.count(bench.url, queue) == 0
    assert f"at {place}" in caplog.text


def test_exception_on_the_way_out_reaches_the_caller_and_nothing_is_sent(bench: Bench) -> None:
    """One afterwards does not: the event was sent."""
    queue = bench.names.queue()
    declare(bench, queue, "#")
    outside = Recorder()
    with publisher_of(bench, outside, Failing("publish")) as publisher:
        with pytest.raises(ValueError, match="at publish"):
            publisher.publish(DomainEvent("a"))
        with pytest.raises(ValueError, match="at publish"):
            publisher.publish_many([DomainEvent("a")])
    assert [type(error) for _, error in outside.results] == [ValueError, ValueError]
    assert onlooker.count(bench.url, queue) == 0
    with publisher_of(bench, Failing("after publish")) as publisher:
        publisher.publish(DomainEvent("a"))
        assert publisher.publish_many([DomainEvent("a")]) == 1
    assert onlooker.count(bench.url, queue) == 2


class Suppressing(Middleware):
    """Hides every exception, as an error tracker's context manager may."""

    @contextmanager
    def handling(self, event: DomainEvent) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # noqa: BLE001
            logging.getLogger("tracker").info("hidden: %r", error)


@pytest.mark.parametrize("culprit", ["handler", "enter", "exit"])
def test_no_middleware_can_suppress_an_exception(bench: Bench, culprit: str) -> None:
    """The event would be acked, and nobody had handled it."""
    subscriber = subscriber_of(bench, Suppressing(), Failing(culprit))
    queue = bench.names.queue()

    def handle(event: DomainEvent) -> None:
        if culprit == "handler":
            raise ValueError("at handler")

    subscriber.register(handle, queue, ["#"])
    bench.publish("a")
    with running(subscriber):
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl"))


def test_deliveries_without_a_handler_call_are_reported(bench: Bench) -> None:
    """A retired key, and a key that this process does not list."""
    recorder = Recorder()
    subscriber = subscriber_of(bench, recorder)
    queue = bench.names.queue()
    declare(bench, queue, "retired", "unlisted", "listed")
    bench.publish("retired")
    bench.publish("unlisted")
    subscriber.register(print, queue, ["listed"], retired_keys=["retired"])
    with running(subscriber):
        wait_until(lambda: len(recorder.delivered_) == 2)
        wait_until(lambda: recorder.results)
    assert set(recorder.outcomes()) == {Outcome.RETIRED, Outcome.HANDED_BACK}
    assert recorder.results[0] == (Operation.HAND_BACK, None)
    assert [each.seconds for each in recorder.delivered_] == [None, None]
    assert not any(note[1] == "enter" for note in recorder.notes)


def test_header_of_a_middleware_that_cannot_be_sent_is_the_callers_error(bench: Bench) -> None:
    class Wrong(Middleware):
        def publishing(self, outgoing: Outgoing) -> None:
            outgoing.headers["x-death"] = "no"

    recorder = Recorder()
    with (
        publisher_of(bench, recorder, Wrong()) as publisher,
        pytest.raises(InvalidEvent, match="'x-death' is not for publishers"),
    ):
        publisher.publish(DomainEvent("a"))
    assert [type(error) for _, error in recorder.results] == [InvalidEvent]


def test_events_of_one_object_stay_in_order_with_middleware(bench: Bench) -> None:
    """Several workers, an object's events one after the other, each in its own context."""

    class Sets(Middleware):
        def handling(self, event: DomainEvent) -> None:
            assert not current.get()
            current.set(event.uuid_string)

    subscriber = subscriber_of(bench, Sets(), workers=3)
    order: dict[str, list[int]] = {"a": [], "b": []}

    def handle(event: DomainEvent) -> None:
        assert current.get() == event.uuid_string
        order[str(event.domain_object_id)].append(event.data)

    queue = bench.names.queue()
    subscriber.register(handle, queue, ["#"], ordered=True)
    bench.publisher.publish_many(
        DomainEvent("a.b", number, about) for number in range(30) for about in order
    )
    with running(subscriber):
        wait_until(lambda: sum(map(len, order.values())) == 60)
    assert order == {"a": list(range(30)), "b": list(range(30))}
    assert onlooker.count(bench.url, f"{queue}-dl") == 0
