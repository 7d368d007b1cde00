"""A node with the management plugin, and what an operator does with it over HTTP.

`rabbitmqctl` takes seconds for each request.
"""

from __future__ import annotations

import base64
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import rabbitmq_node
from rabbitmq_node import Node
from support import wait_until

#: Milliseconds; not RabbitMQ's own.
CONSUMER_TIMEOUT = 600_000


class Managed:
    """The node, running."""

    def __init__(self, make: Callable[..., Node], release: str, programs: Path) -> None:
        self.port = rabbitmq_node.free_port()
        self.outer_port = rabbitmq_node.free_port()
        #: An address of this machine that is not loopback.
        self.outer_host = own_address()
        lines = [
            f"management.tcp.port = {self.port}",
            f"listeners.tcp.2 = {self.outer_host}:{self.outer_port}",
            "loopback_users = none",
            f"consumer_timeout = {CONSUMER_TIMEOUT}",
        ]
        self.node = make(release=release, plugins=["rabbitmq_management"], config="\n".join(lines))
        #: For the PATH.
        self.programs = programs
        self.node.write_programs(programs)

    def __enter__(self) -> Managed:
        self.node.start()
        wait_until(lambda: self.get("overview") is not None, timeout=60)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.node.close()

    @property
    def url(self) -> str:
        return self.node.url

    @property
    def management(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url_of(self, user: str, vhost: str = "/") -> str:
        """The broker's URL for a user of `user`, or for another vhost."""
        return f"amqp://{user}:{user}@127.0.0.1:{self.node.port}/{quote(vhost, safe='')}"

    # --- requests --------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        """The answer; None if there is none."""
        try:
            return self._request("GET", path)
        except (OSError, urllib.error.URLError):
            return None

    def put(self, path: str, **body: Any) -> None:
        self._request("PUT", path, body)

    def delete(self, path: str) -> None:
        self._request("DELETE", path)

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"{self.management}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": "Basic " + base64.b64encode(b"guest:guest").decode(),
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    # --- states, and back ------------------------------------------------------------------------

    @contextmanager
    def user(self, name: str, permissions: tuple[str, str, str], tags: str = "") -> Iterator[str]:
        """A user with these permissions: configure, write, read. Its URL."""
        self.put(f"users/{name}", password=name, tags=tags)
        configure, write, read = permissions
        self.put(f"permissions/%2F/{name}", configure=configure, write=write, read=read)
        yield self.url_of(name)
        self.delete(f"users/{name}")

    @contextmanager
    def policy(
        self,
        name: str,
        pattern: str,
        definition: dict[str, Any],
        *,
        apply_to: str = "queues",
        priority: int = 0,
        operator: bool = False,
    ) -> Iterator[None]:
        path = f"{'operator-policies' if operator else 'policies'}/%2F/{name}"
        body = {"pattern": pattern, "definition": definition, "priority": priority}
        self.put(path, **body, **{"apply-to": apply_to})
        yield
        self.delete(path)


def own_address() -> str:
    """An address of this machine in its network; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        address: str = probe.getsockname()[0]
        return address
