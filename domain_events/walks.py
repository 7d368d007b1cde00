"""Walks over a queue in which events wait for a person: what `DeadLetters` and `Undelivered` share.

A walk gets each message that is there once, and holds it: it can be settled until the next walk
begins, and others do not see it. Then all that was not settled is given back, in its order.
Neither the bodies nor anything else of what was passed is kept here.

**A look counts.** Up to RabbitMQ 4.2 whatever is given back to a quorum queue has been delivered
once more, and beyond the queue's delivery limit the broker deletes it. Our own limit is out of
reach, but a policy may lower it, and a queue of another program has the broker's default of 20.
The limit in force cannot be seen over AMQP; how often a message came back can. So before it comes
back too often, everything in the queue is published to it anew: each message is confirmed at the
end of the queue before it is acked at the front. Content and order stay; a crash on the way
duplicates some, and loses none.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

from domain_events import settings, topology
from domain_events.broker import (
    Browser,
    Consuming,
    Publication,
    Publishing,
    close_dropped,
    connect,
)
from domain_events.broker.refusals import Taken
from domain_events.checks import seconds
from domain_events.errors import (
    ConfigurationError,
    DomainEventsError,
    EventNotConfirmed,
    TopologyError,
)
from domain_events.log import Log
from domain_events.message import Delivery, Message
from domain_events.process import check_fork
from domain_events.publisher import confirmed
from domain_events.settings import ConnectionSettings

log = Log("domain_events")

_CLOSE_TIMEOUT = 10.0

# What came back so often is published anew; a delivery limit of 3 still lets it come this once.
_TOO_OFTEN = 3
# How much of it is under way at a time.
_MOST_UNDER_WAY = 100
_MOST_BYTES_UNDER_WAY = 4 * 2**20

_Self = TypeVar("_Self", bound="Walks")


class Walks:
    """Walks over one queue, one at a time, with the connections for it.

    :param queue: its name.
    :param what: what it keeps, for errors and the log.
    """

    def __init__(
        self, queue: str, what: str, connection_settings: ConnectionSettings, timeout: float
    ) -> None:
        connection_settings = settings.masked(connection_settings)
        self._queue = queue
        self._what = what
        self._timeout = seconds(timeout)
        urls = settings.replaced(settings.resolve(connection_settings))
        self._broker = None if urls is None else connect(urls)
        self._consuming: Consuming | None = None
        self._publishing: Publishing | None = None
        self._browser: Browser | None = None
        self._closed = False
        # The number of the current walk; the receipts of what it has passed and is not settled.
        self._walk = 0
        self._held: set[object] = set()

    def count(self) -> int:
        """How many there are, but for those that somebody else's walk holds.

        If somebody else is looking at them just now, a warning in the log says so.

        :raises TopologyError: there is no such queue.
        """
        if self._connection() is None:
            return 0
        if not self._walk:
            # Else it is this walk that was announced, or the warning was given when it began.
            try:
                self._connected().count(self._sign, self._timeout)
            except Taken:
                self._warn_of_another_walk()
            except (TopologyError, ConfigurationError):
                pass  # nobody is, or this user may not know
        return self._count_ready() + len(self._held)

    def close(self) -> None:
        """Give back what is left, and close the connections."""
        self._closed = True
        self._held.clear()
        browser, self._browser = self._browser, None
        consuming, self._consuming = self._consuming, None
        publishing, self._publishing = self._publishing, None
        try:
            if browser is not None:
                browser.close(self._timeout)
        finally:
            if consuming is not None:
                consuming.close(_CLOSE_TIMEOUT)
            if publishing is not None:
                publishing.close(_CLOSE_TIMEOUT)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self, close_dropped: Callable[..., None] = close_dropped) -> None:
        # Without it, the connections and their threads would stay for ever.
        connections = (getattr(self, name, None) for name in ("_consuming", "_publishing"))
        close_dropped(self, *connections)

    def _anew(self, delivery: Delivery) -> Message:
        """The message that puts the same into the queue once more."""
        raise NotImplementedError

    def _deliveries(self) -> Iterator[Delivery]:
        """The messages that are there now, each one once."""
        if self._connection() is None:
            return
        self._walk += 1
        walk = self._walk
        self._begin()
        delivery = self._next(walk)
        if delivery is not None and delivery.failures >= _TOO_OFTEN:
            self._publish_all_anew(delivery)
            delivery = self._next(walk)
        # Those that come while the walk goes on are left for the next one.
        behind = delivery.message_count if delivery is not None else 0
        while delivery is not None:
            self._held.add(delivery.receipt)
            yield delivery
            delivery = self._next(walk) if behind else None
            behind -= 1

    def _begin(self) -> None:
        """Let others see that there is a walk; give back what the last one held."""
        self._held.clear()
        try:
            sign = topology.temporary_queue(self._sign, exclusive=True, auto_delete=False)
            self._connected().declare([sign], self._timeout)
        except Taken:
            self._warn_of_another_walk()
        except (TopologyError, ConfigurationError):
            pass  # this user may not declare it; it is only a sign
        if self._browser is not None:
            browser, self._browser = self._browser, None
            with contextlib.suppress(DomainEventsError):  # if it was lost, all is back
                browser.rewind()
                self._browser = browser
        if self._browser is None:
            self._browser = self._connected().browse(self._queue, self._timeout)

    @property
    def _sign(self) -> str:
        """An exclusive queue that exists while there is a walk."""
        return f"{self._queue}.walk"

    def _warn_of_another_walk(self) -> None:
        log.warning(
            "Somebody else is looking at %s. What that walk holds is not seen or counted here, "
            "until it ends.",
            self._what,
        )

    def _next(self, walk: int) -> Delivery | None:
        if self._browser is None or walk != self._walk:
            raise RuntimeError("This walk is over: another one began, or it was closed.")
        try:
            return self._browser.next(self._timeout)
        except DomainEventsError:
            # Its connection is gone, and all it held is back in the queue.
            self._browser = None
            self._held.clear()
            raise

    def _publish_all_anew(self, delivery: Delivery | None) -> None:
        """See the module's docstring; from this one on, which is the first."""
        assert delivery is not None
        times, left = delivery.failures, delivery.message_count
        under_way: deque[tuple[Publication, threading.Event, Delivery]] = deque()
        size = 0
        try:
            while delivery is not None:
                under_way.append((*self._submit(self._anew(delivery)), delivery))
                size += len(delivery.body)
                while len(under_way) >= _MOST_UNDER_WAY or size > _MOST_BYTES_UNDER_WAY:
                    size -= len(under_way[0][2].body)
                    self._settle_anew(*under_way.popleft(), self._timeout)
                delivery = self._next(self._walk) if left else None
                left -= 1
            while under_way:
                self._settle_anew(*under_way.popleft(), self._timeout)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{self._what} came back {times} times. RabbitMQ counts each look, and deletes "
                "what came back more often than the queue's delivery limit, which cannot be seen "
                "from here. So they must be published to their queue anew before they are looked "
                f"at again, and this user may not: {error}"
            ) from error
        finally:
            # When it was broken off: of what is confirmed, one of the two is taken out.
            deadline = time.monotonic() + self._timeout
            for each in under_way:
                with contextlib.suppress(DomainEventsError):
                    self._settle_anew(*each, max(0.0, deadline - time.monotonic()))

    def _submit(self, message: Message) -> tuple[Publication, threading.Event]:
        known = threading.Event()
        publication = Publication(message, lambda _publication: known.set())
        self._publisher().submit(publication)
        return publication, known

    def _settle_anew(
        self,
        publication: Publication,
        known: threading.Event,
        delivery: Delivery,
        timeout: float,
    ) -> None:
        publishing = self._publisher()
        if not known.wait(timeout) and publishing.withdraw(publication):
            why = publishing.trouble or "the broker has not answered"
            raise EventNotConfirmed(
                f"No confirm within {self._timeout:g} s ({why}), while {self._what} were published "
                "to their queue anew. None is lost; some may be there twice."
            )
        if publication.error is not None:
            raise publication.error
        if self._browser is not None:  # else the connection was lost, and an error is on its way
            self._browser.ack(delivery, self._timeout)

    def _send(self, message: Message) -> None:
        """Publish, and wait for the confirm."""
        confirmed(self._publisher(), message, self._timeout)

    def _settle(self, delivery: Delivery) -> None:
        """Take it out of the queue."""
        self._check_held(delivery)
        assert self._browser is not None
        self._browser.ack(delivery, self._timeout)
        self._held.discard(delivery.receipt)

    def _check_held(self, delivery: Delivery) -> None:
        if delivery.receipt not in self._held:
            raise RuntimeError("This was settled already, or its walk is over; begin another one.")

    def _count_ready(self) -> int:
        return 0 if self._broker is None else self._connected().count(self._queue, self._timeout)

    def _connection(self) -> Consuming | None:
        """The connection to look with; None when everything is switched off."""
        check_fork()
        if self._closed:
            raise RuntimeError(
                f"{self._what} were closed here; make another {type(self).__name__} to look again."
            )
        if self._broker is None:
            return None
        if self._consuming is None:
            self._consuming = self._broker.consuming("dead letters", lambda: None)
        return self._consuming

    def _connected(self) -> Consuming:
        connection = self._connection()
        assert connection is not None
        return connection

    def _publisher(self) -> Publishing:
        if self._publishing is None:
            assert self._broker is not None
            self._publishing = self._broker.publishing((), "dead letters")
        return self._publishing
