"""docs/operating.rst is true: its commands print what it shows, and its exit statuses are ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import shell
from rabbitmq_node import Node
from sqlalchemy import create_engine, text
from test_cli_outbox import Shop

from domain_events import DomainEvent, Publisher
from domain_events.cli import exits
from domain_events.outbox import OUTBOX

PAGE = Path(__file__).parent.parent / "docs" / "operating.rst"
# What is another one each time.
VOLATILE = [
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID"),
    (r"\d\d:\d\d:\d\d\.\d{3}", "TIME"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME"),
    (r"\t\d+ s\t", "\tN s\t"),
    (r"\t[\d.,]+$", "\tRATE"),
]


def test_the_exit_statuses_are_those_of_the_command() -> None:
    documented = {int(each) for each in re.findall(r"^(\d+) {2,}\S", PAGE.read_text(), re.M)}
    assert documented == {value for value in vars(exits).values() if isinstance(value, int)}


def sessions() -> Iterator[tuple[str, list[str]]]:
    """Each command of the page, and the lines that it prints."""
    for block in re.findall(r"\.\. code-block:: console\n\n((?:    .*\n|\n)+)", PAGE.read_text()):
        printed: list[str] = []
        command = ""
        for line in (each[4:] for each in block.splitlines() if each.strip()):
            if line.startswith("$ "):
                if command:
                    yield command, printed
                command, printed = line[2:], []
            else:
                printed.append(line)
        yield command, printed


def same(lines: list[str]) -> list[str]:
    """Without what is another one each time."""
    found = []
    for each in lines:
        line = each
        for pattern, name in VOLATILE:
            line = re.sub(pattern, name, line)
        found.append(line)
    return found


@pytest.fixture
def folder(tmp_path: Path, killable_node: Node) -> Path:
    """One with the database of the page; the command is in its ``bin``."""
    shop = Shop(create_engine(f"sqlite:///{tmp_path / 'shop.db'}"), "domain-events")
    shop.write(1, 2, 3)
    with shop.engine.begin() as connection:
        connection.execute(
            text(
                f"UPDATE {OUTBOX} SET event_id = '{'-'.join(['0' * 8, *['0' * 4] * 3, '0' * 12])}'"
            )
        )
        connection.execute(
            text(
                f"UPDATE {OUTBOX} SET parked = 1.0, error = 'EventRejected: the queue is full', "
                "object_key = '2' WHERE id = 2"
            )
        )
    program = tmp_path / "bin" / "domain-events"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m domain_events "$@"\n')
    program.chmod(0o755)
    return tmp_path


def test_the_commands_print_what_is_documented(folder: Path, killable_node: Node) -> None:
    url = killable_node.url
    path = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    number = 0
    for command, printed in sessions():
        number += 1
        if command.startswith("domain-events tail"):
            found = tail(url, command.replace("'", "").split()[1:])
        else:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=folder,
                env=shell.environment(url, path),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            found = done.stdout.splitlines()
        assert same(found) == same(printed), command
    assert number == PAGE.read_text().count("\n    $ "), "the page is read in another way"


def tail(url: str, arguments: list[str]) -> list[str]:
    with shell.running(url, *arguments) as running:
        running.saw("Events of")
        with Publisher(url) as publisher:
            publisher.publish(DomainEvent("user.registered", {"name": "Ada"}, 42))
            publisher.publish(DomainEvent("user.renamed", {"name": "Grace"}, 42))
        assert running.end() == 0
        return [*running.err, *running.out]
