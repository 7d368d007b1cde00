"""What an operator does with a broker's queues, exchanges and bindings, one request at a time.

For the command ``domain-events``. Everything is done over AMQP with the operator's own permissions;
bindings can be made and removed this way, but not listed. Messages are none of its business.

Each request may be repeated after a reconnect, so each has the same effect when done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from pika.channel import Channel
from pika.spec import Basic

from domain_events import settings
from domain_events.broker.rabbitmq.channel import Channels
from domain_events.broker.rabbitmq.errors import (
    ACCESS_REFUSED,
    NOT_FOUND,
    PRECONDITION_FAILED,
    close_code,
    closed_error,
    explain,
    is_different,
    is_in_use,
    read_error,
)
from domain_events.broker.rabbitmq.link import Link
from domain_events.broker.rabbitmq.nodes import Nodes, check
from domain_events.broker.rabbitmq.permissions import Permission, probe
from domain_events.broker.rabbitmq.requests import Refused, Requests, Work
from domain_events.broker.rabbitmq.topology import (
    Binding,
    Declaration,
    Exchange,
    Queue,
    Topology,
)
from domain_events.broker.rabbitmq.transport import Connection
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    TopologyError,
)
from domain_events.settings import DEFAULT, ConnectionSettings
from domain_events.text import printable

_CLOSE_TIMEOUT = 10.0


@dataclass(frozen=True)
class QueueState:
    """A queue's state, as a passive declaration reports it."""

    #: Messages that are ready, without those that consumers hold.
    messages: int
    consumers: int


class Comparison(Enum):
    """How a declaration compares with what exists on the broker."""

    SAME = "same"
    MISSING = "missing"
    DIFFERENT = "different"
    #: AMQP cannot show it, as with bindings, or this user may not see it.
    UNKNOWN = "unknown"


class Administration:
    """A connection for an operator; made at the first request. To be closed, or used in ``with``.

    Every method raises `BrokerUnavailable` if there is no broker within ``timeout`` seconds, and
    `ConfigurationError` when the settings cannot work or the user lacks a permission.

    :param connection_settings: an AMQP URL, or several.
    :param timeout: seconds within which the broker must answer each request.
    """

    def __init__(
        self, connection_settings: ConnectionSettings = DEFAULT, *, timeout: float = 10.0
    ) -> None:
        connection_settings = settings.masked(connection_settings)
        urls = settings.resolve(connection_settings)
        if urls is None or not all(url.lower().startswith("amqp") for url in urls):
            raise ConfigurationError(
                "Only a RabbitMQ has queues to administer: give its URL, amqp:// or amqps://."
            )
        check(urls)
        self.urls = urls
        self._timeout = timeout
        self._link = Link(Nodes(urls), "administration", self)
        self.forget()

    def forget(self) -> None:
        """Reset all state (at first, and in the child of a fork)."""
        self._channels = Channels(self._link)
        self._requests = Requests(self._link, self._channels)
        #: Why the broker has stopped to read from this connection, an alarm; see `refusal`.
        self.blocked = ""

    def __enter__(self) -> Administration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._link.close(_CLOSE_TIMEOUT)
        self._requests.fail(closed_error())

    # --- looking ---------------------------------------------------------------------------------

    @property
    def server(self) -> Mapping[str, Any]:
        """What the broker states about itself: ``product``, ``version``, ``cluster_name``."""

        def look(_channel: Channel, done: Callable[[object], None]) -> None:
            connection = self._link.connection
            done(dict((connection and connection.server_properties) or {}))

        found: Mapping[str, Any] = self._do(look)
        return found

    @property
    def cluster(self) -> str:
        """The cluster's name; empty if the broker does not state it."""
        return str(self.server.get("cluster_name", ""))

    def queue(self, name: str) -> QueueState | None:
        """The queue of that name; None if there is none.

        :raises TopologyError: it is exclusive to another connection, or cannot be reached.
        """
        try:
            frame = self._do(
                lambda channel, done: channel.queue_declare(name, passive=True, callback=done),
                lambda _error, reason: _read_error(name, reason),
            )
        except _Missing:
            return None
        return QueueState(int(frame.method.message_count), int(frame.method.consumer_count))

    def is_empty(self, name: str) -> bool:
        """Whether no message is ready in the queue, for sure.

        `queue` gives 0 for a quorum queue without a leader (``stat`` in rabbit_quorum_queue.erl);
        only the leader answers this.
        """

        def work(channel: Channel, done: Callable[[object], None]) -> None:
            channel.add_callback(lambda _frame: done(True), [Basic.GetEmpty])
            # Not acked: it is requeued as the channel is closed.
            channel.basic_get(name, lambda *_: done(False))

        return bool(self._do(work, lambda _error, reason: _read_error(name, reason)))

    def has_exchange(self, name: str) -> bool:
        """Whether there is an exchange of that name."""
        try:
            self._do(
                lambda channel, done: channel.exchange_declare(name, passive=True, callback=done),
                lambda error, reason: _missing_or(error, reason, f"The exchange {name!r}"),
            )
        except _Missing:
            return False
        return True

    def compare(self, declaration: Declaration) -> tuple[Comparison, str]:
        """How it compares with what exists, and in which way it is different; creates nothing.

        Comparing takes the permission to declare it, and is unknown without.
        """
        try:
            if isinstance(declaration, Queue):
                exists = self.queue(declaration.name) is not None
            elif isinstance(declaration, Exchange):
                exists = self.has_exchange(declaration.name)
            else:
                return Comparison.UNKNOWN, "AMQP does not show bindings"
            if not exists:
                return Comparison.MISSING, ""
            self._do(lambda _channel, done: done(None), _comparison_error, [declaration])
        except _Different as difference:
            return Comparison.DIFFERENT, str(difference)
        except ConfigurationError as error:
            return Comparison.UNKNOWN, str(error)
        return Comparison.SAME, ""

    def refusal(self, permission: Permission) -> str:
        """What the broker answers to a user without this permission; empty if the user has it.

        Changes nothing; see `permissions`. To probe ``write`` on an exchange is to publish, as far
        as the broker is concerned: during an alarm it blocks the connection, which can then not be
        used any more (`blocked`).
        """
        send = probe(permission)

        def work(channel: Channel, done: Callable[[object], None]) -> None:
            # The broker sends this before its answer.
            channel.connection.add_on_connection_blocked_callback(
                self._link.guarded(self._on_blocked)
            )
            send(channel, done)

        try:
            self._do(work, _permission_error)
        except _Refused as refusal:
            return str(refusal)
        except _Permitted:
            pass
        return ""

    # --- changing --------------------------------------------------------------------------------

    def declare(self, declarations: Topology) -> None:
        """Declare all of this.

        :raises TopologyError: something exists with other arguments.
        """
        self._requests.call(partial(self._requests.declare, declarations), self._timeout)

    def bind(self, queue: str, exchange: str, binding_key: str) -> None:
        """Bind the queue to the exchange by this key."""
        self.declare([Binding(exchange, queue, binding_key)])

    def unbind(self, queue: str, exchange: str, binding_key: str) -> None:
        """Remove a binding; one that does not exist is not an error."""
        self._do(
            lambda channel, done: channel.queue_unbind(queue, exchange, binding_key, callback=done),
            lambda error, reason: _missing_or(error, reason, f"The binding of {queue!r}"),
        )

    def delete_queue(
        self, name: str, *, if_empty: bool = True, if_unused: bool = True, own_consumers: int = 0
    ) -> None:
        """Delete it; one that does not exist is not an error.

        :param own_consumers: how many consumers are the caller's, and do not count as its use.

        Both are checked here and not by the broker, since a quorum queue supports neither
        (NOT_IMPLEMENTED on 3.10 and on 4.3). So unbind the queue before.

        :raises TopologyError: it has messages or consumers, and was to have none.
        :raises BrokerUnavailable: the connection was lost meanwhile, and it is perhaps deleted. It
            is not tried again, since another program may have declared the queue anew.
        """
        state = self.queue(name)
        if state is None:
            return
        if (if_empty and state.messages) or (if_unused and state.consumers > own_consumers):
            raise TopologyError(
                f"The queue {name!r} is not deleted: it has {state.messages} messages and "
                f"{state.consumers} consumers."
            )
        self._delete_once(name)

    def delete_classic(self, name: str) -> bool:
        """Delete a classic queue, unless it has messages or consumers; the broker checks both.

        :returns: whether it was done, or it did not exist.
        :raises BrokerUnavailable: see `delete_queue`.
        """
        try:
            self._delete_once(name, if_unused=True, if_empty=True)
        except _InUse:
            return False
        return True

    def _delete_once(self, name: str, **conditions: bool) -> None:
        tried = False

        def work(channel: Channel, done: Callable[[object], None]) -> None:
            nonlocal tried
            if tried:
                done(False)
                return
            tried = True
            channel.queue_delete(name, callback=lambda _frame: done(True), **conditions)

        if not self._do(work, partial(_deletion_error, name)):
            raise BrokerUnavailable(
                f"The connection was lost while the queue {name!r} was being deleted; check "
                "whether it still exists."
            )

    def replace_classic(self, queue: Queue, *, if_unused: bool) -> bool:
        """Delete the classic queue of that name if it is empty, and declare this one at once.

        The broker itself checks that it is empty, and unused. It refuses this for a quorum queue,
        so that one which is there already is never deleted.

        :returns: whether it was done; otherwise check what there is.
        """
        tried = False

        def work(channel: Channel, done: Callable[[object], None]) -> None:
            nonlocal tried
            if tried:  # the connection was lost meanwhile: perhaps it was done
                done(False)
                return
            tried = True
            # Without a callback there is no reply, so that nothing is sent in between.
            channel.queue_delete(queue.name, if_unused, True)
            channel.queue_declare(
                queue.name,
                durable=True,
                arguments=dict(queue.arguments),
                callback=lambda _frame: done(True),
            )

        try:
            return bool(self._do(work))
        except TopologyError:
            return False

    def delete_exchange(self, name: str) -> None:
        """Delete it, unless something is bound to it; one that does not exist is not an error.

        :raises TopologyError: something is bound to it.
        """
        self._do(
            lambda channel, done: channel.exchange_delete(name, if_unused=True, callback=done),
            lambda error, reason: (
                TopologyError(f"The exchange {name!r} is in use: {explain(reason)}")
                if close_code(reason) == PRECONDITION_FAILED
                else error
            ),
        )

    # --- the I/O thread --------------------------------------------------------------------------

    def opened(self, _connection: Connection) -> None:
        """There is a connection: perform waiting requests."""
        self._requests.perform()

    def lost(self, _error: BaseException | None) -> None:
        """The connection is gone; requests are repeated on the next one."""
        self._channels.lost()
        self._requests.lost()

    def refused(self, error: ConfigurationError) -> None:
        """No connection can be made: all waiting requests fail with the error."""
        self._requests.fail(error)

    def _on_blocked(self, _connection: object, frame: Any) -> None:
        self.blocked = printable(frame.method.reason) or "an alarm"

    # --- private ---------------------------------------------------------------------------------

    def _do(
        self,
        work: Work,
        refused: Refused = lambda error, reason: _missing_or(error, reason, "It"),
        declarations: Topology = (),
    ) -> Any:
        return self._requests.call(
            lambda answer: self._requests.on_channel(answer, work, declarations, refused),
            self._timeout,
        )


class _Missing(TopologyError):
    """It does not exist."""


class _InUse(TopologyError):
    """It has messages or consumers."""


class _Different(TopologyError):
    """It exists with other arguments."""


class _Refused(ConfigurationError):
    """The user lacks the permission."""


class _Permitted(TopologyError):
    """The request failed for another reason than the user's permissions."""


def _permission_error(error: DomainEventsError, reason: BaseException) -> DomainEventsError:
    code, text = close_code(reason), printable(explain(reason), 400)
    if code == ACCESS_REFUSED and not is_in_use(text):
        return _Refused(text)
    return _Permitted(text) if code else error


def _read_error(name: str, reason: BaseException) -> DomainEventsError:
    code, text = close_code(reason), explain(reason)
    error = read_error(name, code, text)
    if code == NOT_FOUND and not isinstance(error, BrokerUnavailable):
        return _Missing(str(error))
    return error


def _missing_or(error: DomainEventsError, reason: BaseException, what: str) -> DomainEventsError:
    code, text = close_code(reason), printable(explain(reason), 400)
    if code == NOT_FOUND:
        return _Missing(f"{what} does not exist: {text}")
    if code == ACCESS_REFUSED:
        return ConfigurationError(f"{what} may not be used by this user: {text}")
    return error


def _deletion_error(
    name: str, error: DomainEventsError, reason: BaseException
) -> DomainEventsError:
    if close_code(reason) == PRECONDITION_FAILED:
        return _InUse(f"The queue {name!r} is not deleted: {printable(explain(reason), 400)}.")
    return _missing_or(error, reason, f"The queue {name!r}")


def _comparison_error(error: DomainEventsError, reason: BaseException) -> DomainEventsError:
    text = printable(explain(reason), 400)
    return _Different(text) if is_different(close_code(reason), text) else error
