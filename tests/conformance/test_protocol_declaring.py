"""The broker protocol: what subscribers declare and delete, and which events reach them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onlooker
import pytest
from support import Names, wait_until

from conformance.peer import TIMEOUT, Kind, Peer
from domain_events import TopologyError
from domain_events.broker import Exchange, Queue, memory
from domain_events.broker.clock import SECOND
from domain_events.broker.rabbitmq import topology
from domain_events.message import (
    Later,
    Place,
    ToDeadLetters,
    ToExchange,
    ToSubscriber,
    UndeliveredOf,
)

KINDS: dict[str, Kind] = {
    "durable": {},
    "retries": {"dead_letters": True, "delays": True},
    "temporary": {"durable": False},
    "exclusive": {"exclusive": True},
    "auto-delete": {"auto_delete": True},
    "classic": {"classic": True, "dead_letters": True},
}


@pytest.fixture
def exchange(names: Names) -> Exchange:
    return Exchange(names.exchange())


@pytest.fixture
def queue(names: Names, exchange: Exchange) -> Queue:
    """With all that there is; not declared yet."""
    return Queue(names.queue(), exchange, ("a.*",), dead_letters=True, delays=True)


def places(queue: Queue) -> list[Place]:
    """All places in which its events may wait."""
    return [
        ToSubscriber(queue.name),
        ToDeadLetters(queue.name),
        UndeliveredOf(queue.exchange.name),
    ]


# ------------------------------------------------------------------ declaring


@pytest.mark.parametrize("kind", KINDS)
def test_declaring_again_changes_nothing(
    kind: str, peer: Peer, names: Names, exchange: Exchange
) -> None:
    """What is in the queue stays, and a binding that is declared twice is one."""
    queue = Queue(names.queue(), exchange, ("a.*",), **KINDS[kind])
    peer.declare(queue)
    peer.publish(ToExchange(exchange.name), b"kept", mandatory=True)
    peer.declare(queue)
    peer.publish(ToExchange(exchange.name), b"once", mandatory=True)
    assert peer.take_all(queue.name) == [b"kept", b"once"]


def test_only_what_a_subscriber_wants_is_declared(
    peer: Peer, queue: Queue, exchange: Exchange
) -> None:
    """No dead letters and no delays for one that has no use for them."""
    peer.declare(replace(queue, dead_letters=False, delays=False))
    assert [peer.exists(place) for place in places(queue)] == [True, False, False]
    peer.declare(replace(queue, delays=False))
    assert [peer.exists(place) for place in places(queue)] == [True, True, False]
    peer.declare(queue)
    assert [peer.exists(place) for place in places(queue)] == [True, True, True]


def test_what_a_subscriber_wants_may_change(peer: Peer, queue: Queue) -> None:
    """Nothing of it is fixed when the queue is made, and nothing that waits is lost."""
    peer.declare(queue)
    peer.publish(ToSubscriber(queue.name), b"kept")
    peer.publish(ToDeadLetters(queue.name), b"dead")
    for dead_letters in (False, True):
        for delays in (False, True):
            for keys in ((), ("b.*", "c"), ("a.*",)):
                peer.declare(
                    replace(queue, dead_letters=dead_letters, delays=delays, binding_keys=keys)
                )
    assert peer.take_all(queue.name) == [b"kept"]
    assert peer.take_all(ToDeadLetters(queue.name)) == [b"dead"]


def test_further_binding_keys_are_added(peer: Peer, queue: Queue, exchange: Exchange) -> None:
    """Those of another release stay, for it may run still."""
    peer.declare(queue)
    peer.declare(replace(queue, binding_keys=("b.*",)))
    for key in ("a.x", "b.x", "c.x"):
        peer.publish(ToExchange(exchange.name), key.encode(), key=key)
    assert peer.take_all(queue.name) == [b"a.x", b"b.x"]


def test_retired_keys_are_unbound(peer: Peer, queue: Queue, exchange: Exchange) -> None:
    """And no others; one that was never bound is not an error. What came by it stays."""
    queue = replace(queue, binding_keys=("a.*", "b.*", "c"))
    peer.declare(queue)
    peer.publish(ToExchange(exchange.name), b"before", key="b.x")
    for _ in range(2):
        peer.declare(replace(queue, binding_keys=("a.*",), retired_keys=("b.*", "never.bound")))
        for key in ("a.x", "b.x", "c"):
            peer.publish(ToExchange(exchange.name), key.encode(), key=key)
    assert peer.take_all(queue.name) == [b"before", b"a.x", b"c", b"a.x", b"c"]


@pytest.mark.parametrize(
    ("one", "other"), [("topic", "fanout"), ("fanout", "direct"), ("direct", "topic")]
)
def test_exchange_of_another_type_is_a_topology_error(
    peer: Peer, queue: Queue, one: str, other: str
) -> None:
    """It says which, what it is, what was asked for, and the ways out; nothing is changed."""
    there = replace(queue, exchange=Exchange(queue.exchange.name, one))
    peer.declare(there)
    with pytest.raises(TopologyError) as caught:
        peer.declare(replace(queue, exchange=Exchange(queue.exchange.name, other)))
    for words in (queue.exchange.name, one, other, "ways out"):
        assert words in str(caught.value)
    peer.declare(there)


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ("durable", "temporary"),
        ("durable", "exclusive"),
        ("durable", "auto-delete"),
        ("temporary", "durable"),
        ("temporary", "auto-delete"),
        ("auto-delete", "durable"),
        ("classic", "durable"),
    ],
)
def test_queue_of_another_kind_is_a_topology_error(
    peer: Peer, names: Names, exchange: Exchange, there: str, wanted: str
) -> None:
    """It names the queue, and says the ways out; what is in it stays."""
    found = Queue(names.queue(), exchange, ("#",), **KINDS[there])
    peer.declare(found)
    peer.publish(ToSubscriber(found.name), b"kept")
    with pytest.raises(TopologyError) as caught:
        peer.declare(Queue(found.name, exchange, ("#",), **KINDS[wanted]))
    assert found.name in str(caught.value)
    # Where it is asked for as exclusive, RabbitMQ does not say what is different about it.
    assert wanted == "exclusive" or "ways out" in str(caught.value)
    peer.declare(found)
    assert peer.take_all(found.name) == [b"kept"]


def test_classic_queue_is_taken_whatever_it_is(
    peer: Peer, names: Names, exchange: Exchange
) -> None:
    """With what waits in it; it is bound, and gets dead letters if it has none."""
    found = Queue(names.queue(), exchange, durable=False)
    peer.declare(found)
    peer.publish(ToSubscriber(found.name), b"kept")
    peer.declare(Queue(found.name, exchange, ("a.*",), dead_letters=True, classic=True))
    peer.publish(ToExchange(exchange.name), b"new", mandatory=True)
    peer.publish(ToDeadLetters(found.name), b"dead", mandatory=True)
    assert peer.take_all(found.name) == [b"kept", b"new"]
    assert peer.take_all(ToDeadLetters(found.name)) == [b"dead"]


def test_declaring_after_an_error_works(
    broker_url: str, peer: Peer, queue: Queue, exchange: Exchange
) -> None:
    """The connection works as before, and the same call succeeds when the cause is gone."""
    onlooker.declare_exchange(broker_url, exchange.name, "fanout")
    for _ in range(3):
        with pytest.raises(TopologyError, match=exchange.name):
            peer.declare(queue)
    onlooker.delete(broker_url, exchanges=[exchange.name])
    peer.declare(queue)
    assert peer.count(queue.name) == 0


# ------------------------------------------------------------------ deleting


def test_deleting_takes_all_that_was_there(peer: Peer, queue: Queue, exchange: Exchange) -> None:
    """Messages, bindings, dead letters and what was delayed or undelivered."""
    peer.declare(queue)
    peer.publish(ToExchange(exchange.name), b"gone")
    peer.publish(ToDeadLetters(queue.name), b"gone")
    peer.publish(Later(exchange.name, "nobody", 0.1), b"gone")
    peer.publish(Later(exchange.name, queue.name, 1.0), b"gone")
    peer.delete(queue.name, exchange=exchange.name)
    assert not any(peer.exists(place) for place in places(queue))
    assert peer.is_unroutable(ToExchange(exchange.name))
    peer.declare(replace(queue, binding_keys=()))
    assert [peer.count(place) for place in places(queue)] == [0, 0, 0]
    peer.publish(ToExchange(exchange.name), b"bound no longer")
    # Behind what would have been due before.
    peer.publish(Later(exchange.name, queue.name, 1.1), b"new")
    peer.wait_for_count(queue.name, 1)
    assert peer.take_all(queue.name) == [b"new"]
    assert peer.count(UndeliveredOf(exchange.name)) == 0


def test_deleting_what_is_not_there_is_not_an_error(peer: Peer, queue: Queue) -> None:
    """Nor is deleting twice; others stay."""
    peer.declare(queue)
    peer.publish(ToSubscriber(queue.name), b"kept")
    for _ in range(2):
        peer.delete(f"{queue.name}-nobody", exchange=f"{queue.exchange.name}-none")
    assert peer.take_all(queue.name) == [b"kept"]
    for _ in range(2):
        peer.delete(queue.name, f"{queue.name}-nobody", exchange=queue.exchange.name)
    assert not peer.exists(queue.name)


def test_deleting_a_subscriber_leaves_the_others(
    peer: Peer, queue: Queue, names: Names, exchange: Exchange
) -> None:
    """On the same exchange, with their bindings and their delayed events."""
    other = replace(queue, name=names.queue("other"))
    peer.declare(queue, other)
    peer.publish(Later(exchange.name, other.name, 0.3), b"late")
    peer.delete(queue.name)
    peer.publish(ToExchange(exchange.name), b"now")
    peer.wait_for_count(other.name, 2)
    assert peer.take_all(other.name) == [b"now", b"late"]


def test_registered_is_what_a_subscriber_that_may_retry_declares(
    broker_url: str, peer: Peer, names: Names, exchange: Exchange
) -> None:
    """A queue that others make by chance is none, if one must be sure."""
    for kind, strictly in (("retries", True), ("temporary", False), ("auto-delete", False)):
        name = names.queue(kind)
        peer.declare(Queue(name, exchange, **KINDS[kind]))
        assert peer.consuming.is_registered(name, TIMEOUT, strict=False)
        assert peer.consuming.is_registered(name, TIMEOUT, strict=True) is strictly
    stranger = names.queue("stranger")
    onlooker.bind_queue(broker_url, stranger, exchange.name, "none")
    assert not peer.consuming.is_registered(stranger, TIMEOUT, strict=True)
    nobody = names.queue("nobody")
    for strict in (False, True):
        with pytest.raises(TopologyError, match=nobody):
            peer.consuming.is_registered(nobody, TIMEOUT, strict=strict)
    assert not peer.exists(nobody)


# ------------------------------------------------------------------ routing


def test_queue_gets_an_event_once_however_often_it_is_bound(
    peer: Peer, names: Names, exchange: Exchange
) -> None:
    """By several keys that match."""
    queue = Queue(names.queue(), exchange, ("#", "a.*", "a.b"))
    peer.declare(queue)
    peer.publish(ToExchange(exchange.name), b"once", mandatory=True)
    assert peer.take_all(queue.name) == [b"once"]


@pytest.mark.parametrize(
    ("exchange_type", "reached"),
    [("topic", {"a.*", "a.b", "#"}), ("direct", {"a.b"}), ("fanout", {"a.*", "a.b", "#", "c"})],
)
def test_exchange_routes_by_its_type(
    peer: Peer, names: Names, exchange_type: str, reached: set[str]
) -> None:
    """Patterns with topic, the same key with direct, everything with fanout."""
    exchange = Exchange(names.exchange(), exchange_type)
    queues = {
        key: Queue(names.queue(str(number)), exchange, (key,))
        for number, key in enumerate(["a.*", "a.b", "#", "c"])
    }
    peer.declare(*queues.values())
    peer.publish(ToExchange(exchange.name), b"", key="a.b", mandatory=True)
    for key, queue in queues.items():
        peer.wait_for_count(queue.name, 1 if key in reached else 0)


def test_queue_may_be_bound_to_several_exchanges(
    peer: Peer, queue: Queue, names: Names, exchange: Exchange
) -> None:
    """Each with binding keys of its own."""
    other = Exchange(names.exchange("other"))
    peer.declare(queue, replace(queue, exchange=other, binding_keys=("b.*",)))
    for where in (exchange, other):
        for key in ("a.x", "b.x"):
            peer.publish(ToExchange(where.name), f"{where.name} {key}".encode(), key=key)
    assert peer.take_all(queue.name) == [
        f"{exchange.name} a.x".encode(),
        f"{other.name} b.x".encode(),
    ]


def test_name_of_a_subscriber_is_taken_as_it_is(
    peer: Peer, names: Names, exchange: Exchange
) -> None:
    """Also one that looks like a pattern, or like another with something behind it."""
    queues = [
        Queue(names.queue(label), exchange, delays=True) for label in ("a*", "a.b", "a.b.c", "ü")
    ]
    peer.declare(*queues)
    for queue in queues:
        peer.publish(ToSubscriber(queue.name), b"now", mandatory=True)
        peer.publish(Later(exchange.name, queue.name, 0.1), b"late", mandatory=True)
    for queue in queues:
        peer.wait_for_count(queue.name, 2)
        assert peer.take_all(queue.name) == [b"now", b"late"]


# ------------------------------------------------------------------ queues that go by themselves


def test_exclusive_queue_is_its_connections_own(
    peer: Peer, names: Names, exchange: Exchange
) -> None:
    """Nobody else may declare, count, browse or consume it; it goes with its connection."""
    queue = Queue(names.queue(), exchange, exclusive=True)
    peer.declare(queue)
    peer.declare(queue)
    peer.publish(ToSubscriber(queue.name), b"anybody may publish")
    other = peer.another_connection()
    with pytest.raises(TopologyError, match="exclusively used by another connection"):
        other.declare(queue, TIMEOUT)
    with pytest.raises(TopologyError, match=queue.name):
        other.declare(Queue(queue.name, exchange, classic=True), TIMEOUT)
    with pytest.raises(TopologyError, match=queue.name):
        other.count(ToSubscriber(queue.name), TIMEOUT)
    with pytest.raises(TopologyError, match=queue.name):
        peer.browse(queue.name, other).next(TIMEOUT)
    with pytest.raises(TopologyError, match=queue.name):
        other.delete([queue.name], "none", TIMEOUT)
    assert peer.count(queue.name) == 1
    peer.consuming.close(TIMEOUT)
    peer.consuming = other
    wait_until(lambda: not peer.exists(queue.name))


def test_auto_delete_queue_goes_with_its_last_consumer(
    peer: Peer, names: Names, exchange: Exchange
) -> None:
    """Not before its first one, and not with one of two."""
    queue = Queue(names.queue(), exchange, auto_delete=True)
    peer.declare(queue)
    peer.publish(ToSubscriber(queue.name), b"kept until then")
    connection, another = peer.another_connection(), peer.another_connection()
    first = peer.consume(queue, prefetch_count=1, connection=connection)
    first.wait(1)
    second = peer.consume(queue, connection=another)
    peer.publish(ToSubscriber(queue.name), b"for the second")
    second.wait(1)
    first.consumer.stop(TIMEOUT)
    assert peer.exists(queue.name)
    another.close(TIMEOUT)
    wait_until(lambda: not peer.exists(queue.name))


def test_durable_queue_stays_without_anybody(
    broker_url: str, peer: Peer, queue: Queue, exchange: Exchange
) -> None:
    """Nobody consumes it, and no connection is open; it gets its events all the same."""
    peer.declare(queue)
    peer.publish(ToExchange(exchange.name), b"handled")
    inbox = peer.consume(queue)
    inbox.settle(*inbox.wait(1))
    inbox.consumer.stop(TIMEOUT)
    peer.close()
    later = Peer(broker_url)
    later.publish(ToExchange(exchange.name), b"for it", mandatory=True)
    assert later.take_all(queue.name) == [b"for it"]
    later.close()


@pytest.fixture
def kept_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second is a minute: how long a temporary queue is kept without a consumer."""
    monkeypatch.setattr(memory, "_EXPIRES", SECOND // 2)
    original = topology.temporary_queue

    def short_lived(*arguments: Any, **options: Any) -> topology.Queue:
        queue = original(*arguments, **options)
        if "x-expires" not in queue.arguments:
            return queue
        return replace(queue, arguments={**queue.arguments, "x-expires": 500})

    monkeypatch.setattr(topology, "temporary_queue", short_lived)


@pytest.mark.usefixtures("kept_for_a_moment")
def test_temporary_queue_goes_some_time_after_its_last_consumer(
    peer: Peer, names: Names, exchange: Exchange
) -> None:
    """With its events, but not while somebody consumes; who comes back sooner finds them."""
    unused, used = (Queue(names.queue(label), exchange, durable=False) for label in ("a", "b"))
    peer.declare(unused, used)
    connection = peer.another_connection()
    inbox = peer.consume(used, connection=connection)
    peer.publish(ToSubscriber(unused.name), b"x")
    # Counting is use: only what is published to it tells whether it is there.
    wait_until(lambda: peer.is_unroutable(ToSubscriber(unused.name)))
    peer.publish(ToSubscriber(used.name), b"still there", mandatory=True)
    inbox.wait(1)
    connection.close(TIMEOUT)
    connection = peer.another_connection()
    again = peer.consume(used, connection=connection)
    again.settle(*again.wait(1))
    assert again.bodies() == [b"still there"]
    connection.close(TIMEOUT)
    wait_until(lambda: peer.is_unroutable(ToSubscriber(used.name)))
