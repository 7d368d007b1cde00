"""``Prometheus``: middleware that counts and times events, for Prometheus to scrape.

::

    from domain_events.prometheus import Prometheus, serve

    configure(middleware=[Prometheus()])
    serve(9000)  # unless a web server of this process exposes them already

The metrics are described in docs/prometheus.rst, with a dashboard and alert rules. Their labels are
subscribers, exchanges, operations, outcomes, classes of exceptions, kinds of connections: never a
routing key, an id or a text, whose number has no bound.

It works in the multiprocess mode of prometheus_client, too. A failure here is logged, and does not
affect events.

`OutboxMetrics` shows the state of outboxes, in the process of a relay.

Needs the extra ``[prometheus]``.
"""

from __future__ import annotations

import functools
import math
import os
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

try:
    from prometheus_client import (
        REGISTRY,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        Metric,
        make_wsgi_app,
    )
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "domain_events.prometheus needs prometheus_client: "
        "pip install 'domain-events-rabbitmq[prometheus]'"
    ) from error

from domain_events import (
    ConfigurationError,
    ConnectionChange,
    ConnectionState,
    Delivered,
    DomainEvent,
    Middleware,
    Outcome,
    Outgoing,
    Subscriber,
)
from domain_events.checks import refusal, seconds, shown, whole_number
from domain_events.log import Log
from domain_events.text import printable

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)

log = Log(__name__)

_MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"

# Seconds. A handler takes a millisecond or minutes; from an event to the end of its handler, with
# retries and after an outage, days may pass.
_HANDLER_TIMES = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_CRITICAL_TIMES = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 6 * 3600, 24 * 3600)
_PUBLISH_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

# Seconds. What fails, fails with each event.
_BETWEEN_LINES = 60.0
_CLOSE_TIMEOUT = 5.0


class Prometheus(Middleware):
    """Counts and times events, and shows the state of connections and handlers.

    :param registry: where the metrics are registered; that of prometheus_client if left out.
    :raises ConfigurationError: when they are registered there already, when it is not a registry,
        or when the directory of the multiprocess mode does not exist.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        _check_registry(registry)
        _check_multiprocess()
        metrics: list[Counter | Gauge | Histogram] = []

        def by_labels(metric: _Metric) -> Callable[..., _Metric]:
            # Cached, which halves the time that an event takes here; labels have few values.
            metrics.append(metric)
            return functools.cache(metric.labels)

        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            return by_labels(Counter(name, text, labels, registry=None))

        def histogram(
            name: str, text: str, label: str, buckets: tuple[float, ...]
        ) -> Callable[..., Histogram]:
            return by_labels(Histogram(name, text, (label,), buckets=buckets, registry=None))

        def gauge(
            name: str, text: str, *labels: str, of_processes: Literal["livesum", "livemin"]
        ) -> Callable[..., Gauge]:
            return by_labels(
                Gauge(name, text, labels, multiprocess_mode=of_processes, registry=None)
            )

        self._delivered = counter(
            "domain_events_delivered_total",
            "Events delivered to a subscriber, by what became of them.",
            *("subscriber", "outcome", "exception"),
        )
        self._handler_time = histogram(
            "domain_events_handler_time_seconds",
            "From the call of a handler to its return.",
            "subscriber",
            _HANDLER_TIMES,
        )
        self._critical_time = histogram(
            "domain_events_critical_time_seconds",
            "From an event's timestamp until it was handled; 0 if the clocks differ by more.",
            "subscriber",
            _CRITICAL_TIMES,
        )
        self._in_progress = gauge(
            "domain_events_in_progress",
            "Handlers that are running.",
            "subscriber",
            of_processes="livesum",
        )
        self._oldest = gauge(
            "domain_events_oldest_handler_start_time_seconds",
            "Unix time at which the handler that has run longest was called; +Inf if none runs.",
            "subscriber",
            of_processes="livemin",
        )
        self._published = counter(
            "domain_events_published_total",
            "Events sent, by operation and by whether the broker confirmed them.",
            *("operation", "exchange", "subscriber", "outcome", "exception"),
        )
        self._publish_time = histogram(
            "domain_events_publish_time_seconds",
            "From the call until the broker confirmed the event, or it failed.",
            "operation",
            _PUBLISH_TIMES,
        )
        self._connected = gauge(
            "domain_events_connected",
            "Connections to the broker that are open.",
            *("owner", "purpose"),
            of_processes="livesum",
        )
        self._disconnected = gauge(
            "domain_events_disconnected",
            "Connections to the broker that are not open, and are being made.",
            *("owner", "purpose"),
            of_processes="livesum",
        )
        self._blocked = gauge(
            "domain_events_blocked",
            "Connections on which the broker accepts nothing for the time being.",
            *("owner", "purpose"),
            of_processes="livesum",
        )
        self._reconnects = counter(
            "domain_events_reconnects_total",
            "Connections to the broker that were made again.",
            *("owner", "purpose"),
        )
        self._unsettled = gauge(
            "domain_events_unsettled",
            "Deliveries that a process holds: waiting, being handled, or being forwarded.",
            "subscriber",
            of_processes="livesum",
        )
        self._watched: weakref.WeakSet[Subscriber] = weakref.WeakSet()
        self._unsettled_of: set[str] = set()
        # The start of each handler that runs, in order.
        self._running: dict[str, dict[object, float]] = {}
        self._connections: dict[tuple[str, str], dict[int, _Connection]] = {}
        self._updates = _Updates(self._start_over)
        _register(
            [_AtScrape(self._updates, self._show_unsettled), *metrics],
            registry,
            "Prometheus(); create one and give it to all that need it, once in "
            "configure(middleware=[...]) for example",
        )

    def watch(self, subscriber: Subscriber) -> None:
        """Show how many deliveries this Subscriber holds, as ``domain_events_unsettled``.

        Read with each scrape, so not in multiprocess mode, where another process is scraped. The
        Subscriber is not kept alive.

        :raises ConfigurationError: it is something else. Publishers need not be watched.
        """
        if not isinstance(subscriber, Subscriber):
            raise ConfigurationError(f"watch() takes a Subscriber, not {shown(subscriber)}.")
        self._watched.add(subscriber)

    # --- middleware ------------------------------------------------------------------------------

    def publishing(self, outgoing: Outgoing) -> Callable[[BaseException | None], None]:
        begun = time.monotonic()
        labels = (str(outgoing.operation), outgoing.exchange or "", outgoing.subscriber or "")

        def done(error: BaseException | None) -> None:
            self._updates.do(self._sent, labels, error, time.monotonic() - begun)

        return done

    def handling(self, event: DomainEvent[Any]) -> _Running:
        return _Running(self, event.subscriber or "")

    def delivered(self, delivered: Delivered) -> None:
        self._updates.do(self._decided, delivered, time.time())

    def connection(self, change: ConnectionChange) -> None:
        self._updates.do(self._changed, change)

    # --- updates ---------------------------------------------------------------------------------

    def _sent(self, labels: tuple[str, str, str], error: BaseException | None, took: float) -> None:
        outcome = "confirmed" if error is None else "failed"
        self._published(*labels, outcome, _class_of(error)).inc()
        self._publish_time(labels[0]).observe(took)

    def _begun(self, subscriber: str, handler: object, now: float) -> None:
        self._running.setdefault(subscriber, {})[handler] = now
        self._show_running(subscriber)

    def _ended(self, subscriber: str, handler: object) -> None:
        # Not there if it was begun before a fork, in the parent.
        self._running.setdefault(subscriber, {}).pop(handler, None)
        self._show_running(subscriber)

    def _show_running(self, subscriber: str) -> None:
        running = self._running[subscriber]
        self._oldest(subscriber).set(next(iter(running.values()), math.inf))
        self._in_progress(subscriber).set(len(running))

    def _decided(self, delivered: Delivered, now: float) -> None:
        subscriber, event = delivered.subscriber, delivered.event
        error = _class_of(delivered.error)
        self._delivered(subscriber, str(delivered.outcome), error).inc()
        if delivered.seconds is not None:
            self._handler_time(subscriber).observe(delivered.seconds)
        if delivered.outcome is Outcome.HANDLED and event is not None:
            self._critical_time(subscriber).observe(max(0.0, now - event.timestamp))

    def _show_unsettled(self) -> None:
        unsettled = dict.fromkeys(self._unsettled_of, 0)  # 0 if its Subscriber is gone
        for subscriber in list(self._watched):
            for each in subscriber.health().subscriptions:
                unsettled[each.name] = unsettled.get(each.name, 0) + each.unsettled
        for name, number in unsettled.items():
            self._unsettled(name).set(number)
        self._unsettled_of = set(unsettled)

    def _changed(self, change: ConnectionChange) -> None:
        key = change.owner, change.purpose
        connections = self._connections.setdefault(key, {})
        before = connections.pop(change.connection, None)
        if change.state is not ConnectionState.CLOSED:
            was_connected = before is not None and before.was_connected
            reconnects = self._reconnects(*key)  # shown from the beginning, as 0
            if change.state is ConnectionState.CONNECTED and was_connected:
                reconnects.inc()
            connections[change.connection] = _Connection(change.state, was_connected)
        self._show_connections(key)

    def _show_connections(self, key: tuple[str, str]) -> None:
        now = self._connections[key].values()
        self._connected(*key).set(sum(each.is_connected for each in now))
        self._disconnected(*key).set(sum(not each.is_connected for each in now))
        self._blocked(*key).set(sum(each.state is ConnectionState.BLOCKED for each in now))

    def _start_over(self) -> None:
        """In the child of a fork: the handlers and connections of the parent are not here."""
        for subscriber, running in self._running.items():
            running.clear()
            self._show_running(subscriber)
        for key, connections in self._connections.items():
            connections.clear()
            self._show_connections(key)


class Outbox(Protocol):
    """What has the ``status()`` of an outbox: `domain_events.outbox.Relay`, or the one of
    `domain_events.sqlalchemy`.
    """

    def status(self) -> Any:
        """With ``waiting``, ``oldest`` and ``parked``; of a relay, with ``sent``, too."""


class OutboxMetrics(Collector):
    """Shows how many events wait in outboxes, for how long, and how many are parked.

    ::

        with outbox.relay() as relay:
            OutboxMetrics({'shop': relay})
            serve(9000)
            relay.run()

    Each scrape reads them, on a connection to the database of their own. In multiprocess mode it is
    not shown; use it in the process of a relay, which is one.

    :param outboxes: relays or outboxes, by the name that is their label ``outbox``.
    :param registry: where the metrics are registered; that of prometheus_client if left out.
    :param timeout: seconds for which a scrape waits for the databases. An outbox that cannot be
        read until then is shown as such, and is logged.
    :raises ConfigurationError: when they are registered there already, or an option is wrong.
    """

    def __init__(
        self,
        outboxes: Mapping[str, Outbox],
        registry: CollectorRegistry = REGISTRY,
        timeout: float = 3.0,
    ) -> None:
        _check_registry(registry)
        if not isinstance(outboxes, Mapping) or not all(
            isinstance(name, str) and callable(getattr(outbox, "status", None))
            for name, outbox in outboxes.items()
        ):
            raise refusal(outboxes, "outboxes", "a dict of relays or outboxes by their names")
        self._timeout = seconds(timeout)
        self._readings = {name: _Reading(name, outbox) for name, outbox in outboxes.items()}
        _register([self], registry, "OutboxMetrics(); give all outboxes to that one")

    def describe(self) -> list[Metric]:
        """For the registry, which refuses a second one."""
        return list(self._families())

    def _families(self) -> tuple[GaugeMetricFamily | CounterMetricFamily, ...]:
        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"domain_events_outbox_{name}", text, labels=["outbox"])

        return (
            gauge("readable", "1 if the outbox could be read in time, else 0."),
            gauge("waiting", "Events in the outbox that are to be sent."),
            gauge("oldest_seconds", "For how long the oldest of them has waited; 0 without any."),
            gauge("parked", "Events that cannot be sent, until somebody decides about them."),
            CounterMetricFamily(
                "domain_events_outbox_relayed_total",
                "Events that the relay of this process has sent.",
                labels=["outbox"],
            ),
        )

    def collect(self) -> list[Metric]:
        """Called by the registry with each scrape."""
        families = self._families()
        for reading in self._readings.values():
            reading.begin()
        deadline = time.monotonic() + self._timeout
        for name, reading in self._readings.items():
            status = reading.result(deadline)
            readable, waiting, oldest, parked, relayed = families
            readable.add_metric([name], status is not None)
            if status is not None:
                waiting.add_metric([name], status.waiting)
                oldest.add_metric([name], status.oldest)
                parked.add_metric([name], status.parked)
                if hasattr(status, "sent"):
                    relayed.add_metric([name], status.sent)
        return list(families)


class _Reading:
    """Reads the state of an outbox, on a thread that may take longer than a scrape."""

    def __init__(self, name: str, outbox: Outbox) -> None:
        self._name = name
        self._outbox = outbox
        self._thread: threading.Thread | None = None
        self._status: Any = None
        self._logged_at = -math.inf

    def begin(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._status = None
            self._thread = threading.Thread(
                target=self._read, name="domain-events-outbox-metrics", daemon=True
            )
            self._thread.start()

    def result(self, deadline: float) -> Any:
        """None if it cannot be read, or not until then."""
        thread = self._thread
        assert thread is not None
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            self._log("its database does not answer")
        return self._status

    def _read(self) -> None:
        try:
            self._status = self._outbox.status()
        except Exception as error:  # noqa: BLE001 - adapters have errors of their own
            self._log(printable(f"{type(error).__name__}: {error}"))

    def _log(self, why: str) -> None:
        now = time.monotonic()
        if now - self._logged_at >= _BETWEEN_LINES:
            self._logged_at = now
            log.warning(
                "The outbox '%s' cannot be read for its metrics: %s. (Logged once a minute at "
                "most.)",
                printable(self._name),
                why,
            )


def _check_registry(registry: object) -> None:
    # Another one would be noticed by the first scrape.
    if not isinstance(registry, CollectorRegistry):
        raise refusal(registry, "registry", "a CollectorRegistry of prometheus_client")


def _check_multiprocess() -> bool:
    """Whether the metrics of several processes are shown together."""
    directory = os.environ.get(_MULTIPROCESS)
    if directory is not None and not Path(directory).is_dir():
        raise ConfigurationError(
            f"The environment variable {_MULTIPROCESS} must name a directory, not {directory!r}; "
            "create it, empty, before the program starts."
        )
    return directory is not None


def _register(metrics: Sequence[Collector], registry: CollectorRegistry, another: str) -> None:
    registered = []
    try:
        for metric in metrics:
            registry.register(metric)
            registered.append(metric)
    except ValueError as error:
        for metric in registered:
            registry.unregister(metric)
        raise ConfigurationError(
            "The metrics of domain_events are registered in this registry already, by another "
            f"{another}, or give this one a registry of its own (registry=CollectorRegistry())."
        ) from error


class _Running:
    """Around a handler's call."""

    __slots__ = ("_prometheus", "_subscriber")

    def __init__(self, prometheus: Prometheus, subscriber: str) -> None:
        self._prometheus = prometheus
        self._subscriber = subscriber

    def __enter__(self) -> None:
        self._prometheus._updates.do(self._prometheus._begun, self._subscriber, self, time.time())

    def __exit__(self, *_error: object) -> None:
        self._prometheus._updates.do(self._prometheus._ended, self._subscriber, self)


class _Connection:
    """A connection that was not closed by its owner."""

    def __init__(self, state: ConnectionState, was_connected: bool) -> None:
        self.state = state
        self.is_connected = state not in (ConnectionState.LOST, ConnectionState.UNREACHABLE)
        #: Now, or before it was lost.
        self.was_connected = was_connected or self.is_connected


class _AtScrape:
    """Is called at each scrape by the registry, before the metrics are read."""

    def __init__(self, updates: _Updates, update: Callable[[], None]) -> None:
        self._updates = updates
        self._update = update

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        self._updates.do(self._update)
        return []


class _Queue:
    """The updates of one process that are to be run."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.lock = threading.RLock()
        #: Whether one runs on the thread that has the lock.
        self.busy = False
        #: The threads that fork.
        self.forking: list[int] = []


class _Updates:
    """Runs updates one at a time, and never gets stuck at a lock of prometheus_client.

    A signal handler, or a finalizer, that interrupts an update leaves its own to the interrupted
    one, or it would wait for a lock that its own thread holds. While the process forks, no other
    thread is within an update: the child has its locks, and not the thread that releases them.
    """

    def __init__(self, after_fork: Callable[[], None]) -> None:
        self._after_fork = after_fork
        # By process: a child inherits updates and locks that are its parent's.
        self._queues: dict[int, _Queue] = {}
        self._logged_at = -math.inf
        _all.add(self)

    def do(self, update: Callable[..., None], *arguments: Any) -> None:
        """Run it; what it raises is logged."""
        queue = self._queue()
        queue.waiting.append((update, arguments))
        self._run_waiting(queue)

    def pause(self) -> None:
        """Before a fork."""
        queue = self._queue()
        queue.forking.append(threading.get_ident())
        queue.lock.acquire()

    def resume(self) -> None:
        """After a fork, in the parent."""
        queue, thread = self._queue(), threading.get_ident()
        if thread not in queue.forking:  # it was created meanwhile
            return
        queue.forking.remove(thread)
        queue.lock.release()
        self._run_waiting(queue)

    def _queue(self) -> _Queue:
        pid = os.getpid()
        queue = self._queues.get(pid)
        if queue is None:
            queue = self._queues.setdefault(pid, _Queue())
            queue.waiting.appendleft((self._after_fork, ()))
        return queue

    def _run_waiting(self, queue: _Queue) -> None:
        # Again, if an interruption has left one after the last.
        while queue.waiting and not queue.forking:
            failure: Exception | None = None
            with queue.lock:
                if queue.busy:
                    return
                queue.busy = True
                try:
                    while queue.waiting and not queue.forking:
                        update, arguments = queue.waiting.popleft()
                        try:
                            update(*arguments)
                        except Exception as error:  # noqa: BLE001 - logged, without the lock
                            failure = error
                finally:
                    queue.busy = False
            if failure is not None:
                self._log_failure(failure)

    def _log_failure(self, failure: Exception) -> None:
        now = time.monotonic()
        if now - self._logged_at >= _BETWEEN_LINES:
            self._logged_at = now
            log.error(
                "Metrics could not be updated; events are published and handled as before. "
                "(Logged once a minute at most.)",
                exc_info=failure,
            )


_all: weakref.WeakSet[_Updates] = weakref.WeakSet()


def _pause() -> None:
    for each in list(_all):
        each.pause()


def _resume() -> None:
    for each in list(_all):
        each.resume()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_pause, after_in_parent=_resume)


def _class_of(error: BaseException | None) -> str:
    return "" if error is None else type(error).__name__


class _HTTPServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's asks the DNS for a name that is not used here
        self.server_name, self.server_port = "", self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        # The client is gone, or has sent nothing.
        log.debug("A scrape by %s failed: %r", client_address, sys.exc_info()[1])


class _HTTPServerV6(_HTTPServer):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds for a request to arrive

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: by default there is a line on stderr for each scrape."""


class Server:
    """Serves the metrics by HTTP, on a thread of its own, until it is closed; see `serve`."""

    def __init__(self, port: int, host: str, registry: CollectorRegistry) -> None:
        kind = _HTTPServerV6 if ":" in host else _HTTPServer
        self._httpd = make_server(host, port, make_wsgi_app(registry), kind, _Handler)
        self._thread = threading.Thread(
            target=self._httpd.serve_forever, name="domain-events-prometheus", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens; of interest when it was to choose one itself."""
        return self._httpd.server_port

    def close(self) -> None:
        """Stop serving, within half a second."""
        if self._thread.is_alive():  # not in the child of a fork
            self._httpd.shutdown()
            self._thread.join(_CLOSE_TIMEOUT)
        self._httpd.server_close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve(port: int, host: str = "", registry: CollectorRegistry = REGISTRY) -> Server:
    """Serve the metrics at ``http://host:port/metrics``, for a process without a web server.

    In multiprocess mode it serves those of all processes: call it in one of them.

    :param port: 0 for any that is free; then see `Server.port`.
    :param host: the address on which to listen; all of this machine's, of IPv4, if left out.
    :param registry: what to serve, except in multiprocess mode.
    :raises ConfigurationError: when it cannot listen there, for an option that cannot work, or when
        the directory of the multiprocess mode does not exist.
    """
    port = whole_number(port, "port", 0, 65_535)
    if not isinstance(host, str):
        raise refusal(host, "host", "an address, such as '127.0.0.1'")
    _check_registry(registry)
    if _check_multiprocess():
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    try:
        return Server(port, host, registry)
    except OSError as error:
        raise ConfigurationError(
            f"The metrics cannot be served at {host or '0.0.0.0'}:{port}: {error}. Give another "
            "port. Each of several processes on one machine needs its own; or they use the "
            "multiprocess mode of prometheus_client, and one of them serves."
        ) from error
