"""A fake broker, which accepts connections and then misbehaves."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType

from pika import frame
from pika.amqp_object import Method
from pika.spec import Basic, Channel, Confirm, Connection, Exchange, Queue

Behaviour = Callable[[socket.socket], None]


class Impostor:
    """Listens on a port of its own, and runs the behaviour on each connection, in a thread."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._server = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self._closed = False
        self.accepted = 0
        self._accepting = threading.Thread(target=self._accept)

    @property
    def port(self) -> int:
        port: int = self._server.getsockname()[1]
        return port

    def url(self, options: str = "", scheme: str = "amqp") -> str:
        return f"{scheme}://guest:s3cr3t-hunter2@127.0.0.1:{self.port}/%2F{options}"

    def __enter__(self) -> Impostor:
        self._accepting.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._accepting.join(10)
        self._server.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            connection, _ = self._server.accept()
            if self._closed:
                connection.close()
                return
            self.accepted += 1
            self._connections.append(connection)
            thread = threading.Thread(target=self._behave, args=(connection,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _behave(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._behaviour(connection)


def method(channel: int, sent: Method) -> bytes:
    """The frame of a method."""
    return bytes(frame.Method(channel, sent).marshal())


CAPABILITIES = {"capabilities": {"publisher_confirms": True, "basic.nack": True}}
START = method(0, Connection.Start(0, 9, CAPABILITIES, "PLAIN", "en_US"))
ANSWERS: dict[type[Method], Callable[[], Method]] = {
    Connection.StartOk: lambda: Connection.Tune(2047, 131072, 60),
    Connection.Open: Connection.OpenOk,
    Connection.Close: Connection.CloseOk,
    Channel.Open: Channel.OpenOk,
    Channel.Close: Channel.CloseOk,
    Exchange.Declare: Exchange.DeclareOk,
    Confirm.Select: Confirm.SelectOk,
    Basic.Qos: Basic.QosOk,
}


def converse(connection: socket.socket, bad: type[Method], answer: bytes) -> None:
    """Answer as a broker does, except to one method."""
    connection.recv(8, socket.MSG_WAITALL)
    connection.sendall(START)
    received = b""
    while data := connection.recv(65536):
        received += data
        while (found := frame.decode_frame(received))[0]:
            received = received[found[0] :]
            if not isinstance(found[1], frame.Method):
                continue
            asked = found[1].method
            if isinstance(asked, bad):
                connection.sendall(answer)
            elif isinstance(asked, Queue.Declare):
                declared = Queue.DeclareOk(asked.queue, 1, 0)
                connection.sendall(method(found[1].channel_number, declared))
            elif type(asked) in ANSWERS:
                connection.sendall(method(found[1].channel_number, ANSWERS[type(asked)]()))
