"""The brokers and databases that tests run against, and what keeps tests out of each other's way.

Every test run has one private RabbitMQ node, shared by its tests and by all workers of
pytest-xdist: fixture `broker_url`. Tests that kill, stop or configure a broker take a node of their
own: `killable_node` (one per worker, running again at the start of each test), `own_node` (new for
the test), or `node_factory`. All of them stand on `rabbitmq_release`, which gives their tests the
marker `rabbitmq`; a test that starts a node in some other way has it too, by
`pytest.mark.usefixtures`.

Each worker also has a PostgreSQL and a MariaDB of its own, from the first test that takes one
(tools/databases.py). A test gets the address of a fresh database (`postgresql`, `mariadb`), and may
kill and stop the server below it (`postgresql_server`, `mariadb_server`).

Environment: DOMAIN_EVENTS_TEST_URL names a broker to use instead of the shared node;
DOMAIN_EVENTS_TEST_RELEASE the RabbitMQ release of the nodes started here (tools/rabbitmq_node.py),
or `none`: then a test that takes a RabbitMQ fails. `make check` sets that, and runs those without
the marker. DOMAIN_EVENTS_TEST_DATABASES=none skips the tests that take a database server.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import onlooker
import pytest
import rabbitmq_node
from bench import Bench
from databases import Address, MariaDB, PostgreSQL, Server, ServerError
from faults.broker import HAND_ON
from hypothesis import settings
from managed import Managed
from rabbitmq_node import Node, NodeError
from support import Names, prefix_of, wait_until

from domain_events import Publisher
from domain_events.pytest_plugin import event_broker

__all__ = ["event_broker"]  # the fixture that users have, for the tests of it

# No deadline anywhere: machines that are shared are slow at times.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
# For tests that make up what they do: pytest --hypothesis-profile=thorough
settings.register_profile("thorough", max_examples=300, deadline=None)

# With pytest-xdist. Runs of the fault harness keep a core busy, and its verdict counts seconds: two
# at a time would be in each other's way. Samples of the bench have the same queues. The others have
# a server that takes seconds to start.
ON_ONE_WORKER = (
    "test_fault_runs.py",
    "test_benchmarks.py",
    "test_cli_doctor.py",
    "test_cli_topology.py",
    "test_databases.py",
    "test_security.py",
)
OWN_NODE_FIXTURES = {"killable_node", "node_factory", "own_node"}

_shared: Node | None = None


def _release() -> str:
    return os.environ.get("DOMAIN_EVENTS_TEST_RELEASE") or "host"


def _no_nodes() -> bool:
    return _release() == rabbitmq_node.NO_NODES


def _given_url() -> str | None:
    return os.environ.get("DOMAIN_EVENTS_TEST_URL") or None


def _start_shared_node(release: str) -> Node:
    """Start the run's node without waiting for it: it boots while tests are collected."""
    global _shared
    if _shared is None:
        _shared = Node(release)
        _shared.start(wait=False)
    return _shared


# ------------------------------------------------------------------ hooks


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Test by test to whichever worker is free; but some files to one worker as a whole.

    Those come first, the largest before the others. Then come the slow tests, so that no worker
    begins one when the others have nothing left to do.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return next((file for file in ON_ONE_WORKER if file in nodeid), nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In the controller of pytest-xdist, for each worker: tell it where the shared node is."""
    if _no_nodes() or _given_url() is not None:
        return
    if rabbitmq_node.find(_release()) is not None:
        node.workerinput["broker_port"] = _start_shared_node(_release()).port


def pytest_configure() -> None:
    # A shell's background jobs ignore SIGINT, and so would the programs that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    if _shared is not None:
        _shared.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = _fixtures_of(item)
        if OWN_NODE_FIXTURES & fixtures:
            item.add_marker("own_node")
        if {"rabbitmq_release", "rabbitmq_url"} & fixtures:
            item.add_marker("rabbitmq")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _fixtures_of(item: pytest.Item) -> set[str]:
    """The fixtures that a test has, or has by its parameter `broker_url` (conformance/)."""
    fixtures = set(getattr(item, "fixturenames", ()))
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "broker_url" in parameters:
        fixtures.add(f"{parameters['broker_url']}_url")
    return fixtures


def pytest_report_header() -> str:
    if _no_nodes():
        return "broker: no RabbitMQ (DOMAIN_EVENTS_TEST_RELEASE=none)"
    if _given_url() is not None:
        return "broker: DOMAIN_EVENTS_TEST_URL"
    found = rabbitmq_node.find(_release())
    return f"broker: RabbitMQ {found.version if found else f'({_release()}) is not installed'}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many guarantees of conformance/ were held on both kinds of broker."""
    held: dict[str, set[str]] = {}
    for report in terminalreporter.stats.get("passed", []):
        brokers = {value for name, value in report.user_properties if name == "conformance"}
        held.setdefault(report.nodeid.partition("[")[0], set()).update(brokers)
    failed = [*terminalreporter.stats.get("failed", []), *terminalreporter.stats.get("error", [])]
    for report in failed:
        held.pop(report.nodeid.partition("[")[0], None)
    number = sum(brokers == {"memory", "rabbitmq"} for brokers in held.values())
    if number:
        found = rabbitmq_node.find(_release()) if _given_url() is None else None
        version = found.version if found else "at DOMAIN_EVENTS_TEST_URL"
        terminalreporter.write_line(
            f"conformance: {number} guarantees on memory:// and RabbitMQ {version}"
        )


# ------------------------------------------------------------------ brokers


@pytest.fixture(scope="session")
def rabbitmq_release() -> str:
    """The release of the nodes that this run starts."""
    if _no_nodes():
        pytest.fail(
            "This test takes a RabbitMQ, and DOMAIN_EVENTS_TEST_RELEASE=none allows none.",
            pytrace=False,
        )
    return _release()


@pytest.fixture(scope="session")
def rabbitmq_url(request: pytest.FixtureRequest, rabbitmq_release: str) -> str:
    """The URL of the RabbitMQ that all tests share; tests use names of their own on it."""
    given = _given_url()
    if given is not None:
        return given
    workerinput = getattr(request.config, "workerinput", None)
    if workerinput is not None and "broker_port" in workerinput:
        port: int = workerinput["broker_port"]
        rabbitmq_node.wait_for_broker(port)
        return f"amqp://guest:guest@127.0.0.1:{port}/%2F"
    try:
        node = _start_shared_node(rabbitmq_release)
        node.start()
    except NodeError as error:
        pytest.fail(f"{error}\nor set DOMAIN_EVENTS_TEST_URL", pytrace=False)
    return node.url


@pytest.fixture(scope="session")
def broker_url(rabbitmq_url: str) -> str:
    """The broker of a test. The tests in conformance/ run once on each kind of broker."""
    return rabbitmq_url


def _new_node(release: str, **options: Any) -> Node:
    if rabbitmq_node.find(release) is None and _given_url() is not None:
        pytest.skip(f"a node of its own takes RabbitMQ ({release}), which is not installed")
    return Node(release, **options)


@pytest.fixture
def node_factory(rabbitmq_release: str) -> Iterator[Callable[..., Node]]:
    """Makes private nodes (not started) from the arguments of Node; closed after the test."""
    nodes: list[Node] = []

    def make(**options: Any) -> Node:
        nodes.append(_new_node(**{"release": rabbitmq_release, **options}))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


@pytest.fixture
def own_node(node_factory: Callable[..., Node]) -> Node:
    """A running node that this test has for itself; costs some seconds."""
    node = node_factory()
    node.start()
    return node


@pytest.fixture(scope="session")
def _killable_node(rabbitmq_release: str) -> Iterator[Node]:
    node = _new_node(rabbitmq_release)
    # By default a broker that is back after a crash may wait for three minutes before it hands on
    # again the retries that were on their way: see docs/guarantees.rst.
    (node.folder / "advanced.config").write_text(HAND_ON)
    yield node
    node.close()


@pytest.fixture
def killable_node(_killable_node: Node) -> Node:
    """A running node to kill, stop and pause at will; other tests do so after this one."""
    _killable_node.resume()
    _killable_node.start()
    return _killable_node


@pytest.fixture(scope="session")
def managed_node(rabbitmq_release: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A node with the management plugin and a `rabbitmqctl` of its own, for the tests of a worker.

    They leave it as they found it.
    """
    with Managed(_new_node, rabbitmq_release, tmp_path_factory.mktemp("programs")) as node:
        yield node


@pytest.fixture
def demo_alone(broker_url: str) -> Iterator[None]:
    """No other test runs the demo on the shared broker meanwhile; all have the same names there."""
    name = f"domain-events-demo-{broker_url.rpartition('@')[2].partition('/')[0]}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def unused_port() -> int:
    """A port on which nobody listens."""
    return rabbitmq_node.free_port()


# ------------------------------------------------------------------ databases


def _new_server(kind: type[Server]) -> Server:
    try:
        return kind()
    except ServerError as error:
        pytest.skip(str(error))  # it is not installed, or may not be started


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """A PostgreSQL for the tests of this worker. A test that kills it also takes `postgresql`."""
    with _new_server(PostgreSQL) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[Server]:
    """A MariaDB for the tests of this worker. A test that kills it also takes `mariadb`."""
    import pymysql

    pymysql.install_as_MySQLdb()  # for Django
    with _new_server(MariaDB) as server:
        yield server


@pytest.fixture
def postgresql(postgresql_server: Server, unique: str) -> Iterator[Address]:
    """A database on `postgresql_server`, which runs at the start and the end of the test."""

    import psycopg

    def run(statement: str) -> None:
        postgresql_server.start()
        with psycopg.connect(postgresql_server.url, autocommit=True) as connection:
            connection.execute(statement.encode())

    run(f'CREATE DATABASE "{unique}"')
    yield postgresql_server.address.of(unique)
    run(f'DROP DATABASE "{unique}" WITH (FORCE)')


@pytest.fixture
def mariadb(mariadb_server: Server, unique: str) -> Iterator[Address]:
    """A database on `mariadb_server`, which runs at the start and the end of the test."""
    import pymysql

    def run(statement: str) -> None:
        mariadb_server.start()
        address = mariadb_server.address
        with closing(
            pymysql.connect(
                host=address.host, port=address.port, user=address.user, password=address.password
            )
        ) as connection:
            connection.query(statement)

    run(f"CREATE DATABASE `{unique}`")
    yield mariadb_server.address.of(unique)
    run(f"DROP DATABASE `{unique}`")


# ------------------------------------------------------------------ tests leave nothing behind


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> str:
    """A short prefix that no other test uses, for names on a shared broker."""
    return prefix_of(request.node.nodeid, secrets.token_hex(3))


@pytest.fixture
def names(broker_url: str, unique: str) -> Iterator[Names]:
    """Makes names for queues and exchanges on the shared broker, deleted after the test."""
    names = Names(broker_url, unique)
    yield names
    names.delete()


@pytest.fixture
def bench(broker_url: str, names: Names) -> Iterator[Bench]:
    """An exchange of this test's own on the shared broker, with a publisher."""
    bench = Bench(broker_url, names)
    yield bench
    bench.publisher.close()


@pytest.fixture
def queue(names: Names, broker_url: str) -> str:
    """A queue that receives everything published to the exchange of the same test."""
    queue, exchange = names.queue(), names.exchange()
    onlooker.bind_queue(broker_url, queue, exchange, "#")
    return queue


@pytest.fixture
def exchange(names: Names) -> str:
    return names.exchange()


@pytest.fixture
def publisher(broker_url: str, exchange: str) -> Iterator[Publisher]:
    with Publisher(broker_url, exchange) as publisher:
        yield publisher


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Every thread of ours that a test started ends with it."""
    before = set(threading.enumerate())
    yield

    def ended() -> bool:
        return not [
            thread
            for thread in threading.enumerate()
            if thread not in before and thread.name.startswith("domain-events")
        ]

    wait_until(ended, message="all threads named domain-events* have ended")
