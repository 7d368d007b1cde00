"""The same data as each kind of class that can be published and subscribed to."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, TypedDict
from uuid import UUID

import attrs
import msgspec
import pydantic
import pydantic.dataclasses


class Plan(enum.Enum):
    """A field of the data."""

    FREE = "free"
    PAID = "paid"


class Level(enum.IntEnum):
    """Another one."""

    LOW = 1
    HIGH = 2


@dataclass
class Dataclass:
    user_id: int
    name: str
    plan: Plan
    level: Level
    active: bool
    score: float
    balance: Decimal
    token: UUID
    born: date
    wakes: time
    registered: datetime
    tags: list[str]
    prices: dict[str, Decimal]
    visits: dict[int, date]
    note: str | None
    friends: list[Dataclass]


@attrs.define
class Attrs:
    user_id: int
    name: str
    plan: Plan
    level: Level
    active: bool
    score: float
    balance: Decimal
    token: UUID
    born: date
    wakes: time
    registered: datetime
    tags: list[str]
    prices: dict[str, Decimal]
    visits: dict[int, date]
    note: str | None
    friends: list[Attrs]


class Struct(msgspec.Struct):
    user_id: int
    name: str
    plan: Plan
    level: Level
    active: bool
    score: float
    balance: Decimal
    token: UUID
    born: date
    wakes: time
    registered: datetime
    tags: list[str]
    prices: dict[str, Decimal]
    visits: dict[int, date]
    note: str | None
    friends: list[Struct]


class Model(pydantic.BaseModel):
    user_id: int
    name: str
    plan: Plan
    level: Level
    active: bool
    score: float
    balance: Decimal
    token: UUID
    born: date
    wakes: time
    registered: datetime
    tags: list[str]
    prices: dict[str, Decimal]
    visits: dict[int, date]
    note: str | None
    friends: list[Model]


class StrictModel(Model):
    model_config = pydantic.ConfigDict(strict=True)
    friends: list[StrictModel]  # type: ignore[assignment]


@pydantic.dataclasses.dataclass
class ModelDataclass:
    user_id: int
    name: str
    plan: Plan
    level: Level
    active: bool
    score: float
    balance: Decimal
    token: UUID
    born: date
    wakes: time
    registered: datetime
    tags: list[str]
    prices: dict[str, Decimal]
    visits: dict[int, date]
    note: str | None
    friends: list[ModelDataclass]


class Dictionary(TypedDict):
    user_id: int
    name: str
    plan: Plan
    level: Level
    active: bool
    score: float
    balance: Decimal
    token: UUID
    born: date
    wakes: time
    registered: datetime
    tags: list[str]
    prices: dict[str, Decimal]
    visits: dict[int, date]
    note: str | None
    friends: list[Dictionary]


#: By its name; each is called with the fields.
KINDS: dict[str, Callable[..., Any]] = {
    "dataclass": Dataclass,
    "attrs": Attrs,
    "msgspec": Struct,
    "pydantic": Model,
    "strict pydantic": StrictModel,
    "pydantic dataclass": ModelDataclass,
    "TypedDict": Dictionary,
}


#: Fields of one of them.
FIELDS: dict[str, Any] = {
    "user_id": 42,
    "name": "Ada",
    "plan": Plan.PAID,
    "level": Level.HIGH,
    "active": True,
    "score": 0.5,
    "balance": Decimal("1.10"),
    "token": UUID(int=7),
    "born": date(1815, 12, 10),
    "wakes": time(6, 30),
    "registered": datetime.fromisoformat("2026-11-26T07:00:00+00:00"),
    "tags": ["a", "b"],
    "prices": {"basic": Decimal("9.90")},
    "visits": {7: date(2026, 11, 26)},
    "note": None,
    "friends": [],
}

#: The same as JSON values.
AS_JSON: dict[str, Any] = {
    **FIELDS,
    "plan": "paid",
    "level": 2,
    "balance": "1.10",
    "token": "00000000-0000-0000-0000-000000000007",
    "born": "1815-12-10",
    "wakes": "06:30:00",
    "registered": "2026-11-26T07:00:00+00:00",
    "prices": {"basic": "9.90"},
    "visits": {"7": "2026-11-26"},
}


def make(kind: Callable[..., Any], fields: dict[str, Any]) -> Any:
    """An object of that kind, and so are those among its fields."""
    # In the order of the classes: a TypedDict keeps the one in which it is made.
    made = {name: fields[name] for name in FIELDS}
    return kind(**{**made, "friends": [make(kind, each) for each in fields["friends"]]})
