"""Confirmed publishing, pipelined, over lost connections and closed channels.

Threads. Callers append to ``_waiting`` and wake the I/O thread, which alone sends from it and owns
the senders (channels) and what is in flight on them. ``_lock`` guards in each publication the step
from waiting to sent and from not done to done: a caller that gives up at its deadline must know
for sure whether its message was ever sent.

When a connection is lost, what was unconfirmed goes back to the head of ``_waiting``, in order.
When the broker closes the *channel*, it does not say over which message. Then what was in flight
is sent again one at a time, until the culprit is alone with the blame; otherwise a message that
the broker will never take would close the channel for ever, and take others with it.

When the broker *nacks*, that may be for good (a queue at its length limit) or because the channel
clings to a queue's leader that is gone: in a cluster, a channel that first used a queue during an
election is refused for as long as it lives (rabbit_fifo_client, seen on 3.10). So a nacked message
is sent again a few times, after pauses, each time on a channel opened for it, before its sender
gets the error. The main channel goes on meanwhile. When the broker confirms on the new channel
what it nacked on the main one, the new one becomes the main one, as soon as the broker has routed
what is in flight on the old one, so that nothing overtakes it; the old one is closed when all on
it is answered.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import pika
import pika.exceptions

from domain_events.broker import Publication
from domain_events.broker.rabbitmq.link import Link, is_io_thread
from domain_events.broker.rabbitmq.nodes import Nodes, close_code, explain
from domain_events.broker.rabbitmq.sending import Sender, blame, nacked, unsendable
from domain_events.broker.rabbitmq.transport import Connection
from domain_events.broker.refusals import FORBIDDEN, REFUSED, closed
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    EventNotConfirmed,
)
from domain_events.log import Log
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
# Seconds for which a nack is believed at once, after one for the same exchange and routing key
# that could not be cured.
_BELIEF = 10.0
_MOST_BELIEFS = 1000
# Channels besides the main one; with so many, none is opened for nacked messages.
_MOST_ASIDE = 4

# A broker that is short of memory reads nothing, so also no goodbye.
_GOODBYE_WHILE_BLOCKED = 0.1

# The broker's operator closes connections with this; that is nobody's fault.
_CONNECTION_FORCED = 320


class RabbitPublishing:
    """See `domain_events.broker.Publishing`."""

    def __init__(self, nodes: Nodes, declare: Topology, name: str) -> None:
        self._declare = declare
        self._link = Link(nodes, f"{name} publishing", self)
        self._closed = False  # for good, also in the child of a fork
        self.forget()

    def forget(self) -> None:
        """Be as new (at first, and in the child of a fork)."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Publication] = deque()
        self._woken = False
        self._waker = 0  # the thread that is about to wake the loop
        self._may_declare = True
        # Over what the broker has closed the connection, and until when that is believed.
        self._refusal: DomainEventsError | None = None
        self._refused_until = 0.0
        self._blocked = ""
        # How many publications are still to be sent one at a time.
        self._careful = 0
        # Until when a nack is believed, by exchange and routing key.
        self._believed: dict[tuple[str, str], float] = {}
        self._heard_at = 0.0
        self._forget_senders()

    def _forget_senders(self) -> None:
        self._opening: Sender | None = None  # it will be the main one
        self._main: Sender | None = None
        # Nacked, and when to send each again.
        self._nacked: list[tuple[float, Publication]] = []
        self._timer: Any = None
        self._fresh: Sender | None = None  # being opened for them
        # What has something in flight besides the main one, the oldest first: channels on which
        # nacked messages were sent again, and those that were the main one.
        self._aside: list[Sender] = []
        # Which of them becomes the main one, as soon as the order allows it.
        self._successor: Sender | None = None

    # --- any thread ----------------------------------------------------------------------------

    @property
    def trouble(self) -> str:
        """Why nothing goes through at the moment; empty if nothing is known."""
        if self._blocked:
            return f"{self._link.node} blocks publishers: {self._blocked}"
        return self._link.trouble

    def submit(self, publication: Publication) -> None:
        """Send this behind all before it, as soon as there is room in the window."""
        if self._closed:
            self._finish(publication, closed())
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
        with self._lock:
            if publication.done:
                return False
            publication.done = True
            publication.let_go()
            # Mostly the first one: deadlines come in the order of the publishes.
            with contextlib.suppress(ValueError):
                self._waiting.remove(publication)
            self._changed.notify_all()
        if publication.sent:
            with contextlib.suppress(BrokerUnavailable):
                self._link.wake(self._cut_if_silent)
        return True

    def close(self, timeout: float) -> None:
        """Take no more, wait for what is under way, then close."""
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
                    self._link.wake(self._cut_soon)
            self._link.close(max(1.0, deadline - time.monotonic()))
        self._woken = False  # whoever comes now is told that it is closed
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
        """Close without waiting."""
        self._closed = True
        return self._link.close_soon()

    def _under_way(self) -> list[Publication]:
        return [
            *(publication for _, publication in self._nacked.copy()),
            *(each for sender in self._senders() for each in sender.in_flight.copy().values()),
            *self._waiting.copy(),
        ]

    def _senders(self) -> list[Sender]:
        """Those that may have something in flight."""
        main = self._main
        return self._aside.copy() if main is None else [*self._aside, main]

    # --- the I/O thread: the link reports --------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        """There is a connection: open a channel on it."""
        guarded = self._link.guarded
        connection.add_on_connection_blocked_callback(guarded(self._on_blocked))
        connection.add_on_connection_unblocked_callback(guarded(self._on_unblocked))
        self._open_main()

    def lost(self, error: BaseException | None) -> None:
        """The connection is gone; what was in flight waits for the next one."""
        self._blocked = ""
        again = [publication for _, publication in self._nacked]
        in_flight = [each for sender in self._senders() for each in sender.in_flight.values()]
        if self._timer is not None:
            self._link.cancel_call(self._timer)
        self._forget_senders()
        self._take_back(error, in_flight, again)

    def refused(self, error: ConfigurationError) -> None:
        """No connection can be made: everybody who waits gets the error."""
        self._fail_all(error)

    # --- the I/O thread: channels ----------------------------------------------------------------

    def _open(self) -> Sender | None:
        connection = self._link.connection
        if connection is None or not connection.is_open:
            return None
        return Sender(self._link, connection, self._declare if self._may_declare else (), self)

    def _open_main(self) -> None:
        if self._main is not None or self._opening is not None:
            return
        if self._refusal is not None:
            if time.monotonic() < self._refused_until:
                self._fail_all(self._refusal)
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
        elif sender is self._fresh:
            self._fresh = None
            self._aside.append(sender)
            self._send_nacked(sender)

    def not_opened(self, sender: Sender, error: DomainEventsError, reason: BaseException) -> None:
        """The broker has closed a channel before it could send."""
        if self._link.connection is None:
            # The broker closed the connection over it, as it would for each event that comes.
            self._refusal, self._refused_until = error, time.monotonic() + _BELIEF
            self._fail_all(error)
            return
        main = sender is self._opening
        if main:
            self._opening = None
        else:
            self._fresh = None
        if close_code(reason) == FORBIDDEN and self._may_declare:
            # A publisher that may not configure still publishes to an exchange that exists.
            self._may_declare = False
            self._open_main()
            self._retry_later()
        elif main:
            self._fail_all(error)
        else:
            self._believe_nacks()

    def closed_by_broker(self, sender: Sender, reason: BaseException) -> None:
        """The broker has closed a channel that could send; what was in flight is sent again."""
        if sender is self._main:
            self._main = self._successor = None
        elif sender in self._aside:
            self._aside.remove(sender)
            if sender is self._successor:
                self._successor = None
        else:
            return  # closed by us
        log.warning("The broker closed the publishing channel: %s.", explain(reason))
        self._take_back(reason, list(sender.in_flight.values()))
        self._pump()

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
        main = self._main
        if main is None:
            self._link.connect()
            self._open_main()
            return
        most, in_flight, channel = self._most_in_flight(), main.in_flight, main.channel
        waiting, lock, send, now = self._waiting, self._lock, main.send, time.monotonic()
        try:
            # The window, spelled out: a call for each event is measurable.
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
                except Exception as error:  # noqa: BLE001 - whatever there is against this one
                    # It could not be put into frames; nothing of it was sent, nor will be.
                    publication.sent = again
                    self._finish(publication, unsendable(message, error))
                except BaseException:  # injected by another thread: nothing is known of this one
                    waiting.appendleft(publication)
                    raise
        finally:
            main.flush()
        if len(in_flight) >= most or main.bytes >= _MOST_BYTES_IN_FLIGHT:
            # Whoever makes room sends what waits. Until then it is in vain to wake the loop.
            self._woken = True

    def _most_in_flight(self) -> int:
        if self._blocked or self._successor is not None:
            return 0
        return 1 if self._careful else _MOST_IN_FLIGHT

    def _cut_if_silent(self) -> None:
        """A caller gave up: if there was no confirm for long, make the connection anew.

        The other end may be gone without a word; the heartbeat takes a minute or two to find
        out, a new connection milliseconds. Or what fills the window is never confirmed.
        """
        oldest = [next(iter(each.in_flight.values())) for each in self._senders() if each.in_flight]
        if not oldest or self._blocked:
            return
        since = max(self._heard_at, min(publication.sent_at for publication in oldest))
        if time.monotonic() - since > _SUSPICIOUS_SILENCE:
            self._link.cut()

    def _cut_soon(self) -> None:
        self._link.call_later(_GOODBYE_WHILE_BLOCKED, self._link.cut)

    # --- the I/O thread: answers -----------------------------------------------------------------

    def answered(self, sender: Sender, publications: list[Publication], acked: bool) -> None:
        """The broker has confirmed these, or nacked them."""
        self._heard_at = time.monotonic()
        main = sender is self._main
        if self._careful and main:
            self._careful = max(0, self._careful - len(publications))
        for publication in publications:
            if not acked:
                self._doubt(publication)
            elif publication.message.mandatory:
                self._finish(publication, sender.returned_error(publication.message))
            else:
                self._finish(publication, None)
        if main:
            self._woken = False  # before the look at who waits: who comes later wakes the loop
            if self._waiting:
                self._pump()
        else:
            if acked:
                self._succeed(sender)
            self._close_answered()

    # --- the I/O thread: what was nacked ---------------------------------------------------------

    def _doubt(self, publication: Publication) -> None:
        if publication.done:
            return  # withdrawn
        now = time.monotonic()
        message = publication.message
        address = message.exchange, message.routing_key
        if publication.nacks < len(_DOUBTS) and now >= self._believed.get(address, 0):
            self._nacked.append((now + _DOUBTS[publication.nacks], publication))
            publication.nacks += 1
            self._retry_later()
            return
        if len(self._believed) >= _MOST_BELIEFS:
            self._believed.clear()
        self._believed[address] = now + _BELIEF
        self._finish(publication, nacked(message))

    def _retry_later(self) -> None:
        """Have nacked messages sent again when the first of them is due."""
        if self._nacked and self._timer is None and self._fresh is None:
            due = min(due for due, _ in self._nacked)
            pause = max(0.0, due - time.monotonic())
            if self._blocked or len(self._aside) >= _MOST_ASIDE:
                pause = max(pause, _DOUBTS[0])
            self._timer = self._link.call_later(pause, self._retry)

    def _retry(self) -> None:
        self._timer = None
        self._nacked = [each for each in self._nacked if not each[1].done]
        self._close_answered()
        if self._blocked or len(self._aside) >= _MOST_ASIDE:
            self._retry_later()
        elif self._nacked:
            self._fresh = self._open()

    def _believe_nacks(self) -> None:
        """No channel can be opened on which nacked messages could be sent again."""
        doubted, self._nacked = self._nacked, []
        for _, publication in doubted:
            self._finish(publication, nacked(publication.message))

    def _send_nacked(self, sender: Sender) -> None:
        """On a channel opened for them: send those that are due."""
        now = time.monotonic()
        due = [publication for at, publication in self._nacked if at <= now]
        self._nacked = [each for each in self._nacked if each[0] > now]
        for publication in due:
            with self._lock:
                message = publication.message
                withdrawn = publication.done
            if not withdrawn:
                sender.send(publication, message, now)  # it has been put into frames before
        sender.flush()
        self._close_answered()
        self._retry_later()

    def _succeed(self, sender: Sender) -> None:
        """It was confirmed what others had nacked: go on with this one, if the main one is older.

        Not before the broker has routed all that the main one has in flight.
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
        self._aside.remove(new)
        self._aside.append(old)
        self._main = new
        self._close_answered()
        self._pump()

    def _close_answered(self) -> None:
        """Close the channels aside on which nobody waits for an answer any more."""
        for sender in self._aside.copy():
            answered = all(each.done for each in sender.in_flight.values())
            if answered and sender is not self._successor:
                self._aside.remove(sender)
                sender.close()

    def _take_back(
        self,
        reason: BaseException | None,
        in_flight: list[Publication],
        before: Sequence[Publication] = (),
    ) -> None:
        """A channel is gone: what was in flight waits again, in its old order."""
        self._woken = False
        code = close_code(reason)
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
            again = [each for each in (*before, *in_flight) if not each.done]
            self._waiting.extendleft(reversed(again))
        if not self._waiting:
            self._careful = 0

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

    def _finish(self, publication: Publication, error: DomainEventsError | None) -> None:
        with self._lock:
            if publication.done:
                return
            publication.error = error
            publication.done = True
            if self._closed:
                self._changed.notify_all()
        publication.on_done(publication)
