"""The programs under test: started, watched, killed, and started again when they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from faults.subscriber import DIED

_TESTS = Path(__file__).resolve().parent.parent
# A program is restarted at once, but not in a tight loop.
_PAUSE_AFTER_A_FAILURE = 1.0

#: Seconds for an orderly end of a program: its longest publish, and some more.
STOP_SECONDS = 45.0

Configuration = Mapping[str, Any]


class Program:
    """One program: one process after the other, as they end."""

    def __init__(
        self, role: str, name: str, folder: Path, configure: Callable[[str], Configuration]
    ) -> None:
        self.role = role
        self.name = name
        self._folder = folder
        self._configure = configure
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False  # to end
        self._wanted = True
        self._not_before = 0.0
        self.starts = 0
        self.deaths = 0  # that handlers died
        self.misbehaved: list[str] = []

    @property
    def process_name(self) -> str:
        """The name of the current process in the records."""
        return f"{self.name}.{self.starts}"

    def start(self) -> None:
        with self._lock:
            self.starts += 1
            self._asked = False
            config = json.dumps(self._configure(self.process_name))
            # Coverage is not measured here: it would slow down the programs under load.
            environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
            # The library that this process would import, whether it is installed or not.
            paths = [str(_TESTS), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            with (self._folder / f"{self.name}.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", f"faults.{self.role}", config],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # Its own process group: only the harness gets Ctrl-C, and then ends the rest.
                    start_new_session=True,
                )

    def look_after(self) -> None:
        """Restart it if it has ended; record if it should not have."""
        with self._lock:
            process = self._process
            if process is None or process.poll() is None:
                return
            self._judge_end(process.returncode)
            if self._wanted and time.monotonic() >= self._not_before:
                self.start()
            else:
                self._process = None if not self._wanted else process

    def _judge_end(self, status: int) -> None:
        if self._asked:
            return
        self._asked = True
        if status in (DIED, -signal.SIGKILL):
            self.deaths += 1
            return
        self._not_before = time.monotonic() + _PAUSE_AFTER_A_FAILURE
        self.misbehaved.append(
            f"{self.process_name} ended by itself with status {status}: {self._last_words()}"
        )

    def _last_words(self) -> str:
        lines = (self._folder / f"{self.name}.log").read_text(errors="replace").splitlines()
        return lines[-1][:200] if lines else "(no output)"

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)
        with self._lock:
            if self._process is not None:
                self._process.wait(10)

    def fork(self) -> None:
        """Make it fork; for publishers only."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGUSR1)

    def terminate(self) -> None:
        """SIGTERM; it must end in order, and in time."""
        with self._lock:
            process = self._process
            name = self.process_name
        self._signal(signal.SIGTERM)
        if process is None:
            return
        try:
            status = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.misbehaved.append(f"{name} did not end within {STOP_SECONDS:.0f} s of SIGTERM")
            process.kill()
            process.wait()
            return
        # One that is just starting has not installed its signal handlers yet.
        if status not in (0, -signal.SIGTERM, -signal.SIGKILL, DIED):
            self.misbehaved.append(
                f"{name} ended with status {status} at SIGTERM: {self._last_words()}"
            )

    def stop(self) -> None:
        """SIGTERM, without a restart."""
        self._wanted = False
        self.terminate()

    def close(self) -> None:
        """Kill it; the children of its forks then end by themselves."""
        self._wanted = False
        with self._lock:
            if self._process is not None:
                self._asked = True
                self._process.kill()
                self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._asked = True
                self._process.send_signal(number)
