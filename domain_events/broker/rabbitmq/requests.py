"""Requests of callers' threads, performed on a link's I/O thread as soon as there is a connection.

Threads. A caller appends its request and wakes the I/O thread, then waits for the `Answer`, with a
time limit. A request that was under way when the connection was lost is repeated on the next one,
so it must be one that may be performed twice. ``_lock`` guards both collections.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from pika.channel import Channel

from domain_events.broker.rabbitmq.channel import Answer, Channels
from domain_events.broker.rabbitmq.link import Link, is_io_thread
from domain_events.broker.rabbitmq.topology import Topology
from domain_events.errors import BrokerUnavailable, DomainEventsError
from domain_events.process import check_fork

# Seconds before a request is repeated that the broker cannot fulfil at the moment.
_PAUSE = 0.2

#: Performed on the I/O thread, on an open connection; sooner or later it settles the answer.
Request: TypeAlias = Callable[[Answer], None]

#: Uses the channel, and calls the second argument with the result.
Work: TypeAlias = Callable[[Channel, Callable[[object], None]], None]

#: The error for the caller: of what the channel has found out, and of the reason that closed it.
Refused: TypeAlias = Callable[[DomainEventsError, BaseException], DomainEventsError]


def as_it_is(error: DomainEventsError, _reason: BaseException) -> DomainEventsError:
    """The channel's own error is the caller's."""
    return error


class Requests:
    """The requests to one link."""

    def __init__(self, link: Link, channels: Channels) -> None:
        self._link = link
        self._channels = channels
        self._lock = threading.RLock()
        self._waiting: deque[tuple[Request, Answer]] = deque()
        self._running: list[tuple[Request, Answer]] = []

    @property
    def is_idle(self) -> bool:
        """Whether none waits, and none is under way."""
        return not self._waiting and not self._running

    def call(self, request: Request, timeout: float) -> Any:
        """Any other thread: perform the request, and wait for the result.

        :raises BrokerUnavailable: there was no answer within ``timeout`` seconds.
        :raises DomainEventsError: what the request has failed with.
        """
        answer = Answer()
        entry = (request, answer)
        check_fork()
        if is_io_thread():
            raise BrokerUnavailable(
                "No request to the broker can be made from a connection's own thread, by a "
                "finalizer for example."
            )
        self._waiting.append(entry)
        try:
            self._link.wake(self.perform)
            # Each answer restarts the time limit: a thousand binding keys take long.
            while (
                left := answer.progressed_at + timeout - time.monotonic()
            ) > 0 and not answer.done():
                concurrent.futures.wait([answer], left)
        finally:
            gave_up = answer.cancel()
            self._drop(entry)
        if gave_up:
            why = answer.trouble or self._link.trouble or f"{self._link.node}: no answer"
            raise BrokerUnavailable(f"No broker within {timeout:g} s. {why}.")
        error = answer.exception()
        if error is None:
            return answer.result()
        # A fresh one. pika's callbacks still refer to the other one, whose traceback would keep the
        # callers' objects alive until a garbage collection.
        fresh = type(error)(*error.args)
        fresh.__cause__ = error.__cause__
        del answer, entry, error
        try:
            raise fresh
        finally:
            del fresh

    def _drop(self, entry: tuple[Request, Answer]) -> None:
        """Keep nothing of a request for which no caller waits."""
        with self._lock:
            for entries in (self._waiting, self._running):
                with contextlib.suppress(ValueError):
                    entries.remove(entry)

    # --- the I/O thread --------------------------------------------------------------------------

    def perform(self) -> None:
        """Perform what waits, if there is a connection; otherwise connect."""
        if not self._channels.is_open:
            self._link.connect()
            return
        while True:
            with self._lock:
                if not self._waiting:
                    return
                request, answer = entry = self._waiting[0]
                self._running.append(entry)
                self._waiting.popleft()
            if not answer.done():
                request(answer)

    def lost(self) -> None:
        """The connection is gone: what was under way waits for the next one."""
        with self._lock:
            self._waiting.extendleft(reversed(self._running))
            self._running.clear()

    def fail(self, error: DomainEventsError) -> None:
        """All of them fail with the error."""
        with self._lock:
            entries = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for _, answer in entries:
            answer.fail(type(error)(*error.args))

    def on_channel(
        self,
        answer: Answer,
        work: Work,
        declarations: Topology = (),
        refused: Refused = as_it_is,
    ) -> None:
        """Declare this, then do the work, on a channel of its own, since an error closes it."""
        connection = self._link.connection

        def is_same() -> bool:
            return self._channels.is_open and self._link.connection is connection

        def failed(error: DomainEventsError, reason: BaseException) -> None:
            error = refused(error, reason)
            # Not when the connection was closed over it: others use the next one.
            if isinstance(error, BrokerUnavailable) and answer.awaited and is_same():
                answer.trouble = str(error)
                self._link.call_later(_PAUSE, again)
            else:
                answer.fail(error)

        def again() -> None:
            # On the next connection it is repeated anyway.
            if is_same() and not answer.done():
                self.on_channel(answer, work, declarations, refused)

        def prepare(channel: Channel) -> None:
            def done(result: object) -> None:
                setup.usable()
                answer.succeed(result)
                if channel.is_open:  # not while the connection is being closed
                    channel.close()

            work(channel, self._link.guarded(done))

        setup = self._channels.open(
            declarations,
            prepare=prepare,
            failed=failed,
            closed=lambda _reason: None,
            progress=answer.progress,
        )

    def declare(self, declarations: Topology, answer: Answer) -> None:
        """Declare all of this."""
        self.on_channel(answer, lambda _channel, done: done(None), declarations)
