"""One ``start_consuming``: an inbox of deliveries, threads that handle them, an orderly end.

Threads. The broker's I/O thread puts deliveries into the inbox; workers take them out, and handle
and settle them. With one worker, that is the thread that called ``start_consuming``, to which
all other state of a `Worker` belongs; ``_stopping`` is a flag that any thread may set. Each worker
writes what it does into ``_running``, ``_last_event`` and ``_handled``, each entry as a whole. Any
thread reads them for `Subscriber.health`, without a lock that a worker may hold.

A signal handler must not take a lock or call pika; it sets the flag and puts a wake-up into the
inbox, which is a `SimpleQueue` for that reason.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

from domain_events import message as messages
from domain_events.broker import Consumer, Consuming, Settlement
from domain_events.errors import InvalidEvent
from domain_events.forwarding import Forwarder
from domain_events.handling import Subscription
from domain_events.health import RunningHandler
from domain_events.log import Log, about, in_background
from domain_events.message import Delivery
from domain_events.outcomes import Delivered, ends_the_process
from domain_events.text import printable

log = Log("domain_events")

_PAUSE_AFTER_INTERNAL_ERROR = 5.0

# How long the broker may take to cancel the consumers.
_CANCEL_TIMEOUT = 5.0
# How long it may take to confirm what was forwarded: before they are cancelled, and after it.
_FORWARD_TIMEOUTS = 2.0, 8.0

# Why it has stopped, for the log.
_TIMEOUT = "the timeout"


class Work(NamedTuple):
    """A delivery to be handled; ``key`` where events of one object must keep their order."""

    subscription: Subscription
    delivery: Delivery
    consumer: Consumer
    key: str | None = None


class Worker:
    """One `Subscriber.start_consuming`, from its beginning to its end.

    :param threads: how many handlers run at the same time.
    :param timeout: seconds after which it ends by itself, if not None.
    """

    def __init__(
        self, consuming: Consuming, forwarder: Forwarder, threads: int, timeout: float | None
    ) -> None:
        self._consuming = consuming
        self._forwarder = forwarder
        self._threads = threads
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._stopping = False
        # Why, and since when; logged by `_log_stop`.
        self._reason, self._stopped_at = "", 0.0
        # None is a wake-up: check the flag.
        self._inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._keyed = KeyedQueues(self._inbox)
        self._consumers: dict[str, Consumer] = {}  # by the subscriber's name
        # By thread: what is being handled there, and since when on the monotonic clock.
        self._running: dict[int, tuple[Work, float]] = {}
        # By the subscriber's name: when a handler was last called.
        self._last_event: dict[str, float] = {}
        # By thread: since when that handler runs over whose limit a warning was logged.
        self._warned: dict[int, float] = {}
        # By thread: how many were handled.
        self._handled: dict[int, int] = {}
        self._warning = threading.Lock()
        # When more wait in the inbox, some are stale: their connection is gone.
        self._most_waiting = 0
        self._interruption: BaseException | None = None

    @property
    def stopping(self) -> bool:
        """Whether it takes no more events."""
        return self._stopping

    def stop(self, reason: str) -> None:
        """Any thread, a handler, a signal handler: take no more events, then end.

        :param reason: for the log; that of the first call counts.
        """
        if not self._stopping:
            self._reason, self._stopped_at = reason, time.monotonic()
        self._stopping = True
        for _ in range(self._threads):
            self._inbox.put(None)
        self._ended.put(None)

    def consume(self, subscription: Subscription) -> None:
        """Start to receive for one subscription."""
        prefetch_count = subscription.options.prefetch(self._threads)
        self._most_waiting += 2 * prefetch_count
        deliver = partial(self._deliver, subscription)
        self._consumers[subscription.options.name] = self._consuming.consume(
            subscription.options.queue, prefetch_count, deliver
        )

    def work(self, subscriptions: Sequence[Subscription]) -> None:
        """Handle deliveries until stopped; then requeue those not begun, and finish forwarding.

        :raises BaseException: raised by a handler to end the process; why the connection gave up.
        """
        self._forwarder.begin()
        try:
            for subscription in subscriptions:
                self.consume(subscription)
            self.receive()
        finally:
            before, after = _FORWARD_TIMEOUTS
            # Acks go before the cancel: see "When acks are forgotten" in rabbitmq/consumer.py.
            self._forwarder.wait(before)
            self._give_back()
            if not self._forwarder.end(after):
                log.warning("Unconfirmed retries or dead letters will be redelivered.")
        failure = self._consuming.failure()
        if failure is not None:
            raise failure

    def receive(self) -> None:
        """Handle deliveries as they come, until stopped."""
        if self._threads > 1:
            self._work_in_threads()
            return
        try:
            self._work(self._deadline)
        except BaseException as error:
            self.stop(type(error).__name__)
            raise
        finally:
            self._log_stop()

    def next_waiting(self) -> Work | None:
        """The next delivery that has arrived; None if none waits."""
        while True:
            try:
                work = self._inbox.get_nowait()
            except queue.Empty:
                return None
            if work is not None:
                return work

    def _work_in_threads(self) -> None:
        threads = [
            # In the context of the caller, as with one worker.
            threading.Thread(
                target=copy_context().run,
                args=(self._run_thread,),
                name=f"domain-events-worker-{n}",
                daemon=True,
            )
            for n in range(1, self._threads + 1)
        ]
        try:
            for thread in threads:
                thread.start()
            while not self._stopping:
                self._ended.get(timeout=_left(self._deadline))
        except queue.Empty:
            self.stop(_TIMEOUT)
        except BaseException as error:
            self.stop(type(error).__name__)
            raise
        finally:
            self._log_stop()
        for thread in threads:
            thread.join()
        if self._interruption is not None:
            raise self._interruption

    def _give_back(self) -> None:
        """Stop receiving, and requeue deliveries that were not begun."""
        self._stopping = True
        deadline = time.monotonic() + _CANCEL_TIMEOUT
        for consumer in self.consumers().values():
            consumer.stop(max(0.0, deadline - time.monotonic()))
        for work in self._left_over():
            if work.consumer.is_current(work.delivery):
                work.subscription.give_back(work.delivery, work.consumer)
        for consumer in self.consumers().values():
            consumer.flush()

    def _left_over(self) -> Iterator[Work]:
        while (work := self.next_waiting()) is not None:
            yield work
        yield from self._keyed.left_over()

    def _deliver(self, subscription: Subscription, delivery: Delivery, consumer: Consumer) -> None:
        """On the I/O thread: a delivery has arrived."""
        if self._inbox.qsize() + self._keyed.waiting > self._most_waiting:
            self._drop_stale()
        work = Work(subscription, delivery, consumer)
        if self._threads > 1 and subscription.options.ordered:
            self._keyed.put(work)
        else:
            self._inbox.put(work)

    def _drop_stale(self) -> None:
        """Drop deliveries of lost connections, which were requeued; the others keep their order.

        While a handler runs for hours and the connection is lost repeatedly, they would pile up.
        """
        for _ in range(self._inbox.qsize()):
            try:
                work = self._inbox.get_nowait()
            except queue.Empty:
                break
            if work is None or work.key is not None or _is_current(work):
                self._inbox.put(work)
        self._keyed.drop_stale()

    def _run_thread(self) -> None:
        try:
            self._work(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            # sys.exit() in a handler, for example: it ends the run, as it would with one worker.
            self._interruption = error
            self.stop(type(error).__name__)

    def _work(self, deadline: float | None) -> None:
        inbox = self._inbox
        last: Consumer | None = None
        try:
            while True:
                try:
                    work = inbox.get(timeout=_left(deadline))
                except queue.Empty:
                    self.stop(_TIMEOUT)
                    return
                if self._stopping:
                    if work is not None:
                        inbox.put(work)  # `give_back` finds it there
                    return
                if work is None:
                    continue
                if last is not None and work.consumer is not last:
                    last.flush()
                last = work.consumer
                self.handle(work)
                if inbox.empty():
                    last.flush()
                if deadline is not None and time.monotonic() >= deadline:
                    self.stop(_TIMEOUT)
                    return
        finally:
            if last is not None:
                last.flush()

    def _log_stop(self) -> None:
        # Here and not in `stop`: a signal handler must not take the locks of logging.
        ago = time.monotonic() - self._stopped_at
        log.info(
            "%s: stopping on %s%s; handlers still running: %d.",
            ", ".join(self._consumers),
            self._reason,
            f", {ago:.1f} s ago" if ago >= 0.1 else "",
            len(self._running),
        )

    def handle(self, work: Work) -> Delivered | None:
        """Have a delivery handled; None if it is not current any more."""
        delivered: Delivered | None = None
        me = threading.get_ident()
        try:
            if _is_current(work):
                now = time.monotonic()
                self._running[me] = work, now
                self._last_event[work.subscription.options.name] = now
                delivered = work.subscription.handle(work.delivery, work.consumer)
                self._handled[me] = self._handled.get(me, 0) + 1
        except Exception:
            # A bug of this library, since errors of the handler are handled. One such message must
            # not stop the subscriber, nor be lost, nor be redelivered without a pause.
            work.consumer.repair(_PAUSE_AFTER_INTERNAL_ERROR, partial(_fail, work))
            named = messages.about(work.delivery, work.subscription.options.name)
            log.exception(
                "Internal error in %s, while handling %s %s; it is requeued.",
                *named.values(),
                about=named,
            )
        finally:
            self._running.pop(me, None)
            if work.key is not None:
                self._keyed.done(work.key)
        try:
            if delivered is None or delivered.error is None:
                return delivered
            if ends_the_process(delivered.error):
                raise delivered.error
            return delivered
        finally:
            del delivered  # this frame called those in its error's traceback

    # --- health, for any thread ------------------------------------------------------------------

    @property
    def handled(self) -> int:
        """How many deliveries were handled, whatever became of them."""
        return sum(self._handled.copy().values())

    def consumers(self) -> dict[str, Consumer]:
        """The consumers, by the subscribers' names."""
        return self._consumers.copy()

    def last_event_at(self, name: str) -> float | None:
        """When a handler of this subscriber was last called, in Unix seconds."""
        at = self._last_event.get(name)
        return None if at is None else time.time() - (time.monotonic() - at)

    def handlers(self) -> tuple[RunningHandler, ...]:
        """The handlers that run, the oldest first; warns once of each that is over its limit."""
        running = sorted(self._running.copy().items(), key=lambda each: each[1][1])
        now = time.monotonic()
        handlers = []
        for thread, (work, since) in running:
            handler = _running_handler(work, now - since)
            handlers.append(handler)
            if handler.is_over_limit:
                self._warn_once(thread, since, handler)
        return tuple(handlers)

    def _warn_once(self, thread: int, since: float, handler: RunningHandler) -> None:
        if not self._warning.acquire(blocking=False):
            return  # another thread is about to warn
        try:
            if self._warned.get(thread) == since:
                return
            self._warned[thread] = since
        finally:
            self._warning.release()
        with in_background():  # the handler may hang in the application's logging
            log.warning(
                "%s. It goes on; this process is not alive until it returns.",
                handler,
                about=about(handler.subscriber, handler.routing_key, handler.event_id),
            )


def _running_handler(work: Work, seconds: float) -> RunningHandler:
    options = work.subscription.options
    name, routing_key, event_id = messages.about(work.delivery, options.name).values()
    if event_id is None:  # of domain-event-broker, which only writes it into the envelope
        with suppress(InvalidEvent, RecursionError):
            event_id = printable(messages.to_event(work.delivery).uuid_string)
    return RunningHandler(name or "", routing_key or "", event_id, seconds, options.handler_limit)


class KeyedQueues:
    """Events of one object in sequence, of different objects in parallel.

    The first event of an object goes to the inbox; the next ones wait in the object's queue,
    and each goes to the inbox when the one before it is done.
    """

    def __init__(self, inbox: queue.SimpleQueue[Work | None]) -> None:
        self._inbox = inbox
        self._lock = threading.Lock()
        self._queues: dict[str, deque[Work]] = {}
        #: How many wait in the queues.
        self.waiting = 0

    def put(self, work: Work) -> None:
        """Put it into the inbox, or after other events of the same object."""
        try:
            event = messages.to_event(work.delivery)
            key = f"{work.subscription.options.name} {event.domain_object_id!r}"
        except (InvalidEvent, RecursionError):
            self._inbox.put(work)  # the worker gets the same error, and handles it
            return
        if event.domain_object_id is None:
            self._inbox.put(work)
            return
        work = Work(work.subscription, work.delivery, work.consumer, key)
        with self._lock:
            if key in self._queues:
                self._queues[key].append(work)
                self.waiting += 1
                return
            self._queues[key] = deque()
        self._inbox.put(work)

    def done(self, key: str) -> None:
        """The current event of this object is done: go on to the next one."""
        with self._lock:
            waiting = self._queues.get(key)
            following = waiting.popleft() if waiting else None
            self.waiting -= following is not None
            if following is None:
                self._queues.pop(key, None)  # it is gone already when the run has ended meanwhile
        if following is not None:
            self._inbox.put(following)

    def drop_stale(self) -> None:
        """Drop queued deliveries of lost connections; an object's current one is not queued."""
        with self._lock:
            for key, works in self._queues.items():
                self._queues[key] = deque(filter(_is_current, works))
            self.waiting = sum(map(len, self._queues.values()))

    def left_over(self) -> list[Work]:
        """Empty the queues, and return what was in them."""
        with self._lock:
            left = [work for works in self._queues.values() for work in works]
            self._queues.clear()
            self.waiting = 0
        return left


def _is_current(work: Work) -> bool:
    return work.consumer.is_current(work.delivery)


def _fail(work: Work, _exists: bool) -> None:
    work.consumer.settle(work.delivery, Settlement.FAILED)
    work.consumer.flush()


@contextmanager
def signals(worker: Worker) -> Iterator[None]:
    """SIGTERM and SIGINT stop it; a second SIGINT interrupts it."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and worker.stopping:
            raise KeyboardInterrupt
        worker.stop(signal.Signals(number).name)

    before: dict[int, Any] = {}
    for number in (int(signal.SIGTERM), int(signal.SIGINT)):
        handler = signal.getsignal(number)
        # An ignored signal stays ignored: shells protect background jobs so. None means a
        # handler installed by C code, which Python cannot restore.
        if handler is signal.SIG_IGN or handler is None:
            continue
        # Only allowed in the main thread. No check before it: with eventlet,
        # threading.current_thread() is not threading.main_thread() there either.
        with suppress(ValueError):
            signal.signal(number, on_signal)
            before[number] = handler
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
