"""Broken versions of the library, patched in at run time in the programs, never in the package.

The harness is useful only if it detects each of them. Each patches internals of the library: if one
of these names is gone, the mistake must be implemented again in the new code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from domain_events.broker.rabbitmq import consumer as consuming
from domain_events.broker.rabbitmq import publishing, topology
from domain_events.forwarding import Forwarder
from domain_events.handling import Subscription
from domain_events.names import matches
from domain_events.outcomes import Delivered, Outcome


@dataclass(frozen=True)
class Mistake:
    """A mistake, and the scenario that is certain to expose it."""

    about: str
    scenario: str
    seconds: float
    make: Callable[[], None]


class _Acked:
    """A consumer whose delivery has already been acked."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer

    def is_current(self, delivery: Any) -> bool:
        return bool(self._consumer.is_current(delivery))

    def settle(self, delivery: Any, how: Any = None) -> None:
        pass

    def flush(self) -> None:
        self._consumer.flush()

    def repair(self, seconds: float, then: Any, *, delays: bool = False) -> None:
        pass


def _patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace an existing attribute by the result of a function of it."""
    setattr(owner, name, make(getattr(owner, name)))


def _ack_first() -> None:
    def handle_acked(handle: Any) -> Any:
        def broken(self: Any, delivery: Any, consumer: Any) -> Any:
            consumer.settle(delivery)
            consumer.flush()
            return handle(self, delivery, _Acked(consumer))

        return broken

    _patch(Subscription, "handle", handle_acked)


def _retry_after_ack() -> None:
    def forward_acked(forward: Any) -> Any:
        def broken(self: Any, message: Any, delivery: Any, consumer: Any, **how: Any) -> None:
            consumer.settle(delivery)
            consumer.flush()
            forward(self, message, delivery, _Acked(consumer), **how)

        return broken

    _patch(Forwarder, "forward", forward_acked)


def _classic_delays() -> None:
    def classic(declaration: topology.Declaration) -> topology.Declaration:
        if not isinstance(declaration, topology.Queue) or not declaration.arguments:
            return declaration
        kept = ("x-message-ttl", "x-dead-letter-exchange")
        arguments = {
            name: declaration.arguments[name] for name in kept if name in declaration.arguments
        }
        return replace(declaration, arguments={"x-queue-type": "classic", **arguments})

    _patch(topology, "delays", lambda delays: lambda exchange: [*map(classic, delays(exchange))])


def _no_confirms() -> None:
    def pump_and_forget(pump: Any) -> Any:
        def broken(self: Any) -> None:
            pump(self)
            for sender in self._senders():
                for publication in list(sender.in_flight.values()):
                    self._finish(publication, None)

        return broken

    _patch(publishing.RabbitPublishing, "_pump", pump_and_forget)


def _stale_tags() -> None:
    def one_for_all(_method: Any) -> Any:
        return lambda self, delivery: True

    _patch(consuming.RabbitConsumer, "is_current", one_for_all)
    # A careful start holds one delivery, and would hide the mistake.
    never = property(lambda self: False, lambda self, value: None)
    consuming.RabbitConsumer._starts_carefully = never  # type: ignore[assignment]
    # All channels have the same number, so that a tag of an old one is accepted on the new one.
    consuming.Tags.epoch = property(lambda self: 1, lambda self, value: None)  # type: ignore[assignment]


def _unlisted_acked() -> None:
    def ack_unlisted(handle: Any) -> Any:
        def broken(self: Any, delivery: Any, consumer: Any) -> Any:
            key = delivery.original_routing_key
            if any(matches(each, key) for each in self.options.queue.binding_keys):
                return handle(self, delivery, consumer)
            if consumer.is_current(delivery):
                consumer.settle(delivery)
            return Delivered(self.options.name, None, Outcome.RETIRED)

        return broken

    _patch(Subscription, "handle", ack_unlisted)


MISTAKES = {
    "ack-first": Mistake(
        "a delivery is acked before its handler is called", "killed-subscribers", 12, _ack_first
    ),
    "retry-after-ack": Mistake(
        "a retry or dead letter is published after the ack of the original",
        "killed-in-an-alarm",
        20,
        _retry_after_ack,
    ),
    "classic-delays": Mistake(
        "retries wait in classic queues, which dead-letter without confirms",
        "waiting-retries",
        60,
        _classic_delays,
    ),
    "no-confirms": Mistake(
        "a publish returns as soon as it is sent", "cut-in-full-flight", 12, _no_confirms
    ),
    "stale-tags": Mistake(
        "tags of an old channel are acked on the new one",
        "closed-under-slow-handlers",
        20,
        _stale_tags,
    ),
    "unlisted-acked": Mistake(
        "an event whose key only another release lists is acked", "rolling", 20, _unlisted_acked
    ),
}


def make(name: str) -> None:
    """Make the mistake in this process."""
    MISTAKES[name].make()
