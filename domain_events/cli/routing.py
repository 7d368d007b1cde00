"""Which subscribers get an event, by which binding key, and why others nearly do. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from domain_events.cli.registrations import Registration
from domain_events.names import matches
from domain_events.text import printable

# Two words that differ in so many letters may be one with a typo.
_MOST_TYPOS = 2


@dataclass(frozen=True)
class Route:
    """The ways from an exchange to one queue.

    :ivar handler: where it is defined; None for a queue that was only seen on the broker.
    """

    name: str
    exchange: str
    exchange_type: str
    keys: tuple[str, ...]
    retired_keys: tuple[str, ...] = ()
    handler: str | None = None
    temporary: bool = False


@dataclass(frozen=True)
class Near:
    """A binding key that does not match, but nearly: the lower the rank, the nearer."""

    route: Route
    key: str
    reason: str
    rank: int


def route_of(registration: Registration) -> Route:
    queue = registration.queue
    return Route(
        queue.name,
        queue.exchange.name,
        queue.exchange.type,
        queue.binding_keys,
        queue.retired_keys,
        registration.handler,
        queue.is_temporary,
    )


def matching(route: Route, routing_key: str) -> tuple[str, ...] | None:
    """Its keys that match; None where the exchange does not go by keys alone."""
    if route.exchange_type == "fanout":
        return route.keys
    if route.exchange_type == "direct":
        return tuple(key for key in route.keys if key == routing_key)
    if route.exchange_type == "topic":
        return tuple(key for key in route.keys if matches(key, routing_key))
    return None


def nearest(route: Route, routing_key: str, exchange: str) -> Near | None:
    """Its key that is nearest to matching, and why it does not."""
    for key in route.retired_keys:
        if matches(key, routing_key):
            return Near(route, key, "retired: its events are acked unhandled", 0)
    if route.exchange != exchange:
        found = matching(route, routing_key)
        if not found:
            return None
        name = printable(route.exchange)
        return Near(route, found[0], f"bound to another exchange, {name}", 1)
    if route.exchange_type not in ("topic", "direct"):
        return None
    near: list[Near] = []
    for key in dict.fromkeys(route.keys):
        for rank, why in enumerate(_REASONS, 2):
            if reason := why(route, key, routing_key):
                near.append(Near(route, key, reason, rank))
                break
    return min(near, key=lambda each: each.rank, default=None)


def _case(_route: Route, key: str, routing_key: str) -> str:
    differs = matches(key.casefold(), routing_key.casefold())
    return "upper and lower case differ" if differs else ""


def _direct(route: Route, key: str, routing_key: str) -> str:
    if route.exchange_type == "direct" and matches(key, routing_key):
        return "on a direct exchange '*' and '#' are not wildcards"
    return ""


def _separator(_route: Route, key: str, routing_key: str) -> str:
    one, other = (re.sub(r"[\s_\-/:]", ".", text.strip(" .")) for text in (key, routing_key))
    return "dots and other separators differ" if matches(one, other) else ""


def _one_word(_route: Route, key: str, routing_key: str) -> str:
    words = key.split(".")
    if "*" not in words:
        return ""
    if not matches(".".join("#" if word == "*" else word for word in words), routing_key):
        return ""
    number = len(routing_key.split("."))
    plural = "word" if number == 1 else "words"
    return f"'*' stands for exactly one word; this routing key has {number} {plural}"


def _typo(_route: Route, key: str, routing_key: str) -> str:
    word, other = _different_word(key, routing_key)
    most = min(_MOST_TYPOS, (min(len(word), len(other)) + 1) // 3)
    if word and distance(word, other, most) <= most:
        return f"perhaps a typo: {printable(word)!r} is not {printable(other)!r}"
    return ""


def _another_word(_route: Route, key: str, routing_key: str) -> str:
    word, other = _different_word(key, routing_key)
    if word and "." in key:
        return f"one word differs: {printable(word)!r} is not {printable(other)!r}"
    return ""


def _length(_route: Route, key: str, routing_key: str) -> str:
    words, others = key.split("."), routing_key.split(".")
    shorter = min(len(words), len(others))
    if "#" in words or abs(len(words) - len(others)) != 1:
        return ""
    if not matches(".".join(words[:shorter]), ".".join(others[:shorter])):
        return ""
    if len(words) > len(others):
        return f"the binding key has one word more: {printable(words[-1])!r}"
    return f"the routing key has one word more: {printable(others[-1])!r}"


#: From the nearest; each returns why the key does not match, or an empty text.
_REASONS: Sequence[Callable[[Route, str, str], str]] = (
    _direct,
    _case,
    _separator,
    _one_word,
    _typo,
    _length,
    _another_word,
)


def _different_word(key: str, routing_key: str) -> tuple[str, str]:
    """The one word in which they differ, in both; empty if there is not exactly one."""
    words, others = key.split("."), routing_key.split(".")
    if len(words) != len(others) or "#" in words:
        return "", ""
    different = [pair for pair in zip(words, others, strict=True) if pair[0] not in ("*", pair[1])]
    return different[0] if len(different) == 1 else ("", "")


def distance(one: str, other: str, most: int) -> int:
    """How many letters to add, remove, replace or swap with the next; more than ``most`` is enough.

    (Optimal string alignment.)
    """
    if abs(len(one) - len(other)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, another in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != another))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == another:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
        if min(row) > most:
            return most + 1
    return row[-1]


def sorted_near(near: Iterable[Near]) -> list[Near]:
    """The nearest first; of equal ones in the order of their names."""
    return sorted(near, key=lambda each: (each.rank, each.route.name, each.key))
