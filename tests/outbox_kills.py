"""Kills a process (SIGKILL) that writes and sends events, once at each of its steps.

    python tests/outbox_kills.py DIALECT ADDRESS BROKER EXCHANGE [BROKEN]

Each step is a fork of this process, which does the same work up to there: transactions with events,
a rolled-back SAVEPOINT, a rollback, couriers, a relay. Prints how many steps there are. BROKEN
breaks what is promised, to see that it is noticed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
from outbox_databases import DbApi, sqlite

from domain_events import DomainEvent, Middleware, Outgoing, configure, outbox
from domain_events.outbox import Courier, Execute, Relay
from domain_events.outbox.sending import Sender, Sent

# They mostly wait: for the broker, and for the database.
_AT_ONCE = 6


class Steps:
    """Counts, and ends the process with one of them."""

    def __init__(self, last: int) -> None:
        self._numbers = itertools.count(1)
        self._last = last

    def step(self) -> None:
        if next(self._numbers) == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


class Killed(DbApi):
    """Steps before and after each statement and each commit."""

    def __init__(self, database: DbApi, steps: Steps) -> None:
        super().__init__(database.name, database.dialect, database.connect)
        self._steps = steps

    def executing(self, connection: Any) -> Execute:
        inner = super().executing(connection)

        def execute(sql: str, parameters: Any = None, /) -> Any:
            self._steps.step()
            found = inner(sql, parameters)
            self._steps.step()
            return found

        return execute

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Execute]:
        with super().transaction() as execute:
            yield execute
            self._steps.step()
        self._steps.step()


class Watches(Middleware):
    """Steps before each event is sent, and after it was confirmed."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def publishing(self, outgoing: Outgoing) -> Callable[[object], None]:
        self._steps.step()
        return lambda _: self._steps.step()


def work(database: Killed, steps: Steps, run: int, exchange: str, broken: str) -> None:
    """A transaction with a courier, one that is rolled back, one without, and a relay."""
    numbers = itertools.count(1)
    watches = Watches(steps)
    courier = Courier(database, middleware=[watches])

    def write(execute: Execute, key: str | None, courier: Courier | None) -> Any:
        number = next(numbers)
        about = None if key is None else f"{run}-{key}"
        event = DomainEvent("thing.changed", {"number": number}, about)
        execute(
            "INSERT INTO committed (event_id, about, number) VALUES (:event_id, :about, :number)",
            {"event_id": event.uuid_string, "about": about, "number": number},
        )
        return outbox.write(execute, database.dialect, event, exchange=exchange, courier=courier)

    def transaction(courier: Courier | None, *, commit: bool = True) -> None:
        with database.application() as (connection, execute):
            written = [write(execute, key, courier) for key in ("a", "b", "a", None)]
            execute("SAVEPOINT s", {})
            write(execute, "a", courier)
            execute("ROLLBACK TO SAVEPOINT s", {})
            steps.step()
            if broken == "publish before the commit" and courier is not None:
                courier._sender._publish(exchange, [each.row for each in written], Sent())
            if not commit:
                connection.rollback()
                return
            connection.commit()
            steps.step()
            if courier is not None:
                courier.take(each.row for each in written)
                assert courier.wait(60)

    transaction(courier)
    transaction(courier, commit=False)
    transaction(None)
    with Relay(database, batch=3, middleware=[watches]) as relay:
        relay.sweep()


def break_sending(database: DbApi) -> None:
    """Delete the rows before they are confirmed."""
    send = Sender._send

    def delete_first(self: Sender, rows: Any, *others: Any) -> None:
        with database.transaction() as execute:
            for row in rows:
                execute(f"DELETE FROM {outbox.OUTBOX} WHERE id = :id", {"id": row.id})
        send(self, rows, *others)

    Sender._send = delete_first  # type: ignore[method-assign, assignment]


def main() -> None:
    dialect, address, url, exchange, *broken = sys.argv[1:]
    if dialect == "sqlite":
        database = sqlite(address)
    else:
        database = DbApi("postgresql", dialect, lambda: psycopg.connect(address))
    why = broken[0] if broken else ""
    survived: list[int] = []
    running: dict[int, int] = {}
    for last in itertools.count(1, 4 if why else 1):
        pid = os.fork()
        if pid == 0:
            configure(url)
            steps = Steps(last)
            killed = Killed(database, steps)
            if why == "delete before the confirm":
                break_sending(killed)
            work(killed, steps, last, exchange, why)
            os._exit(0)
        running[pid] = last
        while len(running) >= (1 if survived else _AT_ONCE):
            pid, status = os.wait()
            number = running.pop(pid)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                survived.append(number)
        if survived and not running:
            print(min(survived))
            return


if __name__ == "__main__":
    main()
