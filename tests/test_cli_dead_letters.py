"""``domain-events dead-letters`` and ``undelivered``, run as an operator runs them."""

from __future__ import annotations

import json
import os
import pty
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import onlooker
import pytest
from bench import Bench, running
from pyamqp import Properties
from support import sooner_than, thorough, wait_until

from domain_events import DeadLetters, DomainEvent, Reject
from domain_events.broker.rabbitmq import envelope
from domain_events.cli import archive

pytestmark = pytest.mark.rabbitmq

COMMAND = [sys.executable, "-m", "domain_events"]


class Terminal:
    """Runs commands in a folder of its own, with the broker in the environment."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "DOMAIN_EVENTS_URL": url, "TZ": "UTC"}

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=self.folder,
            env=self.environment,
            text=True,
            **{**pipes, **options},
        )

    def run(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        """Its output, and its remarks."""
        process = self.start(*arguments)
        output, remarks = process.communicate(timeout=120)
        assert process.returncode == status, remarks
        assert "Traceback" not in remarks
        return output, remarks

    def rows(self, *arguments: str) -> list[dict[str, str]]:
        """The table that a command prints."""
        heads, *lines = self.run(*arguments)[0].splitlines()
        return [dict(zip(heads.split("\t"), line.split("\t"), strict=True)) for line in lines]


@pytest.fixture
def terminal(bench: Bench, tmp_path: Path) -> Terminal:
    return Terminal(bench.url, tmp_path)


def fill(bench: Bench, queue: str, number: int, error: str = "ValueError") -> list[str]:
    """Dead letters as this library makes them; returns their ids."""
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["none"])
    events = [DomainEvent("user.registered", {"n": n}) for n in range(number)]
    there = onlooker.count(bench.url, f"{queue}-dl")
    with onlooker.channel(bench.url) as channel:
        for event in events:
            headers = {
                envelope.ROUTING_KEY: event.routing_key,
                envelope.ERROR_TYPE: error,
                envelope.ERROR_MESSAGE: "no \x1b[2Jluck\nat all",
                envelope.SUBSCRIBER: queue,
            }
            properties = Properties(headers=headers, message_id=event.uuid_string, delivery_mode=2)
            channel.basic_publish("", f"{queue}-dl", event.to_json().encode(), properties)
        # On this channel: a quorum queue forgets what it keeps back when the channel is closed.
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == there + number, 120)
    return [event.uuid_string for event in events]


def ids(url: str, queue: str) -> list[str]:
    """Of the dead letters that are there."""
    with DeadLetters(queue, url) as dead_letters:
        return [str(letter.id) for letter in dead_letters]


def taken(url: str, queue: str) -> list[str]:
    """The ids of all events in a queue, which are taken out of it."""
    return [DomainEvent.from_json(body).uuid_string for body in onlooker.take_all(url, queue)]


# --- look ----------------------------------------------------------------------------------------


def test_last_ten_of_an_error_are_listed_and_replayed_slowly(
    bench: Bench, terminal: Terminal
) -> None:
    """In two commands: "show me the last ten of mailer with ValueError, replay them slowly"."""
    mailer = bench.names.queue("mailer")
    wanted = fill(bench, mailer, 12)[-10:]
    others = fill(bench, mailer, 5, "shop.OutOfStock")
    chosen = ["--error-type", "ValueError", "--newest", "--limit", "10"]
    listed = terminal.rows("dead-letters", "list", mailer, *chosen)
    assert [row["ID"] for row in listed] == wanted[::-1]
    assert listed[0]["ERROR"] == "ValueError"
    assert listed[0]["MESSAGE"] == "no \\x1b[2Jluck"  # it cannot move the cursor
    begun = time.monotonic()
    replay = "dead-letters", "replay", mailer, *chosen, "--rate", "5", "--patience", "0", "--yes"
    _, remarks = terminal.run(*replay)
    assert time.monotonic() - begun >= 9 / 5
    assert remarks == (
        f"{mailer}: 10 replayed; 10 wait in its queue (is the subscriber running?).\n"
    )
    assert taken(bench.url, mailer) == wanted[::-1]
    assert len(ids(bench.url, mailer)) == 2 + len(others)


def test_all_of_a_dead_letter_is_shown(bench: Bench, terminal: Terminal) -> None:
    """The event, its cause, headers, errors, how often it was retried and replayed."""
    queue = bench.names.queue()
    with bench.subscriber() as subscriber:

        def fail(event: DomainEvent) -> None:
            subscriber.stop_consuming()
            raise Reject("no \x1b[2Jluck")

        subscriber.register(fail, queue, ["#"])
        cause = DomainEvent("user.invited", {"by": "Ann"})
        bench.publisher.publish(cause)
        subscriber.start_consuming(timeout=30)
    wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    with DeadLetters(queue, bench.url) as dead_letters:
        dead_letters.replay_all()
    with bench.subscriber() as subscriber:
        subscriber.register(fail, queue, ["#"])
        subscriber.start_consuming(timeout=30)
    wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    output, _ = terminal.run("dead-letters", "show", queue)
    lines = [" ".join(line.split()) for line in output.splitlines()]
    for line in (
        f"subscriber: {queue}",
        f"id: {cause.uuid_string}",
        "routing key: user.invited",
        "error: domain_events.retry.Reject: no \\x1b[2Jluck",
        "retries: 0",
        "replays: 1",
        f"correlation id: {cause.uuid_string}",
        'data: {"by": "Ann"}',
        'raise Reject("no \\x1b[2Jluck")',
    ):
        assert line in lines
    output, _ = terminal.run("dead-letters", "show", queue, cause.uuid_string, "--json")
    found = json.loads(output)
    assert found["event"] == cause.event_data
    assert found["replays"] == 1
    _, remarks = terminal.run("dead-letters", "show", queue, "another", status=3)
    assert remarks == f"Nothing matches among the dead letters of {queue}.\n"
    [row] = terminal.rows("dead-letters", "list", queue, "--group-by", "error,frame")
    assert row["ERROR"] == "domain_events.retry.Reject"
    assert f"{Path(__file__).name}:" in row["FRAME"]
    assert row["FRAME"].endswith(" in fail")
    assert row["COUNT"] == "1"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["list", "nobody"], 8, "There is no queue 'nobody-dl'"),
        (["list", "x", "--since", "5x"], 2, "is not a time"),
        (["list", "x", "--where", "a"], 2, "is not a condition"),
        (["list", "x", "--newest"], 2, "--newest needs a --limit"),
        (["list", "x", "--group-by", "colour"], 2, "'colour' is not one of"),
        (["show", "x", "--interactive"], 2, "--interactive needs a terminal"),
        (["discard", "x", "--to", "a", "--no-copy"], 2, "exclude each other"),
        (["list", "x", "--broker", "amqp://localhost:1", "--timeout", "0.5"], 4, "No broker"),
    ],
)
def test_mistakes_are_one_line(
    terminal: Terminal, arguments: list[str], status: int, words: str
) -> None:
    """What is wrong, and what to do; a status for scripts."""
    output, remarks = terminal.run("dead-letters", *arguments, status=status)
    assert not output
    assert words in remarks.splitlines()[-1]


def test_nothing_is_changed_without_a_yes(bench: Bench, terminal: Terminal) -> None:
    """Not by --dry-run, nor where nobody can answer."""
    queue = bench.names.queue()
    there = fill(bench, queue, 40)
    for command in ("replay", "discard"):
        some = "dead-letters", command, queue, "--where", "n<3"
        output, remarks = terminal.run(*some, "--dry-run")
        assert len(output.splitlines()) == 4
        assert remarks.startswith("3 would be ")
        _, remarks = terminal.run(*some, status=2)
        assert f"{command.capitalize()} 3 of the dead letters of {queue}?" in remarks
    assert ids(bench.url, queue) == there
    assert not list(terminal.folder.iterdir())


# --- replay --------------------------------------------------------------------------------------


@contextmanager
def handling(bench: Bench, queue: str, handler: Callable[[DomainEvent], None]) -> Iterator[None]:
    """A subscriber at work."""
    with bench.subscriber() as subscriber:
        subscriber.register(handler, queue, ["#"])
        with running(subscriber):
            yield


def test_replay_stops_by_itself_when_events_fail_again(bench: Bench, terminal: Terminal) -> None:
    """After few of them; the others are left, and those that failed show that it was again."""
    queue = bench.names.queue()
    fill(bench, queue, 100)

    def fail(_event: DomainEvent) -> None:
        raise Reject("still broken")

    with handling(bench, queue, fail):
        output, remarks = terminal.run(
            "dead-letters", "replay", queue, "--yes", "--json", "--patience", "30", status=3
        )
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 100)
    result = json.loads(output)
    assert result["stopped"]
    assert 3 <= len(result["failed_again"]) <= result["replayed"] <= 7
    assert "failed again (domain_events.retry.Reject). Stopped, the rest is left" in remarks
    rows = terminal.rows("dead-letters", "list", queue)
    assert len(rows) == 100
    again = {row["ID"] for row in rows if row["REPLAYS"] == "1"}
    assert len(again) == result["replayed"]
    assert set(result["failed_again"]) <= again


def test_replay_is_not_stopped_by_failures_of_others(bench: Bench, terminal: Terminal) -> None:
    """Events that were not replayed fail meanwhile, among them one that was replayed before."""
    queue = bench.names.queue()
    fill(bench, queue, 60)
    handled = []

    def handle(event: DomainEvent) -> None:
        if event.routing_key == "order.placed":
            raise Reject("another failure")
        for _ in range(3):
            bench.publish("order.placed")
        handled.append(event)

    with handling(bench, queue, handle):
        output, _ = terminal.run("dead-letters", "replay", queue, "--yes", "--json")
        wait_until(lambda: len(handled) == 60)
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 180)
    assert json.loads(output) == {
        "subscriber": queue,
        "replayed": 60,
        "failed_again": {},
        "waiting": 0,
        "stopped": False,
    }


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["replay", "discard"])
def test_id_that_is_not_there_is_named_by_the_status(
    bench: Bench, terminal: Terminal, command: str
) -> None:
    """A script must not take a mistyped id for a dead letter that was replayed."""
    queue = bench.names.queue()
    there, _ = fill(bench, queue, 2)
    ids = ["--id", there, "--id", "055a3b06-5eff-468b-8f30-50721ebbe2be"]
    for how, status in (("--dry-run", 3), ("--yes", 3), ("--yes", 3)):
        remarks = terminal.run("dead-letters", command, queue, *ids, how, status=status)[1]
    assert "Not there: 2 of the 2 that --id names." in remarks
    assert onlooker.count(bench.url, f"{queue}-dl") == 1


def test_what_is_discarded_can_be_imported_again(bench: Bench, terminal: Terminal) -> None:
    """It is the same dead letter then; twice imported, it is there once."""
    queue = bench.names.queue()
    fill(bench, queue, 30)
    with onlooker.channel(bench.url) as channel:  # and one that is not an event, of somebody else
        properties = Properties(headers={"lang": "de"}, message_id="odd", app_id="shop")
        channel.basic_publish("", f"{queue}-dl", b"\xff\x00", properties)
    wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 31)
    before = [
        json.loads(line) for line in terminal.run("dead-letters", "export", queue)[0].splitlines()
    ]
    _, remarks = terminal.run("dead-letters", "discard", queue, "--yes")
    [copy] = terminal.folder.iterdir()
    assert remarks == f"{queue}: 31 discarded; a copy is in {copy}.\n"
    assert copy.stat().st_mode & 0o077 == 0
    assert ids(bench.url, queue) == []
    lines = copy.read_bytes().splitlines(keepends=True)
    assert [json.loads(line) for line in lines] == before
    # As after a kill: the last line is not whole. It is left out; the next copies do not join it.
    copy.write_bytes(b"".join(lines[:20]) + lines[20][:50])
    _, remarks = terminal.run("dead-letters", "import", copy.name, status=3)
    assert f"{copy.name}:21 was left out" in remarks
    assert "20 imported; 0 there already." in remarks
    copy.write_bytes(b"".join(lines))
    _, remarks = terminal.run("dead-letters", "import", copy.name)
    assert remarks == "11 imported; 20 there already.\n"
    after = [
        json.loads(line) for line in terminal.run("dead-letters", "export", queue)[0].splitlines()
    ]
    assert after == before
    terminal.run("dead-letters", "discard", queue, "--yes", "--no-copy")
    assert list(terminal.folder.iterdir()) == [copy]
    _, remarks = terminal.run("dead-letters", "import", copy.name, "--replay")
    assert remarks == "31 imported; 0 there already.\n"
    assert onlooker.count(bench.url, queue) == 31
    assert ids(bench.url, queue) == []


def test_export_leaves_everything_and_overwrites_nothing(bench: Bench, terminal: Terminal) -> None:
    """A file under its name is complete."""
    queue = bench.names.queue()
    there = fill(bench, queue, 250)
    export = "dead-letters", "export", queue, "--to", "all.jsonl"
    terminal.run(*export)
    copied = (terminal.folder / "all.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in copied] == there == ids(bench.url, queue)
    _, remarks = terminal.run(*export, status=2)
    assert "all.jsonl exists" in remarks


def test_nothing_is_deleted_when_its_copy_cannot_be_written(
    bench: Bench, terminal: Terminal
) -> None:
    """Where there is no such folder, and on a full disk."""
    queue = bench.names.queue()
    there = fill(bench, queue, 3)
    for path in ("nowhere/copy.jsonl", "/dev/full"):
        discard = "dead-letters", "discard", queue, "--yes", "--to", path
        _, remarks = terminal.run(*discard, status=74)
        assert "Copies cannot be written to" in remarks
        assert len(remarks.splitlines()) == 1
    assert ids(bench.url, queue) == there


def test_copies_that_fill_the_disk_are_counted(bench: Bench, terminal: Terminal) -> None:
    """What was deleted until then is in the file, and the rest is where it was."""
    queue = bench.names.queue()
    there = fill(bench, queue, 250)
    discard = terminal.start(
        *("dead-letters", "discard", queue, "--yes", "--to", "copies.jsonl"),
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    _, remarks = discard.communicate(timeout=120)
    assert discard.returncode == 74
    # What measures coverage cannot write its file either, and remarks on that.
    done, failed, *_ = remarks.splitlines()
    left = ids(bench.url, queue)
    assert done == f"{250 - len(left)} discarded; a copy is in copies.jsonl."
    assert "Copies cannot be written to copies.jsonl" in failed
    copies = (terminal.folder / "copies.jsonl").read_text().splitlines()
    assert 0 < len(left) < 250
    assert [json.loads(line)["id"] for line in copies[: 250 - len(left)]] == there[: -len(left)]
    assert left == there[-len(left) :]


# --- kills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["export", "replay", "discard", "import"])
def test_kill_at_any_moment_loses_nothing(bench: Bench, terminal: Terminal, command: str) -> None:
    """By kill -9, SIGTERM, Ctrl-C: each event is somewhere, and running it again completes it."""
    queue = bench.names.queue()
    dead = f"{queue}-dl"
    everything = fill(bench, queue, 600)
    copy = terminal.folder / "copy.jsonl"
    arguments = ["dead-letters", command, queue]
    if command == "replay":
        arguments += ["--yes", "--patience", "0"]
    elif command == "discard":
        arguments += ["--yes", "--to", copy.name]
    elif command == "import":
        terminal.run("dead-letters", "export", queue, "--to", copy.name)
        terminal.run("dead-letters", "discard", queue, "--no-copy", "--yes")
        arguments = ["dead-letters", command, copy.name]
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        before = onlooker.count(bench.url, dead)
        process = terminal.start(*arguments)
        while process.poll() is None and onlooker.count(bench.url, dead) == before:
            pass  # until it holds some, or has added some
        time.sleep(random.uniform(0, 0.15))  # the moment of the kill
        process.send_signal(how)
        process.communicate(timeout=60)
        assert process.returncode in (0, -how, 128 + how)

    def completed() -> bool:
        # What a killed process held may not be back yet.
        terminal.run(*arguments)
        left = len(everything) if command == "import" else 0
        return onlooker.count(bench.url, dead) == left

    if command == "export":
        wait_until(lambda: sorted(ids(bench.url, queue)) == sorted(everything))
        return
    wait_until(completed, 60)
    if command == "replay":
        assert set(taken(bench.url, queue)) == set(everything)
    elif command == "import":
        assert sorted(ids(bench.url, queue)) == sorted(everything)
    else:
        # A line that was cut off is of one that was left then.
        lines = copy.read_bytes().splitlines()
        whole = [saved for _, saved in archive.read(iter(lines)) if saved is not None]
        assert {saved["id"] for saved in whole} == set(everything)
        assert len(lines) - len(whole) <= 1


# --- one by one ----------------------------------------------------------------------------------


def test_one_by_one_on_a_terminal(bench: Bench, terminal: Terminal) -> None:
    """Replay, discard, leave, quit: each is asked for, and done."""
    queue = bench.names.queue()
    there = fill(bench, queue, 6)
    leader, follower = pty.openpty()
    process = terminal.start(
        "dead-letters",
        "show",
        queue,
        "--interactive",
        "--to",
        "gone.jsonl",
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    shown = ""

    def read_until(words: str) -> None:
        nonlocal shown
        while words not in shown:
            shown += os.read(leader, 4096).decode()
        shown = shown.partition(words)[2]

    with sooner_than(120):
        # The fourth answer is none of those that are offered, so it asks again.
        for shows, answer in zip([0, 1, 2, 3, None, 4], "rdlxlq", strict=True):
            if shows is not None:
                read_until(there[shows])
            read_until("replay, discard, leave, quit")
            os.write(leader, f"{answer}\n".encode())
        assert process.wait(60) == 0
    os.close(leader)
    assert taken(bench.url, queue) == [there[0]]
    assert json.loads((terminal.folder / "gone.jsonl").read_text())["id"] == there[1]
    assert ids(bench.url, queue) == there[2:]


def test_question_is_answered_on_a_terminal(bench: Bench, terminal: Terminal) -> None:
    """Nothing is held while it waits; a no changes nothing."""
    queue = bench.names.queue()
    there = fill(bench, queue, 40)
    for answer, left in (("n", there), ("y", there[5:])):
        leader, follower = pty.openpty()
        process = terminal.start(
            "dead-letters", "discard", queue, "--limit", "5", "--no-copy", stdin=follower
        )
        os.close(follower)
        assert process.stderr is not None
        question = ""
        while not question.endswith("[y/N]: "):
            question += process.stderr.read(1)
        assert f"Discard 5 of the dead letters of {queue}?" in question
        assert onlooker.count(bench.url, f"{queue}-dl") == 40
        os.write(leader, f"{answer}\n".encode())
        process.communicate(timeout=60)
        os.close(leader)
        assert ids(bench.url, queue) == left


# --- undelivered ---------------------------------------------------------------------------------


def test_undelivered_retries_are_listed_returned_and_discarded(
    bench: Bench, terminal: Terminal
) -> None:
    """Those of the subscriber that came back, and that were chosen; a copy of the others."""
    first, second = bench.names.queue("first"), bench.names.queue("second")
    exchange = "--exchange", bench.exchange
    with bench.subscriber() as subscriber:
        for name in (first, second):
            subscriber.register(print, name, ["none"], max_retries=3)
    events = [DomainEvent("user.registered", {"n": n}) for n in range(9)]
    for event in events:
        name = second if event.data["n"] > 5 else first
        onlooker.publish(
            bench.url,
            f"{bench.exchange}.undelivered",
            ".".join("0" * 24) + f".{name}",
            event.to_json().encode(),
            message_id=event.uuid_string,
        )
    wait_until(lambda: onlooker.count(bench.url, f"{bench.exchange}.undelivered") == 9)
    rows = terminal.rows("undelivered", "list", *exchange)
    assert [row["ID"] for row in rows] == [event.uuid_string for event in events]
    assert {row["SUBSCRIBER"] for row in rows} == {first, second}
    none = "--newest", "--limit", "9", "--routing-key", "order.*", "--yes"
    assert terminal.run("undelivered", "return", first, *exchange, *none)[1] == "0 returned.\n"
    begun = time.monotonic()
    slowly = "--limit", "4", "--rate", "2", "--yes"
    _, remarks = terminal.run("undelivered", "return", first, *exchange, *slowly)
    assert remarks == "4 returned.\n"
    assert time.monotonic() - begun >= 1.5
    assert taken(bench.url, first) == [event.uuid_string for event in events[:4]]
    discard = "undelivered", "discard", "--subscriber", second, "--yes", "--to", "copy.jsonl"
    _, remarks = terminal.run(*discard, *exchange)
    assert remarks.startswith("3 discarded; a copy is in")
    assert onlooker.count(bench.url, f"{bench.exchange}.undelivered") == 2
    _, remarks = terminal.run("dead-letters", "import", "copy.jsonl")
    assert remarks.startswith("3 imported")
    assert ids(bench.url, second) == [event.uuid_string for event in events[6:]]
    _, remarks = terminal.run("undelivered", "return", "nobody", *exchange, "--yes", status=8)
    assert "There is no queue 'nobody' to hand back to" in remarks


# --- many ----------------------------------------------------------------------------------------

MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True)
print(len(done.stdout.splitlines()), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


@thorough
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_take_bounded_memory(bench: Bench, terminal: Terminal) -> None:
    """They are grouped, exported, and discarded; the last ten of them are found."""
    queue = bench.names.queue()
    fill(bench, queue, 100_000)

    def measured(*arguments: str) -> list[int]:
        command = [sys.executable, "-c", MEASURED, *COMMAND, "dead-letters", *arguments]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            env=terminal.environment,
            cwd=terminal.folder,
            check=True,
            timeout=250,
        )
        return [int(each) for each in done.stdout.split()]

    lines, megabytes = measured("list", queue, "--group-by", "error")
    assert (lines, megabytes < 150) == (2, True)
    lines, megabytes = measured("list", queue, "--newest", "--limit", "10")
    assert (lines, megabytes < 150) == (11, True)
    lines, megabytes = measured("discard", queue, "--yes", "--to", "all.jsonl")
    assert (lines, megabytes < 150) == (0, True)
    with (terminal.folder / "all.jsonl").open() as file:
        assert len({json.loads(line)["id"] for line in file}) == 100_000
