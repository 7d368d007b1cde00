"""Publishing to the embedded broker: what is submitted is in the queues at once."""

from __future__ import annotations

from domain_events.broker import Publication, refusals
from domain_events.broker.memory.store import Store
from domain_events.errors import BrokerUnavailable, DomainEventsError
from domain_events.topology import Topology


class MemoryPublishing:
    """See `domain_events.broker.Publishing`."""

    #: Nothing ever stands in the way.
    trouble = ""

    def __init__(self, store: Store, declare: Topology) -> None:
        self._store = store
        self._declare = declare
        self._closed = False

    def submit(self, publication: Publication) -> None:
        """Put the message into every queue that is bound, and say so."""
        if publication.awaited and self._store.is_in_operation():
            # A finalizer or a signal handler, which would wait for what it has interrupted.
            publication.error = BrokerUnavailable(
                "Nothing can be published in the middle of an operation of the embedded broker, by "
                "a finalizer or a signal handler. The event was not sent."
            )
            publication.done = True
            publication.on_done(publication)
            return
        self._store.soon(lambda: self._publish(publication))

    def _publish(self, publication: Publication) -> None:
        if publication.done:
            return
        publication.error = self._error(publication)
        publication.done = True
        publication.on_done(publication)

    def _error(self, publication: Publication) -> DomainEventsError | None:
        if self._closed:
            return refusals.closed()
        try:
            self._store.declare(self._declare, self)
        except DomainEventsError as error:
            return error
        publication.sent = True
        return self._store.publish(publication.message)

    def withdraw(self, publication: Publication) -> bool:
        """Give a publication up; False: it is done already."""

        def give_up() -> bool:
            given_up = not publication.done
            publication.done = True
            return given_up

        return self._store.call(give_up)

    def close(self, timeout: float) -> None:
        """Take no more."""
        self._closed = True

    def close_soon(self) -> bool:
        """There is nothing that could have been left open."""
        return False
