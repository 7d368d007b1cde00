"""One handler and its queue: what a delivery becomes when the handler has had its say.

An event is acked when its handler has returned. What the handler wants tried again, or failed
on, is *moved*: published to its new place, confirmed there, and only then acked where it came
from. A crash in between makes a second copy and never loses the first.

Knows no threads but those it is called on: `Subscription.handle` on a worker, `Moves` also on
the broker's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from domain_events import message as messages
from domain_events import topology
from domain_events.broker import Consumer, Publication, Publishing
from domain_events.errors import DomainEventsError, InvalidEvent
from domain_events.events import DomainEvent
from domain_events.log import Log
from domain_events.message import Delivery, Message
from domain_events.options import Options
from domain_events.retry import Reject, Retry

log = Log("domain_events")

Handler: TypeAlias = Callable[[DomainEvent], object]

# Seconds before a delivery whose move failed is given back, so that this cannot spin.
_PAUSE_AFTER_A_FAILED_MOVE = 5.0

_ROUTING_KEYS_REMEMBERED = 10_000


class Subscription:
    """A handler, its options, and what happens to each delivery."""

    def __init__(self, handler: Handler, options: Options, moves: Moves) -> None:
        self.options = options
        self.handler = handler
        self.moves = moves
        # Whether an event with this routing key is still asked for.
        self._asked_for: dict[str, bool] = {}

    def handle(self, delivery: Delivery, consumer: Consumer) -> None:
        """Have the delivery handled and settled.

        :raises BaseException: what the handler raised, when it is no `Exception`; the delivery
            is then given back.
        """
        if not consumer.is_current(delivery):
            return
        try:
            event = messages.to_event(delivery)
        except InvalidEvent as error:
            log.error("%s got a message that is no event. %s", self.options.name, error)
            self._give_up(delivery, consumer, error)
            return
        if not self._is_asked_for(delivery):
            consumer.settle(delivery)
            return
        token = messages.handling.set((event, delivery))
        try:
            self.handler(event)
        except Retry as signal:
            self._try_again(event, delivery, consumer, signal.delay, signal)
        except Reject as signal:
            log.warning("%s rejected %s: %s", self.options.name, _named(event), signal.reason)
            self._give_up(delivery, consumer, signal)
        except self.options.retry_on as error:
            delay = self.options.backoff.delay(event.retries + 1)
            self._try_again(event, delivery, consumer, delay, error)
        except Exception as error:
            log.exception("%s failed on %s", self.options.name, _named(event))
            self._give_up(delivery, consumer, error)
        except BaseException:
            consumer.settle(delivery, requeue=True)
            raise
        else:
            consumer.settle(delivery)
        finally:
            messages.handling.reset(token)

    def _try_again(
        self,
        event: DomainEvent,
        delivery: Delivery,
        consumer: Consumer,
        delay: float,
        error: Exception,
    ) -> None:
        options = self.options
        if event.retries >= options.max_retries:
            log.error(
                "%s gave up on %s after %d retries",
                options.name,
                _named(event),
                event.retries,
                exc_info=error,
            )
            self._give_up(delivery, consumer, error)
            return
        log.info(
            "%s tries %s again in %.1f s (retry %d of %d)",
            options.name,
            _named(event),
            delay,
            event.retries + 1,
            options.max_retries,
        )
        message = messages.retry(delivery, options.exchange, options.name, delay)
        self.moves.move(message, delivery, consumer)

    def _give_up(self, delivery: Delivery, consumer: Consumer, error: Exception) -> None:
        if self.options.dead_letter:
            message = messages.dead_letter(delivery, self.options.name, error)
            self.moves.move(message, delivery, consumer)
        else:
            log.error(
                "%s keeps no dead letters; dropped: %s %s",
                self.options.name,
                _shown(delivery.original_routing_key),
                _shown(delivery.properties.message_id),
            )
            consumer.settle(delivery)

    def _is_asked_for(self, delivery: Delivery) -> bool:
        """Not, when it came by a binding of an earlier deployment that is no longer listed."""
        options = self.options
        if delivery.exchange != options.exchange:
            return True  # a retry or a replay
        key = delivery.routing_key
        asked_for = self._asked_for.get(key)
        if asked_for is None:
            if options.exchange_type == "topic":
                # The plain look first: there may be a thousand binding keys.
                asked_for = key in options.binding_keys or any(
                    topology.matches(each, key) for each in options.binding_keys
                )
            else:
                asked_for = options.exchange_type != "direct" or key in options.binding_keys
            if not asked_for:
                log.warning(
                    "%s no longer lists a binding key for %r, but its queue is still bound for "
                    "it: such events are acked unhandled. Unbind the old key from the exchange "
                    "%r, or list it again.",
                    options.name,
                    key,
                    options.exchange,
                )
            if len(self._asked_for) >= _ROUTING_KEYS_REMEMBERED:
                self._asked_for.clear()
            self._asked_for[key] = asked_for
        return asked_for


class Moves:
    """Messages on their way to another queue; each is acked where it was once it is there.

    Nobody waits for one of them, so a failing handler is not slowed down by its failures.
    """

    def __init__(self, publishing: Callable[[], Publishing]) -> None:
        self.publishing = publishing
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._open = 0

    def move(self, message: Message, delivery: Delivery, consumer: Consumer) -> None:
        """Publish the message; then, once confirmed, ack the delivery."""
        self._leave_to_parent()
        with self._changed:
            self._open += 1
        publication = Publication(message, partial(self._done, delivery, consumer))
        self.publishing().submit(publication)

    def wait(self, timeout: float) -> bool:
        """Wait until none is on its way; False when time ran out."""
        self._leave_to_parent()
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def _leave_to_parent(self) -> None:
        # What was on its way when this process was forked is its parent's.
        if self._pid != os.getpid():
            self._begin_anew()

    def _done(self, delivery: Delivery, consumer: Consumer, publication: Publication) -> None:
        error: DomainEventsError | None = publication.error
        if error is None:
            consumer.settle(delivery)
            consumer.flush()
        else:
            log.error(
                "%s could not be moved to %r: %s Its delivery is given back.",
                _shown(delivery.original_routing_key),
                publication.message.exchange or publication.message.routing_key,
                error,
            )
            consumer.requeue_later(delivery, _PAUSE_AFTER_A_FAILED_MOVE)
        with self._changed:
            self._open -= 1
            self._changed.notify_all()


def _named(event: DomainEvent) -> str:
    return f"{_shown(event.routing_key)} {_shown(event.uuid_string)}"


def _shown(text: object) -> str:
    """What a sender has chosen, in a log line: it must not make lines of its own, nor long ones."""
    shown = str(text)[: topology.LONGEST_NAME]
    return shown if shown.isprintable() else repr(shown)
