"""The outbox beside others, in PostgreSQL: ``python -m benchmarks --outbox``.

Three things are measured: how fast a relay sends what waits, how long an event takes from the
commit of its transaction to its handler, and how much longer a transaction takes with an event in
it. Every sample has a database of its own on the same server, and processes of its own; in each
round every outbox has its turn, in another order each time. The events are the same, and so is the
handler, which is this library's.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from databases import Address, PostgreSQL, Server
from databases import install as install_databases
from rabbitmq_node import Node, free_port, install

from benchmarks import brokerside, environments
from benchmarks.peers.driver import percentile
from benchmarks.registry import Peer
from benchmarks.running import machine, say, shuffled
from benchmarks.samples import Driver, SampleFailed
from benchmarks.summary import Summary, short
from benchmarks.tables import Table, aligned, list_table

#: Seconds for one step of a sample.
_PATIENCE = 300.0
_LOOK_EVERY = 0.05


@dataclass(frozen=True)
class Measured:
    """An outbox, used in one way.

    :ivar waiting: SQL that counts its rows that are not sent.
    """

    title: str
    peer: Peer
    waiting: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)


def _ours(framework: str) -> Measured:
    peer = Peer(
        "domain_events",
        f"this library, {framework}",
        f"outbox_{framework.lower()}_driver.py",
        distribution="domain-events-rabbitmq",
        way="publish_on_commit; the process sends it after the commit, and a relay the rest",
    )
    return Measured(peer.title, peer, "domain_events_outbox")


_FASTSTREAM = Peer(
    "faststream-outbox",
    "faststream-outbox",
    "outbox_faststream_driver.py",
    needs=("faststream-outbox[asyncpg]>=0.19,<0.20", "faststream[rabbit]>=0.7.6,<0.8"),
    distribution="faststream-outbox",
    lacks="does not promise the order of an object's events",
    way="a RabbitMQ publisher as the decorator of its subscriber; asyncpg, with LISTEN/NOTIFY",
)
_PATTERN = Peer(
    "django-outbox-pattern",
    "django-outbox-pattern",
    "outbox_pattern_driver.py",
    needs=("django-outbox-pattern>=3.2,<4", "psycopg[binary]>=3.2,<4"),
    distribution="django-outbox-pattern",
    lacks="sends over STOMP without receipts (confirms), and does not promise the order",
    way="Published.objects.create(); manage.py publish",
)
_TUNED = {"max_workers": 4, "fetch_batch_size": 100, "terminal_flush_batch_size": 100}
MEASURED = (
    _ours("SQLAlchemy"),
    _ours("Django"),
    Measured("faststream-outbox", _FASTSTREAM, "outbox"),
    Measured(
        "faststream-outbox, tuned",
        _FASTSTREAM,
        "outbox",
        # As its pages about performance and subscribers recommend for throughput.
        {"subscriber": _TUNED},
    ),
    Measured("django-outbox-pattern", _PATTERN, "published WHERE status = 1"),
)
_HANDLER = MEASURED[0]


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    #: Events that a relay sends.
    relayed: int
    #: Transactions a second, and how many of them, from commit to handler.
    rate: int
    committed: int
    #: Transactions of each kind.
    transactions: int

    @classmethod
    def of(cls, *, quick: bool, rounds: int | None) -> Effort:
        if quick:
            return cls(rounds or 1, 2_000, 50, 200, 200)
        return cls(rounds or 5, 10_000, 50, 500, 500)


@dataclass
class Outcome:
    """The samples of a run: by title, and by what was measured, in seconds or events a second."""

    effort: Effort
    servers: str
    machine: dict[str, str]
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    #: By title: why something has no figures.
    failed: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """:raises ValueError: the file does not contain results of outboxes."""
        kept = json.loads(path.read_text())
        try:
            return cls(Effort(**kept.pop("effort")), **kept)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} has no results of outboxes: {error}") from error

    def add(self, title: str, figures: dict[str, float]) -> None:
        taken = self.samples.setdefault(title, {})
        for key, value in figures.items():
            taken.setdefault(key, []).append(value)

    def summary(self, title: str, key: str) -> Summary | None:
        return Summary.of(self.samples.get(title, {}).get(key, []))


class Place:
    """A RabbitMQ and a PostgreSQL, with a database for each sample."""

    def __init__(self, server: Server, url: str, stomp: int = 0) -> None:
        self.server = server
        self.url = url
        self._stomp = stomp
        self._numbers = itertools.count(1)

    @contextlib.contextmanager
    def database(self, measured: Measured) -> Iterator[tuple[Address, dict[str, Any]]]:
        """A new one, with the options of drivers that use it; and an empty queue."""
        name = f"bench_{next(self._numbers)}"
        queue = f"bench-outbox-{uuid.uuid4()}"
        address = self.server.address
        with psycopg.connect(address.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        where = {
            "host": address.host,
            "port": address.port,
            "user": address.user,
            "password": address.password,
            "name": name,
        }
        options = {
            "url": self.url,
            "stomp": self._stomp,
            "database": where,
            "queue": queue,
            **measured.options,
        }
        try:
            yield address.of(name), options
        finally:
            brokerside.delete(self.url, queue)
            with psycopg.connect(address.url, autocommit=True) as connection:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def relay(
    place: Place, measured: Measured, effort: Effort, patience: float = 10.0
) -> dict[str, float]:
    """Events a second, from a relay's first look until nothing waits.

    :param patience: seconds until all events must have arrived, then.
    :raises SampleFailed: they have not.
    """
    with place.database(measured) as (address, options):
        options["count"] = effort.relayed
        brokerside.declare(place.url, options["queue"], "quorum")
        with Driver(measured.peer, "fill", options) as filling:
            filling.hear(_PATIENCE)
        with (
            psycopg.connect(address.url, autocommit=True) as connection,
            Driver(measured.peer, "relay", options) as driver,
        ):
            connection.execute("ANALYZE")
            driver.hear(_PATIENCE)
            begun = time.perf_counter()
            driver.go()
            _wait_until_empty(connection, measured)
            seconds = time.perf_counter() - begun
        _check_arrived(place.url, options["queue"], effort.relayed, patience)
    return {"relay": effort.relayed / seconds}


def _wait_until_empty(connection: Any, measured: Measured) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        row = connection.execute(f"SELECT count(*) FROM {measured.waiting}").fetchone()
        if not row[0]:
            return
        if time.monotonic() > deadline:
            raise SampleFailed(f"{row[0]} events wait after {_PATIENCE:g} s")
        time.sleep(_LOOK_EVERY)


def _check_arrived(url: str, queue: str, count: int, patience: float) -> None:
    """All of them: a relay that is fast because it loses events has no figures."""
    deadline = time.monotonic() + patience
    while True:
        with brokerside.channel(url) as on:
            arrived = on.queue_declare(queue, passive=True).messages
        if arrived >= count:
            return
        if time.monotonic() > deadline:
            raise SampleFailed(f"{arrived} of {count} events have arrived")
        time.sleep(_LOOK_EVERY)


def latency(place: Place, measured: Measured, effort: Effort) -> dict[str, float]:
    """Seconds from the end of a commit to the beginning of the handler."""
    with place.database(measured) as (_, options):
        options["count"] = 0
        with Driver(measured.peer, "fill", options) as creating:
            creating.hear(_PATIENCE)
        options |= {"count": effort.committed, "rate": effort.rate}
        with (
            Driver(_HANDLER.peer, "handle", options) as handling,
            Driver(measured.peer, "relay", options) as relaying,
            Driver(measured.peer, "at_rate", options) as committing,
        ):
            for each in (handling, relaying, committing):
                each.hear(_PATIENCE)
            relaying.go()
            committing.go()
            committed = committing.hear(_PATIENCE)["times"]
            handled = handling.hear(_PATIENCE)["times"]
    warm = effort.committed // 10
    taken = [handled[number] - committed[number] for number in list(committed)[warm:]]
    return {"p50": percentile(taken, 50), "p99": percentile(taken, 99)}


def cost(place: Place, measured: Measured, effort: Effort) -> dict[str, float]:
    """Seconds of a transaction without an event, and with one."""
    with place.database(measured) as (_, options):
        options["count"] = 0
        brokerside.declare(place.url, options["queue"], "quorum")
        with Driver(measured.peer, "fill", options) as creating:
            creating.hear(_PATIENCE)
        options["count"] = effort.transactions
        with Driver(measured.peer, "cost", options) as driver:
            driver.hear(_PATIENCE)
            driver.go()
            taken: dict[str, float] = driver.hear(_PATIENCE)
    extra = {f"{kind} more": taken[kind] - taken["without"] for kind in taken if kind != "without"}
    return {"without": taken["without"], **extra}


_Take = Callable[[Place, Measured, Effort], dict[str, float]]
_SAMPLES: tuple[_Take, ...] = (relay, latency, cost)


def measure(release: str, effort: Effort) -> Outcome:
    """All samples, interleaved.

    :raises NodeError: a server cannot be started.
    """
    install([release])
    install_databases(["postgresql"])
    taking_part = []
    # What else the machine does: a figure of a busy one is worth less.
    load = f"{os.getloadavg()[0]:.1f}"
    outcome = Outcome(effort, "", machine() | {"load": load})
    for measured in MEASURED:
        try:
            environments.command(measured.peer)
            outcome.versions[measured.title] = environments.version(measured.peer)
            taking_part.append(measured)
        except environments.Unavailable as error:
            outcome.failed[measured.title] = str(error)
            say(f"{measured.title} is left out: {error}")
    stomp = free_port()
    config = f"stomp.listeners.tcp.1 = 127.0.0.1:{stomp}\ndisk_free_limit.absolute = 500MB\n"
    say(f"starting PostgreSQL and RabbitMQ ({release})")
    with (
        PostgreSQL() as server,
        Node(release, config=config, plugins=["rabbitmq_stomp"]) as node,
    ):
        outcome.servers = f"{_version(server)}, RabbitMQ {node.version}"
        place = Place(server, node.url, stomp)
        turns = [
            (take, number, measured)
            for number in range(1, effort.rounds + 1)
            for take in _SAMPLES
            for measured in shuffled(taking_part, f"{take.__name__} {number}")
        ]
        try:
            _take_turns(place, turns, outcome)
        except KeyboardInterrupt:
            say("interrupted; partial results follow")
    return outcome


def _take_turns(
    place: Place, turns: Sequence[tuple[_Take, int, Measured]], outcome: Outcome
) -> None:
    for progress, (take, number, measured) in enumerate(turns, 1):
        where = f"[{progress}/{len(turns)}] {take.__name__}, {measured.title}, round {number}"
        try:
            figures = take(place, measured, outcome.effort)
        except (SampleFailed, brokerside.ConnectionFailed, psycopg.Error) as error:
            outcome.failed[measured.title] = f"{take.__name__}: {error}"
            say(f"{where}: FAILED, {error}")
            continue
        outcome.add(measured.title, figures)
        say(f"{where}: {', '.join(f'{key} {short(value)}' for key, value in figures.items())}")


def _version(server: Server) -> str:
    with psycopg.connect(server.address.url) as connection:
        (version,) = connection.execute("SHOW server_version").fetchone() or ("",)
    return f"PostgreSQL {version.split()[0]}"


# --------------------------------------------------------------------------- tables

# Of three columns, so that they fit on a phone.
_TABLES = {
    "Outboxes in PostgreSQL": (
        ("relay", "relay, events/s", 1.0),
        ("p50", "commit to handler p50, ms", 1e3),
        ("p99", "p99, ms", 1e3),
    ),
    "A transaction, without and with an event": (
        ("without", "without an event, ms", 1e3),
        ("outbox more", "more with one in the outbox, ms", 1e3),
        ("after more", "more with one published after the commit, ms", 1e3),
    ),
}


def heading(outcome: Outcome) -> str:
    """Where and how it was measured."""
    effort, here = outcome.effort, outcome.machine
    return (
        f"{outcome.servers}, Python {here['python']}, {here['cores']} cores of "
        f"{here['processor']}, for both servers and all programs, with a load average of "
        f"{here.get('load', '?')} before the run. {effort.relayed:,} events of "
        f"about 200 bytes wait for the relay; {effort.rate} transactions/s from commit to handler; "
        f"{effort.transactions} transactions of each kind, one after the other. Median "
        f"(lowest-highest) of at most {effort.rounds} interleaved rounds."
    )


def tables(outcome: Outcome) -> list[Table]:
    """The figures, and who was measured."""
    shown = [each for each in MEASURED if each.title in outcome.samples]
    failed = [f"{title}: {why}" for title, why in outcome.failed.items()]
    who = [
        (each.title, outcome.versions[each.title], each.peer.way + _options(each)) for each in shown
    ]
    lacks = {each.peer.title: each.peer.lacks for each in shown if each.peer.lacks}
    return [
        *(
            Table(
                title,
                ("", *(title for _, title, _ in columns)),
                tuple(
                    (each.title, *(_cell(outcome, each, *column) for column in columns))
                    for each in shown
                ),
                tuple(failed) if columns[0][0] == "relay" else (),
            )
            for title, columns in _TABLES.items()
        ),
        Table(
            "Who was measured, and how",
            ("", "version", "way"),
            tuple(who),
            tuple(f"{title} {what}." for title, what in lacks.items()),
        ),
    ]


def _options(measured: Measured) -> str:
    options = measured.options.get("subscriber", {})
    return "".join(f"; {name}={value}" for name, value in options.items())


def _cell(outcome: Outcome, measured: Measured, key: str, _title: str, scale: float) -> str:
    found = outcome.summary(measured.title, key)
    if found is None:
        return "-"
    median, low, high = (short(value * scale) for value in (found.median, found.low, found.high))
    return median if found.samples == 1 else f"{median} ({low}-{high})"


def as_text(outcome: Outcome) -> str:
    parts = [heading(outcome)]
    parts += [
        f"{table.title}\n{'-' * len(table.title)}\n{aligned(table)}" for table in tables(outcome)
    ]
    return "\n\n".join(parts) + "\n"


def as_rst(outcome: Outcome) -> str:
    """For the documentation."""
    parts: list[str] = [heading(outcome)]
    for table in tables(outcome):
        parts.append(list_table(table))
        parts += ["\n".join(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n\n".join(parts) + "\n"
