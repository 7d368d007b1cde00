"""Turns errors of RabbitMQ and pika into errors that explain what to do. Pure."""

from __future__ import annotations

import re
import socket
import ssl

import pika
import pika.exceptions

from domain_events.broker import TO_APPLY
from domain_events.broker.rabbitmq.topology import (
    Binding,
    Declaration,
    Exchange,
    Queue,
    Unbinding,
    address,
    must_exist,
)
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    EventNotConfirmed,
    EventRejected,
    EventUnroutable,
    InvalidEvent,
    TopologyError,
)
from domain_events.message import Message
from domain_events.text import printable

# The codes of AMQP: https://www.rabbitmq.com/amqp-0-9-1-reference#constants
ACCESS_REFUSED, NOT_FOUND, RESOURCE_LOCKED = 403, 404, 405
PRECONDITION_FAILED, COMMAND_INVALID = 406, 503

# The texts of refusals with the code 403 that are not about the permissions of a user on a queue or
# an exchange (rabbit_channel.erl of 3.10 to 4.3).
_TOPIC = "access to topic"
_TOPIC_WAY = (
    "It requires a topic permission that matches the routing key; see rabbitmqctl "
    "list_user_topic_permissions and set_topic_permissions."
)
_INTERNAL = "internal exchange"
_MISSING = re.compile("no (queue|exchange)")
_EXCLUSIVE = "in exclusive use"

#: The name of the default exchange in permissions.
DEFAULT_EXCHANGE = "amq.default"


class ResourceLocked(TopologyError):
    """The queue is exclusive to another connection."""


def declare_error(declaration: Declaration, code: int, text: str) -> DomainEventsError:
    """Why this could not be declared, what was requested, and the ways out."""
    text = _shown(text)
    what, requested = _described(declaration)
    if must_exist(declaration) and code == NOT_FOUND and _MISSING.search(text):
        return TopologyError(f"{what} does not exist. {TO_APPLY}")
    if code == ACCESS_REFUSED:
        if _TOPIC in text:
            return ConfigurationError(f"{what} may not be made by this user: {text}. {_TOPIC_WAY}")
        return ConfigurationError(
            f"{what} may not be declared by this user: {text}. Declaring it, even if it exists, "
            f"requires the permissions {_permissions(declaration)}."
        )
    if code == RESOURCE_LOCKED:
        return ResourceLocked(
            f"{what} is exclusively used by another connection, or was declared with another value "
            f"of 'exclusive': {text}. An exclusive queue belongs to one connection; let each "
            "process that wants one of its own register under a name of its own."
        )
    if is_different(code, text) and isinstance(declaration, Queue):
        return TopologyError(
            f"{what} exists with different settings: {text}. Requested: {requested}. "
            "A queue's arguments cannot change. The ways out: register under another name; or, "
            "once it is empty, delete the queue and start again; or, when domain-event-broker "
            "has declared it, register with queue_type='classic' to use it as it is."
        )
    # From 4.0 on, it has the code of an exchange that exists with another type (406).
    if isinstance(declaration, Exchange) and (
        code == COMMAND_INVALID or "unknown exchange" in text
    ):
        return TopologyError(
            f"{what} cannot be declared: {text}. Its type is misspelt, or the plugin that "
            "provides it is not enabled."
        )
    if is_different(code, text) and isinstance(declaration, Exchange):
        return TopologyError(
            f"{what} exists with different settings: {text}. Requested: {requested}. The ways out: "
            "use the type it has (exchange_type=...), or another exchange."
        )
    if code == NOT_FOUND and isinstance(declaration, Queue):
        # A declaration would create a missing queue: its node is down, or not quite up yet.
        return BrokerUnavailable(f"{what} cannot be reached: {text}.")
    return TopologyError(f"{what} could not be declared: {text}.")


def is_different(code: int, text: str) -> bool:
    """Whether the broker refused because it exists with other settings than requested.

    Other reasons have the same code, such as a limit of the vhost; only the text sets them apart.
    """
    return code == PRECONDITION_FAILED and "inequivalent arg" in text


def is_in_use(text: str) -> bool:
    """Whether a refusal is about another consumer's exclusive access, not about permissions."""
    return _EXCLUSIVE in text


def may_be_used(exchange: Exchange, code: int, text: str) -> bool:
    """Whether an exchange that exists with other arguments can be used as it is.

    An alternate exchange, for example, is the operator's decision. RabbitMQ compares the type first
    (assert_equivalence in rabbit_exchange.erl).
    """
    another_type = "inequivalent arg 'type'" in text
    return is_different(code, text) and not another_type and not exchange.strict


def read_error(queue: str, code: int, text: str) -> DomainEventsError:
    """Why this queue cannot be read."""
    text = _shown(text)
    if code == NOT_FOUND:
        if "no queue" in text:
            who = "a subscriber with retries" if queue.endswith(".undelivered") else "a subscriber"
            return TopologyError(
                f"There is no queue {queue!r}: {who} declares it when it registers. Check "
                "the name, and the broker and the vhost in the URL."
            )
        return BrokerUnavailable(f"The queue {queue!r} cannot be reached: {text}.")
    if code == ACCESS_REFUSED:
        return read_permission_error(text)
    if code == RESOURCE_LOCKED:
        return ResourceLocked(f"The queue {queue!r} is exclusive to another connection: {text}.")
    return TopologyError(f"The queue {queue!r} cannot be read: {text}.")


def read_permission_error(text: str) -> DomainEventsError:
    """This user may not consume from a queue, nor browse it."""
    text = _shown(text)
    if _EXCLUSIVE in text:
        return TopologyError(
            f"The queue cannot be read: {text}. Another consumer has exclusive access; stop that "
            "one, or let it consume without its exclusive flag."
        )
    return ConfigurationError(
        f"This user may not read from the queue: {text}. It requires the permission read on it; "
        "with some releases of RabbitMQ, counting its messages also requires configure."
    )


def write_error(message: Message, text: str) -> DomainEventsError:
    """This user may not publish there."""
    text = _shown(text)
    exchange, routing_key = address(message.destination, message.routing_key)
    exchange = exchange or DEFAULT_EXCHANGE
    if _INTERNAL in text:
        return TopologyError(
            f"Nobody can publish to the exchange {exchange!r}: {text}. It was declared as "
            "internal, for messages from other exchanges only; publish to one of these, or to "
            "another exchange (exchange=...)."
        )
    if _TOPIC in text:
        return ConfigurationError(
            f"This user may not publish {routing_key!r} to the exchange {exchange!r}: "
            f"{text}. {_TOPIC_WAY}"
        )
    return ConfigurationError(
        f"This user may not write to the exchange {exchange!r}: {text}. It requires the permission "
        "write on it."
    )


def unroutable_error(message: Message) -> DomainEventsError:
    """No queue is bound for it."""
    exchange, routing_key = address(message.destination, message.routing_key)
    return EventUnroutable(
        f"No queue is bound to the exchange {exchange!r} for the routing key {routing_key!r}."
    )


def missing_exchange_error(message: Message, text: str) -> DomainEventsError:
    """There is no exchange to publish it to."""
    exchange, _ = address(message.destination, message.routing_key)
    return TopologyError(
        f"The exchange {exchange!r} does not exist: {_shown(text)}. Register a subscriber "
        "on it, or give this user the permission configure on it, so that it is declared."
    )


def no_channel_error(text: str) -> BrokerUnavailable:
    """The connection, or its user, has as many channels as it may."""
    return BrokerUnavailable(
        f"No channel is free: {_shown(text)}. Each subscriber of a connection needs one, register "
        "briefly one more; allow more (channel_max in the URL and in the broker's settings, "
        "max-channels of the user), or run the subscribers in several processes."
    )


def closed_error() -> BrokerUnavailable:
    """A request was made on a connection that this program has closed."""
    return BrokerUnavailable("The connection was closed by this program.")


def encode_error(message: Message, error: Exception) -> DomainEventsError:
    """The error of a message that cannot be encoded."""
    invalid = InvalidEvent(f"{_event(message)} cannot be sent over AMQP: {printable(error)}")
    invalid.__cause__ = error
    return invalid


def nacked_error(message: Message) -> DomainEventsError:
    """The error of a message that the broker has refused."""
    return EventRejected(
        f"The broker refused {_event(message)}; one of its queues may be at its length limit, or "
        "unavailable."
    )


def publish_error(message: Message, code: int, reason: BaseException | None) -> DomainEventsError:
    """The error of a message over which the broker has closed the channel or the connection."""
    text = explain(reason)
    what = f"{_event(message)} ({len(message.body):,} bytes)"
    error: DomainEventsError
    if code == ACCESS_REFUSED:
        error = write_error(message, text)
    elif code == NOT_FOUND:
        error = missing_exchange_error(message, text)
    elif code == PRECONDITION_FAILED:
        error = InvalidEvent(f"The broker does not accept {what}: {text}.")
    else:
        error = EventNotConfirmed(f"The channel was closed twice over {what}: {text}.")
    error.__cause__ = reason
    return error


def _event(message: Message) -> str:
    return repr(message.routing_key)


def _shown(text: str) -> str:
    # It may contain names from other programs.
    return printable(text, 400)


def _described(declaration: Declaration) -> tuple[str, str]:
    if isinstance(declaration, Exchange):
        requested = f"durable, type {declaration.type!r}, {dict(declaration.arguments)}"
        return f"The exchange {declaration.name!r}", requested
    if isinstance(declaration, Queue):
        flags = ("durable", "exclusive", "auto_delete")
        chosen = ", ".join(flag for flag in flags if getattr(declaration, flag))
        return f"The queue {declaration.name!r}", f"{chosen}, {dict(declaration.arguments)}"
    assert isinstance(declaration, Binding | Unbinding)
    what = f"The binding of {declaration.destination!r} to the exchange {declaration.exchange!r}"
    return f"{what} by {declaration.binding_key!r}", ""


def _permissions(declaration: Declaration) -> str:
    """The permissions it requires; RabbitMQ names the missing one only from 4.0 on."""
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
        f"{onward or DEFAULT_EXCHANGE!r}, to which it forwards"
    )


# --- connections ---------------------------------------------------------------------------------

# The reply codes of a refused login, and of a refused vhost.
LOGIN_REFUSED = 403
_NOT_ALLOWED = 530

# RabbitMQ closes with NOT_ALLOWED for transient and for permanent reasons, so the text decides. Of
# 3.10, 4.0 and 4.3 (deps/rabbit/src/rabbit_reader.erl and rabbit_access_control.erl in
# https://github.com/rabbitmq/rabbitmq-server):
#
#   vhost V not found                                              a mistake
#   access to vhost V refused for user U                           permissions may be granted yet
#   access to vhost V refused for user U: connection limit (N) is reached           others may go
#   connection refused for user U: user connection limit (N) is reached             others may go
#   connection refused: node connection limit (N) is reached                        others may go
#
# (A vhost that is down is INTERNAL_ERROR.) Only the beginning: a long name truncates the end.
_NO_SUCH_VHOST = re.compile(r"NOT_ALLOWED - vhost ")

# OpenSSL's names of the alerts with which the broker refuses the client's certificate. With TLS 1.3
# they come when the handshake is over for the client. The connection may break before one is read.
_CERTIFICATE_ALERT = re.compile(r"\w*ALERT_\w*(?:CERTIFICATE|UNKNOWN_CA)\w*")

# What pika raises when a server uses another protocol.
_FOREIGN = (
    pika.exceptions.IncompatibleProtocolError,
    pika.exceptions.ProtocolSyntaxError,
    pika.exceptions.ProtocolVersionMismatch,
    pika.exceptions.UnexpectedFrameError,
)


def explain(error: BaseException | None) -> str:
    """Why a connection failed or was lost, in one line for a user."""
    cause = _innermost(error)
    code = _closed_by_broker(cause)
    if code is not None:
        return f"closed by the broker: {printable(code[1])} ({code[0]})"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    if isinstance(cause, pika.exceptions.AMQPHeartbeatTimeout):
        return "the broker did not answer (missed heartbeats)"
    if isinstance(cause, pika.exceptions.StreamLostError):
        return "the connection broke"
    if isinstance(cause, _FOREIGN):
        # A proxy that is up before its broker is causes this, too, so it may be transient.
        return (
            "it does not use AMQP 0-9-1 (perhaps another port, or it expects TLS, hence "
            "amqps://, or a client's certificate)"
        )
    if isinstance(cause, pika.exceptions.NoFreeChannels):
        return "no channel is free on this connection"
    if isinstance(cause, _PROBABLE):
        return "it closed the connection during the login"
    if isinstance(cause, ssl.SSLError):
        return f"TLS failed ({cause.reason or cause}); perhaps it is not a TLS port"
    if isinstance(cause, socket.gaierror):
        return f"the host name cannot be resolved ({cause.strerror})"
    if isinstance(cause, OSError):
        return printable(cause.strerror or cause) or type(cause).__name__
    return printable(cause) or type(cause).__name__


def permanent_reason(error: BaseException, *, was_connected: bool) -> str | None:
    """Why no retry can help; None if one may.

    A missing vhost or an untrusted certificate is a mistake at the first connection; after one that
    has worked, it is an outage like others. A refused password is always final: retries lock
    accounts.
    """
    cause = _innermost(error)
    code, words = _closed_by_broker(cause) or (0, "")
    if code == LOGIN_REFUSED:
        return "user or password is wrong (and 'guest' may log in from the broker's machine only)"
    if was_connected:
        return None
    if code == _NOT_ALLOWED and _NO_SUCH_VHOST.match(words):
        return f"the vhost does not exist ({printable(words)})"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({cause.verify_message})"
    if isinstance(cause, ssl.SSLError) and _CERTIFICATE_ALERT.fullmatch(cause.reason or ""):
        return f"TLS is refused ({cause.reason}); does it require another client certificate?"
    return None


def close_code(error: BaseException | None) -> int:
    """The reply code with which the broker closed a channel or connection; 0 if it did not."""
    found = _closed_by_broker(_innermost(error))
    return found[0] if found else 0


def _innermost(error: BaseException | None) -> BaseException | None:
    """The error that pika's connection workflow has wrapped, of its last attempt."""
    while True:
        following: BaseException | None = None
        if exceptions := getattr(error, "exceptions", None):
            following = exceptions[-1]
        elif isinstance(wrapped := getattr(error, "exception", None), BaseException):
            following = wrapped
        if following is None:
            return error
        error = following


_PROBABLE = (
    pika.exceptions.ProbableAuthenticationError,
    pika.exceptions.ProbableAccessDeniedError,
)

_CLOSED = (pika.exceptions.ConnectionClosedByBroker, pika.exceptions.ChannelClosedByBroker)


def _closed_by_broker(cause: BaseException | None) -> tuple[int, str] | None:
    if isinstance(cause, _CLOSED):
        return cause.reply_code, printable(cause.reply_text, 255)
    return None
