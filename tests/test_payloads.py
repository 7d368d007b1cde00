"""Subscribing to typed data: what handlers get, what becomes of misfits; versions of data."""

from __future__ import annotations

import asyncio
import enum
import functools
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NewType, TypedDict, TypeVar
from uuid import UUID

import attrs
import msgspec
import onlooker
import pydantic
import pydantic.dataclasses
import pytest
from bench import Bench, running
from kinds_of_data import AS_JSON, FIELDS, KINDS, Dataclass, Model, make
from support import Names, wait_until
from typing_extensions import TypeAliasType

from domain_events import (
    ConfigurationError,
    DeadLetters,
    DomainEvent,
    InvalidEvent,
    Middleware,
    Reject,
    Retry,
    Subscriber,
)
from domain_events.testing import Delivered, EventBroker, Outcome

if TYPE_CHECKING:
    from somewhere import Imported  # type: ignore[import-not-found]  # as type checkers see it

# Not in one piece: pytest shows the lines of the test.
SECRET = "s3cr3t-" + "hunter2"
NUMBER = -27182818

T = TypeVar("T")
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@dataclass
class UserRegistered:
    """What most tests here are about."""

    user_id: int
    name: str = "?"


class Payments:
    """Collects what a handler gets."""

    def __init__(self) -> None:
        self.events: list[DomainEvent[Any]] = []

    def handle(self, event: DomainEvent) -> None:
        self.events.append(event)

    @property
    def data(self) -> list[Any]:
        return [event.data for event in self.events]


@pytest.fixture
def seen() -> Payments:
    return Payments()


def registered(handler: Callable[..., object], **options: Any) -> Subscriber:
    subscriber = Subscriber()
    subscriber.register(handler, "users", ["#"], **options)
    return subscriber


def delivered(
    broker: EventBroker, seen: Payments, data: object, version: int = 1, **options: Any
) -> Delivered:
    """The outcome of an event with such data."""
    subscriber = registered(seen.handle, **options)
    (delivery,) = broker.deliver(subscriber, DomainEvent("user.registered", data, version=version))
    return delivery


def refused(handler: Callable[..., object], **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        registered(handler, **options)
    return str(caught.value)


# --- what a handler gets --------------------------------------------------------------------------


@every_kind
def test_handler_gets_an_object_of_the_class(
    kind: Any, event_broker: EventBroker, seen: Payments
) -> None:
    """Equal to what was published, and everything else of the event is kept."""
    friends = {**FIELDS, "friends": [FIELDS]}
    event = DomainEvent("user.registered", make(kind, friends), "42", headers={"tenant": "x"})
    event_broker.deliver(registered(seen.handle, payload=kind), event, raising=True)
    (got,) = seen.events
    assert got.data == event.data
    assert got == event
    assert got.to_json() == event.to_json()
    assert got.domain_object_id == "42"
    assert (got.headers, got.subscriber, got.redelivered) == ({"tenant": "x"}, "users", False)
    assert pickle.loads(pickle.dumps(got)) == got
    assert got.derived("user.welcomed", got.data).cause == event.uuid_string


def by_annotation(event: DomainEvent[UserRegistered]) -> None:
    raise Reject(repr(event.data))


def by_text(event: "DomainEvent[UserRegistered]") -> None:  # noqa: UP037
    by_annotation(event)


def by_nested_text(event: DomainEvent["UserRegistered"]) -> None:  # noqa: UP037
    by_annotation(event)


def by_annotated(event: Annotated[DomainEvent[UserRegistered], "a note"]) -> None:
    by_annotation(event)


UserEvent = DomainEvent[UserRegistered]
UserId = NewType("UserId", int)
NamedEvent = TypeAliasType("NamedEvent", DomainEvent[UserRegistered])


def by_alias(event: UserEvent) -> None:
    by_annotation(event)


def by_named_alias(event: NamedEvent) -> None:
    by_annotation(event)


def by_position(*events: DomainEvent[UserRegistered]) -> None:
    by_annotation(events[0])


def with_more(event: DomainEvent[UserRegistered], database: str = "", **_more: object) -> None:
    by_annotation(event)


def with_the_event_last(database: str, event: DomainEvent[UserRegistered]) -> None:
    by_annotation(event)


def logged(handler: Callable[[DomainEvent[T]], object]) -> Callable[[DomainEvent[T]], object]:
    @functools.wraps(handler)
    def wrapper(event: DomainEvent[T]) -> object:
        return handler(event)

    return wrapper


class Mailer:
    def send(self, event: DomainEvent[UserRegistered]) -> None:
        by_annotation(event)

    @classmethod
    def send_all(cls, event: DomainEvent[UserRegistered]) -> None:
        by_annotation(event)

    @staticmethod
    def send_any(event: DomainEvent[UserRegistered]) -> None:
        by_annotation(event)

    def __call__(self, event: DomainEvent[UserRegistered]) -> None:
        by_annotation(event)


class Logged:
    def __init__(self, handler: Callable[[DomainEvent[UserRegistered]], object]) -> None:
        functools.update_wrapper(self, handler)

    def __call__(self, *arguments: Any) -> None:
        by_annotation(*arguments)


class Evaluated:
    """As annotations are without ``from __future__ import annotations``."""

    def __call__(self, event: Any) -> None:
        by_annotation(event)

    __call__.__annotations__["event"] = DomainEvent[UserRegistered]


HANDLERS: dict[str, Callable[..., object]] = {
    "a function": by_annotation,
    "text": by_text,
    "nested text": by_nested_text,
    "Annotated": by_annotated,
    "an alias": by_alias,
    "a type statement": by_named_alias,
    "*events": by_position,
    "more parameters": with_more,
    "a partial": functools.partial(with_more, database="x"),
    "a partial that fills the first": functools.partial(with_the_event_last, "x"),
    "a decorated function": logged(by_annotation),
    "two decorators": logged(logged(by_annotation)),
    "a method": Mailer().send,
    "a partial of a method": functools.partial(Mailer().send),
    "a class method": Mailer.send_all,
    "a static method": Mailer.send_any,
    "an object": Mailer(),
    "an object that wraps": Logged(by_annotation),
    "evaluated": Evaluated(),
    "a cached function": functools.lru_cache(by_annotation),
}


@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
def test_annotation_of_the_handler_is_enough(
    handler: Callable[..., object], event_broker: EventBroker
) -> None:
    """However the handler is made."""
    subscriber = registered(handler)
    (delivery,) = event_broker.deliver(subscriber, DomainEvent("a.b", {"user_id": 7}))
    assert str(delivery.error) == "UserRegistered(user_id=7, name='?')"


def plain(event: DomainEvent) -> None:
    by_annotation(event)


def anything(event: DomainEvent[Any]) -> None:
    by_annotation(event)


def of_dict(event: DomainEvent[dict]) -> None:  # type: ignore[type-arg]
    by_annotation(event)  # type: ignore[arg-type]


def of_str_to_any(event: DomainEvent[dict[str, Any]]) -> None:
    by_annotation(event)  # type: ignore[arg-type]


def of_mapping(event: DomainEvent[Mapping[str, object]]) -> None:
    by_annotation(event)  # type: ignore[arg-type]


def of_typevar(event: DomainEvent[T]) -> None:
    by_annotation(event)  # type: ignore[arg-type]


def of_nothing(event):  # type: ignore[no-untyped-def]
    by_annotation(event)


def of_another_kind(event: Any, *_: Any) -> None:
    by_annotation(event)


def unresolvable_and_not_ours(event: Imported) -> None:
    by_annotation(event)


AS_IT_IS: dict[str, Callable[..., object]] = {
    "no argument": plain,
    "Any": anything,
    "dict": of_dict,
    "dict[str, Any]": of_str_to_any,
    "Mapping": of_mapping,
    "a TypeVar": of_typevar,
    "nothing": of_nothing,
    "Any event": of_another_kind,
    "a name for type checkers": unresolvable_and_not_ours,
}


@pytest.mark.parametrize("handler", AS_IT_IS.values(), ids=AS_IT_IS)
def test_other_annotations_leave_the_data_as_it_is(
    handler: Callable[..., object], event_broker: EventBroker
) -> None:
    """A dict, as JSON has it."""
    subscriber = registered(handler)
    (delivery,) = event_broker.deliver(subscriber, DomainEvent("a.b", {"user_id": "7"}))
    assert str(delivery.error) == "{'user_id': '7'}"


@dataclass
class Page(Generic[T]):
    items: list[T]


class PageModel(pydantic.BaseModel, Generic[T]):
    items: list[T]


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True):
    barks: bool


class CatModel(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int


class DogModel(pydantic.BaseModel):
    kind: Literal["dog"]
    barks: bool


Pet = Annotated[CatModel | DogModel, pydantic.Field(discriminator="kind")]


@dataclass
class WithModel:
    """Its own work is msgspec's, and that of its field pydantic's."""

    model: CatModel
    others: list[WithModel] = field(default_factory=list)


class Partial(TypedDict, total=False):
    user_id: int


@pytest.mark.parametrize(
    ("payload", "data", "expected"),
    [
        (Page[int], {"items": [1]}, Page([1])),
        (PageModel[int], {"items": [1]}, PageModel(items=[1])),
        (Cat | Dog, {"type": "Dog", "barks": True}, Dog(True)),
        (Pet, {"kind": "dog", "barks": True}, DogModel(kind="dog", barks=True)),
        (list[UserRegistered], [{"user_id": 1}], [UserRegistered(1)]),
        (CatModel | None, None, None),
        (list[CatModel], [{"kind": "cat", "lives": 1}], [CatModel(kind="cat", lives=1)]),
        (dict[int, UserRegistered], {"7": {"user_id": 1}}, {7: UserRegistered(1)}),
        (Partial, {}, {}),
        (UserId, 7, 7),
        (
            WithModel,
            {"model": {"kind": "cat", "lives": 1}, "others": []},
            WithModel(CatModel(kind="cat", lives=1)),
        ),
    ],
    ids=str,
)
def test_payload_may_be_any_type_that_its_library_knows(
    payload: Any, data: object, expected: object, event_broker: EventBroker, seen: Payments
) -> None:
    """Generic classes, unions, lists; a pydantic model inside a dataclass."""
    event = DomainEvent("a.b", data if data is not None else [])
    if data is None:
        event.__dict__["data"] = None  # the constructor makes it an empty dict
    event_broker.deliver(registered(seen.handle, payload=payload), event, raising=True)
    assert seen.data == [expected]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the type statement is new in Python 3.12")
def test_type_statement_may_refer_to_itself(event_broker: EventBroker, seen: Payments) -> None:
    """As far as the library of what it contains supports that."""
    names: dict[str, Any] = {"Cat": CatModel}
    exec("type Cats = Cat | list[Cats]", names)
    data = [{"kind": "cat", "lives": 1}, []]
    event_broker.deliver(
        registered(seen.handle, payload=names["Cats"]), DomainEvent("a.b", data), raising=True
    )
    assert seen.data == [[CatModel(kind="cat", lives=1), []]]


@every_kind
def test_unknown_fields_are_ignored(kind: Any, event_broker: EventBroker, seen: Payments) -> None:
    """A publisher that adds one must not fill everybody's dead letters."""
    delivery = delivered(event_broker, seen, {**AS_JSON, "added": {"x": [1]}}, payload=kind)
    assert delivery.outcome == "handled"
    assert seen.data == [make(kind, FIELDS)]


class Forbidding(pydantic.BaseModel, extra="forbid"):
    user_id: int


class ForbiddingStruct(msgspec.Struct, forbid_unknown_fields=True):
    user_id: int


@pytest.mark.parametrize("kind", [Forbidding, ForbiddingStruct])
def test_class_may_forbid_unknown_fields(
    kind: Any, event_broker: EventBroker, seen: Payments
) -> None:
    """Its own word counts."""
    delivery = delivered(event_broker, seen, {"user_id": 1, "added": SECRET}, payload=kind)
    assert delivery.outcome == "dead letter"
    assert "added" in str(delivery.error)
    assert SECRET not in str(delivery.error)


def test_middleware_sees_the_payload(event_broker: EventBroker, seen: Payments) -> None:
    """As the handler does; and what does not fit is reported without a handler's time."""
    handled, reported = [], []

    class Recording(Middleware):
        @contextmanager
        def handling(self, event: DomainEvent[Any]) -> Iterator[None]:
            handled.append(event.data)
            yield

        def delivered(self, delivered: Delivered) -> None:
            reported.append(delivered)

    subscriber = Subscriber(middleware=[Recording()])
    subscriber.register(seen.handle, "users", ["#"], payload=UserRegistered)
    event_broker.deliver(
        subscriber, DomainEvent("a.b", {"user_id": 1}), DomainEvent("a.b", {"user_id": "1"})
    )
    assert handled == [UserRegistered(1)]
    assert [(each.outcome, each.seconds is None) for each in reported] == [
        ("handled", False),
        ("dead letter", True),
    ]


def test_retry_gets_the_payload_again(event_broker: EventBroker) -> None:
    """Which is read from the same body each time."""
    got: list[UserRegistered] = []

    def handle(event: DomainEvent[UserRegistered]) -> None:
        got.append(event.data)
        event.data.user_id = 0  # its own object
        if not event.retries:
            raise Retry

    subscriber = registered(handle, payload=UserRegistered, max_retries=1)
    event_broker.deliver_all(subscriber, DomainEvent("a.b", UserRegistered(7)), raising=True)
    assert len(got) == 2
    assert got[0] is not got[1]


# --- refused when registering ---------------------------------------------------------------------


def by_unknown_name(event: DomainEvent[Imported]) -> None:
    by_annotation(event)


def test_annotation_that_cannot_be_resolved_is_refused(event_broker: EventBroker) -> None:
    """With the way out, which works."""
    error = refused(by_unknown_name)
    for part in ("users: ", "DomainEvent[Imported]", "'Imported' is not defined", "payload=..."):
        assert part in error
    subscriber = registered(by_unknown_name, payload=UserRegistered)
    (delivery,) = event_broker.deliver(subscriber, DomainEvent("a.b", {"user_id": 7}))
    assert str(delivery.error) == "UserRegistered(user_id=7, name='?')"


def test_annotation_and_option_must_agree(event_broker: EventBroker) -> None:
    """Both may be given."""
    error = refused(by_annotation, payload=Model)
    assert "kinds_of_data.Model" in error
    assert "DomainEvent[test_payloads.UserRegistered]" in error
    assert "UserRegistered" in refused(by_annotation, payload=dict)
    assert "Model" in refused(of_dict, payload=Model)
    registered(by_annotation, payload=UserRegistered).close()
    registered(of_dict, payload=Mapping).close()


@pytest.mark.parametrize("kind", [Dataclass, KINDS["attrs"], KINDS["TypedDict"], list[int]])
def test_missing_library_is_named(
    kind: Any, event_broker: EventBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With how it is installed; and no queue is declared that nobody would serve."""
    monkeypatch.setitem(sys.modules, "msgspec", None)
    error = refused(ignore, payload=kind)
    assert "msgspec" in error
    assert "pip install 'domain-events-rabbitmq[typed]'" in error
    with pytest.raises(Exception, match="no queue 'users-dl'"), DeadLetters("users") as letters:
        letters.count()


def ignore(event: DomainEvent) -> None:
    pass


class Opaque:
    """No library knows how to make one."""


@dataclass
class OfOpaque:
    user_id: int
    opaque: list[Opaque]


class Ratio(enum.Enum):
    HALF = 0.5


@dataclass
class OfRatio:
    ratio: Ratio


@dataclass
class Unfinished:
    other: NotDefined  # type: ignore[name-defined]  # noqa: F821


class UnfinishedModel(pydantic.BaseModel):
    other: NotDefined  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("payload", "parts"),
    [
        (Opaque, ["test_payloads.Opaque", "a dataclass, a TypedDict"]),
        (OfOpaque, ["test_payloads.OfOpaque", "test_payloads.Opaque", "fields"]),
        (UserRegistered | Page[int], ["more than one dataclass"]),
        (OfRatio, ["test_payloads.OfRatio", "either all str or all int"]),
        (Unfinished, ["test_payloads.Unfinished", "'NotDefined' is not defined"]),
        (UnfinishedModel, ["test_payloads.UnfinishedModel", "NotDefined"]),
        ("UserRegistered", ["UserRegistered", "a dataclass, a TypedDict"]),
        (UserRegistered(1), ["a dataclass, a TypedDict"]),
        (7, ["7", "a dataclass, a TypedDict"]),
        (ignore, ["test_payloads.ignore", "a dataclass, a TypedDict"]),
    ],
    # Not of the function, which would contain its address.
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_class_that_cannot_be_made_is_refused(
    payload: Any, parts: list[str], event_broker: EventBroker
) -> None:
    """When registering, and not with the first event."""
    error = refused(ignore, payload=payload)
    for part in ("users: ", *parts):
        assert part in error


# --- what does not fit ----------------------------------------------------------------------------


@every_kind
def test_misfit_is_a_dead_letter_at_once(
    kind: Any, event_broker: EventBroker, seen: Payments, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is retried; with the path of the field and the class, and without the value."""
    data = {**AS_JSON, "friends": [{**AS_JSON, "user_id": SECRET}]}
    options: dict[str, Any] = {"payload": kind, "max_retries": 3, "retry_on": Exception}
    delivery = delivered(event_broker, seen, data, **options)
    assert (delivery.outcome, delivery.seconds) == (Outcome.DEAD_LETTER, None)
    assert isinstance(delivery.error, InvalidEvent)
    assert seen.events == []
    (letter,) = event_broker.dead_letters("users")
    assert (letter.error_type, letter.retries) == ("payload", 0)
    assert letter.error_message is not None
    for part in ("user.registered", f"kinds_of_data.{kind.__name__}", "friends[0].user_id", "int"):
        assert part in letter.error_message
    assert letter.event is not None
    assert letter.event.data == data
    shown = f"{letter.error_message} {letter.traceback} {delivery!r} {caplog.text}"
    assert SECRET not in shown
    (record,) = caplog.records
    assert (record.levelname, letter.error_message in record.getMessage()) == ("ERROR", True)


class Colour(enum.Enum):
    RED = "red"


@dataclass
class WithColour:
    colour: Colour
    token: UUID | None = None
    by_name: dict[str, int] = field(default_factory=dict)
    visits: dict[int, int] = field(default_factory=dict)


class WithColourModel(pydantic.BaseModel):
    colour: Colour
    token: UUID | None = None
    by_name: dict[str, int] = {}
    visits: dict[int, int] = {}


@attrs.define
class Validated:
    age: int = attrs.field(validator=attrs.validators.gt(30), default=31)
    name: Any = attrs.field(validator=attrs.validators.instance_of(int), default=1)
    kind: str = attrs.field(validator=attrs.validators.in_(["a"]), default="a")
    code: str = attrs.field(validator=attrs.validators.matches_re("[0-9]+"), default="1")


@dataclass
class PostInit:
    age: int

    def __post_init__(self) -> None:
        if self.age < 0:
            raise ValueError("an age is not negative")


class ValidatedModel(pydantic.BaseModel):
    age: int

    @pydantic.field_validator("age")
    @classmethod
    def _check(cls, age: int) -> int:
        if age < 0:
            raise ValueError("an age is not negative")
        return age


@dataclass
class OfColourModel:
    inner: list[WithColourModel]
    other: ValidatedModel | None = None
    age: int = 0

    def __post_init__(self) -> None:
        if self.age < 0:
            raise ValueError("an age is not negative")


red = {"colour": "red"}
MISFITS: dict[str, tuple[Any, Any, list[str]]] = {
    "not an object": (UserRegistered, [SECRET], ["Expected `object`", "event.data)"]),
    "text": (UserRegistered, SECRET, ["event.data)"]),
    "missing": (UserRegistered, {}, ["missing", "event.data.user_id)"]),
    "missing inside": (Page[UserRegistered], {"items": [{}]}, ["event.data.items[0].user_id)"]),
    "an enum": (WithColour, {"colour": SECRET}, ["Invalid enum value", "event.data.colour)"]),
    "a UUID": (WithColour, {**red, "token": SECRET}, ["UUID", "event.data.token)"]),
    "a value in a dict": (
        WithColour,
        {**red, "by_name": {SECRET: "x"}},
        ["event.data.by_name[...])"],
    ),
    "a key": (WithColour, {**red, "visits": {SECRET: 1}}, ["a key", "event.data.visits)"]),
    "a tag": (Cat | Dog, {"type": SECRET}, ["Invalid value", "event.data.type)"]),
    "attrs: gt": (Validated, {"age": NUMBER}, ["'age' must be > 30", "event.data)"]),
    "attrs: instance_of": (Validated, {"name": SECRET}, ["'name' must be", "event.data)"]),
    "attrs: in_": (Validated, {"kind": SECRET}, ["'kind' must be in ['a']"]),
    "attrs: matches_re": (Validated, {"code": SECRET}, ["'code' must match regex '[0-9]+'"]),
    "__post_init__": (PostInit, {"age": NUMBER}, ["ValueError: an age is not negative"]),
    "pydantic: not an object": (WithColourModel, [SECRET], ["event.data)"]),
    "pydantic: missing": (WithColourModel, {}, ["Field required", "event.data.colour)"]),
    "pydantic: an enum": (WithColourModel, {"colour": SECRET}, ["'red'", "event.data.colour)"]),
    "pydantic: a UUID": (
        WithColourModel,
        {**red, "token": SECRET},
        ["Input should be a valid UUID", "event.data.token)"],
    ),
    "pydantic: a value in a dict": (
        WithColourModel,
        {**red, "by_name": {SECRET: "x"}},
        ["event.data.by_name[...])"],
    ),
    "pydantic: a key": (
        WithColourModel,
        {**red, "visits": {SECRET: 1}},
        ["event.data.visits[...]"],
    ),
    "pydantic: a tag": (Pet, {"kind": SECRET}, ["tag", "event.data)"]),
    "pydantic: a validator": (
        ValidatedModel,
        {"age": NUMBER},
        ["Value error, an age is not negative", "event.data.age)"],
    ),
    "pydantic in a dataclass": (
        OfColourModel,
        {"inner": [{"colour": SECRET}]},
        ["'red'", "event.data.inner[0].colour)"],
    ),
    "pydantic in a dataclass, another": (
        OfColourModel,
        {"inner": [], "other": {"age": SECRET}},
        ["Input should be a valid integer", "event.data.other.age)"],
    ),
    "pydantic in a dataclass, not at fault": (
        OfColourModel,
        {"inner": [], "age": NUMBER},
        ["ValueError: an age is not negative", "event.data)"],
    ),
    "not Unicode": (WithColourModel, {"colour": "\ud800"}, ["event.data"]),
}


@pytest.mark.parametrize("what", MISFITS)
def test_misfit_names_the_field_and_not_the_value(
    what: str, event_broker: EventBroker, seen: Payments, caplog: pytest.LogCaptureFixture
) -> None:
    """Libraries put it into their messages, and tracebacks show those."""
    payload, data, parts = MISFITS[what]
    assert delivered(event_broker, seen, data, payload=payload).outcome == "dead letter"
    (letter,) = event_broker.dead_letters("users")
    assert letter.error_message is not None
    for part in parts:
        assert part in letter.error_message
    shown = f"{letter.error_message} {letter.traceback}"
    assert SECRET not in f"{shown} {caplog.text}"
    assert str(NUMBER) not in shown  # the log has the event's id, which may contain any digits


def test_many_misfits_are_counted(event_broker: EventBroker, seen: Payments) -> None:
    """An error stays short."""
    data = {"items": [SECRET] * 12}
    error = str(delivered(event_broker, seen, data, payload=PageModel[int]).error)
    assert "event.data.items[4]" in error
    assert "event.data.items[5]" not in error
    assert error.endswith("; and 7 more.")


@dataclass
class Buggy:
    user_id: int

    def __post_init__(self) -> None:
        if errors:
            raise errors.pop()


errors: list[BaseException] = []


@pytest.mark.parametrize(
    "error", [KeyError("no such user"), RecursionError("no such user")], ids=repr
)
def test_class_whose_code_fails_gives_the_event_up(
    error: Exception, event_broker: EventBroker, seen: Payments
) -> None:
    """With the traceback, as of a handler."""
    errors.append(error)
    options: dict[str, Any] = {"payload": Buggy, "max_retries": 3, "retry_on": Exception}
    assert delivered(event_broker, seen, {"user_id": 1}, **options).outcome == "dead letter"
    (letter,) = event_broker.dead_letters("users")
    assert letter.error_type == "payload"
    assert "no such user" in str(letter.error_message)
    assert "__post_init__" in str(letter.traceback)


def test_class_that_cancels_gives_the_event_up(event_broker: EventBroker, seen: Payments) -> None:
    """Not every failure is an `Exception`; the subscriber goes on."""
    errors.append(asyncio.CancelledError("cancelled"))
    delivery = delivered(event_broker, seen, {"user_id": 1}, payload=Buggy)
    assert delivery.outcome == "dead letter"


def test_class_that_ends_the_process_gives_the_event_back(
    event_broker: EventBroker, seen: Payments
) -> None:
    """As a handler that does; the event comes again."""
    errors.append(SystemExit(3))
    subscriber = registered(seen.handle, payload=Buggy)
    with pytest.raises(SystemExit):
        event_broker.deliver(subscriber, DomainEvent("a.b", {"user_id": 1}))
    assert event_broker.dead_letters("users") == []
    (delivery,) = event_broker.deliver(subscriber)
    assert delivery.outcome == "handled"
    assert seen.events[0].redelivered


def test_misfit_without_dead_letters_is_dropped(
    event_broker: EventBroker, seen: Payments, caplog: pytest.LogCaptureFixture
) -> None:
    """And logged."""
    options: dict[str, Any] = {"payload": UserRegistered, "dead_letter": False}
    assert delivered(event_broker, seen, {}, **options).outcome == "dropped"
    assert "user_id" in caplog.text


def test_replayed_misfit_is_read_again(event_broker: EventBroker, seen: Payments) -> None:
    """After a release whose class fits."""
    assert delivered(event_broker, seen, {}, payload=UserRegistered).outcome == "dead letter"
    fixed = registered(seen.handle, payload=Partial)
    with DeadLetters("users") as letters:
        letters.replay_all()
    event_broker.deliver(fixed, raising=True)
    assert seen.data == [{}]


# --- versions -------------------------------------------------------------------------------------


def v1_to_v2(data: Any) -> Any:
    return {"user_id": int(data["id"])}


def v2_to_v3(data: Any) -> Any:
    return {**data, "name": "unknown"}


STEPS = {2: v2_to_v3, 1: v1_to_v2}


@pytest.mark.parametrize("payload", [None, UserRegistered])
@pytest.mark.parametrize(
    ("version", "data"),
    [(1, {"id": "7"}), (2, {"user_id": 7}), (3, {"user_id": 7, "name": "unknown"})],
)
def test_old_data_is_turned_into_new_data(
    version: int, data: object, payload: Any, event_broker: EventBroker, seen: Payments
) -> None:
    """Step by step, before the payload is made of it; the event keeps its version."""
    options: dict[str, Any] = {"upcast": STEPS, "payload": payload}
    assert delivered(event_broker, seen, data, version, **options).outcome == "handled"
    (event,) = seen.events
    new: dict[str, Any] = {"user_id": 7, "name": "unknown"}
    assert event.data == (new if payload is None else UserRegistered(**new))
    assert event.version == version


def test_newer_version_than_known_is_handled_as_it_is(
    event_broker: EventBroker, seen: Payments
) -> None:
    """Publishers are deployed first; what no longer fits shows when it is read."""
    options: dict[str, Any] = {"upcast": STEPS, "payload": UserRegistered}
    data = {"user_id": 7, "name": "Ada", "more": 1}
    assert delivered(event_broker, seen, data, 9, **options).outcome == "handled"
    assert seen.data == [UserRegistered(7, "Ada")]


def test_version_without_a_step_is_a_dead_letter(event_broker: EventBroker, seen: Payments) -> None:
    """Nobody knows what its data means."""
    delivery = delivered(event_broker, seen, {}, 1, upcast={2: v2_to_v3})
    assert delivery.outcome == "dead letter"
    (letter,) = event_broker.dead_letters("users")
    assert letter.error_type == "upcast"
    assert "version 1" in str(letter.error_message)
    assert "the oldest one is for version 2" in str(letter.error_message)


def forgets(data: Any) -> None:
    data["forgotten"] = True


def retries(data: Any) -> Any:
    raise Retry


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        (v1_to_v2, ["test_payloads.v1_to_v2 failed", "KeyError: 'id'"]),
        (forgets, ["test_payloads.forgets returned None"]),
        (retries, ["test_payloads.retries failed"]),
    ],
)
def test_step_that_fails_is_named_by_the_dead_letter(
    step: Any, parts: list[str], event_broker: EventBroker, seen: Payments
) -> None:
    """At once, whatever is retried."""
    options: dict[str, Any] = {
        "upcast": {1: v2_to_v3, 2: step},
        "max_retries": 3,
        "retry_on": Exception,
    }
    data = {"user_id": 7}
    assert delivered(event_broker, seen, data, 1, **options).outcome == "dead letter"
    assert seen.events == []
    (letter,) = event_broker.dead_letters("users")
    assert (letter.error_type, letter.retries) == ("upcast", 0)
    for part in ("published as version 1", "from version 2 to 3", *parts):
        assert part in str(letter.error_message)
    assert letter.event is not None
    assert letter.event.data == data


async def coroutine(data: Any) -> Any:
    return data


@pytest.mark.parametrize(
    ("upcast", "parts"),
    [
        ({1: v1_to_v2, 3: v2_to_v3}, ["no step from version 2 to 3", "between 1 and 4"]),
        ([v1_to_v2], ["a dict"]),
        ({"1": v1_to_v2}, ["an int", "'1'"]),
        ({0: v1_to_v2}, ["an int from 1", "0"]),
        ({True: v1_to_v2}, ["an int", "True"]),
        ({1: "v1_to_v2"}, ["a function", "upcast[1]"]),
        ({1: coroutine}, ["a plain function", "upcast[1]"]),
    ],
    # Not of the function, which would contain its address.
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_steps_that_cannot_work_are_refused(
    upcast: Any, parts: list[str], event_broker: EventBroker
) -> None:
    """When registering."""
    error = refused(ignore, upcast=upcast)
    for part in ("users: upcast", *parts):
        assert part in error


# --- on RabbitMQ ----------------------------------------------------------------------------------


def test_payloads_and_versions_on_rabbitmq(broker_url: str, names: Names) -> None:
    """In threads, in order, through a header; a misfit's body is kept byte for byte."""
    bench, seen = Bench(broker_url, names), Payments()
    subscriber, queue = bench.subscriber(workers=2), names.queue()
    subscriber.register(
        seen.handle,
        queue,
        ["user.*"],
        max_retries=3,
        retry_on=Exception,
        ordered=True,
        payload=UserRegistered,
        upcast=STEPS,
    )
    old = bench.publisher.publish(DomainEvent("user.registered", {"id": "7"}, "7"))
    new = DomainEvent("user.registered", UserRegistered(8, "Ada"), "8", version=3)
    bench.publisher.publish(new)
    body = json.dumps(
        {"data": {"name": "\u00e4"}, "uuid_string": "odd", "routing_key": "user.odd", "x": 1},
        indent=3,
        ensure_ascii=False,
    ).encode()
    with onlooker.channel(broker_url) as channel:
        channel.basic_publish(bench.exchange, "user.odd", body)
    with running(subscriber), DeadLetters(queue, broker_url) as letters:
        wait_until(lambda: len(seen.events) == 2 and letters.count() == 1)
        (letter,) = letters
        assert letter.body == body
        assert letter.error_type == "upcast"
    got = {event.uuid_string: (event.data, event.version) for event in seen.events}
    assert got == {
        old.uuid_string: (UserRegistered(7, "unknown"), 1),
        new.uuid_string: (UserRegistered(8, "Ada"), 3),
    }
    bench.publisher.close()
