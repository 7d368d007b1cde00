"""Whole programs: signals, kills, forks, and the snippets of the README as they are typed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import onlooker
import pytest
from bench import Bench, Events
from support import Names, sooner_than, wait_until

from domain_events import DomainEvent

PROGRAMS = Path(__file__).parent / "programs"


class Program:
    """A program whose lines are collected as it prints them."""

    def __init__(self, url: str, *arguments: str, measured: bool = True) -> None:
        environment = {**os.environ, "DOMAIN_EVENTS_URL": url, "PYTHONUNBUFFERED": "1"}
        if not measured:
            environment = {k: v for k, v in environment.items() if not k.startswith("COVERAGE_")}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                self.lines.append(line.strip())

    def saw(self, line: str) -> None:
        """Wait until it has printed such a line."""
        wait_until(
            lambda: any(each.startswith(line) for each in self.lines),
            message=f"{line!r} in {self.lines}",
        )

    def end(self, timeout: float = 30) -> int:
        """Wait until it has ended; its exit status."""
        status = self.process.wait(timeout)
        self._reader.join(10)
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(10)


Start = Callable[..., Program]


@pytest.fixture
def start(broker_url: str) -> Iterator[Start]:
    """Start a program with the shared broker as its default."""
    programs: list[Program] = []

    def start(*arguments: object, measured: bool = True) -> Program:
        programs.append(Program(broker_url, *map(str, arguments), measured=measured))
        return programs[-1]

    yield start
    for program in programs:
        program.close()


def start_subscriber(start: Start, bench: Bench, queue: str, *options: str) -> Program:
    program = start(PROGRAMS / "subscriber.py", queue, bench.exchange, *options)
    program.saw("ready")
    return program


def n(number: int, seconds: float = 0) -> dict[str, float]:
    return {"n": number, "seconds": seconds}


def test_killed_subscriber_loses_nothing(bench: Bench, start: Start) -> None:
    """SIGKILL in the middle of a handler: that event and those behind it come again."""
    queue = bench.names.queue()
    first = start_subscriber(start, bench, queue)
    bench.publish("a.b", n(0))
    bench.publish("a.b", n(1, seconds=60))
    for number in range(2, 10):
        bench.publish("a.b", n(number))
    first.saw("begin 1")
    first.process.kill()
    first.end()
    assert "end 1" not in first.lines
    second = start_subscriber(start, bench, queue)
    # It is busy for long with event 1; a third one gets the rest, as it would in life.
    second.saw("begin 1")
    third = start_subscriber(start, bench, queue)
    second.process.kill()
    third.saw("begin 1")
    third.process.kill()
    third.end()
    wait_until(lambda: onlooker.count(bench.url, queue) >= 1)
    left = [DomainEvent.from_json(body) for body in onlooker.take_all(bench.url, queue)]
    lines = [line for program in (first, second, third) for line in program.lines]
    handled = {int(line.split()[1]) for line in lines if line.startswith("end")}
    assert {event.data["n"] for event in left} | handled == set(range(10))
    assert 1 not in handled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("workers", [1, 3])
def test_signal_ends_a_subscriber_in_order(
    bench: Bench, start: Start, number: signal.Signals, workers: int
) -> None:
    """The running handler finishes and is acked, what waits is given back, the call returns."""
    queue = bench.names.queue()
    program = start_subscriber(start, bench, queue, f"workers={workers}")
    for each in range(10):
        bench.publish("a.b", n(each, seconds=2))
    program.saw("begin 0")
    program.process.send_signal(number)
    assert program.end() == 0
    assert program.lines[-1] == "returned"
    begun = [line.split()[1] for line in program.lines if line.startswith("begin")]
    ended = [line.split()[1] for line in program.lines if line.startswith("end")]
    assert sorted(begun) == sorted(ended)
    assert 1 <= len(ended) <= workers
    wait_until(lambda: onlooker.count(bench.url, queue) == 10 - len(ended))


def test_signal_ends_an_idle_subscriber_at_once(bench: Bench, start: Start) -> None:
    """Nothing to wait for: well within a second or two."""
    program = start_subscriber(start, bench, bench.names.queue())
    wait_until(lambda: onlooker.consumers(bench.url, bench.names.prefix + "-q") == 1)
    with sooner_than(30):  # what is given to handlers that run, before most systems kill
        program.process.terminate()
        assert program.end() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_second_interrupt_does_not_wait_for_the_handler(
    bench: Bench, start: Start, workers: int
) -> None:
    """Ctrl-C twice: KeyboardInterrupt, and the event is given back."""
    queue = bench.names.queue()
    program = start_subscriber(start, bench, queue, f"workers={workers}")
    bench.publish("a.b", n(0, seconds=60))
    program.saw("begin 0")
    program.process.send_signal(signal.SIGINT)
    # Python runs signal handlers between two steps of the program: not both in one go.
    wait_until(lambda: not _pending(program.process.pid, signal.SIGINT))
    program.process.send_signal(signal.SIGINT)
    program.saw("interrupted")
    assert program.end() == 0
    wait_until(lambda: onlooker.count(bench.url, queue) == 1)


def _pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a signal that it has not looked at yet."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("SigPnd", "ShdPnd")) and int(line.split()[1], 16) >> (number - 1) & 1:
            return True
    # Also give the interpreter its turn: it is asleep again once the handler has run.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "R"


def test_forked_processes_publish(names: Names, broker_url: str, start: Start) -> None:
    """Children have connections of their own; the parent's is none the worse for it."""
    exchange, queue = names.exchange(), names.queue()
    onlooker.bind_queue(broker_url, queue, exchange, "#")
    program = start(PROGRAMS / "forking.py", exchange)
    program.saw("done")
    assert program.end() == 0, program.lines
    counts: dict[str, int] = {}
    while onlooker.count(broker_url, queue):
        properties, body = onlooker.take(broker_url, queue)
        event = DomainEvent.from_json(body)
        assert properties.headers["process"] == event.data["process"], "the middleware's, there"
        counts[event.routing_key] = counts.get(event.routing_key, 0) + 1
    assert counts == {
        "from.parent": 1,
        "from.thread": 500,
        "from.multiprocessing": 60,
        "from.fork": 20,
        "from.parent-again": 20,
    }


def test_killed_publisher_leaves_what_was_confirmed(
    bench: Bench, start: Start, tmp_path: Path
) -> None:
    """What a publisher has seen confirmed is there, whatever becomes of the publisher."""
    queue = bench.names.queue()
    onlooker.bind_queue(bench.url, queue, bench.exchange, "#")
    script = tmp_path / "publisher.py"
    script.write_text(
        "import sys\n"
        "from domain_events import DomainEvent, Publisher\n"
        f"publisher = Publisher(exchange={bench.exchange!r})\n"
        "for n in range(100_000):\n"
        "    publisher.publish(DomainEvent('a.b', n))\n"
        "    print(n, flush=True)\n"
    )
    program = start(script)
    program.saw("300")
    program.process.kill()
    program.end()
    confirmed = {int(line) for line in program.lines if line}
    stored = {DomainEvent.from_json(body).data for body in onlooker.take_all(bench.url, queue)}
    assert confirmed <= stored


def test_snippets_of_the_readme_work_in_two_terminals(
    broker_url: str, start: Start, tmp_path: Path
) -> None:
    """The mission's two snippets, as they are, with a handler that prints."""
    listening = tmp_path / "listening.py"
    listening.write_text(
        "from domain_events import Subscriber\n"
        "def handle_user_event(event):\n"
        "    print(event.routing_key, event.data)\n"
        "subscriber = Subscriber()\n"
        "subscriber.register(handle_user_event, 'print-user-event', ['user.*'])\n"
        "subscriber.start_consuming()\n"
    )
    publishing = tmp_path / "publishing.py"
    publishing.write_text(
        "from domain_events import publish_domain_event\n"
        "class user: id = 7\n"
        "publish_domain_event('user.registered', {'user_id': user.id})\n"
    )
    names = Names(broker_url, "print-user-event")
    names.add(queue="print-user-event")
    names.add(queue="print-user-event-dl")
    try:
        subscriber = start(listening)
        wait_until(lambda: onlooker.exists(broker_url, "print-user-event"))
        assert start(publishing).end() == 0
        subscriber.saw("user.registered {'user_id': 7}")
        subscriber.process.send_signal(signal.SIGINT)
        assert subscriber.end() == 0
        # And the other way round: published first.
        assert start(publishing).end() == 0
        again = start(listening)
        again.saw("user.registered {'user_id': 7}")
        again.process.terminate()
        again.end()
    finally:
        names.delete()


def test_core_imports_without_pika(start: Start) -> None:
    """pika is loaded with the first RabbitMQ broker, and no sooner."""
    program = start("-c", "import sys, domain_events; print('pika' in sys.modules)")
    assert program.end() == 0
    assert program.lines == ["False"]


def test_publishing_while_the_interpreter_ends_is_an_error_in_time(start: Start) -> None:
    """Too late to start a thread: `BrokerUnavailable`, and no hang. Or it still works."""
    program = start(
        "-c",
        "import atexit, domain_events\n"
        "def publish():\n"
        "    try: domain_events.publish_domain_event('nobody.listens', {})\n"
        "    except domain_events.BrokerUnavailable: print('unavailable')\n"
        "    else: print('published')\n"
        "atexit.register(publish)\n",
    )
    assert program.end() == 0
    assert program.lines in (["unavailable"], ["published"])


def assert_whole_story(story: str) -> None:
    """The demo has told all that it is for."""
    for words in (
        "mail to Ada is sent",
        "raise Retry(1.0)",
        "mail to Grace is sent (retries: 1",
        "dead letter of demo-ledger: invoice.issued",
        "ValueError",
        "12.50 is booked",
        "dead letters left: 0",
    ):
        assert words in story
    assert "Traceback" not in story


def test_demo_needs_no_broker_at_all(start: Start) -> None:
    """`python -m domain_events demo`, on the embedded broker, in under three seconds."""
    with sooner_than(24):  # three seconds, on a machine with four times the load
        program = start("-m", "domain_events", "demo")
        assert program.end(20) == 0, program.lines
    assert_whole_story("\n".join(program.lines))


@pytest.mark.usefixtures("demo_alone")
def test_demo_tells_the_whole_story(broker_url: str, start: Start) -> None:
    """`python -m domain_events demo --broker URL`, and nothing is left of it."""
    program = start("-m", "domain_events", "demo", "--broker", broker_url)
    assert program.end(60) == 0, program.lines
    assert_whole_story("\n".join(program.lines))
    for queue in ("demo-mailer", "demo-ledger", "demo-ledger-dl", "domain-events-demo.delay.00"):
        assert not onlooker.exists(broker_url, queue)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("amqp://guest:hunter2@127.0.0.1:1/", "No broker within 10 s"),
        ("amqp://guest:hunter2@no-such-host.invalid/", "cannot be resolved"),
        ("http://guest:hunter2@localhost/", "it must begin with amqp://"),
        ("amqp://guest:hun/ter2@localhost/", "the password or the vhost write %2F"),
    ],
)
def test_mistake_on_the_command_line_is_a_line_and_no_traceback(
    start: Start, url: str, words: str
) -> None:
    """The password is not in it."""
    program = start("-m", "domain_events", "demo", "--broker", url)
    assert program.end(30) == 1
    story = "\n".join(program.lines)
    assert words in story
    assert "Traceback" not in story
    assert "hunter2" not in story
    assert "ter2" not in story


def test_command_line_helps(start: Start) -> None:
    """`--help`, `--version`, and no command at all."""
    for arguments, status, words in (
        (["--help"], 0, "demo"),
        (["--version"], 0, "domain-events 0."),
        (["demo", "--help"], 0, "--broker"),
        ([], 2, "COMMAND"),
    ):
        program = start("-m", "domain_events", *arguments)
        assert program.end() == status
        assert words in "\n".join(program.lines)


def test_subscriber_in_a_forked_child_does_not_touch_its_parents(
    bench: Bench, start: Start, tmp_path: Path
) -> None:
    """A handler that forks: the child's end does not ack, close or steal what is the parent's."""
    queue = bench.names.queue()
    script = tmp_path / "forking_handler.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from domain_events import Subscriber\n"
        "def work(): print('child', flush=True)\n"
        "def handle(event):\n"
        "    child = multiprocessing.get_context('fork').Process(target=work)\n"
        "    child.start(); child.join()\n"
        "    print('handled', event.data, flush=True)\n"
        "    if event.data == 9: subscriber.stop_consuming()\n"
        f"subscriber = Subscriber(exchange={bench.exchange!r})\n"
        f"subscriber.register(handle, {queue!r}, ['#'])\n"
        "subscriber.start_consuming()\n"
    )
    seen: Events = []
    with bench.subscriber() as subscriber:
        subscriber.register(seen.append, queue, ["#"])
    for number in range(10):
        bench.publish("a.b", number)
    program = start(script)
    assert program.end(30) == 0, program.lines
    assert [line for line in program.lines if line.startswith("handled")] == [
        f"handled {number}" for number in range(10)
    ]
    assert onlooker.count(bench.url, queue) == 0


def test_signal_handler_may_publish(bench: Bench, start: Start, tmp_path: Path) -> None:
    """Also in the middle of a publish, on the same thread; and may raise there."""
    queue = bench.names.queue()
    onlooker.bind_queue(bench.url, queue, bench.exchange, "#")
    script = tmp_path / "signals.py"
    script.write_text(
        "import signal, time\n"
        "from domain_events import DomainEvent, Publisher\n"
        f"publisher = Publisher(exchange={bench.exchange!r})\n"
        "class Timeout(Exception): pass\n"
        "raising = armed = False\n"
        "def again(): signal.setitimer(signal.ITIMER_REAL, 0.003)\n"
        "def on_alarm(number, frame):\n"
        "    global armed\n"
        "    if not raising: publisher.publish(DomainEvent('from.handler', {}))\n"
        "    again()\n"
        "    if armed:\n"
        "        armed = False\n"
        "        raise Timeout\n"
        "signal.signal(signal.SIGALRM, on_alarm)\n"
        "publisher.publish(DomainEvent('first.one', {}))\n"
        "again()\n"
        "for n in range(300): publisher.publish(DomainEvent('from.main', n))\n"
        "raising = True\n"
        "for n in range(300):\n"
        "    try:\n"
        "        armed = True\n"
        "        publisher.publish(DomainEvent('interrupted.one', n))\n"
        "        armed = False\n"
        "    except Timeout: pass\n"
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
        "publisher.publish(DomainEvent('last.one', {}))\n"
        "publisher.close()\n"
        "print('done', flush=True)\n"
    )
    # The lock of coverage.py itself is not re-entrant, and it needs descriptors.
    program = start(script, measured=False)
    assert program.end(60) == 0, program.lines
    keys = [DomainEvent.from_json(body).routing_key for body in onlooker.take_all(bench.url, queue)]
    assert keys.count("from.main") == 300
    assert keys.count("from.handler") > 5
    assert keys.count("last.one") == 1


def test_publisher_recovers_when_there_are_descriptors_again(
    bench: Bench, start: Start, tmp_path: Path
) -> None:
    """Out of descriptors is an error in time, and no end for the connection."""
    script = tmp_path / "descriptors.py"
    script.write_text(
        "import resource\n"
        "from domain_events import DomainEvent, DomainEventsError, Publisher\n"
        f"publisher = Publisher(exchange={bench.exchange!r})\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "def publish(**options): publisher.publish(DomainEvent('a.b', {}), **options)\n"
        "def refused():\n"
        "    try: publish(timeout=0.5)\n"
        "    except DomainEventsError: return True\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))\n"
        "assert refused()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "publish()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))\n"
        "publisher._publishing()._link.wake(publisher._publishing()._link.drop)\n"
        "assert refused()\n"
        "assert refused()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "publish()\n"
        "publisher.close()\n"
        "print('done', flush=True)\n"
    )
    # The lock of coverage.py itself is not re-entrant, and it needs descriptors.
    program = start(script, measured=False)
    assert program.end(60) == 0, program.lines
    assert "done" in program.lines
