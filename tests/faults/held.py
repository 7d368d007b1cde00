"""A subscriber of one process that holds many events, and whose queue allows few failures.

The event that kills the process each time must become a dead letter; the events that are held
behind it, or requeued by one orderly stop after the other, must not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from domain_events import DomainEvent, DomainEventsError, Publisher
from faults.evidence import Evidence
from faults.kinds import POISON
from faults.records import Recorder

#: The subscriber's name in the records, the report and the queue; the first word of its routing
#: keys.
LABEL = "held"

#: The delivery limit of its queue, instead of a hundred: this many processes have to die.
DELIVERY_LIMIT = 10
#: Orderly stops in a row: more than the limit.
STOPS = 15

#: Two that are handled before, the one that kills, and those that are held behind it.
POISONED = ["ok"] * 2 + [POISON] + ["ok"] * 20
#: More than are handled between the stops.
MANY = ["slow"] * 60

_TIMEOUT = 5.0


class Held:
    """Publishes to it, from a thread of the harness."""

    def __init__(self, urls: list[str], exchange: str, folder: Path) -> None:
        self._publisher = Publisher(urls, exchange)
        self._recorder = Recorder(folder / f"{LABEL}-publisher.records")
        self._number = 0

    def publish(self, kinds: Sequence[str]) -> int:
        """Publish one event of each kind, in this order; returns how many were confirmed."""
        confirmed = 0
        for kind in kinds:
            self._number += 1
            event = DomainEvent(f"{LABEL}.{kind}", {}, None, f"{LABEL}-{self._number}")
            self._recorder.write("take", event.uuid_string, event.routing_key)
            outcome = "returned"
            try:
                self._publisher.publish(event, timeout=_TIMEOUT)
            except DomainEventsError as error:
                outcome = type(error).__name__
            else:
                confirmed += 1
            self._recorder.write("done", event.uuid_string, outcome, "0")
        return confirmed

    def close(self) -> None:
        self._publisher.close()


def neighbours_handled(evidence: Evidence) -> bool:
    """Whether every event that was published to it, and does not kill, is handled."""
    return all(
        0 in evidence.handlings[LABEL, event].returned
        for event, publication in list(evidence.publications.items())
        if publication.returned
        and publication.routing_key.startswith(f"{LABEL}.")
        and not publication.routing_key.endswith(POISON)
    )
