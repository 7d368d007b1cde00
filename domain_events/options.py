"""The options of `Subscriber.register`, checked. Pure."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from domain_events.broker import Exchange, Queue
from domain_events.checks import flag, refusal, seconds, shown, whole_number
from domain_events.errors import ConfigurationError
from domain_events.names import check_binding_key, check_name, matches
from domain_events.payloads import signature
from domain_events.retry import Backoff

_MOST_RETRIES = 2**31 - 1
_MOST_PREFETCHED = 65_535  # AMQP's own limit

QueueType = Literal["quorum", "classic"]


class RegisterOptions(TypedDict, total=False):
    """The options of `Subscriber.register` that `Subscriber.on` accepts."""

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
    payload: Any
    upcast: Mapping[int, Callable[[Any], Any]] | None
    handler_limit: float | None


# The default of prefetch_count, and the least for each worker.
_PREFETCH_COUNT = 200
_FOR_EACH_WORKER = 4


@dataclass(frozen=True)
class Options:
    """A subscriber's options; `Subscriber.register` documents each."""

    queue: Queue
    max_retries: int
    retry_on: tuple[type[BaseException], ...]
    backoff: Backoff
    prefetch_count: int | None
    ordered: bool
    #: Seconds after which a handler that still runs is considered hung.
    handler_limit: float | None = None

    @property
    def name(self) -> str:
        """The subscriber's name."""
        return self.queue.name

    def prefetch(self, workers: int) -> int:
        """The most deliveries that a process with so many workers holds."""
        if self.prefetch_count is not None:
            return self.prefetch_count
        return max(_PREFETCH_COUNT, _FOR_EACH_WORKER * workers)

    def lists(self, routing_key: str) -> bool:
        """Whether events with this routing key match one of the binding keys."""
        # A fanout exchange ignores the keys, and exchanges of plugins interpret them as they like.
        used = self.queue.exchange.type in ("topic", "direct")
        return not used or self._match(self.queue.binding_keys, routing_key)

    def has_retired(self, routing_key: str) -> bool:
        """Whether events with this routing key match one of the retired keys."""
        return self._match(self.queue.retired_keys, routing_key)

    def _match(self, keys: tuple[str, ...], routing_key: str) -> bool:
        # The plain lookup first: there may be a thousand binding keys.
        topic = self.queue.exchange.type == "topic"
        return routing_key in keys or (topic and any(matches(key, routing_key) for key in keys))


def make_options(
    name: object,
    binding_keys: object,
    dead_letter: bool | None,
    retry_on: type[BaseException] | Sequence[type[BaseException]],
    backoff: Backoff | None,
    retired_keys: Sequence[str] = (),
    *,
    exchange: Exchange,
    durable: bool,
    exclusive: bool,
    auto_delete: bool,
    max_retries: int,
    queue_type: str,
    prefetch_count: int | None,
    ordered: bool,
    handler_limit: float | None = None,
    declare: bool = True,
) -> Options:
    """The options as a user gives them, checked and with their defaults.

    :raises ConfigurationError: when they cannot work, or clash.
    """
    if not isinstance(name, str) and isinstance(binding_keys, str):
        raise ConfigurationError(
            f"name is {shown(name)} and binding_keys is {shown(binding_keys)}: they are swapped; "
            "it is register(handler, name, binding_keys)."
        )
    name = check_name(name, "subscriber", exchange.name)
    durable = flag(durable, f"{name}: durable")
    exclusive = flag(exclusive, f"{name}: exclusive")
    auto_delete = flag(auto_delete, f"{name}: auto_delete")
    temporary = exclusive or auto_delete or not durable
    if temporary and not declare:
        raise ConfigurationError(
            f"{name}: each process declares its temporary queue, which Subscriber(declare=False) "
            "does not do; make it durable, or register it with another Subscriber."
        )
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
    keys = _binding_keys(binding_keys, name, exchange.type)
    return Options(
        Queue(
            name,
            exchange,
            keys,
            _retired_keys(retired_keys, name, exchange.type, keys),
            dead_letters=(
                not temporary if dead_letter is None else flag(dead_letter, f"{name}: dead_letter")
            ),
            delays=max_retries > 0,
            durable=durable,
            exclusive=exclusive,
            auto_delete=auto_delete,
            classic=_queue_type(queue_type, f"{name}: queue_type") == "classic",
            must_exist=not declare,
        ),
        max_retries,
        kinds,
        backoff or Backoff(),
        prefetch_count,
        flag(ordered, f"{name}: ordered"),
        None if handler_limit is None else seconds(handler_limit, f"{name}: handler_limit"),
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
    """Check that a call of the handler with an event handles the event.

    :raises ConfigurationError: it cannot be called so, or the call would only return a coroutine
        or a generator.
    """
    # The name may be wrong as well.
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
    for each in (called, getattr(called, "__call__", None)):  # noqa: B004 - it is inspected
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
        signature(handler).bind(object())
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
        return tuple(check_binding_key(key, exchange_type) for key in keys)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None


def _exceptions(given: object, option: str) -> tuple[type[BaseException], ...]:
    kinds = (
        tuple(given)
        if isinstance(given, Iterable) and not isinstance(given, str | type)
        else (given,)
    )
    for kind in kinds:
        # Including those of gevent and asyncio, but not those that end the process.
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
