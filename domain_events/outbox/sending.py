"""Sending rows: what courier and relay have in common.

Of one object, one event at a time is under way. More of them would be faster, and out of order as
soon as the broker refuses one and accepts the next. So rows are sent in waves: in each, the oldest
row of each object. What is in one wave is pipelined.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from domain_events import settings
from domain_events.broker import switched_off
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    EventRejected,
    InvalidEvent,
)
from domain_events.events import DomainEvent
from domain_events.log import Log, about
from domain_events.message import type_name
from domain_events.middleware import Done, Middleware, Operation, Outgoing
from domain_events.outbox import rows as table
from domain_events.outbox.database import Database, begin, check_dialect
from domain_events.outbox.rows import Row
from domain_events.publisher import Publisher
from domain_events.settings import DEFAULT, ConnectionSettings

log = Log("domain_events.outbox")

# Seconds after which what was confirmed is deleted, and leases are renewed, while others are sent:
# a process that is killed leaves duplicates of no more than this.
_SETTLE_EVERY = 1.0
# The most objects of which it is remembered what was sent.
_MOST_OBJECTS = 10_000
# Seconds without a connection, since an attempt has failed, that are an outage for a hasty sender:
# enough to try each node of a cluster. And between two looks at that.
_OUTAGE = 0.5
_LOOK_AGAIN = 0.01


@dataclass
class Sent:
    """What became of rows; those in none of these were not sent, or not confirmed."""

    confirmed: list[Row] = field(default_factory=list)
    #: With the reason.
    parked: list[tuple[Row, str]] = field(default_factory=list)
    #: By exchange: why nothing can be published there for now.
    failures: dict[str, Exception] = field(default_factory=dict)


class Sender:
    """Publishes rows, and deletes, parks or releases them accordingly. For one thread.

    :param lease: seconds for which rows are leased.
    :param timeout: seconds without any confirm that are an outage.
    :param hasty: send nothing while the broker is known to be away, without waiting for it.
    """

    def __init__(
        self,
        database: Database,
        connection_settings: ConnectionSettings = DEFAULT,
        *,
        lease: float,
        timeout: float,
        middleware: Iterable[Middleware] = (),
        hasty: bool = False,
    ) -> None:
        self._database = database
        self._dialect = check_dialect(database.dialect)
        self._settings = settings.masked(connection_settings)
        self._lease = lease
        self._timeout = timeout
        self._hasty = hasty
        self._ended = False
        #: By object: the id up to which its rows were sent.
        self.sent: OrderedDict[str, int] = OrderedDict()
        self._outcomes = _Outcomes()
        self._middleware = (*middleware, self._outcomes)
        self._publishers: dict[tuple[tuple[str, ...] | None, str], Publisher] = {}

    def send(self, token: str, rows: Sequence[Row]) -> Sent:
        """Send rows that are leased to ``token``, in their order, and settle them.

        :raises Exception: of the database; then their leases run out.
        """
        sent = Sent()
        settled = 0
        open_ = {row.id for row in rows}

        def settle(*, finish: bool) -> None:
            nonlocal settled
            confirmed = sent.confirmed[settled:]
            rest = open_ - {row.id for row in sent.confirmed} - {row.id for row, _ in sent.parked}
            mine = self._settle(token, confirmed, sent.parked, rest, finish=finish)
            open_.difference_update(rest - mine)
            settled += len(confirmed)

        try:
            self._send(rows, sent, open_, settle)
        finally:
            settle(finish=True)
        for row in sent.confirmed:
            if row.object_key is not None:
                self.sent[row.object_key] = row.id
                self.sent.move_to_end(row.object_key)
        while len(self.sent) > _MOST_OBJECTS:
            self.sent.popitem(last=False)
        for row, why in sent.parked:
            log.error(
                "The event %s '%s' cannot be sent: row %d of the outbox in %s is parked%s. %s",
                row.event_id,
                row.routing_key,
                row.id,
                self._database.name,
                "" if row.object_key is None else "; later events of its object wait for it",
                why,
                about=about(None, row.routing_key, row.event_id),
            )
        return sent

    def _settle(
        self,
        token: str,
        confirmed: list[Row],
        parked: list[tuple[Row, str]],
        rest: set[int],
        *,
        finish: bool,
    ) -> set[int]:
        """Delete what was confirmed; at the end, park and release, before that, renew the leases.

        :return: what is still leased to the token.
        """

        def settle() -> set[int]:
            with self._database.transaction() as execute:
                begin(execute, self._dialect)
                table.delete(execute, token, [row.id for row in confirmed])
                if not finish:
                    return table.renew(execute, self._dialect, token, rest, self._lease)
                for row, why in parked:
                    table.park(execute, self._dialect, token, row.id, why)
                table.release(execute, token, rest)
                return set()

        try:
            return settle()
        except Exception:  # noqa: BLE001 - adapters have errors of their own
            # Once more, on a new connection: otherwise what was confirmed is sent twice.
            with contextlib.suppress(Exception):
                self._database.close()
            return settle()

    def close(self, timeout: float = 10.0) -> None:
        """Close the connections to the broker; the next row opens them again."""
        deadline = time.monotonic() + timeout
        while self._publishers:
            _, publisher = self._publishers.popitem()
            publisher.close(max(0.0, deadline - time.monotonic()))

    def end(self) -> None:
        """Close them for good, from any thread; what is under way there has failed."""
        self._ended = True
        self.close(0.0)

    def _send(
        self,
        rows: Sequence[Row],
        sent: Sent,
        open_: Collection[int],
        settle: Callable[..., None],
    ) -> None:
        lanes: dict[object, deque[Row]] = {}
        for row in rows:
            # A row of no object is a lane of its own.
            lanes.setdefault(row.id if row.object_key is None else row.object_key, deque()).append(
                row
            )
        settle_at = min((row.leased_at for row in rows), default=0.0) + min(
            _SETTLE_EVERY, self._lease / 3
        )
        while lanes:
            if time.monotonic() > settle_at:
                settle(finish=False)
                settle_at = time.monotonic() + min(_SETTLE_EVERY, self._lease / 3)
            wave: dict[str, list[Row]] = {}
            for lane in lanes.values():
                if lane[0].id in open_ and lane[0].exchange not in sent.failures:
                    wave.setdefault(lane[0].exchange, []).append(lane[0])
            going_on: set[int] = set()
            for exchange, batch in wave.items():
                going_on |= self._publish(exchange, batch, sent)
            for key, lane in list(lanes.items()):
                if lane.popleft().id not in going_on or not lane:
                    del lanes[key]

    def _publish(self, exchange: str, rows: list[Row], sent: Sent) -> set[int]:
        """Publish at most one row of each object; returns the ids of the confirmed ones."""
        before = len(sent.confirmed)
        waiting: list[tuple[Row, DomainEvent[Any]]] = []
        for row in rows:
            try:
                waiting.append((row, row.event()))
            except InvalidEvent as error:
                sent.parked.append((row, _reason(error)))
        while waiting and exchange not in sent.failures:
            outcomes = self._outcomes.begin()
            try:
                publisher = self._publisher(exchange)
                if self._hasty:
                    self._reach(publisher)
                publisher.publish_many(event for _, event in waiting)
            except Exception as error:  # noqa: BLE001 - also a middleware's
                for event in getattr(error, "unconfirmed", ()):
                    # Where middleware before ours has failed, it has no outcome.
                    outcomes.setdefault(id(event), error)
                if not outcomes:
                    sent.failures[exchange] = error
            finally:
                waiting = self._sort(exchange, waiting, outcomes, sent)
        return {row.id for row in sent.confirmed[before:]}

    def _sort(
        self,
        exchange: str,
        rows: list[tuple[Row, DomainEvent[Any]]],
        outcomes: dict[int, BaseException | None],
        sent: Sent,
    ) -> list[tuple[Row, DomainEvent[Any]]]:
        """Note what became of the rows; returns those that were not taken."""
        rest = []
        for row, event in rows:
            if id(event) not in outcomes:
                rest.append((row, event))
                continue
            error = outcomes[id(event)]
            if error is None:
                sent.confirmed.append(row)
            elif _concerns_the_event(error):
                sent.parked.append((row, _reason(error)))
            elif isinstance(error, Exception):
                sent.failures.setdefault(exchange, error)
        if len(rest) == len(rows):
            why = "What became of the events is not known: they were not announced."
            sent.failures.setdefault(exchange, RuntimeError(why))
        return rest

    def _publisher(self, exchange: str) -> Publisher:
        urls = settings.resolve(self._settings)
        if switched_off(urls):
            raise ConfigurationError(
                "Publishing is switched off, since connection_settings is None, but there are "
                "events in the outbox. They stay there; give an AMQP URL."
            )
        publisher = self._publishers.get((urls, exchange))
        if publisher is None:
            for key in [key for key in self._publishers if key[0] != urls]:
                self._publishers.pop(key).close(0.0)  # configure() was called meanwhile
            publisher = self._publishers[urls, exchange] = Publisher(
                urls,
                exchange,
                timeout=self._timeout,
                middleware=self._middleware,
                operation=Operation.RELAY,
            )
        if self._ended:  # perhaps by another thread, while this one made it
            self.close(0.0)
            raise BrokerUnavailable("This program's courier has ended. The event was not sent.")
        return publisher

    def _reach(self, publisher: Publisher) -> None:
        """Wait for a connection, as long as it is not known that there is none to be had.

        :raises BrokerUnavailable: the broker is away, or accepts nothing for now.
        """
        publishing = publisher.connections.publishing()
        if publishing is None:
            return
        publishing.connect()
        deadline = time.monotonic() + self._timeout
        while not self._ended:
            health = publisher.health()
            if health.blocked is not None:
                raise BrokerUnavailable(f"{publishing.trouble}. The event was not sent.")
            if health.connected:
                return
            since = min((each.since or health.at for each in health.connections), default=health.at)
            away = health.last_error is not None and health.at - since >= _OUTAGE
            if away or time.monotonic() > deadline:
                why = publishing.trouble or health.last_error or "the broker has not answered"
                raise BrokerUnavailable(f"There is no broker ({why}). The event was not sent.")
            time.sleep(_LOOK_AGAIN)


class _Outcomes(Middleware):
    """Notes what became of each event of a `Publisher.publish_many`; its error is of the first."""

    def __init__(self) -> None:
        self._outcomes: dict[int, BaseException | None] = {}

    def begin(self) -> dict[int, BaseException | None]:
        """For the next events, by ``id()``: two may be equal."""
        self._outcomes = {}
        return self._outcomes

    def publishing(self, outgoing: Outgoing) -> Done:
        outcomes, number = self._outcomes, id(outgoing.event)

        def done(error: BaseException | None) -> None:
            outcomes[number] = error

        return done


def _concerns_the_event(error: BaseException) -> bool:
    """Whether others may be sent all the same; otherwise there is an outage, which ends."""
    if isinstance(error, DomainEventsError):
        return isinstance(error, InvalidEvent | EventRejected)
    # A middleware's. What it reads may be unavailable, too.
    return isinstance(error, Exception) and not isinstance(error, OSError | MemoryError)


def _reason(error: BaseException) -> str:
    return f"{type_name(error)}: {error}"
