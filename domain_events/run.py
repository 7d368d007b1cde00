"""One ``start_consuming``: deliveries into an inbox, workers that handle them, an end in order.

Threads. The broker's I/O thread puts deliveries into the inbox; workers take them out, have them
handled and settled. With one worker, that is the thread that called ``start_consuming``, to which
all other state of a run belongs; ``_stopping`` is a flag that anyone may set.

A signal handler may take no lock and call no pika; it sets the flag and puts a wake-up into the
inbox, which is a `SimpleQueue` for that reason.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

from domain_events import message as messages
from domain_events.broker import Consumer, Consuming, Settlement
from domain_events.errors import InvalidEvent
from domain_events.log import Log
from domain_events.message import Delivery
from domain_events.subscription import Subscription

log = Log("domain_events")

_PAUSE_AFTER_A_MISTAKE = 5.0

# How long the broker may take to confirm that it sends no more.
_CANCEL_TIMEOUT = 5.0


class Work(NamedTuple):
    """A delivery to be handled; ``lane`` where events of one object must keep their order."""

    subscription: Subscription
    delivery: Delivery
    consumer: Consumer
    lane: str | None = None


class Run:
    """One `Subscriber.start_consuming`, from its beginning to its end."""

    def __init__(self, consuming: Consuming, workers: int, timeout: float | None) -> None:
        self.pid = os.getpid()  # in a forked child, the run is its parent's
        self._consuming = consuming
        self._workers = workers
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._stopping = False
        # None is a wake-up: look at the flag.
        self._inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._lanes = Lanes(self._inbox)
        self._consumers: list[Consumer] = []
        # When so many wait in the inbox, some have died with their connection.
        self._most_waiting = 0
        self._interruption: BaseException | None = None

    @property
    def failure(self) -> Exception | None:
        """Why the connection gave up for good, if it did."""
        return self._consuming.failure()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping

    def stop(self) -> None:
        """Any thread, a handler, a signal handler: take no more events, then end."""
        self._stopping = True
        for _ in range(self._workers):
            self._inbox.put(None)
        self._ended.put(None)

    def consume(self, subscription: Subscription) -> None:
        """Start to receive for one subscription."""
        options = subscription.options
        prefetch_count = options.prefetch(self._workers)
        self._most_waiting += 2 * prefetch_count
        self._consumers.append(
            self._consuming.consume(
                options.name,
                options.topology(),
                prefetch_count,
                partial(self._deliver, subscription),
                careful=options.counts_failures,
            )
        )

    def work(self, subscriptions: Sequence[Subscription]) -> None:
        """Receive and handle, until stopped."""
        for subscription in subscriptions:
            self.consume(subscription)
        if self._workers == 1:
            self._work(self._deadline)
        else:
            self._work_in_threads()

    def work_off(self, subscriptions: Sequence[Subscription]) -> None:
        """For `testing`: handle here what waits now, and what comes of it, then stop."""
        for subscription in subscriptions:
            self.consume(subscription)
        while not self._stopping:
            try:
                work = self._inbox.get_nowait()
            except queue.Empty:
                return
            if work is not None:
                self._handle(work)
                work.consumer.flush()

    def _work_in_threads(self) -> None:
        threads = [
            threading.Thread(target=self._work_aside, name=f"domain-events-worker-{n}", daemon=True)
            for n in range(1, self._workers + 1)
        ]
        try:
            for thread in threads:
                thread.start()
            while not self._stopping:
                self._ended.get(timeout=_left(self._deadline))
        except queue.Empty:
            pass  # the time is over
        finally:
            self.stop()
        for thread in threads:
            thread.join()
        if self._interruption is not None:
            raise self._interruption

    def give_back(self) -> None:
        """Stop receiving, and return what was received and not begun."""
        self._stopping = True
        deadline = time.monotonic() + _CANCEL_TIMEOUT
        for consumer in self._consumers:
            consumer.stop(max(0.0, deadline - time.monotonic()))
        for work in self._left_over():
            if work.consumer.is_current(work.delivery):
                work.subscription.give_back(work.delivery, work.consumer)
        for consumer in self._consumers:
            consumer.flush()

    def _left_over(self) -> Iterator[Work]:
        while True:
            try:
                work = self._inbox.get_nowait()
            except queue.Empty:
                break
            if work is not None:
                yield work
        yield from self._lanes.left_over()

    def _deliver(self, subscription: Subscription, delivery: Delivery, consumer: Consumer) -> None:
        """On the I/O thread: a delivery has arrived."""
        if self._inbox.qsize() + self._lanes.waiting > self._most_waiting:
            self._drop_stale()
        work = Work(subscription, delivery, consumer)
        if self._workers > 1 and subscription.options.ordered:
            self._lanes.put(work)
        else:
            self._inbox.put(work)

    def _drop_stale(self) -> None:
        """Let go of deliveries that a lost connection took back, in the order of the others.

        While a handler runs for hours and the connection is lost again and again, they would pile
        up.
        """
        for _ in range(self._inbox.qsize()):
            try:
                work = self._inbox.get_nowait()
            except queue.Empty:
                break
            if work is None or work.lane is not None or _is_current(work):
                self._inbox.put(work)
        self._lanes.drop_stale()

    def _work_aside(self) -> None:
        try:
            self._work(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            # sys.exit() in a handler, for example: it ends the run, as it would with one worker.
            self._interruption = error
        finally:
            self.stop()

    def _work(self, deadline: float | None) -> None:
        inbox = self._inbox
        last: Consumer | None = None
        try:
            while True:
                try:
                    work = inbox.get(timeout=_left(deadline))
                except queue.Empty:
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
                self._handle(work)
                if inbox.empty():
                    last.flush()
                if deadline is not None and time.monotonic() >= deadline:
                    return
        finally:
            if last is not None:
                last.flush()

    def _handle(self, work: Work) -> None:
        try:
            work.subscription.handle(work.delivery, work.consumer)
        except Exception:
            # Not the handler's, which are dealt with: ours. One message that we have a mistake
            # about must not stop the subscriber, nor be lost, nor make it spin.
            work.consumer.repair(_PAUSE_AFTER_A_MISTAKE, partial(_fail, work))
            log.exception("Internal error over a delivery; it is given back.")
        finally:
            if work.lane is not None:
                self._lanes.done(work.lane)


class Lanes:
    """Events of one object, one after the other; of different ones, side by side.

    The first event of an object goes to the inbox; the next ones wait in the object's lane,
    and each goes to the inbox when the one before it is done.
    """

    def __init__(self, inbox: queue.SimpleQueue[Work | None]) -> None:
        self._inbox = inbox
        self._lock = threading.Lock()
        self._lanes: dict[str, deque[Work]] = {}
        #: How many wait in the lanes.
        self.waiting = 0

    def put(self, work: Work) -> None:
        """To the inbox, or behind what is under way for the same object."""
        try:
            event = messages.to_event(work.delivery)
            key = f"{work.subscription.options.name} {event.domain_object_id!r}"
        except (InvalidEvent, RecursionError):
            self._inbox.put(work)  # the worker will see, and say
            return
        if event.domain_object_id is None:
            self._inbox.put(work)
            return
        work = work._replace(lane=key)
        with self._lock:
            if key in self._lanes:
                self._lanes[key].append(work)
                self.waiting += 1
                return
            self._lanes[key] = deque()
        self._inbox.put(work)

    def done(self, key: str) -> None:
        """The event under way for this object is done: the next one's turn."""
        with self._lock:
            lane = self._lanes.get(key)
            following = lane.popleft() if lane else None
            self.waiting -= following is not None
            if following is None:
                self._lanes.pop(key, None)  # it is gone already when the run has ended meanwhile
        if following is not None:
            self._inbox.put(following)

    def drop_stale(self) -> None:
        """Let go of what a lost connection took back, but for the first event of each object."""
        with self._lock:
            for key, lane in self._lanes.items():
                self._lanes[key] = deque(filter(_is_current, lane))
            self.waiting = sum(map(len, self._lanes.values()))

    def left_over(self) -> list[Work]:
        """What waits in the lanes; they are empty afterwards."""
        with self._lock:
            left = [work for lane in self._lanes.values() for work in lane]
            self._lanes.clear()
            self.waiting = 0
        return left


def _is_current(work: Work) -> bool:
    return work.consumer.is_current(work.delivery)


def _fail(work: Work, _exists: bool) -> None:
    work.consumer.settle(work.delivery, Settlement.FAILED)
    work.consumer.flush()


@contextmanager
def signals(run: Run) -> Iterator[None]:
    """SIGTERM and SIGINT stop the run; a second SIGINT interrupts it."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and run.stopping:
            raise KeyboardInterrupt
        run.stop()

    before: dict[int, Any] = {}
    for number in (int(signal.SIGTERM), int(signal.SIGINT)):
        handler = signal.getsignal(number)
        # One that is ignored stays so: that is how a shell protects background jobs. None was
        # installed by C code, which alone could put it back.
        if handler is signal.SIG_IGN or handler is None:
            continue
        # Only the main thread may; whether this is it, Python alone knows: with eventlet,
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
