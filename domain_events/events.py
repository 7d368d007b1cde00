"""``DomainEvent`` and its JSON. Pure.

The JSON is an object of exactly five keys (``routing_key, data, domain_object_id, uuid_string,
timestamp``), since consumers of domain-event-broker fail on a sixth. Reading is lenient: unknown
keys are ignored.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypedDict
from uuid import UUID, uuid5

from domain_events.checks import shown
from domain_events.errors import InvalidEvent
from domain_events.kinds import field_names, fields_of
from domain_events.text import plain, printable

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Data = TypeVar("Data", default=Any)
else:
    from typing import TypeVar

    Data = TypeVar("Data")

#: The value of a header: what RabbitMQ also keeps in streams, and passes to AMQP 1.0.
HeaderValue: TypeAlias = str | int | bool


class Details(NamedTuple):
    """What is known of an event besides its envelope; see the properties of `DomainEvent`."""

    headers: Mapping[str, Any] = MappingProxyType({})
    correlation_id: str | None = None
    cause: str | None = None
    version: int = 1
    redelivered: bool = False
    replayed: bool = False
    subscriber: str | None = None
    exchange: str | None = None
    #: Of an event from an outbox, the program that wrote it.
    app_id: str | None = None


#: Of an event of which nothing is known besides its envelope.
NO_DETAILS = Details()


@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class DomainEvent(Generic[Data]):
    """A fact from inside a bounded context that other services may want to know.

    Two events are equal when the five fields of their envelopes are; all else, ``retries`` too, is
    known besides and travels in the message's properties and headers.

    :param routing_key: ``<DOMAIN>.<EVENT_TYPE>``, such as ``user.registered``.
    :param data: what happened: a dict of JSON values, or an object with fields: a dataclass, a
        pydantic model, a msgspec struct, an attrs class. datetime, date, time, UUID, Decimal (all
        as text) and Enum (as its value) may be among the values. A tuple, also a named one,
        arrives as a list, and a key that is a number as text. None is an empty dict.
    :param domain_object_id: the id of the object it happened to; optional.
    :param uuid_string: the event's own id: the key by which a handler can recognize an
        event that it has seen before. A new one if left out.
    :param timestamp: when it happened, in Unix seconds (UTC). Now if left out.
    :param retries: how often it was retried; 0 on the first delivery.
    :param headers: what else to send with it: a str, an int or a bool by each name. Names that
        begin with ``domain-events-`` or ``x-`` are not for these.
    :param correlation_id: shared by all events that one event has caused. If left out, that of
        the event being handled, or else its own id.
    :param cause: the id of the event that caused it; that of the event being handled, if left out.
    :param version: of its data; subscribers turn older ones into newer ones by ``upcast``.
    :raises InvalidEvent: when ``retries`` is not an int >= 0.
    """

    routing_key: str
    data: Data
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
        *,
        headers: Mapping[str, HeaderValue] | None = None,
        correlation_id: str | None = None,
        cause: str | None = None,
        version: int = 1,
    ) -> None:
        # One update of the dict: object.__setattr__ six times costs more than the rest of this.
        self.__dict__.update(
            routing_key=routing_key if type(routing_key) is str else _exact(routing_key),
            data={} if data is None else data,
            domain_object_id=None if domain_object_id is None else _exact(domain_object_id),
            uuid_string=_new_id() if uuid_string is None else _exact(uuid_string),
            timestamp=time.time() if timestamp is None else _exact(timestamp),
            retries=retries,
        )
        if type(retries) is not int or retries < 0:
            if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
                raise InvalidEvent(
                    f"An event's retries must be an int from 0, not {shown(retries)}."
                )
            self.__dict__["retries"] = int.__int__(retries)
        if headers or correlation_id is not None or cause is not None or version != 1:
            copied = dict(headers) if isinstance(headers, Mapping) else headers
            self.__dict__["_details"] = Details(copied or {}, correlation_id, cause, version)

    @property
    def headers(self) -> Mapping[str, Any]:
        """The headers that came with it, or are to be sent with it, except this library's own."""
        headers = self.details.headers
        return MappingProxyType(headers) if isinstance(headers, dict) else headers

    @property
    def correlation_id(self) -> str | None:
        """Shared by all events that one event has caused; None before it is published."""
        return self.details.correlation_id

    @property
    def cause(self) -> str | None:
        """The id of the event during whose handling it was published, if any."""
        return self.details.cause

    @property
    def version(self) -> int:
        """The version of its data, as published; 1 unless the publisher has given another."""
        return self.details.version

    @property
    def redelivered(self) -> bool:
        """Whether it was delivered before and came back unsettled, as after a crash."""
        return self.details.redelivered

    @property
    def replayed(self) -> bool:
        """Whether an operator has returned it from the dead letters."""
        return self.details.replayed

    @property
    def subscriber(self) -> str | None:
        """The name of the subscriber that it was delivered to; None if it was not."""
        return self.details.subscriber

    def with_details(self, details: Details) -> DomainEvent[Data]:
        """A copy with these.

        :meta private:
        """
        event = type(self).__new__(type(self))
        event.__dict__.update(self.__dict__, _details=details)
        event.__dict__.pop("_derived", None)
        return event

    @property
    def exchange(self) -> str | None:
        """The exchange on which that subscriber is."""
        return self.details.exchange

    @property
    def details(self) -> Details:
        """All of these.

        :meta private:
        """
        details: Details | Callable[[], Details] = self.__dict__.get("_details", NO_DETAILS)
        if callable(details):
            details = self.__dict__["_details"] = details()
        return details

    def derived(
        self,
        routing_key: str,
        data: Any = None,
        domain_object_id: str | int | UUID | None = None,
        *,
        key: str = "",
        timestamp: float | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        version: int = 1,
    ) -> DomainEvent[Any]:
        """A follow-up event whose id is computed from this one's.

        A handler that runs twice for one event, after a crash or a retry, so publishes the same
        event twice, which its subscribers recognize by the id, and not two events. The id depends
        on this event, its subscriber, the routing key, ``domain_object_id`` and ``key``, and on
        nothing else. This event is its cause.

        ::

            def handle_order(event):
                for line in event.data['lines']:
                    publisher.publish(event.derived('line.shipped', line, key=line['sku']))

        :param key: tells several apart that have the same routing key and object: something that
            is the same each time, such as a position's number, and not a counter.
        :raises InvalidEvent: the same one was derived before, with other data: one of them would
            be taken for a copy of the other.
        """
        parts = [self.uuid_string, self.subscriber, routing_key, domain_object_id, key]
        derived = DomainEvent(
            routing_key,
            data,
            domain_object_id,
            str(uuid5(_DERIVED, json.dumps(list(map(str, parts))))),
            timestamp,
            headers=headers,
            correlation_id=self.correlation_id or self.uuid_string,
            cause=self.uuid_string,
            version=version,
        )
        known: dict[str, DomainEvent[Any]] = self.__dict__.setdefault("_derived", {})
        first = known.setdefault(derived.uuid_string, derived)
        if first.data != derived.data:
            raise InvalidEvent(
                f"Two events {printable(repr(routing_key))} with different data would be derived "
                f"from {printable(self)}, and have the same id, so that subscribers took one for a "
                "copy of the other; give each a key=... of its own, such as the number of the "
                "position it is about."
            )
        return first

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__}
        state.pop("_derived", None)
        if "_details" in state:
            # A delivery, which they may still have to be read from, is its connection's own.
            details = self.details
            state["_details"] = Details(dict(details.headers), *details[1:])
        return state

    if not TYPE_CHECKING:  # for a type checker, every attribute would exist

        def __getattr__(self, name: str) -> Any:
            # Only called for missing attributes. Not `self.data`, which is missing, too, while an
            # event is being unpickled.
            error = f"A DomainEvent has no attribute {name!r}"
            data = self.__dict__.get("data")
            if isinstance(data, dict) and name in data:
                error += f"; it is in the event's data: event.data[{name!r}]"
            elif name in field_names(type(data)):
                error += f"; it is in the event's data: event.data.{name}"
            raise AttributeError(error, name=name, obj=self)

    @property
    def event_data(self) -> dict[str, Any]:
        """The envelope as a dict of its five fields."""
        return {
            "routing_key": self.routing_key,
            "data": self.data,
            "domain_object_id": self.domain_object_id,
            "uuid_string": self.uuid_string,
            "timestamp": self.timestamp,
        }

    def to_json(self) -> str:
        """The envelope as JSON.

        :raises InvalidEvent: when the data is not JSON (NaN is not), or would lose a value in
            JSON: of two keys that are the same text, ``1`` and ``'1'``, only one would arrive;
            and when ``domain_object_id`` is neither a str, an int, a UUID nor None.
        """
        data, about = self.data, self.domain_object_id
        if about is not None and type(about) is not str and not _is_id(about):
            raise self._invalid_error(
                "domain_object_id must be a str, an int, a UUID or None, not of type "
                f"{type(about).__name__}; give the object's id, such as str(user.id)."
            )
        try:
            envelope = self.event_data
            content = data
            if type(data) is not dict and not isinstance(data, _JSON_TYPES):
                content = envelope["data"] = fields_of(data)
            text = encode(envelope)
            # Most events need no walk: without a brace after the first character, the data has no
            # nested object, and join() checks that all its keys are str.
            if text.find("{", text.index('"data": ') + 9) > 0:
                _refuse_clashing_keys(content)
            elif isinstance(content, dict):
                try:
                    "".join(content)
                except TypeError:
                    _refuse_clashing_keys(content)
            elif not isinstance(content, _JSON_TYPES):  # an Enum, whose value may be a dict
                _refuse_clashing_keys(content)
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, RecursionError):
                why = "its data is nested too deeply, or contains itself"
            elif isinstance(self.timestamp, int | float) and not is_timestamp(self.timestamp):
                why = f"its timestamp must be Unix seconds, not {printable(self.timestamp, 80)}"
            else:
                why = f"{error}{_where(data)}"
            raise self._invalid_error(f"it is not JSON: {why}") from error
        return text

    def _invalid_error(self, why: str) -> InvalidEvent:
        error = InvalidEvent(
            f"The event {printable(repr(self.routing_key))} cannot be published: {why}"
        )
        error.event = self
        return error

    @classmethod
    def from_json(cls, json_data: bytes | str) -> DomainEvent[Any]:
        """The event of an envelope.

        :param json_data: JSON in UTF-8; a byte order mark before it is ignored.
        :raises InvalidEvent: when it is not a JSON object with a routing key and data.
        """
        return from_envelope(read_envelope(json_data), kind=cls)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DomainEvent):
            return NotImplemented
        return self.event_data == other.event_data

    def __hash__(self) -> int:
        return hash(self.uuid_string)

    def __repr__(self) -> str:
        # Other programs may have written each of these: on one line, and short.
        about = ""
        if self.domain_object_id is not None:
            about = f", about {_shown(self.domain_object_id)}"
        again = f", retry {printable(self.retries, 20)}" if self.retries else ""
        key, uuid_string = _shown(self.routing_key), printable(self.uuid_string)
        return f"<DomainEvent {key} {uuid_string}{about}{again}>"


def _shown(value: object) -> str:
    return f"'{printable(value)}'" if isinstance(value, str) else printable(value)


class Envelope(TypedDict):
    """The fields of an envelope, as read; a missing id or timestamp is None."""

    routing_key: str
    data: Any
    domain_object_id: Any
    uuid_string: str | None
    timestamp: float | None


def from_envelope(
    envelope: Envelope,
    retries: int = 0,
    kind: type[DomainEvent[Any]] = DomainEvent,
    details: Callable[[], Details] | None = None,
) -> DomainEvent[Any]:
    """The event that was read.

    :param details: called when they are needed.

    Not by its constructor, which replaces None as data by an empty dict: here, null stays null.
    """
    event = kind.__new__(kind)
    event.__dict__.update(envelope, retries=retries)
    if envelope["uuid_string"] is None:
        event.__dict__["uuid_string"] = _new_id()
    if envelope["timestamp"] is None:
        event.__dict__["timestamp"] = time.time()
    if details is not None:
        event.__dict__["_details"] = details
    return event


def with_data(event: DomainEvent[Any], data: Any) -> DomainEvent[Any]:
    """The same event, received with other data: as its handler takes them."""
    copy = type(event).__new__(type(event))
    copy.__dict__.update(event.__dict__, data=data)
    return copy


def read_envelope(json_data: bytes | str) -> Envelope:
    """The five fields of an envelope.

    :raises InvalidEvent: when it is not a JSON object with a routing key and data.
    """
    if not isinstance(json_data, bytes | str):
        raise InvalidEvent(
            f"Not an event: JSON is a str or bytes, not of type {type(json_data).__name__}; with a "
            "dict of the five fields, call DomainEvent(**fields)."
        )
    try:
        text = json_data.decode() if isinstance(json_data, bytes) else json_data
        envelope = _decode(text)
    except (ValueError, RecursionError) as error:
        raise InvalidEvent(f"Not JSON in UTF-8: {error}") from error
    if not isinstance(envelope, dict):
        raise InvalidEvent("Not an event: the JSON must be an object.")
    routing_key = envelope.get("routing_key")
    if not isinstance(routing_key, str) or "data" not in envelope:
        raise InvalidEvent("Not an event: the envelope needs a routing_key and data.")
    uuid_string = envelope.get("uuid_string")
    if uuid_string is not None and not isinstance(uuid_string, str):
        raise InvalidEvent("Not an event: its uuid_string must be a string.")
    timestamp = envelope.get("timestamp")
    if not is_timestamp(timestamp):
        raise InvalidEvent("Not an event: its timestamp must be a number.")
    return {
        "routing_key": routing_key,
        "data": envelope["data"],
        "domain_object_id": envelope.get("domain_object_id"),
        "uuid_string": uuid_string,
        "timestamp": timestamp,
    }


def _decode(text: str) -> Any:
    """The same as json.loads, in two thirds of the time if no whitespace surrounds the value."""
    try:
        value, end = _raw_decode(text)
    except ValueError:
        end = None
    # .NET's encoder writes a byte order mark, which json.loads refuses.
    return value if end == len(text) else json.loads(text.removeprefix("\ufeff"))


# The namespace of the ids of derived events (RFC 9562, version 5); never to be changed.
_DERIVED = UUID("5b0c7f0e-7d0a-4f55-9a6e-2f4f0a6c9d31")

# Unused random numbers, and the process they belong to.
_numbers: deque[int] = deque()
_numbers_of = os.getpid()
_NUMBERS_AT_ONCE = 256


def _new_id() -> str:
    """The same as ``str(uuid.uuid4())`` (RFC 9562), without releasing the GIL each time.

    ``os.urandom`` releases it, which cost a quarter of the CPU time of publishing in bulk. So
    random numbers are fetched for many ids at once. The time goes into each id, too: a virtual
    machine may be resumed twice from one snapshot, and two events must never share an id.
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


def _exact(value: Any) -> Any:
    """A str or a number as its exact type, also of an Enum member, numpy.float64, SafeString."""
    if type(value) in _EXACT:
        return value
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, int):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, float) else value


def _is_id(value: object) -> bool:
    return isinstance(value, str | int | UUID) and not isinstance(value, bool)


def is_timestamp(value: object) -> bool:
    """Whether it is valid as the timestamp of an envelope."""
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Not math.isfinite: it raises for an int that is too large for a float. NaN compares false.
    return abs(value) <= sys.float_info.max


def _default(value: object) -> object:
    """Convert a type that the JSON encoder does not support."""
    if isinstance(value, date | time_of_day):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, UUID | Decimal):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    fields = fields_of(value)
    if fields is value:
        raise TypeError(_unsuitable(value))
    return fields


def _unsuitable(value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        advice = (
            "give it as text, base64.b64encode(value).decode(), or store it and publish where it is"
        )
    elif isinstance(value, timedelta):
        advice = "give its total_seconds()"
    elif isinstance(value, set | frozenset):
        advice = "give a list, such as sorted(value)"
    elif isinstance(value, type):
        advice = f"it is a class, so give an object of it, {value.__name__}(...)"
    else:
        advice = "convert it first, for example to a dict, a list or a str"
    return f"a value of type {type(value).__name__} is not JSON-serializable; {advice}"


def _refuse_clashing_keys(data: object) -> None:
    """Raise if two keys of a dict are the same in JSON: one of their values would be lost.

    :param data: encoded before, hence not cyclic.
    """
    waiting = [data]
    for value in waiting:  # which grows meanwhile
        if isinstance(value, dict):
            try:
                "".join(value)
            except TypeError:
                _refuse_clash(value)
            for part in value.values():
                if type(part) not in _EXACT:
                    waiting.append(part)  # noqa: PERF401 - a list of them costs more
        elif isinstance(value, list | tuple):
            waiting += [part for part in value if type(part) not in _EXACT]
        elif not isinstance(value, str | int | float):
            waiting.append(_default(value))


def _refuse_clash(keys: Iterable[object]) -> None:
    seen: dict[str, object] = {}
    for key in keys:
        text = key_text(key)
        if text in seen:
            raise ValueError(
                f"the keys {seen[text]!r} and {key!r} are the same text in JSON, so that one of "
                "their values would be lost; rename one of them"
            )
        seen[text] = key


def key_text(key: object) -> str:
    """The text of a dictionary's key in JSON."""
    return plain(key) if isinstance(key, str) else encode(key)


def simplified(value: object) -> object:
    """A value as the type that it has in JSON, but nothing inside it.

    :raises TypeError: it has none.
    """
    return value if isinstance(value, _JSON_TYPES) else _default(value)


def _where(data: object) -> str:
    """For an error: where in the data the value is that cannot be encoded; empty if not there."""
    if _is_json(data):
        return ""
    path = "event.data"
    going_on = True
    while going_on and len(path) < _LONGEST_PATH:
        going_on = False
        for step, part in _parts(data):
            if not _is_json(part):
                path, data, going_on = path + step, part, True
                break
    return f" (at {path})"


def _parts(value: object) -> Iterable[tuple[str, object]]:
    if isinstance(value, dict):
        return [(f"[{printable(repr(key), 60)}]", part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{at}]", part) for at, part in enumerate(value)]
    try:
        fields = fields_of(value)
    except (TypeError, ValueError, RecursionError):  # a serializer of the user's, for pydantic
        return []
    if fields is value:
        return []
    if not isinstance(fields, dict):
        return [("", fields)]
    return [(f".{printable(name, 60)}", part) for name, part in fields.items()]


def _is_json(value: object) -> bool:
    try:
        encode(value)
        _refuse_clashing_keys(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


# What the JSON encoder supports by itself.
_JSON_TYPES = (dict, str, int, float, list, tuple, type(None))
_EXACT = frozenset({str, int, float, bool, type(None), UUID})
_LONGEST_PATH = 200


def _encoder() -> Callable[[object], str]:
    """One encoder for all events. Cyclic data raises RecursionError, as too deep data does."""
    encoder = json.JSONEncoder(allow_nan=False, check_circular=False, default=_default)
    quote = json.encoder.encode_basestring_ascii
    try:
        # JSONEncoder.encode() makes one of these at each call: a fifth of all its time.
        chunks = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
            None, _default, quote, None, ": ", ", ", False, False, False
        )
    except (AttributeError, TypeError):  # this Python has none, or another one
        return encoder.encode
    return lambda value: "".join(chunks(value, 0))


#: The JSON of a value.
#: The JSON of a value.
encode = _encoder()
_raw_decode = json.JSONDecoder().raw_decode
