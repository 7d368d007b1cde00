"""The courier: sends what this process has written, as soon as it is committed.

A row is inserted with the lease of its process's courier, so that after the commit nobody has to
claim it. The transaction's thread only hands it over; the courier's own thread sends it and deletes
it, a few milliseconds later. Whatever it cannot do at once (the broker is away, another process has
an older event of the same object) it leaves to a relay, and so does a process that dies: its leases
run out.

Threads. `take` may be called from any; the lock guards what both sides touch. The courier's thread
starts with the first row and ends soon after the last.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable

from domain_events.checks import refusal, seconds
from domain_events.log import Log
from domain_events.middleware import Middleware
from domain_events.outbox import rows as table
from domain_events.outbox.database import Database, check_dialect
from domain_events.outbox.rows import Row
from domain_events.outbox.sending import Sender
from domain_events.process import check_fork, on_fork
from domain_events.settings import DEFAULT, ConnectionSettings

log = Log("domain_events.outbox")

#: Seconds for which a row is leased with its writing, and the most that it may be: so long do the
#: events of a process that was killed wait.
LEASE = 30.0
LONGEST_LEASE = 3600.0
#: Seconds without any confirm that are an outage.
TIMEOUT = 10.0

# The most that waits for the courier; more than that is left to a relay.
_MOST_ROWS = 10_000
_MOST_BYTES = 64 * 2**20
# The most that it sends at a time.
_BATCH = 500
# Seconds without a row after which its thread ends.
_LINGER = 2.0
# Seconds for which a row waits for an older one that another process sends, and between two looks.
_PATIENCE = 1.0
_LOOK_AGAIN = 0.02
# Seconds after an outage in which it leaves everything to a relay.
_SHORTEST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
# Of the time that it has for its end, the share that is left for what is not sent by then.
_LAST = 0.2


class Courier:
    """Sends rows of one outbox that this process has written.

    While the broker is known to be away, rows are left to a relay at once.

    :param database: the outbox's.
    :param connection_settings: the broker's; see `domain_events.configure`.
    :param lease: seconds after which a relay takes over the rows of a process that has died: more
        than ``timeout``, and at most an hour. A row whose transaction takes longer is a relay's,
        too.
    :param timeout: seconds without any confirm that are an outage.
    :param middleware: within that of `domain_events.configure`.
    :raises ConfigurationError: for options that cannot work.
    """

    def __init__(
        self,
        database: Database,
        connection_settings: ConnectionSettings = DEFAULT,
        *,
        lease: float = LEASE,
        timeout: float = TIMEOUT,
        middleware: Iterable[Middleware] = (),
    ) -> None:
        #: Whose leases its rows have, and for how many seconds.
        self.token = str(uuid.uuid4())
        self.lease, timeout = check_times(lease, timeout)
        self._pid = os.getpid()
        self._database = database
        self._dialect = check_dialect(database.dialect)
        self._sender = Sender(
            database,
            connection_settings,
            lease=self.lease,
            timeout=timeout,
            middleware=middleware,
            hasty=True,
        )
        self._changed = threading.Condition()
        self._rows: deque[Row] = deque()
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._closing = False
        self._overflowed = False
        self._busy = False
        # The courier's thread's own.
        self._waiting: dict[int, tuple[Row, float]] = {}  # for an older one; since when
        self._pause = 0.0
        self._paused_until = 0.0

    def take(self, rows: Iterable[Row | None]) -> None:
        """Take rows whose transaction has been committed; never blocks, never raises.

        :param rows: those of `Written`; None is passed over.
        """
        if os.getpid() != self._pid:  # a fork: its thread and its lock are the parent's
            return
        with self._changed:
            for row in filter(None, rows):
                if self._closing or len(self._rows) >= _MOST_ROWS or self._bytes >= _MOST_BYTES:
                    if not self._overflowed and not self._closing:
                        self._overflowed = True
                        log.warning(
                            "Events are written to the outbox in %s faster than they are sent; "
                            "some are left to a relay, which gets them in %g s.",
                            self._database.name,
                            self.lease,
                        )
                    return
                self._rows.append(row)
                self._bytes += len(row.body)
            if self._thread is None and self._rows:
                self._start()
            self._changed.notify()

    def wait(self, timeout: float = 5.0) -> bool:
        """Wait until nothing is left to do; False when time ran out."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._thread is not None and (self._rows or self._busy or self._waiting):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.05))
        return True

    def close(self, timeout: float = 5.0) -> None:
        """Send what it has, as far as that is possible in time, and end; a relay has the rest.

        Whatever happens, its connections to the broker are closed.

        :param timeout: about the most seconds that it takes.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closing = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout * (1 - _LAST))
        self._sender.end()
        if thread is not None and thread is not threading.current_thread():
            # It leaves its rows to a relay. In time, or their leases run out.
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self) -> None:
        # In an empty context: what is sent is not part of the request that has started the thread.
        thread = threading.Thread(
            target=contextvars.Context().run,
            args=(self._run,),
            name="domain-events-courier",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:  # out of threads, or the interpreter is shutting down
            self._rows.clear()
            self._bytes = 0
            log.warning("The outbox's courier cannot be started: %s; a relay has its rows.", error)
        else:
            self._thread = thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                if not self._rows and not self._closing:
                    self._changed.wait(_LOOK_AGAIN if self._waiting else _LINGER)
                if not self._rows and not self._waiting:
                    self._thread = None  # the next row, from now on, starts another one
                    break
                batch = [self._rows.popleft() for _ in range(min(_BATCH, len(self._rows)))]
                self._bytes -= sum(len(row.body) for row in batch)
                self._overflowed = self._overflowed and bool(self._rows)
                self._busy = True
            try:
                self._round(batch)
            except Exception as error:
                self._waiting.clear()
                log.exception(
                    "The outbox's courier cannot use %s (%s); what it has not sent is left to a "
                    "relay, which gets it in %g s.",
                    self._database.name,
                    type(error).__name__,
                    self.lease,
                )
        with contextlib.suppress(Exception):  # the connection is broken, or the database gone
            self._database.close()

    def _round(self, batch: list[Row]) -> None:
        """Send what can be sent now."""
        now = time.monotonic()
        since = {row.id: begun for row, begun in self._waiting.values()}
        rows = sorted([*(row for row, _ in self._waiting.values()), *batch])
        self._waiting = {}
        if now < self._paused_until:
            self._release(rows)
            return
        with self._database.transaction() as execute:
            # A database may have rolled back what was committed: MySQL after a deadlock, when the
            # application goes on. And a relay has those whose lease has run out here.
            held = table.held(execute, self.token, [row.id for row in rows])
            rows = [row for row in rows if row.id in held]
            keys = [(row.id, row.object_key) for row in rows]
            found = table.in_order(execute, keys, self._sender.sent)
        ids = {number for number, _ in found}
        ready = [row for row in rows if row.id in ids]
        patient, given_up = [], []
        for row in rows:
            if row.id not in ids:
                begun = since.get(row.id, now)
                if now - begun < _PATIENCE and not self._closing:
                    patient.append((row, begun))
                else:
                    given_up.append(row)
        self._waiting = {row.id: (row, begun) for row, begun in patient}
        self._release(given_up)
        if not ready:
            return
        sent = self._sender.send(self.token, ready)
        if not sent.failures:
            self._pause = self._paused_until = 0.0
            return
        self._pause = min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, self._pause * 2))
        self._paused_until = time.monotonic() + self._pause
        for exchange, error in sent.failures.items():
            log.warning(
                "Events of the outbox in %s cannot be published to the exchange '%s' for now; they "
                "are left to a relay, and so are others within the next %g s. %s: %s",
                self._database.name,
                exchange,
                self._pause,
                type(error).__name__,
                error,
            )

    def _release(self, rows: list[Row]) -> None:
        if rows:
            with self._database.transaction() as execute:
                table.release(execute, self.token, [row.id for row in rows])


def check_times(lease: object, timeout: object) -> tuple[float, float]:
    """The options of a courier.

    :raises ConfigurationError: they cannot work.
    """
    within = seconds(timeout)
    leased = seconds(lease, "lease")
    if not within < leased <= LONGEST_LEASE:
        right = f"longer than the timeout, which is {within:g} s, and at most {LONGEST_LEASE:g} s"
        raise refusal(lease, "lease", right)
    return leased, within


# --- the process's own couriers ------------------------------------------------------------------

_couriers: dict[tuple[str, str, float, float], Courier] = {}
_lock = threading.Lock()


def courier(database: Database, *, lease: float = LEASE, timeout: float = TIMEOUT) -> Courier:
    """The process's courier for an outbox, with the process's default broker.

    The options are those of `Courier`. With others, it is another one.
    """
    check_fork()
    key = (database.name, database.dialect, lease, timeout)
    found = _couriers.get(key)
    if found is None:
        with _lock:
            if not _couriers:
                atexit.unregister(close_couriers)
                atexit.register(close_couriers)
            found = _couriers.get(key) or Courier(database, lease=lease, timeout=timeout)
            _couriers[key] = found
    return found


def close_couriers(timeout: float = 5.0) -> None:
    """Let the process's couriers send what they have; a relay has what they cannot.

    Called at the end of the program; the next event makes new ones.
    """
    check_fork()
    deadline = time.monotonic() + timeout
    with _lock:
        ending = list(_couriers.values())
        _couriers.clear()
    for each in ending:
        each.close(max(0.0, deadline - time.monotonic()))


def _after_fork() -> None:
    # The parent sends its rows; its thread is not in the child, and the lock may be held.
    global _lock
    _lock = threading.Lock()
    _couriers.clear()


on_fork(_after_fork)
