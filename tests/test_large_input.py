"""Bodies, headers, keys and bindings as large as the broker takes them, and larger."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import onlooker
import pytest
import raw_amqp as raw
from bench import Bench, Events
from live import consuming
from rabbitmq_node import Node
from support import Names, wait_until

from domain_events import DeadLetters, DomainEvent, InvalidEvent, Retry

# RabbitMQ's own limit from 4.0 on; 3.10 is told to have it, too.
LIMIT = 16 * 2**20


@pytest.fixture
def limited(node_factory: Callable[..., Node], unique: str) -> Iterator[Bench]:
    """A bench on a broker that takes no larger body."""
    node = node_factory(config=f"max_message_size = {LIMIT}")
    node.start()
    bench = Bench(node.url, Names(node.url, unique))
    yield bench
    bench.publisher.close()


def event_of(size: int) -> DomainEvent:
    """An event whose body has so many bytes."""
    event = DomainEvent("large.one", "")
    data = "x" * (size - len(event.to_json()))
    return DomainEvent(event.routing_key, data, None, event.uuid_string, event.timestamp)


class Failing:
    """A handler that asks for one retry of each event, and then gives up."""

    def __init__(self) -> None:
        self.seen: Events = []

    def __call__(self, event: DomainEvent) -> None:
        self.seen.append(event)
        raise Retry(0.1)


def test_largest_body_is_handled_retried_kept_and_replayed_and_a_larger_one_refused(
    limited: Bench,
) -> None:
    """The larger one is an `InvalidEvent`; of those in flight beside it, none is lost."""
    queue = limited.names.queue()
    handler = Failing()
    largest, too_large = event_of(LIMIT), event_of(LIMIT + 1)
    subscriber = limited.subscriber()
    subscriber.register(handler, queue, ["large.#"], max_retries=1)
    onlooker.bind_queue(limited.url, f"{queue}-small", limited.exchange, "small.#")
    small = [DomainEvent("small.one", n) for n in range(300)]
    with consuming(subscriber, limited.url, queue):
        limited.publisher.publish(largest, timeout=30)
        wait_until(lambda: onlooker.count(limited.url, f"{queue}-dl") == 1)
        with DeadLetters(queue, limited.url) as dead_letters:
            (letter,) = dead_letters
            assert (letter.event, letter.retries) == (largest, 1)
            letter.replay()
        wait_until(lambda: onlooker.count(limited.url, f"{queue}-dl") == 1)
    assert [event.retries for event in handler.seen] == [0, 1, 0, 1]
    assert all(event == largest for event in handler.seen)

    # Some in one call with the culprit, and others from a thread of their own at the same time.
    others = threading.Thread(target=lambda: limited.publisher.publish_many(small[200:]))
    others.start()
    with pytest.raises(InvalidEvent, match="does not accept") as caught:
        limited.publisher.publish_many([*small[:100], too_large, *small[100:200]], timeout=30)
    others.join(30)
    assert not others.is_alive()
    assert caught.value.event is too_large
    assert list(caught.value.unconfirmed) == [too_large]
    stored = [
        DomainEvent.from_json(body).data
        for body in onlooker.take_all(limited.url, f"{queue}-small")
    ]
    assert set(range(100)) | set(range(200, 300)) <= set(stored)
    limited.publisher.publish(small[0])


@pytest.mark.parametrize("kibibytes", [100, 119, 125])
def test_headers_that_fill_a_frame_go_through_a_retry_and_a_dead_letter(
    bench: Bench, kibibytes: int
) -> None:
    """They are kept where they fit beside ours; otherwise left out, and the event is kept."""
    queue = bench.names.queue()
    handler = Failing()
    subscriber = bench.subscriber()
    subscriber.register(handler, queue, ["#"], max_retries=1)
    event = DomainEvent("a.b", {})
    headers = {b"baggage": raw.text(b"b" * (kibibytes * 1024))}
    with consuming(subscriber, bench.url, queue):
        with onlooker.channel(bench.url) as channel:
            channel.confirm_delivery()
            properties = raw.Properties(headers, delivery_mode=2, message_id=b"m" * 255)
            channel.basic_publish(bench.exchange, "a.b", event.to_json().encode(), properties)
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    assert [event.retries for event in handler.seen] == [0, 1]
    with DeadLetters(queue, bench.url) as dead_letters:
        (letter,) = dead_letters
        assert (letter.event, letter.retries) == (event, 1)
        assert letter.error_type == "domain_events.retry.Retry"
        letter.replay()
    received, _ = onlooker.take(bench.url, queue)
    baggage = (received.headers or {}).get("baggage")
    assert baggage == (None if kibibytes == 125 else "b" * kibibytes * 1024)


def test_longest_routing_key_and_names(bench: Bench) -> None:
    """255 bytes, among them characters of four bytes, through a retry and a dead letter."""
    queue = bench.names.queue()
    handler = Failing()
    subscriber = bench.subscriber()
    key = "user." + "\U0001f4a3" * 62 + "ab"
    assert len(key.encode()) == 255
    subscriber.register(handler, queue, [key], max_retries=1)
    with consuming(subscriber, bench.url, queue):
        event = bench.publish(key, {})
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    assert [each.retries for each in handler.seen] == [0, 1]
    with DeadLetters(queue, bench.url) as dead_letters:
        (letter,) = dead_letters
        assert (letter.routing_key, letter.event) == (key, event)


def test_a_thousand_binding_keys(bench: Bench) -> None:
    """Each one counts, and they may be registered once more."""
    queue = bench.names.queue()
    keys = [f"user.{n}.*" for n in range(1000)]
    seen: Events = []
    with bench.subscriber() as before:
        before.register(print, queue, keys)
    subscriber = bench.subscriber()
    subscriber.register(seen.append, queue, keys)
    with consuming(subscriber, bench.url, queue):
        for n in (0, 500, 999):
            bench.publish(f"user.{n}.registered", n)
        bench.publish("user.1000.registered", 1000)
        wait_until(lambda: len(seen) == 3)
    assert [event.data for event in seen] == [0, 500, 999]
