"""docs/operating-dead-letters.rst, from the top to the bottom: its commands print what it shows."""

from __future__ import annotations

import os
import pty
import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import onlooker
import pytest
import shell
from rabbitmq_node import Node
from support import wait_until

from domain_events import DomainEvent, Publisher, Subscriber

PAGE = Path(__file__).parent.parent / "docs" / "operating-dead-letters.rst"

# Its lines are those of the tracebacks on the page.
MAILER = '''\
"""Sends mails."""


def send(address):
    _name, _, host = address.partition("@")
    if not host:
        raise ValueError(f"not an address: {address}")
    if host == "example.invalid":
        raise ConnectionError(f"{address}: no route to the mail server")


def welcome(event):
    send(event.data["email"])
'''

# By their order: an event of a server that is away, and one without an address, in turn at first.
AWAY = {2, 4, 6, 8, 10, 12, 14}

VOLATILE = [
    (r"published by: +\S+", "published by: PROGRAM"),
    (r"(?m)^ +[\^~]+$", ""),  # that mark a part of the line above, from Python 3.11 on
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", "TIME"),
    (r"\d{8}T\d{6}Z", "TIME"),
    (r"\bmail-1\b|\b" + re.escape(socket.gethostname()) + r"\b", "HOST"),
]


class Mailer:
    """The service, on a thread: as it was, or mended."""

    def __init__(self, url: str, folder: Path) -> None:
        file = folder / "mailer.py"
        file.write_text(MAILER)
        names: dict[str, object] = {}
        exec(compile(MAILER, str(file), "exec"), names)
        self._subscriber = Subscriber(url)
        self._welcome = names["welcome"]
        self.mended = False
        # With retries, so that there is a place for undelivered ones.
        self._subscriber.register(self.handle, "mailer", ["user.registered"], max_retries=1)
        self._thread = threading.Thread(target=self._subscriber.start_consuming)
        self._thread.start()

    def handle(self, event: DomainEvent) -> None:
        if not self.mended:
            self._welcome(event)  # type: ignore[operator]

    def stop(self) -> None:
        self._subscriber.stop_consuming()
        self._thread.join(60)
        self._subscriber.close()


@pytest.fixture
def mailer(killable_node: Node, tmp_path: Path) -> Iterator[Mailer]:
    """It has failed on twenty events."""
    url = killable_node.url
    mailer = Mailer(url, tmp_path)
    try:
        wait_until(lambda: onlooker.exists(url, "mailer") and onlooker.consumers(url, "mailer"))
        with Publisher(url) as publisher:
            for number in range(1, 21):
                address = f"u{number}@example.invalid" if number in AWAY else f"u{number}"
                user = {"id": number, "country": "DE"}
                data = {"user": user, "email": address}
                publisher.publish(DomainEvent("user.registered", data))
        wait_until(lambda: onlooker.count(url, "mailer-dl") == 20)
        yield mailer
    finally:
        mailer.stop()
        onlooker.delete(url, queues=["mailer", "mailer-dl"])


def sessions() -> Iterator[tuple[str, str]]:
    """Each command of the page, and what it prints there."""
    for block in re.findall(r"\.\. code-block:: console\n\n((?:    .*\n|\n)+)", PAGE.read_text()):
        for session in re.split(r"(?m)^    \$ ", block)[1:]:
            command, _, printed = session.partition("\n")
            yield command, printed


def same(text: str, folder: Path) -> str:
    """Without what is another one each time, and how lines are broken."""
    text = text.replace(str(folder), "/srv/shop")
    for pattern, name in VOLATILE:
        text = re.sub(pattern, name, text)
    return " ".join(text.split())


def typed(url: str, arguments: list[str], folder: Path) -> tuple[str, int]:
    """What a command prints, and its exit status; a question is answered with yes."""
    primary, secondary = pty.openpty()
    try:
        os.write(primary, b"y\n")
        done = subprocess.run(
            [*shell.COMMAND, *arguments],
            cwd=folder,
            env=shell.environment(url),
            stdin=secondary,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(primary)
        os.close(secondary)
    return done.stdout, done.returncode


@pytest.mark.rabbitmq
def test_the_commands_print_what_is_documented(
    mailer: Mailer, killable_node: Node, tmp_path: Path
) -> None:
    """Those without output on the page are run, too."""
    played = []
    for written, printed in sessions():
        command = written.partition("  #")[0]
        arguments = shlex.split(command)[1:]
        # The ten newest succeed when they are replayed, the rest fails again.
        mailer.mended = "replay" in arguments and "--newest" in arguments
        copies = sorted(tmp_path.glob("mailer-dead-letters-*.jsonl"))
        if "import" in arguments:
            arguments[-1] = str(copies[0])
        output, status = typed(killable_node.url, arguments, tmp_path)
        assert status in ((0, 3) if "failed again" in printed else (0,)), output
        if printed.strip():
            # The answer is on the terminal only.
            shown = same(printed.replace("[y/N]: y\n", "[y/N]: "), tmp_path)
            expected = re.escape(shown).replace(r"\.\.\.", ".*")
            assert re.fullmatch(expected, same(output, tmp_path)), f"{command}\n{output}"
        played.append(command)
    assert len(played) == PAGE.read_text().count("\n    $ ") == 10
