"""A program whose handlers succeed, fail, ask for retries, sleep and die, and write it down.

Started by the harness: ``python -m faults.subscriber CONFIG``, a JSON object; see `Config`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from domain_events import BrokerUnavailable, DomainEvent, Reject, Retry, Subscriber
from faults import broken
from faults.records import Recorder, watch

#: The exit status of a process that a handler has ended; or it kills itself.
DIED = 86


@dataclass(frozen=True)
class Config:
    """What the harness tells a subscriber."""

    process: str
    name: str  # its queue's
    label: str  # what the records call it
    urls: list[str]
    exchange: str
    binding_key: str
    folder: str
    workers: int
    max_retries: int
    prefetch_count: int | None
    queue_type: str
    slow: list[float]
    broken: str


class Handler:
    """Does what the event's kind asks for, and writes down that it does."""

    def __init__(self, config: Config, recorder: Recorder) -> None:
        self._config = config
        self._recorder = recorder

    def __call__(self, event: DomainEvent) -> None:
        self._record("begin", event)
        try:
            self._handle(event)
        except Exception as error:
            self._record("ended", event, type(error).__name__)
            raise
        self._record("ended", event, "returned")

    def _record(self, word: str, event: DomainEvent, *outcome: str) -> None:
        self._recorder.write(word, self._config.label, event.uuid_string, event.retries, *outcome)

    def _handle(self, event: DomainEvent) -> None:
        _, kind, *rest = event.routing_key.split(".")
        if kind == "slow":
            # The slow handler that is asked for; nothing is waited for.
            time.sleep(random.uniform(*self._config.slow))
        elif kind == "raise":
            raise ValueError("as asked for")
        elif kind == "reject":
            raise Reject("as asked for")
        elif kind == "exhaust" or (kind == "retry" and event.retries < int(rest[0])):
            raise Retry(random.uniform(0.1, 1.5))
        elif kind == "later" and event.retries == 0:
            raise Retry(max(0.1, event.data - time.monotonic()))
        elif kind == "die":
            self._die_once(event)

    def _die_once(self, event: DomainEvent) -> None:
        """The first process of this subscriber that sees the event dies of it."""
        mark = Path(self._config.folder) / f"{self._config.label}-{event.uuid_string}.died"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return
        if random.random() < 0.5:
            os._exit(DIED)
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    config = Config(**json.loads(sys.argv[1]))
    if config.broken:
        broken.make(config.broken)
    recorder = Recorder(Path(config.folder) / f"{config.process}.records")
    watch(recorder)
    subscriber = Subscriber(config.urls, config.exchange, workers=config.workers)
    registered = False
    while not registered:
        try:
            subscriber.register(
                Handler(config, recorder),
                config.name,
                [config.binding_key],
                max_retries=config.max_retries,
                prefetch_count=config.prefetch_count,
                queue_type="classic" if config.queue_type == "classic" else "quorum",
            )
        except BrokerUnavailable:
            continue  # as a service that is started again until its broker is there
        registered = True
    recorder.write("ready")
    subscriber.start_consuming()


if __name__ == "__main__":
    main()
