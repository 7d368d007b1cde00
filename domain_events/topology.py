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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, TypeAlias, cast, get_args

from domain_events.checks import refusal, shown
from domain_events.errors import ConfigurationError
from domain_events.retry import SHORTEST_DELAY, units_of
from domain_events.text import plain

LEVELS = 24

#: A name that AMQP carries ("short string"), in bytes of UTF-8.
LONGEST_NAME = 255

#: Without a limit of its own a quorum queue has 20 from RabbitMQ 4.0 on, and browsing counts.
#: -1 ("no limit") drops at the first requeue on 3.10.
_AS_GOOD_AS_UNLIMITED = 10**9

_DUE = ".due"
# Of shells, SQL and regular expressions; %2F is none.
_FOREIGN_WILDCARD = re.compile(r"\?|%(?![0-9A-Fa-f]{2})|\{[^}]*\}|\[[^\]]*\]")
_OF_AN_EXCHANGE = re.compile(r"(\.due|\.undelivered|\.delay\.[0-9]{2})\Z")
_OF_A_QUEUE = re.compile(r"(\.walk|\.undelivered|\.delay\.[0-9]{2})\Z")
_OF_SHARED_QUEUE = re.compile(r"(\.undelivered|\.delay\.[0-9]{2})\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# Where a name stands beside the URL that it may be mixed up with.
_CALLS = {
    "subscriber": "DeadLetters(name, connection_settings), Subscriber(connection_settings)",
    "exchange": (
        "Publisher(connection_settings, exchange), Undelivered(exchange, connection_settings)"
    ),
}

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


@dataclass(frozen=True)
class Unbinding:
    """The queue is no longer to be bound to the exchange by this key."""

    exchange: str
    destination: str
    binding_key: str


#: Types of exchanges that every RabbitMQ has. A plug-in's begin with ``x-``.
ExchangeType: TypeAlias = Literal["topic", "direct", "fanout", "headers"]

Declaration: TypeAlias = Exchange | Queue | Binding | Unbinding
Topology: TypeAlias = Sequence[Declaration]


def dead_letter_name(name: str) -> str:
    """The queue that keeps what subscriber ``name`` failed on."""
    return f"{name}-dl"


def undelivered_name(exchange: str) -> str:
    """The queue (and the exchange) for retries whose subscriber's queue is gone."""
    return f"{exchange}.undelivered"


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


def unbindings(exchange: str, name: str, retired_keys: Sequence[str]) -> list[Unbinding]:
    """Which events of ``exchange`` are no longer to reach the queue ``name``."""
    return [Unbinding(exchange, name, key) for key in retired_keys]


def delays(exchange: str) -> list[Declaration]:
    """All that delayed retries on ``exchange`` need, apart from each subscriber's `way_back`."""
    undelivered = undelivered_name(exchange)
    alternate = {"alternate-exchange": undelivered}
    due = Exchange(due_name(exchange), arguments=alternate, strict=True)
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
    return Binding(due_name(exchange), name, "*." * LEVELS + name)


def is_shared(declaration: Declaration) -> bool:
    """Whether it is one of `delays`, which all subscribers of an exchange have in common.

    Their names are reserved: no subscriber and no exchange of a user's can have one of them.
    """
    if isinstance(declaration, Exchange):
        return _OF_AN_EXCHANGE.search(declaration.name) is not None
    if isinstance(declaration, Binding) and declaration.to_exchange:
        return True
    name = declaration.name if isinstance(declaration, Queue) else declaration.destination
    return _OF_SHARED_QUEUE.search(name) is not None


def delay_address(exchange: str, name: str, delay: float) -> tuple[str, str]:
    """The exchange and the routing key that bring a message to ``name`` after ``delay`` seconds.

    The delay is rounded up to whole tenths of a second; it
    starts at the level of the highest bit, the others above it having nothing to add.
    """
    units = units_of(delay)
    if units >> LEVELS:
        raise ValueError(f"A delay of {delay} s is longer than the delay levels reach.")
    bits = ".".join(f"{units:0{LEVELS}b}")
    return _level(exchange, units.bit_length() - 1), f"{bits}.{name}"


def subscriber_of(address: str) -> str | None:
    """Whose retry is sent to an address of `delay_address`; None if it is not such an address."""
    *bits, name = address.split(".", LEVELS)
    if len(bits) < LEVELS or not name or not set(bits) <= {"0", "1"}:
        return None
    try:
        return _usable_name(name, "subscriber")
    except ConfigurationError:
        return None


def check_name(name: object, what: str, exchange: str = "") -> str:
    """The name of a subscriber or an exchange as plain text, if the topology can be built from it.

    :param exchange: of a subscriber, the exchange that it is on.
    :raises ConfigurationError: when it is not a text, empty, too long, reserved or has wildcards.
    """
    name = _usable_name(name, what)
    if why := _reserved(name, what, exchange):
        raise ConfigurationError(f"The {what}'s name {shown(name)} {why}")
    return name


def _usable_name(name: object, what: str) -> str:
    room = LONGEST_NAME - 2 * LEVELS
    if not isinstance(name, str) or not name:
        raise ConfigurationError(
            f"The {what} needs a name: a str that is not empty, not {shown(name)}."
        )
    name = plain(name)
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"The {what}'s name {shown(name)} is not valid Unicode."
        ) from error
    text = shown(name)
    if "://" in name:
        calls = _CALLS[what]
        raise ConfigurationError(
            f"The {what}'s name {text} is a URL, which belongs into connection_settings: {calls}."
        )
    if size > room:
        raise ConfigurationError(
            f"The {what}'s name {text} is longer than {room} bytes, which leave room for the "
            "names that are built from it; choose a shorter one."
        )
    if name.startswith("amq."):
        raise ConfigurationError(
            f"The {what}'s name {text}: names in 'amq.' belong to the broker; choose another one."
        )
    if has_wildcards(name):
        raise ConfigurationError(
            f"The {what}'s name {text} has a wildcard ('*' or '#') for a word; wildcards belong "
            "into binding_keys."
        )
    if name != name.strip() or _CONTROL.search(name):
        raise ConfigurationError(
            f"The {what}'s name {text} begins or ends with white space, or has a control "
            "character in it; leave it out."
        )
    return name


def _reserved(name: str, what: str, exchange: str) -> str:
    """What is against a name that this library gives to queues or exchanges of its own."""
    if what == "exchange":
        if found := _OF_AN_EXCHANGE.search(name):
            return f"ends in {found[0]!r}, as what retries need does; choose another one."
    elif name.endswith("-dl"):
        return f"is that of a queue of dead letters; give the subscriber's name, {name[:-3]!r}."
    elif (found := _OF_A_QUEUE.search(name)) or name == due_name(exchange):
        end = found[0] if found else _DUE
        return f"ends in {end!r}, as queues and exchanges of this library do; choose another one."
    return ""


def check_exchange_type(exchange_type: object) -> ExchangeType:
    """The type of an exchange as plain text.

    :raises ConfigurationError: when no RabbitMQ has such a type.
    """
    if isinstance(exchange_type, str):
        exchange_type = plain(exchange_type)
        if exchange_type in get_args(ExchangeType) or exchange_type.startswith("x-"):
            return cast(ExchangeType, exchange_type)
    types = ", ".join(map(repr, get_args(ExchangeType)))
    raise refusal(exchange_type, "exchange_type", f"one of {types}, or a plug-in's ('x-...')")


def check_binding_key(key: object, exchange_type: str) -> str:
    """A binding key as plain text, if it can ever match.

    On a topic exchange, that is: a ``*`` or ``#`` within a word is a letter to the broker, and
    matches nothing that anybody means.

    :raises ConfigurationError: when it cannot.
    """
    if not isinstance(key, str):
        raise refusal(key, "each of binding_keys", "a str such as 'user.*'")
    key = plain(key)
    text = shown(key)
    if not fits(key):
        raise ConfigurationError(
            f"The binding key {text} must be valid Unicode of at most {LONGEST_NAME} bytes."
        )
    if exchange_type not in ("topic", "direct"):
        return key  # means nothing there, or something else
    if not key:
        raise ConfigurationError(
            "A binding key is empty; give one such as 'user.*', or '#' for all."
        )
    if why := _odd(key) or (exchange_type == "topic" and _spaced(key)):
        raise ConfigurationError(f"The binding key {text} {why}, so it matches nothing meant.")
    if exchange_type == "topic" and (found := _FOREIGN_WILDCARD.search(key)):
        raise ConfigurationError(
            f"The binding key {text} has {found[0]!r} in it, which is not a wildcard here and so "
            "matches nothing meant: '*' stands for one word between dots, '#' for any number of "
            "them, and a choice takes several binding keys."
        )
    if exchange_type == "topic" and (part := _half_wildcard(key)):
        if "://" in key:  # of which a word may be the password
            raise ConfigurationError(f"The binding key {text} is a URL.")
        stem = key.split(part)[0] + part.split("*")[0].split("#")[0]
        stem = stem.rstrip(".") or "user"
        raise ConfigurationError(
            f"The binding key {text} has a wildcard within the word {part!r}, where it is a "
            f"letter. Wildcards stand for whole words between dots: '{stem}.*' for one word, "
            f"'{stem}.#' for any number of them."
        )
    return key


def mistyped(routing_key: str) -> str:
    """What is odd about a routing key, in words; empty if nothing is.

    The broker takes such keys, and compares them word by word, character by character.
    """
    if why := _odd(routing_key) or _spaced(routing_key):
        return why
    part = _half_wildcard(routing_key)
    return f"has a wildcard within the word {shown(part)}, where it is a letter" if part else ""


def _odd(key: str) -> str:
    if key != key.strip():
        return "begins or ends with white space"
    if "" in key.split("."):
        return "has an empty word (a dot at its beginning or end, or two in a row)"
    return "has a control character" if _CONTROL.search(key) else ""


def _spaced(key: str) -> str:
    return "has white space in it" if re.search(r"\s", key) else ""


def _half_wildcard(key: str) -> str:
    """The first word that has a wildcard in it and is none."""
    words = key.split(".")
    return next((word for word in words if len(word) > 1 and not {"*", "#"}.isdisjoint(word)), "")


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


@lru_cache(maxsize=256)
def return_exchanges(exchange: str) -> frozenset[str]:
    """Through which exchanges this library sends on what was published to ``exchange``.

    Retries come back through ``<exchange>.due``, and from the last level in whose queue they have
    waited through the next level's; replays through the default one. Exactly these: anybody may
    make an exchange that has a similar name.
    """
    levels = (_level(exchange, level) for level in range(LEVELS))
    return frozenset(("", due_name(exchange), *levels))


def due_name(exchange: str) -> str:
    """The exchange from which retries that are due return to their subscribers."""
    return exchange + _DUE


def _level(exchange: str, level: int) -> str:
    return f"{exchange}.delay.{level:02}"


def _quorum_queue(name: str) -> Queue:
    return Queue(name, {"x-queue-type": "quorum", "x-delivery-limit": _AS_GOOD_AS_UNLIMITED})
