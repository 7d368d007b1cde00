"""Makes a channel ready: opens it, declares what is needed on it, and minds the time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pika
import pika.exceptions
from pika.channel import Channel

from domain_events.broker.rabbitmq.declaring import Declaring
from domain_events.broker.rabbitmq.link import Link
from domain_events.broker.rabbitmq.nodes import explain
from domain_events.broker.refusals import no_channel
from domain_events.errors import DomainEventsError
from domain_events.topology import Topology

# So many seconds the broker has for each answer until the channel is usable; pika has no time
# limit. More than a broker takes that is busy recovering its queues.
_ANSWER_TIMEOUT = 30.0


class Opening:
    """One channel, from being asked for to its end; everything on the I/O thread.

    :param prepare: called with the channel when the topology is declared on it; does the rest
        and then calls `usable`.
    :param failed: called when the broker closes the channel before it is usable, or when there is
        none; also when it closes the whole connection over this one, which is lost by then.
    :param closed: called when the channel is closed after it was usable.
    :param declared: called after each declaration, with how many there have been.

    None is called when the connection is lost otherwise, of which its link calls all who use it.
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
        self._deadline: object = None
        self._is_open = False
        self._usable = False
        self._closing = False
        link.turns.take(self)

    @property
    def step(self) -> object:
        """What it is doing: a declaration; None while there is no channel."""
        return self._declaring.current if self._is_open else None

    def begin(self) -> None:
        """Open the channel."""
        if not self._connection.is_open:
            return
        self._wait_for_an_answer()
        try:
            self._connection.channel(on_open_callback=self._link.guarded(self._opened))
        except pika.exceptions.NoFreeChannels as error:
            refusal = no_channel(f"channel_max is {self._connection.params.channel_max}")
            self._stop_waiting()
            # Not now: whoever makes this does not have it yet.
            self._link.call_later(0, partial(self._refuse, refusal, error))

    def usable(self) -> None:
        """The channel does its work now."""
        self._usable = True
        if not self._closing:
            self._stop_waiting()
        self._link.turns.ended(self)

    def busy(self) -> None:
        """The channel is to be asked for something; it is usable again when that is answered."""
        self._wait_for_an_answer()

    def close(self, channel: Channel) -> None:
        """Close the channel; its end is told, or the connection is made anew."""
        self._closing = True
        self._wait_for_an_answer()
        channel.close()

    def blame(self, reason: BaseException) -> None:
        """The broker has closed the connection over this channel, or over what is done on it."""
        if self._is_open:
            error = self._declaring.closed(reason) or no_channel(explain(reason))
        else:
            error = no_channel(explain(reason))
        self._failed(error, reason)

    def _opened(self, channel: Channel) -> None:
        self._is_open = True
        channel.add_on_close_callback(self._link.guarded(self._on_close))
        guarded = self._link.guarded
        self._declaring.run(
            channel, guarded(self._answered), guarded(partial(self._prepare, channel))
        )

    def _answered(self, count: int) -> None:
        self._wait_for_an_answer()
        self._declared(count)

    def _wait_for_an_answer(self) -> None:
        self._stop_waiting()
        self._deadline = self._link.call_later(_ANSWER_TIMEOUT, self._too_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._link.cancel_call(self._deadline)
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self._link.connection is self._connection:
            self._link.cut()

    def _on_close(self, _channel: Channel, reason: BaseException) -> None:
        self._stop_waiting()
        if not self._connection.is_open:
            return
        self._is_open = False
        if self._usable:
            self._closed(reason)
            return
        error = self._declaring.closed(reason)
        if error is None:
            self.begin()  # what is missing is declared now
        else:
            self._refuse(error, reason)

    def _refuse(self, error: DomainEventsError, reason: BaseException) -> None:
        if self._connection.is_open:
            self._link.turns.ended(self)
            self._failed(error, reason)
