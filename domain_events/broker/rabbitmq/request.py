"""What a caller's thread asks of the I/O thread, and how it gets its answer: a future."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import pika

from domain_events.errors import DomainEventsError

Result = TypeVar("Result")

#: Carried out on the I/O thread, on an open connection; settles the future sooner or later.
Request: TypeAlias = Callable[[pika.SelectConnection, "concurrent.futures.Future[Any]"], None]

#: Has a request carried out and waits for its answer, at most so many seconds.
Call: TypeAlias = Callable[[Request, float], Any]


def succeed(future: concurrent.futures.Future[Result], result: Result) -> None:
    # Whoever waited may have given up, and this very moment.
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        future.set_result(result)


def fail(future: concurrent.futures.Future[Any], error: DomainEventsError) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        future.set_exception(error)
