"""``OpenTelemetry``: traces and metrics of events, as `Middleware`.

::

    configure(middleware=[OpenTelemetry()])

Needs the extra ``[opentelemetry]``: the API only, which does nothing until the program sets up
OpenTelemetry's SDK. Spans, metrics and attributes follow the semantic conventions for messaging and
for RabbitMQ, version 1.44, whose status is "development": they may change their names, so all of
them are in one section of this file.

**Contexts.** An event carries its *creation context*, that of the span that published it, in the
headers that the propagator writes (``traceparent``, ``tracestate``, ``baggage``). It stays there
through retries, days of delay, dead letters and replays. Whatever moves an event on has a span of
its own, whose context travels beside it in ``forwarded-traceparent``, where only this module looks.

**What it never does:** raise. A propagator or a processor of spans that fails is logged.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from domain_events import __version__
from domain_events.checks import flag, refusal, seconds
from domain_events.events import DomainEvent
from domain_events.log import Log
from domain_events.message import reason_of, type_name
from domain_events.middleware import (
    ConnectionChange,
    ConnectionState,
    Done,
    Middleware,
    Operation,
    Outgoing,
)
from domain_events.outcomes import Delivered, Outcome
from domain_events.retry import Retry
from domain_events.text import printable

try:
    from opentelemetry import context as contexts
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.propagators.textmap import Getter, Setter, TextMapPropagator
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode, TracerProvider
except ImportError as error:
    raise ImportError(
        "domain_events.opentelemetry needs opentelemetry-api, which is not installed: "
        "pip install 'domain-events-rabbitmq[opentelemetry]'"
    ) from error

log = Log("domain_events")

# --- the names, by version 1.44 of the conventions -----------------------------------------------
# https://opentelemetry.io/docs/specs/semconv/messaging/

_SCHEMA = "https://opentelemetry.io/schemas/1.44.0"

_SYSTEM = "messaging.system"
_RABBITMQ = "rabbitmq"
_OPERATION = "messaging.operation.name"
_TYPE = "messaging.operation.type"
_DESTINATION = "messaging.destination.name"
_TEMPLATE = "messaging.destination.template"
_SUBSCRIPTION = "messaging.destination.subscription.name"
_ROUTING_KEY = "messaging.rabbitmq.destination.routing_key"
_MESSAGE_ID = "messaging.message.id"
_CONVERSATION_ID = "messaging.message.conversation_id"
_SERVER_ADDRESS = "server.address"
_SERVER_PORT = "server.port"
_ERROR_TYPE = "error.type"

_CREATE, _SEND, _PROCESS, _SETTLE = "create", "send", "process", "settle"
_ACK = "ack"
# The operation that writes an event to be sent later.
_OUTBOX = "outbox"

_OPERATION_DURATION = "messaging.client.operation.duration"
_PROCESS_DURATION = "messaging.process.duration"
_SENT = "messaging.client.sent.messages"
_CONSUMED = "messaging.client.consumed.messages"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)

# What the conventions have no name for.
_OUTCOME = "domain_events.outcome"
_DELAY = "domain_events.delay"
_RETRIES = "domain_events.retries"
_REDELIVERED = "domain_events.redelivered"
_REPLAYED = "domain_events.replayed"
_CAUSE = "domain_events.cause"
# Of a link: which context it is.
_LINK = "domain_events.link"
_CREATION, _FORWARDED, _AMBIENT = "creation", "forwarded", "ambient"
_CRITICAL_TIME = "domain_events.critical_time"
# From a handler's time to a week in the dead letters.
_CRITICAL_BUCKETS = (*_BUCKETS, 30, 60, 300, 900, 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600)

_DEAD_LETTERS = "-dl"
_FORWARDED_PREFIX = "forwarded-"
# Receivers ignore a baggage that is longer (https://www.w3.org/TR/baggage/).
_LONGEST_HEADER = 8192

# --- the middleware ------------------------------------------------------------------------------


class OpenTelemetry(Middleware):
    """Traces and metrics of what is published and handled, by OpenTelemetry's conventions.

    :param parent: what the span of a handler's call has as its parent. False, as the conventions
        have it: the span that surrounds ``start_consuming``, if any, so that each call is a trace
        of its own, *linked* to the span that published the event. True: that span itself, so that
        publishing and handling are *one* trace.
    :param parent_within: with ``parent=True``, the age of an event in seconds from which on its
        handlers are linked after all: hardly any backend shows a trace of days.
    :param template: makes a name of low cardinality out of a routing key, for routing keys that
        contain ids: ``lambda key: re.sub(r'[0-9]+', '{id}', key)``. It is then in the names of
        spans and among the attributes of metrics, too; without it, metrics have no routing key.
    :param settle_spans: whether there is a span for each ack. The library acks many events at
        once, so it shows when that was decided, and takes no time.
    :param tracer_provider: instead of the global one; likewise ``meter_provider``, and
        ``propagator``. A global one may be set later than this is made.
    :raises ConfigurationError: when an option is something else.
    """

    def __init__(
        self,
        *,
        parent: bool = False,
        parent_within: float = 3600.0,
        template: Callable[[str], str] | None = None,
        settle_spans: bool = True,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        propagator: TextMapPropagator | None = None,
    ) -> None:
        if template is not None and not callable(template):
            raise refusal(template, "template", "a function of a routing key")
        for option, given, method in (
            ("tracer_provider", tracer_provider, "get_tracer"),
            ("meter_provider", meter_provider, "get_meter"),
            ("propagator", propagator, "inject"),
        ):
            if given is not None and not callable(getattr(given, method, None)):
                raise refusal(given, option, f"OpenTelemetry's, with a method {method}()")
        self._parent = flag(parent, "parent")
        self._parent_within = seconds(parent_within, "parent_within")
        self._template = template
        self._settle_spans = flag(settle_spans, "settle_spans")
        self._given_propagator = propagator
        self._tracer = trace.get_tracer("domain_events", __version__, tracer_provider, _SCHEMA)
        meter = metrics.get_meter("domain_events", __version__, meter_provider, _SCHEMA)
        self._operation_duration = meter.create_histogram(
            _OPERATION_DURATION,
            "s",
            "Duration of messaging operation initiated by a producer or consumer client.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._process_duration = meter.create_histogram(
            _PROCESS_DURATION,
            "s",
            "Duration of processing operation.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._critical_time = meter.create_histogram(
            _CRITICAL_TIME,
            "s",
            "From an event's timestamp until it was handled.",
            explicit_bucket_boundaries_advisory=_CRITICAL_BUCKETS,
        )
        self._sent = meter.create_counter(
            _SENT, "{message}", "Number of messages producer attempted to send to the broker."
        )
        self._consumed = meter.create_counter(
            _CONSUMED, "{message}", "Number of messages that were delivered to the application."
        )
        # What the event being handled has; unlike OpenTelemetry's own context, it is still there
        # when the handler's outcome is decided.
        self._process: ContextVar[_Process | None] = ContextVar("process", default=None)
        # The attributes of the broker, by the owner and the purpose of the connection.
        self._servers: dict[tuple[str, str], dict[str, Any]] = {}
        self._logged: set[str] = set()

    # --- on the way out --------------------------------------------------------------------------

    def publishing(self, outgoing: Outgoing) -> Done | None:
        """Start the span of what is sent, and have its context sent along."""
        with self._guarded("before an event was sent"):
            return self._begin_sending(outgoing)
        return None

    def _begin_sending(self, outgoing: Outgoing) -> Done:
        event, headers, operation = outgoing.event, outgoing.headers, outgoing.operation
        # Otherwise it was before, and goes to one subscriber.
        is_new = outgoing.exchange is not None
        if is_new and headers:
            # A copy of a received event's headers.
            for name in self._propagator.fields:
                headers.pop(_FORWARDED_PREFIX + name, None)
        _, creation, links = self._carried(headers, Context())
        process = None if is_new else self._process_of(event)
        current = process.context if process is not None else contexts.get_current()
        if creation is not None and not _span_context(current).is_valid and self._nests(event):
            current = _with_parent(current, creation)
        name = operation.value.replace(" ", "_")
        shown, attributes = self._sent_attributes(outgoing, name)
        span = self._tracer.start_span(
            f"{name} {shown}",
            current,
            # By the conventions: whose context the message carries as that of its creation.
            SpanKind.PRODUCER if is_new and creation is None else SpanKind.CLIENT,
            attributes,
            links,
        )
        started = time.perf_counter()
        context = trace.set_span_in_context(span, current)
        with self._guarded("when it added a trace's context to an event"):
            if not is_new:
                alone = trace.set_span_in_context(span, Context())
                self._propagator.inject(headers, alone, _FORWARDED_HEADERS)
            elif creation is None:
                self._propagator.inject(headers, context, _HEADERS)

        def done(error: BaseException | None) -> None:
            took = time.perf_counter() - started
            with self._guarded("after an event was sent"):
                # Of what no handler was called with, this is the only span.
                unhandled = outgoing.error if process is None else None
                failure = unhandled if error is None else error
                self._end_sending(outgoing, span, attributes, failure)
                self._count_sent(outgoing, name, error, took, context)
                if error is None and operation in _SETTLING:
                    self._settle_forwarded(outgoing, process, span, context, links)

        return done

    def _end_sending(
        self,
        outgoing: Outgoing,
        span: Span,
        attributes: Mapping[str, Any],
        error: BaseException | None,
    ) -> None:
        try:
            if _SERVER_ADDRESS not in attributes:  # it connected meanwhile
                span.set_attributes(self._server_of(outgoing))
            if error is not None:
                _fail(span, error)
        finally:
            span.end()

    def _sent_attributes(self, outgoing: Outgoing, name: str) -> tuple[str, dict[str, Any]]:
        """The destination as the span's name has it, and the attributes."""
        attributes = _sending(outgoing, name)
        event = outgoing.event
        if outgoing.exchange is not None and event is not None:
            shown = self._name_destination(attributes, outgoing.exchange, event.routing_key)
        else:
            shown = attributes[_DESTINATION] = _queue_of(outgoing)
        if outgoing.delay is not None:
            attributes[_DELAY] = outgoing.delay
        if event is not None:
            self._describe(attributes, event)
        attributes.update(self._server_of(outgoing))
        return shown, attributes

    def _count_sent(
        self,
        outgoing: Outgoing,
        name: str,
        error: BaseException | None,
        took: float,
        context: Context,
    ) -> None:
        attributes = _sending(outgoing, name)
        event = outgoing.event
        if outgoing.exchange is None:
            attributes[_DESTINATION] = _queue_of(outgoing)
        elif self._template is not None and event is not None:
            self._name_destination(attributes, outgoing.exchange, event.routing_key)
            del attributes[_DESTINATION]
        else:
            attributes[_TEMPLATE] = outgoing.exchange
        if error is not None:
            attributes[_ERROR_TYPE] = type_name(error)
        attributes.update(self._server_of(outgoing))
        self._operation_duration.record(took, attributes, context)
        if attributes[_TYPE] == _SEND:
            self._sent.add(1, attributes, context)

    # --- handling --------------------------------------------------------------------------------

    def handling(self, event: DomainEvent[Any]) -> _Process | None:
        """Start the span of a handler's call; the handler runs in its context."""
        with self._guarded("before a handler was called"):
            process = self._begin_process(event)
            self._process.set(process)
            return process
        return None

    def _begin_process(self, event: DomainEvent[Any]) -> _Process:
        ambient = contexts.get_current()
        context, creation, links = self._carried(event.headers, ambient)
        if creation is not None and self._nests(event):
            context = _with_parent(context, creation)
            if _span_context(ambient).is_valid:
                links.append(Link(_span_context(ambient), {_LINK: _AMBIENT}))
        shown, attributes = self._process_attributes(event.subscriber, event)
        if event.retries:
            attributes[_RETRIES] = event.retries
        if event.redelivered:
            attributes[_REDELIVERED] = True
        if event.replayed:
            attributes[_REPLAYED] = True
        started = time.time_ns()
        span = self._tracer.start_span(
            f"{_PROCESS} {shown}",
            context,
            SpanKind.CONSUMER,
            attributes,
            links,
            start_time=started,
        )
        context = trace.set_span_in_context(span, context)
        return _Process(event, span, context, shown, attributes, links, started)

    def _process_attributes(
        self, subscriber: str | None, event: DomainEvent[Any] | None
    ) -> tuple[str, dict[str, Any]]:
        attributes: dict[str, Any] = {_SYSTEM: _RABBITMQ, _OPERATION: _PROCESS, _TYPE: _PROCESS}
        if event is None:
            shown = attributes[_DESTINATION] = str(subscriber)
        else:
            shown = self._name_destination(
                attributes, event.exchange, event.routing_key, subscriber
            )
            self._describe(attributes, event)
        if subscriber is not None:
            attributes[_SUBSCRIPTION] = subscriber
        attributes.update(self._servers.get(_CONSUMING, {}))
        return shown, attributes

    def delivered(self, delivered: Delivered) -> None:
        """End the span of a handler's call, by its outcome."""
        with self._guarded("after an event was handled"):
            process = self._process_of(delivered.event)
            if process is not None:
                self._end_process(process, delivered)
            elif delivered.outcome in (Outcome.RETIRED, Outcome.DROPPED):
                event = delivered.event
                headers = event.headers if event is not None else {}
                _, _, links = self._carried(headers, Context())
                shown, attributes = self._process_attributes(delivered.subscriber, event)
                attributes[_OUTCOME] = str(delivered.outcome)
                self._settle(contexts.get_current(), shown, attributes, links)

    def _end_process(self, process: _Process, delivered: Delivered) -> None:
        span, outcome, error = process.span, delivered.outcome, delivered.error
        reason = None if error is None else reason_of(error)
        # What a handler asks for is not an error of its own.
        failed = reason is not None and not (outcome is Outcome.RETRY and isinstance(error, Retry))
        try:
            span.set_attribute(_OUTCOME, str(outcome))
            if delivered.delay is not None:
                span.set_attribute(_DELAY, delivered.delay)
            if reason is not None and failed:
                _fail(span, reason, process.ended)
            elif reason is not None and reason is not error and span.is_recording():
                # Why it is to be retried.
                span.record_exception(reason, timestamp=process.ended)
            if outcome in (Outcome.HANDLED, Outcome.DROPPED) and span.is_recording():
                self._settle(process.context, process.shown, process.attributes, process.links)
        finally:
            span.end(process.ended)
        attributes: dict[str, Any] = {
            _SYSTEM: _RABBITMQ,
            _OPERATION: _PROCESS,
            _TYPE: _PROCESS,
            _SUBSCRIPTION: delivered.subscriber,
            _OUTCOME: str(outcome),
        }
        # The conventions have the destination's name or template if its cardinality is low. What a
        # subscriber gets by '#' is others' choice; its queue is not.
        attributes[_TEMPLATE] = process.attributes.get(_TEMPLATE, delivered.subscriber)
        if reason is not None and failed:
            attributes[_ERROR_TYPE] = type_name(reason)
        attributes.update(self._servers.get(_CONSUMING, {}))
        took = max(0, process.ended - process.started) / 1e9
        self._process_duration.record(took, attributes, process.context)
        self._consumed.add(1, attributes, process.context)
        if outcome is Outcome.HANDLED:
            age = max(0.0, process.ended / 1e9 - process.event.timestamp)
            shared = {_SYSTEM: _RABBITMQ, _SUBSCRIPTION: delivered.subscriber}
            self._critical_time.record(age, shared, process.context)

    # --- acks ------------------------------------------------------------------------------------

    def _settle_forwarded(
        self,
        outgoing: Outgoing,
        process: _Process | None,
        span: Span,
        context: Context,
        links: list[Link],
    ) -> None:
        """What was forwarded is confirmed, and so acked where it came from."""
        if not self._settle_spans or not span.get_span_context().trace_flags.sampled:
            return
        if process is not None:
            self._settle(process.context, process.shown, process.attributes, process.links)
        else:
            shown, attributes = self._process_attributes(outgoing.subscriber, outgoing.event)
            self._settle(context, shown, attributes, links)

    def _settle(
        self, context: Context, shown: str, attributes: Mapping[str, Any], links: list[Link]
    ) -> None:
        if self._settle_spans:
            attributes = {**attributes, _OPERATION: _ACK, _TYPE: _SETTLE}
            self._tracer.start_span(
                f"{_ACK} {shown}", context, SpanKind.CLIENT, attributes, links
            ).end()

    # --- connections -----------------------------------------------------------------------------

    def connection(self, change: ConnectionChange) -> None:
        """Remember the broker's address."""
        with self._guarded("when it read a broker's address"):
            if change.state is ConnectionState.CONNECTED:
                self._servers[change.owner, change.purpose] = _server(change.address)
                self._warn_of_pika()

    def _server_of(self, outgoing: Outgoing) -> dict[str, Any]:
        if outgoing.operation.value == _OUTBOX:
            return {}
        return self._servers.get(_OWNERS.get(outgoing.operation, _PUBLISHER), {})

    def _warn_of_pika(self) -> None:
        """Warn if the instrumentation of pika makes spans of its own for the same messages.

        Its earlier releases wrap only pika's blocking connections, of which there are none here;
        later ones wrap them all.
        """
        module = sys.modules.get("opentelemetry.instrumentation.pika")
        instrumentor = getattr(module, "PikaInstrumentor", None)
        if instrumentor is None or not instrumentor().is_instrumented_by_opentelemetry:
            return
        connections = getattr(sys.modules.get("pika.connection"), "Connection", None)
        if hasattr(getattr(connections, "channel", None), "__wrapped__"):
            self._log_once(
                "pika",
                "opentelemetry-instrumentation-pika instruments this library's connections, too. "
                "Each retry, dead letter and replay gets a second span, whose context replaces the "
                "publisher's, so that their traces fall apart. Switch it off: "
                "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=pika for opentelemetry-instrument, or "
                "PikaInstrumentor().uninstrument() before connecting. This is logged once.",
            )

    # --- inside ----------------------------------------------------------------------------------

    @property
    def _propagator(self) -> TextMapPropagator:
        return self._given_propagator or propagate.get_global_textmap()

    def _carried(
        self, headers: Mapping[str, Any], ambient: Context
    ) -> tuple[Context, SpanContext | None, list[Link]]:
        """What the headers carry: baggage, the creation context, and links to all contexts.

        :return: the ambient context with that baggage; the creation context, if any; the links.
        """
        links: list[Link] = []
        if not headers:
            return ambient, None, links
        alone = trace.set_span_in_context(trace.INVALID_SPAN, ambient)
        context = self._propagator.extract(headers, alone, _HEADERS)
        creation: SpanContext | None = _span_context(context)
        if creation is not None and creation.is_valid:
            links.append(Link(creation, {_LINK: _CREATION}))
        else:
            creation = None
        if any(name.startswith(_FORWARDED_PREFIX) for name in headers):
            last = self._propagator.extract(headers, Context(), _FORWARDED_HEADERS)
            forwarded = _span_context(last)
            if forwarded.is_valid:
                links.append(Link(forwarded, {_LINK: _FORWARDED}))
        surrounding = trace.get_current_span(ambient)
        return trace.set_span_in_context(surrounding, context), creation, links

    def _process_of(self, event: DomainEvent[Any] | None) -> _Process | None:
        process = self._process.get()
        return process if process is not None and process.event is event else None

    def _nests(self, event: DomainEvent[Any] | None) -> bool:
        """Whether the creation context is the parent of what becomes of the event."""
        if not self._parent or event is None:
            return False
        return time.time() - event.timestamp < self._parent_within

    def _name_destination(
        self,
        attributes: dict[str, Any],
        exchange: str | None,
        routing_key: str,
        queue: str | None = None,
    ) -> str:
        """Set what names the destination; returns the name of low cardinality."""
        name = _joined(exchange, routing_key, queue)
        attributes[_DESTINATION] = name
        if self._template is not None:
            template = self._template(routing_key)
            name = attributes[_TEMPLATE] = _joined(exchange, template, queue)
        return name

    def _describe(self, attributes: dict[str, Any], event: DomainEvent[Any]) -> None:
        """Add what is known of the one event that the span is about."""
        attributes[_ROUTING_KEY] = event.routing_key
        attributes[_MESSAGE_ID] = event.uuid_string
        details = event.details
        correlation_id, cause = details.correlation_id, details.cause
        if event.subscriber is None and (process := self._process.get()) is not None:
            # Not published yet: what it inherits from the event being handled.
            handled = process.event
            correlation_id = correlation_id or handled.correlation_id or handled.uuid_string
            cause = cause or handled.uuid_string
        attributes[_CONVERSATION_ID] = correlation_id or event.uuid_string
        if cause is not None:
            attributes[_CAUSE] = cause

    def _guarded(self, when: str) -> _Guard:
        return _Guard(when, self._logged)

    def _log_once(self, key: str, text: str) -> None:
        if key not in self._logged:
            self._logged.add(key)
            log.warning(text)


class _Guard:
    """Logs an exception, the first of perhaps very many, instead of letting it out."""

    def __init__(self, when: str, logged: set[str]) -> None:
        self._when = when
        self._logged = logged

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if self._when not in self._logged:
            self._logged.add(self._when)
            log.error(
                "OpenTelemetry failed %s; the event goes on without it. This is logged once.",
                self._when,
                exc_info=error,
            )
        return True


class _Process:
    """The span of one handler's call: what it is within, and what its outcome is reported to."""

    def __init__(
        self,
        event: DomainEvent[Any],
        span: Span,
        context: Context,
        shown: str,
        attributes: dict[str, Any],
        links: list[Link],
        started: int,
    ) -> None:
        self.event = event
        self.span = span
        #: In which the handler runs: the span is the current one, and the event's baggage is there.
        self.context = context
        #: The destination, as the span's name has it.
        self.shown = shown
        self.attributes = attributes
        self.links = links
        #: In nanoseconds since the epoch.
        self.started = started
        self.ended = started

    def __enter__(self) -> None:
        self._token = contexts.attach(self.context)

    def __exit__(self, *_error: object) -> None:
        self.ended = time.time_ns()
        contexts.detach(self._token)


class _Headers(Getter[Mapping[str, Any]], Setter[MutableMapping[str, Any]]):
    """How propagators read and write an event's headers."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix

    def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
        value = carrier.get(self._prefix + key)
        # Other programs may have written whatever AMQP has.
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Mapping[str, Any]) -> list[str]:
        prefix = self._prefix
        return [key[len(prefix) :] for key in carrier if key.startswith(prefix)]

    def set(self, carrier: MutableMapping[str, Any], key: str, value: str) -> None:
        name = self._prefix + key
        # Names with x- are the broker's, and would be refused.
        if name.startswith("x-") or len(value) > _LONGEST_HEADER:
            return
        # What a publisher has given stays.
        if self._prefix or name not in carrier:
            carrier[name] = value


_HEADERS = _Headers()
_FORWARDED_HEADERS = _Headers(_FORWARDED_PREFIX)

# Those that are followed by an ack.
_SETTLING = (Operation.RETRY, Operation.DEAD_LETTER, Operation.HAND_BACK)
# The owner and the purpose of the connection.
_CONSUMING = ("subscriber", "consuming")
_PUBLISHER = ("publisher", "publishing")
_OWNERS = {
    **dict.fromkeys(_SETTLING, ("subscriber", "publishing")),
    Operation.REPLAY: ("dead letters", "publishing"),
}


def _joined(*parts: str | None) -> str:
    """The name of a destination by the conventions for RabbitMQ."""
    distinct = dict.fromkeys(part for part in parts if part)
    return ":".join(distinct) or "amq.default"


def _sending(outgoing: Outgoing, name: str) -> dict[str, Any]:
    """The attributes of whatever is sent, or is written to be sent later."""
    kind = _CREATE if outgoing.operation.value == _OUTBOX else _SEND
    return {_SYSTEM: _RABBITMQ, _OPERATION: name, _TYPE: kind}


def _queue_of(outgoing: Outgoing) -> str:
    queue = outgoing.subscriber or ""
    return queue + _DEAD_LETTERS if outgoing.operation is Operation.DEAD_LETTER else queue


def _span_context(context: Context) -> SpanContext:
    return trace.get_current_span(context).get_span_context()


def _with_parent(context: Context, parent: SpanContext) -> Context:
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), context)


def _fail(span: Span, error: BaseException, when: int | None = None) -> None:
    if span.is_recording():
        span.set_attribute(_ERROR_TYPE, type_name(error))
        span.set_status(StatusCode.ERROR, printable(error))
        span.record_exception(error, timestamp=when)


def _server(address: str) -> dict[str, Any]:
    """The attributes of a broker, by its address; of an embedded one, none."""
    url = urlsplit(address)
    if url.scheme not in _PORTS or not url.hostname:
        return {}
    return {_SERVER_ADDRESS: url.hostname, _SERVER_PORT: url.port or _PORTS[url.scheme]}


_PORTS = {"amqp": 5672, "amqps": 5671}
