"""``domain-events run``: what becomes of its processes, and of events, whatever happens to them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onlooker
import pytest
from rabbitmq_node import Node
from support import Names, wait_until

from domain_events import DomainEvent, Publisher
from domain_events.cli import exits

TESTS = Path(__file__).parent

# The subscriber of a test. It writes down what it does, and does what each event demands.
SHOP = """
import os, pathlib, signal, sys, time
from domain_events import Subscriber

notes = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
hoard = []

def note(*words):
    os.write(notes, (" ".join(map(str, words)) + "\\n").encode())

subscriber = Subscriber(exchange=os.environ["EXCHANGE"], timeout=float(os.environ["TIMEOUT"]))
note("imported by", os.getpid())

def handle(event):
    number, do = event.data["n"], event.data.get("do", "")
    note("begin", number, os.getpid())
    if do == "wait":
        while not pathlib.Path(os.environ["NOTES"] + f".{number}").exists():
            time.sleep(0.01)
    elif do == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "exit":
        os._exit(0)
    elif do == "stop":
        subscriber.stop_consuming()
    elif do == "hoard":
        hoard.append(bytearray(os.urandom(1)) * 20_000_000)
    elif do == "orphan" and os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.2)
            note("orphan ends, the child of", os.getppid())
        os._exit(0)
    note("end", number, os.getpid())

subscriber.register(handle, os.environ["QUEUE"], ["#"], OPTIONS)
"""


class Run:
    """A ``domain-events run`` with the lines that it has printed."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            self.lines.extend(iter(lines.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def saw(self, text: str, times: int = 1) -> None:
        """Wait until it has printed this so many times."""
        wait_until(
            lambda: self.output.count(text) >= times or self.process.poll() is not None,
            60,
            f"{text!r} in {self.lines}",
        )
        assert self.output.count(text) >= times, self.output

    def children(self) -> list[int]:
        return children_of(self.pid)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, number: signal.Signals | None = None) -> int:
        """Wait until it has ended, on this signal; its exit status."""
        if number is not None:
            self.send(number)
        status = self.process.wait(60)
        self._reader.join(60)
        return status

    def close(self) -> None:
        children = self.children()
        self.process.kill()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(60)
        self._reader.join(60)


def children_of(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except FileNotFoundError:
        return []


class Shop:
    """A folder with ``shop.py``, and what its processes have noted."""

    def __init__(self, url: str, names: Names, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.queue, self.exchange = names.queue(), names.exchange()
        self.notes = folder / "notes"
        self.notes.touch()
        self.environment = {
            **os.environ,
            "DOMAIN_EVENTS_URL": url,
            "EXCHANGE": self.exchange,
            "QUEUE": self.queue,
            "NOTES": str(self.notes),
            "TIMEOUT": "30",
        }
        self.write()
        self._started: list[Run] = []

    def write(self, options: str = "", text: str = SHOP) -> None:
        (self.folder / "shop.py").write_text(text.replace("OPTIONS", options))

    def start(self, *arguments: str, prefix: tuple[str, ...] = ()) -> Run:
        command = [*prefix, sys.executable, "-m", "domain_events", "run", *arguments]
        return self.start_command(command)

    def start_command(self, command: list[str]) -> Run:
        self._started.append(Run(command, self.folder, self.environment))
        return self._started[-1]

    def run(self, *arguments: str) -> Run:
        """One whose processes all consume."""
        run = self.start("shop:subscriber", *arguments)
        run.saw("Consuming in ")
        return run

    def publish(self, number: int, do: str = "", about: str | None = None) -> None:
        with Publisher(self.url, self.exchange, timeout=60) as publisher:
            publisher.publish(DomainEvent("a.b", {"n": number, "do": do}, about))

    def go_on(self, number: int) -> None:
        """Let the handler of this event end, that waits."""
        Path(f"{self.notes}.{number}").touch()

    def noted(self, text: str) -> list[list[str]]:
        """The words of the notes that begin so."""
        lines = self.notes.read_text().splitlines()
        return [line.split() for line in lines if line.startswith(text)]

    def saw(self, text: str, times: int = 1) -> list[list[str]]:
        return wait_until(
            lambda: found if len(found := self.noted(text)) >= times else [],
            60,
            f"{times} times {text!r} in the notes",
        )

    def is_settled(self) -> bool:
        """Whether nothing is left in the queue, and nobody holds anything."""
        return onlooker.count(self.url, self.queue) == 0

    def close(self) -> None:
        for run in self._started:
            run.close()


@pytest.fixture
def shop(broker_url: str, names: Names, tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(broker_url, names, tmp_path)
    yield shop
    shop.close()


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# --- replacing -----------------------------------------------------------------------------------


def test_process_is_replaced_without_waiting_for_its_handler(shop: Shop) -> None:
    """On SIGHUP: the next event is handled by the new one while the old one is still busy."""
    run = shop.run()
    (old,) = run.children()
    shop.publish(1, "wait")
    shop.saw("begin 1")
    run.send(signal.SIGHUP)
    run.saw("takes over")
    # The broker still delivers to both; what the old one gets comes back with its handler's end.
    for number in range(2, 12):
        shop.publish(number)
    (_, _, new), *_ = shop.saw("end")
    assert int(new) != old
    assert is_running(old)
    shop.go_on(1)
    assert shop.saw("end 1 ") == [["end", "1", str(old)]]
    assert {line[2] for line in shop.saw("end", 11)} == {str(old), new}
    wait_until(lambda: run.children() == [int(new)])
    assert run.end(signal.SIGTERM) == exits.OK
    assert shop.is_settled()


def test_queue_is_never_without_a_consumer_while_processes_are_replaced(shop: Shop) -> None:
    run = shop.run("--processes", "2")
    fewest: list[int] = []
    for times in (1, 2):
        run.send(signal.SIGHUP)
        while run.output.count("All processes were replaced") < times:
            fewest.append(onlooker.consumers(shop.url, shop.queue))
            assert run.process.poll() is None
    assert min(fewest) >= 2
    assert max(fewest) == 3, "one more while one is replaced"
    assert run.end(signal.SIGTERM) == exits.OK


def test_ordered_subscriber_is_replaced_when_its_handler_has_ended(shop: Shop) -> None:
    """Two processes at a time would handle two events of one object at a time."""
    shop.write("ordered=True")
    file = shop.folder / "health"
    run = shop.run(f"--health-file={file}")
    (old,) = run.children()
    shop.publish(0, "wait", "an object")
    shop.saw("begin 0")
    run.send(signal.SIGHUP)
    run.saw("takes over")
    (new,) = set(run.children()) - {old}
    for number in range(1, 11):
        shop.publish(number, about="an object")
    wait_until(lambda: (process_in(file, new) or {}).get("subscriber"))
    shop.go_on(0)
    shop.saw("end", 11)
    events = [line[:2] for line in shop.noted("") if line[0] in ("begin", "end")]
    assert events == [[what, str(n)] for n in range(11) for what in ("begin", "end")]
    assert {line[2] for line in shop.noted("end") if line[1] != "0"} == {str(new)}
    assert run.end(signal.SIGTERM) == exits.OK


def test_broken_deployment_leaves_the_old_processes(shop: Shop) -> None:
    run = shop.run("--processes", "2")
    old = run.children()
    shop.write(text="import something_that_is_not_there")
    run.send(signal.SIGHUP)
    run.saw("No module named 'something_that_is_not_there'")
    run.saw("Nothing more is replaced")
    assert run.children() == old
    shop.write()
    run.send(signal.SIGHUP)
    run.saw("All processes were replaced")
    assert not set(run.children()) & set(old)
    assert run.end(signal.SIGTERM) == exits.OK


def test_changed_file_is_loaded(shop: Shop) -> None:
    """With --reload, which waits for a change also when nothing can be imported."""
    shop.write(text="broken(")
    run = shop.start("shop:subscriber", "--reload")
    run.saw("Waiting for a file to be changed")
    shop.write()
    run.saw("Consuming in 1")
    shop.write(text=SHOP.replace('note("end"', 'note("changed"'))
    run.saw("All processes were replaced", 2)
    shop.publish(1)
    shop.saw("changed 1")
    assert run.end(signal.SIGTERM) == exits.OK


@pytest.mark.parametrize(("option", "do"), [("--max-events=5", ""), ("--max-memory=150", "hoard")])
def test_process_is_replaced_at_its_limit(shop: Shop, option: str, do: str) -> None:
    run = shop.run(option)
    (old,) = run.children()
    for number in range(8):
        shop.publish(number, do)
    run.saw(f"takes over from {old}")
    shop.saw("end", 8)
    assert run.end(signal.SIGTERM) == exits.OK
    assert shop.is_settled()
    assert "crashed" not in run.output


@pytest.mark.slow
def test_rolling_restarts_and_kills_lose_nothing(shop: Shop) -> None:
    """10,000 events, while all are replaced again and again, and one is killed each second."""
    run = shop.run("--processes", "3", "--max-restarts", "100000")
    source = random.Random(7)
    ended = threading.Event()
    done = {"kills": 0, "hangups": 0}

    def disturb() -> None:
        for turn in itertools.count():
            if ended.wait(1.0):
                return
            if turn % 2:
                run.send(signal.SIGHUP)
                done["hangups"] += 1
            if children := run.children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(source.choice(children), signal.SIGKILL)
                    done["kills"] += 1

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        with Publisher(shop.url, shop.exchange) as publisher:
            for number in range(10_000):
                publisher.publish(DomainEvent("a.b", {"n": number}))
                time.sleep(0.001)  # so that it takes a while
        wait_until(lambda: len({line[1] for line in shop.noted("end")}) == 10_000, 120, interval=1)
    finally:
        ended.set()
        disturbing.join()
    assert min(done.values()) >= 3
    assert run.end(signal.SIGTERM) in (exits.OK, exits.CRASHING)  # the last kill may come late
    assert onlooker.count(shop.url, f"{shop.queue}-dl") == 0
    assert shop.is_settled()


# --- crashes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("do", "how"), [("die", "SIGKILL, perhaps for lack of memory"), ("exit", "exit status 0")]
)
def test_process_that_crashes_is_started_again_up_to_a_limit(shop: Shop, do: str, how: str) -> None:
    """Alone; an exit status of 0 in a handler is a crash too, and one of the whole never 0."""
    run = shop.run("--processes=2", "--max-restarts=2")
    shop.publish(1, do)
    assert run.end() == exits.CRASHING
    assert run.output.count(f"has crashed: {how}") == 3
    assert "crash 3 within a minute" in run.output
    assert len(shop.noted("begin 1")) == 3
    wait_until(lambda: onlooker.count(shop.url, shop.queue) == 1)


def test_process_killed_while_it_stops_is_not_success(shop: Shop) -> None:
    run = shop.run()
    (child,) = run.children()
    shop.publish(1, "wait")
    shop.saw("begin 1")
    run.send(signal.SIGTERM)
    run.saw("stopping 1 process")
    os.kill(child, signal.SIGKILL)
    assert run.end() == exits.CRASHING
    wait_until(lambda: onlooker.count(shop.url, shop.queue) == 1)


def test_one_that_stops_by_itself_is_not_started_again(shop: Shop) -> None:
    run = shop.run()
    shop.publish(1, "stop")
    assert run.end() == exits.OK
    assert len(shop.noted("imported")) == 1


def test_process_that_someone_stops_is_followed_by_another(shop: Shop) -> None:
    run = shop.run()
    (old,) = run.children()
    os.kill(old, signal.SIGTERM)
    run.saw("on a signal to it alone")
    wait_until(lambda: onlooker.consumers(shop.url, shop.queue) == 1)
    assert run.children() != [old]
    assert "crashed" not in run.output
    assert run.end(signal.SIGTERM) == exits.OK


MISTAKES = {
    "no module": ("nowhere:subscriber", SHOP, exits.NOT_IMPORTED, "There is no module 'nowhere'"),
    "no attribute": ("shop:nobody", SHOP, exits.NOT_IMPORTED, "has no 'nobody'"),
    "an error in it": ("shop:subscriber", "1 / 0", exits.NOT_IMPORTED, "ZeroDivisionError"),
    "an exit in it": ("shop:subscriber", "exit(0)", exits.NOT_IMPORTED, "it calls sys.exit(0)"),
    "consuming in it": (
        "shop:subscriber",
        f"{SHOP}\nsubscriber.start_consuming()",
        exits.USAGE,
        "the module consumes when it is imported",
    ),
    "a wrong option": (
        "shop:subscriber",
        SHOP.replace("OPTIONS", "prefetch_count=0"),
        exits.USAGE,
        "prefetch_count",
    ),
    "order among several": (
        "shop:subscriber",
        SHOP.replace("OPTIONS", "ordered=True"),
        exits.USAGE,
        "ordered=True keeps the order of events within one process",
    ),
    "another queue": (
        "shop:subscriber",
        SHOP,
        exits.TOPOLOGY,
        "exists",
    ),
    "no colon": ("shop", SHOP, exits.USAGE, "write package.module:subscriber"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_at_the_start_ends_it_at_once(shop: Shop, mistake: str) -> None:
    """With one message for all processes, and a status that says what it was."""
    target, text, status, message = MISTAKES[mistake]
    if status == exits.TOPOLOGY:
        onlooker.bind_queue(shop.url, shop.queue, shop.exchange, "#", **{"x-max-length": 7})
    shop.write(text=text)
    run = shop.start(target, "--processes=3")
    assert run.end() == status
    assert run.output.count(message) == 1, run.output
    assert "crash" not in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_outage_is_not_a_crash(killable_node: Node, unique: str, tmp_path: Path) -> None:
    """Neither one at the start, which is waited for, nor one while it consumes."""
    names = Names(killable_node.url, unique)
    shop = Shop(killable_node.url, names, tmp_path)
    shop.environment["TIMEOUT"] = "1"
    try:
        killable_node.sync()
        killable_node.kill()
        run = shop.start("shop:subscriber", "--processes=2", "--max-restarts=0")
        run.saw("trying again in", 2)
        killable_node.start()
        run.saw("Consuming in 2")
        children = run.children()
        killable_node.sync()
        killable_node.kill()
        killable_node.start()
        for number in range(20):
            shop.publish(number)
        shop.saw("end", 20)
        assert run.children() == children
        assert run.end(signal.SIGTERM) == exits.OK
        assert "Lost the subscriber consuming connection" in run.output
        assert "StreamLostError" not in run.output, "pika's lines stay away"
    finally:
        shop.close()
        names.delete()


# --- signals -------------------------------------------------------------------------------------


def test_processes_of_a_killed_supervisor_finish_and_end(shop: Shop) -> None:
    run = shop.run("--processes=2")
    children = run.children()
    shop.publish(1, "wait")
    shop.saw("begin 1")
    run.process.kill()
    wait_until(lambda: sum(map(is_running, children)) == 1, message="the idle one has ended")
    shop.go_on(1)
    shop.saw("end 1")
    wait_until(lambda: not any(map(is_running, children)))
    wait_until(shop.is_settled)


def test_ctrl_c_lets_handlers_finish(shop: Shop) -> None:
    """A terminal sends SIGINT to all processes, and the handler's event is acked all the same."""
    run = shop.run("--processes=2")
    shop.publish(1, "wait")
    shop.saw("begin 1")
    os.killpg(run.pid, signal.SIGINT)
    run.saw("SIGINT: stopping 2 processes")
    wait_until(lambda: len(run.children()) == 1)
    os.kill(run.children()[0], signal.SIGINT)  # in case its own has come first
    shop.go_on(1)
    assert run.end() == exits.OK
    assert shop.noted("end 1")
    assert "Traceback" not in run.output
    assert shop.is_settled()


def test_sigterm_to_all_at_once_is_one_for_each(shop: Shop) -> None:
    """As systemd sends it: to the supervisor, which sends it too, and to its processes."""
    run = shop.run("--processes=2")
    shop.publish(1, "wait")
    shop.saw("begin 1")
    os.killpg(run.pid, signal.SIGTERM)
    run.saw("SIGTERM: stopping")
    shop.go_on(1)
    assert run.end() == exits.OK
    assert shop.noted("end 1")
    assert shop.is_settled()


def test_second_signal_does_not_wait(shop: Shop) -> None:
    run = shop.run("--processes=2")
    shop.publish(1, "wait")
    shop.saw("begin 1")
    run.send(signal.SIGTERM)
    wait_until(lambda: len(run.children()) == 1, message="the idle one has ended")
    assert run.end(signal.SIGTERM) == exits.TERMINATED
    wait_until(lambda: onlooker.count(shop.url, shop.queue) == 1)


def test_process_that_still_imports_stops_when_it_has(shop: Shop) -> None:
    """Although the module has a handler of its own for SIGTERM."""
    handler = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)\n"
    wait = "\nwhile not pathlib.Path(os.environ['NOTES'] + '.1').exists(): time.sleep(0.01)\n"
    shop.write(text=handler + SHOP + wait)
    run = shop.start("shop:subscriber")
    shop.saw("imported")
    run.send(signal.SIGTERM)
    run.saw("stopping 1 process")
    shop.go_on(1)
    assert run.end() == exits.OK


def test_closed_terminal_ends_it(shop: Shop) -> None:
    """Its SIGHUP does not mean to replace processes."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(shop.folder)
        command = [sys.executable, "-m", "domain_events", "run", "shop:subscriber"]
        os.execve(sys.executable, command, shop.environment)
    try:
        wait_until(lambda: onlooker.exists(shop.url, shop.queue))
        wait_until(lambda: onlooker.consumers(shop.url, shop.queue) == 1)
        children = children_of(pid)
        os.close(terminal)
        wait_until(lambda: not is_running(pid))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == exits.OK
        assert not any(map(is_running, children))
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


UNSHARE = (
    "unshare",
    "--user",
    "--map-root-user",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)


@pytest.fixture
def namespace() -> tuple[str, ...]:
    """Executes a command as the first process of a PID namespace, as the one of a container."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*UNSHARE, "true"], check=False).returncode
    ):
        pytest.skip("this system does not let its users make PID namespaces")
    return UNSHARE


def test_first_process_of_a_container(shop: Shop, namespace: tuple[str, ...]) -> None:
    """It acts on signals, and reaps the processes that the handlers' processes leave behind."""
    run = shop.start("shop:subscriber", prefix=namespace)
    run.saw("Consuming in 1")
    (first,) = run.children()
    shop.publish(1, "orphan")
    shop.saw("orphan ends, the child of 1")
    wait_until(lambda: len(children_of(first)) == 1, message="the orphan is reaped")
    os.kill(first, signal.SIGHUP)
    run.saw("All processes were replaced")
    os.kill(first, signal.SIGTERM)
    assert run.end() == exits.OK
    assert "crashed" not in run.output


# --- probes --------------------------------------------------------------------------------------


class Systemd:
    """The socket to which systemd's services send."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.sent: list[str] = []

    def saw(self, line: str, after: int = 0) -> None:
        """Wait until this was sent, after so many others."""
        wait_until(lambda: any(each.startswith(line) for each in self.received()[after:]))

    def received(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.sent += self._socket.recv(65_536).decode().splitlines()
        return self.sent

    def close(self) -> None:
        self._socket.close()


def test_systemd_is_notified_of_all_processes(shop: Shop, unused_port: int, tmp_path: Path) -> None:
    """One that hangs stops the watchdog; reloading is announced, and its end."""
    path = Path(os.path.relpath(tmp_path / "notify"))
    systemd = Systemd(path)
    shop.environment |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
    try:
        run = shop.start("shop:subscriber", "--processes=2", f"--health-port={unused_port}")
        systemd.saw("READY=1")
        run.saw("Consuming in 2")
        systemd.saw("WATCHDOG=1")
        before = len(systemd.received())
        asked = time.monotonic_ns() // 1000
        run.send(signal.SIGHUP)
        systemd.saw("RELOADING=1", before)
        systemd.saw("READY=1", before)
        reloading = systemd.sent[systemd.sent.index("RELOADING=1") + 1]
        assert int(reloading.removeprefix("MONOTONIC_USEC=")) >= asked
        wait_until(lambda: len(run.children()) == 2)
        hung = run.children()[0]
        os.kill(hung, signal.SIGSTOP)
        systemd.saw(f"STATUS=Process {hung} has not responded")
        before = len(systemd.received())
        wait_until(lambda: silence_of(hung, unused_port) > 3.0)
        assert "WATCHDOG=1" not in systemd.received()[before:]
        os.kill(hung, signal.SIGCONT)
        systemd.saw("WATCHDOG=1", before)
        before = len(systemd.received())
        assert run.end(signal.SIGTERM) == exits.OK
        systemd.saw("STOPPING=1", before)
    finally:
        systemd.close()


def process_in(file: Path, pid: int) -> dict[str, Any] | None:
    """What a health file has about this process."""
    (processes,) = json.loads(file.read_text())["checked"]
    found = [each for each in processes["processes"] if each["pid"] == pid]
    return found[0] if found else None


def silence_of(pid: int, port: int) -> float:
    (processes,) = asked(port, "/health")[1]["checked"]
    return max(float(each["heard"]) for each in processes["processes"] if each["pid"] == pid)


def asked(port: int, path: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_probes_are_those_of_all_processes(shop: Shop, unused_port: int, tmp_path: Path) -> None:
    file = tmp_path / "health"
    shop.write("handler_limit=0.2")
    run = shop.run("--processes=2", f"--health-port={unused_port}", f"--health-file={file}")
    assert asked(unused_port, "/ready")[0] == 200
    status, found = asked(unused_port, "/health")
    assert status == 200
    (together,) = found["checked"]
    assert {each["pid"] for each in together["processes"]} == set(run.children())
    check = [sys.executable, "-m", "domain_events.probes", str(file), "--ready"]
    assert subprocess.run(check, check=False, stdout=subprocess.DEVNULL).returncode == 0
    shop.publish(1, "wait")
    ((*_, busy),) = shop.saw("begin 1")
    wait_until(lambda: asked(unused_port, "/live")[0] == 503)
    assert f"Process {busy}: {shop.queue} has been handling a.b" in str(
        asked(unused_port, "/live")[1]["reasons"]
    )
    assert asked(unused_port, "/ready")[0] == 200
    wait_until(lambda: not json.loads(file.read_text())["alive"])
    shop.go_on(1)
    wait_until(lambda: asked(unused_port, "/live")[0] == 200)
    assert run.end(signal.SIGTERM) == exits.OK
    assert not file.exists()


# --- deployments ---------------------------------------------------------------------------------

DEPLOY = TESTS.parent / "examples/workers"


def of_systemd() -> list[str]:
    lines = (DEPLOY / "shop-mails.service").read_text().splitlines()
    return next(line for line in lines if line.startswith("ExecStart=")).partition("=")[2].split()


def of_docker() -> list[str]:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    parts = (line.partition(" ")[2] for line in lines if line.startswith(("ENTRYPOINT", "CMD")))
    return [word for part in parts for word in json.loads(part)]


def of_kubernetes() -> list[str]:
    import yaml

    deployment = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = [each["containerPort"] for each in container["ports"]]
    assert container["args"][-2:] == ["--health-port", *map(str, ports)]
    return [*container["command"], *container["args"]]


@pytest.mark.parametrize("command_of", [of_systemd, of_docker, of_kubernetes])
def test_command_of_a_deployment_works(
    shop: Shop,
    namespace: tuple[str, ...],
    command_of: Callable[[], list[str]],
    unused_port: int,
) -> None:
    """That of each documented file, as the first process of a container."""
    (shop.folder / "shop.py").unlink()
    (shop.folder / "shop").mkdir()
    (shop.folder / "shop/mails.py").write_text(SHOP.replace("OPTIONS", ""))
    program, *words = command_of()
    assert Path(program).name == "domain-events"
    ours = {"8080": str(unused_port), "/tmp/health.json": str(shop.folder / "health.json")}
    command = [sys.executable, "-m", "domain_events", *(ours.get(word, word) for word in words)]
    run = shop.start_command([*namespace, *command])
    run.saw("Consuming in ")
    if "--health-port" in words:
        assert asked(unused_port, "/ready")[0] == 200
    shop.publish(1, "wait")
    shop.saw("begin 1")
    (first,) = run.children()
    os.kill(first, signal.SIGTERM)
    shop.go_on(1)
    assert run.end() == exits.OK
    assert shop.noted("end 1")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_unit_is_one_that_systemd_accepts(tmp_path: Path) -> None:
    unit = tmp_path / "shop-mails.service"
    text = (DEPLOY / unit.name).read_text()
    # It checks that the program is there.
    unit.write_text(text.replace("/srv/shop/bin/domain-events", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# --- Django --------------------------------------------------------------------------------------

HANDLERS = """
import os
from domain_events.django import on

@on(os.environ['QUEUE'] + '.extra', name=os.environ['QUEUE'])
def handle(event):
    with open(os.environ['NOTES'], 'a') as notes:
        notes.write(f'end {event.data} {os.getpid()}\\n')
"""


def test_command_of_django_runs_processes(shop: Shop, names: Names) -> None:
    """With the same means: they are started again, replaced, and end."""
    app = shop.folder / "extra"
    app.mkdir()
    (app / "__init__.py").touch()
    (app / "subscribers.py").write_text(HANDLERS)
    paths = [str(shop.folder), str(TESTS), str(TESTS.parent)]
    shop.environment |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "DJANGO_SETTINGS_MODULE": "django_shop.settings",
        "SHOP_FOLDER": str(shop.folder),
        "SHOP_QUEUES": names.queue("django"),
        "SHOP_APPS": "extra",
    }
    manage = [sys.executable, str(TESTS / "django_shop/manage.py"), "consume_domain_events"]
    run = shop.start_command([*manage, shop.queue, "--processes=2"])
    wait_until(lambda: onlooker.exists(shop.url, shop.queue))
    wait_until(lambda: onlooker.consumers(shop.url, shop.queue) == 2)
    killed, other = run.children()
    os.kill(killed, signal.SIGKILL)
    run.saw("has crashed: SIGKILL")
    wait_until(lambda: onlooker.consumers(shop.url, shop.queue) == 2)
    run.send(signal.SIGHUP)
    wait_until(lambda: not {killed, other} & set(run.children()) and len(run.children()) == 2)
    with Publisher(shop.url) as publisher:
        publisher.publish(DomainEvent(f"{shop.queue}.extra", "it"))
    shop.saw("end it")
    assert run.end(signal.SIGTERM) == exits.OK
    (app / "subscribers.py").write_text("1 / 0")
    broken = shop.start_command([*manage, shop.queue, "--processes=2"])
    assert broken.end() == exits.NOT_IMPORTED
    assert broken.output.count("ZeroDivisionError") == 1
