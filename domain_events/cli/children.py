"""The supervisor's side of one of its processes: starts it, reads its reports, judges its end.

A process is started by executing Python anew. A fork of the supervisor would be quicker, but would
have the code that was on disk when the supervisor was started, not the one of a new deployment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from domain_events.cli.child import OF_THE_TERMINAL, VARIABLE

# systemd's: they are for the supervisor.
_NOT_FOR_CHILDREN = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"

_MOST_AT_ONCE = 65_536


class Child:
    """One process; all of it belongs to the thread that supervises.

    ``report``, ``heard_at`` and ``stopping_since`` are also read by others: each is set as a whole.

    :param command: what to execute.
    :param environment: to add to the supervisor's.
    :param generation: how often all processes had been replaced when it was started.
    :param every: seconds between two reports.
    :param processes: how many there are, in all.
    :raises OSError: it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        generation: int,
        every: float,
        processes: int,
    ) -> None:
        self.generation = generation
        self.started_at = self.heard_at = time.monotonic()
        #: Its last ``health``; None until the subscriber is imported.
        self.report: dict[str, Any] | None = None
        #: Bytes.
        self.memory = 0
        #: Whether the subscriber is imported and has declared its queues.
        self.is_loaded = False
        #: Whether no other process may consume at the same time.
        self.is_ordered = False
        #: Whether it was allowed to consume.
        self.is_allowed = False
        #: Since when it consumes.
        self.ready_since: float | None = None
        #: Since when it is to stop.
        self.stopping_since: float | None = None
        #: Since when consuming has ended in order.
        self.ended_at: float | None = None
        #: Whether that was on a signal, and not by ``stop_consuming``.
        self.ended_by_signal = False
        #: After so many events, or with so much memory, it is to be replaced.
        self.most_events: float | None = None
        self.most_memory: float | None = None
        #: Whether its start was remarked to take long.
        self.is_late = False
        self._unread = b""
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            reports, write = _pipe(ours, theirs)
            read, life = _pipe(theirs, ours)
            os.set_blocking(reports, False)
            environment = {**os.environ, **environment}
            for name in _NOT_FOR_CHILDREN:
                environment.pop(name, None)
            orders = {"reports": write, "life": read, "every": every, "processes": processes}
            environment[VARIABLE] = json.dumps(orders)
            with _blocked(OF_THE_TERMINAL):
                self._process = subprocess.Popen(command, env=environment, pass_fds=(write, read))
            ours.pop_all()
        self.reports = reports
        self._life = life
        self.pid = self._process.pid

    def allow(self) -> None:
        """Let it consume."""
        self.is_allowed = True
        with contextlib.suppress(BrokenPipeError):  # it has just died
            os.write(self._life, b"\n")

    def stop(self) -> None:
        """Have it stop in order; again, if it was to stop already, does nothing."""
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            self.send(signal.SIGTERM)

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        self._process.send_signal(number)

    def has_ended(self) -> bool:
        """Whether the process is gone; reaps it."""
        return self._process.poll() is not None

    @property
    def status(self) -> int:
        """The exit status of one that is gone; negative for a signal."""
        assert self._process.returncode is not None
        return self._process.returncode

    @property
    def has_ended_in_order(self) -> bool:
        """Whether it has finished its work, or had none yet when it was to stop."""
        killed = self.status == -signal.SIGTERM and self.stopping_since is not None
        return self.ended_at is not None or (killed and not self.is_allowed)

    @property
    def end(self) -> str:
        """How it has ended, in words."""
        if self.status >= 0:
            return f"exit status {self.status}"
        try:
            name = signal.Signals(-self.status).name
        except ValueError:  # a real-time signal
            name = f"signal {-self.status}"
        return f"{name}, perhaps for lack of memory" if name == "SIGKILL" else name

    @property
    def is_ready(self) -> bool:
        """Whether it consumes, as of its last report."""
        return self.report is not None and bool(self.report["ready"])

    @property
    def is_worn(self) -> bool:
        """Whether it has reached one of its limits."""
        handled = 0 if self.report is None else self.report["handled"]
        return (self.most_events is not None and handled >= self.most_events) or (
            self.most_memory is not None and self.memory >= self.most_memory
        )

    def read(self) -> bool:
        """Read what it has reported; False at the end of the file."""
        while True:
            try:
                text = os.read(self.reports, _MOST_AT_ONCE)
            except BlockingIOError:
                return True
            *lines, self._unread = (self._unread + text).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):  # others of the process may write there
                    self._note(json.loads(line))
            if not text:
                return False

    def _note(self, message: dict[str, Any]) -> None:
        self.heard_at = time.monotonic()
        if "loaded" in message:
            self.is_loaded, self.is_ordered = True, message["ordered"]
        elif "ended" in message:
            self.ended_at, self.ended_by_signal = time.monotonic(), message["signal"]
        else:
            self.report, self.memory = message["health"], message["memory"]
            if self.is_ready and self.ready_since is None:
                self.ready_since = time.monotonic()

    def close(self) -> None:
        """Close the pipes of one that is gone."""
        os.close(self.reports)
        os.close(self._life)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """Its ends, each closed by its stack."""
    read, write = os.pipe()
    reader.callback(os.close, read)
    writer.callback(os.close, write)
    return read, write


@contextlib.contextmanager
def _blocked(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Block signals, also in what is executed meanwhile, until that is prepared for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
