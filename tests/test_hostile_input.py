"""Whatever arrives, a subscriber goes on, handlers see events only, and nothing is lost."""

from __future__ import annotations

import gc
import json
import logging
import math
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import hostile
import impostor
import onlooker
import pika
import pytest
import raw_amqp as raw
from bench import Bench, Events
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live import consuming
from pika import frame
from pika.spec import Basic
from support import wait_until

from domain_events import (
    BrokerUnavailable,
    DeadLetters,
    DomainEvent,
    Publisher,
    Reject,
    Retry,
)

# In large batches, since each waits for the retries of its own.
BATCHES = 10
BATCH = 1000

# Headers with which pika can read no frame, or which it could not write again.
UNREADABLE = {
    "a timestamp in milliseconds": raw.number(b"T", 1_700_000_000_000),
    "the last timestamp": raw.number(b"T", 2**64 - 1),
    "nested too deep for pika": raw.nested(10_000),
    "nested too deep to be copied": raw.nested(800),
}
READABLE = {
    "a float": raw.number(b"d", 1.5),
    "no value": raw.VOID,
    "a decimal": raw.decimal(255, 2**32 - 1),
    "bytes": raw.text(b"\xff\xfe", b"x"),
    "text that is not UTF-8": raw.text(b"\xff\xfe"),
    "a large number": raw.number(b"l", 2**63 - 1),
    "tables in arrays": raw.array([raw.table({b"\xff": raw.array([raw.VOID])})] * 20),
}


# Whether pika reads a double as a float, which is not a count: from 1.5 on. Before, as an int.
READS_DOUBLES = isinstance(pika.data.decode_value(raw.number(b"d", 1.5).encoded(), 0)[0], float)
# Whether it reads the sign of a 64-bit integer: pika 1.3.2 does not (pika/data.py, decode_value).
READS_SIGN = pika.data.decode_value(raw.number(b"l", -1).encoded(), 0)[0] == -1


def publish(bench: Bench, *messages: hostile.Hostile, queue: str = "") -> None:
    """As any other program might; returns when the broker has them.

    :param queue: publish to this queue, and not to the exchange.
    """
    with onlooker.channel(bench.url) as channel:
        channel.confirm_delivery()
        for each in messages:
            channel.basic_publish(
                "" if queue else bench.exchange,
                queue or each.routing_key,
                each.body,
                each.properties,
                mandatory=True,
            )


def event_with(headers: dict[bytes, raw.Value], data: object = None) -> hostile.Hostile:
    """An event that is as it should be, but for its headers."""
    body = DomainEvent("user.registered", data).to_json().encode()
    return hostile.Hostile(body, b"user.registered", raw.Properties(headers), "handled")


@pytest.mark.parametrize("header", [*UNREADABLE, *READABLE])
def test_event_with_strange_headers_is_handled_retried_kept_and_replayed(
    bench: Bench, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The body stays what it was; the connection, too."""
    queue = bench.names.queue()
    value = (UNREADABLE | READABLE)[header]
    seen: Events = []

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        raise Retry(0.1)

    subscriber = bench.subscriber()
    subscriber.register(handle, queue, ["#"], max_retries=1)
    message = event_with({b"strange": value, b"domain-events-cause": value})
    with consuming(subscriber, bench.url, queue):
        publish(bench, message)
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
        with DeadLetters(queue, bench.url) as dead_letters:
            (letter,) = dead_letters
            assert (letter.body, letter.retries) == (message.body, 1)
            assert letter.error_type == "domain_events.retry.Retry"
            letter.replay()
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    assert [event.retries for event in seen] == [0, 1, 0, 1]
    assert {event.to_json().encode() for event in seen} == {message.body}
    assert "Lost the" not in caplog.text
    assert "Internal error" not in caplog.text


@pytest.mark.parametrize(
    ("value", "retries"),
    [
        (raw.number(b"t", True), 0),
        (raw.number(b"l", -(2**63)), 0 if READS_SIGN else 2**31 - 1),
        (raw.number(b"d", 1.5), 0 if READS_DOUBLES else 1),
        (raw.text("1"), 0),
        (raw.number(b"I", 2), 2),
        (raw.number(b"l", 2**63 - 1), 2**31 - 1),
        (raw.number(b"d", 1e30), 0 if READS_DOUBLES else 2**31 - 1),
    ],
)
@pytest.mark.parametrize("through", ["the exchange", "the default exchange"])
def test_forged_retry_count_is_a_number_or_none_at_all(
    bench: Bench, value: raw.Value, retries: int, through: str
) -> None:
    """Never negative, not a bool, and no retry more than allowed; from a publisher, nothing."""
    queue = bench.names.queue()
    seen: Events = []

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        raise Retry(0.1)

    subscriber = bench.subscriber()
    subscriber.register(handle, queue, ["#"], max_retries=2)
    with consuming(subscriber, bench.url, queue):
        event = event_with({b"domain-events-retries": value})
        if through == "the exchange":
            publish(bench, event)
            retries = 0
        else:
            publish(bench, event, queue=queue)
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    counts = [event.retries for event in seen]
    assert counts == list(range(retries, 3)) or counts == [retries]
    assert {type(count) for count in counts} == {int}


@pytest.fixture
def no_collection() -> Iterator[None]:
    """No finalizer of what other tests left runs at the limit of recursion, and fails there."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("ordered", [False, True])
def test_object_id_that_cannot_be_named_stops_nobody(bench: Bench, ordered: bool) -> None:
    """Nested as deep as JSON may be."""
    queue = bench.names.queue()
    seen: Events = []
    subscriber = bench.subscriber(workers=4)
    subscriber.register(seen.append, queue, ["#"], ordered=ordered)
    with consuming(subscriber, bench.url, queue):
        for depth in (10, 200, 400, 600, 800, 900, 950, 1000, 100_000):
            about = "[" * depth + "]" * depth
            body = f'{{"routing_key": "a.b", "data": {depth}, "domain_object_id": {about}}}'
            properties = raw.Properties(message_id=b"1")
            publish(bench, hostile.Hostile(body.encode(), b"a.b", properties, "any"))
        bench.publish("a.b", "good", "x")
        wait_until(lambda: len(seen) + onlooker.count(bench.url, f"{queue}-dl") == 10)
    assert any(event.data == "good" for event in seen)


def test_routing_key_that_is_not_utf8(bench: Bench) -> None:
    """It is handled as others are, and shown with its bytes escaped."""
    queue = bench.names.queue()
    seen: Events = []

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        raise Reject("told so")

    subscriber = bench.subscriber()
    subscriber.register(handle, queue, ["user.#"])
    message = event_with({})._replace(routing_key=b"user.\xe9")
    with consuming(subscriber, bench.url, queue):
        publish(bench, message)
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    with DeadLetters(queue, bench.url) as dead_letters:
        (letter,) = dead_letters
        assert (letter.routing_key, letter.body) == ("user.\\xe9", message.body)


def test_sender_cannot_write_lines_into_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor very long ones: its words are shown on one line, cut and escaped."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        raise Reject("told so")

    subscriber.register(handle, queue, ["#"])
    forged = "\n2026-01-01 CRITICAL forged\x1b[2J"
    envelope = {"routing_key": forged, "data": {}, "uuid_string": forged + "u" * 100_000}
    message = hostile.Hostile(
        json.dumps(envelope).encode(), forged.encode(), raw.Properties(), "dead"
    )
    with consuming(subscriber, bench.url, queue):
        publish(bench, message)
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    lines = [record.getMessage() for record in caplog.records if record.name == "domain_events"]
    assert any("told so" in line for line in lines)
    for line in lines:
        assert line.isprintable()
        assert len(line) < 2000


# --- a broker that is none -----------------------------------------------------------------------


def silence(_connection: socket.socket) -> None:
    """It accepts, and that is all."""


def drip(connection: socket.socket) -> None:
    """The frame that it began is never complete."""
    connection.sendall(struct.pack(">BHI", 1, 0, 100_000))
    while True:
        connection.sendall(b"x")
        time.sleep(0.02)


def flood(connection: socket.socket) -> None:
    """Heartbeats without end, and never a welcome."""
    beats = frame.Heartbeat().marshal() * 1000
    while True:
        connection.sendall(beats)


def giant(connection: socket.socket) -> None:
    """A frame of 4 GiB."""
    connection.sendall(struct.pack(">BHI", 1, 0, 2**32 - 1) + bytes(100_000))


def web(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 \x1b[2J Bad Request\r\n\r\n")


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (silence, "imeout"),
        (drip, "imeout"),
        (flood, "imeout"),
        (giant, "a frame of 4,294,967,303 bytes, the most is 131,072"),
        (web, "does not use AMQP 0-9-1; it sent 'HTTP/1.1 400"),
    ],
)
def test_listener_that_never_welcomes_is_left_within_the_time_for_connecting(
    behaviour: impostor.Behaviour, words: str
) -> None:
    """And tried again: another may listen there by then. The error says what it did."""
    with (
        impostor.Impostor(behaviour) as broker,
        Publisher(broker.url("?stack_timeout=0.5"), timeout=2) as publisher,
    ):

        def left_and_tried_again() -> bool:
            with pytest.raises(BrokerUnavailable) as caught:
                publisher.publish(DomainEvent("a.b", {}))
            assert str(caught.value).isprintable()
            return words in str(caught.value) and broker.accepted > 1

        wait_until(left_and_tried_again)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (struct.pack(">BHI", 1, 1, 2**31), "a frame of 2,147,483,656 bytes"),
        (
            impostor.method(1, Basic.GetOk(1, False, "x", "a.b", 0))
            + frame.Header(1, 2**63, pika.BasicProperties()).marshal(),
            "a body of 9,223,372,036,854,775,808 bytes",
        ),
        (impostor.method(1, Basic.GetOk(1, False, "x", "a.b", 0))[:-1] + b"\0", "without its end"),
    ],
    ids=["frame", "body", "end"],
)
def test_broker_that_announces_too_much_loses_its_connection_at_once(
    answer: bytes, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After the login, here to somebody who looks at dead letters."""

    def behave(connection: socket.socket) -> None:
        impostor.converse(connection, Basic.Get, answer)

    with (
        impostor.Impostor(behave) as broker,
        DeadLetters("nobody", broker.url(), timeout=5) as dead_letters,
    ):
        with pytest.raises(BrokerUnavailable):
            next(iter(dead_letters))
        wait_until(lambda: words in caplog.text)
        assert "Lost the dead letters consuming connection" in caplog.text


# --- ten thousand of them ------------------------------------------------------------------------


def name(batch: int, at: int) -> str:
    """An id that no other becomes when some of its bytes are changed."""
    return str(uuid5(NAMESPACE_OID, f"{batch}-{at}"))


class Target:
    """A live subscriber under fire, and the books: what came, and what became of it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.queue = bench.names.queue()
        self.handled: Counter[str] = Counter()
        self.nonsense: list[DomainEvent] = []
        self.threads: set[int] = set()
        self.dead: Counter[bytes] = Counter()
        self.finished = 0  # calls of the handler that returned
        self.subscriber = bench.subscriber()
        self.subscriber.register(self.handle, self.queue, ["#"], max_retries=2)

    def handle(self, event: DomainEvent) -> None:
        self.threads.add(threading.get_ident())
        if not is_sound(event):
            self.nonsense.append(event)
        answer = event.data.get("answer") if isinstance(event.data, dict) else None
        if answer == "retry":
            raise Retry(0.1)
        if answer == "reject":
            raise Reject("no")
        self.handled[event.uuid_string] += 1
        self.finished += 1

    def fire(self, numbers: Iterable[int], batch: int) -> None:
        """Publish the messages of these numbers, and see what becomes of each."""
        messages = [hostile.message(n, name(batch, at)) for at, n in enumerate(numbers)]
        before = self.finished
        with onlooker.channel(self.bench.url) as channel:
            for each in messages:
                channel.basic_publish(
                    self.bench.exchange,
                    each.routing_key,
                    each.body,
                    each.properties,
                )
            dead: Counter[bytes] = Counter()
            deadline = time.monotonic() + 60
            # Without acks: a quorum queue forgets those it keeps back when the channel is closed.
            for received in channel.consume(f"{self.queue}-dl", inactivity_timeout=0.05):
                if received is not None:
                    dead[received.body] += 1
                if self.finished - before + dead.total() >= len(messages):
                    break
                assert time.monotonic() < deadline, self.missing(messages, batch, dead)
        self.check(messages, batch, dead)

    def check(self, messages: list[hostile.Hostile], batch: int, dead: Counter[bytes]) -> None:
        sent = Counter(each.body for each in messages)
        assert dead <= sent  # byte for byte
        for at, each in enumerate(messages):
            if each.fate == "handled":
                assert self.handled[name(batch, at)] == 1
            elif each.fate == "dead":
                assert dead[each.body] == sent[each.body], each
        self.dead += dead

    def missing(
        self, messages: list[hostile.Hostile], batch: int, dead: Counter[bytes]
    ) -> list[hostile.Hostile]:
        return [
            each
            for at, each in enumerate(messages)
            if not self.handled[name(batch, at)] and each.body not in dead
        ]


def is_sound(event: DomainEvent) -> bool:
    """Whether each field is what a handler may count on."""
    return (
        isinstance(event.routing_key, str)
        and isinstance(event.uuid_string, str)
        and event.uuid_string != ""
        and type(event.timestamp) in {int, float}
        and math.isfinite(event.timestamp)
        and type(event.retries) is int
        and event.retries >= 0
    )


@pytest.fixture
def surprises() -> Iterator[list[str]]:
    """Log lines that are about no message, but about the subscriber itself."""
    log = logging.getLogger("domain_events")
    lines: list[str] = []
    expected = (
        "got a message",
        "failed on",
        "rejected",
        "gave up on",
        "tries",
        "A message",
        "envelope",
    )

    def keep(record: logging.LogRecord) -> bool:
        if not any(words in record.msg for words in expected):
            lines.append(record.getMessage())
        return False

    log.addFilter(keep)
    yield lines
    log.removeFilter(keep)


def test_ten_thousand_hostile_messages_stop_no_subscriber(
    bench: Bench, surprises: list[str]
) -> None:
    """Good ones among them are handled once; bad ones are dead letters, byte for byte."""
    target = Target(bench)
    batches = 0

    @settings(
        max_examples=BATCHES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64))
    def fire(first: int) -> None:
        nonlocal batches
        batches += 1
        target.fire(range(first, first + BATCH), batches)

    with consuming(target.subscriber, bench.url, target.queue):
        fire()
        assert batches >= BATCHES
        assert target.finished + target.dead.total() == batches * BATCH
        browse_and_replay(target)
    assert not target.nonsense
    assert len(target.threads) == 1
    assert not surprises


def browse_and_replay(target: Target) -> None:
    """The dead letters of one more batch: each is shown, replayed, and fails once more."""
    messages = [hostile.message(number, f"last-{number}") for number in range(BATCH)]
    messages = [each for each in messages if each.fate == "dead"]
    publish(target.bench, *messages)
    sent = Counter(each.body for each in messages)
    queue = target.queue

    def all_dead() -> bool:
        return onlooker.count(target.bench.url, f"{queue}-dl") == len(messages)

    wait_until(all_dead)
    with DeadLetters(queue, target.bench.url) as dead_letters:
        letters = list(dead_letters)
        assert Counter(letter.body for letter in letters) == sent
        assert all(described(letter) for letter in letters)
        assert dead_letters.replay_all() == len(messages)
    wait_until(all_dead)
    assert Counter(onlooker.take_all(target.bench.url, f"{queue}-dl")) == sent


def described(letter: Any) -> bool:
    return bool(letter.subscriber and letter.error_type and letter.failed_at and repr(letter))
