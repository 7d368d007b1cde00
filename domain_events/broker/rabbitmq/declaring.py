"""Declares a topology on a channel."""

from __future__ import annotations

from collections.abc import Callable

from pika.channel import Channel

from domain_events.broker.rabbitmq.nodes import close_code, explain
from domain_events.broker.refusals import (
    FORBIDDEN,
    MISSING,
    may_be_used,
    undeclarable,
    unreadable_by_this_user,
)
from domain_events.errors import DomainEventsError, TopologyError
from domain_events.topology import Declaration, Exchange, Queue, Topology, Unbinding


class Declaring:
    """One declaration after the other, on a channel of whoever calls; I/O thread only.

    An error closes the channel. Whoever owns it then asks `closed` what to do: a queue that is
    to be taken as it is found was looked for and is missing, so that it can be declared on the
    next channel; an exchange exists that will do as it is; anything else is an error.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._next = 0
        self._missing: set[str] = set()

    def run(
        self, channel: Channel, answered: Callable[[int], None], done: Callable[[], None]
    ) -> None:
        """Declare all on the channel, or the rest; then call ``done``.

        :param answered: called after each declaration, with how many there have been.
        """

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
                channel.queue_declare(
                    declaration.name,
                    passive=self._looks_for(declaration),
                    durable=declaration.durable,
                    exclusive=declaration.exclusive,
                    auto_delete=declaration.auto_delete,
                    arguments=dict(declaration.arguments) or None,
                    callback=succeeded,
                )
            elif isinstance(declaration, Unbinding):
                # To unbind what is not bound is not an error.
                channel.queue_unbind(
                    declaration.destination,
                    declaration.exchange,
                    declaration.binding_key,
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
            answered(self._next)
            proceed()

        proceed()

    @property
    def current(self) -> Declaration | None:
        """What is being declared; None when all is."""
        return self._topology[self._next] if self._next < len(self._topology) else None

    def _looks_for(self, queue: Queue) -> bool:
        return queue.as_found and queue.name not in self._missing

    def closed(self, reason: BaseException) -> DomainEventsError | None:
        """The channel was closed; None when the rest can be tried on another."""
        declaration = self.current
        if declaration is None:
            if close_code(reason) == FORBIDDEN:
                return unreadable_by_this_user(explain(reason))
            return TopologyError(f"The broker closed the channel: {explain(reason)}.")
        code, said = close_code(reason), explain(reason)
        if isinstance(declaration, Exchange) and may_be_used(declaration, code, said):
            self._next += 1
            return None
        # Else it was declared, not looked for: its node is down, for example.
        if code == MISSING and isinstance(declaration, Queue) and self._looks_for(declaration):
            self._missing.add(declaration.name)
            return None
        return undeclarable(declaration, code, said)
