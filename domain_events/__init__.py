"""Domain events over RabbitMQ: publish facts, subscribe to them, lose none.

::

    publish_domain_event('user.registered', {'user_id': user.id})

    subscriber = Subscriber()
    subscriber.register(handle_user_event, 'print-user-event', ['user.*'])
    subscriber.start_consuming()

To know every guarantee, read in this order: ``events``, ``retry``, ``errors``, ``outcomes``,
``middleware``, ``message``, ``broker`` (the protocol), ``publisher``, ``subscriber`` with
``options`` and ``payloads``, ``worker``, ``handling`` and ``forwarding``, ``dead_letters`` with
``undelivered`` and ``walks``, ``broker.memory`` (a broker that keeps them all). ``broker.rabbitmq``
is how RabbitMQ keeps them. CONTRIBUTING.rst has the map.
"""

from domain_events import safe_path  # isort: skip  # before anything else is imported
from domain_events.dead_letters import (
    DISCARD,
    LEAVE,
    RETRY,
    DeadLetter,
    DeadLetters,
    replay_all,
    replay_event,
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
from domain_events.events import DomainEvent
from domain_events.health import PublisherHealth, SubscriberHealth
from domain_events.middleware import (
    ConnectionChange,
    ConnectionState,
    Middleware,
    Operation,
    Outgoing,
)
from domain_events.outcomes import Delivered, Outcome
from domain_events.publisher import Publisher, close_publishers, publish_domain_event
from domain_events.retry import Backoff, Reject, Retry
from domain_events.settings import DEFAULT, configure
from domain_events.subscriber import Subscriber
from domain_events.text import printable
from domain_events.undelivered import Undelivered, UndeliveredEvent

del safe_path

__version__ = "0.1.0"

__all__ = [
    "DEFAULT",
    "DISCARD",
    "LEAVE",
    "RETRY",
    "Backoff",
    "BrokerUnavailable",
    "ConfigurationError",
    "ConnectionChange",
    "ConnectionState",
    "DeadLetter",
    "DeadLetters",
    "Delivered",
    "DomainEvent",
    "DomainEventsError",
    "EventNotConfirmed",
    "EventRejected",
    "EventUnroutable",
    "InvalidEvent",
    "Middleware",
    "Operation",
    "Outcome",
    "Outgoing",
    "Publisher",
    "PublisherHealth",
    "Reject",
    "Retry",
    "Subscriber",
    "SubscriberHealth",
    "TopologyError",
    "Undelivered",
    "UndeliveredEvent",
    "close_publishers",
    "configure",
    "printable",
    "publish_domain_event",
    "replay_all",
    "replay_event",
]
