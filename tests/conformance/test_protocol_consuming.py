"""The broker protocol: consuming, settling, and browsing."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support import Names, wait_until

from conformance.peer import TIMEOUT, Peer, bodies, walk
from domain_events import BrokerUnavailable, TopologyError
from domain_events.message import Message
from domain_events.topology import (
    Binding,
    Exchange,
    Queue,
    Topology,
    dead_letter_queue,
    subscriber_queue,
    temporary_queue,
)


def durable(name: str) -> Queue:
    return subscriber_queue(name)


def temporary(name: str) -> Queue:
    return temporary_queue(name, exclusive=False, auto_delete=False)


@pytest.fixture(params=[durable, temporary, dead_letter_queue], ids=lambda kind: kind.__name__)
def queue(request: pytest.FixtureRequest, peer: Peer, names: Names) -> str:
    """A queue of each kind that the library declares; tests are the same for all."""
    declaration: Queue = request.param(names.queue())
    peer.declare(declaration)
    return declaration.name


# ------------------------------------------------------------------ consuming


def test_deliveries_come_in_the_order_of_publishing(peer: Peer, queue: str) -> None:
    """What was there before, and what comes while it consumes."""
    peer.publish("", queue, b"1", b"2")
    inbox = peer.consume(queue)
    inbox.wait(2)
    peer.publish("", queue, b"3", b"4")
    assert bodies(inbox.wait(4)) == [b"1", b"2", b"3", b"4"]
    assert [delivery.redelivered for delivery in inbox.deliveries] == [False] * 4
    assert all(inbox.consumer.is_current(delivery) for delivery in inbox.deliveries)
    assert peer.consuming.failure() is None


def test_no_more_is_held_than_the_prefetch_count(peer: Peer, queue: str) -> None:
    """What is held is not counted as ready; each ack makes room for one."""
    peer.publish("", queue, *(b"%d" % n for n in range(6)))
    inbox = peer.consume(queue, prefetch=2)
    inbox.wait(2)
    peer.wait_for_count(queue, 4)
    assert inbox.bodies() == [b"0", b"1"]
    inbox.settle(inbox.deliveries[1])
    inbox.wait(3)
    peer.wait_for_count(queue, 3)
    inbox.settle(inbox.deliveries[0], inbox.deliveries[2])
    assert bodies(inbox.wait(5)) == [b"0", b"1", b"2", b"3", b"4"]
    peer.wait_for_count(queue, 1)


def test_acked_is_gone_for_good(peer: Peer, queue: str) -> None:
    """Whether it was flushed, or the connection closed in order."""
    peer.publish("", queue, b"1", b"2", b"3")
    connection = peer.another_connection()
    inbox = peer.consume(queue, connection=connection)
    first, second, _ = inbox.wait(3)
    inbox.consumer.settle(first)
    inbox.consumer.flush()
    inbox.consumer.settle(second)
    inbox.consumer.flush()
    connection.close(TIMEOUT)
    wait_until(lambda: peer.count(queue) == 1)
    assert peer.take_all(queue) == [b"3"]


def test_broker_is_told_of_an_ack_that_nobody_flushes(peer: Peer, queue: str) -> None:
    """The next handler may take an hour; what was acked before it is not held back for it."""
    peer.publish("", queue, b"1", b"2", b"3", b"4")
    inbox = peer.consume(queue, prefetch=2)
    first, _ = inbox.wait(2)
    inbox.consumer.settle(first)
    third = inbox.wait(3)[2]  # there is room only when the broker knows
    inbox.consumer.settle(third)
    assert inbox.wait(4)[3].body == b"4"


def test_unsettled_returns_in_its_order_when_the_connection_ends(peer: Peer, queue: str) -> None:
    """In front of what was not delivered, marked as a redelivery, with the same properties."""
    peer.publish("", queue, *(b"%d" % n for n in range(6)))
    connection = peer.another_connection()
    inbox = peer.consume(queue, prefetch=4, connection=connection)
    held = inbox.wait(4)
    inbox.settle(held[1])
    inbox.wait(5)
    connection.close(TIMEOUT)
    assert not inbox.consumer.is_current(held[0])
    wait_until(lambda: peer.count(queue) == 5)
    again = peer.consume(queue).wait(5)
    assert bodies(again) == [b"0", b"2", b"3", b"4", b"5"]
    assert [delivery.redelivered for delivery in again] == [True, True, True, True, False]


def test_what_is_settled_after_the_connection_ended_is_passed_over(peer: Peer, queue: str) -> None:
    """Its tag died with the connection: the message is in the queue again."""
    peer.publish("", queue, b"1")
    connection = peer.another_connection()
    inbox = peer.consume(queue, connection=connection)
    (delivery,) = inbox.wait(1)
    connection.close(TIMEOUT)
    inbox.settle(delivery)
    inbox.settle(delivery, requeue=True)
    inbox.consumer.repair(0, lambda _exists: None)
    inbox.consumer.stop(TIMEOUT)
    peer.wait_for_count(queue, 1)


def test_given_back_comes_again_at_once(peer: Peer, queue: str) -> None:
    """Before what is behind it, as a redelivery."""
    peer.publish("", queue, b"1", b"2", b"3")
    inbox = peer.consume(queue, prefetch=1)
    inbox.settle(*inbox.wait(1), requeue=True)
    inbox.wait(2)
    inbox.settle(inbox.deliveries[1])
    inbox.wait(3)
    inbox.settle(inbox.deliveries[2])
    inbox.wait(4)
    seen = [(delivery.body, delivery.redelivered) for delivery in inbox.deliveries]
    assert seen == [(b"1", False), (b"1", True), (b"2", False), (b"3", False)]


def test_given_back_may_go_to_another_consumer(peer: Peer, queue: str) -> None:
    """One that has room, when the first has none, or is stopped."""
    peer.publish("", queue, b"1", b"2")
    first = peer.consume(queue)
    held = first.wait(2)
    first.consumer.stop(TIMEOUT)
    second = peer.consume(queue, connection=peer.another_connection())
    first.settle(held[0], requeue=True)
    (delivery,) = second.wait(1)
    assert (delivery.body, delivery.redelivered) == (b"1", True)


def test_stopped_consumer_takes_no_more_and_settles_what_it_has(peer: Peer, queue: str) -> None:
    """What comes after the stop stays ready in the queue."""
    peer.publish("", queue, b"1", b"2")
    inbox = peer.consume(queue)
    first, second = inbox.wait(2)
    inbox.consumer.stop(TIMEOUT)
    peer.publish("", queue, b"3")
    assert inbox.consumer.is_current(first)
    inbox.settle(first)
    inbox.settle(second, requeue=True)
    peer.wait_for_count(queue, 2)
    assert inbox.bodies() == [b"1", b"2"]
    peer.consuming.close(TIMEOUT)
    peer.consuming = peer.another_connection()
    assert peer.take_all(queue) == [b"2", b"3"]


def test_stopping_twice_takes_no_time(peer: Peer, queue: str) -> None:
    """There is nothing to wait for the second time, nor where the queue is gone."""
    stopped, gone = peer.consume(queue), peer.consume(queue)
    peer.publish("", queue, b"1")
    wait_until(lambda: stopped.deliveries or gone.deliveries)
    begun = time.monotonic()
    stopped.consumer.stop(TIMEOUT)
    stopped.consumer.stop(TIMEOUT)
    peer.delete(Queue(queue))
    gone.consumer.stop(TIMEOUT)
    assert time.monotonic() - begun < TIMEOUT / 2


def test_consumers_share_what_comes(peer: Peer, queue: str) -> None:
    """Each message goes to one; both have work, and neither holds more than it may."""
    first = peer.consume(queue, prefetch=2)
    second = peer.consume(queue, prefetch=2, connection=peer.another_connection())
    peer.publish("", queue, *(b"%d" % n for n in range(5)))
    first.wait(2)
    second.wait(2)
    peer.wait_for_count(queue, 1)
    assert sorted(first.bodies() + second.bodies()) == [b"0", b"1", b"2", b"3"]


def test_repair_declares_again_and_calls_back_later(peer: Peer, names: Names) -> None:
    """Declared again at once, called back after the pause: here, to give it back."""
    exchange, name = names.exchange(), names.queue()
    topology: Topology = [
        Exchange(exchange),
        dead_letter_queue(name),
        subscriber_queue(name),
        Binding(exchange, name, "#"),
    ]
    inbox = peer.consume(name, prefetch=1, topology=topology)
    wait_until(lambda: peer.exists(name))
    peer.publish("", name, b"1", b"2")
    (delivery,) = inbox.wait(1)
    peer.delete(dead_letter_queue(name))
    begun = time.monotonic()
    inbox.consumer.repair(0.4, lambda _exists: inbox.settle(delivery, requeue=True))
    wait_until(lambda: peer.exists(f"{name}-dl"))
    again = inbox.wait(2)[1]
    assert 0.4 <= time.monotonic() - begun < 3
    assert (again.body, again.redelivered) == (b"1", True)


def test_consumer_declares_what_it_needs_and_does_so_again(peer: Peer, names: Names) -> None:
    """When it starts, and when its queue was deleted under it."""
    exchange, name = names.exchange(), names.queue()
    topology: Topology = [
        Exchange(exchange),
        subscriber_queue(name),
        Binding(exchange, name, "a.*"),
    ]
    inbox = peer.consume(name, topology=topology)
    # It declares one thing after the other: the binding last.
    wait_until(lambda: not _is_unroutable(peer, exchange, "a.b", b"1"))
    (first,) = inbox.wait(1)
    peer.delete(subscriber_queue(name))
    wait_until(lambda: not _is_unroutable(peer, exchange, "a.b", b"2"))
    assert inbox.wait(2)[1].body == b"2"
    inbox.settle(first)  # of the queue that is gone: passed over
    inbox.settle(*inbox.deliveries[1:])
    peer.wait_for_count(name, 0)


def test_consumer_that_is_turned_away_asks_again(
    peer: Peer, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    """A queue stands against it for a while: it says so, and consumes when that has gone."""
    name = names.queue()
    peer.declare(Queue(name))
    inbox = peer.consume(name, topology=[subscriber_queue(name)])
    wait_until(lambda: "cannot consume" in caplog.text)
    peer.delete(Queue(name))
    wait_until(lambda: peer.exists(name))
    peer.publish("", name, b"1")
    assert bodies(inbox.wait(1)) == [b"1"]


def test_closed_connection_says_so(peer: Peer, names: Names) -> None:
    """Nobody waits for what cannot come; closing again is no error."""
    name = names.queue()
    connection = peer.another_connection()
    connection.declare([Queue(name)], TIMEOUT)
    browser = connection.browse(name, TIMEOUT)
    connection.close(TIMEOUT)
    connection.close(TIMEOUT)
    with pytest.raises(BrokerUnavailable, match="closed"):
        connection.declare([Queue(name)], TIMEOUT)
    with pytest.raises(BrokerUnavailable, match="closed"):
        connection.count(name, TIMEOUT)
    with pytest.raises(BrokerUnavailable, match="closed"):
        connection.delete([Queue(name)], TIMEOUT)
    with pytest.raises(BrokerUnavailable, match="closed"):
        connection.browse(name, TIMEOUT)
    with pytest.raises(BrokerUnavailable, match="closed"):
        browser.next(TIMEOUT)


def test_topic_subscriber_that_is_slow_holds_nobody_up(peer: Peer, names: Names) -> None:
    """Each queue has a copy of its own; one that is full of unsettled messages is no other's."""
    exchange, slow, quick = names.exchange(), names.queue("slow"), names.queue("quick")
    peer.declare(Exchange(exchange), durable(slow), durable(quick))
    peer.declare(Binding(exchange, slow, "#"), Binding(exchange, quick, "#"))
    held = peer.consume(slow, prefetch=1)
    inbox = peer.consume(quick, prefetch=1)
    peer.publish(exchange, "a", b"1", b"2", b"3")
    for number in range(1, 4):
        inbox.settle(inbox.wait(number)[-1])
    assert held.bodies() == [b"1"]
    peer.wait_for_count(slow, 2)


# ------------------------------------------------------------------ browsing


def test_browser_shows_everything_once_in_order(peer: Peer, queue: str) -> None:
    """With how many there are behind each; what it has seen is not ready for others."""
    peer.publish("", queue, b"1", b"2", b"3")
    peer.wait_for_count(queue, 3)
    browser = peer.browse(queue)
    seen = walk(browser)
    assert bodies(seen) == [b"1", b"2", b"3"]
    assert [delivery.message_count for delivery in seen] == [2, 1, 0]
    assert [delivery.redelivered for delivery in seen] == [False] * 3
    assert [delivery.routing_key for delivery in seen] == [queue] * 3
    assert browser.next(TIMEOUT) is None
    assert peer.count(queue) == 0
    peer.publish("", queue, b"4")
    assert bodies(walk(browser)) == [b"4"]
    browser.close(TIMEOUT)
    peer.wait_for_count(queue, 4)


def test_rewound_browser_shows_it_all_again(peer: Peer, queue: str) -> None:
    """In the old order, also after a walk that was broken off."""
    peer.publish("", queue, b"1", b"2", b"3", b"4")
    browser = peer.browse(queue)
    for _ in range(2):
        browser.next(TIMEOUT)
    for _ in range(3):
        browser.rewind()
        again = walk(browser)
        assert bodies(again) == [b"1", b"2", b"3", b"4"]
    assert [delivery.redelivered for delivery in again] == [True] * 4


@pytest.mark.parametrize("kind", [durable, temporary])
def test_order_of_what_is_given_back_is_kept(
    kind: Callable[[str], Queue], peer: Peer, names: Names
) -> None:
    """After whole walks and such as were broken off, over more than a quorum queue sorts itself."""
    queue = kind(names.queue()).name
    peer.declare(kind(queue))
    sent = [b"%d" % number for number in range(100)]
    peer.publish("", queue, *sent)
    browser = peer.browse(queue)
    for most in (100, 70, 1, 40, 100):
        for number in range(most):
            delivery = browser.next(TIMEOUT)
            assert delivery is not None
            assert delivery.body == sent[number]
        browser.rewind()
    assert bodies(walk(browser)) == sent


def test_browser_takes_out_what_it_acks_and_nothing_else(peer: Peer, queue: str) -> None:
    """Also after a rewind, and when it is closed."""
    peer.publish("", queue, b"1", b"2", b"3", b"4")
    browser = peer.browse(queue)
    seen = walk(browser)
    browser.ack(seen[1], TIMEOUT)
    browser.rewind()
    seen = walk(browser)
    assert bodies(seen) == [b"1", b"3", b"4"]
    browser.ack(seen[0], TIMEOUT)
    browser.close(TIMEOUT)
    peer.wait_for_count(queue, 2)
    assert peer.take_all(queue) == [b"3", b"4"]


def test_browser_of_a_closed_connection_gives_everything_back(peer: Peer, queue: str) -> None:
    """As of one that was lost."""
    peer.publish("", queue, b"1", b"2")
    connection = peer.another_connection()
    browser = connection.browse(queue, TIMEOUT)
    assert browser.next(TIMEOUT) is not None
    connection.close(TIMEOUT)
    peer.wait_for_count(queue, 2)
    assert peer.take_all(queue) == [b"1", b"2"]


def test_two_browsers_see_different_messages(peer: Peer, queue: str) -> None:
    """What one holds the other does not see; what is given back it does."""
    peer.publish("", queue, b"1", b"2")
    one = peer.browse(queue)
    other = peer.another_connection().browse(queue, TIMEOUT)
    first = one.next(TIMEOUT)
    second = other.next(TIMEOUT)
    assert (first and first.body, second and second.body) == (b"1", b"2")
    assert other.next(TIMEOUT) is None
    one.close(TIMEOUT)
    peer.wait_for_count(queue, 1)
    assert bodies(walk(other)) == [b"1"]


def test_browsing_a_queue_that_is_missing_is_a_topology_error(peer: Peer, names: Names) -> None:
    """At the latest with the first message asked for."""
    name = names.queue()
    with pytest.raises(TopologyError, match=name):
        peer.browse(name).next(TIMEOUT)


def _is_unroutable(peer: Peer, exchange: str, routing_key: str, body: bytes) -> bool:
    return peer.send(Message(exchange, routing_key, body, mandatory=True)) is not None
