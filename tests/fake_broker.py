"""Servers that are no good broker: made-up ones, which answer always the same."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Server:
    """Answers each connection with the same bytes, or as RabbitMQ does that refuses a login.

    :ivar logins: how many there were.
    """

    def __init__(
        self, answer: bytes | None, *, greets: bool = False, hangs_up: bool = True
    ) -> None:
        self.answer = answer
        self.greets = greets
        self.hangs_up = hangs_up
        self.logins = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(10)
            try:
                if self.answer is None:
                    self._refuse(connection)
                    return
                if not self.greets:
                    connection.recv(1000)
                connection.sendall(self.answer)
                while not self.hangs_up and connection.recv(1000):
                    pass
            except OSError:
                pass

    def _refuse(self, connection: socket.socket) -> None:
        connection.recv(8)
        # Connection.Start: version, server's properties, mechanisms, locales.
        start = struct.pack(">HHBB", 10, 10, 0, 9) + struct.pack(">I", 0)
        connection.sendall(_frame(start + _long(b"PLAIN") + _long(b"en_US")))
        if connection.recv(4096):
            self.logins += 1
            text = b"ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN."
            close = struct.pack(">HHHB", 10, 50, 403, len(text)) + text + struct.pack(">HH", 0, 0)
            connection.sendall(_frame(close))
            connection.recv(100)


def _long(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def _frame(method: bytes) -> bytes:
    return struct.pack(">BHI", 1, 0, len(method)) + method + b"\xce"


@contextmanager
def serving(answer: bytes | None, **options: bool) -> Iterator[Server]:
    """A server while the block lasts; without an answer, it refuses each login."""
    server = Server(answer, **options)
    try:
        yield server
    finally:
        server.close()
