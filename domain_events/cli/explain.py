"""``domain-events explain``: who gets an event, by which binding key, and who nearly does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from domain_events import settings
from domain_events.cli import exits
from domain_events.cli.options import broker_option, json_option, management_option
from domain_events.cli.output import record, remark
from domain_events.names import fits, has_wildcards, oddity
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.text import printable

if TYPE_CHECKING:
    from domain_events.cli.management import Source
    from domain_events.cli.routing import Near, Route

_EXCHANGE = "domain-events"
_MOST_NEAR = 10
# Seconds to find out the broker's name.
_CLUSTER_TIMEOUT = 3.0


@dataclass(frozen=True)
class _Getter:
    """A queue that gets the event, in the code, on the broker, or in both.

    :ivar in_code: None if no registrations were read; ``on_broker`` if no bindings were.
    """

    route: Route
    keys: tuple[str, ...]
    in_code: bool | None
    on_broker: bool | None
    note: str = ""
    differs: bool = False


@click.command("explain")
@click.argument("routing_key", metavar="ROUTING-KEY")
@click.argument("targets", metavar="[package.module:subscriber ...]", nargs=-1)
@click.option(
    "--exchange",
    metavar="NAME",
    help=f"The exchange that it is published to. If left out: the subscribers', or {_EXCHANGE}.",
)
@broker_option
@management_option
@json_option
def command(
    routing_key: str,
    targets: tuple[str, ...],
    exchange: str | None,
    broker: ConnectionSettings,
    management: str | None,
    as_json: bool,
) -> int:
    """Explain who gets an event with this routing key, and who nearly does and why not.

    With subscribers: from the registrations in the code, without a broker. Without: from the
    bindings on the broker, which the management plugin or rabbitmqctl shows. With both, subscribers
    and --broker or --management: from both, compared.

    Ends with status 1 if nobody gets it, or if the code and the broker differ.
    """
    from domain_events.cli import registrations, routing  # noqa: PLC0415 - quick --help

    _check(routing_key)
    found = registrations.read(targets)
    code = [routing.route_of(each) for each in found.registrations] if targets else None
    exchange = exchange or _exchange_of(code or [])
    live = None
    if code is None or broker is not DEFAULT or management is not None:
        live = _bound(found.broker(broker), management, exchange)
    getters, near = _explained(code, live, routing_key, exchange)
    lines = (
        _as_json(getters, near)
        if as_json
        else _as_text(getters, near, routing_key, exchange, live is not None and code is not None)
    )
    for line in lines:
        if isinstance(line, str):
            click.echo(line)
        else:
            record({"routing_key": routing_key, "exchange": exchange, **line})
    gets = any(getter.on_broker is not False for getter in getters)
    differs = any(getter.differs for getter in getters)
    return exits.OK if gets and not differs else exits.FOUND


def _check(routing_key: str) -> None:
    if has_wildcards(routing_key):
        raise click.UsageError(
            f"{routing_key!r} is a binding key; give the routing key of an event, which has no "
            "wildcards, such as user.registered."
        )
    if not routing_key or not fits(routing_key):
        raise click.UsageError("The routing key must have 1 to 255 bytes of UTF-8.")
    if why := oddity(routing_key):
        remark(f"Note: the routing key '{printable(routing_key)}' {why}.")


def _exchange_of(routes: Sequence[Route]) -> str:
    exchanges = {route.exchange for route in routes} or {_EXCHANGE}
    if len(exchanges) > 1 and _EXCHANGE not in exchanges:
        raise click.UsageError(
            f"The subscribers are on several exchanges ({', '.join(sorted(exchanges))}); name the "
            "one that the event is published to: --exchange."
        )
    return exchanges.pop() if len(exchanges) == 1 else _EXCHANGE


def _bound(broker: ConnectionSettings, management: str | None, exchange: str) -> list[Route]:
    """The routes on the broker.

    :raises ConfigurationError: its bindings cannot be read.
    """
    from domain_events.cli.management import Unavailable, find  # noqa: PLC0415
    from domain_events.errors import ConfigurationError  # noqa: PLC0415

    urls = settings.resolve(broker)
    if urls is None or not urls[0].lower().startswith("amqp"):
        raise ConfigurationError("Only a RabbitMQ has bindings to read: give its URL, amqp://.")
    source, reasons = find(management, urls, _cluster(urls))
    try:
        if source is not None:
            return _routes(source, exchange)
    except Unavailable as error:
        reasons = str(error)
    raise ConfigurationError(
        f"The broker's bindings cannot be read: {reasons}. Give the management plugin's URL "
        "(--management), or name subscribers to explain it from their code: domain-events explain "
        "ROUTING-KEY package.module:subscriber, without --broker."
    )


def _cluster(urls: Sequence[str]) -> str:
    """The broker's own name; empty if AMQP has no answer, which is not needed for anything else."""
    from domain_events.broker.rabbitmq.administration import Administration  # noqa: PLC0415
    from domain_events.errors import DomainEventsError  # noqa: PLC0415

    try:
        with Administration(urls, timeout=_CLUSTER_TIMEOUT) as administration:
            return administration.cluster
    except DomainEventsError:
        return ""


def _routes(source: Source, exchange: str) -> list[Route]:
    from domain_events.cli.routing import Route  # noqa: PLC0415

    kinds = {each["name"]: str(each["type"]) for each in source.exchanges()}
    if exchange not in kinds:
        remark(f"Note: there is no exchange {printable(exchange)} on the broker.")
    kind = kinds.get(exchange, "topic")
    keys: dict[str, list[str]] = {}
    for binding in source.bindings():
        if binding.exchange == exchange:
            name = binding.destination
            name = f"{name} (an exchange)" if binding.to_exchange else name
            keys.setdefault(name, []).append(binding.binding_key)
    temporary = {each["name"] for each in source.queues() if _is_temporary(each)}
    return [
        Route(name, exchange, kind, tuple(sorted(bound)), temporary=name in temporary)
        for name, bound in sorted(keys.items())
    ]


def _is_temporary(queue: dict[str, Any]) -> bool:
    arguments = queue.get("arguments") or {}
    return bool(queue.get("exclusive") or queue.get("auto_delete") or "x-expires" in arguments)


def _explained(
    code: list[Route] | None, live: list[Route] | None, routing_key: str, exchange: str
) -> tuple[list[_Getter], list[Near]]:
    from domain_events.cli.routing import matching, nearest, sorted_near  # noqa: PLC0415

    bound = {route.name: route for route in live or []}
    getters: list[_Getter] = []
    near: list[Near] = []
    for route in code or []:
        here = matching(route, routing_key) if route.exchange == exchange else ()
        on_broker = bound.pop(route.name, None)
        there = (matching(on_broker, routing_key) or ()) if on_broker is not None else ()
        if here is None:
            note = f"a {printable(route.exchange_type)} exchange does not go by routing keys alone"
            getters.append(_Getter(route, (), None, None, note))
        elif here or there:
            getters.append(_getter(route, here, there, live is not None, routing_key))
        elif found := nearest(route, routing_key, exchange):
            near.append(found)
    for route in bound.values():
        if found_there := matching(route, routing_key):
            in_code, note = (None, "") if code is None else (False, "not one of these subscribers")
            getters.append(_Getter(route, found_there, in_code, True, note))
        elif found := nearest(route, routing_key, exchange):
            near.append(found)
    return getters, sorted_near(near)


def _getter(
    route: Route, here: tuple[str, ...], there: tuple[str, ...], compared: bool, routing_key: str
) -> _Getter:
    from domain_events.names import matches  # noqa: PLC0415

    note = ""
    if not compared:
        return _Getter(route, here, True, None)
    if not there:
        if route.temporary:
            return _Getter(route, here, True, False, "it does not run")
        note = "not bound on the broker: domain-events topology apply, or start its process"
    elif not here and any(matches(key, routing_key) for key in route.retired_keys):
        note = "bound, but retired: it acks the event unhandled"
    elif not here:
        note = "bound, but not listed in the code: the event becomes a dead letter in 15 minutes"
    return _Getter(route, here or there, bool(here), bool(there), note, differs=bool(note))


def _as_json(getters: Sequence[_Getter], near: Sequence[Near]) -> Iterator[dict[str, Any]]:
    for each in getters:
        yield {
            "subscriber": each.route.name,
            "gets": each.on_broker is not False,
            "binding_keys": list(each.keys),
            "in_code": each.in_code,
            "on_broker": each.on_broker,
            "temporary": each.route.temporary,
            "handler": each.route.handler,
            "note": each.note or None,
        }
    for other in near:
        yield {
            "subscriber": other.route.name,
            "gets": False,
            "nearly": other.key,
            "reason": other.reason,
            "handler": other.route.handler,
        }


def _as_text(
    getters: Sequence[_Getter],
    near: Sequence[Near],
    routing_key: str,
    exchange: str,
    compared: bool,
) -> Iterator[str]:
    number = sum(getter.on_broker is not False for getter in getters)
    who = "1 subscriber gets" if number == 1 else f"{number or 'No'} subscribers get"
    where = f", as bound on the broker ({len(getters)} in all)" if compared and getters else ""
    yield f"{who} {printable(routing_key)} from the exchange {printable(exchange)}{where}."
    if getters:
        yield ""
        yield from _columns([_row(each) for each in getters])
    if near:
        yield ""
        yield "Nearly:"
        yield ""
        rows = [
            (printable(each.route.name), printable(each.key), each.reason)
            for each in near[:_MOST_NEAR]
        ]
        yield from _columns(rows)
        if len(near) > _MOST_NEAR:
            yield f"  and {len(near) - _MOST_NEAR} more; --json prints all of them"


def _row(getter: _Getter) -> tuple[str, ...]:
    route = getter.route
    notes = [printable(route.handler)] if route.handler else []
    if route.temporary:
        notes.append("a temporary queue, so only while it runs")
    if getter.note:
        notes.append(getter.note)
    keys = ", ".join(map(printable, getter.keys)) or "?"
    return printable(route.name), keys, "; ".join(notes)


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [min(40, max(map(len, column))) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        yield f"  {'  '.join(cells)}".rstrip()
