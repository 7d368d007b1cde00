"""``domain-events topology``: what subscribers need on the broker; and explain, from its bindings.

One node of this file's own, with the management plugin: that shows bindings.
"""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import onlooker
import pytest
from bench import running
from commands import ROOT, Ended, command, environment, run
from rabbitmq_node import Node, free_port
from support import Names, wait_until

from domain_events import DeadLetters, DomainEvent, Publisher, Retry, Subscriber
from domain_events.broker.rabbitmq.topology import subscriber_queue
from domain_events.cli import drawing

EXAMPLES = ROOT / "examples" / "several-handlers"
PICTURE = ROOT / "docs" / "topology-example.svg"
# The arguments of a subscriber's queue.
QUORUM = dict(subscriber_queue("mails").arguments)
SVG = "{http://www.w3.org/2000/svg}"


class Managed:
    """A node, and the address of its management plugin."""

    def __init__(self, node: Node, port: int) -> None:
        self.node = node
        self.url = node.url
        self.management = f"http://guest:guest@127.0.0.1:{port}"
        self._api = f"http://127.0.0.1:{port}/api/"

    def get(self, path: str) -> Any:
        return self._request("GET", path)

    def _request(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._api + path, data, method=method)
        request.add_header("Authorization", "Basic Z3Vlc3Q6Z3Vlc3Q=")
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    @contextmanager
    def user(self, name: str, configure: str, write: str, read: str) -> Iterator[str]:
        """A user with these permissions; its URL."""
        self._request("PUT", f"users/{name}", {"password": "hunter2", "tags": ""})
        permissions = {"configure": configure, "write": write, "read": read}
        self._request("PUT", f"permissions/%2F/{name}", permissions)
        yield self.url.replace("guest:guest", f"{name}:hunter2")
        self._request("DELETE", f"users/{name}")

    def close_connections(self, user: str) -> int:
        """Close those of the user; how many there were."""
        found = [each["name"] for each in self.get("connections") if each["user"] == user]
        for name in found:
            self._request("DELETE", f"connections/{quote(name)}")
        return len(found)

    def keys(self, queue: str) -> set[str]:
        """The keys by which a queue is bound, but for those of its retries."""
        found = self.get(f"queues/%2F/{quote(queue)}/bindings")
        return {
            each["routing_key"]
            for each in found
            if each["source"] and not each["source"].endswith(".due")
        }


@pytest.fixture(scope="module")
def managed(rabbitmq_release: str) -> Iterator[Managed]:
    port = free_port()
    node = Node(
        rabbitmq_release,
        plugins=["rabbitmq_management"],
        config=f"management.tcp.port = {port}\n",
    )
    node.start()
    yield Managed(node, port)
    node.close()


@pytest.fixture
def there(managed: Managed, unique: str) -> Iterator[Names]:
    """Names on the managed node, deleted after the test."""
    names = Names(managed.url, unique)
    yield names
    names.delete()


class Shop:
    """A module with subscribers of the test's own, and the command to run on it."""

    def __init__(self, folder: Path, managed: Managed, names: Names) -> None:
        self.folder = folder
        self.managed = managed
        self.exchange = names.exchange()
        self.mails = names.queue("mails")
        self.crm = names.queue("crm")

    def write(self, body: str, options: str = "") -> None:
        (self.folder / "shop.py").write_text(
            "from domain_events import Subscriber\n"
            f"subscriber = Subscriber(exchange={self.exchange!r}{options})\n"
            f"mails, crm = {self.mails!r}, {self.crm!r}\n"
            f"{body}\n"
        )

    @property
    def plugin(self) -> tuple[str, str]:
        return "--management", self.managed.management

    def run(self, *arguments: str, management: bool = True, url: str | None = None) -> Ended:
        if management:
            arguments = (*arguments, *self.plugin)
        return run(*arguments, folder=self.folder, url=url or self.managed.url)

    def named(self, text: str) -> str:
        """The text with the names of this test for `mails`, `crm` and `shop`."""
        text = re.sub(r"\bX\b", self.exchange, text)
        return re.sub(r"\bMAILS\b", self.mails, re.sub(r"\bCRM\b", self.crm, text))


@pytest.fixture
def shop(tmp_path: Path, managed: Managed, there: Names) -> Shop:
    return Shop(tmp_path, managed, there)


TWO = """
subscriber.register(print, mails, ['user.registered', 'order.*'], max_retries=3)
subscriber.register(print, crm, ['user.#'])
"""

# ------------------------------------------------------------------ show


def test_topology_is_shown_from_the_code() -> None:
    """Offline: no broker is tried, whatever the environment names."""
    done = run(
        "topology", "show", "orders:subscriber", folder=EXAMPLES, url="amqp://u:p@host.invalid"
    )
    assert (done.status, done.errors) == (0, "")
    assert (
        done.output
        == """\
domain-events  topic exchange

  invoices  quorum queue
    events        order.placed
    handler       orders:issue_invoice
    payload       orders.OrderPlaced
    retries       up to 5, on ConnectionError, TimeoutError after 10 s, 20 s, 40 s and so on, at
                  most 10 min, or on Retry
    dead letters  invoices-dl
    prefetch      200, workers: 4
    ordered       by domain_object_id

  mails  quorum queue
    events        user.registered, order.*
    handler       orders:send_mail
    retries       up to 3, when the handler raises Retry
    dead letters  mails-dl
    prefetch      200, workers: 4

  audit  temporary queue
    events        #
    handler       orders:audit
    retries       none
    dead letters  none
    prefetch      200, workers: 4

  Retries whose queue is gone are kept in domain-events.undelivered.
"""
    )


def test_services_are_shown_together_by_their_exchanges(tmp_path: Path) -> None:
    """Subscribers built in functions, callable objects as handlers, a system of two services."""
    (tmp_path / "one.py").write_text(
        """\
from functools import partial
from domain_events import Subscriber

class Handler:
    def __call__(self, event): ...

def make():
    subscriber = Subscriber(declare=False)
    subscriber.register(Handler(), 'mails', ['a'], retired_keys=['b'], handler_limit=90)
    return subscriber
"""
    )
    (tmp_path / "two.py").write_text(
        """\
from domain_events import Subscriber
class Places:
    subscriber = Subscriber('amqp://user:secret@host/x', 'orders', 'direct')
Places.subscriber.register(print, 'crm', ['c'], exclusive=True)
"""
    )
    done = run("topology", "show", "one:make", "two:Places.subscriber", folder=tmp_path)
    assert (done.status, done.errors) == (0, "")
    assert (
        done.output
        == """\
domain-events  topic exchange

  mails  quorum queue, of one:make
    events        a
    retired keys  b
    handler       one:Handler
    retries       none
    dead letters  mails-dl
    prefetch      200, workers: 1
    limit         90 s for the handler
    declared      by an operator (declare=False)

orders  direct exchange

  crm  exclusive queue, of two:Places.subscriber
    events        c
    handler       builtins:print
    retries       none
    dead letters  none
    prefetch      200, workers: 1
"""
    )
    lines = run("topology", "show", "two:Places.subscriber", "--json", folder=tmp_path).output
    assert json.loads(lines) == {
        "subscriber": "crm",
        "target": "two:Places.subscriber",
        "exchange": "orders",
        "exchange_type": "direct",
        "binding_keys": ["c"],
        "retired_keys": [],
        "queue": "exclusive queue",
        "handler": "builtins:print",
        "payload": None,
        "max_retries": 0,
        "retry_on": [],
        "backoff": None,
        "dead_letters": None,
        "prefetch_count": 200,
        "workers": 1,
        "ordered": False,
        "handler_limit": None,
        "declares": True,
    }


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("subscriber.register(print, 'q', ['a'])\nsubscriber.start_consuming()", 2, "__main__"),
        ("subscriber.register(print, 'q', [])", 2, "binding_keys is empty"),
        ("", 2, "nothing is registered"),
        (
            "from domain_events import publish_domain_event\npublish_domain_event('a.b', 1)",
            4,
            "sent",
        ),
        ("raise SystemExit(3)", 9, "'odd' cannot be imported: it calls sys.exit(3)."),
        ("def subscriber(): raise SystemExit", 9, "it calls sys.exit(None)."),
    ],
)
def test_module_that_cannot_be_read_is_named(
    tmp_path: Path, body: str, status: int, words: str
) -> None:
    """One that consumes at its import would never end."""
    (tmp_path / "odd.py").write_text(
        f"from domain_events import Subscriber\nsubscriber = Subscriber()\n{body}\n"
    )
    done = run("topology", "show", "odd:subscriber", folder=tmp_path)
    assert (done.status, done.output) == (status, "")
    assert words in done.errors


def test_picture_that_cannot_be_written_has_the_status_for_files(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "from domain_events import Subscriber\nsubscriber = Subscriber()\n"
        "subscriber.register(print, 'q', ['a'])\n"
    )
    show = "topology", "show", "odd:subscriber", "--svg", "nowhere/picture.svg"
    done = run(*show, folder=tmp_path)
    assert (done.status, done.output) == (74, "")
    assert "nowhere/picture.svg" in done.errors


def test_picture_in_the_docs_is_the_one_that_the_command_draws(tmp_path: Path) -> None:
    """Byte by byte. To draw it again: topology show orders:subscriber --svg FILE."""
    drawn = tmp_path / "drawn.svg"
    done = run("topology", "show", "orders:subscriber", "--svg", str(drawn), folder=EXAMPLES)
    assert (done.status, done.output) == (0, "")
    assert drawn.read_bytes() == PICTURE.read_bytes()


def test_picture_can_be_read_on_a_phone_and_aloud(tmp_path: Path) -> None:
    """Every text fits, whatever its length; light or dark; with all of it in words."""
    key = "a-very-long-word." * 6 + "<&>"
    (tmp_path / "long.py").write_text(
        f"""\
from domain_events import Subscriber
one, two = Subscriber(), Subscriber(exchange='another-exchange-of-some-considerable-length')
one.register(print, 'name-' * 30, [{key!r}, *map(str, range(60))], max_retries=2)
two.register(print, 'short', ['#'])
"""
    )
    done = run("topology", "show", "long:one", "long:two", "--svg", "-", folder=tmp_path)
    picture = ElementTree.fromstring(done.output)
    assert picture.findtext(f"{SVG}title") == "Who gets which events"
    described = picture.findtext(f"{SVG}desc") or ""
    assert key in described
    assert "short gets # from the exchange another-exchange" in described
    style = picture.findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme: dark" in style
    width, height = map(float, picture.attrib["viewBox"].split()[2:])
    assert width <= 350  # of the 390 pixels, the page's margins take 40
    assert drawing.SIZE >= 11
    shown = ""
    for text in picture.iter(f"{SVG}text"):
        words = text.text or ""
        shown += words
        assert float(text.attrib["x"]) + len(words) * drawing.ADVANCE <= width
        assert 0 < float(text.attrib["y"]) < height
    for part in ("name-" * 30, key, "and 41 more", "long:two", "short"):
        assert part in shown


# ------------------------------------------------------------------ the documentation


def test_documentation_shows_what_the_commands_print(managed: Managed) -> None:
    """All of its commands in their order, word by word."""
    page = (ROOT / "docs" / "operating-topology.rst").read_text()
    names = Names(managed.url, "")
    names.add(exchange="domain-events")
    for queue in ("invoices", "mails"):
        names.add(queue=queue)
        names.add(queue=f"{queue}-dl")
    played = []
    for block in page.split(".. code-block:: console\n\n")[1:]:
        lines = itertools.takewhile(lambda line: not line or line[0] == " ", block.splitlines())
        command, *expected = textwrap.dedent("\n".join(lines)).strip().splitlines()
        assert command.startswith("$ domain-events ")
        arguments = shlex.split(command)[2:]
        if "check" in arguments:  # the earlier release of the text
            onlooker.bind_queue(managed.url, "mails", "domain-events", "user.deleted", **QUORUM)
        if arguments[0] == "topology" and arguments[1] != "show":
            arguments += ["--management", managed.management]
        done = run(*arguments, folder=EXAMPLES, url=managed.url)
        assert not done.errors
        played.append((command, expected, done.output.splitlines()))
    names.delete()
    for command, expected, output in played:
        assert (command, expected) == (command, output)
    assert len(played) == 7


# ------------------------------------------------------------------ check


def test_check_names_what_is_missing_and_apply_declares_it(shop: Shop) -> None:
    """Then all is as it should be, and to apply it again changes nothing."""
    shop.write(TWO)
    before = shop.run("topology", "check", "shop:subscriber")
    assert before.status == 1
    missing = shop.named(
        """\
missing  exchange  X
missing  queue     MAILS-dl
missing  queue     MAILS
missing  binding   MAILS by user.registered
missing  binding   MAILS by order.*
missing  binding   MAILS, for its retries, from X.due
missing  queue     CRM-dl
missing  queue     CRM
missing  binding   CRM by user.#
missing  exchange  26 exchanges of the delay levels, such as X.undelivered
missing  queue     25 queues of the delay levels, such as X.undelivered
missing  binding   49 bindings of the delay levels

Missing: run domain-events topology apply shop:subscriber

0 of 109 are as they should be.
"""
    )
    assert before.output == missing
    dry = shop.run("topology", "apply", "shop:subscriber", "--dry-run")
    assert dry.output.splitlines()[0] == f"to create  exchange  {shop.exchange}"
    assert dry.output.splitlines()[-1] == "109 to declare, 0 existed."
    assert shop.run("topology", "check", "shop:subscriber").output == missing
    applied = shop.run("topology", "apply", "shop:subscriber")
    assert (applied.status, applied.errors) == (0, "")
    assert applied.output == re.sub(r"(?m)^missing", "created", missing).partition("\n\n")[0] + (
        "\n109 declared, 0 existed.\n"
    )
    after = shop.run("topology", "check", "--strict", "shop:subscriber")
    assert (after.status, after.output) == (0, "109 of 109 are as they should be.\n")
    again = shop.run("topology", "apply", "shop:subscriber")
    assert (again.status, again.output) == (0, "0 declared, 109 existed.\n")
    # What a subscriber itself declares is no different.
    with Subscriber(shop.managed.url, shop.exchange) as subscriber:
        subscriber.register(print, shop.mails, ["user.registered", "order.*"], max_retries=3)
        subscriber.register(print, shop.crm, ["user.#"])


def knows_consumer(shop: Shop, queue: str) -> bool:
    """Whether the management plugin has the address of a consumer: it is seconds behind."""
    return any(
        each["queue"]["name"] == queue and (each.get("channel_details") or {}).get("peer_host")
        for each in shop.managed.get("consumers/%2F")
    )


def test_check_names_what_is_stale_and_different_and_prune_unbinds_it(
    shop: Shop, there: Names
) -> None:
    """Keys that none of the subscribers lists, with the proof that somebody may need them."""
    shop.write(TWO)
    shop.run("topology", "apply", "shop:subscriber")
    onlooker.bind_queue(shop.managed.url, there.queue("odd"), shop.exchange, "a")
    odd = f"{there.prefix}-odd"
    old = Subscriber(shop.managed.url, shop.exchange)
    old.register(print, shop.mails, ["user.registered", "user.left"])
    shop.write(
        f"subscriber.register(print, mails, ['user.registered'], retired_keys=['order.*'])\n"
        f"subscriber.register(print, {odd!r}, ['a'], dead_letter=False)\n"
    )
    with old, running(old):
        wait_until(partial(onlooker.consumers, shop.managed.url, shop.mails))
        wait_until(lambda: knows_consumer(shop, shop.mails))
        done = shop.run("topology", "check", "shop:subscriber")
        assert done.status == 1
        lines = done.output.splitlines()
        assert lines[0].startswith(f"different  queue     {odd}: ")
        assert "inequivalent arg" in lines[0]
        stale = shop.named(r"stale      binding   MAILS by order\.\*: retired; 1 consumer is con")
        assert re.fullmatch(rf"{stale}nected: 127\.0\.0\.1:\d+", lines[1])
        stale = shop.named(r"stale      binding   MAILS by user\.left: listed by none of these ")
        assert re.fullmatch(
            rf"{stale}subscribers; 1 consumer is connected: 127\.0\.0\.1:\d+", lines[2]
        )
        ways_out = "\n".join(lines[3:])
        assert "topology prune --stale shop:subscriber" in ways_out
        assert "arguments cannot change" in ways_out
        refused = shop.run("topology", "apply", "shop:subscriber")
        assert refused.status == 8
        assert refused.output.endswith("Nothing was declared.\n")
    asked = shop.run("topology", "prune", "--stale", "shop:subscriber")
    assert (asked.status, "give --yes" in asked.errors) == (2, True)
    dry = shop.run("topology", "prune", "--stale", "--dry-run", "shop:subscriber")
    assert dry.output == shop.named(
        "unbind  MAILS from X by order.*: no consumer is connected\n"
        "unbind  MAILS from X by user.left: no consumer is connected\n"
    )
    assert shop.managed.keys(shop.mails) == {"user.registered", "user.left", "order.*"}
    done = shop.run("topology", "prune", "--stale", "--yes", "shop:subscriber")
    assert (done.status, done.errors) == (0, "")
    assert done.output == dry.output + shop.named(
        "unbound  MAILS from X by order.*\nunbound  MAILS from X by user.left\n"
    )
    assert shop.managed.keys(shop.mails) == {"user.registered"}
    again = shop.run("topology", "prune", "--stale", "--yes", "shop:subscriber")
    assert (again.status, again.output) == (0, "There is nothing to prune.\n")
    records = shop.run("topology", "check", "shop:subscriber", "--json").output.splitlines()
    (bad,) = [each for each in map(json.loads, records) if each["status"] != "ok"]
    assert (bad["status"], bad["kind"], bad["name"]) == ("different", "queue", odd)


def test_what_cannot_be_found_out_is_never_fine_silently(shop: Shop) -> None:
    """Without the plugin, bindings are unknown; for a user without permissions, queues as well."""
    shop.write(TWO)
    assert shop.run("topology", "apply", "shop:subscriber", management=False).status == 0
    done = shop.run("topology", "check", "shop:subscriber", management=False)
    assert done.status == 0
    first, _, way, _, last = done.output.splitlines()
    assert first.startswith("unknown  binding   all 53: the management plugin at http://127.0.0.1")
    assert "rabbitmqctl is not installed here" in first
    assert "--management" in way
    assert last == "56 of 109 are as they should be."
    strict = shop.run("topology", "check", "shop:subscriber", "--strict", management=False)
    assert (strict.status, strict.output) == (1, done.output)
    name = f"u-{shop.crm[-12:]}"
    with shop.managed.user(name, "^$", "^$", "^$") as url:
        done = shop.run("topology", "check", "shop:subscriber", "--strict", "--broker", url)
        refused = shop.run("topology", "apply", "shop:subscriber", url=url)
    assert done.status == 1
    assert "hunter2" not in done.output + done.errors
    assert done.output.startswith(f"unknown  exchange  {shop.exchange}: ")
    assert done.output.endswith("53 of 109 are as they should be.\n")
    assert refused.status == 2
    assert "may not be declared by this user" in refused.errors


def test_broker_that_is_away_ends_it_with_a_status_of_its_own(shop: Shop) -> None:
    shop.write(TWO)
    url = f"amqp://guest:hunter2@127.0.0.1:{free_port()}"
    for name in ("check", "apply"):
        done = shop.run("topology", name, "shop:subscriber", "--timeout", "0.5", url=url)
        assert (done.status, done.output) == (4, "")
        assert done.errors.splitlines()[-1].startswith("domain-events: No broker within 0.5 s.")
        assert "hunter2" not in done.errors


def test_broker_of_the_subscribers_is_meant_unless_another_one_is_named(shop: Shop) -> None:
    """Their own URL counts more than the environment's, and --broker more than theirs."""
    away = f"amqp://guest:hunter2@127.0.0.1:{free_port()}"
    shop.write(TWO, f", connection_settings={away!r}")
    options = ("--timeout", "0.5", "shop:subscriber")
    assert shop.run("topology", "check", *options).status == 4
    done = shop.run("topology", "check", "--broker", shop.managed.url, "shop:subscriber")
    assert done.status == 1
    assert "0 of 109" in done.output


# ------------------------------------------------------------------ services that declare nothing


def test_service_whose_user_may_configure_nothing_runs_on_what_was_applied(shop: Shop) -> None:
    """With retries, dead letters, a replay, and after the broker has closed its connections."""
    body = "subscriber.register(print, mails, ['user.*'], max_retries=1)"
    shop.write(body, ", declare=False")
    name = f"u-{shop.crm[-12:]}"
    write = rf"^(amq\.default|{shop.exchange}\.delay\.\d\d)$"
    seen: list[int] = []

    def handle(event: DomainEvent) -> None:
        seen.append(event.retries)
        raise Retry(0.1)

    assert shop.run("topology", "apply", "shop:subscriber").status == 0
    with shop.managed.user(name, "^$", write, f"^{shop.mails}(-dl)?$") as url:
        subscriber = Subscriber(url, shop.exchange, declare=False)
        subscriber.register(handle, shop.mails, ["user.*"], max_retries=1)
        with (
            subscriber,
            running(subscriber),
            Publisher(shop.managed.url, shop.exchange) as publisher,
            DeadLetters(shop.mails, url) as letters,
        ):
            publisher.publish(DomainEvent("user.left"))
            wait_until(lambda: letters.count() == 1)
            # The consuming one, the publishing one, and that of the dead letters.
            wait_until(lambda: shop.managed.close_connections(name) >= 3)
            wait_until(partial(onlooker.consumers, shop.managed.url, shop.mails))
            wait_until(lambda: letters.count() == 1)
            assert letters.replay_all() == 1
            wait_until(lambda: len(seen) == 4)
            wait_until(lambda: letters.count() == 1)
    assert seen == [0, 1, 0, 1]


# ------------------------------------------------------------------ prune


def test_retired_subscriber_is_unbound_and_deleted_when_it_is_empty(
    shop: Shop, there: Names
) -> None:
    """Not while anybody consumes, nor while a message is left: then nothing is changed at all."""
    shop.write(TWO)
    shop.run("topology", "apply", "shop:subscriber")
    url, retire = shop.managed.url, ("topology", "prune", "--retire", shop.mails, "--yes")
    exchange = ("--exchange", shop.exchange)
    subscriber = Subscriber(url, shop.exchange)
    subscriber.register(print, shop.mails, ["user.registered", "order.*"], max_retries=3)
    with subscriber, running(subscriber):
        wait_until(partial(onlooker.consumers, url, shop.mails))
        done = shop.run(*retire)
    assert done.status == 8
    assert f"'{shop.mails}' is in use: 1 consumer is connected" in done.errors
    for queue, way in (
        (shop.mails, "topology prune --unbind"),
        (f"{shop.mails}-dl", f"domain-events dead-letters list {shop.mails}"),
    ):
        onlooker.publish(url, "", queue, b"kept")
        done = shop.run(*retire)
        assert (done.status, done.output) == (8, "")
        assert f"'{queue}' has 1 message" in done.errors
        assert way in done.errors
        assert onlooker.take_all(url, queue) == [b"kept"]
    assert shop.managed.keys(shop.mails) == {"user.registered", "order.*"}
    done = shop.run(*retire, management=False)
    assert done.status == 2
    assert f"--unbind {shop.mails}=KEY" in done.errors
    assert onlooker.exists(url, shop.mails)
    done = shop.run(*retire)
    assert (done.status, done.errors) == (0, "")
    assert done.output == shop.named(
        """\
unbind  MAILS from X by order.*: no consumer is connected
unbind  MAILS from X by user.registered: no consumer is connected
unbind  MAILS from X.due for its retries: no consumer is connected
delete  MAILS, if it is empty
delete  MAILS-dl, if it is empty
unbound  MAILS from X by order.*
unbound  MAILS from X by user.registered
unbound  MAILS from X.due for its retries
deleted  MAILS
deleted  MAILS-dl
"""
    )
    assert not onlooker.exists(url, shop.mails)
    assert not onlooker.exists(url, f"{shop.mails}-dl")
    again = shop.run(*retire)
    assert again.output == "There is nothing to prune.\n"
    assert again.errors == f"Note: there is no queue {shop.mails} on the broker.\n"
    unbind = ("topology", "prune", "--unbind", f"{shop.crm}=user.#", "--retire", shop.crm, "--yes")
    done = shop.run(*unbind, *exchange, management=False)
    assert (done.status, done.errors) == (0, "")
    assert not onlooker.exists(url, shop.crm)


@contextmanager
def retiring(shop: Shop) -> Iterator[subprocess.Popen[str]]:
    """A process that is about to delete a queue, which it has just unbound."""
    shop.write(TWO)
    shop.run("topology", "apply", "shop:subscriber")
    process = subprocess.Popen(
        command("topology", "prune", "--retire", shop.mails, "--yes", *shop.plugin),
        cwd=shop.folder,
        env=environment(shop.managed.url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            while not process.stdout.readline().startswith(
                f"unbound  {shop.mails} from {shop.exchange}.due"
            ):
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def test_event_that_arrives_while_a_subscriber_is_retired_is_kept(shop: Shop) -> None:
    """It ends halfway, with a status of its own; once the queue is empty, it can be run again."""
    with retiring(shop) as process:
        onlooker.publish(shop.managed.url, "", shop.mails, b"late")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 3
    assert f"stopped halfway. The queue '{shop.mails}' has 1 message" in errors
    assert onlooker.take_all(shop.managed.url, shop.mails) == [b"late"]
    again = shop.run("topology", "prune", "--retire", shop.mails, "--yes")
    assert again.output.splitlines()[-2:] == [f"deleted  {shop.mails}", f"deleted  {shop.mails}-dl"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_retirement_that_was_interrupted_goes_on_when_it_is_run_again(
    shop: Shop, number: signal.Signals
) -> None:
    with retiring(shop) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    assert onlooker.exists(shop.managed.url, shop.mails)
    again = shop.run("topology", "prune", "--retire", shop.mails, "--yes")
    assert (again.status, again.output) == (
        0,
        shop.named(
            "delete  MAILS, if it is empty\ndelete  MAILS-dl, if it is empty\n"
            "deleted  MAILS\ndeleted  MAILS-dl\n"
        ),
    )


@pytest.mark.parametrize(("answer", "status"), [("n", 130), ("y", 0)])
def test_terminal_is_asked_before_anything_is_pruned(shop: Shop, answer: str, status: int) -> None:
    """On a real terminal. Without one, it wants --yes."""
    shop.write(TWO)
    shop.run("topology", "apply", "shop:subscriber")
    terminal, side = pty.openpty()
    arguments = ("--exchange", shop.exchange, "--unbind", f"{shop.crm}=user.#", *shop.plugin)
    process = subprocess.Popen(
        command("topology", "prune", *arguments),
        cwd=shop.folder,
        env=environment(shop.managed.url),
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
    )
    os.close(side)
    seen = b""
    with process:
        while b"Do this?" not in seen:
            seen += os.read(terminal, 1000)
        assert shop.managed.keys(shop.crm) == {"user.#"}
        os.write(terminal, f"{answer}\n".encode())
        assert process.wait(60) == status
    os.close(terminal)
    assert b"no consumer is connected" in seen
    assert shop.managed.keys(shop.crm) == ({"user.#"} if answer == "n" else set())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stale"], "name the subscribers whose keys are not stale"),
        (["orders:subscriber"], "for --stale only"),
        (["--unbind", "mails"], "give QUEUE=KEY"),
        (["--stale", "--unbind", "mails=order.*", "orders:subscriber"], "mails lists order.*"),
        (["--stale", "--retire", "mails", "orders:subscriber"], "mails is registered in orders:su"),
    ],
)
def test_what_is_needed_is_not_pruned(arguments: list[str], words: str) -> None:
    """Mistakes on the command line, before any broker is tried."""
    done = run("topology", "prune", *arguments, "--yes", folder=EXAMPLES, url="amqp://localhost:1")
    assert (done.status, done.output) == (2, "")
    assert words in done.errors


# ------------------------------------------------------------------ explain


def test_explanation_compares_the_code_with_the_broker(shop: Shop, there: Names) -> None:
    """Both ways: listed and not bound, bound and not listed; others are named; status 1."""
    shop.write(TWO)
    shop.run("topology", "apply", "shop:subscriber")
    url, other = shop.managed.url, there.queue("other")
    onlooker.bind_queue(url, other, shop.exchange, "user.*")
    both = shop.run("explain", "user.registered", "shop:subscriber")
    assert (both.status, both.errors) == (0, "")
    gets = "subscribers get user.registered from the exchange X, as bound on the broker (3 in all)."
    assert both.output.startswith(shop.named(f"3 {gets}\n"))
    assert f"{other}" in both.output
    live = shop.run("explain", "user.registered", "--exchange", shop.exchange)
    assert live.status == 0
    names = (shop.mails, shop.crm, other)
    wide = max(map(len, names))
    assert live.output.splitlines()[2:] == [
        f"  {name:{wide}}  {key}"
        for name, key in sorted(zip(names, ("user.registered", "user.#", "user.*"), strict=True))
    ]
    shop.write(
        "subscriber.register(print, mails, ['user.left'], retired_keys=['order.*'])\n"
        "subscriber.register(print, crm, ['order.placed'])"
    )
    found = {}
    for key in ("order.placed", "user.registered"):
        done = shop.run("explain", key, "shop:subscriber", "--json")
        assert done.status == 1
        for line in done.output.splitlines():
            each = json.loads(line)
            found[key, each["subscriber"]] = each
    retired = found["order.placed", shop.mails]
    assert (retired["in_code"], retired["on_broker"]) == (False, True)
    assert retired["note"] == "bound, but retired: it acks the event unhandled"
    unbound = found["order.placed", shop.crm]
    assert (unbound["gets"], unbound["in_code"], unbound["on_broker"]) == (False, True, False)
    assert "topology apply" in unbound["note"]
    unlisted = found["user.registered", shop.mails]
    assert unlisted["binding_keys"] == ["user.registered"]
    assert "not listed in the code" in unlisted["note"]
    assert found["user.registered", other]["note"] == "not one of these subscribers"


def test_bindings_are_read_by_rabbitmqctl_where_the_plugin_is_not(shop: Shop, there: Names) -> None:
    """With types of exchanges, temporary queues, and the proof of who consumes."""
    node, programs = shop.managed.node, shop.folder / "bin"
    programs.mkdir()
    words = node._command("rabbitmqctl")
    variables = [f"{name}={value}" for name, value in node._environment().items()]
    script = programs / "rabbitmqctl"
    script.write_text(f'#!/bin/sh\nexec /usr/bin/env -i {shlex.join([*variables, *words])} "$@"\n')
    script.chmod(0o755)
    shop.write("subscriber.register(print, mails, ['user.left'])")
    url, path = shop.managed.url, f"{programs}:/usr/bin:/bin"
    old = Subscriber(url, shop.exchange)
    old.register(print, shop.mails, ["user.*"])
    old.register(print, there.queue("audit"), ["#"], durable=False)
    with old, running(old):
        wait_until(partial(onlooker.consumers, url, shop.mails))
        checked = run(
            "topology", "check", "shop:subscriber", folder=shop.folder, url=url, path=path
        )
    assert (checked.status, checked.errors) == (1, "")
    assert checked.output.startswith(
        shop.named(
            "missing  binding   MAILS by user.left\nstale    binding   MAILS by user.*: "
            "listed by none of these subscribers; 1 consumer is connected\n"
        )
    )
    explained = run(
        "explain", "user.a", "--exchange", shop.exchange, folder=shop.folder, url=url, path=path
    )
    assert explained.status == 0
    assert f"{shop.mails}" in explained.output
    assert "a temporary queue, so only while it runs" in explained.output


# ------------------------------------------------------------------ speed


@pytest.mark.slow
def test_hundred_subscribers_with_fifty_keys_each_are_applied_and_checked_quickly(
    shop: Shop, there: Names
) -> None:
    """Alone it takes a few seconds; a round trip for each of 5,000 bindings would take minutes."""
    names = [there.queue(f"s{n}") for n in range(100)]
    shop.write(
        f"for n, name in enumerate({names!r}):\n"
        "    keys = [f'area{n}.thing{m}.*' for m in range(50)]\n"
        "    subscriber.register(print, name, keys, max_retries=1)"
    )
    for name in ("apply", "check"):
        begun = time.monotonic()
        done = shop.run("topology", name, "shop:subscriber")
        assert (done.status, done.errors) == (0, "")
        assert time.monotonic() - begun < 120
    assert done.output == f"{1 + 100 * 53 + 100} of {1 + 100 * 53 + 100} are as they should be.\n"
