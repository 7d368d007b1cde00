"""Kills `domain-events migrate` or `rename` (SIGKILL) at each of its steps, and runs it again.

    python tests/migrate_kills.py URL [--command rename [--queue-type quorum]]
        [--every N] [--first N] [--at-once N]

Each step has a subscriber of its own: half of them with a consumer all the time, half without, all
with a publisher all the time, with events and dead letters that waited before. A step is each
change on the broker, before and after it, and some messages that are moved and not acked yet.
Prints a JSON object. BROKEN in the environment breaks what is promised, to see that it is noticed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyamqp

from domain_events import DeadLetters, DomainEvent, Publisher, Retry, Subscriber
from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.administration import Administration, Comparison
from domain_events.broker.rabbitmq.mover import Mover
from domain_events.cli.app import run
from domain_events.cli.moving import Work

# Of each subscriber, before the first run.
WAITING, DEAD_LETTERS = 150, 5
# Of a quorum queue, also so many retries, which are due after so many seconds.
RETRIES, DELAY = 5, 4.0
# Seconds that a handler takes; the consumer holds all of those.
HANDLER = 0.01
# Each so many of the messages that are moved, there is a step.
EVERY_MOVED = 10
# Seconds between two events of a subscriber.
INTERVAL = 0.05
LONGEST_RUN = 120.0


class Steps:
    """Counts, and ends the process with one of them."""

    def __init__(self, last: int) -> None:
        self._numbers = itertools.count(1)
        self._last = last
        self.taken = 0

    def is_next(self) -> bool:
        return self.taken + 1 == self._last

    def step(self) -> None:
        self.taken = next(self._numbers)
        if self.taken == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def run_killed(last: int, arguments: list[str]) -> int:
    """In a process of its own: the command, which is killed at this step."""
    steps = Steps(last)
    take_steps(steps)
    if broken := os.environ.get("BROKEN"):
        BREAK[broken]()
    status = run(arguments)
    print(f"steps {steps.taken}")
    return status


def take_steps(steps: Steps) -> None:
    """At each change on the broker, and among the messages that are moved."""

    def around(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            steps.step()
            try:
                return inner(self, *arguments, **options)
            finally:
                steps.step()

        setattr(owner, name, call)

    for name in (
        "declare",
        "unbind",
        "delete_queue",
        "delete_classic",
        "delete_exchange",
        "replace_classic",
    ):
        around(Administration, name)
    for name in ("start", "stop", "finish", "close"):
        around(Mover, name)
    replace_classic, done = Administration.replace_classic, Mover._done
    moved = itertools.count(1)

    def replace_or_half(self: Administration, queue: Any, *, if_unused: bool) -> bool:
        # It is one write to the socket; yet the broker may stop in the middle.
        if steps.is_next():
            self.delete_queue(queue.name, if_unused=False)
        return replace_classic(self, queue, if_unused=if_unused)

    def some_done(self: Mover, *arguments: Any) -> None:
        if not next(moved) % EVERY_MOVED:
            steps.step()
        done(self, *arguments)

    deliver: Any = Mover._on_delivery
    received = itertools.count(1)

    def some_delivered(self: Any, *arguments: Any) -> None:
        if not next(received) % EVERY_MOVED:
            steps.step()
        deliver(self, *arguments)

    Mover._on_delivery = some_delivered  # type: ignore[assignment, method-assign]
    Administration.replace_classic = replace_or_half  # type: ignore[method-assign]
    Mover._done = some_done  # type: ignore[assignment, method-assign]


def unbind_first() -> None:
    bind = Work._bind

    def broken(self: Work, queue: str) -> None:
        if queue.endswith(".new"):
            self._unbind(self._name)
            time.sleep(0.3)
        bind(self, queue)

    Work._bind = broken  # type: ignore[method-assign]


def ack_first() -> None:
    move: Any = Mover._on_delivery

    def broken(self: Any, *arguments: Any) -> None:
        self._channel.basic_ack(arguments[3])
        self._connection.transport.flush()
        self._tags.acks = lambda _done: []
        move(self, *arguments)

    Mover._on_delivery = broken  # type: ignore[assignment, method-assign]


def delete_what_is_there() -> None:
    replace_classic = Administration.replace_classic

    def broken(self: Administration, queue: Any, *, if_unused: bool) -> bool:
        self.delete_queue(queue.name, if_empty=False, if_unused=False)
        return replace_classic(self, queue, if_unused=if_unused)

    Administration.replace_classic = broken  # type: ignore[method-assign]
    Work._is_unheld = lambda *_, **__: True  # type: ignore[method-assign]


BREAK = {
    "unbind first": unbind_first,
    "ack first": ack_first,
    "delete what is there": delete_what_is_there,
}


@dataclass
class Case:
    """A subscriber that is moved, and what becomes of its events."""

    name: str
    step: int
    live: bool
    sent: list[str] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)
    sent_while_moving: int = 0
    received: list[str] = field(default_factory=list)
    steps: int = 0
    trouble: str = ""


class Matrix:
    """Cases with a publisher, and a consumer of the half of them."""

    def __init__(self, url: str, command: str, queue_type: Any = "classic") -> None:
        self.url = url
        self.queue_type = queue_type
        self.command = command
        self.exchange = f"kills-{secrets.token_hex(3)}"
        self.cases: list[Case] = []
        self._publisher = Publisher(url, self.exchange)
        self._publishing: list[Case] = []
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def new(self, step: int, live: bool) -> Case:
        case = Case(f"{self.exchange}-{len(self.cases)}", step, live)
        self.cases.append(case)
        return case

    def prepare(self, case: Case) -> None:
        """The queues, bound, with events and dead letters."""
        if self.queue_type == "classic":
            self._declare_classic(case)
        else:
            self._retry(case)
        with pyamqp.Connection(self.url) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            for number in range(DEAD_LETTERS):
                event = DomainEvent(f"{case.name}.dead", {"n": number})
                body = event.to_json().encode()
                channel.basic_publish("", f"{case.name}-dl", body, pyamqp.Properties())
        for _ in range(WAITING):
            self._publish(case)

    def _declare_classic(self, case: Case) -> None:
        with pyamqp.Connection(self.url) as connection:
            channel = connection.channel()
            channel.exchange_declare(self.exchange, "topic", durable=True)
            channel.queue_declare(f"{case.name}-dl", durable=True)
            dlx = {"x-dead-letter-exchange": f"{case.name}-dlx"}
            channel.queue_declare(case.name, durable=True, arguments=dlx)
            channel.queue_bind(case.name, self.exchange, f"{case.name}.#")

    def _retry(self, case: Case) -> None:
        subscriber = Subscriber(self.url, self.exchange)

        def fail(event: DomainEvent) -> None:
            case.retried.append(str(event.uuid_string))
            raise Retry(DELAY)

        subscriber.register(fail, case.name, [f"{case.name}.#"], max_retries=1)
        thread = threading.Thread(target=subscriber.start_consuming)
        thread.start()
        try:
            for _ in range(RETRIES):
                self._publish(case)
            wait_for(lambda: set(case.retried) == set(case.sent), "retries")
        finally:
            subscriber.stop_consuming()
            thread.join()

    def _publish(self, case: Case) -> None:
        event = DomainEvent(f"{case.name}.a", {"n": len(case.sent)})
        self._publisher.publish(event)
        case.sent.append(str(event.uuid_string))

    def publish_all_the_time(self) -> None:
        while not self._ended.wait(INTERVAL):
            with self._lock:
                cases = self._publishing.copy()
            for case in cases:
                with self._lock:  # not after `published` has ended
                    if case in self._publishing:
                        self._publish(case)
                        case.sent_while_moving += 1

    @contextmanager
    def published(self, case: Case) -> Iterator[None]:
        with self._lock:
            self._publishing.append(case)
        try:
            yield
        finally:
            with self._lock:
                self._publishing.remove(case)

    @contextmanager
    def consumed(self, case: Case, name: str, queue_type: Any) -> Iterator[None]:
        subscriber = Subscriber(self.url, self.exchange)

        def handle(event: DomainEvent) -> None:
            time.sleep(HANDLER)
            case.received.append(str(event.uuid_string))

        subscriber.register(handle, name, [f"{case.name}.#"], queue_type=queue_type, max_retries=1)
        thread = threading.Thread(target=subscriber.start_consuming)
        thread.start()
        try:
            yield
        finally:
            subscriber.stop_consuming()
            thread.join()

    def run_case(self, case: Case) -> None:
        try:
            self.prepare(case)
            if self.command == "rename":
                self._rename(case)
            else:
                self._migrate(case)
        except Exception as error:  # noqa: BLE001 - the verdict shows it
            case.trouble = f"{type(error).__name__}: {error}"[:2000]
        finally:
            self._delete(case)

    def _migrate(self, case: Case) -> None:
        arguments = ["migrate", case.name, "--binding-key", f"{case.name}.#"]
        with self.published(case):
            if case.live:
                with self.consumed(case, case.name, "classic"):
                    self._kill_and_run(case, arguments)
            else:
                self._kill_and_run(case, arguments)
        self._judge(case, case.name)

    def _rename(self, case: Case) -> None:
        new = f"{case.name}-new"
        arguments = ["rename", case.name, new, "--binding-key", f"{case.name}.#"]
        with self.published(case):
            if not case.live:
                self._kill_and_run(case, arguments)
            else:
                # A deployment: the old process ends while it runs, the new one begins before.
                with ThreadPoolExecutor(1) as executor:
                    with self.consumed(case, case.name, self.queue_type):
                        run = executor.submit(self._kill_and_run, case, arguments)
                        wait_for(lambda: case.sent_while_moving > 2 / INTERVAL)
                        begun = self.consumed(case, new, "quorum")
                        begun.__enter__()
                    try:
                        run.result()
                    finally:
                        begun.__exit__(None, None, None)
        self._judge(case, new)

    def _kill_and_run(self, case: Case, arguments: list[str]) -> None:
        for last in (case.step, 0):
            program = [sys.executable, __file__, "--run", str(last), "--", *arguments]
            program += ["--exchange", self.exchange, "--held-for", "2", "--wait", "60"]
            done = subprocess.run(
                program,
                env={**os.environ, "DOMAIN_EVENTS_URL": self.url},
                capture_output=True,
                text=True,
                timeout=LONGEST_RUN,
                check=False,
            )
            if done.returncode == -signal.SIGKILL and last:
                continue
            if done.returncode:
                raise RuntimeError(f"step {last}: status {done.returncode}: {done.stderr}")
            case.steps = int(done.stdout.rpartition("steps ")[2])
            return

    def _judge(self, case: Case, name: str) -> None:
        """:raises AssertionError: something is lost, or left."""
        with self.consumed(case, name, "quorum"):
            timeout = 10.0 if os.environ.get("BROKEN") else 60.0
            wait_for(
                lambda: set(case.sent) <= set(case.received), f"all of {len(case.sent)}", timeout
            )
        with DeadLetters(name, self.url) as letters:
            found = [letter.event.data["n"] for letter in letters if letter.event is not None]
        assert sorted(set(found)) == list(range(DEAD_LETTERS)), f"dead letters: {found}"
        assert list(dict.fromkeys(found)) == list(range(DEAD_LETTERS)), f"their order: {found}"
        if not case.live and not os.environ.get("BROKEN"):
            numbers = [
                case.sent.index(each)
                for each in dict.fromkeys(case.received)
                if each not in case.retried
            ]
            late = sum(one > other for one, other in itertools.pairwise(numbers))
            assert late <= 2, f"order: {late} events came after later ones"
        with Administration(self.url) as administration:
            for suffix in ("", ".new", ".old", ".dl", ".dlx"):
                left = f"{case.name}.migrate{suffix}"
                assert administration.queue(left) is None, left
                assert not administration.has_exchange(left), left
            result, why = administration.compare(topology.subscriber_queue(name))
            assert result is Comparison.SAME, why

    def _delete(self, case: Case) -> None:
        with pyamqp.Connection(self.url) as connection:
            channel = connection.channel()
            names = [case.name, f"{case.name}-new"]
            for name in [*names, *(f"{each}-dl" for each in names)]:
                channel.queue_delete(name)

    def run(self, points: list[tuple[int, bool]], at_once: int) -> dict[str, Any]:
        thread = threading.Thread(target=self.publish_all_the_time)
        thread.start()
        try:
            with ThreadPoolExecutor(at_once) as executor:
                cases = [self.new(step, live) for step, live in points]
                list(executor.map(self.run_case, cases))
        finally:
            self._ended.set()
            thread.join()
            self._publisher.close()
            declared = topology.all_of([], self.exchange)
            with pyamqp.Connection(self.url) as connection:
                channel = connection.channel()
                for each in declared:
                    if isinstance(each, topology.Exchange):
                        channel.exchange_delete(each.name)
                    elif isinstance(each, topology.Queue):
                        channel.queue_delete(each.name)
        repeated = Counter(
            {case.name: len(case.received) - len(set(case.received)) for case in cases}
        )
        return {
            "cases": len(cases),
            "steps": max(case.steps for case in cases),
            "events": sum(len(case.sent) for case in cases),
            "lost": sum(len(set(case.sent) - set(case.received)) for case in cases),
            "unknown": sum(len(set(case.received) - set(case.sent)) for case in cases),
            "received twice": sum(repeated.values()),
            "most in a case": max(repeated.values()),
            "more than were sent meanwhile": [
                case.name for case in cases if repeated[case.name] > 2 * 32 + case.sent_while_moving
            ],
            "troubles": [
                f"step {case.step}, {'with' if case.live else 'without'} a consumer: {case.trouble}"
                for case in cases
                if case.trouble
            ],
        }


def wait_for(condition: Callable[[], bool], what: str = "", timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(0.02)


def main() -> int:
    if sys.argv[1] == "--run":
        return run_killed(int(sys.argv[2]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("url")
    parser.add_argument("--command", default="migrate")
    parser.add_argument("--queue-type", default="classic")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="if left out, as many as there are")
    parser.add_argument("--at-once", type=int, default=8)
    given = parser.parse_args()
    steps = given.steps
    if not steps:
        whole = Matrix(given.url, given.command, given.queue_type).run([(0, True), (0, False)], 2)
        if whole["troubles"]:
            print(json.dumps(whole))
            return 1
        steps = whole["steps"]
    points = [
        (step, bool(number % 2))
        for number, step in enumerate(range(given.first, steps + 1, given.every))
    ]
    result = Matrix(given.url, given.command, given.queue_type).run(points, given.at_once)
    print(json.dumps(result))
    return 1 if result["troubles"] or result["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
