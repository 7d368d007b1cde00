"""How a subscriber wants its events: what `Subscriber.register` is given, checked. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from domain_events import topology
from domain_events.errors import ConfigurationError
from domain_events.retry import Backoff
from domain_events.topology import Declaration

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
    retry_on: tuple[type[Exception], ...]
    backoff: Backoff
    queue_type: Literal["quorum", "classic"]
    prefetch_count: int | None
    ordered: bool
    retired_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        topology.check_name(self.name, "subscriber")
        if not self.binding_keys:
            raise ConfigurationError(
                f"{self.name} needs at least one binding key, such as 'user.*'."
            )
        for key in (*self.binding_keys, *self.retired_keys):
            if not topology.fits(key):
                raise ConfigurationError(f"{self.name}: {key!r:.80} is no binding key.")
        if self.queue_type not in ("quorum", "classic"):
            raise ConfigurationError(f"{self.name}: queue_type is 'quorum' or 'classic'.")
        _at_least(self.name, "max_retries", self.max_retries, 0)
        if self.prefetch_count is not None:
            _at_least(self.name, "prefetch_count", self.prefetch_count, 1)
        if self.retry_on and not self.max_retries:
            raise ConfigurationError(
                f"{self.name}: retry_on has no effect without max_retries, which is 0."
            )

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
    name: str,
    binding_keys: Sequence[str],
    dead_letter: bool | None,
    retry_on: type[Exception] | Sequence[type[Exception]],
    backoff: Backoff | None,
    retired_keys: Sequence[str],
    **others: Any,
) -> Options:
    """The options as a user gives them, checked and with their defaults.

    :raises ConfigurationError: when they cannot work, or clash.
    """
    if isinstance(binding_keys, str):
        raise ConfigurationError(
            f"{name}: binding_keys is a list of them: [{binding_keys!r}], not {binding_keys!r}."
        )
    if isinstance(retired_keys, str):
        raise ConfigurationError(
            f"{name}: retired_keys is a list of them: [{retired_keys!r}], not {retired_keys!r}."
        )
    both = sorted({*binding_keys} & {*retired_keys})
    if both:
        raise ConfigurationError(
            f"{name}: {both[0]!r} is both in binding_keys and in retired_keys; leave it out of one."
        )
    kinds = (retry_on,) if isinstance(retry_on, type) else tuple(retry_on)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
        raise ConfigurationError(f"{name}: retry_on is a list of exception classes.")
    temporary = others["exclusive"] or others["auto_delete"] or not others["durable"]
    return Options(
        name=name,
        binding_keys=tuple(binding_keys),
        dead_letter=not temporary if dead_letter is None else dead_letter,
        retry_on=kinds,
        backoff=backoff or Backoff(),
        retired_keys=tuple(retired_keys),
        **others,
    )


def _matches_any(binding_keys: tuple[str, ...], routing_key: str) -> bool:
    # The plain look first: there may be a thousand binding keys.
    return routing_key in binding_keys or any(
        topology.matches(key, routing_key) for key in binding_keys
    )


def _at_least(name: str, option: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}: {option} is a number from {least} up, not {value!r}.")
