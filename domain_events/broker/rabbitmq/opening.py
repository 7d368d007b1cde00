"""Makes a channel ready: opens it, declares what is needed on it, and minds the time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pika
from pika.channel import Channel

from domain_events.broker.rabbitmq.declaring import Declaring
from domain_events.broker.rabbitmq.link import Link
from domain_events.errors import DomainEventsError
from domain_events.topology import Topology

# So many seconds the broker has for each answer until the channel is usable; pika has no time
# limit. More than a broker takes that is busy recovering its queues.
_ANSWER_TIMEOUT = 30.0


class Opening:
    """One channel, from being asked for to its end; everything on the I/O thread.

    :param prepare: called with the channel when the topology is declared on it; does the rest
        and then calls `usable`.
    :param failed: called when the broker closes the channel before it is usable.
    :param closed: called when the channel is closed after it was usable.
    :param declared: called after each declaration, with how many there have been.

    None is called when the connection is lost, which its link tells to all.
    """

    def __init__(
        self,
        link: Link,
        connection: pika.SelectConnection,
        topology: Topology,
        *,
        prepare: Callable[[Channel], None],
        failed: Callable[[DomainEventsError, BaseException], None],
        closed: Callable[[BaseException], None],
        declared: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._link = link
        self._connection = connection
        self._declaring = Declaring(topology)
        self._prepare = prepare
        self._failed = failed
        self._closed = closed
        self._declared = declared
        self._usable = False
        self._closing = False
        self._open()

    def usable(self) -> None:
        """The channel does its work now."""
        self._usable = True
        if not self._closing:
            self._link.cancel_call(self._deadline)

    def busy(self) -> None:
        """The channel is to be asked for something; it is usable again when that is answered."""
        self._link.cancel_call(self._deadline)
        self._wait_for_an_answer()

    def close(self, channel: Channel) -> None:
        """Close the channel; its end is told, or the connection is made anew."""
        self._closing = True
        self._link.cancel_call(self._deadline)
        self._wait_for_an_answer()
        channel.close()

    def _open(self) -> None:
        # This first: it raises when the connection has no channel left, and nothing is awaited.
        self._connection.channel(on_open_callback=self._link.guarded(self._opened))
        self._wait_for_an_answer()

    def _opened(self, channel: Channel) -> None:
        channel.add_on_close_callback(self._link.guarded(self._on_close))
        guarded = self._link.guarded
        self._declaring.run(
            channel, guarded(self._answered), guarded(partial(self._prepare, channel))
        )

    def _answered(self, count: int) -> None:
        self._link.cancel_call(self._deadline)
        self._wait_for_an_answer()
        self._declared(count)

    def _wait_for_an_answer(self) -> None:
        self._deadline = self._link.call_later(_ANSWER_TIMEOUT, self._too_late)

    def _too_late(self) -> None:
        if self._link.connection is self._connection:
            self._link.cut()

    def _on_close(self, _channel: Channel, reason: BaseException) -> None:
        self._link.cancel_call(self._deadline)
        if not self._connection.is_open:
            return
        if self._usable:
            self._closed(reason)
            return
        error = self._declaring.closed(reason)
        if error is None:
            self._open()  # what is missing is declared now
        else:
            self._failed(error, reason)
