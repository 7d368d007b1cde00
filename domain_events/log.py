"""The library's log lines, isolated from everything else.

Logging runs the application's code: filters, handlers, formatters, record factories. They may
raise (a filter that reads ``flask.request`` on a thread that has none), take long, deadlock with a
thread that waits for this library, or publish an event. None of that may affect the state of a
connection or of a delivery. Therefore:

- Logging never raises. Lines that the application's logging could not write go to standard error,
  with the reason.
- Within `in_background`, which a connection's I/O thread never leaves, lines are handed to a thread
  that does nothing else, so that however long they take, heartbeats and confirms go on.

A line about an event has the attributes of `about` on its ``LogRecord``, so that formatters that
write JSON get them. Their names are this library's own: another one would clash with what an
application's record factory sets, and ``logging`` refuses that.

Threads. ``_Writer`` owns the queue; its thread starts with the first line, and ends soon after the
last. At the program's end the remaining lines get a second.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

from domain_events.process import check_fork, on_fork
from domain_events.text import printable

# The most lines that wait to be written; further ones are counted and dropped.
_MOST_WAITING = 1000
# Seconds without a line after which the writer's thread ends.
_LINGER = 0.5
# The most characters in a line of a traceback.
_LONGEST_LINE = 2000
_FLUSH_TIMEOUT = 1.0

ExcInfo: TypeAlias = (
    BaseException
    | tuple[type[BaseException], BaseException, TracebackType | None]
    | tuple[None, None, None]
    | None
)


#: The attributes of `about`.
About: TypeAlias = Mapping[str, str | None]


def about(subscriber: object, routing_key: object, event_id: object) -> About:
    """The attributes of a line about an event: text on one line, or None if it is not known."""
    return {
        "domain_event_subscriber": None if subscriber is None else printable(subscriber),
        "domain_event_routing_key": None if routing_key is None else printable(routing_key),
        "domain_event_id": None if event_id is None else printable(event_id),
    }


class _Line(NamedTuple):
    logger: logging.Logger
    level: int
    message: str
    arguments: tuple[object, ...]
    exc_info: ExcInfo
    about: About | None = None


class Log:
    """A logger with methods of ``logging.Logger`` that never raise.

    Each takes what the line is about, if it is about an event.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, *arguments: object, about: About | None = None) -> None:
        self._log(logging.DEBUG, message, arguments, about)

    def info(self, message: str, *arguments: object, about: About | None = None) -> None:
        self._log(logging.INFO, message, arguments, about)

    def warning(self, message: str, *arguments: object, about: About | None = None) -> None:
        self._log(logging.WARNING, message, arguments, about)

    def error(
        self,
        message: str,
        *arguments: object,
        exc_info: ExcInfo = None,
        about: About | None = None,
    ) -> None:
        self._log(logging.ERROR, message, arguments, about, exc_info)

    def exception(self, message: str, *arguments: object, about: About | None = None) -> None:
        """An error, with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, message, arguments, about, sys.exc_info())

    def _log(
        self,
        level: int,
        message: str,
        arguments: tuple[object, ...],
        about: About | None,
        exc_info: ExcInfo = None,
    ) -> None:
        line = _Line(self._logger, level, message, arguments, exc_info, about)
        if getattr(_local, "depth", 0):
            _writer.put(line)
        else:
            # From this method's caller's caller, which is where the line was logged.
            _write(line, stacklevel=4)


class _InBackground:
    def __enter__(self) -> None:
        _local.depth = getattr(_local, "depth", 0) + 1

    def __exit__(self, *_error: object) -> None:
        _local.depth -= 1


def in_background() -> _InBackground:
    """Within this block, another thread writes what this one logs."""
    return _IN_BACKGROUND


def redirect(library: str) -> None:
    """Write all lines of another library's loggers on the writer's thread."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and f"{name}.".startswith(f"{library}."):
            _redirect(logger)


def _redirect(logger: logging.Logger) -> None:
    here = logger._log

    def log(
        level: int, message: object, arguments: Any, exc_info: Any = None, *others: Any, **more: Any
    ) -> None:
        if _writer.is_this_thread():
            here(level, message, arguments, exc_info, *others, **more)
        else:
            raised = sys.exc_info() if exc_info is True else exc_info
            _writer.put(_Line(logger, level, str(message), arguments, raised))

    # After the check of the level, and before any code of the application is called: filters,
    # handlers, the record factory.
    logger._log = log  # type: ignore[method-assign, assignment]


def flush(timeout: float = _FLUSH_TIMEOUT) -> bool:
    """Wait until all lines are written; False when time ran out."""
    return _writer.flush(timeout)


class _Writer:
    """Writes lines on a thread of its own."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Reset all state (at first, and in the child of a fork)."""
        # Re-entrant: a finalizer that interrupts `put` may log as well.
        self._changed = threading.Condition(threading.RLock())
        self._lines: deque[_Line] = deque()
        self._dropped = 0
        self._writing = False
        self._thread: threading.Thread | None = None

    def put(self, line: _Line) -> None:
        check_fork()
        with self._changed:
            if len(self._lines) >= _MOST_WAITING:
                self._dropped += 1
                return
            self._lines.append(line)
            if self._thread is not None:
                self._changed.notify()
                return
            thread = threading.Thread(target=self._run, name="domain-events-log", daemon=True)
            try:
                thread.start()
            except BaseException as error:  # noqa: BLE001 - the interpreter is shutting down, say
                self._lines.clear()
                _to_stderr(line, error)
            else:
                self._thread = thread

    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def flush(self, timeout: float) -> bool:
        check_fork()
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._thread is not None and (self._lines or self._writing):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.05))
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._lines:
                    self._changed.wait(_LINGER)
                if not self._lines:
                    self._thread = None
                    return
                line = self._lines.popleft()
                dropped, self._dropped = self._dropped, 0
                self._writing = True
            if dropped:
                lost = "%d log lines were dropped: logging takes too long."
                _write_safely(_Line(line.logger, line.level, lost, (dropped,), None))
            _write_safely(line)
            with self._changed:
                self._writing = False
                self._changed.notify_all()


def _write(line: _Line, stacklevel: int = 1) -> None:
    logger, level, message, arguments, exc_info, about = line
    try:
        if not logger.isEnabledFor(level):
            return
        error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
        if error is None:
            logger.log(level, message, *arguments, stacklevel=stacklevel, extra=about)
            return
        # Before Python 3.11, findCaller() itself skips two frames of logging.
        own = 0 if sys.version_info >= (3, 11) else 2
        file, number, function, _ = logger.findCaller(False, max(1, stacklevel - own))
        exception = (type(error), error, error.__traceback__)
        record = logger.makeRecord(
            logger.name, level, file, number, message, arguments, exception, function, about
        )
        # Formatters use it as it is; an exception's message may contain text of other programs.
        record.exc_text = _printable_traceback(error)
        logger.handle(record)
    except Exception as broken:  # noqa: BLE001 - whatever the application's logging raises
        _to_stderr(line, broken)


def _printable_traceback(error: BaseException) -> str:
    """As Python's, but with each exception's text on one line, without control characters."""
    parts = []
    for part in traceback.format_exception(type(error), error, error.__traceback__):
        text = part.rstrip("\n")
        # Frames and headings have lines of their own; they are indented, or begin a paragraph.
        lines = text.split("\n") if part.startswith((" ", "\n", "Traceback ")) else [text]
        parts += [printable(line, _LONGEST_LINE) for line in lines]
    return "\n".join(parts)


def _write_safely(line: _Line) -> None:
    try:
        _write(line)
    except BaseException as error:  # noqa: BLE001 - sys.exit() in a filter, for example
        _to_stderr(line, error)


def _to_stderr(line: _Line, error: BaseException) -> None:
    with contextlib.suppress(BaseException):  # the application may have replaced sys.stderr
        text = line.message % line.arguments if line.arguments else line.message
        why = f"{type(error).__name__}: {error}"
        print(f"domain_events: {text} (logging failed: {why})", file=sys.stderr)


_local = threading.local()
_IN_BACKGROUND = _InBackground()  # stateless, since it is entered for each operation of a broker
_writer = _Writer()
on_fork(_writer.reset)
atexit.register(_writer.flush, _FLUSH_TIMEOUT)
