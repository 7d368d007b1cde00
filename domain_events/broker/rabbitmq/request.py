"""What a caller's thread asks of the I/O thread, and how it gets its answer."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pika

from domain_events.errors import DomainEventsError


class Answer(concurrent.futures.Future[Any]):
    """What becomes of a request.

    :ivar heard_at: when the broker last took it a step further, or when it was made.
    :ivar trouble: why it was not carried out so far; it is tried again, if somebody waits for it.
    """

    def __init__(self, *, awaited: bool = True) -> None:
        super().__init__()
        self.heard_at = time.monotonic()
        self.awaited = awaited
        self.trouble = ""
        self._steps = 0

    def came_to(self, step: int) -> None:
        """I/O thread. One that is begun again on a new connection counts when it gets further."""
        if step > self._steps:
            self._steps = step
            self.heard_at = time.monotonic()


#: Carried out on the I/O thread, on an open connection; settles the answer sooner or later.
Request: TypeAlias = Callable[[pika.SelectConnection, Answer], None]

#: Has a request carried out and waits for its answer, at most so many seconds.
Call: TypeAlias = Callable[[Request, float], Any]


def succeed(answer: Answer, result: object) -> None:
    # Whoever waited may have given up, and this very moment.
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        answer.set_result(result)


def fail(answer: Answer, error: DomainEventsError) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        answer.set_exception(error)
