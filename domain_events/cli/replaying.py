"""Replays dead letters slowly, and stops when they fail again. Also for use in Python.

After a batch it waits until the subscriber has taken the events, then looks whether some of them
are dead letters again: those with an id that was replayed here and one replay more. Others that
fail meanwhile do not matter. The first batch is a single event, each further one twice as large.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TypeAlias

from domain_events.cli.pace import Pace
from domain_events.dead_letters import DeadLetter, DeadLetters
from domain_events.errors import DomainEventsError
from domain_events.message import ToSubscriber

#: Chooses some of the dead letters of a walk.
Choose: TypeAlias = Callable[[Iterable[DeadLetter]], Iterable[DeadLetter]]

_POLL_INTERVAL = 0.1
# Seconds that a handler has for the last event of a batch, once its queue is empty.
_SETTLING = 0.5


@dataclass
class Replayed:
    """What became of a replay.

    :ivar number: how many were replayed.
    :ivar failed_again: of these, the ids of those that are dead letters again, with the reason.
    :ivar waiting: how many events were in the subscriber's queue at the last look; None if this
        user may not look.
    :ivar stopped: whether it ended because of them, before all were replayed.
    """

    number: int = 0
    failed_again: dict[str, str] = field(default_factory=dict)
    waiting: int | None = None
    stopped: bool = False


class Replay:
    """Replays dead letters of one walk over ``dead_letters``.

    :param rate: at most so many events each second; None for no limit.
    :param batch: at most so many before it waits and looks.
    :param stop_after: end when so many have failed again; 0 never ends it, and does not look.
    :param patience: seconds to wait after a batch, if its events are not taken sooner.
    :param on_replayed: called after each one.
    """

    def __init__(
        self,
        dead_letters: DeadLetters,
        *,
        rate: float | None = None,
        batch: int = 1000,
        stop_after: int = 3,
        patience: float = 5.0,
        on_replayed: Callable[[], None] = lambda: None,
    ) -> None:
        self._dead_letters = dead_letters
        self._pace = Pace(rate)
        self._slowly = bool(rate)
        self._batch = batch
        self._stop_after = stop_after
        self._patience = patience
        self._on_replayed = on_replayed
        #: What became of it so far; also after an interruption.
        self.result = Replayed()
        # How often each was replayed with this one.
        self._replays: dict[str, int] = {}
        self._expected = 0
        self._next_look = 0.0
        self._started = datetime.now(timezone.utc)
        self._passed_over = False

    def run(self, choose: Choose = iter) -> Replayed:
        """Replay what was there when this began, in the order of ``choose``.

        What failed later is left, by its time: looking may have changed the order.

        :param choose: yields some of the dead letters that it gets, such as a filter does.
        :raises DomainEventsError: as `DeadLetter.replay`; that one and the rest are left.
        """
        while True:
            number, self._passed_over = self.result.number, False
            self._run(iter(choose(self._letters())))
            # Some that are behind the new ones were not reached.
            if self.result.stopped or not self._passed_over or self.result.number == number:
                return self.result

    def _letters(self) -> Iterator[DeadLetter]:
        for letter in self._dead_letters:
            is_new = letter.failed_at is not None and letter.failed_at > self._started
            if is_new or letter.id in self._replays:
                self._passed_over = True
            else:
                yield letter

    def _run(self, letters: Iterator[DeadLetter]) -> None:
        size = 1
        for first in letters:
            if not self.result.number:
                self._expected = self._dead_letters.count()
            elif not self._may_go_on():
                self.result.stopped = True
                return
            batch = itertools.chain([first], itertools.islice(letters, size - 1))
            if self._slowly:
                self._replay_slowly(batch)
            else:
                self._dead_letters.replay_many(batch, self._replayed)
            size = min(size * 2, self._batch)
        if self.result.number:
            self._may_go_on()

    def _replay_slowly(self, letters: Iterable[DeadLetter]) -> None:
        for letter in letters:
            self._pace.step()
            letter.replay()
            self._replayed(letter)

    def _replayed(self, letter: DeadLetter) -> None:
        if letter.id is not None:
            self._replays[letter.id] = letter.replays + 1
        self.result.number += 1
        self._on_replayed()

    def _may_go_on(self) -> bool:
        """Wait until the subscriber has taken them, then look."""
        if not self._stop_after:
            return True
        deadline = time.monotonic() + self._patience
        empty_since: float | None = None
        arrived = False
        while True:
            empty_since = (empty_since or time.monotonic()) if self._is_taken() else None
            now = time.monotonic()
            is_over = now > deadline or (empty_since is not None and now - empty_since > _SETTLING)
            arrived = self._arrived() or arrived
            # Among many others that are left, a look takes seconds.
            if arrived and (is_over or now >= self._next_look):
                arrived = False
                if self._too_many():
                    return False
                self._next_look = now + 5 * (time.monotonic() - now)
            if is_over:
                return True
            time.sleep(_POLL_INTERVAL)

    def _is_taken(self) -> bool:
        consuming = self._dead_letters.connections.consuming()
        assert consuming is not None
        place = ToSubscriber(self._dead_letters.name)
        try:
            self.result.waiting = consuming.count(place, self._patience + 1.0)
        except DomainEventsError:
            self.result.waiting = None  # perhaps this user may not; then the time is waited for
        return self.result.waiting == 0

    def _arrived(self) -> bool:
        """Whether there are more dead letters than at the last look."""
        there = self._dead_letters.count() + self.result.number
        arrived, self._expected = there > self._expected, there
        return arrived

    def _too_many(self) -> bool:
        for letter in self._dead_letters.unreached():
            if letter.id is not None and letter.replays >= self._replays.get(letter.id, 2**31):
                self.result.failed_again[letter.id] = letter.error_type or "unknown"
        return len(self.result.failed_again) >= self._stop_after
