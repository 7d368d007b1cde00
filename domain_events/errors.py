"""What can go wrong, as one tree.

::

    DomainEventsError
    ├── InvalidEvent          this event can never be sent as it is; nothing was sent
    ├── BrokerUnavailable     no broker in time; surely not sent
    ├── EventNotConfirmed     sent, but not confirmed in time; perhaps the broker has it
    ├── EventRejected         the broker said no; at least one queue does not have the event
    ├── EventUnroutable       nobody listens (only with ``mandatory``)
    ├── TopologyError         a queue or an exchange is not as it is asked for
    └── ConfigurationError    wrong settings: address, password, permission, option

After `BrokerUnavailable` a caller may publish the event again and it happens once. After
`EventNotConfirmed` it should publish *the same* event again (``error.event``): the id is the
same, so that a subscriber can tell.

``Retry`` and ``Reject`` (`domain_events.retry`) are not here: a handler raises them to say
something; they are not errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from domain_events.events import DomainEvent


class DomainEventsError(Exception):
    """The root of every error of this library."""

    #: The event this is about, where it is about one.
    event: DomainEvent | None = None

    #: What ``publish_many`` had taken and not seen confirmed when it raised this, oldest first.
    unconfirmed: Sequence[DomainEvent] = ()

    #: Those of ``unconfirmed`` that may be stored, in a queue at least; the others surely are not.
    perhaps: Sequence[DomainEvent] = ()

    #: How many events ``publish_many`` had read from its iterable; the rest it has not taken.
    taken: int = 0

    #: How many of them are confirmed: all but the ``unconfirmed``.
    published: int = 0


class InvalidEvent(DomainEventsError):
    """The event cannot be an event: data that is not JSON, a bad routing key, too large."""


class BrokerUnavailable(DomainEventsError):
    """No broker could be reached within the deadline; nothing was sent."""


class EventNotConfirmed(DomainEventsError):
    """The event was sent and no confirm came within the deadline; perhaps it was stored."""


class EventRejected(DomainEventsError):
    """The broker refused the event, for example because a queue is at its length limit.

    Other queues that it was bound for may have it.
    """


class EventUnroutable(DomainEventsError):
    """The event was published with ``mandatory`` and no queue is bound for its routing key."""


class TopologyError(DomainEventsError):
    """A queue or an exchange exists otherwise than asked for, or is missing, or is taken."""


class ConfigurationError(DomainEventsError):
    """Settings that cannot work: a malformed URL, a wrong password, an option that clashes."""
