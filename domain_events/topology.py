"""Every exchange, queue and binding on the broker, as data. Pure: declares nothing itself.

::

    publisher ──► <exchange> ──binding keys──► <name> ──► handler
                                                 ▲  │ Retry                  │ gave up
                    <exchange>.due ──────────────┘  ▼                        ▼
                          ▲              <exchange>.delay.NN              <name>-dl
                          └── TTL expires ◄── (a queue per bit)

**Delays.** Level *i* of 24 is a topic exchange and a quorum queue ``<exchange>.delay.<i>`` that
keeps a message 2**i tenths of a second and hands it to level *i - 1*; level 0 hands it to
``<exchange>.due``. A delay is written in binary in front of the queue's name, highest bit first
(``0.0.1.0.1.<name>``): at each level a set bit waits in the queue, a clear bit goes straight on
to the next exchange. So a fixed number of queues keeps any delay up to 19 days, a short one is
never behind a long one, and a retry returns to its own subscriber only. NServiceBus and Celery
delay this way.

**Safety.** A queue that dead-letters does so at least once only as a quorum queue with
``x-dead-letter-strategy=at-least-once`` and ``x-overflow=reject-publish``
(https://www.rabbitmq.com/docs/quorum-queues#dead-lettering). A retry whose subscriber's queue is
gone would block that for all others, so ``<exchange>.due`` hands it to ``<exchange>.undelivered``.

**No options in arguments.** A queue's arguments cannot change once it exists, so a subscriber's
queue has the same ones whatever its options are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

from domain_events.errors import ConfigurationError
from domain_events.retry import SHORTEST_DELAY

LEVELS = 24

#: A name that AMQP carries ("short string"), in bytes of UTF-8.
LONGEST_NAME = 255

#: Without a limit of its own a quorum queue has 20 from RabbitMQ 4.0 on, and browsing counts.
#: -1 ("no limit") drops at the first requeue on 3.10.
_AS_GOOD_AS_UNLIMITED = 10**9

_CONFIRMED_DEAD_LETTERING = {
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


@dataclass(frozen=True)
class Exchange:
    """An exchange; durable. One that exists with the same type is used as it is.

    ``strict``: it must have these very arguments.
    """

    name: str
    type: str = "topic"
    arguments: Mapping[str, object] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True)
class Queue:
    """A queue. ``as_found``: when one of that name exists, take it whatever its arguments."""

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    as_found: bool = False


@dataclass(frozen=True)
class Binding:
    """From an exchange to a queue, or with ``to_exchange`` to another exchange."""

    exchange: str
    destination: str
    binding_key: str
    to_exchange: bool = False


Declaration: TypeAlias = Exchange | Queue | Binding
Topology: TypeAlias = Sequence[Declaration]


def dead_letter_name(name: str) -> str:
    """The queue that keeps what subscriber ``name`` failed on."""
    return f"{name}-dl"


def subscriber_queue(name: str) -> Queue:
    """A durable subscriber's queue.

    Its own dead-lettering is only the net under an event whose handler kills the process a
    hundred times; what a handler fails on we move ourselves, with the reason.
    """
    return Queue(
        name,
        {
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": dead_letter_name(name),
            "x-delivery-limit": 100,
            **_CONFIRMED_DEAD_LETTERING,
        },
    )


def classic_queue(name: str, dead_letter: bool) -> Queue:
    """The queue that domain-event-broker declares, and any that it has declared before."""
    arguments = {"x-dead-letter-exchange": f"{name}-dlx"} if dead_letter else {}
    return Queue(name, arguments, as_found=True)


def temporary_queue(
    name: str, *, exclusive: bool, auto_delete: bool, as_found: bool = False
) -> Queue:
    """The queue of a subscriber that wants nothing kept while it is away.

    Never a transient queue that is not exclusive: RabbitMQ 4.3 may refuse these and close the
    connection. One that is neither exclusive nor deleted with its consumer outlives a blip or a
    restart of the broker, and goes a minute after the last consumer.
    """
    # Said, and not left to the default, which a vhost may have set to quorum.
    arguments: dict[str, object] = {"x-queue-type": "classic"}
    if not exclusive and not auto_delete:
        arguments["x-expires"] = 60_000
    return Queue(
        name,
        arguments,
        durable=not exclusive,
        exclusive=exclusive,
        auto_delete=auto_delete,
        as_found=as_found,
    )


def dead_letter_queue(name: str, *, classic: bool = False) -> Queue:
    """The dead letters of subscriber ``name``; no TTL: they wait for a person."""
    if classic:
        return Queue(dead_letter_name(name), as_found=True)
    return _quorum_queue(dead_letter_name(name))


def bindings(exchange: str, name: str, binding_keys: Sequence[str]) -> list[Binding]:
    """Which events of ``exchange`` reach the queue ``name``."""
    return [Binding(exchange, name, key) for key in binding_keys]


def delays(exchange: str) -> list[Declaration]:
    """All that delayed retries on ``exchange`` need, apart from each subscriber's `way_back`."""
    undelivered = f"{exchange}.undelivered"
    due = Exchange(_due(exchange), arguments={"alternate-exchange": undelivered}, strict=True)
    topology: list[Declaration] = [
        Exchange(undelivered, "fanout", strict=True),
        _quorum_queue(undelivered),
        Binding(undelivered, undelivered, ""),
        due,
    ]
    following = due.name
    for level in range(LEVELS):
        name = _level(exchange, level)
        # In a key, the bit of this level stands behind those of all higher levels.
        higher_bits = "*." * (LEVELS - 1 - level)
        topology += [
            Exchange(name, strict=True),
            Queue(
                name,
                {
                    "x-queue-type": "quorum",
                    "x-message-ttl": round(SHORTEST_DELAY * 1000) << level,
                    "x-dead-letter-exchange": following,
                    "x-delivery-limit": _AS_GOOD_AS_UNLIMITED,
                    **_CONFIRMED_DEAD_LETTERING,
                },
            ),
            Binding(name, name, f"{higher_bits}1.#"),
            Binding(name, following, f"{higher_bits}0.#", to_exchange=True),
        ]
        following = name
    return topology


def way_back(exchange: str, name: str) -> Binding:
    """How a retry that is due returns to the queue ``name``."""
    return Binding(_due(exchange), name, "*." * LEVELS + name)


def delay_address(exchange: str, name: str, delay: float) -> tuple[str, str]:
    """The exchange and the routing key that bring a message to ``name`` after ``delay`` seconds.

    The delay is rounded up to whole tenths of a second, since a retry must not come early; it
    starts at the level of the highest bit, the others above it having nothing to add.
    """
    # A whole number of tenths is seldom exact in binary: 0.3 / 0.1 is 2.9999999999999996.
    units = max(1, math.ceil(round(delay / SHORTEST_DELAY, 6)))
    if units >> LEVELS:
        raise ValueError(f"A delay of {delay} s is longer than the delay levels reach.")
    bits = ".".join(f"{units:0{LEVELS}b}")
    return _level(exchange, units.bit_length() - 1), f"{bits}.{name}"


def delay_of(address: str) -> float:
    """The delay, in seconds, that is written in a routing key by `delay_address`."""
    return round(int("".join(address.split(".")[:LEVELS]), 2) * SHORTEST_DELAY, 1)


def check_name(name: str, what: str) -> str:
    """The name of a subscriber or an exchange, if the topology above can be built from it.

    :raises ConfigurationError: when it is empty, too long, reserved or has wildcards.
    """
    room = LONGEST_NAME - 2 * LEVELS
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"The {what} needs a name.")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"The {what} {name[:40]!r} is no valid Unicode.") from error
    if size > room:
        raise ConfigurationError(f"The {what} {name[:40]!r}... is longer than {room} bytes.")
    if name.startswith("amq."):
        raise ConfigurationError(f"The {what} {name!r}: names in 'amq.' belong to the broker.")
    if has_wildcards(name):
        raise ConfigurationError(f"The {what} {name!r} has a wildcard ('*' or '#') for a word.")
    return name


def fits(text: object) -> bool:
    """Whether AMQP can carry it as a short string, which names and keys are."""
    try:
        return isinstance(text, str) and len(text.encode()) <= LONGEST_NAME
    except UnicodeEncodeError:
        return False


def has_wildcards(key: str) -> bool:
    """Whether a word of the key is ``*`` or ``#``."""
    return ("*" in key or "#" in key) and not {"*", "#"}.isdisjoint(key.split("."))


@lru_cache(maxsize=4096)
def matches(binding_key: str, routing_key: str) -> bool:
    """Whether a topic exchange routes ``routing_key`` through ``binding_key``.

    ``*`` stands for one word, ``#`` for any number of them, none included
    (https://www.rabbitmq.com/tutorials/amqp-concepts#exchange-topic).
    """
    words = routing_key.split(".") if routing_key else []
    # The numbers of words of the routing key that the binding key so far may stand for.
    ends = {0}
    for part in binding_key.split(".") if binding_key else []:
        if part == "#":
            ends = set(range(min(ends), len(words) + 1))
        else:
            ends = {end + 1 for end in ends if end < len(words) and part in ("*", words[end])}
        if not ends:
            return False
    return len(words) in ends


def _due(exchange: str) -> str:
    return f"{exchange}.due"


def _level(exchange: str, level: int) -> str:
    return f"{exchange}.delay.{level:02}"


def _quorum_queue(name: str) -> Queue:
    return Queue(name, {"x-queue-type": "quorum", "x-delivery-limit": _AS_GOOD_AS_UNLIMITED})
