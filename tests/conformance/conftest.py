"""The brokers that the guarantees are held on: what asks for a broker here runs once on each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import Names

from conformance.peer import Peer
from domain_events.broker import memory


@pytest.fixture(params=["memory", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """The URL of the broker under test."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def memory_url(unique: str) -> Iterator[str]:
    """An embedded broker of the test's own."""
    yield f"memory://{unique}"
    memory.forget(unique)


@pytest.fixture
def shared_names(rabbitmq_url: str, unique: str) -> Iterator[Names]:
    """Names for tests that run both brokers side by side, deleted from RabbitMQ afterwards."""
    names = Names(rabbitmq_url, unique)
    yield names
    names.delete()


@pytest.fixture
def peer(broker_url: str, names: Names) -> Iterator[Peer]:
    """Someone who talks to the broker by its protocol; closed before the names are deleted."""
    peer = Peer(broker_url)
    yield peer
    peer.close()
