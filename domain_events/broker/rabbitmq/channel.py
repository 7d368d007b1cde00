"""Opens channels on a link's connection and declares on them what they need, within time limits.

Lasting declarations (exchanges, and those that the retries of all subscribers share) are sent once
on each connection. Several channels may need the same at the same time: one declares it, and the
others wait. A subscriber's own declarations are sent each time, since it may have been deleted.

Declarations are sent in pieces: ``nowait`` for all but the last one of a piece, whose answer
stands for all of them, because a channel processes requests in order. An error closes the channel
and does not name the declaration that caused it. So the rest is then declared one by one on
another channel.

Everything here belongs to the I/O thread, except for threads that wait for an `Answer`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pika
import pika.exceptions
from pika.channel import Channel

from domain_events.broker.rabbitmq.errors import (
    ACCESS_REFUSED,
    NOT_FOUND,
    close_code,
    declare_error,
    explain,
    may_be_used,
    no_channel_error,
    read_permission_error,
)
from domain_events.broker.rabbitmq.link import Link
from domain_events.broker.rabbitmq.topology import (
    Binding,
    Declaration,
    Exchange,
    Queue,
    Topology,
    Unbinding,
    is_shared,
    must_exist,
)
from domain_events.broker.rabbitmq.transport import Connection
from domain_events.errors import DomainEventsError, TopologyError

# Seconds within which the broker must answer each request until the channel is usable; pika has
# no limit. A broker that is recovering its queues needs less.
_ANSWER_TIMEOUT = 30.0

# The most declarations in one piece: few round trips, and still an answer every now and then.
_MOST_IN_A_PIECE = 32


class Answer(concurrent.futures.Future[Any]):
    """The result of a request of a caller's thread to the I/O thread.

    :ivar progressed_at: when the request was made, or when the broker last took it a step further.
    :ivar trouble: why it has failed so far; it is repeated as long as the caller waits.
    """

    def __init__(self, *, awaited: bool = True) -> None:
        super().__init__()
        self.progressed_at = time.monotonic()
        self.awaited = awaited
        self.trouble = ""
        self._steps = 0

    def progress(self, step: int) -> None:
        """I/O thread. After a restart on another connection, only further steps count."""
        if step > self._steps:
            self._steps = step
            self.progressed_at = time.monotonic()

    def succeed(self, result: object) -> None:
        """I/O thread. The caller may give up at this very moment."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.set_result(result)

    def fail(self, error: DomainEventsError) -> None:
        """I/O thread."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.set_exception(error)


class Channels:
    """The channels of one link, and the lasting declarations on its connection.

    Invariant: ``known`` has only declarations that the broker has answered on this connection,
    and none of them since anything was found missing.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.lost()

    def open(
        self,
        topology: Topology,
        *,
        prepare: Callable[[Channel], None],
        failed: Callable[[DomainEventsError, BaseException], None],
        closed: Callable[[BaseException], None],
        progress: Callable[[int], None] = lambda _steps: None,
    ) -> ChannelSetup:
        """Open a channel, on a connection that `is_open`; see `ChannelSetup`."""
        connection = self.link.connection
        assert connection is not None
        return ChannelSetup(self, connection, topology, prepare, failed, closed, progress)

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, on which a channel can be opened."""
        connection = self.link.connection
        return connection is not None and bool(connection.is_open)

    def forget(self) -> None:
        """Something may have been deleted: declare everything again."""
        # Not cleared: a declaration that is not answered yet must not get into the new one.
        self.known: set[str] = set()

    def lost(self) -> None:
        """The connection is gone."""
        self.forget()
        self._declaring: ChannelSetup | None = None
        self._waiting: list[ChannelSetup] = []

    def may_declare(self, setup: ChannelSetup) -> bool:
        """Whether no other channel sends lasting declarations; else it must wait for `released`."""
        if self._declaring in (None, setup):
            self._declaring = setup
            return True
        self._waiting.append(setup)
        return False

    def progress(self, steps: int) -> None:
        """The declarations that the others wait for go on."""
        for each in self._waiting:
            each.progress(steps)

    def release(self, setup: ChannelSetup) -> None:
        """This one sends no lasting declarations any more."""
        if setup in self._waiting:
            self._waiting.remove(setup)
        if setup is self._declaring:
            self._declaring = None
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                each.released()


class ChannelSetup:
    """One channel, from the request to open it to its end.

    :param prepare: called with the channel when the topology is declared on it; does the rest
        and then calls `usable`.
    :param failed: called when the broker closes the channel before it is usable, or when none is
        free; also when the broker closes the whole connection over it, which is lost by then.
    :param closed: called when the channel is closed after it was usable.
    :param progress: called after each answer, with how much is declared.

    When the connection is lost otherwise, none of them is called: the link informs its owner.
    """

    def __init__(
        self,
        channels: Channels,
        connection: Connection,
        topology: Topology,
        prepare: Callable[[Channel], None],
        failed: Callable[[DomainEventsError, BaseException], None],
        closed: Callable[[BaseException], None],
        progress: Callable[[int], None],
    ) -> None:
        self._channels = channels
        self._link = channels.link
        self._connection = connection
        self._topology = topology
        self._prepare = prepare
        self._failed = failed
        self._closed = closed
        self.progress = progress
        self._channel: Channel | None = None  # as soon as it is open
        self._deadline: object = None
        self._usable = False
        self._closing = False
        self._missing: set[str] = set()  # queues that a passive declaration did not find
        self._one_by_one = False
        self._declare_all(trusting=True)
        self._link.turns.take(self)

    @property
    def step(self) -> object:
        """The current declaration; None while the channel is not open, or when all are declared."""
        left = self._lasting or self._own
        return left[0] if left and self._channel is not None else None

    def begin(self) -> None:
        """Open the channel."""
        if not self._connection.is_open:
            return
        self.await_answer()
        try:
            self._connection.channel(on_open_callback=self._link.guarded(self._opened))
        except pika.exceptions.NoFreeChannels as error:
            refusal = no_channel_error(f"channel_max is {self._connection.params.channel_max}")
            self._stop_waiting()
            # Not now: the caller of this constructor does not have the object yet.
            self._link.call_later(0, partial(self._refuse, refusal, error))

    def usable(self) -> None:
        """The channel is set up, or has answered."""
        self._usable = True
        if not self._closing:
            self._stop_waiting()
        self._link.turns.ended(self)

    def await_answer(self) -> None:
        """Give the broker a time limit to answer; `usable` or `closed` ends it."""
        self._stop_waiting()
        self._deadline = self._link.call_later(_ANSWER_TIMEOUT, self._on_timeout)

    def close(self, channel: Channel) -> None:
        """Close the channel, since the broker has cancelled its consumer; `closed` is called."""
        self._closing = True
        self._channels.forget()
        self.await_answer()
        channel.close()

    def blame(self, reason: BaseException) -> None:
        """The broker has closed the connection over this channel, or over a declaration on it."""
        error = no_channel_error(explain(reason)) if self._channel is None else self._error(reason)
        self._failed(error, reason)

    def released(self) -> None:
        """No other channel sends lasting declarations any more."""
        if self._channel is not None and self._channel.is_open:
            self.await_answer()
            self._declare()

    # --- declaring -------------------------------------------------------------------------------

    def _declare_all(self, *, trusting: bool) -> None:
        """:param trusting: whether to leave out declarations that are in ``known``."""
        self._trusting = trusting
        self._lasting = [each for each in self._topology if _lasts(each)]
        self._own = [each for each in self._topology if not _lasts(each)]

    def _opened(self, channel: Channel) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._link.guarded(self._on_close))
        self._declare()

    def _declare(self) -> None:
        """Send the next piece; when nothing is left, have the channel prepared."""
        channels, channel = self._channels, self._channel
        assert channel is not None
        if not channel.is_open:
            return  # the connection is being closed
        if self._trusting:
            known = channels.known
            self._lasting = [each for each in self._lasting if str(each) not in known]
        if self._lasting:
            if not channels.may_declare(self):
                self._stop_waiting()  # the time limit is that of the other one
                return
        else:
            channels.release(self)
        left = self._lasting or self._own
        if not left:
            self._prepare(channel)
            return
        piece = self._piece(left)
        answered = partial(self._answered, left, piece, channels.known)
        for each in piece[:-1]:
            self._send(channel, each)
        self._send(channel, piece[-1], self._link.guarded(answered))

    def _piece(self, left: list[Declaration]) -> Sequence[Declaration]:
        """Declarations to send together; one that may close the connection is sent alone."""
        together = 1 if self._one_by_one else _MOST_IN_A_PIECE
        return list(itertools.takewhile(_is_safe, left[:together])) or left[:1]

    def _send(
        self,
        channel: Channel,
        declaration: Declaration,
        callback: Callable[[Any], None] | None = None,
    ) -> None:
        """:param callback: called with the broker's answer; without, there is none (``nowait``)."""
        if isinstance(declaration, Exchange):
            channel.exchange_declare(
                declaration.name,
                declaration.type,
                passive=declaration.must_exist,
                durable=True,
                arguments=dict(declaration.arguments) or None,
                callback=callback,
            )
        elif isinstance(declaration, Queue):
            channel.queue_declare(
                declaration.name,
                passive=self._is_passive(declaration),
                durable=declaration.durable,
                exclusive=declaration.exclusive,
                auto_delete=declaration.auto_delete,
                arguments=dict(declaration.arguments) or None,
                callback=callback,
            )
        else:
            bind: Callable[..., None]
            if isinstance(declaration, Unbinding):
                bind = channel.queue_unbind  # not an error if it is not bound
            else:
                bind = channel.exchange_bind if declaration.to_exchange else channel.queue_bind
            bind(
                declaration.destination,
                declaration.exchange,
                declaration.binding_key,
                callback=callback,
            )

    def _answered(
        self,
        left: list[Declaration],
        piece: Sequence[Declaration],
        known: set[str],
        _frame: object,
    ) -> None:
        if left is self._lasting:
            known.update(map(str, piece))
        del left[: len(piece)]
        self.await_answer()
        steps = len(self._topology) - len(self._lasting) - len(self._own)
        self.progress(steps)
        self._channels.progress(steps)
        self._declare()

    def _is_passive(self, queue: Queue) -> bool:
        return queue.must_exist or (queue.adopt_existing and queue.name not in self._missing)

    def _can_go_on(self, reason: BaseException) -> bool:
        """Whether the rest can be declared on another channel, after this one was closed."""
        left = self._lasting or self._own
        if not left:
            return False
        if len(self._piece(left)) > 1:
            self._one_by_one = True
            return True
        declaration, code = left[0], close_code(reason)
        if must_exist(declaration):
            # RabbitMQ 4.2.6 and 4.3.0 require configure for a passive declaration, too: then it
            # cannot be checked, and is found missing when it is used.
            if code == ACCESS_REFUSED:
                self._channels.known.add(str(declaration))
                del left[0]
                return True
            return False
        if isinstance(declaration, Exchange) and may_be_used(declaration, code, explain(reason)):
            self._channels.known.add(str(declaration))
            del left[0]
            return True
        if code != NOT_FOUND:
            return False
        if isinstance(declaration, Queue) and self._is_passive(declaration):
            self._missing.add(declaration.name)
            return True
        if isinstance(declaration, Binding | Unbinding) and self._trusting:
            self._channels.forget()  # its queue or exchange was deleted on this connection
            self._declare_all(trusting=False)
            return True
        return False

    def _error(self, reason: BaseException) -> DomainEventsError:
        code, text = close_code(reason), explain(reason)
        left = self._lasting or self._own
        if left:
            return declare_error(left[0], code, text)
        if code == ACCESS_REFUSED:
            return read_permission_error(text)
        return TopologyError(f"The broker closed the channel: {text}.")

    # --- the end ---------------------------------------------------------------------------------

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._link.cancel_call(self._deadline)
            self._deadline = None

    def _on_timeout(self) -> None:
        self._deadline = None
        if self._link.connection is self._connection:
            self._link.drop()

    def _on_close(self, _channel: Channel, reason: BaseException) -> None:
        self._stop_waiting()
        if not self._connection.is_open:
            return
        goes_on = not self._usable and self._can_go_on(reason)
        if not goes_on and close_code(reason):
            self._channels.forget()
        self._channel = None
        self._channels.release(self)
        if goes_on:
            # Not now: pika frees the number of the closed channel only after its callbacks
            # (Channel._transition_to_closed), and it may be the only one.
            self._link.call_later(0, self.begin)
        elif self._usable:
            self._closed(reason)
        else:
            self._refuse(self._error(reason), reason)

    def _refuse(self, error: DomainEventsError, reason: BaseException) -> None:
        if self._connection.is_open:
            self._link.turns.ended(self)
            self._failed(error, reason)


def _lasts(declaration: Declaration) -> bool:
    """Whether it stays until somebody deletes it by hand."""
    return isinstance(declaration, Exchange) or is_shared(declaration)


def _is_safe(declaration: Declaration) -> bool:
    """Whether the broker closes only the channel if it refuses it, so that it can be repeated."""
    return isinstance(declaration, Binding) or is_shared(declaration) or must_exist(declaration)
