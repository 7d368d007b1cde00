"""One handler and its queue: what a delivery becomes when the handler has had its say.

An event is settled when its handler has returned. What the handler wants tried again, or failed
on, is *moved*: published to its new place, confirmed there, and only then acked where it came
from. A crash in between makes a second copy and never loses the first.

An event whose routing key this process does not list belongs to another release of the same
subscriber: two run side by side in every rolling deployment, and after a roll-back the old one
alone. It is **handed back** with growing delays, so that a process that lists it gets it, and is a
dead letter when none has turned up after some fifteen minutes. It is never acked unhandled, but
for the keys that the user has retired.

Knows no threads but those it is called on: `Subscription.handle` on a worker, `Moves` also on
the broker's. State is changed first and logged afterwards.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeAlias

from domain_events import message as messages
from domain_events import topology
from domain_events.broker import Consumer, Publication, Publishing, Settlement
from domain_events.errors import DomainEventsError, InvalidEvent
from domain_events.events import DomainEvent
from domain_events.log import Log
from domain_events.message import Delivery, GivenUp, Message
from domain_events.options import Options
from domain_events.process import check_fork
from domain_events.retry import SHORTEST_DELAY, Reject, Retry, checked_delay, units_of
from domain_events.text import printable
from domain_events.topology import Topology

log = Log("domain_events")

Handler: TypeAlias = Callable[[DomainEvent], object]

# Seconds before a move that failed is tried again; twice as long after each further failure.
_PAUSE_AFTER_A_FAILED_MOVE = 5.0
_LONGEST_PAUSE = 60.0

# Seconds after which an event that is not listed comes back, each time: 15 minutes in all. Which
# process gets it then is the broker's choice; with one in twenty that lists the key, most of the
# events have found it after half of the time.
_HAND_BACK_DELAYS = tuple(round(min(15.0, 0.5 * 1.3**n), 1) for n in range(70))

# So often a delivery may fail - the process died, the connection broke, the handler exited -
# before the event is given up; as often as RabbitMQ lets it by default since 4.0.
_MOST_FAILURES = 20
# Up to RabbitMQ 4.2 an event that is given back counts as failed. So often it is; then it is
# renewed instead, so that orderly stops, however many, never make a dead letter of it.
_MOST_GIVE_BACKS = 10

# Seconds after which a user who could not declare the delay levels tries again.
_PAUSE_WITHOUT_DELAYS = 60.0

_ROUTING_KEYS_REMEMBERED = 10_000


class Outcome(str, Enum):
    """What a delivery came to; each is equal to its text."""

    HANDLED = "handled"
    RETRY = "retry"
    DEAD_LETTER = "dead letter"
    #: Given up, by a subscriber that keeps no dead letters.
    DROPPED = "dropped"
    #: The handler ended the process, with ``sys.exit()`` for example: the event comes again.
    GIVEN_BACK = "given back"
    #: Its routing key is not listed here: it comes again, for a process that lists it.
    HANDED_BACK = "handed back"
    #: Its routing key is among the ``retired_keys``: acked without calling the handler.
    RETIRED = "retired"

    def __str__(self) -> str:
        return self.value


@dataclass
class Delivered:
    """One event, delivered to one subscriber, and what became of it."""

    #: The subscriber's name.
    subscriber: str
    #: The event; None for a message that is none, which goes to the dead letters unhandled.
    event: DomainEvent | None
    outcome: Outcome
    #: What the handler raised.
    error: BaseException | None = None
    #: Seconds after which a retry, or what was handed back, comes again.
    delay: float | None = None

    def __repr__(self) -> str:
        what = printable(self.event.routing_key) if self.event else "a message that is not an event"
        after = f" in {self.delay:g} s" if self.delay is not None else ""
        why = f" ({printable(repr(self.error))})" if self.error is not None else ""
        return f"<{self.subscriber}: {what} -> {self.outcome}{after}{why}>"


class Subscription:
    """A handler, its options, and what happens to each delivery.

    :param observe: called with what became of each delivery, on the thread that handled it.
    """

    def __init__(
        self,
        handler: Handler,
        options: Options,
        moves: Moves,
        observe: Callable[[Delivered], None] | None = None,
    ) -> None:
        self.options = options
        self.handler = handler
        self._moves = moves
        self._observe = observe
        # Whether an event with this routing key is listed.
        self._listed: dict[str, bool] = {}
        self._has_delays = bool(options.max_retries)
        self._no_delays_until = 0.0
        self._ours = topology.return_exchanges(options.exchange)
        self._warned_of_claims = False

    def observed(self, observe: Callable[[Delivered], None]) -> Subscription:
        """The same handler and options, watched."""
        return Subscription(self.handler, self.options, self._moves, observe)

    def handle(self, delivery: Delivery, consumer: Consumer) -> None:
        """Have the delivery handled and settled.

        :raises BaseException: what the handler raised to end the process, such as SystemExit; the
            delivery has then failed.
        """
        if not consumer.is_current(delivery):
            return
        delivery.ours = delivery.exchange in self._ours
        outcome = self._handled(delivery, consumer)
        if self._observe is not None:
            self._observe(outcome)
        if outcome.error is not None and _ends_the_process(outcome.error):
            raise outcome.error

    def give_back(self, delivery: Delivery, consumer: Consumer) -> None:
        """Return a delivery that was not begun."""
        often = self.options.counts_failures and delivery.failures >= _MOST_GIVE_BACKS
        if often and not delivery.counts_returns:
            self._moves.move(messages.renewed(delivery, self.options.name), delivery, consumer)
        else:
            consumer.settle(delivery, Settlement.GIVE_BACK)

    # --- one delivery ----------------------------------------------------------------------------

    def _handled(self, delivery: Delivery, consumer: Consumer) -> Delivered:
        name = self.options.name
        try:
            event, claimed = messages.read_event(delivery)
        except InvalidEvent as error:
            outcome = self._give_up(delivery, consumer, error)
            log.error("%s got a message that is not an event. %s", name, printable(error))
            return Delivered(name, None, outcome)
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
            outcome = self._give_up(delivery, consumer, limit)
            log.error("%s gave up on %s. %s", name, _named(event), limit)
            return Delivered(name, event, outcome, limit)
        return self._call(event, delivery, consumer)

    def _call(self, event: DomainEvent, delivery: Delivery, consumer: Consumer) -> Delivered:
        name = self.options.name
        token = messages.handling.set((event, delivery))
        try:
            result = self.handler(event)
            if result is not None:
                _check_finished(result)
        except Retry as signal:
            return self._try_again(
                event, delivery, consumer, signal, partial(getattr, signal, "delay")
            )
        except Reject as signal:
            reason = getattr(signal, "reason", signal)  # a subclass may have left it out
            outcome = self._give_up(delivery, consumer, signal)
            log.warning("%s rejected %s: %s", name, _named(event), printable(reason))
            return Delivered(name, event, outcome, signal)
        except self.options.retry_on as error:
            if _ends_the_process(error):
                return self._exited(event, delivery, consumer, error)
            delay_of = partial(self.options.backoff.delay, event.retries + 1)
            return self._try_again(event, delivery, consumer, error, delay_of)
        except BaseException as error:
            if _ends_the_process(error):
                return self._exited(event, delivery, consumer, error)
            outcome = self._give_up(delivery, consumer, error)
            log.error("%s failed on %s", name, _named(event), exc_info=error)
            return Delivered(name, event, outcome, error)
        else:
            consumer.settle(delivery)
            return Delivered(name, event, Outcome.HANDLED)
        finally:
            messages.handling.reset(token)

    def _try_again(
        self,
        event: DomainEvent,
        delivery: Delivery,
        consumer: Consumer,
        error: BaseException,
        delay_of: Callable[[], float],
    ) -> Delivered:
        options = self.options
        name, most = options.name, options.max_retries
        if event.retries >= most:
            outcome = self._give_up(delivery, consumer, error)
            why = f"after {event.retries} retries (max_retries={most})"
            if not most:
                why = "at once: its handler asked for a retry, and max_retries is 0"
            log.error("%s gave up on %s %s", name, _named(event), why, exc_info=error)
            return Delivered(name, event, outcome, error)
        try:
            # The user's code may compute it, and any attribute may have been changed.
            delay = round(units_of(checked_delay(delay_of(), "a delay")) * SHORTEST_DELAY, 1)
        except Exception as wrong:
            wrong.__cause__ = error
            outcome = self._give_up(delivery, consumer, wrong)
            log.error("%s failed on %s", name, _named(event), exc_info=wrong)
            return Delivered(name, event, outcome, wrong)
        reason = messages.reason_of(error)
        message = messages.retry(delivery, options.exchange, name, delay, reason)
        self._moves.move(message, delivery, consumer)
        log.info(
            "%s tries %s again in %.1f s (retry %d of %d) after %s: %s",
            name,
            _named(event),
            delay,
            event.retries + 1,
            most,
            messages.type_name(reason),
            printable(reason),
        )
        return Delivered(name, event, Outcome.RETRY, error, delay)

    def _exited(
        self, event: DomainEvent, delivery: Delivery, consumer: Consumer, error: BaseException
    ) -> Delivered:
        """The handler ended the process: the event comes again, but not for ever."""
        name = self.options.name
        options = self.options
        last = options.counts_failures and delivery.failures + 1 >= _MOST_FAILURES
        # Otherwise it stays unsettled until the connection is closed, which ends this run: to the
        # broker a failed delivery. Rejected, it would at once be delivered here again.
        outcome = Outcome.GIVEN_BACK
        if last and options.dead_letter:
            outcome = self._give_up(delivery, consumer, error)
        log.error("%s: the handler ended the process on %s", name, _named(event), exc_info=error)
        return Delivered(name, event, outcome, error)

    def _give_up(self, delivery: Delivery, consumer: Consumer, error: BaseException) -> Outcome:
        if self.options.dead_letter:
            message = messages.dead_letter(delivery, self.options.name, error)
            self._moves.move(message, delivery, consumer)
            return Outcome.DEAD_LETTER
        consumer.settle(delivery)
        log.error(
            "%s keeps no dead letters; dropped: %s %s",
            self.options.name,
            printable(delivery.original_routing_key),
            printable(delivery.properties.message_id),
        )
        return Outcome.DROPPED

    def _has_failed_too_often(self, event: DomainEvent, delivery: Delivery) -> bool:
        options = self.options
        if not options.counts_failures or delivery.failures < _MOST_FAILURES:
            return False
        if not options.dead_letter:
            # Not dropped, for nobody can say that the event is to blame. The broker will put it
            # aside, where it waits until there is a queue for dead letters.
            log.error(
                "%s: %s was delivered %d times and never settled; it is tried again",
                options.name,
                _named(event),
                delivery.failures + 1,
            )
        return options.dead_letter

    def _warn_of_claim(self, event: DomainEvent, claimed: str) -> None:
        if not self._warned_of_claims:
            self._warned_of_claims = True
            log.warning(
                "%s: the envelope of %s says %s. The event's routing key is the one it was "
                "published with, which the broker has checked; said once.",
                self.options.name,
                _named(event),
                printable(claimed),
            )

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
                self._warn_of_unlisted(key)
        return listed

    def _warn_of_unlisted(self, key: str) -> None:
        name = self.options.name
        if self.options.has_retired(key):
            log.warning("%s has retired %s: such events are acked unhandled.", name, printable(key))
            return
        log.warning(
            "%s gets events with the routing key %s, which matches none of the binding keys of "
            "this process: %s. Another release of this subscriber has bound it, or another service "
            "uses the same name. They are handed back for a process that lists the key, and become "
            "dead letters after about %d minutes without one. If nobody is to get them any more, "
            "register with retired_keys=[%r].",
            name,
            printable(key),
            ", ".join(map(printable, self.options.binding_keys[:10])),
            round(sum(_HAND_BACK_DELAYS) / 60),
            printable(key),
        )

    def _pass_on(self, event: DomainEvent, delivery: Delivery, consumer: Consumer) -> Delivered:
        options = self.options
        if options.has_retired(event.routing_key):
            consumer.settle(delivery)
            return Delivered(options.name, event, Outcome.RETIRED)
        often = delivery.hand_backs
        if often >= len(_HAND_BACK_DELAYS) and options.dead_letter:
            unlisted = GivenUp(
                "unlisted routing key",
                f"No process of {options.name} that lists the routing key "
                f"{printable(event.routing_key)} took it in {round(sum(_HAND_BACK_DELAYS) / 60)} "
                f"minutes. This one lists: {', '.join(map(printable, options.binding_keys))}.",
            )
            outcome = self._give_up(delivery, consumer, unlisted)
            log.error("%s gave up on %s. %s", options.name, _named(event), unlisted)
            return Delivered(options.name, event, outcome, unlisted)
        delay = _HAND_BACK_DELAYS[min(often, len(_HAND_BACK_DELAYS) - 1)]
        self._hand_back(delivery, consumer, delay)
        return Delivered(options.name, event, Outcome.HANDED_BACK, delay=delay)

    def _hand_back(self, delivery: Delivery, consumer: Consumer, delay: float) -> None:
        options, moves = self.options, self._moves
        delayed = messages.hand_back(delivery, options.exchange, options.name, delay)

        def wait_here() -> None:
            # This user may not have the delay levels: to the end of the queue, after the delay.
            self._has_delays = False
            again = messages.renewed(delivery, options.name, handed_back=True)
            moves.later(delay, delivery, consumer, lambda _: moves.move(again, delivery, consumer))

        def declared(exist: bool) -> None:
            self._has_delays = exist
            if exist:
                moves.move(delayed, delivery, consumer, otherwise=wait_here)
            else:
                self._no_delays_until = time.monotonic() + _PAUSE_WITHOUT_DELAYS
                wait_here()

        if self._has_delays:
            moves.move(delayed, delivery, consumer, otherwise=wait_here)
        elif time.monotonic() < self._no_delays_until:
            wait_here()
        else:
            # Without retries this subscriber has had no use for the delay levels so far.
            moves.later(0, delivery, consumer, declared, also=options.delays())


class Moves:
    """Messages on their way to another queue; each is acked where it was once it is there.

    Nobody waits for one of them, so a failing handler is not slowed down by its failures. One that
    fails is tried again after a pause, and its delivery held meanwhile: to give it back would
    count against the event up to RabbitMQ 4.2.
    """

    def __init__(self, publishing: Callable[[], Publishing]) -> None:
        self._publishing = publishing
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.RLock())
        self._open: set[Publication] = set()
        # Deliveries whose move is going to be tried, or tried again, after a pause.
        self._held: dict[Delivery, Consumer] = {}
        self._ending = False

    def begin(self) -> None:
        """A run begins."""
        self._leave_to_parent()
        self._ending = False

    def move(
        self,
        message: Message,
        delivery: Delivery,
        consumer: Consumer,
        *,
        otherwise: Callable[[], None] | None = None,
        failures: int = 0,
    ) -> None:
        """Publish the message; then, once confirmed, ack the delivery.

        :param otherwise: what to do if that fails, instead of trying again.
        """
        self._leave_to_parent()

        def done(publication: Publication) -> None:
            self._done(publication, delivery, consumer, otherwise, failures)

        publication = Publication(message, done, awaited=False)
        with self._changed:
            self._open.add(publication)
        try:
            self._publishing().submit(publication)
        except DomainEventsError as error:
            publication.error = error
            done(publication)
        except BaseException:
            self._close_one(publication)
            raise

    def later(
        self,
        seconds: float,
        delivery: Delivery,
        consumer: Consumer,
        then: Callable[[bool], None],
        also: Topology = (),
    ) -> None:
        """Hold the delivery; call ``then`` when all is declared again, and a pause is over.

        :param then: gets whether all of it exists; not called when the delivery was given back.
        :param also: what is to be declared besides what the subscriber always needs.
        """

        def call(exists: bool) -> None:
            if self._let_go(delivery) and consumer.is_current(delivery):
                then(exists)

        with self._changed:
            ending = self._ending
            if not ending:
                self._held[delivery] = consumer
        if ending:
            consumer.settle(delivery, Settlement.GIVE_BACK)
            consumer.flush()
        else:
            consumer.repair(seconds, call, also)

    def end(self, timeout: float) -> bool:
        """Give back what is held, and wait until nothing is on its way; False at the timeout."""
        self._leave_to_parent()
        with self._changed:
            self._ending = True
            held, self._held = self._held, {}
        for delivery, consumer in held.items():
            consumer.settle(delivery, Settlement.GIVE_BACK)
            consumer.flush()
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def _leave_to_parent(self) -> None:
        # What was on its way when this process was forked is its parent's.
        check_fork()
        if self._pid != os.getpid():
            self._reset()

    def _let_go(self, delivery: Delivery) -> bool:
        with self._changed:
            return self._held.pop(delivery, None) is not None

    def _close_one(self, publication: Publication) -> None:
        with self._changed:
            # Once for each: a signal handler may have raised in the middle of `move`.
            if publication in self._open:
                self._open.discard(publication)
                self._changed.notify_all()

    def _done(
        self,
        publication: Publication,
        delivery: Delivery,
        consumer: Consumer,
        otherwise: Callable[[], None] | None,
        failures: int,
    ) -> None:
        error, message = publication.error, publication.message
        try:
            if error is None or self._ending:
                consumer.settle(delivery, Settlement.GIVE_BACK if error else Settlement.DONE)
                consumer.flush()
            elif otherwise is not None:
                otherwise()
            else:
                pause = min(_LONGEST_PAUSE, _PAUSE_AFTER_A_FAILED_MOVE * 2.0 ** min(failures, 10))
                self.later(
                    pause,
                    delivery,
                    consumer,
                    lambda _: self.move(message, delivery, consumer, failures=failures + 1),
                )
        finally:
            self._close_one(publication)
        if error is not None:
            log.error(
                "%s could not be moved to %s: %s %s",
                printable(delivery.original_routing_key),
                printable(message.exchange or message.routing_key),
                printable(error, 1000),
                "It is given back." if self._ending else "It is tried again.",
            )


def _check_finished(result: object) -> None:
    """A handler has returned something: nothing may show that its work is yet to be done.

    :raises TypeError: says what was returned, and what to do.
    """
    if isinstance(result, Future) and result.done():
        result.result()
        return
    what = _unfinished(result)
    if not what and isinstance(result, list | tuple | set | frozenset | dict):
        # As of [pool.submit(work, each) for each in ...]. No deeper: data may be large.
        values = result.values() if isinstance(result, dict) else result
        what = next(filter(None, map(_unfinished, values)), "")
    if what:
        raise TypeError(f"The handler returned {what}. The event counts as failed.")


def _unfinished(result: object) -> str:
    """What was returned instead of a result; empty if it may be one."""
    if result is None or isinstance(result, str | bytes | int | float):
        return ""
    if isinstance(result, BaseException) or _is_exception_class(result):
        return f"{printable(repr(result))} instead of raising it"
    if inspect.iscoroutine(result):
        result.close()  # or Python warns that nobody has awaited it
        return "a coroutine, which nobody runs; call asyncio.run(...) in a plain function"
    if type(result).__module__ == "contextlib":
        return "a context manager that was not entered; a handler is a plain function"
    if inspect.isasyncgen(result):
        return "an asynchronous generator, which nobody iterates over"
    if (
        isinstance(result, Iterator)
        and not isinstance(result, io.IOBase)
        and iter(result) is result
    ):
        return "a generator or another lazy iterator, which nobody iterates over"
    if isinstance(result, Future):
        return "" if result.done() else "a future whose work is not done; wait for its result()"
    if type(result).__module__ == "multiprocessing.pool":
        return "the result of a pool, which nobody waits for; return what its get() returns"
    if inspect.isawaitable(result):
        return "an awaitable, which nobody awaits; call asyncio.run(...) in a plain function"
    if isinstance(result, threading.Thread) and result.ident is None:
        return "a thread that was not started"
    if isinstance(result, FunctionType | MethodType | partial):
        return "a function, which nobody calls; register what it returns, perhaps"
    return ""


def _is_lazy(result: object) -> bool:
    # A file is no work that waits, and a mock only claims to be an iterator.
    is_file = isinstance(result, io.IOBase)
    return isinstance(result, Iterator) and not is_file and iter(result) is result


def _is_exception_class(result: object) -> bool:
    return isinstance(result, type) and issubclass(result, BaseException)


def _ends_the_process(error: BaseException) -> bool:
    """Whether the handler has not failed, but the program is to end.

    Everything else is a failure of the handler, also where its class is not an `Exception`:
    asyncio.CancelledError, gevent.Timeout, pytest's outcomes.
    """
    greenlet: Any = sys.modules.get("greenlet")
    ends: tuple[type[BaseException], ...] = (SystemExit, KeyboardInterrupt)
    if greenlet is not None:
        ends += (greenlet.GreenletExit,)
    return isinstance(error, ends)


def _named(event: DomainEvent) -> str:
    return f"{printable(event.routing_key)} {printable(event.uuid_string)}"
