"""Declaring, counting, consuming and browsing on one connection, across reconnects.

Threads. Callers make `Requests`, which the I/O thread performs; everything else belongs to that
thread.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pika.channel import Channel

from domain_events.broker import Consumer, OnChange, Publishing, Queue, ignore_change
from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.browser import RabbitBrowser
from domain_events.broker.rabbitmq.channel import Answer, Channels
from domain_events.broker.rabbitmq.consumer import RabbitConsumer
from domain_events.broker.rabbitmq.errors import (
    ResourceLocked,
    close_code,
    closed_error,
    explain,
    read_error,
)
from domain_events.broker.rabbitmq.link import Link
from domain_events.broker.rabbitmq.nodes import Nodes
from domain_events.broker.rabbitmq.requests import Requests
from domain_events.broker.rabbitmq.topology import Topology
from domain_events.broker.rabbitmq.transport import Connection
from domain_events.broker.rabbitmq.turns import is_mistake
from domain_events.broker.rabbitmq.walk import RabbitWalk
from domain_events.errors import (
    ConfigurationError,
    DomainEventsError,
    TopologyError,
)
from domain_events.log import Log
from domain_events.message import Delivery, Place
from domain_events.process import check_fork

log = Log("domain_events")


class RabbitConsuming:
    """See `domain_events.broker.Consuming`."""

    def __init__(
        self,
        nodes: Nodes,
        name: str,
        on_failure: Callable[[], None],
        on_change: OnChange = ignore_change,
    ) -> None:
        self._on_failure = on_failure
        self._consumers: list[RabbitConsumer] = []
        self._link = Link(nodes, f"{name} consuming", self, on_change)
        self.forget()

    def forget(self) -> None:
        """Reset all state (at first, and in the child of a fork)."""
        for consumer in self._consumers:
            consumer.forget()
        self._consumers = []
        self._channels = Channels(self._link)
        self._requests = Requests(self._link, self._channels)
        self._failure: DomainEventsError | None = None
        self._last_error = ""  # of `_repair`

    # --- any thread ----------------------------------------------------------------------------

    def silence(self) -> float:
        return self._link.silence()

    def failure(self) -> DomainEventsError | None:
        return self._failure

    def declare(self, queue: Queue, timeout: float) -> None:
        self._declare_all(topology.needed(queue), timeout)

    def _declare_all(self, declarations: Topology, timeout: float) -> None:
        self._requests.call(partial(self._requests.declare, declarations), timeout)

    def delete(self, names: Sequence[str], exchange: str, timeout: float) -> None:
        self._requests.call(partial(self._delete, topology.all_of(names, exchange)), timeout)

    def count(self, place: Place, timeout: float) -> int:
        return self._count(topology.queue_of(place), timeout)

    def _count(self, queue: str, timeout: float) -> int:
        frame = self._requests.call(partial(self._declare_passively, queue), timeout)
        return int(frame.method.message_count)

    def is_registered(self, name: str, timeout: float, *, strict: bool) -> bool:
        self._count(name, timeout)  # declaring it would create a missing one
        for queue in topology.registered(name, strict=strict):
            try:
                self._declare_all([queue], timeout)
            except TopologyError:
                continue
            return True
        return False

    def consume(
        self, queue: Queue, prefetch_count: int, deliver: Callable[[Delivery, Consumer], None]
    ) -> RabbitConsumer:
        check_fork()
        consumer = RabbitConsumer(self._channels, self._repair, queue, prefetch_count, deliver)

        def start() -> None:
            self._consumers.append(consumer)
            self._link.connect()
            consumer.open()

        self._link.wake(start)
        return consumer

    def browse(
        self, place: Place, timeout: float, publishing: Callable[[], Publishing]
    ) -> RabbitWalk:
        browser = RabbitBrowser(
            self._channels, self._requests.call, topology.queue_of(place), timeout
        )
        return RabbitWalk(place, browser, self._declare_all, publishing, timeout)

    def is_browsed(self, place: Place, timeout: float) -> bool:
        try:
            self._count(topology.walk_marker(place).name, timeout)
        except ResourceLocked:
            return True
        except (TopologyError, ConfigurationError):
            pass  # there is none, or this user may not check
        return False

    def close(self, timeout: float) -> None:
        # pika closes the channels first, behind all acks already given to them.
        self._link.close(timeout)
        self._requests.fail(closed_error())

    def close_soon(self) -> bool:
        return self._link.close_soon()

    # --- the I/O thread --------------------------------------------------------------------------

    def opened(self, _connection: Connection) -> None:
        """There is a connection: perform waiting requests, and consume again."""
        for consumer in self._consumers:
            consumer.open()
        self._requests.perform()

    def lost(self, error: BaseException | None) -> None:
        """The connection is gone; requests may be repeated, so they simply wait for the next."""
        self._channels.lost()
        for consumer in self._consumers:
            consumer.lost(f"the connection was lost: {explain(error)}", mistake=is_mistake(error))
        self._requests.lost()

    def refused(self, error: ConfigurationError) -> None:
        """No connection can be made: all waiting requests fail with the error."""
        self._requests.fail(error)
        if self._consumers:
            self._failure = error
            self._on_failure()

    def _delete(self, declarations: Topology, answer: Answer) -> None:
        def delete(channel: Channel, done: Callable[[object], None]) -> None:
            def deleted(frame: object) -> None:
                self._channels.forget()
                done(frame)

            # Deleting something that does not exist is not an error. No replies: that of the last
            # request comes when all are done.
            for declaration in declarations:
                if isinstance(declaration, topology.Queue):
                    channel.queue_delete(declaration.name)
                elif isinstance(declaration, topology.Exchange):
                    channel.exchange_delete(declaration.name)
            channel.basic_qos(callback=deleted)

        self._requests.on_channel(answer, delete)

    def _declare_passively(self, queue: str, answer: Answer) -> None:
        def refused(_error: DomainEventsError, reason: BaseException) -> DomainEventsError:
            return read_error(queue, close_code(reason), explain(reason))

        def declare(channel: Channel, done: Callable[[object], None]) -> None:
            channel.queue_declare(queue, passive=True, callback=done)

        self._requests.on_channel(answer, declare, refused=refused)

    def _repair(self, declarations: Topology, then: Callable[[bool], None]) -> None:
        """Declare all of this again, in the background; then call ``then``."""
        if not self._channels.is_open:
            then(False)
            return
        self._channels.forget()
        answer = Answer(awaited=False)

        def report(done: concurrent.futures.Future[Any]) -> None:
            error = done.exception()
            then(error is None)
            # Not each time: its cause may last for days.
            if error is not None and str(error) != self._last_error:
                self._last_error = str(error)
                log.error("%s", error)

        answer.add_done_callback(report)
        self._requests.declare(declarations, answer)
