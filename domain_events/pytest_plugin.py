"""The pytest fixture; pytest loads it automatically where this library is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from domain_events.testing import EventBroker


@pytest.fixture
def event_broker() -> Iterator[EventBroker]:
    """An embedded broker with virtual time that replaces every broker for this test."""
    # Here and not above: pytest loads this module in every run, even if no test needs it.
    from domain_events import testing  # noqa: PLC0415

    kind = testing.EventBroker
    if "domain_events.django" in sys.modules:  # in a Django project that uses it
        from domain_events.django.testing import EventBroker  # noqa: PLC0415

        kind = EventBroker
    with kind() as broker:
        yield broker
