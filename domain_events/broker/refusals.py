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
from domain_events.topology import Binding, Declaration, Exchange, Queue

# The codes of AMQP: https://www.rabbitmq.com/amqp-0-9-1-reference#constants
FORBIDDEN, MISSING, LOCKED, REFUSED, UNKNOWN_TYPE = 403, 404, 405, 406, 503

#: What permissions call the exchange whose name is empty.
DEFAULT_EXCHANGE = "amq.default"


class Refused(Exception):
    """What was asked for cannot be; with AMQP's code, and in its words."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"{said} ({code})")
        self.code = code
        self.said = said


def undeclarable(declaration: Declaration, code: int, said: str) -> DomainEventsError:
    """Why this could not be declared, what was asked for, and the ways out."""
    what, asked = _described(declaration)
    if code == FORBIDDEN:
        return ConfigurationError(
            f"{what} may not be declared by this user: {said}. To declare it, also where it "
            f"exists, takes the permissions {_permissions(declaration)}."
        )
    if code == LOCKED:
        return TopologyError(
            f"{what} is taken: {said}. An exclusive queue belongs to one connection; let each "
            "process that wants one of its own register under a name of its own."
        )
    if code == REFUSED and isinstance(declaration, Queue):
        return TopologyError(
            f"{what} exists with other arguments than asked for: {said}. Asked for: {asked}. "
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
    if code == REFUSED and isinstance(declaration, Exchange):
        return TopologyError(
            f"{what} exists otherwise than asked for: {said}. Asked for: {asked}. The ways out: "
            "use the type it has (exchange_type=...), or another exchange."
        )
    if code == MISSING and isinstance(declaration, Queue):
        # Nobody asked whether it is there: its node is down, or not quite up yet.
        return BrokerUnavailable(f"{what} cannot be reached: {said}.")
    return TopologyError(f"{what} could not be declared: {said}.")


def unreadable(queue: str, code: int, said: str) -> DomainEventsError:
    """Why there is nothing to see in this queue."""
    if code == MISSING:
        return TopologyError(f"There is no queue {queue!r}.")
    if code == FORBIDDEN:
        return unreadable_by_this_user(said)
    return TopologyError(f"The queue {queue!r} cannot be read: {said}.")


def unreadable_by_this_user(said: str) -> ConfigurationError:
    """This user may not consume from a queue, nor look into it."""
    return ConfigurationError(
        f"This user may not read from the queue: {said}. It takes the permission read on it, and "
        "with some releases of RabbitMQ configure too, to look how many messages there are."
    )


def unwritable(message: Message, said: str) -> ConfigurationError:
    """This user may not publish there."""
    exchange = message.exchange or DEFAULT_EXCHANGE
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
        f"The exchange {message.exchange!r} does not exist and this user may not declare it: "
        f"{said}."
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


def _described(declaration: Declaration) -> tuple[str, str]:
    if isinstance(declaration, Exchange):
        asked = f"durable, type {declaration.type!r}, {dict(declaration.arguments)}"
        return f"The exchange {declaration.name!r}", asked
    if isinstance(declaration, Queue):
        flags = ("durable", "exclusive", "auto_delete")
        chosen = ", ".join(flag for flag in flags if getattr(declaration, flag))
        return f"The queue {declaration.name!r}", f"{chosen}, {dict(declaration.arguments)}"
    assert isinstance(declaration, Binding)
    what = f"The binding of {declaration.destination!r} to the exchange {declaration.exchange!r}"
    return f"{what} by {declaration.binding_key!r}", ""


def _permissions(declaration: Declaration) -> str:
    """Which permissions it takes; RabbitMQ says only from 4.0 on which one it has missed."""
    if isinstance(declaration, Binding):
        kind = "exchange" if declaration.to_exchange else "queue"
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
