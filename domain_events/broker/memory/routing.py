"""Exchanges and bindings of the embedded broker: which queues a message reaches. By names only."""

from __future__ import annotations

from dataclasses import dataclass, field

from domain_events import topology
from domain_events.broker.refusals import MISSING, REFUSED, Refused
from domain_events.topology import Binding, Exchange, Unbinding

_TYPES = ("topic", "direct", "fanout")

_ROUTES_REMEMBERED = 10_000


@dataclass(eq=False)
class _Bound:
    """An exchange and what is bound to it."""

    declaration: Exchange
    #: (destination, whether that is an exchange, binding key); a dict for its order.
    bindings: dict[tuple[str, bool, str], None] = field(default_factory=dict)


class Routing:
    """The exchanges. Queues are known by their names, from the bindings to them."""

    def __init__(self) -> None:
        self._exchanges: dict[str, _Bound] = {}
        self._routes: dict[tuple[str, str], tuple[str, ...]] = {}

    def __contains__(self, exchange: str) -> bool:
        return exchange in self._exchanges

    def declare(self, declaration: Exchange) -> None:
        """Make sure that there is this exchange.

        :raises Refused: there is one of its name with another type (or, if it is strict, other
            arguments), or none of its type.
        """
        existing = self._exchanges.get(declaration.name)
        if existing is None:
            if declaration.type not in _TYPES:
                raise Refused(503, f"the embedded broker knows the types {', '.join(_TYPES)} only")
            self._exchanges[declaration.name] = _Bound(declaration)
            self._routes.clear()
        elif existing.declaration.type != declaration.type:
            raise _different("type", existing.declaration, declaration)
        elif declaration.strict and existing.declaration.arguments != declaration.arguments:
            raise _different("arguments", existing.declaration, declaration)

    def bind(self, binding: Binding) -> None:
        """Bind; that the destination exists, if it is a queue, is for the caller to know.

        :raises Refused: an exchange is missing.
        """
        exchanges = [binding.exchange, *([binding.destination] if binding.to_exchange else [])]
        for name in exchanges:
            if name not in self._exchanges:
                raise Refused(MISSING, f"there is no {name!r}")
        key = (binding.destination, binding.to_exchange, binding.binding_key)
        self._exchanges[binding.exchange].bindings[key] = None
        self._routes.clear()

    def unbind(self, unbinding: Unbinding) -> None:
        """Remove the binding of a queue, if there is one.

        :raises Refused: the exchange is missing.
        """
        exchange = self._exchanges.get(unbinding.exchange)
        if exchange is None:
            raise Refused(MISSING, f"there is no {unbinding.exchange!r}")
        exchange.bindings.pop((unbinding.destination, False, unbinding.binding_key), None)
        self._routes.clear()

    def delete(self, exchange: str) -> None:
        """Delete the exchange, if there is one, and all bindings from and to it."""
        self._exchanges.pop(exchange, None)
        self._unbind(exchange, to_exchange=True)

    def unbind_queue(self, queue: str) -> None:
        """Delete all bindings to a queue."""
        self._unbind(queue, to_exchange=False)

    def _unbind(self, destination: str, *, to_exchange: bool) -> None:
        for exchange in self._exchanges.values():
            for binding in list(exchange.bindings):
                if binding[:2] == (destination, to_exchange):
                    del exchange.bindings[binding]
        self._routes.clear()

    def queues(self, exchange: str, routing_key: str) -> tuple[str, ...]:
        """The queues that a message reaches; each one once."""
        if not exchange:
            return (routing_key,)  # the default exchange: every queue is bound by its name
        found = self._routes.get((exchange, routing_key))
        if found is None:
            if len(self._routes) >= _ROUTES_REMEMBERED:
                self._routes.clear()
            found = self._routes[exchange, routing_key] = self._walk(exchange, routing_key)
        return found

    def _walk(self, start: str, routing_key: str) -> tuple[str, ...]:
        found: dict[str, None] = {}
        seen = {start}
        to_see = [start]
        while to_see:
            exchange = self._exchanges.get(to_see.pop())
            if exchange is None:
                continue  # an alternate exchange that was never declared
            following = []
            matched = False
            for destination, is_exchange, binding_key in exchange.bindings:
                if _matches(exchange.declaration.type, binding_key, routing_key):
                    matched = True
                    if is_exchange:
                        following.append(destination)
                    else:
                        found[destination] = None
            alternate = exchange.declaration.arguments.get("alternate-exchange")
            if not matched and isinstance(alternate, str):
                following.append(alternate)
            for each in following:
                if each not in seen:
                    seen.add(each)
                    to_see.append(each)
        return tuple(found)


def _different(what: str, exists: Exchange, asked: Exchange) -> Refused:
    has, wanted = getattr(exists, what), getattr(asked, what)
    return Refused(REFUSED, f"inequivalent arg {what!r}: it has {has!r}, not {wanted!r}")


def _matches(exchange_type: str, binding_key: str, routing_key: str) -> bool:
    if exchange_type == "fanout":
        return True
    if exchange_type == "direct":
        return binding_key == routing_key
    return topology.matches(binding_key, routing_key)
