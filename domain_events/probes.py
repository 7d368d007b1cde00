"""Probes: the health of subscribers and publishers for Kubernetes, Docker and systemd.

Nothing here runs unless it is started. `HealthServer` answers HTTP requests; `HealthBeat` writes a
file for probes that execute a command, and sends systemd's notifications. The command is in this
module, and imports nothing of the program that it checks::

    python -m domain_events.probes /tmp/health.json --live

Threads. `HealthServer` has one that accepts, and one for each request; `HealthBeat` has one, which
alone writes the file and sends. All of them only read: `health()` takes no lock that a handler may
hold. `close` ends them.

Forks. A child has neither the threads nor the file: what its parent has started does nothing there,
and closing it in the child leaves the parent's alone. Start them in the process that consumes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from types import TracebackType
from typing import Any, Protocol, TypeVar

from domain_events import ConfigurationError
from domain_events.checks import flag, refusal, shown, whole_number

__all__ = ["HealthBeat", "HealthServer", "check", "report"]

log = logging.getLogger("domain_events")

# Seconds for a client to send its request, and for systemd to take a notification.
_PATIENCE = 5.0


class Health(Protocol):
    """A `SubscriberHealth`, a `PublisherHealth`, or that of several processes."""

    @property
    def alive(self) -> bool: ...
    @property
    def ready(self) -> bool: ...
    @property
    def not_alive(self) -> tuple[str, ...]: ...
    @property
    def not_ready(self) -> tuple[str, ...]: ...
    def as_dict(self) -> dict[str, Any]: ...


class HasHealth(Protocol):
    """A `Subscriber` or a `Publisher`."""

    def health(self) -> Health:
        """Whether it is alive and ready."""


def report(*checked: HasHealth) -> dict[str, Any]:
    """The health of all of them as one, for ``json.dumps``: alive or ready if each of them is."""
    health = [each.health() for each in checked]
    return {
        "alive": all(each.alive for each in health),
        "ready": all(each.ready for each in health),
        "not_alive": [reason for each in health for reason in each.not_alive],
        "not_ready": [reason for each in health for reason in each.not_ready],
        "at": time.time(),
        "pid": os.getpid(),
        "checked": [each.as_dict() for each in health],
    }


class _Probe:
    """What both have in common: they are started, and closed, once, in one process."""

    _option = ""  # one of its options, as it is given

    def __init__(self, checked: tuple[HasHealth, ...]) -> None:
        for each in checked:
            if isinstance(each, type) or not callable(getattr(each, "health", None)):
                is_option = isinstance(each, int | str | os.PathLike)
                hint = f"; its options are given by name, as {self._option}" if is_option else ""
                raise ConfigurationError(
                    f"{type(self).__name__} takes Subscribers and Publishers, one by one, not "
                    f"{shown(each)}{hint}."
                )
        if not checked:
            raise ConfigurationError(f"{type(self).__name__} needs a Subscriber or a Publisher.")
        self._checked = checked
        self._pid: int | None = None  # the process in which it was started, until it is closed

    def start(self) -> None:
        """Start it; in a with statement that happens by itself."""
        if self._pid == os.getpid():
            raise RuntimeError(f"This {type(self).__name__} was started already.")
        self._start()
        self._pid = os.getpid()
        _started.add(self)

    def close(self) -> None:
        """End it. May be called again."""
        pid, self._pid = self._pid, None
        if pid == os.getpid():
            self._close()
        elif pid is not None:
            self._leave_to_parent()

    def _start(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def _leave_to_parent(self) -> None:
        """In the child of a fork: let go of what only the parent uses."""

    def __enter__(self: _Started) -> _Started:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_Started = TypeVar("_Started", bound=_Probe)
_started: weakref.WeakSet[_Probe] = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_started):
        each.close()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


# --- HTTP ----------------------------------------------------------------------------------------


class HealthServer(_Probe):
    """Answers probes over HTTP.

    ``/live`` and ``/ready`` answer 200 or 503, ``/health`` 200 if all is well. Each has the reasons
    as JSON; ``/health`` has everything, with the addresses of brokers (without passwords), the
    names of subscribers, and the ids of events. ::

        with HealthServer(subscriber, port=8080):
            subscriber.start_consuming()

    :param checked: subscribers and publishers.
    :param host: the address to listen on; all IPv4 addresses if left out, ``::`` for IPv6.
    :param port: the port; with 0, any that is free. See `port` for which one.
    :raises ConfigurationError: for an option that cannot work; when it is started, and cannot
        listen there.
    """

    _option = "port=8080"

    def __init__(self, *checked: HasHealth, host: str = "", port: int = 8080) -> None:
        super().__init__(checked)
        if not isinstance(host, str):
            raise refusal(host, "host", "an address, such as '127.0.0.1'")
        self._host = host
        self._port = whole_number(port, "port", 0, 65_535)
        self._server: _Server | None = None

    @property
    def port(self) -> int:
        """The port on which it listens; before it is started, the one that was given."""
        return self._port if self._server is None else int(self._server.server_address[1])

    def _start(self) -> None:
        try:
            self._server = _Server(self._host, self._port, self._checked)
        except OSError as error:
            where = f"port {self._port} of {self._host or 'this host'}"
            raise ConfigurationError(
                f"Health cannot be served on {where}: {error}. Give another port, or 0 for any "
                "that is free; several processes of one host need one each."
            ) from error
        serve = self._server.serve_forever
        try:
            threading.Thread(target=serve, name="domain-events-health", daemon=True).start()
        except BaseException:
            self._leave_to_parent()
            raise
        log.info("Health is served on port %d: /live, /ready, /health.", self.port)

    def _close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def _leave_to_parent(self) -> None:
        # Otherwise the port would be taken for as long as the child runs.
        server, self._server = self._server, None
        if server is not None:
            server.socket.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, checked: tuple[HasHealth, ...]) -> None:
        self.checked = checked
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's may wait for the DNS, for a name nobody uses
        self.server_name, self.server_port = "", self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exc_info()[1]
        log.debug("A health request of %s failed: %r", client_address, error)  # the client is gone


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE
    server_version, sys_version = "domain-events", ""

    def do_GET(self) -> None:
        question = self.path.partition("?")[0]
        if question not in ("/live", "/ready", "/health"):
            self._answer(404, {"error": "There are /live, /ready and /health."})
            return
        try:
            found = report(*self.server.checked)
        except Exception as error:
            log.exception("The health could not be determined.")
            self._answer(500, {"error": f"{type(error).__name__}; see the log."})
            return
        well = _answers(found)[question.removeprefix("/")]
        if question != "/health":
            kind = "alive" if question == "/live" else "ready"
            found = {kind: found[kind], "reasons": found[f"not_{kind}"]}
        self._answer(200 if well else 503, found)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """A probe comes every few seconds; nobody wants a line for each."""


def _answers(found: dict[str, Any]) -> dict[str, bool]:
    alive, ready = bool(found["alive"]), bool(found["ready"])
    return {"live": alive, "ready": ready, "health": alive and ready}


# --- the file, and systemd -----------------------------------------------------------------------


class HealthBeat(_Probe):
    """Writes the health to a file every few seconds, and sends systemd's notifications.

    The file is JSON and replaced as a whole; when it was last modified is the beat, by which the
    command (``python -m domain_events.probes``) notices a process that does nothing any more, not
    even this. It is deleted when this is closed.

    To systemd go ``READY=1`` as soon as all are ready, ``STATUS=`` with the reasons, ``STOPPING=1``
    when this is closed, and, if the unit has a watchdog, ``WATCHDOG=1`` in half of its time, while
    all are alive. Without a ``NOTIFY_SOCKET``, as outside of systemd, nothing is sent. ::

        with HealthBeat(subscriber, file='/tmp/health.json'):
            subscriber.start_consuming()

    :param checked: subscribers and publishers.
    :param file: where to write; each process needs one of its own.
    :param systemd: whether to notify systemd.
    :param every: seconds between two beats; with a watchdog, at most half of its time.
    :raises ConfigurationError: for an option that cannot work; when it is started, and the file
        cannot be written.
    """

    _option = "file='/tmp/health.json'"

    def __init__(
        self,
        *checked: HasHealth,
        file: str | os.PathLike[str] | None = None,
        systemd: bool = False,
        every: float = 5.0,
    ) -> None:
        super().__init__(checked)
        if file is not None and not (isinstance(file, str | os.PathLike) and Path(file).name):
            raise refusal(file, "file", "the path of a file, such as '/tmp/health.json'")
        if not flag(systemd, "systemd") and file is None:
            raise ConfigurationError("HealthBeat does nothing without file=... or systemd=True.")
        if not isinstance(every, int | float) or not 0 < every < threading.TIMEOUT_MAX:
            raise ConfigurationError(f"every must be a positive number of seconds, not {every!r}.")
        self._file = None if file is None else Path(file)
        self._systemd = Systemd() if systemd else None
        self._every = every
        self._failing = False

    def _start(self) -> None:
        if self._systemd is not None:
            self._systemd.begin()
        try:
            self._beat()
        except OSError as error:
            raise ConfigurationError(
                f"The health file {self._file} cannot be written: {error}. Give a file in a "
                "directory that exists and that this user may write to."
            ) from error
        every = self._every
        if self._systemd is not None and self._systemd.watchdog is not None:
            every = min(every, self._systemd.watchdog / 2)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(every,), name="domain-events-beat", daemon=True
        )
        self._thread.start()

    def _close(self) -> None:
        self._closing.set()
        self._thread.join(_PATIENCE)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()
        if self._systemd is not None:
            self._systemd.end()

    def _run(self, every: float) -> None:
        while not self._closing.wait(every):
            try:
                self._beat()
            except Exception:
                # No beat, so the probe fails; logged once, until it succeeds again.
                if not self._failing:
                    self._failing = True
                    with contextlib.suppress(Exception):
                        log.exception("The health cannot be written to %s.", self._file)
            else:
                self._failing = False

    def _beat(self) -> None:
        found = report(*self._checked)
        if self._systemd is not None:
            self._systemd.notify(found)
        if self._file is not None:
            replace(self._file, json.dumps(found) + "\n")


def replace(file: Path, content: str) -> None:
    """Write the file so that a reader gets the old or the new one, as a whole."""
    # In the same directory, which a rename must not leave.
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        new.write_text(content, encoding="utf-8")
        new.replace(file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


class Systemd:
    """The protocol of sd_notify(3) and sd_watchdog_enabled(3), without their library.

    :param patience: seconds for systemd to take a notification.
    """

    def __init__(self, patience: float = _PATIENCE) -> None:
        self._patience = patience
        self._address: str | None = None
        #: Seconds within which systemd wants a beat; None if it wants none.
        self.watchdog: float | None = None
        self._was_ready = False
        self._reloading = False
        self._status = ""
        self._failing = False

    def begin(self) -> None:
        """Read what systemd has put into the environment."""
        address = os.environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the NUL byte of an abstract socket.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address or None
        microseconds = os.environ.get("WATCHDOG_USEC", "")
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        if self._address and ours and microseconds.isdecimal() and int(microseconds):
            self.watchdog = int(microseconds) / 1e6
        self._was_ready, self._status = False, ""

    def notify(self, found: dict[str, Any]) -> None:
        """Send what is to be sent about this health."""
        lines = []
        ready = found["ready"] and not self._reloading
        if ready and not self._was_ready:
            lines.append("READY=1")
        if found["alive"] and self.watchdog is not None:
            lines.append("WATCHDOG=1")
        reasons = dict.fromkeys((*found["not_alive"], *found["not_ready"]))
        status = " ".join(" ".join(reasons).split()) or "Alive and ready."
        if status != self._status:
            lines.append(f"STATUS={status}")
        if lines and self._send(lines):
            self._was_ready = self._was_ready or ready
            self._status = status

    def reloading(self) -> None:
        """It begins to replace what runs: systemd waits for `reloaded`."""
        if not self._was_ready:
            return
        self._reloading = True
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(["RELOADING=1", f"MONOTONIC_USEC={microseconds}"])

    def reloaded(self) -> None:
        """It has ended, whether something was replaced or not: ``READY=1`` is sent again."""
        if self._reloading:
            self._reloading = False
            self._was_ready = self._send(["READY=1"])

    def end(self) -> None:
        self._send(["STOPPING=1"])

    def _send(self, lines: list[str]) -> bool:
        """Whether systemd has received them; otherwise they are sent with the next beat."""
        if self._address is None:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to_systemd:
                to_systemd.settimeout(self._patience)
                to_systemd.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            if not self._failing:  # logged once, until it succeeds again
                self._failing = True
                log.warning("systemd cannot be notified at NOTIFY_SOCKET: %s.", error)
            return False
        self._failing = False
        return True


# --- the command ---------------------------------------------------------------------------------


def check(file: str | os.PathLike[str], question: str, max_age: float) -> tuple[bool, str]:
    """Look into the file that a `HealthBeat` writes.

    :param question: ``live`` or ``ready``.
    :param max_age: seconds; an older file means that its process does not run.
    :return: whether all is well, and why, on one line.
    """
    try:
        with Path(file).open(encoding="utf-8") as opened:
            age = time.time() - os.fstat(opened.fileno()).st_mtime
            found = json.load(opened)
        well = _answers(found)[question]
        reasons = " ".join(found["not_alive" if question == "live" else "not_ready"])
    except FileNotFoundError:
        return False, f"{file} does not exist: the process has not started, or has ended."
    except (OSError, ValueError, KeyError, TypeError) as error:
        return False, f"{file} cannot be read: {type(error).__name__}: {error}"
    if abs(age) > max_age:  # in the future after the clock was set
        return False, f"{file} is {age:.0f} s old: the process does not run."
    return well, reasons or f"{question}, {max(0.0, age):.0f} s ago"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: exit status 0 if all is well, else 1, and one line that says why."""
    parser = argparse.ArgumentParser(
        prog="python -m domain_events.probes",
        description="Check the file that a HealthBeat writes, as a probe.",
    )
    parser.add_argument("file")
    question = parser.add_mutually_exclusive_group(required=True)
    for each, what in (
        ("live", "fail if only a restart helps"),
        ("ready", "fail while it does not receive events"),
    ):
        question.add_argument(
            f"--{each}", dest="question", action="store_const", const=each, help=what
        )
    parser.add_argument(
        "--max-age",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="fail if the file is older (default: 15); three beats or more",
    )
    options = parser.parse_args(arguments)
    well, why = check(options.file, options.question, options.max_age)
    print(why)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
