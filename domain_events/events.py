"""``DomainEvent`` and its JSON. Pure: knows no broker.

The JSON is an object of exactly five keys (``routing_key, data, domain_object_id, uuid_string,
timestamp``), since consumers of domain-event-broker fail on a sixth. Reading is lenient: what
it does not know it ignores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import deque
from datetime import date
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from domain_events.errors import InvalidEvent
from domain_events.text import printable


@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class DomainEvent:
    """A fact from inside a bounded context that others may want to hear.

    Two events are equal when the five fields that travel are; ``retries`` does not travel in
    the envelope.

    :param routing_key: ``<DOMAIN>.<EVENT_TYPE>``, such as ``user.registered``.
    :param data: what happened: a dict or a dataclass of JSON values; datetime, date, time,
        UUID, Decimal (all as text) and Enum (as its value) may be among them.
    :param domain_object_id: the id of the object it happened to; optional.
    :param uuid_string: the event's own id: the key by which a handler can tell that it has
        seen the event before. A new one if left out.
    :param timestamp: when it happened, in Unix seconds (UTC). Now if left out.
    :param retries: how often a handler has asked to try again; 0 on the first delivery.
    """

    routing_key: str
    data: Any
    domain_object_id: str | int | UUID | None
    uuid_string: str
    timestamp: float
    retries: int

    def __init__(
        self,
        routing_key: str = "",
        data: Any = None,
        domain_object_id: str | int | UUID | None = None,
        uuid_string: str | None = None,
        timestamp: float | None = None,
        retries: int = 0,
    ) -> None:
        # One update of the dict: object.__setattr__ six times costs more than the rest of this.
        self.__dict__.update(
            routing_key=routing_key,
            data={} if data is None else data,
            domain_object_id=domain_object_id,
            uuid_string=_new_id() if uuid_string is None else uuid_string,
            timestamp=time.time() if timestamp is None else timestamp,
            retries=retries,
        )

    @property
    def event_data(self) -> dict[str, Any]:
        """The envelope as a dict: the five fields that travel."""
        return {
            "routing_key": self.routing_key,
            "data": self.data,
            "domain_object_id": self.domain_object_id,
            "uuid_string": self.uuid_string,
            "timestamp": self.timestamp,
        }

    def to_json(self) -> str:
        """The envelope as JSON.

        :raises InvalidEvent: when the data is not JSON (NaN is not).
        """
        try:
            return _encode(self.event_data)
        except (TypeError, ValueError, RecursionError) as error:
            invalid = InvalidEvent(f"The event {self.routing_key!r} is not JSON: {error}")
            invalid.event = self
            raise invalid from error

    @classmethod
    def from_json(cls, json_data: bytes | str) -> DomainEvent:
        """The event of an envelope.

        :raises InvalidEvent: when it is no JSON object with a routing key and data.
        """
        return cls(**read_envelope(json_data))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DomainEvent):
            return NotImplemented
        return self.event_data == other.event_data

    def __hash__(self) -> int:
        return hash(self.uuid_string)

    def __repr__(self) -> str:
        # Others may have written each of these: on one line, and short.
        about = ""
        if self.domain_object_id is not None:
            about = f", about {_shown(self.domain_object_id)}"
        again = f", retry {printable(self.retries, 20)}" if self.retries else ""
        key, uuid_string = _shown(self.routing_key), printable(self.uuid_string)
        return f"<DomainEvent {key} {uuid_string}{about}{again}>"


def _shown(value: object) -> str:
    return f"'{printable(value)}'" if isinstance(value, str) else printable(value)


def read_envelope(json_data: bytes | str) -> dict[str, Any]:
    """The five fields of an envelope; its id or its timestamp may be None.

    :raises InvalidEvent: when it is no JSON object with a routing key and data.
    """
    try:
        text = json_data.decode() if isinstance(json_data, bytes) else json_data
        envelope = _decode(text)
    except (ValueError, RecursionError) as error:
        raise InvalidEvent(f"Not JSON: {error}") from error
    if not isinstance(envelope, dict):
        raise InvalidEvent("Not an event: the JSON is no object.")
    routing_key = envelope.get("routing_key")
    if not isinstance(routing_key, str) or "data" not in envelope:
        raise InvalidEvent("Not an event: the envelope needs a routing_key and data.")
    uuid_string = envelope.get("uuid_string")
    if uuid_string is not None and not isinstance(uuid_string, str):
        raise InvalidEvent("Not an event: its uuid_string is no string.")
    timestamp = envelope.get("timestamp")
    if not _is_timestamp(timestamp):
        raise InvalidEvent("Not an event: its timestamp is no number.")
    return {
        "routing_key": routing_key,
        "data": envelope["data"],
        "domain_object_id": envelope.get("domain_object_id"),
        "uuid_string": uuid_string,
        "timestamp": timestamp,
    }


def _decode(text: str) -> Any:
    """What json.loads makes of it, in two thirds of the time where nothing surrounds the value."""
    try:
        value, end = _raw_decode(text)
    except ValueError:
        end = None
    return value if end == len(text) else json.loads(text)


# Random numbers that no event has yet, and the process they belong to.
_numbers: deque[int] = deque()
_numbers_of = os.getpid()
_NUMBERS_AT_ONCE = 256


def _new_id() -> str:
    """What ``str(uuid.uuid4())`` gives (RFC 9562), without letting other threads run.

    Each request for randomness does, and that cost a quarter of all that publishing in bulk
    computes. So it is fetched for many ids at once. The time goes into each, too: a virtual
    machine may be resumed from one snapshot twice, and two events must never have one id.
    """
    global _numbers_of
    if os.getpid() != _numbers_of:  # a fork: these numbers are the parent's
        _numbers.clear()
        _numbers_of = os.getpid()
    try:
        number = _numbers.popleft()
    except IndexError:
        data = os.urandom(16 * _NUMBERS_AT_ONCE)
        number, *others = (
            int.from_bytes(data[at : at + 16], "big") for at in range(0, len(data), 16)
        )
        _numbers.extend(others)
    digits = f"{number ^ time.time_ns():032x}"
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def _is_timestamp(value: object) -> bool:
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Not math.isfinite: it raises for an integer that no float can be. NaN compares false.
    return abs(value) <= sys.float_info.max


def _plain(value: object) -> object:
    """What the JSON encoder does not know, in terms that it does."""
    if isinstance(value, date | time_of_day):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, UUID | Decimal):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"a {type(value).__name__} cannot be told in JSON; convert it first.")


# One encoder for all: json.dumps with options builds a new one at each call.
_encode = json.JSONEncoder(allow_nan=False, default=_plain).encode
_raw_decode = json.JSONDecoder().raw_decode
