"""The broker protocol: publishing with confirms."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import datetime, timezone

import pytest
from support import Names, wait_until

from conformance.peer import KEY, TIMEOUT, Peer, bodies, walk
from domain_events import BrokerUnavailable, EventUnroutable, TopologyError
from domain_events import message as messages
from domain_events.broker import Exchange, Publication, Queue, confirm
from domain_events.message import (
    NO_FAILURE,
    Destination,
    Failure,
    Later,
    Message,
    ToDeadLetters,
    ToExchange,
    ToSubscriber,
    UndeliveredOf,
)


@pytest.fixture
def queue(peer: Peer, names: Names) -> Queue:
    """The queue of a subscriber that keeps dead letters, for all events."""
    queue = Queue(names.queue(), Exchange(names.exchange()), ("#",), dead_letters=True)
    peer.declare(queue)
    return queue


@pytest.fixture
def retrying(peer: Peer, queue: Queue) -> Queue:
    """The same, if it may retry; which takes RabbitMQ some time to declare."""
    retrying = replace(queue, delays=True)
    peer.declare(retrying)
    return retrying


@pytest.fixture(params=["exchange", "subscriber"])
def destination(request: pytest.FixtureRequest, queue: Queue) -> Destination:
    """Each way straight into the queue."""
    return ToExchange(queue.exchange.name) if request.param == "exchange" else to(queue)


def to(queue: Queue) -> ToSubscriber:
    return ToSubscriber(queue.name)


def later(queue: Queue, seconds: float) -> Later:
    return Later(queue.exchange.name, queue.name, seconds)


# ------------------------------------------------------------------ confirms


def test_confirmed_publication_is_done_once_and_stored(
    peer: Peer, queue: Queue, destination: Destination
) -> None:
    """`on_done` is called once, when ``done`` is true; by then the queue has the message."""
    done: list[tuple[bool, object]] = []
    publication = Publication(
        Message(destination, KEY, b"one"), lambda each: done.append((each.done, each.error))
    )
    peer.publishing.submit(publication)
    wait_until(lambda: done)
    assert done == [(True, None)]
    assert publication.sent
    assert peer.publishing.trouble == ""
    peer.wait_for_count(queue.name, 1)
    peer.publish(destination, b"two")
    assert len(done) == 1


def test_messages_are_stored_in_the_order_of_their_submission(
    peer: Peer, queue: Queue, destination: Destination
) -> None:
    """Many under way at a time keep their order."""
    sent = [b"%d" % n for n in range(300)]
    publications = peer.submit(*(Message(destination, KEY, body) for body in sent))
    wait_until(lambda: all(each.done for each in publications))
    assert not [each.error for each in publications if each.error]
    inbox = peer.consume(queue, 1000)
    assert bodies(inbox.wait(300)) == sent


def test_message_that_reaches_no_queue_is_an_error_only_if_mandatory(
    peer: Peer, names: Names
) -> None:
    """Wherever it was sent; and the connection works as before."""
    queue = Queue(names.queue(), Exchange(names.exchange()), ("a.*",))
    peer.declare(queue)
    nowhere: list[tuple[Destination, str]] = [
        (ToExchange(queue.exchange.name), "b.c"),
        (ToSubscriber(f"{queue.name}-nobody"), f"{queue.name}-nobody"),
        (ToDeadLetters(queue.name), queue.name),  # it keeps none
    ]
    for where, words in nowhere:
        assert peer.send(Message(where, "b.c", b"")) is None
        error = peer.send(Message(where, "b.c", b"", mandatory=True))
        assert isinstance(error, EventUnroutable)
        assert words in str(error)
    peer.publish(ToExchange(queue.exchange.name), b"found", mandatory=True)
    assert peer.take_all(queue.name) == [b"found"]


def test_confirm_waits_for_one_message_and_raises_its_error(peer: Peer, queue: Queue) -> None:
    """When it returns the queue has the message."""
    confirm(peer.publishing, Message(to(queue), KEY, b"one"), TIMEOUT)
    with pytest.raises(EventUnroutable):
        confirm(
            peer.publishing, Message(ToSubscriber(f"{queue.name}-x"), KEY, b"", mandatory=True), 10
        )
    assert peer.take_all(queue.name) == [b"one"]


def test_exchange_that_is_missing_is_a_topology_error(
    peer: Peer, queue: Queue, names: Names
) -> None:
    """It names the exchange; what is published elsewhere at the same time is stored."""
    missing = names.exchange("missing")
    before, lost, after = peer.submit(
        Message(to(queue), KEY, b"before"),
        Message(ToExchange(missing), KEY, b""),
        Message(to(queue), KEY, b"after"),
    )
    wait_until(lambda: before.done and lost.done and after.done)
    assert (before.error, after.error) == (None, None)
    assert isinstance(lost.error, TopologyError)
    assert missing in str(lost.error)
    # Whichever was under way with the culprit may have been sent again.
    assert {*peer.take_all(queue.name)} == {b"before", b"after"}


def test_exchange_of_a_publisher_is_declared_for_it(broker_url: str, names: Names) -> None:
    """With the connection; if it exists with another type, whoever publishes gets an error."""
    exchange = names.exchange()
    peer = Peer(broker_url, Exchange(exchange, "direct"))
    other = Peer(broker_url, Exchange(exchange, "fanout"))
    try:
        peer.publish(ToExchange(exchange), b"")
        error = other.send(Message(ToExchange(exchange), KEY, b""))
        assert isinstance(error, TopologyError)
        for words in (exchange, "direct", "fanout"):
            assert words in str(error)
        # An answer, not a state: mended outside, it works.
        peer.delete(exchange=exchange)
        other.publish(ToExchange(exchange), b"")
    finally:
        peer.close()
        other.close()


def test_withdrawn_publication_is_never_reported(peer: Peer, queue: Queue) -> None:
    """Either it was done already, or `on_done` is never called."""
    reported: list[Publication] = []
    given_up: list[Publication] = []
    publications = [
        Publication(Message(to(queue), KEY, b"%d" % n), reported.append) for n in range(50)
    ]
    for publication in publications:
        peer.publishing.submit(publication)
        if peer.publishing.withdraw(publication):
            given_up.append(publication)
    peer.publish(to(queue), b"last")  # behind all of them
    assert all(each.done for each in publications)
    assert {*map(id, reported)} | {*map(id, given_up)} == {*map(id, publications)}
    assert len(reported) + len(given_up) == len(publications)
    stored = {*peer.take_all(queue.name)}
    assert b"last" in stored
    # What was surely not sent is not there; what was confirmed is.
    assert {each.message.body for each in reported} <= stored
    assert not {each.message.body for each in given_up if not each.sent} & stored


def test_done_publication_cannot_be_withdrawn(peer: Peer, queue: Queue) -> None:
    """`withdraw` returns False, and the publication stays as it was."""
    (publication,) = peer.submit(Message(to(queue), KEY, b""))
    wait_until(lambda: publication.done)
    assert peer.publishing.withdraw(publication) is False
    assert publication.error is None


def test_closing_waits_for_what_is_under_way(peer: Peer, queue: Queue) -> None:
    """Nothing is cut off; afterwards nothing goes, and nobody waits for it."""
    publications = peer.submit(*(Message(to(queue), KEY, b"%d" % n) for n in range(500)))
    peer.publishing.close(TIMEOUT)
    assert all(each.done for each in publications)
    assert not [each.error for each in publications if each.error]
    peer.wait_for_count(queue.name, 500)
    done: list[int] = []
    late = Publication(Message(to(queue), KEY, b"late"), lambda _: done.append(1))
    peer.publishing.submit(late)
    assert done == [1]
    assert late.done
    assert isinstance(late.error, BrokerUnavailable)
    assert not late.sent
    peer.publishing.close(TIMEOUT)


def test_any_thread_may_publish(peer: Peer, queue: Queue) -> None:
    """At the same time, on one connection; each thread's messages keep their order."""

    def publish(number: int) -> None:
        peer.publish(to(queue), *(b"%d %d" % (number, n) for n in range(50)))

    threads = [threading.Thread(target=publish, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    stored = [delivery.body.split() for delivery in walk(peer.browse(queue.name))]
    for number in range(8):
        assert [int(n) for who, n in stored if int(who) == number] == list(range(50))


def test_connections_are_apart(peer: Peer, queue: Queue) -> None:
    """Closing one to consume on does nothing to publishing, nor the other way round."""
    another = peer.another_connection()
    another.close(TIMEOUT)
    peer.publish(to(queue), b"one")
    peer.publishing.close(TIMEOUT)
    assert peer.take_all(queue.name) == [b"one"]


# ------------------------------------------------------------------ what arrives


def test_event_arrives_as_it_was_sent(peer: Peer, queue: Queue, destination: Destination) -> None:
    """Every field, every byte, and the event's own routing key, wherever it was sent."""
    body = bytes(range(256)) * 3
    message = Message(
        destination,
        "user.ü",
        body,
        message_id="message",
        correlation_id="correlation",
        timestamp=1_700_000_000,
        app_id="program",
        cause="a cause",
    )
    assert peer.send(message) is None
    (delivery,) = peer.consume(queue).wait(1)
    assert delivery.body == body
    assert delivery.original_routing_key == "user.ü"
    assert delivery.redelivered is False
    assert (delivery.message_id, delivery.correlation_id) == ("message", "correlation")
    assert (delivery.timestamp, delivery.app_id) == (1_700_000_000, "program")
    assert delivery.cause == "a cause"
    assert (delivery.retries, delivery.hand_backs, delivery.failures) == (0, 0, 0)
    assert delivery.failure == NO_FAILURE


def test_what_an_event_has_not_is_not_made_up(
    peer: Peer, queue: Queue, destination: Destination
) -> None:
    """None it stays, and an empty body is one."""
    peer.publish(destination, b"")
    (delivery,) = peer.consume(queue).wait(1)
    assert delivery.body == b""
    ids = (delivery.message_id, delivery.correlation_id, delivery.cause)
    assert (*ids, delivery.timestamp, delivery.app_id) == (None,) * 5


def test_each_receiver_has_an_event_of_its_own(peer: Peer, names: Names) -> None:
    """What the sender does to it afterwards, or another receiver, changes nothing."""
    exchange = Exchange(names.exchange())
    first = Queue(names.queue("a"), exchange, ("#",))
    second = Queue(names.queue("b"), exchange, ("#",))
    peer.declare(first, second)
    message = Message(ToExchange(exchange.name), KEY, b"x", "id")
    assert peer.send(message) is None
    message.body, message.message_id, message.retries = b"y", "another", 7
    one = peer.consume(first)
    (delivery,) = one.wait(1)
    handed_back = messages.hand_back(delivery, to(first))
    assert peer.send(handed_back) is None
    one.settle(delivery)
    (other,) = peer.consume(second).wait(1)
    for each in (delivery, other):
        assert (each.body, each.message_id, each.retries, each.hand_backs) == (b"x", "id", 0, 0)


def test_large_body_arrives_whole(peer: Peer, queue: Queue) -> None:
    """Of several megabytes, which is many frames."""
    body = bytes(range(256)) * 2**14
    peer.publish(to(queue), body)
    (delivery,) = peer.consume(queue).wait(1)
    assert delivery.body == body


def test_event_that_is_sent_on_stays_the_same_event(peer: Peer, retrying: Queue) -> None:
    """Retried, handed back, dead, replayed: only the counts and the reasons differ."""
    event = Message(
        ToExchange(retrying.exchange.name),
        "user.x",
        b"body",
        message_id="id",
        correlation_id="c",
        timestamp=7,
        app_id="another",
        cause="a cause",
    )
    assert peer.send(event) is None
    inbox = peer.consume(retrying)
    (first,) = inbox.wait(1)
    assert peer.send(messages.retry(first, later(retrying, 0.1), ValueError("no"))) is None
    retried = inbox.wait(2)[1]
    assert peer.send(messages.hand_back(retried, to(retrying))) is None
    handed_back = inbox.wait(3)[2]
    assert peer.send(messages.dead_letter(handed_back, retrying.name, KeyError("so"))) is None
    peer.wait_for_count(ToDeadLetters(retrying.name), 1)
    (dead,) = peer.look(ToDeadLetters(retrying.name))
    assert peer.send(messages.replay(dead, retrying.name)) is None
    replayed = inbox.wait(4)[3]
    everything = [first, retried, handed_back, dead, replayed]
    for each in everything:
        assert each.body == b"body"
        assert (each.message_id, each.correlation_id, each.app_id) == ("id", "c", "another")
        assert (each.timestamp, each.cause) == (7, "a cause")
        assert each.original_routing_key == each.published_routing_key == "user.x"
    assert [each.retries for each in everything] == [0, 1, 1, 1, 0]
    assert [each.hand_backs for each in everything] == [0, 0, 1, 1, 0]
    assert [each.failure.first_error_message for each in everything] == [None, *["no"] * 3, None]
    assert [each.failure.error_type for each in everything] == [None] * 3 + ["KeyError", None]


def test_dead_letter_keeps_the_whole_reason(peer: Peer, queue: Queue) -> None:
    """Every field of its failure, also long ones and such as are not ASCII."""
    failure = Failure(
        subscriber=queue.name,
        error_type="shop.OutOfPaper",
        error_message="kein Papier für " + "ü" * 500,
        traceback="line\n" * 2000,
        failed_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
        host="a.host",
        first_error_type="builtins.KeyError",
        first_error_message="'first'",
    )
    message = Message(ToDeadLetters(queue.name), "user.x", b"dead", retries=3, failure=failure)
    assert peer.send(message) is None
    (dead,) = peer.look(ToDeadLetters(queue.name))
    assert dead.failure == failure
    assert (dead.retries, dead.original_routing_key) == (3, "user.x")


# ------------------------------------------------------------------ destinations


def test_what_is_for_one_subscriber_reaches_no_other(peer: Peer, names: Names) -> None:
    """Whatever the others have bound, and whatever its routing key is."""
    exchange = Exchange(names.exchange())
    one, other = (
        Queue(names.queue(label), exchange, ("#",), dead_letters=True, delays=True)
        for label in ("one", "other")
    )
    peer.declare(one, other)
    for destination in (to(one), later(one, 0.1), ToDeadLetters(one.name)):
        peer.publish(destination, b"x", key="user.x", mandatory=True)
    peer.wait_for_count(one.name, 2)
    peer.wait_for_count(ToDeadLetters(one.name), 1)
    assert peer.count(other.name) == peer.count(ToDeadLetters(other.name)) == 0
    assert peer.count(UndeliveredOf(exchange.name)) == 0


@pytest.mark.parametrize("delay", [0.1, 0.3, 0.4])
def test_delayed_event_is_back_in_time(peer: Peer, names: Names, delay: float) -> None:
    """Never early; with the event's own routing key, also to a name that has dots in it."""
    exchange = Exchange(names.exchange())
    queue = Queue(names.queue("a.b"), exchange, delays=True)
    peer.declare(queue)
    inbox = peer.consume(queue)
    begun = time.monotonic()
    peer.publish(later(queue, delay), b"late", key="user.x", mandatory=True)
    (delivery,) = inbox.wait(1)
    assert delay <= time.monotonic() - begun < delay + 2
    assert delivery.original_routing_key == "user.x"


def test_delayed_events_are_back_in_the_order_in_which_they_are_due(
    peer: Peer, retrying: Queue
) -> None:
    """Short delays are not held up by long ones; of equal ones, the first comes first."""
    delays = {b"long": 3600.0, b"third": 0.9, b"second": 0.5, b"first": 0.2}
    for body, delay in delays.items():
        peer.publish(later(retrying, delay), body)
    equal = [b"%d" % n for n in range(10)]
    peer.publish(later(retrying, 1.3), *equal)
    inbox = peer.consume(retrying)
    assert bodies(inbox.wait(13)) == [b"first", b"second", b"third", *equal]
    assert peer.count(retrying.name) == 0


def test_longest_delay_is_taken_and_kept(peer: Peer, retrying: Queue) -> None:
    """Of nineteen days; it is neither due nor undelivered at once."""
    peer.publish(later(retrying, 19 * 24 * 3600), b"in nineteen days", mandatory=True)
    peer.publish(later(retrying, 0.3), b"soon")
    assert bodies(peer.consume(retrying).wait(1)) == [b"soon"]
    assert peer.count(retrying.name) == peer.count(UndeliveredOf(retrying.exchange.name)) == 0


def test_delayed_event_outlives_its_publisher(broker_url: str, peer: Peer, retrying: Queue) -> None:
    """The broker has it: neither who published nor who consumed need be there."""
    other = Peer(broker_url)
    other.publish(later(retrying, 0.5), b"late")
    other.close()
    peer.wait_for_count(retrying.name, 1)


def test_event_that_is_due_without_a_queue_is_undelivered(peer: Peer, retrying: Queue) -> None:
    """It is kept, with the name of its subscriber, and does not block what is due behind it."""
    gone = f"{retrying.name}-gone"
    inbox = peer.consume(retrying)
    undelivered = UndeliveredOf(retrying.exchange.name)
    message = Message(
        Later(retrying.exchange.name, gone, 0.1), "user.x", b"lost", message_id="id", retries=2
    )
    assert peer.send(message) is None
    peer.publish(later(retrying, 0.1), b"found")
    assert bodies(inbox.wait(1)) == [b"found"]
    peer.wait_for_count(undelivered, 1)
    (lost,) = peer.look(undelivered)
    assert (lost.body, lost.subscriber, lost.message_id) == (b"lost", gone, "id")
    assert (lost.original_routing_key, lost.retries) == ("user.x", 2)
    assert peer.take_all(undelivered) == [b"lost"]


def test_delaying_where_nothing_can_is_a_topology_error(peer: Peer, names: Names) -> None:
    """As long as no subscriber on the exchange has asked for delays."""
    queue = Queue(names.queue(), Exchange(names.exchange()))
    peer.declare(queue)
    error = peer.send(Message(later(queue, 0.1), KEY, b"", mandatory=True))
    assert isinstance(error, TopologyError)
    assert queue.exchange.name in str(error)
    peer.declare(Queue(queue.name, queue.exchange, delays=True))
    peer.publish(later(queue, 0.1), b"late", mandatory=True)
    assert bodies(peer.consume(queue).wait(1)) == [b"late"]


def test_exchanges_do_not_share_their_delayed_events(peer: Peer, names: Names) -> None:
    """A subscriber of the same name on another exchange, and its undelivered ones, are others."""
    one, other = (
        Queue(names.queue(label), Exchange(names.exchange(label)), ("#",), delays=True)
        for label in ("one", "other")
    )
    peer.declare(one, other)
    peer.publish(Later(one.exchange.name, other.name, 0.1), b"lost")
    peer.publish(later(other, 0.2), b"found")
    assert bodies(peer.consume(other).wait(1)) == [b"found"]
    peer.wait_for_count(UndeliveredOf(one.exchange.name), 1)
    assert peer.count(UndeliveredOf(other.exchange.name)) == 0
