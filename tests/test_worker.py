"""One `start_consuming` from the inside: signals, and what is kept of connections that are gone."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pika
import pytest
from bench import Bench
from support import wait_until

from domain_events import DomainEvent, Reject, Subscriber
from domain_events.broker import Publication, Settlement, memory
from domain_events.broker.rabbitmq.envelope import RabbitDelivery
from domain_events.forwarding import Forwarder
from domain_events.message import Delivery
from domain_events.worker import KeyedQueues, Work, Worker, signals

EVENTLET = Path(__file__).parent / "programs" / "eventlet_subscriber.py"


class Consumer:
    """One whose connection may be lost: then none of its deliveries is current."""

    consuming_since = None
    unsettled = 0

    def __init__(self) -> None:
        self.lost = False
        self.settled: list[Settlement] = []

    def is_current(self, _delivery: Delivery) -> bool:
        return not self.lost

    def settle(self, _delivery: Delivery, how: Settlement = Settlement.DONE) -> None:
        self.settled.append(how)

    def flush(self) -> None: ...

    def repair(
        self, seconds: float, then: Callable[[bool], None], *, delays: bool = False
    ) -> None: ...

    def stop(self, _timeout: float) -> None: ...


class Consuming:
    """A connection whose consumers are given to it."""

    def consume(self, *_: Any, **__: Any) -> Consumer:
        return Consumer()


def delivery(data: object, about: str | None = None) -> Delivery:
    body = DomainEvent("a.b", data, about).to_json().encode()
    return RabbitDelivery("x", "a.b", False, pika.BasicProperties(), body, data)


def new_worker(threads: int) -> Worker:
    return Worker(Consuming(), Forwarder(lambda: None), threads, None)  # type: ignore[arg-type]


def test_acks_of_what_is_being_forwarded_go_before_the_cancel() -> None:
    """Those behind it may be forgotten: see `broker.rabbitmq.consumer`. The confirms come late."""
    done: list[str] = []
    delay = threading.Event()

    class Ordered(Consumer):
        def settle(self, _delivery: Delivery, how: Settlement = Settlement.DONE) -> None:
            done.append(how.name)

        def stop(self, _timeout: float) -> None:
            done.append("cancel")

    class Delivering(Consuming):
        def consume(self, *given: Any, **_: Any) -> Consumer:
            consumer = Ordered()
            for number in range(3):
                given[2](delivery(number), consumer)
            return consumer

        def failure(self) -> None: ...

    class Publishing:
        def submit(self, publication: Publication) -> None:
            threading.Thread(target=self.confirm, args=(publication,)).start()

        def confirm(self, publication: Publication) -> None:
            assert delay.wait(30)
            publication.on_done(publication)

    def reject(event: DomainEvent) -> None:
        if event.data == 1:
            worker.stop("the test")
            threading.Timer(0.1, delay.set).start()
        raise Reject("no")

    subscriber = Subscriber("memory://")
    subscriber.register(reject, "q", ["#"])
    forwarder = subscriber.forwarder
    forwarder._publishing = Publishing  # type: ignore[assignment]
    worker = Worker(Delivering(), forwarder, 1, None)  # type: ignore[arg-type]
    worker.work(subscriber.subscriptions)
    assert done == ["DONE", "DONE", "cancel", "GIVE_BACK"]
    subscriber.close()


@pytest.mark.parametrize("ordered", [False, True])
def test_deliveries_of_lost_connections_do_not_pile_up(ordered: bool) -> None:
    """A handler runs for hours, and the connection is lost a hundred times meanwhile."""
    subscriber = Subscriber("memory://")
    subscriber.register(print, "q", ["#"], prefetch_count=20, ordered=ordered)
    (subscription,) = subscriber.subscriptions
    worker = new_worker(2)
    worker.consume(subscription)
    for _ in range(100):
        consumer = Consumer()
        for number in range(20):
            worker._deliver(subscription, delivery(number, "one"), consumer)
        assert worker._inbox.qsize() + worker._keyed.waiting <= 3 * 20 + 1
        consumer.lost = True
    last = Consumer()
    for number in range(20):
        worker._deliver(subscription, delivery(number, "one"), last)
    left = [work for work in worker._left_over() if work.consumer == last]
    assert [work.delivery.receipt for work in left] == list(range(20)), "and none of the current"
    subscriber.close()


def test_keyed_queues_count_what_waits_in_them() -> None:
    """Through its whole life."""
    subscriber = Subscriber("memory://")
    subscriber.register(print, "q", ["#"])
    (subscription,) = subscriber.subscriptions
    worker = new_worker(2)
    queues: KeyedQueues = worker._keyed
    consumer = Consumer()
    for number in range(5):
        queues.put(Work(subscription, delivery(number, "one"), consumer))
    assert (worker._inbox.qsize(), queues.waiting) == (1, 4)
    (key,) = queues._queues
    queues.done(key)
    assert (worker._inbox.qsize(), queues.waiting) == (2, 3)
    consumer.lost = True
    queues.drop_stale()
    assert queues.waiting == 0
    subscriber.close()


def test_handler_that_c_code_has_installed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python could not put it back."""
    worker = new_worker(1)
    mine = signal.getsignal(signal.SIGINT)
    by_python = {signal.SIGINT: mine}
    monkeypatch.setattr(signal, "getsignal", by_python.get)
    installed: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, _handler: installed.append(number))
    with signals(worker):
        assert installed == [signal.SIGINT]
    assert installed == [signal.SIGINT, signal.SIGINT]


def testsignals_are_left_alone_where_they_cannot_be_handled() -> None:
    """In another thread than the main one."""
    worker = new_worker(1)
    before = signal.getsignal(signal.SIGTERM)
    inside: list[object] = []

    def use() -> None:
        with signals(worker):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert inside == [before]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="eventlet does not run on Python 3.14")
def test_sigterm_under_eventlet_lets_the_handler_finish(bench: Bench, tmp_path: Path) -> None:
    """There, the current thread is not the main thread, though it is."""
    queue = bench.names.queue()
    output = tmp_path / "output"
    environment = {"DOMAIN_EVENTS_URL": bench.url, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-W", "ignore", str(EVENTLET), queue, bench.exchange]
    with (
        output.open("w") as lines,
        subprocess.Popen(command, stdout=lines, stderr=lines, env=environment) as process,
    ):
        try:
            wait_until(lambda: "ready" in output.read_text())
            bench.publish("user.registered")
            wait_until(lambda: "begin" in output.read_text())
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert output.read_text().split() == ["ready", "begin", "end", "returned"]


def test_second_sigterm_does_not_interrupt_the_close(tmp_path: Path) -> None:
    """The connections are closed in order, and the program goes on behind `start_consuming`."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, threading, time\n"
        "from domain_events import Subscriber\n"
        "from domain_events.broker.memory import MemoryConsuming\n"
        "close = MemoryConsuming.close\n"
        "def slow(self, timeout):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.1)\n"
        "    close(self, timeout)\n"
        "MemoryConsuming.close = slow\n"
        "subscriber = Subscriber('memory://')\n"
        "subscriber.register(print, 'a', ['#'])\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "subscriber.start_consuming()\n"
        "print('returned')\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "returned\n"), done.stderr


def test_connection_that_is_made_while_others_are_closed_is_not_left_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever has asked gets another one, which the next `close` knows of."""
    consuming = memory.Memory.consuming
    closing, made = threading.Event(), threading.Event()

    def slow(broker: memory.Memory, *arguments: Any) -> memory.MemoryConsuming:
        connection = consuming(broker, *arguments)
        if not made.is_set():
            made.set()
            assert closing.wait(30)
        return connection

    monkeypatch.setattr(memory.Memory, "consuming", slow)
    url = f"memory://{uuid4()}"
    subscriber = Subscriber(url)
    thread = threading.Thread(
        target=subscriber.register, args=(print, "a", ["#"]), kwargs={"exclusive": True}
    )
    thread.start()
    assert made.wait(30)
    subscriber.close()
    closing.set()
    thread.join(30)
    subscriber.close()
    with Subscriber(url) as another:
        another.register(print, "a", ["#"], exclusive=True)  # else it would be in use
