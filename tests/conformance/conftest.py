"""The brokers that the guarantees are held on: what asks for a broker here runs once on each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Names

from conformance.peer import Peer
from domain_events.broker import memory

BROKERS = ["memory", "rabbitmq"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have each report say what it is about, for the count at the end of the run."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.user_properties += [("conformance", broker) for broker in brokers_of(item)]


def brokers_of(item: pytest.Item) -> list[str]:
    """The brokers that a test runs against: one of them at a time, or side by side."""
    parameters = (
        item.callspec.params
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else {}
    )
    if "broker_url" in parameters:
        return [str(parameters["broker_url"])]
    used = getattr(item, "fixturenames", ())
    return [broker for broker in BROKERS if f"{broker}_url" in used]


@pytest.fixture(params=BROKERS)
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
