"""What the page "Transactions" says: at each crash point, and of the tables."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import onlooker
import pytest
import sqlalchemy
from databases import PgBouncer, ServerError
from sqlalchemy import Engine, MetaData, NullPool, text
from support import Names, wait_until

from domain_events import DomainEvent, Publisher
from domain_events.outbox import DIALECTS, close_couriers, create
from domain_events.sqlalchemy import Outbox, inbox_table, once, outbox_table, publish_on_commit
from domain_events.testing import EventBroker

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "transactions.rst").read_text()
PROGRAM = Path(__file__).parent / "programs" / "transactions.py"

TABLES = MetaData()
outbox_table(TABLES)
inbox_table(TABLES)


# --- crash points --------------------------------------------------------------------------------


class Bench(NamedTuple):
    """A database, an exchange, a queue that gets what is published, and a subscriber's."""

    engine: Engine
    url: str
    exchange: str
    published: str
    queue: str

    def run(self, what: str, point: str = "") -> subprocess.Popen[str]:
        arguments = [str(self.engine.url), self.url, self.exchange, self.queue, what, point]
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            text=True,
        )

    def work(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.scalar(text("SELECT count(*) FROM work")) or 0)

    def relay(self) -> int:
        """Send what was left behind, as if the leases of the dead were over."""
        with self.engine.begin() as connection:
            connection.execute(text("UPDATE domain_events_outbox SET leased_until = 0"))
        with Outbox(self.engine).relay(self.url) as relay:
            return relay.sweep()

    def events(self) -> list[str]:
        """The ids of what was published."""
        bodies = onlooker.take_all(self.url, self.published)
        return [DomainEvent.from_json(body).uuid_string for body in bodies]


@pytest.fixture
def bench(tmp_path: Path, broker_url: str, names: Names) -> Bench:
    engine = sqlalchemy.create_engine(
        f"sqlite:///{tmp_path}/work.db", poolclass=NullPool, connect_args={"timeout": 30}
    )
    TABLES.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE work (name text)"))
    bench = Bench(
        engine, broker_url, names.exchange(), names.queue("published"), names.queue("work")
    )
    onlooker.bind_queue(broker_url, bench.published, bench.exchange, "work.done")
    return bench


@pytest.mark.parametrize(
    ("what", "point", "stored", "sent", "relayed"),
    [
        ("publish", "before the commit", 0, 0, 0),
        ("publish", "before the publish", 1, 0, 0),  # lost
        ("publish", "after the confirm", 1, 1, 0),
        ("publish with an outbox", "before the commit", 0, 0, 0),
        ("publish with an outbox", "before the publish", 1, 0, 1),
        ("publish with an outbox", "after the confirm", 1, 1, 1),
    ],
)
def test_process_killed_around_a_commit_leaves_what_the_page_says(
    bench: Bench, what: str, point: str, stored: int, sent: int, relayed: int
) -> None:
    """The row, the event or both; a copy that the relay sends has the same id."""
    with bench.run(what, point) as killed:
        assert killed.wait(120) == -signal.SIGKILL
    assert bench.work() == stored
    before = bench.events()
    assert len(before) == sent
    assert bench.relay() == relayed
    after = bench.events()
    assert len(after) == relayed
    assert len({*before, *after}) == max(sent, relayed)


@pytest.mark.parametrize(
    ("what", "point", "works"),
    [
        ("handle", "in the handler", 1),
        ("handle", "before the ack", 2),
        ("handle once", "in the handler", 1),
        ("handle once", "before the ack", 1),
    ],
)
def test_killed_handler_has_worked_as_often_as_the_page_says(
    bench: Bench, what: str, point: str, works: int
) -> None:
    """Its event is delivered again; with the inbox it does its work, and publishes, once."""
    with bench.run(what, point) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "ready\n"
        with Publisher(bench.url, bench.exchange) as publisher:
            wait_until(lambda: onlooker.consumers(bench.url, bench.queue) == 1)
            publisher.publish(DomainEvent("work.ordered"))
        assert killed.wait(120) == -signal.SIGKILL
    with bench.run(what) as second:
        assert second.stdout is not None
        try:
            assert [second.stdout.readline() for _ in range(2)] == ["ready\n", "handled\n"]
        finally:
            second.terminate()
        assert second.wait(120) == 0  # it has finished what was delivered to it
    assert onlooker.take_all(bench.url, bench.queue) == []
    assert bench.work() == works
    if what == "handle once":
        bench.relay()
        assert len(set(bench.events())) == 1


def test_each_row_of_the_page_names_tests_that_exist() -> None:
    """A crash point that nobody tries is not written down."""
    table = PAGE.partition("Each crash point\n")[2].partition("\nThe tables\n")[0]
    rows = [row for row in re.split(r"\n   \* - ", table)[1:] if "process is killed" not in row]
    assert len(rows) >= 7
    for row in rows:
        found = re.findall(r"\.\. (test_\w+\.py)::(\w+)", row)
        assert found, row
        for file, name in found:
            assert f"def {name}(" in (Path(__file__).parent / file).read_text(), name


# --- the tables ----------------------------------------------------------------------------------


def nullable(column: str) -> str:
    return " NULL" if " NULL" in column and "NOT NULL" not in column else ""


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tables_of_the_page_are_those_that_are_made(dialect: str) -> None:
    """Each column, in its order, with whether it may be NULL; each index."""
    made: list[str] = []
    for statement in create(dialect):
        if statement.startswith("CREATE TABLE"):
            name = statement.split()[2]
            lines = statement.partition("(\n")[2].splitlines()[:-1]
            columns = [line.strip() for line in lines if "PRIMARY KEY (" not in line]
            made += [f"{name}.{column.split()[0]}{nullable(column)}" for column in columns]
        elif statement.startswith("CREATE INDEX"):
            made.append(" ".join(statement.split()[2:]))
    shown: list[str] = []
    section = PAGE.partition("\nThe tables\n")[2].partition("\nOperations\n")[0]
    name = ""
    for line in section.splitlines():
        if heading := re.match(r"``(domain_events_\w+)``(?:,|$)", line):
            name = heading[1]
        elif row := re.match(r"   \* - (.+)", line):
            names = re.findall(r"``(\w+)``", row[1])
            shown += [f"{name}.{each}{' NULL' * ('NULL' in row[1])}" for each in names]
        elif index := re.match(r"- ``(\w+ ON .*)``", line):
            shown.append(index[1])
    assert sorted(shown) == sorted(made)
    assert [each for each in shown if "ON" not in each] == [
        each for each in made if "ON" not in each
    ]


def test_outbox_needs_nothing_of_a_session(request: pytest.FixtureRequest) -> None:
    """As behind pgbouncer, which may give each transaction another connection."""
    url = request.getfixturevalue("postgresql").sqlalchemy_url
    engine = sqlalchemy.create_engine(url, poolclass=NullPool)
    TABLES.create_all(engine)
    outbox = Outbox(engine)
    with EventBroker(virtual_time=False) as broker:
        with engine.begin() as connection:
            publish_on_commit(connection, "a", 1, 7, outbox=outbox)
        assert outbox.wait(30)
        with engine.begin() as connection:
            left = publish_on_commit(connection, "a", 2, 7, outbox=outbox)
            connection.execute(
                text("UPDATE domain_events_outbox SET token = NULL, leased_until = 0")
            )
        with outbox.relay() as relay:
            wait_until(lambda: relay.sweep() + outbox.status().waiting == 0)
        close_couriers()
        assert broker.published[-1] == left
        assert len(broker.published) == 2
    engine.dispose()


def test_outbox_and_inbox_work_behind_pgbouncer(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Each transaction may get another connection of the server's, of which there are two.

    So nothing may be left on one: no lock, no setting, no LISTEN.
    """
    postgresql = request.getfixturevalue("postgresql")
    try:
        pgbouncer = PgBouncer(request.getfixturevalue("postgresql_server"), 2)
    except ServerError as error:
        pytest.skip(str(error))  # it is not installed
    with pgbouncer:
        engine = sqlalchemy.create_engine(
            pgbouncer.address.of(postgresql.database).sqlalchemy_url,
            connect_args={"prepare_threshold": None},
        )
        TABLES.create_all(engine)
        outbox = Outbox(engine)

        @once(engine, subscriber="mail")
        def follow(connection: sqlalchemy.Connection, event: DomainEvent) -> None:
            publish_on_commit(connection, "b", event.data, event.domain_object_id, outbox=outbox)

        def request_of(worker: int) -> None:
            for number in range(20):
                with engine.begin() as connection:
                    event = publish_on_commit(connection, "a", number, worker % 3, outbox=outbox)
                follow(event)
                follow(event)

        with EventBroker(virtual_time=False) as broker:
            with outbox.relay(idle=0.02) as relay, ThreadPoolExecutor() as threads:
                relay.start()
                list(threads.map(request_of, range(6)))
                wait_until(lambda: outbox.status().waiting == 0)
            close_couriers()
            keys = [event.routing_key for event in broker.published]
            assert (keys.count("a"), keys.count("b")) == (120, 120)
            assert "without waiting any longer" not in caplog.text
        engine.dispose()
