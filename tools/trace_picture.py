"""Draws the traces of one event, for docs/opentelemetry.rst, from spans that were exported.

The event is published, handled, retried, handled again, is a dead letter, is replayed, and handled
at last. This writes the pictures:

    python tools/rabbitmq_node.py run -- python tools/trace_picture.py
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from domain_events import (
    DeadLetters,
    DomainEvent,
    Publisher,
    Retry,
    Subscriber,
    configure,
)
from domain_events.opentelemetry import OpenTelemetry

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = {False: DOCS / "trace-linked.txt", True: DOCS / "trace-nested.txt"}

_DELAY = 1.0
# Seconds; far above what any of it takes.
_TIMEOUT = 60.0


def life_of_an_event(
    url: str, exchange: str = "domain-events", name: str = "welcome-mail", *, parent: bool
) -> list[ReadableSpan]:
    """The spans of it."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = OpenTelemetry(parent=parent, tracer_provider=provider)
    configure(url, middleware=[tracing])
    subscriber = Subscriber(exchange=exchange)
    publisher = Publisher(exchange=exchange)

    def send_mail(event: DomainEvent) -> None:
        if not event.replayed and not event.retries:
            raise Retry(_DELAY) from TimeoutError("the mail server does not answer")
        subscriber.stop_consuming()
        if not event.replayed:
            raise ValueError("not an address")
        publisher.publish(DomainEvent("mail.sent"))

    try:
        subscriber.register(send_mail, name, ["user.registered"], max_retries=3)
        with provider.get_tracer("shop").start_as_current_span("POST /users"):
            publisher.publish(DomainEvent("user.registered", {"name": "Ada"}))
        subscriber.start_consuming(_TIMEOUT)
        with DeadLetters(name) as dead_letters:
            dead_letters.replay_all()
        subscriber.start_consuming(_TIMEOUT)
    finally:
        publisher.close()
        subscriber.close()
        configure()
    return list(exporter.get_finished_spans())


def draw(spans: Sequence[ReadableSpan]) -> str:
    """Each trace as a tree. Spans that others link to are numbered."""
    spans = sorted(spans, key=lambda span: span.start_time or 0)
    linked = {_id(link.context) for span in spans for link in span.links}
    order = [_id(span.context) for span in _in_order(spans)]
    numbers = {
        each: number for number, each in enumerate((id_ for id_ in order if id_ in linked), 1)
    }
    lines: list[tuple[str, str]] = []

    def add(span: ReadableSpan, first: str, others: str) -> None:
        number = numbers.get(_id(span.context))
        shown = f"[{number}] {span.name}" if number else span.name
        links = [str(numbers.get(_id(link.context), "?")) for link in span.links]
        about = " ".join([_described(span), *([f"-> {', '.join(links)}"] if links else [])])
        lines.append((first + shown, about))
        children = _children(span, spans)
        for child in children:
            last = child is children[-1]
            add(child, others + ("└─ " if last else "├─ "), others + ("   " if last else "│  "))

    for root in _roots(spans):
        lines.append(("", ""))
        add(root, "", "")
    width = max(len(left) for left, _ in lines) + 2
    return "\n".join(f"{left:{width}}{right}".rstrip() for left, right in lines[1:]) + "\n"


def _in_order(spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
    """As they are drawn: each before its children."""
    ordered: list[ReadableSpan] = []
    waiting = _roots(spans)
    while waiting:
        span = waiting.pop(0)
        ordered.append(span)
        waiting[:0] = _children(span, spans)
    return ordered


def _roots(spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
    return [span for span in spans if span.parent is None]


def _children(parent: ReadableSpan, spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
    return [span for span in spans if span.parent and _id(span.parent) == _id(parent.context)]


def _id(context: object) -> int:
    id_: int = context.span_id  # type: ignore[attr-defined]
    return id_


def _described(span: ReadableSpan) -> str:
    """Its kind, and its outcome."""
    attributes: dict[str, Any] = dict(span.attributes or {})
    parts = [span.kind.name.lower()]
    if "domain_events.outcome" in attributes:
        parts.append(f"{attributes['domain_events.outcome']}")
        if "domain_events.delay" in attributes:
            parts.append(f"in {attributes['domain_events.delay']:g} s")
    if not span.status.is_ok:
        parts.append(f"({span.status.status_code.name}: {attributes['error.type']})")
    return " ".join(parts)


if __name__ == "__main__":
    for with_parent, picture in PICTURES.items():
        picture.write_text(
            draw(life_of_an_event(os.environ["DOMAIN_EVENTS_URL"], parent=with_parent))
        )
        print(picture.read_text())
