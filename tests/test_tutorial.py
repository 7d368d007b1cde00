"""The tutorial, step by step on a RabbitMQ of its own: it shows what comes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import shell
from rabbitmq_node import Node
from support import wait_until

from domain_events.broker.rabbitmq.administration import Administration

ROOT = Path(__file__).parent.parent
FILES = ROOT / "examples" / "tutorial"
PAGE = (ROOT / "docs" / "tutorial.rst").read_text()


class Desk:
    """A folder with the files of the tutorial, and terminals."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self._environment = {
            **os.environ,
            "DOMAIN_EVENTS_URL": url,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(ROOT),
        }
        # Without what measures coverage: its remarks are on no page.
        for name in [
            each for each in self._environment if each.startswith(("COVERAGE_", "PYTEST_"))
        ]:
            del self._environment[name]

    def write_mailer(self, number: int) -> None:
        """As the page has it in its next step."""
        shutil.copy(FILES / f"mailer_{number}.py", self.folder / "mailer.py")
        # Of the same second and the same size, it would be taken for the one before.
        shutil.rmtree(self.folder / "__pycache__", ignore_errors=True)

    @contextmanager
    def running(self, *command: str) -> Iterator[Callable[[], str]]:
        """A program in a terminal of its own, and what it has printed; ended as by Ctrl-C."""
        output = self.folder / f"output-{time.monotonic_ns()}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env=self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            yield output.read_text
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait(10)

    def run(self, *command: str) -> str:
        """A command that ends well; what it prints."""
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def on_terminal(self, *arguments: str) -> str:
        """What the command prints on a terminal of 80 columns, without colours."""
        with shell.on_terminal(
            self._environment["DOMAIN_EVENTS_URL"],
            *arguments,
            more={"NO_COLOR": "1"},
            cwd=self.folder,
            stderr=subprocess.DEVNULL,
        ) as command:
            assert command.end() == 0
        return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(command.out))


def shown(name: str) -> str:
    """What the page shows, with stars for what differs each time."""
    return stars((FILES / name).read_text())


def stars(text: str) -> str:
    """The text without ids, times and the width of columns."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "*", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d([+-]\d\d:\d\d)?", "*", text)
    return re.sub(r"[ \t]+", " ", text).strip()


@pytest.mark.slow
def test_tutorial_works_word_by_word(own_node: Node, tmp_path: Path) -> None:
    shutil.copy(FILES / "shop.py", tmp_path)
    shutil.copy(FILES / "test_mailer.py", tmp_path)
    desk = Desk(tmp_path, own_node.url)
    command = "-m", "domain_events"

    desk.write_mailer(1)
    # A queue exists from the first start on, and keeps what is published later.
    with desk.running("mailer.py") as printed, Administration(own_node.url) as broker:
        wait_until(lambda: broker.queue("welcome-mail"))
        assert stars(desk.run("shop.py", "ada@example.org")) == shown("shop.txt")
        wait_until(lambda: "Welcome, ada@example.org" in printed())
    desk.run("shop.py", "bob@example.org")
    with desk.running("mailer.py") as printed:
        wait_until(lambda: "Welcome, bob@example.org" in printed())

    desk.write_mailer(2)
    with desk.running("mailer.py") as printed:
        desk.run("shop.py", "ada@example.org")
        wait_until(lambda: stars(printed()) == shown("mailer_2.txt"))
        desk.run("shop.py", "ada-at-example.org")
        wait_until(lambda: "ValueError" in printed())

        listed = [""]

        def is_listed() -> bool:
            listed[0] = stars(desk.on_terminal("dead-letters", "list", "welcome-mail"))
            return "ValueError" in listed[0]

        wait_until(is_listed, 120)
        assert listed[0] == shown("dead_letters.txt")

    desk.write_mailer(3)
    with desk.running("mailer.py") as printed:
        replayed = desk.run(*command, "dead-letters", "replay", "welcome-mail", "--yes")
        assert stars(replayed) == shown("replayed.txt")
        wait_until(lambda: "Welcome, ada-at-example.org" in printed())

    # Some packages install their tests. Of a virtual environment that is itself the folder where
    # the page runs pytest, pytest would run these too.
    environment = re.search(r"-m venv (\S+)", PAGE)
    assert environment
    packages = tmp_path / environment[1] / "lib" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "test_of_a_package.py").write_text("def test_of_a_package():\n    assert False\n")
    assert "1 passed" in desk.run("-m", "pytest", "-p", "no:cacheprovider")

    program = "run", "mailer:make_subscriber", "--processes", "2"
    assert f"domain-events {' '.join(program)}" in PAGE
    with desk.running(*command, *program) as printed:
        wait_until(lambda: "Consuming in 2 processes" in printed(), 60)
        desk.run("shop.py", "eve@example.org")
        wait_until(lambda: "Welcome, eve" in printed())
