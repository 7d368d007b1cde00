"""The embedded broker is the faster one: what tests gain by it."""

from __future__ import annotations

import statistics
import threading
import time

import pytest
from bench import running
from support import Names

from domain_events import DomainEvent, Publisher, Subscriber

NUMBER = 200


def test_embedded_broker_takes_less_time_for_the_same_events(
    memory_url: str,
    rabbitmq_url: str,
    shared_names: Names,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Published and handled one after the other, as tests do; on both brokers in turn.

    Time is what this is about. Half of so many may be as late as they like, and what else this
    machine does meanwhile is in the way of both.
    """
    exchange, queue = shared_names.exchange(), shared_names.queue()
    sides = {"memory://": Side(memory_url, exchange, queue)}
    sides["RabbitMQ"] = Side(rabbitmq_url, exchange, queue)
    with running(*(side.subscriber for side in sides.values())):
        for number in range(NUMBER):
            for side in sides.values():
                side.play(number)
    took = {name: statistics.median(side.took) for name, side in sides.items()}
    for side in sides.values():
        side.publisher.close()
    with capsys.disabled():
        print("\nan event published and handled, median:")
        for name, seconds in took.items():
            print(f"  {name:<10} {1000 * seconds:6.2f} ms")
    assert took["memory://"] < took["RabbitMQ"]


class Side:
    """A publisher and a subscriber on one broker, and how long each event took."""

    def __init__(self, url: str, exchange: str, queue: str) -> None:
        self._handled = threading.Semaphore(0)
        self.took: list[float] = []
        self.subscriber = Subscriber(url, exchange)
        self.subscriber.register(lambda _event: self._handled.release(), queue, ["user.*"])
        self.publisher = Publisher(url, exchange, timeout=60)

    def play(self, number: int) -> None:
        begun = time.perf_counter()
        self.publisher.publish(DomainEvent("user.registered", {"user_id": number}))
        assert self._handled.acquire(timeout=60)
        self.took.append(time.perf_counter() - begun)
