"""Detects handlers that returned before their work was done. Pure."""

from __future__ import annotations

import inspect
import io
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from types import FunctionType, MethodType

from domain_events.text import printable


def check_finished(result: object) -> None:
    """Check that the result of a handler is not work that is yet to be done.

    :raises TypeError: it is.
    """
    if isinstance(result, Future) and result.done():
        result.result()
        return
    what = _unfinished(result)
    if not what and isinstance(result, list | tuple | set | frozenset | dict):
        # As of [pool.submit(work, each) for each in ...]. No deeper: data may be large.
        values = result.values() if isinstance(result, dict) else result
        what = next(filter(None, map(_unfinished, values)), "")
    if what:
        raise TypeError(f"The handler returned {what}. The event counts as failed.")


def _unfinished(result: object) -> str:
    """Describes unfinished work that was returned; empty if it may be a result."""
    if result is None or isinstance(result, str | bytes | int | float):
        return ""
    if isinstance(result, BaseException) or _is_exception_class(result):
        return f"{printable(repr(result))} instead of raising it"
    if inspect.iscoroutine(result):
        result.close()  # or Python warns that it was never awaited
        return "a coroutine, which nobody runs; call asyncio.run(...) in a plain function"
    if type(result).__module__ == "contextlib":
        return "a context manager that was not entered; a handler is a plain function"
    if inspect.isasyncgen(result):
        return "an asynchronous generator, which nobody iterates over"
    if _is_lazy(result):
        return "a generator or another lazy iterator, which nobody iterates over"
    if isinstance(result, Future):
        return "" if result.done() else "a future whose work is not done; wait for its result()"
    if type(result).__module__ == "multiprocessing.pool":
        return "the result of a pool, which nobody waits for; return what its get() returns"
    if inspect.isawaitable(result):
        return "an awaitable, which nobody awaits; call asyncio.run(...) in a plain function"
    if isinstance(result, threading.Thread) and result.ident is None:
        return "a thread that was not started"
    if isinstance(result, FunctionType | MethodType | partial):
        return "a function, which nobody calls; perhaps register that function"
    return ""


def _is_lazy(result: object) -> bool:
    # A file is not pending work, and a mock only pretends to be an iterator.
    is_file = isinstance(result, io.IOBase)
    return isinstance(result, Iterator) and not is_file and iter(result) is result


def _is_exception_class(result: object) -> bool:
    return isinstance(result, type) and issubclass(result, BaseException)
