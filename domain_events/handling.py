"""One handler and its queue: how each delivery is settled, depending on what its handler does.

An event is settled when its handler has returned. A retry or a dead letter is *forwarded*:
published to its new place, confirmed there, and only then acked where it came from. A crash in
between makes a second copy and never loses the first.

An event whose routing key this process does not list belongs to another release of the same
subscriber: two run side by side in every rolling deployment, and after a roll-back the old one
alone. It is **handed back** with growing delays, so that a process that lists it gets it, and
becomes a dead letter if none has after some fifteen minutes. It is never acked unhandled, except
for keys that the user has retired.

Runs on the worker that calls it. State is changed first and logged afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any, TypeAlias

from domain_events import message as messages
from domain_events.broker import Consumer, Settlement
from domain_events.errors import InvalidEvent
from domain_events.events import DomainEvent
from domain_events.forwarding import Forwarder
from domain_events.log import About, Log, about
from domain_events.message import Delivery, GivenUp, Later, Message, ToSubscriber
from domain_events.middleware import (
    Done,
    Middleware,
    Operation,
    Outgoing,
    announce,
    around,
    ignore,
    report,
)
from domain_events.options import Options
from domain_events.outcomes import Delivered, Outcome, ends_the_process
from domain_events.payloads import Payload
from domain_events.retry import SHORTEST_DELAY, Reject, Retry, checked_delay, units_of
from domain_events.text import printable
from domain_events.unfinished import check_finished

log = Log("domain_events")

Handler: TypeAlias = Callable[[DomainEvent[Any]], object]

# Seconds after which an event that is not listed comes back, each time: 15 minutes in all. The
# broker chooses the process that gets it then; if one in twenty lists the key, most events have
# reached it after half of the time.
_HAND_BACK_DELAYS = tuple(round(min(15.0, 0.5 * 1.3**n), 1) for n in range(70))

# How often a delivery may fail - the process died, the connection broke, the handler exited -
# before the event is given up; RabbitMQ's own default since 4.0
# (https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling).
_MOST_FAILURES = 20
# Up to RabbitMQ 4.2 a requeued event counts as failed. After so many, it is republished instead,
# so that orderly stops, however many, never make it a dead letter.
_MOST_GIVE_BACKS = 10

# Seconds before the next attempt to declare the delay levels, after this user could not.
_PAUSE_WITHOUT_DELAYS = 60.0

_ROUTING_KEYS_REMEMBERED = 10_000


class Subscription:
    """A handler, its options, and what happens to each delivery."""

    def __init__(
        self,
        handler: Handler,
        options: Options,
        forwarder: Forwarder,
        middleware: Callable[[], tuple[Middleware, ...]] = tuple,
        payload: Payload | None = None,
    ) -> None:
        self.options = options
        self.handler = handler
        self._forwarder = forwarder
        self._middleware = middleware
        self.payload = payload
        # Whether an event with this routing key is listed.
        self._listed: dict[str, bool] = {}
        self._has_delays = options.queue.delays
        self._no_delays_until = 0.0
        self._warned_of_claims = False

    def give_back(self, delivery: Delivery, consumer: Consumer) -> None:
        """Requeue a delivery that was not begun."""
        counts = self.options.queue.counts_failures and delivery.give_back_counts
        if counts and delivery.failures >= _MOST_GIVE_BACKS:
            copy = messages.sent_on(delivery, ToSubscriber(self.options.name))
            self._forwarder.forward(copy, delivery, consumer)
        else:
            consumer.settle(delivery, Settlement.GIVE_BACK)

    def handle(self, delivery: Delivery, consumer: Consumer) -> Delivered:
        """Handle and settle the delivery; returns its outcome."""
        # In a context of its own: what a handler or a middleware sets there ends with it.
        chain = self._middleware()
        handle = self._handle_and_report if chain else self._handle
        return copy_context().run(handle, delivery, consumer, chain)

    def _handle_and_report(
        self, delivery: Delivery, consumer: Consumer, chain: tuple[Middleware, ...]
    ) -> Delivered:
        delivered = self._handle(delivery, consumer, chain)
        try:
            report(chain, delivered)
            return delivered
        finally:
            del delivered  # this frame called those in its error's traceback

    def _handle(
        self, delivery: Delivery, consumer: Consumer, chain: tuple[Middleware, ...]
    ) -> Delivered:
        name = self.options.name
        try:
            exchange = self.options.queue.exchange.name
            event, claimed = messages.read_event(delivery, name, exchange)
        except InvalidEvent as error:
            outcome = self._give_up(None, delivery, consumer, error)
            log.error(
                "%s got a message that is not an event. %s",
                name,
                printable(error),
                about=messages.about(delivery, name),
            )
            return Delivered(name, None, outcome, error)
        if claimed != event.routing_key:
            self._warn_of_claim(event, claimed)
        if not self._is_listed(delivery, event):
            return self._pass_on(event, delivery, consumer)
        if delivery.redelivered and self._has_failed_too_often(event, delivery):
            limit = GivenUp(
                "delivery limit",
                f"Delivered {delivery.failures + 1} times and never settled: each time the process "
                "or its connection ended before the handler returned, or the event was given back.",
            )
            outcome = self._give_up(event, delivery, consumer, limit)
            log.error("%s gave up on %s. %s", name, _named(event), limit, about=self._about(event))
            return Delivered(name, event, outcome, limit)
        if self.payload is not None:
            try:
                event = self.payload.read(event)
            except BaseException as error:  # noqa: BLE001 - as in `_failed`
                if ends_the_process(error):
                    return self._exited(event, delivery, consumer, error)
                outcome = self._give_up(event, delivery, consumer, error)
                log.error(
                    "%s gave up on %s. %s",
                    name,
                    _named(event),
                    printable(error, 1000),
                    about=self._about(event),
                )
                return Delivered(name, event, outcome, error)
        messages.handling.set((event, delivery))
        started = time.monotonic()
        try:
            if chain:
                around(chain, event, partial(self._call, event))
            else:
                self._call(event)
        except BaseException as error:  # noqa: BLE001 - see `_failed`
            # Not kept in this frame, which is in the error's traceback.
            seconds = time.monotonic() - started
            return self._failed(event, delivery, consumer, error, seconds)
        seconds = time.monotonic() - started
        consumer.settle(delivery)
        return Delivered(name, event, Outcome.HANDLED, None, None, seconds)

    def _failed(
        self,
        event: DomainEvent[Any],
        delivery: Delivery,
        consumer: Consumer,
        error: BaseException,
        seconds: float,
    ) -> Delivered:
        """The handler has raised this: what follows."""
        name = self.options.name
        if isinstance(error, Retry):
            delay_of: Callable[[], float] = partial(getattr, error, "delay")
            delivered = self._try_again(event, delivery, consumer, error, delay_of)
        elif isinstance(error, Reject):
            reason = getattr(error, "reason", error)  # a subclass may have left it out
            outcome = self._give_up(event, delivery, consumer, error)
            log.warning(
                "%s rejected %s: %s",
                name,
                _named(event),
                printable(reason),
                about=self._about(event),
            )
            delivered = Delivered(name, event, outcome, error)
        elif ends_the_process(error):
            delivered = self._exited(event, delivery, consumer, error)
        elif isinstance(error, self.options.retry_on):
            delay_of = partial(self.options.backoff.delay, event.retries + 1)
            delivered = self._try_again(event, delivery, consumer, error, delay_of)
        else:
            outcome = self._give_up(event, delivery, consumer, error)
            log.error(
                "%s failed on %s", name, _named(event), exc_info=error, about=self._about(event)
            )
            delivered = Delivered(name, event, outcome, error)
        delivered.seconds = seconds
        return delivered

    def _call(self, event: DomainEvent[Any]) -> None:
        result = self.handler(event)
        if result is not None:
            check_finished(result)

    def _try_again(
        self,
        event: DomainEvent[Any],
        delivery: Delivery,
        consumer: Consumer,
        error: BaseException,
        delay_of: Callable[[], float],
    ) -> Delivered:
        options = self.options
        name, most = options.name, options.max_retries
        if event.retries >= most:
            outcome = self._give_up(event, delivery, consumer, error)
            why = f"after {event.retries} retries (max_retries={most})"
            if not most:
                why = "at once: its handler raised Retry, and max_retries is 0"
            log.error(
                "%s gave up on %s %s",
                name,
                _named(event),
                why,
                exc_info=error,
                about=self._about(event),
            )
            return Delivered(name, event, outcome, error)
        try:
            # The user's code may have computed it, or changed any attribute.
            delay = round(units_of(checked_delay(delay_of(), "a delay")) * SHORTEST_DELAY, 1)
        except Exception as wrong:
            wrong.__cause__ = error
            outcome = self._give_up(event, delivery, consumer, wrong)
            log.error(
                "%s failed on %s", name, _named(event), exc_info=wrong, about=self._about(event)
            )
            return Delivered(name, event, outcome, wrong)
        reason = messages.reason_of(error)
        later = Later(options.queue.exchange.name, name, delay)
        message = messages.retry(delivery, later, reason)
        done = self._announce(Operation.RETRY, event, delivery, message, error)
        self._forwarder.forward(message, delivery, consumer, done=done)
        log.info(
            "%s tries %s again in %.1f s (retry %d of %d) after %s: %s",
            name,
            _named(event),
            delay,
            event.retries + 1,
            most,
            messages.type_name(reason),
            printable(reason),
            about=self._about(event),
        )
        return Delivered(name, event, Outcome.RETRY, error, delay)

    def _exited(
        self, event: DomainEvent[Any], delivery: Delivery, consumer: Consumer, error: BaseException
    ) -> Delivered:
        """The handler ended the process: the event comes again, but not for ever."""
        name = self.options.name
        options = self.options
        last = options.queue.counts_failures and delivery.failures + 1 >= _MOST_FAILURES
        # Otherwise it stays unsettled until the connection is closed at the end of this run, which
        # counts as a failed delivery. A reject would redeliver it here at once.
        outcome = Outcome.GIVEN_BACK
        if last and options.queue.dead_letters:
            outcome = self._give_up(event, delivery, consumer, error)
        log.error(
            "%s: the handler ended the process on %s",
            name,
            _named(event),
            exc_info=error,
            about=self._about(event),
        )
        return Delivered(name, event, outcome, error)

    def _give_up(
        self,
        event: DomainEvent[Any] | None,
        delivery: Delivery,
        consumer: Consumer,
        error: BaseException,
    ) -> Outcome:
        if self.options.queue.dead_letters:
            message = messages.dead_letter(delivery, self.options.name, error)
            done = self._announce(Operation.DEAD_LETTER, event, delivery, message, error)
            self._forwarder.forward(message, delivery, consumer, done=done)
            return Outcome.DEAD_LETTER
        consumer.settle(delivery)
        log.error(
            "%s keeps no dead letters; dropped: %s %s",
            self.options.name,
            printable(delivery.original_routing_key),
            printable(delivery.message_id),
            about=self._about(event, delivery),
        )
        return Outcome.DROPPED

    def _has_failed_too_often(self, event: DomainEvent[Any], delivery: Delivery) -> bool:
        options = self.options
        if not options.queue.counts_failures or delivery.failures < _MOST_FAILURES:
            return False
        if not options.queue.dead_letters:
            # Not dropped, since the event may not be to blame. Beyond its own limit, the broker
            # keeps it aside until there is a dead-letter queue.
            log.error(
                "%s: %s was delivered %d times and never settled; it is tried again",
                options.name,
                _named(event),
                delivery.failures + 1,
                about=self._about(event),
            )
        return options.queue.dead_letters

    def _announce(
        self,
        operation: Operation,
        event: DomainEvent[Any] | None,
        delivery: Delivery,
        message: Message,
        error: BaseException | None = None,
    ) -> Done:
        """Announce to the middleware what is about to be forwarded, and add what that adds."""
        chain = self._middleware()
        if not chain:
            return ignore
        known = delivery.foreign_headers
        outgoing = Outgoing(
            operation, event, dict(known), subscriber=self.options.name, error=error
        )
        if isinstance(message.destination, Later):
            outgoing.delay = message.destination.seconds
        done: Done = ignore
        try:
            done = announce(chain, outgoing)
            message.headers = messages.added_headers(known, outgoing.headers)
        except BaseException as failure:
            # No caller waits for it, and an event must not be lost by what looks on.
            if ends_the_process(failure):
                raise
            log.exception(
                "%s: %s goes to %s without what a middleware would have added.",
                self.options.name,
                printable(message.message_id),
                printable(message.destination),
                about=self._about(event, delivery),
            )
        return done

    def _warn_of_claim(self, event: DomainEvent[Any], claimed: str) -> None:
        if not self._warned_of_claims:
            self._warned_of_claims = True
            log.warning(
                "%s: the envelope of %s claims %s. The event keeps the routing key it was "
                "published with, which the broker has checked. This is logged once.",
                self.options.name,
                _named(event),
                printable(claimed),
                about=self._about(event),
            )

    def _about(self, event: DomainEvent | None, delivery: Delivery | None = None) -> About:
        if event is None:
            assert delivery is not None
            return messages.about(delivery, self.options.name)
        return about(self.options.name, event.routing_key, event.uuid_string)

    # --- events that are not listed --------------------------------------------------------------

    def _is_listed(self, delivery: Delivery, event: DomainEvent) -> bool:
        key = event.routing_key
        listed = self._listed.get(key)
        if listed is None:
            listed = self.options.lists(key)
            if len(self._listed) >= _ROUTING_KEYS_REMEMBERED:
                self._listed.clear()
            self._listed[key] = listed
            if not listed:
                self._warn_of_unlisted(event)
        return listed

    def _warn_of_unlisted(self, event: DomainEvent) -> None:
        name, key = self.options.name, event.routing_key
        if self.options.has_retired(key):
            log.warning(
                "%s has retired %s: such events are acked unhandled.",
                name,
                printable(key),
                about=self._about(event),
            )
            return
        log.warning(
            "%s gets events with the routing key %s, which matches none of the binding keys of "
            "this process: %s. Another release of this subscriber has bound it, or another service "
            "uses the same name. They are handed back for a process that lists the key, and become "
            "dead letters after about %d minutes without one. If no process needs them any more, "
            "register with retired_keys=[%r].",
            name,
            printable(key),
            ", ".join(map(printable, self.options.queue.binding_keys[:10])),
            round(sum(_HAND_BACK_DELAYS) / 60),
            printable(key),
            about=self._about(event),
        )

    def _pass_on(
        self, event: DomainEvent[Any], delivery: Delivery, consumer: Consumer
    ) -> Delivered:
        options = self.options
        if options.has_retired(event.routing_key):
            consumer.settle(delivery)
            return Delivered(options.name, event, Outcome.RETIRED)
        often = delivery.hand_backs
        if often >= len(_HAND_BACK_DELAYS) and options.queue.dead_letters:
            keys = options.queue.binding_keys
            unlisted = GivenUp(
                "unlisted routing key",
                f"No process of {options.name} that lists the routing key "
                f"{printable(event.routing_key)} took it in {round(sum(_HAND_BACK_DELAYS) / 60)} "
                f"minutes. This one lists: {', '.join(map(printable, keys))}.",
            )
            outcome = self._give_up(event, delivery, consumer, unlisted)
            log.error(
                "%s gave up on %s. %s",
                options.name,
                _named(event),
                unlisted,
                about=self._about(event),
            )
            return Delivered(options.name, event, outcome, unlisted)
        delay = _HAND_BACK_DELAYS[min(often, len(_HAND_BACK_DELAYS) - 1)]
        self._hand_back(event, delivery, consumer, delay)
        return Delivered(options.name, event, Outcome.HANDED_BACK, delay=delay)

    def _hand_back(
        self, event: DomainEvent[Any], delivery: Delivery, consumer: Consumer, delay: float
    ) -> None:
        name, forwarder = self.options.name, self._forwarder
        later = Later(self.options.queue.exchange.name, name, delay)
        delayed = messages.hand_back(delivery, later)

        def wait_here() -> None:
            # This user may not declare the delay levels: to the end of the queue, after the delay.
            self._has_delays = False
            again = messages.hand_back(delivery, ToSubscriber(name))

            def send(_exists: bool) -> None:
                done = self._announce(Operation.HAND_BACK, event, delivery, again)
                forwarder.forward(again, delivery, consumer, done=done)

            forwarder.later(delay, delivery, consumer, send)

        def send_delayed() -> None:
            done = self._announce(Operation.HAND_BACK, event, delivery, delayed)
            forwarder.forward(delayed, delivery, consumer, done=done, otherwise=wait_here)

        def declared(exist: bool) -> None:
            self._has_delays = exist
            if exist:
                send_delayed()
            else:
                self._no_delays_until = time.monotonic() + _PAUSE_WITHOUT_DELAYS
                wait_here()

        queue = self.options.queue
        # The levels may exist for others, but without a binding back to this queue.
        never = queue.must_exist and not queue.delays
        if self._has_delays:
            send_delayed()
        elif never or time.monotonic() < self._no_delays_until:
            wait_here()
        else:
            # Without retries, this subscriber has not declared the delay levels so far.
            forwarder.later(0, delivery, consumer, declared, delays=True)


def _named(event: DomainEvent) -> str:
    return f"{printable(event.routing_key)} {printable(event.uuid_string)}"
