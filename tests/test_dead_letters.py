"""Dead letters on RabbitMQ: delivery limits, permissions, memory, a broker that falls silent."""

from __future__ import annotations

import _thread
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import onlooker
import pytest
import raw_amqp as raw
from bench import Bench
from pyamqp import Properties
from rabbitmq_node import Node
from support import Names, sooner_than, wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DeadLetter,
    DeadLetters,
    DomainEvent,
    Reject,
    TopologyError,
)
from domain_events.broker.rabbitmq import envelope, walk
from domain_events.broker.rabbitmq.envelope import RabbitDelivery
from domain_events.message import Message, Place

# As many as come back in pieces, and a whole number of windows and a rest.
MANY = 230


@pytest.fixture
def target(killable_node: Node, unique: str) -> Iterator[Bench]:
    """A bench on a node that may be configured and paused."""
    names = Names(killable_node.url, unique)
    bench = Bench(killable_node.url, names)
    yield bench
    killable_node.resume()
    bench.publisher.close()
    names.delete()


@pytest.fixture
def policy(killable_node: Node, unique: str) -> Iterator[None]:
    """A policy for all queues of this test, which deletes what came back five times."""
    killable_node.ctl("set_policy", unique, f"^{unique}", '{"delivery-limit": 5}')
    yield
    killable_node.ctl("clear_policy", unique)


def described(letter: DeadLetter) -> tuple[object, ...]:
    """All that can be read of a dead letter."""
    names = [name for name in DeadLetter.__dataclass_fields__ if not name.startswith("_")]
    return tuple(getattr(letter, name) for name in names)


def make_letters(bench: Bench, queue: str, number: int = MANY) -> None:
    """One that a handler failed on, one that the broker moved, and many others."""
    with bench.subscriber() as subscriber:

        def fail(event: DomainEvent) -> None:
            subscriber.stop_consuming()
            raise Reject("no")

        subscriber.register(fail, queue, ["#"])
        bench.publish("user.registered", "failed on")
        subscriber.start_consuming(timeout=20)
    bench.publish("user.moved", "moved by the broker")
    with onlooker.channel(bench.url) as channel:
        wait_until(lambda: onlooker.count(bench.url, queue) == 1)
        received = channel.basic_get(queue)
        assert received is not None
        channel.basic_reject(received.delivery_tag, requeue=False)
        dead = f"{queue}-dl"
        wait_until(lambda: onlooker.count(bench.url, dead) == 2)
        channel.confirm_delivery()
        for n in range(number - 2):
            body = DomainEvent("a.b", n).to_json().encode()
            channel.basic_publish("", dead, body, Properties(message_id=str(n)))
    wait_until(lambda: onlooker.count(bench.url, dead) == number)


def looks(bench: Bench, queue: str, times: int) -> list[list[tuple[object, ...]]]:
    """Whole walks, and between them such as end with the first."""
    seen = []
    for _ in range(times):
        with DeadLetters(queue, bench.url) as dead_letters:
            seen.append([described(letter) for letter in dead_letters])
        with DeadLetters(queue, bench.url) as dead_letters:
            next(iter(dead_letters))
    return seen


@pytest.mark.usefixtures("policy")
def test_policy_does_not_delete_what_is_looked_at(target: Bench) -> None:
    """It lowers our delivery limit: all are there afterwards, in order, with their reasons."""
    queue = target.names.queue()
    make_letters(target, queue)
    seen = looks(target, queue, 6)
    assert len(seen[0]) == MANY
    assert seen[0][0][3:6] == (queue, "domain_events.retry.Reject", "no")
    assert seen[0][1][2:5] == ("user.moved", queue, "rejected")
    for look in seen[1:]:
        assert look == seen[0]
    assert onlooker.count(target.url, f"{queue}-dl") == MANY
    with DeadLetters(queue, target.url) as dead_letters:
        assert dead_letters.replay_all() == MANY
    replayed = [DomainEvent.from_json(body).data for body in onlooker.take_all(target.url, queue)]
    assert replayed == ["failed on", "moved by the broker", *range(MANY - 2)]


def test_queue_of_another_program_does_not_lose_what_is_looked_at(bench: Bench) -> None:
    """domain-event-broker's, where the vhost makes it a quorum queue with a limit of 20."""
    queue = bench.names.queue()
    with onlooker.channel(bench.url) as channel:
        for name in (queue, f"{queue}-dl"):
            arguments = {"x-queue-type": "quorum", "x-delivery-limit": 20}
            channel.queue_declare(name, durable=True, arguments=arguments)
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["#"], True, queue_type="classic")
    for n in range(20):
        body = DomainEvent("a.b", n).to_json().encode()
        onlooker.publish(bench.url, "", f"{queue}-dl", body, message_id=str(n))
    seen = looks(bench, queue, 15)
    assert [len(look) for look in seen] == [20] * 15
    assert all(look == seen[0] for look in seen)


@pytest.mark.usefixtures("policy")
def test_look_that_is_broken_off_while_it_republishes_loses_nothing(
    target: Bench, killable_node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C; the next look sees each one, once. On 4.3 a look does not count."""
    queue = target.names.queue()
    make_letters(target, queue, 150)
    for _ in range(3):
        with DeadLetters(queue, target.url) as dead_letters:
            seen = [described(letter) for letter in dead_letters]
    published = 0
    republished = envelope.republished

    def interrupted(delivery: RabbitDelivery, place: Place) -> Message:
        nonlocal published
        published += 1
        if published == 120:
            raise KeyboardInterrupt
        return republished(delivery, place)

    def look() -> None:
        with DeadLetters(queue, target.url) as dead_letters:
            list(dead_letters)

    monkeypatch.setattr(walk, "republished", interrupted)
    if not killable_node.version.startswith("4.3"):
        with pytest.raises(KeyboardInterrupt):
            look()
    monkeypatch.undo()
    with DeadLetters(queue, target.url) as dead_letters:
        again = [described(letter) for letter in dead_letters]
    assert sorted(again, key=repr) == sorted(seen, key=repr)


@pytest.mark.usefixtures("policy")
def test_look_that_could_delete_is_refused_to_who_may_not_publish(
    target: Bench, killable_node: Node, unique: str
) -> None:
    """It says why, before anything is lost. On 4.3 a look does not count, and none is refused."""
    queue = target.names.queue()
    make_letters(target, queue, 10)
    killable_node.ctl("add_user", unique, "secret")
    killable_node.ctl("set_permissions", unique, f"^{queue}-dl$", "^$", f"^{queue}-dl$")
    url = target.url.replace("guest:guest", f"{unique}:secret")
    refused = []
    for _ in range(5):
        with DeadLetters(queue, url) as dead_letters:
            try:
                assert len(list(dead_letters)) == 10
            except ConfigurationError as error:
                refused.append(str(error))
    killable_node.ctl("delete_user", unique)
    if killable_node.version.startswith("4.3"):
        assert not refused
    else:
        assert len(refused) == 2
        for words in (queue, "were requeued 3 times", "delivery limit", "amq.default"):
            assert words in refused[0]
    with DeadLetters(queue, target.url) as dead_letters:
        assert len(list(dead_letters)) == 10


WALK = """
import resource, sys
from domain_events import DeadLetters

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

with DeadLetters(sys.argv[1], sys.argv[2], timeout=60) as dead_letters:
    assert dead_letters.count() == 30
    before = peak()
    sizes = [len(letter.body) for letter in dead_letters]
    assert dead_letters.count() == 30
print(len(sizes), sum(sizes), peak() - before)
"""


def test_walk_holds_few_bodies_at_a_time(bench: Bench) -> None:
    """30 dead letters of 8 MB: not 240 MB."""
    queue = bench.names.queue()
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["none"])
    body = b"x" * 8_000_000
    with onlooker.channel(bench.url) as channel:
        channel.confirm_delivery()
        for _ in range(30):
            channel.basic_publish("", f"{queue}-dl", body)
    command = [sys.executable, "-c", WALK, queue, bench.url]
    output = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, timeout=120, env=os.environ
    ).stdout
    number, size, megabytes = map(int, output.split())
    assert (number, size) == (30, 240_000_000)
    assert megabytes < 100


def test_silent_broker_ends_a_walk_in_time(target: Bench, killable_node: Node) -> None:
    """The reply is waited for no longer than the timeout; then the walk is over, nothing lost."""
    queue = target.names.queue()
    make_letters(target, queue, 5)
    with DeadLetters(queue, target.url, timeout=1.0) as dead_letters:
        walk = iter(dead_letters)
        first = next(walk)
        killable_node.pause()
        with sooner_than(60), pytest.raises(BrokerUnavailable):  # the heartbeat
            next(walk)
        with pytest.raises(RuntimeError, match="walk is over"):
            first.discard()
        killable_node.resume()
        wait_until(lambda: onlooker.count(target.url, f"{queue}-dl") == 5)
    with DeadLetters(queue, target.url) as dead_letters:
        assert len(list(dead_letters)) == 5


def test_ctrl_c_while_waiting_for_the_broker(target: Bench, killable_node: Node) -> None:
    """What was asked for and not waited for goes back with the rest, and the close is prompt."""
    queue = target.names.queue()
    make_letters(target, queue, 20)
    with DeadLetters(queue, target.url) as dead_letters:
        before = [described(letter) for letter in dead_letters]
        walk = iter(dead_letters)
        for _ in range(5):
            next(walk)
        killable_node.pause()
        timers = [
            threading.Timer(0.5, _thread.interrupt_main),
            threading.Timer(1.0, killable_node.resume),
        ]
        for timer in timers:
            timer.start()
        with pytest.raises(KeyboardInterrupt):
            list(walk)  # some have arrived before; the rest is waited for
        for timer in timers:
            timer.join()
    assert onlooker.count(target.url, f"{queue}-dl") == 20
    with DeadLetters(queue, target.url) as dead_letters:
        assert [described(letter) for letter in dead_letters] == before


def test_connection_that_was_cut_between_two_walks_is_made_again(
    target: Bench, killable_node: Node
) -> None:
    """The next walk sees all; the letters of the one before are not its own."""
    queue = target.names.queue()
    make_letters(target, queue, 5)
    with DeadLetters(queue, target.url) as dead_letters:
        old = list(dead_letters)
        killable_node.ctl("close_all_connections", "test")
        wait_until(lambda: onlooker.count(target.url, f"{queue}-dl") == 5)
        new = list(dead_letters)
        assert len(new) == 5
        for letter in old:
            with pytest.raises(RuntimeError, match="walk is over"):
                letter.discard()
        new[0].discard()
        assert dead_letters.count() == 4


@pytest.mark.parametrize("message_id", [b"", b"\xff", b"id-1"])
def test_letter_that_cannot_be_replayed_is_left_whatever_its_id(
    bench: Bench, message_id: bytes
) -> None:
    """What the broker returns is known by the id that was sent, be it empty or not text."""
    queue = bench.names.queue()
    with onlooker.channel(bench.url) as channel:
        channel.confirm_delivery()
        channel.queue_declare(f"{queue}-dl", durable=True)
        body = DomainEvent("a.b", 1).to_json().encode()
        channel.basic_publish("", f"{queue}-dl", body, raw.Properties(message_id=message_id))
    with DeadLetters(queue, bench.url) as dead_letters:
        with pytest.raises(TopologyError, match="There is no queue"):
            dead_letters.replay_all()
        assert dead_letters.count() == 1
    assert onlooker.count(bench.url, f"{queue}-dl") == 1
