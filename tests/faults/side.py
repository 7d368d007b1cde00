"""An exchange to delete, with one subscriber and one publisher, apart from all others.

An event published to an exchange without bindings is confirmed and gone; one in a queue that is
deleted is gone with it. So deletions happen only while publishing pauses and every published event
has been handled. Afterwards events are published as *mandatory*: until the subscriber is back, they
raise `EventUnroutable`, and no event whose publish returned may be lost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from domain_events import DomainEvent, DomainEventsError, Publisher
from faults.evidence import Evidence
from faults.records import Recorder

_PAUSE = 0.1
_TIMEOUT = 5.0


class Side:
    """Publishes to the side exchange, on a thread of the harness."""

    def __init__(self, urls: list[str], exchange: str, folder: Path) -> None:
        self._publisher = Publisher(urls, exchange)
        self._recorder = Recorder(folder / "side-publisher.records")
        self._stopping = threading.Event()
        self._publishing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="side-publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_TIMEOUT * 3)
        self._publisher.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause publishing."""
        with self._publishing:
            yield

    def _run(self) -> None:
        number = 0
        while not self._stopping.wait(_PAUSE):
            number += 1
            event = DomainEvent("side.ok", {}, None, f"side-{number}")
            with self._publishing:
                self._publish(event)

    def _publish(self, event: DomainEvent) -> None:
        self._recorder.write("take", event.uuid_string, event.routing_key)
        outcome = "returned"
        try:
            self._publisher.publish(event, mandatory=True, timeout=_TIMEOUT)
        except DomainEventsError as error:
            outcome = type(error).__name__
        self._recorder.write("done", event.uuid_string, outcome, "0")


def all_handled(evidence: Evidence, subscriber: str) -> bool:
    """Whether every event published to the side exchange has been handled."""
    return all(
        0 in evidence.handlings[subscriber, event].returned
        for event, publication in list(evidence.publications.items())
        if publication.returned and publication.routing_key.startswith("side.")
    )
