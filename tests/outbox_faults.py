#!/usr/bin/env python3
"""Kills services, relays, a subscriber, the database and the broker, while events are committed.

    python tests/outbox_faults.py --transactions 2000 --seed 7 --database mariadb --adapter django

or ``make kills``. Three services commit transactions with events of several objects: a third
is rolled back, a third has SAVEPOINTs, some of them rolled back. Two relays send what the services
leave behind; a subscriber handles the events once, and publishes a follow-up of some. All of them
are killed at random steps (SIGKILL), from between two statements to between confirm and deleted
row. The database is killed and started again; so is RabbitMQ, which is also away for longer than
every timeout; a relay is stopped (SIGSTOP) for longer than its lease while it publishes.

Then what the database says was committed, in a table of the services' own, is compared with what
has arrived in a queue, and with what was handled. The exit status is 1 if anything is not as
promised. ``--broken`` breaks a promise on purpose, to see that it is noticed.

Ctrl-C ends the transactions; what was committed so far is judged. A second one ends the program.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import fragment
import onlooker
from databases import MariaDB, PostgreSQL, Server
from faults.broker import HAND_ON
from outbox_adapters import ADAPTERS, TITLES, Adapter, Transaction, make_engine
from rabbitmq_node import RELEASES, Node, NodeError, wait_for_broker
from sqlalchemy import Engine, text

from domain_events import (
    Backoff,
    DomainEvent,
    DomainEventsError,
    Middleware,
    Operation,
    Outgoing,
    Publisher,
    configure,
    outbox,
)
from domain_events.outbox import OUTBOX, Courier, Relay
from domain_events.outbox.sending import Sender

BROKEN = (
    "delete before the confirm",
    "publish before the commit",
    "cursor by id",
    "inbox outside of the transaction",
)
DATABASES: dict[str, type[Server] | None] = {
    "postgresql": PostgreSQL,
    "mariadb": MariaDB,
    "sqlite": None,
}
KINDS = ("committed", "rolled back", "with SAVEPOINTs")

SERVICES = ("service 1", "service 2", "service 3")
RELAYS = ("relay 1", "relay 2")
SUBSCRIBER = "subscriber"
#: Its rows are left to the relays.
LEAVES = SERVICES[2]
#: One of so many steps of a process is its last.
STEPS = {"service": 250, "relay": 50, "subscriber": 80}

OBJECTS = 12
EXCHANGE = "outbox-faults"
ARRIVED = "outbox-faults-arrived"
HANDLES = "outbox-faults-handles"

#: Seconds. Those of a relay's timeout and lease are options.
PATIENCE = 90.0  # for a server or a process
SILENCE = 15.0  # in which nothing changes any more


# --------------------------------------------------------------------------- steps


_STATEMENTS = (
    (f"INSERT INTO {OUTBOX}", "insert of an event"),
    (f"DELETE FROM {OUTBOX}", "delete of sent rows"),
    (f"UPDATE {OUTBOX}", "lease"),
    ("domain_events_inbox", "note in the inbox"),
    ("SAVEPOINT", "SAVEPOINT, its end"),
)
_PLACES = (*(name for _, name in _STATEMENTS), "other statement", "commit", "publish")


class Shared:
    """Numbers that all processes see, and that outlive them. Each has one writer at a time."""

    def __init__(self) -> None:
        everybody = (*SERVICES, *RELAYS, SUBSCRIBER)
        names = ["quiet", "stop", "limit"]
        names += [f"{name} {what}" for name in SERVICES for what in ("begun", *KINDS)]
        names += [f"{name} pause" for name in RELAYS]
        names += [f"{name}: {when} {place}" for name in everybody for when, place in _steps()]
        self._index = {name: number for number, name in enumerate(names)}
        self._numbers = memoryview(mmap.mmap(-1, 8 * len(names))).cast("q")

    def __getitem__(self, name: str) -> int:
        return self._numbers[self._index[name]]

    def __setitem__(self, name: str, number: int) -> None:
        self._numbers[self._index[name]] = number


def _steps() -> Iterator[tuple[str, str]]:
    return ((when, place) for place in _PLACES for when in ("before", "after"))


class Steps(Middleware):
    """Counts the steps of this process, and ends it with one of them."""

    def __init__(self, shared: Shared, name: str, seed: object) -> None:
        self._shared = shared
        self._name = name
        self._random = random.Random(f"{seed}")
        self._share = 1 / STEPS[name.partition(" ")[0]]

    def step(self, when: str, place: str) -> None:
        shared = self._shared
        pause = f"{self._name} pause"
        if place == "publish" and self._name in RELAYS and shared[pause] == 1:
            shared[pause] = 2
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._name in RELAYS and place == "other statement":
            return  # it looks for rows, also when it is idle
        if self._random.random() < self._share and not shared["quiet"]:
            shared[f"{self._name}: {when} {place}"] += 1
            os.kill(os.getpid(), signal.SIGKILL)

    def publishing(self, outgoing: Outgoing) -> Callable[[object], None] | None:
        if outgoing.operation is not Operation.RELAY:
            return None
        self.step("before", "publish")
        return lambda _: self.step("after", "publish")

    def executes(self, when: str, sql: str) -> None:
        """A step before or after a statement, or a commit."""
        if sql == "COMMIT":
            self.step(when, "commit")
            return
        name = next((name for start, name in _STATEMENTS if start in sql), "other statement")
        self.step(when, name)


# --------------------------------------------------------------------------- the database


def create_tables(engine: Engine) -> None:
    """Those of the services, besides the outbox and the inbox."""
    with engine.begin() as connection:
        for columns in (
            "objects (about varchar(50) PRIMARY KEY, number integer NOT NULL)",
            """committed (event_id varchar(50) PRIMARY KEY, about varchar(50),
                number integer NOT NULL, cause varchar(50))""",
            "handled (event_id varchar(50) NOT NULL)",
        ):
            connection.execute(text(f"CREATE TABLE {columns}"))
        for number in range(OBJECTS):
            connection.execute(
                text("INSERT INTO objects (about, number) VALUES (:about, 0)"),
                {"about": f"object-{number}"},
            )


def note_committed(
    inside: Transaction, event: DomainEvent[Any], number: int, cause: str | None = None
) -> None:
    """The services' own record of the event, in the event's transaction."""
    inside.execute(
        "INSERT INTO committed (event_id, about, number, cause) "
        "VALUES (:event_id, :about, :number, :cause)",
        {
            "event_id": event.uuid_string,
            "about": event.domain_object_id,
            "number": number,
            "cause": cause,
        },
    )


# --------------------------------------------------------------------------- the processes


@dataclass(frozen=True)
class Settings:
    """What the processes need to know."""

    broker: str
    seed: int
    transactions: int
    lease: float
    timeout: float
    broken: str


class Unwanted(Exception):
    """Rolls a transaction back, or a savepoint."""


def leave_all_to_relays() -> None:
    """As if this process died after each commit."""

    def take(_courier: Courier, _rows: object) -> None:
        pass

    Courier.take = take  # type: ignore[method-assign, assignment]


def serve(shared: Shared, settings: Settings, name: str, adapter: Adapter) -> None:
    """A service: its share of the transactions."""
    if name == LEAVES:
        leave_all_to_relays()
    early = Publisher(exchange=EXCHANGE, timeout=settings.timeout)
    begun = f"{name} begun"
    while not shared["stop"]:
        index = shared[begun] * len(SERVICES) + SERVICES.index(name)
        if index >= settings.transactions:
            break
        if index >= shared["limit"]:
            time.sleep(0.01)
            continue
        shared[begun] += 1  # at most once: the database knows whether it was committed
        kind = KINDS[index // len(SERVICES) % len(KINDS)]
        shared[f"{name} {kind}"] += 1
        chance = random.Random(f"{settings.seed} {index}")
        try:
            transact(adapter, kind, chance, early if settings.broken == BROKEN[1] else None)
        except adapter.errors as error:  # the database was killed; it comes back
            print(f"transaction {index}: {error}", flush=True)
            adapter.renew()
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 0.03))
    outbox.close_couriers(PATIENCE)


def transact(adapter: Adapter, kind: str, chance: random.Random, early: Publisher | None) -> None:
    abouts = sorted(chance.sample(range(OBJECTS), 2))
    names = [f"object-{number}" for number in abouts]

    def write(inside: Transaction, about: str | None) -> None:
        number = 0
        if about is not None:
            of = {"about": about}
            inside.execute("UPDATE objects SET number = number + 1 WHERE about = :about", of)
            ((number,),) = inside.execute("SELECT number FROM objects WHERE about = :about", of)
        event = inside.publish("thing.changed", {"number": number}, about, exchange=EXCHANGE)
        note_committed(inside, event, number)
        if early is not None:
            with contextlib.suppress(DomainEventsError):
                early.publish(event)

    with contextlib.suppress(Unwanted), adapter.transaction() as inside:
        for about in names:  # always in this order: no deadlock
            inside.execute(
                "UPDATE objects SET number = number WHERE about = :about", {"about": about}
            )
        write(inside, names[0])
        if kind == "with SAVEPOINTs":
            for about in (names[1], names[0]):
                with contextlib.suppress(Unwanted), inside.savepoint():
                    write(inside, about)
                    if chance.random() < 0.5:
                        raise Unwanted
        write(inside, names[1])
        write(inside, chance.choice((None, names[0])))
        if kind == "rolled back":
            raise Unwanted


def relay(_shared: Shared, settings: Settings, _name: str, adapter: Adapter) -> None:
    adapter.relay(PATIENCE, batch=40, lease=settings.lease, idle=0.2, timeout=settings.timeout)


def subscribe(_shared: Shared, settings: Settings, _name: str, adapter: Adapter) -> None:

    def handle(inside: Transaction, event: DomainEvent[Any]) -> None:
        inside.execute(
            "INSERT INTO handled (event_id) VALUES (:event_id)", {"event_id": event.uuid_string}
        )
        if event.data["number"] % 3 == 0:
            follow_up = inside.publish("thing.followed", {}, exchange=EXCHANGE)
            note_committed(inside, follow_up, 0, event.uuid_string)

    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            subscriber = adapter.subscriber(
                handle,
                HANDLES,
                EXCHANGE,
                once=settings.broken != BROKEN[3],
                max_retries=1000,
                backoff=Backoff(first=0.2, maximum=1.0),
            )
            break
        except DomainEventsError:  # the broker is away
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    subscriber.start_consuming()


def break_on_purpose(broken: str, adapter: Adapter, folder: Path) -> None:
    """In this process only."""
    if broken == "delete before the confirm":
        send = Sender._send

        def delete_first(self: Sender, rows: Any, *others: Any) -> None:
            with adapter.transaction() as inside:
                for row in rows:
                    inside.execute(f"DELETE FROM {OUTBOX} WHERE id = {row.id}")
            send(self, rows, *others)

        Sender._send = delete_first  # type: ignore[method-assign, assignment]
    if broken == "cursor by id":
        fetch = Relay._fetch
        cursor = folder / "cursor"

        def fetch_after(self: Relay, token: str, most: int, _after: int, **others: Any) -> Any:
            after = int(cursor.read_text() or 0) if cursor.exists() else 0
            page = fetch(self, token, most, after, **others)
            if page.last is not None:
                cursor.write_text(str(page.last))
            return page

        Relay._fetch = fetch_after  # type: ignore[method-assign, assignment]


# --------------------------------------------------------------------------- the run


@dataclass
class Verdict:
    """What was committed, compared with what has arrived and what was handled."""

    committed: int = 0
    arrived: int = 0
    duplicates: int = 0
    handled: int = 0
    follow_ups: int = 0
    #: Each with its number, which must be 0.
    wrong: dict[str, int] = field(default_factory=dict)


class Run:
    """The processes, and what happens to them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shared = Shared()
        self.random = random.Random(options.seed)
        self.faults: Counter[str] = Counter()
        self.failed: list[str] = []
        self.seconds = 0.0
        self._processes: dict[str, int] = {}
        self._starts: Counter[str] = Counter()
        self._finished: set[str] = set()
        self._interrupted = False
        self._silent_since = 0.0

    def run(self) -> Verdict:
        begun = time.monotonic()
        options = self.options
        with contextlib.ExitStack() as stack:
            self.folder = Path(tempfile.mkdtemp(prefix="domain-events-outbox-faults-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            kind = DATABASES[options.database]
            self.server = None if kind is None else stack.enter_context(kind())
            self.node = stack.enter_context(Node(options.release))
            database = self.folder / "shop.db" if self.server is None else self.server.address
            self.adapter = ADAPTERS[options.adapter](database, options.lease, options.timeout)
            self.settings = Settings(
                self.node.url,
                options.seed,
                options.transactions,
                options.lease,
                options.timeout,
                options.broken or "",
            )
            self.engine = make_engine(database)  # the judge's
            stack.callback(self.engine.dispose)
            stack.callback(self._kill_all)
            self._create_tables()
            onlooker.bind_queue(self.node.url, ARRIVED, EXCHANGE, "#")
            self._start(SUBSCRIBER)
            self._wait_for_queue()
            try:
                self._work()
            except KeyboardInterrupt:
                self._interrupted = True
                print("interrupted: no more transactions; judging what was committed", flush=True)
            self._drain()
            verdict = self._verdict()
            self.seconds = time.monotonic() - begun
            if verdict.wrong:
                self._show_logs()
            return verdict

    # --- processes -------------------------------------------------------------------------------

    def _create_tables(self) -> None:
        # In a process of its own: the others are forked from this one, which has no connection.
        _, status = os.waitpid(self._fork(self.adapter.create), 0)
        if status:
            raise NodeError("the tables could not be created")
        create_tables(self.engine)
        self.engine.dispose()

    def _start(self, name: str) -> None:
        self._starts[name] += 1
        self._processes[name] = self._fork(lambda: self._be(name))

    def _fork(self, be: Callable[[], None]) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which is the parent's
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() == parent:
                be()
                status = 0
        except BaseException:  # noqa: BLE001 - it must not go on as a copy of the parent
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _be(self, name: str) -> None:
        file = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        settings = self.settings
        steps = Steps(self.shared, name, f"{settings.seed} {name} {self._starts[name]}")
        configure(settings.broker, middleware=[steps])
        self.adapter.watch(steps.executes)
        break_on_purpose(settings.broken, self.adapter, self.folder)
        role = {"service": serve, "relay": relay, "subscriber": subscribe}[name.partition(" ")[0]]
        role(self.shared, settings, name, self.adapter)

    def _supervise(self) -> None:
        """Start again what was killed."""
        for name, pid in list(self._processes.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self._processes[name]
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                self.faults[f"{name.partition(' ')[0]} killed"] += 1
                self._start(name)
            elif status == 0 and name in SERVICES:
                self._finished.add(name)
            else:
                self.failed.append(f"{name} ended with status {status}")
                self._start(name)
                self._wait(1.0)

    def _kill(self, name: str) -> None:
        if name in self._processes:
            os.kill(self._processes[name], signal.SIGKILL)

    def _kill_all(self) -> None:
        for pid in self._processes.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._processes.clear()

    def _wait(self, seconds: float) -> None:
        self._until(lambda: False, seconds)

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            self._supervise()
            time.sleep(0.02)
        return True

    def _wait_for_queue(self) -> None:
        """Events that are published before it exists do not reach the subscriber."""
        self.shared["quiet"] = 1
        if not self._until(lambda: onlooker.exists(self.node.url, HANDLES), PATIENCE):
            raise NodeError("the subscriber did not start; its queue does not exist")
        self.node.sync()  # else a crash may take the queue, which is young
        self.shared["quiet"] = 0

    # --- faults ----------------------------------------------------------------------------------

    def _work(self) -> None:
        """All transactions; at each of some equal parts of them, a fault."""
        total, shared = self.options.transactions, self.shared
        kinds = [self._broker_killed, self._relay_stopped, self._broker_away]
        if self.server is not None:
            kinds.insert(1, self._database_killed)
        parts = max(len(kinds), total // 60)
        for name in (*SERVICES, *RELAYS):
            self._start(name)
        order: list[Callable[[], None]] = []
        for part in range(1, parts + 1):
            shared["limit"] = total * part // parts
            if not order:
                order = self.random.sample(kinds, len(kinds))
            self._wait(self.random.uniform(0.05, 0.3))
            for name in (*SERVICES, *RELAYS, SUBSCRIBER):
                if self.random.random() < 0.1:
                    self._kill(name)
            order.pop()()
            if not self._until(self._at_limit, PATIENCE):
                self.failed.append(f"part {part} did not end within {PATIENCE:g} s")
                break
            self._progress(f"{self._begun():,} of {total:,} transactions")
        if not self._until(lambda: self._finished >= set(SERVICES), PATIENCE):
            self.failed.append(f"the services did not end within {PATIENCE:g} s")

    def _begun(self) -> int:
        return sum(self.shared[f"{name} begun"] for name in SERVICES)

    def _at_limit(self) -> bool:
        return self._begun() >= self.shared["limit"]

    def _broker_killed(self) -> None:
        self.faults["RabbitMQ killed, and started at once"] += 1
        self.node.kill()
        self._start_node()

    def _broker_away(self) -> None:
        self.faults["RabbitMQ killed, and away for longer than every timeout and lease"] += 1
        self.node.kill()
        self._wait(self.options.timeout + self.options.lease + 2.0)
        self._start_node()

    def _start_node(self) -> None:
        # A broker that is back may wait for minutes before it hands on retries: see HAND_ON.
        (self.node.folder / "advanced.config").write_text(HAND_ON)
        self.node.start(wait=False)
        self._wait(1.0)
        wait_for_broker(self.node.port)

    def _database_killed(self) -> None:
        assert self.server is not None
        self.faults["database killed, and started again"] += 1
        self.server.kill()
        self._wait(self.random.uniform(0, 1.0))
        self.server.start()

    def _relay_stopped(self) -> None:
        """In the middle of a publish, if it has any within a few seconds."""
        name, shared = self.random.choice(RELAYS), self.shared
        pause = f"{name} pause"
        shared[pause] = 1
        publishing = self._until(lambda: shared[pause] == 2, 5.0)
        shared[pause] = 0
        self._supervise()
        pid = self._processes[name]
        os.kill(pid, signal.SIGSTOP)
        where = "while it published" if publishing else "while it was idle"
        self.faults[f"relay stopped {where}, for longer than its lease"] += 1
        self._wait(self.options.lease + 1.0)
        with contextlib.suppress(ProcessLookupError):  # it had ended itself just before
            os.kill(pid, signal.SIGCONT)

    # --- the end ---------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Without faults, until everything was sent and handled, or nothing changes any more."""
        self.shared["quiet"] = self.shared["stop"] = 1
        self.node.start()
        if self.server is not None:
            self.server.start()
        for pid in self._processes.values():  # a relay may be stopped
            os.kill(pid, signal.SIGCONT)
        if not self._until(lambda: not set(SERVICES) & set(self._processes), PATIENCE):
            self.failed.append("a service did not stop")
        for name in (*RELAYS, SUBSCRIBER):  # they may be in a long pause after an outage
            if name in self._processes:
                self._kill(name)
            else:
                self._start(name)
        last: object = None
        self._silent_since = time.monotonic()
        while time.monotonic() < self._silent_since + SILENCE:
            self._wait(0.3)
            state = waiting, unhandled = self._state()
            if not waiting and unhandled <= 0:
                return
            if state != last:
                last, self._silent_since = state, time.monotonic()
                self._progress(f"{waiting:,} rows to send, {unhandled:,} events to handle")

    def _state(self) -> tuple[int, int]:
        with self.engine.begin() as connection:
            waiting, committed, handled = (
                int(connection.execute(text(f"SELECT COUNT(*) FROM {what}")).scalar_one())
                for what in (
                    OUTBOX,
                    "committed WHERE cause IS NULL",
                    "(SELECT DISTINCT event_id FROM handled) h",
                )
            )
        return waiting, committed - handled

    def _verdict(self) -> Verdict:
        with self.engine.begin() as connection:
            committed = [
                tuple(row)
                for row in connection.execute(
                    text("SELECT event_id, about, number, cause FROM committed ORDER BY number")
                )
            ]
            handled = Counter(connection.execute(text("SELECT event_id FROM handled")).scalars())
            left = connection.execute(text(f"SELECT COUNT(*) FROM {OUTBOX}")).scalar_one()
        bodies = [json.loads(body) for body in onlooker.take_all(self.node.url, ARRIVED)]
        copies = [(body["uuid_string"], body["domain_object_id"]) for body in bodies]
        arrived = list(dict.fromkeys(copies))
        sent = {event_id for event_id, _ in arrived}
        known = {event_id for event_id, *_ in committed}
        to_handle = {event_id for event_id, _, _, cause in committed if cause is None}
        causes = Counter(cause for *_, cause in committed if cause is not None)
        due = {
            event_id
            for event_id, _, number, cause in committed
            if cause is None and number % 3 == 0 and event_id in handled
        }
        out_of_order = 0
        for about in {about for _, about, *_ in committed if about is not None}:
            in_order = [each for each, of, *_ in committed if of == about and each in sent]
            as_sent = [each for each, of in arrived if of == about and each in known]
            out_of_order += sum(a != b for a, b in zip(in_order, as_sent, strict=True))
        wrong = {
            "arrived, but rolled back": len(sent - known),
            "committed, but never arrived": len(known - sent),
            "first copies out of the order of their object": out_of_order,
            "committed, but never handled": len(to_handle - set(handled)),
            "handled, but rolled back": len(set(handled) - to_handle),
            "handled more than once": sum(number > 1 for number in handled.values()),
            "follow-ups missing": len(due - set(causes)),
            "follow-ups made up, or more than one": len(set(causes) - due)
            + sum(number > 1 for number in causes.values()),
            "rows left in the outbox, or parked": int(left),
            "dead letters": onlooker.count(self.node.url, f"{HANDLES}-dl"),
            "programs that misbehaved": len(self.failed),
        }
        return Verdict(
            len(committed),
            len(arrived),
            len(copies) - len(arrived),
            sum(handled.values()),
            sum(causes.values()),
            {what: number for what, number in wrong.items() if number},
        )

    # --- showing ---------------------------------------------------------------------------------

    def _progress(self, words: str) -> None:
        kills = sum(number for what, number in self.faults.items() if what.endswith(" killed"))
        others = sum(self.faults.values()) - kills
        print(f"{words}; {kills:,} kills of processes, {others:,} other faults", flush=True)

    def _show_logs(self) -> None:
        for what in self.failed:
            print(what)
        for path in sorted(self.folder.glob("*.log")):
            print(f"--- {path.name}", *path.read_text().splitlines()[-25:], sep="\n")

    def outcome(self, verdict: Verdict) -> Outcome:
        options = self.options
        command = (
            f"python tests/outbox_faults.py --transactions {options.transactions} "
            f"--seed {options.seed} --database {options.database} --adapter {options.adapter} "
            f"--release {options.release}"
        )
        if options.broken:
            command += f' --broken "{options.broken}"'
        server = "SQLite" if self.server is None else self.server.title
        return Outcome(
            f"{server}, {TITLES[options.adapter]}, RabbitMQ {self.node.version}",
            command,
            self._figures(verdict),
            dict(self.faults),
            self._steps(),
        )

    def _figures(self, verdict: Verdict) -> dict[str, int]:
        kinds = {kind: sum(self.shared[f"{name} {kind}"] for name in SERVICES) for kind in KINDS}
        return {
            "transactions": sum(kinds.values()),
            **{f"of them {kind}": number for kind, number in kinds.items()},
            "events committed": verdict.committed,
            "of them published by a handler": verdict.follow_ups,
            "events arrived": verdict.arrived,
            "further copies of them": verdict.duplicates,
            "events handled": verdict.handled,
            "lost, made up, out of order, handled twice (must be 0)": sum(verdict.wrong.values()),
            "seconds": round(self.seconds),
        }

    def _steps(self) -> dict[str, list[int]]:
        """How often each kind of process ended itself at each step."""
        return {
            f"{when} {place}": [
                sum(self.shared[f"{name}: {when} {place}"] for name in names)
                for names in (SERVICES, RELAYS, (SUBSCRIBER,))
            ]
            for when, place in _steps()
        }


# --------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Outcome:
    """What came of a run, for a report."""

    title: str
    command: str
    figures: dict[str, int]
    faults: dict[str, int]
    #: By step: of services, of relays, of the subscriber.
    steps: dict[str, list[int]]


def report(outcomes: Sequence[Outcome]) -> str:
    """Tables of one run, or of several beside each other."""
    several = len(outcomes) > 1
    titles = [f"Run {n}" if several else each.title for n, each in enumerate(outcomes, 1)]
    totals = ["All"] if several else []

    def row(what: str, numbers: Sequence[int]) -> tuple[str, ...]:
        return (what, *(f"{number:,}" for number in (*numbers, *([sum(numbers)] * len(totals)))))

    def rows(of: Sequence[dict[str, int]]) -> Iterator[tuple[str, ...]]:
        for what in dict.fromkeys(what for each in of for what in each):
            yield row(what, [each.get(what, 0) for each in of])

    figures = rows([outcome.figures for outcome in outcomes])
    faults = rows([dict(sorted(outcome.faults.items())) for outcome in outcomes])
    steps = [
        (what, *(f"{sum(each.steps[what][kind] for each in outcomes):,}" for kind in range(3)))
        for what in outcomes[0].steps
        if any(sum(each.steps[what]) for each in outcomes)
    ]
    lines = [
        *(f"{n}. {each.title}" for n, each in enumerate(outcomes, 1) if several),
        *([""] if several else []),
        "To run it again:",
        "",
        ".. code-block:: sh",
        "",
        *(f"    {outcome.command}" for outcome in outcomes),
        "",
        *table(("What came of it", *titles, *totals), *figures),
        *table(("Fault", *titles, *totals), *faults),
        "Of the kills, those at a step of the process itself:",
        "",
        *table(("Step", "Service", "Relay", "Subscriber"), *steps),
    ]
    return "\n".join(lines)


def table(*rows: tuple[str, ...]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for first, *others in rows:
        lines += [f"   * - {first}", *(f"     - {other}" for other in others)]
    return [*lines, ""]


def show(paths: Sequence[Path]) -> str:
    """The report of runs that were kept with ``--json``."""
    return report([Outcome(**json.loads(path.read_text())) for path in paths])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="The exit status is 1 if anything is not as promised.",
    )
    parser.add_argument("--transactions", type=int, default=300, metavar="N")
    parser.add_argument("--seed", type=int, default=1, help="of transactions, kills and faults")
    parser.add_argument("--database", choices=DATABASES, default="postgresql")
    parser.add_argument("--adapter", choices=ADAPTERS, default="sqlalchemy")
    parser.add_argument("--release", choices=RELEASES, default="host", help="of RabbitMQ")
    parser.add_argument("--lease", type=float, default=3.0, help="seconds; default: 3")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds, less than the lease")
    parser.add_argument("--broken", choices=BROKEN, help="break a promise on purpose")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables, as RST")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what came of it")
    parser.add_argument(
        "--show", type=Path, nargs="+", metavar="FILE", help="only report runs that were kept"
    )
    options = parser.parse_args()
    if options.transactions < 1 or not 0 < options.timeout < options.lease:
        parser.error("give at least one transaction, and a timeout that is less than the lease")
    if options.show:
        try:
            return finish(show(options.show), options.report)
        except (OSError, ValueError, TypeError) as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 2
    try:
        run = Run(options)
        verdict = run.run()
    except NodeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    outcome = run.outcome(verdict)
    if options.json is not None:
        options.json.write_text(json.dumps(dataclasses.asdict(outcome), indent=1) + "\n")
    finish(report([outcome]), options.report)
    for what, number in verdict.wrong.items():
        print(f"NOT AS PROMISED: {what}: {number:,}")
    if not verdict.wrong:
        print("as promised")
    return 1 if verdict.wrong else 0


def finish(written: str, path: Path | None) -> int:
    print(written)
    if path is not None:
        fragment.write(path, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
