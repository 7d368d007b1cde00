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
from typing import Any

from domain_events import (
    BrokerUnavailable,
    DomainEvent,
    Reject,
    Retry,
    Subscriber,
    subscription,
)
from faults import broken, rolling
from faults.kinds import POISON
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
    topics: list[str]  # first words of the routing keys that it lists
    retired: list[str]  # and of those that are to go
    folder: str
    workers: int
    max_retries: int
    dead_letter: bool
    prefetch_count: int | None
    queue_type: str
    slow: list[float]
    delivery_limit: int  # of the queue; 0: the library's
    announce: bool  # write down what it registers
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
        elif kind == POISON:
            os._exit(DIED)
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
    _hand_back_soon()
    if config.delivery_limit:
        _limit_deliveries(config.delivery_limit)
    recorder = Recorder(Path(config.folder) / f"{config.process}.records")
    watch(recorder)
    if config.announce:
        topics, retired = (",".join(each) or "-" for each in (config.topics, config.retired))
        recorder.write("release", topics, retired, config.max_retries, config.dead_letter)
    subscriber = Subscriber(config.urls, config.exchange, workers=config.workers)
    # Not given when there are none: as a release does that knows nothing of it.
    others: dict[str, Any] = {}
    if config.retired:
        others["retired_keys"] = _keys(config.retired)
    registered = False
    while not registered:
        try:
            subscriber.register(
                Handler(config, recorder),
                config.name,
                _keys(config.topics),
                dead_letter=config.dead_letter,
                max_retries=config.max_retries,
                prefetch_count=config.prefetch_count,
                queue_type="classic" if config.queue_type == "classic" else "quorum",
                **others,
            )
        except BrokerUnavailable:
            continue  # as a service that is started again until its broker is there
        registered = True
    recorder.write("ready")
    subscriber.start_consuming()


def _keys(topics: list[str]) -> list[str]:
    return [f"{topic}.#" for topic in topics]


def _hand_back_soon() -> None:
    """An event that another release lists is a dead letter after seconds, not after minutes."""
    subscription._HAND_BACK_DELAYS = rolling.HAND_BACK_DELAYS


def _limit_deliveries(limit: int) -> None:
    """An event that kills its process does so less often: each time takes a start."""
    subscription._MOST_FAILURES = limit
    subscription._MOST_GIVE_BACKS = limit // 2


if __name__ == "__main__":
    main()
