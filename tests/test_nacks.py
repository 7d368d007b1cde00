"""A refused event is tried again on other channels, and nobody else waits for that."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import onlooker
import pytest
from nacking import NackingProxy
from support import Names, sooner_than, wait_until

from domain_events import (
    DomainEvent,
    DomainEventsError,
    EventNotConfirmed,
    EventRejected,
    Publisher,
)
from domain_events.broker.rabbitmq import publishing
from domain_events.broker.rabbitmq.sending import Sender

FULL = {"x-max-length": 1, "x-overflow": "reject-publish"}


@pytest.fixture
def full(names: Names, broker_url: str, exchange: str) -> str:
    """A queue at its length limit, bound for ``full.#``, beside ``healthy``."""
    queue = names.queue("full")
    onlooker.bind_queue(broker_url, queue, exchange, "full.#", **FULL)
    with Publisher(broker_url, exchange) as publisher:
        publisher.publish(DomainEvent("full.one", {}))
    return queue


@pytest.fixture
def healthy(names: Names, broker_url: str, exchange: str) -> str:
    queue = names.queue("healthy")
    onlooker.bind_queue(broker_url, queue, exchange, "healthy.#")
    return queue


@contextmanager
def refused_all_the_time(publisher: Publisher) -> Iterator[list[float]]:
    """Events go to the full queue without end, each with a routing key that none had before."""
    stopping = threading.Event()
    rejected: list[float] = []

    def publish(who: int) -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            try:
                publisher.publish(DomainEvent(f"full.{who}.{number}", {}))
            except EventRejected:
                rejected.append(time.monotonic())

    threads = [threading.Thread(target=publish, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield rejected
    finally:
        stopping.set()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)


def publish_to_healthy(publisher: Publisher, each: int = 50, threads: int = 8) -> int:
    """Publish one at a time, from several threads; how many were confirmed."""

    def publish(_thread: int) -> int:
        for _ in range(each):
            publisher.publish(DomainEvent("healthy.one", {}), timeout=60)
        return each

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(publish, range(threads)))


def test_refused_events_do_not_hold_up_others(
    publisher: Publisher,
    full: str,
    healthy: str,
    broker_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While they wait until they are sent again, events for a healthy queue are confirmed."""
    monkeypatch.setattr(publishing, "_NACK_RETRY_DELAYS", (60.0,))
    refused: list[BaseException] = []

    def publish_refused(number: int) -> None:
        try:
            publisher.publish(DomainEvent(f"full.{number}", {}), timeout=120)
        except DomainEventsError as error:
            refused.append(error)

    threads = [threading.Thread(target=publish_refused, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    rabbit = publisher._publishing()
    assert isinstance(rabbit, publishing.RabbitPublishing)
    wait_until(lambda: len(rabbit._nacked.copy()) == len(threads))
    with sooner_than(60):  # until the first of them is sent again
        assert publish_to_healthy(publisher) == 400
    assert len(rabbit._nacked.copy()) == len(threads)
    assert onlooker.count(broker_url, healthy) == 400
    publisher.close(timeout=0.1)
    for thread in threads:
        thread.join(30)
    assert len(refused) == len(threads)


def test_refused_events_that_are_sent_again_do_not_hold_up_others(
    publisher: Publisher,
    full: str,
    healthy: str,
    broker_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a new channel each time, again and again: all events for a healthy queue are stored."""
    monkeypatch.setattr(publishing, "_NACK_RETRY_DELAYS", (0.02, 0.02, 0.02))
    published = 0
    with refused_all_the_time(publisher) as rejected:
        while len(rejected) < 20 or published < 800:
            published += publish_to_healthy(publisher)
    assert onlooker.count(broker_url, healthy) == published


def test_events_that_are_not_refused_keep_their_order(
    publisher: Publisher,
    full: str,
    healthy: str,
    broker_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch at full speed, while the channel is replaced again and again under it.

    That is so because the other queue now and then has room for what it has refused.
    """
    monkeypatch.setattr(publishing, "_NACK_RETRY_DELAYS", (0.05, 0.05, 0.05))
    replaced: list[int] = []
    switch = publishing.RabbitPublishing._switch

    def counted(rabbit: publishing.RabbitPublishing, old: Sender, new: Sender) -> None:
        replaced.append(len(old.in_flight))
        switch(rabbit, old, new)

    monkeypatch.setattr(publishing.RabbitPublishing, "_switch", counted)
    stopping = threading.Event()

    def make_room() -> None:
        while not stopping.is_set():
            onlooker.take_all(broker_url, full)
            stopping.wait(0.02)

    def batch() -> Iterator[DomainEvent]:
        while number[0] < 3_000 or len(replaced) < 3 or max(replaced) < 50:
            yield DomainEvent("healthy.one", {"n": number[0]})
            number[0] += 1

    number = [0]
    taker = threading.Thread(target=make_room)
    taker.start()
    try:
        with refused_all_the_time(publisher):
            assert publisher.publish_many(batch()) == number[0]
    finally:
        stopping.set()
        taker.join(30)
    assert max(replaced) >= 50  # with so many in flight
    stored = [json.loads(body)["data"]["n"] for body in onlooker.take_all(broker_url, healthy)]
    assert stored == list(range(number[0]))


def test_refused_event_goes_through_when_there_is_room_again(
    publisher: Publisher, full: str, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent again; its sender sees nothing of it but the time."""
    monkeypatch.setattr(publishing, "_NACK_RETRY_DELAYS", (0.25,) * 30)
    timer = threading.Timer(0.4, onlooker.take, (broker_url, full))
    timer.start()
    begun = time.monotonic()
    publisher.publish(DomainEvent("full.one", {"n": 2}))
    assert time.monotonic() - begun > 0.2
    timer.join()
    _, body = onlooker.take(broker_url, full)
    assert json.loads(body)["data"] == {"n": 2}


def test_refusal_of_one_kind_is_not_believed_of_another(
    publisher: Publisher, full: str, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one that was refused for good, the same kind fails at once, and only that."""
    monkeypatch.setattr(publishing, "_NACK_TRUST", 600.0)
    with pytest.raises(EventRejected):
        publisher.publish(DomainEvent("full.one", {}))
    monkeypatch.setattr(publishing, "_NACK_RETRY_DELAYS", (60.0,))
    with sooner_than(60), pytest.raises(EventRejected):
        publisher.publish(DomainEvent("full.one", {}), timeout=120)
    monkeypatch.setattr(publishing, "_NACK_RETRY_DELAYS", (0.25,))
    begun = time.monotonic()
    with pytest.raises(EventRejected):
        publisher.publish(DomainEvent("full.two", {}))
    assert time.monotonic() - begun > 0.2


def test_refusal_that_lasts_longer_than_the_timeout_is_named(
    publisher: Publisher, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker has answered; the error does not say that it is silent."""
    monkeypatch.setattr(publishing, "_NACK_RETRY_DELAYS", (60.0,))
    with pytest.raises(EventNotConfirmed, match="has nacked it so far"):
        publisher.publish(DomainEvent("full.one", {}), timeout=1)
    with pytest.raises(EventNotConfirmed, match="has nacked it so far"):
        publisher.publish_many([DomainEvent("full.two", {})], timeout=1)


# --- a channel that refuses what another takes ---------------------------------------------------


Behind = Callable[..., tuple[Publisher, NackingProxy]]


@pytest.fixture
def behind(broker_url: str, exchange: str) -> Iterator[Behind]:
    """A publisher behind a proxy that nacks on some channels."""
    port = urlsplit(broker_url).port
    assert port is not None
    made: list[Publisher] = []

    def make(refuses: Callable[[int], bool], options: str = "") -> tuple[Publisher, NackingProxy]:
        proxy = NackingProxy(port, refuses)
        proxies.append(proxy)
        url = broker_url.replace(f":{port}/", f":{proxy.port}/") + options
        made.append(Publisher(url, exchange))
        return made[-1], proxy

    proxies: list[NackingProxy] = []
    yield make
    for publisher in made:
        publisher.close()
    for proxy in proxies:
        proxy.close()


def test_channel_that_refuses_what_a_new_one_takes_is_replaced(
    behind: Behind, queue: str, broker_url: str
) -> None:
    """As after an election: every event on the old one is nacked, none on the new one."""
    publisher, proxy = behind(lambda channel: channel == 1)
    number = 300
    # The nacked ones have been stored all the same: the proxy is between.
    assert publisher.publish_many(DomainEvent("a.b", {"n": n}) for n in range(number)) == number
    nacks = proxy.nacks
    assert nacks > 0
    for n in range(20):
        publisher.publish(DomainEvent("a.b", {"n": n}))
    assert proxy.nacks == nacks
    stored = {json.loads(body)["uuid_string"] for body in onlooker.take_all(broker_url, queue)}
    assert len(stored) == number + 20
    rabbit = publisher._publishing()
    assert isinstance(rabbit, publishing.RabbitPublishing)
    wait_until(lambda: not rabbit._secondary)  # the old channel is closed when all is answered


def test_event_is_refused_when_every_new_channel_refuses_it(behind: Behind, queue: str) -> None:
    """Three new ones are tried, not more."""
    publisher, proxy = behind(lambda _channel: True)
    with pytest.raises(EventRejected):
        publisher.publish(DomainEvent("a.b", {}))
    assert proxy.nacks == 4


def test_connection_that_may_have_one_channel_only(behind: Behind, queue: str) -> None:
    """No other can be opened: the refusal is believed, and the connection stays."""
    refusing = threading.Event()
    publisher, proxy = behind(lambda _channel: refusing.is_set(), "?channel_max=1")
    publisher.publish(DomainEvent("a.b", {}))
    connection = publisher._publishing()._link.connection  # type: ignore[union-attr]
    refusing.set()
    with pytest.raises(EventRejected):
        publisher.publish(DomainEvent("a.b", {}))
    refusing.clear()
    publisher.publish(DomainEvent("a.b", {}))
    assert publisher._publishing()._link.connection is connection  # type: ignore[union-attr]
    assert proxy.nacks == 1
