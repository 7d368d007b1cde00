"""The broker protocol: exchanges, queues and bindings, and what queues do by themselves."""

from __future__ import annotations

import time

import pytest
from support import Names, wait_until

from conformance.peer import TIMEOUT, Peer, bodies
from domain_events import TopologyError
from domain_events.message import Message
from domain_events.topology import (
    Binding,
    Exchange,
    Queue,
    dead_letter_queue,
    delay_address,
    delays,
    subscriber_queue,
    temporary_queue,
    way_back,
)

SAFE = {
    "x-queue-type": "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


# ------------------------------------------------------------------ declaring and deleting


def test_declaring_again_changes_nothing(peer: Peer, names: Names) -> None:
    """What is in the queues stays, and a binding that is there twice is one."""
    exchange, queue = names.exchange(), names.queue()
    topology = [
        Exchange(exchange),
        dead_letter_queue(queue),
        subscriber_queue(queue),
        Binding(exchange, queue, "a.*"),
        *delays(exchange),
        way_back(exchange, queue),
    ]
    peer.declare(*topology)
    peer.publish(exchange, "a.b", b"kept")
    peer.declare(*topology)
    peer.publish(exchange, "a.b", b"once")
    assert peer.take_all(queue) == [b"kept", b"once"]


@pytest.mark.parametrize(
    ("one", "other"), [("topic", "fanout"), ("fanout", "direct"), ("direct", "topic")]
)
def test_exchange_of_another_type_is_a_topology_error(
    peer: Peer, names: Names, one: str, other: str
) -> None:
    """It says which, what it is, what was asked for, and the ways out; nothing is changed."""
    exchange = names.exchange()
    peer.declare(Exchange(exchange, one))
    with pytest.raises(TopologyError) as caught:
        peer.declare(Exchange(exchange, other))
    for words in (exchange, one, other, "ways out"):
        assert words in str(caught.value)
    peer.declare(Exchange(exchange, one))


def test_exchange_with_other_arguments_is_used_as_it_is(peer: Peer, names: Names) -> None:
    """An alternate exchange, for example, is for whoever runs the broker to decide. It stays."""
    exchange, alternate, queue = names.exchange(), names.exchange("other"), names.queue()
    peer.declare(
        Exchange(alternate, "fanout"),
        Queue(queue),
        Binding(alternate, queue, ""),
        Exchange(exchange, arguments={"alternate-exchange": alternate}, strict=True),
    )
    bound = names.queue("bound")
    peer.declare(Exchange(exchange), Queue(bound), Binding(exchange, bound, "a"))
    peer.publish(exchange, "a", b"bound")
    peer.publish(exchange, "b", b"not bound")
    assert peer.take_all(bound) == [b"bound"]
    assert peer.take_all(queue) == [b"not bound"]


def test_strict_exchange_with_other_arguments_is_a_topology_error(peer: Peer, names: Names) -> None:
    """Those of our own: without its alternate exchange, `.due` would lose retries."""
    exchange = names.exchange()
    peer.declare(Exchange(exchange))
    with pytest.raises(TopologyError, match="alternate-exchange"):
        peer.declare(Exchange(exchange, arguments={"alternate-exchange": "x"}, strict=True))
    base = names.exchange("base")
    peer.declare(Exchange(f"{base}.due"))
    with pytest.raises(TopologyError, match=f"{base}.due"):
        peer.declare(*delays(base))


@pytest.mark.parametrize(
    "asked",
    [
        Queue("q", {"x-queue-type": "quorum"}),
        Queue("q", {"x-message-ttl": 1000}),
        Queue("q", {"x-message-ttl": 2000, "x-expires": 60_000}),
        Queue("q", {"x-message-ttl": 2000, "x-dead-letter-exchange": "y"}),
        Queue("q", {"x-message-ttl": 2000, "x-dead-letter-routing-key": "y"}),
        Queue("q", {"x-message-ttl": 2000}, durable=False, exclusive=True),
        Queue("q", {"x-message-ttl": 2000}, auto_delete=True),
    ],
    ids=["type", "ttl", "expires", "exchange", "routing key", "exclusive", "auto-delete"],
)
def test_queue_with_other_arguments_is_a_topology_error(
    peer: Peer, names: Names, asked: Queue
) -> None:
    """It names the queue; what is in it stays."""
    name = names.queue()
    found = Queue(name, {"x-message-ttl": 2000})
    peer.declare(found)
    asked = Queue(name, asked.arguments, asked.durable, asked.exclusive, asked.auto_delete)
    with pytest.raises(TopologyError, match=name):
        peer.declare(asked)
    peer.declare(found)


def test_classic_said_and_classic_not_said_are_the_same(peer: Peer, names: Names) -> None:
    """A queue of domain-event-broker has no ``x-queue-type``; a temporary one of ours has."""
    unsaid, said = names.queue("unsaid"), names.queue("said")
    peer.declare(Queue(unsaid), Queue(said, {"x-queue-type": "classic"}))
    peer.declare(Queue(unsaid, {"x-queue-type": "classic"}), Queue(said))


def test_queue_taken_as_found_is_taken_whatever_it_is(peer: Peer, names: Names) -> None:
    """Else it is declared as asked for."""
    there, new = names.queue("there"), names.queue("new")
    peer.declare(Queue(there, {"x-message-ttl": 60_000}))
    peer.publish("", there, b"kept")
    peer.declare(
        Queue(there, {"x-queue-type": "quorum"}, as_found=True),
        Queue(new, {"x-message-ttl": 60_000}, as_found=True),
    )
    assert peer.take_all(there) == [b"kept"]
    peer.declare(Queue(new, {"x-message-ttl": 60_000}))
    with pytest.raises(TopologyError):
        peer.declare(Queue(new))


@pytest.mark.parametrize("missing", ["exchange", "queue", "exchange to", "exchange from"])
def test_binding_of_what_is_missing_is_a_topology_error(
    peer: Peer, names: Names, missing: str
) -> None:
    """And what stands before it in the topology is declared."""
    exchange, queue = names.exchange(), names.queue()
    nothing = f"{names.prefix}-nothing"
    peer.declare(Queue(queue), Exchange(exchange))
    first = names.queue("first")
    binding = {
        "exchange": Binding(nothing, queue, "a"),
        "queue": Binding(exchange, nothing, "a"),
        "exchange to": Binding(exchange, nothing, "a", to_exchange=True),
        "exchange from": Binding(nothing, exchange, "a", to_exchange=True),
    }[missing]
    with pytest.raises(TopologyError, match=nothing):
        peer.declare(Queue(first), binding)
    assert peer.exists(first)


def test_deleting_takes_all_that_was_there(peer: Peer, names: Names) -> None:
    """Messages and bindings too; what is not there is no error."""
    exchange, queue = names.exchange(), names.queue()
    topology = [Exchange(exchange), Queue(queue)]
    peer.declare(*topology, Binding(exchange, queue, "#"))
    peer.publish(exchange, "a", b"gone")
    peer.delete(Queue(queue))
    assert not peer.exists(queue)
    with pytest.raises(TopologyError, match=queue):
        peer.count(queue)
    peer.delete(*topology, Binding(exchange, queue, "#"))
    peer.declare(*topology)
    assert peer.count(queue) == 0
    peer.publish(exchange, "a", b"bound no longer")
    peer.publish("", queue, b"new")
    assert peer.take_all(queue) == [b"new"]


def test_deleting_an_exchange_unbinds_it(peer: Peer, names: Names) -> None:
    """From queues and from other exchanges, on both of its sides."""
    first, middle, last = (names.exchange(name) for name in ("first", "middle", "last"))
    queue = names.queue()
    peer.declare(*map(Exchange, (first, middle, last)), Queue(queue))
    bindings = [
        Binding(first, middle, "#", to_exchange=True),
        Binding(middle, last, "#", to_exchange=True),
        Binding(last, queue, "#"),
    ]
    peer.declare(*bindings)
    peer.publish(first, "a", b"one")
    peer.delete(Exchange(middle))
    peer.declare(Exchange(middle))
    peer.publish(first, "a", b"two")
    peer.publish(middle, "a", b"three")
    assert peer.take_all(queue) == [b"one"]


def test_exclusive_queue_is_its_connections_own(peer: Peer, names: Names) -> None:
    """Nobody else may declare, count, browse or consume it; it goes with its connection."""
    queue = names.queue()
    exclusive = temporary_queue(queue, exclusive=True, auto_delete=False)
    peer.declare(exclusive)
    peer.declare(exclusive)
    peer.publish("", queue, b"anybody may publish")
    other = peer.another_connection()
    with pytest.raises(TopologyError, match="is taken"):
        other.declare([exclusive], TIMEOUT)
    with pytest.raises(TopologyError, match=queue):
        other.declare([Queue(queue, as_found=True)], TIMEOUT)
    with pytest.raises(TopologyError, match=queue):
        other.count(queue, TIMEOUT)
    with pytest.raises(TopologyError, match=queue):
        other.browse(queue, TIMEOUT).next(TIMEOUT)
    with pytest.raises(TopologyError, match=queue):
        other.delete([exclusive], TIMEOUT)
    assert peer.count(queue) == 1
    peer.consuming.close(TIMEOUT)
    peer.consuming = other
    wait_until(lambda: not peer.exists(queue))


# ------------------------------------------------------------------ routing


def test_a_queue_gets_a_message_once_however_often_it_is_bound(peer: Peer, names: Names) -> None:
    """By several keys, and by several ways."""
    first, second, queue = names.exchange("first"), names.exchange("second"), names.queue()
    peer.declare(Exchange(first), Exchange(second), Queue(queue))
    peer.declare(*(Binding(first, queue, key) for key in ("#", "a.*", "a.b")))
    peer.declare(Binding(first, second, "#", to_exchange=True), Binding(second, queue, "#"))
    # Also where exchanges are bound in a circle.
    peer.declare(Binding(second, first, "#", to_exchange=True))
    peer.publish(first, "a.b", b"once", mandatory=True)
    peer.publish(second, "a.b", b"too", mandatory=True)
    assert peer.take_all(queue) == [b"once", b"too"]


@pytest.mark.parametrize(
    ("exchange_type", "reached"),
    [("topic", {"a.*", "a.b", "#"}), ("direct", {"a.b"}), ("fanout", {"a.*", "a.b", "#", "c"})],
)
def test_exchange_routes_by_its_type(
    peer: Peer, names: Names, exchange_type: str, reached: set[str]
) -> None:
    """Patterns with topic, the same key with direct, everything with fanout."""
    exchange = names.exchange()
    peer.declare(Exchange(exchange, exchange_type))
    queues = {}
    for number, key in enumerate(["a.*", "a.b", "#", "c"]):
        queues[key] = names.queue(str(number))
        peer.declare(Queue(queues[key]), Binding(exchange, queues[key], key))
    peer.publish(exchange, "a.b", b"", mandatory=True)
    for key, queue in queues.items():
        peer.wait_for_count(queue, 1 if key in reached else 0)


def test_exchange_bound_to_an_exchange_hands_on(peer: Peer, names: Names) -> None:
    """Each with its own type and key; the delivery names the exchange it was published to."""
    first, second = names.exchange("first"), names.exchange("second")
    queue = names.queue()
    peer.declare(Exchange(first), Exchange(second, "direct"), Queue(queue))
    peer.declare(Binding(first, second, "a.#", to_exchange=True), Binding(second, queue, "a.b"))
    for key in ("a.b", "a.c", "b.b"):
        peer.publish(first, key, key.encode())
    (delivery,) = peer.consume(queue).wait(1)
    assert (delivery.exchange, delivery.routing_key, delivery.body) == (first, "a.b", b"a.b")
    assert peer.count(queue) == 0


def test_alternate_exchange_takes_what_would_reach_no_queue(peer: Peer, names: Names) -> None:
    """And only that; it counts as reached."""
    exchange, alternate = names.exchange(), names.exchange("alternate")
    bound, other = names.queue("bound"), names.queue("other")
    peer.declare(
        Exchange(alternate, "fanout"),
        Exchange(exchange, arguments={"alternate-exchange": alternate}),
        Queue(bound),
        Queue(other),
        Binding(exchange, bound, "a.*"),
        Binding(alternate, other, ""),
    )
    peer.publish(exchange, "a.b", b"routed", mandatory=True)
    peer.publish(exchange, "b.c", b"not routed", mandatory=True)
    assert peer.take_all(bound) == [b"routed"]
    assert peer.take_all(other) == [b"not routed"]


def test_default_exchange_routes_to_the_queue_of_that_name(peer: Peer, names: Names) -> None:
    """Without any binding, and with wildcards taken as they are."""
    first, second = names.queue("a.*"), names.queue("a.b")
    peer.declare(Queue(first), Queue(second))
    peer.publish("", second, b"b", mandatory=True)
    peer.publish("", first, b"*", mandatory=True)
    assert (peer.take_all(first), peer.take_all(second)) == ([b"*"], [b"b"])


# ------------------------------------------------------------------ expiry and dead letters


def test_message_moves_when_its_time_in_the_queue_is_over(peer: Peer, names: Names) -> None:
    """Not before, in its order, unchanged but for what the broker writes of its own."""
    exchange = names.exchange()
    wait, end = names.queue("wait"), names.queue("end")
    peer.declare(
        Exchange(exchange),
        Queue(wait, {**SAFE, "x-message-ttl": 600, "x-dead-letter-exchange": exchange}),
        subscriber_queue(end),
        Binding(exchange, end, "#"),
    )
    inbox = peer.consume(end)
    begun = time.monotonic()
    for n in range(5):
        message = Message("", wait, b"%d" % n, headers={"mine": "kept"}, message_id=str(n))
        assert peer.send(message) is None
    arrived = inbox.wait(5)
    assert 0.6 <= time.monotonic() - begun < 3
    assert bodies(arrived) == [b"0", b"1", b"2", b"3", b"4"]
    first = arrived[0]
    assert (first.exchange, first.routing_key) == (exchange, wait)
    assert first.properties.message_id == "0"
    assert first.headers["mine"] == "kept"
    assert first.headers["x-first-death-queue"] == wait
    assert first.headers["x-first-death-reason"] == "expired"
    (death,) = first.headers["x-death"]
    assert (death["queue"], death["reason"], death["count"]) == (wait, "expired", 1)
    assert (death["exchange"], death["routing-keys"]) == ("", [wait])
    assert peer.count(wait) == 0


@pytest.mark.parametrize("nonsense", [7, "text", [{"queue": "x"}], {"a": 1}], ids=str)
def test_nonsense_in_the_brokers_headers_does_not_stop_a_message(
    peer: Peer, names: Names, nonsense: object
) -> None:
    """Anybody may have put anything into ``x-death``."""
    wait, end = names.queue("wait"), names.queue("end")
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": end}
    peer.declare(Queue(wait, {"x-message-ttl": 100, **arguments}), Queue(end))
    assert peer.send(Message("", wait, b"moved", headers={"x-death": nonsense})) is None
    peer.wait_for_count(end, 1)


def test_expired_message_without_a_dead_letter_exchange_is_gone(peer: Peer, names: Names) -> None:
    """A queue that is told to forget forgets."""
    queue = names.queue()
    peer.declare(Queue(queue, {"x-message-ttl": 100}))
    peer.publish("", queue, b"short-lived")
    peer.wait_for_count(queue, 0)


def test_dead_letter_routing_key_replaces_the_old_one(peer: Peer, names: Names) -> None:
    """With the default exchange as the dead-letter exchange: straight to a queue."""
    exchange = names.exchange()
    wait, end = names.queue("wait"), names.queue("end")
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": end}
    peer.declare(
        Exchange(exchange),
        Queue(wait, {**SAFE, "x-message-ttl": 100, **arguments}),
        subscriber_queue(end),
        Binding(exchange, wait, "a.b"),
    )
    peer.publish(exchange, "a.b", b"")
    (delivery,) = peer.consume(end).wait(1)
    assert (delivery.exchange, delivery.routing_key) == ("", end)
    assert delivery.original_routing_key == "a.b"


def test_message_that_would_go_in_circles_is_dropped(peer: Peer, names: Names) -> None:
    """By expiry alone, to a queue where it has been: else it would do so for ever."""
    first, second, itself = names.queue("first"), names.queue("second"), names.queue("itself")
    for queue, following in ((first, second), (second, first), (itself, itself)):
        arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": following}
        peer.declare(Queue(queue, {"x-message-ttl": 100, **arguments}))
    peer.publish("", first, b"round")
    peer.publish("", itself, b"and round")
    wait_until(lambda: not any(map(peer.count, (first, second, itself))))
    # The queues are none the worse for it.
    peer.publish("", first, b"again")
    peer.wait_for_count(second, 1)
    peer.wait_for_count(second, 0)
    peer.wait_for_count(first, 0)


@pytest.mark.parametrize(("delay", "last"), [(0.1, "due"), (0.3, "due"), (0.4, "delay.01")])
def test_delay_levels_bring_a_message_to_its_queue_in_time(
    peer: Peer, names: Names, delay: float, last: str
) -> None:
    """Through levels that keep it and levels that pass it on; to that queue only."""
    exchange, queue, other = names.exchange(), names.queue("a.b"), names.queue("other")
    peer.declare(*delays(exchange), subscriber_queue(queue), subscriber_queue(other))
    peer.declare(way_back(exchange, queue), way_back(exchange, other))
    inbox = peer.consume(queue)
    address, key = delay_address(exchange, queue, delay)
    begun = time.monotonic()
    peer.publish(address, key, b"late", mandatory=True)
    (delivery,) = inbox.wait(1)
    assert delay <= time.monotonic() - begun < delay + 2
    # Where it was last published to, by the last level that kept it.
    assert delivery.exchange == f"{exchange}.{last}"
    assert peer.count(other) == 0


def test_message_that_is_due_without_a_queue_is_undelivered(peer: Peer, names: Names) -> None:
    """The alternate exchange keeps it: it must not block what is due behind it."""
    exchange, queue = names.exchange(), names.queue()
    peer.declare(*delays(exchange), subscriber_queue(queue), way_back(exchange, queue))
    inbox = peer.consume(queue)
    for name, body in ((f"{queue}-gone", b"lost"), (queue, b"found")):
        address, key = delay_address(exchange, name, 0.1)
        peer.publish(address, key, body)
    assert bodies(inbox.wait(1)) == [b"found"]
    peer.wait_for_count(f"{exchange}.undelivered", 1)
    assert peer.take_all(f"{exchange}.undelivered") == [b"lost"]


def test_message_that_crashed_its_consumers_too_often_is_dead_lettered(
    peer: Peer, names: Names
) -> None:
    """`x-delivery-limit`: so many times again, and then over, with the broker's reason.

    What is given back counts too on RabbitMQ up to 4.2, and no longer on 4.3; the embedded broker
    is like the newest here.
    """
    exchange, queue = names.exchange(), names.queue()
    limited = Queue(queue, {**subscriber_queue(queue).arguments, "x-delivery-limit": 2})
    peer.declare(Exchange(exchange), limited, dead_letter_queue(queue))
    peer.declare(Binding(exchange, queue, "#"))
    peer.publish(exchange, "a.b", b"poison")
    for crash in range(3):
        connection = peer.another_connection()
        (delivery,) = peer.consume(queue, connection=connection).wait(1)
        assert delivery.redelivered is (crash > 0)
        connection.close(TIMEOUT)
    (dead,) = peer.consume(f"{queue}-dl").wait(1)
    assert dead.body == b"poison"
    assert dead.headers["x-first-death-reason"] == "delivery_limit"
    assert dead.headers["x-first-death-queue"] == queue
    assert dead.original_routing_key == "a.b"
    assert peer.count(queue) == 0


# ------------------------------------------------------------------ queues that go by themselves


def test_unused_queue_expires(peer: Peer, names: Names) -> None:
    """`x-expires`: with its messages, but not while somebody consumes."""
    unused, used = names.queue("unused"), names.queue("used")
    for queue in (unused, used):
        peer.declare(Queue(queue, {"x-queue-type": "classic", "x-expires": 400}))
    connection = peer.another_connection()
    inbox = peer.consume(used, connection=connection)
    peer.publish("", unused, b"")
    # Counting is use: only what is published to it tells whether it is there.
    wait_until(lambda: peer.send(Message("", unused, b"", mandatory=True)) is not None)
    assert peer.send(Message("", used, b"still there", mandatory=True)) is None
    inbox.settle(*inbox.wait(1))
    connection.close(TIMEOUT)
    wait_until(lambda: peer.send(Message("", used, b"", mandatory=True)) is not None)


def test_auto_delete_queue_goes_with_its_last_consumer(peer: Peer, names: Names) -> None:
    """Not before its first one, and not with one of two."""
    queue = names.queue()
    peer.declare(temporary_queue(queue, exclusive=False, auto_delete=True))
    peer.publish("", queue, b"kept until then")
    connection, another = peer.another_connection(), peer.another_connection()
    first = peer.consume(queue, prefetch=1, connection=connection)
    first.wait(1)
    second = peer.consume(queue, connection=another)
    peer.publish("", queue, b"for the second")
    second.wait(1)
    first.consumer.stop(TIMEOUT)
    assert peer.exists(queue)
    another.close(TIMEOUT)
    wait_until(lambda: not peer.exists(queue))
