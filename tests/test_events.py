"""What is promised of a domain event and its JSON: domain_events/events.py."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any
from uuid import RFC_4122, UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from domain_events import DomainEvent, InvalidEvent
from domain_events import events as events_module
from domain_events.events import read_envelope

# Machines that are shared are slow at times.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

ENVELOPE = ["routing_key", "data", "domain_object_id", "uuid_string", "timestamp"]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Also half a surrogate pair: JSON can tell it.
    | st.text(st.characters(exclude_categories=())),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=12,
)

events: st.SearchStrategy[DomainEvent] = st.builds(
    DomainEvent,
    routing_key=st.text(),
    data=json_values.filter(lambda value: value is not None),
    domain_object_id=st.none() | st.text() | st.integers(),
    uuid_string=st.none() | st.text(),
    timestamp=st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    retries=st.integers(min_value=0),
)


@dataclasses.dataclass
class Address:
    street: str
    since: date


@dataclasses.dataclass
class Moved:
    user_id: UUID
    to: Address


class Plan(Enum):
    FREE = "free"
    PAID = 2
    FROM_2030 = date(2030, 1, 1)


class Level(IntEnum):
    HIGH = 3


# ------------------------------------------------------------------ the import


def test_importing_the_package_does_not_import_pika() -> None:
    """Who only builds events, or publishes to no broker, does not load pika."""
    code = "import domain_events, sys; sys.exit('pika' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------ an event


def test_id_is_a_random_uuid() -> None:
    """Version 4 of RFC 9562 in its usual form, and no two alike."""
    ids = {DomainEvent("user.registered").uuid_string for _ in range(2000)}
    assert len(ids) == 2000
    for each in ids:
        assert str(UUID(each)) == each
        assert (UUID(each).version, UUID(each).variant) == (4, RFC_4122)
    # Nor is a digit that should be random always the same; the third group begins with the
    # version, the fourth with one of four.
    digits = [set(column) for column in zip(*ids, strict=True)]
    counts = {len(each) for at, each in enumerate(digits) if at not in (8, 13, 14, 18, 19, 23)}
    assert (counts, len(digits[14]), digits[19]) == ({16}, 1, set("89ab"))


def test_ids_are_unique_among_threads() -> None:
    """They share the numbers that ids are made of."""
    ids: list[str] = []

    def work() -> None:
        ids.extend([DomainEvent("a.b").uuid_string for _ in range(5000)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 8 * 5000


def test_child_of_a_fork_has_ids_of_its_own() -> None:
    """None of those that its parent gives after it."""
    program = """
        import os
        from domain_events import DomainEvent
        DomainEvent("a.b")  # the numbers that ids are made of are there
        if os.fork():
            os.wait()  # or their lines would mix
        # What is random in an id, and nothing else.
        print(*(DomainEvent("a.b").uuid_string[:13] for _ in range(50)), flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    first, second = (set(line.split()) for line in output.splitlines())
    assert len(first) == len(second) == 50
    assert not first & second


def test_machine_resumed_twice_from_one_snapshot_never_gives_one_id_twice() -> None:
    """Which has the same numbers each time, but never the same time."""
    DomainEvent("a.b")
    snapshot = list(events_module._numbers)
    first = [DomainEvent("a.b").uuid_string for _ in snapshot]
    events_module._numbers.clear()
    events_module._numbers.extend(snapshot)
    second = [DomainEvent("a.b").uuid_string for _ in snapshot]
    assert [each[:8] for each in first] == [each[:8] for each in second]
    assert not set(first) & set(second)


def test_what_is_left_out_has_a_default() -> None:
    """An event has an id of its own, the time it was made, no object, no retries."""
    before = time.time()
    event = DomainEvent("user.registered", {"user_id": 1})
    assert (event.routing_key, event.data) == ("user.registered", {"user_id": 1})
    assert event.domain_object_id is None
    assert str(UUID(event.uuid_string)) == event.uuid_string
    assert before <= event.timestamp <= time.time()
    assert event.retries == 0


def test_arguments_may_be_given_by_position() -> None:
    """The order of domain-event-broker: routing key, data, object, id, timestamp, retries."""
    event = DomainEvent("a.b", {"x": 1}, "object", "id", 12.5, 3)
    assert [event.event_data[name] for name in ENVELOPE] == ["a.b", {"x": 1}, "object", "id", 12.5]
    assert event.retries == 3


def test_an_event_without_arguments_is_empty() -> None:
    """As in domain-event-broker, every argument may be left out."""
    assert (DomainEvent().routing_key, DomainEvent().data) == ("", {})


def test_events_share_no_data_and_no_id() -> None:
    """The default data of one event is not that of the next."""
    first, second = DomainEvent("a"), DomainEvent("a")
    assert first.data is not second.data
    assert first.uuid_string != second.uuid_string


def test_falsy_values_are_kept() -> None:
    """Only what is left out has a default: zero and empty values are values."""
    event = DomainEvent("a", [], 0, "", 0)
    assert list(event.event_data.values()) == ["a", [], 0, "", 0]


@pytest.mark.parametrize("name", [*ENVELOPE, "retries"])
def test_an_event_cannot_be_changed(name: str) -> None:
    """A fact stays as it is."""
    event = DomainEvent("a.b", {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, name, "other")
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(event, name)


@pytest.mark.parametrize("name", ENVELOPE)
def test_events_that_differ_in_the_envelope_are_unequal(name: str) -> None:
    """Each of the five fields that travel counts."""
    event = DomainEvent("a.b", {}, "object", "id", 1.0)
    assert dataclasses.replace(event) == event
    changed: dict[str, Any] = {name: "other"}
    assert dataclasses.replace(event, **changed) != event


def test_retries_do_not_make_an_event_another_one() -> None:
    """The same fact on its third try is equal, and found in a set."""
    event = DomainEvent("a.b", {}, retries=0)
    again = dataclasses.replace(event, retries=3)
    assert again == event
    assert again in {event}


def test_an_event_is_not_equal_to_another_thing() -> None:
    """Comparing with what is no event is False, no error; the other side may say otherwise."""
    event = DomainEvent("a.b", {})
    assert event != event.event_data
    assert event.__eq__(event.event_data) is NotImplemented


@patient
@given(events)
def test_equal_events_have_equal_hashes(event: DomainEvent) -> None:
    """Also with data that cannot be hashed."""
    twin = DomainEvent(**copy.deepcopy(event.event_data))
    assert twin == event
    assert hash(twin) == hash(event)


@patient
@given(events)
def test_an_event_survives_copying_and_pickling(event: DomainEvent) -> None:
    """An event may be handed to another process."""
    for twin in (copy.copy(event), copy.deepcopy(event), pickle.loads(pickle.dumps(event))):
        assert twin == event
        assert twin.retries == event.retries


def test_repr_names_the_event_and_tells_nothing_of_its_data() -> None:
    """Routing key, id, object and retries: what a log line may have, never the payload."""
    event = DomainEvent("user.registered", {"name": "Ada"}, uuid_string="id-1")
    assert repr(event) == "<DomainEvent 'user.registered' id-1>"
    event = DomainEvent("user.registered", {"name": "Ada"}, 17, "id-1", retries=2)
    assert repr(event) == "<DomainEvent 'user.registered' id-1, about 17, retry 2>"


def test_repr_is_a_short_line_whatever_others_have_written() -> None:
    """An id that clears the screen, a key with a newline, an object of a megabyte."""
    event = DomainEvent("a\n.b", {}, "x" * 10**6, "\x1b[2J" + "y" * 10**6)
    assert repr(event).isprintable()
    assert len(repr(event)) < 800
    assert repr(event).startswith(r"<DomainEvent 'a\n.b' \x1b[2Jyyy")


# ------------------------------------------------------------------ to JSON


@patient
@given(events)
def test_an_event_survives_its_json(event: DomainEvent) -> None:
    """As text and as bytes; the retries stay behind."""
    as_json = event.to_json()
    for twin in (DomainEvent.from_json(as_json), DomainEvent.from_json(as_json.encode())):
        assert twin == event
        assert twin.retries == 0


@patient
@given(events)
def test_the_json_has_exactly_five_keys(event: DomainEvent) -> None:
    """Consumers of domain-event-broker fail on a sixth."""
    assert list(json.loads(event.to_json())) == ENVELOPE
    assert list(event.event_data) == ENVELOPE


def test_changing_event_data_does_not_change_the_event() -> None:
    """``event_data`` is a dict of its own."""
    event = DomainEvent("a.b", {})
    event.event_data["routing_key"] = "other"
    assert event.routing_key == "a.b"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (datetime(2024, 5, 6, 7, 8, 9, tzinfo=timezone.utc), "2024-05-06T07:08:09+00:00"),
        (date(2024, 5, 6), "2024-05-06"),
        (time_of_day(7, 8, 9), "07:08:09"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.10"), "1.10"),
        (Plan.FREE, "free"),
        (Plan.PAID, 2),
        (Plan.FROM_2030, "2030-01-01"),
        (Level.HIGH, 3),
        ((1, 2), [1, 2]),
        (Address("Main St", date(2020, 1, 1)), {"street": "Main St", "since": "2020-01-01"}),
    ],
)
def test_what_json_does_not_know_is_told_in_its_terms(value: object, told: object) -> None:
    """Dates, times, UUIDs, Decimals as text, Enums as their value, dataclasses as objects."""
    for data, expected in ((value, told), ({"x": [value]}, {"x": [told]})):
        assert json.loads(DomainEvent("a.b", data).to_json())["data"] == expected


def test_data_may_be_a_dataclass_in_a_dataclass() -> None:
    """A dataclass is told by its fields, all the way down; the event keeps the object."""
    moved = Moved(UUID(int=2), Address("Main St", date(2020, 1, 1)))
    event = DomainEvent("user.moved", moved)
    assert event.data is moved
    assert json.loads(event.to_json())["data"] == {
        "user_id": str(UUID(int=2)),
        "to": {"street": "Main St", "since": "2020-01-01"},
    }


def test_an_object_id_may_be_a_uuid() -> None:
    """It travels as text."""
    event = DomainEvent("a.b", {}, UUID(int=3))
    assert DomainEvent.from_json(event.to_json()).domain_object_id == str(UUID(int=3))


def circular() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


def deep() -> list[Any]:
    values: list[Any] = []
    for _ in range(200_000):
        values = [values]
    return values


@pytest.mark.parametrize(
    "data",
    [
        math.nan,
        math.inf,
        {"x": -math.inf},
        {"x": object()},
        {1, 2},
        b"bytes",
        timedelta(1),
        Address,  # the class, not one of it
        {(1, 2): "a key that JSON does not know"},
        circular(),
    ],
    ids=lambda data: type(data).__name__,
)
def test_data_that_is_not_json_is_an_invalid_event(data: object) -> None:
    """The error names the routing key, has the event and its cause."""
    event = DomainEvent("user.registered", data)
    with pytest.raises(InvalidEvent, match=r"user\.registered") as caught:
        event.to_json()
    assert caught.value.event is event
    assert isinstance(caught.value.__cause__, TypeError | ValueError | RecursionError)


def test_data_nested_too_deeply_is_an_invalid_event() -> None:
    """The interpreter's limit is no other error."""
    with pytest.raises(InvalidEvent):
        DomainEvent("a.b", deep()).to_json()


def test_the_error_names_the_type_that_is_not_json() -> None:
    """So that the user sees which value to convert."""
    with pytest.raises(InvalidEvent, match="timedelta"):
        DomainEvent("a.b", {"since": timedelta(1)}).to_json()


class Count(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "data",
    [
        {1: "a", "1": "b"},
        {"1": "b", 1: "a"},
        {True: "a", "true": "b"},
        {False: "a", "false": "b"},
        {None: "a", "null": "b"},
        {1.5: "a", "1.5": "b"},
        {-0.0: "a", "-0.0": "b"},
        {Count.ONE: "a", "1": "b"},
        OrderedDict({1: "a", "1": "b"}),
        {"{": {1: "a", "1": "b"}},
        {"x": [({"y": {1: "a", "1": "b"}},)]},
        [{1: "a", "1": "b"}],
        Address({1: "a", "1": "b"}, date(2020, 1, 1)),  # type: ignore[arg-type]
        {"x": Address({"y": {1: "a", "1": "b"}}, date(2020, 1, 1))},  # type: ignore[arg-type]
        Enum("E", {"X": {1: "a", "1": "b"}}).X,  # type: ignore[attr-defined]
    ],
    ids=repr,
)
def test_keys_that_are_one_in_json_are_refused(data: object) -> None:
    """At any depth, in whatever is told as an object: one of the two values would be lost."""
    with pytest.raises(InvalidEvent, match=r"same text in JSON.*lost") as caught:
        DomainEvent("user.registered", data).to_json()
    assert isinstance(caught.value.__cause__, ValueError)


json_keys = st.text("1{}ate.") | st.integers(0, 2) | st.booleans() | st.none() | st.just(0.5)
keyed_values = st.recursive(
    st.none() | st.integers() | st.text('{}"a:'),
    lambda values: (
        st.lists(values, max_size=3)
        | st.lists(values, max_size=3).map(tuple)
        | st.dictionaries(json_keys | st.just("true") | st.just("null"), values, max_size=4)
    ),
    max_leaves=10,
)


def clashes(value: object) -> bool:
    """Whether two keys of a dict in it are the same in JSON; told by the standard library."""
    if isinstance(value, dict):
        told = [next(iter(json.loads(json.dumps({key: 0})))) for key in value]
        return len(set(told)) < len(told) or any(map(clashes, value.values()))
    return isinstance(value, list | tuple) and any(map(clashes, value))


@patient
@given(keyed_values, st.text('{}"data: '))
@example({"a": 1}, '"data": {')
@example({1: 1, "1": 1}, '"data": {')
def test_no_value_is_lost_in_json(data: object, routing_key: str) -> None:
    """What has clashing keys is refused; everything else says what json.dumps does."""
    event = DomainEvent(routing_key, data)
    if clashes(data):
        with pytest.raises(InvalidEvent, match="same text in JSON"):
            event.to_json()
    else:
        assert event.to_json() == json.dumps(event.event_data)


def test_error_says_where_in_the_data() -> None:
    """Through dicts, lists and dataclasses; not more of it than fits a line."""
    moved = Moved(UUID(int=2), Address("x", {1}))  # type: ignore[arg-type]
    with pytest.raises(InvalidEvent, match=r"at event\.data\['a'\]\[1\]\.to\.since\)$"):
        DomainEvent("a.b", {"a": [0, moved]}).to_json()
    with pytest.raises(InvalidEvent) as caught:
        DomainEvent("a.b", {"x" * 10_000: {"\n": b""}}).to_json()
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_data_that_contains_itself_says_so() -> None:
    """A dict in itself, a dataclass in itself."""
    event = DomainEvent("a.b", circular())
    moved = Moved(UUID(int=1), None)  # type: ignore[arg-type]
    moved.to = moved  # type: ignore[assignment]
    for each in (event, DomainEvent("a.b", moved)):
        with pytest.raises(InvalidEvent, match="contains itself"):
            each.to_json()


def test_other_pythons_encode_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without the encoder in C: PyPy."""
    data = {"x": [1.5, None, "ü"], "y": UUID(int=1), 1: True}
    expected = DomainEvent("a.b", data, uuid_string="id", timestamp=1).to_json()
    monkeypatch.setattr(json.encoder, "c_make_encoder", None)
    monkeypatch.setattr(events_module, "encode", events_module._encoder())
    assert DomainEvent("a.b", data, uuid_string="id", timestamp=1).to_json() == expected


def test_missing_attribute_breaks_no_protocol() -> None:
    """Of copying, pickling, or whoever asks whether there is one; also half-way through."""
    event = DomainEvent("a.b", {"__deepcopy__": 1, "__setstate__": 2, "keys": 3})
    for twin in (copy.copy(event), copy.deepcopy(event), pickle.loads(pickle.dumps(event))):
        assert (twin, vars(twin)) == (event, vars(event))
    empty = DomainEvent.__new__(DomainEvent)
    assert not hasattr(empty, "data")
    assert not hasattr(event, "keys")
    assert getattr(event, "__deepcopy__", None) is None


# ------------------------------------------------------------------ from JSON


@pytest.mark.parametrize("encode", [str, str.encode])
def test_byte_order_mark_is_read_over(encode: Callable[[str], bytes | str]) -> None:
    """.NET's encoder writes one before its UTF-8."""
    event = DomainEvent("a.b", {"name": "\ufeffAda"}, 5)
    assert DomainEvent.from_json(encode("\ufeff" + event.to_json())) == event
    with pytest.raises(InvalidEvent):
        DomainEvent.from_json(encode("\ufeff\ufeff" + event.to_json()))


@pytest.mark.parametrize("data", [None, {}, [], "", 0, False])
def test_null_is_read_as_none(data: object) -> None:
    """And every other empty value as itself; only a constructor without data makes a dict."""
    body = json.dumps({"routing_key": "a.b", "data": data})
    event = DomainEvent.from_json(body)
    assert event.data == data
    assert type(event.data) is type(data)
    assert json.loads(event.to_json())["data"] == data
    assert pickle.loads(pickle.dumps(event)).data == data
    assert DomainEvent("a.b", None).data == {}


def test_reading_makes_an_event_of_the_class_that_reads() -> None:
    """With all that a new one has."""

    class Mine(DomainEvent):
        pass

    event = Mine.from_json('{"routing_key": "a.b", "data": 1}')
    assert type(event) is Mine
    assert UUID(event.uuid_string).version == 4
    assert abs(event.timestamp - time.time()) < 60
    assert event.retries == 0


def test_reading_ignores_what_it_does_not_know() -> None:
    """A sixth key, of a later version or of another program, is no error."""
    event = DomainEvent.from_json(
        '{"routing_key": "a.b", "data": {}, "uuid_string": "id", "timestamp": 1, "more": 2,'
        ' "retries": 5}'
    )
    assert event == DomainEvent("a.b", {}, None, "id", 1)
    assert event.retries == 0


def test_reading_needs_only_routing_key_and_data() -> None:
    """What else is missing has the same defaults as in a new event."""
    event = DomainEvent.from_json('{"routing_key": "a.b", "data": [1]}')
    assert (event.routing_key, event.data, event.domain_object_id) == ("a.b", [1], None)
    assert UUID(event.uuid_string)
    assert read_envelope('{"routing_key": "a.b", "data": [1]}') == {
        "routing_key": "a.b",
        "data": [1],
        "domain_object_id": None,
        "uuid_string": None,
        "timestamp": None,
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"\xff\xfe",
        b"[" * 200_000,
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"data": {}}',
        b'{"routing_key": "a.b"}',
        b'{"routing_key": 1, "data": {}}',
        b'{"routing_key": null, "data": {}}',
        b'{"routing_key": "a.b", "data": {}, "uuid_string": 1}',
        b'{"routing_key": "a.b", "data": {}, "timestamp": "now"}',
        b'{"routing_key": "a.b", "data": {}, "timestamp": true}',
        b'{"routing_key": "a.b", "data": {}, "timestamp": NaN}',
        b'{"routing_key": "a.b", "data": {}, "timestamp": -Infinity}',
        # More than a float can be: to compare or to print it is an error elsewhere.
        b'{"routing_key": "a.b", "data": {}, "timestamp": 1' + b"0" * 400 + b"}",
        b'{"routing_key": "a.b", "data": 1' + b"0" * 5000 + b', "timestamp": true}',
    ],
    ids=lambda body: repr(body[:60]),
)
def test_what_is_no_envelope_is_an_invalid_event(body: bytes) -> None:
    """Whatever arrives, the one error that reading raises is InvalidEvent."""
    with pytest.raises(InvalidEvent):
        DomainEvent.from_json(body)


loose_values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.lists(st.integers(), max_size=2)
)


@patient
@given(
    st.binary()
    | st.text()
    | st.fixed_dictionaries({}, optional=dict.fromkeys(ENVELOPE, loose_values)).map(json.dumps)
)
@example('{"routing_key": "a", "data": 0, "timestamp": 1' + "0" * 309 + "}")
def test_reading_ends_in_an_event_or_an_invalid_event(body: bytes | str) -> None:
    """No other error, and never half an event."""
    try:
        event = DomainEvent.from_json(body)
    except InvalidEvent:
        return
    assert isinstance(event.routing_key, str)
    assert isinstance(event.uuid_string, str)
    assert math.isfinite(event.timestamp)
    assert DomainEvent.from_json(body).data == event.data or "NaN" in str(body)


def test_an_invalid_event_has_its_cause() -> None:
    """Where something else failed first, the error says what."""
    with pytest.raises(InvalidEvent, match="Not JSON") as caught:
        DomainEvent.from_json("{")
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)
