"""The broker protocol: publishing with confirms."""

from __future__ import annotations

import threading
from datetime import datetime, timezone
from typing import Any

import pytest
from support import Names, wait_until

from conformance.peer import TIMEOUT, Peer, bodies, walk
from domain_events import BrokerUnavailable, EventUnroutable, TopologyError
from domain_events.broker import Publication
from domain_events.message import Message
from domain_events.topology import Binding, Exchange, Queue, subscriber_queue


@pytest.fixture
def queue(peer: Peer, names: Names) -> str:
    """A durable subscriber's queue."""
    name = names.queue()
    peer.declare(subscriber_queue(name))
    return name


def test_confirmed_publication_is_done_once_and_stored(peer: Peer, queue: str) -> None:
    """`on_done` is called once, when ``done`` is true; by then the queue has the message."""
    told: list[tuple[bool, object]] = []
    publication = Publication(
        Message("", queue, b"one"), lambda each: told.append((each.done, each.error))
    )
    peer.publishing.submit(publication)
    wait_until(lambda: told)
    assert told == [(True, None)]
    assert publication.sent
    assert peer.publishing.trouble == ""
    peer.wait_for_count(queue, 1)
    peer.publish("", queue, b"two")
    assert len(told) == 1


def test_messages_are_stored_in_the_order_of_their_submission(peer: Peer, queue: str) -> None:
    """Many under way at a time keep their order."""
    sent = [b"%d" % n for n in range(300)]
    publications = peer.submit(*(Message("", queue, body) for body in sent))
    wait_until(lambda: all(each.done for each in publications))
    assert not [each.error for each in publications if each.error]
    inbox = peer.consume(queue, prefetch=1000)
    assert bodies(inbox.wait(300)) == sent


def test_message_that_reaches_no_queue_is_an_error_only_if_mandatory(
    peer: Peer, names: Names
) -> None:
    """From any exchange; and the connection is none the worse for it."""
    exchange, queue = names.exchange(), names.queue()
    peer.declare(Exchange(exchange), Queue(queue), Binding(exchange, queue, "a.*"))
    for where, key in ((exchange, "b.c"), ("", f"{queue}-nobody")):
        assert peer.send(Message(where, key, b"")) is None
        error = peer.send(Message(where, key, b"", mandatory=True))
        assert isinstance(error, EventUnroutable)
        assert key in str(error)
    peer.publish(exchange, "a.b", b"found", mandatory=True)
    assert peer.take_all(queue) == [b"found"]


def test_exchange_that_is_missing_is_a_topology_error(peer: Peer, names: Names) -> None:
    """It names the exchange; what is published elsewhere at the same time is stored."""
    queue = names.queue()
    peer.declare(Queue(queue))
    missing = names.exchange("missing")
    before, lost, after = peer.submit(
        Message("", queue, b"before"), Message(missing, "a", b""), Message("", queue, b"after")
    )
    wait_until(lambda: before.done and lost.done and after.done)
    assert (before.error, after.error) == (None, None)
    assert isinstance(lost.error, TopologyError)
    assert missing in str(lost.error)
    stored = peer.take_all(queue)
    # Whichever was under way with the culprit may have been sent again.
    assert {*stored} == {b"before", b"after"}


def test_exchanges_of_a_publisher_are_declared_for_it(broker_url: str, names: Names) -> None:
    """With the connection; one of another type is told to whoever publishes."""
    exchange = names.exchange()
    peer = Peer(broker_url, [Exchange(exchange, "direct")])
    other = Peer(broker_url, [Exchange(exchange, "fanout")])
    try:
        peer.publish(exchange, "a", b"")
        error = other.send(Message(exchange, "a", b""))
        assert isinstance(error, TopologyError)
        for words in (exchange, "direct", "fanout"):
            assert words in str(error)
        # An answer, not a state: mended outside, it works.
        peer.delete(Exchange(exchange))
        other.publish(exchange, "a", b"")
    finally:
        peer.close()
        other.close()


PROPERTIES: dict[str, Any] = {
    "content_type": "text/plain",
    "content_encoding": "utf-8",
    "correlation_id": "correlation",
    "reply_to": "reply",
    "message_id": "message",
    "timestamp": 1_700_000_000,
    "type": "kind",
    "app_id": "program",
}


def test_message_arrives_as_it_was_sent(peer: Peer, queue: str) -> None:
    """Every property, every type of header, every byte."""
    headers = {
        "text": "ü",
        "number": 2**40,
        "negative": -1,
        "yes": True,
        "nothing": None,
        "bytes": b"\x00\xff",
        "when": datetime(2026, 1, 2, tzinfo=timezone.utc),
        "list": [1, "two", [3]],
        "table": {"a": {"b": "c"}},
    }
    body = bytes(range(256)) * 3
    assert peer.send(Message("", queue, body, headers=headers, **PROPERTIES)) is None
    (delivery,) = peer.consume(queue).wait(1)
    assert delivery.body == body
    assert (delivery.exchange, delivery.routing_key) == ("", queue)
    assert delivery.redelivered is False
    assert {name: getattr(delivery.properties, name) for name in PROPERTIES} == PROPERTIES
    received = dict(delivery.headers)
    # pika reads a time without its zone.
    when = received.pop("when")
    assert when.replace(tzinfo=timezone.utc) == headers.pop("when")
    assert received == headers


def test_message_without_properties_arrives_without(peer: Peer, queue: str) -> None:
    """Nothing is made up, and an empty body is one."""
    assert peer.send(Message("", queue, b"", content_type=None)) is None
    (delivery,) = peer.consume(queue).wait(1)
    assert delivery.body == b""
    assert {name: getattr(delivery.properties, name) for name in PROPERTIES} == dict.fromkeys(
        PROPERTIES
    )
    assert not delivery.headers


def test_each_receiver_has_a_message_of_its_own(peer: Peer, names: Names) -> None:
    """What the sender does to it afterwards, or another receiver, changes nothing."""
    exchange, first, second = names.exchange(), names.queue("a"), names.queue("b")
    peer.declare(Exchange(exchange, "fanout"), Queue(first), Queue(second))
    peer.declare(Binding(exchange, first, ""), Binding(exchange, second, ""))
    headers: dict[str, Any] = {"list": [1], "table": {"a": 1}}
    assert peer.send(Message(exchange, "k", b"x", headers=headers)) is None
    headers["list"].append(2)
    headers["more"] = 3
    (one,) = peer.consume(first).wait(1)
    assert one.headers == {"list": [1], "table": {"a": 1}}
    one.properties.headers["table"]["a"] = 2
    (other,) = peer.consume(second).wait(1)
    assert other.headers == {"list": [1], "table": {"a": 1}}


def test_large_body_arrives_whole(peer: Peer, queue: str) -> None:
    """Of several megabytes, which is many frames."""
    body = bytes(range(256)) * 2**14
    peer.publish("", queue, body)
    (delivery,) = peer.consume(queue).wait(1)
    assert delivery.body == body


def test_withdrawn_publication_is_not_told_about(peer: Peer, queue: str) -> None:
    """Either it was done already, or `on_done` is never called."""
    told: list[Publication] = []
    given_up: list[Publication] = []
    publications = [Publication(Message("", queue, b"%d" % n), told.append) for n in range(50)]
    for publication in publications:
        peer.publishing.submit(publication)
        if peer.publishing.withdraw(publication):
            given_up.append(publication)
    peer.publish("", queue, b"last")  # behind all of them
    assert all(each.done for each in publications)
    assert {*map(id, told)} | {*map(id, given_up)} == {*map(id, publications)}
    assert len(told) + len(given_up) == len(publications)
    stored = {*peer.take_all(queue)}
    assert b"last" in stored
    # What was surely not sent is not there; what was confirmed is.
    assert {each.message.body for each in told} <= stored
    assert not {each.message.body for each in given_up if not each.sent} & stored


def test_done_publication_cannot_be_withdrawn(peer: Peer, queue: str) -> None:
    """It says so, and stays what it was."""
    (publication,) = peer.submit(Message("", queue, b""))
    wait_until(lambda: publication.done)
    assert peer.publishing.withdraw(publication) is False
    assert publication.error is None


def test_closing_waits_for_what_is_under_way(peer: Peer, queue: str) -> None:
    """Nothing is cut off; afterwards nothing goes, and nobody waits for it."""
    publications = peer.submit(*(Message("", queue, b"%d" % n) for n in range(500)))
    peer.publishing.close(TIMEOUT)
    assert all(each.done for each in publications)
    assert not [each.error for each in publications if each.error]
    peer.wait_for_count(queue, 500)
    late = Publication(Message("", queue, b"late"), lambda _: told.append(1))
    told: list[int] = []
    peer.publishing.submit(late)
    assert told == [1]
    assert late.done
    assert isinstance(late.error, BrokerUnavailable)
    assert not late.sent
    peer.publishing.close(TIMEOUT)


def test_any_thread_may_publish(peer: Peer, queue: str) -> None:
    """At the same time, on one connection; each thread's messages keep their order."""

    def publish(number: int) -> None:
        peer.publish("", queue, *(b"%d %d" % (number, n) for n in range(50)))

    threads = [threading.Thread(target=publish, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    browser = peer.browse(queue)
    stored = [delivery.body.split() for delivery in walk(browser)]
    for number in range(8):
        assert [int(n) for who, n in stored if int(who) == number] == list(range(50))


def test_connections_are_apart(peer: Peer, queue: str) -> None:
    """Closing one to consume on does nothing to publishing, nor the other way round."""
    another = peer.another_connection()
    another.close(TIMEOUT)
    peer.publish("", queue, b"one")
    peer.publishing.close(TIMEOUT)
    assert peer.take_all(queue) == [b"one"]
