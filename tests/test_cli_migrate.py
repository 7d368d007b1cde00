"""`domain-events migrate` and `rename`: as processes, while publishers and consumers go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import migrate_kills
import onlooker
import pika
import pyamqp
import pytest
import raw_amqp
from managed import Managed
from migrate_kills import BREAK
from rabbitmq_node import Node
from support import Names, thorough, wait_until

from domain_events import DeadLetters, DomainEvent, Publisher, Subscriber
from domain_events.broker import Publication
from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.administration import Administration, Comparison
from domain_events.broker.rabbitmq.mover import _MOST_BYTES, MOST_UNDER_WAY, Mover
from domain_events.cli import exits
from domain_events.cli.policies import lossy

RELEASED = Path(__file__).parent / "programs" / "released.py"
KILLS = Path(migrate_kills.__file__)
OURS, THEIRS = "domain_events", "domain_event_broker"
# What has no statistics is held for a second at most: the handlers of these tests return at once.
HELD = ("--held-for", "1")


class Ran:
    """A command that has ended."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status = done.returncode
        self.out, self.err = done.stdout, done.stderr


def run(url: str, *words: str, cwd: Path | None = None) -> Ran:
    """``domain-events WORDS``, without a management plugin or rabbitmqctl."""
    return Ran(
        subprocess.run(
            [sys.executable, "-m", "domain_events", *words],
            env={**os.environ, "DOMAIN_EVENTS_URL": url, "PATH": "", "COVERAGE_PROCESS_START": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=cwd,
        )
    )


class Release:
    """A process of a release of a service; `events` are the ids it has handled."""

    def __init__(self, url: str, library: str, name: str, exchange: str, *options: str) -> None:
        self.events: list[str] = []
        self.retried: list[str] = []
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, RELEASED, library, name, exchange, "user.*", *options],
            env={**os.environ, "DOMAIN_EVENTS_URL": url, "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._ready.wait(60), "it does not start"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            word, _, event = line.strip().partition(" ")
            if word == "ready":
                self._ready.set()
            elif word == "event":
                self.events.append(event)
            elif word == "retry":
                self.retried.append(event)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Service:
    """A service whose releases follow one another, and the publisher that goes on meanwhile."""

    def __init__(self, url: str, name: str, exchange: str) -> None:
        self.url, self.name, self.exchange = url, name, exchange
        self.sent: list[str] = []
        self.releases: list[Release] = []
        self._running: list[Release] = []
        self._publisher = Publisher(url, exchange)

    def deploy(self, library: str, *options: str, name: str | None = None, number: int = 2) -> None:
        """A rolling deployment: each new process is ready before an old one is stopped."""
        old, self._running = self._running, []
        for _ in range(number):
            new = Release(self.url, library, name or self.name, self.exchange, *options)
            self.releases.append(new)
            self._running.append(new)
            if old:
                old.pop().stop()

    def stop(self) -> None:
        while self._running:
            self._running.pop().stop()

    def publish(self, **data: Any) -> str:
        event = self._publisher.publish(DomainEvent("user.registered", data))
        self.sent.append(str(event.uuid_string))
        return self.sent[-1]

    @property
    def received(self) -> list[str]:
        return [event for release in self.releases for event in release.events]

    @property
    def missing(self) -> set[str]:
        return set(self.sent) - set(self.received)

    @contextmanager
    def published(self) -> Iterator[None]:
        """All the time."""
        ended = threading.Event()

        def publish() -> None:
            while not ended.wait(0.005):
                self.publish()

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def close(self) -> None:
        self.stop()
        self._publisher.close()


@pytest.fixture
def name(names: Names) -> str:
    """A subscriber, with all that domain-event-broker and the commands have for it."""
    name = names.queue("mailer")
    for suffix in ("", ".new", ".old", ".dl", ".dlx"):
        names.add(queue=f"{name}.migrate{suffix}", exchange=f"{name}.migrate{suffix}")
    for suffix in ("-dlx", "-retry", "-delay-3000"):
        names.add(queue=f"{name}{suffix}", exchange=f"{name}{suffix}")
    return name


@pytest.fixture
def service(broker_url: str, name: str, exchange: str) -> Iterator[Service]:
    service = Service(broker_url, name, exchange)
    yield service
    service.close()


def declare_classic(url: str, name: str, exchange: str, *events: DomainEvent) -> None:
    """The queue of a subscriber that uses queue_type='classic', with events."""
    subscriber = Subscriber(url, exchange)
    subscriber.register(print, name, ["user.*"], queue_type="classic")
    subscriber.close()
    with Publisher(url, exchange) as publisher:
        publisher.publish_many(events)


def kind(url: str, name: str) -> str:
    with Administration(url) as administration:
        if administration.queue(name) is None:
            return "missing"
        result, _ = administration.compare(topology.subscriber_queue(name))
        return "quorum" if result is Comparison.SAME else "classic"


def leftovers(url: str, name: str) -> list[str]:
    """What the commands have left of their own."""
    found = [f"{name}.migrate{suffix}" for suffix in ("", ".new", ".old", ".dl", ".dlx")]
    with Administration(url) as administration:
        return [
            each
            for each in found
            if administration.queue(each) is not None or administration.has_exchange(each)
        ]


# --- moving messages -----------------------------------------------------------------------------


KEPT = {
    b"float": raw_amqp.number(b"d", 0.1),
    b"large": raw_amqp.number(b"l", 2**63 - 1),
    b"date": raw_amqp.number(b"T", 10**13),
    b"text": raw_amqp.text(b"\xff\xfe"),
    b"price": raw_amqp.decimal(2, 1999),
    b"none": raw_amqp.VOID,
    b"deep": raw_amqp.array([raw_amqp.table({b"x-death": raw_amqp.number(b"t", True)})]),
    b"domain-events-retries": raw_amqp.number(b"s", 3),
}
STRIPPED = {
    b"x-death": raw_amqp.array([]),
    b"x-first-death-queue": raw_amqp.text("q"),
    b"CC": raw_amqp.array([]),
}


class Encoded:
    def __init__(self, flags: int, data: bytes) -> None:
        self._encoded = flags.to_bytes(2, "big") + data

    def encode(self) -> list[bytes]:
        return [self._encoded]


def encoded(headers: dict[bytes, raw_amqp.Value], expiration: bytes) -> Encoded:
    """Content type, headers, delivery mode, priority, expiration, message id."""
    table = raw_amqp.table(headers).encoded()[1:]
    flags = 1 << 15 | 1 << 13 | 1 << 12 | 1 << 11 | 1 << 7
    expires = b""
    if expiration:
        flags |= 1 << 8
        expires = raw_amqp.short(expiration)
    data = raw_amqp.short(b"text/x") + table + b"\x01\x05" + expires + raw_amqp.short(b"\xffid")
    return Encoded(flags, data)


@pytest.fixture
def places(broker_url: str, names: Names, unique: str) -> tuple[str, str, str]:
    """Two queues, and a fanout exchange to the second. Classic: these add no header."""
    old, new, route = names.queue("from"), names.queue("to"), f"{unique}-route"
    names.add(exchange=route)
    with onlooker.channel(broker_url) as channel:
        channel.queue_declare(old, durable=True)
        channel.queue_declare(new, durable=True)
        channel.exchange_declare(route, "fanout", durable=True)
        channel.queue_bind(new, route, "")
    return old, route, new


def move_all(mover: Mover, number: int) -> None:
    mover.start(30)
    wait_until(lambda: mover.error or mover.moved == number)
    mover.stop(30)


def test_a_message_is_moved_byte_for_byte(broker_url: str, places: tuple[str, str, str]) -> None:
    """Only what the broker would act upon again is left out, at the top level of the headers."""
    old, route, new = places
    body = bytes(range(256)) * 700  # several frames
    with pyamqp.Connection(broker_url) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for headers, expiration in ((KEPT, b""), ({**STRIPPED, **KEPT}, b"86400000")):
            channel.basic_publish("", old, body, encoded(headers, expiration))
        with Mover((broker_url,), old, lambda _exchange, key: (route, f"{key}.moved")) as mover:
            move_all(mover, 2)
        assert channel.queue_declare(old, passive=True).messages == 0
        # From 4.0 on, the broker itself encodes the headers again, of each message.
        channel.basic_publish("", new, body, encoded(KEPT, b""))
        one, other, published = (channel.basic_get(new, auto_ack=True) for _ in range(3))
        assert one is not None
        assert other is not None
        assert published is not None
        assert one.body == other.body == body
        assert one.encoded == other.encoded == published.encoded


def test_the_memory_for_moving_large_messages_is_bounded(
    broker_url: str, places: tuple[str, str, str]
) -> None:
    """Nothing more is read while 16 MiB wait for their confirms, and all is read in the end."""
    old, route, new = places
    size = 2 * 2**20
    with pyamqp.Connection(broker_url) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for _ in range(MOST_UNDER_WAY):
            channel.basic_publish("", old, bytes(size), pyamqp.Properties())
    with Mover((broker_url,), old, lambda _exchange, _key: (route, "")) as mover:
        held: list[Publication] = []
        submit = mover._publishing.submit
        mover._publishing.submit = held.append  # type: ignore[assignment, method-assign]
        mover.start(30)
        most = _MOST_BYTES // size + 1
        wait_until(lambda: len(held) == most)
        # The broker has sent the others; a round trip on the connection would not be answered.
        time.sleep(0.5)
        assert len(held) == most
        mover._publishing.submit = submit  # type: ignore[method-assign]
        for publication in held:
            submit(publication)
        wait_until(lambda: mover.error or mover.moved == MOST_UNDER_WAY)
        mover.stop(30)
    assert onlooker.count(broker_url, new) == MOST_UNDER_WAY


def test_what_arrives_as_the_queue_is_deleted_is_moved(
    broker_url: str, names: Names, places: tuple[str, str, str]
) -> None:
    """The broker deletes a quorum queue with whatever is in it; the mover has that already."""
    _, route, new = places
    old = topology.subscriber_queue(names.queue("quorum"))
    with Administration(broker_url) as administration:
        administration.declare([old])
        with Mover((broker_url,), old.name, lambda _exchange, _key: (route, "")) as mover:
            mover.start(30)

            def arrive_and_delete() -> None:
                for _ in range(MOST_UNDER_WAY // 2):
                    onlooker.publish(broker_url, "", old.name, b"{}")
                administration.delete_queue(old.name, if_empty=False, own_consumers=1)

            submit = mover._publishing.submit

            def submit_late(publication: Publication) -> None:
                threading.Timer(0.5, submit, [publication]).start()

            mover._publishing.submit = submit_late  # type: ignore[method-assign]
            mover.finish(arrive_and_delete, 30)
        assert administration.queue(old.name) is None
    assert onlooker.count(broker_url, new) == MOST_UNDER_WAY // 2


# --- deployments ---------------------------------------------------------------------------------


def test_a_service_is_migrated_by_the_documented_steps(service: Service) -> None:
    """docs/operating-migrate.rst: no event is lost, and hardly any handled twice."""
    service.deploy(THEIRS, "dead_letter=1")
    with service.published():
        # 1. A release of this library, on the old queue.
        service.deploy(OURS, "queue_type=classic", "max_retries=1")
        # 2. The command.
        before = len(service.sent)
        ran = run(
            *(service.url, "migrate", service.name, "--exchange", service.exchange),
            *("--binding-key", "user.*", *HELD),
        )
        assert ran.status == 0, ran.err
        assert kind(service.url, service.name) == "quorum"
        wait_until(lambda: len(service.received) > before)  # the old release goes on with it
        # 3. The release with a quorum queue.
        service.deploy(OURS, "max_retries=1")
        wait_until(lambda: not set(service.sent[:before]) - set(service.received))
    wait_until(lambda: not service.missing)
    assert leftovers(service.url, service.name) == []
    # Twice: those of two moments, and what the old processes of each deployment gave back.
    assert len(service.received) - len(set(service.received)) < len(service.sent) / 4


@pytest.mark.parametrize("queue_type", ["quorum", pytest.param("classic", marks=pytest.mark.slow)])
def test_a_service_gets_another_name_by_the_documented_steps(
    service: Service, names: Names, queue_type: str
) -> None:
    """And a retry of the old processes that is under way, and dead letters."""
    new = names.queue("new")
    options = (f"queue_type={queue_type}", "max_retries=1")
    service.deploy(OURS, *options)
    dead = [DomainEvent("user.dead", {"n": number}) for number in range(3)]
    for event in dead:
        onlooker.publish(service.url, "", f"{service.name}-dl", event.to_json().encode())
    with service.published():
        retried = service.publish(retry=4)
        wait_until(lambda: retried in [each for old in service.releases for each in old.retried])
        # 1. The command, which waits for the old processes to end.
        held = HELD if queue_type == "classic" else ()
        with renaming(service, new, *held) as command:
            assert command.stderr is not None
            for line in command.stderr:
                if "stop these processes" in line:
                    break
            # 2. The release with the new name.
            service.deploy(OURS, "max_retries=1", name=new)
            rest = command.stderr.read()
        assert command.returncode == 0, rest
    wait_until(lambda: not service.missing)
    assert kind(service.url, service.name) == "missing"
    assert leftovers(service.url, service.name) == []
    with DeadLetters(new, service.url) as letters:
        assert [letter.event for letter in letters] == dead


def renaming(service: Service, new: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "domain_events", "rename", service.name, new),
            *("--exchange", service.exchange, "--binding-key", "user.*", *options),
        ],
        env={**os.environ, "DOMAIN_EVENTS_URL": service.url, "PATH": ""},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_quorum_queue_is_not_deleted_while_an_event_of_it_is_held(
    service: Service, names: Names
) -> None:
    """Also by a consumer that is cancelled: the broker counts that, and nothing is to be named."""
    new = names.queue("new")
    with Subscriber(service.url, service.exchange) as subscriber:
        subscriber.register(print, service.name, ["user.*"])
    event = service.publish()
    with closing(pika.BlockingConnection(pika.URLParameters(service.url))) as connection:
        channel = connection.channel()
        held: list[int] = []
        tag = channel.basic_consume(service.name, lambda *_: held.append(1))
        while not held:
            connection.process_data_events(0.1)
        channel.basic_cancel(tag)
        command = renaming(service, new)
        assert command.stderr is not None
        for line in command.stderr:
            if "may hold events" in line:
                break
        connection.process_data_events(3)  # longer than an empty queue without consumers is kept
        assert command.poll() is None
        assert kind(service.url, service.name) == "quorum"
    rest = command.stderr.read()
    command.stderr.close()
    assert command.wait(60) == 0, rest
    bodies = onlooker.take_all(service.url, new)
    assert [json.loads(body)["uuid_string"] for body in bodies] == [event]
    assert kind(service.url, service.name) == "missing"


@thorough
def test_an_event_that_the_broker_parks_is_not_deleted_with_its_queue(
    service: Service, names: Names
) -> None:
    """A poison event of a subscriber without dead letters: in no number that AMQP shows."""
    new = names.queue("new")
    with Subscriber(service.url, service.exchange) as subscriber:
        subscriber.register(print, service.name, ["user.*"], dead_letter=False)
    event = service.publish()
    with onlooker.channel(service.url) as channel:
        wait_until(lambda: channel.queue_declare(service.name, passive=True).messages)
        while (message := channel.basic_get(service.name)) is not None:
            channel.basic_reject(message.delivery_tag, requeue=True)
    command = renaming(service, new)
    assert command.stderr is not None
    for line in command.stderr:
        if "parks" in line:
            break
    command.kill()
    command.wait()
    command.stderr.close()
    with renaming(service, new) as command:
        _, rest = command.communicate(timeout=280)
    assert command.returncode == 0, rest
    with DeadLetters(new, service.url) as letters:
        assert [each.event and each.event.uuid_string for each in letters] == [event]
    assert leftovers(service.url, service.name) == []


@pytest.mark.parametrize(
    ("command", "library"),
    [
        ("migrate", OURS),
        *(
            pytest.param(*case, marks=thorough)
            for case in (("migrate", THEIRS), ("rename", OURS), ("rename", THEIRS))
        ),
    ],
)
def test_a_retry_in_flight_returns(
    service: Service, names: Names, command: str, library: str
) -> None:
    """Of this library through its delay levels, of domain-event-broker through its own exchange."""
    new = names.queue("new") if command == "rename" else service.name
    release = Release(
        *(service.url, library, service.name, service.exchange, "max_retries=1"),
        *(["queue_type=classic"] if library == OURS else []),
    )
    event = service.publish(retry=3)
    wait_until(lambda: release.retried == [event])
    if library == THEIRS:  # which acks an event before it publishes its retry
        delay = f"{service.name}-delay-3000"
        wait_until(lambda: onlooker.exists(service.url, delay))
        wait_until(lambda: onlooker.count(service.url, delay))
    release.stop()
    assert release.events == []
    ran = run(
        *(service.url, command, *dict.fromkeys((service.name, new))),
        *("--exchange", service.exchange, "--binding-key", "user.*", *HELD),
    )
    assert ran.status == 0, ran.err
    last = Release(service.url, OURS, new, service.exchange, "max_retries=5")
    try:
        wait_until(lambda: last.events)
    finally:
        last.stop()
    assert set(last.events) == {event}


@pytest.mark.parametrize("command", ["migrate", "rename"])
def test_dead_letters_keep_their_order_and_their_reason(
    broker_url: str, name: str, exchange: str, names: Names, command: str
) -> None:
    """Those of this library, and those that the broker moved for domain-event-broker."""
    old = pytest.importorskip(THEIRS)
    new = names.queue("new") if command == "rename" else name
    theirs = old.Subscriber(broker_url, exchange)
    theirs.register(print, name, ["user.*"], True)
    with Publisher(broker_url, exchange) as publisher:
        rejected = publisher.publish(DomainEvent("user.rejected"))
    with onlooker.channel(broker_url) as channel:
        theirs.disconnect()
        wait_until(lambda: channel.queue_declare(name, passive=True).messages)
        got = channel.basic_get(name)
        assert got is not None
        channel.basic_reject(got.delivery_tag, requeue=False)
        wait_until(lambda: channel.queue_declare(f"{name}-dl", passive=True).messages)
    ours = Subscriber(broker_url, exchange)

    def fail(event: DomainEvent) -> None:
        ours.stop_consuming()
        raise LookupError(f"no user {event.data['n']}")

    ours.register(fail, name, ["user.*"], queue_type="classic")
    with Publisher(broker_url, exchange) as publisher:
        failed = publisher.publish(DomainEvent("user.failed", {"n": 5}))
    ours.start_consuming(timeout=60)
    ran = run(
        *(broker_url, command, *dict.fromkeys((name, new)), "--exchange", exchange),
        *("--binding-key", "user.*", *HELD),
    )
    assert ran.status == 0, ran.err
    with DeadLetters(new, broker_url) as letters:
        found = [(each.event, each.routing_key, each.error_type) for each in letters]
    assert found == [
        (rejected, "user.rejected", "rejected"),
        (failed, "user.failed", "LookupError"),
    ]
    with Administration(broker_url) as administration:
        result, why = administration.compare(topology.dead_letter_queue(new))
        assert result is Comparison.SAME, why
        assert not administration.has_exchange(f"{name}-dlx")


def test_the_commands_print_what_is_documented(killable_node: Node, tmp_path: Path) -> None:
    """docs/operating-migrate.rst, from the top to the bottom, with one process of the service."""
    page = (Path(__file__).parent.parent / "docs" / "operating-migrate.rst").read_text()
    blocks = re.findall(r"^( +)\$ (domain-events .*)\n((?:\1.*\n)+)", page, re.M)
    assert len(blocks) == page.count("$ domain-events") == 3
    program = tmp_path / "domain-events"
    program.write_text(f'#!/bin/sh\nPATH= exec "{sys.executable}" -m domain_events "$@"\n')
    program.chmod(0o755)
    url = killable_node.url
    release = Release(url, OURS, "mailer", "domain-events", "queue_type=classic", "max_retries=1")
    try:
        for indent, command, printed in blocks:
            with subprocess.Popen(
                ["bash", "-c", command.replace("grep", "grep --line-buffered")],
                env={**os.environ, "DOMAIN_EVENTS_URL": url, "PATH": f"{tmp_path}:/usr/bin:/bin"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process:
                assert process.stdout is not None
                found = []
                for line in process.stdout:
                    if line.startswith("mailer: its 1 consumers may hold events: "):
                        continue  # how far it is, every few seconds
                    found.append(line.rstrip("\n"))
                    if "stop these processes" in line:
                        release.stop()
            expected = printed.replace(f"\n{indent}", "\n").removeprefix(indent).splitlines()
            if "--dry-run" in command:  # remarks are not buffered
                found.sort(key=lambda line: "cannot be read" not in line)
            assert found == expected, command
    finally:
        release.stop()
        names = ("mailer", "mailer-dl", "welcome-mail", "welcome-mail-dl")
        onlooker.delete(url, queues=names)


# --- what it knows, shows and refuses ------------------------------------------------------------


def test_the_plan_is_shown_and_nothing_changed(broker_url: str, name: str, exchange: str) -> None:
    declare_classic(broker_url, name, exchange)
    words = ("migrate", name, "--exchange", exchange, "--binding-key", "user.*", "--dry-run")
    shown = run(broker_url, *words)
    assert shown.status == 0
    assert "Stage: not begun" in shown.out
    assert "user.*" in shown.out
    # What may harm, and cannot be seen here, is named.
    assert "policies cannot be read here" in shown.err
    assert f"{name}.migrate.new" in shown.err
    plan = json.loads(run(broker_url, *words, "--json").out)
    assert plan["stage"] == "not begun"
    assert {"exchange": exchange, "binding_key": "user.*"} in plan["bindings"]
    assert plan["read_from_the_broker"] is False
    assert len(plan["steps"]) > 3
    assert kind(broker_url, name) == "classic"
    assert leftovers(broker_url, name) == []


def test_binding_keys_are_those_of_the_code_which_declares_nothing(
    broker_url: str, name: str, exchange: str, tmp_path: Path
) -> None:
    """Of the release that is to come, whose registration would fail on the old queue."""
    declare_classic(broker_url, name, exchange, DomainEvent("user.a"))
    (tmp_path / "shop.py").write_text(
        "from domain_events import Subscriber\n"
        f"subscriber = Subscriber({broker_url!r}, {exchange!r})\n"
        f"subscriber.register(print, {name!r}, ['user.*', 'order.#'])\n"
    )
    ran = run(broker_url, "migrate", name, "shop:subscriber", *HELD, cwd=tmp_path)
    assert ran.status == 0, ran.err
    assert kind(broker_url, name) == "quorum"
    with Publisher(broker_url, exchange) as publisher:
        publisher.publish(
            DomainEvent("order.paid.now"),
        )
    assert onlooker.count(broker_url, name) == 2
    other = run(broker_url, "rename", "nobody", "else", "shop:subscriber", cwd=tmp_path)
    assert other.status != 0


def refuses(url: str, *words: str, status: int) -> str:
    """One line, no traceback."""
    ran = run(url, *words)
    assert (ran.status, ran.out) == (status, "")
    assert ran.err.count("\n") == 1
    return ran.err


def test_what_cannot_be_done_safely_is_refused_with_the_way_out(
    broker_url: str, name: str, exchange: str, names: Names
) -> None:
    words = ("migrate", name, "--exchange", exchange)
    keys = ("--binding-key", "user.*")
    missing = refuses(broker_url, *words, *keys, status=exits.TOPOLOGY)
    assert "no queue" in missing
    declare_classic(broker_url, name, exchange)
    assert "--binding-key" in refuses(broker_url, *words, status=exits.USAGE)
    wrong = refuses(broker_url, "migrate", name, *keys, "--exchange", f"{exchange}-x", status=2)
    assert "no exchange" in wrong
    with onlooker.channel(broker_url) as channel:
        channel.basic_consume(name, lambda _message: None)
        held = refuses(broker_url, *words, *keys, status=exits.USAGE)
        assert "1 consumers" in held
        assert "--held-for" in held
        assert "--management" in held
    with DeadLetters(name, broker_url) as letters:
        assert list(letters) == []
        walked = run(broker_url, *words, *keys, *HELD)
        assert walked.status == exits.TOPOLOGY
        assert "walks over its dead letters" in walked.err
    other = names.queue("lazy")
    onlooker.bind_queue(broker_url, other, exchange, "#", **{"x-max-priority": 3})
    unknown = refuses(
        broker_url, "migrate", other, "--exchange", exchange, *keys, status=exits.TOPOLOGY
    )
    assert "x-max-priority" in unknown
    assert kind(broker_url, name) == "classic"
    assert leftovers(broker_url, name) == []


def test_events_by_keys_that_were_not_named_stop_it_before_anything_is_deleted(
    broker_url: str, name: str, exchange: str
) -> None:
    """Their binding would be gone with the old queue."""
    declare_classic(broker_url, name, exchange)
    onlooker.bind_queue(
        broker_url, name, exchange, "order.*", **{"x-dead-letter-exchange": f"{name}-dlx"}
    )
    with Publisher(broker_url, exchange) as publisher:
        publisher.publish_many([DomainEvent("user.a"), DomainEvent("order.b")])
    words = ("migrate", name, "--exchange", exchange, *HELD, "--binding-key", "user.*")
    ran = run(broker_url, *words)
    assert ran.status == exits.USAGE
    assert "order.b" in ran.err.splitlines()[-1]
    assert kind(broker_url, name) == "classic"
    ran = run(broker_url, *words, "--binding-key", "order.*")
    assert ran.status == 0, ran.err
    with Publisher(broker_url, exchange) as publisher:
        publisher.publish(DomainEvent("order.c"))
    keys = [json.loads(body)["routing_key"] for body in onlooker.take_all(broker_url, name)]
    assert keys == ["user.a", "order.b", "order.c"]


def test_only_one_runs_at_a_time_and_a_stop_is_not_the_end(
    broker_url: str, name: str, exchange: str
) -> None:
    """A consumer that holds an event makes it stop; the next run goes on."""
    declare_classic(broker_url, name, exchange, DomainEvent("user.a"))
    words = ("migrate", name, "--exchange", exchange, "--binding-key", "user.*")
    with onlooker.channel(broker_url) as channel:
        channel.basic_consume(name, lambda _message: None)
        first = subprocess.Popen(
            [sys.executable, "-m", "domain_events", *words, "--held-for", "600"],
            env={**os.environ, "DOMAIN_EVENTS_URL": broker_url, "PATH": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert first.stderr is not None
        for line in first.stderr:
            if "may hold" in line:
                break
        second = run(broker_url, *words, *HELD)
        assert second.status == exits.TOPOLOGY
        assert "another migrate" in second.err
        first.terminate()
        first.communicate(timeout=60)
        assert first.returncode == exits.TERMINATED
        stopped = run(broker_url, *words, "--held-for", "600", "--wait", "1")
        assert stopped.status == exits.PARTIAL
        assert "run the same command again" in stopped.err
    assert kind(broker_url, name) == "classic"
    ran = run(broker_url, *words, *HELD)
    assert ran.status == 0, ran.err
    assert onlooker.count(broker_url, name) == 1
    again = run(broker_url, *words, *HELD)
    assert (again.status, again.err.count("done")) == (0, 1)


def test_a_policy_that_would_cost_events_is_refused(managed_node: Managed, unique: str) -> None:
    """On a queue in which they wait; what the queue to be moved has already is no news."""
    name, exchange, new = f"{unique}-mailer", f"{unique}-x", f"{unique}-new"
    declare_classic(managed_node.url, name, exchange)
    words = ("--exchange", exchange, "--management", managed_node.management, "--dry-run")
    migrate, rename = ("migrate", name, *words), ("rename", name, new, *words)
    try:
        with managed_node.policy("limits", f"^{unique}", {"max-length": 9}):
            refused = refuses(managed_node.url, *migrate, status=exits.TOPOLOGY)
            assert f"'limits' sets max-length = 9 for '{name}.migrate." in refused
            assert "clear_policy limits" in refused
            assert run(managed_node.url, *rename).status == 0
        with managed_node.policy("limits", f"^{new}", {"expires": 600_000}, operator=True):
            refused = refuses(managed_node.url, *rename, status=exits.TOPOLOGY)
            assert f"expires = 600000 for '{new}'" in refused
            assert "clear_operator_policy limits" in refused
        allowed = run(managed_node.url, *migrate)
        assert (allowed.status, "polic" in allowed.err) == (0, False)
    finally:
        onlooker.delete(managed_node.url, queues=[name, f"{name}-dl"], exchanges=[exchange])


@pytest.mark.parametrize(
    ("key", "value", "costs"),
    [
        ("message-ttl", 60_000, True),
        ("max-length-bytes", 10**9, True),
        ("delivery-limit", 99, True),
        ("delivery-limit", 100, False),
        ("delayed-retry-type", "all", True),
        ("delayed-retry-type", "disabled", False),
        ("dead-letter-exchange", "other", False),
    ],
)
def test_policies_that_cost_events_are_known(key: str, value: object, costs: bool) -> None:
    policy = {"name": "p", "pattern": "^mail", "apply-to": "queues", "priority": 0}
    policy |= {"definition": {key: value, "overflow": "drop-head"}, "operator": False}
    arguments = topology.subscriber_queue("mailer").arguments
    assert set(lossy([policy], "mailer", "quorum", arguments)) == (
        {(key, value)} if costs else set()
    )
    assert not lossy([policy], "other", "quorum", arguments)


@pytest.mark.slow
def test_statistics_prove_that_consumers_hold_nothing(
    node_factory: Callable[..., Node], unused_port: int
) -> None:
    """With the management plugin: bindings are read, and no time has to be named."""
    node = node_factory(
        plugins=["rabbitmq_management"], config=f"management.tcp.port = {unused_port}\n"
    )
    node.start()
    service = Service(node.url, "mailer", "shop")
    try:
        service.deploy(OURS, "queue_type=classic")
        with service.published():
            ran = run(
                *(node.url, "migrate", "mailer", "--exchange", "shop"),
                *("--management", f"http://127.0.0.1:{unused_port}"),
            )
            assert ran.status == 0, ran.err
            service.deploy(OURS)
        wait_until(lambda: not service.missing)
    finally:
        service.close()


# --- faults --------------------------------------------------------------------------------------


def kill_matrix(url: str, *options: str, broken: str = "") -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, KILLS, url, *options],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            **({"BROKEN": broken} if broken else {}),
        },
        stdout=subprocess.PIPE,
        text=True,
        timeout=1500,
        check=False,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def assert_nothing_was_lost(result: dict[str, Any]) -> None:
    assert result["troubles"] == []
    assert (result["lost"], result["unknown"]) == (0, 0), result
    assert result["more than were sent meanwhile"] == []


COMMANDS = {
    "migrate": ("--command", "migrate"),
    "rename": ("--command", "rename", "--queue-type", "quorum"),
    "rename of a classic queue": ("--command", "rename"),
}


@pytest.mark.parametrize("command", ["migrate", "rename"])
def test_nothing_is_lost_when_it_is_killed_at_some_step(broker_url: str, command: str) -> None:
    """At some of the steps, others in each run; `slow` has all of them."""
    first = str(1 + int(time.time()) % 40)
    result = kill_matrix(
        broker_url, *COMMANDS[command], "--every", "40", "--steps", "120", "--first", first
    )
    assert result["cases"] == 3
    assert_nothing_was_lost(result)


@thorough
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_lost_when_it_is_killed_at_any_step(broker_url: str, command: str) -> None:
    result = kill_matrix(broker_url, *COMMANDS[command])
    assert result["cases"] > 50
    assert_nothing_was_lost(result)


@thorough
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mistake", BREAK)
def test_the_matrix_notices_a_mistake(broker_url: str, mistake: str) -> None:
    result = kill_matrix(
        broker_url, "--first", "20", "--every", "17", "--steps", "130", broken=mistake
    )
    assert result["lost"], result


@pytest.mark.slow
def test_a_restart_of_the_broker_is_survived(killable_node: Node, unique: str) -> None:
    """Killed while the queue is drained: it goes on by itself as soon as the broker is back."""
    name, exchange, url = f"{unique}-mailer", f"{unique}-x", killable_node.url
    events = [DomainEvent("user.a", {"n": number}) for number in range(3000)]
    declare_classic(url, name, exchange, *events)
    command = subprocess.Popen(
        [
            *(sys.executable, "-m", "domain_events", "migrate", name, "--exchange", exchange),
            *("--binding-key", "user.*", *HELD),
        ],
        env={**os.environ, "DOMAIN_EVENTS_URL": url, "PATH": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert command.stderr is not None
    for line in command.stderr:
        if "events are left" in line:
            break
    killable_node.kill()
    killable_node.start()
    rest = command.stderr.read()
    command.stderr.close()
    assert command.wait(120) == 0, rest
    numbers = [json.loads(body)["data"]["n"] for body in onlooker.take_all(url, name)]
    assert list(dict.fromkeys(numbers)) == list(range(len(events)))
    assert len(numbers) <= len(events) + 2 * MOST_UNDER_WAY
    assert leftovers(url, name) == []
