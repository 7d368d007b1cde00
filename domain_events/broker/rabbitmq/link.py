"""One connection, kept open: an I/O thread that runs pika and connects again after any trouble.

Threads. The I/O thread is the only one that touches pika; it owns every attribute below but
those that ``_lock`` guards (``_thread``, ``_loop``, ``_closing``). Other threads put work into
structures of their owner's and call `wake`.

A fork takes no thread along. In the child a link forgets all it had, without touching it: to
close or to unregister would reach into the parent's sockets.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from domain_events.broker.rabbitmq.loop import Loop
from domain_events.broker.rabbitmq.nodes import Nodes, explain, hopeless
from domain_events.broker.rabbitmq.stream import Connection
from domain_events.broker.refusals import closed
from domain_events.errors import BrokerUnavailable, ConfigurationError
from domain_events.log import Log
from domain_events.process import check_fork, on_fork

log = Log("domain_events")

# Seconds between attempts to connect: short enough to be back within a second of the broker.
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.8

# A connection that lasted so many seconds is not counted among the failures.
_LASTING = 5.0

# A loop that fails so often in a row is given up for a new one.
_FAILURES_OF_A_LOOP = 3

# How long a graceful close may take before the socket is cut.
_GRACE = 2.0

_numbers = itertools.count(1)
_links: weakref.WeakSet[Link] = weakref.WeakSet()
# What a child of a fork inherited and must neither use nor have garbage-collected.
_inherited: list[object] = []


class Owner(Protocol):
    """Who uses a link. All on the I/O thread, but `forget`."""

    def opened(self, connection: Connection) -> None:
        """There is a connection."""

    def lost(self, error: BaseException | None) -> None:
        """It is gone, and everything on it; another one is being made, unless it is closed."""

    def refused(self, error: ConfigurationError) -> None:
        """No connection can be made with these settings; the link tries again when woken."""

    def forget(self) -> None:
        """After a fork, in the child: be as new."""


class Link:
    """A connection to one of the nodes, and its I/O thread, both made when first woken."""

    def __init__(self, nodes: Nodes, role: str, owner: Owner) -> None:
        self._nodes = nodes
        self._role = role
        self._owner = owner
        self._reset()
        _links.add(self)

    def _reset(self) -> None:
        # Re-entrant, since a signal handler or a finalizer may publish in the middle of a publish.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._loop: Loop | None = None
        self._closing = False
        self.connection: Connection | None = None
        self._workflow: Any = None
        self._attempt = 0  # the number of the last one
        self._pause: Any = None
        self._failures = 0  # since a connection last lasted
        self._was_connected = False
        self._connected_at = 0.0
        #: Why there is no connection, for errors; empty while there is one.
        self.trouble = ""

    @property
    def node(self) -> str:
        """The address of the node whose turn it is, without the password."""
        return str(self._nodes)

    def wake(self, callback: Callable[[], None]) -> None:
        """Any thread: have ``callback`` run on the I/O thread soon, and a connection made.

        :raises BrokerUnavailable: when the link is closed, or no thread can be started.
        """
        with self._lock:
            if self._closing:
                raise closed()
            if self._thread is None or not self._thread.is_alive():
                self._start_thread()
            loop = self._loop
        assert loop is not None
        loop.soon(self.guarded(callback))

    def is_this_thread(self) -> bool:
        """Whether the caller is the I/O thread."""
        return threading.current_thread() is self._thread

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Any:
        """I/O thread: have ``callback`` run there after ``seconds``."""
        assert self._loop is not None
        return self._loop.call_later(seconds, self.guarded(callback))

    def cancel_call(self, handle: Any) -> None:
        """I/O thread: take `call_later` back."""
        if self._loop is not None:
            self._loop.remove_timeout(handle)

    def cut(self) -> None:
        """I/O thread: break the connection at once; it will be `lost` and made again."""
        if self._loop is not None:
            self._loop.shut_sockets()

    def guarded(self, callback: Callable[..., None]) -> Callable[..., None]:
        """The callback, safe to give to pika.

        An exception in a callback would kill pika's loop or abort its transport. Ours ends in
        the log and in a fresh connection, for nobody knows what state it left behind.
        """

        def call(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except Exception:
                log.exception("Internal error on the %s connection; it is made anew.", self._role)
                self.cut()

        return call

    def close(self, timeout: float) -> None:
        """Any thread but the I/O thread: close the connection in order, end the thread."""
        with self._lock:
            begun, self._closing = self._closing, True
            thread, loop = self._thread, self._loop
        if thread is None or loop is None:
            return
        if not begun:  # a second time would break off the first
            loop.soon(self.guarded(self._shut_down))
        thread.join(timeout)
        if thread.is_alive():
            log.warning(
                "The %s connection did not close in %.0f s; it is broken off.", self._role, timeout
            )
            loop.soon(self.guarded(self.cut))

    def close_soon(self) -> bool:
        """Any thread, also in a finalizer: close without waiting. False: nothing was open."""
        check_fork()
        with self._lock:
            thread, loop = self._thread, self._loop
            if self._closing or thread is None or loop is None or not thread.is_alive():
                return False
            self._closing = True
        loop.soon(self.guarded(self._shut_down))
        return True

    # --- everything below runs on the I/O thread ---------------------------------------------

    def _start_thread(self) -> None:
        try:
            self._loop = Loop()
        except OSError as error:
            raise BrokerUnavailable(f"No connection can be made here: {error}.") from error
        name = f"domain-events-{self._role}-{next(_numbers)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # From 3.12 on, none can be started while the interpreter shuts down.
            self._loop.close()
            self._loop = None
            raise BrokerUnavailable("No thread can be started; is the program ending?") from error
        self._thread = thread

    def _run(self) -> None:
        loop = self._loop
        assert loop is not None
        while not self._runs(loop):
            # It cannot even be entered: pika leaves it so when there is no descriptor for epoll.
            self.connection = self._pause = None
            self._owner.lost(None)
            with contextlib.suppress(AssertionError):
                loop.close()  # pika takes it for running still
            loop = self._new_loop()
        loop.close()

    def _runs(self, loop: Loop) -> bool:
        """Run the loop until it is stopped. False when it cannot go on."""
        loop.soon(self.guarded(self._connect))
        in_a_row = 0
        while in_a_row < _FAILURES_OF_A_LOOP:
            begun = time.monotonic()
            try:
                loop.start()
            except Exception:
                # What is left of the connection ends as any lost connection does.
                log.exception("Internal error in the %s connection; going on.", self._role)
                loop.shut_sockets()
                self._abandon_attempt()
                time.sleep(_FIRST_PAUSE)
                in_a_row = in_a_row + 1 if time.monotonic() - begun < 1 else 0
            else:
                return True
        return False

    def _new_loop(self) -> Loop:
        while True:
            try:
                loop = Loop()
            except OSError:
                time.sleep(_LONGEST_PAUSE)
            else:
                with self._lock:
                    self._loop = loop
                return loop

    def _connect(self) -> None:
        """Make a connection, unless there is one, or one is under way or waiting for its time."""
        if self._closing or self.connection or self._workflow or self._pause:
            return
        try:
            parameters = self._nodes.parameters(self._role)
        except ConfigurationError as error:
            self._refuse(error)
            return
        try:
            # pika has no ear for this failure in the middle of its attempt.
            socket.socket().close()
        except OSError as error:
            self._attempt_failed(error)
            return
        self._attempt += 1
        self._workflow = Connection.create_connection(
            [parameters],
            on_done=self.guarded(partial(self._attempted, self._attempt)),
            custom_ioloop=self._loop,
        )

    def _abandon_attempt(self) -> None:
        """An exception has escaped from pika; if from its attempt to connect, that is dead.

        There was no descriptor for a socket, for example. Nobody would report its end.
        """
        if self._workflow is not None:
            self._attempt += 1
            self._workflow = None
            self._attempt_failed(RuntimeError("internal error while connecting"))

    def connect(self) -> None:
        """I/O thread: make sure that a connection is there or on its way."""
        self._connect()

    def _attempted(self, attempt: int, result: Connection | BaseException) -> None:
        if attempt != self._attempt:
            if not isinstance(result, BaseException):
                result.close()
            return
        self._workflow = None
        if isinstance(result, BaseException):
            self._attempt_failed(result)
            return
        self.connection = result
        if self._closing:
            self._shut_down()
            return
        result.add_on_close_callback(self.guarded(self._on_closed))
        self._connected_at = time.monotonic()
        self._was_connected = True
        self.trouble = ""
        self._owner.opened(result)

    def _attempt_failed(self, error: BaseException) -> None:
        if self._closing:
            self._stop_loop()
            return
        final = hopeless(error, self.node, was_connected=self._was_connected)
        self._failures += 1
        if final is not None and self._failures >= len(self._nodes):
            self._refuse(final)
            return
        self.trouble = f"{self.node}: {explain(error)}"
        if self._failures == 1:
            log.warning("No %s connection to %s. Trying again.", self._role, self.trouble)
        self._nodes.rotate()
        self._connect_later()

    def _connect_later(self) -> None:
        def try_again() -> None:
            self._pause = None
            self._connect()

        # Every node once without a pause; then ever longer ones, not all clients at once.
        rounds = max(0, self._failures - len(self._nodes))
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(rounds, 10))
        self._pause = self.call_later(longest * random.uniform(0.5, 1), try_again)

    def _refuse(self, error: ConfigurationError) -> None:
        self._failures = 0
        self.trouble = str(error)
        self._owner.refused(error)

    def _on_closed(self, connection: Connection, error: BaseException) -> None:
        if connection is not self.connection:
            return
        if self._closing:
            self.connection = None
            self._owner.lost(error)
            self._stop_loop()
            return
        self.connection = None
        self.trouble = f"{self.node}: {explain(error)}"
        log.warning("Lost the %s connection to %s.", self._role, self.trouble)
        self._owner.lost(error)
        self._nodes.rotate()
        # A broker that takes connections only to drop them is one that fails.
        lasted = time.monotonic() - self._connected_at > _LASTING
        self._failures = 0 if lasted else self._failures + 1
        self._connect_later()

    def _shut_down(self) -> None:
        if self._pause is not None:
            self.cancel_call(self._pause)
        if self.connection is not None and self.connection.is_open:
            self.connection.close()
            self.call_later(_GRACE, self.cut)
            self.call_later(_GRACE * 2, self._stop_loop)
        elif self._workflow is not None:
            # Its end is reported to _attempted.
            self.call_later(_GRACE, self._stop_loop)
            try:
                self._workflow.abort()
            except AssertionError:
                # pika cannot abort in the middle of the AMQP handshake.
                self.cut()
        else:
            self._stop_loop()

    def _stop_loop(self) -> None:
        if self._loop is not None:
            self._loop.stop()

    def _forget(self) -> None:
        _inherited.append((self._loop, self.connection, self._workflow, self._thread, self._lock))
        self._reset()
        self._owner.forget()


def _forget_all() -> None:
    for link in list(_links):
        link._forget()


on_fork(_forget_all)
