"""A program for tests of the metrics: several processes, forks, signals.

Usage: metered.py SCENARIO
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.multiprocess import mark_process_dead

from domain_events import (
    DomainEvent,
    Operation,
    Outgoing,
    Publisher,
    Subscriber,
    configure,
    publish_domain_event,
)
from domain_events.prometheus import Prometheus, serve

NAME = "metered"
prometheus = Prometheus()
configure("memory://", middleware=[prometheus])


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"domain_events_{name}", labels) or 0.0


def started(handler: Callable[[DomainEvent[Any]], object]) -> Subscriber:
    subscriber = Subscriber()
    subscriber.register(handler, NAME, ["#"])
    threading.Thread(target=subscriber.start_consuming, daemon=True).start()
    return subscriber


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------ scenarios


def processes() -> None:
    """Two processes handle three events each, and then one that takes forever."""
    context = multiprocessing.get_context("fork")
    publish_domain_event("before.the.fork", {})
    busy = context.Semaphore(0)

    def handle(event: DomainEvent[Any]) -> None:
        if event.data == "hang":
            busy.release()
            threading.Event().wait(600)

    def work() -> None:
        started(handle)
        with Publisher() as publisher:
            publisher.publish_many([DomainEvent("a", n) for n in range(3)])
            until(lambda: value_of_this_process() == 3)
            publish_domain_event("a", "hang")
        threading.Event().wait(600)

    def value_of_this_process() -> float:
        return value("delivered_total", subscriber=NAME, outcome="handled", exception="")

    def show() -> None:
        import urllib.request

        url = f"http://127.0.0.1:{server.port}/metrics"
        print(urllib.request.urlopen(url, timeout=30).read().decode(), end="")

    children = [context.Process(target=work) for _ in range(2)]
    for child in children:
        child.start()
    with serve(0, "127.0.0.1") as server:
        for _ in children:
            assert busy.acquire(timeout=60)
        show()
        for child in children:
            child.kill()
            child.join(60)
            assert child.pid is not None
            mark_process_dead(child.pid)  # type: ignore[no-untyped-call]
            print("=====")
            show()


def unwritable() -> None:
    """The directory of the metrics is deleted before the first event."""
    shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    handled: list[DomainEvent[Any]] = []
    started(handled.append)
    with Publisher() as publisher:
        publisher.publish_many([DomainEvent("a", n) for n in range(100)])
    until(lambda: len(handled) == 100)
    print("handled", len(handled))


def forks() -> None:
    """Children publish; in the parent, threads do it all the time."""
    stop = threading.Event()

    def publish() -> None:
        outgoing = Outgoing(Operation.PUBLISH, DomainEvent("a"), {}, "x")
        while not stop.is_set():
            prometheus.publishing(outgoing)(None)

    threads = [threading.Thread(target=publish, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)  # ends a child that is stuck
            prometheus.publishing(Outgoing(Operation.PUBLISH, DomainEvent("a"), {}, "x"))(None)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    stop.set()


def child() -> None:
    """A child is forked by a handler, while the parent has connections."""
    published = {"owner": "publisher", "purpose": "publishing"}
    result: list[int] = []

    def handle(_: DomainEvent[Any]) -> None:
        assert value("in_progress", subscriber=NAME) == 1
        assert value("connected", **published) == 1
        pid = os.fork()
        if pid == 0:
            try:
                publish_domain_event("from.the.child", {})
                assert value("in_progress", subscriber=NAME) == 0
                assert value("oldest_handler_start_time_seconds", subscriber=NAME) == float("inf")
                assert value("connected", **published) == 1
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        result.append(os.waitpid(pid, 0)[1])

    started(handle)
    publish_domain_event("a", {})
    until(lambda: result)
    assert result == [0]


def signals() -> None:
    """A signal handler updates what the main thread is updating."""
    outgoing = Outgoing(Operation.PUBLISH, DomainEvent("a"), {}, "x")
    from_signals = Outgoing(Operation.RETRY, DomainEvent("a"), {}, subscriber=NAME)
    interrupted = 0

    def on_signal(*_: object) -> None:
        nonlocal interrupted
        interrupted += 1
        prometheus.publishing(outgoing)(None)
        prometheus.publishing(from_signals)(None)

    signal.signal(signal.SIGALRM, on_signal)
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    watchdog = threading.Timer(60, os._exit, [3])
    watchdog.daemon = True
    watchdog.start()
    while interrupted < 20_000:
        prometheus.publishing(outgoing)(None)
    signal.setitimer(signal.ITIMER_REAL, 0)
    prometheus.publishing(outgoing)(None)
    labels = {"exchange": "", "subscriber": NAME, "outcome": "confirmed", "exception": ""}
    print(interrupted, int(value("published_total", operation="retry", **labels)))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
