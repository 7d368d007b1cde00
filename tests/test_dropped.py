"""Nothing is kept for somebody who no longer waits, or is no more."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import embedded
import onlooker
import pytest
from rabbitmq_node import Node
from support import Names, wait_until

from domain_events import (
    BrokerUnavailable,
    DeadLetters,
    DomainEvent,
    DomainEventsError,
    Publisher,
    Subscriber,
)
from domain_events.broker import Publication
from domain_events.message import Message, ToExchange

LARGE = "x" * 100_000
NUMBER = 500
# Of 50 MB that are given up; a window of an open connection is 16 MB, and may be in its buffers.
ALLOWED = 2 * 2**20


def large(number: int) -> Iterator[DomainEvent]:
    return (DomainEvent("n.n", {"n": n, "x": LARGE}) for n in range(number))


@contextmanager
def keeping_less_than(allowed: int) -> Iterator[None]:
    """What the block leaves behind in memory, without any help of the garbage collector's."""
    gc.collect()
    gc.disable()
    tracemalloc.start(1)
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
        more = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.enable()
    assert more < allowed, f"{more:,} bytes"


@pytest.fixture
def nowhere(unused_port: int) -> Iterator[Publisher]:
    """A publisher whose broker is down."""
    with Publisher(f"amqp://guest:guest@127.0.0.1:{unused_port}/%2F") as publisher:
        yield publisher


def give_up(publisher: Publisher, number: int, timeout: float) -> None:
    """From 50 threads, since each of them waits."""

    def publish(events: list[DomainEvent]) -> None:
        for event in events:
            try:
                publisher.publish(event, timeout=timeout)
            except DomainEventsError:
                failed.append(1)

    failed: list[int] = []
    events = list(large(number))
    threads = [threading.Thread(target=publish, args=(events[n::50],)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(failed) == number


def unconfirmed(publisher: Publisher, events: Iterator[DomainEvent]) -> int:
    """How many of a batch are not published, with its error let go of."""
    with pytest.raises((BrokerUnavailable, KeyboardInterrupt)) as caught:
        publisher.publish_many(events, timeout=0.2)
    number = len(caught.value.unconfirmed)  # type: ignore[attr-defined]
    del caught
    return number


@contextmanager
def waiting_for_an_hour(publisher: Publisher) -> Iterator[None]:
    """An event at the head of the queue, whose sender waits on."""
    errors: list[BaseException] = []

    def publish() -> None:
        try:
            publisher.publish(DomainEvent("n.n", "patient"), timeout=3600)
        except DomainEventsError as error:
            errors.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    rabbit = publisher._publishing()
    wait_until(lambda: rabbit._waiting or rabbit._under_way())  # type: ignore[union-attr]
    yield
    assert not errors  # it waits still
    publisher.close(timeout=0.1)
    thread.join(30)
    assert errors


def test_events_given_up_in_an_outage_are_let_go(nowhere: Publisher) -> None:
    """500 of 100 kB, each at its deadline, behind one that waits for an hour."""
    with waiting_for_an_hour(nowhere), keeping_less_than(ALLOWED):
        give_up(nowhere, NUMBER, timeout=0.05)


def test_batch_given_up_in_an_outage_is_let_go(nowhere: Publisher) -> None:
    """All at once, as soon as the error is let go of."""
    with waiting_for_an_hour(nowhere), keeping_less_than(ALLOWED):
        for _ in range(3):
            assert unconfirmed(nowhere, large(NUMBER)) > 100


def test_interrupted_batch_is_let_go(nowhere: Publisher) -> None:
    """Ctrl-C is a way to wait no longer."""

    def interrupted() -> Iterator[DomainEvent]:
        yield from large(100)
        raise KeyboardInterrupt

    with keeping_less_than(ALLOWED):
        assert unconfirmed(nowhere, interrupted()) == 100


def test_events_that_a_blocked_broker_did_not_take_are_let_go(
    killable_node: Node, unique: str
) -> None:
    """Under a memory alarm too, behind one that was sent and waits for its confirm."""
    with Publisher(killable_node.url, unique) as publisher:
        publisher.publish(DomainEvent("first.one", {}), timeout=30)
        killable_node.ctl("set_vm_memory_high_watermark", "0.00001")
        try:
            with waiting_for_an_hour(publisher):
                wait_until(lambda: "blocks publishers" in publisher._publishing().trouble)  # type: ignore[union-attr]
                with keeping_less_than(ALLOWED):
                    give_up(publisher, NUMBER, timeout=0.05)
                with keeping_less_than(ALLOWED):
                    assert unconfirmed(publisher, large(200)) > 100
        finally:
            killable_node.ctl("set_vm_memory_high_watermark", "0.6")


def test_events_in_flight_to_a_silent_broker_are_let_go(killable_node: Node, unique: str) -> None:
    """They were sent, and never confirmed: what is left is what the connection has not sent yet."""
    with Publisher(killable_node.url, unique) as publisher:
        publisher.publish(DomainEvent("first.one", {}), timeout=30)
        killable_node.pause()
        try:
            with keeping_less_than(ALLOWED):
                for _ in range(20):
                    with suppress(DomainEventsError):
                        publisher.publish(DomainEvent("n.n", LARGE), timeout=0.05)
            flight = publisher._publishing()._main.in_flight  # type: ignore[union-attr]
            assert len(flight) == 20
            assert not any(each.message.body for each in flight.values())
        finally:
            killable_node.resume()


def test_order_of_giving_up_costs_nothing_noticeable(nowhere: Publisher) -> None:
    """Also when the last ones are given up first."""
    rabbit = nowhere._publishing()
    assert rabbit is not None
    publications = [
        Publication(Message(ToExchange(""), "", b""), lambda _: None) for _ in range(4000)
    ]
    for each in publications:
        rabbit.submit(each)
    began = time.thread_time()  # of this thread alone, whatever the load
    for each in reversed(publications):
        assert rabbit.withdraw(each)
    assert time.thread_time() - began < 5
    assert not rabbit._under_way()  # type: ignore[attr-defined]


# --- dropped unclosed ----------------------------------------------------------------------------


def ours() -> list[threading.Thread]:
    """Threads of connections."""
    return [
        each
        for each in threading.enumerate()
        if each.name.startswith("domain-events") and each.name != "domain-events-log"
    ]


@contextmanager
def warned_of(number: int, what: str) -> Iterator[None]:
    """So many ResourceWarnings, each with the object that was dropped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    resources = [each for each in caught if each.category is ResourceWarning]
    assert len(resources) == number, [str(each.message) for each in resources]
    for each in resources:
        assert "unclosed" in str(each.message)
        assert what in str(each.message)
        assert type(each.source).__name__ == what  # for tracemalloc


Make = Callable[[str, str, str], object]


def published(url: str, exchange: str, _name: str) -> Publisher:
    publisher = Publisher(url, exchange)
    publisher.publish(DomainEvent("n.n", {}))
    return publisher


def registered(url: str, exchange: str, name: str) -> Subscriber:
    subscriber = Subscriber(url, exchange)
    subscriber.register(print, name, ["n.#"])
    return subscriber


def counted(url: str, _exchange: str, name: str) -> DeadLetters:
    letters = DeadLetters(name, url)
    letters.count()
    return letters


def walking(url: str, _exchange: str, name: str) -> DeadLetters:
    letters = DeadLetters(name, url)
    next(iter(letters), None)  # the first one holds it, so that others do not see it
    return letters


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (published, "Publisher"),
        (registered, "Subscriber"),
        (counted, "DeadLetters"),
        (walking, "DeadLetters"),
    ],
)
def test_what_is_dropped_unclosed_is_closed_with_a_warning(
    make: Make, what: str, names: Names, broker_url: str, exchange: str
) -> None:
    """At once, without a garbage collection and without waiting; no thread is left."""
    name = names.queue()
    with Subscriber(broker_url, exchange) as subscriber:
        subscriber.register(print, name, ["n.#"])
    onlooker.publish(broker_url, "", f"{name}-dl", b"a dead letter")
    wait_until(lambda: not ours())
    with warned_of(20, what):
        gc.disable()
        try:
            dropped = [make(broker_url, exchange, name) for _ in range(20)]
            assert len(ours()) == 20
            began = time.thread_time()  # of this thread alone, whatever the load
            dropped.clear()
            assert time.thread_time() - began < 2
            wait_until(lambda: not ours(), message="no thread")
        finally:
            gc.enable()
    if make is walking:
        wait_until(lambda: onlooker.count(broker_url, f"{name}-dl") == 1)


def test_dropped_while_there_is_no_broker(unused_port: int) -> None:
    """Its thread would try to connect for ever."""
    with warned_of(1, "Publisher"):
        publisher = Publisher(f"amqp://guest:guest@127.0.0.1:{unused_port}/%2F", timeout=0.2)
        with pytest.raises(BrokerUnavailable):
            publisher.publish(DomainEvent("n.n", {}))
        assert len(ours()) == 1
        del publisher
        wait_until(lambda: not ours())


def test_dropped_by_a_handler_on_its_own_io_thread(publisher: Publisher, broker_url: str) -> None:
    """A garbage collection may run on any thread, those of connections too."""
    with warned_of(1, "Publisher"):
        dropped = [Publisher(broker_url)]
        dropped[0].publish(DomainEvent("nobody.listens", {}))
        link = dropped[0]._publishing()._link  # type: ignore[union-attr]
        link.wake(dropped.clear)
        wait_until(lambda: not dropped and not ours())


def test_no_warning_without_a_connection(broker_url: str, unique: str) -> None:
    """Unused, closed, switched off, or embedded: nothing is open."""
    with warned_of(0, ""):
        Publisher(broker_url)
        Subscriber(broker_url)
        DeadLetters("any", broker_url)
        Publisher(None).publish(DomainEvent("n.n", {}))
        with Publisher(broker_url) as publisher:
            publisher.publish(DomainEvent("nobody.listens", {}))
        del publisher
        url = f"memory://{unique}"
        published(url, "x", "q")
        registered(url, "x", "q")
        counted(url, "x", "q")
        with pytest.raises(Exception, match="exchange"):
            Publisher(broker_url, exchange="")


def test_dropped_walk_of_the_embedded_broker_gives_back_what_it_held(unique: str) -> None:
    """As the end of a connection does: others see the dead letter again."""
    url = f"memory://{unique}"
    with Subscriber(url, "x") as subscriber, DeadLetters("q", url) as others:
        subscriber.register(print, "q", ["n.#"])
        embedded.publish(url, "", "q-dl", b"a dead letter")
        walk = walking(url, "x", "q")
        assert others.count() == 0
        del walk
        assert others.count() == 1


PROGRAM = """
import os, sys, threading, warnings
from domain_events import DeadLetters, DomainEvent, Publisher, Subscriber
warnings.simplefilter("always")
url, name = sys.argv[1], sys.argv[2]
publisher = Publisher(url)
publisher.publish(DomainEvent("nobody.listens", {}))
subscriber = Subscriber(url)
subscriber.register(print, name, ["nobody.at.all"], auto_delete=True, durable=False)
kept = [publisher]
kept.append(kept)  # found by the last garbage collection only
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "always::ResourceWarning"},
    )


def test_no_warning_at_the_end_of_the_program(broker_url: str, names: Names) -> None:
    """What a module keeps until the end need not be closed; and the end is quick."""
    result = run(PROGRAM, broker_url, names.queue())
    assert result.returncode == 0
    assert "domain_events" not in result.stderr
    assert "Error" not in result.stderr


def test_no_warning_in_a_forked_child_for_what_the_parent_has(
    broker_url: str, names: Names
) -> None:
    """The child drops what it inherited; the parent's connection goes on."""
    child = """
import gc
pid = os.fork()
if pid == 0:
    kept.clear()
    del publisher, subscriber
    gc.collect()
    own = Publisher(url)
    own.publish(DomainEvent("nobody.listens", {}))
    print("child", threading.active_count(), flush=True)
    own.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
publisher.publish(DomainEvent("nobody.listens", {}))
print("parent")
"""
    result = run(PROGRAM + child, broker_url, names.queue())
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["child", "2", "parent"]
    assert "unclosed" not in result.stderr
