"""One `start_consuming` from the inside: signals, and what is kept of connections that are gone."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from bench import Bench
from support import wait_until

from domain_events import DomainEvent, Subscriber
from domain_events.broker import Settlement
from domain_events.message import Delivery, Message
from domain_events.run import Lanes, Run, Work, signals

EVENTLET = Path(__file__).parent / "programs" / "eventlet_subscriber.py"


class Consumer:
    """One whose connection may be lost: then none of its deliveries is current."""

    def __init__(self) -> None:
        self.lost = False
        self.settled: list[Settlement] = []

    def is_current(self, _delivery: Delivery) -> bool:
        return not self.lost

    def settle(self, _delivery: Delivery, how: Settlement = Settlement.DONE) -> None:
        self.settled.append(how)

    def flush(self) -> None: ...

    def repair(self, *_: Any) -> None: ...

    def stop(self, _timeout: float) -> None: ...


class Consuming:
    """A connection whose consumers are given to it."""

    def consume(self, *_: Any, **__: Any) -> Consumer:
        return Consumer()


def delivery(data: object, about: str | None = None) -> Delivery:
    body = DomainEvent("a.b", data, about).to_json().encode()
    return Delivery("x", "a.b", False, Message("x", "a.b", body), body, data)


@pytest.mark.parametrize("ordered", [False, True])
def test_deliveries_of_lost_connections_do_not_pile_up(ordered: bool) -> None:
    """A handler runs for hours, and the connection is lost a hundred times meanwhile."""
    subscriber = Subscriber("memory://")
    subscriber.register(print, "q", ["#"], prefetch_count=20, ordered=ordered)
    (subscription,) = subscriber._subscriptions
    run = Run(Consuming(), 2, None)  # type: ignore[arg-type]
    run.consume(subscription)
    for _ in range(100):
        consumer = Consumer()
        for number in range(20):
            run._deliver(subscription, delivery(number, "one"), consumer)
        assert run._inbox.qsize() + run._lanes.waiting <= 3 * 20 + 1
        consumer.lost = True
    last = Consumer()
    for number in range(20):
        run._deliver(subscription, delivery(number, "one"), last)
    left = [work for work in run._left_over() if work.consumer is last]
    assert [work.delivery.receipt for work in left] == list(range(20)), "and none of the current"
    subscriber.close()


def test_lane_counts_what_waits_in_it() -> None:
    """Through its whole life."""
    subscriber = Subscriber("memory://")
    subscriber.register(print, "q", ["#"])
    (subscription,) = subscriber._subscriptions
    run = Run(Consuming(), 2, None)  # type: ignore[arg-type]
    lanes: Lanes = run._lanes
    consumer = Consumer()
    for number in range(5):
        lanes.put(Work(subscription, delivery(number, "one"), consumer))
    assert (run._inbox.qsize(), lanes.waiting) == (1, 4)
    (key,) = lanes._lanes
    lanes.done(key)
    assert (run._inbox.qsize(), lanes.waiting) == (2, 3)
    consumer.lost = True
    lanes.drop_stale()
    assert lanes.waiting == 0
    subscriber.close()


def test_handler_that_c_code_has_installed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python could not put it back."""
    run = Run(Consuming(), 1, None)  # type: ignore[arg-type]
    mine = signal.getsignal(signal.SIGINT)
    by_python = {signal.SIGINT: mine}
    monkeypatch.setattr(signal, "getsignal", by_python.get)
    installed: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, _handler: installed.append(number))
    with signals(run):
        assert installed == [signal.SIGINT]
    assert installed == [signal.SIGINT, signal.SIGINT]


def test_signals_are_left_alone_where_they_cannot_be_handled() -> None:
    """In another thread than the main one."""
    run = Run(Consuming(), 1, None)  # type: ignore[arg-type]
    before = signal.getsignal(signal.SIGTERM)
    inside: list[object] = []

    def use() -> None:
        with signals(run):
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
