"""What this process holds: threads, descriptors and memory; and whether that grows."""

from __future__ import annotations

import gc
import os
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support import wait_until


class Footprint(NamedTuple):
    threads: int
    descriptors: int
    traced: int  # bytes that Python objects take
    resident: int  # bytes that the process takes


@contextmanager
def tracing() -> Iterator[None]:
    """Count the bytes of all Python objects made meanwhile."""
    tracemalloc.start(1)
    try:
        yield
    finally:
        tracemalloc.stop()


def footprint() -> Footprint:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Footprint(
        threading.active_count(),
        len(list(Path("/proc/self/fd").iterdir())),
        tracemalloc.get_traced_memory()[0],
        pages * os.sysconf("SC_PAGE_SIZE"),
    )


class Allowed(NamedTuple):
    """How many bytes may be there more: some in any case, and so many for each item."""

    slack: int
    per_item: int


def assert_flat(before: Footprint, items: int, traced: Allowed, resident: Allowed) -> None:
    """No thread and no descriptor more than before; so many bytes more at most.

    Whatever is about to end, or to be freed, is given the time to: threads, sockets, and messages
    that are on their way on a busy machine. What leaks stays.
    """
    after = before

    def is_flat() -> bool:
        nonlocal after
        after = footprint()
        return (
            after.threads <= before.threads
            and after.descriptors <= before.descriptors
            and after.traced - before.traced < traced.slack + items * traced.per_item
            and after.resident - before.resident < resident.slack + items * resident.per_item
        )

    try:
        wait_until(is_flat, message="no more than before")
    finally:
        print(f"{items:,} items: {before}, then {after}")  # pytest -rP shows it
