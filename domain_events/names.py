"""Names and keys: which are valid, and which routing keys a binding key matches. Pure."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, TypeAlias, cast, get_args

from domain_events.checks import refusal, shown
from domain_events.errors import ConfigurationError
from domain_events.text import plain

#: A name that AMQP carries ("short string"), in bytes of UTF-8.
LONGEST_NAME = 255
# Names of exchanges and queues are built from a subscriber's and an exchange's; a retry's routing
# key is a subscriber's name with its delay in 24 words before it.
_LONGEST_GIVEN_NAME = LONGEST_NAME - 2 * 24

# Wildcards of shells, SQL and regular expressions; %2F is not one.
_FOREIGN_WILDCARD = re.compile(r"\?|%(?![0-9A-Fa-f]{2})|\{[^}]*\}|\[[^\]]*\]")
_EXCHANGE_SUFFIX = re.compile(r"(\.due|\.undelivered|\.delay\.[0-9]{2})\Z")
_QUEUE_SUFFIX = re.compile(r"(\.walk|\.undelivered|\.delay\.[0-9]{2})\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# The calls in which a name may be confused with the URL beside it.
_CALLS = {
    "subscriber": "DeadLetters(name, connection_settings), Subscriber(connection_settings)",
    "exchange": (
        "Publisher(connection_settings, exchange), Undelivered(exchange, connection_settings)"
    ),
}

#: Types of exchanges that every RabbitMQ has. A plug-in's begin with ``x-``.
ExchangeType: TypeAlias = Literal["topic", "direct", "fanout", "headers"]


def check_name(name: object, what: str, exchange: str = "") -> str:
    """The name of a subscriber or an exchange as plain text, if the topology can be built from it.

    :param exchange: of a subscriber, the exchange that it is on.
    :raises ConfigurationError: when it is not a text, empty, too long, reserved or has wildcards.
    """
    name = usable_name(name, what)
    if why := _why_reserved(name, what, exchange):
        raise ConfigurationError(f"The {what}'s name {shown(name)} {why}")
    return name


def usable_name(name: object, what: str) -> str:
    room = _LONGEST_GIVEN_NAME
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"The {what} needs a name: a non-empty str, not {shown(name)}.")
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
            f"The {what}'s name {text} is a URL, which belongs in connection_settings: {calls}."
        )
    if size > room:
        raise ConfigurationError(
            f"The {what}'s name {text} is longer than {room} bytes, the limit for names "
            "that others are built from; choose a shorter one."
        )
    if name.startswith("amq."):
        raise ConfigurationError(
            f"The {what}'s name {text}: 'amq.' names are reserved; choose another one."
        )
    if has_wildcards(name):
        raise ConfigurationError(
            f"The {what}'s name {text} has a wildcard ('*' or '#') as a word; wildcards belong "
            "in binding_keys."
        )
    if name != name.strip() or _CONTROL.search(name):
        raise ConfigurationError(
            f"The {what}'s name {text} begins or ends with whitespace, or contains a control "
            "character; remove it."
        )
    return name


def _why_reserved(name: str, what: str, exchange: str) -> str:
    """Why a name is reserved for this library's own queues and exchanges; empty if it is not."""
    if what == "exchange":
        if found := _EXCHANGE_SUFFIX.search(name):
            return f"ends in {found[0]!r}, which is reserved for retries; choose another one."
    elif name.endswith("-dl"):
        return f"is that of a dead-letter queue; give the subscriber's name, {name[:-3]!r}."
    elif (found := _QUEUE_SUFFIX.search(name)) or name == f"{exchange}.due":
        end = found[0] if found else ".due"
        return f"ends in {end!r}, which is reserved for this library's own; choose another one."
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

    On a topic exchange, the broker takes a ``*`` or ``#`` within a word literally, so such a key
    does not match what its author means.

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
        return key  # ignored there, or with another meaning
    if not key:
        raise ConfigurationError(
            "A binding key is empty; give one such as 'user.*', or '#' for all."
        )
    if why := _common_oddity(key) or (exchange_type == "topic" and _inner_space(key)):
        raise ConfigurationError(f"The binding key {text} {why}, so it cannot match as intended.")
    if exchange_type == "topic" and (found := _FOREIGN_WILDCARD.search(key)):
        raise ConfigurationError(
            f"The binding key {text} has {found[0]!r} in it, which is not a wildcard in AMQP: '*' "
            "stands for one word between dots, '#' for any number of them; for alternatives, give "
            "several binding keys."
        )
    if exchange_type == "topic" and (part := _half_wildcard(key)):
        if "://" in key:  # of which a word may be the password
            raise ConfigurationError(f"The binding key {text} is a URL; give keys like 'user.*'.")
        stem = key.split(part)[0] + part.split("*")[0].split("#")[0]
        stem = stem.rstrip(".") or "user"
        raise ConfigurationError(
            f"The binding key {text} has a wildcard within the word {part!r}, where it is "
            f"literal. Wildcards stand for whole words between dots: '{stem}.*' for one word, "
            f"'{stem}.#' for any number of them."
        )
    return key


def oddity(routing_key: str) -> str:
    """What is unusual about a routing key; empty if nothing is.

    The broker accepts such keys, and compares them word by word, character by character.
    """
    if why := _common_oddity(routing_key) or _inner_space(routing_key):
        return why
    part = _half_wildcard(routing_key)
    return f"has a wildcard within the word {shown(part)}, where it is literal" if part else ""


def _common_oddity(key: str) -> str:
    if key != key.strip():
        return "begins or ends with whitespace"
    if "" in key.split("."):
        return "has an empty word (a dot at its beginning or end, or two in a row)"
    return "has a control character" if _CONTROL.search(key) else ""


def _inner_space(key: str) -> str:
    return "contains whitespace" if re.search(r"\s", key) else ""


def _half_wildcard(key: str) -> str:
    """The first word that contains a wildcard without being one; empty if there is none."""
    words = key.split(".")
    return next((word for word in words if len(word) > 1 and not {"*", "#"}.isdisjoint(word)), "")


def fits(text: object) -> bool:
    """Whether it fits an AMQP short string, as names and keys must."""
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
    # How many words of the routing key the binding key so far can match.
    ends = {0}
    for part in binding_key.split(".") if binding_key else []:
        if part == "#":
            ends = set(range(min(ends), len(words) + 1))
        else:
            ends = {end + 1 for end in ends if end < len(words) and part in ("*", words[end])}
        if not ends:
            return False
    return len(words) in ends
