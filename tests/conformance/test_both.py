"""That the guarantees are held on both brokers, and not on one of them only."""

from __future__ import annotations

import pytest

from conformance.conftest import BROKERS, brokers_of


def test_what_asks_for_a_broker_asks_for_both(request: pytest.FixtureRequest) -> None:
    """One after the other by its parameter, or side by side; nothing here is RabbitMQ's only."""
    here = request.path.parent
    items = [item for item in request.session.items if here in item.path.parents]
    assert items
    for item in items:
        by_turns = "broker_url" in getattr(item, "fixturenames", ())
        assert by_turns or brokers_of(item) in (BROKERS, []), item.nodeid
