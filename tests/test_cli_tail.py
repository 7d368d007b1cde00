"""``domain-events tail``: what it shows, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator

import onlooker
import pytest
import shell
from rabbitmq_node import Node
from support import Names, wait_until

from domain_events import DomainEvent, Publisher

HOSTILE = "a\x1b[2Jb\x9bc\u202ed\r\ne"


def queues(node: Node) -> dict[str, int]:
    """The queues of `tail`, with the number of messages that are ready."""
    found = json.loads(node.ctl("--quiet", "--formatter=json", "list_queues", "name", "messages"))
    return {
        each["name"]: each["messages"]
        for each in found
        if each["name"].startswith("domain-events-tail-")
    }


@pytest.fixture
def exchange(names: Names, broker_url: str) -> str:
    """One that exists."""
    exchange = names.exchange()
    onlooker.declare_exchange(broker_url, exchange, "topic")
    return exchange


@pytest.fixture
def node(killable_node: Node, unique: str) -> Iterator[Node]:
    """A node whose queues can be listed."""
    onlooker.declare_exchange(killable_node.url, unique, "topic")
    yield killable_node
    killable_node.start()
    onlooker.delete(killable_node.url, exchanges=[unique])


def test_events_are_shown_as_they_are_published(
    publisher: Publisher, exchange: str, broker_url: str
) -> None:
    publisher.publish(DomainEvent("user.before", 1))
    arguments = ["tail", "user.*", "order.#", "--exchange", exchange]
    with shell.running(broker_url, *arguments) as tail:
        tail.saw("Events of user.*, order.#:")
        event = publisher.publish(DomainEvent("user.registered", {"name": "é"}, 42))
        publisher.publish(DomainEvent("car.sold", 1))
        publisher.publish(DomainEvent("order.paid", "x" * 5000))
        tail.saw("order.paid")
        tail.send(signal.SIGINT)
        assert tail.end() == 0
    first, second = tail.out
    assert re.sub(r"\d\d:\d\d:\d\d\.\d{3}", "TIME", first) == (
        f'TIME  user.registered  {event.uuid_string}  object 42  {{"name": "é"}}'
    )
    assert second.endswith("xxx...")
    assert len(second) < 1200


@pytest.mark.parametrize("options", [[], ["--full"], ["--json"], ["--stats", "--every", "0.1"]])
def test_text_of_events_cannot_control_the_terminal(
    publisher: Publisher, exchange: str, broker_url: str, options: list[str]
) -> None:
    with shell.on_terminal(
        broker_url,
        *["tail", "--limit", "1", *options, "--exchange", exchange],
        more={"NO_COLOR": "1"},
        columns=400,
    ) as tail:
        tail.saw("Events of")
        publisher.publish(DomainEvent(f"a.{HOSTILE}", {HOSTILE: HOSTILE}, HOSTILE, HOSTILE))
        assert tail.end() == 0
    text = re.sub(r"\x1b\[\d*m", "", "".join(tail.out))  # the table's own
    assert "a.a\\" in text
    assert text.replace("\r", "").isprintable()


def test_colours_are_for_terminals_and_no_color_is_honoured(
    publisher: Publisher, exchange: str, broker_url: str
) -> None:
    for more in ({}, {"NO_COLOR": "1"}):
        arguments = ["tail", "--limit", "1", "--exchange", exchange]
        with shell.on_terminal(broker_url, *arguments, more=more, columns=100) as tail:
            tail.saw("Events of")
            publisher.publish(DomainEvent("a.b", "x" * 300))
            assert tail.end() == 0
        assert any("\x1b[" in line for line in tail.out) == (not more)
        plain = re.sub(r"\x1b\[\d*m", "", tail.out[-1])
        assert len(plain) <= 100, plain


def test_what_it_prints_as_json_can_be_published_again(
    publisher: Publisher, exchange: str, queue: str, broker_url: str
) -> None:
    given = DomainEvent("a.b", None, 3, headers={"n": 1}, version=2, correlation_id="c", cause="d")
    other = DomainEvent("a.c", {"é": "\u2028"})
    with shell.running(broker_url, "tail", "--json", "--limit", 2, "--exchange", exchange) as tail:
        tail.saw("Events of")
        publisher.publish(given)
        publisher.publish(other)
        assert tail.end() == 0
    before = [onlooker.take(broker_url, queue) for _ in range(2)]
    text = "".join(f"{line}\n" for line in tail.out)
    done = shell.run(broker_url, "publish", "--lines", "--exchange", exchange, stdin=text)
    assert done.returncode == 0, done.stderr
    for properties, body in before:
        again, same_body = onlooker.take(broker_url, queue)
        assert same_body == body
        assert again.headers == properties.headers
        assert again.correlation_id == properties.correlation_id


def test_it_ends_after_so_many_events_or_so_long(
    publisher: Publisher, exchange: str, broker_url: str
) -> None:
    arguments = ["tail", "--exchange", exchange, "--limit"]
    with shell.running(broker_url, *arguments, 2) as tail:
        tail.saw("Events of")
        for n in range(5):
            publisher.publish(DomainEvent("a.b", n))
        assert tail.end() == 0
    assert [line[-1] for line in tail.out] == ["0", "1"]
    assert shell.run(broker_url, *arguments, 2, "--duration", 0.2).returncode == 3
    assert shell.run(broker_url, *arguments[:-1], "--duration", 0.2).returncode == 0


def test_statistics_count_the_events_of_each_key(
    publisher: Publisher, exchange: str, broker_url: str
) -> None:
    arguments = ["tail", "--stats", "--json", "--limit", 6, "--exchange", exchange]
    with shell.running(broker_url, *arguments) as tail:
        tail.saw("Events of")
        for key in ("a", "b", "a", "c", "a", "b"):
            publisher.publish(DomainEvent(key))
        assert tail.end() == 0
    found = [json.loads(line) for line in tail.out]
    assert [(each["routing_key"], each["events"]) for each in found] == [
        ("a", 3),
        ("b", 2),
        ("c", 1),
    ]
    assert all(each["per_second"] > 0 for each in found)


def test_nothing_is_left_behind_when_it_is_killed(node: Node, unique: str) -> None:
    with shell.running(node.url, "tail", "--exchange", unique) as tail:
        tail.saw("Events of")
        assert len(queues(node)) == 1
        tail.process.kill()
    wait_until(lambda: not queues(node))


def test_an_exchange_whose_name_is_mistyped_is_not_made(broker_url: str, names: Names) -> None:
    exchange = names.exchange()
    done = shell.run(broker_url, "tail", "--exchange", exchange)
    assert done.returncode == 8
    assert f"There is no exchange '{exchange}' on this broker yet" in done.stderr
    again = shell.run(broker_url, "tail", "--exchange", exchange, "--create", "--duration", 0.1)
    assert again.returncode == 0


def test_events_that_were_missed_during_an_outage_are_mentioned(node: Node, unique: str) -> None:
    with shell.running(node.url, "tail", "--exchange", unique) as tail:
        tail.saw("Events of")
        node.kill()
        node.start()
        tail.saw("events that were published meanwhile are not shown")
        with Publisher(node.url, unique) as publisher:

            def is_shown() -> bool:
                publisher.publish(DomainEvent("a.after"))
                return any("a.after" in line for line in tail.out)

            wait_until(is_shown)


def test_a_slow_reader_piles_nothing_up_on_the_broker(node: Node, unique: str) -> None:
    """The oldest events are dropped, and their number is shown."""
    read, write = os.pipe()
    with shell.running(node.url, "tail", "--json", "--exchange", unique, stdout=write) as tail:
        os.close(write)
        tail.saw("Events of")
        with Publisher(node.url, unique) as publisher:
            events = (DomainEvent("a.b", {"n": n, "x": "x" * 100}) for n in range(15_000))
            publisher.publish_many(events)
        wait_until(lambda: list(queues(node).values()) == [0])
        tail.collect(os.fdopen(read, "rb"), tail.out)
        shown = tail.saw("events are not shown")
        wait_until(lambda: any('"n": 14999' in line for line in tail.out))
    dropped = int(shown.split()[0].replace(",", ""))
    numbers = [json.loads(line)["data"]["n"] for line in tail.out]
    assert numbers == sorted(numbers)
    assert len(numbers) + dropped == 15_000
