"""Traces and metrics of events, as OpenTelemetry's SDK gets them.

Most of it on the embedded broker; what depends on a connection, and the pictures in the
documentation, on RabbitMQ.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pika.connection
import pytest
import trace_picture
from bench import Bench, running
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from support import Names, wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    ConnectionChange,
    ConnectionState,
    DeadLetters,
    Delivered,
    DomainEvent,
    Middleware,
    Operation,
    Outcome,
    Outgoing,
    Publisher,
    Reject,
    Retry,
    Subscriber,
    configure,
    publish_domain_event,
)
from domain_events.opentelemetry import OpenTelemetry
from domain_events.testing import EventBroker

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "opentelemetry.rst"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)


class Telemetry:
    """The SDK, with what it has exported."""

    def __init__(self, **provider: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**provider)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self._meters = MeterProvider([self._reader])
        self.tracer = self.provider.get_tracer("test")

    def middleware(self, **options: Any) -> OpenTelemetry:
        return OpenTelemetry(tracer_provider=self.provider, meter_provider=self._meters, **options)

    def use(self, **options: Any) -> OpenTelemetry:
        """Have it in all of the process."""
        middleware = self.middleware(**options)
        configure(middleware=[middleware])
        return middleware

    def spans(self, operation: str = "") -> list[ReadableSpan]:
        """Those of an operation, in the order in which they began."""
        spans = [
            span
            for span in self._exporter.get_finished_spans()
            if span.name.startswith(f"{operation} " if operation else "")
        ]
        return sorted(spans, key=lambda span: span.start_time or 0)

    def span(self, operation: str) -> ReadableSpan:
        (span,) = self.spans(operation)
        return span

    def names(self) -> list[str]:
        return [span.name for span in self.spans()]

    def metrics(self) -> dict[str, Metric]:
        data = self._reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, metric: str) -> list[Any]:
        return list(self.metrics()[metric].data.data_points)

    def counted(self, metric: str) -> dict[str, int]:
        """By operation and outcome, and the type of the error."""
        counted: dict[str, int] = {}
        for point in self.points(metric):
            parts = [
                point.attributes["messaging.operation.name"],
                point.attributes.get("domain_events.outcome"),
                point.attributes.get("error.type"),
            ]
            number = point.value if hasattr(point, "value") else point.count
            counted[" ".join(filter(None, parts))] = number
        return counted


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    yield Telemetry()
    configure()


def handled(
    broker: EventBroker,
    handler: Callable[[DomainEvent], object] = lambda event: None,
    *events: DomainEvent,
    **options: Any,
) -> list[Delivered]:
    """What becomes of events (one, if none is given) of a subscriber."""
    subscriber = Subscriber()
    subscriber.register(handler, "mailer", ["user.*"], **options)
    return broker.deliver_all(subscriber, *(events or [DomainEvent("user.registered")]))


def ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def parent(span: ReadableSpan) -> tuple[int, int] | None:
    return (span.parent.trace_id, span.parent.span_id) if span.parent is not None else None


def links(span: ReadableSpan) -> dict[str, tuple[int, int]]:
    """Which contexts it is linked to."""
    return {
        str((link.attributes or {})["domain_events.link"]): (
            link.context.trace_id,
            link.context.span_id,
        )
        for link in span.links
    }


def described(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


# --- traces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["linked", "nested"])
def test_picture_in_the_documentation_is_what_is_exported(
    names: Names, broker_url: str, nested: bool
) -> None:
    """On RabbitMQ: publish, handler, retry, second handler, dead letter, replay, third handler."""
    exchange, name = names.exchange(), names.queue()
    spans = trace_picture.life_of_an_event(broker_url, exchange, name, parent=nested)
    drawn = (
        trace_picture.PICTURES[nested]
        .read_text()
        .replace("domain-events", exchange)
        .replace("welcome-mail", name)
    )
    assert trace_picture.draw(spans).split() == drawn.split()
    assert drawn.count("\n\n") == (0 if nested else 4)


def test_handler_is_linked_to_the_publisher(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """As the conventions have it, in a trace of its own."""
    telemetry.use()
    handled(event_broker)
    published, processed = telemetry.span("publish"), telemetry.span("process")
    assert processed.parent is None
    assert links(processed) == {"creation": ids(published)}
    assert (published.kind, processed.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)


def test_handler_is_within_what_surrounds_it(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """A program that handles events in a span of its own."""
    telemetry.use()
    with telemetry.tracer.start_as_current_span("job") as job:
        handled(event_broker)
    processed = telemetry.span("process")
    assert parent(processed) == ids(job)  # type: ignore[arg-type]
    assert links(processed) == {"creation": ids(telemetry.span("publish"))}


def test_handler_is_in_the_publishers_trace_if_asked(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """Linked to it all the same, and to what surrounds it."""
    telemetry.use(parent=True)
    subscriber = Subscriber()
    subscriber.register(lambda event: None, "mailer", ["user.*"])
    publish_domain_event("user.registered", {})
    with telemetry.tracer.start_as_current_span("job") as job:
        event_broker.deliver(subscriber)
    published, processed = telemetry.span("publish"), telemetry.span("process")
    assert parent(processed) == ids(published)
    assert links(processed) == {
        "creation": ids(published),
        "ambient": ids(job),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize(("age", "nests"), [(3500, True), (3700, False)])
def test_handler_of_an_old_event_is_linked(
    telemetry: Telemetry, event_broker: EventBroker, age: float, nests: bool
) -> None:
    """Days later, as after a replay, the publisher's trace is over."""
    telemetry.use(parent=True)
    handled(event_broker, print, DomainEvent("user.old", timestamp=time.time() - age))
    published, processed = telemetry.span("publish"), telemetry.span("process")
    assert parent(processed) == (ids(published) if nests else None)
    assert links(processed) == {"creation": ids(published)}


def test_event_of_the_future_is_linked_as_any_other(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """Another machine's clock is ahead."""
    telemetry.use()
    handled(event_broker, print, DomainEvent("user.new", timestamp=time.time() + 60))
    assert telemetry.span("process").parent is None


def test_what_a_handler_publishes_is_within_its_span(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    telemetry.use()

    def handle(event: DomainEvent) -> None:
        with telemetry.tracer.start_as_current_span("inner"):
            publish_domain_event("mail.sent", {})

    handled(event_broker, handle)
    (inner,) = [span for span in telemetry.spans() if span.name == "inner"]
    _, sent = telemetry.spans("publish")
    assert parent(inner) == ids(telemetry.span("process"))
    assert parent(sent) == ids(inner)
    event = telemetry.spans("publish")[0]
    assert (
        described(sent)["messaging.message.conversation_id"]
        == described(sent)["domain_events.cause"]
        == described(event)["messaging.message.id"]
    )


def test_context_of_a_handler_ends_with_it(telemetry: Telemetry, event_broker: EventBroker) -> None:
    """Also if it ends the process, and whatever it has left attached."""
    after: list[trace.Span] = []

    class Outer(Middleware):
        @contextmanager
        def handling(self, event: DomainEvent) -> Iterator[None]:
            try:
                yield
            finally:
                after.append(trace.get_current_span())

    configure(middleware=[Outer(), telemetry.middleware()])

    def handle(event: DomainEvent) -> None:
        context.attach(trace.set_span_in_context(telemetry.tracer.start_span("left"), None))
        sys.exit()

    with pytest.raises(SystemExit):
        handled(event_broker, handle)
    assert [*after, trace.get_current_span()] == [trace.INVALID_SPAN] * 2
    assert not baggage.get_all()
    processed = telemetry.span("process")
    assert described(processed)["domain_events.outcome"] == "given back"
    assert described(processed)["error.type"] == "SystemExit"
    assert processed.status.status_code is StatusCode.ERROR


def test_contexts_of_two_workers_do_not_mix(telemetry: Telemetry, unique: str) -> None:
    """Their handlers run at the same time."""
    url = f"memory://{unique}"
    middleware = telemetry.middleware()
    subscriber = Subscriber(url, workers=2, middleware=[middleware])
    publisher = Publisher(url, middleware=[middleware])
    both = threading.Barrier(2)

    def handle(event: DomainEvent) -> None:
        both.wait(30)
        publisher.publish(DomainEvent("mail.sent", {"to": event.data}))
        both.wait(30)

    subscriber.register(handle, "mailer", ["user.*"])
    with publisher, running(subscriber):
        publisher.publish_many([DomainEvent("user.a", "a"), DomainEvent("user.b", "b")])
        wait_until(lambda: len(telemetry.spans("ack")) == 2)
    first, second = telemetry.spans("process")
    sent = telemetry.spans("publish")[2:]
    assert {parent(span) for span in sent} == {ids(first), ids(second)}
    for span in sent:
        (handler,) = [each for each in (first, second) if ids(each) == parent(span)]
        cause = described(handler)["messaging.message.id"]
        assert described(span)["domain_events.cause"] == cause


def test_events_published_at_once_have_a_context_each(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """All within what surrounds the call."""
    telemetry.use()
    subscriber = Subscriber()
    subscriber.register(lambda event: None, "mailer", ["user.*"])
    with telemetry.tracer.start_as_current_span("import") as job, Publisher() as publisher:
        publisher.publish_many(DomainEvent(f"user.{name}") for name in "abc")
    event_broker.deliver(subscriber)
    published = {
        described(span)["messaging.message.id"]: span for span in telemetry.spans("publish")
    }
    assert len(published) == 3
    assert {parent(span) for span in published.values()} == {ids(job)}  # type: ignore[arg-type]
    for span in telemetry.spans("process"):
        publish = published[described(span)["messaging.message.id"]]
        assert links(span) == {"creation": ids(publish)}
        assert "messaging.batch.message_count" not in described(publish)


def test_baggage_is_kept(telemetry: Telemetry, event_broker: EventBroker) -> None:
    """Through a retry, and by what the handler publishes; it is not the next event's."""
    telemetry.use()
    seen: list[object] = []

    def handle(event: DomainEvent) -> None:
        seen.append(baggage.get_baggage("tenant"))
        if event.routing_key == "user.registered" and not event.retries:
            raise Retry(5)
        if event.routing_key == "user.registered":
            publish_domain_event("user.welcomed", {})

    token = context.attach(baggage.set_baggage("tenant", "7"))
    event = DomainEvent("user.registered")
    with Publisher() as publisher:
        subscriber = Subscriber()
        subscriber.register(handle, "mailer", ["user.*"], max_retries=1)
        publisher.publish(event)
    context.detach(token)
    event_broker.deliver_all(subscriber, DomainEvent("user.other"))
    assert seen == ["7", None, "7", "7"]


def test_creation_context_of_the_user_is_left_alone(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """One that waited in a table, for example: its writer is what handlers are linked to."""
    telemetry.use()
    headers: dict[str, str] = {}
    with telemetry.tracer.start_as_current_span("write the row") as row:
        propagate.inject(headers)
    seen: list[Any] = []
    token = context.attach(baggage.set_baggage("relay", "1"))
    handled(event_broker, seen.append, DomainEvent("user.registered", headers=headers))
    context.detach(token)
    sent = telemetry.span("publish")
    assert dict(seen[0].headers) == headers
    assert sent.kind is SpanKind.CLIENT
    assert links(sent) == {"creation": ids(row)}  # type: ignore[arg-type]
    assert links(telemetry.span("process")) == links(sent)


class OfTheOutbox(str, Enum):
    WRITTEN = "outbox"
    SENT = "relay"


@pytest.mark.parametrize("nested", [False, True], ids=["linked", "nested"])
def test_event_of_an_outbox_is_created_once_and_sent_later(
    telemetry: Telemetry, nested: bool
) -> None:
    """Its handlers are linked to the transaction that wrote it. Written is not sent."""
    middleware = telemetry.middleware(parent=nested)
    middleware.connection(
        ConnectionChange(ConnectionState.CONNECTED, "publisher", "publishing", "amqp://rabbit/")
    )
    event = DomainEvent("user.registered")
    headers: dict[str, Any] = {}

    def send(operation: OfTheOutbox) -> None:
        outgoing = Outgoing(operation, event, headers, "domain-events")  # type: ignore[arg-type]
        done = middleware.publishing(outgoing)
        assert done is not None
        done(None)

    with telemetry.tracer.start_as_current_span("transaction") as transaction:
        send(OfTheOutbox.WRITTEN)
    stored = dict(headers)
    send(OfTheOutbox.SENT)
    assert headers == stored
    written, sent = telemetry.span("outbox"), telemetry.span("relay")
    assert parent(written) == ids(transaction)  # type: ignore[arg-type]
    assert (written.kind, sent.kind) == (SpanKind.PRODUCER, SpanKind.CLIENT)
    assert links(sent) == {"creation": ids(written)}
    assert parent(sent) == (ids(written) if nested else None)
    assert described(written)["messaging.operation.type"] == "create"
    assert "server.address" in described(sent)
    assert "server.address" not in described(written)
    assert written.name == "outbox domain-events:user.registered"
    assert telemetry.counted("messaging.client.sent.messages") == {"relay": 1}
    durations = telemetry.counted("messaging.client.operation.duration")
    assert durations == {"outbox": 1, "relay": 1}


def test_baggage_of_the_user_is_left_alone(telemetry: Telemetry, event_broker: EventBroker) -> None:
    telemetry.use()
    token = context.attach(baggage.set_baggage("tenant", "7"))
    seen: list[Any] = []
    handled(event_broker, seen.append, DomainEvent("user.a", headers={"baggage": "tenant=8"}))
    context.detach(token)
    assert seen[0].headers["baggage"] == "tenant=8"
    assert links(telemetry.span("process")) == {"creation": ids(telemetry.span("publish"))}


def test_event_with_copied_headers_is_not_taken_for_a_retry(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    telemetry.use()

    def handle(event: DomainEvent) -> None:
        if event.routing_key == "user.a":
            if not event.retries:
                raise Retry(1)
            publish_domain_event("user.b", {}, headers=dict(event.headers))

    handled(event_broker, handle, DomainEvent("user.a"), max_retries=1)
    *_, retried, copied = telemetry.spans("process")
    assert links(retried).keys() == {"creation", "forwarded"}
    assert links(copied) == {"creation": ids(telemetry.spans("publish")[0])}


def test_context_survives_days_of_delay(telemetry: Telemetry, event_broker: EventBroker) -> None:
    telemetry.use()

    def handle(event: DomainEvent) -> None:
        if event.retries < 2:
            raise Retry(3 * 24 * 3600)

    handled(event_broker, handle, max_retries=2)
    (published,) = telemetry.spans("publish")
    first, second = telemetry.spans("retry")
    assert [links(span) for span in telemetry.spans("process")] == [
        {"creation": ids(published)},
        {"creation": ids(published), "forwarded": ids(first)},
        {"creation": ids(published), "forwarded": ids(second)},
    ]
    assert described(second)["domain_events.delay"] == 3 * 24 * 3600


def test_event_handed_back_for_another_release_is_traced(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    telemetry.use()
    old, new = Subscriber(), Subscriber()
    old.register(print, "mailer", ["user.registered"])
    new.register(print, "mailer", ["user.*"])
    publish_domain_event("user.new", {})
    event_broker.deliver(old)
    event_broker.advance(60)
    event_broker.deliver(new)
    handed_back = telemetry.span("hand_back")
    assert handed_back.name == "hand_back mailer"
    assert links(telemetry.span("process"))["forwarded"] == ids(handed_back)
    assert parent(telemetry.spans("ack")[0]) == ids(handed_back)


def test_message_that_is_not_an_event_is_traced(bench: Bench, telemetry: Telemetry) -> None:
    """To the dead letters, and back."""
    import onlooker

    middleware = telemetry.middleware()
    configure(bench.url, middleware=[middleware])
    subscriber = bench.subscriber()
    name = bench.names.queue()
    subscriber.register(print, name, ["#"])
    with telemetry.tracer.start_as_current_span("another program") as other:
        headers: dict[str, str] = {}
        propagate.inject(headers)
    onlooker.publish(bench.url, bench.exchange, "a.b", b"not JSON", headers=headers)
    with running(subscriber):
        wait_until(lambda: telemetry.spans("ack"))
    dead = telemetry.span("dead_letter")
    assert dead.name == f"dead_letter {name}-dl"
    assert links(dead) == {"creation": ids(other)}  # type: ignore[arg-type]
    with DeadLetters(name, bench.url) as dead_letters:
        assert dead_letters.replay_all() == 1
    assert links(telemetry.span("replay"))["forwarded"] == ids(dead)


# --- what spans say ------------------------------------------------------------------------------


def test_spans_have_the_names_of_the_conventions(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    telemetry.use()
    event = DomainEvent("user.registered", correlation_id="order-1", cause="before")
    handled(event_broker, print, event)
    shared = {
        "messaging.system": "rabbitmq",
        "messaging.rabbitmq.destination.routing_key": "user.registered",
        "messaging.message.id": event.uuid_string,
        "messaging.message.conversation_id": "order-1",
        "domain_events.cause": "before",
    }
    published, processed, acked = (telemetry.span(name) for name in ("publish", "process", "ack"))
    assert published.name == "publish domain-events:user.registered"
    assert described(published) == {
        **shared,
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": "domain-events:user.registered",
    }
    consumed = {
        **shared,
        "messaging.destination.name": "domain-events:user.registered:mailer",
        "messaging.destination.subscription.name": "mailer",
    }
    assert processed.name == "process domain-events:user.registered:mailer"
    assert described(processed) == {
        **consumed,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "domain_events.outcome": "handled",
    }
    assert acked.name == "ack domain-events:user.registered:mailer"
    assert acked.kind is SpanKind.CLIENT
    assert parent(acked) == ids(processed)
    assert described(acked) == {
        **consumed,
        "messaging.operation.name": "ack",
        "messaging.operation.type": "settle",
    }
    scope = published.instrumentation_scope
    assert scope is not None
    assert (scope.name, scope.schema_url) == (
        "domain_events",
        "https://opentelemetry.io/schemas/1.44.0",
    )


def test_what_is_sent_on_has_the_name_of_its_queue(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    telemetry.use()

    def handle(event: DomainEvent) -> None:
        if not event.retries:
            raise Retry(2)
        raise ValueError

    handled(event_broker, handle, max_retries=1)
    retry, dead = telemetry.span("retry"), telemetry.span("dead_letter")
    assert (retry.name, dead.name) == ("retry mailer", "dead_letter mailer-dl")
    for span, queue in ((retry, "mailer"), (dead, "mailer-dl")):
        assert span.kind is SpanKind.CLIENT
        assert described(span)["messaging.destination.name"] == queue
        assert described(span)["messaging.operation.type"] == "send"
    assert described(retry)["domain_events.delay"] == 2
    first, second = telemetry.spans("process")
    assert (parent(retry), parent(dead)) == (ids(first), ids(second))
    assert described(second)["domain_events.retries"] == 1


def test_handler_knows_the_queue_once_if_it_is_the_routing_key(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """By the conventions for RabbitMQ."""
    telemetry.use()
    subscriber = Subscriber(exchange="shop")
    subscriber.register(print, "mail.wanted", ["mail.wanted"])
    event_broker.deliver(subscriber, DomainEvent("mail.wanted"))
    assert telemetry.span("process").name == "process shop:mail.wanted"


def test_routing_keys_with_ids_have_a_template(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """Names of spans and metrics have few values then; the key itself is an attribute of spans."""
    telemetry.use(template=lambda key: re.sub("[0-9]+", "{id}", key))
    handled(event_broker, print, DomainEvent("user.41"), DomainEvent("user.42"))
    assert set(telemetry.names()) == {
        "publish domain-events:user.{id}",
        "process domain-events:user.{id}:mailer",
        "ack domain-events:user.{id}:mailer",
    }
    processed = described(telemetry.spans("process")[0])
    assert processed["messaging.destination.name"] == "domain-events:user.41:mailer"
    (point,) = telemetry.points("messaging.process.duration")
    assert (
        point.attributes["messaging.destination.template"]
        == (processed["messaging.destination.template"])
    )
    (point,) = telemetry.points("messaging.client.sent.messages")
    assert point.attributes["messaging.destination.template"] == "domain-events:user.{id}"
    assert "messaging.destination.name" not in point.attributes


def retry_on_purpose(event: DomainEvent) -> None:
    raise Retry(1)


def retry_for_a_reason(event: DomainEvent) -> None:
    raise Retry(1) from TimeoutError("slow")


def fail_with_what_is_retried(event: DomainEvent) -> None:
    raise ConnectionError("gone")


def reject(event: DomainEvent) -> None:
    raise Reject("no such user")


def fail(event: DomainEvent) -> None:
    raise ValueError("bad")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def fail_unprintably(event: DomainEvent) -> None:
    raise Unprintable


@pytest.mark.parametrize(
    ("handler", "options", "outcome", "error", "recorded"),
    [
        (lambda event: None, {}, "handled", None, []),
        (retry_on_purpose, {"max_retries": 9}, "retry", None, []),
        (retry_for_a_reason, {"max_retries": 9}, "retry", None, ["TimeoutError"]),
        (
            fail_with_what_is_retried,
            {"max_retries": 9, "retry_on": ConnectionError},
            "retry",
            "ConnectionError",
            ["ConnectionError"],
        ),
        (
            retry_on_purpose,
            {},
            "dead letter",
            "domain_events.retry.Retry",
            ["domain_events.retry.Retry"],
        ),
        (retry_for_a_reason, {}, "dead letter", "TimeoutError", ["TimeoutError"]),
        (
            reject,
            {},
            "dead letter",
            "domain_events.retry.Reject",
            ["domain_events.retry.Reject"],
        ),
        (fail, {}, "dead letter", "ValueError", ["ValueError"]),
        (fail, {"dead_letter": False}, "dropped", "ValueError", ["ValueError"]),
    ],
)
def test_span_ends_with_the_status_of_its_outcome(
    telemetry: Telemetry,
    event_broker: EventBroker,
    handler: Callable[[DomainEvent], object],
    options: dict[str, Any],
    outcome: str,
    error: str | None,
    recorded: list[str],
) -> None:
    """A retry that the handler asks for is not an error; one that an exception causes is."""
    telemetry.use()
    subscriber = Subscriber()
    subscriber.register(handler, "mailer", ["user.*"], **options)
    event_broker.deliver(subscriber, DomainEvent("user.registered"))
    span = telemetry.span("process")
    assert described(span)["domain_events.outcome"] == outcome
    assert described(span).get("error.type") == error
    assert span.status.status_code is (StatusCode.UNSET if error is None else StatusCode.ERROR)
    assert [(each.attributes or {})["exception.type"] for each in span.events] == recorded
    for metric in ("messaging.process.duration", "messaging.client.consumed.messages"):
        expected = f"process {outcome}" + (f" {error}" if error else "")
        assert telemetry.counted(metric) == {expected: 1}
    assert len(telemetry.spans("ack")) == 1


def test_span_of_an_error_that_cannot_be_shown_ends(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    telemetry.use()
    handled(event_broker, fail_unprintably)
    span = telemetry.span("process")
    assert span.status.status_code is StatusCode.ERROR
    assert described(span)["error.type"].endswith("Unprintable")


def test_span_lasts_as_long_as_the_handler(telemetry: Telemetry, event_broker: EventBroker) -> None:
    """And the metric says the same."""
    telemetry.use()
    times: list[int] = []

    def handle(event: DomainEvent) -> None:
        times.append(time.time_ns())
        time.sleep(0.05)
        times.append(time.time_ns())

    handled(event_broker, handle)
    span = telemetry.span("process")
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time <= times[0] < times[1] <= span.end_time
    (point,) = telemetry.points("messaging.process.duration")
    assert point.sum == pytest.approx((span.end_time - span.start_time) / 1e9)


def test_metrics_point_to_a_span(telemetry: Telemetry, event_broker: EventBroker) -> None:
    """As exemplars: an example of each bucket."""
    telemetry.use()
    handled(event_broker)
    metrics = telemetry.metrics()  # once: an exemplar is shown once
    for metric, operation in (
        ("messaging.client.operation.duration", "publish"),
        ("messaging.process.duration", "process"),
        ("domain_events.critical_time", "process"),
    ):
        points: list[Any] = list(metrics[metric].data.data_points)
        (exemplar,) = points[0].exemplars
        assert (exemplar.trace_id, exemplar.span_id) == ids(telemetry.span(operation))


def test_failed_publish_ends_with_an_error(telemetry: Telemetry, unused_port: int) -> None:
    middleware = telemetry.middleware()
    url = f"amqp://guest:guest@127.0.0.1:{unused_port}/"
    with Publisher(url, timeout=0.2, middleware=[middleware]) as publisher:
        event = DomainEvent("user.registered")
        with pytest.raises(BrokerUnavailable):
            publisher.publish(event)
    span = telemetry.span("publish")
    error = "domain_events.errors.BrokerUnavailable"
    assert span.status.status_code is StatusCode.ERROR
    assert described(span)["error.type"] == error
    assert [each.name for each in span.events] == ["exception"]
    assert telemetry.counted("messaging.client.sent.messages") == {f"publish {error}": 1}
    assert telemetry.counted("messaging.client.operation.duration") == {f"publish {error}": 1}


def test_event_acked_unhandled_is_shown(telemetry: Telemetry, event_broker: EventBroker) -> None:
    """Its key is retired."""
    telemetry.use()
    handled(event_broker, print, DomainEvent("user.b"))  # which binds the key
    subscriber = Subscriber()
    subscriber.register(print, "mailer", ["user.a"], retired_keys=["user.b"])
    publish_domain_event("user.b", {})
    with Publisher() as publisher:
        publisher.publish(DomainEvent("user.b"))
    other = Subscriber()
    other.register(print, "mailer", ["user.*"])
    publish_domain_event("user.b", {})
    event_broker.deliver(subscriber)
    assert len(telemetry.spans("process")) == 1
    assert described(telemetry.spans("ack")[-1])["domain_events.outcome"] == "retired"


def test_event_that_does_not_fit_has_its_error_in_the_trace(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """Its handler is not called, so there is no span of it."""
    telemetry.use()
    subscriber = Subscriber()
    subscriber.register(print, "mailer", ["user.*"], payload=dict[str, int])
    (delivery,) = event_broker.deliver(subscriber, DomainEvent("user.a", {"n": "x"}))
    assert delivery.outcome == "dead letter"
    span = telemetry.span("dead_letter")
    assert span.status.status_code is StatusCode.ERROR
    assert described(span)["error.type"].endswith("Misfit")
    assert "does not fit" in str(span.status.description)
    assert [each.name for each in span.events] == ["exception"]
    assert telemetry.counted("messaging.client.sent.messages") == {"publish": 1, "dead_letter": 1}


def test_handler_that_handles_others_events_keeps_its_span(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    telemetry.use()
    inner = Subscriber()
    inner.register(print, "inner", ["user.a"])
    retiring = Subscriber()
    retiring.register(print, "inner", ["user.b"], retired_keys=["user.c"])
    publish_domain_event("user.a", {})  # which the second one does not list
    handled(event_broker, lambda event: event_broker.deliver(retiring), DomainEvent("user.d"))
    assert described(telemetry.span("process"))["domain_events.outcome"] == "handled"
    assert len(telemetry.spans("hand_back")) == 1


def test_acks_can_be_left_out(telemetry: Telemetry, event_broker: EventBroker) -> None:
    telemetry.use(settle_spans=False)
    handled(event_broker, fail)
    handled(event_broker, print)
    assert not telemetry.spans("ack")
    assert len(telemetry.spans("process")) == 2


# --- metrics -------------------------------------------------------------------------------------


def test_metrics_have_the_names_of_the_conventions(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """With their units and buckets."""
    telemetry.use()

    def handle(event: DomainEvent) -> None:
        if event.routing_key == "user.bad":
            raise ValueError
        if not event.retries:
            raise Retry(1)

    handled(event_broker, handle, DomainEvent("user.a"), DomainEvent("user.bad"), max_retries=1)
    with DeadLetters("mailer") as dead_letters:
        dead_letters.replay_all()
    metrics = telemetry.metrics()
    assert {name: metric.unit for name, metric in metrics.items()} == {
        "messaging.client.operation.duration": "s",
        "messaging.client.sent.messages": "{message}",
        "messaging.client.consumed.messages": "{message}",
        "messaging.process.duration": "s",
        "domain_events.critical_time": "s",
    }
    for name in ("messaging.client.operation.duration", "messaging.process.duration"):
        assert {point.explicit_bounds for point in telemetry.points(name)} == {BUCKETS}
    sent = {"publish": 2, "retry": 1, "dead_letter": 1, "replay": 1}
    assert telemetry.counted("messaging.client.sent.messages") == sent
    assert telemetry.counted("messaging.client.operation.duration") == sent
    assert telemetry.counted("messaging.client.consumed.messages") == {
        "process retry": 1,
        "process handled": 1,
        "process dead letter ValueError": 1,
    }


def test_attributes_of_metrics_have_few_values(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """Neither ids nor routing keys: by '#', a subscriber gets whatever others have thought of."""
    telemetry.use()
    subscriber = Subscriber()
    subscriber.register(print, "mailer", ["#"])
    events = [DomainEvent(f"user.registered.{number}") for number in range(20)]
    event_broker.deliver(subscriber, *events)
    (point,) = telemetry.points("messaging.client.sent.messages")
    assert dict(point.attributes) == {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.template": "domain-events",
    }
    (point,) = telemetry.points("messaging.process.duration")
    assert dict(point.attributes) == {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.template": "mailer",
        "messaging.destination.subscription.name": "mailer",
        "domain_events.outcome": "handled",
    }
    (point,) = telemetry.points("domain_events.critical_time")
    assert dict(point.attributes) == {
        "messaging.system": "rabbitmq",
        "messaging.destination.subscription.name": "mailer",
    }


def test_critical_time_is_from_the_timestamp_until_it_was_handled(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """Of events that were handled in the end; also if another machine's clock is ahead."""
    telemetry.use()

    def handle(event: DomainEvent) -> None:
        if event.routing_key == "user.bad":
            raise ValueError

    now = time.time()
    handled(
        event_broker,
        handle,
        DomainEvent("user.a", timestamp=now - 1000),
        DomainEvent("user.b", timestamp=now + 1000),
        DomainEvent("user.bad", timestamp=now - 5000),
    )
    (point,) = telemetry.points("domain_events.critical_time")
    assert (point.count, point.min) == (2, 0)
    assert 1000 <= point.sum < 1100
    assert max(point.explicit_bounds) == 7 * 24 * 3600


# --- connections ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("amqp://a%40b@rabbit:5673/%2F", {"server.address": "rabbit", "server.port": 5673}),
        ("amqps://rabbit/shop", {"server.address": "rabbit", "server.port": 5671}),
        ("amqp://guest@[::1]/%2F", {"server.address": "::1", "server.port": 5672}),
        ("memory://shop", {}),
    ],
)
def test_address_of_the_broker_is_among_the_attributes(
    telemetry: Telemetry, address: str, expected: dict[str, Any]
) -> None:
    """Of the connection that the event goes or comes by."""
    middleware = telemetry.middleware()

    def connected(owner: str, purpose: str, address: str) -> None:
        change = ConnectionChange(ConnectionState.CONNECTED, owner, purpose, address)
        middleware.connection(change)

    def send(operation: Operation) -> None:
        done = middleware.publishing(Outgoing(operation, event, {}, "x", "mailer"))
        assert done is not None
        done(None)

    def handle() -> None:
        process = middleware.handling(event)
        assert process is not None
        with process:
            pass
        send(Operation.RETRY)
        middleware.delivered(Delivered("mailer", event, Outcome.RETRY))

    event = DomainEvent("user.a")
    connected("dead letters", "publishing", "amqp://another/")
    connected("publisher", "publishing", address)
    connected("subscriber", "publishing", address)
    connected("subscriber", "consuming", address)
    send(Operation.PUBLISH)
    copy_context().run(handle)
    for operation in ("publish", "process", "retry", "ack"):
        attributes = described(telemetry.span(operation))
        found = {name: each for name, each in attributes.items() if name.startswith("server.")}
        assert found == expected
    for metric in ("messaging.client.operation.duration", "messaging.process.duration"):
        for point in telemetry.points(metric):
            assert point.attributes.get("server.address") == expected.get("server.address")


def test_address_is_added_if_it_connects_meanwhile(telemetry: Telemetry) -> None:
    """As with the first event of a program."""
    middleware = telemetry.middleware()
    done = middleware.publishing(Outgoing(Operation.PUBLISH, DomainEvent("user.a"), {}, "x"))
    assert done is not None
    middleware.connection(
        ConnectionChange(ConnectionState.CONNECTED, "publisher", "publishing", "amqp://rabbit/")
    )
    done(None)
    assert described(telemetry.span("publish"))["server.address"] == "rabbit"


def test_spans_name_the_broker(bench: Bench, telemetry: Telemetry) -> None:
    """Also the first event of a program, which is what connects."""
    configure(bench.url, middleware=[telemetry.middleware()])
    subscriber = bench.subscriber()
    name = bench.names.queue()

    def handle(event: DomainEvent) -> None:
        if not event.replayed:
            raise ValueError

    subscriber.register(handle, name, ["#"])
    with Publisher(bench.url, bench.exchange) as publisher, running(subscriber):
        publisher.publish(DomainEvent("a.b"))
        wait_until(lambda: telemetry.spans("process"))
        wait_until(lambda: telemetry.spans("ack"))
        with DeadLetters(name, bench.url) as dead_letters:
            assert dead_letters.replay_all() == 1
        wait_until(lambda: len(telemetry.spans("ack")) == 2)
    url = urlsplit(bench.url)
    for span in telemetry.spans():
        assert described(span)["server.address"] == url.hostname
        assert described(span)["server.port"] == url.port


@contextmanager
def instrumented_pika(monkeypatch: pytest.MonkeyPatch, *, all_connections: bool) -> Iterator[None]:
    """What opentelemetry-instrumentation-pika leaves behind; its earlier releases wrap less."""

    class PikaInstrumentor:
        is_instrumented_by_opentelemetry = True

    module = SimpleNamespace(PikaInstrumentor=PikaInstrumentor)
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.pika", module)
    if all_connections:
        original = pika.connection.Connection.channel

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        monkeypatch.setattr(pika.connection.Connection, "channel", wrapped)
    yield


@pytest.mark.parametrize("doubles", [True, False])
def test_instrumentation_of_pika_is_noticed(
    telemetry: Telemetry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    doubles: bool,
) -> None:
    """If it makes spans of the same events; once, and with the way out."""
    middleware = telemetry.middleware()
    change = ConnectionChange(ConnectionState.CONNECTED, "publisher", "publishing", "amqp://a/")
    with instrumented_pika(monkeypatch, all_connections=doubles):
        middleware.connection(change)
        middleware.connection(change)
    warnings = [each.getMessage() for each in caplog.records]
    assert len(warnings) == doubles
    assert all("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=pika" in each for each in warnings)


# --- it harms nothing ----------------------------------------------------------------------------


class BrokenPropagator(TextMapPropagator):
    def extract(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken propagator")

    def inject(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken propagator")

    @property
    def fields(self) -> set[str]:
        raise RuntimeError("broken propagator")


class BrokenProcessor(SpanProcessor):
    def on_start(self, *_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("broken processor")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("broken processor")


class BrokenAtTheEnd(BrokenProcessor):
    def on_start(self, *_args: Any, **_kwargs: Any) -> None:
        pass


def no_template(key: str) -> str:
    raise RuntimeError("broken template")


@pytest.mark.parametrize(
    "options",
    [
        {"propagator": BrokenPropagator()},
        {"template": no_template},
        BrokenProcessor(),
        BrokenAtTheEnd(),
    ],
    ids=["propagator", "template", "processor", "processor-at-the-end"],
)
def test_what_is_broken_is_logged_and_harms_nothing(
    telemetry: Telemetry,
    event_broker: EventBroker,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any] | SpanProcessor,
) -> None:
    """Neither the publisher, nor the event; and a thousand events do not fill the log."""
    if isinstance(options, SpanProcessor):
        telemetry.provider.add_span_processor(options)
        options = {}
    telemetry.use(**options)
    seen: list[DomainEvent] = []

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if not event.retries:
            raise Retry(1)

    events = [DomainEvent("user.a", headers={"mine": 1}) for _ in range(10)]
    with caplog.at_level(logging.ERROR, "domain_events"):
        outcomes = handled(event_broker, handle, *events, max_retries=1)
    assert [str(each.outcome) for each in outcomes] == ["retry"] * 10 + ["handled"] * 10
    assert [event.headers["mine"] for event in seen] == [1] * 20
    logged = [each for each in caplog.records if each.name == "domain_events"]
    assert 1 <= len(logged) <= 4
    assert all("OpenTelemetry failed" in each.getMessage() for each in logged)
    assert all("broken" in str((each.exc_info or (0, 0))[1]) for each in logged)


def test_headers_of_others_are_read_with_care(
    telemetry: Telemetry, event_broker: EventBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is in them, the event is handled."""
    telemetry.use()
    headers: list[dict[str, Any]] = [
        {"traceparent": 7, "tracestate": True, "baggage": 1, "forwarded-traceparent": 2},
        {"traceparent": "no", "tracestate": "\u20ac,=;", "baggage": ";=,\u20ac" * 5000},
        {"traceparent": f"00-{'0' * 32}-{'0' * 16}-01"},
        {"forwarded-traceparent": f"00-{'1' * 32}-{'1' * 16}-01"},
    ]
    events = [DomainEvent("user.a", headers=each) for each in headers]
    with caplog.at_level(logging.ERROR, "domain_events"):
        outcomes = handled(event_broker, print, *events)
    assert [str(each.outcome) for each in outcomes] == ["handled"] * 4
    assert not [each for each in caplog.records if each.name == "domain_events"]
    # Only publishers' own contexts are carried by a header of that name.
    assert "forwarded" not in {name for span in telemetry.spans() for name in links(span)}


class XNames(TextMapPropagator):
    """As B3 with several headers, X-Ray's and others."""

    def extract(self, carrier: Any, context: Any = None, getter: Any = None) -> Any:
        return context or {}

    def inject(self, carrier: Any, context: Any = None, setter: Any = None) -> None:
        setter.set(carrier, "x-b3-traceid", "1" * 32)
        setter.set(carrier, "baggage", "a=" + "b" * 40_000)

    @property
    def fields(self) -> set[str]:
        return {"x-b3-traceid"}


def test_propagator_whose_headers_cannot_be_sent_harms_nothing(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """Names with x- are the broker's, and headers have a limit."""
    telemetry.use(propagator=XNames())
    seen: list[DomainEvent] = []
    handled(event_broker, seen.append)
    assert dict(seen[0].headers) == {}


def test_without_an_sdk_nothing_is_added(event_broker: EventBroker) -> None:
    configure(middleware=[OpenTelemetry()])
    try:
        seen: list[DomainEvent] = []
        handled(event_broker, seen.append)
        assert dict(seen[0].headers) == {}
    finally:
        configure()


def test_trace_that_is_not_sampled_stays_so(event_broker: EventBroker) -> None:
    """In all services that the event reaches."""
    telemetry = Telemetry(sampler=ALWAYS_OFF)
    telemetry.use()
    try:
        seen: list[DomainEvent] = []
        handled(event_broker, seen.append)
    finally:
        configure()
    flags = int(seen[0].headers["traceparent"].rpartition("-")[2], 16)
    assert not flags & 1
    assert not telemetry.spans()
    assert telemetry.counted("messaging.client.consumed.messages") == {"process handled": 1}


def test_nothing_is_kept_of_events_that_are_over(
    telemetry: Telemetry, event_broker: EventBroker
) -> None:
    """Whatever became of them."""
    telemetry.use()
    events = [DomainEvent(f"user.{number}") for number in range(30)]

    def handle(event: DomainEvent) -> None:
        number = int(event.routing_key.removeprefix("user."))
        if number % 3 == 0:
            raise Reject("no")  # no traceback, which pytest would keep with its log
        if number % 3 == 1 and not event.retries:
            raise Retry(1)

    handled(event_broker, handle, *events, max_retries=1)
    gc.collect()
    kept = Counter(type(each).__qualname__ for each in gc.get_objects())
    assert kept["OpenTelemetry"]
    assert kept["_Process"] < len(events)
    assert kept["_Span"] < len(events)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"template": "{id}"}, "template must be a function of a routing key, not '{id}'"),
        ({"parent_within": "1 h"}, "parent_within must be a positive number of seconds, not '1 h'"),
        ({"parent": 3600}, "parent must be True or False, not 3600"),
        ({"settle_spans": None}, "settle_spans must be True or False, not None"),
        (
            {"tracer_provider": "sdk"},
            "tracer_provider must be OpenTelemetry's, with a method get_t",
        ),
    ],
)
def test_wrong_option_is_refused(options: dict[str, Any], why: str) -> None:
    """And not logged with the first event."""
    with pytest.raises(ConfigurationError, match=why):
        OpenTelemetry(**options)


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_without_the_extra_says_what_to_install() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None
try:
    import domain_events.opentelemetry
except ImportError as error:
    print(error)
"""
    assert "pip install 'domain-events-rabbitmq[opentelemetry]'" in run(program)


SDK = """
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()

def start_sdk():
    trace.set_tracer_provider(TracerProvider())
    trace.get_tracer_provider().add_span_processor(BatchSpanProcessor(exporter))
    metrics.set_meter_provider(MeterProvider([reader]))

def spans():
    trace.get_tracer_provider().force_flush()
    return [span.name for span in exporter.get_finished_spans()]
"""


def test_sdk_may_be_set_up_later() -> None:
    """As in a program whose settings are read before."""
    program = """
from domain_events import configure, publish_domain_event
from domain_events.opentelemetry import OpenTelemetry

configure("memory://later", middleware=[OpenTelemetry()])
publish_domain_event("user.a", {})
start_sdk()
publish_domain_event("user.b", {})
print(spans(), len(reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics))
"""
    assert run(SDK + program) == "['publish domain-events:user.b'] 2\n"


def test_child_of_a_fork_has_traces_of_its_own(names: Names, broker_url: str) -> None:
    """It sets up the SDK itself, as a server's worker does; the middleware is the parent's."""
    program = """
import os, sys
from domain_events import DomainEvent, Publisher, configure
from domain_events.opentelemetry import OpenTelemetry

configure(middleware=[OpenTelemetry()])
publisher = Publisher(exchange=os.environ["EXCHANGE"])
publisher.publish(DomainEvent("user.parent"))
pid = os.fork()
if not pid:
    try:
        start_sdk()
        publisher.publish(DomainEvent("user.child"))
        print(spans(), flush=True)
    finally:
        publisher.close()
        os._exit(0)
os.waitpid(pid, 0)
start_sdk()
publisher.publish(DomainEvent("user.parent"))
publisher.close()
print(spans())
"""
    exchange = names.exchange()
    printed = run(
        "import warnings; warnings.simplefilter('ignore')\n" + SDK + program,
        DOMAIN_EVENTS_URL=broker_url,
        EXCHANGE=exchange,
    )
    assert printed.splitlines() == [
        f"['publish {exchange}:user.child']",
        f"['publish {exchange}:user.parent']",
    ]


# --- the documentation ---------------------------------------------------------------------------


def test_documentation_has_every_name() -> None:
    """Of attributes and metrics; and no other."""
    source = (ROOT / "domain_events" / "opentelemetry.py").read_text()
    name = re.compile(r"\b(?:messaging|server|error|domain_events)\.[a-z_.]*[a-z]")
    used = set(re.findall(r'= "([a-z_.]+\.[a-z_.]+)"', source))
    assert len(used) > 20
    documented = set(re.findall(r"``(" + name.pattern + r")``", PAGE.read_text()))
    assert documented - {"domain_events.opentelemetry"} == used
