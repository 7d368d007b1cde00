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

    Threads and sockets that are about to end are given the time to.
    """

    def as_few_as_before() -> bool:
        now = footprint()
        return now.threads <= before.threads and now.descriptors <= before.descriptors

    wait_until(as_few_as_before, message=f"as few threads and descriptors as in {before}")
    after = footprint()
    more = (after.traced - before.traced, after.resident - before.resident)
    print(f"{items:,} items: {more[0]:+,} bytes traced, {more[1]:+,} resident")  # pytest -rP
    for bytes_more, allowed in zip(more, (traced, resident), strict=True):
        assert bytes_more < allowed.slack + items * allowed.per_item, (before, after, items)
