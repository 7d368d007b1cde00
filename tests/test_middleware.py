"""Middleware and the details of events where no broker matters: mistakes, derived events, kinds."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import pickle
import weakref
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from domain_events import (
    ConfigurationError,
    DomainEvent,
    InvalidEvent,
    Middleware,
    Publisher,
    Subscriber,
    configure,
    publish_domain_event,
)
from domain_events.testing import EventBroker


class Asynchronous(Middleware):
    async def delivered(self, delivered: object) -> None:  # type: ignore[override]
        await asyncio.sleep(0)


class Undecorated(Middleware):
    def handling(self, event: DomainEvent) -> Iterator[None]:  # type: ignore[override]
        yield


class NotAContextManager(Middleware):
    def handling(self, event: DomainEvent) -> Any:
        return event


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (Middleware(), "put it into a list"),
        ([Middleware], r"give an instance, Middleware\(\)"),
        ([print], "each an instance of a subclass"),
        ("tracing", "must be a list of Middleware"),
        (None, "must be a list of Middleware"),
        ([Asynchronous()], "Asynchronous.delivered is async"),
        ([Undecorated()], "Undecorated.handling is a generator; decorate it"),
    ],
)
def test_what_is_not_middleware_is_refused_where_it_is_given(given: Any, why: str) -> None:
    for take in (configure, Publisher, Subscriber):
        with pytest.raises(ConfigurationError, match=why):
            take(middleware=given)


@pytest.mark.parametrize("given", [Middleware(), [Middleware()]])
def test_middleware_in_the_place_of_the_broker_is_an_error_with_the_right_call(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"configure\(middleware=\[...\]\)"):
        configure(given)


def test_handling_that_returns_something_else_fails_the_event_and_says_whose_it_is() -> None:
    subscriber = Subscriber(middleware=[NotAContextManager()])
    with EventBroker() as broker:
        subscriber.register(print, "mail", ["#"])
        (delivered,) = broker.deliver(subscriber, DomainEvent("a"))
        assert "NotAContextManager is wrong: its handling() must" in str(delivered.error)
        assert len(broker.dead_letters("mail")) == 1


def test_middleware_of_configure_applies_to_what_was_made_before() -> None:
    seen: list[str] = []

    class Sees(Middleware):
        def publishing(self, outgoing: Any) -> None:
            seen.append(outgoing.event.routing_key)

    with EventBroker(), Publisher() as publisher:
        publisher.publish(DomainEvent("before"))
        configure(middleware=[Sees()])
        try:
            publisher.publish(DomainEvent("now"))
            publish_domain_event("now.too", {})
        finally:
            configure()
        publisher.publish(DomainEvent("afterwards"))
    assert seen == ["now", "now.too"]


def test_nothing_is_announced_when_publishing_is_switched_off() -> None:
    class Fails(Middleware):
        def publishing(self, outgoing: Any) -> None:
            raise AssertionError

    with Publisher(None, middleware=[Fails()]) as publisher:
        publisher.publish(DomainEvent("a"))
        assert publisher.publish_many([DomainEvent("a")]) == 1


def test_iterable_that_fails_still_has_every_event_reported() -> None:
    """Also the event of which a middleware makes something that cannot be sent."""
    results: list[BaseException | None] = []

    class Counts(Middleware):
        def publishing(self, outgoing: Any) -> Any:
            if outgoing.event.routing_key == "bad":
                raise LookupError("bad")
            return results.append

    def events() -> Iterator[DomainEvent]:
        yield DomainEvent("a")
        yield DomainEvent("b")
        raise OSError("the file ends here")

    with EventBroker(), Publisher(middleware=[Counts()]) as publisher:
        with pytest.raises(OSError, match="ends here"):
            publisher.publish_many(events())
        assert results == [None, None]
        with pytest.raises(LookupError) as caught:
            publisher.publish_many([DomainEvent("a"), DomainEvent("bad"), DomainEvent("c")])
        assert results == [None] * 3
        error: Any = caught.value
        assert (error.published, [event.routing_key for event in error.unconfirmed]) == (1, ["bad"])


# --- what an event knows ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"domain-events-retries": 7}, "not for publishers"),
        ({"x-death": "a"}, "not for publishers"),
        ({"CC": "a"}, "not for publishers"),
        ({"": "a"}, "The name of a header"),
        ({1: "a"}, "The name of a header must be a str"),
        ({"n" * 256: "a"}, "The name of a header"),
        ({"price": 1.5}, "The header 'price' must be a str, an int of 64 bits or a bool, not of"),
        ({"none": None}, "of type NoneType"),
        ({"bytes": b""}, "of type bytes"),
        ({"large": 2**63}, "an int of 64 bits"),
        ({"half": "\ud800"}, "not valid Unicode"),
        ({"long": "a" * 33_000}, "at most 32,768 bytes"),
        (["a"], "headers must be a dict, not of type list"),
    ],
)
def test_header_that_cannot_be_sent_is_refused(headers: Any, why: str) -> None:
    with EventBroker() as broker:
        with pytest.raises(InvalidEvent, match=why):
            publish_domain_event("a", {}, headers=headers)
        assert not broker.published


@pytest.mark.parametrize(
    ("detail", "why"),
    [
        ({"version": 0}, "version must be an int from 1"),
        ({"version": 1.5}, "version must be an int from 1 to 2,147,483,647, not 1.5"),
        ({"version": "2"}, "version must be an int from 1 to 2,147,483,647, not '2'"),
        ({"correlation_id": ""}, "correlation_id must be a non-empty str"),
        ({"correlation_id": "c" * 256}, "correlation_id must be at most 255 bytes"),
        ({"cause": "c" * 256}, "cause must be at most 255 bytes"),
    ],
)
def test_detail_that_cannot_be_sent_is_refused(detail: Any, why: str) -> None:
    with EventBroker(), pytest.raises(InvalidEvent, match=why):
        publish_domain_event("a", {}, **detail)


def test_details_are_not_part_of_the_envelope_or_of_equality() -> None:
    plain = DomainEvent("a", {"b": 1})
    event = DomainEvent(
        *plain.event_data.values(), headers={"h": "1"}, correlation_id="c", cause="d", version=2
    )
    assert event == plain
    assert hash(event) == hash(plain)
    assert event.to_json() == plain.to_json()
    assert "headers" not in dataclasses.asdict(event)


def test_headers_of_an_event_cannot_be_changed_by_it_or_by_the_callers_dict() -> None:
    given = {"h": "1"}
    event = DomainEvent("a", headers=given)
    given["h"] = "2"
    assert event.headers == {"h": "1"}
    with pytest.raises(TypeError):
        event.headers["h"] = "3"  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.version = 3  # type: ignore[misc]


def test_received_event_can_be_pickled_copied_and_published_again() -> None:
    received: list[DomainEvent] = []
    subscriber = Subscriber()
    with EventBroker() as broker:
        subscriber.register(received.append, "mail", ["#"])
        broker.deliver(subscriber, DomainEvent("a", {"b": 1}, headers={"h": "1"}, version=2))
        (event,) = received
        for again in (copy.deepcopy(event), copy.copy(event), pickle.loads(pickle.dumps(event))):
            assert again == event
            assert again.details == event.details
            assert again.subscriber == "mail"
        with Publisher() as publisher:
            publisher.publish(event)
        broker.deliver(subscriber)
        assert received[1].headers == {"h": "1"}
        assert received[1].version == 2


# --- derived events --------------------------------------------------------------------------


def handled_twice(*events: DomainEvent) -> list[DomainEvent]:
    """The same events, as a second delivery brings them: other objects, with the same envelope."""
    return [DomainEvent.from_json(event.to_json()) for event in events]


def test_derived_event_is_the_same_each_time_its_handler_runs() -> None:
    cause = DomainEvent("order.paid", {"lines": [1, 2]}, correlation_id="order-7")
    (again,) = handled_twice(cause)
    first = cause.derived("order.shipped", {"n": 1}, 7, headers={"h": "1"}, version=2)
    second = again.derived("order.shipped", {"n": 2}, 7)
    assert first.uuid_string == second.uuid_string != cause.uuid_string
    assert (first.correlation_id, first.cause) == ("order-7", cause.uuid_string)
    assert again.derived("order.shipped", {"n": 2}, 7) == second
    assert second.correlation_id == again.uuid_string
    assert (first.headers, first.version) == ({"h": "1"}, 2)


def test_id_of_a_derived_event_depends_on_what_tells_it_apart() -> None:
    cause, other = DomainEvent("a"), DomainEvent("a")
    ids = {
        cause.derived("b").uuid_string,
        cause.derived("c").uuid_string,
        cause.derived("b", None, 1).uuid_string,
        cause.derived("b", None, None, key="1").uuid_string,
        other.derived("b").uuid_string,
        cause.derived("b").derived("b").uuid_string,
    }
    assert len(ids) == 6


@pytest.mark.parametrize("key", [object(), None, [1], {"n": 1}, 1.5, b"1"])
def test_key_of_a_derived_event_is_the_same_in_each_run(key: Any) -> None:
    """The text of an object has its address, which another process would not have."""
    with pytest.raises(InvalidEvent, match="key must be a str, an int or a UUID, not of type"):
        DomainEvent("a").derived("b", key=key)
    for right in (7, UUID(int=7)):
        derived = DomainEvent("a", uuid_string="x").derived("b", key=right)  # type: ignore[arg-type]
        as_text = DomainEvent("a", uuid_string="x").derived("b", key=str(right))
        assert derived.uuid_string == as_text.uuid_string


def test_id_of_a_derived_event_never_changes_between_releases() -> None:
    """Two releases of one subscriber may handle the same event."""
    cause = DomainEvent("a", {}, uuid_string="9a0ba3c6-7a4a-4b9f-8f2e-000000000001")
    assert cause.derived("b", {}, 7, key="k").uuid_string == "9b428954-272a-5174-b169-1cf4d350788d"


def test_two_that_would_get_the_same_id_are_refused() -> None:
    """A loop that forgets the key: all but the first would be taken for copies of it."""
    cause = DomainEvent("order.paid", {"lines": [1, 2]})
    cause.derived("line.shipped", {"line": 1})
    with pytest.raises(InvalidEvent, match=r"give each a key="):
        cause.derived("line.shipped", {"line": 2})
    ids = {
        cause.derived("line.shipped", {"line": line}, key=str(line)).uuid_string
        for line in cause.data["lines"]
    }
    assert len(ids) == 2


def test_two_with_the_same_id_are_refused_also_if_their_data_is_one_object() -> None:
    """A loop that changes a dictionary and derives an event from it each time."""
    cause = DomainEvent("order.paid")
    line = {"line": 1}
    cause.derived("line.shipped", line)
    line["line"] = 2
    with pytest.raises(InvalidEvent, match=r"give each a key="):
        cause.derived("line.shipped", line)


def test_same_data_is_the_same_in_any_order() -> None:
    cause = DomainEvent("order.paid")
    one = cause.derived("line.shipped", {"a": 1, "b": {"c": 1, "d": 2}})
    assert cause.derived("line.shipped", {"b": {"d": 2, "c": 1}, "a": 1}) == one


@pytest.mark.parametrize("data", [{"n": float("nan")}, {"n": object()}, {1: 1, "1": 2}])
def test_derived_event_that_is_not_json_is_refused_as_any_other(data: Any) -> None:
    """When it is published, and not as if its data were another event's."""
    cause = DomainEvent("a")
    cause.derived("b", data)
    with pytest.raises(InvalidEvent, match="cannot be published"):
        cause.derived("b", data).to_json()


def test_event_does_not_keep_what_was_derived_from_it() -> None:
    """A handler may derive very many, with much data."""
    cause = DomainEvent("a")
    weak = [weakref.ref(cause.derived("b", {"n": n}, key=str(n))) for n in range(3)]
    assert [each() for each in weak] == [None] * 3


@pytest.mark.parametrize("event_id", ["x" * 300, "\u00e9" * 200, "a\ud800b"])
def test_event_with_an_id_that_amqp_cannot_carry_has_derived_ones(
    event_broker: EventBroker, event_id: str
) -> None:
    """Another program may have written it into the envelope."""
    received = DomainEvent.from_json(DomainEvent("a", uuid_string=event_id).to_json())
    derived = received.derived("b")
    assert derived.cause
    assert derived.cause == derived.correlation_id
    publish_domain_event("b", uuid_string="1", data={}, cause=derived.cause)
    with Publisher() as publisher:
        publisher.publish(derived)
    event_broker.assert_published("b", times=2)


def test_two_subscribers_derive_two_events() -> None:
    """Theirs are not copies of each other, whatever their routing keys."""
    ids: dict[str | None, str] = {}
    subscriber = Subscriber()

    def handle(event: DomainEvent) -> None:
        ids[event.subscriber] = event.derived("mail.sent", {"a": 1}).uuid_string

    with EventBroker() as broker, contextlib.closing(subscriber):
        subscriber.register(handle, "one", ["a"])
        subscriber.register(handle, "two", ["a"])
        broker.deliver(subscriber, DomainEvent("a"))
    assert ids.keys() == {"one", "two"}
    assert len(set(ids.values())) == 2
