"""A walk over a place: a `RabbitBrowser` that others can see, and that survives delivery limits.

**Browsing counts.** Up to RabbitMQ 4.2 each requeue to a quorum queue counts as a failed delivery,
and beyond the queue's delivery limit the broker deletes the message
(https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling). Our own limit is out of
reach, but a policy may lower it, and a queue of another program has the broker's default of 20.
AMQP does not show the limit in force, only how often a message was requeued. So before that is too
often, all messages are republished: each is confirmed at the end of the queue before it is acked at
the front. Content and order stay; a crash on the way duplicates some messages, and loses none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from domain_events.broker import Publishing, confirm_each
from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.browser import RabbitBrowser
from domain_events.broker.rabbitmq.envelope import RabbitDelivery, browsed, republished
from domain_events.broker.rabbitmq.errors import ResourceLocked
from domain_events.broker.rabbitmq.topology import Topology
from domain_events.errors import (
    ConfigurationError,
    EventNotConfirmed,
    TopologyError,
)
from domain_events.message import Delivery, Message, Place

# Messages requeued so often are republished; a delivery limit of 3 still allows this delivery.
_TOO_OFTEN = 3


class RabbitWalk:
    """See `domain_events.broker.Browser`. Called by one thread."""

    def __init__(
        self,
        place: Place,
        browser: RabbitBrowser,
        declare: Callable[[Topology, float], None],
        publishing: Callable[[], Publishing],
        timeout: float,
    ) -> None:
        self._place = place
        self._browser = browser
        self._declare = declare
        self._publishing = publishing
        self._timeout = timeout
        self._begin()

    def _begin(self) -> None:
        self._at_the_start = True
        self._left = 0
        self.shared = False
        try:
            self._declare([topology.walk_marker(self._place)], self._timeout)
        except ResourceLocked:
            self.shared = True
        except (TopologyError, ConfigurationError):
            pass  # this user may not declare it; it is only a marker

    @property
    def ahead(self) -> int:
        return self._browser.ahead

    def next(self, timeout: float) -> Delivery | None:
        first, self._at_the_start = self._at_the_start, False
        delivery = self._browser.next(timeout, max(1, self._left))
        if first and delivery is not None:
            if delivery.failures >= _TOO_OFTEN:
                self._republish_all(delivery)
                delivery = self._browser.next(timeout)
            # Those that arrive during the walk are not taken, and not held.
            self._left = 0 if delivery is None else delivery.message_count + 1
        self._left -= 1
        return None if delivery is None else browsed(delivery, self._place)

    def ack(self, delivery: Delivery, timeout: float) -> None:
        self._browser.ack(delivery, timeout)

    def ack_all(self, deliveries: Sequence[Delivery], timeout: float) -> None:
        self._browser.ack_all(deliveries, timeout)

    def rewind(self) -> None:
        self._browser.rewind()
        self._begin()

    def close(self, timeout: float) -> None:
        self._browser.close(timeout)

    def _republish_all(self, first: RabbitDelivery) -> None:
        """See the module's docstring."""

        def messages() -> Iterator[tuple[Message, RabbitDelivery]]:
            delivery: RabbitDelivery | None = first
            left = first.message_count
            while delivery is not None:
                yield republished(browsed(delivery, self._place), self._place), delivery
                delivery = self._browser.next(self._timeout, left) if left else None
                left -= 1

        def confirmed(delivery: RabbitDelivery) -> None:
            self._browser.ack(delivery, self._timeout)

        try:
            confirm_each(self._publishing(), messages(), self._timeout, confirmed)
        except EventNotConfirmed as error:
            raise EventNotConfirmed(
                f"{self._place}: not all were republished; none is lost, some may be there twice. "
                f"{error}"
            ) from error
        except ConfigurationError as error:
            raise ConfigurationError(
                f"Messages among {self._place} were requeued {first.failures} times. RabbitMQ "
                "counts each browsing, and deletes messages beyond the queue's delivery limit, "
                "which cannot be read from here. So they must be republished to their queue before "
                f"they are browsed again, which this user may not do: {error}"
            ) from error
