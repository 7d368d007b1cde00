"""Clusters: nodes go down and come back, and nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from faults.broker import HAND_ON
from rabbitmq_node import Node
from support import Names, wait_until

from domain_events import (
    BrokerUnavailable,
    DomainEvent,
    Publisher,
    Retry,
    Subscriber,
)

NodeFactory = Callable[..., Node]


@pytest.mark.slow
def test_cluster_serves_while_any_one_node_is_down(node_factory: NodeFactory, unique: str) -> None:
    """Three nodes, killed in turn: every confirmed event is handled, retries included."""
    nodes = [node_factory() for _ in range(3)]
    for node in nodes:
        (node.folder / "advanced.config").write_text(HAND_ON)
        node.start(wait=False)
    nodes[0].start()
    for node in nodes[1:]:
        node.join(nodes[0])
    urls = [node.url for node in nodes]
    exchange, queue = f"{unique}-x", f"{unique}-q"
    number = 60
    done: set[int] = set()
    subscriber = Subscriber(urls, exchange)

    def handle(event: DomainEvent) -> None:
        if event.data % 3 == 0 and event.retries == 0:
            raise Retry(0.5)
        done.add(event.data)

    subscriber.register(handle, queue, ["#"], max_retries=9)
    for node in nodes:
        node.sync()
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    try:
        with Publisher(",".join(urls), exchange) as publisher:
            for victim, node in enumerate(nodes):
                for n in range(number * victim, number * (victim + 1)):
                    if n == number * victim + number // 2:
                        node.kill()
                    publisher.publish(DomainEvent("a.b", n), timeout=60)
                wait_until(lambda: len(done) >= number * victim + 1, timeout=60)  # noqa: B023
                node.start()
        wait_until(lambda: done == set(range(3 * number)), timeout=60)
    finally:
        subscriber.stop_consuming()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.slow
def test_queue_whose_node_is_down_is_named(node_factory: NodeFactory, unique: str) -> None:
    """A classic queue lives on one node: it is waited for until the deadline, and named then."""
    home, other = node_factory(), node_factory()
    home.start(wait=False)
    other.start(wait=False)
    home.start()
    other.join(home)
    queue = f"{unique}-q"
    with Subscriber(home.url, f"{unique}-x") as subscriber:
        subscriber.register(print, queue, ["#"], durable=False)
    home.kill()
    with (
        Subscriber(other.url, f"{unique}-x", timeout=2) as subscriber,
        pytest.raises(BrokerUnavailable, match=f"{queue}' cannot be reached: .*down"),
    ):
        subscriber.register(print, queue, ["#"], durable=False)
    with Subscriber(other.url, f"{unique}-x", timeout=60) as subscriber:
        back = threading.Thread(target=home.start)
        back.start()
        subscriber.register(print, queue, ["#"], durable=False)
        back.join()


def test_nodes_that_are_down_are_passed_over(
    broker_url: str, names: Names, unused_port: int
) -> None:
    """One of several addresses is enough, and a name that cannot be resolved spoils nothing."""
    exchange = names.exchange()
    down = f"amqp://guest:guest@127.0.0.1:{unused_port}/%2F"
    unknown = "amqp://guest:guest@no-such-host.invalid/%2F"
    for _ in range(5):  # they are shuffled
        with Publisher([down, unknown, broker_url], exchange) as publisher:
            publisher.publish(DomainEvent("user.registered", {}), timeout=30)
