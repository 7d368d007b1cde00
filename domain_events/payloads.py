"""Typed data: what turns the data of a received event into what its handler takes.

In two steps, each optional. ``upcast`` turns the data of an older version into that of the next
one, until it is new. Then it becomes the payload: a dataclass, a TypedDict, an attrs class or a
struct by msgspec, a model by pydantic, whichever the class belongs to. Neither library is imported
unless a subscriber has such a payload.

What does not fit is a dead letter at once, since it will not fit the next time. Its error names
the field, and never the value: libraries put that into their messages, and tracebacks show those.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import (
    Annotated,
    Any,
    ForwardRef,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    is_typeddict,
)

from domain_events.checks import refusal, shown
from domain_events.errors import ConfigurationError, InvalidEvent
from domain_events.events import DomainEvent, encode, with_data
from domain_events.kinds import field_names, is_pydantic
from domain_events.message import GivenUp, type_name
from domain_events.text import printable

#: Turns the data of one version into that of the next one.
Upcast = Callable[[Any], Any]

_INSTALL = "pip install 'domain-events-rabbitmq[typed]'"
_MOST_PROBLEMS = 5


class Misfit(GivenUp, InvalidEvent):
    """The data of a received event is not what its subscriber takes."""


class Payload:
    """What a subscriber makes of the data of each event.

    :param subscriber: its name, for errors.
    :param kind: the class of the payload, or another type; None for the data as it is.
    :param upcast: by the version that each step begins with.
    :raises ConfigurationError: when it cannot work.
    """

    def __init__(self, subscriber: str, kind: Any, upcast: Mapping[int, Upcast]) -> None:
        self._kind = kind
        self._steps = dict(sorted(upcast.items()))
        self._convert: Callable[[Any], Any] | None = None
        self._problems: Callable[[Exception], list[_Problem] | None] = lambda _error: None
        if kind is not None:
            by = _ByPydantic if _mentions_pydantic(kind) else _ByMsgspec
            library = by(kind, f"{subscriber}: the payload {_named(kind)}")
            self._convert, self._problems = library.convert, library.problems

    @property
    def name(self) -> str | None:
        """The name of the class or type; None for JSON values that are only upcast."""
        return None if self._kind is None else _named(self._kind)

    def read(self, event: DomainEvent[Any]) -> DomainEvent[Any]:
        """The event with its data as the handler takes it.

        :raises Misfit: it does not fit.
        """
        data, version = event.data, 0
        if self._steps:
            data, version = self._upcast(event), max(event.version, max(self._steps) + 1)
        if self._convert is None:
            return with_data(event, data, version)
        try:
            return with_data(event, self._convert(data), version)
        except Exception as error:
            problems = self._problems(error)
            if problems is None:  # raised by code of the user's, in a class or a validator
                problems = [("event.data", f"{type_name(error)}: {printable(error)}")]
                raise self._misfit(event, problems) from error
        # Not inside the `except`: the traceback would show the library's error, with the values.
        raise self._misfit(event, problems)

    def _misfit(self, event: DomainEvent[Any], problems: list[_Problem]) -> Misfit:
        texts = [f"{text} (at {path})" for path, text in problems[:_MOST_PROBLEMS]]
        if len(problems) > _MOST_PROBLEMS:
            texts.append(f"and {len(problems) - _MOST_PROBLEMS} more")
        what = f"The data of {printable(event.routing_key)}"
        misfit = Misfit("payload", f"{what} does not fit {_named(self._kind)}: {'; '.join(texts)}.")
        misfit.event = event
        return misfit

    def _upcast(self, event: DomainEvent[Any]) -> Any:
        data, version = event.data, event.version
        oldest, newest = min(self._steps), max(self._steps) + 1
        if version < oldest:
            why = f"there is no step for it: the oldest one is for version {oldest}"
            raise self._upcast_error(event, version, why)
        # A newer one than known is handled as it is: it may have no more than additions.
        for number in range(version, newest):
            step = self._steps[number]
            try:
                data = step(data)
            except Exception as error:
                why = f"{type_name(error)}: {printable(error)}"
                raise self._upcast_error(event, number, f"{_named(step)} failed: {why}") from error
            if data is None:
                why = f"{_named(step)} returned None instead of the data of version {number + 1}"
                raise self._upcast_error(event, number, why)
        return data

    @staticmethod
    def _upcast_error(event: DomainEvent[Any], version: int, why: str) -> Misfit:
        misfit = Misfit(
            "upcast",
            f"The data of {printable(event.routing_key)}, published as version {event.version}, "
            f"cannot be upcast from version {version} to {version + 1}: {why}.",
        )
        misfit.event = event
        return misfit


_Problem: TypeAlias = tuple[str, str]


def make_payload(handler: Any, name: str, payload: Any, upcast: Any) -> Payload | None:
    """What a subscriber makes of data: by its options, and by the annotation of its handler.

    :return: None if it takes the data as it is.
    :raises ConfigurationError: when that cannot work, or the two differ.
    """
    steps = _checked_steps(upcast, f"{name}: upcast")
    _check_is_class(payload, f"{name}: payload")
    try:
        annotated = _annotated(handler, name)
    except _Unresolvable as error:
        if payload is None:
            raise ConfigurationError(f"{name}: {error}") from error.__cause__
        annotated = None
    if payload is None:
        payload = annotated
    elif annotated is not None and not _are_same(annotated, payload):
        raise ConfigurationError(
            f"{name}: payload is {_named(payload)}, and the handler takes a "
            f"DomainEvent[{_named(annotated)}]; give the same one, or one of them only."
        )
    kind = None if payload is None or _is_as_it_is(payload) else payload
    return Payload(name, kind, steps) if kind is not None or steps else None


def _check_is_class(payload: Any, option: str) -> None:
    """Refuse what is mistaken for a class; the libraries refuse the rest."""
    if _is_event(payload):
        argument = _argument(payload)
        hint = "leave it out" if argument is None else f"give payload={_named(argument)}"
        raise ConfigurationError(f"{option} is the class of event.data, not of the event; {hint}.")
    hint = "" if isinstance(payload, type) else _class_of(payload)
    if hint:
        right = "a dataclass, a TypedDict, an attrs class, a msgspec.Struct or a pydantic model"
        raise refusal(payload, option, right, f"; give {hint}")


def _is_event(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, DomainEvent)


def _class_of(payload: Any) -> str:
    if isinstance(payload, str):
        return "the class itself"
    return f"its class, {type(payload).__name__}" if field_names(type(payload)) else ""


def _checked_steps(given: Any, option: str) -> dict[int, Upcast]:
    if given is None:
        return {}
    right = (
        "a dict from each old version to the function that upgrades its data, such as {1: v1_to_v2}"
    )
    if not isinstance(given, Mapping):
        raise refusal(given, option, right)
    for version, step in given.items():
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise refusal(version, f"{option}: a version", "an int from 1")
        if not callable(step):
            raise refusal(step, f"{option}[{version}]", "a function that takes and returns data")
        if inspect.iscoroutinefunction(step) or inspect.isgeneratorfunction(step):
            raise refusal(step, f"{option}[{version}]", "a plain function")
        try:
            signature(step).bind(object())
        except ValueError:
            pass  # one that is written in C has no signature
        except TypeError as error:
            raise ConfigurationError(
                f"{option}[{version}] must take one argument, the data; as it is: {error}."
            ) from error
    missing = sorted(set(range(min(given, default=0), max(given, default=0))) - set(given))
    if missing:
        raise ConfigurationError(
            f"{option} has no step from version {missing[0]} to {missing[0] + 1}, between "
            f"{min(given)} and {max(given) + 1}; give one for each version."
        )
    return dict(given)


# --- the annotation of a handler ------------------------------------------------------------------


class _Unresolvable(Exception):
    """An annotation has a name that is not defined where the handler is."""


def _annotated(handler: Any, name: str) -> Any:
    """``UserRegistered``, if its first parameter is a ``DomainEvent[UserRegistered]``.

    :raises ConfigurationError: if it is a ``UserRegistered``.
    """
    try:
        parameters = signature(handler).parameters
    except (TypeError, ValueError):
        return None  # one that is written in C has no signature
    annotation = next((each.annotation for each in parameters.values()), None)
    argument: Any = None
    try:
        annotation = _evaluated(annotation, handler)
        argument = _argument(annotation)
        argument = _evaluated(argument, handler)
    except Exception as error:
        text = str(_text(annotation) if argument is None else f"DomainEvent[{_text(argument)}]")
        if "DomainEvent[" not in text:
            return None
        raise _Unresolvable(
            f"the handler's annotation {printable(text)} cannot be resolved: {printable(error)}. "
            "Import or define the class where the handler's module finds it at run time, or give "
            "it to register() as payload=..."
        ) from error
    if argument is None and _is_payload(annotation) and not _is_decorated(handler):
        raise ConfigurationError(
            f"{name}: the handler is annotated to take {_named(annotation)}, but is called with a "
            f"DomainEvent. Annotate its parameter as DomainEvent[{_named(annotation)}]; the object "
            "is then in event.data."
        )
    return None if isinstance(argument, TypeVar) else argument


def _is_payload(annotation: Any) -> bool:
    """Whether it is a class that data is made of, and not one that looks like an event."""
    if not isinstance(annotation, type) or getattr(annotation, "_is_protocol", False):
        return False
    names = field_names(annotation)
    is_one = bool(names) or is_pydantic(annotation) or is_typeddict(annotation)
    return is_one and "routing_key" not in names


def _is_decorated(handler: Any) -> bool:
    """Whether the annotation is that of a function which a decorator calls, perhaps with data."""
    while not hasattr(handler, "__wrapped__"):
        if isinstance(handler, functools.partial):
            handler = handler.func
        elif hasattr(handler, "__func__"):
            handler = handler.__func__
        else:
            return hasattr(type(handler).__call__, "__wrapped__")
    return True


def signature(handler: Any) -> inspect.Signature:
    """Its signature; on Python 3.14 an annotation may have a name that only type checkers know."""
    if sys.version_info >= (3, 14):
        from annotationlib import Format  # noqa: PLC0415

        return inspect.signature(handler, annotation_format=Format.FORWARDREF)
    return inspect.signature(handler)


def _evaluated(annotation: Any, handler: Any) -> Any:
    for _ in range(2):  # text in quotes is text of text, with `from __future__ import annotations`
        text = _text(annotation)
        if not isinstance(text, str):
            break
        # These two are often imported for type checkers only.
        known = {"DomainEvent": DomainEvent, "Any": Any, **_globals(handler)}
        annotation = eval(text, known)
    return annotation


def _text(annotation: Any) -> Any:
    """Its text, if it is yet to be evaluated."""
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else annotation


def _globals(handler: Any) -> dict[str, Any]:
    """Those of the function behind it, where its annotations were written."""
    while True:
        if isinstance(handler, functools.partial):
            handler = handler.func
        elif hasattr(handler, "__wrapped__"):
            handler = handler.__wrapped__
        elif hasattr(handler, "__func__"):
            handler = handler.__func__
        elif hasattr(handler, "__globals__"):
            return dict(handler.__globals__)
        elif hasattr(type(handler).__call__, "__globals__") or hasattr(
            type(handler).__call__, "__wrapped__"
        ):
            handler = type(handler).__call__
        else:
            return {}


def _argument(annotation: Any) -> Any:
    """``UserRegistered`` of ``DomainEvent[UserRegistered]``; None of anything else."""
    annotation = _unwrapped(annotation)
    if get_origin(annotation) is Annotated:
        annotation = _unwrapped(get_args(annotation)[0])
    origin = get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, DomainEvent):
        return get_args(annotation)[0]
    if origin in (Union, types.UnionType):
        # `DomainEvent[UserRegistered] | None`, of a function that is called without one elsewhere.
        members = [_argument(each) for each in get_args(annotation) if each is not type(None)]
        return None if None in members else Union[tuple(members)]  # noqa: UP007
    return None


def _unwrapped(kind: Any) -> Any:
    """What a ``type`` statement or a NewType stands for."""
    while type(kind).__name__ == "TypeAliasType" or hasattr(kind, "__supertype__"):
        kind = kind.__supertype__ if hasattr(kind, "__supertype__") else kind.__value__
    return kind


def _is_as_it_is(kind: Any) -> bool:
    """Whether it means any data that an event may have."""
    mappings = (dict, Mapping, MutableMapping)
    if isinstance(kind, TypeVar) or any(kind is each for each in (Any, object, *mappings)):
        return True
    if get_origin(kind) not in mappings:
        return False
    arguments = get_args(kind)
    return not arguments or (arguments[0] in (str, Any) and arguments[1] in (Any, object))


def _are_same(one: Any, other: Any) -> bool:
    return bool(one == other) or (_is_as_it_is(one) and _is_as_it_is(other))


# --- the libraries --------------------------------------------------------------------------------


class _ByMsgspec:
    """Payloads that are msgspec's work: dataclasses, TypedDicts, attrs classes, structs."""

    def __init__(self, kind: Any, what: str) -> None:
        try:
            import msgspec  # noqa: PLC0415
            import msgspec.inspect  # noqa: PLC0415
        except ImportError as error:
            raise ConfigurationError(
                f"{what} needs msgspec, which is not installed: {_INSTALL}"
            ) from error
        try:
            msgspec.json.Decoder(kind)
            strangers = list(_strangers(msgspec.inspect.type_info(kind), set()))
        except Exception as error:
            raise ConfigurationError(
                f"{what} cannot be used: {printable(error)}. {_RIGHT_ONES}"
            ) from error
        for stranger in strangers:
            if not is_pydantic(stranger):
                inside = "" if stranger is kind else f", for the {_named(stranger)} in it"
                raise ConfigurationError(
                    f"{what} cannot be used{inside}: msgspec does not know how to make a "
                    f"{_named(stranger)}. {_RIGHT_ONES}"
                )
        # Models of pydantic inside it.
        self._models = {each: _ByPydantic(each, what) for each in strangers}
        self._words = {word for model in self._models.values() for word in model.words}
        self._error = msgspec.ValidationError
        self.convert: Callable[[Any], Any] = functools.partial(
            msgspec.convert, type=kind, str_keys=True, dec_hook=self._make_model
        )

    def _make_model(self, kind: Any, data: Any) -> Any:
        return self._models[kind].convert(data)

    def problems(self, error: Exception) -> list[_Problem] | None:
        """What does not fit, and where; None if it is another error."""
        if not isinstance(error, self._error):
            return None
        found = _MSGSPEC.fullmatch(str(error))
        assert found is not None  # it matches any text
        text, path = found["text"], f"event.data{found['path'] or ''}"
        cause = error.__cause__
        if cause is not None:
            problems = _problems_of_pydantic(cause, self._words)
            if problems is not None:
                return [(path + where.removeprefix("event.data"), why) for where, why in problems]
            text = _text_of_validator(cause)
        elif missing := _MISSING.fullmatch(text):
            path += f".{missing['field']}"
        elif shows := _SHOWS_VALUE.match(text):
            text = shows[0]
        text = printable(text)
        return [(printable(path), f"a key: {text}" if found["key"] else text)]


_RIGHT_ONES = (
    "Give a dataclass, a TypedDict, an attrs class, a msgspec.Struct or a pydantic model, and give "
    "its fields such types."
)
# `Expected `int`, got `str` - at `$.lines[0].price``, or `... - at `key` in `$.prices``.
_MSGSPEC = re.compile(r"(?P<text>.*?)( - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>.*)`", re.DOTALL)
_SHOWS_VALUE = re.compile(r"Invalid (enum )?value(?= )")


def _text_of_validator(error: BaseException) -> str:
    """The text of an error that a validator raised, or ``__post_init__``."""
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    if module.partition(".")[0] == "attr":
        # 'age' must be > 3: 1; 'name' must be <class 'str'> (got 1 that is a <class 'int'>).
        text = re.split(r": | \(", text)[0]
    return f"{type_name(error)}: {printable(text)}"


def _strangers(node: Any, seen: set[int]) -> Iterable[type]:
    """The classes in a type that msgspec has no way to make."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if type(node).__name__ == "CustomType":
        yield node.cls
    parts = node if isinstance(node, tuple | list) else ()
    if type(node).__module__ == "msgspec.inspect":
        parts = [getattr(node, name) for name in node.__struct_fields__]
    for part in parts:
        yield from _strangers(part, seen)


class _ByPydantic:
    """Payloads that are pydantic's work: its models and its dataclasses."""

    def __init__(self, kind: Any, what: str) -> None:
        import pydantic  # noqa: PLC0415

        try:
            self._adapter: Any = pydantic.TypeAdapter(kind)
            if hasattr(self._adapter, "rebuild"):  # from 2.10 on
                self._adapter.rebuild(raise_errors=True)
            self.words = set(_words(self._adapter.core_schema))
        except Exception as error:
            raise ConfigurationError(f"{what} cannot be used: {printable(error)}") from error

    def convert(self, data: Any) -> Any:
        # From JSON, in which also a strict model takes a date as text.
        return self._adapter.validate_json(encode(data))

    def problems(self, error: BaseException) -> list[_Problem] | None:
        """What does not fit, and where; None if it is another error."""
        return _problems_of_pydantic(error, self.words)


def _problems_of_pydantic(error: BaseException, words: set[str]) -> list[_Problem] | None:
    pydantic: Any = sys.modules.get("pydantic")
    if pydantic is None or not isinstance(error, pydantic.ValidationError):
        return None
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    return [(_path_of_pydantic(each, words), _text_of_pydantic(each)) for each in errors]


def _path_of_pydantic(error: Any, words: set[str]) -> str:
    steps = ["event.data"]
    unknown = error["type"] == "extra_forbidden"
    for at, part in enumerate(error["loc"], 1):
        if isinstance(part, int):
            steps.append(f"[{part}]")
        elif part in words or (unknown and at == len(error["loc"])):
            steps.append(f".{printable(part, 60)}")
        else:
            steps.append("[...]")  # a key of a dictionary, which may be an e-mail address
    return "".join(steps)


def _text_of_pydantic(error: Any) -> str:
    kind, text = error["type"], error["msg"]
    if kind == "union_tag_invalid":
        return "The tag is not one of those expected"
    # Input should be a valid UUID, invalid character: found `x` at 1
    return printable(text.partition(",")[0] if kind.endswith(("_parsing", "_violation")) else text)


def _words(schema: Any) -> Iterable[str]:
    """Every text in a schema, with the names of all fields."""
    if isinstance(schema, str):
        yield schema
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            yield from _words(key)
            yield from _words(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            yield from _words(value)


def _mentions_pydantic(kind: Any, seen: tuple[Any, ...] = ()) -> bool:
    if any(kind is each for each in seen):
        return False  # a `type` statement that refers to itself
    seen += (kind,)
    kind = _unwrapped(kind)
    if is_pydantic(kind) or is_pydantic(get_origin(kind)):
        return True
    return any(_mentions_pydantic(each, seen) for each in get_args(kind))


def _named(kind: Any) -> str:
    """A class, another type, or a function, for an error."""
    if isinstance(kind, type | types.FunctionType) and not get_args(kind):
        module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
        return printable(f"{module}{kind.__qualname__}")
    return shown(kind)
