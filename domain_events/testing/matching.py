"""Whether an event is as expected, and what is different. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from domain_events.events import DomainEvent, key_text, simplified
from domain_events.kinds import field_names
from domain_events.names import matches


class _Anything:
    def __repr__(self) -> str:
        return "ANYTHING"


#: Matches any value.
ANYTHING = _Anything()


@dataclass(frozen=True)
class Expectation:
    """What a test expects of an event."""

    binding_key: str
    data: object = ANYTHING
    about: object = ANYTHING
    headers: Mapping[str, object] | None = None

    def __str__(self) -> str:
        words = f"an event {self.binding_key!r}"
        if self.about is not ANYTHING:
            words += f" about {self.about!r}"
        if self.data is not ANYTHING:
            words += f" with {self.data!r}"
        return words if self.headers is None else f"{words} and the headers {self.headers!r}"

    def difference(self, event: DomainEvent[Any]) -> str:
        """Empty if the event is as expected."""
        if not matches(self.binding_key, event.routing_key):
            return "another routing key"
        if self.about is not ANYTHING and event.domain_object_id != self.about:
            return f"domain_object_id is {event.domain_object_id!r}"
        different = "" if self.data is ANYTHING else _difference(event.data, self.data, "data")
        return different or _difference(event.headers, self.headers or {}, "headers")

    def listing(self, events: Iterable[DomainEvent[Any]]) -> str:
        """Each event on a line of its own, with what is different."""
        lines = []
        for event in events:
            mark = self.difference(event) or "as expected"
            lines.append(f"  {event.routing_key} {event.data!r}   <- {mark}")
        return "\n".join(lines)


def _difference(actual: Any, expected: Any, where: str, exact: bool = False) -> str:
    """A mapping is as expected if it has at least these entries; all else must be equal.

    :param actual: as read from JSON.
    :param exact: it is a part of an object, which is compared with all its fields.
    """
    if actual == expected:
        return ""
    exact = exact or bool(field_names(type(expected)))
    # As published. What has no JSON, such as unittest.mock.ANY, compares as it likes.
    with contextlib.suppress(Exception):
        expected = simplified(expected)
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        return _difference_of_entries(actual, expected, where, exact)
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        if len(actual) != len(expected):
            return f"{where} has {len(actual)} entries"
        for index, value in enumerate(expected):
            if different := _difference(actual[index], value, f"{where}[{index}]", exact):
                return different
        return ""
    return "" if actual == expected else f"{where} is {actual!r}"


def _difference_of_entries(
    actual: Mapping[Any, Any], expected: Mapping[Any, Any], where: str, exact: bool
) -> str:
    missed = set(actual)
    for given, value in expected.items():
        key = given
        if key not in actual:
            with contextlib.suppress(TypeError):  # not a key in JSON
                key = key_text(key)
        entry = f"{where}[{key!r}]"
        if key not in actual:
            return f"{entry} is missing"
        if different := _difference(actual[key], value, entry, exact):
            return different
        missed.discard(key)
    return f"{where}[{min(missed)!r}] is not expected" if exact and missed else ""
