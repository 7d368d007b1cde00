"""A program that publishes from several threads, and records the outcomes.

Started by the harness: ``python -m faults.publisher CONFIG``, a JSON object; see `Config`.

SIGTERM shuts it down in order; SIGUSR1 makes it fork, and the child publishes too.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from domain_events import DomainEvent, DomainEventsError, EventNotConfirmed, Publisher
from faults import broken
from faults.kinds import Mix
from faults.records import Recorder, watch

_FORKED_EVENTS = 20
_LONGEST_CHILD = 90
# One in this many events can never be sent.
_INVALID = 300
_TRIES = 4


@dataclass(frozen=True)
class Config:
    """A publisher's configuration, from the harness."""

    name: str
    urls: list[str]
    exchange: str
    folder: str
    seed: str
    threads: int
    pause: float
    batch: int
    batch_pause: float
    timeouts: list[float]
    topics: dict[str, float]
    mix: dict[str, float]
    broken: str
    waiting: int  # publish this many events that wait for a retry until `due`, and nothing else
    due: float
    spread: float


class Program:
    """The publisher of one process, and its threads."""

    def __init__(self, config: Config, name: str, publisher: Publisher) -> None:
        self._config = config
        self._name = name
        self._publisher = publisher
        self.recorder = Recorder(Path(config.folder) / f"{name}.records")
        self.stopping = threading.Event()

    def publish_singly(self, number: int) -> None:
        events = self._events(f"{self._name}-{number}")
        timeouts = self._config.timeouts
        for event in events:
            if self.stopping.is_set():
                return
            self._publish(event, timeouts[number % len(timeouts)])
            self.stopping.wait(self._config.pause)

    def publish_in_batches(self) -> None:
        events = self._events(f"{self._name}-b")
        while not self.stopping.is_set():
            batch = [next(events) for _ in range(self._config.batch)]
            self.publish_many(batch, self._config.timeouts[-1])
            self.stopping.wait(self._config.batch_pause)

    def publish_a_few(self) -> None:
        """Runs in the child of a fork."""
        events = self._events(self._name)
        for _ in range(_FORKED_EVENTS):
            self._publish(next(events), 10.0)

    def publish_waiting(self) -> None:
        """Events whose handler requests a retry that is due at a certain time, or soon after."""
        source = random.Random(self._config.seed)
        due = self._config.due
        for begin in range(0, self._config.waiting, 1000):
            end = min(begin + 1000, self._config.waiting)
            self.publish_many(
                [
                    DomainEvent(
                        "event.later",
                        due + source.uniform(0, self._config.spread),
                        None,
                        f"w{number}",
                    )
                    for number in range(begin, end)
                ],
                60.0,
            )

    def publish_many(self, events: Sequence[DomainEvent], timeout: float) -> None:
        taken_at = 0.0
        taken: list[DomainEvent] = []

        def take() -> Iterator[DomainEvent]:
            nonlocal taken_at
            for event in events:
                self.recorder.write("take", event.uuid_string, event.routing_key)
                taken.append(event)
                taken_at = time.monotonic()
                yield event

        outcome: dict[str, str] = {}
        try:
            self._publisher.publish_many(take(), timeout=timeout)
        except DomainEventsError as error:
            # The outcome of the others is unknown.
            outcome = {event.uuid_string: "Unconfirmed" for event in error.unconfirmed}
            if error.event is not None:
                outcome[error.event.uuid_string] = type(error).__name__
        # The last event that was taken has the latest deadline.
        beyond = time.monotonic() - taken_at - timeout
        for event in taken:
            name = event.uuid_string
            self.recorder.write("done", name, outcome.get(name, "returned"), f"{beyond:.3f}")

    def _publish(self, event: DomainEvent, timeout: float) -> None:
        """Publish it, and publish it again while it is unknown whether it was stored."""
        for _ in range(_TRIES):
            self.recorder.write("take", event.uuid_string, event.routing_key)
            begun = time.monotonic()
            outcome = "returned"
            try:
                self._publisher.publish(event, timeout=timeout)
            except DomainEventsError as error:
                outcome = type(error).__name__
            beyond = time.monotonic() - begun - timeout
            self.recorder.write("done", event.uuid_string, outcome, f"{beyond:.3f}")
            if outcome != EventNotConfirmed.__name__ or self.stopping.is_set():
                return

    def _events(self, prefix: str) -> Iterator[DomainEvent]:
        source = random.Random(f"{self._config.seed} {prefix}")
        mix = Mix(self._config.topics, self._config.mix, source)
        number = 0
        while True:
            number += 1
            invalid = self._config.threads and source.randrange(_INVALID) == 0
            data = {"never": {"JSON"}} if invalid else {"n": number}
            yield DomainEvent(mix.routing_key(), data, None, f"{prefix}-{number}")


def main() -> None:
    config = Config(**json.loads(sys.argv[1]))
    if config.broken:
        broken.make(config.broken)
    # Received one by one below. Blocked before any thread starts, so that all threads inherit this.
    signals = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    publisher = Publisher(config.urls, config.exchange)
    program = Program(config, config.name, publisher)
    watch(program.recorder)
    program.recorder.write("ready")
    if config.waiting:
        program.publish_waiting()
    threads = [
        threading.Thread(target=program.publish_singly, args=(number,), name=f"publish-{number}")
        for number in range(config.threads)
    ]
    if config.batch and config.threads:
        threads.append(threading.Thread(target=program.publish_in_batches, name="publish-many"))
    for thread in threads:
        thread.start()
    children: list[int] = []
    while signal.sigwait(signals) == signal.SIGUSR1:
        children.append(_fork(config, publisher, len(children) + 1))
    program.stopping.set()
    for thread in threads:
        thread.join()
    publisher.close()
    for child in children:
        os.waitpid(child, 0)


def _fork(config: Config, publisher: Publisher, number: int) -> int:
    """Publish from a child as well, with the inherited publisher; returns its process id."""
    child_id = os.fork()
    if child_id:
        return child_id
    status = 1
    try:
        # It ends when its parent does, or when it takes too long.
        signal.alarm(_LONGEST_CHILD)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        child = Program(config, f"{config.name}f{number}", publisher)
        watch(child.recorder)
        child.publish_a_few()
        publisher.close()
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
