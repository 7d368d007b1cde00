"""The pytest fixture; pytest loads it automatically where this library is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from domain_events.testing import EventBroker

_AUTOUSE = "domain_events_autouse"


@pytest.fixture
def event_broker() -> Iterator[EventBroker]:
    """An embedded broker with virtual time that replaces every broker for this test."""
    # Here and not above: pytest loads this module in every run, even if no test needs it.
    from domain_events.testing import EventBroker  # noqa: PLC0415

    with EventBroker() as broker:
        yield broker


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(_AUTOUSE, "Let every test have the fixture event_broker.", "bool", False)


def pytest_configure(config: pytest.Config) -> None:
    if config.getini(_AUTOUSE):
        # A plugin of its own, so that without the option no test has a fixture more.
        config.pluginmanager.register(_Autouse(), _AUTOUSE)


class _Autouse:
    @pytest.fixture(autouse=True)
    def _every_test_has_an_event_broker(self, event_broker: EventBroker) -> None:
        """Also those of unittest, which cannot ask for a fixture."""
