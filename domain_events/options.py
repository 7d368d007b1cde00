"""How a subscriber wants its events: what `Subscriber.register` is given, checked. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from domain_events import topology
from domain_events.broker import Prefetch
from domain_events.errors import ConfigurationError
from domain_events.retry import Backoff

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
    queue_type: Literal["quorum", "classic"]
    prefetch_count: int | None
    ordered: bool

    def __post_init__(self) -> None:
        topology.check_name(self.name, "subscriber")
        if not self.binding_keys:
            raise ConfigurationError(
                f"{self.name} needs at least one binding key, such as 'user.*'."
            )
        for key in self.binding_keys:
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
    name: str,
    binding_keys: Sequence[str],
    dead_letter: bool | None,
    retry_on: type[Exception] | Sequence[type[Exception]],
    backoff: Backoff | None,
    **others: Any,
) -> Options:
    """The options as a user gives them, checked and with their defaults.

    :raises ConfigurationError: when they cannot work, or clash.
    """
    if isinstance(binding_keys, str):
        raise ConfigurationError(
            f"{name}: binding_keys is a list of them: [{binding_keys!r}], not {binding_keys!r}."
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
        **others,
    )


def _at_least(name: str, option: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}: {option} is a number from {least} up, not {value!r}.")
