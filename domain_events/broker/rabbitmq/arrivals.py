"""Deliveries that have arrived before they are needed, within bounded memory.

How large messages are is only known when they arrive. Bodies beyond `_MOST_BYTES` wait in a
temporary file, which has no name and is gone with the process.
"""

from __future__ import annotations

import tempfile
import threading
from collections import deque
from typing import IO

from domain_events.broker.rabbitmq.envelope import RabbitDelivery

# So many bytes of bodies are kept in memory.
_MOST_BYTES = 8 * 2**20


class Arrivals:
    """Deliveries in their order. The I/O thread adds them, the caller's takes them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # With each, where its body begins in the file, and its length; None if it is in memory.
        self._waiting: deque[tuple[RabbitDelivery, tuple[int, int] | None]] = deque()
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, delivery: RabbitDelivery) -> None:
        """Keep it until it is taken.

        :raises OSError: its body must go to a file, and cannot be written.
        """
        size = len(delivery.body)
        with self._lock:
            if self._waiting and self._bytes + size > _MOST_BYTES:
                if self._file is None:
                    self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `clear`
                start = self._file.seek(0, 2)
                self._file.write(delivery.body)
                delivery.body = b""
                self._waiting.append((delivery, (start, size)))
            else:
                self._bytes += size
                self._waiting.append((delivery, None))

    def take(self) -> RabbitDelivery | None:
        """The next one, or None."""
        with self._lock:
            if not self._waiting:
                return None
            delivery, in_file = self._waiting.popleft()
            if in_file is None:
                self._bytes -= len(delivery.body)
            else:
                assert self._file is not None
                self._file.seek(in_file[0])
                delivery.body = self._file.read(in_file[1])
        if not self._waiting:
            self.clear()
        return delivery

    def clear(self) -> None:
        """Keep none of them."""
        with self._lock:
            self._waiting.clear()
            self._bytes = 0
            file, self._file = self._file, None
        if file is not None:
            file.close()
