"""How a subscriber wants its events: what `Subscriber.register` is given, checked. Pure."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from domain_events import topology
from domain_events.checks import flag, refusal, shown, whole_number
from domain_events.errors import ConfigurationError
from domain_events.retry import Backoff
from domain_events.topology import Declaration

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
    retry_on: type[BaseException] | Sequence[type[BaseException]]
    backoff: Backoff | None
    queue_type: QueueType
    prefetch_count: int | None
    ordered: bool
    retired_keys: Sequence[str]


# Deliveries held by a process, where the user has not said how many, and at least for each worker.
_PREFETCH_COUNT = 200
_FOR_EACH_WORKER = 4


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
    retry_on: tuple[type[BaseException], ...]
    backoff: Backoff
    queue_type: QueueType
    prefetch_count: int | None
    ordered: bool
    retired_keys: tuple[str, ...] = ()

    def topology(self) -> list[Declaration]:
        """All that must exist on the broker for this subscriber."""
        name, classic = self.name, self.queue_type == "classic"
        declarations: list[Declaration] = [topology.Exchange(self.exchange, self.exchange_type)]
        if self.dead_letter:
            declarations.append(topology.dead_letter_queue(name, classic=classic))
        if self._is_temporary:
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
        declarations += topology.unbindings(self.exchange, name, self.retired_keys)
        if self.max_retries:
            declarations += self.delays()
        return declarations

    def delays(self) -> list[Declaration]:
        """What must exist so that an event can come back to this subscriber after a delay."""
        way_back = topology.way_back(self.exchange, self.name)
        return [*topology.delays(self.exchange), way_back]

    def prefetch(self, workers: int) -> int:
        """How many deliveries a process with so many workers holds at most."""
        if self.prefetch_count is not None:
            return self.prefetch_count
        return max(_PREFETCH_COUNT, _FOR_EACH_WORKER * workers)

    @property
    def counts_failures(self) -> bool:
        """Whether the subscriber's queue counts how often a delivery failed."""
        return self.durable and self.queue_type == "quorum" and not self._is_temporary

    @property
    def _is_temporary(self) -> bool:
        return self.exclusive or self.auto_delete or not self.durable

    def lists(self, routing_key: str) -> bool:
        """Whether events with this routing key are asked for."""
        if self.exchange_type == "topic":
            return _matches_any(self.binding_keys, routing_key)
        # A fanout exchange has no use for the keys, and those of plugins have uses of their own.
        return self.exchange_type != "direct" or routing_key in self.binding_keys

    def has_retired(self, routing_key: str) -> bool:
        """Whether events with this routing key were asked for once, and are not kept any more."""
        if self.exchange_type == "topic":
            return _matches_any(self.retired_keys, routing_key)
        return routing_key in self.retired_keys


def make_options(
    name: object,
    binding_keys: object,
    dead_letter: bool | None,
    retry_on: type[BaseException] | Sequence[type[BaseException]],
    backoff: Backoff | None,
    retired_keys: Sequence[str] = (),
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
    name = topology.check_name(name, "subscriber", exchange)
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
    if backoff is not None and not kinds:
        raise ConfigurationError(
            f"{name}: backoff has no effect without retry_on; give the exceptions on which an "
            "event is tried again, such as retry_on=(ConnectionError, TimeoutError), and "
            "max_retries=3."
        )
    if prefetch_count is not None:
        option = f"{name}: prefetch_count"
        prefetch_count = whole_number(prefetch_count, option, 1, _MOST_PREFETCHED)
    keys = _binding_keys(binding_keys, name, exchange_type)
    return Options(
        name=name,
        binding_keys=keys,
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
        retired_keys=_retired_keys(retired_keys, name, exchange_type, keys),
    )


def _matches_any(binding_keys: tuple[str, ...], routing_key: str) -> bool:
    # The plain look first: there may be a thousand binding keys.
    return routing_key in binding_keys or any(
        topology.matches(key, routing_key) for key in binding_keys
    )


def _retired_keys(
    given: object, name: str, exchange_type: str, binding_keys: tuple[str, ...]
) -> tuple[str, ...]:
    if given in ((), []):
        return ()
    keys = _binding_keys(given, name, exchange_type, "retired_keys")
    both = sorted({*keys} & {*binding_keys})
    if both:
        raise ConfigurationError(
            f"{name}: {both[0]!r} is both in binding_keys and in retired_keys; leave it out of one."
        )
    return keys


def check_handler(handler: Any, name: object) -> None:
    """Make sure that calling the handler with an event is what handles the event.

    :raises ConfigurationError: it cannot be called so, or the call would only make a coroutine
        or a generator, which nobody runs.
    """
    # Its name may be a mistake as well.
    what = f"{shown(name)[1:-1]}: the handler" if isinstance(name, str) else "The handler"
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
    while isinstance(called, functools.partial | staticmethod | classmethod):
        called = called.func if isinstance(called, functools.partial) else called.__func__
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


def _binding_keys(
    given: object, name: str, exchange_type: str, option: str = "binding_keys"
) -> tuple[str, ...]:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        hint = f"; give [{shown(given)}]" if isinstance(given, str) else ""
        right = "a list of binding keys, such as ['user.*'], or ['#'] for all events"
        raise refusal(given, f"{name}: {option}", right, hint)
    keys = tuple(given)
    if not keys:
        raise ConfigurationError(
            f"{name}: {option} is empty; give at least one, such as 'user.*', or '#' for all."
        )
    try:
        return tuple(topology.check_binding_key(key, exchange_type) for key in keys)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None


def _exceptions(given: object, option: str) -> tuple[type[BaseException], ...]:
    kinds = (
        tuple(given)
        if isinstance(given, Iterable) and not isinstance(given, str | type)
        else (given,)
    )
    for kind in kinds:
        # Also those of gevent and asyncio, but not what ends the process.
        right = isinstance(kind, type) and issubclass(kind, BaseException)
        if not right or issubclass(kind, SystemExit | KeyboardInterrupt):
            right_ones = "exception classes, such as (ConnectionError, TimeoutError)"
            hint = f"; give {type(kind).__name__}" if isinstance(kind, BaseException) else ""
            raise refusal(kind, option, right_ones, hint)
    return kinds


def _queue_type(given: object, option: str) -> QueueType:
    if given == "quorum":
        return "quorum"
    if given == "classic":
        return "classic"
    raise refusal(given, option, "'quorum' or 'classic'")
