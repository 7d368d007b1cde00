"""The broker under test: private nodes or a given one, with proxies in front of them.

Programs connect through the proxies; the harness itself connects directly, with `pyamqp`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

import pyamqp
from pyamqp import Channel
from rabbitmq_node import Node

from faults.proxy import Proxy

#: For ``advanced.config``. A level waits this many milliseconds before it dead-letters unconfirmed
#: messages again: a node died, or the broker was just back and the next level was not. By default
#: three minutes, which `lateness` measures.
HAND_ON = "[{rabbit, [{dead_letter_worker_publisher_confirm_timeout, 3000}]}]."

# Short, so that a connection whose peer is silently gone is detected within seconds.
_HEARTBEAT = 6

_PATIENCE = 60.0
# Seconds between attempts to reach a broker that is down.
_BETWEEN_ATTEMPTS = 0.3


class Broker:
    """RabbitMQ on private nodes, one or a cluster of three; or one that was given by its URL."""

    def __init__(self, release: str = "host", *, cluster: bool = False, url: str = "") -> None:
        self.nodes: list[Node] = []
        self.proxies: list[Proxy] = []
        self._given = url
        self._turn = 0
        try:
            if not url:
                with uninterrupted():
                    for _ in range(3 if cluster else 1):
                        self.nodes.append(Node(release))
                self._start(self.nodes)
            for direct in map(urlsplit, self._direct()):
                if not (direct.username and direct.hostname and direct.port):
                    raise ValueError("the URL of a broker needs a user, a host and a port here")
                self.proxies.append(Proxy(direct.hostname, direct.port))
        except BaseException:
            self.close()
            raise

    def _start(self, nodes: Sequence[Node]) -> None:
        first, *others = nodes
        for node in nodes:
            (node.folder / "advanced.config").write_text(HAND_ON)
            node.start(wait=False)
        first.start()
        for node in others:
            node.join(first)

    @property
    def urls(self) -> list[str]:
        """The URLs to which programs connect: those of the proxies."""
        urls = []
        for direct, proxy in zip(self._direct(), self.proxies, strict=True):
            parts = urlsplit(direct)
            user, _, _ = parts.netloc.rpartition("@")
            url = parts._replace(netloc=f"{user}@127.0.0.1:{proxy.port}").geturl()
            urls.append(f"{url}{'&' if '?' in url else '?'}heartbeat={_HEARTBEAT}")
        return urls

    @property
    def version(self) -> str:
        """As RabbitMQ reports it when a client connects."""
        with self.channel() as channel:
            return str(channel.connection.server_properties["version"])

    @property
    def old(self) -> bool:
        """Whether it is a RabbitMQ 3."""
        return bool(self.nodes) and self.nodes[0].version.startswith("3.")

    def next_node(self) -> Node:
        """Each node in turn."""
        self._turn += 1
        return self.nodes[self._turn % len(self.nodes)]

    def sync(self) -> None:
        """See `Node.sync`: a quorum queue younger than a second may be forgotten in a crash."""
        for node in self.nodes:
            node.sync()
        if not self.nodes:
            # The table is written about a second later; a given broker does not show when.
            time.sleep(2)

    def close(self) -> None:
        with uninterrupted():
            for proxy in self.proxies:
                proxy.close()
            for node in self.nodes:
                node.close()

    # --- directly, without the proxies -----------------------------------------------------------

    @contextmanager
    def channel(self) -> Iterator[Channel]:
        """A separate channel on a node that responds; waits up to a minute for one."""
        with self._connection() as connection:
            yield connection.channel()

    def counts(self, queues: Sequence[str]) -> dict[str, int]:
        """How many messages are ready in each queue that exists."""
        counts: dict[str, int] = {}

        def count(channel: Channel, queue: str) -> None:
            counts[queue] = channel.queue_declare(queue, passive=True).messages

        self._each(queues, count)
        return counts

    def held(self, queues: Sequence[str]) -> int:
        """How many messages these queues hold, including those that clients cannot see.

        A quorum queue with at-least-once dead-lettering holds a message until its target has
        confirmed it, and counts it as neither ready nor unacknowledged. Only rabbitmqctl shows
        them; for a broker given by its URL the number is unknown, and 0 is returned.
        """
        if not self.nodes:
            return 0
        lines = self.nodes[0].ctl("list_queues", "name", "messages").splitlines()
        counts = (line.split("\t") for line in lines)
        return sum(int(words[1]) for words in counts if words[0] in queues and words[1].isdigit())

    def take_all(self, queue: str, reasons: dict[str, str] | None = None) -> Counter[str]:
        """Take all messages out of the queue; returns how often each event was among them.

        :param reasons: receives the reason of each dead letter, by the event's id.
        """
        ids: Counter[str] = Counter()

        def take(channel: Channel, queue: str) -> None:
            while (received := channel.basic_get(queue, auto_ack=True)) is not None:
                event = json.loads(received.body)["uuid_string"]
                ids[event] += 1
                if reasons is not None:
                    headers = received.properties.headers or {}
                    words = ("domain-events-error-type", "domain-events-error-message")
                    reasons[event] = ": ".join(str(headers.get(word, "")) for word in words)

        self._each([queue], take)
        return ids

    def delete(self, *, queue: str = "", exchange: str = "") -> None:
        """Delete the queue, the exchange, or both."""
        with self.channel() as channel:
            if queue:
                channel.queue_delete(queue)
            if exchange:
                channel.exchange_delete(exchange)

    def _each(self, queues: Sequence[str], function: Callable[[Channel, str], None]) -> None:
        """Call the function for each existing queue; retries errors for a minute."""
        left = list(queues)
        deadline = time.monotonic() + _PATIENCE
        while left:
            try:
                with self.channel() as channel:
                    while left:
                        function(channel, left[0])
                        left.pop(0)
            except pyamqp.ERRORS as error:
                if isinstance(error, pyamqp.NotFound) and "no queue" in error.reply_text:
                    left.pop(0)
                    continue
                if time.monotonic() > deadline:
                    raise
                time.sleep(_BETWEEN_ATTEMPTS)

    def _direct(self) -> list[str]:
        return [node.url for node in self.nodes] or [self._given]

    def _connection(self) -> pyamqp.Connection:
        deadline = time.monotonic() + _PATIENCE
        while True:
            for url in self._direct():
                with contextlib.suppress(*pyamqp.ERRORS):
                    return pyamqp.Connection(url, connect_timeout=5, timeout=60)
            if time.monotonic() > deadline:
                raise ConnectionError(f"no broker answered within {_PATIENCE:.0f} s")
            time.sleep(_BETWEEN_ATTEMPTS)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until this is done: a node that is half started or closed leaks its epmd."""
    pending: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _frame: pending.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pending:
        raise KeyboardInterrupt


def together(*functions: Callable[[], object]) -> None:
    """Run them at the same time, and wait for all; an error of any is raised."""
    errors: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
