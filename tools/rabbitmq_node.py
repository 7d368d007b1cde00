#!/usr/bin/env python3
"""Private RabbitMQ nodes for tests, the demo and benchmarks: no root service, no Docker.

As a module::

    with Node() as node:
        connect(node.url)
        node.kill()      # as a crash
        node.start()     # same port, same data

As a command::

    python tools/rabbitmq_node.py install [RELEASE ...]
    python tools/rabbitmq_node.py run [--release RELEASE] -- COMMAND ...

The command gets the node's URL in the environment (DOMAIN_EVENTS_URL), where other users of the
machine cannot read it, and in place of each ``{url}`` among its arguments, where they can.

Releases: ``host`` is the rabbitmq-server installed on this machine. ``3.10``, ``4.0`` and ``4.3``
are those of Debian 12, 13 and testing; where the host has another one, they are unpacked with
debootstrap (about two minutes, 400 MB, needs root) below the user's cache folder and kept.

Linux only. It uses only the standard library, so that it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import os
import random
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

# Release of RabbitMQ -> the Debian suite that has it.
SUITES = {"3.10": "bookworm", "4.0": "trixie", "4.3": "forky"}
RELEASES = ("host", *SUITES)
# DOMAIN_EVENTS_TEST_RELEASE, where no node may be started.
NO_NODES = "none"

START_SECONDS = 90.0
STOP_SECONDS = 30.0
CTL_SECONDS = 60.0

# Debian's /usr/sbin wrappers switch to the user `rabbitmq`, which may not write into our folders.
_PROGRAMS = "usr/lib/rabbitmq/bin"
_LIBRARIES = "usr/lib/rabbitmq/lib"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


# Erlang's port for other nodes and for rabbitmqctl; without this it listens on all interfaces.
_LOOPBACK_ONLY = "-kernel inet_dist_use_interface {127,0,0,1}"

# The listeners of plugins, likewise.
_PLUGIN_LISTENERS = {
    "rabbitmq_management": "management.tcp.ip = 127.0.0.1",
    "rabbitmq_prometheus": "prometheus.tcp.ip = 127.0.0.1",
}


class NodeError(Exception):
    """A node or an installation failed; the message has the end of its log or output."""


# --------------------------------------------------------------------------- installations


@dataclass(frozen=True)
class Installation:
    """A rabbitmq-server on disk: the host's (`root` is None) or one in its own folder."""

    root: Path | None
    version: str

    def command(self, *arguments: str) -> list[str]:
        """The command line of a program of this installation, without an intermediate process."""
        return list(arguments) if self.root is None else chrooted(self.root, *arguments)

    def inside(self, path: Path) -> str:
        """The name of `path` as seen by a program of this installation."""
        return str(path) if self.root is None else "/" + str(path.relative_to(self.root))


def chrooted(root: Path, *arguments: str, shared: Sequence[Path] = ()) -> list[str]:
    """The command line of a program in an unpacked Debian, without an intermediate process.

    `shared` are folders and files of this machine that the program also sees, under the same names.
    """
    # Erlang needs /proc and /dev. Mounted in a mount namespace of the process alone, they
    # vanish with it: nothing to unmount, and deleting the folder can never reach the real /dev.
    mounts = ['mount -t proc proc "$0/proc"', 'mount --rbind /dev "$0/dev"']
    mounts += [
        f'mount --rbind {shlex.quote(str(path))} "$0"{shlex.quote(str(path))}' for path in shared
    ]
    script = " && ".join([*mounts, 'exec chroot "$0" "$@"'])
    unshare = ["unshare", "--mount", "--propagation", "private"]
    return [*unshare, "sh", "-c", script, str(root), *arguments]


def find(release: str = "host") -> Installation | None:
    """The installation of `release`, or None if it must be installed first."""
    if release not in RELEASES:
        raise NodeError(f"unknown release {release!r}; known are {', '.join(RELEASES)}")
    host = _installation(None)
    if release == "host" or (host is not None and host.version.startswith(release + ".")):
        return host
    return _installation(_cache() / SUITES[release])


def _installation(root: Path | None) -> Installation | None:
    base = root or Path("/")
    if not (base / _PROGRAMS / "rabbitmq-server").exists():
        return None
    versions = [path.name.split("-")[-1] for path in (base / _LIBRARIES).glob("rabbitmq_server-*")]
    return Installation(root, versions[0]) if versions else None


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "domain-events-rabbitmq"


# --------------------------------------------------------------------------- ports


def free_port() -> int:
    """A free port of 127.0.0.1, below the range for outgoing connections.

    From that range the kernel could hand the port of a killed node to somebody's outgoing
    connection - even to a client that tries to reconnect to the node, which then talks to itself.
    Random, because several test runs on one machine choose at the same time; and locked until this
    process ends, because a node listens only some seconds after its port was chosen.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    lowest = lowest if lowest > 12_000 else 32_768
    for _ in range(100):
        port = random.randrange(10_000, lowest)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if _reserve(port):
            return port
    raise NodeError("no free port found on 127.0.0.1")


def _reserve(port: int) -> bool:
    """Whether no other process has chosen this port, nor this one before.

    The lock is a name among the abstract sockets of Linux: no file, and gone with the process.
    """
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0domain-events-rabbitmq-port-{port}")
    except OSError:
        lock.close()
        return False
    lock.detach()  # keeps its descriptor open
    return True


def wait_for_broker(port: int, seconds: float = START_SECONDS) -> None:
    """Return once a broker on 127.0.0.1:`port` answers an AMQP protocol header."""
    deadline = time.monotonic() + seconds
    while not _answers(port):
        if time.monotonic() > deadline:
            raise NodeError(f"no broker answered on port {port} within {seconds:.0f} s")
        time.sleep(0.1)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"  # a method frame: Connection.Start
    except OSError:
        return False


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


# --------------------------------------------------------------------------- shared by the nodes


class _Household:
    """Shared by the nodes of one Python process: an epmd, a cookie, and a watcher.

    The epmd (Erlang's name server) is private, on its own port, so that simultaneous test runs
    cannot see each other's nodes; it is shared, so that our nodes can form a cluster.

    The watcher kills our processes when this process dies without a chance to clean up (SIGKILL).
    The kernel's own mechanism, PR_SET_PDEATHSIG, does not work here: it fires when the *thread*
    that started the broker ends, and tests restart brokers from threads. So a small process checks
    four times a second whether its parent is still the same, and holds pidfds, which cannot refer
    to a later process with the same number.
    """

    def __init__(self, installation: Installation) -> None:
        self.pid = os.getpid()
        self.cookie = secrets.token_hex(16)
        self.nodes: set[Node] = set()
        self.epmd_port = free_port()
        self._lock = threading.Lock()
        watcher = [sys.executable, "-I", "-S", __file__, "_watch", str(self.pid)]
        # Its own session: only we receive Ctrl-C from the terminal, and then end the rest in order.
        self._watcher = subprocess.Popen(watcher, stdin=subprocess.PIPE, start_new_session=True)
        self._epmd = subprocess.Popen(
            installation.command("epmd", "-port", str(self.epmd_port), "-address", "127.0.0.1"),
            env={"PATH": _PATH, "HOME": "/"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.tell("watch", self._epmd.pid)

    def tell(self, word: str, what: object) -> None:
        """`watch` or `forget` a process id, or `delete` a folder at the end."""
        assert self._watcher.stdin is not None
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._watcher.stdin.write(f"{word} {what}\n".encode())
            self._watcher.stdin.flush()

    def close(self) -> None:
        self._epmd.kill()
        self._epmd.wait()
        self._watcher.communicate()  # closes its standard input, which ends it


_household: _Household | None = None
_household_lock = threading.Lock()


def _enter(node: Node, installation: Installation) -> _Household:
    global _household
    with _household_lock:
        # After a fork only the parent closes the parent's household.
        if _household is None or _household.pid != os.getpid():
            _household = _Household(installation)
        _household.nodes.add(node)
        return _household


def _leave(node: Node, household: _Household) -> None:
    global _household
    with _household_lock:
        household.nodes.discard(node)
        if not household.nodes:
            household.close()
            if _household is household:
                _household = None


@atexit.register
def _close_all() -> None:
    if _household is not None and _household.pid == os.getpid():
        for node in list(_household.nodes):
            node.close()


def _watch(parent: int) -> None:
    """The watcher's main loop: see _Household."""
    processes: dict[str, int] = {}
    folders: list[str] = []
    rest = b""
    while True:
        orphaned = os.getppid() != parent
        # Commands that arrived before the parent died are still carried out.
        if not select.select([0], [], [], 0 if orphaned else 0.25)[0]:
            if orphaned:
                break
            continue
        data = os.read(0, 65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            word, what = os.fsdecode(line).split(" ", 1)
            if word == "watch":
                with contextlib.suppress(ProcessLookupError):
                    processes[what] = os.pidfd_open(int(what))
            elif word == "forget" and what in processes:
                os.close(processes.pop(what))
            elif word == "delete":
                folders.append(what)
    for handle in processes.values():
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------- the node


class Node:
    """One RabbitMQ node on 127.0.0.1, with its own ports, folder and epmd.

    It keeps its ports and its data from `kill` or `stop` to the next `start`. `close` deletes its
    folder, unless the caller provided it. Nodes of one process have the same cookie by default, and
    so can `join` each other.

    config: lines for `rabbitmq.conf`. tls: also listen with TLS, and create the certificates for it
    (a client certificate is optional). plugins: names of plugins to enable.
    """

    def __init__(
        self,
        release: str = "host",
        *,
        config: str = "",
        name: str | None = None,
        cookie: str | None = None,
        folder: Path | None = None,
        tls: bool = False,
        plugins: Sequence[str] = (),
    ) -> None:
        installation = find(release)
        if installation is None:
            raise NodeError(
                f"RabbitMQ ({release}) is not installed; try: "
                f"python tools/rabbitmq_node.py install {release}"
            )
        if os.environ.get("DOMAIN_EVENTS_TEST_RELEASE") == NO_NODES:
            raise NodeError("DOMAIN_EVENTS_TEST_RELEASE=none allows no RabbitMQ to be started")
        if installation.root is not None and os.geteuid() != 0:
            raise NodeError(f"RabbitMQ {release} is unpacked in a folder: running it needs root")
        self._installation = installation
        self.port = free_port()
        self.tls_port = free_port()
        self._distribution_port = free_port()
        self.name = f"{name or f'rabbit{self.port}'}@localhost"
        self._config = config
        self._tls = tls
        self._plugins = tuple(plugins)
        self._keep_folder = folder is not None
        self._beam: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        self._closed = False

        if folder is None:
            base = None if installation.root is None else installation.root / "srv"
            folder = Path(tempfile.mkdtemp(prefix="domain-events-node-", dir=base))
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._household = _enter(self, installation)
        if not self._keep_folder:
            self._household.tell("delete", folder)
        self.cookie = cookie or self._household.cookie
        self._write("enabled_plugins", f"[{','.join(self._plugins)}].\n")
        cookie_file = folder / ".erlang.cookie"
        cookie_file.unlink(missing_ok=True)
        # Whoever can read it may run anything as this user; so it never has any other mode.
        handle = os.open(cookie_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        with os.fdopen(handle, "w") as file:
            file.write(self.cookie)
        if tls and not self.ca_file.exists():
            _make_certificates(folder)

    # -- addresses

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"

    @property
    def tls_url(self) -> str:
        """For a client that trusts `ca_file`."""
        return f"amqps://guest:guest@127.0.0.1:{self.tls_port}/%2F"

    @property
    def version(self) -> str:
        return self._installation.version

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def certificate_file(self) -> Path:
        """The client's certificate; the node has its own, of the same authority."""
        return self.folder / "client.pem"

    @property
    def key_file(self) -> Path:
        return self.folder / "client.key"

    @property
    def log(self) -> str:
        """The node's output so far."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int | None:
        """The broker's process, or None while it is not running."""
        beam = self._beam
        return beam.pid if beam is not None and beam.poll() is None else None

    # -- life cycle

    def start(self, wait: bool = True) -> None:
        """Start, and wait until it answers AMQP (90 s at most). A running node is left alone.

        With wait=False return at once; `wait_for_broker` or a second `start` waits.
        """
        with self._lock:
            if self._closed:
                raise NodeError(f"{self.name} is closed")
            if self.pid is None:
                self._launch()
            if wait:
                self._wait()

    def kill(self) -> None:
        """SIGKILL, like a crash."""
        with self._lock:
            if self._beam is not None:
                self._beam.kill()
                self._reap(STOP_SECONDS)

    def stop(self) -> None:
        """Stop in order; SIGKILL if that takes longer than 30 s."""
        with self._lock:
            if self._beam is None:
                return
            self._beam.terminate()
            self.resume()
            try:
                self._reap(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: the broker stays connected but silent, as behind a dead network."""
        self._signal(signal.SIGSTOP)
        # The signal is only on its way; a publish could still get through and be confirmed.
        deadline = time.monotonic() + STOP_SECONDS
        while self.pid is not None and not _is_stopped(self.pid):
            if time.monotonic() > deadline:
                raise NodeError(f"{self.name} does not stop for SIGSTOP")
            time.sleep(0.01)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def ctl(self, *arguments: str) -> str:
        """rabbitmqctl on this node: its output. Takes two to three seconds."""
        return self._run("rabbitmqctl", "--quiet", *arguments)

    def write_programs(self, folder: Path) -> None:
        """Write the command-line tools for this node there, for the PATH of a program."""
        environment = [f"{name}={value}" for name, value in self._environment().items()]
        for name in ("rabbitmqctl", "rabbitmq-diagnostics"):
            command = shlex.join(["env", "-i", *environment, *self._command(name)])
            program = folder / name
            program.write_text(f'#!/bin/sh\ncd / && exec {command} "$@"\n')
            program.chmod(0o700)

    def sync(self) -> None:
        """Write to disk what this node still holds in memory about its quorum queues.

        A broker registers a new quorum queue in a table that it writes about a second later. If it
        is killed before that, it forgets the queue's log, with events that it had confirmed
        (3.10.8, 4.0.5 and 4.3.6 alike). Tests that declare, publish and kill call this first.
        """
        self.ctl("eval", "[dets:sync(Table) || Table <- dets:all()].")

    def join(self, other: Node) -> None:
        """Join the cluster of the other node; this node loses its data."""
        other.start()
        self.start()
        self.ctl("stop_app")
        self.ctl("join_cluster", other.name)
        self.ctl("start_app")
        self._wait()

    def close(self) -> None:
        """Kill the node and delete its folder. None of its processes is left."""
        if os.getpid() != self._household.pid:
            return  # a fork of its owner
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.kill()
            if not self._keep_folder:
                shutil.rmtree(self.folder, ignore_errors=True)
            _leave(self, self._household)

    def __enter__(self) -> Node:
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
        return f"<Node {self.name} RabbitMQ {self.version}, {state}>"

    # -- implementation

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def _environment(self) -> dict[str, str]:
        inside = self._installation.inside
        return {
            # Not the caller's environment: its ERL_FLAGS or RABBITMQ_... would take effect.
            "PATH": _PATH,
            "LANG": "C.UTF-8",
            "HOME": inside(self.folder),  # for the cookie
            "ERL_EPMD_PORT": str(self._household.epmd_port),
            "ERL_CRASH_DUMP_SECONDS": "0",  # prevents a dump of many MB in some folder
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": inside(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": inside(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": inside(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": inside(self.folder / "data"),
            "RABBITMQ_LOG_BASE": inside(self.folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": inside(self.folder / "pid"),
            # "Allow input", without providing any: so the script *becomes* the Erlang VM instead of
            # waiting for it in a shell, and the process that we signal and reap is the broker
            # itself.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
            # Two schedulers are plenty for a test, and start faster than one per core.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"+S 2:2 {_LOOPBACK_ONLY}",
            "RABBITMQ_CTL_ERL_ARGS": f"+S 1:1 {_LOOPBACK_ONLY}",
        }

    def _configuration(self) -> str:
        lines = [f"listeners.tcp.1 = 127.0.0.1:{self.port}"]
        if self._tls:
            inside = self._installation.inside
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}",
                f"ssl_options.cacertfile = {inside(self.ca_file)}",
                f"ssl_options.certfile = {inside(self.folder / 'server.pem')}",
                f"ssl_options.keyfile = {inside(self.folder / 'server.key')}",
                "ssl_options.verify = verify_peer",
                "ssl_options.fail_if_no_peer_cert = false",
            ]
        lines += [line for plugin, line in _PLUGIN_LISTENERS.items() if plugin in self._plugins]
        return "\n".join([*lines, self._config, ""])

    def _command(self, program: str, *arguments: str) -> list[str]:
        return self._installation.command(f"/{_PROGRAMS}/{program}", *arguments)

    def _launch(self) -> None:
        self._write("rabbitmq.conf", self._configuration())
        with (self.folder / "log").open("ab") as log:
            self._beam = subprocess.Popen(
                self._command("rabbitmq-server"),
                env=self._environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # see _Household
            )
        self._household.tell("watch", self._beam.pid)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        # The TLS listener opens after the plain one.
        while not (_answers(self.port) and (not self._tls or _accepts(self.tls_port))):
            if self._beam is not None and self._beam.poll() is not None:
                raise NodeError(f"{self.name} ended while it started:\n{_tail(self.log)}")
            if time.monotonic() > deadline:
                self.kill()
                raise NodeError(
                    f"{self.name} did not answer on port {self.port} within "
                    f"{START_SECONDS:.0f} s:\n{_tail(self.log)}"
                )
            time.sleep(0.05)

    def _reap(self, seconds: float) -> None:
        assert self._beam is not None
        self._beam.wait(seconds)
        self._household.tell("forget", self._beam.pid)
        self._beam = None

    def _signal(self, number: signal.Signals) -> None:
        if self._beam is not None:
            self._beam.send_signal(number)

    def _run(self, program: str, *arguments: str) -> str:
        try:
            done = subprocess.run(
                self._command(program, *arguments),
                env=self._environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=CTL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise NodeError(
                f"{program} {' '.join(arguments)}: did not end within {CTL_SECONDS} s"
            ) from error
        if done.returncode != 0:
            raise NodeError(f"{program} {' '.join(arguments)}:\n{_tail(done.stdout)}")
        return done.stdout


def _is_stopped(pid: int) -> bool:
    """Whether every thread of the process is stopped."""
    states = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            states.append(stat.read_text().rpartition(")")[2].split()[0])
    return set(states) <= {"T"}


def _tail(text: str, lines: int = 80) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _make_certificates(folder: Path) -> None:
    """A certificate authority, with certificates for a server and for a client."""

    def openssl(name: str, subject: str, extensions: Sequence[str], *more: str) -> None:
        # -subj and -addext alone determine its contents, not the machine's openssl.cnf.
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
        command += ["ec_paramgen_curve:P-256", "-nodes", "-days", "3650", "-subj", f"/CN={subject}"]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.pem", *more]
        for extension in extensions:
            command += ["-addext", extension]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise NodeError("TLS needs the command `openssl` to create certificates") from error
        except subprocess.CalledProcessError as error:
            raise NodeError(f"openssl:\n{_tail(error.stderr)}") from error

    openssl("ca", "domain-events test authority", ["keyUsage=critical,keyCertSign,cRLSign"])
    authority = ["-CA", "ca.pem", "-CAkey", "ca.key"]
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    leaf = ["basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature"]
    openssl("server", "localhost", [names, *leaf, "extendedKeyUsage=serverAuth"], *authority)
    openssl("client", "domain-events", [*leaf, "extendedKeyUsage=clientAuth"], *authority)


# --------------------------------------------------------------------------- the commands

# One script, so that `sudo` runs once. Debian starts a service as soon as it is installed;
# policy-rc.d prevents that. Package lists can be missing (a fresh container) or too old.
_APT = """
set -e
export DEBIAN_FRONTEND=noninteractive
if [ ! -e /usr/sbin/policy-rc.d ]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
fi
if ! ls /var/lib/apt/lists | grep -q _Packages; then apt-get update; fi
apt-get install -y --no-install-recommends "$@" || {
    apt-get update
    apt-get install -y --no-install-recommends "$@"
}
"""


_OTHERWISE = ", or set DOMAIN_EVENTS_TEST_URL to the URL of a broker that tests may use"


def install(releases: Sequence[str] = ("host",)) -> None:
    """Install the missing ones of `releases`, after a message. Raises NodeError if it cannot."""
    for release in releases:
        if find(release) is not None:
            continue
        if release == "host":
            _say("installing rabbitmq-server with apt-get; its service is not started")
            apt_install("rabbitmq-server", "openssl")
        else:
            unpack(SUITES[release], SUITES[release], f"RabbitMQ {release}", ["rabbitmq-server"])
        if find(release) is None:
            raise NodeError(f"RabbitMQ ({release}) was installed, but there is no /{_PROGRAMS}")


def apt_install(*packages: str, otherwise: str = _OTHERWISE) -> None:
    """Install Debian packages, starting no service. Raises NodeError, which ends in `otherwise`."""
    command = ["sh", "-c", _APT, "sh", *packages]
    package = " ".join(packages)
    if shutil.which("apt-get") is None:
        raise NodeError(f"no apt-get here: install {package} yourself{otherwise}")
    if os.geteuid() != 0:
        if shutil.which("sudo") is None or subprocess.call(["sudo", "-n", "true"]) != 0:
            raise NodeError(f"apt-get needs root: run `apt-get install {package}`{otherwise}")
        command = ["sudo", "-n", *command]
    if subprocess.call(command, stdin=subprocess.DEVNULL) != 0:
        raise NodeError(f"apt-get could not install {package}: install it yourself{otherwise}")


def unpack(name: str, suite: str, content: str, packages: Sequence[str]) -> Path:
    """A minimal Debian with these packages, unpacked to a folder of this name and kept there."""
    cache = _cache()
    folder = cache / name
    if os.geteuid() != 0:
        raise NodeError(f"unpacking {content} needs root{_OTHERWISE}")
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{name}.lock"):
        if folder.exists():
            return folder  # from an earlier run, or another process was faster
        if shutil.which("debootstrap") is None:
            _say("installing debootstrap with apt-get")
            apt_install("debootstrap")
        mirror = _mirror()
        _say(f"unpacking {content} (Debian {suite}, 400 MB and more) to {folder}")
        # A debootstrap older than the suite has no script for it; that of `sid` works for all.
        script = suite if Path(f"/usr/share/debootstrap/scripts/{suite}").exists() else "sid"
        partial = cache / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}"]
        if subprocess.call([*command, suite, str(partial), mirror, script]) != 0:
            raise NodeError(f"debootstrap failed; its log is {partial}/debootstrap/debootstrap.log")
        with (partial / "etc/hosts").open("a") as hosts:
            hosts.write("127.0.0.1 localhost\n")
        shutil.rmtree(partial / "var/cache/apt/archives", ignore_errors=True)
        partial.rename(folder)  # so the folder is never visible half unpacked
    return folder


def _mirror() -> str:
    """The Debian mirror of this machine's own apt sources."""
    fields = ["--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian", "Label: Debian"]
    for line in subprocess.getoutput(shlex.join(["apt-get", "indextargets", *fields])).splitlines():
        if line.startswith(("http:", "https:", "file:")):
            return line
    raise NodeError(f"this machine's apt sources have no Debian mirror{_OTHERWISE}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_with_node(release: str, command: Sequence[str]) -> int:
    """Run `command` with a node; returns its exit code, as a shell would."""
    install([release])
    exit_on_signals()
    _say(f"starting RabbitMQ ({release}); this takes some seconds")
    with Node(release) as node:
        arguments = [argument.replace("{url}", node.url) for argument in command]
        return run_to_the_end(arguments, {**os.environ, "DOMAIN_EVENTS_URL": node.url})


def exit_on_signals() -> None:
    """From now on SIGTERM and SIGHUP raise SystemExit, so that what was started is stopped."""

    def on_signal(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGHUP, on_signal)


def run_to_the_end(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command, which ends with us; returns its exit code, as a shell would."""
    try:
        child = subprocess.Popen(arguments, env=environment)
    except OSError as error:
        print(f"{arguments[0]}: {error.strerror}", file=sys.stderr)
        return 127
    try:
        code = child.wait()
    except KeyboardInterrupt:
        # The terminal sent Ctrl-C to the command as well: let it end in its own way.
        code = _end(child)
    except SystemExit:
        child.terminate()
        _end(child)
        raise
    return code if code >= 0 else 128 - code


def _end(child: subprocess.Popen[bytes]) -> int:
    try:
        return child.wait(10)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.kill()
        return child.wait()


def _say(text: str) -> None:
    print(f"rabbitmq_node: {text}", file=sys.stderr, flush=True)


def partition(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and what stands after it."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def main() -> int:
    if sys.argv[1:2] == ["_watch"]:
        _watch(int(sys.argv[2]))
        return 0
    # Everything after the first `--` belongs to the command, whatever it looks like.
    words, command = partition(sys.argv[1:])
    parser = argparse.ArgumentParser(
        prog="rabbitmq_node.py",
        description="Private RabbitMQ nodes: no root service, no Docker.",
        epilog=f"RELEASE is one of {', '.join(RELEASES)}; `host` is the one installed here.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "install missing releases (needs root and apt-get)"
    installing = commands.add_parser("install", help=text, description=text)
    installing.add_argument("releases", nargs="*", metavar="RELEASE", help="default: host")
    text = "run a command with a node, its URL in DOMAIN_EVENTS_URL and in place of each {url}"
    usage = "rabbitmq_node.py run [-h] [--release RELEASE] -- COMMAND ..."
    running = commands.add_parser("run", help=text, description=text, usage=usage)
    running.add_argument("--release", default="host", choices=RELEASES, metavar="RELEASE")
    options = parser.parse_args(words)
    try:
        if options.command == "install":
            install(options.releases or ["host"])
            return 0
        if not command:
            running.error("no command after --")
        return _run_with_node(options.release, command)
    except NodeError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
