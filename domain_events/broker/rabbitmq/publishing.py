"""Confirmed publishing, pipelined, over lost connections and closed channels.

Threads. Callers append to ``_waiting`` and wake the I/O thread, which alone takes from it and owns
the channel, the delivery tags and ``_unconfirmed``. ``_lock`` guards in each publication the step
from waiting to sent and from not done to done: a caller that gives up at its deadline must know
for sure whether its message was ever sent.

When a connection is lost, what was unconfirmed goes back to the head of ``_waiting``, in order.
When the broker closes the *channel*, it does not say over which message. Then what was in flight
is sent again one at a time, until the culprit is alone with the blame; otherwise a message that
the broker will never take would close the channel for ever, and take others with it.

When the broker *nacks*, that may be for good (a queue at its length limit) or because the channel
clings to a queue's leader that is gone: in a cluster, a channel that first used a queue during an
election is refused for as long as it lives (rabbit_fifo_client, seen on 3.10). So a nacked message
is sent again a few times, each time on a new channel, before its sender is told.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter, deque
from typing import Any

import pika
from pika.channel import Channel
from pika.spec import Basic

from domain_events.broker import Publication
from domain_events.broker.rabbitmq.link import Link, is_io_thread
from domain_events.broker.rabbitmq.nodes import Nodes, close_code, explain
from domain_events.broker.rabbitmq.opening import Opening
from domain_events.broker.rabbitmq.sending import blame, nacked, properties, unsendable
from domain_events.broker.rabbitmq.stream import Connection, Stream
from domain_events.broker.rabbitmq.wire import Writer
from domain_events.broker.refusals import FORBIDDEN, REFUSED, unroutable
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    EventNotConfirmed,
)
from domain_events.log import Log
from domain_events.message import Message
from domain_events.process import check_fork
from domain_events.text import printable
from domain_events.topology import Topology

log = Log("domain_events")

# In flight at a time. Measured: half of it costs a tenth of the speed; the bytes bound the memory.
_MOST_IN_FLIGHT = 2000
_MOST_BYTES_IN_FLIGHT = 16 * 2**20

# Seconds without a confirm while one is overdue, after which the connection is made anew.
_SUSPICIOUS_SILENCE = 5.0

# Seconds to wait, before each time that a nacked message is sent again.
_DOUBTS = (0.25, 0.5, 1.0)
# Seconds for which a nack is believed at once after one that could not be cured, and a refusal
# over which the broker closed the connection.
_BELIEF = 10.0

# The broker's operator closes connections with this; that is nobody's fault.
_CONNECTION_FORCED = 320


class RabbitPublishing:
    """See `domain_events.broker.Publishing`."""

    def __init__(self, nodes: Nodes, declare: Topology, name: str) -> None:
        self._declare = declare
        self._link = Link(nodes, f"{name} publishing", self)
        self.forget()

    def forget(self) -> None:
        """Be as new (at first, and in the child of a fork)."""
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._waiting: deque[Publication] = deque()
        self._woken = False
        self._waker = 0  # the thread that is about to wake the loop
        self._channel: Channel | None = None
        self._stream: Stream
        self._writer: Writer
        self._opening: Opening | None = None
        self._may_declare = True
        self._refusal: DomainEventsError | None = None
        self._refused_until = 0.0
        self._blocked = ""
        self._forget_channel()
        # How many publications are still to be sent one at a time.
        self._careful = 0
        # Nacked, and to be sent again on a new channel when this one has nothing in flight.
        self._doubted: list[Publication] = []
        self._renewing = False
        self._believe_until = 0.0
        self._heard_at = 0.0

    def _forget_channel(self) -> None:
        self._channel = None
        self._opening = None
        self._current: Opening | None = None
        self._unconfirmed: dict[int, Publication] = {}
        self._next_tag = 1
        self._bytes = 0
        self._returned: Counter[tuple[str | None, str | None, str | None]] = Counter()

    # --- any thread ----------------------------------------------------------------------------

    @property
    def trouble(self) -> str:
        """Why nothing goes through at the moment; empty if nothing is known."""
        if self._blocked:
            return f"{self._link.node} blocks publishers: {self._blocked}"
        return self._link.trouble

    def submit(self, publication: Publication) -> None:
        """Send this behind all before it, as soon as there is room in the window."""
        check_fork()
        if is_io_thread():
            error = BrokerUnavailable(
                "Nothing can be published from a connection's own thread, by a finalizer for "
                "example. The event was not sent."
            )
            self._finish(publication, error)
            return
        # No lock: a signal handler may publish in the middle of a publish, on the same thread.
        self._waiting.append(publication)
        # If it is this very thread that is about to wake the loop, then it was interrupted, and
        # will not get to it before this publication's fate is known.
        this_thread = threading.get_ident()
        if self._woken and self._waker != this_thread:
            return
        try:
            self._waker = this_thread
            self._woken = True
            self._link.wake(self._pump)
            self._waker = 0
        except BrokerUnavailable as error:
            self._woken = False
            self._fail_all(error)
        except BaseException:
            # A signal handler that raises. Once too often is harmless, once too seldom is not.
            self._woken = False
            raise

    def withdraw(self, publication: Publication) -> bool:
        """Give a publication up; ``publication.sent`` is then final. False: it is done already."""
        check_fork()
        with self._lock:
            if publication.done:
                return False
            publication.done = True
            self._idle.notify_all()
        with contextlib.suppress(BrokerUnavailable):
            self._link.wake(self._cut_if_silent)
        return True

    def close(self, timeout: float) -> None:
        """Wait for what is under way, then close."""
        check_fork()
        deadline = time.monotonic() + timeout
        with self._idle:
            self._idle.wait_for(
                lambda: not any(not p.done for p in self._outstanding()),
                0 if is_io_thread() else timeout,
            )
        self._link.close(max(1.0, deadline - time.monotonic()))
        self._woken = False  # whoever comes now is told that it is closed
        with self._lock:
            left = self._outstanding()
            self._waiting.clear()
        for publication in left:
            if publication.sent:
                self._finish(publication, EventNotConfirmed("Closed before the confirm came."))
            else:
                self._finish(publication, BrokerUnavailable("Closed before it was sent."))

    def _outstanding(self) -> list[Publication]:
        with self._lock:
            return [*self._doubted, *self._unconfirmed.copy().values(), *self._waiting]

    # --- the I/O thread: the link tells ----------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        """There is a connection: open a channel on it."""
        guarded = self._link.guarded
        connection.add_on_connection_blocked_callback(guarded(self._on_blocked))
        connection.add_on_connection_unblocked_callback(guarded(self._on_unblocked))
        self._open_channel()

    def lost(self, error: BaseException | None) -> None:
        """The connection is gone; what was in flight waits for the next one."""
        self._blocked = ""
        self._take_back(error)

    def refused(self, error: ConfigurationError) -> None:
        """No connection can be made: everybody who waits is told."""
        self._fail_all(error)

    # --- the I/O thread: the channel -------------------------------------------------------------

    def _open_channel(self) -> None:
        connection = self._link.connection
        if connection is None or not connection.is_open or self._opening or self._channel:
            return
        if self._refusal is not None:
            if time.monotonic() < self._refused_until:
                self._fail_all(self._refusal)
                return
            if not self._waiting:
                return
            self._refusal = None
        guarded = self._link.guarded

        def select(channel: Channel) -> None:
            channel.add_on_return_callback(guarded(self._on_return))
            connection.stream.hear_confirms(channel.channel_number, guarded(self._on_confirm))
            # pika wants to tell of confirms, too, but hears of none.
            channel.confirm_delivery(
                lambda _frame: None, callback=guarded(lambda _frame: ready(channel))
            )

        def ready(channel: Channel) -> None:
            opening.usable()
            self._forget_channel()
            self._channel = channel
            self._stream = connection.stream
            self._writer = Writer(channel.channel_number)
            self._current = opening
            self._pump()

        opening = self._opening = Opening(
            self._link,
            connection,
            self._declare if self._may_declare else (),
            prepare=select,
            failed=self._not_opened,
            closed=lambda reason: self._channel_closed(opening, reason),
        )

    def _not_opened(self, error: DomainEventsError, reason: BaseException) -> None:
        self._opening = None
        if self._link.connection is None:
            # The broker closed the connection over it: each event that comes would have it do so.
            self._refusal, self._refused_until = error, time.monotonic() + _BELIEF
        if close_code(reason) == FORBIDDEN and self._may_declare:
            # A publisher that may not configure still publishes to an exchange that exists.
            self._may_declare = False
            self._open_channel()
            return
        self._fail_all(error)

    def _channel_closed(self, opening: Opening, reason: BaseException) -> None:
        if opening is not self._current:
            return  # closed by us, to go on with a new one
        log.warning("The broker closed the publishing channel: %s.", explain(reason))
        self._take_back(reason)
        self._open_channel()

    def _on_blocked(self, _connection: object, frame: pika.frame.Method[Any]) -> None:
        self._blocked = printable(getattr(frame.method, "reason", "")) or "out of resources"
        log.warning("%s blocks publishers: %s.", self._link.node, self._blocked)

    def _on_unblocked(self, _connection: object, _frame: object) -> None:
        self._blocked = ""
        log.warning("%s takes events again.", self._link.node)
        self._pump()

    # --- the I/O thread: sending -----------------------------------------------------------------

    def _pump(self) -> None:
        """Send what waits, as far as the window goes."""
        self._woken = False
        channel = self._channel
        if channel is None:
            self._link.connect()
            if not self._renewing:
                self._open_channel()
            return
        try:
            self._send(channel)
        finally:
            self._stream.put_out()
        if not self._has_room():
            # What makes room looks for who waits. Until then it is in vain to wake the loop.
            self._woken = True

    def _send(self, channel: Channel) -> None:
        while self._waiting and self._has_room() and channel.is_open:
            with self._lock:
                publication = self._waiting.popleft()
                if publication.done:
                    continue
                again = publication.sent
                publication.sent = True
            message = publication.message
            try:
                frames = self._writer.frames(message)
                if frames is None:
                    channel.basic_publish(
                        message.exchange,
                        message.routing_key,
                        message.body,
                        properties(message),
                        message.mandatory,
                    )
                else:
                    self._stream.put(frames)
            except Exception as error:  # noqa: BLE001 - whatever there is against this one
                # It could not be put into frames; nothing of it was sent, nor will be.
                publication.sent = again
                self._finish(publication, unsendable(message, error))
                continue
            except BaseException:  # injected by another thread: nothing is known of this one
                self._waiting.appendleft(publication)
                raise
            # Only now, so that the tags stay those that the broker counts.
            publication.sent_at = time.monotonic()
            self._unconfirmed[self._next_tag] = publication
            self._next_tag += 1
            self._bytes += len(message.body)

    def _has_room(self) -> bool:
        return (
            len(self._unconfirmed) < (1 if self._careful else _MOST_IN_FLIGHT)
            and self._bytes < _MOST_BYTES_IN_FLIGHT
            and not self._blocked
            and not self._renewing
        )

    def _cut_if_silent(self) -> None:
        """A caller gave up: if there was no confirm for long, make the connection anew.

        The other end may be gone without a word; the heartbeat takes a minute or two to find
        out, a new connection milliseconds. Or what fills the window is never confirmed.
        """
        oldest = next(iter(self._unconfirmed.values()), None)
        if oldest is None or self._blocked:
            return
        if time.monotonic() - max(self._heard_at, oldest.sent_at) > _SUSPICIOUS_SILENCE:
            self._link.cut()

    def _on_confirm(self, tag: int, multiple: bool, confirmed: bool) -> None:
        self._heard_at = time.monotonic()
        tags = list(itertools.takewhile(tag.__ge__, self._unconfirmed)) if multiple else [tag]
        for each in tags:
            publication = self._unconfirmed.pop(each, None)
            if publication is not None:
                self._bytes -= len(publication.message.body)
                if self._careful:
                    self._careful -= 1
                if confirmed:
                    self._finish(publication, self._returned_error(publication.message))
                else:
                    self._nacked(publication)
        self._woken = False  # before the look at who waits: who comes later wakes the loop
        if self._renewing and not self._unconfirmed:
            self._renew()
        elif self._waiting:
            self._pump()
        else:
            self._tell_idle()

    def _nacked(self, publication: Publication) -> None:
        now = time.monotonic()
        if now >= self._believe_until and publication.nacks < len(_DOUBTS):
            publication.nacks += 1
            self._doubted.append(publication)
            self._renewing = True
            return
        self._believe_until = now + _BELIEF
        self._finish(publication, nacked(publication.message))

    def _renew(self) -> None:
        """Nothing is in flight on this channel: go on with another, after a pause."""
        old = self._channel
        self._forget_channel()
        if old is not None and old.is_open:
            old.close()
        pause = _DOUBTS[max(publication.nacks for publication in self._doubted) - 1]
        self._link.call_later(pause, self._renewed)

    def _renewed(self) -> None:
        self._renewing = False
        with self._lock:
            self._waiting.extendleft(reversed(self._doubted))
            self._doubted.clear()
        self._pump()

    def _returned_error(self, message: Message) -> DomainEventsError | None:
        if message.mandatory and self._returned:
            # Returns come before the confirm of what they return.
            key = (message.message_id, message.exchange, message.routing_key)
            if self._returned[key] > 0:
                self._returned[key] -= 1
                self._returned += Counter()  # drops what is back at zero
                return unroutable(message)
        return None

    def _on_return(
        self,
        _channel: Channel,
        method: Basic.Return,
        properties: pika.BasicProperties,
        _body: bytes,
    ) -> None:
        self._returned[properties.message_id, method.exchange, method.routing_key] += 1

    def _take_back(self, reason: BaseException | None) -> None:
        """The channel is gone: what was in flight waits again, in its old order."""
        in_flight = list(self._unconfirmed.values())
        doubted = self._doubted.copy()
        self._doubted.clear()
        self._renewing = False
        code = close_code(reason)
        self._forget_channel()
        self._woken = False
        if code not in (0, _CONNECTION_FORCED) and in_flight:
            if len(in_flight) == 1:
                culprit = in_flight[0]
                culprit.strikes += 1
                # A missing exchange is declared again with the next channel: one more chance.
                if culprit.strikes > 1 or code in (FORBIDDEN, REFUSED):
                    self._finish(culprit, blame(culprit.message, code, reason))
                    self._careful = max(0, self._careful - 1)
            else:
                self._careful = max(self._careful, len(in_flight))
        with self._lock:
            again = [each for each in (*doubted, *in_flight) if not each.done]
            self._waiting.extendleft(reversed(again))
        if not self._waiting:
            self._careful = 0
            self._tell_idle()

    def _fail_all(self, error: DomainEventsError) -> None:
        self._woken = False
        while True:
            try:
                publication = self._waiting.popleft()
            except IndexError:
                break
            kind = EventNotConfirmed if publication.sent else type(error)
            fresh = kind(*error.args)  # an exception raised in two threads mixes their tracebacks
            fresh.__cause__ = error.__cause__
            self._finish(publication, fresh)
        self._tell_idle()

    def _finish(self, publication: Publication, error: DomainEventsError | None) -> None:
        with self._lock:
            if publication.done:
                return
            publication.error = error
            publication.done = True
        publication.on_done(publication)

    def _tell_idle(self) -> None:
        with self._idle:
            self._idle.notify_all()
