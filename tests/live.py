"""Run a subscriber in a thread of its own for the duration of a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import onlooker
from support import wait_until

from domain_events import Subscriber


@contextmanager
def consuming(subscriber: Subscriber, url: str, queue: str) -> Iterator[threading.Thread]:
    """Run the subscriber. The block begins when it consumes from the queue, and ends it."""
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    try:
        wait_until(lambda: onlooker.consumers(url, queue))
        yield thread
    finally:
        subscriber.stop_consuming()
        thread.join(30)
        assert not thread.is_alive()
