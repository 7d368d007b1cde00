"""Imports a subscriber without a broker: what its module declares meanwhile is declared nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from domain_events.broker import (
    Consumer,
    Exchange,
    OnChange,
    Publication,
    Queue,
    ignore_change,
    overridden,
)
from domain_events.cli.targets import load_subscriber
from domain_events.errors import BrokerUnavailable, ConfigurationError
from domain_events.message import Delivery
from domain_events.subscriber import Subscriber


def load_offline(target: str) -> Subscriber:
    """As `load_subscriber`, for a look at what is registered; nothing reaches a broker.

    :raises NotImported: it cannot be imported.
    :raises DomainEventsError: a registration cannot work, or the module uses its broker.
    """
    with overridden(_NoBroker()):
        return load_subscriber(target)


class _NoBroker:
    """Accepts declarations, and does nothing with them. Nothing is published or consumed."""

    def publishing(
        self, name: str, declare: Exchange | None = None, on_change: OnChange = ignore_change
    ) -> _NoPublishing:
        return _NoPublishing()

    def consuming(
        self, name: str, on_failure: Callable[[], None], on_change: OnChange = ignore_change
    ) -> Any:
        return _NoConsuming()


class _NoConnection:
    def silence(self) -> float:
        return 0.0

    def close(self, timeout: float) -> None:
        pass

    def close_soon(self) -> bool:
        return False


class _NoPublishing(_NoConnection):
    trouble = ""

    def connect(self) -> None:
        """There is nothing to connect to."""

    def submit(self, publication: Publication) -> None:
        publication.error = BrokerUnavailable(
            "Nothing is published while registrations are read: the event was not sent. Publish "
            "it where the program runs, not where its modules are imported."
        )
        publication.done = True
        publication.on_done(publication)

    def withdraw(self, publication: Publication) -> bool:
        return False


class _NoConsuming(_NoConnection):
    def declare(self, queue: Queue, timeout: float) -> None:
        pass

    def failure(self) -> None:
        return None

    def consume(
        self, queue: Queue, prefetch_count: int, deliver: Callable[[Delivery, Consumer], None]
    ) -> Consumer:
        raise ConfigurationError(
            f"{queue.name}: the module consumes when it is imported; call start_consuming() under "
            "if __name__ == '__main__', so that its registrations can be read."
        )

    def __getattr__(self, name: str) -> Any:
        raise ConfigurationError(
            f"The module uses its broker when it is imported ({name}); do that where the program "
            "runs, so that its registrations can be read."
        )
