"""The servers that tests with a database stand on: tools/databases.py."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import databases
import pytest
import sqlalchemy
from databases import SERVERS, Address, MariaDB, PgBouncer, PostgreSQL, Server, ServerError
from rabbitmq_node import NodeError
from sqlalchemy.pool import NullPool
from support import wait_until
from test_node import LOOPBACK, listening, processes_with

TOOL = Path(databases.__file__)
KINDS = list(SERVERS)


@contextlib.contextmanager
def connected(address: Address, **arguments: object) -> Iterator[sqlalchemy.Connection]:
    """A connection that is not kept in a pool."""
    engine = sqlalchemy.create_engine(
        address.sqlalchemy_url, poolclass=NullPool, connect_args=arguments
    )
    with engine.connect() as connection:
        yield connection


def execute(address: Address, statement: str) -> None:
    with connected(address) as connection:
        connection.exec_driver_sql(statement)
        connection.commit()


def numbers(address: Address) -> list[int]:
    with connected(address) as connection:
        return list(connection.scalars(sqlalchemy.text("SELECT n FROM numbers ORDER BY n")))


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Server:
    """This worker's server, of one kind and the other."""
    server: Server = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture
def address(request: pytest.FixtureRequest, server: Server) -> Address:
    """A fresh database on `server`."""
    address: Address = request.getfixturevalue(server.kind)
    return address


def new_server(kind: str) -> Server:
    try:
        return SERVERS[kind]()
    except ServerError as error:
        pytest.skip(str(error))  # it is not installed, or may not be started


# --- the life of a server ------------------------------------------------------------------------


def test_what_was_committed_survives_a_kill_and_nothing_else_does(
    server: Server, address: Address
) -> None:
    """Also what was committed a moment ago; the port and the password stay."""
    execute(address, "CREATE TABLE numbers (n int)")
    for number in range(5):
        with connected(address) as connection, connected(address) as uncommitted:
            uncommitted.exec_driver_sql("INSERT INTO numbers VALUES (-1)")
            for _ in range(20):
                connection.exec_driver_sql(f"INSERT INTO numbers VALUES ({number})")
                connection.commit()
            server.kill()
            connection.invalidate()
            uncommitted.invalidate()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
        # A thread that ends does not take the server along.
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
        assert numbers(address) == [each for each in range(number + 1) for _ in range(20)]


def test_kill_leaves_no_process_of_the_server(server: Server, address: Address) -> None:
    """Neither one that is busy, nor one that is a group of its own."""
    with connected(address) as connection:
        sleep = {"postgresql": "SELECT pg_sleep(60)", "mariadb": "SELECT sleep(60)"}
        busy = threading.Thread(target=run_into_the_kill, args=(address, sleep[server.kind]))
        busy.start()
        wait_until(lambda: sleepers(connection, server.kind))
        running = processes_in(server.folder)
        assert {server.pid} <= running
        assert (len(running) > 3) == (server.kind == "postgresql")
        server.kill()
        assert not processes_in(server.folder)
        assert server.pid is None
        connection.invalidate()
        busy.join()


def run_into_the_kill(address: Address, statement: str) -> None:
    with contextlib.suppress(sqlalchemy.exc.OperationalError):
        execute(address, statement)


def sleepers(connection: sqlalchemy.Connection, kind: str) -> int:
    """How many connections sleep in the database; this one does not."""
    table = {
        "postgresql": "pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'",
        "mariadb": "information_schema.processlist WHERE info LIKE 'SELECT sleep%'",
    }
    number = connection.scalar(sqlalchemy.text(f"SELECT count(*) FROM {table[kind]}"))
    connection.commit()  # PostgreSQL shows what was there at the transaction's beginning
    return int(number or 0)


def processes_in(folder: Path) -> set[int]:
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink().is_relative_to(folder):
                found.add(int(entry.name))
    return found


def test_stop_ends_in_order_though_clients_are_connected(server: Server, address: Address) -> None:
    """It would not, if it waited for them."""
    execute(address, "CREATE TABLE numbers (n int)")
    execute(address, "INSERT INTO numbers VALUES (1)")
    with connected(address) as connection:
        connection.exec_driver_sql("SELECT 1")
        before = len(server.log)
        server.stop()
        connection.invalidate()
    ending = server.log[before:].lower()
    assert "shut down" in ending or "shutdown complete" in ending
    server.start()
    assert numbers(address) == [1]


def test_each_test_has_a_database_of_its_own(server: Server, address: Address) -> None:
    """On this worker's server, in UTF-8, by TCP and by the socket."""
    assert address.database not in {server.database, ""}
    execute(address, "CREATE TABLE numbers (n int, name text)")
    execute(address, "INSERT INTO numbers VALUES (1, 'ä🐇')")
    with connected(address) as connection:
        assert connection.scalar(sqlalchemy.text("SELECT name FROM numbers")) == "ä🐇"
    by_socket: dict[str, dict[str, object]] = {
        "postgresql": {"host": str(address.socket)},
        "mariadb": {"unix_socket": str(address.socket)},
    }
    with connected(address, **by_socket[server.kind]) as connection:
        assert connection.scalar(sqlalchemy.text("SELECT n FROM numbers")) == 1
    with pytest.raises(sqlalchemy.exc.ProgrammingError):
        numbers(server.address)


def test_server_is_private(server: Server, address: Address) -> None:
    """It listens on this machine only, and nobody enters without the password."""
    assert server.pid is not None
    listens = listening(server.pid)
    assert listens
    assert listens <= LOOPBACK
    wrong = Address(**{**vars(address), "password": "guessed"})
    with pytest.raises(sqlalchemy.exc.OperationalError), connected(wrong):
        pass
    assert server.folder.stat().st_mode & 0o077 == 0
    assert Path(f"/proc/{server.pid}").stat().st_uid != 0


DJANGO = """
import json, os
import django, pymysql
from django.conf import settings
pymysql.install_as_MySQLdb()
settings.configure(DATABASES={"default": json.loads(os.environ["DATABASE"])})
django.setup()
from django.db import connection, transaction
with transaction.atomic(), connection.cursor() as cursor:
    cursor.execute("CREATE TABLE numbers (n int)")
    cursor.execute("INSERT INTO numbers VALUES (%s)", [42])
    cursor.execute("SELECT n FROM numbers")
    print(connection.display_name, *cursor.fetchone())
"""


def test_django_connects(server: Server, address: Address) -> None:
    """To MariaDB with PyMySQL in place of mysqlclient."""
    environment = {**os.environ, "DATABASE": json.dumps(address.django)}
    printed = subprocess.check_output(
        [sys.executable, "-W", "error", "-c", DJANGO], env=environment, text=True
    )
    assert printed == f"{server.title} 42\n"


@pytest.mark.parametrize("kind", KINDS)
def test_two_servers_run_at_once_and_leave_nothing(kind: str) -> None:
    """Started at the same moment, as by two workers; they know nothing of each other."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(contextlib.closing(new_server(kind))) for _ in range(2)]
        with ThreadPoolExecutor() as threads:
            list(threads.map(Server.start, servers))
        assert len({server.port for server in servers}) == 2
        for number, server in enumerate(servers):
            execute(server.address, "CREATE TABLE numbers (n int)")
            execute(server.address, f"INSERT INTO numbers VALUES ({number})")
        servers[0].kill()
        assert numbers(servers[1].address) == [1]
        servers[0].start()
        assert numbers(servers[0].address) == [0]
        segments = [segment for server in servers for segment in shared_memory(server)]
        assert len(segments) == {"postgresql": 2, "mariadb": 0}[kind]
        servers[0].kill()
    for server in servers:
        assert not server.folder.exists()
        assert not processes_in(server.folder)
        with pytest.raises(ServerError, match="is closed"):
            server.start()
    assert not existing(segments)


def shared_memory(server: Server) -> list[str]:
    """The System V segment of a PostgreSQL, which survives its processes."""
    file = server.folder / "data/postmaster.pid"
    return [file.read_text().splitlines()[6].split()[1]] if file.exists() else []


def existing(segments: list[str]) -> set[str]:
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {line.split()[1] for line in lines} & set(segments)


def test_broken_start_shows_the_log(
    server: Server, monkeypatch: pytest.MonkeyPatch, address: Address
) -> None:
    """And the next one succeeds."""
    assert address.port == server.port
    server.stop()
    command = [*server._command(), "--no-such-option=1"]
    with monkeypatch.context() as patch:
        patch.setattr(server, "_command", lambda: command)
        with pytest.raises(ServerError, match=r"no.such.option"):
            server.start()
        assert server.pid is None
    server.start()
    execute(address, "SELECT 1")


def test_temporary_tables_of_another_mariadb_stay() -> None:
    """A MariaDB that starts deletes those that it finds, wherever it is to put its own."""
    with contextlib.closing(new_server("mariadb")) as server:
        table = Path(f"/tmp/#sql-temptable-{secrets.token_hex(4)}-1-1.MAI")
        try:
            table.touch()
            owner = server.folder.stat()
            os.chown(table, owner.st_uid, owner.st_gid)
            server.start()
            assert table.exists()
        finally:
            table.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_creation_that_was_cut_off_is_begun_again(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C, or for lack of time."""
    with contextlib.closing(new_server(kind)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(databases, "CREATE_SECONDS", 0.1)
            with pytest.raises(ServerError, match=r"did not end within"):
                server.start()
        assert not processes_in(server.folder)
        server.start()
        execute(server.address, "SELECT 1")


# --- a run that is ended -------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    """For temporary files, which an unprivileged user may reach; pytest's belong to one user."""
    folder = Path(f"/tmp/domain-events-{secrets.token_hex(8)}")
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def kinds() -> list[str]:
    """The servers that can be started."""
    kinds = [kind for kind in KINDS if SERVERS[kind].installed()]
    if not kinds or os.environ.get("DOMAIN_EVENTS_TEST_DATABASES") == databases.NO_SERVERS:
        pytest.skip("no database server is installed, or none may be started")
    return kinds


def run_tool(*arguments: str) -> list[str]:
    return [sys.executable, str(TOOL), *arguments]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_run_that_is_ended_leaves_nothing(
    number: signal.Signals, folder: Path, kinds: list[str]
) -> None:
    """Neither processes nor files nor shared memory, however it is ended."""
    mark = f"--mark={secrets.token_hex(8)}"
    script = "import signal; print(flush=True); signal.pause()"
    command = run_tool("run", *kinds, "--", sys.executable, "-c", script, mark)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline()
        assert len(list(folder.iterdir())) == len(kinds)
        assert processes_in(folder)
        locks = folder.glob("*/data/postmaster.pid")
        segments = [lock.read_text().splitlines()[6].split()[1] for lock in locks]
        if number is signal.SIGTERM:
            run.send_signal(number)
        else:
            os.killpg(run.pid, number)  # to the command as well
        run.wait(20)
    wait_until(lambda: not processes_with(mark))
    wait_until(lambda: not processes_in(folder))
    wait_until(lambda: not list(folder.iterdir()))
    wait_until(lambda: not existing(segments))


def test_run_that_is_killed_while_it_creates_the_data_leaves_nothing(
    folder: Path, kinds: list[str]
) -> None:
    """It has started programs that have started others."""
    for kind in kinds:
        command = run_tool("run", kind, "--", "true")
        environment = {**os.environ, "TMPDIR": str(folder)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as run:
            wait_until(lambda: len(processes_in(folder)) > 1)
            run.kill()
        wait_until(lambda: not processes_in(folder))
        wait_until(lambda: not list(folder.iterdir()))


@pytest.mark.parametrize("kind", KINDS)
def test_fork_of_the_owner_leaves_the_server_alone(kind: str) -> None:
    """A child of `multiprocessing` ends, and with it what it has of ours."""
    with contextlib.closing(new_server(kind)) as server:
        server.start()
        pid = os.fork()
        if pid == 0:
            try:
                server.close()
                databases._close_all()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        execute(server.address, "SELECT 1")


# --- the command ---------------------------------------------------------------------------------


def test_run_gives_the_urls_and_passes_the_exit_code_on(kinds: list[str]) -> None:
    script = (
        "import os, sys; print(*(os.environ[name] for name in sys.argv[2:])); print(sys.argv[1])"
    )
    words = " ".join(f"{{{kind}}}" for kind in kinds)
    names = [f"{kind.upper()}_URL" for kind in kinds]
    command = run_tool("run", *kinds, "--", sys.executable, "-c", f"{script}; sys.exit(7)", words)
    done = subprocess.run([*command, *names], stdout=subprocess.PIPE, text=True, check=False)
    environment, arguments = done.stdout.splitlines()
    assert environment == arguments
    schemes = [urlsplit(url).scheme for url in environment.split()]
    assert schemes == [SERVERS[kind].scheme for kind in kinds]
    assert done.returncode == 7


class Apt:
    """What would be installed."""

    def __init__(self) -> None:
        self.installed: list[tuple[str, ...]] = []

    def install(self, *packages: str, otherwise: str) -> None:
        assert "DOMAIN_EVENTS_TEST_DATABASES=none" in otherwise
        self.installed.append(packages)


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> Apt:
    """And all but PostgreSQL is installed."""
    apt = Apt()
    monkeypatch.setattr(databases, "apt_install", apt.install)
    for each in (MariaDB, PgBouncer):
        monkeypatch.setattr(each, "installed", lambda *_: True)
    monkeypatch.setattr(PostgreSQL, "installed", lambda *_: bool(apt.installed))
    monkeypatch.delenv("DOMAIN_EVENTS_TEST_DATABASES", raising=False)
    return apt


def test_install_announces_what_is_missing_and_installs_no_more(
    apt: Apt, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    announced = []

    def install(*packages: str, otherwise: str) -> None:
        announced.append(capsys.readouterr().err)
        apt.install(*packages, otherwise=otherwise)

    monkeypatch.setattr(databases, "apt_install", install)
    databases.install(["mariadb"])
    assert apt.installed == []
    databases.install()
    assert apt.installed == [("postgresql",)]
    assert announced == ["databases: installing postgresql with apt-get; no service is started\n"]
    databases.install()
    assert len(apt.installed) == 1
    assert capsys.readouterr().err == ""


def test_install_without_the_rights_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither root nor sudo, or another system than Debian."""
    monkeypatch.setattr(PostgreSQL, "installed", lambda *_: False)
    monkeypatch.delenv("DOMAIN_EVENTS_TEST_DATABASES", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for present, message in {
        "apt-get": "needs root: run `apt-get install postgresql`, or set DOMAIN_EVENTS_TEST_DATA",
        "": "no apt-get here: install postgresql yourself, or set DOMAIN_EVENTS_TEST_DATABASES=",
    }.items():
        monkeypatch.setattr(shutil, "which", {present: f"/usr/bin/{present}"}.get)
        with pytest.raises(NodeError, match=message):
            databases.install(["postgresql"])


def test_none_is_installed_or_started_where_there_is_to_be_none(
    apt: Apt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOMAIN_EVENTS_TEST_DATABASES", "none")
    databases.install()
    assert apt.installed == []
    with pytest.raises(ServerError, match="DOMAIN_EVENTS_TEST_DATABASES=none allows no MariaDB"):
        MariaDB()


def test_server_that_is_not_installed_names_the_command(apt: Apt) -> None:
    assert apt.installed == []
    with pytest.raises(ServerError, match=r"python tools/databases\.py install postgresql"):
        PostgreSQL()
