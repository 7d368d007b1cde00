"""Confirmed publishing, pipelined, over lost connections and closed channels.

Threads. Callers append to ``_waiting`` and ring; the I/O thread alone sends from it and owns the
senders (channels) and what is in flight on them. ``_lock`` guards in each publication the step
from waiting to sent and from not done to done: a caller that gives up at its deadline must know
for sure whether its message was ever sent.

When a connection is lost, unconfirmed publications go back to the head of ``_waiting``, in order.
When the broker closes the *channel*, it does not name the message. Then those in flight are sent
again one at a time, until the culprit is alone; otherwise a message that the broker never accepts
would close the channel for ever, and fail others with it.

A *nack* may be final (a queue at its length limit), or the channel may use the leader of a queue
that is gone: in a cluster, a channel that first used a queue during an election gets nacks for as
long as it lives (rabbit_fifo_client.erl, seen on 3.10). So a nacked message is sent again a few
times, after pauses, each time on a channel opened for it, before its publisher gets the error. The
main channel goes on meanwhile. When the broker confirms on the new channel what it nacked on the
main one, the new one becomes the main one, as soon as the broker has routed all in flight on the
old one, so that nothing overtakes it; the old one is closed when all on it are answered
(tests/test_nacks.py).
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import pika
import pika.exceptions

from domain_events.broker import Exchange, OnChange, Publication, ignore_change
from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.channel import Channels
from domain_events.broker.rabbitmq.doorbell import Doorbell
from domain_events.broker.rabbitmq.errors import (
    ACCESS_REFUSED,
    PRECONDITION_FAILED,
    close_code,
    closed_error,
    encode_error,
    explain,
    nacked_error,
    publish_error,
)
from domain_events.broker.rabbitmq.link import REMINDER, Link, is_io_thread
from domain_events.broker.rabbitmq.nodes import Nodes
from domain_events.broker.rabbitmq.sending import Sender
from domain_events.broker.rabbitmq.topology import Topology
from domain_events.broker.rabbitmq.transport import Connection
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    EventNotConfirmed,
)
from domain_events.log import Log
from domain_events.middleware import ConnectionState
from domain_events.process import check_fork
from domain_events.text import printable

log = Log("domain_events")

# In flight at a time. Measured: half of it costs a tenth of the speed; the bytes bound the memory.
_MOST_IN_FLIGHT = 2000
_MOST_BYTES_IN_FLIGHT = 16 * 2**20

# Seconds without a confirm while one is overdue, after which to reconnect.
_SUSPICIOUS_SILENCE = 5.0

# Seconds to wait, before each time that a nacked message is sent again.
_NACK_RETRY_DELAYS = (0.25, 0.5, 1.0)
# Seconds for which a nack is final at once, after one for the same exchange and routing key was.
_NACK_TRUST = 10.0
_MOST_TRUSTED = 1000
# Channels besides the main one; with so many, none is opened for nacked messages.
_MOST_SECONDARY = 4

# Seconds for which publishing fails at once, after the broker has closed the connection over it.
_REFUSAL_TTL = 10.0

# A broker that is short of memory reads nothing from publishers, not even connection.close.
_CLOSE_TIMEOUT_WHILE_BLOCKED = 0.1

# The code of connections closed by an operator; no message is to blame.
_CONNECTION_FORCED = 320


class Nacked:
    """Nacked publications that are to be sent again, and for which addresses a nack is final.

    Invariant: publications in here are not in flight, and were nacked at most as often as there are
    `_NACK_RETRY_DELAYS`. Other threads may `copy` it.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[float, Publication]] = []  # when each is due
        self._trusted: dict[tuple[str, str], float] = {}  # until when, by address

    def add(self, publication: Publication) -> bool:
        """Keep it, to be sent again; False when the nack is final."""
        now = time.monotonic()
        message = publication.message
        address = topology.address(message.destination, message.routing_key)
        if publication.nacks < len(_NACK_RETRY_DELAYS) and now >= self._trusted.get(address, 0):
            self._waiting.append((now + _NACK_RETRY_DELAYS[publication.nacks], publication))
            publication.nacks += 1
            return True
        if len(self._trusted) >= _MOST_TRUSTED:
            self._trusted.clear()
        self._trusted[address] = now + _NACK_TRUST
        return False

    def pause(self) -> float | None:
        """Seconds until the first one is due; None when there is none."""
        self._waiting = [each for each in self._waiting if not each[1].done]
        if not self._waiting:
            return None
        return max(0.0, min(due for due, _ in self._waiting) - time.monotonic())

    def take(self, until: float = math.inf) -> list[Publication]:
        """Take out those that are due by then."""
        due = [publication for at, publication in self._waiting if at <= until]
        self._waiting = [each for each in self._waiting if each[0] > until]
        return due

    def copy(self) -> list[Publication]:
        return [publication for _, publication in self._waiting.copy()]


class RabbitPublishing:
    """See `domain_events.broker.Publishing`."""

    def __init__(
        self,
        nodes: Nodes,
        declare: Exchange | None,
        name: str,
        on_change: OnChange = ignore_change,
    ) -> None:
        self._declare: Topology = (
            () if declare is None else [topology.Exchange(declare.name, declare.type)]
        )
        self._link = Link(nodes, f"{name} publishing", self, on_change)
        self._channels = Channels(self._link)
        self._closed = False  # for good, also in the child of a fork
        self.forget()

    def forget(self) -> None:
        """Reset all state (at first, and in the child of a fork)."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Publication] = deque()
        self._bell = Doorbell(lambda: self._link.wake(self._pump))
        self._may_declare = True
        # The error over which the broker closed the connection, and until when not to try again.
        self._refusal: tuple[DomainEventsError, float] | None = None
        self._blocked = ""
        self._blocked_since = 0.0
        # How many publications are still to be sent one at a time.
        self._one_at_a_time = 0
        self._answered_at = 0.0
        self._nacked = Nacked()
        self._forget_senders()

    def _forget_senders(self) -> None:
        self._channels.lost()
        self._opening: Sender | None = None  # it will be the main one
        self._main: Sender | None = None
        self._timer: Any = None  # when the first of the nacked ones is due
        self._retry_sender: Sender | None = None  # being opened for them
        # Other senders with publications in flight, the oldest first: those on which nacked
        # messages were sent again, and those that were the main one.
        self._secondary: list[Sender] = []
        # The one of them that becomes the main one, as soon as the order allows it.
        self._successor: Sender | None = None

    # --- any thread ----------------------------------------------------------------------------

    @property
    def trouble(self) -> str:
        """Why nothing is confirmed at the moment; empty if there is no known reason."""
        if self._blocked:
            return f"{self._link.node} blocks publishers: {self._blocked}"
        return self._link.trouble

    def silence(self) -> float:
        return self._link.silence()

    def connect(self) -> None:
        self._link.wake(self._pump)

    def submit(self, publication: Publication) -> None:
        if self._closed:
            self._finish(publication, closed_error())
            return
        if publication.awaited and is_io_thread():
            error = BrokerUnavailable(
                "Nothing can be published from a connection's own thread, by a finalizer for "
                "example. The event was not sent."
            )
            self._finish(publication, error)
            return
        # No lock: a signal handler may publish in the middle of a publish, on the same thread.
        self._waiting.append(publication)
        try:
            self._bell.ring()
        except BrokerUnavailable as error:
            self._fail_all(error)

    def withdraw(self, publication: Publication) -> bool:
        with self._lock:
            if publication.done:
                return False
            publication.done = True
            publication.detach()
            # Mostly the first one: deadlines come in the order of the publishes.
            with contextlib.suppress(ValueError):
                self._waiting.remove(publication)
            self._changed.notify_all()
        if publication.sent:
            with contextlib.suppress(BrokerUnavailable):
                self._link.wake(self._drop_if_silent)
        return True

    def close(self, timeout: float) -> None:
        check_fork()
        deadline = time.monotonic() + timeout
        self._closed = True
        if is_io_thread():
            self._link.close_soon()  # a finalizer: this thread cannot wait for itself
        else:
            try:
                self._wait_for_answers(deadline)
            except BaseException:  # Ctrl-C: not in order, but closed
                self._link.close_soon()
                raise
            if self._blocked:
                with contextlib.suppress(BrokerUnavailable):
                    self._link.wake(self._drop_soon)
            self._link.close(max(1.0, deadline - time.monotonic()))
        self._bell.answer()  # later publications get an error
        with self._lock:
            left_over = self._under_way()
            self._waiting.clear()
        for publication in left_over:
            if publication.sent:
                self._finish(publication, EventNotConfirmed("Closed before the confirm came."))
            else:
                self._finish(publication, BrokerUnavailable("Closed before it was sent."))

    def _wait_for_answers(self, deadline: float) -> None:
        with self._changed:
            for publication in self._under_way():
                left = deadline - time.monotonic()
                if not self._changed.wait_for(lambda: publication.done, left):  # noqa: B023
                    return

    def close_soon(self) -> bool:
        self._closed = True
        return self._link.close_soon()

    def _under_way(self) -> list[Publication]:
        return [
            *self._nacked.copy(),
            *(each for sender in self._senders() for each in sender.in_flight.copy().values()),
            *self._waiting.copy(),
        ]

    def _senders(self) -> list[Sender]:
        """Those that may have something in flight."""
        main = self._main
        return self._secondary.copy() if main is None else [*self._secondary, main]

    # --- the I/O thread: the link's calls --------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        """There is a connection: open a channel on it."""
        guarded = self._link.guarded
        connection.add_on_connection_blocked_callback(guarded(self._on_blocked))
        connection.add_on_connection_unblocked_callback(guarded(self._on_unblocked))
        self._open_main()

    def lost(self, error: BaseException | None) -> None:
        """The connection is gone; publications in flight wait for the next one."""
        self._blocked = ""
        nacked_before = self._nacked.take()
        in_flight = [each for sender in self._senders() for each in sender.in_flight.values()]
        if self._timer is not None:
            self._link.cancel_call(self._timer)
        self._forget_senders()
        self._resubmit(error, in_flight, nacked_before)

    def refused(self, error: ConfigurationError) -> None:
        """No connection can be made: all waiting publications fail with the error."""
        self._fail_all(error)

    # --- the I/O thread: channels ----------------------------------------------------------------

    def _open(self) -> Sender | None:
        connection = self._link.connection
        if connection is None or not connection.is_open:
            return None
        declare = self._declare if self._may_declare else ()
        return Sender(self._channels, connection, declare, self)

    def _open_main(self) -> None:
        if self._main is not None or self._opening is not None:
            return
        if self._refusal is not None:
            error, until = self._refusal
            if time.monotonic() < until:
                self._fail_all(error)
                return
            if not self._waiting:
                return
            self._refusal = None
        self._opening = self._open()

    def ready(self, sender: Sender) -> None:
        """A channel can send now."""
        if sender is self._opening:
            self._opening, self._main = None, sender
            self._pump()
        elif sender is self._retry_sender:
            self._retry_sender = None
            self._secondary.append(sender)
            self._send_nacked(sender)

    def not_opened(self, sender: Sender, error: DomainEventsError, reason: BaseException) -> None:
        """The broker has closed a channel before it could send."""
        if self._link.connection is None:
            # The broker closed the connection over it, as it would for each further event.
            self._refusal = error, time.monotonic() + _REFUSAL_TTL
            self._fail_all(error)
            return
        main = sender is self._opening
        if main:
            self._opening = None
        else:
            self._retry_sender = None
        if close_code(reason) == ACCESS_REFUSED and self._may_declare:
            # A publisher that may not configure still publishes to an exchange that exists.
            self._may_declare = False
            self._open_main()
            self._retry_later()
        elif main:
            self._fail_all(error)
        else:
            self._accept_nacks()

    def closed_by_broker(self, sender: Sender, reason: BaseException) -> None:
        """The broker has closed a channel; publications in flight on it are sent again."""
        if sender is self._main:
            self._main = self._successor = None
        elif sender in self._secondary:
            self._secondary.remove(sender)
            if sender is self._successor:
                self._successor = None
        else:
            return  # closed by us
        log.warning("The broker closed the publishing channel: %s.", explain(reason))
        self._resubmit(reason, list(sender.in_flight.values()))
        self._pump()

    def _on_blocked(self, _connection: object, frame: pika.frame.Method[Any]) -> None:
        self._blocked = printable(getattr(frame.method, "reason", "")) or "out of resources"
        log.warning("%s blocks publishers: %s.", self._link.node, self._blocked)
        self._blocked_since = since = time.monotonic()
        self._link.call_later(REMINDER, partial(self._remind, since))
        self._link.report(ConnectionState.BLOCKED, self._blocked)

    def _on_unblocked(self, _connection: object, _frame: object) -> None:
        self._blocked = ""
        took = time.monotonic() - self._blocked_since
        log.warning("%s no longer blocks publishers, after %.1f s.", self._link.node, took)
        self._link.report(ConnectionState.UNBLOCKED)
        self._pump()

    def _remind(self, since: float) -> None:
        """Log again, every few minutes, that publishers are blocked."""
        if self._blocked and self._blocked_since == since:
            node, seconds = self._link.node, time.monotonic() - since
            log.warning("%s blocks publishers for %.0f s now: %s.", node, seconds, self._blocked)
            self._link.call_later(REMINDER, partial(self._remind, since))

    # --- the I/O thread: sending -----------------------------------------------------------------

    def _pump(self) -> None:
        """Send waiting publications, as far as there is room in the window."""
        self._bell.answer()
        main = self._main
        if main is None:
            self._link.connect()
            self._open_main()
            return
        most, in_flight, channel = self._most_in_flight(), main.in_flight, main.channel
        waiting, lock, send, now = self._waiting, self._lock, main.send, time.monotonic()
        try:
            # The window is checked inline: a call for each event is measurable.
            while (
                waiting
                and len(in_flight) < most
                and main.bytes < _MOST_BYTES_IN_FLIGHT
                and channel.is_open
            ):
                with lock:
                    if not waiting:
                        break  # it was withdrawn just now
                    publication = waiting.popleft()
                    if publication.done:
                        continue
                    again = publication.sent
                    publication.sent = True
                    message = publication.message
                try:
                    send(publication, message, now)
                except Exception as error:  # noqa: BLE001 - whatever is wrong with this one
                    # It cannot be encoded; nothing of it was sent, nor will be.
                    publication.sent = again
                    self._finish(publication, encode_error(message, error))
                except BaseException:  # injected by another thread: it may have been sent or not
                    waiting.appendleft(publication)
                    raise
        finally:
            main.flush()
        if len(in_flight) >= most or main.bytes >= _MOST_BYTES_IN_FLIGHT:
            self._bell.mute()  # whatever frees window space also sends waiting publications

    def _most_in_flight(self) -> int:
        if self._blocked or self._successor is not None:
            return 0
        return 1 if self._one_at_a_time else _MOST_IN_FLIGHT

    def _drop_if_silent(self) -> None:
        """A caller gave up: if there was no confirm for long, reconnect.

        The other end may be gone without closing the connection; heartbeats take a minute or two to
        detect that, a new connection milliseconds. Or a full window is never confirmed.
        """
        oldest = [next(iter(each.in_flight.values())) for each in self._senders() if each.in_flight]
        if not oldest or self._blocked:
            return
        since = max(self._answered_at, min(publication.sent_at for publication in oldest))
        if time.monotonic() - since > _SUSPICIOUS_SILENCE:
            self._link.drop()

    def _drop_soon(self) -> None:
        self._link.call_later(_CLOSE_TIMEOUT_WHILE_BLOCKED, self._link.drop)

    # --- the I/O thread: answers -----------------------------------------------------------------

    def answered(self, sender: Sender, publications: list[Publication], acked: bool) -> None:
        """The broker has confirmed these, or nacked them."""
        self._answered_at = time.monotonic()
        main = sender is self._main
        if self._one_at_a_time and main:
            self._one_at_a_time = max(0, self._one_at_a_time - len(publications))
        for publication in publications:
            if not acked:
                self._on_nack(publication)
            elif publication.message.mandatory:
                self._finish(publication, sender.returned_error(publication.message))
            else:
                self._finish(publication, None)
        if main:
            self._bell.answer()  # before `_waiting` is checked: later publications ring
            if self._waiting:
                self._pump()
        else:
            if acked:
                self._succeed(sender)
            self._close_answered()

    # --- the I/O thread: nacked publications -----------------------------------------------------

    def _on_nack(self, publication: Publication) -> None:
        if publication.done:
            return  # withdrawn
        if self._nacked.add(publication):
            self._retry_later()
        else:
            self._finish(publication, nacked_error(publication.message))

    def _retry_later(self) -> None:
        """Schedule the next sending of nacked messages, for when the first of them is due."""
        if self._timer is None and self._retry_sender is None:
            pause = self._nacked.pause()
            if pause is not None:
                if not self._may_open_secondary():
                    pause = max(pause, _NACK_RETRY_DELAYS[0])
                self._timer = self._link.call_later(pause, self._retry)

    def _retry(self) -> None:
        self._timer = None
        self._close_answered()
        if not self._may_open_secondary():
            self._retry_later()
        elif self._nacked.pause() is not None:
            self._retry_sender = self._open()

    def _may_open_secondary(self) -> bool:
        return not self._blocked and len(self._secondary) < _MOST_SECONDARY

    def _accept_nacks(self) -> None:
        """Fail all nacked messages: no channel can be opened to send them again on."""
        for publication in self._nacked.take():
            self._finish(publication, nacked_error(publication.message))

    def _send_nacked(self, sender: Sender) -> None:
        """On a channel opened for them: send those that are due."""
        now = time.monotonic()
        for publication in self._nacked.take(now):
            with self._lock:
                message = publication.message
                withdrawn = publication.done
            if not withdrawn:
                sender.send(publication, message, now)  # it has been encoded before
        sender.flush()
        self._close_answered()
        self._retry_later()

    def _succeed(self, sender: Sender) -> None:
        """This sender gets confirms where others got nacks: switch to it, if it is newer.

        Not before the broker has routed all that are in flight on the main one.
        """
        main = self._main
        if (
            main is None
            or not main.channel.is_open
            or self._successor
            or sender.number < main.number
        ):
            return
        self._successor = sender
        main.call_when_routed(partial(self._switch, main, sender))

    def _switch(self, old: Sender, new: Sender) -> None:
        if self._successor is not new or self._main is not old:
            return  # the broker has closed one of them meanwhile
        self._successor = None
        self._secondary.remove(new)
        self._secondary.append(old)
        self._main = new
        self._close_answered()
        self._pump()

    def _close_answered(self) -> None:
        """Close the secondary channels on which nothing awaits an answer any more."""
        for sender in self._secondary.copy():
            answered = all(each.done for each in sender.in_flight.values())
            if answered and sender is not self._successor:
                self._secondary.remove(sender)
                sender.close()

    def _resubmit(
        self,
        reason: BaseException | None,
        in_flight: list[Publication],
        before: Sequence[Publication] = (),
    ) -> None:
        """A channel is gone: publications in flight on it wait again, in their old order."""
        self._bell.answer()
        code = close_code(reason)
        if code not in (0, _CONNECTION_FORCED) and in_flight:
            if len(in_flight) == 1:
                culprit = in_flight[0]
                culprit.channel_errors += 1
                # A missing exchange is declared again with the next channel: one more chance.
                if culprit.channel_errors > 1 or code in (ACCESS_REFUSED, PRECONDITION_FAILED):
                    self._finish(culprit, publish_error(culprit.message, code, reason))
                    self._one_at_a_time = max(0, self._one_at_a_time - 1)
            else:
                self._one_at_a_time = max(self._one_at_a_time, len(in_flight))
        with self._lock:
            again = [each for each in (*before, *in_flight) if not each.done]
            self._waiting.extendleft(reversed(again))
        if not self._waiting:
            self._one_at_a_time = 0

    def _fail_all(self, error: DomainEventsError) -> None:
        self._bell.answer()
        while True:
            try:
                publication = self._waiting.popleft()
            except IndexError:
                break
            kind = EventNotConfirmed if publication.sent else type(error)
            fresh = kind(*error.args)  # an exception raised in two threads mixes their tracebacks
            fresh.__cause__ = error.__cause__
            self._finish(publication, fresh)

    def _finish(self, publication: Publication, error: DomainEventsError | None) -> None:
        with self._lock:
            if publication.done:
                return
            publication.error = error
            publication.done = True
            if self._closed:
                self._changed.notify_all()
        publication.on_done(publication)
