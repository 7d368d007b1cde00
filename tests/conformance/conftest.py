"""The brokers that the guarantees are held on: what asks for a broker here runs once on each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import Names

from conformance.peer import Peer

# False only where there is no embedded broker yet.
EMBEDDED = False

BROKERS = ["memory", "rabbitmq"] if EMBEDDED else ["rabbitmq"]


@pytest.fixture(params=BROKERS)
def broker_url(request: pytest.FixtureRequest, unique: str) -> str:
    """The URL of the broker under test: the shared RabbitMQ, or an embedded one of the test's."""
    if request.param == "memory":
        return f"memory://{unique}"
    url: str = request.getfixturevalue("rabbitmq_url")
    return url


@pytest.fixture
def both_urls(rabbitmq_url: str, unique: str) -> list[str]:
    """The URLs of both brokers, for tests that run them side by side."""
    return [f"memory://{unique}", rabbitmq_url] if EMBEDDED else [rabbitmq_url]


@pytest.fixture
def peer(broker_url: str, names: Names) -> Iterator[Peer]:
    """Someone who talks to the broker by its protocol; closed before the names are deleted."""
    peer = Peer(broker_url)
    yield peer
    peer.close()
