#!/usr/bin/env python3
"""Kills services, relays, a subscriber, the database and the broker, while events are committed.

    python tests/outbox_faults.py --transactions 2000 --seed 7 --database postgresql

Three services commit transactions with events of several objects: a third is rolled back, a third
has SAVEPOINTs, some of them rolled back. Two relays send what the services leave behind; a
subscriber handles the events once, and publishes a follow-up of some. All of them are killed at
random steps (SIGKILL), from between two statements to between confirm and deleted row. The database
is killed and started again; so is RabbitMQ, which is also away for longer than every timeout; a
relay is stopped (SIGSTOP) for longer than its lease while it publishes.

Then what the database says was committed, in a table of the services' own, is compared with what
has arrived in a queue, and with what was handled. The exit status is 1 if anything is not as
promised. ``--broken`` breaks a promise on purpose, to see that it is noticed.

Ctrl-C ends the transactions; what was committed so far is judged. A second one ends the program.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import onlooker
import sqlalchemy
from databases import MariaDB, PostgreSQL, Server
from faults.broker import HAND_ON
from rabbitmq_node import RELEASES, Node, NodeError, wait_for_broker
from sqlalchemy import Connection, Engine, text

from domain_events import (
    Backoff,
    DomainEvent,
    DomainEventsError,
    Middleware,
    Operation,
    Outgoing,
    Publisher,
    Subscriber,
    configure,
    outbox,
)
from domain_events.outbox import OUTBOX, Relay
from domain_events.outbox.sending import Sender
from domain_events.sqlalchemy import (
    Outbox,
    first_time,
    inbox_table,
    once,
    outbox_table,
    publish_on_commit,
)

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
#: Its rows are left to the relays, as if it died after each commit.
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

    def watch(self, engine: Engine) -> None:
        """Step before and after each statement and each commit."""

        def place(sql: str) -> str:
            return next((name for start, name in _STATEMENTS if start in sql), "other statement")

        def before(_conn: Any, _cursor: Any, sql: str, *_others: Any) -> None:
            self.step("before", place(sql))

        def after(_conn: Any, _cursor: Any, sql: str, *_others: Any) -> None:
            self.step("after", place(sql))

        sqlalchemy.event.listen(engine, "before_cursor_execute", before)
        sqlalchemy.event.listen(engine, "after_cursor_execute", after)
        commit = engine.dialect.do_commit

        def do_commit(connection: Any) -> None:
            self.step("before", "commit")
            commit(connection)
            self.step("after", "commit")

        engine.dialect.do_commit = do_commit  # type: ignore[method-assign, assignment]


# --------------------------------------------------------------------------- the database


def make_engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return sqlalchemy.create_engine(url)
    engine = sqlalchemy.create_engine(url, connect_args={"timeout": 60})

    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", on_connect)
    sqlalchemy.event.listen(engine, "begin", on_begin)
    return engine


def create_tables(engine: Engine) -> None:
    metadata = sqlalchemy.MetaData()
    outbox_table(metadata)
    inbox_table(metadata)
    metadata.create_all(engine)
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
    connection: Connection, event: DomainEvent[Any], number: int, cause: str | None = None
) -> None:
    """The services' own record of the event, in the event's transaction."""
    connection.execute(
        text(
            "INSERT INTO committed (event_id, about, number, cause) "
            "VALUES (:event_id, :about, :number, :cause)"
        ),
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

    database: str  # its URL
    broker: str
    seed: int
    transactions: int
    lease: float
    timeout: float
    broken: str


class LeavesAll(Outbox):
    """Leaves all rows to the relays."""

    def _take(self, written: Any) -> None:
        pass


def serve(shared: Shared, settings: Settings, name: str, engine: Engine) -> None:
    """A service: its share of the transactions."""
    which = LeavesAll if name == LEAVES else Outbox
    box = which(engine, lease=settings.lease, timeout=settings.timeout)
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
            transact(engine, box, kind, chance, early if settings.broken == BROKEN[1] else None)
        except sqlalchemy.exc.DBAPIError as error:  # the database was killed; it comes back
            print(f"transaction {index}: {error}", flush=True)
            engine.dispose()
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 0.03))
    box.wait(PATIENCE)
    outbox.close_couriers()


def transact(
    engine: Engine, box: Outbox, kind: str, chance: random.Random, early: Publisher | None
) -> None:
    abouts = sorted(chance.sample(range(OBJECTS), 2))

    with engine.connect() as connection, connection.begin() as transaction:

        def write(about: str | None) -> None:
            number = 0
            if about is not None:
                of = {"about": about}
                connection.execute(
                    text("UPDATE objects SET number = number + 1 WHERE about = :about"), of
                )
                found = connection.execute(
                    text("SELECT number FROM objects WHERE about = :about"), of
                )
                number = found.scalar_one()
            event = publish_on_commit(
                connection,
                "thing.changed",
                {"number": number},
                about,
                exchange=EXCHANGE,
                outbox=box,
            )
            note_committed(connection, event, number)
            if early is not None:
                with contextlib.suppress(DomainEventsError):
                    early.publish(event)

        names = [f"object-{number}" for number in abouts]
        for about in names:  # always in this order: no deadlock
            connection.execute(
                text("UPDATE objects SET number = number WHERE about = :about"), {"about": about}
            )
        write(names[0])
        if kind == "with SAVEPOINTs":
            for about in (names[1], names[0]):
                with connection.begin_nested() as savepoint:
                    write(about)
                    if chance.random() < 0.5:
                        savepoint.rollback()
        write(names[1])
        write(chance.choice((None, names[0])))
        if kind == "rolled back":
            transaction.rollback()


def relay(_shared: Shared, settings: Settings, name: str, engine: Engine) -> None:
    Outbox(engine).relay(batch=40, lease=settings.lease, idle=0.2, timeout=settings.timeout).run()


def subscribe(_shared: Shared, settings: Settings, _name: str, engine: Engine) -> None:
    box = Outbox(engine, lease=settings.lease, timeout=settings.timeout)

    def handle(connection: Connection, event: DomainEvent[Any]) -> None:
        connection.execute(
            text("INSERT INTO handled (event_id) VALUES (:event_id)"),
            {"event_id": event.uuid_string},
        )
        if event.data["number"] % 3 == 0:
            follow_up = publish_on_commit(
                connection, "thing.followed", {}, exchange=EXCHANGE, outbox=box
            )
            note_committed(connection, follow_up, 0, event.uuid_string)

    def handle_outside(event: DomainEvent[Any]) -> None:
        with engine.begin() as connection:
            if not first_time(connection, event):
                return
        with engine.begin() as connection:
            handle(connection, event)

    subscriber = Subscriber(exchange=EXCHANGE)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            subscriber.register(
                handle_outside if settings.broken == BROKEN[3] else once(engine)(handle),
                HANDLES,
                ["thing.changed"],
                max_retries=1000,
                retry_on=sqlalchemy.exc.DBAPIError,
                backoff=Backoff(first=0.2, maximum=1.0),
            )
            break
        except DomainEventsError:  # the broker is away
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    subscriber.start_consuming()


def break_on_purpose(broken: str, engine: Engine, folder: Path) -> None:
    """In this process only."""
    if broken == "delete before the confirm":
        send = Sender._send

        def delete_first(self: Sender, rows: Any, *others: Any) -> None:
            with engine.begin() as connection:
                for row in rows:
                    connection.execute(text(f"DELETE FROM {OUTBOX} WHERE id = {row.id}"))
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
            url = (
                f"sqlite:///{self.folder}/shop.db"
                if self.server is None
                else self.server.address.sqlalchemy_url
            )
            self.settings = Settings(
                url,
                self.node.url,
                options.seed,
                options.transactions,
                options.lease,
                options.timeout,
                options.broken or "",
            )
            self.engine = make_engine(url)
            stack.callback(self.engine.dispose)
            stack.callback(self._kill_all)
            create_tables(self.engine)
            self.engine.dispose()
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

    def _start(self, name: str) -> None:
        self._starts[name] += 1
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._processes[name] = pid
            return
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which is the parent's
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() == parent:
                self._be(name)
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
        engine = make_engine(settings.database)
        steps.watch(engine)
        break_on_purpose(settings.broken, engine, self.folder)
        role = {"service": serve, "relay": relay, "subscriber": subscribe}[name.partition(" ")[0]]
        role(self.shared, settings, name, engine)

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

    def figures(self, verdict: Verdict) -> list[tuple[str, str]]:
        kinds = {kind: sum(self.shared[f"{name} {kind}"] for name in SERVICES) for kind in KINDS}
        return [
            ("transactions", f"{sum(kinds.values()):,}"),
            *((f"of them {kind}", f"{number:,}") for kind, number in kinds.items()),
            ("events committed", f"{verdict.committed:,}"),
            ("of them published by a handler", f"{verdict.follow_ups:,}"),
            ("events arrived", f"{verdict.arrived:,}"),
            ("further copies of them", f"{verdict.duplicates:,}"),
            ("events handled", f"{verdict.handled:,}"),
            (
                "lost, made up, out of order, handled twice (must be 0)",
                f"{sum(verdict.wrong.values()):,}",
            ),
            ("seconds", f"{self.seconds:.0f}"),
        ]

    def steps(self) -> list[tuple[str, ...]]:
        """How often each kind of process ended itself at each step."""
        rows = []
        for when, place in _steps():
            numbers = [
                sum(self.shared[f"{name}: {when} {place}"] for name in names)
                for names in (SERVICES, RELAYS, (SUBSCRIBER,))
            ]
            if any(numbers):
                rows.append((f"{when} {place}", *(f"{number:,}" for number in numbers)))
        return rows


def table(*rows: tuple[str, ...]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for first, *others in rows:
        lines += [f"   * - {first}", *(f"     - {other}" for other in others)]
    return [*lines, ""]


def report(run: Run, verdict: Verdict) -> str:
    options = run.options
    command = (
        f"python tests/outbox_faults.py --transactions {options.transactions} "
        f"--seed {options.seed} --database {options.database}"
    )
    if options.broken:
        command += f' --broken "{options.broken}"'
    server = "SQLite" if run.server is None else run.server.title
    lines = [
        f"{server}, RabbitMQ {run.node.version}. To run it again::",
        "",
        f"    {command}",
        "",
        *table(("What came of it", "Number"), *run.figures(verdict)),
        *table(("Fault", "How often"), *((k, f"{n:,}") for k, n in sorted(run.faults.items()))),
        "Of the kills, those at a step of the process itself:",
        "",
        *table(("Step", "Service", "Relay", "Subscriber"), *run.steps()),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="The exit status is 1 if anything is not as promised.",
    )
    parser.add_argument("--transactions", type=int, default=300, metavar="N")
    parser.add_argument("--seed", type=int, default=1, help="of transactions, kills and faults")
    parser.add_argument("--database", choices=DATABASES, default="postgresql")
    parser.add_argument("--release", choices=RELEASES, default="host", help="of RabbitMQ")
    parser.add_argument("--lease", type=float, default=3.0, help="seconds; default: 3")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds, less than the lease")
    parser.add_argument("--broken", choices=BROKEN, help="break a promise on purpose")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables, as RST")
    options = parser.parse_args()
    if options.transactions < 1 or not 0 < options.timeout < options.lease:
        parser.error("give at least one transaction, and a timeout that is less than the lease")
    try:
        run = Run(options)
        verdict = run.run()
    except NodeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    written = report(run, verdict)
    print(written)
    if options.report is not None:
        options.report.write_text(written)
    for what, number in verdict.wrong.items():
        print(f"NOT AS PROMISED: {what}: {number:,}")
    if not verdict.wrong:
        print("as promised")
    return 1 if verdict.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
