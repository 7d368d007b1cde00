"""A TCP proxy whose connections can be cut."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from types import TracebackType
from urllib.parse import urlsplit


class Proxy:
    """Forwards to the broker behind a URL, on one thread, which owns all sockets."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = url.replace(f":{parts.port}/", f":{self._listener.getsockname()[1]}/")
        self._ear, self._bell = socket.socketpair()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Cut all connections; new ones may be made at once."""
        self._bell.send(b"c")

    def close(self) -> None:
        self._bell.send(b"q")
        self._thread.join(10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        running = True
        while running:
            for key, _ in self._selector.select():
                ready = key.fileobj
                if ready is self._listener:
                    self._connect()
                elif ready is self._ear:
                    running = b"q" not in self._ear.recv(100)
                    for each in list(self._peers):
                        self._drop(each)
                elif ready in self._peers:
                    assert isinstance(ready, socket.socket)
                    self._forward(ready)
        self._selector.close()
        for each in (self._listener, self._ear, self._bell):
            each.close()

    def _connect(self) -> None:
        client, _ = self._listener.accept()
        broker = socket.create_connection(self._target)
        for one, other in ((client, broker), (broker, client)):
            self._peers[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, ready: socket.socket) -> None:
        try:
            data = ready.recv(65536)
            self._peers[ready].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(ready)

    def _drop(self, one: socket.socket) -> None:
        other = self._peers.pop(one, None)
        if other is not None:
            self._selector.unregister(one)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
            self._drop(other)
