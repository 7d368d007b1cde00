"""The relay: sends what couriers have left behind, or everything where there are none.

Any number of them may run beside each other: on PostgreSQL, MySQL 8 and MariaDB 10.6 they share the
work, on SQLite one fetches at a time.

**Looking.** A sweep looks at the outbox page by page, from the lowest id. Ids may be committed
after larger ones, so each sweep begins at the lowest id again - but not more often than it can
afford: where another transaction has been open for long, PostgreSQL keeps every row that was
deleted meanwhile, and to pass them takes time. In between, it looks at what is new.

**Outages.** While nothing can be published to an exchange, its rows stay as they are; a single one
is tried, again and again with growing pauses, until that succeeds. Nothing is counted.
"""

from __future__ import annotations

import contextlib
import contextvars
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple

from domain_events.checks import refusal, seconds, whole_number
from domain_events.log import Log
from domain_events.middleware import Middleware
from domain_events.outbox import rows as table
from domain_events.outbox.database import (
    Database,
    Execute,
    begin_fetch,
    check_dialect,
    clock,
)
from domain_events.outbox.rows import Page
from domain_events.outbox.schema import OUTBOX
from domain_events.outbox.sending import Sender, Sent
from domain_events.settings import DEFAULT, ConnectionSettings

log = Log("domain_events.outbox")

_SHORTEST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0
# Of the time, at most this share goes into looking at what was looked at before.
_SHARE_OF_LOOKING_AGAIN = 0.1
# Seconds over which the rate is measured.
_RATE_WINDOW = 60.0


class Waiting(NamedTuple):
    """The state of an outbox."""

    #: How many events are to be sent.
    waiting: int
    #: Seconds since the oldest of them was written; 0 if there is none.
    oldest: float
    #: How many are parked: see `domain_events.outbox.parked`.
    parked: int


class Status(NamedTuple):
    """The state of an outbox, and of one relay."""

    waiting: int
    oldest: float
    parked: int
    #: How many this relay has sent since it was made.
    sent: int
    #: And per second, within the last minute.
    rate: float
    #: By exchange: why nothing can be published there for now.
    failures: dict[str, str]


class Relay:
    """Sends the events of an outbox. `run` it, `start` it as a thread, or `sweep` once.

    :param database: the outbox's.
    :param connection_settings: the broker's; see `domain_events.configure`.
    :param batch: the most rows that it leases at a time.
    :param lease: seconds after which another relay takes over the rows of one that has died.
    :param idle: seconds between two looks at an outbox without rows.
    :param timeout: seconds without any confirm that are an outage.
    :param middleware: within that of `domain_events.configure`.
    :raises ConfigurationError: for options that cannot work.
    """

    def __init__(
        self,
        database: Database,
        connection_settings: ConnectionSettings = DEFAULT,
        *,
        batch: int = 1000,
        lease: float = 60.0,
        idle: float = 1.0,
        timeout: float = 10.0,
        middleware: Iterable[Middleware] = (),
    ) -> None:
        self._database = database
        self._dialect = check_dialect(database.dialect)
        self._batch = whole_number(batch, "batch", 1, 10_000)
        self._lease = seconds(lease, "lease")
        if self._lease <= seconds(timeout):
            raise refusal(lease, "lease", f"longer than the timeout, which is {timeout:g} s")
        self._idle = seconds(idle, "idle")
        self._sender = Sender(
            database,
            connection_settings,
            lease=self._lease,
            timeout=seconds(timeout),
            middleware=middleware,
        )
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._sweeping = threading.Lock()
        self._looked_until = 0
        self._look_again_at = 0.0
        # By exchange: the error, when to try again, and after which pause.
        self._failures: dict[str, tuple[Exception, float, float]] = {}
        self._sent = 0
        self._since = time.monotonic()
        self._sent_at: deque[tuple[float, int]] = deque()

    # --- running ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Send what is in the outbox, and what comes, until `stop` is called."""
        pause = 0.0
        while not self._stopping.is_set():
            try:
                done = self._in_context(whole=False)
            except Exception as error:  # noqa: BLE001 - adapters have errors of their own
                log_it = log.warning if pause else log.exception  # one traceback is enough
                pause = min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, pause * 2))
                log_it(
                    "The outbox in %s cannot be used (%s); the relay tries again in %.1f s.",
                    self._database.name,
                    type(error).__name__,
                    pause,
                )
                self._close_database()
                self._stopping.wait(pause * random.uniform(0.8, 1.2))
            else:
                pause = 0.0
                if not done:
                    self._stopping.wait(self._idle)
        self._close_database()

    def sweep(self) -> int:
        """Send what is in the outbox now.

        :return: how many events were sent.
        :raises DomainEventsError: some cannot be published for now; the others were sent.
        """
        before = self._sent
        self._failures.clear()
        try:
            self._in_context(whole=True)
        finally:
            self._close_database()
        for error, _, _ in self._failures.values():
            raise error
        return self._sent - before

    def start(self) -> Relay:
        """Run in a thread of its own, until `stop`."""
        if self._thread is None or not self._thread.is_alive():
            self._stopping.clear()
            self._thread = threading.Thread(
                target=self.run, name="domain-events-relay", daemon=True
            )
            self._thread.start()
        return self

    def stop(self) -> None:
        """Stop `run` after the rows that are under way; from any thread, or a signal handler."""
        self._stopping.set()

    def close(self, timeout: float = 10.0) -> None:
        """Stop, wait for that, and close the connections to the broker."""
        deadline = time.monotonic() + timeout
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        self._sender.close(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def status(self) -> Status:
        """The state of the outbox and of this relay."""
        try:
            with self._database.transaction() as execute:
                waiting = status(execute, self._dialect)
        finally:
            self._close_database()
        now = time.monotonic()
        window = min(_RATE_WINDOW, now - self._since)
        recent = sum(number for when, number in list(self._sent_at) if when >= now - window)
        failures = {
            exchange: f"{type(error).__name__}: {error}"
            for exchange, (error, _, _) in list(self._failures.items())
        }
        return Status(*waiting, self._sent, recent / window if window else 0.0, failures)

    def _close_database(self) -> None:
        with contextlib.suppress(Exception):  # the connection is broken, or the database gone
            self._database.close()

    # --- one sweep -------------------------------------------------------------------------------

    def _in_context(self, *, whole: bool) -> int:
        # An empty one: an event that is sent has the cause that it was written with, or none.
        with self._sweeping:
            return contextvars.Context().run(self._sweep, whole)

    def _sweep(self, whole: bool) -> int:
        """Send page by page what can be sent; returns how many rows were sent or parked."""
        done = sum(self._probe(exchange) for exchange in self._due())
        begun = time.monotonic()
        again = whole or begun >= self._look_again_at
        after = 0 if again else self._looked_until
        while not self._stopping.is_set() or whole:
            token = str(uuid.uuid4())
            page = self._fetch(token, self._batch, after, without=list(self._failures))
            if again:
                took = time.monotonic() - begun
                pause = max(self._idle, took / _SHARE_OF_LOOKING_AGAIN)
                self._look_again_at = time.monotonic() + pause
                again = False
            if page.last is not None:
                after = self._looked_until = page.last
            if page.rows:
                done += self._send(token, page)
            if not page.full:
                break
        return done

    def _due(self) -> list[str]:
        now = time.monotonic()
        return [exchange for exchange, (_, due, _) in self._failures.items() if now >= due]

    def _probe(self, exchange: str) -> int:
        """Try one event of an exchange to which nothing could be published."""
        token = str(uuid.uuid4())
        page = self._fetch(token, 1, 0, only=exchange)
        if page.rows:
            return self._send(token, page)
        if not page.full:
            self._failures.pop(exchange, None)
        return 0

    def _fetch(
        self,
        token: str,
        most: int,
        after: int,
        *,
        only: str | None = None,
        without: Iterable[str] = (),
    ) -> Page:
        if self._dialect == "sqlite" and not self._any():
            return Page([], None, False)
        with self._database.transaction() as execute:
            begin_fetch(execute, self._dialect)
            return table.fetch(
                execute,
                self._dialect,
                token,
                self._lease,
                most,
                after=after,
                only=only,
                without=list(without),
                sent=self._sender.sent,
            )

    def _any(self) -> bool:
        """On SQLite, where a fetch keeps others from writing: whether it is worth it."""
        with self._database.transaction() as execute:
            now = clock(self._dialect)
            return bool(
                execute(
                    f"SELECT 1 FROM {OUTBOX} WHERE parked = 0 AND leased_until < {now} LIMIT 1", {}
                )
            )

    def _send(self, token: str, page: Page) -> int:
        sent = self._sender.send(token, page.rows)
        number = len(sent.confirmed)
        self._sent += number
        now = time.monotonic()
        self._sent_at.append((now, number))
        while self._sent_at and self._sent_at[0][0] < now - _RATE_WINDOW:
            self._sent_at.popleft()
        self._note(sent, {row.exchange for row in page.rows})
        return number + len(sent.parked)

    def _note(self, sent: Sent, exchanges: set[str]) -> None:
        """Note to which exchanges nothing can be published, and to which again."""
        now = time.monotonic()
        for exchange in exchanges:
            known = self._failures.get(exchange)
            error = sent.failures.get(exchange)
            if error is None:
                if known is not None:
                    del self._failures[exchange]
                    log.warning("The relay publishes to the exchange '%s' again.", exchange)
                continue
            pause = min(_LONGEST_PAUSE, known[2] * 2 if known else _SHORTEST_PAUSE)
            self._failures[exchange] = (error, now + pause * random.uniform(0.8, 1.2), pause)
            if known is None or str(known[0]) != str(error):
                log.warning(
                    "Events of the outbox in %s cannot be published to the exchange '%s'; they "
                    "stay there, and the relay tries again. %s: %s",
                    self._database.name,
                    exchange,
                    type(error).__name__,
                    error,
                )


def status(execute: Execute, dialect: str) -> Waiting:
    """The state of an outbox; it counts its rows."""
    now = clock(check_dialect(dialect))
    (waiting, oldest), (parked, _) = (
        execute(
            f"SELECT COUNT(*), {now} - MIN(created) FROM {OUTBOX} WHERE parked {condition}", {}
        )[0]
        for condition in ("= 0", "> 0")
    )
    return Waiting(int(waiting), max(0.0, float(oldest or 0.0)), int(parked))
