"""Whoever adds something for the I/O thread is never left waiting, however the threads interleave.

No broker: the I/O thread is played by `Yard.look`. What may happen between any two lines of
`Doorbell` is made to happen there, by tracing it line by line.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import FrameType
from typing import Any

import pytest
from support import wait_until

from domain_events.broker.rabbitmq import doorbell
from domain_events.broker.rabbitmq.doorbell import Doorbell
from domain_events.errors import BrokerUnavailable

pytestmark = pytest.mark.timeout(120)

# More lines than `ring` has, with those of its handlers.
LINES = range(16)


class Yard:
    """What is added, the wake-ups that are on their way, and what the I/O thread has seen."""

    def __init__(self) -> None:
        self.added: deque[str] = deque()
        self.wakeups: deque[None] = deque()
        self.seen: list[str] = []
        self.lock = threading.RLock()  # a link has one, too
        self.waking = 0  # how often a wake-up was begun
        self.in_wake: Callable[[], None] = lambda: None
        self.bell = Doorbell(self.wake)

    def wake(self) -> None:
        self.waking += 1
        with self.lock:
            self.in_wake()
            self.wakeups.append(None)

    def add(self, what: str) -> None:
        self.added.append(what)
        self.bell.ring()

    def look(self) -> None:
        """The I/O thread, which looks only when it was woken."""
        while self.wakeups:
            self.wakeups.popleft()
            self.bell.answer()
            while self.added:
                self.seen.append(self.added.popleft())


def traced(act: Callable[[], None], at_line: Callable[[int], None]) -> int:
    """Do it, calling ``at_line`` before each line of `Doorbell`; how many lines there were.

    The outermost on a thread of its own, since the trace function of the main thread may be that of
    coverage.
    """
    lines = 0
    raised: list[BaseException] = []

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != doorbell.__file__:
            return None
        if event == "line":
            lines += 1
            sys.settrace(None)
            frame.f_trace, before = None, frame.f_trace
            try:
                at_line(lines - 1)
            finally:
                frame.f_trace = before
                sys.settrace(trace)
        return trace

    def run() -> None:
        sys.settrace(trace)
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - raised again below
            raised.append(error)
        finally:
            sys.settrace(None)

    if threading.current_thread() is threading.main_thread():
        elsewhere(run)
    else:
        run()
    if raised:
        raise raised[0]
    return lines


def elsewhere(act: Callable[[], None]) -> None:
    """Do it on another thread, and wait for it."""
    thread = threading.Thread(target=act)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("rung_before", [False, True])
def test_signal_handler_does_not_rely_on_what_it_interrupts(line: int, rung_before: bool) -> None:
    """It is seen while the interrupted `ring` stands still: it may wait for that."""
    yard = Yard()
    if rung_before:
        yard.add("before")

    def interrupt(number: int) -> None:
        if number == line:
            yard.add("handler's")
            yard.look()
            assert "handler's" in yard.seen

    traced(lambda: yard.add("mine"), interrupt)
    yard.look()
    assert not yard.added


@pytest.mark.parametrize("line", LINES)
def test_handler_in_a_handler(line: int) -> None:
    """Two signals, the second one in the middle of the first one's `ring`, and after it."""
    for inner in LINES:
        yard = Yard()

        def nested(number: int, inner: int = inner, yard: Yard = yard) -> None:
            if number == inner:
                yard.add("second")
                yard.look()
                assert "second" in yard.seen

        def interrupt(
            number: int, yard: Yard = yard, nested: Callable[[int], None] = nested
        ) -> None:
            if number == line:
                traced(lambda: yard.add("first"), nested)
                yard.look()
                assert "first" in yard.seen
                yard.add("third")
                yard.look()
                assert "third" in yard.seen

        traced(partial(yard.add, "mine"), interrupt)
        yard.look()
        assert not yard.added


def test_signal_handler_does_not_rely_on_who_waits_for_the_thread_it_interrupts() -> None:
    """Another thread is about to wake, too, but needs a lock that the interrupted one holds."""
    yard = Yard()
    goes_on, decided = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if number == 3:  # behind the look at whether somebody has rung
            decided.set()
            assert goes_on.wait(30)

    other = threading.Thread(target=lambda: traced(lambda: yard.add("other's"), hold))
    other.start()
    assert decided.wait(30)

    def interrupt() -> None:
        yard.in_wake = lambda: None
        goes_on.set()
        wait_until(lambda: yard.waking == 2)  # the other one waits for the lock
        yard.add("first")
        yard.look()
        assert "first" in yard.seen
        another.start()
        wait_until(lambda: yard.waking == 4)
        yard.add("second")
        yard.look()
        assert "second" in yard.seen

    another = threading.Thread(target=lambda: yard.add("another's"))
    yard.in_wake = interrupt
    yard.add("mine")
    for thread in (other, another):
        thread.join(30)
    yard.look()
    assert not yard.added


@pytest.mark.parametrize("line", LINES)
def test_io_thread_may_look_at_any_time(line: int) -> None:
    """In the middle of a `ring`; whoever comes later is seen all the same."""
    yard = Yard()

    def look(number: int) -> None:
        if number == line:
            yard.look()

    assert 4 < traced(lambda: yard.add("mine"), look) <= len(LINES)
    yard.look()
    yard.add("later")
    yard.look()
    assert yard.seen == ["mine", "later"]


class Mischief(Exception):
    """Raised by a signal handler: a time limit of the application's, for example."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Mischief])
@pytest.mark.parametrize("line", LINES)
def test_who_relied_on_a_wakeup_is_seen_when_a_signal_handler_raises(
    line: int, kind: type[BaseException]
) -> None:
    """Another thread found that somebody had rung, and does not ring itself."""
    for before in range(line + 1):
        yard = Yard()

        def raise_(number: int, before: int = before, yard: Yard = yard) -> None:
            if number == before:
                elsewhere(lambda: yard.add("other's"))
            if number == line:
                raise kind

        try:
            lines = traced(partial(yard.add, "mine"), raise_)
        except kind:
            pass
        else:
            if lines <= before:
                return
        yard.look()
        assert not yard.added
        yard.add("later")
        yard.look()
        assert "later" in yard.seen


def test_wakeup_that_raises_is_tried_by_the_next_one() -> None:
    """The link is closed; one that is made in its place is woken."""
    yard = Yard()

    def closed() -> None:
        raise BrokerUnavailable("closed")

    yard.in_wake = closed
    for _ in range(2):
        with pytest.raises(BrokerUnavailable):
            yard.add("mine")
    yard.in_wake = lambda: None
    yard.add("mine")
    yard.look()
    assert yard.seen == ["mine"] * 3


def test_one_wakeup_for_all_that_is_added_until_it_is_answered() -> None:
    yard = Yard()
    for _ in range(100):
        yard.add("mine")
    assert len(yard.wakeups) == 1
    yard.look()
    assert len(yard.seen) == 100
    yard.bell.mute()
    yard.add("muted")
    assert not yard.wakeups
    yard.bell.answer()
    yard.add("mine")
    assert len(yard.wakeups) == 1


# --- several threads, line by line ---------------------------------------------------------------


class Actor:
    """A thread that does one step (a line of `Doorbell`, or up to `pause`) when it is told to."""

    def __init__(self, act: Callable[[Actor], None]) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = False

        def run() -> None:
            self._go.acquire(timeout=30)
            traced(lambda: act(self), lambda _line: self.pause())
            self.ended = True
            self._stopped.release()

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def pause(self) -> None:
        self._stopped.release()
        assert self._go.acquire(timeout=30)

    def step(self) -> None:
        if not self.ended:
            self._go.release()
            assert self._stopped.acquire(timeout=30)

    def finish(self) -> None:
        while not self.ended:
            self.step()
        self.thread.join(30)


def schedules() -> Iterator[tuple[tuple[int, int], ...]]:
    """Who does how many steps: every way to take turns in which two threads are held up."""
    for first, second in product(range(3), range(3)):
        if first != second:
            for steps, more in product(range(9), range(9)):
                yield (first, steps), (second, more), (3 - first - second, 20)


def test_no_order_of_steps_leaves_anything_unseen() -> None:
    """Two that add something, and the I/O thread looking, at first for something older."""
    for schedule in schedules():
        yard = Yard()
        yard.add("older")

        def add(actor: Actor, yard: Yard = yard) -> None:
            yard.added.append("mine")
            actor.pause()
            yard.bell.ring()

        def look(actor: Actor, yard: Yard = yard) -> None:
            yard.wakeups.popleft()
            actor.pause()
            yard.bell.answer()
            actor.pause()
            while yard.added:
                yard.seen.append(yard.added.popleft())
                actor.pause()

        actors = [Actor(add), Actor(add), Actor(look)]
        for who, steps in schedule:
            for _ in range(steps):
                actors[who].step()
        for actor in actors:
            actor.finish()
        yard.look()
        assert len(yard.seen) == 3, schedule


def test_many_threads_at_once() -> None:
    """At full speed, with an I/O thread that sleeps until it is woken."""
    woken = threading.Semaphore(0)
    bell = Doorbell(woken.release)
    added: deque[int] = deque()
    seen: list[int] = []
    number, threads = 20_000, 8

    def add() -> None:
        for n in range(number):
            added.append(n)
            bell.ring()

    def look() -> None:
        while len(seen) < number * threads:
            if not woken.acquire(timeout=5):
                return
            bell.answer()
            while added:
                seen.append(added.popleft())

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers = [threading.Thread(target=add) for _ in range(threads)]
        io_thread = threading.Thread(target=look)
        for thread in [*workers, io_thread]:
            thread.start()
        for thread in [*workers, io_thread]:
            thread.join(60)
    finally:
        sys.setswitchinterval(before)
    assert len(seen) == number * threads
