"""What can go wrong, as one tree.

::

    DomainEventsError
    ├── InvalidEvent          this event can never be sent as it is; nothing was sent
    ├── BrokerUnavailable     no broker in time; definitely not sent
    ├── EventNotConfirmed     sent, but not confirmed in time; the broker may have it
    ├── EventRejected         the broker refused it; at least one queue does not have the event
    ├── EventUnroutable       no queue is bound for it (only with ``mandatory``)
    ├── TopologyError         a queue or an exchange is missing, or has other settings
    └── ConfigurationError    wrong settings: address, password, permission, option

After `BrokerUnavailable` a caller may publish the event again without a duplicate. After
`EventNotConfirmed` it should publish *the same* event again (``error.event``): the id is the
same, so that a subscriber can recognize it.

``Retry`` and ``Reject`` (`domain_events.retry`) are not here: they are signals that a
handler raises, not errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import domain_events


class DomainEventsError(Exception):
    """The root of every error of this library."""

    #: The event that failed, if the error concerns one event.
    event: domain_events.DomainEvent | None = None

    #: The events that ``publish_many`` had taken and that were not confirmed, oldest first.
    unconfirmed: Sequence[domain_events.DomainEvent] = ()

    #: Those of ``unconfirmed`` that may be stored in a queue; the others surely are not.
    perhaps: Sequence[domain_events.DomainEvent] = ()

    #: How many events ``publish_many`` had read from its iterable.
    taken: int = 0

    #: How many of them are confirmed: all but the ``unconfirmed``.
    published: int = 0


class InvalidEvent(DomainEventsError):
    """The event can never be sent: data that is not JSON, a bad routing key, too large a body."""


class BrokerUnavailable(DomainEventsError):
    """No broker could be reached within the deadline; nothing was sent."""


class EventNotConfirmed(DomainEventsError):
    """The event was sent and no confirm came within the deadline; perhaps it was stored."""


class EventRejected(DomainEventsError):
    """The broker refused the event, for example because a queue is at its length limit.

    Other queues that it was routed to may have it.
    """


class EventUnroutable(DomainEventsError):
    """The event was published with ``mandatory`` and no queue is bound for its routing key."""


class TopologyError(DomainEventsError):
    """A queue or an exchange exists with different settings, is missing, or is not available."""


class ConfigurationError(DomainEventsError):
    """Settings that cannot work: a malformed URL, a wrong password, an option that clashes."""
