"""Probes: over HTTP, by a file, for systemd; the broker is away, a handler hangs, all stops."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench import Bench, running
from rabbitmq_node import Node
from support import Names, sooner_than, wait_until
from test_processes import Program

from domain_events import (
    ConfigurationError,
    DomainEvent,
    Publisher,
    PublisherHealth,
    Subscriber,
    SubscriberHealth,
    probes,
)
from domain_events.broker import memory
from domain_events.health import RunningHandler, SubscriptionHealth
from domain_events.probes import HealthBeat, HealthServer

PROBED = Path(__file__).parent / "programs" / "probed.py"

#: Seconds; far more than a process that runs lets pass between two beats.
TOO_OLD = 10.0


def ask(port: int, path: str, method: str = "GET", timeout: float = 30) -> tuple[int, Any]:
    """The status and the JSON of an answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
        return answer.status, json.loads(body) if body else None
    finally:
        connection.close()


def statuses(port: int) -> tuple[int, int, int]:
    """Those of live, ready and health."""
    live, ready, health = (ask(port, path)[0] for path in ("/live", "/ready", "/health"))
    return live, ready, health


class Checked:
    """Has the health that a test gives it."""

    def __init__(self, *, alive: bool = True, ready: bool = True) -> None:
        self.alive, self.ready = alive, ready

    def health(self) -> SubscriberHealth:
        handler = RunningHandler("shop-mail", "a.b", "an-id", 75.0, 60.0)
        return SubscriberHealth(
            at=time.time(),
            switched_off=False,
            connections=(),
            last_error=None,
            last_error_at=None,
            running=True,
            stopping=not self.ready,
            ended_by=None,
            subscriptions=(SubscriptionHealth("shop-mail", 1.0, 1, 2.0),),
            handlers=() if self.alive else (handler,),
        )


class Broken:
    """One whose health cannot be determined."""

    def health(self) -> PublisherHealth:
        raise ValueError("broken")


@pytest.fixture
def memory_url(unique: str) -> Iterator[str]:
    yield f"memory://{unique}"
    memory.forget(unique)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "health.json"


def checked_by_command(file: Path, question: str, max_age: float = TOO_OLD) -> tuple[int, str]:
    """The exit status of the command, and its line."""
    done = subprocess.run(
        [sys.executable, "-m", "domain_events.probes", file, question, f"--max-age={max_age}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    return done.returncode, done.stdout.strip()


# ------------------------------------------------------------------ a program, and what befalls it


@pytest.fixture
def outage(killable_node: Node, unique: str) -> Iterator[Bench]:
    bench = Bench(killable_node.url, Names(killable_node.url, unique))
    yield bench
    bench.publisher.close()


@contextmanager
def probed(bench: Bench, queue: str, file: Path) -> Iterator[tuple[Program, int]]:
    """A program with probes, as soon as it is ready; and its port."""
    program = Program(bench.url, str(PROBED), queue, bench.exchange, str(file))
    try:
        program.saw("port")
        port = int(program.lines[0].split()[1])
        wait_until(lambda: statuses(port) == (200, 200, 200))
        yield program, port
    finally:
        program.close()


def test_broker_that_is_away_is_no_reason_to_restart(
    outage: Bench, killable_node: Node, file: Path
) -> None:
    """The node is stopped: alive, but not ready, by HTTP and by the file; and ready again."""
    queue = outage.names.queue()
    with probed(outage, queue, file) as (program, port):
        killable_node.stop()
        wait_until(lambda: statuses(port) == (200, 503, 503))
        _, shown = ask(port, "/ready")
        assert "The subscriber has no consuming connection" in shown["reasons"][0]
        wait_until(lambda: checked_by_command(file, "--ready")[0] == 1)
        assert checked_by_command(file, "--live")[0] == 0
        assert (
            "The subscriber has no consuming connection" in checked_by_command(file, "--ready")[1]
        )
        killable_node.start()
        wait_until(lambda: statuses(port) == (200, 200, 200), timeout=60)
        wait_until(lambda: checked_by_command(file, "--ready")[0] == 0)
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 0
        assert program.lines[-1] == "returned"
    assert not file.exists()


def test_handler_that_hangs_is_a_reason_to_restart(bench: Bench, file: Path) -> None:
    """It is beyond its own limit; the reason names its subscriber and the event."""
    queue = bench.names.queue()
    with probed(bench, queue, file) as (program, port):
        event = bench.publisher.publish(DomainEvent("user.registered", {"seconds": 60}))
        program.saw("begin")
        wait_until(lambda: statuses(port) == (503, 200, 503))
        _, shown = ask(port, "/live")
        wait_until(lambda: checked_by_command(file, "--live")[0] == 1)
        for reason in (shown["reasons"][0], checked_by_command(file, "--live")[1]):
            assert reason.startswith(f"{queue} has been handling user.registered")
            assert event.uuid_string in reason
        assert checked_by_command(file, "--ready")[0] == 0


def test_stopped_process_is_noticed_from_outside(bench: Bench, file: Path) -> None:
    """SIGSTOP: HTTP times out, and the file is too old, whatever is in it."""
    with probed(bench, bench.names.queue(), file) as (program, port):
        assert checked_by_command(file, "--live")[0] == 0
        program.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError):
                ask(port, "/live", timeout=0.5)
            wait_until(lambda: "the process does not run" in probes.check(file, "live", 0.5)[1])
            status, line = checked_by_command(file, "--live", max_age=0.5)
            assert status == 1
            assert "s old: the process does not run" in line
            assert json.loads(file.read_text())["alive"], "as it was"
        finally:
            program.process.send_signal(signal.SIGCONT)
        wait_until(lambda: checked_by_command(file, "--live")[0] == 0)
        assert ask(port, "/live")[0] == 200


# ------------------------------------------------------------------ HTTP


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("ready", [True, False])
def test_several_are_alive_and_ready_if_each_of_them_is(alive: bool, ready: bool) -> None:
    """The statuses of the three, and the reasons."""
    with HealthServer(Checked(), Checked(alive=alive, ready=ready), port=0) as server:
        assert statuses(server.port) == (
            200 if alive else 503,
            200 if ready else 503,
            200 if alive and ready else 503,
        )
        _, shown = ask(server.port, "/live")
        assert shown["alive"] is alive
        assert [reason.split()[0] for reason in shown["reasons"]] == ["shop-mail"] * (not alive)
        _, shown = ask(server.port, "/ready?verbose=1")
        assert shown["ready"] is ready
        assert len(shown["reasons"]) == (not ready)
        _, shown = ask(server.port, "/health")
        assert (shown["alive"], shown["ready"]) == (alive, ready)
        assert [each["kind"] for each in shown["checked"]] == ["subscriber"] * 2
        assert shown["pid"] == os.getpid()


def test_subscriber_and_publisher_are_served_while_they_run(memory_url: str) -> None:
    """The real ones."""
    subscriber = Subscriber(memory_url)
    subscriber.register(print, "q", ["#"])
    with Publisher(memory_url) as publisher, HealthServer(subscriber, publisher, port=0) as server:
        assert statuses(server.port) == (200, 503, 503)
        with running(subscriber):
            wait_until(lambda: statuses(server.port) == (200, 200, 200))
        _, shown = ask(server.port, "/health")
        assert [each["kind"] for each in shown["checked"]] == ["subscriber", "publisher"]


def test_other_requests_get_an_answer_too() -> None:
    """HEAD, as load balancers send, and a path that does not exist."""
    with HealthServer(Checked(alive=False), port=0) as server:
        assert ask(server.port, "/live", "HEAD") == (503, None)
        assert ask(server.port, "/ready", "HEAD") == (200, None)
        assert ask(server.port, "/")[0] == 404
        assert ask(server.port, "/live/")[0] == 404


def test_client_that_sends_nothing_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is dropped after a while."""
    assert 0 < probes._Handler.timeout <= 10
    monkeypatch.setattr("domain_events.probes._Handler.timeout", 0.5)
    with (
        HealthServer(Checked(), port=0) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as silent,
    ):
        assert ask(server.port, "/live")[0] == 200
        assert silent.recv(1) == b""


def test_health_that_cannot_be_determined_fails_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error of this library's must not look like health."""
    with HealthServer(Broken(), port=0) as server:
        assert ask(server.port, "/live") == (500, {"error": "ValueError; see the log."})
    assert "ValueError: broken" in caplog.text


def test_port_that_is_taken_is_an_error_that_says_so() -> None:
    """And one that is free again can be taken."""
    with HealthServer(Checked(), port=0) as server:
        port = server.port
        with pytest.raises(ConfigurationError, match=f"cannot be served on port {port} of this"):
            HealthServer(Checked(), port=port).start()
        assert ask(port, "/live")[0] == 200
    with HealthServer(Checked(), port=port) as again:
        assert again.port == port
        assert ask(port, "/live")[0] == 200
    with pytest.raises(OSError, match="refused"):
        ask(port, "/live")


@pytest.mark.parametrize("port", [-1, 65536, "8080", None, True])
def test_port_that_is_none_is_an_error_that_says_so(port: Any) -> None:
    """A text, for example, as it is in the environment. Refused when it is made."""
    with pytest.raises(ConfigurationError, match="port must be an int from 0 to 65,535, not"):
        HealthServer(Checked(), port=port)


def test_options_that_are_not_given_by_name_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """Those to be checked come before them, any number of them."""
    with pytest.raises(ConfigurationError, match=r"not 8080; its options .* as port=8080"):
        HealthServer(Checked(), 8080)  # type: ignore[arg-type]
    for file in (tmp_path, str(tmp_path)):
        with pytest.raises(ConfigurationError, match=r"its options .* by name, as file="):
            HealthBeat(Checked(), file)  # type: ignore[arg-type]


def test_host_is_an_address() -> None:
    wrong: Any = 8080
    with pytest.raises(ConfigurationError, match="host must be an address"):
        HealthServer(Checked(), host=wrong)


@pytest.mark.parametrize("file", ["", ".", 5, True])
def test_file_of_a_beat_is_a_path(file: Any) -> None:
    """An empty one, for example, as a variable in the environment is."""
    with pytest.raises(ConfigurationError, match="file must be the path of a file"):
        HealthBeat(Checked(), file=file)


def test_text_is_not_taken_for_true() -> None:
    """As it is in the environment, in which "no" would be true."""
    no: Any = "no"
    with pytest.raises(ConfigurationError, match="systemd must be True or False"):
        HealthBeat(Checked(), file="health.json", systemd=no)


def test_health_is_served_on_ipv6() -> None:
    """Clusters may have nothing else."""
    with HealthServer(Checked(), host="::1", port=0) as server:
        connection = HTTPConnection("::1", server.port, timeout=30)
        connection.request("GET", "/live")
        assert connection.getresponse().status == 200
        connection.close()


def test_closing_twice_and_starting_again_is_possible() -> None:
    """As with everything that a with statement closes."""
    server = HealthServer(Checked(), port=0)
    server.close()
    for _ in range(2):
        with server:
            assert ask(server.port, "/live")[0] == 200
            with pytest.raises(RuntimeError, match="started already"):
                server.start()
        server.close()


@pytest.mark.parametrize("kind", [HealthServer, HealthBeat])
@pytest.mark.parametrize("checked", [(), ([Checked()],), (Subscriber,)])
def test_what_has_no_health_is_refused(kind: Any, checked: Any) -> None:
    """A list of them, a class, and none at all."""
    with pytest.raises(ConfigurationError, match=f"{kind.__name__} (takes|needs)"):
        kind(*checked)


# ------------------------------------------------------------------ forks


def in_child(act: Callable[[], bool]) -> bool:
    """Whether it is so in the child of a fork."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = not act()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def test_child_of_a_fork_leaves_the_parents_probes_alone(file: Path) -> None:
    """It may close them, and start its own."""
    server, beat = HealthServer(Checked(), port=0), HealthBeat(Checked(), file=file, every=0.05)
    with server, beat:
        port = server.port

        def child() -> bool:
            beat.close()
            server.close()
            with HealthServer(Checked(alive=False), port=0) as own, server:
                return (
                    own.port != port
                    and ask(own.port, "/live")[0] == 503
                    and ask(server.port, "/live")[0] == 200
                    and server.port != port
                )

        assert in_child(child)
        assert ask(port, "/live")[0] == 200
        before = file.stat().st_mtime_ns
        wait_until(lambda: file.stat().st_mtime_ns > before)


def test_child_of_a_fork_does_not_keep_the_port() -> None:
    """Otherwise the parent could not be restarted while a child runs."""
    waits, ends = os.pipe()
    server = HealthServer(Checked(), port=0)
    with server:
        port = server.port
        pid = os.fork()
        if not pid:
            os.close(ends)
            os.read(waits, 1)
            os._exit(0)
    os.close(waits)
    try:
        with HealthServer(Checked(), port=port) as again:
            assert ask(again.port, "/live")[0] == 200
    finally:
        os.close(ends)
        os.waitpid(pid, 0)


# ------------------------------------------------------------------ the file and its command


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("ready", [True, False])
def test_command_answers_as_the_process_is(
    file: Path, capsys: pytest.CaptureFixture[str], alive: bool, ready: bool
) -> None:
    """By its exit status, with the reason on one line."""
    with HealthBeat(Checked(), Checked(alive=alive, ready=ready), file=file):
        assert probes.main([str(file), "--live"]) == (not alive)
        line = capsys.readouterr().out
        assert line.startswith("live, " if alive else "shop-mail has been handling a.b an-id")
        assert probes.main([str(file), "--ready"]) == (not ready)
        line = capsys.readouterr().out
        assert line.startswith("ready, " if ready else "It is stopping")
        assert line.count("\n") == 1
    assert probes.main([str(file), "--live"]) == 1
    assert "does not exist" in capsys.readouterr().out


@pytest.mark.parametrize("age", [60, -60])
def test_file_of_another_time_is_none(file: Path, age: float) -> None:
    """Of a process that does not run, or of one whose clock was set back."""
    with HealthBeat(Checked(), file=file, every=3600):
        assert probes.check(file, "live", 15)[0]
        at = time.time() - age
        os.utime(file, (at, at))
        well, why = probes.check(file, "live", 15)
        assert not well
        assert "the process does not run" in why
        assert probes.check(file, "live", 100)[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"alive": true, "ready": 1}', "\0"])
def test_file_of_another_program_is_not_health(file: Path, content: str) -> None:
    """Whatever is in it."""
    file.write_text(content)
    well, why = probes.check(file, "live", 15)
    assert not well
    assert "cannot be read" in why


def test_reader_never_sees_a_part_of_the_file(file: Path) -> None:
    """It is replaced as a whole, and nothing else is left."""
    with HealthBeat(*[Checked()] * 50, file=file, every=0.0001):
        first = file.stat().st_ino
        seen: set[float] = set()
        deadline = time.monotonic() + 30
        while len(seen) < 100 and time.monotonic() < deadline:
            seen.add(json.loads(file.read_text())["at"])
        assert len(seen) == 100
        assert file.stat().st_ino != first or len(seen) > 1
    assert list(file.parent.iterdir()) == []


def test_beat_goes_on_while_a_handler_runs(memory_url: str, file: Path) -> None:
    """It has a thread of its own."""
    subscriber = Subscriber(memory_url)
    began, go_on = threading.Event(), threading.Event()

    def handle(_event: DomainEvent) -> None:
        began.set()
        assert go_on.wait(60)

    subscriber.register(handle, "q", ["#"])
    with (
        HealthBeat(subscriber, file=file, every=0.02),
        Publisher(memory_url) as publisher,
        running(subscriber),
    ):
        publisher.publish(DomainEvent("a.b"))
        assert began.wait(30)
        before = file.stat().st_mtime_ns
        wait_until(lambda: file.stat().st_mtime_ns > before)
        wait_until(lambda: json.loads(file.read_text())["checked"][0]["running_handlers"] == 1)
        go_on.set()


def test_file_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    """And not a probe that fails for ever."""
    for wrong in (tmp_path / "nowhere" / "health.json", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be written"):
            HealthBeat(Checked(), file=wrong).start()
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_written_later_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And written again as soon as that is possible."""
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "health.json"
    with HealthBeat(Checked(), file=file, every=0.01):
        moved = folder.rename(tmp_path / "elsewhere")
        wait_until(lambda: "cannot be written to" in caplog.text)
        before = (moved / "health.json").stat().st_mtime_ns
        time.sleep(0.1)  # for further beats to fail; none may be logged
        moved.rename(folder)
        wait_until(lambda: file.stat().st_mtime_ns > before)
    assert caplog.text.count("cannot be written to") == 1


@pytest.mark.parametrize("options", [{}, {"systemd": False}])
def test_beat_without_a_purpose_is_refused(options: Any) -> None:
    """It would do nothing."""
    with pytest.raises(ConfigurationError, match="does nothing without"):
        HealthBeat(Checked(), **options)


@pytest.mark.parametrize("every", [0, -1, "5", float("nan"), float("inf")])
def test_pause_between_beats_is_a_number_of_seconds(file: Path, every: Any) -> None:
    """Refused when it is made."""
    with pytest.raises(ConfigurationError, match="every must be a positive number"):
        HealthBeat(Checked(), file=file, every=every)


# ------------------------------------------------------------------ systemd


class Systemd:
    """The end of the socket that systemd has."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(30)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def next(self) -> list[str]:
        """The lines of the next notification."""
        return self.socket.recv(65536).decode().split("\n")


@pytest.fixture(params=["path", "abstract"])
def systemd(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unique: str
) -> Iterator[Systemd]:
    address = f"@{unique}" if request.param == "abstract" else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    end = Systemd(address)
    yield end
    end.socket.close()


def test_systemd_is_notified_when_all_are_ready_first(systemd: Systemd) -> None:
    """Not before, and once; and of each change, and of the end."""
    checked = Checked(ready=False)
    with HealthBeat(Checked(), checked, systemd=True, every=0.02):
        assert systemd.next() == ["STATUS=It is stopping: it takes no more events."]
        checked.ready = True
        assert systemd.next() == ["READY=1", "STATUS=Alive and ready."]
        checked.ready = False
        assert systemd.next()[0].startswith("STATUS=It is stopping")
        checked.ready = True
        assert systemd.next() == ["STATUS=Alive and ready."]
    assert systemd.next() == ["STOPPING=1"]


def test_watchdog_gets_a_beat_only_while_all_are_alive(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At half of its time, however rarely the others are wanted; whether or not it is ready."""
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    checked = Checked(ready=False)
    with HealthBeat(checked, systemd=True, every=3600), sooner_than(60):
        assert "WATCHDOG=1" in systemd.next()
        for _ in range(5):
            assert systemd.next() == ["WATCHDOG=1"]
        checked.alive = False
        while (lines := systemd.next()) == ["WATCHDOG=1"]:
            pass
        assert lines[0].startswith("STATUS=shop-mail has been handling")
        systemd.socket.settimeout(1.0)
        with pytest.raises(TimeoutError):
            systemd.next()
        checked.alive = True
        systemd.socket.settimeout(30)
        assert "WATCHDOG=1" in systemd.next()


@pytest.mark.parametrize(
    ("microseconds", "of"), [("200000", "1"), ("", ""), ("0", ""), ("soon", "")]
)
def test_watchdog_of_another_process_gets_nothing(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch, microseconds: str, of: str
) -> None:
    """Or none at all."""
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    if of:
        monkeypatch.setenv("WATCHDOG_PID", of)
    with HealthBeat(Checked(), systemd=True, every=0.02):
        assert systemd.next() == ["READY=1", "STATUS=Alive and ready."]
    assert systemd.next() == ["STOPPING=1"]


def test_without_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """The same program runs elsewhere, too."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "1")
    with HealthBeat(Checked(), systemd=True, file=file, every=3600):
        assert probes.check(file, "ready", 15)[0]


def test_systemd_that_is_gone_does_not_stop_the_beat(
    systemd: Systemd, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and what it has missed is sent with a later beat."""
    systemd.socket.close()
    Path(os.environ["NOTIFY_SOCKET"]).unlink(missing_ok=True)
    with HealthBeat(Checked(), systemd=True, file=file, every=0.02):
        wait_until(lambda: "systemd cannot be notified" in caplog.text)
        again = Systemd(os.environ["NOTIFY_SOCKET"])
        assert again.next() == ["READY=1", "STATUS=Alive and ready."]
        assert probes.check(file, "live", 15)[0]
        again.socket.close()
    assert caplog.text.count("systemd cannot be notified") <= 2, "once each time"


# ------------------------------------------------------------------ the documentation


def documented(language: str) -> list[str]:
    """The blocks of that language in docs/health.rst."""
    text = (Path(__file__).parent.parent / "docs" / "health.rst").read_text()
    blocks = re.findall(rf"\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", text)
    return [textwrap.dedent(block) for block in blocks]


@pytest.mark.parametrize("number", [0, 1])
def test_documented_probes_of_kubernetes_are_what_is_served(
    number: int, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paths are answered, the commands are understood; both say what they are there for."""
    probe = yaml.safe_load(documented("yaml")[number])
    assert set(probe) == {"livenessProbe", "readinessProbe"}
    dead = Checked(alive=False)
    with HealthServer(dead, port=0) as server, HealthBeat(dead, file=file):
        for kind, well in (("livenessProbe", False), ("readinessProbe", True)):
            if number == 0:
                assert probe[kind]["httpGet"]["port"] == 8080
                status, _ = ask(server.port, probe[kind]["httpGet"]["path"])
                assert (status == 200) is well
            else:
                assert (run_documented(probe[kind]["exec"]["command"], file) == 0) is well
            assert probe[kind]["timeoutSeconds"] <= probe[kind]["periodSeconds"]


def test_documented_healthcheck_of_docker_is_understood(file: Path) -> None:
    """The command is the same one."""
    (block,) = documented("docker")
    command = json.loads(block.partition("CMD")[2])
    for alive in (True, False):
        with HealthBeat(Checked(alive=alive), file=file):
            assert run_documented(command, file) == (not alive)


def run_documented(command: list[str], file: Path) -> int:
    assert command[:4] == ["python", "-m", "domain_events.probes", "/tmp/health.json"]
    return probes.main([str(file), *command[4:]])


def test_documented_unit_of_systemd_can_be_read(tmp_path: Path) -> None:
    """By systemd itself, where it is installed."""
    (block,) = documented("ini")
    unit = configparser.ConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(block)
    assert unit["Service"]["Type"] == "notify"
    assert float(unit["Service"]["WatchdogSec"]) >= 2 * 5.0, "two beats"
    if analyze := shutil.which("systemd-analyze"):
        file = tmp_path / "shop-mails.service"
        file.write_text(block.replace("/srv/shop/bin/python", sys.executable))
        done = subprocess.run(
            [analyze, "verify", "--man=no", file], capture_output=True, text=True, check=False
        )
        assert "shop-mails" not in done.stderr, done.stderr


def test_documented_programs_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a subscriber that is there."""

    class Consumer(Checked):
        consumed = 0

        def start_consuming(self) -> None:
            self.consumed += 1

    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    consumer = Consumer(ready=False)
    for block in documented("python"):
        if "health" in block.lower():
            code = block.replace("port=8080", "port=0").replace("/tmp/health.json", str(file))
            exec(code, {"subscriber": consumer})
    assert consumer.consumed == 3
