"""Runs a subscriber in one or several processes: starts, watches, replaces, and ends them.

It imports nothing of the application: each process does, and tells it through a pipe (`child`) what
has become of that, and how it is.

One process is replaced by another without a gap: the new one consumes before the old one is asked
to stop. If its subscriber is ``ordered``, the old one ends first, or two processes would handle
events of one object at the same time.

Only a crash is followed by another start: a signal, an exit that was not in order, an exception. A
process that waits for the broker has not crashed, and ends only when there was none when it
declared its queues; it is started again for as long as it takes. What cannot work when all begins -
the import, the settings, the topology - ends the command with that status, at the first process;
the others are started when that one is loaded.

Threads. All of it runs on the thread that calls `Supervisor.run`, which must be the main one: in
`turns <Supervisor.run>`, each of which looks at everything and waits for nothing. Signal handlers
only append to a deque. The threads of the `HealthServer` read, through `Supervisor.health`;
`Supervisor.replace_all` may be called by any.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domain_events import health as of_subscriber
from domain_events import probes
from domain_events.cli import exits
from domain_events.cli.children import Child
from domain_events.errors import ConfigurationError
from domain_events.log import Log

log = Log("domain_events")

# Seconds between two looks at what no signal and no report announces.
_TURN = 1.0
# Seconds between two writes of the health file.
_BEAT = 5.0
# Seconds before the first start after a crash; doubled with each, up to half a minute's share.
_FIRST_PAUSE = 0.5
# Seconds for which a process must have consumed for its next crash to count as the first again.
_STABLE = 60.0
# The longest pause before the next start when there was no broker.
_LONGEST_PAUSE_WITHOUT_BROKER = 15.0
# How long a new process may take until it consumes, if another one is to be replaced by it.
_LONGEST_START = 120.0
# After so long, one that is still being imported is remarked.
_LATE = 30.0
# How long an old process may take to stop until the next one is replaced all the same.
_LONGEST_WAIT = 30.0
# After consuming has ended, a process has so long until it is killed: there is nothing to lose.
_LONGEST_EXIT = 30.0
# A process with a limit lives for so long at least, and so long passes after it could not be
# replaced.
_SHORTEST_LIFE, _PAUSE_AFTER_FAILURE = 3.0, 30.0
# Limits are reached by chance up to so much earlier, so that not all are replaced at a time.
_JITTER = 0.1
# Signals so close together are one: timeout(1) and others send it to a process and to its group.
_SAME_SIGNAL = 0.02
# How long systemd may take for a notification, which keeps everything else waiting.
_PATIENCE_WITH_SYSTEMD = 0.5
# How long killed processes may take to be gone.
_LONGEST_KILL = 5.0

_PERMANENT = {
    exits.NOT_IMPORTED: "it cannot be imported",
    exits.USAGE: "its settings cannot work",
    exits.TOPOLOGY: "a queue or an exchange is missing or different",
}
_FORWARDED = signal.SIGUSR1, signal.SIGUSR2


@dataclass(frozen=True)
class Plan:
    """What to run, and how.

    :param command: executes one process, which calls `child.serve`.
    :param environment: for them, in addition.
    :param max_restarts: how many starts after crashes within a minute, in all.
    :param max_events: a process that has handled about so many is replaced.
    :param max_memory: a process that uses about so many bytes is replaced.
    :param waits_for_changes: what cannot work ends nothing, since somebody is about to change it.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    processes: int = 1
    max_restarts: int = 10
    max_events: int | None = None
    max_memory: int | None = None
    health_port: int | None = None
    health_file: str | None = None
    waits_for_changes: bool = False


@dataclass(frozen=True)
class Health:
    """The health of all processes as one."""

    not_alive: tuple[str, ...]
    not_ready: tuple[str, ...]
    processes: tuple[dict[str, Any], ...]

    @property
    def alive(self) -> bool:
        return not self.not_alive

    @property
    def ready(self) -> bool:
        return not self.not_ready

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": "processes",
            "alive": self.alive,
            "ready": self.ready,
            "processes": list(self.processes),
        }


class _Place:
    """One of the processes that are to run, and the one that is to follow it."""

    def __init__(self) -> None:
        self.child: Child | None = None
        self.successor: Child | None = None
        #: When to start one; None if it has ended by itself.
        self.start_at: float | None = 0.0
        #: Crashes, and attempts without a broker, in a row.
        self.crashes = 0
        self.without_broker = 0


class Supervisor:
    """Runs the processes of a plan; see the module."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._places = [_Place() for _ in range(plan.processes)]
        self._leaving: list[Child] = []  # old ones, that finish what they do
        self._generation = 0
        self._replacing_all = False
        self._replace_requests: deque[str] = deque()
        self._signals: deque[tuple[int, float]] = deque()  # with their times
        self._crashes: deque[float] = deque()  # when; those of the last minute
        self._was_loaded = False  # any process, ever
        self._was_ready = False  # all of them, ever
        self._stopping = False
        self._asked_to_end_at: float | None = None  # by a signal
        self._killed_at: float | None = None
        self._status = exits.OK
        self._had_terminal = _has_terminal()
        self._replace_no_worn_before = 0.0
        self._systemd = probes.Systemd(_PATIENCE_WITH_SYSTEMD)
        self._file = None if plan.health_file is None else Path(plan.health_file)
        self._file_due = 0.0
        self._file_fails = False
        self._well_in_file: tuple[bool, bool] | None = None
        self._turn = _TURN
        self._longest_silence = of_subscriber.LONGEST_SILENCE
        self._selector = selectors.DefaultSelector()
        self._wake_up = -1

    def run(self) -> int:
        """Run the processes until they are to end; returns the exit status.

        :raises ConfigurationError: the probes cannot be served.
        """
        self._systemd.begin()
        if self._systemd.watchdog is not None:
            # A process that hangs is noticed in time for systemd to act within its watchdog's time.
            self._turn = min(_TURN, self._systemd.watchdog / 8)
            self._longest_silence = min(self._longest_silence, self._systemd.watchdog / 2)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._selector)
            stack.enter_context(self._noted_signals())
            stack.callback(self._let_go)
            if self._file is not None:
                self._write_file(first=True)
                stack.callback(self._remove_file, self._file)
            if self._plan.health_port is not None:
                stack.enter_context(probes.HealthServer(self, port=self._plan.health_port))
            while True:
                self._act_on_signals()
                self._reap()
                if self._stopping and self._is_over():
                    return self._status
                if not self._stopping:
                    self._allow()
                    self._start()
                    self._replace()
                self._end_late_ones()
                self._notify()
                self._wait()

    @staticmethod
    def _remove_file(file: Path) -> None:
        with contextlib.suppress(OSError):
            file.unlink()

    def replace_all(self, why: str) -> None:
        """Replace all processes, one by one. From any thread."""
        self._replace_requests.append(why)
        self._wake()

    def health(self) -> Health:
        """The health of all processes. From any thread."""
        now = time.monotonic()
        places = [(each, each.child) for each in self._places]
        not_alive: list[str] = []
        not_ready: list[str] = []
        for _, child in places:
            if child is None:
                not_ready.append("A process is not running; see the log.")
            elif child.report is None:
                not_ready.append(f"Process {child.pid} is starting.")
            else:
                not_ready += (f"Process {child.pid}: {why}" for why in child.report["not_ready"])
        if self._stopping:
            not_ready = ["It is stopping: it takes no more events."]
        children = [child for _, child in places if child is not None] + self._leaving.copy()
        for child in children:
            silence = now - child.heard_at
            if silence > self._longest_silence:
                not_alive.append(f"Process {child.pid} has not responded for {silence:.0f} s.")
            if child.report is not None:
                not_alive += (f"Process {child.pid}: {why}" for why in child.report["not_alive"])
        return Health(tuple(not_alive), tuple(not_ready), tuple(map(_shown, children)))

    # --- signals ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _noted_signals(self) -> Iterator[None]:
        """Signals go to the deque, and wake it up; an ignored one stays ignored, as by nohup."""
        read, self._wake_up = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(self._wake_up, False)
        self._selector.register(read, selectors.EVENT_READ, None)
        noted = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *_FORWARDED, signal.SIGCHLD
        before = {
            number: signal.getsignal(number)
            for number in noted
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        # Before the signals: a process that was started with SIGCHLD ignored never gets to know
        # how its children have ended.
        before[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD)
        wake_up_before = signal.set_wakeup_fd(self._wake_up, warn_on_full_buffer=False)
        for number in before:
            signal.signal(number, self._note_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # one that was installed by C code
                    signal.signal(number, handler)
            signal.set_wakeup_fd(wake_up_before)
            os.close(read)
            wake_up, self._wake_up = self._wake_up, -1
            os.close(wake_up)

    def _note_signal(self, number: int, _frame: object) -> None:
        self._signals.append((number, time.monotonic()))

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_up, b"\0")

    def _act_on_signals(self) -> None:
        while self._signals:
            number, at = self._signals.popleft()
            if number == signal.SIGHUP and self._had_terminal and not _has_terminal():
                number = signal.SIGTERM  # its window was closed
            if number in (signal.SIGTERM, signal.SIGINT):
                self._end_on(signal.Signals(number), at)
            elif number == signal.SIGHUP:
                self._replace_requests.append("SIGHUP")
            elif number in _FORWARDED:
                for child in self._children():
                    child.send(number)
        while self._replace_requests:
            why = self._replace_requests.popleft()
            if not self._stopping:
                self._begin_to_replace_all(why)

    def _end_on(self, number: signal.Signals, at: float) -> None:
        if self._asked_to_end_at is not None:
            if at - self._asked_to_end_at < _SAME_SIGNAL:
                return
            children = self._children()
            log.warning(
                "%s again: killing %s; the events that they handle will come again.",
                number.name,
                _counted(len(children)),
            )
            self._status = 128 + number
            self._killed_at = time.monotonic()
            for child in children:
                child.send(signal.SIGKILL)
            return
        self._asked_to_end_at = at
        if not self._stopping:
            log.info(
                "%s: stopping %s when their handlers have finished; again to kill them.",
                number.name,
                _counted(len(self._children())),
            )
            self._end(exits.OK)

    def _end(self, status: int) -> None:
        """Have everything stop in order, and end with this status."""
        self._stopping = True
        self._status = status
        self._systemd.end()
        for child in self._children():
            child.stop()

    def _is_over(self) -> bool:
        killed_at = self._killed_at
        return not self._children() or (
            killed_at is not None and time.monotonic() - killed_at > _LONGEST_KILL
        )

    # --- starts and ends -------------------------------------------------------------------------

    def _children(self) -> list[Child]:
        both = [child for each in self._places for child in (each.child, each.successor)]
        return [child for child in both if child is not None] + self._leaving

    def _start(self) -> None:
        """Start those that are due; the first one shows whether it can work at all."""
        now = time.monotonic()
        for place in self._places:
            if not self._was_loaded and place is not self._places[0]:
                break
            if place.child is None and place.start_at is not None and now >= place.start_at:
                try:
                    place.child = self._new_child()
                except OSError as error:
                    self._crashed(place, None, f"A process cannot be started: {error}")
                    return

    def _new_child(self) -> Child:
        plan = self._plan
        child = Child(plan.command, plan.environment, self._generation, self._turn, plan.processes)
        chance = 1 - random.uniform(0, _JITTER)
        child.most_events = None if plan.max_events is None else plan.max_events * chance
        child.most_memory = None if plan.max_memory is None else plan.max_memory * chance
        self._selector.register(child.reports, selectors.EVENT_READ, child)
        return child

    def _allow(self) -> None:
        """Let those consume that are loaded; an ordered one when no other one consumes."""
        children = self._children()
        for child in children:
            if not child.is_loaded or child.is_allowed or child.stopping_since is not None:
                continue
            self._was_loaded = True
            if child.is_ordered and any(other.is_allowed for other in children):
                continue
            child.allow()

    def _reap(self) -> None:
        for child in self._children():
            if child.has_ended():
                child.read()
                with contextlib.suppress(KeyError):
                    self._selector.unregister(child.reports)
                child.close()
                self._ended(child)
        if os.getpid() == 1:
            self._reap_adopted()

    def _reap_adopted(self) -> None:
        """As the first process of a container: processes whose parents have died."""
        ours = {child.pid for child in self._children()}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in ours:
                return  # one of ours, that has ended just now, is left to its Child
            os.waitpid(ended.si_pid, 0)

    def _ended(self, child: Child) -> None:
        """This process is gone."""
        if child in self._leaving:
            self._leaving.remove(child)
            if not child.has_ended_in_order:
                self._died_while_stopping(child)
            return
        place = next(each for each in self._places if child in (each.child, each.successor))
        if child is place.successor:
            place.successor = None
            if not self._stopping:
                why = _PERMANENT.get(child.status, child.end)
                self._could_not_replace(f"process {child.pid} has ended: {why}")
            return
        # A successor that is on its way takes the place.
        place.child, place.successor = place.successor, None
        if self._stopping:
            if not child.has_ended_in_order:
                self._died_while_stopping(child)
        elif child.has_ended_in_order:
            self._ended_by_itself(place, child)
        elif child.status == exits.NO_BROKER:
            self._found_no_broker(place)
        elif child.status in _PERMANENT and not self._was_ready:
            # It has printed why.
            self._give_up(place, child.status)
        else:
            self._crashed(place, child, f"Process {child.pid} has crashed: {child.end}")

    def _died_while_stopping(self, child: Child) -> None:
        if self._killed_at is not None:
            return
        log.error(
            "Process %d died while it was stopping: %s. The events that it handled will come "
            "again.",
            child.pid,
            child.end,
        )
        if self._stopping and self._status == exits.OK:
            self._status = exits.CRASHING

    def _ended_by_itself(self, place: _Place, child: Child) -> None:
        if child.ended_by_signal:
            log.info("Process %d has stopped on a signal to it alone; starting another.", child.pid)
            place.start_at = time.monotonic() + _FIRST_PAUSE
            return
        log.info("Process %d has stopped by itself; it is not started again.", child.pid)
        place.start_at = None
        self._end_without_places(exits.OK)

    def _found_no_broker(self, place: _Place) -> None:
        place.without_broker += 1
        pause = _pause(place.without_broker, 1.0, _LONGEST_PAUSE_WITHOUT_BROKER)
        log.warning(
            "Without a broker it cannot start; trying again in %.1f s, for as long as it takes.",
            pause,
        )
        place.start_at = time.monotonic() + pause

    def _crashed(self, place: _Place, child: Child | None, how: str) -> None:
        now = time.monotonic()
        if child is not None and child.ready_since is not None:
            place.without_broker = 0
            if now - child.ready_since > _STABLE:
                place.crashes = 0
        place.crashes += 1
        self._crashes.append(now)
        while now - self._crashes[0] > 60:
            self._crashes.popleft()
        limit = self._plan.max_restarts
        if len(self._crashes) > limit:
            log.error(
                "%s. That is crash %d within a minute, and %d are started again: ending.",
                how,
                len(self._crashes),
                limit,
            )
            is_known = child is not None and child.status in _PERMANENT
            self._give_up(place, child.status if child and is_known else exits.CRASHING)
            return
        pause = _pause(place.crashes, _FIRST_PAUSE, 30 / max(1, limit))
        log.warning("%s. Starting another in %.1f s.", how, pause)
        place.start_at = now + pause

    def _give_up(self, place: _Place, status: int) -> None:
        place.start_at = None
        if self._plan.waits_for_changes:
            log.warning("Waiting for a file to be changed.")
        else:
            self._end(status)

    def _end_without_places(self, status: int) -> None:
        if not self._plan.waits_for_changes and not any(
            each.child is not None or each.start_at is not None for each in self._places
        ):
            self._end(status)

    def _end_late_ones(self) -> None:
        now = time.monotonic()
        for child in self._children():
            if child.ended_at is not None and now - child.ended_at > _LONGEST_EXIT:
                child.send(signal.SIGKILL)
            elif child.stopping_since is not None and child.is_loaded and not child.is_allowed:
                # The first one may have gone to a handler that the application sets on import.
                child.send(signal.SIGTERM)
            if not child.is_loaded and not child.is_late and now - child.started_at > _LATE:
                child.is_late = True
                log.warning(
                    "Process %d has been importing the subscriber for %.0f s. If its module calls "
                    "start_consuming() itself, leave that to this command.",
                    child.pid,
                    now - child.started_at,
                )

    def _let_go(self) -> None:
        """However this ends: the end of their pipes has the processes finish and stop."""
        for child in self._children():
            child.close()

    # --- replacing -------------------------------------------------------------------------------

    def _begin_to_replace_all(self, why: str) -> None:
        self._generation += 1
        self._replacing_all = True
        self._systemd.reloading()
        log.info("%s: replacing %s, one by one.", why, _counted(len(self._places)))
        for place in self._places:
            if place.child is None:
                place.start_at = time.monotonic()

    def _replace(self) -> None:
        """Replace one process at a time, if one is to be replaced."""
        now = time.monotonic()
        for place in self._places:
            if place.successor is not None and place.child is not None:
                self._hand_over(place, place.child, place.successor)
                return
        if any(now - (each.stopping_since or now) < _LONGEST_WAIT for each in self._leaving):
            return
        for place in self._places:
            if place.child is not None and self._is_to_be_replaced(place.child):
                try:
                    place.successor = self._new_child()
                except OSError as error:
                    self._could_not_replace(f"a process cannot be started: {error}")
                return
        if self._replacing_all:
            self._replacing_all = False
            self._systemd.reloaded()
            log.info("All processes were replaced.")

    def _is_to_be_replaced(self, child: Child) -> bool:
        if self._replacing_all and child.generation < self._generation:
            return True
        now = time.monotonic()
        return (
            child.is_worn
            and child.ready_since is not None
            and now - child.ready_since >= _SHORTEST_LIFE
            and now >= self._replace_no_worn_before
        )

    def _hand_over(self, place: _Place, old: Child, new: Child) -> None:
        if new.is_ready or (new.is_loaded and new.is_ordered):
            log.info("Process %d takes over from %d, which stops.", new.pid, old.pid)
            place.child, place.successor = new, None
            place.without_broker = 0
            leaving = old
        elif time.monotonic() - new.started_at > _LONGEST_START:
            place.successor = None
            leaving = new
            self._could_not_replace(
                f"process {new.pid} does not consume after {_LONGEST_START:.0f} s"
            )
        else:
            return
        leaving.stop()
        self._leaving.append(leaving)

    def _could_not_replace(self, why: str) -> None:
        log.error("Nothing more is replaced, since %s. The running processes go on.", why)
        self._replace_no_worn_before = time.monotonic() + _PAUSE_AFTER_FAILURE
        if self._replacing_all:
            self._replacing_all = False
            self._systemd.reloaded()

    # --- turns -----------------------------------------------------------------------------------

    def _notify(self) -> None:
        found = probes.report(self)
        if found["ready"] and not self._was_ready:
            self._was_ready = True
            log.info("Consuming in %s.", _counted(len(self._places)))
        self._systemd.notify(found)
        if self._file is not None:
            self._write_file(found)

    def _write_file(self, found: dict[str, Any] | None = None, *, first: bool = False) -> None:
        found = probes.report(self) if found is None else found
        well = found["alive"], found["ready"]
        now = time.monotonic()
        if well == self._well_in_file and now < self._file_due:
            return
        assert self._file is not None
        try:
            probes.replace(self._file, json.dumps(found) + "\n")
        except OSError as error:
            if first:
                raise ConfigurationError(
                    f"The health file {self._file} cannot be written: {error}. Give a file in a "
                    "directory that exists and that this user may write to."
                ) from error
            if not self._file_fails:  # logged once, until it succeeds again
                log.error("The health cannot be written to %s: %s.", self._file, error)
            self._file_fails = True
        else:
            self._file_fails = False
            self._well_in_file = well
        self._file_due = now + _BEAT

    def _wait(self) -> None:
        """Until a report, a signal, the next start, or the next turn."""
        starts = [
            each.start_at
            for each in self._places
            if each.child is None and each.start_at is not None
        ]
        first = min(starts, default=float("inf")) if not self._stopping else float("inf")
        for key, _ in self._selector.select(max(0.0, min(self._turn, first - time.monotonic()))):
            child: Child | None = key.data
            if child is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(key.fd, 4096)
            elif not child.read():
                self._selector.unregister(key.fd)


def _shown(child: Child) -> dict[str, Any]:
    return {
        "pid": child.pid,
        "ready": child.is_ready,
        "stopping": child.stopping_since is not None,
        "heard": time.monotonic() - child.heard_at,
        "memory": child.memory,
        "subscriber": child.report,
    }


def _counted(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _pause(attempt: int, first: float, longest: float) -> float:
    """Seconds before the next attempt: growing, capped, and a little by chance."""
    return min(longest, first * 2.0 ** min(attempt - 1, 30)) * random.uniform(0.75, 1.25)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True
