"""Which queues an event reaches: random binding keys and routing keys, both brokers side by side.

`topology.matches` has to say the same; that RabbitMQ does so too where no queue is in the way is
in test_topology.py.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import Names, wait_until

from conformance.peer import Peer
from domain_events import TopologyError
from domain_events.message import Message
from domain_events.topology import Binding, Exchange, Queue, matches

WORDS = ["a", "b", "", "ü", "a*", "*", "#", "*", "#"]

# Several patterns for a queue, and patterns that stand behind another exchange's.
bindings = st.lists(
    st.lists(st.sampled_from(WORDS), max_size=4).map(".".join), min_size=1, max_size=2, unique=True
)
routing_keys = st.lists(
    st.lists(st.sampled_from(["a", "b", "", "ü", "a*", "*", "#"]), max_size=5).map(".".join),
    min_size=10,
    max_size=25,
    unique=True,
)


def test_same_queues_are_reached_on_both_brokers(
    memory_url: str, rabbitmq_url: str, shared_names: Names
) -> None:
    """By every routing key, directly and by way of another exchange; and `matches` agrees."""
    peers = [Peer(memory_url), Peer(rabbitmq_url)]
    names = shared_names
    most = 2 if _refuses_many_hashes(peers[1], names) else 4
    first, second = names.exchange("first"), names.exchange("second")
    queues = [names.queue(str(number)) for number in range(8)]
    pairs = 0

    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Each example takes a broker's time; the keys that differ are shown by the assertion.
        phases=[Phase.generate],
    )
    @given(st.lists(bindings, min_size=8, max_size=8), bindings, routing_keys)
    def check(bound: list[list[str]], onward: list[str], keys: list[str]) -> None:
        nonlocal pairs
        bound = [[key for key in each if key.split(".").count("#") <= most] for each in bound]
        onward = [key for key in onward if key.split(".").count("#") <= most]
        pairs += len(keys) * sum(map(len, bound))
        direct = queues[:4]  # the others stand behind the second exchange
        expected = {
            queue: [
                key
                for key in keys
                if any(matches(each, key) for each in patterns)
                and (queue in direct or any(matches(each, key) for each in onward))
            ]
            for queue, patterns in zip(queues, bound, strict=True)
        }
        for peer in peers:
            peer.delete(*map(Queue, queues), Exchange(first), Exchange(second))
            peer.declare(Exchange(first), Exchange(second), *map(Queue, queues))
            peer.declare(*(Binding(first, second, key, to_exchange=True) for key in onward))
            for queue, patterns in zip(queues, bound, strict=True):
                exchange = first if queue in direct else second
                peer.declare(*(Binding(exchange, queue, key) for key in patterns))
            sent = peer.submit(*(Message(first, key, key.encode()) for key in keys))
            wait_until(lambda: all(each.done for each in sent))  # noqa: B023
            reached = {queue: [body.decode() for body in peer.take_all(queue)] for queue in queues}
            assert reached == expected

    try:
        check()
    finally:
        for peer in peers:
            peer.close()
    assert pairs > 500


def _refuses_many_hashes(peer: Peer, names: Names) -> bool:
    """RabbitMQ 4.3 and later: no binding key with more than two ``#``."""
    exchange, queue = names.exchange("hashes"), names.queue("hashes")
    peer.declare(Exchange(exchange), Queue(queue))
    try:
        peer.declare(Binding(exchange, queue, "#.#.#"))
    except TopologyError:
        return True
    return False
