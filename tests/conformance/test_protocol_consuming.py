"""The broker protocol: consuming, settling, and browsing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import onlooker
import pytest
from support import Names, wait_until

from conformance.peer import TIMEOUT, Inbox, Kind, Peer, bodies, walk
from domain_events import BrokerUnavailable, TopologyError
from domain_events.broker import Browser, Exchange, Queue
from domain_events.message import (
    Delivery,
    Destination,
    Later,
    Place,
    ToDeadLetters,
    ToExchange,
    ToSubscriber,
    UndeliveredOf,
)

#: The kinds of queues that more than one connection may consume, and that stay meanwhile.
KINDS: dict[str, Kind] = {
    "durable": {},
    "temporary": {"durable": False},
    "classic": {"classic": True},
}


@pytest.fixture(params=KINDS)
def queue(request: pytest.FixtureRequest, peer: Peer, names: Names) -> Queue:
    """A queue of each kind, for all events of an exchange; tests are the same for all."""
    queue = Queue(names.queue(), Exchange(names.exchange()), ("#",), **KINDS[request.param])
    peer.declare(queue)
    return queue


@pytest.fixture
def durable(peer: Peer, names: Names) -> Queue:
    """A queue that counts failures and has dead letters."""
    queue = Queue(names.queue(), Exchange(names.exchange()), ("#",), dead_letters=True)
    peer.declare(queue)
    return queue


def to(queue: Queue) -> ToSubscriber:
    return ToSubscriber(queue.name)


# ------------------------------------------------------------------ consuming


def test_deliveries_come_in_the_order_of_publishing(peer: Peer, queue: Queue) -> None:
    """What was there before, and what comes while it consumes."""
    peer.publish(to(queue), b"1", b"2")
    inbox = peer.consume(queue)
    inbox.wait(2)
    peer.publish(to(queue), b"3", b"4")
    assert bodies(inbox.wait(4)) == [b"1", b"2", b"3", b"4"]
    assert [delivery.redelivered for delivery in inbox.deliveries] == [False] * 4
    assert all(inbox.consumer.is_current(delivery) for delivery in inbox.deliveries)
    assert peer.consuming.failure() is None


def test_no_more_is_held_than_the_prefetch_count(peer: Peer, queue: Queue) -> None:
    """What is held is not counted as ready; each ack makes room for one."""
    peer.publish(to(queue), *(b"%d" % n for n in range(6)))
    inbox = peer.consume(queue, prefetch_count=2)
    inbox.wait(2)
    peer.wait_for_count(queue.name, 4)
    assert inbox.bodies() == [b"0", b"1"]
    inbox.settle(inbox.deliveries[1])
    inbox.wait(3)
    peer.wait_for_count(queue.name, 3)
    inbox.settle(inbox.deliveries[0], inbox.deliveries[2])
    assert bodies(inbox.wait(5)) == [b"0", b"1", b"2", b"3", b"4"]
    peer.wait_for_count(queue.name, 1)


def test_acked_is_gone_for_good(peer: Peer, queue: Queue) -> None:
    """Whether it was flushed, or the connection closed in order."""
    peer.publish(to(queue), b"1", b"2", b"3")
    connection = peer.another_connection()
    inbox = peer.consume(queue, connection=connection)
    first, second, _ = inbox.wait(3)
    inbox.consumer.settle(first)
    inbox.consumer.flush()
    inbox.consumer.settle(second)
    inbox.consumer.flush()
    connection.close(TIMEOUT)
    wait_until(lambda: peer.count(queue.name) == 1)
    assert peer.take_all(queue.name) == [b"3"]


def test_ack_that_nobody_flushes_is_sent_soon(peer: Peer, queue: Queue) -> None:
    """The next handler may take an hour; what was acked before it is not held back for it."""
    peer.publish(to(queue), b"1", b"2", b"3", b"4")
    inbox = peer.consume(queue, prefetch_count=2)
    first, _ = inbox.wait(2)
    inbox.consumer.settle(first)
    third = inbox.wait(3)[2]  # there is room only when the broker knows
    inbox.consumer.settle(third)
    assert inbox.wait(4)[3].body == b"4"


def test_unsettled_returns_in_its_order_when_the_connection_ends(peer: Peer, queue: Queue) -> None:
    """In front of what was not delivered, marked as a redelivery, with the same properties."""
    peer.publish(to(queue), *(b"%d" % n for n in range(7)))
    connection = peer.another_connection()
    inbox = peer.consume(queue, prefetch_count=4, connection=connection)
    # With care: the first delivery alone. Held until the others have come, it would return behind.
    inbox.settle(*inbox.wait(1)[:1])
    held = inbox.wait(5)[1:]
    inbox.settle(held[1])
    inbox.wait(6)
    connection.close(TIMEOUT)
    assert not inbox.consumer.is_current(held[0])
    peer.wait_for_count(queue.name, 5)
    # What a consumer held that died is taken one at a time.
    again = one_by_one(peer.consume(queue), 5)
    assert bodies(again) == [b"1", b"3", b"4", b"5", b"6"]
    assert [delivery.redelivered for delivery in again] == [True, True, True, True, False]


def test_what_is_settled_after_the_connection_ended_is_passed_over(
    peer: Peer, queue: Queue
) -> None:
    """Its tag died with the connection: the message is in the queue again."""
    peer.publish(to(queue), b"1")
    connection = peer.another_connection()
    inbox = peer.consume(queue, connection=connection)
    (delivery,) = inbox.wait(1)
    connection.close(TIMEOUT)
    inbox.settle(delivery)
    inbox.give_back(delivery)
    inbox.consumer.repair(0, lambda _exists: None)
    inbox.consumer.stop(TIMEOUT)
    peer.wait_for_count(queue.name, 1)


def test_given_back_comes_again_at_once(peer: Peer, queue: Queue) -> None:
    """Before what is behind it, as a redelivery."""
    peer.publish(to(queue), b"1", b"2", b"3")
    inbox = peer.consume(queue, prefetch_count=1)
    inbox.give_back(*inbox.wait(1))
    inbox.wait(2)
    inbox.settle(inbox.deliveries[1])
    inbox.wait(3)
    inbox.settle(inbox.deliveries[2])
    inbox.wait(4)
    seen = [(delivery.body, delivery.redelivered) for delivery in inbox.deliveries]
    assert seen == [(b"1", False), (b"1", True), (b"2", False), (b"3", False)]


def test_given_back_may_go_to_another_consumer(peer: Peer, queue: Queue) -> None:
    """One that has room, when the first has none, or is stopped."""
    peer.publish(to(queue), b"1", b"2")
    first = peer.consume(queue)
    held = first.wait(2)
    first.consumer.stop(TIMEOUT)
    second = peer.consume(queue, connection=peer.another_connection())
    first.give_back(held[0])
    (delivery,) = second.wait(1)
    assert (delivery.body, delivery.redelivered) == (b"1", True)


def test_stopped_consumer_takes_no_more_and_settles_what_it_has(peer: Peer, queue: Queue) -> None:
    """What comes after the stop stays ready in the queue."""
    peer.publish(to(queue), b"1", b"2")
    inbox = peer.consume(queue)
    first, second = inbox.wait(2)
    inbox.consumer.stop(TIMEOUT)
    peer.publish(to(queue), b"3")
    assert inbox.consumer.is_current(first)
    inbox.settle(first)
    inbox.give_back(second)
    peer.wait_for_count(queue.name, 2)
    assert inbox.bodies() == [b"1", b"2"]
    peer.consuming.close(TIMEOUT)
    peer.consuming = peer.another_connection()
    assert peer.take_all(queue.name) == [b"2", b"3"]


def test_stopping_twice_takes_no_time(peer: Peer, queue: Queue) -> None:
    """There is nothing to wait for the second time, nor where the queue is gone."""
    stopped, gone = peer.consume(queue), peer.consume(queue)
    peer.publish(to(queue), b"1")
    wait_until(lambda: stopped.deliveries or gone.deliveries)
    begun = time.monotonic()
    stopped.consumer.stop(TIMEOUT)
    stopped.consumer.stop(TIMEOUT)
    peer.delete(queue.name)
    gone.consumer.stop(TIMEOUT)
    assert time.monotonic() - begun < TIMEOUT / 2


def test_consumers_share_what_comes(peer: Peer, queue: Queue) -> None:
    """Each message goes to one; both have work, and neither holds more than it may."""
    first = peer.consume(queue, prefetch_count=2)
    second = peer.consume(queue, prefetch_count=2, connection=peer.another_connection())
    peer.publish(to(queue), *(b"%d" % n for n in range(5)))
    first.wait(2)
    second.wait(2)
    peer.wait_for_count(queue.name, 1)
    assert sorted(first.bodies() + second.bodies()) == [b"0", b"1", b"2", b"3"]


def test_repair_declares_again_and_calls_back_later(
    broker_url: str, peer: Peer, durable: Queue
) -> None:
    """Declared again at once, called back after the pause: here, to give it back."""
    inbox = peer.consume(durable, prefetch_count=1)
    peer.publish(to(durable), b"1", b"2")
    (delivery,) = inbox.wait(1)
    dead_letters = ToDeadLetters(durable.name)
    onlooker.delete(broker_url, queues=[f"{durable.name}-dl"])
    assert not peer.exists(dead_letters)
    begun = time.monotonic()
    calls: list[bool] = []

    def then(exists: bool) -> None:
        calls.append(exists)
        inbox.give_back(delivery)

    inbox.consumer.repair(0.4, then)
    wait_until(lambda: peer.exists(dead_letters))
    again = inbox.wait(2)[1]
    assert 0.4 <= time.monotonic() - begun < 3
    assert (again.body, again.redelivered) == (b"1", True)
    assert calls == [True]


def test_repair_with_delays_makes_it_possible_to_delay(peer: Peer, durable: Queue) -> None:
    """For a subscriber that does not retry, but has an event to hand back."""
    inbox = peer.consume(durable)
    later = Later(durable.exchange.name, durable.name, 0.1)
    assert peer.is_unroutable(later)
    calls: list[bool] = []
    inbox.consumer.repair(0, calls.append, delays=True)
    wait_until(lambda: calls)
    assert calls == [True]
    peer.publish(later, b"late", mandatory=True)
    assert bodies(inbox.wait(1)) == [b"late"]


def test_repair_that_fails_says_so(broker_url: str, peer: Peer, durable: Queue) -> None:
    """An exchange of another type stands in its way; what can be consumed is."""
    exchange = durable.exchange.name
    inbox = peer.consume(durable)
    peer.publish(to(durable), b"1")
    inbox.wait(1)
    onlooker.delete(broker_url, exchanges=[exchange])
    onlooker.declare_exchange(broker_url, exchange, "fanout")
    calls: list[bool] = []
    inbox.consumer.repair(0, calls.append)
    wait_until(lambda: calls)
    assert calls == [False]
    peer.publish(to(durable), b"2")
    assert bodies(inbox.wait(2)) == [b"1", b"2"]


def test_consumer_declares_what_it_needs_and_does_so_again(
    broker_url: str, peer: Peer, names: Names
) -> None:
    """When it starts, and when its queue was deleted under it."""
    queue = Queue(names.queue(), Exchange(names.exchange()), ("a.*",))
    exchange = ToExchange(queue.exchange.name)
    inbox = peer.consume(queue)
    # It declares one thing after the other: the binding last.
    wait_until(lambda: not peer.is_unroutable(exchange, body=b"1"))
    (first,) = inbox.wait(1)
    onlooker.delete(broker_url, queues=[queue.name])
    wait_until(lambda: not peer.is_unroutable(exchange, body=b"2"))
    wait_until(lambda: b"2" in inbox.bodies())
    assert not inbox.consumer.is_current(first)
    inbox.settle(first)  # of the queue that is gone: passed over
    inbox.settle(*inbox.deliveries[1:])
    peer.wait_for_count(queue.name, 0)


def test_consumer_that_is_turned_away_tries_again(
    broker_url: str, peer: Peer, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    """A queue of another kind stands in its way for a while: it logs that, and then consumes."""
    queue = Queue(names.queue(), Exchange(names.exchange()))
    peer.declare(Queue(queue.name, queue.exchange, durable=False))
    inbox = peer.consume(queue)
    wait_until(lambda: "cannot consume" in caplog.text)
    assert queue.name in caplog.text
    onlooker.delete(broker_url, queues=[queue.name])
    wait_until(lambda: peer.exists(queue.name))
    peer.publish(to(queue), b"1")
    assert bodies(inbox.wait(1)) == [b"1"]


def test_closed_connection_says_so(peer: Peer, names: Names) -> None:
    """Nobody waits for what cannot come; closing again is not an error."""
    queue = Queue(names.queue(), Exchange(names.exchange()))
    connection = peer.another_connection()
    connection.declare(queue, TIMEOUT)
    browser = peer.browse(queue.name, connection)
    connection.close(TIMEOUT)
    connection.close(TIMEOUT)
    with pytest.raises(BrokerUnavailable, match="closed"):
        connection.declare(queue, TIMEOUT)
    with pytest.raises(BrokerUnavailable, match="closed"):
        connection.count(to(queue), TIMEOUT)
    with pytest.raises(BrokerUnavailable, match="closed"):
        connection.delete([queue.name], "none", TIMEOUT)
    with pytest.raises(BrokerUnavailable, match="closed"):
        peer.browse(queue.name, connection)
    with pytest.raises(BrokerUnavailable, match="closed"):
        browser.next(TIMEOUT)


def test_subscriber_that_is_slow_holds_nobody_up(peer: Peer, names: Names) -> None:
    """Each queue has a copy of its own; one that is full of unsettled messages is no other's."""
    exchange = Exchange(names.exchange())
    slow, quick = (Queue(names.queue(label), exchange, ("#",)) for label in ("slow", "quick"))
    peer.declare(slow, quick)
    held = peer.consume(slow, prefetch_count=1)
    inbox = peer.consume(quick, prefetch_count=1)
    peer.publish(ToExchange(exchange.name), b"1", b"2", b"3")
    for number in range(1, 4):
        inbox.settle(inbox.wait(number)[-1])
    held.wait(1)
    peer.wait_for_count(slow.name, 2)
    assert held.bodies() == [b"1"]


# ------------------------------------------------------------------ failures


def test_failed_delivery_comes_again_and_is_counted(peer: Peer, durable: Queue) -> None:
    """Each time, by the queue; what is behind it is not."""
    peer.publish(to(durable), b"1", b"2")
    inbox = peer.consume(durable, prefetch_count=1)
    for number in range(1, 4):
        inbox.fail(inbox.wait(number)[-1])
    inbox.settle(inbox.wait(4)[-1])
    inbox.wait(5)
    assert inbox.bodies() == [b"1"] * 4 + [b"2"]
    assert [delivery.failures for delivery in inbox.deliveries] == [0, 1, 2, 3, 0]
    assert [delivery.redelivered for delivery in inbox.deliveries] == [False] + [True] * 3 + [False]


@pytest.mark.parametrize("kind", ["temporary", "classic"])
def test_failures_of_other_queues_are_not_counted(kind: str, peer: Peer, names: Names) -> None:
    """The delivery comes again, as long as somebody takes it."""
    queue = Queue(names.queue(), Exchange(names.exchange()), **KINDS[kind])
    peer.declare(queue)
    peer.publish(to(queue), b"1")
    inbox = peer.consume(queue, prefetch_count=1)
    for number in range(1, 4):
        inbox.fail(inbox.wait(number)[-1])
    assert [delivery.failures for delivery in inbox.wait(4)] == [0] * 4


def test_given_back_is_a_failure_only_if_the_delivery_says_so(peer: Peer, durable: Queue) -> None:
    """Up to RabbitMQ 4.2 the queue counts it."""
    peer.publish(to(durable), b"1")
    inbox = peer.consume(durable)
    inbox.give_back(*inbox.wait(1))
    again = inbox.wait(2)[1]
    assert again.redelivered
    assert again.failures == int(again.give_back_counts)


def test_lost_connection_is_a_failure_of_all_that_it_held(peer: Peer, durable: Queue) -> None:
    """And of nothing else: whoever holds it when the process dies may have killed it."""
    peer.publish(to(durable), b"1", b"2", b"3")
    connection = peer.another_connection()
    held = peer.consume(durable, prefetch_count=2, connection=connection)
    held.wait(2)
    connection.close(TIMEOUT)
    peer.wait_for_count(durable.name, 3)
    inbox = peer.consume(durable, prefetch_count=1)
    assert [delivery.failures for delivery in one_by_one(inbox, 3)] == [1, 1, 0]


def fail_often(peer: Peer, queue: Queue, body: bytes) -> None:
    """Publish it in front of everything, and have its process die more often than is suspicious."""
    peer.publish(to(queue), body)
    for _ in range(3):
        connection = peer.another_connection()
        (delivery,) = peer.consume(queue, prefetch_count=1, connection=connection).wait(1)
        assert delivery.body == body
        connection.close(TIMEOUT)
        peer.wait_for_count(queue.name, 1)


def test_what_may_have_killed_a_process_is_taken_alone(peer: Peer, durable: Queue) -> None:
    """One at a time, until one comes that was never delivered before; then as many as it may."""
    fail_often(peer, durable, b"suspect")
    peer.publish(to(durable), *(b"%d" % n for n in range(6)))
    peer.wait_for_count(durable.name, 7)
    inbox = peer.consume(durable, prefetch_count=3)
    (suspect,) = inbox.wait(1)
    with pytest.raises(AssertionError):
        # Longer than RabbitMQ takes for another one, and less than a suspect is left alone.
        wait_until(lambda: len(inbox.deliveries) > 1, timeout=0.5)
    assert suspect.body == b"suspect"
    inbox.settle(suspect)
    inbox.wait(4)
    peer.wait_for_count(durable.name, 3)
    assert inbox.bodies() == [b"suspect", b"0", b"1", b"2"]


def test_queue_that_does_not_count_failures_is_consumed_at_once(peer: Peer, names: Names) -> None:
    """There nobody can know who failed how often: whoever starts takes as many as it may."""
    queue = Queue(names.queue(), Exchange(names.exchange()), classic=True)
    peer.declare(queue)
    peer.publish(to(queue), b"1", b"2", b"3", b"4")
    for _ in range(4):
        connection = peer.another_connection()
        inbox = peer.consume(queue, prefetch_count=3, connection=connection)
        assert bodies(inbox.wait(3)) == [b"1", b"2", b"3"]
        connection.close(TIMEOUT)
        peer.wait_for_count(queue.name, 4)


def test_what_failed_a_hundred_times_is_a_dead_letter(peer: Peer, durable: Queue) -> None:
    """So often and once more it is delivered; whatever the policy above does, it ends."""
    peer.publish(ToExchange(durable.exchange.name), b"poison", key="user.x")
    peer.publish(to(durable), b"behind it")
    inbox = peer.consume(durable, prefetch_count=1)
    number = 1
    while inbox.wait(number)[-1].body == b"poison":
        inbox.fail(inbox.deliveries[-1])
        number += 1
        assert number < 200
    assert number - 1 == 101
    peer.wait_for_count(ToDeadLetters(durable.name), 1)
    (dead,) = peer.look(ToDeadLetters(durable.name))
    assert (dead.body, dead.original_routing_key) == (b"poison", "user.x")
    assert dead.failure.error_type == "delivery limit"
    assert peer.count(durable.name) == 0


# ------------------------------------------------------------------ browsing


@dataclass
class Waiting:
    """A place where messages wait, and the way there."""

    peer: Peer
    place: Place
    to: Destination

    def put(self, *bodies: bytes) -> None:
        """Have them wait there; a delayed event takes a moment."""
        before = self.peer.count(self.place)
        self.peer.publish(self.to, *bodies)
        self.peer.wait_for_count(self.place, before + len(bodies))

    def wait_for(self, number: int) -> None:
        self.peer.wait_for_count(self.place, number)


PLACES: dict[str, Callable[[Queue], tuple[Place, Destination]]] = {
    **{kind: lambda queue: (to(queue), to(queue)) for kind in KINDS},
    "dead letters": lambda queue: (ToDeadLetters(queue.name), ToDeadLetters(queue.name)),
    "undelivered": lambda queue: (
        UndeliveredOf(queue.exchange.name),
        Later(queue.exchange.name, f"{queue.name}-gone", 0.1),
    ),
}


@pytest.fixture(params=PLACES)
def waiting(request: pytest.FixtureRequest, peer: Peer, names: Names) -> Waiting:
    """Each place where messages wait; tests are the same for all."""
    options: dict[str, Kind] = {
        **KINDS,
        "dead letters": {"dead_letters": True},
        "undelivered": {"delays": True},
    }
    kind = request.param
    queue = Queue(names.queue(), Exchange(names.exchange()), **options[kind])
    peer.declare(queue)
    return Waiting(peer, *PLACES[kind](queue))


def test_browser_shows_everything_once_in_order(peer: Peer, waiting: Waiting) -> None:
    """With how many there are behind each; what it has seen is not ready for others."""
    waiting.put(b"1", b"2", b"3")
    browser = peer.browse(waiting.place)
    seen = walk(browser)
    assert bodies(seen) == [b"1", b"2", b"3"]
    assert [delivery.message_count for delivery in seen] == [2, 1, 0]
    assert browser.next(TIMEOUT) is None
    assert peer.count(waiting.place) == 0
    waiting.put(b"4")
    assert bodies(walk(browser)) == [b"4"]
    browser.close(TIMEOUT)
    waiting.wait_for(4)


def test_rewound_browser_shows_it_all_again(peer: Peer, waiting: Waiting) -> None:
    """In the old order, also after a walk that was broken off, and however often."""
    waiting.put(b"1", b"2", b"3", b"4")
    browser = peer.browse(waiting.place)
    for _ in range(2):
        browser.next(TIMEOUT)
    for _ in range(10):
        browser.rewind()
        assert bodies(walk(browser)) == [b"1", b"2", b"3", b"4"]


def test_order_of_what_is_given_back_is_kept(peer: Peer, waiting: Waiting) -> None:
    """After whole walks and such as were broken off, over more than a quorum queue sorts itself."""
    sent = [b"%d" % number for number in range(100)]
    waiting.put(*sent)
    browser = peer.browse(waiting.place)
    for most in (100, 70, 1, 40, 100):
        for number in range(most):
            delivery = browser.next(TIMEOUT)
            assert delivery is not None
            assert delivery.body == sent[number]
        browser.rewind()
    assert bodies(walk(browser)) == sent


def test_looking_counts_against_nothing(peer: Peer, waiting: Waiting) -> None:
    """Whoever looks very often, on connections of its own, loses nothing."""
    waiting.put(b"1", b"2")
    for _ in range(30):
        connection = peer.another_connection()
        browser = peer.browse(waiting.place, connection)
        assert bodies(walk(browser)) == [b"1", b"2"]
        connection.close(TIMEOUT)
        waiting.wait_for(2)


def test_browser_takes_out_what_it_acks_and_nothing_else(peer: Peer, waiting: Waiting) -> None:
    """Also after a rewind, and when it is closed."""
    waiting.put(b"1", b"2", b"3", b"4")
    browser = peer.browse(waiting.place)
    seen = walk(browser)
    browser.ack(seen[1], TIMEOUT)
    browser.rewind()
    seen = walk(browser)
    assert bodies(seen) == [b"1", b"3", b"4"]
    browser.ack(seen[0], TIMEOUT)
    browser.close(TIMEOUT)
    waiting.wait_for(2)
    assert peer.take_all(waiting.place) == [b"3", b"4"]


def test_browser_of_a_closed_connection_gives_everything_back(peer: Peer, waiting: Waiting) -> None:
    """As of one that was lost."""
    waiting.put(b"1", b"2")
    connection = peer.another_connection()
    browser = peer.browse(waiting.place, connection)
    assert browser.next(TIMEOUT) is not None
    connection.close(TIMEOUT)
    waiting.wait_for(2)
    assert peer.take_all(waiting.place) == [b"1", b"2"]


def test_two_browsers_see_different_messages(peer: Peer, waiting: Waiting) -> None:
    """What one holds the other does not see; what is given back it does."""
    waiting.put(b"1", b"2")
    one = peer.browse(waiting.place)
    first = one.next(TIMEOUT)
    other = peer.browse(waiting.place, peer.another_connection())
    second = other.next(TIMEOUT)
    assert (first and first.body, second and second.body) == (b"1", b"2")
    assert other.next(TIMEOUT) is None
    one.close(TIMEOUT)
    waiting.wait_for(1)
    assert bodies(walk(other)) == [b"1"]


def test_browsers_know_of_each_other(peer: Peer, waiting: Waiting) -> None:
    """From the other's beginning until its end; a connection does not count its own."""
    waiting.put(b"1")
    connection, other = peer.another_connection(), peer.another_connection()
    assert not connection.is_browsed(waiting.place, TIMEOUT)
    one = peer.browse(waiting.place, connection)
    one.next(TIMEOUT)
    assert not one.shared
    assert not connection.is_browsed(waiting.place, TIMEOUT)
    assert other.is_browsed(waiting.place, TIMEOUT)
    second = peer.browse(waiting.place, other)
    assert second.next(TIMEOUT) is None
    assert second.shared
    one.close(TIMEOUT)
    connection.close(TIMEOUT)
    third = peer.another_connection()
    wait_until(lambda: _begins_alone(second))
    assert third.is_browsed(waiting.place, TIMEOUT)
    second.close(TIMEOUT)
    other.close(TIMEOUT)
    wait_until(lambda: not third.is_browsed(waiting.place, TIMEOUT))


def test_browsing_or_counting_what_is_missing_is_a_topology_error(peer: Peer, names: Names) -> None:
    """It names the queue; at the latest with the first message that is wanted."""
    name, exchange = names.queue(), names.exchange()
    places: list[Place] = [ToSubscriber(name), ToDeadLetters(name), UndeliveredOf(exchange)]
    for place in places:
        with pytest.raises(TopologyError, match=f"{name}|{exchange}"):
            peer.browse(place).next(TIMEOUT)
        with pytest.raises(TopologyError, match=f"{name}|{exchange}"):
            peer.count(place)
        assert not peer.consuming.is_browsed(place, TIMEOUT)


# ------------------------------------------------------------------ inside


def one_by_one(inbox: Inbox, number: int) -> list[Delivery]:
    """So many deliveries, each settled when it comes."""
    for count in range(1, number + 1):
        inbox.settle(inbox.wait(count)[count - 1])
    return inbox.deliveries[:number]


def _begins_alone(browser: Browser) -> bool:
    browser.rewind()
    browser.next(TIMEOUT)
    return not browser.shared
