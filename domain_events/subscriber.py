"""``Subscriber``: registers handlers, and runs them on the events that arrive.

Owns what was registered and the two connections; how deliveries become calls of handlers is
`run`'s and `subscription`'s.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

from domain_events import settings, topology
from domain_events.broker import Consuming, Publishing, close_dropped, connect
from domain_events.errors import BrokerUnavailable, ConfigurationError
from domain_events.log import Log
from domain_events.options import make_options
from domain_events.retry import Backoff
from domain_events.run import Run
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.subscription import Handler, Moves, Subscription

log = Log("domain_events")

AnyHandler = TypeVar("AnyHandler", bound=Handler)
Result = TypeVar("Result")

# How long stopping may take: what is not confirmed yet, and closing.
_MOVE_TIMEOUT = 10.0
_CLOSE_TIMEOUT = 10.0


class Subscriber:
    """Receives domain events and calls handlers with them.

    Made without any I/O. Any number of handlers may be registered, each with a queue of its
    own; any number of processes may register the same one, and share its events.

    :param connection_settings: an AMQP URL, several, or None; see `configure`.
    :param exchange: where events are published. It is declared.
    :param exchange_type: its type; binding keys have wildcards with ``topic`` only.
    :param workers: how many handlers run at the same time.
    :param timeout: seconds within which the broker must give each answer that `register` needs.
    :raises ConfigurationError: for settings that cannot work.
    """

    def __init__(
        self,
        connection_settings: ConnectionSettings = DEFAULT,
        exchange: str = "domain-events",
        exchange_type: str = "topic",
        *,
        workers: int = 1,
        timeout: float = 10.0,
    ) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ConfigurationError(f"workers is a number from 1 up, not {workers!r}.")
        self._urls = settings.resolve(connection_settings)
        self.exchange = topology.check_name(exchange, "exchange")
        self._exchange_type = exchange_type
        self._workers = workers
        self._timeout = timeout
        self._broker = None if self._urls is None else connect(self._urls)
        self._subscriptions: list[Subscription] = []
        self._lock = threading.RLock()
        # What the broker is: another one than asked for, in a test that has replaced it.
        self._connected_to = self._urls
        self._consuming: Consuming | None = None
        self._publishing: Publishing | None = None
        self._moves = Moves(_weakly(self._publishing_connection, _dropped))
        self._run: Run | None = None
        self._stop_at_start = False

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
        retry_on: type[Exception] | Sequence[type[Exception]] = (),
        backoff: Backoff | None = None,
        queue_type: Literal["quorum", "classic"] = "quorum",
        prefetch_count: int | None = None,
        ordered: bool = False,
    ) -> None:
        """Have ``handler`` called with every event that one of the binding keys matches.

        The queue and its bindings exist when this returns: what is published from then on is
        kept until ``start_consuming`` (and while the program is down, if ``durable``).

        A handler returns when it is done with the event; it may raise `Retry` to have it again
        later, `Reject` to give it up, and any other exception, which gives it up too unless it
        is in ``retry_on``. **It must be idempotent**: after a crash an event can come a second
        time, with the same ``uuid_string``.

        :param handler: called with a `DomainEvent`.
        :param name: the subscriber's name, and its queue's; the same in each deployment.
        :param binding_keys: routing keys, with ``*`` for one word and ``#`` for any number.
        :param dead_letter: keep what the handler gave up as dead letters in the queue
            ``<name>-dl``. By default a durable subscriber does, a temporary one does not.
        :param durable: keep events while no process of this subscriber runs. Otherwise the
            queue goes a minute after its last consumer.
        :param exclusive: a queue for this process alone, gone when it disconnects.
        :param auto_delete: the queue goes with its last consumer.
        :param max_retries: how often an event is tried again.
        :param retry_on: exceptions on which an event is tried again, after ``backoff``.
        :param backoff: the delays for ``retry_on``; `Backoff` () if left out.
        :param queue_type: ``classic`` to go on with a queue of domain-event-broker.
        :param prefetch_count: how many events are held ready by this process; the fewer, the
            more evenly slow handlers in several processes share the work. If left out, 50 (and
            at least four for each worker), and up to 2,000 as long as the handler is done with
            5,000 a second or more, for which 50 are too few.
        :param ordered: with several workers, never handle two events of one
            ``domain_object_id`` at the same time, and handle them in their order.
        :raises ConfigurationError: options that cannot work; wrong password or permissions.
        :raises BrokerUnavailable: no broker within the subscriber's ``timeout``.
        :raises TopologyError: the queue exists with other arguments, or is taken.
        """
        options = make_options(
            name,
            binding_keys,
            dead_letter,
            retry_on,
            backoff,
            exchange=self.exchange,
            exchange_type=self._exchange_type,
            durable=durable,
            exclusive=exclusive,
            auto_delete=auto_delete,
            max_retries=max_retries,
            queue_type=queue_type,
            prefetch_count=prefetch_count,
            ordered=ordered,
        )
        if not callable(handler):
            raise ConfigurationError(f"{name}: the handler cannot be called: {handler!r}.")
        if any(each.options.name == name for each in self._subscriptions):
            raise ConfigurationError(f"{name} is registered already, with this Subscriber.")
        self._follow()
        if self._broker is not None:
            self._consuming_connection().declare(options.topology(), self._timeout)
        subscription = Subscription(handler, options, self._moves)
        self._subscriptions.append(subscription)
        run = self._run
        if run is not None:
            run.consume(subscription)

    def on(
        self, *binding_keys: str, name: str, **options: Any
    ) -> Callable[[AnyHandler], AnyHandler]:
        """`register`, as a decorator; the function itself is left as it is.

        ::

            @subscriber.on('user.registered', 'user.imported', name='welcome-mail')
            def send_welcome_mail(event): ...
        """

        def decorate(handler: AnyHandler) -> AnyHandler:
            self.register(handler, name, binding_keys, **options)
            return handler

        return decorate

    def start_consuming(self, timeout: float | None = None) -> None:
        """Handle events until told to stop; blocks.

        It ends, in order, on `stop_consuming`, on SIGTERM and SIGINT (where it runs in the main
        thread), and after ``timeout`` seconds: it takes no more events, lets the handlers that
        run finish, settles, gives back what was not begun, and closes. It can be started again
        afterwards. A second SIGINT ends it at once with KeyboardInterrupt: the handler is
        interrupted (with several workers, left behind), and its event comes again.

        A lost broker is no end: it consumes again as soon as there is one.

        :param timeout: stop after about so many seconds; never, if None.
        :raises ConfigurationError: nothing is registered, or the broker refuses the password.
        """
        self._follow()
        if self._broker is None:
            log.debug("No broker is configured; nothing to consume.")
            return
        if not self._subscriptions:
            raise ConfigurationError("Nothing is registered with this Subscriber.")
        if self._run is not None and self._run.pid == os.getpid():
            raise ConfigurationError("This Subscriber is consuming already.")
        run = Run(self._consuming_connection(), self._workers, timeout)
        self._carry_out(run, lambda: run.work(self._subscriptions))

    def _carry_out(self, run: Run, work: Callable[[], None]) -> None:
        """Do the work of a run, and end it in order."""
        self._run = run
        try:
            if self._stop_at_start:
                run.stop()
            work()
        finally:
            try:
                run.give_back()
                if not self._moves.wait(_MOVE_TIMEOUT):
                    log.warning("Some retries or dead letters are not confirmed; they come again.")
            finally:
                self._run = None
                self.close()
                self._stop_at_start = False
        if run.failure is not None:
            raise run.failure

    def stop_consuming(self) -> None:
        """Ask `start_consuming` to end; returns at once. From any thread, or from a handler.

        When it has not begun yet, it will end as soon as it begins.
        """
        run = self._run
        if run is not None:
            run.stop()
        elif self._consuming is not None:
            self._stop_at_start = True

    def close(self) -> None:
        """Close the connections. What was registered stays so, and may be started again.

        While it consumes: the same as `stop_consuming`.
        """
        run = self._run
        if run is not None:
            run.stop()
            return
        with self._lock:
            consuming, self._consuming = self._consuming, None
            publishing, self._publishing = self._publishing, None
        # The acks first: they wait for nothing.
        if consuming is not None:
            consuming.close(_CLOSE_TIMEOUT)
        if publishing is not None:
            publishing.close(_CLOSE_TIMEOUT)

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self, close_dropped: Callable[..., None] = close_dropped) -> None:
        # Without it, the connections and their threads would stay for ever.
        connections = (getattr(self, name, None) for name in ("_consuming", "_publishing"))
        close_dropped(self, *connections)

    def _follow(self) -> None:
        """Go over to the broker that a test has put in the place of ours, or back."""
        urls = settings.replaced(self._urls)
        if urls != self._connected_to and self._run is None:
            self.close()
            self._connected_to = urls
            self._broker = None if urls is None else connect(urls)

    def _consuming_connection(self) -> Consuming:
        with self._lock:
            if self._consuming is None:
                assert self._broker is not None
                on_failure = _weakly(self._on_failure, lambda: None)
                self._consuming = self._broker.consuming("subscriber", on_failure)
            return self._consuming

    def _publishing_connection(self) -> Publishing:
        # For retries and dead letters: made with the first one.
        with self._lock:
            if self._publishing is None:
                assert self._broker is not None
                self._publishing = self._broker.publishing((), "subscriber")
            return self._publishing

    def _on_failure(self) -> None:
        run = self._run
        if run is not None:
            run.stop()


def _weakly(
    method: Callable[[], Result], when_dropped: Callable[[], Result]
) -> Callable[[], Result]:
    """The method, for an I/O thread, which must not keep the method's object alive."""
    weak = weakref.WeakMethod(method)

    def call() -> Result:
        return (weak() or when_dropped)()

    return call


def _dropped() -> Publishing:
    raise BrokerUnavailable("The Subscriber was dropped, and its connections closed.")


def work_off(subscriber: Subscriber, watched: Callable[[Subscription], Subscription]) -> None:
    """For `testing`: have handled, in this thread, what waits for the subscriber now.

    Only with an embedded broker, which has delivered it all at once.

    :param watched: puts another subscription in the place of each.
    """
    subscriber._follow()
    run = Run(subscriber._consuming_connection(), 1, None)
    subscriptions = [watched(each) for each in subscriber._subscriptions]
    subscriber._carry_out(run, lambda: run.work_off(subscriptions))


def declare(subscriber: Subscriber) -> None:
    """For `testing`: have the subscriber's queues on the broker of today, as by `register`."""
    subscriber._follow()
    for subscription in subscriber._subscriptions:
        topology = subscription.options.topology()
        subscriber._consuming_connection().declare(topology, subscriber._timeout)
