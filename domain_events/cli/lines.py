"""Events as JSON lines: what `publish --lines` reads, and what `tail` and `outbox` print."""

from __future__ import annotations

import json
from typing import Any

from domain_events.checks import shown
from domain_events.errors import InvalidEvent
from domain_events.events import NO_DETAILS, Details, DomainEvent, from_envelope

#: Those of the envelope, and what else an event may have.
KEYS = (
    "routing_key",
    "data",
    "domain_object_id",
    "uuid_string",
    "timestamp",
    "headers",
    "correlation_id",
    "cause",
    "version",
)
_ENVELOPE = frozenset(KEYS[:5])


def record_of(event: DomainEvent[Any]) -> dict[str, Any]:
    """The event as an object for a line; `event_of` reads it."""
    record = event.event_data
    if event.headers:
        record["headers"] = dict(event.headers)
    if event.correlation_id not in (None, event.uuid_string):
        record["correlation_id"] = event.correlation_id
    if event.cause is not None:
        record["cause"] = event.cause
    if event.version != 1:
        record["version"] = event.version
    return record


def event_of(line: bytes) -> DomainEvent[Any]:
    """The event in a line of JSON; with an id and a timestamp, also if the line has none.

    :raises InvalidEvent: it is not one. Values that can never be sent are found by publishing it.
    """
    found = value_of(line)
    if not isinstance(found, dict):
        raise InvalidEvent('not an object, such as {"routing_key": "user.registered", "data": {}}')
    unknown = next((key for key in found if key not in KEYS), None)
    if unknown is not None:
        raise InvalidEvent(f"unknown key {shown(unknown)}; the keys are {', '.join(KEYS)}")
    missing = next((key for key in KEYS[:2] if key not in found), None)
    if missing is not None:
        raise InvalidEvent(f"the key '{missing}' is missing")
    details = NO_DETAILS
    if len(found.keys() - _ENVELOPE):
        details = Details(
            found.get("headers") or {},
            found.get("correlation_id"),
            found.get("cause"),
            found.get("version", 1),
        )
    return from_envelope(
        {
            "routing_key": found["routing_key"],
            "data": found["data"],
            "domain_object_id": found.get("domain_object_id"),
            "uuid_string": found.get("uuid_string"),
            "timestamp": found.get("timestamp"),
        },
        details=details,
    )


def value_of(text: bytes) -> Any:
    """The value of a JSON text.

    :raises InvalidEvent: it is not JSON in UTF-8.
    """
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidEvent(f"not UTF-8: {error.reason} at byte {error.start:,}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidEvent(
            f'not JSON: {error}. Keys and texts take double quotes, as in {{"name": "Ada"}}.'
        ) from None
