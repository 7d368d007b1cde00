"""Who gets what, as text and as JSON. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from domain_events.broker import Queue
from domain_events.broker.rabbitmq.topology import dead_letter_name, undelivered_name
from domain_events.cli.registrations import Registration
from domain_events.retry import Backoff
from domain_events.text import printable

_WIDTH = 96
_LABEL = 14


def as_json(each: Registration) -> dict[str, Any]:
    """One registration, with each of its options."""
    options, queue = each.options, each.queue
    backoff = options.backoff
    return {
        "subscriber": each.name,
        "target": each.target,
        "exchange": queue.exchange.name,
        "exchange_type": queue.exchange.type,
        "binding_keys": list(queue.binding_keys),
        "retired_keys": list(queue.retired_keys),
        "queue": kind_of(queue),
        "handler": each.handler,
        "payload": each.payload,
        "max_retries": options.max_retries,
        "retry_on": [kind.__name__ for kind in options.retry_on],
        "backoff": vars(backoff).copy() if options.retry_on else None,
        "dead_letters": dead_letter_name(each.name) if queue.dead_letters else None,
        "prefetch_count": options.prefetch(each.workers),
        "workers": each.workers,
        "ordered": each.options.ordered,
        "handler_limit": options.handler_limit,
        "declares": not queue.must_exist,
    }


def as_text(registrations: Sequence[Registration]) -> Iterator[str]:
    """Lines: exchanges, below each one its subscribers."""
    several = len({each.target for each in registrations}) > 1
    for number, (exchange, group) in enumerate(by_exchange(registrations)):
        if number:
            yield ""
        yield f"{printable(exchange.name)}  {exchange.type} exchange"
        for each in group:
            yield ""
            of = f", of {printable(each.target)}" if several else ""
            yield f"  {printable(each.name)}  {kind_of(each.queue)}{of}"
            for label, text in details(each):
                yield from _entry(label, text)
        if any(each.queue.delays for each in group):
            yield ""
            name = printable(undelivered_name(exchange.name))
            yield f"  Retries whose queue is gone are kept in {name}."


def by_exchange(registrations: Iterable[Registration]) -> list[tuple[Any, list[Registration]]]:
    """The exchanges, each with its registrations, in the order given."""
    groups: dict[Any, list[Registration]] = {}
    for each in registrations:
        groups.setdefault(each.queue.exchange, []).append(each)
    return list(groups.items())


def details(each: Registration) -> Iterator[tuple[str, str]]:
    """What there is to know about a registration: a label and a text each."""
    options, queue = each.options, each.queue
    yield "events", keys(queue.binding_keys)
    if queue.retired_keys:
        yield "retired keys", keys(queue.retired_keys)
    yield "handler", printable(each.handler)
    if each.payload is not None:
        yield "payload", each.payload
    yield "retries", retries(each)
    yield "dead letters", printable(dead_letter_name(each.name)) if queue.dead_letters else "none"
    yield "prefetch", f"{options.prefetch(each.workers)}, workers: {each.workers}"
    if options.ordered:
        yield "ordered", "by domain_object_id"
    if options.handler_limit is not None:
        yield "limit", f"{duration(options.handler_limit)} for the handler"
    if queue.must_exist:
        yield "declared", "by an operator (declare=False)"


def kind_of(queue: Queue) -> str:
    """The queue, in a word or two."""
    if queue.exclusive:
        return "exclusive queue"
    if queue.is_temporary:
        return "temporary queue"
    return "classic queue" if queue.classic else "quorum queue"


def retries(each: Registration) -> str:
    """How often, on what, and after which delays."""
    options = each.options
    if not options.max_retries:
        return "none"
    if not options.retry_on:
        return f"up to {options.max_retries}, when the handler raises Retry"
    kinds = ", ".join(printable(kind.__name__) for kind in options.retry_on)
    return f"up to {options.max_retries}, on {kinds} after {delays(options.backoff)}, or on Retry"


def delays(backoff: Backoff) -> str:
    """The first delays, without their jitter."""
    longest = backoff.maximum
    first = [min(longest, backoff.first * backoff.factor**n) for n in range(3)]
    if first[0] == first[-1]:
        return duration(first[0])
    text = ", ".join(map(duration, dict.fromkeys(first)))
    return text if first[-1] == longest else f"{text} and so on, at most {duration(longest)}"


def duration(seconds: float) -> str:
    """In the largest unit that shows it as it is."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def keys(binding_keys: Iterable[str]) -> str:
    return ", ".join(map(printable, binding_keys))


def _entry(label: str, text: str) -> Iterator[str]:
    indent = "    " + " " * _LABEL
    lines = textwrap.wrap(
        text, _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False
    ) or [""]
    yield f"    {label:{_LABEL}}{lines[0]}"
    for line in lines[1:]:
        yield indent + line
