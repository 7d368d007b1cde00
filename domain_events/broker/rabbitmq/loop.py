"""pika's loop of I/O events, with four things that pika's own has not.

It can be woken from a signal handler or a finalizer that interrupts a wake-up on the same thread;
pika's takes a lock that is not re-entrant. It knows the sockets it watches, so that they can be
broken off. It can have data written at once: pika asks it first when a socket is ready, which it
nearly always is, and that takes three system calls more. And it says when a turn is at its end, so
that what is written in one turn can go together.

Knows nothing of connections. All on the loop's own thread, but `Loop.soon`.
"""

from __future__ import annotations

import contextlib
import socket
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from pika.adapters.select_connection import IOLoop


class Abortable(Protocol):
    """A stream of bytes that the loop reads and writes."""

    def abort(self) -> None:
        """Close its socket soon."""


class Loop(IOLoop):
    """One thread's loop; made on any thread, run and closed on its own.

    :param calls: what is to be called soon; its owner's, so that the next loop has what this one
        did not get to.
    :ivar writes_at_once: while true, who wants to write to a socket does so now, and waits for
        its turn only for what did not go. Not for a socket that is still being connected.
    """

    writes_at_once = False

    #: What is to be aborted when the loop ends before its time.
    streams: weakref.WeakSet[Abortable]

    def __init__(self, calls: deque[Callable[[], None]] | None = None) -> None:
        super().__init__()
        self.streams = weakref.WeakSet()
        self._handlers: dict[int, Callable[[int, int], None]] = {}
        self._writing: int | None = None  # the socket that is being written to at once
        self._wanted = 0  # what its handler asked for meanwhile
        self._in_turn = False
        self._at_end: list[Callable[[], None]] = []
        self._soon: deque[Callable[[], None]] = deque() if calls is None else calls
        self._ear, self._bell = _socket_pair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        super().add_handler(self._ear.fileno(), partial(self._turn, self._on_bell), self.READ)

    def soon(self, callback: Callable[[], None]) -> None:
        """Any thread: run the callback in the loop's thread."""
        self._soon.append(callback)
        self.wake()

    def wake(self) -> None:
        """Any thread: have the loop look at what is to be called soon."""
        # Full: it will look anyway. Closed: it has ended.
        with contextlib.suppress(OSError):
            self._bell.send(b"!")

    def at_end_of_turn(self, callback: Callable[[], None]) -> None:
        """Run the callback when what the loop is doing now is done, before it waits again."""
        if self._in_turn:
            self._at_end.append(callback)
        else:
            self.call_later(0, callback)

    def _turn(self, handler: Callable[[int, int], None], fd: int, events: int) -> None:
        self._in_turn = True
        try:
            handler(fd, events)
        finally:
            self._in_turn = False
            while self._at_end:
                self._at_end.pop(0)()

    def _on_bell(self, _fd: int, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._ear.recv(4096)
        for _ in range(len(self._soon)):
            self._soon.popleft()()
        if self._soon:
            self.wake()  # one was added meanwhile, perhaps by one of these

    def abort(self) -> None:
        """Break off all streams, now that the loop has ended; `process_timeouts` ends them."""
        self.shut_sockets()
        for stream in list(self.streams):
            with contextlib.suppress(Exception):  # it has ended already
                stream.abort()

    def close(self) -> None:
        try:
            super().remove_handler(self._ear.fileno())
            super().close()
        finally:
            self._ear.close()
            self._bell.close()

    # --- what pika watches -----------------------------------------------------------------------

    def add_handler(self, fd: int, handler: Callable[[int, int], None], events: int) -> None:
        self._handlers[fd] = handler
        super().add_handler(fd, partial(self._turn, handler), events)

    def update_handler(self, fd: int, events: int) -> None:
        if fd == self._writing:
            self._wanted = events
            return
        if self.writes_at_once and events & self.WRITE:
            events = self._written(fd, events)
            if not events & self.WRITE:
                return  # nothing is left to write, and that is how it was before
        super().update_handler(fd, events)

    def _written(self, fd: int, events: int) -> int:
        """Have the handler write; what it waits for then."""
        self._writing, self._wanted = fd, events
        try:
            self._handlers[fd](fd, self.WRITE)
        finally:
            self._writing = None
        return self._wanted

    def remove_handler(self, fd: int) -> None:
        self._handlers.pop(fd, None)
        if fd == self._writing:
            self._wanted = 0  # the connection broke under it
        super().remove_handler(fd)

    def shut_sockets(self) -> None:
        """End the conversation on every socket; pika then sees the end of its stream."""
        for fd in self._handlers:
            # Not a duplicate: there may be no descriptor left.
            borrowed = socket.socket(fileno=fd)
            try:
                borrowed.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # not connected yet, or no more: there is nothing to end
            finally:
                borrowed.detach()


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    if hasattr(socket, "socketpair"):
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, address = server.accept()
        if address != one.getsockname():
            raise ConnectionRefusedError("another program connected to the loop's own socket")
    return one, other
