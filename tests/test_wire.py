"""The frames that are written and read without pika: domain_events/broker/rabbitmq/wire.py.

pika's own writing and reading is what they are held against. On a broker, see all tests that
publish and subscribe, and `test_hostile_input`.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pika
import pytest
import raw_amqp as raw
from deliveries import delivery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pika import frame
from pika.spec import Basic, Channel, Queue

from domain_events import message as messages
from domain_events.broker.rabbitmq.envelope import properties
from domain_events.broker.rabbitmq.topology import address
from domain_events.broker.rabbitmq.wire import (
    LARGEST_BODY,
    LARGEST_FRAME,
    Reader,
    ReceivedProperties,
    UnreadableStream,
    Writer,
    text,
)
from domain_events.events import DomainEvent
from domain_events.message import Later, Message, ToDeadLetters, ToExchange, ToSubscriber

# Machines that are shared are slow at times.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CHANNEL = 7
# Deeper than pika can follow; a timestamp in milliseconds it can read from 1.5 on.
UNREADABLE = {b"nested": raw.nested(10_000)}

short_texts = st.text(max_size=60)


def published_by_pika(message: Message) -> bytes:
    """The frames of a message that fits one of each kind."""
    exchange, routing_key = address(message.destination, message.routing_key)
    publish = Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=message.mandatory)
    header = frame.Header(CHANNEL, len(message.body), properties(message))
    body = frame.Body(CHANNEL, message.body)
    return bytes(frame.Method(CHANNEL, publish).marshal() + header.marshal() + body.marshal())


def an_event() -> Message:
    event = DomainEvent("a.b", {"n": 1}, "user-1", "id-1", 1.5)
    return messages.from_event(event, "domain-events", "tests", mandatory=False)


# --- writing -------------------------------------------------------------------------------------


@patient
@given(
    st.builds(
        Message,
        destination=st.builds(ToExchange, short_texts),
        routing_key=short_texts,
        body=st.binary(min_size=1, max_size=4000),
        correlation_id=short_texts,
        message_id=short_texts,
        timestamp=st.integers(0, 2**63 - 1),
        app_id=short_texts,
        mandatory=st.booleans(),
        cause=st.none() | short_texts,
        headers=st.none() | st.dictionaries(short_texts, st.text(max_size=50), max_size=3),
    )
)
def test_event_is_written_as_pika_writes_it(message: Message) -> None:
    """Byte for byte; the second time, too, when its address is known."""
    writer = Writer(CHANNEL)
    assert writer.frames(message) == published_by_pika(message)
    assert writer.frames(message) == published_by_pika(message)


def test_events_of_many_addresses_are_not_mixed_up() -> None:
    """More of them than are remembered, each in turn with others' properties."""
    writer = Writer(CHANNEL)
    for n in [*range(1500), *range(1500)]:
        event = DomainEvent(f"user.{n}", {"n": n}, n, f"id-{n}", float(n))
        message = messages.from_event(event, f"exchange-{n % 3}", f"app-{n % 2}", n % 5 == 0)
        if n % 7 == 0:
            message.correlation_id = f"correlation-{n}"
        assert writer.frames(message) == published_by_pika(message)


@pytest.mark.parametrize(
    "change",
    [
        {"retries": 1},
        {"version": 2},
        {"headers": {"number": 1}},
        {"headers": {"long": "a" * 2000}},
        {"source": delivery()},
        {"destination": ToSubscriber("q")},
        {"destination": ToDeadLetters("q")},
        {"destination": Later("domain-events", "q", 1.0)},
        {"body": b""},
        {"body": bytes(4001)},
        {"timestamp": None},
        {"message_id": None},
        {"correlation_id": None},
        {"app_id": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_plain_is_left_to_pika(change: dict[str, Any]) -> None:
    """Also behind one of the same address that was plain."""
    writer = Writer(CHANNEL)
    assert writer.frames(an_event()) is not None
    message = an_event()
    vars(message).update(change)
    assert writer.frames(message) is None


@pytest.mark.parametrize(
    "field", ["destination", "routing_key", "app_id", "message_id", "correlation_id"]
)
def test_text_that_amqp_cannot_carry_is_refused(field: str) -> None:
    """It would shift all that stands behind it."""
    message = an_event()
    text = "é" * 128
    setattr(message, field, ToExchange(text) if field == "destination" else text)
    with pytest.raises(ValueError, match="256 bytes"):
        Writer(CHANNEL).frames(message)


# --- reading -------------------------------------------------------------------------------------


class Ear:
    """What a reader says, in its order."""

    def __init__(self, *listening: int) -> None:
        self.heard: list[Any] = []
        self.reader = Reader(self._others)
        for channel in listening:
            self.reader.delivered[channel] = self._at(channel, "delivered")
            self.reader.confirmed[channel] = self._at(channel, "confirmed")

    def _at(self, channel: int, what: str) -> Callable[..., None]:
        def hear(*arguments: Any) -> None:
            told = [
                {name: value for name, value in vars(each).items() if name[0] != "_"}
                if isinstance(each, ReceivedProperties) and each.message_id != ()
                else each
                for each in arguments
            ]
            self.heard.append((what, channel, *told))

        return hear

    def _others(self, data: bytes) -> None:
        assert data
        if self.heard and isinstance(self.heard[-1], bytes):
            self.heard[-1] += data
        else:
            self.heard.append(data)


def delivery_frames(
    channel: int, sent: pika.BasicProperties, body: bytes, tag: int = 1, most: int = 100
) -> bytes:
    """What a broker sends, with at most so many bytes of the body in a frame."""
    method = Basic.Deliver("ctag", tag, tag % 2 == 0, "domain-events", "a.ü")
    frames = [frame.Method(channel, method), frame.Header(channel, len(body), sent)]
    frames += [frame.Body(channel, body[at : at + most]) for at in range(0, len(body), most)]
    return b"".join(each.marshal() for each in frames)


received = st.builds(
    pika.BasicProperties,
    content_type=st.none() | short_texts,
    content_encoding=st.none() | short_texts,
    headers=st.none()
    | st.dictionaries(st.text(min_size=1, max_size=20), st.integers(0, 9) | short_texts),
    delivery_mode=st.none() | st.just(2),
    correlation_id=st.none() | short_texts,
    message_id=st.none() | short_texts,
    timestamp=st.none() | st.integers(0, 2**63),
    app_id=st.none() | short_texts,
)
channels = st.sampled_from([1, 2])  # on 1 somebody listens


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[bytes, Any]]:
    """Pieces of what a broker sends, and what is to be heard of each."""
    pieces: list[tuple[bytes, Any]] = []
    for tag in range(draw(st.integers(0, 12))):
        channel = draw(channels)
        kind = draw(st.sampled_from(["delivery", "delivery", "ack", "nack", "method", "beat"]))
        heard: Any = None
        if kind == "delivery":
            sent, body = draw(received), b"x" * draw(st.sampled_from([0, 1, 100, 101, 250]))
            data = delivery_frames(channel, sent, body, tag)
            if channel == 1:
                heard = ("domain-events", "a.ü", tag % 2 == 0, tag, vars(sent), body)
                heard = ("delivered", 1, *heard)
        elif kind in ("ack", "nack"):
            multiple = draw(st.booleans())
            confirm = Basic.Ack if kind == "ack" else Basic.Nack
            data = frame.Method(channel, confirm(tag, multiple)).marshal()
            if channel == 1:
                heard = ("confirmed", 1, tag, multiple, kind == "ack")
        elif kind == "method":
            data = frame.Method(channel, Queue.DeclareOk("q", 1, 2)).marshal()
        else:
            data = frame.Heartbeat().marshal()
        pieces.append((data, heard or data))
    return pieces


@patient
@given(conversations(), st.data())
def test_deliveries_and_confirms_are_heard_and_all_else_is_passed_on(
    conversation: list[tuple[bytes, Any]], data: st.DataObject
) -> None:
    """In their order, however the bytes are cut into pieces."""
    sent = b"".join(piece for piece, _ in conversation)
    ear = Ear(1)
    own = at = 0
    while at < len(sent):
        step = data.draw(st.integers(1, max(1, len(sent) - at)))
        own += ear.reader.feed(sent[at : at + step])
        at += step
    expected = Ear()
    for _, heard in conversation:
        if isinstance(heard, bytes):
            expected._others(heard)
        else:
            expected.heard.append(heard)
    assert ear.heard == expected.heard
    assert own + sum(len(each) for each in ear.heard if isinstance(each, bytes)) == len(sent)


def test_delivery_is_told_before_what_comes_behind_it_is_there() -> None:
    """It may be the last for hours."""
    ear = Ear(1)
    data = delivery_frames(1, pika.BasicProperties(), b"body")
    ear.reader.feed(data[:-1])
    assert ear.heard == []
    ear.reader.feed(data[-1:])
    assert len(ear.heard) == 1


def test_frames_of_another_channel_may_come_between_those_of_a_delivery() -> None:
    """RabbitMQ never does so, but may."""
    ear = Ear(1)
    sent = pika.BasicProperties(message_id="m")
    frames = []
    data = delivery_frames(1, sent, b"body", most=2)
    while data:
        used, _ = frame.decode_frame(data)
        frames.append(data[:used])
        data = data[used:]
    assert len(frames) == 4
    between = frame.Method(2, Queue.DeclareOk("q", 1, 2)).marshal()
    own = ear.reader.feed(between.join(frames))
    heard = ("delivered", 1, "domain-events", "a.ü", False, 1, vars(sent), b"body")
    assert ear.heard == [between * 3, heard]
    assert own == sum(len(each) for each in frames)


def test_delivery_that_was_broken_off_is_forgotten() -> None:
    """Its channel was closed in the middle, and another one has its number now."""
    ear = Ear(1)
    cut = delivery_frames(1, pika.BasicProperties(), b"the first body", most=4)[:-30]
    opened = frame.Method(1, Channel.OpenOk()).marshal()
    sent = pika.BasicProperties(message_id="m")
    ear.reader.feed(cut[: frame.decode_frame(cut)[0]] + opened)
    ear.reader.feed(delivery_frames(1, sent, b"the second", most=4))
    heard = ("delivered", 1, "domain-events", "a.ü", False, 1, vars(sent), b"the second")
    assert ear.heard == [opened, heard]


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", r"not use AMQP 0-9-1; it sent 'HTTP/1.1 400 Bad"),
        (b"AMQP\x00\x00\x09\x01", r"not use AMQP 0-9-1; it sent 'AMQP\\x00"),
        (b"\x15\x03\x01\x00\x02\x02\x0a", "amqps://"),
        (b"\x00" * 9, r"not use AMQP 0-9-1; it sent '\\x00"),
    ],
)
@pytest.mark.parametrize("beats", [0, 3])
def test_what_is_not_amqp_ends_the_connection(hello: bytes, words: str, beats: int) -> None:
    """With its beginning, at once; what stood before it is passed on."""
    beat = frame.Heartbeat().marshal()
    ear = Ear(1)
    for byte in beat * beats:
        ear.reader.feed(bytes([byte]))
    with pytest.raises(UnreadableStream, match=words) as caught:
        ear.reader.feed(hello)
    assert b"".join(ear.heard) == beat * beats
    assert str(caught.value).isprintable()
    with pytest.raises(UnreadableStream):
        Ear(1).reader.feed(hello[:1])


@pytest.mark.parametrize("listening", [(1,), ()])
@pytest.mark.parametrize("number", range(3))
def test_frame_without_its_end_ends_the_connection(number: int, listening: tuple[int, ...]) -> None:
    """Of a delivery its method, its header or its body; whoever reads it."""
    data, ends = delivery_frames(1, pika.BasicProperties(), b"body"), list[int]()
    while len(ends) < 3:
        at = ends[-1] + 1 if ends else 0
        ends.append(at + frame.decode_frame(data[at:])[0] - 1)
    ear = Ear(*listening)
    with pytest.raises(UnreadableStream, match="without its end"):
        ear.reader.feed(data[: ends[number]] + b"\0" + data[ends[number] + 1 :])
    assert not any(isinstance(heard, tuple) for heard in ear.heard)


@pytest.mark.parametrize("most", [2, 100])
def test_body_longer_than_announced_ends_the_connection(most: int) -> None:
    """As with pika: nobody knows what belongs to what then."""
    data = delivery_frames(1, pika.BasicProperties(), b"body", most=most)
    announced = (4).to_bytes(8, "big")
    assert data.count(announced) == 1
    ear = Ear(1)
    with pytest.raises(UnreadableStream, match="longer body"):
        ear.reader.feed(data.replace(announced, (3).to_bytes(8, "big")))
    assert ear.heard == []


@pytest.mark.parametrize("cut", range(4))
def test_delivery_that_is_cut_short_inside_its_frames_ends_the_connection(cut: int) -> None:
    """Its frames are whole, and too short for what must be in them."""
    deliver = frame.Method(1, Basic.Deliver("c", 1, False, "x", "a.b")).marshal()[7:-1]
    header = frame.Header(1, 4, pika.BasicProperties()).marshal()[7:-1]
    methods = [deliver[:5], deliver[:12], deliver, deliver]
    headers = [header, header, header[:3], header[:11]]
    data = b"".join(
        struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"
        for kind, payload in ((1, methods[cut]), (2, headers[cut]), (3, b"body"))
    )
    ear = Ear(1)
    with pytest.raises(UnreadableStream):
        ear.reader.feed(data + frame.Heartbeat().marshal() * 9)
    assert not any(isinstance(heard, tuple) for heard in ear.heard)


# --- what others decide --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [1, 2, 3, 8])
@pytest.mark.parametrize("most", [4096, LARGEST_FRAME])
def test_frame_above_the_maximum_ends_the_connection_at_its_head(kind: int, most: int) -> None:
    """Before any of it is awaited; one of just the maximum is taken."""
    ear = Ear()
    ear.reader.largest_frame = most
    exact = struct.pack(">BHI", 3, 5, most - 8) + bytes(most - 8) + b"\xce"
    ear.reader.feed(exact)
    assert ear.heard == [exact]
    added = 64 * 1024 if kind == 2 else 0  # by the broker, to a publisher's headers
    for size in (most - 7 + added, 2**32 - 1):
        with pytest.raises(UnreadableStream, match=f"the most is {most:,}"):
            ear.reader.feed(struct.pack(">BHIB", kind, 5, size, 0))


def test_frame_above_the_maximum_behind_a_delivery_ends_the_connection() -> None:
    """Also where the header and the body of a delivery are looked for."""
    frames = delivery_frames(1, pika.BasicProperties(), b"body")
    method = frame.decode_frame(frames)[0]
    header = method + frame.decode_frame(frames[method:])[0]
    announced = frames.replace((4).to_bytes(8, "big"), (2**20).to_bytes(8, "big"))
    for begin, kind in ((frames[:method], 2), (frames[:header], 3), (announced[:header], 3)):
        ear = Ear(1)
        with pytest.raises(UnreadableStream, match="a frame of"):
            ear.reader.feed(begin + struct.pack(">BHI", kind, 1, 2**20) + bytes(20))


@pytest.mark.parametrize("listening", [(1,), ()])
@pytest.mark.parametrize("length", [LARGEST_BODY + 1, 2**63, 2**64 - 1])
def test_body_above_the_limit_ends_the_connection_when_it_is_announced(
    length: int, listening: tuple[int, ...]
) -> None:
    """Whoever reads it; one of just the limit is awaited."""
    frames = delivery_frames(1, pika.BasicProperties(), b"body", most=3)
    announced = (4).to_bytes(8, "big")
    Ear(*listening).reader.feed(frames.replace(announced, LARGEST_BODY.to_bytes(8, "big")))
    with pytest.raises(UnreadableStream, match=f"the most is {LARGEST_BODY:,}"):
        Ear(*listening).reader.feed(frames.replace(announced, length.to_bytes(8, "big")))


def seconds_to_read(data: bytes, step: int, *listening: int) -> float:
    """CPU time of this thread."""
    ear = Ear(*listening)
    ear.reader._others = lambda _data: None
    ear.reader.largest_frame = len(data)
    begun = time.thread_time()
    for at in range(0, len(data), step):
        ear.reader.feed(data[at : at + step])
    return time.thread_time() - begun


@pytest.mark.parametrize("listening", [(1,), ()])
def test_reading_takes_time_in_proportion_to_the_bytes(listening: tuple[int, ...]) -> None:
    """However large the frames, and however small the pieces: a large one costs no more."""
    size = 4_000_000
    frames = delivery_frames(1, pika.BasicProperties(), bytes(size), most=1000)
    small = seconds_to_read(frames, 50, *listening)
    frames = delivery_frames(1, pika.BasicProperties(), bytes(size), most=size)
    assert seconds_to_read(frames, 50, *listening) < 3 * small + 0.5


def test_body_in_the_smallest_frames_takes_no_more_memory_than_itself() -> None:
    """Also in frames without anything in them."""
    ear = Ear(1)
    frames = delivery_frames(1, pika.BasicProperties(), bytes(100_000), most=2)
    tracemalloc.start()
    try:
        ear.reader.feed(frames[:-10])
        for _ in range(1000):
            ear.reader.feed(struct.pack(">BHI", 3, 1, 0) + b"\xce")
        most = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert ear.heard == []
    assert most < 200_000


# --- properties ----------------------------------------------------------------------------------


@patient
@given(received)
def test_properties_are_as_pika_reads_them(sent: pika.BasicProperties) -> None:
    """Also when nobody asks for the headers first."""
    encoded = b"".join(sent.encode())
    found = ReceivedProperties(encoded)
    assert (found.message_id, found.headers) == (sent.message_id, sent.headers)
    found = ReceivedProperties(encoded)
    assert (found.headers, found.app_id) == (sent.headers, sent.app_id)
    with pytest.raises(AttributeError):
        found.nothing_of_the_kind  # noqa: B018


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"content_type": b"application/json"},
        {"content_encoding": b"gzip", "message_id": b"1"},
        {"content_type": b"", "content_encoding": b"", "timestamp": 1, "app_id": b"tests"},
    ],
)
@pytest.mark.parametrize("by", ["us", "pika"])
def test_headers_that_cannot_be_read_are_left_out(by: str, others: dict[str, Any]) -> None:
    """Only they: what stands before and behind them is as it was. Also for what pika reads."""
    sent = raw.Properties(UNREADABLE, **others)
    with pytest.raises(RecursionError):
        pika.BasicProperties().decode(sent.data)
    found: Any
    if by == "us":
        found = ReceivedProperties(sent.data)
        assert found.headers == {}
    else:
        ear = Ear()
        ear.reader.feed(delivery_frames(CHANNEL, sent, b"body"))
        [passed_on] = ear.heard
        frames: list[Any] = []
        while passed_on:
            used, each = frame.decode_frame(passed_on)
            frames.append(each)
            passed_on = passed_on[used:]
        method, header, body = frames
        assert (method.method.NAME, body.fragment) == ("Basic.Deliver", b"body")
        found = header.properties
    expected = {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in others.items()
    }
    shown = {
        name: value
        for name, value in vars(found).items()
        if value is not None and not name.startswith("_")
    }
    assert shown == {**expected, "headers": {}}


@pytest.mark.parametrize("by", ["us", "pika"])
def test_log_says_which_message_has_unreadable_headers(
    by: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The queue where it is known, the routing key and the id, on one line."""
    sent = raw.Properties(UNREADABLE, message_id=b"id-1\n")
    header = frame.Header(1, 0, sent).marshal()
    ear = Ear(1)
    ear.reader.queues[1] = "mail"
    if by == "us":
        method: Any = Basic.Deliver("c", 1, False, "x", "a.b")
    else:
        method = Basic.GetOk(1, False, "x", "a.b", 0)
    ear.reader.feed(frame.Method(1, method).marshal() + header)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(r"read without them: a.b id-1\n")
    assert ("for mail" in line) == (by == "us")


@pytest.mark.parametrize("encoded", [b"", b"\0", b"\xff\xf8", b"\x20\0\0", b"\x80\0\x09abc"])
def test_properties_that_are_cut_off_are_none(encoded: bytes) -> None:
    """Nobody's message may stop a subscriber."""
    assert ReceivedProperties(encoded).message_id is None


@pytest.mark.parametrize(
    ("given", "shown"), [("a.b", "a.b"), (b"a.\xff", "a.\\xff"), (None, ""), ("", "")]
)
def test_name_that_is_not_utf8_is_shown_with_its_bytes_escaped(
    given: str | bytes | None, shown: str
) -> None:
    """Never as bytes, which nobody expects there."""
    assert text(given) == shown
