#!/usr/bin/env python3
"""Private PostgreSQL and MariaDB servers for tests: no root service, no Docker.

As a module::

    with PostgreSQL() as server:
        connect(server.url)
        server.kill()    # as a crash
        server.start()   # same port, same data

As a command::

    python tools/databases.py install [postgresql] [mariadb] [pgbouncer]
    python tools/databases.py run [postgresql] [mariadb] -- COMMAND ...

The command gets the servers' URLs in the environment (POSTGRESQL_URL, MARIADB_URL), where other
users of the machine cannot read them, and in place of each ``{postgresql}`` and ``{mariadb}`` among
its arguments, where they can.

A server listens on 127.0.0.1, with a password, and on a socket in its own folder, which only its
user may enter. That is the caller, or `nobody` if the caller is root, as whom both servers refuse
to run. A commit is on disk (fsync) before it returns, as in production; only buffers are small.

Linux only. It uses only the standard library, so that it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import os
import pwd
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from rabbitmq_node import (
    NodeError,
    apt_install,
    exit_on_signals,
    free_port,
    partition,
    run_to_the_end,
)

# DOMAIN_EVENTS_TEST_DATABASES, where no server may be started or installed.
NO_SERVERS = "none"

CREATE_SECONDS = 120.0
START_SECONDS = 90.0
STOP_SECONDS = 30.0

# Who runs the servers of root.
_UNPRIVILEGED = "nobody"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_OTHERWISE = f", or set DOMAIN_EVENTS_TEST_DATABASES={NO_SERVERS} to skip tests with a database"


def _no_servers() -> bool:
    return os.environ.get("DOMAIN_EVENTS_TEST_DATABASES") == NO_SERVERS


class ServerError(NodeError):
    """A server or its installation failed; the message has the end of its log."""


@dataclass(frozen=True)
class Address:
    """Where a database is, and how to enter it.

    socket: what a client is given instead of the host: for PostgreSQL the folder of the socket.
    """

    scheme: str
    host: str
    port: int
    user: str
    password: str
    database: str
    socket: Path

    @property
    def url(self) -> str:
        """As in ``postgresql://user:password@127.0.0.1:5432/database``."""
        login = f"{self.user}:{self.password}"
        return f"{self.scheme}://{login}@{self.host}:{self.port}/{self.database}"

    @property
    def sqlalchemy_url(self) -> str:
        """For SQLAlchemy, with the driver that the tests have."""
        driver = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}[self.scheme]
        return driver + self.url.removeprefix(self.scheme)

    @property
    def django(self) -> dict[str, str]:
        """For Django's setting DATABASES."""
        return {
            "ENGINE": f"django.db.backends.{self.scheme}",
            "HOST": self.host,
            "PORT": str(self.port),
            "USER": self.user,
            "PASSWORD": self.password,
            "NAME": self.database,
        }

    def of(self, database: str) -> Address:
        """The address of another database of the same server."""
        return replace(self, database=database)


# --------------------------------------------------------------------------- the server's processes


def _processes(folder: Path) -> Iterator[int]:
    """Handles (pidfd) of all processes that work in `folder`, as all of a server do.

    By their working directory, since a database's processes are not a process group: each of
    PostgreSQL's leads its own. A pidfd cannot refer to a later process with the same number.
    """
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
            handle = os.pidfd_open(int(entry.name))
            try:
                where = (entry / "cwd").readlink()
                if where == folder or folder in where.parents:
                    yield handle
            finally:
                os.close(handle)


def _kill_all(folder: Path, first: int | None = None) -> None:
    """SIGKILL to every process of a server, to `first` before the others; none is left."""
    if first is not None:
        os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        alive = False
        for handle in _processes(folder):
            alive = True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        if not alive:
            return
        if time.monotonic() > deadline:
            raise ServerError(f"processes in {folder} outlive SIGKILL")
        time.sleep(0.01)


def _clear(folder: Path) -> None:
    """Leave nothing of a server: neither a process nor its folder nor shared memory."""
    _kill_all(folder)
    # A PostgreSQL that was killed leaves a System V segment, by which its next start would notice
    # processes of this one. Its number is in the lock file.
    with contextlib.suppress(OSError, IndexError, ValueError):
        segment = (folder / "data/postmaster.pid").read_text().splitlines()[6].split()[1]
        ctypes.CDLL(None).shmctl(int(segment), 0, None)  # IPC_RMID
    shutil.rmtree(folder, ignore_errors=True)


def _watch(parent: int, folder: Path) -> None:
    """The watcher of a server: clears up when its parent is gone.

    It checks four times a second. PR_SET_PDEATHSIG would not do: it fires when the *thread* that
    started the server ends, it does not delete, and each process of the server would need it.
    """
    while os.getppid() == parent and not select.select([0], [], [], 0.25)[0]:
        pass
    # Standard input at its end also means that the parent is gone.
    _clear(folder)


# --------------------------------------------------------------------------- the servers


class Server:
    """A database server on 127.0.0.1, with its own port, folder and password.

    It keeps its port and its data from `kill` or `stop` to the next `start`. `close` deletes its
    folder. When the process that made it ends in whatever way, nothing of it is left.
    """

    kind: str  # its name on the command line
    title: str  # and for people
    packages: tuple[str, ...]  # of Debian
    scheme: str
    user: str
    database: str

    def __init__(self) -> None:
        if _no_servers():
            raise ServerError(f"DOMAIN_EVENTS_TEST_DATABASES={NO_SERVERS} allows no {self.title}")
        if not self.installed():
            raise ServerError(
                f"{self.title} is not installed; try: python tools/databases.py install {self.kind}"
            )
        self.password = secrets.token_hex(16)
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"domain-events-{self.kind}-")).resolve()
        self._data = self.folder / "data"
        self._owner: pwd.struct_passwd | None = None
        if os.geteuid() == 0:
            self._owner = pwd.getpwnam(_UNPRIVILEGED)
            os.chown(self.folder, self._owner.pw_uid, self._owner.pw_gid)
        self._maker = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.RLock()
        # Without site-packages and PYTHON* variables. Its own session: a Ctrl-C from the terminal
        # reaches only us.
        watcher = [sys.executable, "-E", "-S", __file__, "_watch", str(self._maker)]
        self._watcher = subprocess.Popen(
            [*watcher, str(self.folder)], stdin=subprocess.PIPE, cwd="/", start_new_session=True
        )
        _servers.add(self)

    # -- addresses

    @property
    def address(self) -> Address:
        return Address(
            scheme=self.scheme,
            host="127.0.0.1",
            port=self.port,
            user=self.user,
            password=self.password,
            database=self.database,
            socket=self.socket,
        )

    @property
    def url(self) -> str:
        """The URL of the database that the server has from the beginning."""
        return self.address.url

    @property
    def socket(self) -> Path:
        raise NotImplementedError

    @property
    def log(self) -> str:
        """The server's output so far."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int | None:
        """The server's main process, or None while it is not running."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    # -- life cycle

    def start(self) -> None:
        """Start, and wait until it takes connections (90 s at most). A running one is left alone.

        The first start also creates the data (120 s at most).
        """
        with self._lock:
            if self._closed:
                raise ServerError(f"{self.title} in {self.folder} is closed")
            if self.pid is not None:
                return
            if not (self.folder / "created").exists():
                shutil.rmtree(self._data, ignore_errors=True)  # of one that was cut off
                self._create()
                (self.folder / "created").touch()
            self._process = self._popen(*self._command())
            self._wait()

    def kill(self) -> None:
        """SIGKILL to all its processes, like a crash."""
        with self._lock:
            pid = self.pid
            if pid is not None:
                _kill_all(self.folder, first=pid)
            self._reap()

    def stop(self) -> None:
        """Stop in order, closing the connections; SIGKILL if that takes longer than 30 s."""
        with self._lock:
            if self._process is None:
                return
            self._process.send_signal(self._stop_signal())
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
            self._reap()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """Kill the server and delete its folder. None of its processes is left."""
        if os.getpid() != self._maker:
            return  # a fork of its owner
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self.kill()
                _clear(self.folder)
            finally:
                # It has nothing left to do, or does it where we failed.
                assert self._watcher.stdin is not None
                self._watcher.stdin.close()
                self._watcher.wait(STOP_SECONDS)
                _servers.discard(self)

    def __enter__(self: S) -> S:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "down" if self.pid is None else "running"
        return f"<{self.title} on port {self.port}, {state}>"

    # -- what they differ in

    @classmethod
    def installed(cls) -> bool:
        raise NotImplementedError

    def _create(self) -> None:
        """Create the data."""
        raise NotImplementedError

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _stop_signal(self) -> signal.Signals:
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether it takes connections. Its process is running."""
        raise NotImplementedError

    # -- implementation

    def _popen(self, *command: str) -> subprocess.Popen[bytes]:
        owner = self._owner
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                # Not the caller's environment: its PGPORT or MYSQL_... would take effect.
                env={"PATH": _PATH, "LANG": "C.UTF-8", "HOME": str(self.folder)},
                cwd=self.folder,  # see _processes
                user=owner and owner.pw_uid,
                group=owner and owner.pw_gid,
                extra_groups=owner and (),
                umask=0o077,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # see _watcher
            )

    def _run(self, *command: str) -> None:
        process = self._popen(*command)
        try:
            process.wait(CREATE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise self._error(f"{command[0]} did not end within {CREATE_SECONDS:.0f} s") from error
        finally:
            if process.poll() is None:
                _kill_all(self.folder, first=process.pid)
                process.wait()
        if process.returncode != 0:
            raise self._error(f"{command[0]} failed")

    def _write(self, name: str, text: str) -> Path:
        """A file that only the server's user can read."""
        path = self.folder / name
        path.touch(mode=0o600)
        if self._owner is not None:
            os.chown(path, self._owner.pw_uid, self._owner.pw_gid)
        path.write_text(text)
        return path

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not (self.pid is not None and self._answers()):
            if self.pid is None:
                self._reap()
                raise self._error("it ended while it started")
            if time.monotonic() > deadline:
                self.kill()
                raise self._error(f"no answer on port {self.port} within {START_SECONDS:.0f} s")
            time.sleep(0.02)

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait(STOP_SECONDS)
            self._process = None

    def _error(self, what: str) -> ServerError:
        log = "\n".join(self.log.splitlines()[-40:])
        return ServerError(f"{self.title} in {self.folder}: {what}:\n{log}")


S = TypeVar("S", bound=Server)


class PostgreSQL(Server):
    """A PostgreSQL: the newest that is installed."""

    kind = "postgresql"
    title = "PostgreSQL"
    packages = ("postgresql",)
    scheme = "postgresql"
    user = "postgres"
    database = "postgres"

    @property
    def socket(self) -> Path:
        return self.folder

    @classmethod
    def installed(cls) -> bool:
        return cls._programs() is not None

    @staticmethod
    def _programs() -> Path | None:
        found = Path("/usr/lib/postgresql").glob("*/bin/initdb")
        newest = max(found, key=lambda path: float(path.parts[-3]), default=None)
        return newest and newest.parent

    def _program(self, name: str) -> str:
        programs = self._programs()
        assert programs is not None  # of __init__
        return str(programs / name)

    def _create(self) -> None:
        password = self._write("password", self.password)
        self._run(
            *(self._program("initdb"), "-D", str(self._data), "-U", self.user, "-E", "UTF8"),
            *("--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}"),
            # Small segments, since the first one is written in full.
            *("--locale=C.UTF-8", "--no-sync", "--wal-segsize=2"),
        )

    def _command(self) -> Sequence[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "shared_buffers": "16MB",
            "max_prepared_transactions": "10",
            "min_wal_size": "8MB",
            "max_wal_size": "128MB",
            # In the folder, where it is deleted; `posix` would leave files behind in /dev/shm.
            "dynamic_shared_memory_type": "mmap",
            # What the tests rely on, though it is the default.
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
        }
        options = [word for name in settings for word in ("-c", f"{name}={settings[name]}")]
        return [self._program("postgres"), "-D", str(self._data), *options]

    def _stop_signal(self) -> signal.Signals:
        return signal.SIGINT  # "fast": SIGTERM would wait for the clients

    def _answers(self) -> bool:
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        # It is rewritten in place; and one that was killed has left its own.
        return lines[:1] == [str(self.pid)] and [line.strip() for line in lines[7:]] == ["ready"]


class MariaDB(Server):
    """A MariaDB."""

    kind = "mariadb"
    title = "MariaDB"
    # Without mariadb-server, which is the service: its user, its data, its units.
    packages = ("mariadb-server-core", "mariadb-client-core")
    scheme = "mysql"
    user = "tests"
    database = "tests"

    _SERVER = "/usr/sbin/mariadbd"
    _CREATE = "/usr/bin/mariadb-install-db"
    _DEFAULTS = "/usr/bin/my_print_defaults"  # the one before calls it

    # For creating the data as well as for running.
    _OPTIONS = (
        "--innodb-buffer-pool-size=16M",
        "--innodb-log-file-size=16M",
        "--innodb-use-native-aio=OFF",  # containers restrict io_uring
        "--aria-pagecache-buffer-size=8M",
        "--key-buffer-size=1M",
    )

    @property
    def socket(self) -> Path:
        return self.folder / "socket"

    @classmethod
    def installed(cls) -> bool:
        return all(Path(each).exists() for each in (cls._SERVER, cls._CREATE, cls._DEFAULTS))

    def _create(self) -> None:
        # Its only user is root, by the socket, if he is root on this machine too.
        self._run(
            *(self._CREATE, "--no-defaults", f"--datadir={self._data}", "--skip-test-db"),
            # In the common folder for temporary files, a starting server deletes tables of others.
            *("--skip-name-resolve", "--force", f"--tmpdir={self.folder}", *self._OPTIONS),
        )
        user = f"'{self.user}'@'%'"
        statements = [
            f"CREATE DATABASE IF NOT EXISTS {self.database}",
            f"CREATE USER IF NOT EXISTS {user} IDENTIFIED BY '{self.password}'",
            f"GRANT ALL ON *.* TO {user} WITH GRANT OPTION",
        ]
        self._write("start.sql", "".join(f"{each};\n" for each in statements))

    def _command(self) -> Sequence[str]:
        return [
            *(self._SERVER, "--no-defaults", f"--datadir={self._data}", f"--tmpdir={self.folder}"),
            *("--bind-address=127.0.0.1", f"--port={self.port}", f"--socket={self.socket}"),
            *(f"--pid-file={self.folder / 'pid'}", f"--init-file={self.folder / 'start.sql'}"),
            *("--skip-name-resolve", "--character-set-server=utf8mb4", *self._OPTIONS),
            # What the tests rely on, though it is the default.
            "--innodb-flush-log-at-trx-commit=1",
        ]

    def _stop_signal(self) -> signal.Signals:
        return signal.SIGTERM

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                return connection.recv(5)[4:] == b"\x0a"  # a greeting of protocol 10
        except OSError:
            return False


class PgBouncer(Server):
    """A pgbouncer before a PostgreSQL, which pools its connections for each transaction."""

    kind = "pgbouncer"
    title = "pgbouncer"
    packages = ("pgbouncer",)
    scheme = "postgresql"

    _PROGRAM = "/usr/sbin/pgbouncer"

    def __init__(self, before: Server, size: int) -> None:
        super().__init__()
        self._before = before.address
        self._size = size
        self.user, self.password, self.database = before.user, before.password, before.database

    @property
    def socket(self) -> Path:
        return self.folder

    @classmethod
    def installed(cls) -> bool:
        return Path(cls._PROGRAM).exists()

    def _create(self) -> None:
        users = self._write("users", f'"{self.user}" "{self.password}"\n')
        lines = (
            "[databases]",
            f"* = host={self._before.host} port={self._before.port}",
            "[pgbouncer]",
            "listen_addr = 127.0.0.1",
            f"listen_port = {self.port}",
            f"unix_socket_dir = {self.folder}",
            "auth_type = scram-sha-256",
            f"auth_file = {users}",
            "pool_mode = transaction",
            f"default_pool_size = {self._size}",
        )
        self._write("pgbouncer.ini", "".join(f"{line}\n" for line in lines))

    def _command(self) -> Sequence[str]:
        return [self._PROGRAM, str(self.folder / "pgbouncer.ini")]

    def _stop_signal(self) -> signal.Signals:
        return signal.SIGINT

    def _answers(self) -> bool:
        return "process up" in self.log


SERVERS: dict[str, type[Server]] = {each.kind: each for each in (PostgreSQL, MariaDB)}
_INSTALLED: dict[str, type[Server]] = {**SERVERS, PgBouncer.kind: PgBouncer}

_servers: set[Server] = set()


@atexit.register
def _close_all() -> None:
    for server in list(_servers):
        server.close()


# --------------------------------------------------------------------------- the commands


def install(kinds: Sequence[str] = tuple(_INSTALLED)) -> None:
    """Install the missing ones of `kinds`, after a message. Raises NodeError if it cannot."""
    missing = [_INSTALLED[kind] for kind in kinds if not _INSTALLED[kind].installed()]
    if not missing or _no_servers():
        return
    packages = [package for each in missing for package in each.packages]
    _say(f"installing {' '.join(packages)} with apt-get; no service is started")
    apt_install(*packages, otherwise=_OTHERWISE)
    for each in missing:
        if not each.installed():
            raise ServerError(f"{each.title} was installed, but its programs were not found")


def _run_with_servers(kinds: Sequence[str], command: Sequence[str]) -> int:
    """Run `command` with a server of each kind; returns its exit code, as a shell would."""
    install(kinds)
    exit_on_signals()
    _say(f"starting {' and '.join(SERVERS[kind].title for kind in kinds)}")
    with contextlib.ExitStack() as stack:
        urls = {kind: stack.enter_context(SERVERS[kind]()).url for kind in kinds}
        arguments = list(command)
        for kind, url in urls.items():
            arguments = [argument.replace(f"{{{kind}}}", url) for argument in arguments]
        environment = {f"{kind.upper()}_URL": url for kind, url in urls.items()}
        return run_to_the_end(arguments, {**os.environ, **environment})


def _say(text: str) -> None:
    print(f"databases: {text}", file=sys.stderr, flush=True)


def main() -> int:
    if sys.argv[1:2] == ["_watch"]:
        _watch(int(sys.argv[2]), Path(sys.argv[3]))
        return 0
    # Everything after the first `--` belongs to the command, whatever it looks like.
    words, command = partition(sys.argv[1:])
    parser = argparse.ArgumentParser(
        prog="databases.py",
        description="Private PostgreSQL and MariaDB servers: no root service, no Docker.",
        epilog=f"SERVER is one of {', '.join(_INSTALLED)}; all of them if none is given.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "install missing servers (needs root and apt-get)"
    installing = commands.add_parser("install", help=text, description=text)
    text = "run a command with servers, their URLs in the environment and in place of {SERVER}"
    usage = "databases.py run [-h] [SERVER ...] -- COMMAND ..."
    running = commands.add_parser("run", help=text, description=text, usage=usage)
    for each in (installing, running):
        each.add_argument("servers", nargs="*", metavar="SERVER", help=", ".join(SERVERS))
    options = parser.parse_args(words)
    known = _INSTALLED if options.command == "install" else SERVERS
    kinds = list(dict.fromkeys(options.servers or known))
    for kind in kinds:
        if kind not in known:
            parser.error(f"unknown server {kind!r}; known are {', '.join(known)}")
    try:
        if options.command == "install":
            install(kinds)
            return 0
        if not command:
            running.error("no command after --")
        return _run_with_servers(kinds, command)
    except NodeError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
