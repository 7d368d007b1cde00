"""Runs the command ``domain-events`` as a user does: a process, its streams, a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from support import wait_until

COMMAND = [sys.executable, "-m", "domain_events"]
_TIMEOUT = 120.0


def environment(url: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
    inherited = dict(os.environ)
    for name in ("COLUMNS", "LINES"):  # they would count more than the size of its terminal
        inherited.pop(name, None)
    return {**inherited, "DOMAIN_EVENTS_URL": url, "PYTHONUNBUFFERED": "1", **(more or {})}


def run(
    url: str,
    *arguments: object,
    stdin: bytes | str = b"",
    more: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=data,
        capture_output=True,
        timeout=_TIMEOUT,
        check=False,
        env=environment(url, more),
        **options,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


class Running:
    """It runs; its lines are collected as it prints them."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []
        self.terminal = -1
        self._threads: list[threading.Thread] = []
        for stream, lines in ((process.stdout, self.out), (process.stderr, self.err)):
            if stream is not None:
                self.collect(stream, lines)

    def collect(self, stream: Any, lines: list[str]) -> None:
        """Read it on a thread."""

        def read() -> None:
            with stream, suppress(OSError):  # of a terminal whose process has ended
                for line in stream:
                    lines.append(line.decode().rstrip("\r\n"))  # noqa: PERF401 - at once

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        self._threads.append(thread)

    def saw(self, text: str) -> str:
        """Wait until a line contains this; the line."""

        def found() -> str | None:
            return next((each for each in [*self.out, *self.err] if text in each), None)

        try:
            return str(wait_until(found, 60))
        except AssertionError:
            raise AssertionError(
                f"not printed: {text!r}; but {self.out[-9:]} and {self.err[-9:]}"
            ) from None

    def type(self, text: str) -> None:
        """On its terminal."""
        os.write(self.terminal, text.encode())

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait until it has ended; its exit status."""
        status = self.process.wait(_TIMEOUT)
        for thread in self._threads:
            thread.join(10)
        return status


@contextmanager
def running(
    url: str, *arguments: object, more: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Running]:
    """It runs until the end of the block."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment(url, more),
        start_new_session=True,
        **{**streams, **options},
    )
    command = Running(process)
    try:
        yield command
    finally:
        process.kill()
        command.end()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()


@contextmanager
def on_terminal(
    url: str,
    *arguments: object,
    columns: int = 80,
    more: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[Running]:
    """It runs on a terminal of its own, as wide as this; its lines are in ``out``."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    streams = {"stdin": secondary, "stdout": secondary, "stderr": secondary, **options}
    terminal = {"TERM": "xterm-256color", **(more or {})}
    with running(url, *arguments, more=terminal, **streams) as command:
        os.close(secondary)
        command.terminal = primary
        command.collect(os.fdopen(primary, "rb"), command.out)
        yield command
