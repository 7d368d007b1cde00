"""How late retries are after a crash of the broker, with its default settings and with ours.

Thousands of retries wait; the broker is killed while they fall due, and restarted on a machine that
has other work to do, as is often the case after a crash. After that a few more events request a
short retry. The lateness of a retry is the time from the moment at which it could have been
delivered - when it was due, or when the broker was back, whichever was later - to the moment at
which its handler was called.

RabbitMQ waits ``dead_letter_worker_publisher_confirm_timeout`` before it retries messages that were
being dead-lettered when it restarted; three minutes unless `broker.HAND_ON` is set.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyamqp
from rabbitmq_node import Node

from domain_events import DomainEvent, Publisher, Retry, Subscriber
from faults.broker import HAND_ON
from faults.report import columns

#: By default: retries that wait, and kills of the broker for each release and setting.
EVENTS = 5_000
RUNS = 3

_SPREAD = 1.0  # seconds over which they fall due
_LEAD = 8.0  # seconds from the first publish until the first is due
_KILLED_AFTER = (0.3, 0.6, 0.9)  # seconds after the first was due, in turn
_AFTERWARDS = 200  # events that request a retry once the broker is back
_SHORT = 1.0  # and its delay
# These slow down a start, so that retries are dead-lettered before all queues are recovered: queues
# of other services, and processes that use the CPU.
_OTHERS = 100
_BUSY = 6
# Twice the three minutes, for an event that is caught in two levels.
_PATIENCE = 420.0

DEFAULT, RECOMMENDED = "default", "3 s"


@dataclass(frozen=True)
class Lateness:
    """Seconds within which half, 99 % and all of the retries came."""

    p50: float
    p99: float
    longest: float

    def __str__(self) -> str:
        return f"{self.p50:.1f} / {self.p99:.1f} / {self.longest:.1f} s"


@dataclass(frozen=True)
class Measurement:
    """One kill of one broker."""

    version: str
    setting: str
    waiting: Lateness  # retries that waited when the broker was killed
    afterwards: Lateness  # retries that were requested when it was back


def lateness(seconds: Sequence[float]) -> Lateness:
    """Percentiles by the nearest rank."""
    ordered = sorted(seconds)

    def percentile(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return Lateness(percentile(0.5), percentile(0.99), ordered[-1])


def measure(
    release: str, setting: str, run: int, say: Callable[[str], None], events: int = EVENTS
) -> Measurement:
    """Kill a node once.

    :raises TimeoutError: not all retries came within seven minutes.
    """
    node = Node(release)
    try:
        if setting == RECOMMENDED:
            (node.folder / "advanced.config").write_text(HAND_ON)
        node.start()
        return _measure(node, setting, run, say, events)
    finally:
        node.close()


class _Log:
    """When the handler was first called for each retry."""

    def __init__(self) -> None:
        self.came: dict[str, float] = {}

    def handle(self, event: DomainEvent) -> None:
        if event.retries == 0:
            raise Retry(max(0.1, event.data - time.monotonic()))
        self.came.setdefault(event.uuid_string, time.monotonic())

    def wait(self, events: Sequence[DomainEvent], deadline: float) -> None:
        while missing := sum(event.uuid_string not in self.came for event in events):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{missing:,} retries did not come within {_PATIENCE:.0f} s")
            time.sleep(0.1)  # the handler's thread does the work


def _measure(
    node: Node, setting: str, run: int, say: Callable[[str], None], events: int
) -> Measurement:
    source = random.Random(run)
    log = _Log()
    with _subscribing(node, log), Publisher(node.url, timeout=60.0) as publisher:
        _declare_others(node)
        node.sync()
        first_due = time.monotonic() + _LEAD + events / 1000
        waiting = [
            DomainEvent("event.later", first_due + source.uniform(0, _SPREAD), None, f"w{number}")
            for number in range(events)
        ]
        publisher.publish_many(waiting)
        time.sleep(max(0.0, first_due + _KILLED_AFTER[run % 3] - time.monotonic()))
        node.kill()
        came_before = len(log.came)
        with _busy_machine():
            node.start()
        back = time.monotonic()
        afterwards = [
            DomainEvent("event.later", time.monotonic() + _SHORT, None, f"a{number}")
            for number in range(_AFTERWARDS)
        ]
        publisher.publish_many(afterwards)
        published = time.monotonic()
        log.wait([*waiting, *afterwards], back + _PATIENCE)
    measurement = Measurement(
        node.version,
        setting,
        # Those that came before the kill were not affected.
        lateness(
            [
                came - max(event.data, back)
                for event in waiting
                if (came := log.came[event.uuid_string]) >= back
            ]
        ),
        lateness(
            [log.came[event.uuid_string] - max(event.data, published) for event in afterwards]
        ),
    )
    say(
        f"RabbitMQ {node.version}, {setting}, run {run + 1}: {came_before:,} had come; "
        f"the others {measurement.waiting} late; asked for afterwards {measurement.afterwards}"
    )
    return measurement


def _declare_others(node: Node) -> None:
    with pyamqp.Connection(node.url) as connection:
        channel = connection.channel()
        for number in range(_OTHERS):
            name = f"other-{number}"
            channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
            channel.queue_bind(name, "amq.topic", f"other.{number}")


@contextmanager
def _busy_machine() -> Iterator[None]:
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(_BUSY)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def _subscribing(node: Node, log: _Log) -> Iterator[None]:
    subscriber = Subscriber(node.url)
    subscriber.register(log.handle, "lateness", ["event.later"], max_retries=1)
    thread = threading.Thread(target=subscriber.start_consuming, name="lateness", daemon=True)
    thread.start()
    try:
        yield
    finally:
        subscriber.stop_consuming()
        thread.join(30)


def measure_all(
    releases: Sequence[str], say: Callable[[str], None], events: int = EVENTS, runs: int = RUNS
) -> Iterator[Measurement]:
    """Release after release, with the broker's default and with our setting in turn."""
    for release in releases:
        for run in range(runs):
            for setting in (DEFAULT, RECOMMENDED):
                yield measure(release, setting, run, say, events)


# --- the report ----------------------------------------------------------------------------------


def rst(measurements: Sequence[Measurement], command: str) -> str:
    """A fragment for the documentation."""
    lines = [
        "To reproduce:",
        "",
        ".. code-block:: sh",
        "",
        f"    {command}",
        "",
        "Each cell: half of the retries / 99 in 100 / all of them came within so many seconds.",
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
    ]
    for row in _rows(measurements):
        first, *others = row
        lines.append(f"   * - {first}")
        lines += [f"     - {cell}" for cell in others]
    return "\n".join([*lines, ""])


def _rows(measurements: Sequence[Measurement]) -> Iterator[tuple[str, str, str, str]]:
    yield (
        "RabbitMQ",
        "Timeout",
        "Retries that waited",
        "Retries asked for after the broker's return",
    )
    for each in sorted(
        measurements, key=lambda each: (_numbers(each.version), each.setting != DEFAULT)
    ):
        setting = "3 minutes (default)" if each.setting == DEFAULT else "3 seconds"
        yield (each.version, setting, str(each.waiting), str(each.afterwards))


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".") if number.isdigit()]


def text(measurements: Sequence[Measurement]) -> str:
    """For the terminal."""
    return "\n".join(["", *columns(list(_rows(measurements)))])
