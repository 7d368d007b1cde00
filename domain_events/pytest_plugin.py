"""The pytest fixture; pytest finds it by itself where this library is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from domain_events.testing import EventBroker


@pytest.fixture
def event_broker() -> Iterator[EventBroker]:
    """An embedded broker in the place of every broker, for this test, with virtual time."""
    # Here and not above: pytest loads this module in every run, also where no test needs it.
    from domain_events.testing import EventBroker  # noqa: PLC0415

    with EventBroker() as broker:
        yield broker
