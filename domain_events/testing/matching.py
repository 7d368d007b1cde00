"""Whether an event is as expected, and what is different. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from domain_events.events import DomainEvent
from domain_events.names import matches


class _Anything:
    def __repr__(self) -> str:
        return "ANYTHING"


#: Matches any value.
ANYTHING = _Anything()


def difference(event: DomainEvent, binding_key: str, data: object, about: object) -> str:
    """Empty if the event is as expected."""
    if not matches(binding_key, event.routing_key):
        return "another routing key"
    if about is not ANYTHING and event.domain_object_id != about:
        return f"domain_object_id is {event.domain_object_id!r}"
    return "" if data is ANYTHING else _difference(event.data, data, "data")


def expectation(binding_key: str, data: object, about: object) -> str:
    """The expected event, in words."""
    words = f"an event {binding_key!r}"
    if about is not ANYTHING:
        words += f" about {about!r}"
    return words if data is ANYTHING else f"{words} with {data!r}"


def listing(events: Iterable[DomainEvent], binding_key: str, data: object, about: object) -> str:
    """Each event on a line of its own, with what is different."""
    lines = []
    for event in events:
        different = difference(event, binding_key, data, about)
        mark = f"   <- {different}" if different else "   <- as expected"
        lines.append(f"  {event.routing_key} {event.data!r}{mark}")
    return "\n".join(lines)


def _difference(actual: Any, expected: Any, where: str) -> str:
    """A mapping is as expected if it has at least these entries; all else must be equal."""
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        for key, value in expected.items():
            entry = f"{where}[{key!r}]"
            if key not in actual:
                return f"{entry} is missing"
            if different := _difference(actual[key], value, entry):
                return different
        return ""
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        if len(actual) != len(expected):
            return f"{where} has {len(actual)} entries"
        for index, value in enumerate(expected):
            if different := _difference(actual[index], value, f"{where}[{index}]"):
                return different
        return ""
    return "" if actual == expected else f"{where} is {actual!r}"
