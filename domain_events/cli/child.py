"""What runs in a process that `supervisor` has started: a subscriber, until it is to stop.

``python -m domain_events.cli.child package.module:subscriber`` is that process of ``domain-events
run``; ``manage.py consume_domain_events --processes N`` starts itself again, and both call `serve`.

Between the two are two pipes, named in the environment:

- *reports*, to the supervisor: JSON lines. ``loaded`` when the subscriber is imported and its
  queues are declared; ``health`` about every second, and at once when it becomes ready; ``ended``
  when consuming has ended in order, and whether on a signal.
- *life*, from the supervisor: the first byte allows it to consume. The end of the file means that
  the supervisor is gone, however it died: then the handlers that run finish, as on SIGTERM.

Threads. The main thread imports, waits for the first byte, and consumes. Two daemon threads begin
before the import: one reports, the other reads from *life*.

Signals. SIGTERM kills it while it imports, when there is nothing to finish; from then on it stops
consuming, at any moment, also before it has begun. SIGINT and SIGHUP of a terminal reach all
processes at once; they are for the supervisor, and ignored here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import queue
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from domain_events.cli import exits
from domain_events.errors import ConfigurationError, DomainEventsError
from domain_events.health import SubscriberHealth
from domain_events.subscriber import Subscriber
from domain_events.text import printable

#: The environment variable with the `Orders`, as JSON.
VARIABLE = "DOMAIN_EVENTS_SUPERVISOR"

#: Signals that a terminal sends to all processes, and that only the supervisor acts on.
OF_THE_TERMINAL = signal.SIGINT, signal.SIGHUP

# Seconds between two looks at whether it is ready, until it is for the first time.
_IMPATIENT = 0.1

# Seconds for the supervisor to read the last report.
_PATIENCE = 5.0

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def is_supervised() -> bool:
    """Whether a supervisor has started this process."""
    return VARIABLE in os.environ


def serve(make_subscriber: Callable[[], Subscriber]) -> None:
    """Make the subscriber, and consume until the supervisor or SIGTERM ends it.

    :raises ConfigurationError: the subscriber cannot be consumed by several processes.
    :raises BaseException: that of ``make_subscriber`` and of ``start_consuming``.
    """
    orders = json.loads(os.environ.pop(VARIABLE))  # not for programs that the handlers start
    loaded: list[Subscriber] = []

    def stop(_number: int, _frame: object) -> None:
        if loaded:
            loaded[0].stop_consuming()
            allowed.put(None)  # it ends as soon as it begins
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    for number in OF_THE_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_TERMINAL)
    _die_with_parent()
    reports = _Reports(orders["reports"], orders["every"])
    allowed = _watch(orders["life"])
    reports.start(loaded)
    subscriber = make_subscriber()
    _check_order(subscriber, orders["processes"])
    loaded.append(subscriber)
    signal.signal(signal.SIGTERM, stop)  # the application may have set another handler
    if subscriber.health().switched_off:
        logging.getLogger("domain_events").warning(
            "The subscriber is switched off, since its connection_settings is None: it gets no "
            "events."
        )
    with _signals_seen() as seen:
        reports.send({"loaded": True, "ordered": _is_ordered(subscriber)})
        allowed.get()
        subscriber.start_consuming()
    reports.send({"ended": True, "signal": signal.SIGTERM in seen}, patience=_PATIENCE)


@contextlib.contextmanager
def _signals_seen() -> Iterator[set[int]]:
    """The signals that have arrived until its end, whoever has handled them."""
    seen: set[int] = set()
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield seen
    finally:
        signal.set_wakeup_fd(before)
        with contextlib.suppress(BlockingIOError):
            seen.update(os.read(read, 4096))
        os.close(read)
        os.close(write)


def _is_ordered(subscriber: Subscriber) -> bool:
    return any(each.options.ordered for each in subscriber.subscriptions)


def _check_order(subscriber: Subscriber, processes: int) -> None:
    ordered = [each.options.name for each in subscriber.subscriptions if each.options.ordered]
    if processes > 1 and ordered:
        raise ConfigurationError(
            f"{', '.join(ordered)}: ordered=True keeps the order of events within one process, "
            f"not among {processes}. Run one process, with Subscriber(workers=...) for more "
            "handlers at a time."
        )


def _die_with_parent() -> None:
    """Have the kernel send SIGTERM when the supervisor dies, also before `_watch` runs."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _watch(life: int) -> queue.SimpleQueue[None]:
    """Puts None at each byte; sends SIGTERM to this process at the end of the file.

    A `SimpleQueue`, since a signal handler may put into it while the same thread waits for it.
    """
    os.set_inheritable(life, False)
    allowed: queue.SimpleQueue[None] = queue.SimpleQueue()

    def watch() -> None:
        while os.read(life, 1):
            allowed.put(None)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="domain-events-life", daemon=True).start()
    return allowed


class _Reports:
    """The pipe to the supervisor, which may be slow, stopped or gone: nothing waits for it."""

    def __init__(self, pipe: int, every: float) -> None:
        os.set_inheritable(pipe, False)
        os.set_blocking(pipe, False)
        self._pipe = pipe
        self._every = every
        self._lock = threading.Lock()
        self._unsent = b""

    def start(self, loaded: list[Subscriber]) -> None:
        """Report about every second; what is in the list as soon as it is there."""
        threading.Thread(
            target=self._run, args=(loaded,), name="domain-events-reports", daemon=True
        ).start()

    def send(self, message: Mapping[str, Any], *, patience: float = 0.0) -> None:
        """Send it; health is dropped if the pipe is full.

        :param patience: seconds to wait until the supervisor has read what is in the pipe.
        """
        with self._lock:
            if self._flush(patience) or "health" not in message:
                self._unsent += json.dumps(message).encode() + b"\n"
                self._flush(patience)

    def _flush(self, patience: float) -> bool:
        """Whether all of it was written."""
        try:
            while self._unsent:
                if patience:
                    writable = select.poll()  # select() takes only numbers below 1024
                    writable.register(self._pipe, select.POLLOUT)
                    writable.poll(patience * 1000)
                self._unsent = self._unsent[os.write(self._pipe, self._unsent) :]
        except BlockingIOError:
            return False
        except OSError:  # the supervisor is gone
            self._unsent = b""
        return True

    def _run(self, loaded: list[Subscriber]) -> None:
        waiting = threading.Event()
        was_ready, sent_at = False, 0.0
        while True:
            health = loaded[0].health() if loaded else None
            is_ready = health is not None and health.ready
            if is_ready is not was_ready or time.monotonic() - sent_at >= self._every:
                was_ready, sent_at = is_ready, time.monotonic()
                self.send({"health": _shown(health), "memory": _memory()})
            waiting.wait(self._every if is_ready else min(_IMPATIENT, self._every))


def _shown(health: SubscriberHealth | None) -> dict[str, Any] | None:
    if health is None:  # it is not imported yet
        return None
    reasons = {"not_alive": health.not_alive, "not_ready": health.not_ready}
    return {**health.as_dict(), **reasons}


def _memory() -> int:
    """How much memory this process uses, in bytes; where there is no /proc, its maximum so far."""
    try:
        resident = Path("/proc/self/statm").read_bytes().split()[1]
    except (OSError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return int(resident) * resource.getpagesize()


# --- the process of `domain-events run` ----------------------------------------------------------


def configure_logging() -> None:
    """Log to stderr from INFO on, if the application has not configured logging."""
    if not logging.getLogger().handlers and not logging.getLogger("domain_events").handlers:
        logging.basicConfig(
            format="%(asctime)s %(process)d %(levelname)s %(message)s", level=logging.INFO
        )


@contextlib.contextmanager
def _nothing_consumed(target: str) -> Iterator[None]:
    """Refuse to consume: the import would not return, and the supervisor would wait for it."""

    def refuse(*_: object, **__: object) -> None:
        raise ConfigurationError(
            f"{target}: the module consumes when it is imported, and `run` does that itself; call "
            "start_consuming() under if __name__ == '__main__'."
        )

    original = Subscriber.start_consuming
    Subscriber.start_consuming = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        Subscriber.start_consuming = original  # type: ignore[method-assign]


def main(target: str) -> int:
    """Run the subscriber; returns the exit status. A user's mistake prints one line."""
    from domain_events.cli.targets import NotImported, load_subscriber  # noqa: PLC0415 - has click

    module = target.partition(":")[0]
    # As with `python -m package.module`: the name of the program, which dead letters show.
    sys.argv = [f"{module.replace('.', '/')}.py"]

    def load() -> Subscriber:
        with _nothing_consumed(target):
            subscriber = load_subscriber(target)
        configure_logging()
        return subscriber

    try:
        serve(load)
    except NotImported as error:
        return _fail(error.message, error.exit_code)
    except DomainEventsError as error:
        return _fail(printable(error, 2000), exits.of(error))
    return exits.OK


def _fail(text: str, status: int) -> int:
    print(f"domain-events: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
