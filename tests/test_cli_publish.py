"""``domain-events publish``: what arrives, and what is known of what does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onlooker
import pytest
import shell
from rabbitmq_node import Node
from support import wait_until


def lines(numbers: range, **more: object) -> str:
    return "".join(f"{json.dumps({'routing_key': 'a.b', 'data': n, **more})}\n" for n in numbers)


def received(url: str, queue: str) -> list[dict[str, Any]]:
    return [json.loads(body) for body in onlooker.take_all(url, queue)]


def test_one_event_arrives_as_it_was_given(broker_url: str, queue: str, exchange: str) -> None:
    options = ["--object", "42", "--id", "the-id", "--timestamp", "2026-01-31T12:00:00Z"]
    done = shell.run(
        broker_url,
        *["publish", "user.registered", '{"name": "Ada"}', "--exchange", exchange],
        *[*options, "--header", "tenant=shop"],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "the-id\n", "")
    properties, body = onlooker.take(broker_url, queue)
    assert json.loads(body) == {
        "routing_key": "user.registered",
        "data": {"name": "Ada"},
        "domain_object_id": "42",
        "uuid_string": "the-id",
        "timestamp": 1769860800.0,
    }
    assert properties.headers is not None
    assert properties.headers["tenant"] == "shop"


def test_data_come_from_the_argument_a_file_or_stdin(
    broker_url: str, queue: str, exchange: str, tmp_path: Path
) -> None:
    file = tmp_path / "data.json"
    file.write_text("1")
    for data, stdin in ((f"@{file}", ""), ("2", ""), ("-", "3"), (None, "4"), ("null", "")):
        given = [] if data is None else [data]
        done = shell.run(broker_url, "publish", "a.b", *given, "--exchange", exchange, stdin=stdin)
        assert done.returncode == 0, done.stderr
    assert [each["data"] for each in received(broker_url, queue)] == [1, 2, 3, 4, None]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["a.b", '{"open": '], 7, "not JSON"),
        (["a.b", "NaN"], 7, "it is not JSON"),
        (["a.b", "-"], 7, "the input is empty"),
        (["a.*", "1"], 7, "wildcard"),
        (["a.b", "1", "--mandatory"], 6, "No queue is bound"),
        (["a.b", "@/nowhere"], 74, "/nowhere: No such file"),
        (["a.b", "1", "--timestamp", "noon"], 2, "ISO 8601"),
        (["a.b", "1", "--rest", "x"], 2, "without --lines"),
        (["--lines", "-", "--id", "x"], 2, "with --lines"),
        ([], 2, "routing key and data, or --lines"),
    ],
)
def test_what_cannot_be_published_has_its_own_status_and_one_line(
    broker_url: str, exchange: str, arguments: list[str], status: int, words: str
) -> None:
    done = shell.run(broker_url, "publish", *arguments, "--exchange", exchange)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_lines_arrive_in_their_order_with_all_that_they_have(
    broker_url: str, queue: str, exchange: str
) -> None:
    first = {
        "routing_key": "a.b",
        "data": None,
        "domain_object_id": 7,
        "uuid_string": "mine",
        "timestamp": 12.5,
        "headers": {"tenant": "shop", "n": 3},
        "correlation_id": "c",
        "cause": "d",
        "version": 2,
    }
    text = f"\ufeff{json.dumps(first)}\n\n{lines(range(1, 5000))}".rstrip("\n")
    done = shell.run(broker_url, "publish", "--lines", "--exchange", exchange, stdin=text)
    assert (done.returncode, done.stderr) == (0, "Published: 5,000\n")
    properties, body = onlooker.take(broker_url, queue)
    assert json.loads(body) == {key: first[key] for key in list(first)[:5]}
    assert properties.headers is not None
    assert properties.headers.items() >= {"tenant": "shop", "n": 3}.items()
    assert properties.correlation_id == "c"
    others = received(broker_url, queue)
    assert [each["data"] for each in others] == list(range(1, 5000))
    assert done.stdout.splitlines() == ["mine", *(each["uuid_string"] for each in others)]


def test_a_wrong_line_is_named_and_the_rest_can_be_published_later(
    broker_url: str, queue: str, exchange: str, tmp_path: Path
) -> None:
    """What was before it is confirmed; it and what follows are in the file as they were."""
    rest = tmp_path / "rest.jsonl"
    wrong = b'{"routing_key": "a.b", "dat\xff": 1}\n'
    text = lines(range(3)).encode() + wrong + lines(range(3, 6)).encode()
    arguments = ["publish", "--lines", "--exchange", exchange]
    done = shell.run(broker_url, *arguments, "--rest", rest, stdin=text)
    assert done.returncode == 7
    assert "Confirmed: 3 (lines 1-3)\nNot sent: all from line 4 on\n" in done.stderr
    assert done.stderr.endswith("domain-events: Line 4: not UTF-8: invalid start byte at byte 27\n")
    assert rest.read_bytes() == wrong + lines(range(3, 6)).encode()
    again = shell.run(broker_url, *arguments, "--rest", rest, stdin=text)
    assert again.returncode == 2
    assert "exists" in again.stderr
    rest.write_bytes(rest.read_bytes().replace(wrong, b""))
    assert shell.run(broker_url, *arguments, rest).returncode == 0
    assert [each["data"] for each in received(broker_url, queue)] == list(range(6))


def test_a_broker_that_hangs_leaves_no_line_in_doubt(
    killable_node: Node, unique: str, tmp_path: Path
) -> None:
    """What is reported as confirmed is stored, what as not sent is not, and all else has its id."""
    node, exchange, queue = killable_node, f"{unique}-x", f"{unique}-q"
    onlooker.bind_queue(node.url, queue, exchange, "#")
    rest = tmp_path / "rest.jsonl"
    arguments = ["publish", "--lines", "--exchange", exchange, "--timeout", "3"]
    with shell.running(node.url, *arguments, "--rest", rest, "--json") as publish:
        stdin = publish.process.stdin
        assert stdin is not None
        stdin.write(lines(range(100)).encode())
        stdin.flush()
        wait_until(lambda: len(publish.out) == 100)
        node.pause()
        stdin.write(lines(range(100, 5000)).encode())
        stdin.close()
        status = publish.end()
        node.resume()
    *confirmed, summary = map(json.loads, publish.out)
    assert status == 5
    assert summary["published"] == len(confirmed) == 100
    assert summary["perhaps_sent"]
    left = {
        each["data"]: each["uuid_string"]
        for each in map(json.loads, rest.read_text().splitlines())
        if "uuid_string" in each
    }
    assert list(left) == list(range(100, summary["not_sent_from"] - 1))
    assert len(rest.read_text().splitlines()) == 5000 - 100
    # Lines are counted from 1, and their data from 0.
    unsent = {number - 1 for number in summary["not_sent"]}
    assert left.keys() == unsent | {number - 1 for number in summary["perhaps_sent"]}
    # The broker has read what it was sent before: nothing more comes of it.
    done = shell.run(node.url, "publish", "--lines", rest, "--exchange", exchange)
    assert done.returncode == 0, done.stderr
    stored: dict[int, set[str]] = {}
    for each in received(node.url, queue):
        stored.setdefault(each["data"], set()).add(each["uuid_string"])
    onlooker.delete(node.url, queues=[queue], exchanges=[exchange])
    assert sorted(stored) == list(range(5000))
    assert {n for n, ids in stored.items() if len(ids) > 1} == set(), "an id was not kept"
    assert all(stored[n] == {event_id} for n, event_id in left.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order_and_keeps_what_was_not_published(
    broker_url: str, queue: str, exchange: str, tmp_path: Path, number: int
) -> None:
    rest = tmp_path / "rest.jsonl"
    arguments = ["publish", "--lines", "--exchange", exchange, "--rest", rest]
    with shell.running(broker_url, *arguments) as publish:
        stdin = publish.process.stdin
        assert stdin is not None
        stdin.write(lines(range(500)).encode())
        stdin.flush()
        wait_until(lambda: len(publish.out) == 500)
        publish.send(number)
        publish.saw("Ctrl-C stops that")
        stdin.write(lines(range(500, 503)).encode())
        stdin.close()
        assert publish.end() == (130 if number == signal.SIGINT else 143)
    assert "Confirmed: 500 (lines 1-500)" in publish.err
    assert rest.read_text() == lines(range(500, 503))
    assert [each["data"] for each in received(broker_url, queue)] == list(range(500))


def test_ids_are_the_same_each_time_that_the_output_of_a_dry_run_is_published(
    broker_url: str, queue: str, exchange: str
) -> None:
    """So that a publish that is killed can be run again."""
    dry = shell.run("amqp://nowhere:1", "publish", "--lines", "--dry-run", stdin=lines(range(3)))
    assert dry.returncode == 0
    for _ in range(2):
        done = shell.run(broker_url, "publish", "--lines", "--exchange", exchange, stdin=dry.stdout)
        assert done.returncode == 0
    ids = [each["uuid_string"] for each in received(broker_url, queue)]
    assert ids[:3] == ids[3:]
    assert len(set(ids)) == 3


def test_a_dry_run_names_every_wrong_line(broker_url: str) -> None:
    text = f'{lines(range(1))}[]\n{lines(range(1))}{{"routing_key": "a.#", "data": 1}}\n'
    done = shell.run(broker_url, "publish", "--lines", "--dry-run", stdin=text)
    assert done.returncode == 7
    assert len(done.stdout.splitlines()) == 2
    assert [line.split(":")[0] for line in done.stderr.splitlines()][:2] == ["Line 2", "Line 4"]


def test_a_reader_of_the_ids_who_leaves_does_not_stop_the_publishing(
    broker_url: str, queue: str, exchange: str
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as nobody:
        done = subprocess.run(
            [*shell.COMMAND, "publish", "--lines", "--exchange", exchange],
            input=lines(range(3000)).encode(),
            stdout=nobody,
            stderr=subprocess.PIPE,
            env=shell.environment(broker_url),
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, b"Published: 3,000\n")
    assert len(received(broker_url, queue)) == 3000


def test_memory_does_not_grow_with_the_input(
    broker_url: str, exchange: str, tmp_path: Path
) -> None:
    # What getrusage() has is at least what the test itself uses.
    code = (
        "import sys, re; from domain_events.cli import main; main(sys.argv[1:]);"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )

    def peak(number: int) -> int:
        file = tmp_path / "many.jsonl"
        with file.open("w") as writing:
            for n in range(number):
                writing.write(lines(range(n, n + 1), headers={"x": "y" * 2000}))
        done = subprocess.run(
            [sys.executable, "-c", code, "publish", "--lines", file, "--exchange", exchange],
            capture_output=True,
            text=True,
            env=shell.environment(broker_url),
            check=True,
        )
        assert done.stderr == f"Published: {number:,}\n"
        return int(done.stdout.splitlines()[-1])

    # The smaller one is more than what is under way at a time, too.
    assert peak(30_000) < 1.3 * peak(6_000)


def test_progress_is_shown_on_a_terminal_in_place_of_the_ids(
    broker_url: str, exchange: str, tmp_path: Path
) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(lines(range(2000)))
    with shell.on_terminal(
        broker_url, "publish", "--lines", file, "--exchange", exchange
    ) as publish:
        assert publish.end() == 0
    text = "\n".join(publish.out)
    assert "publishing" in text
    assert "2000/?" in text
    assert "Published: 2,000" in text
    assert len(text) < 2000 * 36


def test_ids_go_to_a_file_while_progress_is_on_the_terminal(
    broker_url: str, exchange: str, tmp_path: Path
) -> None:
    file, ids = tmp_path / "lines.jsonl", tmp_path / "ids"
    file.write_text(lines(range(2000)))
    arguments = ["publish", "--lines", file, "--exchange", exchange]
    with (
        ids.open("wb") as stdout,
        shell.on_terminal(broker_url, *arguments, stdout=stdout) as publish,
    ):
        assert publish.end() == 0
    assert "publishing" in "\n".join(publish.out)
    assert len(set(ids.read_text().splitlines())) == 2000
