"""Dead letters as JSON lines: copies that can be published again. Also for use in Python."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from domain_events.cli.exits import FileFailed
from domain_events.dead_letters import DeadLetter
from domain_events.errors import InvalidEvent
from domain_events.message import (
    Delivery,
    Destination,
    Failure,
    Message,
    is_header,
)
from domain_events.text import printable
from domain_events.undelivered import UndeliveredEvent


def entry(letter: DeadLetter | UndeliveredEvent, queue: str | None) -> dict[str, Any]:
    """All of a dead letter.

    :param queue: the subscriber that it is a dead letter of, or was undelivered to.
    """
    delivery = letter.delivery
    failure = asdict(delivery.failure)
    if delivery.failure.failed_at is not None:
        failure["failed_at"] = delivery.failure.failed_at.isoformat()
    found = {
        "queue": queue,
        "id": delivery.message_id or letter.id,
        "routing_key": letter.routing_key,
        **_body(letter.body),
        "correlation_id": delivery.correlation_id,
        "cause": delivery.cause,
        "app_id": delivery.app_id,
        "timestamp": delivery.timestamp,
        "version": delivery.version,
        "retries": delivery.retries,
        "replays": delivery.replays,
        "headers": _headers(delivery),
        **failure,
    }
    return {name: value for name, value in found.items() if value is not None}


def as_json(letter: DeadLetter | UndeliveredEvent, queue: str | None) -> dict[str, Any]:
    """The same to be read, with the event as an object."""
    found = entry(letter, queue)
    if letter.event is not None:
        found.pop("body", None)
        found["event"] = letter.event.event_data
    return found


def _body(body: bytes) -> dict[str, str]:
    try:
        return {"body": body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(body).decode()}


def _headers(delivery: Delivery) -> dict[str, Any] | None:
    """Those of the publisher; tables and the like, which only other programs send, as text."""
    headers = delivery.foreign_headers
    return {
        str(name): value if is_header(name, value) else repr(value)
        for name, value in headers.items()
    } or None


def message(saved: Mapping[str, Any], destination: Destination, *, replay: bool = False) -> Message:
    """The message that an entry is a copy of.

    :param replay: without its failure, and with a replay more.
    :raises InvalidEvent: it is not such an entry.
    """
    try:
        if "body" in saved:
            body = saved["body"].encode()
        else:
            body = base64.b64decode(saved["body_base64"], validate=True)
        failure = {each.name: saved.get(each.name) for each in fields(Failure)}
        if failure["failed_at"] is not None:
            failure["failed_at"] = datetime.fromisoformat(failure["failed_at"])
        return Message(
            destination,
            _text(saved["routing_key"]),
            body,
            saved.get("id"),
            saved.get("correlation_id"),
            saved.get("timestamp"),
            saved.get("app_id"),
            mandatory=True,  # a queue must take it
            cause=saved.get("cause"),
            retries=0 if replay else int(saved.get("retries", 0)),
            failure=Failure() if replay else Failure(**failure),
            version=int(saved.get("version", 1)),
            replays=int(saved.get("replays", 0)) + replay,
            headers={
                name: value
                for name, value in saved.get("headers", {}).items()
                if is_header(name, value)
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidEvent(
            f"Not a copy of a dead letter: {type(error).__name__} {error}"
        ) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is needed, not {type(value).__name__}")
    return value


def read(file: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The number of each line, and its entry; None for one that was not written to its end."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        yield number, found if isinstance(found, dict) else None


class Archive:
    """A file that copies are added to; they are on the disk when `add` returns.

    :param path: a file that does not exist, or one with copies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Add these.

        :raises FileFailed: the file cannot be written.
        """
        lines = b"".join(json.dumps(each).encode() + b"\n" for each in entries)
        try:
            file = self._file or self._open()
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise FileFailed(
                f"Copies cannot be written to {printable(self.path)}: {error.strerror}. Nothing "
                "is deleted without its copy; name another file with --to."
            ) from error

    def _open(self) -> IO[bytes]:
        # Events are nobody else's business, so other users must not read it.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._file = file = os.fdopen(descriptor, "a+b")
        if size := file.seek(0, os.SEEK_END):
            # Of a process that was killed, the last line may have no end.
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        if os.name == "posix":
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)  # otherwise the file may be there without its name
            finally:
                os.close(directory)
        return file

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of what could not be written, `add` has raised
                self._file.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
