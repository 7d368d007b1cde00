"""A program that uses every public name, for pyright in strict mode: `make types`.

Where the library leaves a type unknown, the line that meets it here is an error. It is not run.
"""

# A line that is wrong on purpose must be an error to both: mypy warns of ignores without one, too.
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TypedDict
from uuid import UUID

from typing_extensions import assert_type

import domain_events
from domain_events import (
    DEFAULT,
    DISCARD,
    LEAVE,
    RETRY,
    Backoff,
    BrokerUnavailable,
    ConfigurationError,
    ConnectionChange,
    DeadLetter,
    DeadLetters,
    DomainEvent,
    DomainEventsError,
    EventNotConfirmed,
    EventRejected,
    EventUnroutable,
    InvalidEvent,
    Middleware,
    Operation,
    Outgoing,
    Publisher,
    Reject,
    Retry,
    Subscriber,
    TopologyError,
    Undelivered,
    UndeliveredEvent,
    close_publishers,
    configure,
    printable,
    publish_domain_event,
    replay_all,
    replay_event,
)
from domain_events.pytest_plugin import event_broker
from domain_events.testing import Delivered, EventBroker, Outcome


class Tenants(Middleware):
    """Every method of a middleware, and what each is given."""

    def publishing(self, outgoing: Outgoing) -> Callable[[BaseException | None], None]:
        outgoing.headers["tenant"] = "acme"
        if outgoing.operation is Operation.RETRY:
            print(outgoing.delay, outgoing.subscriber, outgoing.event, outgoing.batch)

        def done(error: BaseException | None) -> None:
            print(error)

        return done

    @contextmanager
    def handling(self, event: DomainEvent) -> Generator[None, None, None]:
        print(event.headers, event.correlation_id, event.cause, event.version)
        print(event.redelivered or event.replayed, event.subscriber, event.details.headers)
        yield

    def delivered(self, delivered: Delivered) -> None:
        print(delivered.outcome is Outcome.RETRY, delivered.error, delivered.seconds)

    def connection(self, change: ConnectionChange) -> None:
        print(change.state, change.owner, change.purpose, change.address, change.reason)


class User(TypedDict):
    """What the events here are about."""

    user_id: int


def settings() -> str:
    """Every way to name a broker."""
    configure()
    configure("amqp://shop:secret@broker.example/shop", app_id="shop")
    configure(["amqp://one.example", "amqp://two.example"])
    configure(None)
    configure(middleware=[Tenants()])
    publish_domain_event("a.b", {}, headers={"a": 1}, correlation_id="b", cause="c", version=2)
    event = DomainEvent("a.b", {"c": 1}, headers={"a": True}, version=2)
    Publisher(middleware=[Tenants()]).publish(event.derived("d.e", {}, 7, key="8"))
    Subscriber(middleware=[Tenants()])
    configure(connection_settings=DEFAULT)
    return domain_events.__version__


# --- publishing ----------------------------------------------------------------------------------


def publish() -> DomainEvent:
    """With the function, by position as domain-event-broker has it, and by name."""
    user: User = {"user_id": 42}
    publish_domain_event("user.registered", user)
    publish_domain_event("user.registered", user, 42, "an-id", 1.5, "memory://")
    return publish_domain_event(
        "user.registered",
        data=user,
        domain_object_id="42",
        uuid_string=None,
        timestamp=None,
        connection_settings=DEFAULT,
        mandatory=True,
        timeout=5,
        exchange="shop",
    )


def publish_many(events: Iterator[DomainEvent]) -> int:
    """With a publisher."""
    with Publisher() as publisher:
        event: DomainEvent = publisher.publish(DomainEvent("user.registered", {"user_id": 1}))
        publisher.publish(event, mandatory=True, timeout=1.5)
    other = Publisher("memory://", "shop", "topic", timeout=5)
    number: int = other.publish_many(events, mandatory=False, timeout=60)
    other.close(timeout=1)
    close_publishers(timeout=1)
    return number


def events() -> str:
    """An event, and back from its JSON."""
    event = DomainEvent("user.registered", {"user_id": 42}, 42, "an-id", 1.5, 0)
    again: DomainEvent = DomainEvent.from_json(event.to_json())
    parts: tuple[str, str | int | UUID | None, str, float, int] = (
        again.routing_key,
        again.domain_object_id,
        again.uuid_string,
        again.timestamp,
        again.retries,
    )
    return printable(f"{event == again} {parts}", 100)


def errors() -> Sequence[DomainEvent]:
    """Each kind; and what they know of the events."""
    kinds: list[type[DomainEventsError]] = [
        BrokerUnavailable,
        ConfigurationError,
        EventNotConfirmed,
        EventRejected,
        EventUnroutable,
        InvalidEvent,
        TopologyError,
    ]
    try:
        publish()
    except tuple(kinds) as error:
        event: DomainEvent | None = error.event
        counted: int = error.taken + error.published
        print(event, counted)
        return [*error.unconfirmed, *error.perhaps]
    return []


# --- subscribing ---------------------------------------------------------------------------------


def send_mail(event: DomainEvent) -> None:
    """A handler."""
    if event.retries:
        raise Retry(delay=30.0)
    raise Reject("no address")


class Mailer:
    """A handler that is a method, and one that is an object."""

    def send(self, event: DomainEvent) -> bool:
        """What a handler returns is nobody's business."""
        return event.retries > 0

    def __call__(self, event: DomainEvent) -> None:
        """As a handler."""


def subscribe() -> None:
    """Every option, as a call and as a decorator."""
    subscriber = Subscriber("memory://", "shop", "topic", workers=4, timeout=5)
    subscriber.register(send_mail, "mail", ["user.*"], True, True, False, False, 3)
    subscriber.register(
        Mailer().send,
        name="mailer",
        binding_keys=("user.*", "order.#"),
        dead_letter=None,
        durable=True,
        exclusive=False,
        auto_delete=False,
        max_retries=3,
        retry_on=(ConnectionError, TimeoutError),
        backoff=Backoff(first=1.0, factor=2.0, maximum=600.0, jitter=0.2),
        queue_type="quorum",
        prefetch_count=50,
        ordered=True,
        retired_keys=["user.imported"],
    )
    subscriber.register(Mailer(), "object", ["#"], retry_on=OSError, queue_type="classic")

    @subscriber.on("user.*", "order.#", name="decorated", max_retries=3, retry_on=OSError)
    def handle(event: DomainEvent) -> str:
        return event.routing_key

    same: Callable[[DomainEvent], str] = handle
    print(same(DomainEvent("user.registered", {})), subscriber.exchange, subscriber.exchange_type)
    subscriber.start_consuming(timeout=1.5)
    subscriber.stop_consuming()


# --- typed data ----------------------------------------------------------------------------------


@dataclass
class UserRegistered:
    """A payload."""

    user_id: int


def greet(event: DomainEvent[UserRegistered]) -> int:
    """``event.data`` is one: its fields are known, and others are errors."""
    user_id: int = event.data.user_id
    assert_type(event.data, UserRegistered)
    del event.data.name  # type: ignore[attr-defined]
    text: str = event.data.user_id  # type: ignore[assignment]
    print(text, event.version, event.headers)
    return user_id


class Greeter:
    """With a typed handler."""

    def greet(self, event: DomainEvent[UserRegistered]) -> None:
        """As a method."""


def v1_to_v2(data: dict[str, object]) -> dict[str, object]:
    """A step between versions."""
    return {"user_id": data["id"]}


def subscribe_typed() -> None:
    """By the annotation, and by the option; as a call and as a decorator."""
    subscriber = Subscriber()
    subscriber.register(greet, "greet", ["user.registered"], upcast={1: v1_to_v2})
    subscriber.register(Greeter().greet, "greeter", ["user.registered"], payload=UserRegistered)
    subscriber.register(send_mail, "either", ["#"], payload=UserRegistered | User)

    @subscriber.on("user.registered", name="on", payload=UserRegistered, upcast={1: v1_to_v2})
    def handle(event: DomainEvent[UserRegistered]) -> int:
        return event.data.user_id

    same: Callable[[DomainEvent[UserRegistered]], int] = handle
    event = DomainEvent[UserRegistered]("user.registered", UserRegistered(42), version=2)
    publish_domain_event("user.registered", UserRegistered(42))
    print(same(event), greet(event))
    greet(DomainEvent[User]("user.registered", {"user_id": 42}))  # type: ignore[arg-type]


# --- dead letters --------------------------------------------------------------------------------


def seen(letter: DeadLetter) -> tuple[str | None, ...]:
    """What is known of a dead letter."""
    event: DomainEvent | None = letter.event
    failed_at: datetime | None = letter.failed_at
    return (
        str(event or letter.body),
        letter.routing_key,
        letter.subscriber,
        letter.error_type,
        letter.error_message,
        letter.traceback,
        failed_at.isoformat() if failed_at is not None else None,
        letter.host,
        str(letter.retries),
        letter.first_error_type,
        letter.first_error_message,
    )


def look_after() -> int:
    """Dead letters and undelivered retries."""
    with DeadLetters("mail", DEFAULT, timeout=5) as dead_letters:
        for letter in dead_letters:
            print(seen(letter))
            letter.replay()
            letter.discard()
        number: int = dead_letters.count()
        number += dead_letters.replay_all() + dead_letters.discard_all()
    undelivered = Undelivered("shop", "memory://", timeout=5)
    for entry in undelivered:
        each: UndeliveredEvent = entry
        print(each.subscriber, each.event, each.routing_key, each.body)
        each.hand_back()
        each.discard()
    number += undelivered.count() + undelivered.hand_back_all(["mail"])
    undelivered.close()
    return number


def decide(body: bytes, **_kwargs: object) -> str:
    """As domain-event-broker's callbacks do."""
    return {b"{}": RETRY, b"[]": LEAVE}.get(body, DISCARD)


def replay() -> int:
    """As with domain-event-broker."""
    return replay_event("mail") + replay_all("mail", decide, "memory://")


# --- the kit for tests ---------------------------------------------------------------------------


def test_mail(event_broker: EventBroker) -> None:
    """With the fixture."""
    subscriber = Subscriber()
    event_broker.attach(subscriber)
    deliveries: list[Delivered] = event_broker.deliver(subscriber, DomainEvent("a.b", {}))
    deliveries += event_broker.deliver_all(subscriber)
    for delivered in deliveries:
        outcome: Outcome = delivered.outcome
        print(outcome, delivered.subscriber, delivered.event, delivered.error, delivered.delay)
    event: DomainEvent = event_broker.assert_published(
        "user.*", {"user_id": 42}, domain_object_id="42", times=1
    )
    event_broker.assert_not_published("order.#", {}, domain_object_id=None, headers={"tenant": "x"})
    event_broker.assert_published("user.*", UserRegistered(42), headers={"tenant": "x"})
    deliveries += event_broker.deliver(subscriber, event, raising=True)
    deliveries += event_broker.deliver_all(subscriber, event, raising=True)
    with event_broker.outage():
        print(event_broker.published)
    event_broker.advance(600)
    letters: list[DeadLetter] = event_broker.dead_letters("mail")
    print(event, letters, event_broker.published, event_broker.url)
    event_broker.clear()


def by_hand() -> object:
    """As a context manager, and with calls."""
    with EventBroker(virtual_time=False) as broker:
        print(broker.published)
    other: EventBroker = EventBroker().start()
    other.stop()
    return event_broker
