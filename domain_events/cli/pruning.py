"""Unbinds keys and deletes queues that an operator has named, without losing an event."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from domain_events.broker.rabbitmq.topology import LEVELS, Binding, dead_letter_name
from domain_events.cli.comparing import Broker
from domain_events.errors import ConfigurationError, TopologyError
from domain_events.text import printable

# Seconds between the two looks at a queue that must be empty: what was routed to it before it was
# unbound may be on its way.
_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Plan:
    """What is to be done, in this order; made by `plan`.

    :ivar unbind: the bindings to remove, each with what is known of its queue's consumers.
    :ivar retire: the queues to delete once they are empty: subscribers, with their dead letters.
    """

    unbind: list[tuple[Binding, str]] = field(default_factory=list)
    retire: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        for binding, known in self.unbind:
            yield f"unbind  {_named(binding)}: {known}"
        for queue in self.retire:
            yield f"delete  {printable(queue)}, if it is empty"


def plan(broker: Broker, unbind: Iterable[Binding], retire: Iterable[str]) -> Plan:
    """What to do.

    :param retire: the names of subscribers.
    :raises TopologyError: a queue to delete has consumers, or messages.
    :raises ConfigurationError: its bindings are unknown, so that it cannot be unbound.
    """
    names = list(dict.fromkeys(retire))
    unbindings = dict.fromkeys(unbind)
    queues: list[str] = []
    for name in names:
        found = [each for each in (name, dead_letter_name(name)) if _check(broker, each)]
        for queue in found:
            unbindings.update(dict.fromkeys(_bindings(broker, queue, unbindings)))
        queues += found
    known = {each.destination: broker.consumers(each.destination) for each in unbindings}
    return Plan([(each, known[each.destination]) for each in unbindings], queues)


def carry_out(broker: Broker, planned: Plan) -> Iterator[str]:
    """Do it, step by step; yields a line for each step that is done.

    Interrupted at any point, it can be planned and carried out again.

    :raises TopologyError: a queue is not empty any more; it is left, and so are those after it.
    """
    administration = broker.administration
    for binding, _ in planned.unbind:
        administration.unbind(binding.destination, binding.exchange, binding.binding_key)
        yield f"unbound  {_named(binding)}"
    if not planned.retire:
        return
    for queue in planned.retire:
        _check(broker, queue)
    time.sleep(_BETWEEN_LOOKS)
    for queue in planned.retire:
        if _check(broker, queue):
            administration.delete_queue(queue)
            yield f"deleted  {printable(queue)}"


def _check(broker: Broker, queue: str) -> bool:
    """Whether there is such a queue.

    :raises TopologyError: it has consumers, or messages.
    """
    state = broker.administration.queue(queue)
    if state is None:
        return False
    name = printable(queue)
    if state.consumers:
        raise TopologyError(
            f"The queue {name!r} is in use: {broker.consumers(queue)}. Stop these processes first."
        )
    if state.messages:
        named = shlex.quote(name.removesuffix("-dl"))
        how = (
            f"replay or discard them first: domain-events dead-letters list {named}"
            if name.endswith("-dl")
            else f"unbind its keys (domain-events topology prune --unbind {named}=KEY), let its "
            "subscriber handle what is there, stop it, and try again"
        )
        raise TopologyError(f"The queue {name!r} has {_messages(state.messages)}; {how}.")
    return True


def _bindings(broker: Broker, queue: str, given: Iterable[Binding]) -> list[Binding]:
    """All bindings of a queue that is to be deleted."""
    if broker.bindings is not None:
        found = [
            Binding(each.exchange, queue, each.binding_key)
            for each in broker.bindings
            if each.destination == queue and not each.to_exchange
        ]
        return sorted(found, key=lambda each: (each.exchange, each.binding_key))
    if queue.endswith("-dl") or any(each.destination == queue for each in given):
        return []  # of a subscriber's own queue, the user has named them
    raise ConfigurationError(
        f"The bindings of {printable(queue)!r} cannot be read ({broker.reasons}), and a queue that "
        "is still bound would get events while it is deleted. Give the management plugin's URL "
        f"(--management), or name all of its keys: --unbind {printable(queue)}=KEY."
    )


def _named(binding: Binding) -> str:
    if binding.binding_key.startswith("*." * LEVELS):
        key = "for its retries"
    else:
        key = f"by {printable(binding.binding_key)}"
    return f"{printable(binding.destination)} from {printable(binding.exchange)} {key}"


def _messages(number: int) -> str:
    return "1 message" if number == 1 else f"{number:,} messages"
