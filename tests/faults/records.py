"""The records of each process, in one file each; a kill does not lose any record.

A record is a line of words. It reaches the kernel in one ``write`` before the program goes on, so
only a line that was being written can be torn, and only the last one.

::

    take  ID ROUTING-KEY TIME                 about to publish
    done  ID OUTCOME BEYOND TIME              it returned, or raised; seconds beyond its deadline
    begin SUBSCRIBER ID RETRIES TIME          the handler is called
    ended SUBSCRIBER ID RETRIES OUTCOME TIME  it is about to return, or to raise
    usage THREADS DESCRIPTORS KILOBYTES TIME  of this process, every few seconds
    release TOPICS RETIRED RETRIES DEAD-LETTER TIME  it is about to register this (`rolling`)
    ready TIME                                it has declared its queues

Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

USAGE_EVERY = 3.0


class Recorder:
    """Writes the records of one process; from any thread."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *words: object) -> None:
        line = " ".join(map(str, (*words, f"{time.monotonic():.4f}")))
        os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


class Reader:
    """Reads the records of all processes as they grow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def new(self) -> Iterator[tuple[str, list[str]]]:
        """The name of the process and the words of each record written since the last time."""
        for path in sorted(self._folder.glob("*.records")):
            begin = self._read.get(path, 0)
            if path.stat().st_size == begin:
                continue
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read()
            # The text after the last newline is still being written, or was torn by a kill.
            complete, newline, _ = data.rpartition(b"\n")
            self._read[path] = begin + len(complete) + len(newline)
            for line in complete.decode().splitlines():
                yield path.stem, line.split()


def watch(recorder: Recorder) -> None:
    """Record this process's resources, and end it when its parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while True:
            recorder.write("usage", *usage())
            until = time.monotonic() + USAGE_EVERY
            while time.monotonic() < until:
                if os.getppid() != parent:
                    os._exit(1)
                time.sleep(0.25)  # a separate thread: a change of the parent can only be polled

    threading.Thread(target=watch, name="watch", daemon=True).start()


def usage() -> tuple[int, int, int]:
    """Threads, open descriptors and resident kilobytes of this process."""
    threads = kilobytes = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Threads:"):
            threads = int(line.split()[1])
        elif line.startswith("VmRSS:"):
            kilobytes = int(line.split()[1])
    return threads, len(os.listdir("/proc/self/fd")), kilobytes  # noqa: PTH208 - only how many
