"""The exit statuses, the same for every command; docs/operating.rst lists them."""

from __future__ import annotations

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

OK = 0
#: A check has found something: a difference, a finding. Nothing went wrong.
FOUND = 1
#: The command line, the settings, the password or a permission.
USAGE = 2
#: Stopped before the end: part of it is done.
PARTIAL = 3
#: No broker in time. A publish: the event was surely not sent.
NO_BROKER = 4
#: The event was perhaps sent.
NOT_CONFIRMED = 5
#: The broker refused the event, or no queue is bound for it.
REFUSED = 6
#: The event can never be sent as it is.
INVALID = 7
#: A queue or an exchange is missing, or exists with other arguments.
TOPOLOGY = 8
#: The subscriber cannot be imported.
NOT_IMPORTED = 9
#: Processes crash again and again.
CRASHING = 10
#: The database of an outbox cannot be used.
DATABASE = 11
#: An error of this program itself.
INTERNAL = 70
#: A file, or the standard output, cannot be read or written.
FILE = 74
#: Ended by Ctrl-C, and by SIGTERM.
INTERRUPTED, TERMINATED = 130, 143


class FileFailed(ConfigurationError):
    """A file cannot be written."""


_BY_ERROR: list[tuple[type[DomainEventsError], int]] = [
    (BrokerUnavailable, NO_BROKER),
    (EventNotConfirmed, NOT_CONFIRMED),
    (EventRejected, REFUSED),
    (EventUnroutable, REFUSED),
    (InvalidEvent, INVALID),
    (TopologyError, TOPOLOGY),
    (FileFailed, FILE),
    (ConfigurationError, USAGE),
]


def of(error: DomainEventsError) -> int:
    """The exit status that stands for this error."""
    return next((status for kind, status in _BY_ERROR if isinstance(error, kind)), USAGE)
