"""A message as AMQP carries it: domain_events/broker/rabbitmq/envelope.py.

What is said to fit a frame is encoded by pika to see it.
"""

from __future__ import annotations

import struct
from datetime import datetime
from typing import Any

import onlooker
import pika
import pika.data
import pika.frame
import pytest
from deliveries import (
    FRAME,
    delivery,
    exception,
    failure,
    header_frame,
    headers_of,
    properties_of,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import Names

from domain_events import DomainEvent, InvalidEvent, message
from domain_events.broker.rabbitmq import envelope
from domain_events.broker.rabbitmq.envelope import RabbitDelivery, browsed, properties, republished
from domain_events.broker.rabbitmq.topology import address, delay_address
from domain_events.message import (
    NO_FAILURE,
    Delivery,
    Later,
    Message,
    ToDeadLetters,
    ToSubscriber,
    UndeliveredOf,
)

# Machines that are shared are slow at times.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

LATER = Later("domain-events", "q", 2.5)
DEAD_LETTERS = ToDeadLetters("q")


def dead_letter_again(sent: Message) -> RabbitDelivery:
    """A dead letter as it is found by who walks over them."""
    properties = properties_of(sent)
    properties.pop("delivery_mode")
    found = delivery(sent.body, routing_key="q-dl", exchange="", **properties)
    return browsed(found, DEAD_LETTERS)


# ------------------------------------------------------------------ an event as a message


def test_an_event_travels_with_all_its_properties() -> None:
    """The body is the envelope; id, time, routing key and program are AMQP properties."""
    event = DomainEvent("user.registered", {"user_id": 1}, 17, "id-1", 1700000000.75)
    sent = message.from_event(event, "domain-events", "shop", mandatory=True)
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
    sent_properties = properties_of(sent)
    assert sent_properties["message_id"] == uuid_string
    received = delivery(sent.body, routing_key=sent.routing_key, **sent_properties)
    try:
        arrived = message.to_event(received)
    except InvalidEvent:
        # An integer that no float can be is no time.
        assert abs(timestamp) > 1e308
    else:
        assert arrived == event
        assert (arrived.retries, received.original_routing_key) == (0, routing_key)


@pytest.mark.parametrize("seconds", [0, 1, 2**62])
def test_a_time_travels_in_whole_seconds(seconds: int) -> None:
    """As AMQP has it; what it cannot carry is in the envelope only."""
    event = DomainEvent("a.b", {}, timestamp=seconds + 0.5 if seconds < 2**50 else seconds)
    assert properties_of(message.from_event(event, "x", "s", False))["timestamp"] == seconds
    before = DomainEvent("a.b", {}, timestamp=-1.5)
    assert "timestamp" not in properties_of(message.from_event(before, "x", "s", False))


def test_a_cause_is_the_only_header_of_an_event() -> None:
    """And without one there is none at all."""
    event = DomainEvent("a.b", {}, uuid_string="first")
    token = message.handling.set((event, delivery()))
    try:
        sent = message.from_event(DomainEvent("c.d", {}), "x", "s", False)
    finally:
        message.handling.reset(token)
    assert headers_of(sent) == {"domain-events-cause": "first"}
    assert "headers" not in properties_of(message.from_event(event, "x", "s", False))


@patient
@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=300))
@example("ü" * 300)
@example("\U0001f600" * 300)
def test_whatever_its_causes_id_an_event_can_be_sent(uuid_string: str) -> None:
    """An id that was not made by us may be longer than AMQP can carry, or no valid Unicode."""
    token = message.handling.set((DomainEvent("a.b", {}, uuid_string=uuid_string), delivery()))
    try:
        sent = message.from_event(DomainEvent("c.d", {}), "x", "s", False)
    finally:
        message.handling.reset(token)
    assert len(header_frame(sent)) < FRAME


# ------------------------------------------------------------------ a delivery


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
    assert (received.retries, received.hand_backs) == (0, 0)
    assert message.to_event(received).retries == 0


def test_the_original_routing_key_survives_the_ways_through_the_broker() -> None:
    """Of a retry or a dead letter the header tells it; else it is the delivery's."""
    assert delivery(routing_key="a.b").original_routing_key == "a.b"
    headers: dict[str, Any] = {"domain-events-routing-key": "a.b"}
    for exchange in ("domain-events.due", "domain-events.delay.07", ""):
        returned = delivery(routing_key="0.1.q", headers=headers, exchange=exchange)
        assert returned.original_routing_key == "a.b"
    headers = {"domain-events-routing-key": 7}
    assert delivery(routing_key="a.b", headers=headers).original_routing_key == "a.b"


@pytest.mark.parametrize("value", [None, "", b"\xff", "x" * 300, 7])
def test_what_amqp_cannot_carry_again_is_not_read(value: Any) -> None:
    """Ids and the like are text of a size that a message of ours can have, or None."""
    received = delivery(headers={"domain-events-cause": value})
    for name in ("message_id", "correlation_id", "app_id"):
        setattr(received.properties, name, value)
    assert (received.message_id, received.correlation_id) == (None, None)
    assert (received.app_id, received.cause) == (None, None)


@pytest.mark.parametrize("value", [None, -1, 2**63, "17", datetime(2026, 1, 1)])  # noqa: DTZ001
def test_a_time_that_is_none_is_not_read(value: Any) -> None:
    """As pika hands it out, where a sender wrote nonsense."""
    received = delivery()
    received.properties.timestamp = value
    assert received.timestamp is None


def test_a_queue_counts_failures_on_redeliveries_only() -> None:
    """On a first delivery, a header of that name is the publisher's."""
    headers = {"x-delivery-count": 5, "x-acquired-count": 3}
    assert delivery(headers=headers).failures == 0
    old = delivery(headers=headers, redelivered=True, release=(4, 2))
    new = delivery(headers=headers, redelivered=True, release=(4, 3))
    assert (old.failures, old.give_back_counts) == (5, True)
    # The publisher's x-delivery-count stays until the queue writes its own.
    assert (new.failures, new.give_back_counts) == (3, False)
    forged = {"x-delivery-count": -5, "x-acquired-count": "3"}
    assert delivery(headers=forged, redelivered=True, release=(4, 3)).failures == 0


@pytest.mark.parametrize(
    ("exchange", "release", "verified"),
    [("x", (3, 10), True), ("", (3, 13), False), ("", (4, 0), True)],
)
def test_a_routing_key_may_be_forged_where_an_old_broker_moved_the_event(
    exchange: str, release: tuple[int, int], verified: bool
) -> None:
    """Before RabbitMQ 4.0 it goes on with an x-death of the publisher's own."""
    death = {"reason": "rejected", "queue": "q", "routing-keys": ["a.b"]}
    found = delivery(headers={"x-death": [death]}, exchange=exchange, release=release)
    assert browsed(found, DEAD_LETTERS).is_verified is verified
    ours = browsed(delivery(exchange="", release=release), DEAD_LETTERS)
    assert ours.is_verified


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
        message.retry(received, LATER, ValueError("broken")),
        message.hand_back(received, LATER),
        message.hand_back(received, ToSubscriber("q")),
        message.dead_letter(received, "q", ValueError("why")),
        message.replay(received, "q"),
        message.sent_on(received, ToSubscriber("q")),
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
        assert not set(ACTED_UPON) & set(headers_of(sent))
        assert headers_of(sent)["x-mine"] == 1
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
        assert headers_of(sent)[name] == 1
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
        assert "h" in headers_of(sent)


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


def test_the_id_that_is_sent_is_the_one_that_a_return_has() -> None:
    """A return names what it returns by it: an id of bytes must not read as none."""
    for value in (None, "", "id-1", b"\xff"):
        received = delivery()
        received.properties.message_id = value
        for sent in sent_on(received):
            assert properties_of(sent).get("message_id") == envelope.message_id(sent) == value
    event = message.from_event(DomainEvent("a.b", {}, uuid_string="id-2"), "x", "s", False)
    assert envelope.message_id(event) == "id-2"


def test_what_a_later_release_has_added_is_kept() -> None:
    """On what this library has sent; a publisher's is not believed."""
    headers = {"domain-events-of-a-later-release": 1}
    for sent in sent_on(delivery(headers=headers, exchange="domain-events.due")):
        assert headers_of(sent)["domain-events-of-a-later-release"] == 1
    for sent in sent_on(delivery(headers=headers)):
        assert "domain-events-of-a-later-release" not in headers_of(sent)


def test_headers_that_a_publisher_has_forged_do_not_go_on() -> None:
    """But for the cause, which a publisher writes."""
    forged = {
        "domain-events-cause": "c",
        "domain-events-retries": 7,
        "domain-events-hand-backs": 7,
        "domain-events-routing-key": "payment.approved",
        "domain-events-subscriber": "other",
        "domain-events-host": "other",
        "x-death": [{"queue": "Q" * 60_000, "reason": "R" * 60_000}],
    }
    retry, handed_back, here, _, replay, again = sent_on(delivery(headers=forged))
    key = {"domain-events-cause": "c", "domain-events-routing-key": "user.registered"}
    assert headers_of(again) == key
    assert headers_of(replay) == {**key, "domain-events-replays": 1}
    assert headers_of(handed_back) == headers_of(here) == {**key, "domain-events-hand-backs": 1}
    assert headers_of(retry).keys() == {
        *key,
        "domain-events-retries",
        "domain-events-first-error-type",
        "domain-events-first-error-message",
    }


# ------------------------------------------------------------------ retries


def test_a_retry_goes_through_the_delay_and_counts_one_more() -> None:
    """To the address of the delay levels; it knows the key that it was published with."""
    first = message.retry(delivery(), LATER, ValueError("broken"))
    where = address(first.destination, first.routing_key)
    assert where == delay_address("domain-events", "q", 2.5)
    assert headers_of(first) == {
        "domain-events-retries": 1,
        "domain-events-routing-key": "user.registered",
        "domain-events-first-error-type": "ValueError",
        "domain-events-first-error-message": "broken",
    }
    back = delivery(
        first.body, headers_of(first), routing_key=where[1], exchange="domain-events.due"
    )
    assert (back.retries, back.original_routing_key) == (1, "user.registered")
    second = message.retry(back, LATER, KeyError("later"))
    assert headers_of(second) == {**headers_of(first), "domain-events-retries": 2}
    handed_back = message.hand_back(back, LATER)
    assert headers_of(handed_back) == {**headers_of(first), "domain-events-hand-backs": 1}
    assert headers_of(message.sent_on(back, ToSubscriber("q"))) == headers_of(first)


def test_a_retry_of_what_another_tool_has_put_back_keeps_why_it_was_dead() -> None:
    """Its headers are this library's, and were not asked to go."""
    letter = message.dead_letter(delivery(), "q", failure())
    back = delivery(letter.body, headers_of(letter), routing_key="q", exchange="")
    sent = headers_of(message.retry(back, LATER, KeyError("again")))
    assert sent == {
        **headers_of(letter),
        "domain-events-retries": 1,
        "domain-events-first-error-type": "KeyError",
        "domain-events-first-error-message": "'again'",
    }


# ------------------------------------------------------------------ dead letters


def test_a_dead_letter_can_be_read_again() -> None:
    """All that was known of it, and what its sender had put into its headers."""
    headers = {
        "domain-events-retries": 2,
        "domain-events-routing-key": "user.registered",
        "domain-events-first-error-type": "TimeoutError",
        "trace": "t",
    }
    received = delivery(headers=headers, exchange="domain-events.due", message_id="id-1")
    sent = message.dead_letter(received, "mail", failure())
    assert address(sent.destination, sent.routing_key) == ("", "mail-dl")
    letter = dead_letter_again(sent)
    assert letter.failure == sent.failure
    assert (letter.retries, letter.original_routing_key) == (2, "user.registered")
    assert letter.headers["trace"] == "t"
    first = message.dead_letter(delivery(), "mail", failure())
    assert headers_of(first)["domain-events-retries"] == 0, "it says so of itself"


def test_a_dead_letter_of_a_dead_letter_tells_the_last_reason() -> None:
    """One that was replayed by other tools and failed again."""
    first = message.dead_letter(delivery(), "one", failure("first"))
    again = delivery(first.body, headers_of(first), routing_key="two", exchange="")
    second = headers_of(message.dead_letter(again, "two", failure("second")))
    assert second["domain-events-error-message"] == "second"
    assert second["domain-events-subscriber"] == "two"
    assert second["domain-events-routing-key"] == "user.registered"


def test_a_replay_has_no_headers_of_its_failure() -> None:
    """No reason and no retries are left; the sender's headers and the cause are."""
    headers = {
        "trace": "t",
        "domain-events-cause": "c",
        "domain-events-retries": 3,
        "domain-events-hand-backs": 3,
        "domain-events-first-error-type": "KeyError",
        "domain-events-routing-key": "user.registered",
    }
    received = delivery(headers=headers, exchange="domain-events.due")
    letter = message.dead_letter(received, "q", failure())
    assert headers_of(letter)[envelope.RETRIES] == 3
    sent = message.replay(dead_letter_again(letter), "q")
    assert address(sent.destination, sent.routing_key) == ("", "q")
    assert headers_of(sent) == {
        "trace": "t",
        "domain-events-cause": "c",
        "domain-events-replays": 1,
        "domain-events-routing-key": "user.registered",
    }


def test_of_what_the_broker_moved_its_reason_is_told() -> None:
    """Its handler had killed the process again and again; nobody was there to say more."""
    for reason, told in (("delivery_limit", "delivery limit"), ("rejected", "rejected")):
        death = {"reason": reason, "queue": "q", "exchange": "x", "routing-keys": ["a.b"]}
        forged = {envelope.SUBSCRIBER: "other", envelope.TRACEBACK: "?", envelope.RETRIES: 7}
        moved = delivery(headers={"x-death": [death], **forged}, routing_key="q-dl", exchange="")
        moved = browsed(moved, DEAD_LETTERS)
        assert (moved.failure.subscriber, moved.failure.error_type) == ("q", told)
        assert (moved.failure.traceback, moved.retries) == (None, 0)
        assert moved.original_routing_key == "a.b"
        # Published to its queue again, it says the same without an x-death.
        again = dead_letter_again(republished(moved, DEAD_LETTERS))
        assert again.failure == moved.failure
        assert again.original_routing_key == "a.b"
    assert browsed(delivery(), DEAD_LETTERS).failure == NO_FAILURE


def test_an_x_death_on_what_a_subscriber_gets_is_the_publishers() -> None:
    """It has not failed, and what it would say of that must not take room in the frame."""
    death = {"reason": "rejected", "queue": "q", "exchange": "x", "routing-keys": ["a.b"]}
    received = delivery(headers={"x-death": [death]})
    assert received.failure == NO_FAILURE
    assert received.original_routing_key == "user.registered"


def test_a_letter_that_is_put_into_its_queue_again_stays_what_it_is() -> None:
    """With its reason, its retries and whatever else it has."""
    letter = message.dead_letter(delivery(headers={"trace": "t"}), "q", failure())
    found = dead_letter_again(letter)
    again = republished(found, DEAD_LETTERS)
    assert address(again.destination, again.routing_key) == ("", "q-dl")
    assert properties_of(again) == properties_of(letter)


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
    letter = browsed(delivery(headers=headers, exchange=""), DEAD_LETTERS)
    told = vars(letter.failure).copy()
    assert isinstance(told.pop("failed_at"), datetime | None)
    assert all(isinstance(value, str | None) for value in told.values())


# ------------------------------------------------------------------ undelivered retries


def undelivered(headers: dict[str, Any], exchange: str = "domain-events.due") -> RabbitDelivery:
    routing_key = delay_address("domain-events", "q", 2.5)[1]
    found = delivery(headers=headers, routing_key=routing_key, exchange=exchange)
    return browsed(found, UndeliveredOf("domain-events"))


@pytest.mark.parametrize("exchange", ["domain-events.due", "domain-events.undelivered", "x"])
def test_an_undelivered_retry_names_its_subscriber(exchange: str) -> None:
    """By its address, through whichever exchange it came."""
    sent = message.retry(delivery(), LATER, failure())
    found = undelivered(headers_of(sent), exchange)
    assert found.subscriber == "q"
    assert (found.retries, found.original_routing_key) == (1, "user.registered")
    forged = browsed(delivery(routing_key="a.b"), UndeliveredOf("domain-events"))
    assert forged.subscriber is None


def test_an_undelivered_retry_that_is_put_there_again_keeps_its_address() -> None:
    """Or nobody would know whose it is."""
    sent = message.retry(delivery(), LATER, failure())
    found = undelivered(headers_of(sent))
    again = republished(found, UndeliveredOf("domain-events"))
    where = address(again.destination, again.routing_key)
    assert where == ("domain-events.undelivered", found.routing_key)
    assert headers_of(again) == headers_of(sent)


def test_what_is_republished_of_an_undelivered_retry_has_our_headers_only() -> None:
    """Retries and routing key, also without a retry; and its cause."""
    fresh = Message(ToSubscriber("q"), "a.b", b"{}", "id", cause="c")
    assert headers_of(fresh) == {
        "domain-events-retries": 0,
        "domain-events-routing-key": "a.b",
        "domain-events-cause": "c",
    }
    assert properties_of(fresh)["type"] == "a.b"


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
    assert envelope._size(headers) >= pika.data.encode_table(pieces, headers)


def frame_of(received: RabbitDelivery) -> bytes:
    """The frame with which a delivery's properties came, as pika would send it."""
    frame: bytes = pika.frame.Header(1, len(received.body), received.properties).marshal()  # type: ignore[arg-type]
    return frame


def text_of(most: int) -> st.SearchStrategy[str]:
    """Texts up to so many characters, long ones as often as short ones."""
    return st.builds(
        lambda part, times: (part * times)[:most],
        st.text(min_size=1, max_size=5),
        st.sampled_from([0, 1, most // 10, most]),
    )


SENDERS_HEADERS = st.dictionaries(
    st.text(max_size=63)
    | st.sampled_from([envelope.ROUTING_KEY, envelope.CAUSE, envelope.RETRIES]),
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
    assert headers_of(sent)["domain-events-error-type"]
    assert headers_of(sent)["domain-events-subscriber"] == name


@patient
@given(headers=SENDERS_HEADERS, exchange=st.sampled_from(["domain-events", "domain-events.due"]))
@example({"x-death": [{"queue": "q" * 65_000, "reason": "r" * 65_000}]}, "domain-events")
def test_whatever_is_sent_on_fits_its_frame(headers: dict[str, Any], exchange: str) -> None:
    """Where the delivery did: else it could never be moved."""
    received = delivery(headers=headers, exchange=exchange)
    if len(frame_of(received)) <= FRAME:
        for sent in sent_on(received):
            assert len(header_frame(sent)) <= FRAME


def headers_of_size(size: int) -> dict[str, Any]:
    empty = envelope._size({"h": ""})
    return {"h": "x" * (size - empty)}


def test_sender_that_filled_the_frame_costs_its_own_headers() -> None:
    """The largest of them; never ours: the reason and its traceback stay."""
    assert envelope._size(headers_of_size(1000)) == 1000
    small = message.dead_letter(delivery(headers=headers_of_size(50_000)), "q", failure())
    assert {"h", envelope.TRACEBACK, envelope.ERROR_MESSAGE} <= set(headers_of(small))
    returned = {envelope.RETRIES: 2, envelope.ROUTING_KEY: "user.registered", "small": "kept"}
    for size in (124 * 1024 - 2000, 124 * 1024, 126_000):
        received = delivery(
            headers={**headers_of_size(size), **returned}, exchange="domain-events.due"
        )
        sent = headers_of(message.dead_letter(received, "q", failure("x" * 500)))
        assert "h" not in sent
        assert sent["small"] == "kept"
        assert sent[envelope.TRACEBACK].endswith("x" * 500 + "\n")
        assert sent[envelope.ROUTING_KEY] == "user.registered"
        assert sent[envelope.RETRIES] == 2


def test_a_retry_and_a_replay_fit_where_the_event_did() -> None:
    """A frame that its sender filled to the last byte has room for no header of ours."""
    received = delivery()
    filled = {"h": "x" * 131_000}
    received.properties.headers = filled
    filled["h"] += "x" * (FRAME - len(frame_of(received)))
    assert len(frame_of(received)) == FRAME
    for sent in (
        message.retry(received, LATER, ValueError("broken")),
        message.hand_back(received, LATER),
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
        assert "h" in headers_of(sent)
        channel.basic_publish("", queue, sent.body, properties(sent))
        passed = channel.basic_get(queue, auto_ack=True)
        assert passed is not None
        assert passed.properties.headers == headers_of(sent)


# --- headers that nobody should send -------------------------------------------------------------


@pytest.mark.parametrize(
    ("forged", "retries"),
    [(True, 0), (-1, 0), ("1", 0), (None, 0), (2, 2), (2**63 - 1, 2**31 - 1), (10**30, 2**31 - 1)],
)
def test_forged_retry_count_can_be_counted_on_and_sent_on(forged: object, retries: int) -> None:
    """One that no frame could carry would keep the event from its dead letters."""
    assert delivery(headers={envelope.RETRIES: forged}).retries == 0
    received = delivery(headers={envelope.RETRIES: forged}, exchange="domain-events.due")
    assert received.retries == retries
    assert type(received.retries) is int
    for sent in (
        message.retry(received, LATER, ValueError("broken")),
        message.dead_letter(received, "print", ValueError()),
    ):
        assert header_frame(sent)


def test_header_that_is_nested_too_deep_is_sent_on_cut() -> None:
    """Also one that takes all of the stack to be walked."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert header_frame(message.replay(delivery(headers={"deep": value, "other": 1}), "print"))
