"""``domain-events tail``: events as they are published, until Ctrl-C.

A subscriber with an exclusive queue, which the broker deletes with its connection, whatever ends
that. It takes events as fast as they come, so that none pile up on the broker: of those that wait
for a slow terminal, or a slow reader of a pipe, the oldest are dropped, and the number is shown.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import click

from domain_events.broker.rabbitmq.administration import Administration
from domain_events.cli import exits, options, output
from domain_events.cli.lines import record_of
from domain_events.errors import ConfigurationError, TopologyError
from domain_events.events import DomainEvent
from domain_events.middleware import ConnectionChange, ConnectionState, Middleware
from domain_events.settings import ConnectionSettings
from domain_events.subscriber import Subscriber
from domain_events.text import printable

# What waits to be printed, at most: events, and characters of them.
_MOST_WAITING = 10_000
_MOST_CHARACTERS = 32 * 2**20
# Characters of an event's data where no terminal has a width.
_LONGEST_DATA = 1000
_MOST_KEYS = 10_000
_OTHERS = "(others)"
_STOP_TIMEOUT = 10.0


@click.command("tail")
@click.argument("binding_keys", nargs=-1, metavar="[BINDING-KEY]...")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="End after N events.")
@click.option(
    "--duration",
    type=options.Number(min=0, min_open=True),
    metavar="SECONDS",
    help="End after so long; with exit status 3 if there were fewer events than --limit.",
)
@click.option("--full", is_flag=True, help="Show the data in full, indented.")
@click.option("--stats", is_flag=True, help="Count the events of each routing key instead.")
@click.option(
    "--every",
    type=options.Number(min=0.1),
    metavar="SECONDS",
    help="With --stats: how often to show them. If left out, at the end.",
)
@click.option(
    "--create",
    is_flag=True,
    help="Declare the exchange if it does not exist yet; it stays.",
)
@options.exchange_option
@options.json_option
@options.broker_option
@options.timeout_option
def command(
    binding_keys: Sequence[str],
    limit: int | None,
    duration: float | None,
    full: bool,
    stats: bool,
    every: float | None,
    create: bool,
    exchange: str,
    as_json: bool,
    broker: ConnectionSettings,
    timeout: float,
) -> int:
    """Show events as they are published: those that a BINDING-KEY matches, such as 'user.*'.

    Without one, all. It has a temporary queue, and takes no event away from anybody. It shows what
    is published while it runs, and nothing earlier. Ctrl-C ends it, with exit status 0.

    The lines of --json can be published again, by publish --lines.
    """
    if every is not None and not stats:
        raise click.UsageError("--every has no meaning without --stats.")
    if not create:
        _check_exchange(broker, exchange, timeout)
    view: _Statistics | _Lines
    if stats:
        view = _Statistics(limit, every, as_json)
    else:
        view = _Lines(limit, _Json() if as_json else _Readable(full))
    deadline = None if duration is None else time.monotonic() + duration
    subscriber = Subscriber(
        options.rabbitmq(broker), exchange, timeout=timeout, middleware=[_Gaps()]
    )
    name = f"domain-events-tail-{os.getpid()}-{secrets.token_hex(4)}"
    with subscriber:
        subscriber.register(
            view.take, name, binding_keys or ("#",), exclusive=True, dead_letter=False
        )
        with _consuming(subscriber, view):
            output.remark(f"Events of {', '.join(map(printable, binding_keys)) or 'all keys'}:")
            with suppress(KeyboardInterrupt):
                view.show(deadline)
        view.finish()
    complete = limit is None or view.shown >= limit or deadline is None
    return exits.OK if complete else exits.PARTIAL


def _check_exchange(broker: ConnectionSettings, exchange: str, timeout: float) -> None:
    """Nothing is to be left behind, also no exchange whose name was mistyped.

    :raises TopologyError: there is none.
    """
    with Administration(options.rabbitmq(broker), timeout=timeout) as administration:
        try:
            exists = administration.has_exchange(exchange)
        except ConfigurationError:
            return  # this user may not look; subscribing shows what is wrong
    if not exists:
        raise TopologyError(
            f"There is no exchange '{printable(exchange)}' on this broker yet: nobody has "
            "published to it or subscribed. Name another one by --exchange, or declare it by "
            "--create."
        )


@contextmanager
def _consuming(subscriber: Subscriber, view: _View) -> Iterator[None]:
    """Consume on another thread, since this one may be held up by the terminal."""

    def consume() -> None:
        try:
            subscriber.start_consuming()
        except BaseException as error:  # noqa: BLE001 - raised by the thread that shows
            view.fail(error)
        else:
            view.fail(None)

    thread = threading.Thread(target=consume, name="domain-events-tail", daemon=True)
    thread.start()
    try:
        yield
    finally:
        subscriber.stop_consuming()
        thread.join(_STOP_TIMEOUT)


class _Gaps(Middleware):
    """Remarks that events were missed while there was no connection, and thus no queue."""

    def __init__(self) -> None:
        self._lost_at: float | None = None

    def connection(self, change: ConnectionChange) -> None:
        if change.purpose != "consuming":
            return
        if change.state is ConnectionState.LOST:
            self._lost_at = time.monotonic()
        elif change.state is ConnectionState.CONNECTED and self._lost_at is not None:
            seconds = time.monotonic() - self._lost_at
            self._lost_at = None
            output.remark(
                f"Connected again after {seconds:.1f} s; events that were published meanwhile are "
                "not shown."
            )


# --- views ---------------------------------------------------------------------------------------


class _View:
    """What becomes of the events. One thread takes them, another one shows them.

    :ivar shown: how many.
    """

    def __init__(self, limit: int | None) -> None:
        self.shown = 0
        self._limit = limit
        self._changed = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None

    def fail(self, error: BaseException | None) -> None:
        """Consuming has ended."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify()

    def take(self, event: DomainEvent[Any]) -> None:
        """The handler."""
        raise NotImplementedError

    def show(self, deadline: float | None) -> None:
        """Show events until there were enough, or time is up."""
        raise NotImplementedError

    def finish(self) -> None:
        """What is shown at the end."""

    def _wait(self, deadline: float | None) -> bool:
        """Wait for a change, with the lock; False when it is over."""
        if self._ended:
            if self._error is not None:
                raise self._error
            return False
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return False
        self._changed.wait(left)
        return True


class _Lines(_View):
    """A line for each event."""

    def __init__(self, limit: int | None, form: _Readable | _Json) -> None:
        super().__init__(limit)
        self._form = form
        self._waiting: deque[str] = deque()
        self._characters = 0
        self._dropped = 0

    def take(self, event: DomainEvent[Any]) -> None:
        text = self._form.text(event)
        with self._changed:
            self._waiting.append(text)
            self._characters += len(text)
            while len(self._waiting) > _MOST_WAITING or (
                self._characters > _MOST_CHARACTERS and len(self._waiting) > 1
            ):
                self._characters -= len(self._waiting.popleft())
                self._dropped += 1
            self._changed.notify()

    def show(self, deadline: float | None) -> None:
        while self._limit is None or self.shown < self._limit:
            with self._changed:
                while not self._waiting:
                    if not self._wait(deadline):
                        return
                most = 100 if self._limit is None else min(100, self._limit - self.shown)
                texts = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
                self._characters -= sum(map(len, texts))
                dropped, self._dropped = self._dropped, 0
            if dropped:
                output.remark(f"{dropped:,} events are not shown: they came faster than this goes.")
            sys.stdout.write("".join(texts))
            sys.stdout.flush()
            self.shown += len(texts)
            if deadline is not None and time.monotonic() > deadline:
                return


class _Json:
    """An event on a line, as `publish --lines` reads it."""

    def text(self, event: DomainEvent[Any]) -> str:
        return json.dumps(record_of(event), default=str) + "\n"


class _Readable:
    """An event for people: time, routing key, id, object, data, in colours on a terminal."""

    def __init__(self, full: bool) -> None:
        self._full = full
        self._on_terminal = sys.stdout.isatty()
        self._colours = self._on_terminal and not os.environ.get("NO_COLOR")

    def text(self, event: DomainEvent[Any]) -> str:
        fields = [
            (_time(event.timestamp), "bright_black"),
            (printable(event.routing_key), "cyan"),
            (printable(event.uuid_string), "bright_black"),
        ]
        if event.domain_object_id is not None:
            fields.append((f"object {printable(event.domain_object_id)}", "yellow"))
        line = "  ".join(self._styled(text, colour) for text, colour in fields)
        if self._full:
            data = json.dumps(event.data, indent=2, ensure_ascii=False, default=str)
            shown = [f"    {printable(each, len(each))}\n" for each in data.split("\n")]
            return f"{line}\n{''.join(shown)}"
        data = json.dumps(event.data, ensure_ascii=False, default=str)
        width = sum(len(text) + 2 for text, _ in fields)
        return f"{line}  {self._cut(data, width)}\n"

    def _cut(self, data: str, width: int) -> str:
        """The data, so that the line fits the terminal, if that is wide enough for any of it."""
        room = _LONGEST_DATA
        if self._on_terminal:
            room = max(shutil.get_terminal_size().columns - width, 20)
        # What is escaped is longer than before.
        shown = printable(data[: room + 1], room + 1)
        return shown if len(shown) <= room else f"{shown[: room - 3]}..."

    def _styled(self, text: str, colour: str) -> str:
        return click.style(text, fg=colour) if self._colours else text


def _time(timestamp: float) -> str:
    try:
        return f"{datetime.fromtimestamp(timestamp).astimezone():%H:%M:%S.%f}"[:-3]
    except (OverflowError, OSError, ValueError):
        return printable(timestamp, 20)


class _Statistics(_View):
    """How many events there were of each routing key, and how many per second."""

    def __init__(self, limit: int | None, every: float | None, as_json: bool) -> None:
        super().__init__(limit)
        self._every = every
        self._as_json = as_json
        self._counts: Counter[str] = Counter()
        self._before: Counter[str] = Counter()
        self._begun = self._since = time.monotonic()

    def take(self, event: DomainEvent[Any]) -> None:
        with self._changed:
            if self._limit is not None and self.shown >= self._limit:
                return
            known = event.routing_key in self._counts or len(self._counts) < _MOST_KEYS
            self._counts[event.routing_key if known else _OTHERS] += 1
            self.shown += 1
            if self.shown == self._limit:
                self._changed.notify()

    def show(self, deadline: float | None) -> None:
        while True:
            ends = [] if deadline is None else [deadline]
            if self._every is not None:
                ends.append(self._since + self._every)
            with self._changed:
                while self._limit is None or self.shown < self._limit:
                    if not self._wait(min(ends, default=None)):
                        break
                else:
                    return
                if self._ended:
                    return
            if deadline is not None and time.monotonic() >= deadline:
                return
            if self._counts != self._before:
                self._print(self._before, self._since)
            self._before, self._since = self._counts.copy(), time.monotonic()

    def finish(self) -> None:
        self._print(Counter(), self._begun)

    def _print(self, before: Counter[str], since: float) -> None:
        """What was counted in all, and the rate since then."""
        seconds = time.monotonic() - since
        with self._changed:
            counts = self._counts.most_common()
        rows = [(key, count, (count - before[key]) / seconds) for key, count in counts]
        if self._as_json:
            at = round(time.time(), 3)
            for key, count, rate in rows:
                found = {"routing_key": key, "events": count, "per_second": round(rate, 3)}
                output.record({"at": at, **found})
            return
        output.table(
            ("routing key", "events", "per second"),
            [(key, f"{count:,}", f"{rate:,.1f}") for key, count, rate in rows],
        )
