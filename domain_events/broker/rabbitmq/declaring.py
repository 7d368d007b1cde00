"""Declares a topology on a channel, and says in words for a user what stands against it."""

from __future__ import annotations

from collections.abc import Callable

from pika.channel import Channel

from domain_events.broker.rabbitmq.nodes import close_code, explain
from domain_events.errors import ConfigurationError, DomainEventsError, TopologyError
from domain_events.topology import Binding, Exchange, Queue, Topology

_MISSING = 404


class Declaring:
    """One declaration after the other, on a channel of whoever calls; I/O thread only.

    An error closes the channel. Whoever owns it then asks `closed` what to do: a queue that is
    to be taken as it is found was looked for and is missing, so that it can be declared on the
    next channel; anything else is an error.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._next = 0
        self._missing: set[str] = set()

    def run(self, channel: Channel, done: Callable[[], None]) -> None:
        """Declare all on the channel, or the rest; then call ``done``."""

        def proceed(_frame: object = None) -> None:
            if self._next == len(self._topology):
                done()
                return
            declaration = self._topology[self._next]
            if isinstance(declaration, Exchange):
                channel.exchange_declare(
                    declaration.name,
                    declaration.type,
                    durable=True,
                    arguments=dict(declaration.arguments) or None,
                    callback=succeeded,
                )
            elif isinstance(declaration, Queue):
                looked_for = declaration.as_found and declaration.name not in self._missing
                channel.queue_declare(
                    declaration.name,
                    passive=looked_for,
                    durable=declaration.durable,
                    exclusive=declaration.exclusive,
                    auto_delete=declaration.auto_delete,
                    arguments=dict(declaration.arguments) or None,
                    callback=succeeded,
                )
            elif declaration.to_exchange:
                channel.exchange_bind(
                    declaration.destination,
                    declaration.exchange,
                    declaration.binding_key,
                    callback=succeeded,
                )
            else:
                channel.queue_bind(
                    declaration.destination,
                    declaration.exchange,
                    declaration.binding_key,
                    callback=succeeded,
                )

        def succeeded(_frame: object) -> None:
            self._next += 1
            proceed()

        proceed()

    def closed(self, reason: BaseException) -> DomainEventsError | None:
        """The channel was closed; None when the rest can be tried on another."""
        if self._next == len(self._topology):
            return TopologyError(f"The broker closed the channel: {explain(reason)}.")
        declaration = self._topology[self._next]
        if close_code(reason) == _MISSING and isinstance(declaration, Queue):
            self._missing.add(declaration.name)
            return None
        return refusal(declaration, reason)


def refusal(declaration: Exchange | Queue | Binding, reason: BaseException) -> DomainEventsError:
    """Why this could not be declared, what was asked for, and the ways out."""
    said = explain(reason)
    code = close_code(reason)
    what, asked = _described(declaration)
    if code == 403:
        return ConfigurationError(
            f"{what} may not be declared by this user: {said}. Give the user the permissions, or "
            "let another one that has them declare it first."
        )
    if code == 405:
        return TopologyError(
            f"{what} is taken: {said}. An exclusive queue belongs to one connection; let each "
            "process that wants one of its own register under a name of its own."
        )
    if code == 406 and isinstance(declaration, Queue):
        return TopologyError(
            f"{what} exists with other arguments than asked for: {said}. Asked for: {asked}. "
            "A queue's arguments cannot change. The ways out: register under another name; or, "
            "once it is empty, delete the queue and start again; or, when domain-event-broker "
            "has declared it, register with queue_type='classic' to use it as it is."
        )
    if code == 406 and isinstance(declaration, Exchange):
        return TopologyError(
            f"{what} exists otherwise than asked for: {said}. Asked for: {asked}. The ways out: "
            "use the type it has (exchange_type=...), or another exchange."
        )
    return TopologyError(f"{what} could not be declared: {said}.")


def _described(declaration: Exchange | Queue | Binding) -> tuple[str, str]:
    if isinstance(declaration, Exchange):
        asked = f"durable, type {declaration.type!r}, {dict(declaration.arguments)}"
        return f"The exchange {declaration.name!r}", asked
    if isinstance(declaration, Queue):
        flags = ("durable", "exclusive", "auto_delete")
        chosen = ", ".join(flag for flag in flags if getattr(declaration, flag))
        return f"The queue {declaration.name!r}", f"{chosen}, {dict(declaration.arguments)}"
    what = f"The binding of {declaration.destination!r} to the exchange {declaration.exchange!r}"
    return f"{what} by {declaration.binding_key!r}", ""
