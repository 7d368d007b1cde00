"""``domain-events relay`` and ``domain-events outbox``."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import onlooker
import pytest
import shell
from databases import Address
from sqlalchemy import Engine, MetaData, create_engine, text
from support import wait_until

from domain_events import DomainEvent
from domain_events.outbox import INBOX, OUTBOX, write
from domain_events.sqlalchemy import inbox_table, outbox_table
from domain_events.sqlalchemy.outbox import executing

MODULE = """
from sqlalchemy import create_engine
from domain_events.sqlalchemy import Outbox

engine = create_engine("sqlite:///{file}")
outbox = Outbox(engine)
number = 3

def make():
    return outbox
"""


class Shop:
    """A database with an outbox, in which events are written that nobody sends."""

    def __init__(self, engine: Engine, exchange: str) -> None:
        self.engine = engine
        self.exchange = exchange
        metadata = MetaData()
        outbox_table(metadata)
        inbox_table(metadata)
        metadata.create_all(engine)

    def write(self, *numbers: int) -> None:
        with self.engine.begin() as connection:
            for n in numbers:
                event = DomainEvent("order.paid", n, f"order-{n}", f"event-{n}", headers={"n": n})
                write(
                    executing(connection), self.engine.dialect.name, event, exchange=self.exchange
                )

    def park(self, event_id: str) -> int:
        """The event is refused; its row's id."""
        with self.engine.begin() as connection:
            where = {"event_id": event_id}
            connection.execute(
                text(
                    f"UPDATE {OUTBOX} SET parked = 1.5, error = 'full\x1b[2J' "
                    "WHERE event_id = :event_id"
                ),
                where,
            )
            found = connection.execute(
                text(f"SELECT id FROM {OUTBOX} WHERE event_id = :event_id"), where
            )
            return int(found.scalar_one())


@pytest.fixture
def shop(tmp_path: Path, exchange: str) -> Shop:
    file = tmp_path / "shop.db"
    (tmp_path / "shop.py").write_text(MODULE.format(file=file))
    return Shop(create_engine(f"sqlite:///{file}"), exchange)


def data(url: str, queue: str) -> list[int]:
    return sorted(json.loads(body)["data"] for body in onlooker.take_all(url, queue))


def test_a_relay_sends_what_is_in_the_outbox(
    shop: Shop, tmp_path: Path, broker_url: str, queue: str
) -> None:
    url = str(shop.engine.url)
    shop.write(1, 2, 3)
    targets = [url, "env:SHOP", "shop:outbox", "shop:engine", "shop:make"]
    arguments = ["relay", "--status", "--json", *targets]
    before = shell.run(broker_url, *arguments, more={"SHOP": url}, cwd=tmp_path)
    assert [json.loads(line)["waiting"] for line in before.stdout.splitlines()] == [3] * 5
    done = shell.run(broker_url, "relay", "--once", "shop:make", cwd=tmp_path)
    assert (done.returncode, done.stdout.endswith(": 3 sent\n")) == (0, True), done.stderr
    assert data(broker_url, queue) == [1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_relay_sends_what_comes_until_a_signal_and_ends_well(
    shop: Shop, broker_url: str, queue: str, number: int
) -> None:
    with shell.running(broker_url, "relay", shop.engine.url, "--idle", "0.05") as relay:
        relay.saw("Relaying: sqlite:")
        shop.write(1)
        wait_until(lambda: onlooker.count(broker_url, queue) == 1)
        relay.send(number)
        assert relay.end() == 0


def test_several_databases_are_relayed_and_their_inboxes_pruned(
    shop: Shop, postgresql: Address, broker_url: str, queue: str
) -> None:
    other_url = postgresql.url.replace("postgresql://", "postgresql+psycopg://")
    other = Shop(create_engine(other_url), shop.exchange)
    for each in (shop, other):
        with each.engine.begin() as connection:
            connection.execute(text(f"INSERT INTO {INBOX} VALUES ('s', 'old', 1.0)"))

    def notes() -> int:
        number = 0
        for each in (shop, other):
            with each.engine.connect() as connection:
                number += connection.execute(text(f"SELECT COUNT(*) FROM {INBOX}")).scalar_one()
        return number

    arguments = ["relay", shop.engine.url, other_url, "--idle", "0.05"]
    with shell.running(broker_url, *arguments) as relay:
        relay.saw("Relaying: ")
        shop.write(1)
        other.write(2)
        wait_until(lambda: onlooker.count(broker_url, queue) == 2)
        wait_until(lambda: notes() == 0)
        relay.send(signal.SIGTERM)
        assert relay.end() == 0
    other.engine.dispose()
    assert data(broker_url, queue) == [1, 2]


def test_parked_events_are_listed_retried_and_discarded(
    shop: Shop, tmp_path: Path, broker_url: str, queue: str
) -> None:
    shop.write(1, 2, 3)
    first, second = shop.park("event-1"), shop.park("event-2")

    def outbox(command: str, *arguments: object) -> tuple[int, str]:
        done = shell.run(broker_url, "outbox", command, "shop:outbox", *arguments, cwd=tmp_path)
        return done.returncode, done.stdout

    status, table = outbox("list")
    assert status == 0
    assert [line.split("\t")[0] for line in table.splitlines()] == ["id", str(first), str(second)]
    assert "full\\x1b[2J" in table
    one = json.loads(outbox("list", "--json", "--limit", 1)[1])
    assert (one["id"], one["error"], one["event"]["data"]) == (first, "full\x1b[2J", 1)
    assert outbox("discard", second)[0] == 2, "nobody was asked"
    assert outbox("retry")[0] == 2, "neither ids nor --all"
    assert outbox("retry", first, 999)[0] == 3
    status, copy = outbox("discard", second, "--yes")
    assert status == 0
    assert shell.run(broker_url, "relay", shop.engine.url, "--once").returncode == 0
    assert data(broker_url, queue) == [1, 3]
    arguments = ["publish", "--lines", "--exchange", shop.exchange]
    assert shell.run(broker_url, *arguments, stdin=copy).stdout == "event-2\n"
    properties, _ = onlooker.take(broker_url, queue)
    assert properties.headers is not None
    assert properties.headers["n"] == 2


def test_discarding_asks_on_a_terminal(shop: Shop, tmp_path: Path) -> None:
    shop.write(1)
    row = shop.park("event-1")
    for answer, status in (("n", 130), ("y", 0)):
        with shell.on_terminal("memory://", "outbox", "discard", shop.engine.url, row) as discard:
            discard.type(f"{answer}\n")
            assert discard.end() == status
    done = shell.run("memory://", "outbox", "list", "--json", shop.engine.url)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("target", "status", "words"),
    [
        ("shop:nothing", 9, "has no 'nothing'"),
        ("shop:number", 9, "is of type int; name an Outbox or an Engine"),
        ("nowhere:outbox", 9, "There is no module 'nowhere'"),
        ("shop", 2, "write package.module:attribute"),
        ("env:NOWHERE", 2, "NOWHERE is not set"),
        ("sqlite:///empty.db", 2, "there is no table domain_events_outbox"),
        ("sqlite:///mistyped.db", 11, "there is no file mistyped.db"),
        ("orakel://a:geheim@h/d", 2, "not one that SQLAlchemy knows"),
        ("postgresql+psycopg://a:geheim@127.0.0.1:1/d", 11, "cannot be used"),
    ],
)
def test_what_is_not_an_outbox_is_one_line_with_a_status(
    shop: Shop, tmp_path: Path, target: str, status: int, words: str
) -> None:
    (tmp_path / "empty.db").touch()
    done = shell.run("memory://", "relay", target, "--status", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert not (tmp_path / "mistyped.db").exists()
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "geheim" not in done.stderr


def test_an_outbox_whose_broker_is_away_keeps_its_events(
    shop: Shop, broker_url: str, queue: str, unused_port: int
) -> None:
    shop.write(1)
    arguments = ["relay", shop.engine.url, "--once"]
    away = f"amqp://guest:guest@127.0.0.1:{unused_port}/"
    done = shell.run(away, *arguments, "--timeout", 1)
    assert done.returncode == 4
    assert shell.run(broker_url, *arguments).returncode == 0
    assert data(broker_url, queue) == [1]
