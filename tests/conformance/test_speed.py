"""The embedded broker is the faster one: what tests gain by it."""

from __future__ import annotations

import time

import pytest
from support import Names

from domain_events import DomainEvent, Publisher, Subscriber

NUMBER = 20_000


@pytest.mark.timeout(180)
def test_embedded_broker_takes_less_time_for_the_same_events(
    memory_url: str,
    rabbitmq_url: str,
    shared_names: Names,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Published with confirms, then handled and acked; both in this run, on this machine."""
    exchange, queue = shared_names.exchange(), shared_names.queue()
    took = {
        name: seconds_for(url, exchange, queue)
        for name, url in (("memory://", memory_url), ("RabbitMQ", rabbitmq_url))
    }
    with capsys.disabled():
        print(f"\n{NUMBER:,} events published and handled:")
        for name, (published, handled) in took.items():
            print(f"  {name:<10} published in {published:5.2f} s, handled in {handled:5.2f} s")
    assert sum(took["memory://"]) < sum(took["RabbitMQ"])


def seconds_for(url: str, exchange: str, queue: str) -> tuple[float, float]:
    """How long publishing took, and then handling."""
    subscriber = Subscriber(url, exchange)
    count = 0

    def handle(_event: DomainEvent) -> None:
        nonlocal count
        count += 1
        if count == NUMBER:
            subscriber.stop_consuming()

    subscriber.register(handle, queue, ["user.*"])
    with Publisher(url, exchange) as publisher:
        begun = time.perf_counter()
        events = (DomainEvent("user.registered", {"user_id": n}) for n in range(NUMBER))
        assert publisher.publish_many(events, timeout=120) == NUMBER
        published = time.perf_counter()
    subscriber.start_consuming(timeout=120)
    assert count == NUMBER
    return published - begun, time.perf_counter() - published
