"""One connection, kept open: an I/O thread that runs pika and reconnects after any failure.

Threads. The I/O thread is the only one that touches pika; it owns every attribute below but
those that ``_lock`` guards (``_thread``, ``_closing``). Other threads add work to queues of the
link's owner and call `wake`.

Whatever goes wrong on the I/O thread - an exception in one of our callbacks, one that escapes from
pika, one that another thread or a tracer injects - ends the current loop; everything that belonged
to it is disposed of, the owner is notified as for any lost connection, and another loop begins. Of
the application's code, only middleware that was given for it runs here, with what happens to the
connection (`report`); log lines are written by another thread (`log.in_background`).

A fork copies no thread. In the child a link drops everything without touching it: to close or to
unregister would affect the parent's sockets. A closed link stays closed.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from domain_events.broker import OnChange, ignore_change
from domain_events.broker.rabbitmq.attempts import attempts
from domain_events.broker.rabbitmq.errors import (
    LOGIN_REFUSED,
    close_code,
    closed_error,
    explain,
    permanent_reason,
)
from domain_events.broker.rabbitmq.loop import Loop
from domain_events.broker.rabbitmq.nodes import Nodes
from domain_events.broker.rabbitmq.transport import Attempt, Connection
from domain_events.broker.rabbitmq.turns import Turns
from domain_events.errors import BrokerUnavailable, ConfigurationError
from domain_events.log import Log, in_background
from domain_events.middleware import ConnectionState
from domain_events.process import check_fork, on_fork
from domain_events.retry import Backoff

log = Log("domain_events")

# Between attempts to connect: short enough to be back within a second of the broker.
_BACKOFF = Backoff(first=0.05, maximum=0.8, jitter=0.5)

# A connection that lasted longer, in seconds, does not count as a failure.
_LASTING = 5.0

# Seconds after which an attempt is given up; pika has no time limit for resolving a name.
_LONGEST_ATTEMPT = 60.0

#: Seconds after which it is logged again that something is still wrong.
REMINDER = 300.0

# How long a graceful close may take before the connection is dropped.
_GRACE = 2.0

_numbers = itertools.count(1)
_links: weakref.WeakSet[Link] = weakref.WeakSet()
# Inherited by the child of a fork, which must neither use it nor have it garbage-collected.
_inherited: list[object] = []


_here = threading.local()


def is_io_thread() -> bool:
    """Whether this is a link's thread. A finalizer that runs there must not wait for a broker.

    Not for its own, which would be a deadlock, nor for another's, which may be waiting likewise.
    """
    return getattr(_here, "is_io_thread", False)


class Owner(Protocol):
    """The user of a link. Everything is called on the I/O thread, except `forget`."""

    def opened(self, connection: Connection) -> None:
        """There is a connection."""

    def lost(self, error: BaseException | None) -> None:
        """The connection and its channels are gone; unless it is closed, the link reconnects."""

    def refused(self, error: ConfigurationError) -> None:
        """No connection can be made with these settings; the link tries again when woken."""

    def forget(self) -> None:
        """In the child of a fork: reset all state."""


class Link:
    """A connection to one of the nodes, and its I/O thread, both started by the first `wake`.

    :param on_change: called on the I/O thread with what happens to the connection.
    """

    def __init__(
        self, nodes: Nodes, role: str, owner: Owner, on_change: OnChange = ignore_change
    ) -> None:
        self._nodes = nodes
        self._role = role
        self._owner = owner
        self._on_change = on_change
        self._closing = False
        self._reset()
        _links.add(self)

    def _reset(self) -> None:
        # Re-entrant, since a signal handler or a finalizer may publish in the middle of a publish.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._loop: Loop | None = None
        # Callbacks to run soon. Not the loop's own: after a crash the next one takes them over.
        self._calls: deque[Callable[[], None]] = deque()
        self._has_run = False  # whether the I/O thread was ever scheduled
        self._crash: BaseException | None = None
        self.connection: Connection | None = None
        #: The channels that are being set up on it.
        self.turns = Turns()
        self._attempt: Attempt | None = None  # under way, or the one that made `connection`
        self._reconnect_timer: Any = None
        self._attempt_timer: Any = None
        self._failures = 0  # since a connection last lasted
        # By URL, while there is no connection: the last error, and as exception, if it is final.
        self._troubles: dict[str, tuple[str, ConfigurationError | None]] = {}
        self._was_connected = False
        self._connected_at = 0.0
        # Since when there is no connection, and when that was last logged; None while there is one.
        self._away_since: float | None = None
        self._reminded_at = 0.0
        # When `silence` requested a response that has not come yet.
        self._requested_at: float | None = None

    @property
    def node(self) -> str:
        """The address of the current node, without the password."""
        return str(self._nodes)

    @property
    def trouble(self) -> str:
        """Why there is no connection, for errors; empty while there is one."""
        if self._thread is not None and not self._has_run:
            return (
                "the connection's own thread does not run; under uWSGI, enable threads with "
                "enable-threads = true"
            )
        # A copy, since the I/O thread may be changing it.
        troubles = [trouble for trouble, _ in list(self._troubles.values())]
        if not troubles and self._attempt is not None and self.connection is None:
            troubles = [f"{self.node}: it has not answered yet; does RabbitMQ listen on that port?"]
        return "; ".join(troubles)

    def silence(self) -> float:
        """Any thread: see `domain_events.broker.Publishing.silence`. Takes no lock."""
        if self._thread is None:
            return 0.0
        requested_at = self._requested_at
        if requested_at is not None:
            return time.monotonic() - requested_at
        self._requested_at = time.monotonic()
        self._call_soon(self._respond)
        return 0.0

    def _respond(self) -> None:
        self._requested_at = None

    def wake(self, callback: Callable[[], None]) -> None:
        """Any thread: run ``callback`` on the I/O thread soon; start that thread if need be.

        :raises BrokerUnavailable: when the link is closed, or no thread can be started.
        """
        check_fork()
        with self._lock:
            if self._closing:
                raise closed_error()
            if self._thread is None or not self._thread.is_alive():
                self._start_thread()
        self._call_soon(callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Any:
        """I/O thread: run ``callback`` there after ``seconds``."""
        loop = self._loop
        assert loop is not None

        def call() -> None:
            if self._loop is loop:  # otherwise that loop has crashed
                callback()

        return loop.call_later(seconds, self.guarded(call))

    def cancel_call(self, handle: Any) -> None:
        """I/O thread: cancel a `call_later`."""
        if self._loop is not None:
            self._loop.remove_timeout(handle)

    def report(self, state: ConnectionState, reason: str | None = None) -> None:
        """I/O thread: this has happened to the connection to the current node."""
        self._on_change(state, self.node, reason)

    def drop(self) -> None:
        """I/O thread: drop the connection at once; the link notifies its owner and reconnects."""
        if self.connection is not None:
            self.connection.transport.drop()

    def guarded(self, callback: Callable[..., None]) -> Callable[..., None]:
        """The callback, safe to give to pika.

        An exception in a callback would end pika's loop or abort the transport. Here it ends the
        loop, and with it the connection, whose state is unknown by then.
        """

        def call(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except BaseException as error:  # noqa: BLE001 - see above; `_serve` logs it
                self._crash = self._crash or error
                self._stop_loop()

        return call

    def close(self, timeout: float) -> None:
        """Any thread: close the connection in order, end the thread, and wait for that.

        On an I/O thread (a finalizer may run there) it does not wait.
        """
        self.close_soon()
        with self._lock:  # which `wake` holds until the thread has started
            thread = self._thread
        if thread is None or is_io_thread():
            return
        with contextlib.suppress(RuntimeError):  # a signal handler, as this thread starts it
            thread.join(timeout)
        if thread.is_alive():
            self._call_soon(self.drop)
            log.warning(
                "The %s connection did not close in %.0f s; it is dropped.", self._role, timeout
            )

    def close_soon(self) -> bool:
        """Any thread, also in a finalizer: close the connection in order, without waiting for it.

        Takes no lock, and may be called again. False: nothing was open.
        """
        check_fork()
        was_open = not self._closing and self._thread is not None
        self._closing = True
        if self._thread is not None:
            self._call_soon(self._shut_down)
        return was_open

    def connect(self) -> None:
        """I/O thread: connect, unless connected or connecting."""
        self._connect()

    def _call_soon(self, callback: Callable[[], None]) -> None:
        self._calls.append(self.guarded(callback))
        # In this order: a loop that follows this one runs `_calls` as it begins.
        loop = self._loop
        if loop is not None:
            loop.wake()

    def _start_thread(self) -> None:
        name = f"domain-events-{self._role}-{next(_numbers)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        before = self._thread
        self._thread = thread
        try:
            thread.start()
        except BaseException as error:
            # From 3.12 on, none can be started while the interpreter shuts down.
            self._thread = before
            if not isinstance(error, RuntimeError):
                raise
            raise BrokerUnavailable(
                f"No thread can be started ({error}); is the program ending?"
            ) from error

    # --- everything below runs on the I/O thread ---------------------------------------------

    def _run(self) -> None:
        _here.is_io_thread = True
        while True:
            try:
                with in_background():
                    while not self._serve():
                        pass
                    self.report(ConnectionState.CLOSED)
                return
            except BaseException as error:  # noqa: BLE001 - injected by another thread
                self._crash = self._crash or error
                time.sleep(_BACKOFF.maximum)

    def _serve(self) -> bool:
        """Run one loop to its end. True when that was the link's end too."""
        self._has_run = True
        if self._loop is not None:
            self._recover()
        loop = self._new_loop()
        if loop is None:
            return True
        try:
            self._call_soon(self._connect_later if self._failures else self._connect)
            loop.start()
        except BaseException as error:  # noqa: BLE001 - pika's, or injected by another thread
            self._crash = self._crash or error
        if self._crash is not None:
            return False
        self._dispose()
        return True

    def _new_loop(self) -> Loop | None:
        """A loop, as soon as there are descriptors for it; None if the link is closed first."""
        while not self._closing:
            try:
                self._loop = Loop(self._calls)
            except OSError as error:
                self._note(f"{self.node}: {explain(error)}")
                time.sleep(_BACKOFF.maximum)
            else:
                return self._loop
        return None

    def _recover(self) -> None:
        """Clean up after a crashed loop. May be interrupted, and repeated."""
        crash, self._crash = self._crash, None
        attempts.ended(self._nodes.url, self)
        had_connection = self.connection is not None
        self.connection = self._reconnect_timer = None
        self._count_failure()
        self._note(f"{self.node}: {_describe_crash(crash)}")
        state = ConnectionState.LOST if had_connection else ConnectionState.UNREACHABLE
        self.report(state, _describe_crash(crash))
        self._lose(crash)
        self._dispose()
        self._begin_outage()
        if isinstance(crash, OSError):
            log.warning("The %s connection was lost: %s.", self._role, _describe_crash(crash))
        else:
            log.error(
                "Internal error on the %s connection; reconnecting.", self._role, exc_info=crash
            )

    def _connect(self) -> None:
        """Connect, unless connected, connecting, or waiting for the next attempt."""
        if self._closing or self._attempt or self._reconnect_timer or self._loop is None:
            return
        url = self._nodes.url
        try:
            parameters = self._nodes.parameters(self._role)
        except ConfigurationError as error:
            self.report(ConnectionState.UNREACHABLE, str(error))
            self._refuse(error)
            return
        try:
            # pika does not report in `on_done` that there is no descriptor left
            # (test_publisher_recovers_when_there_are_descriptors_again in tests/test_processes.py).
            socket.socket().close()
        except OSError as error:
            self._failed(explain(error))
            return
        if not attempts.begin(url, self):
            if url not in self._troubles:
                self._note(f"{self.node}: waiting for another connection attempt of this process")
            self._nodes.rotate()
            self._connect_in(_BACKOFF.first)
            return
        # Now that no other attempt is under way there, whose refusal would be missed.
        refusal = attempts.refusal(url, login_only=self._was_connected)
        if refusal is not None:
            attempts.ended(url, self)
            self._failed(refusal, refusal)
            return
        self._attempt = attempt = Attempt(self._loop)
        longest = max(_LONGEST_ATTEMPT, 4 * (parameters.stack_timeout or 0))
        self._attempt_timer = self.call_later(longest, self._give_up)
        attempt.start(parameters, self.guarded(partial(self._attempted, attempt)))

    def _attempted(self, attempt: Attempt, result: Connection | BaseException) -> None:
        if attempt is not self._attempt:  # it was given up
            if not isinstance(result, BaseException):
                result.close()
            return
        self.cancel_call(self._attempt_timer)
        if isinstance(result, BaseException):
            self._attempt_failed(attempt.cause or result)
            return
        attempts.ended(self._nodes.url, self, connected=True)
        self.connection = result
        result.add_on_close_callback(self.guarded(partial(self._on_closed, attempt)))
        self._connected_at = time.monotonic()
        self._end_outage()
        self._was_connected = True
        self._troubles = {}
        self.report(ConnectionState.CONNECTED)
        self._owner.opened(result)

    def _give_up(self) -> None:
        error = TimeoutError("no answer, or its name cannot be resolved")
        if self._attempt is not None:
            self._attempt.abandon(error)
        self._attempt_failed(error)

    def _attempt_failed(self, error: BaseException) -> None:
        self._attempt = None
        url = self._nodes.url
        hint = permanent_reason(error, was_connected=self._was_connected)
        if hint is not None:
            # Before it ends, or another connection could try in between.
            attempts.refused(url, hint, login=close_code(error) == LOGIN_REFUSED)
        attempts.ended(url, self)
        if not self._closing:  # else `_shut_down` is about to run
            self._failed(explain(error), hint)

    def _failed(self, why: str, hint: str | None = None) -> None:
        """The attempt has failed; ``hint``: why no retry can help."""
        node, url = self.node, self._nodes.url
        final = hint and ConfigurationError(f"Cannot connect to {node}: {hint}.")
        self._failures += 1
        self._note(f"{node}: {why}", final or None)
        self.report(ConnectionState.UNREACHABLE, why)
        self._nodes.rotate()
        finals = [final for _, final in self._troubles.values() if final is not None]
        if len(finals) == len(self._nodes):
            self._refuse(finals[0] if len(finals) == 1 else _combined_error(finals))
            return
        self._connect_later()
        if self._failures == 1:
            self._begin_outage()
            log.warning("No %s connection to %s. Trying again.", self._role, self._troubles[url][0])
        else:
            self._remind()

    def _begin_outage(self) -> None:
        self._reminded_at = time.monotonic()
        if self._away_since is None:
            self._away_since = self._reminded_at

    def _remind(self) -> None:
        """With each failure: log again, every few minutes, that there is no connection."""
        now = time.monotonic()
        if self._away_since is not None and now - self._reminded_at >= REMINDER:
            self._reminded_at = now
            log.warning(
                "No %s connection for %.0f s now; still trying. %s.",
                self._role,
                now - self._away_since,
                self.trouble,
            )

    def _end_outage(self) -> None:
        if self._away_since is not None:
            away, self._away_since = time.monotonic() - self._away_since, None
            again = " again" if self._was_connected else ""
            log.warning(
                "The %s connection to %s is open%s, after %.1f s.",
                self._role,
                self.node,
                again,
                away,
            )

    def _note(self, trouble: str, final: ConfigurationError | None = None) -> None:
        self._troubles[self._nodes.url] = (trouble, final)

    def _connect_later(self) -> None:
        # After each node has failed once, the pauses grow.
        rounds = max(0, self._failures - len(self._nodes))
        self._connect_in(_BACKOFF.delay(rounds + 1))

    def _connect_in(self, seconds: float) -> None:
        def try_again() -> None:
            self._reconnect_timer = None
            self._connect()

        self._reconnect_timer = self.call_later(seconds, try_again)

    def _count_failure(self) -> None:
        # A broker that accepts connections only to drop them counts as one that fails.
        lasted = self._connected_at and time.monotonic() - self._connected_at > _LASTING
        self._failures = 0 if lasted else self._failures + 1
        self._connected_at = 0.0

    def _refuse(self, error: ConfigurationError) -> None:
        self._failures = 0
        self._owner.refused(error)

    def _on_closed(self, attempt: Attempt, _connection: object, error: BaseException) -> None:
        if attempt is not self._attempt:
            return
        error = attempt.cause or error
        self.connection = self._attempt = None
        attempts.ended(self._nodes.url, self)
        if self._closing:
            self._lose(error)
            self._stop_loop()
            return
        trouble = f"{self.node}: {explain(error)}"
        self._note(trouble)
        self.report(ConnectionState.LOST, explain(error))
        self._nodes.rotate()
        self._count_failure()
        self._connect_later()
        self._lose(error)
        self._begin_outage()
        log.warning("Lost the %s connection to %s.", self._role, trouble)

    def _lose(self, error: BaseException | None) -> None:
        self._owner.lost(error)
        self.turns.lost(error)

    def _shut_down(self) -> None:
        if self._reconnect_timer is not None:
            self.cancel_call(self._reconnect_timer)
        if self.connection is not None:
            if self.connection.is_open:
                self.connection.close()
            self.call_later(_GRACE, self.drop)
            self.call_later(_GRACE * 2, self._stop_loop)
        else:
            if self._attempt is not None:
                attempts.ended(self._nodes.url, self)
            self._stop_loop()

    def _stop_loop(self) -> None:
        if self._loop is not None:
            self._loop.stop()

    def _dispose(self) -> None:
        """Close the sockets of the last loop."""
        loop, attempt = self._loop, self._attempt
        self._loop = self._attempt = None
        if attempt is not None:
            attempt.dispose()
        if loop is not None:
            # pika considers a loop running that could not even be entered.
            with contextlib.suppress(Exception):
                loop.close()

    def _forget(self) -> None:
        _inherited.append((self._loop, self.connection, self._attempt, self._thread, self._lock))
        self._reset()
        self._owner.forget()


def _describe_crash(error: BaseException | None) -> str:
    return explain(error) if isinstance(error, OSError) else f"internal error ({error!r:.200})"


def _combined_error(errors: list[ConfigurationError]) -> ConfigurationError:
    return ConfigurationError(" ".join(dict.fromkeys(map(str, errors))))


def _forget_all() -> None:
    for link in list(_links):
        link._forget()


on_fork(_forget_all)
