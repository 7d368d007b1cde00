"""How a subscriber wants its events: what `Subscriber.register` is given, checked. Pure."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from domain_events import topology
from domain_events.broker import Prefetch
from domain_events.checks import flag, refusal, shown, whole_number
from domain_events.errors import ConfigurationError
from domain_events.retry import Backoff
from domain_events.text import plain

_MOST_RETRIES = 2**31 - 1
_MOST_PREFETCHED = 65_535  # AMQP's own limit

QueueType = Literal["quorum", "classic"]


class RegisterOptions(TypedDict, total=False):
    """The options of `Subscriber.register`, for those of `Subscriber.on`."""

    dead_letter: bool | None
    durable: bool
    exclusive: bool
    auto_delete: bool
    max_retries: int
    retry_on: type[Exception] | Sequence[type[Exception]]
    backoff: Backoff | None
    queue_type: QueueType
    prefetch_count: int | None
    ordered: bool


# Events held ready, where the user has not said how many.
_FEW = 50
_MANY = 2000
_STEADY = 200


@dataclass(frozen=True)
class Options:
    """How a subscriber wants its events; `Subscriber.register` says what each means."""

    name: str
    binding_keys: tuple[str, ...]
    exchange: str
    exchange_type: str
    dead_letter: bool
    durable: bool
    exclusive: bool
    auto_delete: bool
    max_retries: int
    retry_on: tuple[type[Exception], ...]
    backoff: Backoff
    queue_type: QueueType
    prefetch_count: int | None
    ordered: bool

    def topology(self) -> list[topology.Declaration]:
        """All that must exist on the broker for this subscriber."""
        name, classic = self.name, self.queue_type == "classic"
        declarations: list[topology.Declaration] = [
            topology.Exchange(self.exchange, self.exchange_type)
        ]
        if self.dead_letter:
            declarations.append(topology.dead_letter_queue(name, classic=classic))
        if self.exclusive or self.auto_delete or not self.durable:
            declarations.append(
                topology.temporary_queue(
                    name,
                    exclusive=self.exclusive,
                    auto_delete=self.auto_delete,
                    as_found=classic,
                )
            )
        elif classic:
            declarations.append(topology.classic_queue(name, self.dead_letter))
        else:
            declarations.append(topology.subscriber_queue(name))
        declarations += topology.bindings(self.exchange, name, self.binding_keys)
        if self.max_retries:
            declarations += topology.delays(self.exchange)
            declarations.append(topology.way_back(self.exchange, name))
        return declarations

    def prefetch(self, workers: int) -> Prefetch:
        """How many events a process with so many workers holds ready."""
        if self.prefetch_count is not None:
            return Prefetch(self.prefetch_count, self.prefetch_count)
        enough = 4 * workers
        if self.auto_delete or self.queue_type == "classic":
            # To take another number, consuming ends for a moment, and with it an auto-delete
            # queue; so may be a classic one that was found.
            return Prefetch(max(_STEADY, enough), max(_STEADY, enough))
        return Prefetch(max(_FEW, enough), max(_MANY, enough))


def make_options(
    name: object,
    binding_keys: object,
    dead_letter: bool | None,
    retry_on: type[Exception] | Sequence[type[Exception]],
    backoff: Backoff | None,
    *,
    exchange: str,
    exchange_type: str,
    durable: bool,
    exclusive: bool,
    auto_delete: bool,
    max_retries: int,
    queue_type: str,
    prefetch_count: int | None,
    ordered: bool,
) -> Options:
    """The options as a user gives them, checked and with their defaults.

    :raises ConfigurationError: when they cannot work, or clash.
    """
    if not isinstance(name, str) and isinstance(binding_keys, str):
        raise ConfigurationError(
            f"name is {shown(name)} and binding_keys is {shown(binding_keys)}: they are swapped; "
            "it is register(handler, name, binding_keys)."
        )
    name = topology.check_name(name, "subscriber")
    durable = flag(durable, f"{name}: durable")
    exclusive = flag(exclusive, f"{name}: exclusive")
    auto_delete = flag(auto_delete, f"{name}: auto_delete")
    temporary = exclusive or auto_delete or not durable
    max_retries = whole_number(max_retries, f"{name}: max_retries", 0, _MOST_RETRIES)
    kinds = _exceptions(retry_on, f"{name}: retry_on")
    if kinds and not max_retries:
        raise ConfigurationError(
            f"{name}: retry_on has no effect without max_retries, which is 0; "
            "give max_retries=3, for example."
        )
    if backoff is not None and not isinstance(backoff, Backoff):
        raise refusal(backoff, f"{name}: backoff", "a Backoff, such as Backoff(first=5)")
    if prefetch_count is not None:
        option = f"{name}: prefetch_count"
        prefetch_count = whole_number(prefetch_count, option, 1, _MOST_PREFETCHED)
    return Options(
        name=name,
        binding_keys=_binding_keys(binding_keys, name, exchange_type),
        exchange=exchange,
        exchange_type=exchange_type,
        dead_letter=(
            not temporary if dead_letter is None else flag(dead_letter, f"{name}: dead_letter")
        ),
        durable=durable,
        exclusive=exclusive,
        auto_delete=auto_delete,
        max_retries=max_retries,
        retry_on=kinds,
        backoff=backoff or Backoff(),
        queue_type=_queue_type(queue_type, f"{name}: queue_type"),
        prefetch_count=prefetch_count,
        ordered=flag(ordered, f"{name}: ordered"),
    )


def check_handler(handler: Any, name: object) -> None:
    """Make sure that calling the handler with an event is what handles the event.

    :raises ConfigurationError: it cannot be called so, or the call would only make a coroutine
        or a generator, which nobody runs.
    """
    # Its name may be a mistake as well.
    what = f"{plain(name)}: the handler" if isinstance(name, str) else "The handler"
    what += f" {shown(handler)}"
    if not callable(handler):
        if callable(name):
            hint = "handler and name are swapped; it is register(handler, name, binding_keys)"
        elif handler is None:
            hint = (
                "pass the function itself, as in register(handle, ...), not register(handle(), ...)"
            )
        else:
            hint = "pass a function that takes a DomainEvent"
        raise ConfigurationError(f"{what} cannot be called: {hint}.")
    if inspect.isclass(handler) and any("__call__" in vars(kind) for kind in handler.__mro__):
        raise ConfigurationError(
            f"{what} is a class, whose instances handle events; give an instance: "
            f"{handler.__name__}()."
        )
    called = handler
    while isinstance(called, functools.partial):
        called = called.func
    for each in (called, getattr(called, "__call__", None)):  # noqa: B004 - to look into it
        if inspect.iscoroutinefunction(each):
            raise ConfigurationError(
                f"{what} is an async function: calling it runs nothing. Give a plain "
                "function that runs it, such as: lambda event: asyncio.run(handle(event))."
            )
        if inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each):
            raise ConfigurationError(
                f"{what} is a generator function (it has a yield): calling it runs "
                "nothing. Give a function without yield, or one that runs through the generator."
            )
    try:
        inspect.signature(handler).bind(object())
    except ValueError:
        pass  # one that is written in C has no signature
    except TypeError as error:
        raise ConfigurationError(
            f"{what} must take one argument, the event; as it is: {error}."
        ) from error


def _binding_keys(given: object, name: str, exchange_type: str) -> tuple[str, ...]:
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        hint = f"; give [{plain(given)!r}]" if isinstance(given, str) else ""
        right = "a list of binding keys, such as ['user.*'], or ['#'] for all events"
        raise refusal(given, f"{name}: binding_keys", right, hint)
    keys = tuple(given)
    if not keys:
        raise ConfigurationError(
            f"{name}: binding_keys is empty; give at least one, such as 'user.*', or '#' for all."
        )
    try:
        return tuple(topology.check_binding_key(key, exchange_type) for key in keys)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None


def _exceptions(given: object, option: str) -> tuple[type[Exception], ...]:
    kinds = (
        tuple(given)
        if isinstance(given, Iterable) and not isinstance(given, str | type)
        else (given,)
    )
    for kind in kinds:
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            raise refusal(
                kind, option, "exception classes, such as (ConnectionError, TimeoutError)"
            )
    return kinds


def _queue_type(given: object, option: str) -> QueueType:
    if given == "quorum":
        return "quorum"
    if given == "classic":
        return "classic"
    raise refusal(given, option, "'quorum' or 'classic'")
