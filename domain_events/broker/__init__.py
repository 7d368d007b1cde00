"""What carries messages: the protocol that every broker keeps.

A broker makes two kinds of connection, each with an owner of its own. Publishing and consuming
do not share one, since RabbitMQ stops reading from connections that publish while it is short
of memory, and acks must still pass.

Everything here may be called from any thread, and nothing blocks without a deadline. Callbacks
come on a thread of the broker's: they must be short and must not call what blocks.

After a fork the child has connections that are as new; what was under way belongs to the parent.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from domain_events.errors import ConfigurationError, DomainEventsError
from domain_events.message import Delivery, Message
from domain_events.settings import shown
from domain_events.topology import Topology


class Publication:
    """One message on its way, and what is to be called when its fate is known.

    ``on_done`` is called once, when ``done`` is true and ``error`` says what became of it: None
    when the broker has confirmed the message, else an error of this publication's own that says
    whether the message was surely or perhaps not stored. After `Publishing.withdraw` it is not
    called.

    :param awaited: whether a thread waits for it. None of the broker's own threads may: a finalizer
        that publishes there gets an error.
    """

    __slots__ = (
        "awaited",
        "done",
        "error",
        "message",
        "nacks",
        "on_done",
        "sent",
        "sent_at",
        "size",
        "strikes",
    )

    def __init__(
        self, message: Message, on_done: Callable[[Publication], None], *, awaited: bool = True
    ) -> None:
        self.message = message
        self.awaited = awaited
        self.size = len(message.body)
        self.on_done = on_done
        self.done = False
        self.error: DomainEventsError | None = None
        self.sent = False  # ever handed to a connection, whatever became of it
        self.sent_at = 0.0
        self.nacks = 0  # how often the broker refused it
        self.strikes = 0  # how often the broker closed the channel over this one

    def let_go(self) -> None:
        """Nobody waits for it any more: keep what a confirm needs, and no body, no callback.

        It may still be in flight, and stay so for as long as a broker is silent.
        """
        self.message = replace(self.message, body=b"")
        self.on_done = _ignore


def _ignore(_publication: Publication) -> None:
    """The callback of a publication that nobody waits for."""


class Publishing(Protocol):
    """A connection that publishes with confirms."""

    @property
    def trouble(self) -> str:
        """Why nothing goes through now, in words for a user; empty if nothing is known."""

    def submit(self, publication: Publication) -> None:
        """Send this behind all before it, as soon as there is a connection and room in its window.

        What was not confirmed when a connection is lost is sent again on the next. When this
        connection is closed, it is done at once, with an error.
        """

    def withdraw(self, publication: Publication) -> bool:
        """Give a publication up; ``publication.sent`` is then final. False: it is done already."""

    def close(self, timeout: float) -> None:
        """Take no more, wait for what is under way, then close, in about ``timeout`` seconds."""

    def close_soon(self) -> bool:
        """Close without waiting; may be called by a finalizer. False: nothing was open."""


class Settlement(Enum):
    """What is to become of a delivery."""

    #: It is done with: out of the queue.
    DONE = "done"
    #: Back into the queue; nothing was the matter with it.
    GIVE_BACK = "give back"
    #: Back into the queue, which counts it as a failed delivery, towards its limit.
    FAILED = "failed"


class Consumer(Protocol):
    """A subscriber's queue being consumed, again and again, over every trouble."""

    def is_current(self, delivery: Delivery) -> bool:
        """Whether the delivery can still be settled; else it has gone back to the queue."""

    def settle(self, delivery: Delivery, how: Settlement = Settlement.DONE) -> None:
        """Settle the delivery; the broker learns of it soon, with `flush` at once.

        One that is not current is passed over: its tag died with its channel.
        """

    def flush(self) -> None:
        """Have everything settled so far sent to the broker now."""

    def repair(self, seconds: float, then: Callable[[bool], None], also: Topology = ()) -> None:
        """Declare the topology again, and ``also``; call ``then`` after a pause.

        ``then`` is called on the broker's thread, with whether all of it exists now; not at all
        once this consumer's connection is closed.
        """

    def stop(self, timeout: float) -> None:
        """Take no more deliveries; those taken can still be settled."""


class Browser(Protocol):
    """A look at a queue's messages one after the other; what is not acked stays in it."""

    def next(self, timeout: float) -> Delivery | None:
        """The next message not seen by this browser, or None when there is none."""

    def ack(self, delivery: Delivery, timeout: float) -> None:
        """Take the message out of the queue.

        :raises BrokerUnavailable: the connection was lost; the message is in the queue again.
        """

    def rewind(self) -> None:
        """Give back all that was not acked; `next` then sees it again.

        A quorum queue puts it in front, but behind what was given back before.
        """

    def close(self, timeout: float) -> None:
        """Give back all that was not acked, and end."""


class Consuming(Protocol):
    """A connection that declares, consumes and browses.

    What blocks raises `BrokerUnavailable` when there is no broker within ``timeout`` seconds,
    `ConfigurationError` when the settings cannot work, `TopologyError` where the broker's
    queues and exchanges stand against it.
    """

    def declare(self, topology: Topology, timeout: float) -> None:
        """Make sure that all of this exists."""

    def delete(self, topology: Topology, timeout: float) -> None:
        """Delete the queues and exchanges among this, with all that is in them."""

    def count(self, queue: str, timeout: float) -> int:
        """How many messages are ready in the queue."""

    def consume(
        self,
        queue: str,
        topology: Topology,
        prefetch_count: int,
        deliver: Callable[[Delivery, Consumer], None],
        *,
        careful: bool = False,
    ) -> Consumer:
        """Start to consume; ``topology`` is what to declare again after any trouble.

        :param prefetch_count: how many deliveries may be unsettled at a time, at most.
        :param careful: begin, also after each trouble, with one at a time, until one arrives that
            was never delivered before. For what comes again may have killed the process that held
            it, and whatever is held beside it would share its fate.
        """

    def browse(self, queue: str, timeout: float) -> Browser:
        """Look at the messages of a queue."""

    def failure(self) -> DomainEventsError | None:
        """Why this connection has given up for good, if it has."""

    def close(self, timeout: float) -> None:
        """Tell the broker all that was settled, then close. Ends in about ``timeout`` seconds."""

    def close_soon(self) -> bool:
        """Close without waiting; may be called by a finalizer. False: nothing was open."""


def close_dropped(owner: object, *connections: Publishing | Consuming | None) -> None:
    """What a finalizer does for connections that ``owner`` was dropped with: close, and warn.

    At the interpreter's end nothing is done: whoever keeps a connection that long may.
    """
    if sys.is_finalizing():
        return
    # All of them, before a warning that may be an exception.
    closed = [each.close_soon() for each in connections if each is not None]
    if any(closed):
        warnings.warn(
            f"unclosed {owner!r}: it was dropped with an open connection. Call its close(), or "
            "use it in a with statement.",
            ResourceWarning,
            stacklevel=3,
            source=owner,
        )


class Broker(Protocol):
    """A place that takes domain events and hands them out."""

    def publishing(self, declare: Topology, name: str) -> Publishing:
        """A connection to publish on. ``declare``: exchanges to declare, if this user may."""

    def consuming(self, name: str, on_failure: Callable[[], None]) -> Consuming:
        """A connection to consume on. ``on_failure`` is called when it has given up for good."""


@dataclass(frozen=True)
class _Scheme:
    names: tuple[str, ...]
    load: Callable[[tuple[str, ...]], Broker]


def _rabbitmq(urls: tuple[str, ...]) -> Broker:
    # Here and not above: whoever only needs the protocol need not load pika.
    from domain_events.broker.rabbitmq import RabbitMQ  # noqa: PLC0415

    return RabbitMQ(urls)


def _memory(urls: tuple[str, ...]) -> Broker:
    from domain_events.broker.memory import Memory  # noqa: PLC0415

    return Memory(urls)


_SCHEMES = (_Scheme(("amqp", "amqps"), _rabbitmq), _Scheme(("memory",), _memory))


def connect(urls: tuple[str, ...]) -> Broker:
    """The broker behind the URLs; no connection is made yet.

    :raises ConfigurationError: when there is none of that kind.
    """
    schemes = {url.partition("://")[0].lower() if "://" in url else "" for url in urls}
    for scheme in _SCHEMES:
        if schemes <= set(scheme.names):
            return scheme.load(urls)
    known = ", ".join(f"{name}://" for scheme in _SCHEMES for name in scheme.names)
    raise ConfigurationError(
        f"No broker is known for {', '.join(map(shown, urls))}: a broker's URL starts with {known}"
        + (", and several URLs with the same." if len(urls) > 1 else ".")
    )
