"""The mechanism of walks over dead letters on RabbitMQ: fast, in order, within bounded memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time

import onlooker
import pytest
from bench import Bench
from pyamqp import Properties
from support import wait_until

from domain_events import DeadLetters, DomainEvent, TopologyError
from domain_events.broker.rabbitmq.browser import RabbitBrowser

pytestmark = pytest.mark.rabbitmq


def fill(bench: Bench, queue: str, sizes: list[int]) -> None:
    """Put a dead letter of each size among those of a subscriber, numbered."""
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["none"])
    with onlooker.channel(bench.url) as channel:
        for number, size in enumerate(sizes):
            body = DomainEvent("a.b", {"number": number, "pad": "x" * size}).to_json().encode()
            channel.basic_publish("", f"{queue}-dl", body, Properties(delivery_mode=2))
        # On this channel: a quorum queue forgets what it keeps back when the channel is closed.
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == len(sizes), 120)


def numbers(dead_letters: DeadLetters) -> list[int]:
    """Those of the events in a walk, in its order."""
    return [letter.event.data["number"] for letter in dead_letters if letter.event is not None]


def test_five_thousand_are_listed_and_given_back_in_order(bench: Bench) -> None:
    """Three times as fast as one by one, whatever this machine does meanwhile; twice in order."""
    queue, other = bench.names.queue(), bench.names.queue("other")
    fill(bench, queue, [200] * 5000)
    fill(bench, other, [200] * 500)
    with onlooker.channel(bench.url) as channel:
        begun = time.monotonic()
        for _ in range(500):
            channel.basic_get(f"{other}-dl")
        one_by_one = 10 * (time.monotonic() - begun)
    begun = time.monotonic()
    with DeadLetters(queue, bench.url) as dead_letters:
        assert numbers(dead_letters) == list(range(5000))
    assert time.monotonic() - begun < one_by_one / 3
    with DeadLetters(queue, bench.url) as dead_letters:
        assert numbers(dead_letters) == list(range(5000))


WALK = """
import resource, sys
from domain_events import DeadLetters

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

with DeadLetters(sys.argv[1], sys.argv[2], timeout=60) as dead_letters:
    dead_letters.count()
    before = peak()
    found = [(letter.event.data["number"], len(letter.body)) for letter in dead_letters]
print([number for number, _ in found] == list(range(len(found))), len(found))
print(sum(size for _, size in found), peak() - before)
"""


def test_large_bodies_behind_many_small_ones_are_not_all_in_memory(bench: Bench) -> None:
    """A walk takes hundreds of small ones at a time, then meets 60 of 4 MB: not 240 MB."""
    queue = bench.names.queue()
    sizes = [10] * 1200 + [4_000_000] * 60 + [10] * 50
    fill(bench, queue, sizes)
    command = [sys.executable, "-c", WALK, queue, bench.url]
    output = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, timeout=120, env=os.environ
    ).stdout
    in_order, number, size, megabytes = output.split()
    assert (in_order, int(number)) == (b"True", len(sizes))
    assert int(size) > 240_000_000
    assert int(megabytes) < 80


def test_walk_whose_letters_others_take_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were gone between their count and their delivery; all that is there is seen."""
    queue = bench.names.queue()
    fill(bench, queue, [10] * 100)
    begin_window = RabbitBrowser._begin_window

    def hope_for_more(browser: RabbitBrowser, most: int) -> None:
        begin_window(browser, most + 7)

    monkeypatch.setattr(RabbitBrowser, "_begin_window", hope_for_more)
    with DeadLetters(queue, bench.url) as dead_letters:
        assert numbers(dead_letters) == list(range(100))
        assert dead_letters.count() == 100
    with DeadLetters(queue, bench.url) as dead_letters:
        assert numbers(dead_letters) == list(range(100))
    assert onlooker.count(bench.url, f"{queue}-dl") == 100


def test_queue_that_is_deleted_during_a_walk_ends_it(bench: Bench) -> None:
    """With the error that names the queue."""
    queue = bench.names.queue()
    fill(bench, queue, [10] * 30)
    with DeadLetters(queue, bench.url) as dead_letters:
        walk = iter(dead_letters)
        next(walk)
        onlooker.delete(bench.url, queues=[f"{queue}-dl"])
        with pytest.raises(TopologyError, match=f"{queue}-dl"):
            list(walk)


def test_letters_that_arrive_during_a_walk_are_not_held(bench: Bench) -> None:
    """A second walk, of another connection, sees them while the first one is under way."""
    queue = bench.names.queue()
    fill(bench, queue, [10] * 40)
    with DeadLetters(queue, bench.url) as first, DeadLetters(queue, bench.url) as second:
        walk = iter(first)
        next(walk)
        fill_more = [DomainEvent("a.b", {"number": n}).to_json().encode() for n in range(100, 200)]
        for body in fill_more:
            onlooker.publish(bench.url, "", f"{queue}-dl", body)
        assert len(list(walk)) == 39
        assert numbers(second) == list(range(100, 200))


def test_acks_of_thousands_are_not_lost_by_the_end_of_a_walk(bench: Bench) -> None:
    """All that was discarded is gone, and what was left is there in its order."""
    queue = bench.names.queue()
    fill(bench, queue, [10] * 6000)
    with DeadLetters(queue, bench.url) as dead_letters:
        some = (letter for letter in dead_letters if letter.event and letter.event.data["number"])
        assert dead_letters.discard_many(itertools.islice(some, 5900)) == 5900
    left = [0, *range(5901, 6000)]
    with DeadLetters(queue, bench.url) as dead_letters:
        assert numbers(dead_letters) == left
    with DeadLetters(queue, bench.url) as dead_letters:
        assert dead_letters.discard_all() == 100
    assert onlooker.count(bench.url, f"{queue}-dl") == 0
