"""``Subscriber``: registers handlers, and runs them on the events that arrive.

Owns the subscriptions and the connections; `worker` and `handling` turn deliveries into calls of
handlers.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

from domain_events import settings
from domain_events.broker import Connections, Consumer, Exchange, Owner, weakly
from domain_events.checks import flag, seconds, whole_number
from domain_events.errors import ConfigurationError
from domain_events.forwarding import Forwarder
from domain_events.handling import Handler, Subscription
from domain_events.health import SubscriberHealth, SubscriptionHealth
from domain_events.log import Log
from domain_events.middleware import Middleware, check_middleware
from domain_events.names import ExchangeType, check_exchange_type, check_name, has_wildcards
from domain_events.options import QueueType, check_handler, make_options
from domain_events.payloads import make_payload
from domain_events.process import check_fork, on_fork
from domain_events.retry import Backoff
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.text import printable
from domain_events.worker import Worker, signals

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from domain_events.options import RegisterOptions

log = Log("domain_events")

AnyHandler = TypeVar("AnyHandler", bound=Handler)

_CLOSE_TIMEOUT = 10.0

# Why a run has stopped, for the log.
_STOP_CONSUMING = "stop_consuming()"

# Each is a thread of its own.
_MOST_WORKERS = 1000

# Of this process: to detect two that share a queue by mistake, and for the child of a fork.
_subscribers: weakref.WeakSet[Subscriber] = weakref.WeakSet()


class Subscriber(Owner):
    """Receives domain events and calls handlers with them.

    The constructor does no I/O. Any number of handlers may be registered, each with a queue of its
    own; any number of processes may register the same one, and share its events.

    :param connection_settings: an AMQP URL, several, or None; see `configure`.
    :param exchange: where events are published. It is declared, unless ``declare`` is false.
    :param exchange_type: its type; binding keys have wildcards with ``topic`` only.
    :param workers: how many handlers run at the same time, each in a thread; up to 1,000.
    :param timeout: seconds within which the broker must answer each request of `register`.
    :param middleware: within that of `configure`; the first is outermost.
    :param declare: whether `register` declares what it needs, and binds it. If not, an operator
        does, with ``domain-events topology apply``, and this user may do without the permission to
        configure anything: `register` only checks that the queues and exchanges exist, and
        ``retired_keys`` are not unbound.
    :raises ConfigurationError: for settings that cannot work.
    """

    def __init__(
        self,
        connection_settings: ConnectionSettings = DEFAULT,
        exchange: str = "domain-events",
        exchange_type: ExchangeType = "topic",
        *,
        workers: int = 1,
        timeout: float = 10.0,
        middleware: Iterable[Middleware] = (),
        declare: bool = True,
    ) -> None:
        connection_settings = settings.masked(connection_settings)
        urls = settings.resolve(connection_settings)
        self.exchange: str = check_name(exchange, "exchange")
        self.exchange_type: ExchangeType = check_exchange_type(exchange_type)
        self.workers: int = whole_number(workers, "workers", 1, _MOST_WORKERS)
        self._timeout = seconds(timeout)
        self._declare = flag(declare, "declare")
        # The I/O threads must not keep this alive, so their references are weak.
        self.connections: Connections = Connections(
            urls,
            "subscriber",
            on_failure=weakly(self._on_failure),
            middleware=check_middleware(middleware),
        )
        self.forwarder: Forwarder = Forwarder(weakly(self.connections.publishing))
        # The testing kit delivers to them.
        self.subscriptions: list[Subscription] = []
        self._lock = threading.RLock()
        self._worker: Worker | None = None
        self._stop_at_start = False
        self._ended_by: str | None = None  # the error that ended the last run
        _subscribers.add(self)

    def register(
        self,
        handler: Handler,
        name: str,
        binding_keys: Sequence[str],
        dead_letter: bool | None = None,
        durable: bool = True,
        exclusive: bool = False,
        auto_delete: bool = False,
        max_retries: int = 0,
        *,
        retry_on: type[BaseException] | Sequence[type[BaseException]] = (),
        backoff: Backoff | None = None,
        queue_type: QueueType = "quorum",
        prefetch_count: int | None = None,
        ordered: bool = False,
        retired_keys: Sequence[str] = (),
        payload: Any = None,
        upcast: Mapping[int, Callable[[Any], Any]] | None = None,
        handler_limit: float | None = None,
    ) -> None:
        """Call ``handler`` with every event that one of the binding keys matches.

        The queue and its bindings exist when this returns (with ``declare=False``, if an operator
        has applied them): events published from then on are kept until ``start_consuming`` (and
        while the program is down, if ``durable``).

        A handler returns when it is done with the event; it may raise `Retry` to have it again
        later, `Reject` to give it up, and any other exception, which gives it up too unless it
        is in ``retry_on``. **It must be idempotent**: after a crash an event can come a second
        time, with the same ``uuid_string``.

        :param handler: called with a `DomainEvent`; a plain function, not ``async``.
        :param name: the subscriber's name, and its queue's; the same in each deployment.
        :param binding_keys: routing keys, with ``*`` for one word and ``#`` for any number.
        :param dead_letter: keep events that the handler gave up on as dead letters in the queue
            ``<name>-dl``. By default a durable subscriber does, a temporary one does not.
        :param durable: keep events while no process of this subscriber runs. Otherwise the
            queue is deleted a minute after its last consumer is gone.
        :param exclusive: a queue for this process alone, deleted when it disconnects.
        :param auto_delete: the queue is deleted with its last consumer.
        :param max_retries: how often an event is tried again.
        :param retry_on: exceptions on which an event is tried again, after ``backoff``.
        :param backoff: the delays for ``retry_on``; `Backoff` () if left out.
        :param queue_type: ``classic`` to go on with a queue of domain-event-broker.
        :param prefetch_count: how many events this process holds at most, with the one that is
            being handled; the fewer, the more evenly slow handlers in several processes share
            the work. If left out, 200, or four for each worker if that is more.
        :param ordered: with several workers, never handle two events of one
            ``domain_object_id`` at the same time, and handle them in their order. With one
            worker it is always so.
        :param retired_keys: binding keys of earlier releases that no process needs any more. They
            are unbound, and events that still arrive by them are acked unhandled. A key that is
            merely no longer listed stays bound, since other releases of this subscriber may need
            it: its events are handed back, for a process that lists it.
        :param payload: what ``event.data`` is to be: a dataclass, a TypedDict, an attrs class or a
            struct (by msgspec), or a model of pydantic's. If left out, what the handler's
            annotation names, as in ``event: DomainEvent[UserRegistered]``; without one, JSON
            values. Fields that it does not know are ignored. An event whose data does not fit is
            given up at once, whatever ``retry_on`` is.
        :param upcast: functions that turn the data of one version into that of the next one, by
            the version that each begins with: ``{1: v1_to_v2, 2: v2_to_v3}``. They get JSON
            values, before ``payload``. An event that a step fails on, or that is older than the
            first one, is given up at once; one that is newer is handled as it is.
        :param handler_limit: seconds that the handler takes at most when all is well. One that runs
            for longer is left to run; `health` then reports that this process is not alive, and
            logs a warning.
        :raises ConfigurationError: options that cannot work; wrong password or permissions.
        :raises BrokerUnavailable: no broker within the subscriber's ``timeout``.
        :raises TopologyError: the queue exists with other arguments, or is another connection's;
            with ``declare=False``, it does not exist.
        """
        check_handler(handler, name)
        options = make_options(
            name,
            binding_keys,
            dead_letter,
            retry_on,
            backoff,
            retired_keys,
            exchange=Exchange(self.exchange, self.exchange_type),
            durable=durable,
            exclusive=exclusive,
            auto_delete=auto_delete,
            max_retries=max_retries,
            queue_type=queue_type,
            prefetch_count=prefetch_count,
            ordered=ordered,
            handler_limit=handler_limit,
            declare=self._declare,
        )
        if any(each.options.name == options.name for each in self.subscriptions):
            raise ConfigurationError(
                f"{options.name} is registered already, with this Subscriber: two handlers on one "
                "queue would each get only some of the events. Give each a name of its own."
            )
        reader = make_payload(handler, options.name, payload, upcast)
        consuming = self.connections.consuming()
        if consuming is not None:
            consuming.declare(options.queue, self._timeout)
        subscription = Subscription(
            handler, options, self.forwarder, self.connections.middleware, reader
        )
        self._warn_of_sharing(subscription)
        binding_keys = options.queue.binding_keys
        if self.exchange_type == "direct" and any(map(has_wildcards, binding_keys)):
            log.warning(
                "%s: on a direct exchange '*' and '#' are not wildcards: %s",
                options.name,
                ", ".join(binding_keys),
            )
        with self._lock:
            # The lock of `start_consuming`, or both would consume from the new queue.
            self.subscriptions.append(subscription)
            worker = self._worker
            if worker is not None and not worker.stopping:
                worker.consume(subscription)

    @overload
    def on(
        self,
        binding_key: str,
        /,
        *binding_keys: str,
        name: str,
        **options: Unpack[RegisterOptions],
    ) -> Callable[[AnyHandler], AnyHandler]: ...

    @overload
    def on(self, *, name: str, **options: Any) -> NoReturn: ...

    def on(
        self, *binding_keys: str, name: str | None = None, **options: Any
    ) -> Callable[[AnyHandler], AnyHandler]:
        """`register`, as a decorator; the function itself is left as it is.

        ::

            @subscriber.on('user.registered', 'user.imported', name='welcome-mail')
            def send_welcome_mail(event): ...
        """

        example = "@subscriber.on('user.registered', name='welcome-mail')"
        if not all(isinstance(key, str) for key in binding_keys):
            raise ConfigurationError(
                "on() takes binding keys one by one and is called before it decorates, as in "
                f"{example}; a list of keys is given as on(*keys, name=...)."
            )
        if name is None:
            raise ConfigurationError(f"on() needs the subscriber's name, as in {example}.")

        def decorate(handler: AnyHandler) -> AnyHandler:
            self.register(handler, name, binding_keys, **options)
            return handler

        return decorate

    def start_consuming(self, timeout: float | None = None) -> None:
        """Handle events until stopped; blocks.

        It ends, in order, on `stop_consuming`, on SIGTERM and SIGINT (where it runs in the main
        thread), and after ``timeout`` seconds: it takes no more events, lets the handlers that
        run finish, settles, requeues events not begun, and closes. It can be started again
        afterwards. A second SIGINT ends it at once with KeyboardInterrupt: the handler is
        interrupted (with several workers, left behind), and its event comes again.

        It does not end when the connection is lost: it reconnects and consumes again.

        :param timeout: stop after about so many seconds; never, if None.
        :raises ConfigurationError: nothing is registered, or the broker refuses the password.
        """
        if timeout is not None:
            timeout = seconds(timeout, zero=True)
        consuming = self.connections.consuming()
        if consuming is None:
            return
        if not self.subscriptions:
            raise ConfigurationError(
                "Nothing is registered with this Subscriber; call register() before "
                "start_consuming()."
            )
        worker = Worker(consuming, self.forwarder, self.workers, timeout)
        with self.running(worker) as subscriptions:
            names = ", ".join(each.options.name for each in subscriptions)
            started = time.monotonic()
            self._log_start(subscriptions)
            try:
                worker.work(subscriptions)
            finally:
                log.info(
                    "%s: stopped after %.1f s; events handled: %d.",
                    names,
                    time.monotonic() - started,
                    worker.handled,
                )

    @contextmanager
    def running(self, worker: Worker) -> Iterator[list[Subscription]]:
        """One run, of what is registered; at its end the connections are closed.

        SIGTERM and SIGINT stop it, as do `stop_consuming` and `close`. For `start_consuming` and
        the testing kit, which brings a worker of its own.

        :meta private:
        """
        with self._lock:
            if self._worker is not None:
                raise ConfigurationError(
                    "This Subscriber is consuming already; to run more handlers at a time, use "
                    "Subscriber(workers=...)."
                )
            self._worker = worker
            self._ended_by = None
            subscriptions = list(self.subscriptions)
        # Until all is closed: a second SIGTERM must not interrupt an orderly stop.
        with signals(worker), self.connections.pinned():
            try:
                if self._stop_at_start:
                    worker.stop(_STOP_CONSUMING)
                yield subscriptions
            except BaseException as error:
                self._ended_by = printable(f"{type(error).__name__}: {error}", 1000)
                raise
            finally:
                self._worker = None
                self.close()
                self._stop_at_start = False

    def stop_consuming(self) -> None:
        """Make `start_consuming` end; returns at once. From any thread, or from a handler.

        If it has not begun yet, it will end as soon as it begins.
        """
        check_fork()
        worker = self._worker
        if worker is not None:
            worker.stop(_STOP_CONSUMING)
        elif self.subscriptions:
            self._stop_at_start = True

    def health(self) -> SubscriberHealth:
        """Whether it is alive and ready, and why not, as data for probes and metrics.

        From any thread, at any time; it waits for nothing, and takes no lock that a handler may
        hold. It logs a warning for each event whose handler has run for longer than its
        ``handler_limit``, once.
        """
        check_fork()
        worker = self._worker
        consumers = {} if worker is None else worker.consumers()
        last_error, last_error_at = self.connections.last_error()
        return SubscriberHealth(
            at=time.time(),
            switched_off=self.connections.are_switched_off,
            connections=self.connections.health(),
            last_error=last_error,
            last_error_at=last_error_at,
            running=worker is not None,
            stopping=worker is not None and worker.stopping,
            ended_by=self._ended_by,
            subscriptions=tuple(
                _subscription_health(each.options.name, consumers, worker)
                for each in self.subscriptions.copy()
            ),
            handlers=() if worker is None else worker.handlers(),
            handled=0 if worker is None else worker.handled,
        )

    def close(self) -> None:
        """Close the connections. Handlers stay registered, and consuming may be started again.

        While it consumes: the same as `stop_consuming`.
        """
        check_fork()
        worker = self._worker
        if worker is not None:
            worker.stop("close()")
        else:
            self.connections.close(_CLOSE_TIMEOUT)

    def _log_start(self, subscriptions: Sequence[Subscription]) -> None:
        log.info(
            "%s: consuming from %s; workers: %d; %s, process %d on %s.",
            ", ".join(
                f"{each.options.name} (prefetch_count {each.options.prefetch(self.workers)})"
                for each in subscriptions
            ),
            self.connections.shown,
            self.workers,
            printable(settings.app_id()),
            os.getpid(),
            socket.gethostname(),
        )

    def _warn_of_sharing(self, new: Subscription) -> None:
        """Warn if another Subscriber of this process has the name, but not the same handler."""
        name = new.options.name
        for other in list(_subscribers):
            # A closed one is like a process that has ended.
            if other is self or not other.connections.are_open:
                continue
            if other.connections.address == self.connections.address and any(
                old.options.name == name and not _is_same(old, new) for old in other.subscriptions
            ):
                log.warning(
                    "%s is registered by two Subscribers of this process, with different handlers "
                    "or binding keys: they share one queue, so that each gets only some of the "
                    "events. Give each a name of its own.",
                    name,
                )

    def _on_failure(self) -> None:
        worker = self._worker
        if worker is not None:
            worker.stop("the failure of its connection")


def _subscription_health(
    name: str, consumers: Mapping[str, Consumer], worker: Worker | None
) -> SubscriptionHealth:
    consumer = consumers.get(name)
    return SubscriptionHealth(
        name,
        None if consumer is None else consumer.consuming_since,
        0 if consumer is None else consumer.unsettled,
        None if worker is None else worker.last_event_at(name),
    )


def _is_same(one: Subscription, other: Subscription) -> bool:
    queues = one.options.queue, other.options.queue
    if len({(each.exchange.name, frozenset(each.binding_keys)) for each in queues}) > 1:
        return False
    # Each of several threads may have created the function again.
    code = getattr(one.handler, "__code__", None)
    return one.handler == other.handler or (
        code is not None and code is getattr(other.handler, "__code__", None)
    )


def _after_fork() -> None:
    # The worker is the parent's, and the lock may be held by a thread of the parent.
    for subscriber in list(_subscribers):
        subscriber._lock = threading.RLock()
        subscriber._worker = None
        subscriber._stop_at_start = False
        subscriber._ended_by = None


on_fork(_after_fork)
