"""A program whose handlers succeed, fail, request retries, sleep and die, and record it.

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
    handling,
)
from faults import broken, rolling
from faults.kinds import POISON
from faults.records import Recorder, watch

#: The exit status of a process that a handler ended; others kill themselves.
DIED = 86


@dataclass(frozen=True)
class Config:
    """A subscriber's configuration, from the harness."""

    process: str
    name: str  # that of its queue
    label: str  # its name in the records
    urls: list[str]
    exchange: str
    topics: list[str]  # first words of its routing keys
    retired: list[str]  # and of the retired ones
    folder: str
    workers: int
    max_retries: int
    dead_letter: bool
    prefetch_count: int | None
    queue_type: str
    slow: list[float]
    delivery_limit: int  # of the queue; 0: the library's default
    announce: bool  # record what it registers
    broken: str


class Handler:
    """Does what the event's kind requires, and records it."""

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
            # The kind requires a slow handler; this does not wait for a condition.
            time.sleep(random.uniform(*self._config.slow))
        elif kind == "raise":
            raise ValueError("as requested")
        elif kind == "reject":
            raise Reject("as requested")
        elif kind == "exhaust" or (kind == "retry" and event.retries < int(rest[0])):
            raise Retry(random.uniform(0.1, 1.5))
        elif kind == "later" and event.retries == 0:
            raise Retry(max(0.1, event.data - time.monotonic()))
        elif kind == POISON:
            os._exit(DIED)
        elif kind == "die":
            self._die_once(event)

    def _die_once(self, event: DomainEvent) -> None:
        """The first process of this subscriber that receives the event dies."""
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
    # Omitted if there are none: as in a release that does not have the option.
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
            continue  # like a service that is restarted until its broker is available
        registered = True
    recorder.write("ready")
    subscriber.start_consuming()


def _keys(topics: list[str]) -> list[str]:
    return [f"{topic}.#" for topic in topics]


def _hand_back_soon() -> None:
    """An event that only another release lists is dead-lettered after seconds, not minutes."""
    handling._HAND_BACK_DELAYS = rolling.HAND_BACK_DELAYS


def _limit_deliveries(limit: int) -> None:
    """An event that kills its process does so fewer times: each one needs a restart."""
    handling._MOST_FAILURES = limit
    handling._MOST_GIVE_BACKS = limit // 2


if __name__ == "__main__":
    main()
