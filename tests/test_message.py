"""A domain event as a message, and what becomes of a delivery: domain_events/message.py."""

from __future__ import annotations

import json
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from deliveries import delivery, exception, failure
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain_events import DomainEvent, InvalidEvent, Retry, message
from domain_events.message import (
    NO_FAILURE,
    Delivery,
    Failure,
    GivenUp,
    Later,
    Message,
    ToDeadLetters,
    ToExchange,
    ToSubscriber,
    UndeliveredOf,
)
from domain_events.text import truncate

# Machines that are shared are slow at times.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

IDS = [UUID(int=1), "an-id", "ü" * 127]


@contextmanager
def being_handled(event: DomainEvent, of: Delivery) -> Iterator[None]:
    token = message.handling.set((event, of))
    try:
        yield
    finally:
        message.handling.reset(token)


# ------------------------------------------------------------------ an event as a message


def test_an_event_becomes_a_message_with_all_that_it_has() -> None:
    """The body is the envelope; its id is the message's and begins a correlation."""
    event = DomainEvent("user.registered", {"user_id": 1}, 17, "id-1", 1700000000.75)
    sent = message.from_event(event, "domain-events", "shop", mandatory=True)
    assert sent == Message(
        ToExchange("domain-events"),
        "user.registered",
        event.to_json().encode(),
        message_id="id-1",
        correlation_id="id-1",
        timestamp=1700000000,
        app_id="shop",
        mandatory=True,
    )


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


@pytest.mark.parametrize("uuid_string", IDS, ids=str)
def test_an_id_may_be_a_uuid_or_any_short_text(uuid_string: Any) -> None:
    """It is the message's id, as text."""
    event = DomainEvent("a.b", {}, uuid_string=uuid_string)
    sent = message.from_event(event, "x", "shop", mandatory=False)
    assert sent.message_id == str(uuid_string)
    assert json.loads(sent.body)["uuid_string"] == str(uuid_string)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"routing_key": ""}, "routing key must be a non-empty str"),
        ({"routing_key": None}, "routing key must be a non-empty str"),
        ({"routing_key": 7}, "routing key must be a non-empty str"),
        ({"routing_key": "x" * 256}, "routing key must be at most 255 bytes, not 256"),
        ({"routing_key": "ü" * 128}, "routing key must be at most 255 bytes, not 256"),
        ({"routing_key": "\ud800"}, "routing key is not valid Unicode"),
        ({"routing_key": "user.*"}, "wildcard"),
        ({"routing_key": "#"}, "wildcard"),
        ({"uuid_string": ""}, "uuid_string must be a non-empty str"),
        ({"uuid_string": 7}, "uuid_string must be a non-empty str"),
        ({"uuid_string": "x" * 256}, "uuid_string must be at most 255 bytes"),
        ({"uuid_string": "\ud800"}, "uuid_string is not valid Unicode"),
        ({"data": object()}, "object is not JSON-serializable"),
        ({"timestamp": "now"}, "timestamp must be Unix seconds"),
        ({"timestamp": True}, "timestamp must be Unix seconds"),
        ({"timestamp": Decimal(1)}, "timestamp must be Unix seconds"),
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
    assert sent.cause == "first"
    assert sent.correlation_id == "the-beginning"
    after = message.from_event(DomainEvent("c.d", {}, uuid_string="after"), "x", "s", False)
    assert (after.cause, after.correlation_id) == (None, "after")


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


# ------------------------------------------------------------------ a delivery as an event


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


def test_the_routing_key_of_an_event_is_the_one_it_was_published_with() -> None:
    """Whatever its envelope claims, which is returned beside it."""
    event, claimed = message.read_event(delivery(routing_key="user.renamed"))
    assert (event.routing_key, claimed) == ("user.renamed", "user.registered")


def test_the_routing_key_in_an_envelope_is_one_that_amqp_can_carry() -> None:
    """Or None, also for what is not an envelope."""
    assert message.routing_key_in(delivery().body) == "user.registered"
    for key in ("", "x" * 256, "\\ud800", "\\u0000" * 256):
        body = b'{"routing_key": "%s", "data": {}, "uuid_string": "id"}' % key.encode()
        assert message.routing_key_in(body) is None
    assert message.routing_key_in(b"\xff") is None


# ------------------------------------------------------------------ sent on


LATER = Later("domain-events", "q", 2.5)


def sent_on(received: Delivery) -> list[Message]:
    return [
        message.retry(received, LATER, ValueError("broken")),
        message.hand_back(received, LATER),
        message.hand_back(received, ToSubscriber("q")),
        message.dead_letter(received, "q", ValueError("why")),
        message.replay(received, "q"),
        message.sent_on(received, ToSubscriber("q")),
    ]


def test_what_is_sent_on_keeps_what_it_was() -> None:
    """Mandatory, for the original is acked next; under the key that it was published with."""
    received = delivery(
        b"\x00\xff no event",
        {"domain-events-cause": "c"},
        message_id="id-1",
        correlation_id="correlation",
        timestamp=17,
        app_id="shop",
    )
    for sent in sent_on(received):
        assert sent.source is received
        assert sent.body == b"\x00\xff no event"
        assert sent.mandatory
        assert sent.routing_key == "user.registered"
        assert (sent.message_id, sent.correlation_id) == ("id-1", "correlation")
        assert (sent.timestamp, sent.app_id, sent.cause) == (17, "shop", "c")


def test_what_is_sent_on_goes_where_it_belongs() -> None:
    """A retry later to its subscriber, what is given up to the dead letters, a replay back."""
    retry, handed_back, here, dead, replay, anew = sent_on(delivery())
    assert retry.destination == handed_back.destination == LATER
    assert dead.destination == ToDeadLetters("q")
    assert here.destination == replay.destination == anew.destination == ToSubscriber("q")


def test_places_are_named_for_a_log() -> None:
    """With whose they are."""
    assert str(ToExchange("x")) == "the exchange 'x'"
    assert str(ToSubscriber("q")) == "the queue 'q'"
    assert str(LATER) == "the queue 'q' in 2.5 s"
    assert str(ToDeadLetters("q")) == "the dead letters of 'q'"
    assert str(UndeliveredOf("x")) == "the undelivered retries of 'x'"


def test_a_retry_counts_one_more_and_keeps_its_first_failure() -> None:
    """The last one is known when it is given up; what began it would be forgotten."""
    first = message.retry(delivery(), LATER, ValueError("broken"))
    assert (first.retries, first.hand_backs) == (1, 0)
    assert first.failure == Failure(first_error_type="ValueError", first_error_message="broken")
    headers = {
        "domain-events-retries": 1,
        "domain-events-hand-backs": 3,
        "domain-events-first-error-type": "ValueError",
        "domain-events-first-error-message": "broken",
    }
    back = delivery(headers=headers, exchange="domain-events.due")
    second = message.retry(back, LATER, KeyError("later"))
    assert (second.retries, second.hand_backs) == (2, 3)
    assert second.failure == first.failure
    handed_back = message.hand_back(back, LATER)
    assert (handed_back.retries, handed_back.hand_backs) == (1, 4)
    assert handed_back.failure == first.failure


# ------------------------------------------------------------------ dead letters


def test_a_dead_letter_carries_its_reason() -> None:
    """Subscriber, exception, traceback, time, host, retries; and the first failure, if another."""
    before = datetime.now(timezone.utc)
    headers = {"domain-events-retries": 2, "domain-events-first-error-type": "TimeoutError"}
    received = delivery(headers=headers, exchange="domain-events.due")
    sent = message.dead_letter(received, "mail", failure())
    assert sent.retries == 2
    reason = vars(sent.failure).copy()
    failed_at = reason.pop("failed_at")
    assert before <= failed_at <= datetime.now(timezone.utc)
    assert failed_at.utcoffset() == timedelta(0)
    trace = reason.pop("traceback")
    assert trace.startswith("Traceback (most recent call last):")
    assert "in failure" in trace
    assert trace.endswith("ValueError: no such user\n")
    assert reason == {
        "subscriber": "mail",
        "error_type": "ValueError",
        "error_message": "no such user",
        "host": socket.gethostname(),
        "first_error_type": "TimeoutError",
        "first_error_message": None,
    }


def test_an_exception_that_is_no_builtin_is_named_with_its_module() -> None:
    """Two classes of one name are told apart."""
    sent = message.dead_letter(delivery(), "q", InvalidEvent("no"))
    assert sent.failure.error_type == "domain_events.errors.InvalidEvent"


def test_a_dead_letter_on_which_no_handler_has_failed_says_why() -> None:
    """By its error type, in the words of an operator and not the name of a class."""
    sent = message.dead_letter(delivery(), "q", GivenUp("unlisted routing key", "Nobody took it."))
    assert sent.failure.error_type == "unlisted routing key"
    assert sent.failure.error_message == "Nobody took it."


def test_the_reason_of_a_retry_is_what_it_was_raised_for() -> None:
    """Behind the signal, as a traceback shows it: the cause, else what was being handled."""
    behind = ValueError("behind")
    signal = Retry()
    assert message.reason_of(signal) is signal
    signal.__context__ = behind
    assert message.reason_of(signal) is behind
    signal.__suppress_context__ = True
    assert message.reason_of(signal) is signal
    signal.__cause__ = KeyError("cause")
    assert message.reason_of(signal) is signal.__cause__


class BrokenError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class NoTextError(Exception):
    def __str__(self) -> str:
        return None  # type: ignore[return-value]  # noqa: PLE0307


@pytest.mark.parametrize("error", [BrokenError(), NoTextError()], ids=["raises", "no text"])
def test_an_exception_that_cannot_be_shown_is_a_dead_letter_too(error: Exception) -> None:
    """A broken __str__ must not keep the event from its dead letters."""
    reason = message.dead_letter(delivery(), "q", error).failure
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    assert reason.error_type == name
    assert reason.error_message == f"<{name} that cannot be shown>"


def test_a_long_message_is_cut_at_its_end_a_long_traceback_at_its_beginning() -> None:
    """What is most telling is kept: how a message begins, where a traceback ends."""
    error = failure("begin" + "x" * 100_000 + "end")
    text = message.dead_letter(delivery(), "q", error).failure.error_message or ""
    assert len(text) == 2048
    assert text.startswith("beginxxx")
    assert text.endswith("xxx ...")
    trace = message.dead_letter(delivery(), "q", error).failure.traceback or ""
    assert len(trace) == 16 * 1024
    assert trace.startswith("... xxx")
    assert trace.endswith("xxxend\n")
    first = message.retry(delivery(), LATER, error).failure.first_error_message
    assert first == text


def test_a_name_of_a_class_that_is_too_long_is_cut() -> None:
    """It goes into a header, too."""
    error = exception("text", "E" * 100_000, 0)
    assert len(message.dead_letter(delivery(), "q", error).failure.error_type or "") == 2048
    assert len(message.retry(delivery(), LATER, error).failure.first_error_type or "") == 2048


def test_a_traceback_tells_causes() -> None:
    """``raise ... from`` is seen in the dead letter."""
    sent = message.dead_letter(delivery(), "q", exception("text", "TheError", 1))
    trace = sent.failure.traceback or ""
    assert trace.count("TheError: text") == 2
    assert "direct cause" in trace
    assert traceback.format_exc() not in trace


def test_a_replay_is_the_event_as_it_was_before_it_failed() -> None:
    """No reason, no retries and no hand-backs are left; the cause is."""
    headers = {
        "domain-events-cause": "c",
        "domain-events-retries": 3,
        "domain-events-hand-backs": 3,
        "domain-events-error-type": "KeyError",
    }
    sent = message.replay(delivery(headers=headers, exchange=""), "q")
    assert (sent.retries, sent.hand_backs, sent.failure) == (0, 0, NO_FAILURE)
    assert sent.cause == "c"


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
    shortened = truncate(text, most, keep_end=keep_end)
    encoded = shortened.encode()  # or UnicodeEncodeError
    whole = text.encode("utf-8", "replace").decode()
    assert len(encoded) <= most
    if len(whole.encode()) <= most:
        assert shortened == whole
        return
    assert len(encoded) > most - 4
    if keep_end:
        assert shortened.startswith("... ")
        assert whole.endswith(shortened[4:])
    else:
        assert shortened.endswith(" ...")
        assert whole.startswith(shortened[:-4])
