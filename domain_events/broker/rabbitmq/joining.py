"""A connection that sends the frames of one turn of the loop together, and at once.

pika has a `send()` for each frame, of which an event has three, and waits for the socket before;
that is a third of what publishing costs. Joined, there are fewer system calls, each of which may
hand the interpreter over to another thread.
"""

from __future__ import annotations

from typing import cast

import pika

from domain_events.broker.rabbitmq.loop import Loop

# What is longer goes as it is: to join it would copy it.
_MOST_JOINED = 64 * 1024


class JoiningConnection(pika.SelectConnection):
    """pika's connection with another way to put out data, which it asks its adapters for."""

    _joined: list[bytes]
    _size = 0

    def _adapter_emit_data(self, data: bytes) -> None:
        if self._size == 0:
            self._joined = []
            # The loop calls this at the end of its turn, before it waits again.
            self.ioloop.call_later(0, self._put_out)
        self._joined.append(data)
        self._size += len(data)
        if self._size >= _MOST_JOINED:
            self._put_out()

    def _put_out(self) -> None:
        if self._size:
            joined, self._joined = self._joined, []
            self._size = 0
            if not self.is_closed:
                data = joined[0] if len(joined) == 1 else b"".join(joined)
                loop = cast(Loop, self.ioloop)  # the one that it was made with
                loop.writes_at_once = True
                try:
                    # Not among the published types, which have no hooks for adapters.
                    super()._adapter_emit_data(data)  # type: ignore[misc, unused-ignore]
                finally:
                    loop.writes_at_once = False
