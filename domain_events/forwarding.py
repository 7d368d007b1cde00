"""Forwards messages: published to another place, confirmed, then acked where they came from.

Retries, dead letters, hand-backs. A crash in between makes a second copy and never loses the first.

Threads. `Forwarder.forward` is called on a worker, its callbacks on threads of the broker's; one
condition guards its state. State is changed first and logged afterwards.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from domain_events import message as messages
from domain_events.broker import Consumer, Publication, Publishing, Settlement
from domain_events.errors import BrokerUnavailable, DomainEventsError
from domain_events.log import Log
from domain_events.message import Delivery, Message
from domain_events.middleware import Done, ignore
from domain_events.process import check_fork
from domain_events.retry import Backoff
from domain_events.text import printable

log = Log("domain_events")

# Before a message that could not be forwarded is tried again.
_PAUSES = Backoff(5.0, maximum=60.0, jitter=0)


class Forwarder:
    """Forwards messages; each is acked where it was once it is confirmed where it goes.

    No worker waits for the confirm, so a failing handler is not slowed down by its failures. A
    message that fails is tried again after a pause, and its delivery held meanwhile: a requeue
    would count as a failure up to RabbitMQ 4.2.
    """

    def __init__(self, publishing: Callable[[], Publishing | None]) -> None:
        self._publishing = publishing
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.RLock())
        self._open: set[Publication] = set()
        # Deliveries to be forwarded, or tried again, after a pause.
        # With each, its consumer, and what to call if it is given back instead.
        self._held: dict[Delivery, tuple[Consumer, Callable[[], object]]] = {}
        self._ending = False

    def begin(self) -> None:
        """Begin a run of `Subscriber.start_consuming`."""
        self._leave_to_parent()
        self._ending = False

    def forward(
        self,
        message: Message,
        delivery: Delivery,
        consumer: Consumer,
        *,
        done: Done = ignore,
        otherwise: Callable[[], None] | None = None,
        failures: int = 0,
    ) -> None:
        """Publish the message; then, once confirmed, ack the delivery.

        :param done: called once with what became of it in the end.
        :param otherwise: called if it fails, instead of trying again.
        """
        self._leave_to_parent()

        def on_done(publication: Publication) -> None:
            self._done(publication, delivery, consumer, done, otherwise, failures)

        publication = Publication(message, on_done, awaited=False)
        with self._changed:
            self._open.add(publication)
        try:
            publishing = self._publishing()
            if publishing is None:
                raise BrokerUnavailable("The Subscriber is gone, and its connections are closed.")
            publishing.submit(publication)
        except DomainEventsError as error:
            publication.error = error
            on_done(publication)
        except BaseException as error:
            self._close_one(publication)
            done(error)
            raise

    def later(
        self,
        seconds: float,
        delivery: Delivery,
        consumer: Consumer,
        then: Callable[[bool], None],
        *,
        delays: bool = False,
        otherwise: Callable[[], object] = lambda: None,
    ) -> None:
        """Hold the delivery; call ``then`` after declaring its queue again, and after a pause.

        :param then: gets whether all of it exists; not called when the delivery was given back.
        :param delays: declare what delays need, too.
        :param otherwise: called when the delivery was given back.
        """

        def call(exists: bool) -> None:
            if not self._release(delivery):
                return
            if consumer.is_current(delivery):
                then(exists)
            else:
                otherwise()

        with self._changed:
            ending = self._ending
            if not ending:
                self._held[delivery] = consumer, otherwise
        if ending:
            consumer.settle(delivery, Settlement.GIVE_BACK)
            consumer.flush()
            otherwise()
        else:
            consumer.repair(seconds, call, delays=delays)

    def end(self, timeout: float) -> bool:
        """Requeue held deliveries, and wait for those being forwarded; False at the timeout."""
        self._leave_to_parent()
        with self._changed:
            self._ending = True
            held, self._held = self._held, {}
        for delivery, (consumer, otherwise) in held.items():
            consumer.settle(delivery, Settlement.GIVE_BACK)
            consumer.flush()
            otherwise()
        return self.wait(timeout)

    def wait(self, timeout: float) -> bool:
        """Wait until none is being forwarded; False at the timeout."""
        self._leave_to_parent()
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def _leave_to_parent(self) -> None:
        # Messages under way when this process was forked belong to its parent.
        check_fork()
        if self._pid != os.getpid():
            self._reset()

    def _release(self, delivery: Delivery) -> bool:
        with self._changed:
            return self._held.pop(delivery, None) is not None

    def _close_one(self, publication: Publication) -> None:
        with self._changed:
            # Once for each: a signal handler may have raised in the middle of `forward`.
            if publication in self._open:
                self._open.discard(publication)
                self._changed.notify_all()

    def _done(
        self,
        publication: Publication,
        delivery: Delivery,
        consumer: Consumer,
        done: Done,
        otherwise: Callable[[], None] | None,
        failures: int,
    ) -> None:
        error, message = publication.error, publication.message
        final = error is None or otherwise is not None
        try:
            if error is None or self._ending:
                final = True
                consumer.settle(delivery, Settlement.GIVE_BACK if error else Settlement.DONE)
                consumer.flush()
            elif otherwise is not None:
                otherwise()
            else:
                failures += 1
                self.later(
                    _PAUSES.delay(failures),
                    delivery,
                    consumer,
                    lambda _: self.forward(
                        message, delivery, consumer, done=done, failures=failures
                    ),
                    otherwise=lambda: done(error),
                )
        finally:
            self._close_one(publication)
        if final:
            done(error)
        if error is not None:
            log.error(
                "%s %s could not be forwarded to %s: %s %s",
                printable(delivery.original_routing_key),
                printable(delivery.message_id),
                printable(message.destination),
                printable(error, 1000),
                "It is requeued." if self._ending else "Trying again.",
                about=messages.about(delivery, getattr(message.destination, "name", None)),
            )
