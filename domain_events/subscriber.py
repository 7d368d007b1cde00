"""``Subscriber``: registers handlers, and runs them on the events that arrive.

Owns what was registered and the two connections; how deliveries become calls of handlers is
`run`'s and `subscription`'s.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

from domain_events import settings, topology
from domain_events.broker import Consuming, Publishing, close_dropped, connect
from domain_events.checks import seconds, whole_number
from domain_events.errors import BrokerUnavailable, ConfigurationError
from domain_events.log import Log
from domain_events.options import QueueType, check_handler, make_options
from domain_events.process import check_fork, on_fork
from domain_events.retry import Backoff
from domain_events.run import Run, signals
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.subscription import Delivered, Handler, Moves, Subscription
from domain_events.topology import ExchangeType

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from domain_events.options import RegisterOptions

log = Log("domain_events")

AnyHandler = TypeVar("AnyHandler", bound=Handler)
Result = TypeVar("Result")

# How long stopping may take: what is not confirmed yet, and closing.
_MOVE_TIMEOUT = 10.0
_CLOSE_TIMEOUT = 10.0

# Each is a thread of its own.
_MOST_WORKERS = 1000

# Those of this process: to notice two that share a queue by mistake, and for the child of a fork.

_subscribers: weakref.WeakSet[Subscriber] = weakref.WeakSet()


class Subscriber:
    """Receives domain events and calls handlers with them.

    Made without any I/O. Any number of handlers may be registered, each with a queue of its
    own; any number of processes may register the same one, and share its events.

    :param connection_settings: an AMQP URL, several, or None; see `configure`.
    :param exchange: where events are published. It is declared.
    :param exchange_type: its type; binding keys have wildcards with ``topic`` only.
    :param workers: how many handlers run at the same time, each in a thread; up to 1,000.
    :param timeout: seconds within which the broker must give each answer that `register` needs.
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
    ) -> None:
        connection_settings = settings.masked(connection_settings)
        self._urls = settings.resolve(connection_settings)
        self.exchange = topology.check_name(exchange, "exchange")
        self.exchange_type = topology.check_exchange_type(exchange_type)
        self._workers = whole_number(workers, "workers", 1, _MOST_WORKERS)
        self._timeout = seconds(timeout)
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
    ) -> None:
        """Have ``handler`` called with every event that one of the binding keys matches.

        The queue and its bindings exist when this returns: what is published from then on is
        kept until ``start_consuming`` (and while the program is down, if ``durable``).

        A handler returns when it is done with the event; it may raise `Retry` to have it again
        later, `Reject` to give it up, and any other exception, which gives it up too unless it
        is in ``retry_on``. **It must be idempotent**: after a crash an event can come a second
        time, with the same ``uuid_string``.

        :param handler: called with a `DomainEvent`; a plain function, not ``async``.
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
        :param prefetch_count: how many events this process holds at most, with the one that is
            being handled; the fewer, the more evenly slow handlers in several processes share
            the work. If left out, 200, or four for each worker if that is more.
        :param ordered: with several workers, never handle two events of one
            ``domain_object_id`` at the same time, and handle them in their order. With one
            worker it is always so.
        :param retired_keys: binding keys of earlier releases under which nobody is to receive
            any more. They are unbound, and what still comes by them is acked unhandled. A key that
            is merely no longer listed stays bound, for other releases of this subscriber may yet
            need it: its events are handed back, for a process that lists it.
        :raises ConfigurationError: options that cannot work; wrong password or permissions.
        :raises BrokerUnavailable: no broker within the subscriber's ``timeout``.
        :raises TopologyError: the queue exists with other arguments, or is taken.
        """
        check_handler(handler, name)
        options = make_options(
            name,
            binding_keys,
            dead_letter,
            retry_on,
            backoff,
            retired_keys,
            exchange=self.exchange,
            exchange_type=self.exchange_type,
            durable=durable,
            exclusive=exclusive,
            auto_delete=auto_delete,
            max_retries=max_retries,
            queue_type=queue_type,
            prefetch_count=prefetch_count,
            ordered=ordered,
        )
        if any(each.options.name == options.name for each in self._subscriptions):
            raise ConfigurationError(
                f"{options.name} is registered already, with this Subscriber: two handlers on one "
                "queue would each get only some of the events. Give each a name of its own."
            )
        self._follow()
        if self._broker is not None:
            self._consuming_connection().declare(options.topology(), self._timeout)
        subscription = Subscription(handler, options, self._moves)
        self._warn_of_sharing(subscription)
        if options.exchange_type == "direct" and any(
            map(topology.has_wildcards, options.binding_keys)
        ):
            log.warning(
                "%s: '*' and '#' are letters on a direct exchange, and not wildcards: %s",
                options.name,
                ", ".join(options.binding_keys),
            )
        with self._lock:
            # One lock with `start_consuming`, or both would consume from the new queue.
            self._subscriptions.append(subscription)
            run = self._run
            if run is not None and not run.stopping:
                run.consume(subscription)

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
        if timeout is not None:
            timeout = seconds(timeout, zero=True)
        self._follow()
        if self._broker is None:
            return
        if not self._subscriptions:
            raise ConfigurationError(
                "Nothing is registered with this Subscriber; call register() before "
                "start_consuming()."
            )
        run = Run(self._consuming_connection(), self._workers, timeout)
        self._carry_out(run, run.work)

    def _carry_out(
        self,
        run: Run,
        work: Callable[[Sequence[Subscription]], None],
        observe: Callable[[Delivered], None] | None = None,
    ) -> None:
        """Do the work of a run, and end it in order."""
        with self._lock:
            if self._run is not None:
                raise ConfigurationError(
                    "This Subscriber is consuming already; for more handlers at a time there is "
                    "Subscriber(workers=...)."
                )
            self._run = run
            subscriptions = list(self._subscriptions)
        if observe is not None:
            subscriptions = [each.observed(observe) for each in subscriptions]
        self._moves.begin()
        # Until the end: a second SIGTERM must not kill what the first one has begun to end.
        with signals(run):
            try:
                if self._stop_at_start:
                    run.stop()
                work(subscriptions)
            finally:
                try:
                    run.give_back()
                    if not self._moves.end(_MOVE_TIMEOUT):
                        log.warning(
                            "Some retries or dead letters are not confirmed; they come again."
                        )
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
        check_fork()
        run = self._run
        if run is not None:
            run.stop()
        elif self._subscriptions:
            self._stop_at_start = True

    def close(self) -> None:
        """Close the connections. What was registered stays so, and may be started again.

        While it consumes: the same as `stop_consuming`.
        """
        check_fork()
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

    def _warn_of_sharing(self, new: Subscription) -> None:
        """Of another Subscriber of this process with this name that is not the same subscriber."""
        name = new.options.name
        for other in list(_subscribers):
            # One that is closed stands for a process that has ended.
            if other is self or other._consuming is None:
                continue
            if other._connected_to == self._connected_to and any(
                old.options.name == name and not _is_same(old, new) for old in other._subscriptions
            ):
                log.warning(
                    "%s is registered by two Subscribers of this process, with different handlers "
                    "or binding keys: they share one queue, so that each gets only some of the "
                    "events. Give each a name of its own.",
                    name,
                )

    def _follow(self) -> None:
        """Go over to the broker that a test has put in the place of ours, or back."""
        check_fork()
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


def _is_same(one: Subscription, other: Subscription) -> bool:
    if (one.options.exchange, set(one.options.binding_keys)) != (
        other.options.exchange,
        set(other.options.binding_keys),
    ):
        return False
    # Each of several threads may have made the function anew.
    code = getattr(one.handler, "__code__", None)
    return one.handler == other.handler or (
        code is not None and code is getattr(other.handler, "__code__", None)
    )


def work_off(subscriber: Subscriber, observe: Callable[[Delivered], None]) -> None:
    """For `testing`: have handled, in this thread, what waits for the subscriber now.

    Only with an embedded broker, which has delivered it all at once.

    :param observe: called with what became of each delivery.
    """
    subscriber._follow()
    run = Run(subscriber._consuming_connection(), 1, None)
    subscriber._carry_out(run, run.work_off, observe)


def declare(subscriber: Subscriber) -> None:
    """For `testing`: have the subscriber's queues on the broker of today, as by `register`."""
    subscriber._follow()
    for subscription in subscriber._subscriptions:
        topology = subscription.options.topology()
        subscriber._consuming_connection().declare(topology, subscriber._timeout)


def _after_fork() -> None:
    # The run is the parent's, and so may be whoever holds the lock.
    for subscriber in list(_subscribers):
        subscriber._lock = threading.RLock()
        subscriber._run = None
        subscriber._stop_at_start = False


on_fork(_after_fork)
