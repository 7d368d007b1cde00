"""The runner's own work on the broker: it declares queues, and fills them."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyamqp
from pyamqp import Channel

from benchmarks.peers.driver import EXCHANGE, ROUTING_KEY, data_of, envelope

# Suffixes of the queues that the clients declare beside a subscriber's queue.
_COMPANIONS = ("", "-dl", ".DQ", ".XQ", ".dlq", ".retry.1", "-delay-1000", "-delay-6000")

_FILL_SECONDS = 300.0
# Seconds after which an unchanged count is considered final.
_STALLED = 3.0
_PERSISTENT = pyamqp.Properties(content_type="application/json", delivery_mode=2)


class ConnectionFailed(Exception):
    """The broker has refused or closed the runner's own connection, or does not answer on it."""


@dataclass(frozen=True)
class Letter:
    """The events of a client: a template, and their destination.

    ``__N__`` in the template is an event's number, ``__ID__`` its id.
    """

    template: str
    exchange: str = EXCHANGE
    routing_keys: tuple[str, ...] = (ROUTING_KEY,)

    @classmethod
    def asked_for(cls, told: dict[str, Any], options: dict[str, Any]) -> Letter:
        """The feed that a driver requested in its ready report."""
        if "body" in told:
            return cls(told["body"], told["exchange"], (told["routing_key"],))
        spread = options.get("handlers") or options.get("bindings") or 0
        keys = tuple(f"bench.k{number}" for number in range(spread)) or (ROUTING_KEY,)
        return cls(event_template(), EXCHANGE, keys)

    def body(self, number: int) -> bytes:
        text = self.template.replace("__N__", str(number)).replace("__ID__", str(uuid.uuid4()))
        return text.encode()

    def routing_key(self, number: int) -> str:
        return self.routing_keys[number % len(self.routing_keys)]


def event_template() -> str:
    """The event of all scenarios as JSON, with its number and its id left open."""
    event = envelope(data_of(0))
    fields = (
        f'"routing_key": "{ROUTING_KEY}"',
        f'"data": {{"n": __N__, "text": "{event["data"]["text"]}"}}',
        f'"domain_object_id": "{event["domain_object_id"]}"',
        '"uuid_string": "__ID__"',
        f'"timestamp": {event["timestamp"]!r}',
    )
    return "{" + ", ".join(fields) + "}"


@contextlib.contextmanager
def channel(url: str) -> Iterator[Channel]:
    """A channel on its own connection.

    :raises ConnectionFailed: also within the block.
    """
    try:
        with pyamqp.Connection(url) as connection:
            yield connection.channel()
    except pyamqp.ERRORS as error:
        raise ConnectionFailed(f"the runner's own connection: {error!r}") from error


def declare(url: str, queue: str | None, queue_type: str) -> None:
    """The exchange, and a queue for every event unless the client declares its own."""
    with channel(url) as on:
        on.exchange_declare(EXCHANGE, "topic", durable=True)
        if queue is not None:
            on.queue_declare(queue, durable=True, arguments={"x-queue-type": queue_type})
            on.queue_bind(queue, EXCHANGE, "bench.*")


def delete(url: str, queue: str, handlers: int = 0) -> None:
    """Delete the queue and the related queues that clients declare."""
    with channel(url) as on:
        for name in [queue + each for each in _COMPANIONS]:
            on.queue_delete(name)
        for number in range(handlers):
            on.queue_delete(f"{queue}-{number}")


def fill(url: str, queues: list[str], letter: Letter, count: int, taken: int = 0) -> None:
    """Put ``count`` events into the queues, and wait until they are ready.

    :param taken: how many of them a consumer takes at once.
    """
    sent = _send(url, letter, range(count))
    deadline = time.monotonic() + _FILL_SECONDS
    before, changed_at = 0, time.monotonic()
    while True:
        with channel(url) as on:
            there = _ready(on, queues)
        if there >= count - taken:
            return
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(
                f"only {there} of {count} events in {queues[0]} after {_FILL_SECONDS:g} s"
            )
        if there != before:
            before, changed_at = there, now
        elif now - changed_at > _STALLED:
            # Published without confirms, for speed; the missing ones are published again.
            sent += _send(url, letter, range(sent, sent + count - taken - there))
            changed_at = now
        time.sleep(0.02)


def _send(url: str, letter: Letter, numbers: range) -> int:
    with channel(url) as on:
        for number in numbers:
            key = letter.routing_key(number)
            on.basic_publish(letter.exchange, key, letter.body(number), _PERSISTENT)
    return len(numbers)


def feed(url: str, letter: Letter, count: int, rate: float) -> None:
    """Publish ``count`` events at a steady rate, in events a second."""
    with channel(url) as on:
        begun = time.monotonic()
        for number in range(count):
            pause = begun + number / rate - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            key = letter.routing_key(number)
            on.basic_publish(letter.exchange, key, letter.body(number), _PERSISTENT)


def _ready(on: Channel, queues: Iterable[str]) -> int:
    return sum(on.queue_declare(queue, passive=True).messages for queue in queues)
