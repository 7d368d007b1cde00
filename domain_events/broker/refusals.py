"""What stands against a request, in words for a user: the same for every broker. Pure."""

from __future__ import annotations

from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    EventUnroutable,
    TopologyError,
)
from domain_events.message import Message
from domain_events.text import printable
from domain_events.topology import Binding, Declaration, Exchange, Queue, Unbinding

# The codes of AMQP: https://www.rabbitmq.com/amqp-0-9-1-reference#constants
FORBIDDEN, MISSING, LOCKED, REFUSED, UNKNOWN_TYPE = 403, 404, 405, 406, 503

# What sets apart refusals with the code 403 that are not about the permissions of a user on a
# queue or an exchange (rabbit_channel.erl of 3.10 to 4.3).
_TOPIC = "access to topic"
_TOPIC_WAY = (
    "It takes a topic permission that matches the routing key; see rabbitmqctl "
    "list_user_topic_permissions and set_topic_permissions."
)
_INTERNAL = "internal exchange"
_EXCLUSIVE = "in exclusive use"

#: What permissions call the exchange whose name is empty.
DEFAULT_EXCHANGE = "amq.default"


class Refused(Exception):
    """What was asked for cannot be; with AMQP's code, and in its words."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"{said} ({code})")
        self.code = code
        self.said = said


class Taken(TopologyError):
    """The queue is exclusive, and another connection's."""


def undeclarable(declaration: Declaration, code: int, said: str) -> DomainEventsError:
    """Why this could not be declared, what was asked for, and the ways out."""
    said = _shown(said)
    what, asked = _described(declaration)
    if code == FORBIDDEN:
        if _TOPIC in said:
            return ConfigurationError(f"{what} may not be made by this user: {said}. {_TOPIC_WAY}")
        return ConfigurationError(
            f"{what} may not be declared by this user: {said}. To declare it, also where it "
            f"exists, takes the permissions {_permissions(declaration)}."
        )
    if code == LOCKED:
        return Taken(
            f"{what} is taken: {said}. An exclusive queue belongs to one connection; let each "
            "process that wants one of its own register under a name of its own."
        )
    if is_different(code, said) and isinstance(declaration, Queue):
        return TopologyError(
            f"{what} exists with different settings: {said}. Asked for: {asked}. "
            "A queue's arguments cannot change. The ways out: register under another name; or, "
            "once it is empty, delete the queue and start again; or, when domain-event-broker "
            "has declared it, register with queue_type='classic' to use it as it is."
        )
    # From 4.0 on with the code of an exchange that exists with another type.
    if isinstance(declaration, Exchange) and (code == UNKNOWN_TYPE or "unknown exchange" in said):
        return TopologyError(
            f"{what} cannot be declared: {said}. Its type is misspelt, or the plugin that "
            "provides it is not enabled."
        )
    if is_different(code, said) and isinstance(declaration, Exchange):
        return TopologyError(
            f"{what} exists with different settings: {said}. Asked for: {asked}. The ways out: "
            "use the type it has (exchange_type=...), or another exchange."
        )
    if code == MISSING and isinstance(declaration, Queue):
        # A declaration does not ask whether it is there: its node is down, or not quite up yet.
        return BrokerUnavailable(f"{what} cannot be reached: {said}.")
    return TopologyError(f"{what} could not be declared: {said}.")


def is_different(code: int, said: str) -> bool:
    """Whether the broker refused because what exists has other settings than asked for.

    It has the same code for whatever else it has against a declaration, such as a limit of the
    vhost's; only the text tells them apart.
    """
    return code == REFUSED and "inequivalent arg" in said


def may_be_used(exchange: Exchange, code: int, said: str) -> bool:
    """Whether an exchange that could not be declared so exists, and will do as it is.

    An alternate exchange, for example, is for whoever runs the broker to decide. RabbitMQ compares
    the type first.
    """
    another_type = "inequivalent arg 'type'" in said
    return is_different(code, said) and not another_type and not exchange.strict


def unreadable(queue: str, code: int, said: str) -> DomainEventsError:
    """Why there is nothing to see in this queue."""
    said = _shown(said)
    if code == MISSING:
        if "no queue" in said:
            return TopologyError(f"There is no queue {queue!r}.")
        return BrokerUnavailable(f"The queue {queue!r} cannot be reached: {said}.")
    if code == FORBIDDEN:
        return unreadable_by_this_user(said)
    if code == LOCKED:
        return Taken(f"The queue {queue!r} is exclusive to another connection: {said}.")
    return TopologyError(f"The queue {queue!r} cannot be read: {said}.")


def unreadable_by_this_user(said: str) -> DomainEventsError:
    """This user may not consume from a queue, nor look into it."""
    said = _shown(said)
    if _EXCLUSIVE in said:
        return TopologyError(
            f"The queue cannot be read: {said}. Another consumer has it for itself; stop that "
            "one, or have it consume without its exclusive flag."
        )
    return ConfigurationError(
        f"This user may not read from the queue: {said}. It takes the permission read on it, and "
        "with some releases of RabbitMQ configure too, to look how many messages there are."
    )


def unwritable(message: Message, said: str) -> DomainEventsError:
    """This user may not publish there."""
    said = _shown(said)
    exchange = message.exchange or DEFAULT_EXCHANGE
    if _INTERNAL in said:
        return TopologyError(
            f"Nobody can publish to the exchange {exchange!r}: {said}. It was declared as "
            "internal, for messages from other exchanges only; publish to one of these, or to "
            "another exchange (exchange=...)."
        )
    if _TOPIC in said:
        return ConfigurationError(
            f"This user may not publish {message.routing_key!r} to the exchange {exchange!r}: "
            f"{said}. {_TOPIC_WAY}"
        )
    return ConfigurationError(
        f"This user may not write to the exchange {exchange!r}: {said}. It takes the permission "
        "write on it."
    )


def unroutable(message: Message) -> DomainEventsError:
    """No queue is bound for it."""
    return EventUnroutable(
        f"No queue is bound to the exchange {message.exchange!r} for the routing key "
        f"{message.routing_key!r}."
    )


def no_exchange(message: Message, said: str) -> DomainEventsError:
    """There is no exchange to publish it to."""
    return TopologyError(
        f"The exchange {message.exchange!r} does not exist: {_shown(said)}. Have it declared: by a "
        "subscriber that registers on it, or by this user with the permission configure on it."
    )


def no_channel(said: str) -> BrokerUnavailable:
    """The connection, or its user, has as many channels as it may."""
    return BrokerUnavailable(
        f"No channel is free: {said}. Each subscriber of a connection takes one, register one more "
        "for a moment; allow more (channel_max in the URL and in the broker's settings, "
        "max-channels of the user), or share the subscribers out among several processes."
    )


def closed() -> BrokerUnavailable:
    """The connection was closed, and is asked to do something all the same."""
    return BrokerUnavailable("The connection was closed by this program.")


def _shown(said: str) -> str:
    # A name in it may be anybody's.
    return printable(said, 400)


def _described(declaration: Declaration) -> tuple[str, str]:
    if isinstance(declaration, Exchange):
        asked = f"durable, type {declaration.type!r}, {dict(declaration.arguments)}"
        return f"The exchange {declaration.name!r}", asked
    if isinstance(declaration, Queue):
        flags = ("durable", "exclusive", "auto_delete")
        chosen = ", ".join(flag for flag in flags if getattr(declaration, flag))
        return f"The queue {declaration.name!r}", f"{chosen}, {dict(declaration.arguments)}"
    assert isinstance(declaration, Binding | Unbinding)
    what = f"The binding of {declaration.destination!r} to the exchange {declaration.exchange!r}"
    return f"{what} by {declaration.binding_key!r}", ""


def _permissions(declaration: Declaration) -> str:
    """Which permissions it takes; RabbitMQ says only from 4.0 on which one it has missed."""
    if isinstance(declaration, Binding | Unbinding):
        to_exchange = isinstance(declaration, Binding) and declaration.to_exchange
        kind = "exchange" if to_exchange else "queue"
        return (
            f"write on the {kind} {declaration.destination!r} and read on the exchange "
            f"{declaration.exchange!r}"
        )
    if isinstance(declaration, Exchange):
        onward = declaration.arguments.get("alternate-exchange")
    else:
        onward = declaration.arguments.get("x-dead-letter-exchange")
    if onward is None:
        return f"configure on {declaration.name!r}"
    return (
        f"configure and read on {declaration.name!r} and write on the exchange "
        f"{onward or DEFAULT_EXCHANGE!r}, to which it hands on"
    )
