"""The log: a service comes and goes, an outage lasts, and what each line about an event carries."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import onlooker
import pytest
from bench import Bench, running
from pythonjsonlogger.json import JsonFormatter
from rabbitmq_node import Node
from support import Names, wait_until
from test_processes import Program

import domain_events
from domain_events import (
    BrokerUnavailable,
    DeadLetters,
    DomainEvent,
    EventNotConfirmed,
    Middleware,
    Outgoing,
    Reject,
    Retry,
    Subscriber,
    Undelivered,
)
from domain_events.broker import memory
from domain_events.log import Log, about, flush, in_background

PACKAGE = Path(domain_events.__file__).parent
JSON_LOGGING = Path(__file__).parent / "programs" / "json_logging.py"

FIELDS = {"domain_event_subscriber", "domain_event_routing_key", "domain_event_id"}


@pytest.fixture
def memory_url(unique: str) -> Iterator[str]:
    yield f"memory://{unique}"
    memory.forget(unique)


@pytest.fixture
def embedded(memory_url: str, unique: str) -> Iterator[Bench]:
    bench = Bench(memory_url, Names(memory_url, unique))
    yield bench
    bench.publisher.close()


@pytest.fixture
def outage(killable_node: Node, unique: str) -> Iterator[Bench]:
    bench = Bench(killable_node.url, Names(killable_node.url, unique))
    yield bench
    bench.publisher.close()


class Lines:
    """What a formatter that writes JSON makes of the log."""

    def __init__(self) -> None:
        self._stream = StringIO()
        self.handler = logging.StreamHandler(self._stream)
        self.handler.setFormatter(JsonFormatter("%(levelname)s %(message)s %(exc_info)s"))

    def all(self) -> list[dict[str, Any]]:
        assert flush(30)
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]

    def __contains__(self, text: str) -> bool:
        return any(text in line["message"] for line in self.all())

    def with_text(self, pattern: str) -> list[dict[str, Any]]:
        return [line for line in self.all() if re.search(pattern, line["message"])]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The lines of the library, from INFO on."""
    lines = Lines()
    logger = logging.getLogger("domain_events")
    before = logger.level
    logger.addHandler(lines.handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(lines.handler)
    logger.setLevel(before)


# ------------------------------------------------------------------ a service comes and goes


@pytest.mark.parametrize("workers", [1, 3])
def test_service_is_seen_to_come_and_to_go(bench: Bench, workers: int) -> None:
    """Who, where, what; why it stops, and what still runs; how long, and how many."""
    queue = bench.names.queue()
    program = Program(bench.url, str(JSON_LOGGING), queue, bench.exchange, str(workers))
    try:
        program.saw('{"levelname": "INFO", "message"')
        bench.publisher.publish(DomainEvent("a.b", {"seconds": 0}))
        bench.publisher.publish(DomainEvent("a.b", {"seconds": 1}))
        wait_until(lambda: sum('"begin"' in line for line in program.lines) == 2)
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 0
    finally:
        program.close()
    lines = [json.loads(line) for line in program.lines]
    assert {line["levelname"] for line in lines} == {"INFO"}
    start, stop, end = (line["message"] for line in lines if line["message"] != "begin")
    assert "guest:guest" not in start
    found = re.fullmatch(
        rf"{queue} \(prefetch_count 200\): consuming from (\S+); workers: {workers}; "
        r"json_logging, process (\d+) on (\S+)\.",
        start,
    )
    assert found, start
    assert found[1].startswith("amqp://guest@127.0.0.1:")
    assert int(found[2]) == program.process.pid
    # One worker notices it when its handler has returned.
    when = (
        r", \d\.\d s ago; handlers still running: 0"
        if workers == 1
        else ("; handlers still running: 1")
    )
    assert re.fullmatch(rf"{queue}: stopping on SIGTERM{when}\.", stop), stop
    assert re.fullmatch(rf"{queue}: stopped after \d+\.\d s; events handled: 2\.", end), end


def by_stopping(subscriber: Subscriber) -> None:
    subscriber.stop_consuming()


def by_closing(subscriber: Subscriber) -> None:
    subscriber.close()


def by_exiting(_subscriber: Subscriber) -> None:
    raise SystemExit


def by_signal(_subscriber: Subscriber) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (by_stopping, "stop_consuming()"),
        (by_closing, "close()"),
        (by_exiting, "SystemExit"),
        (by_signal, "SIGINT"),
        (None, "the timeout"),
    ],
)
def test_reason_of_the_stop_is_logged_once(
    embedded: Bench,
    lines: Lines,
    workers: int,
    how: Callable[[Subscriber], None] | None,
    reason: str,
) -> None:
    """Whoever stopped it, and however many workers there are."""
    subscriber = embedded.subscriber(workers=workers)
    queue = embedded.names.queue()
    subscriber.register(lambda _event: how and how(subscriber), queue, ["#"])
    embedded.publish("a.b")
    with contextlib.suppress(SystemExit):
        subscriber.start_consuming(timeout=0.2 if how is None else 60)
    (line,) = lines.with_text(": stopping on ")
    assert line["message"].startswith(f"{queue}: stopping on {reason}")
    (line,) = lines.with_text(": stopped after ")
    assert line["message"].endswith("events handled: 1.")
    assert lines.with_text(": consuming from ")


def test_signal_handler_logs_nothing(embedded: Bench, lines: Lines) -> None:
    """It may have interrupted the logging of the same thread, whose lock is held."""
    subscriber = embedded.subscriber()
    lock = lines.handler.lock
    assert lock is not None
    seen: list[int] = []

    def handle(_event: DomainEvent) -> None:
        before = len(lines.all())
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(len(lines.all()) - before)

    subscriber.register(handle, embedded.names.queue(), ["#"])
    embedded.publish("a.b")
    subscriber.start_consuming(timeout=60)
    assert seen == [0]
    assert len(lines.with_text("stopping on SIGTERM")) == 1


# ------------------------------------------------------------------ outages


def test_outage_is_repeated_while_it_lasts_and_its_end_is_logged(
    outage: Bench, killable_node: Node, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By publishers and by subscribers: for how long, and why; then, after how long."""
    monkeypatch.setattr("domain_events.broker.rabbitmq.link.REMINDER", 1.0)
    subscriber = outage.subscriber()
    subscriber.register(print, outage.names.queue(), ["#"])
    outage.publish("a.b")
    with running(subscriber):
        wait_until(lambda: subscriber.health().ready)
        killable_node.stop()
        roles = ("publisher publishing", "subscriber consuming")
        for role in roles:
            wait_until(lambda: len(lines.with_text(rf"^No {role} connection for \d+ s")) >= 2)  # noqa: B023
        killable_node.start()
        wait_until(lambda: subscriber.health().ready, timeout=60)
        wait_until(lambda: outage.publisher.health().ready, timeout=60)
    address = re.escape(outage.url.replace("guest:guest", "guest"))
    for role in roles:
        assert len(lines.with_text(f"^Lost the {role} connection")) == 1
        first, second, *_ = lines.with_text(rf"^No {role} connection for \d+ s now; still trying\.")
        assert re.search(r"refused", first["message"]), first
        assert seconds(second) >= seconds(first)
        assert {line["levelname"] for line in (first, second)} == {"WARNING"}
        (back,) = lines.with_text(
            rf"^The {role} connection to {address} is open again, after \d+\.\d s\.$"
        )
        assert back["levelname"] == "WARNING"


def seconds(line: dict[str, Any]) -> int:
    found = re.search(r"for (\d+) s", line["message"])
    assert found
    return int(found[1])


def test_first_connection_after_failures_is_logged_too(
    outage: Bench, killable_node: Node, lines: Lines
) -> None:
    """A service that was started before its broker; without failures, nothing is logged."""
    outage.publish("a.b")
    assert lines.all() == []
    outage.publisher.close()
    killable_node.stop()
    late = Bench(outage.url, outage.names)
    threads = [threading.Thread(target=publish_late, args=(late,))]
    for thread in threads:
        thread.start()
    wait_until(lambda: "No publisher publishing connection to" in lines)
    killable_node.start()
    for thread in threads:
        thread.join(60)
    wait_until(lambda: lines.with_text(r"is open, after \d+\.\d s\.$"))
    late.publisher.close()


def publish_late(bench: Bench) -> None:
    bench.publisher.publish(DomainEvent("a.b"), timeout=60)


def test_memory_alarm_is_repeated_while_it_lasts(
    outage: Bench, killable_node: Node, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its end says how long it was."""
    monkeypatch.setattr("domain_events.broker.rabbitmq.publishing.REMINDER", 0.3)
    outage.publish("a.b")
    killable_node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        with pytest.raises((EventNotConfirmed, BrokerUnavailable)):
            outage.publisher.publish(DomainEvent("a.b"), timeout=1)
        wait_until(lambda: len(lines.with_text(r"blocks publishers for \d+ s now: ")) >= 2)
    finally:
        killable_node.ctl("set_vm_memory_high_watermark", "0.6")
    wait_until(lambda: lines.with_text(r"no longer blocks publishers, after \d+\.\d s\.$"))


# ------------------------------------------------------------------ fields


def check_fields(line: dict[str, Any], event: DomainEvent, subscriber: str | None) -> None:
    assert line["domain_event_id"] == event.uuid_string, line
    assert line["domain_event_routing_key"] == event.routing_key, line
    assert line["domain_event_subscriber"] == subscriber, line


class Disturbing(Middleware):
    """Fails wherever that is only logged."""

    def publishing(self, outgoing: Outgoing) -> Any:
        if outgoing.operation != "publish":
            raise ValueError("before")

        def done(_error: BaseException | None) -> None:
            raise ValueError("after")

        return done

    def delivered(self, _delivered: object) -> None:
        raise ValueError("delivered")


@pytest.mark.parametrize("broker", ["embedded", pytest.param("bench", marks=pytest.mark.rabbitmq)])
def test_every_line_about_an_event_has_its_fields(
    broker: str, request: pytest.FixtureRequest, lines: Lines
) -> None:
    """Retries, dead letters, dropped events, foreign keys, what a middleware fails on."""
    bench: Bench = request.getfixturevalue(broker)
    queue = bench.names.queue("kept")
    dropping = bench.names.queue("dropping")
    subscriber = Subscriber(bench.url, bench.exchange, middleware=[Disturbing()])

    def handle(event: DomainEvent) -> None:
        kind = event.routing_key.partition(".")[0]
        if kind == "retry" and not event.retries:
            raise Retry(0.1)
        raise {"reject": Reject("no"), "retry": Retry(0.1)}.get(kind, ValueError("broken"))

    subscriber.register(handle, queue, ["#.now"], max_retries=1)
    subscriber.register(handle, dropping, ["#.now"], dead_letter=False)
    events = {kind: bench.publish(f"{kind}.now") for kind in ("reject", "retry", "fail")}
    expected = {
        "reject": (" rejected ", "keeps no dead letters; dropped"),
        "retry": ("again in 0.1 s", "gave up on", "keeps no dead letters; dropped"),
        "fail": (" failed on ", "keeps no dead letters; dropped"),
    }
    with running(subscriber), DeadLetters(queue, bench.url) as dead_letters:
        wait_until(lambda: dead_letters.count() == 3)
    for kind, event in events.items():
        for text in (*expected[kind], "without what a middleware would have added"):
            assert any(
                text in line["message"] and event.uuid_string in line["message"]
                for line in lines.all()
            ), (kind, text)
    by_id = {event.uuid_string: event for event in events.values()}
    about_events = [
        (line, event)
        for line in lines.all()
        for event in by_id.values()
        if event.uuid_string in line["message"]
    ]
    assert len(about_events) > 10
    for line, event in about_events:
        check_fields(line, event, dropping if dropping in line["message"] else queue)
    after = lines.with_text("Disturbing failed after a delivery was settled")
    assert len(after) >= 6
    for line in after:
        assert line["domain_event_id"] in by_id
        assert line["domain_event_subscriber"] in (queue, dropping)


def test_lines_about_other_programs_messages_have_what_is_known(bench: Bench, lines: Lines) -> None:
    """A body that is not an event, an envelope that claims another key, a key not listed."""
    queue = bench.names.queue()
    subscriber = bench.subscriber()
    subscriber.register(print, queue, ["listed"], retired_keys=["old"])
    claiming = DomainEvent("claimed", {})
    with running(subscriber):
        wait_until(lambda: subscriber.health().ready)
        with onlooker.channel(bench.url) as channel:
            for key in ("old", "foreign"):
                channel.queue_bind(queue, bench.exchange, key)
        onlooker.publish(bench.url, bench.exchange, "listed", b"not an event", message_id="one")
        onlooker.publish(bench.url, bench.exchange, "listed", claiming.to_json().encode())
        foreign, old = bench.publish("foreign"), bench.publish("old")
        texts = ("is not an event", "claims claimed", "gets events with", "has retired")
        wait_until(lambda: all(text in lines for text in texts))
    wrong, claims, unlisted, retired = (lines.with_text(text)[0] for text in texts)
    assert (wrong["domain_event_id"], wrong["domain_event_routing_key"]) == ("one", "listed")
    assert claims["domain_event_routing_key"] == "listed"
    assert claims["domain_event_id"] == claiming.uuid_string
    check_fields(unlisted, foreign, queue)
    check_fields(retired, old, queue)


def test_line_about_what_could_not_be_handed_back_has_its_fields(
    bench: Bench, lines: Lines
) -> None:
    """An operator's program writes it."""
    undelivered = f"{bench.exchange}.undelivered"
    queue = bench.names.queue()
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["#"], max_retries=1)
    with onlooker.channel(bench.url) as channel:
        channel.queue_bind(undelivered, bench.exchange, "to.undelivered")
    onlooker.publish(bench.url, bench.exchange, "to.undelivered", b"?", message_id="one")
    with Undelivered(bench.exchange, bench.url) as events:
        events.hand_back_all([queue])
    (line,) = lines.with_text("^Left among")
    assert line["domain_event_id"] == "one"
    assert set(line) >= FIELDS


def test_internal_error_names_the_event(
    embedded: Bench, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong with it."""
    queue = embedded.names.queue()
    subscriber = embedded.subscriber()
    subscriber.register(print, queue, ["#"])
    event = embedded.publish("a.b")

    def broken(*_: object) -> None:
        raise ValueError("of a test")

    with monkeypatch.context() as patch:
        patch.setattr("domain_events.handling.Subscription.handle", broken)
        subscriber.start_consuming(timeout=0.1)
    (line,) = lines.with_text(f"^Internal error in {queue}, while handling a.b {event.uuid_string}")
    check_fields(line, event, queue)
    assert "of a test" in line["exc_info"]


def test_fields_are_on_lines_that_another_thread_writes(lines: Lines) -> None:
    """As on all of a connection's own thread; text of other programs stays on one line."""
    log = Log("domain_events")
    with in_background():
        log.warning("%s", "plain", about=about("mail", "a\nb", "x\x1b[2J" + "y" * 1000))
        try:
            raise ValueError
        except ValueError:
            log.exception("with a traceback", about=about(None, None, 7))
    first, second = lines.all()
    assert first["domain_event_subscriber"] == "mail"
    assert first["domain_event_routing_key"] == r"a\nb"
    assert first["domain_event_id"].startswith(r"x\x1b[2Jyyy")
    assert len(first["domain_event_id"]) < 300
    assert (second["domain_event_subscriber"], second["domain_event_id"]) == (None, "7")
    assert "ValueError" in second["exc_info"]


def test_applications_record_factory_does_not_clash_with_the_fields(
    lines: Lines, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that sets attributes of common names; logging refuses those that exist already."""
    make = logging.getLogRecordFactory()

    def factory(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        for name in ("subscriber", "routing_key", "event_id", "event", "context"):
            setattr(record, name, "the application's")
        return record

    logging.setLogRecordFactory(factory)
    try:
        Log("domain_events").warning("plain", about=about("mail", "a.b", "one"))
    finally:
        logging.setLogRecordFactory(make)
    (line,) = lines.all()
    assert (line["event_id"], line["domain_event_id"]) == ("the application's", "one")
    assert capsys.readouterr().err == ""


def test_lines_that_are_not_about_an_event_have_no_fields(lines: Lines) -> None:
    """So that a filter can tell them apart."""
    Log("domain_events").warning("plain")
    assert not FIELDS & set(lines.all()[0])


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    """Each call of a method of a `Log` in the package, and where it is."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "log"
            ):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def test_no_call_that_names_an_event_leaves_the_fields_out() -> None:
    """By what the calls in the source are given."""
    names_an_event = re.compile(r"_named|message_id|uuid_string|routing_key\b|delivery|\bevent\b")
    found = list(log_calls())
    assert len(found) > 40
    about_events = [
        (where, call)
        for where, call in found
        if any(names_an_event.search(ast.unparse(argument)) for argument in call.args[1:])
    ]
    assert len(about_events) > 12
    without = [
        where
        for where, call in about_events
        if not any(keyword.arg == "about" for keyword in call.keywords)
    ]
    assert without == []


def test_documented_formatter_writes_the_fields() -> None:
    """As a program has it that is copied from docs/health.rst."""
    text = (PACKAGE.parent / "docs" / "health.rst").read_text()
    (block,) = re.findall(
        r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", text.partition("\nLogging\n")[2]
    )
    program = textwrap.dedent(block) + textwrap.dedent("""
        from domain_events.log import Log, about

        Log("domain_events").info("a line", about=about("mail", "a.b", "one"))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    line = json.loads(done.stderr)
    assert line["message"] == "a line"
    assert line["domain_event_id"] == "one"
