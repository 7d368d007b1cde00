"""Every block of Python in README and docs runs as it stands, on the embedded broker.

A comment before a block says what a reader has by then:

- ``.. given:`` with indented Python: runs before the block, in its namespace;
- ``.. goes on``: in the namespace of the block before;
- ``.. run as a program``: in a process of its own;
- ``.. run by`` and the test that runs it with more around it;
- ``.. listing:`` with the file that it is; tests/test_examples.py runs those;
- ``.. not run:`` with the reason.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import listings
import pytest
from bench import Bench

import domain_events
from domain_events import DomainEvent, Publisher, Reject, Retry, Subscriber
from domain_events.log import Log, in_background
from domain_events.outbox import close_couriers
from domain_events.sqlalchemy import Outbox
from domain_events.testing import EventBroker

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))]

SVG = "{http://www.w3.org/2000/svg}"

#: Names of subscribers whose dead letters a page looks at.
SUBSCRIBERS = "print-user-event", "charge-card", "welcome-mail", "mailer"


BRIEFLY = """
import runpy, sys
from domain_events import Subscriber
start = Subscriber.start_consuming
Subscriber.start_consuming = lambda self, timeout=None: start(self, 0.2)
runpy.run_path(sys.argv[1], run_name='__main__')
"""


class Block(NamedTuple):
    """One block, and the comment before it."""

    page: Path
    line: int
    code: str
    comment: str
    given: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks() -> Iterator[Block]:
    """All of them, in order."""
    for page in PAGES:
        lines = page.read_text().splitlines()
        comment = given = ""
        number = 0
        while number < len(lines):
            line = lines[number]
            body, end = indented(lines, number)
            if re.fullmatch(
                r"\s*\.\. (given:|goes on|run as a program|run by .+|listing: .+|not run: .+)", line
            ):
                comment, given = line.strip()[3:], body
                number = end
            elif line.strip() == ".. code-block:: python":
                code = re.sub(r"\A(:\w+:.*\n)+\n?", "", body)
                yield Block(page, number + 1, code, comment, given)
                comment = given = ""
                number = end
            else:
                number += 1


def indented(lines: list[str], number: int) -> tuple[str, int]:
    """What is indented below a line, and the number of the line after it."""
    indent = len(lines[number]) - len(lines[number].lstrip())
    end = number + 1
    while end < len(lines) and (
        not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent
    ):
        end += 1
    return textwrap.dedent("\n".join(lines[number + 1 : end])).strip("\n") + "\n", end


def namespaces() -> dict[str, list[Block]]:
    """By the name of the last block: the blocks to run one after the other."""
    found: dict[str, list[Block]] = {}
    before: list[Block] = []
    for block in blocks():
        before = [*before, block] if block.comment == "goes on" else [block]
        if not block.comment.startswith(("run by ", "listing:", "not run:")):
            found[block.name] = before
    return found


RUNS = namespaces()


@pytest.fixture
def _brief(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A program that would consume for ever does so for a moment; what is set is set back."""
    start = Subscriber.start_consuming

    def start_briefly(self: Subscriber, timeout: float | None = None) -> None:
        start(self, 0.2)

    monkeypatch.setattr(Subscriber, "start_consuming", start_briefly)
    monkeypatch.chdir(tmp_path)
    manager = logging.root.manager
    levels = {name: logging.getLogger(name).level for name in ("", "pika", "domain_events")}
    handlers = logging.root.handlers[:]
    disabled = manager.disable
    yield
    domain_events.configure()
    domain_events.close_publishers()
    close_couriers()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.root.handlers[:] = handlers
    manager.disable = disabled


def fail(event: DomainEvent) -> None:
    raise Reject("for a page about dead letters")


def fill() -> None:
    """Dead letters, and a retry that is under way."""
    with Subscriber() as subscriber, Publisher() as publisher:
        for name in SUBSCRIBERS:
            subscriber.register(fail, name, [f"failed.{name}"], max_retries=1)
            publisher.publish(DomainEvent(f"failed.{name}", {"user_id": 1}))
        subscriber.start_consuming()


@pytest.mark.usefixtures("_brief")
@pytest.mark.parametrize("name", sorted(RUNS))
def test_code_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    *earlier, block = RUNS[name]
    if block.comment == "run as a program":
        program = tmp_path / "program.py"
        program.write_text(block.code)
        environment = {**os.environ, "DOMAIN_EVENTS_URL": "memory://"}
        command = [sys.executable, "-c", BRIEFLY, str(program)]
        subprocess.run(command, env=environment, check=True, timeout=60, cwd=ROOT)
        return
    names: dict[str, Any] = {"__name__": "__main__"}
    with EventBroker(virtual_time=False):
        fill()
        try:
            for each in (*earlier, block):
                exec(compile(each.given, f"given at {each.name}", "exec"), names)
                exec(compile(each.code, each.name, "exec"), names)
        finally:
            for value in names.values():
                if isinstance(value, Outbox):  # or it would be of other tests' sessions, too
                    value.switch_off()


def target(text: str, variant: str) -> str:
    """What was measured of a target, in the table of the documentation."""
    table = (ROOT / "docs" / "measurements-4.3.rst").read_text()
    found = re.search(rf"\* - {re.escape(text)}\n +- ?{variant}\n +- .+\n +- (.+)x\n", table)
    assert found, text
    return found[1]


def test_figures_of_the_readme_are_those_that_were_measured() -> None:
    readme = PAGES[0].read_text()
    bulk = target("Bulk publishing, of the best synchronous peer's", "quorum")
    assert f"- {bulk} times as many confirmed events a second" in readme
    consumed = target("Consuming, of the best Python peer's, all with a prefetch of 200", "")
    assert f"and {consumed} times as many consumed" in readme
    by_default = target("Consuming, of the best Python peer's, default options", "quorum")
    assert f"({by_default} times with" in readme
    faults = (ROOT / "docs" / "faults.rst").read_text()
    mixed = faults.partition("**mixed**")[2].partition("\n**")[0]
    row = re.search(r"events whose publish returned\n((?: +- [\d,]+\n)+)", mixed)
    lost = re.search(r"LOST \(must be 0\)\n((?: +- \d+\n)+)", mixed)
    assert row
    assert lost
    events, losses = (
        sum(int(each.replace(",", "")) for each in re.findall(r"[\d,]+", found[1]))
        for found in (row, lost)
    )
    assert f"- {losses} of {events:,} events lost" in readme
    assert f"{losses} of {events:,} events in the fifteen minutes" in faults


@pytest.mark.parametrize(
    "page", sorted(listings.PAGES.glob("*.rst")), ids=lambda page: str(page.name)
)
def test_what_a_page_lists_is_the_file(page: Path) -> None:
    """`python tools/listings.py` changes nothing."""
    assert listings.filled(page) == page.read_text()


def test_page_needs_nothing_that_a_repository_does_not_render() -> None:
    """There is nothing of a directive of Sphinx that shows text, or of a block with its options."""
    shows_nothing = r"^\.\. (?:literal)?include:: .*|^\.\. code-block:: \w+\n +:.*"
    for page in PAGES:
        assert re.findall(shows_nothing, page.read_text(), re.M) == [], page.name


def test_reference_describes_everything_in_words_too() -> None:
    """On a repository, `docs/api.rst` is a list of names and of what each one is."""
    text = (ROOT / "docs" / "api.rst").read_text()
    names = re.findall(r"^\.\. auto(?:function|class|exception):: ([\w.]+)", text, re.M)
    assert len(names) > 30
    for name in names:
        listed = re.search(rf"^- `(?:[\w.]+\.)?{re.escape(name)}`: (.+)$", text, re.M)
        in_the_tree = re.search(rf"^    \W*{name}\b", text, re.M)
        assert listed or in_the_tree, name
        if listed:
            words = inspect.getdoc(_named(name)) or ""
            shown = re.sub(r"(?<!`)`[\w.]+\.(\w+)`", r"`\1`", listed[1])
            assert " ".join(words.split("\n\n")[0].split()) == shown


def _named(name: str) -> object:
    module, _, own = name.rpartition(".")
    for each in (module, "domain_events", "domain_events.probes"):
        if each and hasattr(importlib.import_module(each), own):
            found: object = getattr(importlib.import_module(each), own)
            return found
    raise AssertionError(name)


def test_page_about_performance_says_what_its_charts_and_tables_say() -> None:
    text = (ROOT / "docs" / "performance.rst").read_text()
    words = " ".join(text.split())
    images = re.findall(r"^\.\. image:: (\S+)$", text, re.M)
    assert len(images) == 3
    for image in images:
        picture = ElementTree.parse(ROOT / "docs" / image).getroot()
        title, description = (picture.findtext(f"{SVG}{tag}") for tag in ("title", "desc"))
        assert f":alt: {title}. {description}" in words
    for figure in (
        target("Consuming, of the best Python peer's, all with a prefetch of 200", ""),
        target("Consuming, of the best Python peer's, default options", "quorum"),
        target("publish\\_domain\\_event one at a time, of domain-event-broker's rate", ""),
        target("publish\\_many, of domain-event-broker's rate", ""),
        target("Bulk publishing, of librabbitmq's with the same window", "classic"),
    ):
        assert re.search(rf"\b{re.escape(figure)}\b", words), figure


def test_figures_about_the_outbox_are_those_that_were_measured() -> None:
    table = (ROOT / "docs" / "measurements-outbox.rst").read_text()
    text = (ROOT / "docs" / "transactions.rst").read_text()
    words = " ".join(
        text.partition("Beside the outboxes of others")[2].partition("\n\n\n")[0].split()
    )
    measured = {
        name: re.findall(r"^     - ([\d.,]+) \(", table.partition(f"* - {name}\n")[2], re.M)[:6]
        for name in (
            "this library, SQLAlchemy",
            "this library, Django",
            "faststream-outbox, tuned",
            "django-outbox-pattern",
        )
    }
    ours, django, faststream, pattern = measured.values()
    assert f"sends {ours[0]} events a second with SQLAlchemy, and {django[0]} with Django" in words
    assert f"faststream-outbox {faststream[0]} when it is tuned" in words
    assert f"django-outbox-pattern {pattern[0]}." in words
    assert f"less than {ours[1]} and {django[1]} ms" in words
    assert f"with the others, {faststream[1]} and {pattern[1]} ms" in words
    assert f"takes {ours[4]} and {django[4]} ms longer" in words
    assert f"with these it is {faststream[4]} and {pattern[4]} ms" in words


def test_threads_of_a_process_are_those_of_their_page(bench: Bench) -> None:
    """The core's: each name on the page is that of a thread, and each thread is on the page."""
    text = (ROOT / "docs" / "threads.rst").read_text()
    names = re.findall(r"``(domain-events-[a-z -]+)(?:<n>)?``", text.partition("The optional")[0])
    seen: set[str] = set()
    subscriber = bench.subscriber(workers=2)

    def note(_event: DomainEvent) -> None:
        with in_background():  # as on an I/O thread
            Log("domain_events").info("for the thread that writes it")
        threads = threading.enumerate()
        seen.update(each.name for each in threads if each.name.startswith("domain-events-"))
        if len(kinds(seen)) == len(names):
            subscriber.stop_consuming()
        else:
            raise Retry(0.1)

    def kinds(threads: set[str]) -> set[str]:
        return {re.sub(r"\d+$", "", each) for each in threads}

    subscriber.register(note, bench.names.queue(), ["#"], max_retries=50)
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=30)
    assert kinds(seen) == set(names)


def test_links_into_the_repository_lead_somewhere() -> None:
    """Those of the pages, of what the commands print, and of the package's metadata."""
    files = [
        *PAGES,
        *ROOT.glob("*.rst"),
        ROOT / "pyproject.toml",
        *ROOT.glob("domain_events/**/*.py"),
    ]
    links = [
        (file.name, link)
        for file in files
        for link in re.findall(r"domain-events-rabbitmq/\w+/main/([^>`\"#\s)]*)", file.read_text())
    ]
    assert len(links) > 20
    for name, link in links:
        assert (ROOT / link).exists(), f"{name}: {link}"


def test_all_pages_are_looked_at() -> None:
    """A mistake in the search would find nothing, and pass."""
    assert len(list(blocks())) > 50
    assert {block.page.name for block in blocks()} > {"README.rst", "handling.rst", "health.rst"}
    assert sum(block.comment.startswith("not run:") for block in blocks()) < 8
    for block in blocks():
        if block.comment.startswith("run by "):
            test = ROOT / block.comment.removeprefix("run by ")
            assert block.page.name in test.read_text(), block.name


def table_of_options(text: str) -> dict[str, str]:
    """Each option, and its default as shown."""
    head = re.search(r"^(=+ +)(=+ +)=+\nOption .*\n=.*\n", text, re.MULTILINE)
    assert head
    first, second = len(head[1]), len(head[2])
    rows = text[head.end() :].partition("\n=")[0].splitlines()
    return {
        row[:first].strip(" `"): row[first : first + second].strip(" `")
        for row in rows
        if row.startswith("``")
    }


@pytest.mark.parametrize(
    ("page", "title", "function"),
    [
        ("README.rst", "Options of ``register``", Subscriber.register),
        ("docs/options.rst", "``Subscriber.register``", Subscriber.register),
        ("docs/options.rst", "``Subscriber``", Subscriber),
        ("docs/options.rst", "``publish_domain_event``", domain_events.publish_domain_event),
        ("docs/options.rst", "``Publisher``", Publisher),
        ("docs/options.rst", "``configure``", domain_events.configure),
    ],
)
def test_table_of_options_has_each_option_and_its_default(
    page: str, title: str, function: Any
) -> None:
    _, _, section = (ROOT / page).read_text().partition(f"\n{title}\n---")
    shown = table_of_options(section)
    parameters = inspect.signature(function).parameters
    assert list(shown) == [name for name in parameters if name != "self"]
    for name, default in shown.items():
        value = parameters[name].default
        if name in IN_WORDS:
            assert default in IN_WORDS[name]
        elif default:
            assert default == repr(value), name
        else:
            assert value is inspect.Parameter.empty, name


#: Defaults that a table shows in other words.
IN_WORDS = {
    "connection_settings": ["the process's", "the environment's"],
    "operation": ["PUBLISH"],
    "backoff": ["None", "Backoff()"],
    "prefetch_count": ["None", "200"],
}
