"""Declaring, counting, consuming and browsing on one connection, over every trouble.

Threads. Callers append to ``_requests`` and wake the I/O thread, which carries them out as soon
as there is a connection; calls that block do so on an answer, with a deadline. Requests may be
carried out twice, and are when the connection is lost under them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pika
import pika.exceptions
from pika.channel import Channel

from domain_events.broker import Consumer
from domain_events.broker.rabbitmq.browser import RabbitBrowser
from domain_events.broker.rabbitmq.consumer import RabbitConsumer
from domain_events.broker.rabbitmq.link import Link, is_io_thread
from domain_events.broker.rabbitmq.nodes import Nodes, close_code, explain
from domain_events.broker.rabbitmq.opening import Opening
from domain_events.broker.rabbitmq.request import Answer, Request, fail, succeed
from domain_events.broker.rabbitmq.turns import is_mistake
from domain_events.broker.refusals import closed, no_channel, unreadable
from domain_events.errors import BrokerUnavailable, ConfigurationError, DomainEventsError
from domain_events.log import Log
from domain_events.message import Delivery
from domain_events.process import check_fork
from domain_events.topology import Exchange, Queue, Topology

log = Log("domain_events")

# Seconds before what the broker cannot do just now is asked for again.
_PAUSE = 0.2


class RabbitConsuming:
    """See `domain_events.broker.Consuming`."""

    def __init__(self, nodes: Nodes, name: str, on_failure: Callable[[], None]) -> None:
        self._on_failure = on_failure
        self._consumers: list[RabbitConsumer] = []
        self._link = Link(nodes, f"{name} consuming", self)
        self.forget()

    def forget(self) -> None:
        """Be as new (at first, and in the child of a fork)."""
        for consumer in self._consumers:
            consumer.forget()
        self._lock = threading.RLock()
        self._requests: deque[tuple[Request, Answer]] = deque()
        self._running: list[tuple[Request, Answer]] = []
        self._consumers = []
        self._failure: DomainEventsError | None = None
        self._last_error = ""  # of `_repair`

    # --- any thread ----------------------------------------------------------------------------

    def failure(self) -> DomainEventsError | None:
        """Why this connection has given up for good, if it has."""
        return self._failure

    def declare(self, topology: Topology, timeout: float) -> None:
        """Make sure that all of this exists."""
        self._call(partial(self._declare, topology), timeout)

    def delete(self, topology: Topology, timeout: float) -> None:
        """Delete the queues and exchanges among this."""
        self._call(partial(self._delete, topology), timeout)

    def count(self, queue: str, timeout: float) -> int:
        """How many messages are ready in the queue."""
        frame = self._call(partial(self._look_at, queue), timeout)
        return int(frame.method.message_count)

    def consume(
        self,
        queue: str,
        topology: Topology,
        prefetch_count: int,
        deliver: Callable[[Delivery, Consumer], None],
        *,
        careful: bool = False,
    ) -> RabbitConsumer:
        """Start to consume, and go on over every trouble."""
        check_fork()
        consumer = RabbitConsumer(
            self._link, self._repair, queue, topology, prefetch_count, deliver, careful=careful
        )

        def start() -> None:
            self._consumers.append(consumer)
            self._link.connect()
            consumer.open()

        self._link.wake(start)
        return consumer

    def browse(self, queue: str, timeout: float) -> RabbitBrowser:
        """Look at the messages of a queue."""
        return RabbitBrowser(self._link, self._call, queue, timeout)

    def close(self, timeout: float) -> None:
        """Tell the broker all that was settled, then close."""
        # pika closes the channels first, behind all acks already given to them.
        self._link.close(timeout)
        self._fail_requests(closed())

    def close_soon(self) -> bool:
        """Close without waiting."""
        return self._link.close_soon()

    def _call(self, request: Request, timeout: float) -> Any:
        """Have the request carried out on the I/O thread, as soon as there is a connection."""
        answer = Answer()
        entry = (request, answer)
        check_fork()
        if is_io_thread():
            raise BrokerUnavailable(
                "Nothing can be asked of the broker from a connection's own thread, by a finalizer "
                "for example."
            )
        self._requests.append(entry)
        try:
            self._link.wake(self._perform)
            # From answer to answer: a thousand binding keys would be too many for one deadline.
            while (left := answer.heard_at + timeout - time.monotonic()) > 0 and not answer.done():
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
        # A fresh one. The other is still known to callbacks of pika's, and a traceback knows the
        # callers: until a garbage collection, whoever they belong to could not be dropped.
        fresh = type(error)(*error.args)
        fresh.__cause__ = error.__cause__
        del answer, entry, error
        try:
            raise fresh
        finally:
            del fresh

    def _drop(self, entry: tuple[Request, Answer]) -> None:
        """Keep nothing of a request for which nobody waits."""
        with self._lock:
            for entries in (self._requests, self._running):
                with contextlib.suppress(ValueError):
                    entries.remove(entry)

    # --- the I/O thread --------------------------------------------------------------------------

    def opened(self, _connection: pika.SelectConnection) -> None:
        """There is a connection: carry out what waits, and consume again."""
        for consumer in self._consumers:
            consumer.open()
        self._perform()

    def lost(self, error: BaseException | None) -> None:
        """The connection is gone; requests may be repeated, so they simply wait for the next."""
        for consumer in self._consumers:
            consumer.lost(f"the connection was lost: {explain(error)}", mistake=is_mistake(error))
        with self._lock:
            self._requests.extendleft(reversed(self._running))
            self._running.clear()

    def refused(self, error: ConfigurationError) -> None:
        """No connection can be made: tell everybody who waits."""
        self._fail_requests(error)
        if self._consumers:
            self._failure = error
            self._on_failure()

    def _fail_requests(self, error: DomainEventsError) -> None:
        with self._lock:
            waiting = [*self._running, *self._requests]
            self._running.clear()
            self._requests.clear()
        for _, answer in waiting:
            fail(answer, type(error)(*error.args))

    def _perform(self) -> None:
        connection = self._link.connection
        if connection is None or not connection.is_open:
            self._link.connect()
            return
        while True:
            with self._lock:
                if not self._requests:
                    return
                request, answer = entry = self._requests[0]
                self._running.append(entry)
                self._requests.popleft()
            if answer.done():
                continue
            try:
                request(connection, answer)
            except pika.exceptions.NoFreeChannels:
                limit = connection.params.channel_max
                fail(answer, no_channel(f"channel_max is {limit}"))

    def _declare(
        self,
        topology: Topology,
        connection: pika.SelectConnection,
        answer: Answer,
    ) -> None:
        self._on_channel(connection, answer, lambda _channel, done: done(None), topology)

    def _delete(
        self,
        topology: Topology,
        connection: pika.SelectConnection,
        answer: Answer,
    ) -> None:
        def delete(channel: Channel, done: Callable[[object], None]) -> None:
            # To delete what is not there is no error, and needs no reply; the last one comes
            # when all is done.
            for declaration in topology:
                if isinstance(declaration, Queue):
                    channel.queue_delete(declaration.name)
                elif isinstance(declaration, Exchange):
                    channel.exchange_delete(declaration.name)
            channel.basic_qos(callback=done)

        self._on_channel(connection, answer, delete)

    def _look_at(
        self,
        queue: str,
        connection: pika.SelectConnection,
        answer: Answer,
    ) -> None:
        def refused(_error: DomainEventsError, reason: BaseException) -> DomainEventsError:
            return unreadable(queue, close_code(reason), explain(reason))

        def look(channel: Channel, done: Callable[[object], None]) -> None:
            channel.queue_declare(queue, passive=True, callback=done)

        self._on_channel(connection, answer, look, refused=refused)

    def _on_channel(
        self,
        connection: pika.SelectConnection,
        answer: Answer,
        work: Callable[[Channel, Callable[[object], None]], None],
        topology: Topology = (),
        refused: Callable[[DomainEventsError, BaseException], DomainEventsError] = (
            lambda error, _reason: error
        ),
    ) -> None:
        """Do it on a channel of its own, since an error closes the channel."""

        def failed(error: DomainEventsError, reason: BaseException) -> None:
            error = refused(error, reason)
            # Not when the connection was closed over it: others use the next one.
            if isinstance(error, BrokerUnavailable) and answer.awaited and connection.is_open:
                answer.trouble = str(error)
                self._link.call_later(_PAUSE, again)
            else:
                fail(answer, error)

        def again() -> None:
            # On the next connection it is begun again anyhow.
            if connection.is_open and not answer.done():
                self._on_channel(connection, answer, work, topology, refused)

        def prepare(channel: Channel) -> None:
            def done(result: object) -> None:
                opening.usable()
                succeed(answer, result)
                channel.close()

            work(channel, self._link.guarded(done))

        opening = Opening(
            self._link,
            connection,
            topology,
            prepare=prepare,
            failed=failed,
            closed=lambda _reason: None,
            declared=answer.came_to,
        )

    def _repair(self, topology: Topology, then: Callable[[bool], None]) -> None:
        """Declare the topology again, without anybody waiting for it; then call ``then``."""
        connection = self._link.connection
        if connection is None or not connection.is_open:
            then(False)
            return
        answer = Answer(awaited=False)

        def report(done: concurrent.futures.Future[Any]) -> None:
            error = done.exception()
            then(error is None)
            # Not each time: what stands against it may do so for days.
            if error is not None and str(error) != self._last_error:
                self._last_error = str(error)
                log.error("%s", error)

        answer.add_done_callback(report)
        self._declare(topology, connection, answer)
