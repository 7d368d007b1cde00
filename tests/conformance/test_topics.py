"""Which queues an event reaches: random binding keys and routing keys, both brokers side by side.

`names.matches` has to say the same; that RabbitMQ does so too for shorter keys, all of them, is in
test_topology.py.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import Names, wait_until

from conformance.peer import Peer
from domain_events import TopologyError
from domain_events.broker import Exchange, Queue
from domain_events.message import Message, ToExchange
from domain_events.names import matches

WORDS = ["a", "b", "", "ü", "a*", "*", "#", "*", "#"]

# Several patterns for a queue.
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
    """By every routing key, also when some keys are retired; and `matches` agrees."""
    peers = [Peer(memory_url), Peer(rabbitmq_url)]
    most = 2 if _refuses_many_hashes(peers[1], shared_names) else 4
    exchange = Exchange(shared_names.exchange())
    names = [shared_names.queue(str(number)) for number in range(8)]
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
    def check(bound: list[list[str]], retired: list[str], keys: list[str]) -> None:
        nonlocal pairs
        bound = [[key for key in each if key.split(".").count("#") <= most] for each in bound]
        pairs += len(keys) * sum(map(len, bound))
        # Of every other queue, some keys are bound, and then retired.
        kept = [
            [key for key in patterns if number % 2 or key not in retired]
            for number, patterns in enumerate(bound)
        ]
        expected = {
            name: [key for key in keys if any(matches(each, key) for each in patterns)]
            for name, patterns in zip(names, kept, strict=True)
        }
        for peer in peers:
            peer.delete(*names)
            for name, before, now in zip(names, bound, kept, strict=True):
                peer.declare(Queue(name, exchange, tuple(before), classic=True))
                gone = tuple({*before} - {*now})
                peer.declare(Queue(name, exchange, tuple(now), retired_keys=gone, classic=True))
            sent = peer.submit(
                *(Message(ToExchange(exchange.name), key, key.encode()) for key in keys)
            )
            wait_until(lambda: all(each.done for each in sent))  # noqa: B023
            reached = {name: [body.decode() for body in peer.take_all(name)] for name in names}
            assert reached == expected

    try:
        check()
    finally:
        for peer in peers:
            peer.close()
    assert pairs > 500


def _refuses_many_hashes(peer: Peer, names: Names) -> bool:
    """RabbitMQ 4.3 and later: no binding key with more than two ``#``."""
    queue = Queue(names.queue("hashes"), Exchange(names.exchange("hashes")), ("#.#.#",))
    try:
        peer.declare(queue)
    except TopologyError:
        return True
    return False
