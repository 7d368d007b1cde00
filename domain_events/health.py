"""The health of a `Subscriber` or a `Publisher`, as data. Pure.

**Alive** does not depend on the broker: a process that waits for a broker must not be restarted. It
is false when only a restart helps: a handler has run for longer than its own ``handler_limit``, a
connection's thread does not respond, or consuming has ended with an error.

**Ready** depends on the broker. A subscriber is ready when it is connected and the broker delivers
to each of its queues; a publisher, when nothing is known that would keep an event from being
confirmed. A publisher connects with its first event, so it is ready before.

Times are in Unix seconds, durations in seconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

#: Seconds without a response after which a connection's thread is considered dead.
LONGEST_SILENCE = 30.0


@dataclass(frozen=True)
class ConnectionHealth:
    """One connection to the broker."""

    #: ``publishing`` or ``consuming``: a subscriber has one of each.
    purpose: str
    #: The broker's address, without the password; empty before the first attempt to connect.
    address: str = ""
    connected: bool = False
    #: Since when it is connected, or is not; None before the first attempt.
    since: float | None = None
    #: How often it was made again after it was lost.
    reconnects: int = 0
    #: Why the broker accepts nothing at the moment, such as being short of memory.
    blocked: str | None = None
    last_error: str | None = None
    #: When, in Unix seconds.
    last_error_at: float | None = None
    #: For how long its thread has not responded. Each ``health()`` requests a response, which the
    #: next one expects.
    silence: float = 0.0


@dataclass(frozen=True)
class SubscriptionHealth:
    """One subscriber: a name, a queue, a handler."""

    name: str
    #: Since when the broker has accepted the consumer; None while it has not.
    consuming_since: float | None
    #: How many deliveries this process holds: waiting, being handled, or being forwarded.
    unsettled: int
    #: When a handler was last called.
    last_event_at: float | None

    @property
    def consuming(self) -> bool:
        """Whether the broker delivers to it."""
        return self.consuming_since is not None


@dataclass(frozen=True)
class RunningHandler:
    """A handler that runs."""

    subscriber: str
    routing_key: str
    event_id: str | None
    #: For how long.
    seconds: float
    #: The ``handler_limit`` of `~domain_events.Subscriber.register`.
    limit: float | None

    @property
    def is_over_limit(self) -> bool:
        """Whether it has run for longer than its limit."""
        return self.limit is not None and self.seconds > self.limit

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" (handler_limit={self.limit:g})"
        event = f"{self.routing_key} {self.event_id}" if self.event_id else self.routing_key
        return f"{self.subscriber} has been handling {event} for {self.seconds:.1f} s{limit}"


@dataclass(frozen=True)
class _Health:
    _whose: ClassVar[str]

    #: When this was so.
    at: float
    #: ``connection_settings`` is None: nothing is sent or received.
    switched_off: bool
    #: Those that are open.
    connections: tuple[ConnectionHealth, ...]
    #: The last error of any connection, also of one that was closed since.
    last_error: str | None
    #: When, in Unix seconds.
    last_error_at: float | None

    @property
    def connected(self) -> bool:
        """Whether there is a connection, and none that is open is without one at the moment."""
        used = [each for each in self.connections if each.since is not None]
        return bool(used) and all(each.connected for each in used)

    @property
    def reconnects(self) -> int:
        """How often open connections were made again after they were lost."""
        return sum(each.reconnects for each in self.connections)

    @property
    def blocked(self) -> str | None:
        """Why the broker accepts nothing at the moment, such as being short of memory."""
        return next((each.blocked for each in self.connections if each.blocked), None)

    @property
    def not_alive(self) -> tuple[str, ...]:
        """Why only a restart helps, in sentences; empty if it is alive."""
        return tuple(
            f"The thread of the {each.purpose} connection has not responded for "
            f"{each.silence:.0f} s."
            for each in self.connections
            if each.silence > LONGEST_SILENCE
        )

    @property
    def not_ready(self) -> tuple[str, ...]:
        """Why it is not ready, in sentences; empty if it is."""
        return tuple(
            f"{self._whose} has no {each.purpose} connection to {each.address} for "
            f"{max(0.0, self.at - each.since):.0f} s: {each.last_error or 'connecting'}."
            for each in self.connections
            if each.since is not None and not each.connected
        )

    @property
    def alive(self) -> bool:
        """Whether it works, or waits for the broker. False: only a restart helps."""
        return not self.not_alive

    @property
    def ready(self) -> bool:
        """Whether events are received, or can be sent, now."""
        return not self.not_ready

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not alive or not ready, in sentences; empty if it is both."""
        return self.not_alive + self.not_ready

    def as_dict(self) -> dict[str, Any]:
        """All of this for ``json.dumps``."""
        return {
            "alive": self.alive,
            "ready": self.ready,
            "reasons": list(self.reasons),
            "at": self.at,
            "switched_off": self.switched_off,
            "connected": self.connected,
            "blocked": self.blocked,
            "reconnects": self.reconnects,
            "last_error": self.last_error,
            "last_error_at": self.last_error_at,
            "connections": [asdict(each) for each in self.connections],
        }


@dataclass(frozen=True)
class PublisherHealth(_Health):
    """The health of a `Publisher`, from its ``health()``."""

    _whose = "The publisher"

    #: By `Publisher.close`: it publishes nothing any more.
    closed: bool

    @property
    def not_ready(self) -> tuple[str, ...]:
        if self.closed:
            return ("The Publisher was closed.",)
        why = super().not_ready
        if self.blocked:
            why += (f"The broker accepts no events: {self.blocked}.",)
        return why

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "publisher", **super().as_dict(), "closed": self.closed}


@dataclass(frozen=True)
class SubscriberHealth(_Health):
    """The health of a `Subscriber`, from its ``health()``."""

    _whose = "The subscriber"

    #: Whether ``start_consuming`` runs.
    running: bool
    #: Whether it takes no more events, and lets the handlers that run finish.
    stopping: bool
    #: The error with which ``start_consuming`` has ended, if it has.
    ended_by: str | None
    #: Each `~domain_events.Subscriber.register`, in their order.
    subscriptions: tuple[SubscriptionHealth, ...]
    #: The handlers that run, the oldest first.
    handlers: tuple[RunningHandler, ...]
    #: How many deliveries this ``start_consuming`` has handled, whatever became of them.
    handled: int = 0

    @property
    def oldest_handler(self) -> RunningHandler | None:
        """The handler that has run for longest; None if none runs."""
        return self.handlers[0] if self.handlers else None

    @property
    def not_alive(self) -> tuple[str, ...]:
        why = tuple(f"{each}." for each in self.handlers if each.is_over_limit)
        if self.ended_by is not None:
            why += (f"start_consuming() has ended: {self.ended_by}",)
        return why + super().not_alive

    @property
    def not_ready(self) -> tuple[str, ...]:
        if self.switched_off:
            return ("Switched off, since connection_settings is None: no event is received.",)
        if not self.subscriptions:
            return ("Nothing is registered.",)
        if not self.running:
            return ("Not consuming: start_consuming() has not begun, or has ended.",)
        if self.stopping:
            return ("It is stopping: it takes no more events.",)
        why = super().not_ready
        idle = [each.name for each in self.subscriptions if not each.consuming]
        return why + ((f"Not consuming: {', '.join(idle)}.",) if idle else ())

    def as_dict(self) -> dict[str, Any]:
        oldest = self.oldest_handler
        return {
            "kind": "subscriber",
            **super().as_dict(),
            "running": self.running,
            "stopping": self.stopping,
            "ended_by": self.ended_by,
            "subscriptions": [
                {"consuming": each.consuming, **asdict(each)} for each in self.subscriptions
            ],
            "handled": self.handled,
            "running_handlers": len(self.handlers),
            "oldest_handler": None if oldest is None else asdict(oldest),
        }
