"""The programs of examples/: their tests pass, and they do on a RabbitMQ what their page says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import onlooker
import pytest
from rabbitmq_node import Node
from support import wait_until

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGE = (EXAMPLES / "README.rst").read_text()

QUEUES = (
    *("welcome-mail", "invoices", "ledger", "greetings", "billing", "order-billing"),
    *("bookshop-invoices", "shop-mails"),
)


def test_every_example_is_on_the_page() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    assert set(re.findall(r"^\*\*([\w-]+)\*\*", PAGE, re.M)) == folders


# --- their own tests -----------------------------------------------------------------------------

PYTEST = ["pytest", "-c", "/dev/null", "-q", "-p", "no:cacheprovider"]


@pytest.mark.parametrize(
    ("folder", "command", "passed"),
    [
        ("script", [*PYTEST, "test_shop.py"], "7 passed"),
        ("script", ["unittest", "test_shop_unittest"], "Ran 2 tests"),
        ("typed", [*PYTEST, "test_accounts.py"], "5 passed"),
        ("flask-shop", [*PYTEST, "test_flask_shop.py"], "3 passed"),
        ("fastapi-shop", [*PYTEST, "test_fastapi_shop.py"], "3 passed"),
        ("django-bookshop", ["django", "check"], "no issues"),
        ("django-bookshop", ["django", "test", "bookshop"], "Ran 2 tests"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_example_passes_its_tests(
    folder: str, command: list[str], passed: str, tmp_path: Path
) -> None:
    """As a user runs them; they take no broker."""
    ran = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=EXAMPLES / folder,
        env=_environment({"DATABASE_URL": f"sqlite:///{tmp_path}/shop.db"}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert passed in ran.stdout + ran.stderr


@pytest.mark.parametrize("folder", ["flask-shop", "fastapi-shop"])
def test_example_passes_its_tests_on_postgresql(folder: str, postgresql: Any) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", *PYTEST],
        cwd=EXAMPLES / folder,
        env=_environment({"DATABASE_URL": postgresql.sqlalchemy_url}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "3 passed" in ran.stdout, ran.stdout + ran.stderr


def _environment(more: dict[str, str]) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    return inherited | {
        "DJANGO_SETTINGS_MODULE": "bookshop.settings",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        **more,
    }


# --- on a RabbitMQ -------------------------------------------------------------------------------


class Desk:
    """A copy of an example, and terminals in it; whatever runs is ended with the test."""

    def __init__(self, folder: Path, url: str, ending: ExitStack, port: int) -> None:
        self.folder = folder
        self._port = str(port)
        self._ending = ending
        self._environment = _environment(
            {"DOMAIN_EVENTS_URL": url, "DATABASE_URL": f"sqlite:///{folder}/shop.db"}
        )
        self._outputs: list[Path] = []

    def words(self, line: str) -> list[str]:
        """A command of the page, on this Python and this test's port."""
        assert f"    {line}\n" in PAGE, "the page has another command"
        line = re.sub(r"(?<=[ :])(5000|8000|8001)\b", self._port, line)
        program, *words = shlex.split(line)
        module = {"domain-events": "domain_events", "python": ""}.get(program, program)
        return [sys.executable, *(["-m", module] if module else []), *words]

    def start(self, line: str) -> Callable[[], str]:
        """A program that runs on; returns what reads its output."""
        output = self.folder / f"output-{len(self._outputs)}"
        self._outputs.append(output)
        with output.open("wb") as file:
            process = subprocess.Popen(
                self.words(line),
                cwd=self.folder,
                env=self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._ending.callback(_end, process)
        return output.read_text

    def run(self, line: str) -> str:
        """One that ends by itself."""
        done = subprocess.run(
            self.words(line),
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

    def curl(self, line: str) -> str:
        """The same request as curl's, as soon as the server is there."""
        option, data, url = self.words(line)[-3:]
        json = {"Content-Type": "application/json"} if option == "--json" else {}
        request = urllib.request.Request(url, data.encode(), json)
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    text: str = response.read().decode()
                    return text
            except urllib.error.HTTPError:
                raise
            except OSError:
                assert time.monotonic() < deadline, self.outputs()
                time.sleep(0.05)  # the pause between attempts

    def wait_for(self, query: str, database: str) -> None:
        """Until the database has a row."""

        def found() -> bool:
            path = self.folder / database
            if not path.exists():
                return False
            connection = sqlite3.connect(path)
            try:
                return bool(connection.execute(query).fetchall())
            except sqlite3.OperationalError:  # no such table: not yet
                return False
            finally:
                connection.close()

        wait_until(found, message=f"{query}\n{self.outputs()}")

    def outputs(self) -> str:
        return "\n".join(path.read_text() for path in self._outputs)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture
def desk(
    request: pytest.FixtureRequest, tmp_path: Path, killable_node: Node, unused_port: int
) -> Iterator[Desk]:
    """For the example that the test's mark names."""
    (name,) = request.node.get_closest_marker("example").args
    folder = tmp_path / "copy"
    shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
    url = killable_node.url
    with ExitStack() as ending:
        yield Desk(folder, url, ending, unused_port)
    every = [*QUEUES, *(f"{queue}-dl" for queue in QUEUES)]
    onlooker.delete(url, queues=every)


def is_bound(node: Node, queue: str) -> None:
    """Until it is declared, since events from before it do not reach it."""
    wait_until(
        lambda: onlooker.exists(node.url, queue) and onlooker.consumers(node.url, queue),
        message=f"a consumer of {queue}",
    )


@pytest.mark.example("script")
def test_script_works(desk: Desk, killable_node: Node) -> None:
    output = desk.start("python shop.py")
    is_bound(killable_node, "ledger")
    desk.run("python shop.py Ada ada@example.org")
    wait_until(lambda: "a mail to ada@example.org" in output(), message=desk.outputs())


@pytest.mark.example("typed")
def test_typed_data_works(desk: Desk, killable_node: Node) -> None:
    output = desk.start("python accounts.py")
    is_bound(killable_node, "greetings")
    desk.run("python accounts.py 'Ada Lovelace' 9.90")
    wait_until(lambda: "Dear Ada Lovelace, thank you for 9.90 euros." in output())


@pytest.mark.example("flask-shop")
def test_flask_shop_works(desk: Desk, killable_node: Node) -> None:
    desk.start("python flask_shop.py")
    is_bound(killable_node, "billing")
    desk.start("flask --app flask_shop run --port 5000")
    desk.curl("curl -d email=ada@example.org http://localhost:5000/users")
    desk.wait_for("SELECT * FROM invoices WHERE user_id = 1", "shop.db")


@pytest.mark.example("fastapi-shop")
def test_fastapi_shop_works(desk: Desk, killable_node: Node) -> None:
    desk.start("python fastapi_shop.py")
    is_bound(killable_node, "order-billing")
    desk.start("uvicorn fastapi_shop:app --port 8000")
    desk.curl("""curl --json '{"book": "Middlemarch"}' http://localhost:8000/orders""")
    desk.wait_for("SELECT * FROM invoices WHERE order_id = 1", "shop.db")


@pytest.mark.example("django-bookshop")
def test_django_bookshop_works(desk: Desk, killable_node: Node) -> None:
    desk.run("python manage.py migrate")
    desk.start("python manage.py consume_domain_events")
    is_bound(killable_node, "bookshop-invoices")
    desk.start("python manage.py runserver --noreload 8001")
    desk.curl("curl -d isbn=9780321125217 http://localhost:8001/orders")
    desk.wait_for("SELECT * FROM bookshop_invoice WHERE order_id = 1", "bookshop/bookshop.sqlite3")
    desk.run("python manage.py relay_domain_events --once")


@pytest.mark.example("workers")
def test_workers_work(desk: Desk, killable_node: Node) -> None:
    output = desk.start("domain-events run shop.mails:subscriber --processes 2")
    wait_until(lambda: "Consuming in 2 processes" in output(), message=desk.outputs())
    desk.run("""domain-events publish user.registered '{"email": "ada@example.org"}'""")
    wait_until(lambda: "a mail to ada@example.org" in output(), message=desk.outputs())
    page = (ROOT / "docs" / "operating-run.rst").read_text()
    _, _, session = page.partition("$ domain-events run shop.mails:subscriber --processes 2\n")
    documented = [_without_numbers(line.strip()) for line in session.splitlines()[:3]]
    # The two processes start at the same time.
    assert documented == [_without_numbers(line) for line in output().splitlines()[:3]]
    _is_replaced_as_documented(page, desk, output)


def _is_replaced_as_documented(page: str, desk: Desk, output: Callable[[], str]) -> None:
    """Replacing on SIGHUP, and then a module with a mistake: its last line is an open bracket."""
    documented = [
        block.replace("/srv/shop", str(desk.folder))
        for block in re.findall(r"code-block:: text\n\n((?:    .*\n)+)", page)
    ]
    assert len(documented) == 2
    supervisor = re.search(r"(\d+) INFO Consuming in 2", output())
    assert supervisor is not None
    mails = desk.folder / "shop" / "mails.py"
    for block, end in zip(documented, ("All processes were", "Nothing more is"), strict=True):
        before = len(output())
        os.kill(int(supervisor[1]), signal.SIGHUP)
        wait_until(lambda end=end: end in output(), message=desk.outputs())  # type: ignore[misc]
        mails.write_text(f"{mails.read_text()}print(\n")  # for the next
        shown = [_without_numbers(line[4:]) for line in block.splitlines() if line.strip() != "..."]
        found = [_without_numbers(line) for line in output()[before:].splitlines()]
        assert (found[0], found[-1]) == (shown[0], shown[-1])
        # Those of several processes come in any order; "..." stands for the same of another one.
        assert set(found) == set(shown)


def _without_numbers(line: str) -> str:
    return re.sub(r"\d+(?:\.\d+)?", "N", re.sub(r" on [\w.-]+\.$", " on HOST.", line))


@pytest.mark.example("several-handlers")
def test_several_handlers_can_be_looked_at(desk: Desk) -> None:
    assert "invoices  quorum queue" in desk.run("domain-events topology show orders:subscriber")
    assert "invoices" in desk.run("domain-events explain order.placed orders:subscriber")
