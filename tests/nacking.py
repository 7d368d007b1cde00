"""A TCP proxy that turns acks of published messages into nacks, as if a queue had refused them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

_FRAME = struct.Struct(">BHI")
_METHOD = 1
# Class and method number. Basic.Ack and Basic.Nack have arguments of the same length.
_ACK = struct.pack(">HH", 60, 80)
_NACK = struct.pack(">HH", 60, 120)
_CHANNEL_OPEN_OK = struct.pack(">HH", 20, 11)


class NackingProxy:
    """Listens on a port of 127.0.0.1 and forwards everything to another port.

    :param refuses: called for each ack with the number of its channel, counted from 1 in the order
        in which the channels of its connection were opened; true turns the ack into a nack.
    """

    def __init__(self, port: int, refuses: Callable[[int], bool]) -> None:
        self._target = ("127.0.0.1", port)
        self._refuses = refuses
        self._sockets: list[socket.socket] = []
        #: How many acks were turned into nacks.
        self.nacks = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Stop listening, and cut all connections."""
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                broker = socket.create_connection(self._target)
                self._sockets += [client, broker]
                for target in (self._to_broker, self._to_client):
                    threading.Thread(target=target, args=(client, broker), daemon=True).start()

    def _to_broker(self, client: socket.socket, broker: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                broker.sendall(data)
            broker.shutdown(socket.SHUT_RDWR)

    def _to_client(self, client: socket.socket, broker: socket.socket) -> None:
        opened = 0
        # Channel numbers are reused: the ordinal of the channel that has this number now.
        which: dict[int, int] = {}
        with contextlib.suppress(OSError, EOFError):
            while True:
                head = _exactly(broker, _FRAME.size)
                kind, channel, size = _FRAME.unpack(head)
                body = _exactly(broker, size + 1)
                if kind == _METHOD and body.startswith(_CHANNEL_OPEN_OK):
                    opened += 1
                    which[channel] = opened
                if kind == _METHOD and body.startswith(_ACK) and self._refuses(which[channel]):
                    body = _NACK + body[4:]
                    self.nacks += 1
                client.sendall(head + body)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data
