"""A domain event as a message, and back: domain_events/message.py.

Properties are pika's own here, and what is said to fit a frame is encoded by pika to see it.
"""

from __future__ import annotations

import json
import socket
import struct
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import onlooker
import pika
import pika.data
import pika.frame
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import Names

from domain_events import DomainEvent, InvalidEvent, message
from domain_events.broker.rabbitmq.sending import properties
from domain_events.message import Delivery, Message
from domain_events.topology import delay_address

# Machines that are shared are slow at times.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

#: What RabbitMQ and pika agree upon unless told otherwise, with all of a frame in it.
FRAME = 128 * 1024

IDS = [UUID(int=1), "an-id", "ü" * 127]


def delivery(
    body: bytes = b'{"routing_key": "user.registered", "data": {}, "uuid_string": "id-1"}',
    headers: dict[Any, Any] | None = None,
    *,
    routing_key: str = "user.registered",
    exchange: str = "domain-events",
    **properties: Any,
) -> Delivery:
    received = pika.BasicProperties(headers=headers, **properties)
    made = Delivery(exchange, routing_key, False, received, body)
    if exchange.startswith(("x.", "domain-events.")):
        made.ours = True  # as a subscriber of that exchange sees it
    return made


def header_frame(sent: Message) -> bytes:
    """The frame that carries the message's properties and headers, as pika sends it."""
    frame: bytes = pika.frame.Header(1, len(sent.body), properties(sent)).marshal()
    return frame


def properties_of(sent: Message) -> dict[str, Any]:
    """The properties that are set, as the receiver has them."""
    decoded = pika.BasicProperties()
    decoded.decode(b"".join(properties(sent).encode()))
    return {name: value for name, value in vars(decoded).items() if value is not None}


@contextmanager
def being_handled(event: DomainEvent, of: Delivery) -> Iterator[None]:
    token = message.handling.set((event, of))
    try:
        yield
    finally:
        message.handling.reset(token)


# ------------------------------------------------------------------ an event as a message


def test_an_event_travels_with_all_its_properties() -> None:
    """The body is the envelope; id, time, routing key and program are AMQP properties."""
    event = DomainEvent("user.registered", {"user_id": 1}, 17, "id-1", 1700000000.75)
    sent = message.from_event(event, "domain-events", "shop", mandatory=True)
    assert sent == Message(
        "domain-events",
        "user.registered",
        event.to_json().encode(),
        headers={},
        content_type="application/json",
        correlation_id="id-1",
        message_id="id-1",
        timestamp=1700000000,
        type="user.registered",
        app_id="shop",
        mandatory=True,
    )
    assert properties_of(sent) == {
        "content_type": "application/json",
        "delivery_mode": 2,
        "correlation_id": "id-1",
        "message_id": "id-1",
        "timestamp": 1700000000,
        "type": "user.registered",
        "app_id": "shop",
    }


@patient
@given(
    routing_key=st.text(min_size=1, max_size=63).filter(
        lambda key: not {"*", "#"} & set(key.split("."))
    ),
    data=st.dictionaries(st.text(), st.integers() | st.text()),
    uuid_string=st.text(min_size=1, max_size=63),
    timestamp=st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
)
def test_an_event_comes_back_from_its_message(
    routing_key: str, data: dict[str, Any], uuid_string: str, timestamp: float
) -> None:
    """Any valid event can be encoded, and arrives equal."""
    event = DomainEvent(routing_key, data, None, uuid_string, timestamp)
    sent = message.from_event(event, "x", "shop", mandatory=False)
    properties = properties_of(sent)
    assert properties["message_id"] == uuid_string
    received = delivery(sent.body, routing_key=sent.routing_key, **properties)
    try:
        arrived = message.to_event(received)
    except InvalidEvent:
        # An integer that no float can be is no time.
        assert abs(timestamp) > 1e308
    else:
        assert arrived == event
        assert (arrived.retries, received.original_routing_key) == (0, routing_key)


@pytest.mark.parametrize(
    ("timestamp", "seconds"), [(0, 0), (1.999, 1), (-1.0, None), (2**63, None), (2**62, 2**62)]
)
def test_a_time_that_amqp_cannot_tell_is_left_to_the_envelope(
    timestamp: float, seconds: int | None
) -> None:
    """AMQP has whole seconds since 1970; an earlier event is valid all the same."""
    event = DomainEvent("a.b", {}, timestamp=timestamp)
    sent = message.from_event(event, "x", "shop", mandatory=False)
    assert sent.timestamp == seconds
    assert properties_of(sent).get("timestamp") == seconds


@pytest.mark.parametrize("uuid_string", IDS, ids=str)
def test_an_id_may_be_a_uuid_or_any_short_text(uuid_string: Any) -> None:
    """It is the message's id, as text."""
    event = DomainEvent("a.b", {}, uuid_string=uuid_string)
    sent = message.from_event(event, "x", "shop", mandatory=False)
    assert sent.message_id == str(uuid_string)
    assert properties_of(sent)["message_id"] == str(uuid_string)
    assert json.loads(sent.body)["uuid_string"] == str(uuid_string)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"routing_key": ""}, "routing key must be a text that is not empty"),
        ({"routing_key": None}, "routing key must be a text"),
        ({"routing_key": 7}, "routing key must be a text"),
        ({"routing_key": "x" * 256}, "routing key has at most 255 bytes, not 256"),
        ({"routing_key": "ü" * 128}, "routing key has at most 255 bytes, not 256"),
        ({"routing_key": "\ud800"}, "routing key is no valid Unicode"),
        ({"routing_key": "user.*"}, "wildcard"),
        ({"routing_key": "#"}, "wildcard"),
        ({"uuid_string": ""}, "uuid_string must be a text that is not empty"),
        ({"uuid_string": 7}, "uuid_string must be a text"),
        ({"uuid_string": "x" * 256}, "uuid_string has at most 255 bytes"),
        ({"uuid_string": "\ud800"}, "uuid_string is no valid Unicode"),
        ({"data": object()}, "object is not JSON-serializable"),
        ({"timestamp": "now"}, "timestamp is Unix seconds"),
        ({"timestamp": True}, "timestamp is Unix seconds"),
        ({"timestamp": Decimal(1)}, "timestamp is Unix seconds"),
        ({"timestamp": float("nan")}, "not JSON"),
    ],
)
def test_what_can_be_no_event_is_refused(fields: dict[str, Any], words: str) -> None:
    """The error says what is wrong and has the event."""
    event = DomainEvent(**{"routing_key": "a.b", "data": {}, **fields})
    with pytest.raises(InvalidEvent, match=words) as caught:
        message.from_event(event, "x", "shop", mandatory=False)
    assert caught.value.event is event


def test_wildcards_inside_a_word_are_letters() -> None:
    """Only a word that is ``*`` or ``#`` means something to the broker."""
    event = DomainEvent("a*.#b", {})
    assert message.from_event(event, "x", "shop", mandatory=False).routing_key == "a*.#b"


def test_a_body_that_no_broker_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its size and the limit; one byte less goes."""
    assert message.LARGEST_BODY == 128 * 2**20
    event = DomainEvent("user.registered", {"text": "x" * 1000})
    size = len(event.to_json())
    monkeypatch.setattr(message, "LARGEST_BODY", size)
    assert message.from_event(event, "x", "shop", mandatory=False)
    monkeypatch.setattr(message, "LARGEST_BODY", size - 1)
    with pytest.raises(InvalidEvent, match=f"{size:,} bytes") as caught:
        message.from_event(event, "x", "shop", mandatory=False)
    assert caught.value.event is event


# ------------------------------------------------------------------ causes


def test_an_event_published_by_a_handler_names_its_cause() -> None:
    """It carries the correlation id on, also over several steps."""
    first = DomainEvent("a.b", {}, uuid_string="first")
    cause = delivery(correlation_id="the-beginning")
    with being_handled(first, cause):
        sent = message.from_event(DomainEvent("c.d", {}, uuid_string="next"), "x", "s", False)
    assert sent.headers == {"domain-events-cause": "first"}
    assert sent.correlation_id == "the-beginning"
    after = message.from_event(DomainEvent("c.d", {}, uuid_string="after"), "x", "s", False)
    assert (after.headers, after.correlation_id) == ({}, "after")


@pytest.mark.parametrize("correlation_id", [None, "", b"\xff"])
def test_a_cause_without_a_correlation_id_becomes_it(correlation_id: Any) -> None:
    """As with events of domain-event-broker, which have none."""
    with being_handled(DomainEvent("a.b", {}, uuid_string="first"), delivery(correlation_id=None)):
        sent = message.from_event(DomainEvent("c.d", {}), "x", "s", False)
    received = delivery()
    received.properties.correlation_id = correlation_id
    with being_handled(DomainEvent("a.b", {}, uuid_string="first"), received):
        other = message.from_event(DomainEvent("c.d", {}), "x", "s", False)
    assert sent.correlation_id == other.correlation_id == "first"


@patient
@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=300))
@example("ü" * 300)
@example("\U0001f600" * 300)
def test_whatever_its_causes_id_an_event_can_be_sent(uuid_string: str) -> None:
    """An id that was not made by us may be longer than AMQP can carry, or no valid Unicode."""
    with being_handled(DomainEvent("a.b", {}, uuid_string=uuid_string), delivery()):
        sent = message.from_event(DomainEvent("c.d", {}), "x", "s", False)
    assert len(header_frame(sent)) < FRAME


# ------------------------------------------------------------------ a delivery as an event


def test_reading_takes_the_retries_from_our_header_only() -> None:
    """Never from x-death, which newer brokers do not keep."""
    headers: dict[str, Any] = {"x-death": [{"count": 7}], "x-delivery-count": 5}
    assert message.to_event(delivery(headers=headers)).retries == 0
    headers["domain-events-retries"] = 3
    returned = delivery(headers=headers, exchange="domain-events.due")
    assert message.to_event(returned).retries == 3


@pytest.mark.parametrize("value", [None, -1, "3", 2.5, [], {}])
def test_a_retry_count_that_is_none_counts_as_never(value: Any) -> None:
    """What others may have put into the header is no error."""
    received = delivery(headers={"domain-events-retries": value})
    assert received.retries == 0
    assert message.to_event(received).retries == 0


def test_a_missing_id_is_the_messages_id() -> None:
    """So that a redelivery is known as the same event."""
    body = b'{"routing_key": "a.b", "data": {}}'
    for _ in range(2):
        assert message.to_event(delivery(body, message_id="id-2")).uuid_string == "id-2"
    assert message.to_event(delivery(message_id="id-2")).uuid_string == "id-1"


@pytest.mark.parametrize("message_id", [None, "", b"\xff"])
@pytest.mark.parametrize("uuid_string", [b"null", b'""'])
def test_without_any_id_it_is_no_event(message_id: Any, uuid_string: bytes) -> None:
    """A new id at each delivery would make every redelivery look like another event."""
    received = delivery(b'{"routing_key": "a.b", "data": {}, "uuid_string": ' + uuid_string + b"}")
    received.properties.message_id = message_id
    with pytest.raises(InvalidEvent, match="has an id"):
        message.to_event(received)


def test_a_body_that_is_no_envelope_is_no_event() -> None:
    """Of messages by other programs only the body decides."""
    with pytest.raises(InvalidEvent):
        message.to_event(delivery(b"\xff", message_id="id"))


def test_the_original_routing_key_survives_the_ways_through_the_broker() -> None:
    """Of a retry or a dead letter the header tells it; else it is the delivery's."""
    assert delivery(routing_key="a.b").original_routing_key == "a.b"
    headers: dict[str, Any] = {"domain-events-routing-key": "a.b"}
    for exchange in ("domain-events.due", "domain-events.delay.07", ""):
        returned = delivery(routing_key="0.1.q", headers=headers, exchange=exchange)
        assert returned.original_routing_key == "a.b"
    headers = {"domain-events-routing-key": 7}
    assert delivery(routing_key="a.b", headers=headers).original_routing_key == "a.b"


# ------------------------------------------------------------------ sent on


PROPERTIES: dict[str, Any] = {
    "content_type": "application/x",
    "content_encoding": "gzip",
    "correlation_id": "correlation",
    "reply_to": "reply",
    "message_id": "id-1",
    "timestamp": 17,
    "type": "type",
    "app_id": "shop",
}

ACTED_UPON = {
    "CC": ["other-queue"],
    "BCC": ["other-queue"],
    "x-death": [{"queue": "q", "count": 1}],
    "x-delivery-count": 3,
    "x-acquired-count": 3,
    "x-first-death-queue": "q",
    "x-first-death-reason": "expired",
    "x-first-death-exchange": "x",
    "x-last-death-queue": "q",
    "x-last-death-reason": "expired",
    "x-last-death-exchange": "x",
}


def sent_on(received: Delivery) -> list[Message]:
    return [
        message.retry(received, "domain-events", "q", 1.0, ValueError("broken")),
        message.dead_letter(received, "q", ValueError("why")),
        message.replay(received, "q"),
    ]


def test_what_is_sent_on_keeps_its_body_and_its_properties() -> None:
    """Byte for byte, valid or not; mandatory, for the original is acked next."""
    received = delivery(b"\x00\xff no event", {"trace": "t", "n": [1]}, **PROPERTIES)
    for sent in sent_on(received):
        assert sent.body == b"\x00\xff no event"
        assert sent.mandatory
        kept = properties_of(sent)
        assert kept.pop("delivery_mode") == 2
        headers = kept.pop("headers")
        assert kept == PROPERTIES
        assert (headers["trace"], headers["n"]) == ("t", [1])
        assert headers["domain-events-routing-key"] == "user.registered"


def test_what_the_broker_would_act_upon_is_left_behind() -> None:
    """CC and BCC would route it elsewhere too; x-death can make the broker drop it."""
    received = delivery(headers={**ACTED_UPON, "x-mine": 1}, expiration="1", user_id="guest")
    for sent in sent_on(received):
        assert not set(ACTED_UPON) & set(sent.headers)
        assert sent.headers["x-mine"] == 1
        assert not {"expiration", "user_id"} & set(properties_of(sent))


def test_what_is_sent_on_leaves_the_delivery_as_it_was() -> None:
    """A move may fail, and the delivery be given back."""
    headers = {"trace": "t", "domain-events-retries": 2, **ACTED_UPON}
    received = delivery(headers=dict(headers))
    sent_on(received)
    assert received.headers == headers


@pytest.mark.parametrize("name", [b"\xff", "", "ü"])
def test_any_header_name_that_can_arrive_can_be_sent_on(name: Any) -> None:
    """pika hands out a name that is no UTF-8 as bytes."""
    pieces: list[bytes] = []
    pika.data.encode_table(pieces, {name: 1})
    arrived, _ = pika.data.decode_table(b"".join(pieces), 0)
    assert arrived == {name: 1}
    for sent in sent_on(delivery(headers=arrived)):
        assert sent.headers[name] == 1
        assert len(header_frame(sent)) < FRAME


@pytest.mark.parametrize(
    "encoded",
    [
        struct.pack(">cd", b"d", 1.5),
        struct.pack(">cd", b"d", 1e300),
        struct.pack(">cf", b"f", 1.5),
        struct.pack(">cq", b"l", -(2**63)),
        struct.pack(">cq", b"L", 2**63 - 1),
        struct.pack(">cI", b"i", 2**32 - 1),
        struct.pack(">ci", b"I", -1),
        struct.pack(">cH", b"u", 2**16 - 1),
        struct.pack(">ch", b"s", -1),
        struct.pack(">cB", b"B", 255),
        struct.pack(">cb", b"b", -1),
        struct.pack(">c?", b"t", True),
        struct.pack(">cBi", b"D", 255, 2**31 - 1),
        struct.pack(">cBi", b"D", 0, -(2**31)),
        struct.pack(">cQ", b"T", 17),
        struct.pack(">cI2s", b"S", 2, b"\xff\xfe"),
        struct.pack(">cI2s", b"x", 2, b"\xff\xfe"),
        struct.pack(">cIcd", b"A", 9, b"d", 1.5),
        struct.pack(">cIB1scd", b"F", 11, 1, b"n", b"d", 1.5),
        b"V",
    ],
    ids=lambda encoded: encoded[:1].decode(),
)
@pytest.mark.filterwarnings("ignore:datetime.datetime.utc:DeprecationWarning")  # pika 1.3
def test_any_header_value_that_can_arrive_can_be_sent_on(encoded: bytes) -> None:
    """Also what pika reads and cannot write, such as a float."""
    entry = b"\x01h" + encoded
    arrived, _ = pika.data.decode_table(struct.pack(">I", len(entry)) + entry, 0)
    for sent in sent_on(delivery(headers=arrived)):
        assert len(header_frame(sent)) < FRAME
        assert "h" in sent.headers


def test_what_pika_may_read_and_cannot_write_is_sent_on_as_text() -> None:
    """Floats and very large integers, which of them depends on pika's release."""
    headers = {"f": 1.5, "n": 2**70, "list": [0.5, [2.5]], "table": {"x": 1.5}}
    for sent in sent_on(delivery(headers=headers)):
        arrived = properties_of(sent)["headers"]
        assert {name: arrived[name] for name in headers} == {
            "f": "1.5",
            "n": str(2**70),
            "list": ["0.5", ["2.5"]],
            "table": {"x": "1.5"},
        }


def test_properties_that_are_no_text_can_be_sent_on() -> None:
    """A property that is no UTF-8 arrives as bytes and goes on as it is."""
    received = delivery()
    received.properties.correlation_id = received.properties.type = b"\xff"
    for sent in sent_on(received):
        assert properties_of(sent)["correlation_id"] == b"\xff"


# ------------------------------------------------------------------ retries


def test_a_retry_goes_through_the_delay_and_counts_one_more() -> None:
    """To the address of the delay levels; it knows the key that it was published with."""
    first = message.retry(delivery(), "domain-events", "q", 2.5, ValueError("broken"))
    assert (first.exchange, first.routing_key) == delay_address("domain-events", "q", 2.5)
    assert first.headers == {
        "domain-events-retries": 1,
        "domain-events-routing-key": "user.registered",
        "domain-events-first-error-type": "ValueError",
        "domain-events-first-error-message": "broken",
    }
    back = delivery(
        first.body, dict(first.headers), routing_key=first.routing_key, exchange="x.due"
    )
    assert (back.retries, back.original_routing_key) == (1, "user.registered")
    second = message.retry(back, "domain-events", "q", 2.5, KeyError("later"))
    assert second.headers == {**first.headers, "domain-events-retries": 2}


# ------------------------------------------------------------------ dead letters


def failure(text: str = "no such user") -> ValueError:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def test_a_dead_letter_carries_its_reason() -> None:
    """Subscriber, exception, traceback, time, host, retries: and all can be read again."""
    before = datetime.now(timezone.utc)
    received = delivery(headers={"domain-events-retries": 2, "trace": "t"}, exchange="x.due")
    received.properties.headers["domain-events-routing-key"] = "user.registered"
    received.properties.headers["domain-events-first-error-type"] = "TimeoutError"
    sent = message.dead_letter(received, "mail", failure())
    assert (sent.exchange, sent.routing_key) == ("", "mail-dl")
    assert sent.headers["trace"] == "t"
    letter = delivery(sent.body, properties_of(sent)["headers"], routing_key="mail-dl", exchange="")
    assert (letter.retries, letter.original_routing_key) == (2, "user.registered")
    told = message.told_by_a_dead_letter(letter)
    failed_at = told.pop("failed_at")
    assert before <= failed_at <= datetime.now(timezone.utc)
    assert failed_at.utcoffset() == timedelta(0)
    trace = told.pop("traceback")
    assert trace.startswith("Traceback (most recent call last):")
    assert "in failure" in trace
    assert trace.endswith("ValueError: no such user\n")
    assert told == {
        "subscriber": "mail",
        "error_type": "ValueError",
        "error_message": "no such user",
        "host": socket.gethostname(),
        "first_error_type": "TimeoutError",
        "first_error_message": None,
    }


def test_an_exception_that_is_no_builtin_is_named_with_its_module() -> None:
    """Two classes of one name are told apart."""
    error = InvalidEvent("no")
    sent = message.dead_letter(delivery(), "q", error)
    assert sent.headers["domain-events-error-type"] == "domain_events.errors.InvalidEvent"


class BrokenError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class NoTextError(Exception):
    def __str__(self) -> str:
        return None  # type: ignore[return-value]  # noqa: PLE0307


@pytest.mark.parametrize("error", [BrokenError(), NoTextError()], ids=["raises", "no text"])
def test_an_exception_that_cannot_be_shown_is_a_dead_letter_too(error: Exception) -> None:
    """A broken __str__ must not keep the event from its dead letters."""
    headers = message.dead_letter(delivery(), "q", error).headers
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    assert headers["domain-events-error-type"] == name
    assert headers["domain-events-error-message"] == f"<{name} that cannot be shown>"


def test_a_long_message_is_cut_at_its_end_a_long_traceback_at_its_beginning() -> None:
    """What is most telling is kept: how a message begins, where a traceback ends."""
    sent = message.dead_letter(delivery(), "q", failure("begin" + "x" * 100_000 + "end"))
    told = sent.headers["domain-events-error-message"]
    assert len(told) == 2048
    assert told.startswith("beginxxx")
    assert told.endswith("xxx ...")
    trace = sent.headers["domain-events-traceback"]
    assert len(trace) == 16 * 1024
    assert trace.startswith("... xxx")
    assert trace.endswith("xxxend\n")


def test_a_dead_letter_of_a_dead_letter_tells_the_last_reason() -> None:
    """One that was replayed by other tools and failed again."""
    first = message.dead_letter(delivery(), "one", failure("first"))
    again = delivery(first.body, dict(first.headers), routing_key="two", exchange="")
    second = message.dead_letter(again, "two", failure("second"))
    assert second.headers["domain-events-error-message"] == "second"
    assert second.headers["domain-events-subscriber"] == "two"
    assert second.headers["domain-events-routing-key"] == "user.registered"


def test_a_replay_is_the_event_as_it_was_before_it_failed() -> None:
    """No reason and no retries are left; the sender's headers and the cause are."""
    headers = {
        "trace": "t",
        "domain-events-cause": "c",
        "domain-events-retries": 3,
        "domain-events-hand-backs": 3,
        "domain-events-first-error-type": "KeyError",
        "domain-events-routing-key": "user.registered",
    }
    letter = message.dead_letter(delivery(headers=headers, exchange="x.due"), "q", failure())
    assert letter.headers[message.RETRIES] == 3
    received = delivery(letter.body, dict(letter.headers), routing_key="q-dl", exchange="")
    sent = message.replay(received, "q")
    assert (sent.exchange, sent.routing_key) == ("", "q")
    assert sent.headers == {
        "trace": "t",
        "domain-events-cause": "c",
        "domain-events-routing-key": "user.registered",
    }


def test_of_what_the_broker_moved_its_reason_is_told() -> None:
    """Its handler had killed the process again and again; nobody was there to say more."""
    for reason, told in (("delivery_limit", "delivery limit"), ("rejected", "rejected")):
        death = {"reason": reason, "queue": "q", "exchange": "x", "routing-keys": ["a.b"]}
        forged = {message.SUBSCRIBER: "other", message.TRACEBACK: "?", message.RETRIES: 7}
        moved = delivery(headers={"x-death": [death], **forged}, routing_key="q-dl", exchange="")
        found = message.told_by_a_dead_letter(moved)
        assert (found["subscriber"], found["error_type"]) == ("q", told)
        assert (found["traceback"], moved.retries) == (None, 0)
        assert moved.original_routing_key == "a.b"
    assert set(message.told_by_a_dead_letter(delivery()).values()) == {None}


@patient
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "domain-events-subscriber",
                "domain-events-error-type",
                "domain-events-error-message",
                "domain-events-traceback",
                "domain-events-failed-at",
                "domain-events-host",
                "x-first-death-reason",
            ]
        ),
        st.none() | st.integers() | st.text() | st.binary() | st.lists(st.text()),
    )
)
def test_whatever_a_dead_letter_has_it_can_be_read(headers: dict[str, Any]) -> None:
    """What cannot be is None, never an error, and what is there is text and time."""
    told = message.told_by_a_dead_letter(delivery(headers=headers))
    assert isinstance(told.pop("failed_at"), datetime | None)
    assert all(isinstance(value, str | None) for value in told.values())


# ------------------------------------------------------------------ room in the frame


# What can arrive in headers, as pika decodes it.
header_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.decimals(-1000, 1000, places=3)
    | st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1))  # noqa: DTZ001  # as pika has them
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda values: (
        st.lists(values, max_size=5) | st.dictionaries(st.text(max_size=20), values, max_size=5)
    ),
    max_leaves=20,
)


@patient
@given(st.dictionaries(st.text(max_size=63), header_values, max_size=5))
@example({"": {}})
@example({"": [{}, {}, {}, {}]})
@example({"": [True] * 3, "x": [[[[]]]]})
def test_the_estimated_size_of_headers_is_never_too_small(headers: dict[str, Any]) -> None:
    """Compared with what pika's own encoder makes of them."""
    pieces: list[bytes] = []
    assert message._size(headers) >= pika.data.encode_table(pieces, headers)


@patient
@given(
    st.text(st.characters(exclude_categories=()), max_size=100)
    # Mostly of the longer kinds of characters, where a cut can go through one.
    | st.text("aü€\U0001f600\ud800", max_size=100),
    st.integers(8, 120),
    st.booleans(),
)
def test_what_is_cut_keeps_its_bound_and_is_valid(text: str, most: int, keep_end: bool) -> None:
    """At most so many bytes, no half characters, hardly less than there is room for."""
    cut = message._cut(text, most, keep_end=keep_end)
    encoded = cut.encode()  # or UnicodeEncodeError
    whole = text.encode("utf-8", "replace").decode()
    assert len(encoded) <= most
    if len(whole.encode()) <= most:
        assert cut == whole
        return
    assert len(encoded) > most - 4
    if keep_end:
        assert cut.startswith("... ")
        assert whole.endswith(cut[4:])
    else:
        assert cut.endswith(" ...")
        assert whole.startswith(cut[:-4])


def exception(text: str, name: str, causes: int) -> Exception:
    """One that was raised, with causes."""
    kind: type[Exception] = type(name or "E", (Exception,), {})
    error: Exception | None = None
    for _ in range(causes + 1):
        try:
            raise kind(text) from error
        except kind as raised:
            error = raised
    assert error is not None
    return error


def text_of(most: int) -> st.SearchStrategy[str]:
    """Texts up to so many characters, long ones as often as short ones."""
    return st.builds(
        lambda part, times: (part * times)[:most],
        st.text(min_size=1, max_size=5),
        st.sampled_from([0, 1, most // 10, most]),
    )


SENDERS_HEADERS = st.dictionaries(
    st.text(max_size=63) | st.sampled_from([message.ROUTING_KEY, message.CAUSE, message.RETRIES]),
    header_values | text_of(30_000) | text_of(120_000).map(str.encode) | text_of(130_000),
    max_size=6,
)


@patient
@given(
    headers=SENDERS_HEADERS,
    properties=st.fixed_dictionaries(
        {}, optional=dict.fromkeys([*PROPERTIES.keys() - {"timestamp"}], st.just("p" * 255))
    ),
    name=text_of(200).filter(bool),
    text=text_of(40_000),
    class_name=st.sampled_from(["E", "E" * 5000, "Ü" * 5000]),
    causes=st.integers(0, 2),
)
@example({"h": "x" * 130_900}, {}, "q", "why", "E", 0)
@example({"domain-events-routing-key": "x" * 129_900}, {}, "q", "why" * 1000, "E", 0)
@example({"h": [{}] * 24_000}, {}, "q", "why" * 1000, "E", 0)
def test_a_dead_letter_always_fits_its_frame(
    headers: dict[str, Any],
    properties: dict[str, Any],
    name: str,
    text: str,
    class_name: str,
    causes: int,
) -> None:
    """Whatever the sender's headers and the exception are: else it could never be moved."""
    received = delivery(headers=headers, **properties)
    error = exception(text, class_name, causes)
    sent = message.dead_letter(received, name, error)
    assert len(header_frame(sent)) <= FRAME
    assert sent.headers["domain-events-error-type"]
    assert sent.headers["domain-events-subscriber"] == name


def headers_of_size(size: int) -> dict[str, Any]:
    empty = message._size({"h": ""})
    return {"h": "x" * (size - empty)}


def test_sender_that_filled_the_frame_costs_its_own_headers() -> None:
    """The largest of them; never ours: the reason and its traceback stay."""
    assert message._size(headers_of_size(1000)) == 1000
    small = message.dead_letter(delivery(headers=headers_of_size(50_000)), "q", failure())
    assert {"h", message.TRACEBACK, message.ERROR_MESSAGE} <= set(small.headers)
    returned = {message.RETRIES: 2, message.ROUTING_KEY: "user.registered", "small": "kept"}
    for size in (124 * 1024 - 2000, 124 * 1024, 126_000):
        received = delivery(headers={**headers_of_size(size), **returned}, exchange="x.due")
        sent = message.dead_letter(received, "q", failure("x" * 500)).headers
        assert "h" not in sent
        assert sent["small"] == "kept"
        assert sent[message.TRACEBACK].endswith("x" * 500 + "\n")
        assert sent[message.ROUTING_KEY] == "user.registered"
        assert sent[message.RETRIES] == 2


def test_a_retry_and_a_replay_fit_where_the_event_did() -> None:
    """A frame that its sender filled to the last byte has room for no header of ours."""
    received = delivery()
    filled = {"h": "x" * 131_000}
    sent = Message("x", "a.b", b"", filled)
    filled["h"] += "x" * (FRAME - len(header_frame(sent)))
    assert len(header_frame(sent)) == FRAME
    received.properties.headers = filled
    for sent in (
        message.retry(received, "x", "q", 1.0, ValueError("broken")),
        message.replay(received, "q"),
    ):
        assert len(header_frame(sent)) <= FRAME


# ------------------------------------------------------------------ on a broker


def test_the_largest_dead_letter_passes_a_broker(broker_url: str, names: Names) -> None:
    """The room that is left in a frame is enough in practice too."""
    queue = names.queue()
    with onlooker.channel(broker_url) as channel:
        channel.confirm_delivery()
        channel.queue_declare(queue, durable=True)
        room = 124 * 1024
        filled: dict[str, Any] = dict.fromkeys(PROPERTIES, "p" * 255)
        filled["timestamp"] = PROPERTIES["timestamp"]
        received = delivery(headers=headers_of_size(room - 4000), **filled)
        sent = message.dead_letter(received, "q", failure("x" * 500))
        assert "h" in sent.headers
        channel.basic_publish("", queue, sent.body, properties(sent))
        passed = channel.basic_get(queue, auto_ack=True)
        assert passed is not None
        assert passed.properties.headers == sent.headers


def test_a_traceback_tells_causes() -> None:
    """``raise ... from`` is seen in the dead letter."""
    sent = message.dead_letter(delivery(), "q", exception("text", "TheError", 1))
    trace = sent.headers["domain-events-traceback"]
    assert trace.count("TheError: text") == 2
    assert "direct cause" in trace
    assert traceback.format_exc() not in trace


# --- headers that nobody should send -------------------------------------------------------------


@pytest.mark.parametrize(
    ("forged", "retries"),
    [(True, 0), (-1, 0), ("1", 0), (None, 0), (2, 2), (2**63 - 1, 2**31 - 1), (10**30, 2**31 - 1)],
)
def test_forged_retry_count_can_be_counted_on_and_sent_on(forged: object, retries: int) -> None:
    """One that no frame could carry would keep the event from its dead letters."""
    assert delivery(headers={message.RETRIES: forged}).retries == 0
    received = delivery(headers={message.RETRIES: forged}, exchange="x.due")
    assert received.retries == retries
    assert type(received.retries) is int
    for sent in (
        message.retry(received, "domain-events", "print", 1.0, ValueError("broken")),
        message.dead_letter(received, "print", ValueError()),
    ):
        assert header_frame(sent)


def test_header_that_is_nested_too_deep_is_sent_on_cut() -> None:
    """Also one that takes all of the stack to be walked."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert header_frame(message.replay(delivery(headers={"deep": value, "other": 1}), "print"))
