"""``domain-events publish``: one event, or as many as there are lines.

**Lines.** Each has its id before it is sent: its own, or a new one. What was not confirmed at the
end is written to a file with these ids, followed by what was not read yet, so that publishing that
file goes on where this has stopped, and subscribers recognize an event that they have got already.

**Signals.** The first Ctrl-C or SIGTERM ends it in order: no more lines are read, and those under
way are waited for. A second one does not wait.

Memory is bounded by the window of `Publisher.publish_many`, and by the longest line.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import stat
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NamedTuple

import click
from rich.progress import Progress

from domain_events import message as messages
from domain_events.cli import exits, options, output
from domain_events.cli.app import Terminated, discard
from domain_events.cli.lines import event_of, record_of, value_of
from domain_events.errors import ConfigurationError, DomainEventsError, InvalidEvent
from domain_events.events import DomainEvent
from domain_events.middleware import Done, Middleware, Outgoing
from domain_events.publisher import Publisher
from domain_events.settings import ConnectionSettings
from domain_events.text import printable

_CHUNK = 256 * 1024
# In JSON, a line may be longer than the body that it becomes.
_LONGEST_LINE = 2 * messages.LARGEST_BODY
# Seconds without another line after which those under way are waited for, so that their outcome is
# known before the next line arrives; and between two looks whether a signal has come.
_IDLE = 0.05
_LOOK = 0.2
# Seconds for which the rest of a pipe is copied after a signal.
_COPY = 5.0
# Confirmed events whose ids are printed together.
_SHOWN_TOGETHER = 500
_FAULTS_SHOWN = 20
# Seconds for closing the connection, to a broker that may hang.
_CLOSE = 1.0


@click.command("publish")
@click.argument("first", required=False, metavar="ROUTING-KEY [DATA] | --lines [FILE]")
@click.argument("second", required=False, metavar="")
@click.option("--object", "object_id", metavar="ID", help="The id of the object it happened to.")
@click.option("--id", "uuid_string", metavar="UUID", help="The event's id. If left out, a new one.")
@click.option(
    "--timestamp", metavar="TIME", help="When it happened: Unix seconds, or ISO 8601. Else now."
)
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="May be repeated.")
@click.option("--lines", is_flag=True, help="Publish each line of FILE, or of stdin.")
@click.option(
    "--rest",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help=(
        "With --lines: where to write what was not published. If left out, to a new file in the "
        "current directory, when it is needed."
    ),
)
@click.option(
    "--mandatory", is_flag=True, help="Fail if no queue is bound for an event's routing key."
)
@click.option(
    "--dry-run", is_flag=True, help="Publish nothing: check the events, and print them as lines."
)
@options.exchange_option
@options.json_option
@options.broker_option
@options.timeout_option
@click.pass_context
def command(
    ctx: click.Context,
    first: str | None,
    second: str | None,
    object_id: str | None,
    uuid_string: str | None,
    timestamp: str | None,
    headers: Sequence[str],
    lines: bool,
    rest: str | None,
    mandatory: bool,
    dry_run: bool,
    exchange: str,
    as_json: bool,
    broker: ConnectionSettings,
    timeout: float,
) -> int | None:
    """Publish an event, and wait until the broker has confirmed it.

    DATA is JSON, @FILE, or - for stdin, from which it is also read if it is left out.

    With --lines, many: each line of FILE, or of stdin, is a JSON object with routing_key and data,
    and perhaps domain_object_id, uuid_string, timestamp, headers, correlation_id, cause, version.

    Prints the ids of the events that are confirmed.
    """
    if not dry_run:
        options.rabbitmq(broker)
    target = _Target(broker, exchange, mandatory, timeout)
    if lines:
        _refuse_options(ctx, "with", ("second", "object_id", "uuid_string", "timestamp", "headers"))
        with _opened(first) as descriptor:
            if dry_run:
                return _check(_Input(descriptor), exchange)
            return _Run(_Input(descriptor), target, as_json).run(rest)
    _refuse_options(ctx, "without", ("rest",))
    if first is None:
        raise click.UsageError("Give a routing key and data, or --lines.")
    envelope = {
        "routing_key": first,
        "data": value_of(_data(second)),
        "domain_object_id": object_id,
        "uuid_string": uuid_string,
        "timestamp": _seconds(timestamp),
        "headers": dict(map(_header, headers)),
    }
    event = event_of(json.dumps(envelope).encode())
    if dry_run:
        messages.from_event(event, exchange, "", mandatory)
        output.record(record_of(event))
        return None
    _publish(event, target)
    if as_json:
        output.record(record_of(event))
    else:
        click.echo(printable(event.uuid_string))
    return None


class _Target(NamedTuple):
    """Where to, and how."""

    broker: ConnectionSettings
    exchange: str
    mandatory: bool
    timeout: float


def _publish(event: DomainEvent[Any], target: _Target) -> None:
    with _publisher(target) as publisher:
        try:
            publisher.publish(event, mandatory=target.mandatory)
        except BaseException as error:
            if not isinstance(error, DomainEventsError) or error.perhaps:
                output.remark(
                    "The event was perhaps sent. To publish the same one again, so that "
                    f"subscribers recognize it: --id {printable(event.uuid_string)} "
                    f"--timestamp {event.timestamp!r}"
                )
            raise


@contextmanager
def _publisher(target: _Target, *middleware: Middleware) -> Iterator[Publisher]:
    publisher = Publisher(
        target.broker, target.exchange, timeout=target.timeout, middleware=middleware
    )
    try:
        yield publisher
    finally:
        publisher.close(_CLOSE)  # nothing is under way any more


# --- the command line ----------------------------------------------------------------------------


def _refuse_options(ctx: click.Context, how: str, names: Iterable[str]) -> None:
    for parameter in ctx.command.params:
        if parameter.name in names and ctx.params[parameter.name]:
            what = parameter.opts[0] if isinstance(parameter, click.Option) else "a second argument"
            raise click.UsageError(f"{what} has no meaning {how} --lines.")


def _data(given: str | None) -> bytes:
    if given is None and sys.stdin.isatty():
        raise click.UsageError("Give the data, as JSON, @FILE, or - for stdin.")
    if given in (None, "-"):
        found = sys.stdin.buffer.read(_LONGEST_LINE + 1)
    elif given is not None and given.startswith("@"):
        with Path(given[1:]).open("rb") as file:
            found = file.read(_LONGEST_LINE + 1)
    else:
        return (given or "").encode("utf-8", "surrogateescape")
    if len(found) > _LONGEST_LINE:
        raise InvalidEvent(f"The data have more than {_LONGEST_LINE:,} bytes.")
    if not found.strip():
        raise InvalidEvent("There are no data, since the input is empty; for none, give {}.")
    return found


def _seconds(given: str | None) -> float | None:
    if given is None:
        return None
    with suppress(ValueError):
        return float(given)
    try:
        # Python 3.10 does not read the Z.
        found = datetime.fromisoformat(given[:-1] + "+00:00" if given.endswith("Z") else given)
    except ValueError:
        raise click.BadParameter(
            f"{printable(repr(given))} is neither Unix seconds nor ISO 8601, such as "
            "2026-01-31T12:00:00Z.",
            param_hint="--timestamp",
        ) from None
    return found.astimezone(timezone.utc).timestamp()


def _header(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not equals:
        raise click.BadParameter(
            f"{printable(repr(given))} is not NAME=VALUE.", param_hint="--header"
        )
    return name, value


@contextmanager
def _opened(name: str | None) -> Iterator[int]:
    """The descriptor of the file, or of stdin."""
    if name in (None, "-"):
        if name is None and sys.stdin.isatty():
            raise click.UsageError("Give the FILE with the lines, or - for stdin.")
        yield sys.stdin.fileno()
        return
    with Path(name or "").open("rb", buffering=0) as file:
        yield file.fileno()


# --- reading -------------------------------------------------------------------------------------


class _Position(NamedTuple):
    """How far the input was taken; replaced as a whole, so that no signal comes in between."""

    data: bytes  # read, and from `start` on not taken
    start: int
    lines: int  # that were taken


class _Input:
    """The lines of a file or a pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = _Position(b"", 0, 0)
        self._ended = False

    @property
    def taken(self) -> int:
        """How many lines were taken."""
        return self._position.lines

    def wait(self, stop: _Stop) -> bool:
        """Wait for the next line; False at the end, and when it is to stop."""
        while not stop.requested:
            if self.next(_LOOK) is not None:
                return True
            if self._ended:
                return False
        return False

    def next(self, seconds: float) -> bytes | None:
        """The next line that is not blank, without taking it; None if there is none in time."""
        while True:
            data, start, lines = self._position
            end = data.find(b"\n", start) + 1 or (len(data) if self._ended else 0)
            if end > start:
                if line := data[start:end].strip():
                    return line
                self._position = _Position(data, end, lines + 1)
            elif len(data) - start > _LONGEST_LINE:
                raise InvalidEvent(f"Line {lines + 1:,} has more than {_LONGEST_LINE:,} bytes.")
            elif self._ended or not self._is_ready(seconds):
                return None
            else:
                chunk = os.read(self._descriptor, _CHUNK)
                self._position = _Position(data[start:] + chunk, 0, lines)
                self._ended = not chunk

    def take(self) -> None:
        """Take the line that `next` has returned."""
        data, start, lines = self._position
        self._position = _Position(data, data.find(b"\n", start) + 1 or len(data), lines + 1)

    def rest(self, enough: Callable[[], bool]) -> Iterator[bytes]:
        """What was not taken, to the end, or until it is enough."""
        yield self._position.data[self._position.start :]
        while not self._ended and not enough():
            if self._is_ready(_LOOK):
                chunk = os.read(self._descriptor, _CHUNK)
                self._ended = not chunk
                yield chunk

    @property
    def ended(self) -> bool:
        """Whether all of it was read."""
        return self._ended

    @property
    def is_file(self) -> bool:
        """Whether it has an end, and need not be waited for."""
        return stat.S_ISREG(os.fstat(self._descriptor).st_mode)

    def _is_ready(self, seconds: float) -> bool:
        return bool(select.select([self._descriptor], [], [], seconds)[0])


def _event_of(line: bytes, number: int, exchange: str) -> DomainEvent[Any]:
    try:
        event = event_of(line)
        messages.from_event(event, exchange, "", False)  # finds all else that can be wrong
    except InvalidEvent as error:
        raise InvalidEvent(f"Line {number:,}: {error}") from error
    return event


def _check(lines: _Input, exchange: str) -> int:
    """Print the events as lines that have their ids and timestamps; what is wrong, to stderr."""
    valid = invalid = 0
    while (line := lines.next(_LOOK)) is not None or not lines.ended:
        if line is None:
            continue
        lines.take()
        try:
            event = _event_of(line, lines.taken, exchange)
        except InvalidEvent as error:
            invalid += 1
            if invalid <= _FAULTS_SHOWN:
                output.remark(printable(error, 1000))
        else:
            valid += 1
            sys.stdout.write(f"{json.dumps(record_of(event))}\n")
    output.remark(f"Valid lines: {valid:,}; invalid: {invalid:,}. Nothing was published.")
    return exits.INVALID if invalid else exits.OK


class _Stop:
    """The first Ctrl-C or SIGTERM requests an orderly stop; the second one interrupts."""

    def __init__(self) -> None:
        self.requested = 0
        self.requested_at = 0.0

    def __enter__(self) -> _Stop:
        self._before = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.requested, self.requested_at = number, time.monotonic()

    @property
    def status(self) -> int:
        """The exit status that stands for the signal."""
        return exits.TERMINATED if self.requested == signal.SIGTERM else exits.INTERRUPTED


# --- publishing lines ----------------------------------------------------------------------------


class _Line(NamedTuple):
    number: int
    event: DomainEvent[Any]


class _Run(Middleware):
    """One ``publish --lines``."""

    def __init__(self, lines: _Input, target: _Target, as_json: bool) -> None:
        self._lines = lines
        self._target = target
        self._as_json = as_json
        self._prints = as_json or not sys.stdout.isatty()
        self._stop = _Stop()
        # Given to `publish_many`, and neither confirmed nor failed yet, in order; and the last one
        # that it has taken.
        self._given: deque[_Line] = deque()
        self._taken: DomainEvent[Any] | None = None
        self._failed: list[_Line] = []
        self._confirmed: list[_Line] = []  # not printed yet
        self._published = 0
        self._bar: Progress | None = None

    def run(self, rest: str | None) -> int:
        """Publish them; returns the exit status, or raises the error that has ended it.

        :param rest: the file for what is not published.
        """
        target, failure = self._target, None
        with self._stop, _reserved(rest) as file:
            with (
                _publisher(target, self) as publisher,
                output.progress("publishing", None) as self._bar,
            ):
                try:
                    while self._lines.wait(self._stop):
                        publisher.publish_many(self._events(), mandatory=target.mandatory)
                        self._show()
                except BaseException as error:  # noqa: BLE001 - it is raised below
                    failure = error
                self._show()
            if failure is None and self._lines.next(0) is None and self._lines.ended:
                output.remark(f"Published: {self._published:,}")
                return exits.OK
            self._report(failure, file)
        if failure is not None:
            raise failure
        return self._stop.status

    def _events(self) -> Iterator[DomainEvent[Any]]:
        """Those that are there; `publish_many` then waits for their confirms."""
        while not self._stop.requested and (line := self._lines.next(_IDLE)) is not None:
            number = self._lines.taken + 1
            event = _event_of(line, number, self._target.exchange)
            self._given.append(_Line(number, event))
            self._lines.take()
            yield event
            if len(self._confirmed) >= _SHOWN_TOGETHER:
                self._show()

    def publishing(self, outgoing: Outgoing) -> Done:
        """`publish_many` has taken it."""
        self._taken = outgoing.event
        return self._done

    def _done(self, error: BaseException | None) -> None:
        """The oldest one is done: it reports them in their order."""
        (self._confirmed if error is None else self._failed).append(self._given[0])
        self._given.popleft()

    def _show(self) -> None:
        """Print the ids of those that are confirmed by now."""
        shown, self._confirmed = self._confirmed, []
        self._published += len(shown)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._published)
        if not self._prints or not shown:
            return
        try:
            sys.stdout.write("".join(f"{self._text(each)}\n" for each in shown))
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads the ids; the events are published all the same
            self._prints = False
            discard(sys.stdout)

    def _text(self, line: _Line) -> str:
        event = line.event
        if not self._as_json:
            return printable(event.uuid_string)
        return json.dumps(
            {
                "line": line.number,
                "uuid_string": event.uuid_string,
                "routing_key": event.routing_key,
            }
        )

    # --- what is left ----------------------------------------------------------------------------

    def _report(self, failure: BaseException | None, file: BinaryIO | None) -> None:
        """Report what became of the lines, and write those that were not published."""
        perhaps, not_sent = self._left(failure)
        left = sorted([*perhaps, *not_sent])
        output.remark(f"Confirmed: {self._published:,}{_confirmed(left, self._lines.taken)}")
        if perhaps:
            output.remark(f"Perhaps sent: {_ranges([each.number for each in perhaps])}")
        after = f"{_ranges([each.number for each in not_sent])}, and " if not_sent else ""
        output.remark(f"Not sent: {after}all from line {self._lines.taken + 1:,} on")
        with _new_rest() if file is None else nullcontext(file) as rest:
            complete = self._write(left, rest)
        name = printable(rest.name, 4096)
        output.remark(f"What was not confirmed is in {name}, with the same ids. To go on:")
        output.remark(f"domain-events publish --lines {shlex.quote(name)}")
        if not complete:
            output.remark(f"The input had not ended; what followed is not in {name}.")
        if self._as_json and self._prints:
            output.record(
                {
                    "published": self._published,
                    "perhaps_sent": [each.number for each in perhaps],
                    "not_sent": [each.number for each in not_sent],
                    "not_sent_from": self._lines.taken + 1,
                    "rest": name,
                }
            )

    def _left(self, failure: BaseException | None) -> tuple[list[_Line], list[_Line]]:
        """The lines that were perhaps sent, and those that surely were not."""
        if self._given and self._given[-1].number > self._lines.taken:
            self._given.pop()  # interrupted while it was taken: it is still in the input
        stored = set(map(id, getattr(failure, "perhaps", ())))
        unsent = set(map(id, getattr(failure, "unconfirmed", ()))) - stored
        if self._given and self._given[-1].event is not self._taken:
            unsent.add(id(self._given[-1].event))
        perhaps: list[_Line] = []
        not_sent: list[_Line] = []
        for each in [*self._failed, *self._given]:
            (not_sent if id(each.event) in unsent else perhaps).append(each)
        return perhaps, not_sent

    def _write(self, left: Iterable[_Line], rest: BinaryIO) -> bool:
        """Write the lines; False: what followed in the input is not among them."""
        for each in left:
            rest.write(f"{json.dumps(record_of(each.event))}\n".encode())
        if not self._lines.is_file:
            output.remark("The rest of the input is copied now, to its end; Ctrl-C stops that.")
        try:
            for chunk in self._lines.rest(self._has_waited):
                rest.write(chunk)
        except (KeyboardInterrupt, Terminated):
            return False
        finally:
            rest.flush()
            os.fsync(rest.fileno())
        return self._lines.ended

    def _has_waited(self) -> bool:
        """Whether a signal has come, and the rest of a pipe was copied for long enough."""
        since = self._stop.requested_at
        return bool(since) and not self._lines.is_file and time.monotonic() > since + _COPY


@contextmanager
def _reserved(name: str | None) -> Iterator[BinaryIO | None]:
    """The file of ``--rest``, opened before anything is published; deleted if it stays empty."""
    if name is None:
        yield None
        return
    path = Path(name)
    if path.exists() and (not path.is_file() or path.stat().st_size):
        raise click.UsageError(
            f"--rest: {printable(name)} exists, and may be all that is left of other events; name "
            "another file."
        )
    with path.open("wb") as file:
        try:
            yield file
        finally:
            if not file.tell():
                path.unlink()


def _new_rest() -> BinaryIO:
    """A new file for what is left, in the current directory, or else among temporary files."""
    name = f"domain-events-rest-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{os.getpid()}.jsonl"
    for folder in (Path(), Path(tempfile.gettempdir())):
        with suppress(OSError):
            return (folder / name).open("xb")
    raise ConfigurationError(
        "What was not confirmed cannot be written: neither the current directory nor that of "
        "temporary files is writable; name a file by --rest."
    )


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers of lines in words, such as ``lines 3, 7-12``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    what = "line" if len(ranges) == 1 and ranges[0][0] == ranges[0][1] else "lines"
    return f"{what} " + ", ".join(f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in ranges)


def _confirmed(left: Sequence[_Line], taken: int) -> str:
    """In words, which lines are confirmed: all that were taken and are not left."""
    others = {each.number for each in left}
    numbers = (number for number in range(1, taken + 1) if number not in others)
    return f" ({_ranges(numbers)})" if taken > len(others) else ""
