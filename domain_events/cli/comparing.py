"""What subscribers need on the broker, beside what is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from domain_events.broker.rabbitmq.administration import Administration, Comparison
from domain_events.broker.rabbitmq.topology import (
    LEVELS,
    Binding,
    Declaration,
    Exchange,
    Queue,
    Unbinding,
    due_name,
    is_shared,
    needed,
)
from domain_events.cli.management import BindingFound, Source, Unavailable
from domain_events.cli.registrations import Registration
from domain_events.errors import TopologyError
from domain_events.text import printable

OK, MISSING, STALE, DIFFERENT, UNKNOWN = "ok", "missing", "stale", "different", "unknown"

# The most consumers that are named.
_MOST_CONSUMERS = 5


@dataclass(frozen=True)
class Finding:
    """One thing on the broker, and how it compares with what the subscribers need."""

    status: str
    what: Declaration
    detail: str = ""

    @property
    def kind(self) -> str:
        return type(self.what).__name__.lower()

    @property
    def name(self) -> str:
        """Printable. A binding has that of its queue, and its key."""
        if isinstance(self.what, Exchange | Queue):
            return printable(self.what.name)
        name, key = printable(self.what.destination), printable(self.what.binding_key)
        if self.what.binding_key.startswith("*." * LEVELS):
            return f"{name}, for its retries, from {printable(self.what.exchange)}"
        return f"{name} by {key}"

    @property
    def shared(self) -> bool:
        """Whether it is one of those that the retries of all subscribers share."""
        return is_shared(self.what)

    def as_json(self) -> dict[str, Any]:
        if isinstance(self.what, Exchange | Queue):
            place = {"name": self.what.name}
        else:
            place = {
                "exchange": self.what.exchange,
                "destination": self.what.destination,
                "binding_key": self.what.binding_key,
            }
        return {
            "status": self.status,
            "kind": self.kind,
            **place,
            "shared": self.shared,
            "detail": self.detail or None,
        }


def wanted(registrations: Iterable[Registration]) -> list[Declaration]:
    """All that an operator can declare for them, each one once.

    The queue of a temporary subscriber is not: each of its processes declares one.
    """
    found: dict[str, Declaration] = {}
    for each in registrations:
        queue = replace(each.queue, must_exist=False)
        for declaration in needed(queue):
            own = getattr(declaration, "destination", getattr(declaration, "name", ""))
            if isinstance(declaration, Unbinding) or (queue.is_temporary and own == queue.name):
                continue
            found.setdefault(str(declaration), declaration)
    return list(found.values())


class Broker:
    """A broker, as far as it can be seen: over AMQP, and, where it is there, by a `Source`.

    :ivar bindings: None if they cannot be read.
    :ivar reasons: why not.
    """

    def __init__(
        self, administration: Administration, source: Source | None, reasons: str = ""
    ) -> None:
        self.administration = administration
        self.source = source
        self.reasons = reasons
        self.bindings: set[BindingFound] | None = None
        if source is not None:
            try:
                self.bindings = set(source.bindings())
            except Unavailable as error:
                self.reasons = str(error)

    def compare(self, declarations: Iterable[Declaration]) -> list[Finding]:
        """Each of them, in their order; those that exist as they should be as well."""
        return [self._compared(each) for each in declarations]

    def _compared(self, declaration: Declaration) -> Finding:
        if isinstance(declaration, Binding):
            if self.bindings is None:
                return Finding(UNKNOWN, declaration, self.reasons)
            return Finding(OK if _found(declaration) in self.bindings else MISSING, declaration)
        try:
            how, detail = self.administration.compare(declaration)
        except TopologyError as error:  # exclusive to a connection, for example
            return Finding(DIFFERENT, declaration, printable(error, 400))
        return Finding(_STATUS[how], declaration, printable(detail, 400))

    def stale(self, registrations: Sequence[Registration]) -> list[Finding]:
        """Keys by which their queues are bound, and that none of the registrations lists."""
        if self.bindings is None:
            return []
        needs: set[BindingFound] = set()
        retired: set[BindingFound] = set()
        ways_back: set[tuple[str, str]] = set()
        for each in registrations:
            exchange, name = each.queue.exchange.name, each.name
            needs |= {BindingFound(exchange, name, key) for key in each.queue.binding_keys}
            retired |= {BindingFound(exchange, name, key) for key in each.queue.retired_keys}
            # Kept without retries, too: events that a process does not list return by it.
            ways_back.add((due_name(exchange), name))
        queues = {each.name for each in registrations if not each.queue.is_temporary}
        stale = [
            each
            for each in self.bindings - needs
            if each.destination in queues
            and not each.to_exchange
            and (each.exchange, each.destination) not in ways_back
        ]
        stale.sort(key=lambda each: (each.destination, each.exchange, each.binding_key))
        return [
            Finding(
                STALE,
                Binding(each.exchange, each.destination, each.binding_key),
                f"{'retired' if each in retired else 'listed by none of these subscribers'}; "
                f"{self.consumers(each.destination)}",
            )
            for each in stale
        ]

    def consumers(self, queue: str) -> str:
        """Which consumers of the queue are connected, in words."""
        clients: list[str] = []
        if self.source is not None:
            try:
                clients = [c.client for c in self.source.consumers() if c.queue == queue]
            except Unavailable:
                clients = []
        state = self.administration.queue(queue)
        number = max(len(clients), state.consumers if state is not None else 0)
        if not number:
            return "no consumer is connected"
        known = sorted({printable(client) for client in clients if client})
        named = ", ".join(known[:_MOST_CONSUMERS])
        text = "1 consumer is connected" if number == 1 else f"{number} consumers are connected"
        return f"{text}: {named}" if named else text


_STATUS = {
    Comparison.SAME: OK,
    Comparison.MISSING: MISSING,
    Comparison.DIFFERENT: DIFFERENT,
    Comparison.UNKNOWN: UNKNOWN,
}


def _found(binding: Binding) -> BindingFound:
    return BindingFound(
        binding.exchange, binding.destination, binding.binding_key, binding.to_exchange
    )


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """One for each; those that all subscribers' retries share together, by status and kind."""
    rows: list[tuple[str, str, str, str]] = []
    shared: dict[tuple[str, str], list[Finding]] = {}
    unknown: list[Finding] = []
    for each in findings:
        if each.status == UNKNOWN and each.kind == "binding":
            unknown.append(each)
        elif each.shared:
            shared.setdefault((each.status, each.kind), []).append(each)
        else:
            rows.append((each.status, each.kind, each.name, each.detail))
    for (status, kind), group in shared.items():
        first = group[0]
        if len(group) == 1:
            rows.append((status, kind, first.name, first.detail))
        else:
            text = f"{len(group)} {kind}s of the delay levels"
            if kind != "binding":
                text += f", such as {first.name}"
            rows.append((status, kind, text, first.detail))
    if unknown:
        rows.append((UNKNOWN, "binding", f"all {len(unknown)}", unknown[0].detail))
    width = max((len(row[0]) for row in rows), default=0)
    for status, kind, name, detail in rows:
        text = f"{status:{width}}  {kind:8}  {name}"
        yield f"{text}: {detail}" if detail else text
