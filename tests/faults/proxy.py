"""A TCP proxy that simulates a bad network: cut, stalled, slow and half-open connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable

_CHUNK = 65_536
# A slow connection pauses for this many seconds after each piece.
_SLOW_PAUSE = 0.02


class Proxy:
    """Listens on a port of 127.0.0.1 and forwards everything to another one, until it is disturbed.

    Runs an event loop on its own thread; the methods may be called from any other.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        # Bytes per second, towards the broker and back; 0: unlimited.
        self._rates = (0, 0)
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()

    # --- any thread ------------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset all connections; data in flight is lost."""
        self._call(self._cut_all)

    def stall(self) -> None:
        """Pass on nothing in either direction, but keep it."""
        self._call(self._flowing.clear)

    def slow(self, rate: int = 100_000, back: int = 100_000) -> None:
        """Limit each connection to about these bytes per second, towards the broker and back."""
        self._call(lambda: setattr(self, "_rates", (rate, back)))

    def flow(self) -> None:
        """Forward everything normally again."""

        def flow() -> None:
            self._rates = (0, 0)
            self._flowing.set()

        self._call(flow)

    def half_open(self) -> None:
        """Close the broker's side without notifying the clients; new connections work."""

        def lose() -> None:
            for pair in list(self._pairs):
                pair.lose_server()

        self._call(lose)

    def connections(self) -> int:
        """The number of connections."""
        return len(self._pairs)

    def half_open_connections(self) -> int:
        """The number of clients that have not noticed yet."""
        return sum(pair.lost_server for pair in list(self._pairs))

    def close(self) -> None:
        """Reset all connections and stop listening."""
        if self._thread.is_alive():
            self._call(self._loop.stop)
            self._thread.join(10)

    def _call(self, function: Callable[[], object]) -> None:
        """Run it in the loop, and wait until it is done."""
        done = threading.Event()

        def call() -> None:
            function()
            done.set()

        self._loop.call_soon_threadsafe(call)
        if not done.wait(10):
            raise RuntimeError("The proxy's loop hangs.")

    # --- the loop --------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connected, sock=self._listener, limit=_CHUNK)
        )
        self._loop.run_forever()
        server.close()
        self._cut_all()
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.close()

    def _cut_all(self) -> None:
        for pair in list(self._pairs):
            pair.cut()

    async def _connected(
        self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        pair = _Pair(to_client)
        self._pairs.add(pair)
        try:
            from_server, to_server = await asyncio.open_connection(*self._target)
            pair.to_server = to_server
            await asyncio.gather(
                self._pass_on(from_client, to_server, pair),
                self._pass_on(from_server, to_client, pair),
            )
        except (OSError, asyncio.CancelledError):
            pass  # the broker is down, or either side has disconnected, or the proxy is closed
        finally:
            pair.cut()
            self._pairs.discard(pair)
            self._tasks.discard(task)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: _Pair
    ) -> None:
        while data := await self._read(reader, writer, pair):
            # A stalled connection keeps its data, and accepts no more than the buffers hold.
            await self._flowing.wait()
            if pair.lost_server:
                continue
            while data:
                rate = self._rates[writer is pair.to_client]
                step = max(1, int(rate * _SLOW_PAUSE)) if rate else len(data)
                writer.write(data[:step])
                await writer.drain()
                data = data[step:]
                if rate:
                    await asyncio.sleep(_SLOW_PAUSE)
        if not pair.lost_server:
            pair.cut()

    async def _read(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: _Pair
    ) -> bytes:
        try:
            return await reader.read(_CHUNK)
        except OSError:
            if pair.lost_server and writer is pair.to_client:
                return b""  # as intended: the client must not notice
            raise


class _Pair:
    """A client's connection and the corresponding one to the broker."""

    def __init__(self, to_client: asyncio.StreamWriter) -> None:
        self.to_client = to_client
        self.to_server: asyncio.StreamWriter | None = None
        self.lost_server = False

    def cut(self) -> None:
        for writer in (self.to_client, self.to_server):
            if writer is not None:
                _reset(writer)

    def lose_server(self) -> None:
        if self.to_server is not None:
            self.lost_server = True
            _reset(self.to_server)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset: the kernel's buffers are dropped, as by a dead network."""
    raw: socket.socket | None = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
