"""The cost of one event, step by step: each repeated many times, without a broker or threads.

It uses real objects of this library and of pika. The sum is less than the time of an event in a
run: it does not include system calls, thread switches and cold caches.
"""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable

import pika
from pika import frame, spec

from benchmarks.peers.driver import ROUTING_KEY, data_of
from domain_events import DomainEvent, Subscriber
from domain_events import message as messages
from domain_events.broker import Settlement
from domain_events.broker.rabbitmq.envelope import RabbitDelivery, properties
from domain_events.broker.rabbitmq.wire import Reader, ReceivedProperties, Writer
from domain_events.message import Delivery

_TIMES = 5_000
_REPEATS = 7

#: A step, and its microseconds.
Piece = tuple[str, float]


def publishing() -> list[Piece]:
    """From the call to the confirm."""
    event = DomainEvent(ROUTING_KEY, data_of(1), "user-4711")
    message = messages.from_event(event, "domain-events", "bench", mandatory=False)
    writer, reader = Writer(1), Reader(lambda _data: None)
    reader.confirmed[1] = lambda *_: None
    confirm = frame.Method(1, spec.Basic.Ack(1, False)).marshal()

    to_json = _microseconds(event.to_json)
    to_message = _microseconds(
        lambda: messages.from_event(event, "domain-events", "bench", mandatory=False)
    )
    return [
        (
            "the event, with its id",
            _microseconds(lambda: DomainEvent(ROUTING_KEY, {}, "user-4711")),
        ),
        ("its JSON", to_json),
        ("the message around it", to_message - to_json),
        ("three frames written", _microseconds(lambda: writer.frames(message))),
        ("a confirm read", _microseconds(lambda: reader.feed(confirm))),
    ]


def consuming() -> list[Piece]:
    """From the bytes to the ack."""
    event = DomainEvent(ROUTING_KEY, data_of(1), "user-4711")
    message = messages.from_event(event, "domain-events", "bench", mandatory=False)
    deliver = spec.Basic.Deliver("ctag1.0123456789abcdef", 1, False, "domain-events", ROUTING_KEY)
    sent = properties(message)
    data = b"".join(
        (
            frame.Method(1, deliver).marshal(),
            frame.Header(1, len(message.body), sent).marshal(),
            frame.Body(1, message.body).marshal(),
        )
    )
    reader = Reader(lambda _data: None)
    reader.delivered[1] = lambda *_: None
    received = ReceivedProperties(b"".join(sent.encode()))
    delivery = RabbitDelivery("domain-events", ROUTING_KEY, False, received, message.body, (1, 1))
    subscriber = Subscriber("memory://")
    subscriber.register(lambda _event: None, "pieces", ["bench.*"])
    [subscription] = subscriber.subscriptions
    consumer = _Consumer()
    from_json = _microseconds(lambda: json.loads(message.body))
    to_event = _microseconds(lambda: messages.to_event(delivery))
    handle = _microseconds(lambda: subscription.handle(delivery, consumer))
    subscriber.close()
    return [
        ("three frames read", _microseconds(lambda: reader.feed(data))),
        ("the JSON", from_json),
        ("the event out of it", to_event - from_json),
        ("an empty handler, called and settled", handle - to_event),
    ]


def pika_s_frames() -> list[Piece]:
    """The same frames by pika alone, for comparison."""
    event = DomainEvent(ROUTING_KEY, data_of(1), "user-4711")
    message = messages.from_event(event, "domain-events", "bench", mandatory=False)
    deliver = spec.Basic.Deliver("ctag1.0123456789abcdef", 1, False, "domain-events", ROUTING_KEY)

    def write(method: pika.amqp_object.Method) -> list[bytes]:
        return [
            frame.Method(1, method).marshal(),
            frame.Header(1, len(message.body), properties(message)).marshal(),
            frame.Body(1, message.body).marshal(),
        ]

    def publish() -> None:
        write(spec.Basic.Publish(exchange="domain-events", routing_key=ROUTING_KEY))

    read = write(deliver)
    return [
        ("three frames written", _microseconds(publish)),
        ("three frames read", _microseconds(lambda: [frame.decode_frame(each) for each in read])),
    ]


class _Consumer:
    """One that only counts."""

    consuming_since = None
    unsettled = 0

    def __init__(self) -> None:
        self.settled = 0

    def is_current(self, _delivery: Delivery) -> bool:
        return True

    def settle(self, _delivery: Delivery, _how: Settlement = Settlement.DONE) -> None:
        self.settled += 1

    def flush(self) -> None:
        pass

    def repair(self, seconds: float, then: Callable[[bool], None], *, delays: bool = False) -> None:
        pass

    def stop(self, _timeout: float) -> None:
        pass


def _microseconds(step: Callable[[], object]) -> float:
    """The best of several measurements: disturbances only make it longer."""
    return min(timeit.repeat(step, number=_TIMES, repeat=_REPEATS)) / _TIMES * 1e6


def show() -> None:
    for title, pieces in (("Publishing", publishing()), ("Consuming", consuming())):
        print(f"{title}, us per event")
        for name, microseconds in (*pieces, ("sum", sum(each for _, each in pieces))):
            print(f"  {name:40}{microseconds:6.1f}")
    print("For comparison, pika's own, us per event")
    for name, microseconds in pika_s_frames():
        print(f"  {name:40}{microseconds:6.1f}")
