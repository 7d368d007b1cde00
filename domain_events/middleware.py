"""``Middleware``: the one way to add behaviour around publishing and handling.

A subclass overrides what it needs; an instance is given to `configure` (for the whole process), to
a `Publisher` or to a `Subscriber`. Those of `configure` come first, and the first is the outermost.

**What it promises.** Each event on its way out is announced before it is sent, once, and what
became of it is reported, once. Each delivery is reported once it is decided. No exception here
loses an event: around a handler it counts as the handler's own, and cannot hide one; on the way
out it reaches the caller before anything is sent, or, if no caller waits (a retry, a dead letter),
is logged; what is raised afterwards is logged.

**Contexts.** Each delivery is handled in a `contextvars` context of its own, a copy of the one in
which ``start_consuming`` was called. A context variable that `Middleware.handling` sets is visible
in the handler, in `Middleware.publishing` for all that is published meanwhile and for the retry or
the dead letter that comes of it, and in `Middleware.delivered`; never with the next event.

**What it knows nothing of:** AMQP, threads, and any particular use of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from domain_events.checks import refusal
from domain_events.errors import ConfigurationError
from domain_events.events import DomainEvent, HeaderValue
from domain_events.log import About, Log, about
from domain_events.outcomes import Delivered, ends_the_process

log = Log("domain_events")

#: Called with the error of what was sent, or with None once it is confirmed.
Done: TypeAlias = Callable[[BaseException | None], object]


class Operation(str, Enum):
    """Why something is sent; each is equal to its text."""

    PUBLISH = "publish"
    RETRY = "retry"
    DEAD_LETTER = "dead letter"
    #: A subscriber's process got it that does not list its routing key.
    HAND_BACK = "hand back"
    #: An operator returns a dead letter, or an undelivered retry, to its subscriber.
    REPLAY = "replay"
    #: Written to an outbox, in a transaction that may still be rolled back: it is not sent yet.
    OUTBOX = "outbox"
    #: Sent from an outbox, with the headers that it was written with.
    RELAY = "relay"

    def __str__(self) -> str:
        return self.value


# Someone waits for the outcome of these.
_WITH_A_CALLER = (Operation.PUBLISH, Operation.REPLAY)


@dataclass
class Outgoing:
    """An event on its way out."""

    #: Why it is sent.
    operation: Operation
    #: None for a dead letter that is not an event.
    event: DomainEvent[Any] | None
    #: Sent along with it. Those of a published event may be changed and added to; to those of a
    #: retry, a dead letter, a replay or a relayed event, which keep what they had, may be added.
    headers: dict[str, HeaderValue]
    #: Where it is published; None for what goes to one subscriber.
    exchange: str | None = None
    #: The subscriber it goes to, or whose dead letters.
    subscriber: str | None = None
    #: Seconds after which a retry, or what was handed back, comes again.
    delay: float | None = None
    #: Whether it is one of several of a `Publisher.publish_many`.
    batch: bool = False
    #: Why it is retried, or a dead letter.
    error: BaseException | None = None


class ConnectionState(str, Enum):
    """What happened to a connection; each is equal to its text."""

    CONNECTED = "connected"
    #: It was lost, and is made again.
    LOST = "lost"
    #: An attempt to connect has failed; there will be others.
    UNREACHABLE = "unreachable"
    #: The broker accepts nothing for the time being: it is short of memory or disk space.
    BLOCKED = "blocked"
    UNBLOCKED = "unblocked"
    #: By its owner.
    CLOSED = "closed"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class ConnectionChange:
    """Something has happened to a connection."""

    #: What has happened.
    state: ConnectionState
    #: Whose it is: ``publisher``, ``subscriber`` or ``dead letters``.
    owner: str
    #: ``publishing`` or ``consuming``: a subscriber has one of each.
    purpose: str
    #: The broker's address, without the password.
    address: str
    #: Why, where it is known.
    reason: str | None = None
    #: Which connection of this process: a number that it has until it is closed by its owner.
    connection: int = 0


class Middleware:
    """Behaviour around publishing and handling. Override what you need; all of it does nothing.

    ::

        class LogContext(Middleware):
            @contextmanager
            def handling(self, event):
                with structlog.contextvars.bound_contextvars(event=event.uuid_string):
                    yield

        configure(middleware=[LogContext()])
    """

    def publishing(self, outgoing: Outgoing) -> Done | None:
        """Called with each event on its way out, before it is sent.

        :param outgoing: its ``headers`` may be added to.
        :return: what to call once it is confirmed, with None, or has failed, with the error; it is
            called once. For a `Publisher` on the thread that publishes, when that notices; for a
            retry or a dead letter on a thread of the connection's, so it must be short, and must
            not publish.
        """

    def handling(self, event: DomainEvent[Any]) -> AbstractContextManager[object] | None:
        """Called with each event before its handler; the handler runs in what it returns.

        :return: a context manager, most often of ``@contextlib.contextmanager``. It sees the
            exception of a handler, and may raise another one, which counts instead; to suppress
            it has no effect.
        """

    def delivered(self, delivered: Delivered) -> None:
        """Called with each delivery whose outcome is decided, whether or not a handler was called.

        A retry and a dead letter are on their way by then, and the event is acked when they have
        been confirmed.
        """

    def connection(self, change: ConnectionChange) -> None:
        """Called with what happens to connections, on a thread of theirs: it must be short."""


def check_middleware(given: object) -> tuple[Middleware, ...]:
    """The middleware in a list of them.

    :raises ConfigurationError: when it is something else.
    """
    right = "a list of Middleware"
    if isinstance(given, Middleware):
        raise refusal(given, "middleware", right, "; put it into a list")
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise refusal(given, "middleware", right)
    chain = tuple(given)
    for each in chain:
        if not isinstance(each, Middleware):
            is_class = isinstance(each, type) and issubclass(each, Middleware)
            hint = f"; give an instance, {each.__name__}()" if is_class else ""
            raise refusal(each, "middleware", f"{right}, each an instance of a subclass", hint)
        _check_methods(each)
    return chain


def _check_methods(middleware: Middleware) -> None:
    """Refuse what would fail with each event: an ``async`` method, a forgotten decorator."""
    for name in ("publishing", "handling", "delivered", "connection"):
        method = getattr(middleware, name)
        kind = type(middleware).__name__
        if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
            raise ConfigurationError(
                f"middleware: {kind}.{name} is async, and this library is synchronous; make it a "
                "plain method."
            )
        if inspect.isgeneratorfunction(method):
            way_out = "make it a plain method"
            if name == "handling":
                way_out = "decorate it with @contextlib.contextmanager"
            raise ConfigurationError(f"middleware: {kind}.{name} is a generator; {way_out}.")


def chained(first: tuple[Middleware, ...], then: tuple[Middleware, ...]) -> tuple[Middleware, ...]:
    """Both lists as one; what is in both is called once."""
    if not first or not then:
        return first or then
    return first + tuple(each for each in then if not any(each is other for other in first))


def ignore(_error: BaseException | None) -> None:
    """What to call with an outcome that no middleware waits for."""


def announce(chain: tuple[Middleware, ...], outgoing: Outgoing) -> Done:
    """Announce what is about to be sent; returns what to call with what became of it.

    :raises Exception: what one of them raised; those before it were told.
    """
    callbacks: list[tuple[Middleware, Done]] = []

    def done(error: BaseException | None) -> None:
        ending: BaseException | None = None
        try:
            while callbacks:
                middleware, callback = callbacks.pop()
                try:
                    callback(error)
                except BaseException as failure:
                    # What no caller waits for is done on the connection's thread, which goes on.
                    if ends_the_process(failure) and outgoing.operation in _WITH_A_CALLER:
                        ending = failure
                        continue
                    log.exception(
                        "%s failed after an event was sent.",
                        _name(middleware),
                        about=_about(outgoing.event, outgoing.subscriber),
                    )
            if ending is not None:
                raise ending
        finally:
            del ending  # this frame is in its traceback

    try:
        for middleware in chain:
            callback = middleware.publishing(outgoing)
            if callback is not None:
                callbacks.append((middleware, callback))
    except BaseException as error:
        done(error)
        raise
    return done


def around(
    chain: tuple[Middleware, ...], event: DomainEvent[Any], call: Callable[[], object]
) -> None:
    """Make the call within the context managers of all of them, the first one outermost.

    None of them can suppress an exception: the event would be acked, and nobody had handled it.
    """
    if not chain:
        call()
        return
    middleware, inner = chain[0], chain[1:]
    manager = middleware.handling(event)
    if manager is None:
        around(inner, event, call)
        return
    if not isinstance(manager, AbstractContextManager):
        raise TypeError(
            f"{_name(middleware)} is wrong: its handling() must return a context manager or None, "
            f"not a {type(manager).__name__}."
        )
    suppressed: BaseException | None = None
    try:
        with manager:
            try:
                around(inner, event, call)
            except BaseException as error:
                suppressed = error
                raise
        if suppressed is not None:
            raise suppressed
    finally:
        del suppressed  # this frame is in its traceback


def report(chain: tuple[Middleware, ...], delivered: Delivered) -> None:
    """Report a delivery, to the innermost first."""
    ending: BaseException | None = None
    try:
        for middleware in reversed(chain):
            try:
                middleware.delivered(delivered)
            except BaseException as failure:
                if ends_the_process(failure):
                    ending = failure
                    continue
                log.exception(
                    "%s failed after a delivery was settled.",
                    _name(middleware),
                    about=_about(delivered.event, delivered.subscriber),
                )
        if ending is not None:
            raise ending
    finally:
        del ending  # this frame is in its traceback


def report_connection(chain: tuple[Middleware, ...], change: ConnectionChange) -> None:
    """Report what happened to a connection; never raises, since its thread must go on."""
    for middleware in chain:
        try:
            middleware.connection(change)
        except BaseException:
            log.exception("%s failed in its method connection().", _name(middleware))


def _about(event: DomainEvent[Any] | None, subscriber: str | None) -> About:
    if event is None:
        return about(subscriber, None, None)
    return about(subscriber, event.routing_key, event.uuid_string)


def _name(middleware: Middleware) -> str:
    return f"The middleware {type(middleware).__qualname__}"
