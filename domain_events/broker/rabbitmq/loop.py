"""pika's I/O loop, with a wake-up that may interrupt another one.

A signal handler or a finalizer may wake the loop in the middle of a wake-up on the same thread.
pika's own ``add_callback_threadsafe`` takes a lock that is not re-entrant (``_waking_mutex`` in
pika/adapters/select_connection.py), and would deadlock. Here there is none: a deque's `append` and
one `send`.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Callable

from pika.adapters.select_connection import IOLoop


class Loop(IOLoop):
    """One thread's loop; created on any thread, run and closed on its own.

    :param calls: callbacks to run soon; the owner's, so that the next loop runs those that this one
        did not.
    """

    def __init__(self, calls: deque[Callable[[], None]] | None = None) -> None:
        super().__init__()
        self._calls: deque[Callable[[], None]] = deque() if calls is None else calls
        self._wake_r, self._wake_w = _socket_pair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self.add_handler(self._wake_r.fileno(), self._on_wake, self.READ)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Any thread: run the callback in the loop's thread."""
        self._calls.append(callback)
        self.wake()

    def wake(self) -> None:
        """Any thread: make the loop run waiting callbacks."""
        # Full: it will wake anyway. Closed: it has ended.
        with contextlib.suppress(OSError):
            self._wake_w.send(b"!")

    def _on_wake(self, _fd: int, _events: int) -> None:
        for _ in range(len(self._calls)):
            self._calls.popleft()()
        # Afterwards, as the calls are urgent. This may also consume the wake-ups of later calls.
        with contextlib.suppress(BlockingIOError):
            self._wake_r.recv(4096)
        if self._calls:
            self.wake()

    def close(self) -> None:
        try:
            self.remove_handler(self._wake_r.fileno())
            super().close()
        finally:
            self._wake_r.close()
            self._wake_w.close()


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    if hasattr(socket, "socketpair"):
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, address = server.accept()
        if address != one.getsockname():
            raise ConnectionRefusedError("another program connected to the loop's own socket")
    return one, other
