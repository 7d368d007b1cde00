"""What `Publisher.publish_many` promises about time, and about what became of the events."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import onlooker
import pytest
from faults.proxy import Proxy
from rabbitmq_node import Node
from support import Names, wait_until

from domain_events import (
    BrokerUnavailable,
    DomainEvent,
    EventNotConfirmed,
    EventRejected,
    InvalidEvent,
    Publisher,
)


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    broker = urlsplit(broker_url)
    assert broker.hostname is not None
    assert broker.port is not None
    with closing(Proxy(broker.hostname, broker.port)) as proxy:
        yield proxy


@pytest.fixture
def far(proxy: Proxy, broker_url: str, exchange: str) -> Iterator[Publisher]:
    """A publisher behind the proxy, connected."""
    url = broker_url.replace(f":{urlsplit(broker_url).port}/", f":{proxy.port}/")
    with Publisher(url, exchange) as publisher:
        publisher.publish(DomainEvent("first.one", {}), timeout=30)
        yield publisher
        proxy.flow()


def events(number: int, size: int = 10) -> Iterator[DomainEvent]:
    return (DomainEvent("n.n", {"n": n, "x": "x" * size}) for n in range(number))


# --- a deadline of silence -----------------------------------------------------------------------


def test_slow_line_that_confirms_all_the_time_is_no_error(
    far: Publisher, proxy: Proxy, broker_url: str, queue: str
) -> None:
    """5 MB over a line of 1 MB/s take more than twice the timeout, and succeed."""
    proxy.slow(1_000_000, 0)
    begun = time.monotonic()
    assert far.publish_many(events(2500, 2000), timeout=2.0) == 2500
    assert time.monotonic() - begun > 3
    assert onlooker.count(broker_url, queue) == 2500


def test_slow_confirms_are_no_error(far: Publisher, proxy: Proxy) -> None:
    """The events get there quickly; their confirms come back a few at a time."""
    proxy.slow(400_000, 2000)
    begun = time.monotonic()
    assert far.publish_many(events(600, 2000), timeout=1.5) == 600
    assert time.monotonic() - begun > 2.5


def test_large_events_over_a_slow_line_are_no_error(far: Publisher, proxy: Proxy) -> None:
    """Each of them takes a part of the timeout, all of them several times as long."""
    proxy.slow(2_000_000, 0)
    begun = time.monotonic()
    assert far.publish_many(events(16, 500_000), timeout=1.5) == 16
    assert time.monotonic() - begun > 2


def test_silence_is_an_error_that_says_what_was_confirmed(far: Publisher, proxy: Proxy) -> None:
    """Counted from the last confirm, however long ago the first event was taken."""
    taken: list[DomainEvent] = []
    stalled = 0.0

    def until_it_stalls() -> Iterator[DomainEvent]:
        nonlocal stalled
        for event in events(3000):
            if len(taken) == 2500:
                # All before are confirmed, the slow ones too.
                wait_until(lambda: not far._publishing()._under_way())  # type: ignore[union-attr]
                proxy.stall()
                stalled = time.monotonic()
            taken.append(event)
            yield event

    with pytest.raises(EventNotConfirmed) as caught:
        far.publish_many(until_it_stalls(), timeout=1.0)
    assert 0.9 < time.monotonic() - stalled < 30  # and not 60, as with the heartbeat
    error = caught.value
    assert error.taken == 3000
    assert error.published == 2500
    assert list(error.unconfirmed) == taken[2500:]
    assert list(error.perhaps) == taken[2500:]
    assert error.event is taken[2500]
    assert "3,000 events taken, 2,500 are confirmed, 500 were sent" in str(error)


def test_what_was_never_sent_is_not_perhaps_stored(unused_port: int) -> None:
    """Without a broker, nothing is; and the error says how many were taken."""
    with Publisher(f"amqp://guest:guest@127.0.0.1:{unused_port}/%2F", timeout=0.5) as publisher:
        with pytest.raises(BrokerUnavailable) as caught:
            publisher.publish_many(events(20))
        error = caught.value
        assert (error.taken, error.published) == (20, 0)
        assert len(error.unconfirmed) == 20
        assert list(error.perhaps) == []
        with pytest.raises(BrokerUnavailable) as one:
            publisher.publish(DomainEvent("n.n", 1))
        assert (one.value.taken, one.value.published) == (1, 0)
        assert list(one.value.perhaps) == []


def test_window_that_is_only_partly_sent(killable_node: Node, unique: str) -> None:
    """A broker that stops in its tracks: what fills the window is perhaps stored, no more."""
    with Publisher(killable_node.url, unique) as publisher:
        publisher.publish(DomainEvent("first.one", {}), timeout=30)
        killable_node.pause()
        batch = list(events(3500))
        with pytest.raises(EventNotConfirmed) as caught:
            publisher.publish_many(batch, timeout=1.0)
        killable_node.resume()
        error = caught.value
        assert error.published == 0
        assert list(error.unconfirmed) == batch[: error.taken]
        assert 0 < len(error.perhaps) < error.taken
        assert list(error.perhaps) == batch[: len(error.perhaps)]


# --- after any error one can tell ----------------------------------------------------------------


def test_exception_of_the_iterable_tells_what_became_of_the_events(
    publisher: Publisher, queue: str, broker_url: str
) -> None:
    """It is the caller's own, and has the same attributes as an error of ours."""

    def failing() -> Iterator[DomainEvent]:
        yield from events(10)
        raise LookupError("the outbox is gone")

    with pytest.raises(LookupError, match="outbox") as caught:
        publisher.publish_many(failing())
    error = caught.value
    assert (error.taken, error.published) == (10, 10)  # type: ignore[attr-defined]
    assert list(error.unconfirmed) == []  # type: ignore[attr-defined]
    assert list(error.perhaps) == []  # type: ignore[attr-defined]
    assert onlooker.count(broker_url, queue) == 10


def test_broker_error_before_an_exception_of_the_iterable_is_kept(
    publisher: Publisher, names: Names, broker_url: str
) -> None:
    """It is in the traceback; the event it is about is unconfirmed."""
    onlooker.bind_queue(broker_url, names.queue(), publisher._exchange, "n.*")
    nobodys = DomainEvent("nobody", 1)

    def failing() -> Iterator[DomainEvent]:
        yield from events(3)
        yield nobodys
        raise LookupError("the outbox is gone")

    with pytest.raises(LookupError) as caught:
        publisher.publish_many(failing(), mandatory=True)
    error = caught.value
    assert (error.taken, error.published) == (4, 3)  # type: ignore[attr-defined]
    assert error.unconfirmed == [nobodys]  # type: ignore[attr-defined]
    assert "No queue is bound" in str(error.__context__)


def test_broker_error_is_kept_behind_a_cause(publisher: Publisher) -> None:
    """Also where the exception has a cause of its own, whose traceback is shown instead."""

    goes_on = threading.Event()

    def failing() -> Iterator[DomainEvent]:
        yield DomainEvent("nobody", 1)
        goes_on.set()
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise LookupError("outer") from error

    publisher.publish(DomainEvent("first.one", {}))
    # The broker's error must not come first: then the iterable is not read on.
    publishing: Any = publisher._publishing()
    publishing._link.wake(lambda: goes_on.wait(10))
    with pytest.raises(LookupError) as caught:
        publisher.publish_many(failing(), mandatory=True)
    context = caught.value.__context__
    assert isinstance(context, KeyError)
    assert "No queue is bound" in str(context.__context__)


@pytest.mark.parametrize("wrong", [{"routing_key": "a.b"}, "a.b", None, DomainEvent])
def test_what_is_not_an_event_is_named_by_its_position(
    publisher: Publisher, queue: str, broker_url: str, wrong: object
) -> None:
    """All before it are published, nothing behind it is read."""
    iterator = iter([*events(5), wrong, *events(5)])
    with pytest.raises(TypeError, match=r"^Item 5 \(counted from 0\): .* not a ") as caught:
        publisher.publish_many(iterator)  # type: ignore[arg-type]
    error = caught.value
    assert (error.taken, error.published) == (6, 5)  # type: ignore[attr-defined]
    assert error.unconfirmed == [wrong]  # type: ignore[attr-defined]
    assert error.perhaps == []  # type: ignore[attr-defined]
    assert len(list(iterator)) == 5
    assert onlooker.count(broker_url, queue) == 5


def test_invalid_event_is_named_by_its_position(publisher: Publisher) -> None:
    """So is an event that can never be sent; also where nothing is published at all."""
    bad = DomainEvent("n.n", {"x": object()})
    for each in (publisher, Publisher(None), Publisher("memory://positions")):
        with pytest.raises(InvalidEvent, match=r"^Item 2 \(counted from 0\): ") as caught:
            each.publish_many([*events(2), bad, *events(2)])
        error = caught.value
        assert error.event is bad
        assert (error.taken, error.published) == (3, 2)
        assert list(error.unconfirmed) == [bad]
        assert list(error.perhaps) == []


def test_rejected_event_is_perhaps_stored_in_another_queue(
    publisher: Publisher, names: Names, broker_url: str, exchange: str
) -> None:
    """A queue at its limit refused it, another one has it."""
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
    onlooker.bind_queue(broker_url, names.queue("full"), exchange, "#", **limits)
    publisher.publish(DomainEvent("n.n", {}))
    batch = list(events(3))
    with pytest.raises(EventRejected) as caught:
        publisher.publish_many(batch)
    error = caught.value
    assert error.taken == 3
    assert error.published + len(error.unconfirmed) == 3
    assert list(error.perhaps) == list(error.unconfirmed)


def test_ctrl_c_waits_for_no_confirm(killable_node: Node, unique: str) -> None:
    """It comes at once; what was sent is perhaps stored, what waited is not."""
    with Publisher(killable_node.url, unique) as publisher:
        publisher.publish(DomainEvent("first.one", {}), timeout=30)
        killable_node.pause()
        batch = list(events(3500))
        waiting = threading.Event()
        main = threading.main_thread().ident
        assert main is not None

        def taken() -> Iterator[DomainEvent]:
            yield from batch
            waiting.set()

        def interrupt() -> None:
            assert waiting.wait(30)
            signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt) as caught:
                publisher.publish_many(taken(), timeout=60)
        finally:
            thread.join()
            killable_node.resume()
        error = caught.value
        assert (error.taken, error.published) == (3500, 0)  # type: ignore[attr-defined]
        assert error.unconfirmed == batch  # type: ignore[attr-defined]
        perhaps = error.perhaps  # type: ignore[attr-defined]
        assert 0 < len(perhaps) < 3500
        assert perhaps == batch[: len(perhaps)]


def test_ctrl_c_in_the_iterable_counts_the_event_that_was_not_sent(
    publisher: Publisher, queue: str
) -> None:
    """What was confirmed meanwhile is published; nothing is in no list."""
    taken: list[DomainEvent] = []

    def interrupted() -> Iterator[DomainEvent]:
        for event in events(10):
            taken.append(event)
            yield event
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        publisher.publish_many(interrupted())
    error = caught.value
    assert error.taken == 10  # type: ignore[attr-defined]
    assert error.published + len(error.unconfirmed) == 10  # type: ignore[attr-defined]


def test_exception_that_takes_no_attributes_is_raised_all_the_same(publisher: Publisher) -> None:
    """The caller's exception comes as it is."""

    class Closed(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise TypeError("no attributes")

    def failing() -> Iterator[DomainEvent]:
        yield from events(3)
        raise Closed("mine")

    with pytest.raises(Closed, match="mine"):
        publisher.publish_many(failing())


# --- an iterable that uses the publisher ---------------------------------------------------------


def test_iterable_may_publish_with_the_same_publisher(
    publisher: Publisher, queue: str, broker_url: str
) -> None:
    """It is a caller like others."""

    def publishing() -> Iterator[DomainEvent]:
        for event in events(50):
            publisher.publish(DomainEvent("inner.one", {}))
            yield event
        assert publisher.publish_many(events(50)) == 50

    assert publisher.publish_many(publishing()) == 50
    assert onlooker.count(broker_url, queue) == 150


def test_iterable_may_close_the_publisher(broker_url: str, exchange: str, queue: str) -> None:
    """What was taken before is published, what comes behind is refused; nothing hangs."""
    publisher = Publisher(broker_url, exchange)
    batch = list(events(20))

    def closing() -> Iterator[DomainEvent]:
        for number, event in enumerate(batch):
            if number == 10:
                publisher.close()
            yield event

    with pytest.raises(BrokerUnavailable, match="closed") as caught:
        publisher.publish_many(closing())
    error = caught.value
    assert (error.taken, error.published) == (11, 10)
    assert list(error.unconfirmed) == [batch[10]]
    assert list(error.perhaps) == []
    assert onlooker.count(broker_url, queue) == 10
