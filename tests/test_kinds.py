"""Publishing objects: the same JSON from each kind, and read back equal by each."""

from __future__ import annotations

import base64
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import date, timedelta, timezone
from decimal import Decimal
from typing import Annotated, Any

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kinds_of_data import AS_JSON, FIELDS, KINDS, Level, Plan, make

from domain_events import DomainEvent, InvalidEvent
from domain_events.kinds import fields_of
from domain_events.payloads import make_payload

ZONES = st.none() | st.integers(-23 * 60, 23 * 60).map(
    lambda minutes: timezone(timedelta(minutes=minutes))
)
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False)
FLAT = {
    "user_id": st.integers(),
    "name": st.text(),
    "plan": st.sampled_from(Plan),
    "level": st.sampled_from(Level),
    "active": st.booleans(),
    "score": st.floats(allow_nan=False, allow_infinity=False),
    "balance": DECIMALS,
    "token": st.uuids(),
    "born": st.dates(),
    "wakes": st.times(),
    "registered": st.datetimes(timezones=ZONES),
    "tags": st.lists(st.text(), max_size=3),
    "prices": st.dictionaries(st.text(), DECIMALS, max_size=3),
    "visits": st.dictionaries(st.integers(-(2**63), 2**63 - 1), st.dates(), max_size=3),
    "note": st.none() | st.text(),
}
SOME_FIELDS = st.recursive(
    st.fixed_dictionaries({**FLAT, "friends": st.just([])}),
    lambda inner: st.fixed_dictionaries({**FLAT, "friends": st.lists(inner, max_size=2)}),
    max_leaves=3,
)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def ignore(event: DomainEvent) -> None:
    pass


READERS = {
    name: make_payload(ignore, "reader", kind, None) for name, kind in KINDS.items()
}  # made once, as register() does


def data_of(event: DomainEvent) -> Any:
    """As they arrive."""
    return DomainEvent.from_json(event.to_json()).data


def error_of(data: object) -> str:
    with pytest.raises(InvalidEvent) as caught:
        DomainEvent("a.b", data).to_json()
    return str(caught.value)


@given(SOME_FIELDS)
def test_each_kind_is_the_same_bytes_and_is_read_back_equal(fields: dict[str, Any]) -> None:
    """Whatever the values; written by one kind, they can be read as any other."""
    objects = {name: make(kind, fields) for name, kind in KINDS.items()}
    events = {
        name: DomainEvent("a.b", each, uuid_string="id", timestamp=1.0)
        for name, each in objects.items()
    }
    (body,) = {event.to_json() for event in events.values()}
    for name, reader in READERS.items():
        assert reader is not None
        event = reader.read(DomainEvent.from_json(body))
        assert event.data == objects[name]
        assert event == events[name]
        assert event.to_json() == body


@every_kind
def test_values_have_one_form(kind: Callable[..., Any]) -> None:
    """Dates as ISO 8601, Decimal and UUID as text, an Enum as its value; keys as text."""
    friend = {**FIELDS, "friends": [FIELDS]}
    assert data_of(DomainEvent("a.b", make(kind, friend))) == {**AS_JSON, "friends": [AS_JSON]}
    listed = DomainEvent("a.b", {"users": [make(kind, FIELDS)]})
    assert data_of(listed) == {"users": [AS_JSON]}


# --- mixed, and what each library knows of its fields ---------------------------------------------


@dataclasses.dataclass
class Price:
    amount: Decimal


@attrs.define
class Item:
    price: Price
    _note: str = "none"


class Line(msgspec.Struct):
    item: Item
    extra: Any = None


class Order(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    line: Line
    price: Price


@dataclasses.dataclass
class Shipment:
    order: Order
    by_id: dict[str, Order]


def test_kinds_may_be_inside_one_another() -> None:
    """Each is converted as its own kind is."""
    price = Price(Decimal("1.10"))
    order = Order(line=Line(Item(price), extra=[price]), price=price)
    line = {
        "item": {"price": {"amount": "1.10"}, "_note": "none"},
        "extra": [{"amount": "1.10"}],
    }
    expected = {"line": line, "price": {"amount": "1.10"}}
    shipment = {"of": Shipment(order, {"7": order})}
    assert data_of(DomainEvent("a.b", shipment)) == {
        "of": {"order": expected, "by_id": {"7": expected}}
    }


class Aliased(pydantic.BaseModel):
    user_id: int = pydantic.Field(alias="userId")
    when: Annotated[timedelta, pydantic.PlainSerializer(lambda value: value.total_seconds())]
    password: str = pydantic.Field(exclude=True)

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2 * self.user_id


@pydantic.dataclasses.dataclass
class AliasedDataclass:
    user_id: Annotated[int, pydantic.Field(serialization_alias="userId")]


class ForJson(pydantic.BaseModel):
    day: Annotated[date, pydantic.PlainSerializer(lambda day: day.year, when_used="json")]


class Numbers(pydantic.RootModel[dict[Any, int]]):
    pass


def test_model_is_published_as_pydantic_dumps_it() -> None:
    """With its aliases, serializers, computed and excluded fields."""
    aliased = Aliased(userId=4, when=timedelta(minutes=1), password="s3cret")
    assert data_of(DomainEvent("a.b", aliased)) == {"userId": 4, "when": 60.0, "twice": 8}
    assert data_of(DomainEvent("a.b", AliasedDataclass(4))) == {"userId": 4}
    assert data_of(DomainEvent("a.b", Numbers({1: 2}))) == {"1": 2}
    # Not as JSON of pydantic's, which has other dates.
    assert data_of(DomainEvent("a.b", ForJson(day=date(2026, 11, 26)))) == {"day": "2026-11-26"}


class Renamed(msgspec.Struct, rename="camel", tag_field="kind", tag="r"):
    user_id: int


class Sparse(msgspec.Struct, omit_defaults=True):
    first: int
    number: int = 300
    names: list[str] = []
    by_name: dict[str, int] = msgspec.field(default_factory=dict)
    unset: int | msgspec.UnsetType = msgspec.UNSET


class SparseKeywords(msgspec.Struct, omit_defaults=True, kw_only=True):
    number: int = 300
    last: int


class Row(msgspec.Struct, array_like=True, tag=True):
    first: int
    second: str = "x"


class UntaggedRow(msgspec.Struct, array_like=True):
    first: int


@pytest.mark.parametrize(
    "struct",
    [
        Renamed(1),
        Sparse(1),
        Sparse(1, 300, ["a"], {"b": 1}, 5),
        Sparse(1, 301, [], {}),
        SparseKeywords(last=1),
        SparseKeywords(last=300, number=1),
        Row(1),
        UntaggedRow(1),
    ],
    ids=repr,
)
def test_struct_is_published_as_msgspec_dumps_it(struct: msgspec.Struct) -> None:
    """With its renamed fields and its tag, and without what is unset or a default."""
    expected = msgspec.to_builtins(struct)
    assert data_of(DomainEvent("a.b", struct)) == expected
    assert data_of(DomainEvent("a.b", [struct])) == [expected]
    assert fields_of(struct) == expected


# --- what has no JSON -----------------------------------------------------------------------------


@dataclasses.dataclass
class DataclassOf:
    photo: Any


@attrs.define
class AttrsOf:
    photo: Any


class StructOf(msgspec.Struct):
    photo: Any


class ModelOf(pydantic.BaseModel):
    photo: Any


@pydantic.dataclasses.dataclass
class ModelDataclassOf:
    photo: Any


NO_JSON = {
    "bytes": (b"\xff", "base64.b64encode(value).decode()"),
    "bytearray": (bytearray(b"x"), "base64"),
    "memoryview": (memoryview(b"x"), "publish where it is"),
    "timedelta": (timedelta(1), "total_seconds()"),
    "set": ({1}, "sorted(value)"),
    "frozenset": (frozenset({1}), "sorted(value)"),
}
HOLDERS: list[Callable[..., Any]] = [
    DataclassOf,
    AttrsOf,
    StructOf,
    ModelOf,
    ModelDataclassOf,
]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("what", NO_JSON)
def test_value_without_json_is_an_error_with_a_way_out(
    what: str, holder: Callable[..., Any]
) -> None:
    """That names the place, whatever kind the value is in."""
    value, way_out = NO_JSON[what]
    for data, place in (
        (holder(photo=value), "event.data.photo"),
        ({"x": [holder(photo=[0, value])]}, "event.data['x'][0].photo[1]"),
    ):
        error = error_of(data)
        assert f"of type {what}" in error
        assert way_out in error
        assert error.endswith(f"(at {place})")


@pytest.mark.parametrize("holder", HOLDERS)
def test_class_instead_of_an_object_is_an_error(holder: Callable[..., Any]) -> None:
    """A forgotten call."""
    for data in (holder, {"x": holder}):
        assert f"{holder.__name__}(...)" in error_of(data)


def test_bytes_as_base64_are_read_back() -> None:
    """The way out that the error shows."""
    text = base64.b64encode(b"\xff\x00").decode()
    for kind in (PhotoTaken, PhotoTakenModel):
        reader = make_payload(ignore, "reader", kind, None)
        assert reader is not None
        payload = reader.read(DomainEvent("photo.taken", {"photo": text})).data
        assert payload == kind(photo=b"\xff\x00")


@dataclasses.dataclass
class PhotoTaken:
    photo: bytes


class PhotoTakenModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(val_json_bytes="base64")
    photo: bytes


class Broken(pydantic.BaseModel):
    user_id: int

    @pydantic.field_serializer("user_id")
    def _fail(self, value: int) -> int:
        raise ValueError("no such user")


@pytest.mark.parametrize("data", [Broken(user_id=1), {"x": [Broken(user_id=1)]}])
def test_serializer_that_fails_is_an_invalid_event(data: object) -> None:
    """And nothing is sent."""
    assert "no such user" in error_of(data)


@pytest.mark.parametrize("data", [Numbers({1: 2, "1": 3}), StructOf(Numbers({1: 2, "1": 3}))])
def test_keys_that_are_the_same_text_are_noticed_in_objects(data: object) -> None:
    """One of the values would be lost."""
    assert "1 and '1'" in error_of(data)


@pytest.mark.parametrize("holder", HOLDERS)
def test_field_that_is_looked_up_on_the_event_is_found_in_its_data(
    holder: Callable[..., Any],
) -> None:
    """The error says where it is."""
    event: Any = DomainEvent("a.b", holder(photo=1))
    with pytest.raises(AttributeError, match=r"event\.data\.photo"):
        _ = event.photo
    with pytest.raises(AttributeError, match=r"no attribute 'no_such'$"):
        _ = event.no_such


def test_no_library_is_imported_for_data_without_classes() -> None:
    """Neither to publish nor to subscribe: the core needs none of them."""
    program = """
import sys
from domain_events import DomainEvent, Subscriber, publish_domain_event
subscriber = Subscriber("memory://")
def handle(event: DomainEvent[dict[str, object]]):
    print(event.data)
    subscriber.stop_consuming()
subscriber.register(handle, "s", ["#"], upcast={1: dict})
publish_domain_event("a.b", {"x": 1}, connection_settings="memory://")
subscriber.start_consuming(30)
print({"msgspec", "pydantic", "attr", "attrs"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["{'x': 1}", "set()"]


def test_json_of_plain_dicts_is_what_it_was() -> None:
    """Byte for byte."""
    event = DomainEvent("a.b", {"x": [1, {"y": None}]}, "7", "id", 1.5)
    assert event.to_json() == json.dumps(
        {
            "routing_key": "a.b",
            "data": {"x": [1, {"y": None}]},
            "domain_object_id": "7",
            "uuid_string": "id",
            "timestamp": 1.5,
        }
    )
