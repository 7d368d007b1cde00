"""What Prometheus scrapes: domain_events/prometheus.py, on a real RabbitMQ and over real HTTP."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import outbox_databases
import pytest
import test_servers
import yaml
from bench import Bench, running
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rabbitmq_node import Node, free_port
from support import Names, sooner_than, wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    ConnectionChange,
    ConnectionState,
    DeadLetters,
    Delivered,
    DomainEvent,
    EventNotConfirmed,
    EventUnroutable,
    Middleware,
    Operation,
    Outcome,
    Outgoing,
    Publisher,
    Reject,
    Retry,
    Subscriber,
    configure,
    demo,
    outbox,
)
from domain_events.prometheus import OutboxMetrics, Prometheus, Server, serve
from domain_events.testing import EventBroker

DOCS = Path(__file__).parent.parent / "docs" / "prometheus"
PROMTOOL = shutil.which("promtool")
PROGRAM = Path(__file__).parent / "programs" / "metered.py"


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels; 0 if there is none."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == f"domain_events_{name}" and labels.items() <= sample.labels.items()
        )


def scraped(server: Server | int) -> Scrape:
    port = server if isinstance(server, int) else server.port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return Scrape(answer.read().decode())


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def prometheus(registry: CollectorRegistry) -> Prometheus:
    return Prometheus(registry)


@pytest.fixture
def server(registry: CollectorRegistry) -> Iterator[Server]:
    with serve(0, "127.0.0.1", registry) as server:
        yield server


@pytest.fixture
def middleware_of_process(prometheus: Prometheus) -> Iterator[None]:
    """As most programs have it: given to `configure`."""
    configure(middleware=[prometheus])
    yield
    configure()


# ------------------------------------------------------------------ what is counted


def test_scrape_shows_what_became_of_each_delivery(
    broker_url: str, names: Names, prometheus: Prometheus, server: Server
) -> None:
    """Handled, a retry, a dead letter, a dropped one, a message that is not an event."""
    exchange, kept, lost = names.exchange(), names.queue("kept"), names.queue("lost")

    def handle(event: DomainEvent[Any]) -> None:
        if event.data == "retry" and not event.retries:
            raise Retry(0.1)
        if event.data == "reject":
            raise Reject("no")
        if event.data == "fail":
            raise ZeroDivisionError

    subscriber = Subscriber(broker_url, exchange, middleware=[prometheus])
    subscriber.register(handle, kept, ["a"], max_retries=1)
    subscriber.register(handle, lost, ["a"], dead_letter=False)
    with Publisher(broker_url, exchange, middleware=[prometheus]) as publisher, running(subscriber):
        publisher.publish(DomainEvent("a", "well"))
        publisher.publish_many([DomainEvent("a", data) for data in ("retry", "reject", "fail")])
        wait_until(lambda: scraped(server)("delivered_total") == 9)
        wait_until(lambda: scraped(server)("published_total") == 7)
    scrape = scraped(server)

    def delivered(subscriber: str, outcome: str, exception: str = "") -> float:
        return scrape(
            "delivered_total", subscriber=subscriber, outcome=outcome, exception=exception
        )

    assert delivered(kept, "handled") == 2
    assert delivered(kept, "retry", "Retry") == 1
    assert delivered(kept, "dead letter", "Reject") == 1
    assert delivered(kept, "dead letter", "ZeroDivisionError") == 1
    assert delivered(lost, "handled") == 1
    assert delivered(lost, "dropped", "Retry") == 1
    assert delivered(lost, "dropped", "Reject") == 1
    assert delivered(lost, "dropped", "ZeroDivisionError") == 1
    assert scrape("handler_time_seconds_count", subscriber=kept) == 5
    assert scrape("critical_time_seconds_count", subscriber=kept) == 2
    # The delay of its retry is part of it.
    assert scrape("critical_time_seconds_sum", subscriber=kept) > 0.1
    assert scrape("in_progress") == 0

    def published(operation: str, **labels: str) -> float:
        return scrape("published_total", operation=operation, outcome="confirmed", **labels)

    assert published("publish", exchange=exchange, subscriber="", exception="") == 4
    assert published("retry", exchange="", subscriber=kept) == 1
    assert published("dead letter", exchange="", subscriber=kept) == 2
    assert scrape("publish_time_seconds_count", operation="publish") == 4


def test_replay_is_not_counted_as_published(
    broker_url: str,
    names: Names,
    prometheus: Prometheus,
    server: Server,
    middleware_of_process: None,
) -> None:
    exchange, name = names.exchange(), names.queue()
    subscriber = Subscriber(broker_url, exchange)
    subscriber.register(lambda event: 1 / event.data, name, ["a"])
    with (
        Publisher(broker_url, exchange) as publisher,
        DeadLetters(name, broker_url) as dead_letters,
        running(subscriber),
    ):
        publisher.publish(DomainEvent("a", 0))
        wait_until(lambda: dead_letters.count() == 1)
        assert dead_letters.replay_all() == 1
        wait_until(lambda: scraped(server)("published_total", operation="dead letter") == 2)
    scrape = scraped(server)
    assert scrape("published_total", operation="publish") == 1
    assert scrape("published_total", operation="replay", subscriber=name) == 1


def test_publish_errors_are_counted_by_their_class(
    broker_url: str, exchange: str, unused_port: int, prometheus: Prometheus, server: Server
) -> None:
    nowhere = f"amqp://guest:guest@127.0.0.1:{unused_port}/%2F"
    with (
        Publisher(broker_url, exchange, middleware=[prometheus]) as publisher,
        pytest.raises(EventUnroutable),
    ):
        publisher.publish(DomainEvent("nobody.listens"), mandatory=True)
    with (
        Publisher(nowhere, exchange, timeout=0.2, middleware=[prometheus]) as publisher,
        pytest.raises(BrokerUnavailable),
    ):
        publisher.publish(DomainEvent("nobody.listens"))
    scrape = scraped(server)
    for error in ("EventUnroutable", "BrokerUnavailable"):
        assert scrape("published_total", outcome="failed", exception=error, exchange=exchange) == 1
    assert scrape("published_total", outcome="confirmed") == 0
    # The attempts took their time, and it is counted.
    assert scrape("publish_time_seconds_sum", operation="publish") >= 0.2


def test_running_handlers_and_the_oldest_of_them_are_shown(
    prometheus: Prometheus, server: Server, unique: str
) -> None:
    """Its start, so that the age is right whenever it is asked; +Inf once none runs."""
    url = f"memory://{unique}"
    go_on = threading.Event()
    subscriber = Subscriber(url, unique, workers=2, middleware=[prometheus])
    subscriber.register(lambda _: go_on.wait(60) and None, unique, ["#"])
    before = time.time()
    with Publisher(url, unique) as publisher, running(subscriber):
        publisher.publish(DomainEvent("a"))
        wait_until(lambda: scraped(server)("in_progress", subscriber=unique) == 1)
        oldest = scraped(server)("oldest_handler_start_time_seconds", subscriber=unique)
        assert before <= oldest <= time.time()
        publisher.publish(DomainEvent("a"))
        wait_until(lambda: scraped(server)("in_progress", subscriber=unique) == 2)
        assert scraped(server)("oldest_handler_start_time_seconds", subscriber=unique) == oldest
        go_on.set()
        wait_until(lambda: scraped(server)("in_progress", subscriber=unique) == 0)
    assert scraped(server)("oldest_handler_start_time_seconds", subscriber=unique) == math.inf


def test_unsettled_deliveries_of_a_subscriber_are_shown_as_long_as_it_exists(
    bench: Bench, prometheus: Prometheus, server: Server
) -> None:
    name = bench.names.queue()
    go_on = threading.Event()
    subscriber = bench.subscriber()
    subscriber.register(lambda _: go_on.wait(60) and None, name, ["#"])
    prometheus.watch(subscriber)
    assert scraped(server)("unsettled", subscriber=name) == 0
    with running(subscriber):
        bench.publisher.publish_many([DomainEvent("a") for _ in range(5)])
        wait_until(lambda: scraped(server)("unsettled", subscriber=name) == 5)
        go_on.set()
        wait_until(lambda: scraped(server)("unsettled", subscriber=name) == 0)
        go_on.clear()
        bench.publisher.publish(DomainEvent("a"))
        wait_until(lambda: scraped(server)("unsettled", subscriber=name) == 1)
        go_on.set()
    gone = weakref.ref(subscriber)
    del subscriber
    wait_until(lambda: gc.collect() >= 0 and gone() is None)
    assert scraped(server)("unsettled", subscriber=name) == 0


def test_critical_time_is_zero_when_the_publishers_clock_is_ahead(
    prometheus: Prometheus, server: Server, unique: str
) -> None:
    url = f"memory://{unique}"
    subscriber = Subscriber(url, unique, middleware=[prometheus])
    subscriber.register(lambda _: None, unique, ["#"])
    with Publisher(url, unique) as publisher, running(subscriber):
        publisher.publish(DomainEvent("a", timestamp=time.time() + 3600))
        wait_until(lambda: scraped(server)("critical_time_seconds_count") == 1)
    assert scraped(server)("critical_time_seconds_sum") == 0


def test_routing_keys_ids_and_texts_are_never_labels(
    prometheus: Prometheus, server: Server, unique: str
) -> None:
    """A hundred events of a hundred routing keys and error messages have the series of one."""
    url = f"memory://{unique}"

    def handle(event: DomainEvent[Any]) -> None:
        raise ValueError(event.uuid_string)

    subscriber = Subscriber(url, unique, middleware=[prometheus])
    subscriber.register(handle, unique, ["#"])
    with Publisher(url, unique, middleware=[prometheus]) as publisher, running(subscriber):
        publisher.publish(DomainEvent("first"))
        wait_until(lambda: scraped(server)("published_total", operation="dead letter") == 1)
        few = {(each.name, *sorted(each.labels.items())) for each in scraped(server).samples}
        publisher.publish_many([DomainEvent(f"key.{n}", n, f"id-{n}") for n in range(100)])
        wait_until(lambda: scraped(server)("published_total", operation="dead letter") == 101)
        many = {(each.name, *sorted(each.labels.items())) for each in scraped(server).samples}
    assert many == few


# ------------------------------------------------------------------ connections


def test_outage_shows_as_disconnected_and_then_as_a_reconnect(
    killable_node: Node, unique: str, prometheus: Prometheus, server: Server
) -> None:
    subscriber = Subscriber(killable_node.url, unique, middleware=[prometheus])
    subscriber.register(lambda _: None, unique, ["#"])
    consuming = {"owner": "subscriber", "purpose": "consuming"}
    with running(subscriber):
        wait_until(lambda: scraped(server)("connected", **consuming) == 1)
        assert scraped(server)("disconnected", **consuming) == 0
        assert scraped(server)("reconnects_total", **consuming) == 0
        killable_node.kill()
        wait_until(lambda: scraped(server)("disconnected", **consuming) == 1)
        assert scraped(server)("connected", **consuming) == 0
        killable_node.start()
        wait_until(lambda: scraped(server)("connected", **consuming) == 1, timeout=90)
        assert scraped(server)("disconnected", **consuming) == 0
        assert scraped(server)("reconnects_total", **consuming) == 1
    # Closed by its owner: nothing to be alarmed about.
    wait_until(lambda: scraped(server)("connected") == 0)
    assert scraped(server)("disconnected") == 0


def test_each_of_several_connections_is_followed(
    killable_node: Node, broker_url: str, exchange: str, prometheus: Prometheus, server: Server
) -> None:
    """Of two publishers one is cut off, and then closed while it is."""
    publishing = {"owner": "publisher", "purpose": "publishing"}
    cut_off = Publisher(killable_node.url, exchange, middleware=[prometheus])
    with Publisher(broker_url, exchange, middleware=[prometheus]) as publisher:
        for each in (cut_off, publisher):
            each.publish(DomainEvent("a"))
        wait_until(lambda: scraped(server)("connected", **publishing) == 2)
        killable_node.kill()
        wait_until(lambda: scraped(server)("disconnected", **publishing) == 1)
        assert scraped(server)("connected", **publishing) == 1
        cut_off.close()
        wait_until(lambda: scraped(server)("disconnected", **publishing) == 0)
        assert scraped(server)("connected", **publishing) == 1
        assert scraped(server)("reconnects_total", **publishing) == 0


def test_broker_that_accepts_nothing_shows_as_blocked(
    killable_node: Node, unique: str, prometheus: Prometheus, server: Server
) -> None:
    with Publisher(killable_node.url, unique, middleware=[prometheus]) as publisher:
        publisher.publish(DomainEvent("a"))
        killable_node.ctl("set_vm_memory_high_watermark", "0.00001")
        try:
            with pytest.raises(EventNotConfirmed):
                publisher.publish(DomainEvent("a"), timeout=1)
            wait_until(lambda: scraped(server)("blocked") == 1)
            assert scraped(server)("connected") == 1
        finally:
            killable_node.ctl("set_vm_memory_high_watermark", "0.6")
        wait_until(lambda: scraped(server)("blocked") == 0)
    error = "EventNotConfirmed"
    assert scraped(server)("published_total", outcome="failed", exception=error) == 1


# ------------------------------------------------------------------ outboxes


@pytest.fixture
def outbox_database(tmp_path: Path) -> Iterator[outbox_databases.DbApi]:
    with outbox_databases.sqlite(str(tmp_path / "outbox.sqlite")).create() as database:
        yield database


def test_outbox_is_read_with_each_scrape(
    outbox_database: outbox_databases.DbApi, registry: CollectorRegistry, server: Server
) -> None:
    def read(name: str) -> float:
        return scraped(server)(f"outbox_{name}", outbox="shop")

    with EventBroker(), outbox.Relay(outbox_database) as relay:
        OutboxMetrics({"shop": relay}, registry)
        assert (read("readable"), read("waiting"), read("parked")) == (1, 0, 0)
        assert read("oldest_seconds") == 0
        with outbox_database.transaction() as execute:
            for _ in range(3):
                outbox.write(execute, "sqlite", DomainEvent("a"))
        outbox_database.run(
            f"UPDATE {outbox.OUTBOX} SET created = created - 1000",
            f"UPDATE {outbox.OUTBOX} SET body = '' WHERE id = 1",
        )
        assert read("waiting") == 3
        assert 1000 <= read("oldest_seconds") < 1100
        relay.sweep()
        assert (read("waiting"), read("parked"), read("relayed_total")) == (0, 1, 2)


def test_outbox_that_cannot_be_read_is_shown_as_such_and_holds_up_nothing(
    outbox_database: outbox_databases.DbApi,
    registry: CollectorRegistry,
    server: Server,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its database is gone, or does not answer; the others are shown, and it is when it is back."""
    answers = threading.Event()

    class Silent:
        def status(self) -> outbox.Waiting:
            assert answers.wait(60)
            return outbox.Waiting(1, 2.0, 3)

    relay = outbox.Relay(outbox_database)
    with outbox_databases.sqlite("/nowhere/at/all") as gone:
        gone.connect = lambda: sqlite3.connect(gone.name)
        outboxes: dict[str, Any]
        outboxes = {"shop": relay, "silent": Silent(), "gone": outbox.Relay(gone)}
        OutboxMetrics(outboxes, registry, timeout=1.0)
        with sooner_than(60):
            scrape = scraped(server)
    names = [sample.labels["outbox"] for sample in scrape.samples if "waiting" in sample.name]
    assert names == ["shop"]
    assert [scrape("outbox_readable", outbox=each) for each in outboxes] == [1, 0, 0]
    assert "'silent' cannot be read for its metrics: its database does not answer" in caplog.text
    assert "'gone' cannot be read for its metrics: OperationalError: unable to" in caplog.text
    assert caplog.text.count("cannot be read") == 2
    answers.set()
    wait_until(lambda: scraped(server)("outbox_parked", outbox="silent") == 3)
    assert caplog.text.count("cannot be read") == 2  # again only after a minute


def test_second_one_for_outboxes_is_refused(registry: CollectorRegistry) -> None:
    OutboxMetrics({}, registry)
    with pytest.raises(ConfigurationError, match=r"by another OutboxMetrics\(\); give all"):
        OutboxMetrics({}, registry)
    others: list[Any] = [None, [], {"shop": None}, {1: outbox.Relay}]
    for other in others:
        with pytest.raises(ConfigurationError, match="outboxes must be a dict of relays or outb"):
            OutboxMetrics(other, CollectorRegistry())
    with pytest.raises(ConfigurationError, match="timeout must be a positive number"):
        OutboxMetrics({}, CollectorRegistry(), timeout=0)


# ------------------------------------------------------------------ where it is served


def test_second_one_in_a_registry_is_refused_with_the_ways_out(registry: CollectorRegistry) -> None:
    """And the first one goes on."""
    first = Prometheus(registry)
    with pytest.raises(ConfigurationError, match="registered in this registry already"):
        Prometheus(registry)
    Prometheus(CollectorRegistry())
    first.publishing(Outgoing(Operation.PUBLISH, DomainEvent("a"), {}))(None)
    assert registry.get_sample_value(
        "domain_events_publish_time_seconds_count", {"operation": "publish"}
    )


def test_metric_of_the_users_with_one_of_our_names_leaves_the_registry_as_it_was(
    registry: CollectorRegistry,
) -> None:
    mine = Counter("domain_events_reconnects_total", "Mine.", registry=registry)
    with pytest.raises(ConfigurationError):
        Prometheus(registry)
    registry.unregister(mine)
    Prometheus(registry)


def test_what_cannot_be_scraped_is_refused_when_it_is_given(registry: CollectorRegistry) -> None:
    """And not in the log of each scrape."""
    prometheus = Prometheus(registry)
    others: list[Any] = [Publisher("memory://"), Subscriber, None, []]
    for other in others:
        with pytest.raises(ConfigurationError, match=r"watch\(\) takes a Subscriber, not"):
            prometheus.watch(other)
        with pytest.raises(ConfigurationError, match="registry must be a CollectorRegistry"):
            Prometheus(other)
        with pytest.raises(ConfigurationError, match="registry must be a CollectorRegistry"):
            serve(0, "127.0.0.1", other)
        with pytest.raises(ConfigurationError, match="host must be an address"):
            serve(0, other)
        with pytest.raises(ConfigurationError, match="port must be an int from 0 to 65,535"):
            serve(other)


def test_port_that_is_taken_is_an_error_that_says_what_to_do(
    server: Server, registry: CollectorRegistry
) -> None:
    with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{server.port}: .*another port"):
        serve(server.port, "127.0.0.1", registry)
    with pytest.raises(ConfigurationError, match="65536"):
        serve(65536, "127.0.0.1", registry)
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1:0: "):
        serve(0, "192.0.2.1", registry)  # for documentation; no machine has this address


def test_closed_server_leaves_its_port_free(registry: CollectorRegistry) -> None:
    server = serve(0, "127.0.0.1", registry)
    assert scraped(server).samples == []
    server.close()
    server.close()
    with serve(server.port, "127.0.0.1", registry) as again:
        assert scraped(again).samples == []
    with serve(0, registry=registry) as everywhere:
        assert scraped(everywhere).samples == []


def test_clients_that_send_nothing_are_disconnected(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    """They would keep a thread each. Meanwhile others are served; stderr has no line of that."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as silent:
        scraped(server)
        assert silent.recv(1) == b""
    assert capfd.readouterr() == ("", "")


def test_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import domain_events.prometheus"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "pip install 'domain-events-rabbitmq[prometheus]'" in done.stderr


# ------------------------------------------------------------------ processes, threads, signals


def run_program(
    scenario: str, *, measured: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a scenario of programs/metered.py; not ``measured``: without coverage."""
    kept = {k: v for k, v in os.environ.items() if measured or not k.startswith("COVERAGE_")}
    return subprocess.run(
        [sys.executable, str(PROGRAM), scenario],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_one_server_shows_all_processes_in_multiprocess_mode(tmp_path: Path) -> None:
    """Two forked processes: counters are sums; what a dead one was at is gone."""
    program = run_program("processes", PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert program.returncode == 0, program.stderr
    running_, one_dead, none = [Scrape(text) for text in program.stdout.split("=====\n")]
    handled = {"subscriber": "metered", "outcome": "handled"}
    assert running_("delivered_total", **handled) == 6
    assert running_("published_total", operation="publish") == 9
    assert running_("handler_time_seconds_count") == 6
    assert running_("in_progress", subscriber="metered") == 2
    # Not of the parent, in which none runs.
    assert time.time() - 600 < running_("oldest_handler_start_time_seconds") <= time.time()
    assert one_dead("in_progress") == 1
    assert one_dead("delivered_total", **handled) == 6
    assert none("in_progress") == 0
    assert none("oldest_handler_start_time_seconds") in (0, math.inf)


def test_missing_multiprocess_directory_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, registry: CollectorRegistry
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "missing"))
    with pytest.raises(ConfigurationError, match="PROMETHEUS_MULTIPROC_DIR"):
        Prometheus(registry)
    with pytest.raises(ConfigurationError, match="PROMETHEUS_MULTIPROC_DIR"):
        serve(0, "127.0.0.1", registry)


def test_metrics_that_cannot_be_written_are_not_in_the_way_of_events(tmp_path: Path) -> None:
    """The directory vanishes. It is logged, once and not with each event."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    program = run_program("unwritable", PROMETHEUS_MULTIPROC_DIR=str(folder))
    assert program.returncode == 0, program.stderr
    assert program.stdout == "handled 100\n"
    assert program.stderr.count("Metrics could not be updated") == 1


@pytest.mark.slow
def test_child_of_a_busy_process_is_not_stuck_at_a_lock_of_the_parents(tmp_path: Path) -> None:
    """Threads update metrics while the process forks, a hundred times.

    In multiprocess mode, where an update holds a lock for longer.
    """
    # Coverage has a lock of its own, at which children would be stuck.
    program = run_program("forks", measured=False, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert program.returncode == 0, program.stderr


def test_child_of_a_fork_shows_its_own_handlers_and_connections_only() -> None:
    program = run_program("child")
    assert program.returncode == 0, program.stderr


def test_signal_handler_that_publishes_is_not_stuck_at_an_update_that_it_interrupts() -> None:
    """And what it counted is counted."""
    program = run_program("signals")
    assert program.returncode == 0, program.stderr
    interrupted, counted = program.stdout.split()
    assert interrupted == counted


@pytest.mark.parametrize("kind", ["gunicorn", "uwsgi"])
def test_workers_of_a_web_server_are_scraped_together(
    kind: str, broker_url: str, tmp_path: Path
) -> None:
    """As the documentation has it. A worker is killed: nothing of it is shown for ever."""
    port = free_port()
    if kind == "gunicorn":
        command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers=2"]
        command += ["--config", str(DOCS / "gunicorn.conf.py"), "service:application"]
        command += ["--pythonpath", str(DOCS), "--preload"]
    else:
        command = test_servers.uwsgi("--processes", "2", "--enable-threads")(port)
        command[command.index("wsgi.py")] = str(DOCS / "uwsgi_service.py")
        command += ["--pythonpath", str(DOCS)]
    (tmp_path / "metrics").mkdir()
    environment = {
        **{key: value for key, value in os.environ.items() if "COVERAGE" not in key},
        "DOMAIN_EVENTS_URL": broker_url,
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"),
    }
    confirmed = {"operation": "publish", "outcome": "confirmed", "exchange": "domain-events"}
    with test_servers.server(command, port, environment, tmp_path / "log") as request:
        pids: list[str] = []

        def have_published(workers: int) -> bool:
            with ThreadPoolExecutor(8) as pool:
                pids.extend(each.result() for each in [pool.submit(request) for _ in range(8)])
            return len(set(pids)) == workers

        wait_until(lambda: have_published(2))
        # Another request showed that the server was up.
        assert scraped(port)("published_total", **confirmed) == len(pids) + 1
        assert scraped(port)("connected", owner="publisher", purpose="publishing") == 2
        os.kill(int(pids[0]), signal.SIGKILL)
        if kind == "gunicorn":
            wait_until(lambda: scraped(port)("connected") == 1)
        wait_until(lambda: have_published(3))
        assert scraped(port)("published_total", **confirmed) == len(pids) + 1
        assert scraped(port)("connected", owner="publisher", purpose="publishing") == 2


# ------------------------------------------------------------------ dashboard, alerts, docs


def excerpt(scrape: str) -> str:
    """What the documentation shows: in a fixed order, and without times and half of the owners."""
    families: list[tuple[list[str], list[str]]] = []
    for line in scrape.splitlines():
        if line.startswith("# HELP"):
            families.append(([line], []))
        elif line.startswith("#"):
            families[-1][0].append(line)
        elif not re.search(r'_(bucket|sum|created){|owner="dead letters"', line):
            families[-1][1].append(line)
    shown = [[*about, *sorted(samples)] for about, samples in families if samples]
    return "".join(f"{line}\n" for family in shown for line in family)


class Snapshot(Middleware):
    """Scrapes once the dead letter of the demo has been replayed and handled."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.text = ""

    def delivered(self, delivered: Delivered) -> None:
        event = delivered.event
        if event is not None and event.replayed and delivered.outcome is Outcome.HANDLED:
            # The operator's side of the replay may be a moment later.
            wait_until(lambda: scraped(self.server)("published_total", operation="replay") == 1)
            self.text = scraped(self.server).text


@pytest.mark.usefixtures("demo_alone")
def test_documented_scrape_is_that_of_the_demo(
    broker_url: str, prometheus: Prometheus, server: Server
) -> None:
    """To renew the file after a change: paste what the failed test shows."""
    snapshot = Snapshot(server)
    configure(middleware=[snapshot, prometheus])
    try:
        demo.run([broker_url])
    finally:
        configure()
    assert excerpt(snapshot.text) == (DOCS / "scrape.txt").read_text()


def test_dashboard_and_alerts_use_metrics_and_labels_that_exist(
    registry: CollectorRegistry, prometheus: Prometheus
) -> None:
    labels = labels_by_metric(prometheus, registry)
    for expression in (*alert_expressions(), *dashboard_expressions()):
        used = set(re.findall(r"\bdomain_events_\w+", expression))
        assert used, expression
        assert used <= labels.keys(), expression
        known = {"job", "instance", "le"}.union(*(labels[name] for name in used))
        for name, matchers in re.findall(r"(\bdomain_events_\w+){([^}]*)}", expression):
            matched = set(re.findall(r"(\w+)\s*!?=", matchers))
            assert matched
            assert matched <= labels[name] | {"job", "instance"}, expression
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= known, expression
    # And none is forgotten, but for those that a histogram has for its own purposes.
    text = " ".join(dashboard_expressions())
    shown = {re.sub("_bucket$", "", name) for name in re.findall(r"\bdomain_events_\w+", text)}
    assert shown == {re.sub("_(bucket|sum|count)$", "", name) for name in labels}


def test_values_of_labels_in_dashboard_and_alerts_are_those_of_the_library() -> None:
    values = {
        "outcome": {str(outcome) for outcome in Outcome} | {"confirmed", "failed"},
        "operation": {str(operation) for operation in Operation},
    }
    matchers = re.findall(
        r'(outcome|operation)=~?"([^"]*)"',
        " ".join([*alert_expressions(), *dashboard_expressions()]),
    )
    assert matchers
    for label, value in matchers:
        assert set(value.split("|")) <= values[label]


def test_alerts_say_what_is_wrong_and_are_all_explained_and_tested() -> None:
    documented = (DOCS.parent / "alarms.rst").read_text()
    tested = yaml.safe_load((DOCS / "alerts.test.yml").read_text())
    fired = {
        case["alertname"]
        for test in tested["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    for rule in alert_rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        row = re.search(rf"``{rule['alert']}``: (\w+), (.+)\n", documented)
        assert row
        assert row[1] == rule["labels"]["severity"]
        if "for" in rule:
            assert f"for {re.sub('[a-z]', '', rule['for'])} minute" in row[2], rule["alert"]
        assert rule["alert"] in fired


def test_dashboard_can_be_imported_into_grafana() -> None:
    """Its parts refer to each other: data source, variables, ids, and no panel covers another."""
    dashboard = json.loads((DOCS / "dashboard.json").read_text())
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    used = {a or b for a, b in re.findall(r"\$(\w+)|\${(\w+)}", json.dumps(dashboard))}
    assert used <= variables | {"__rate_interval", "__range", "__all"}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & covered, panel["title"]
        assert at["x"] + at["w"] <= 24
        covered |= cells
        for target in panel["targets"]:
            assert (
                target["datasource"]
                == panel["datasource"]
                == {
                    "type": "prometheus",
                    "uid": "${datasource}",
                }
            )


@pytest.mark.skipif(not PROMTOOL, reason="promtool is in Debian's package prometheus")
def test_prometheus_itself_accepts_alerts_dashboard_and_metrics(
    tmp_path: Path, registry: CollectorRegistry, prometheus: Prometheus
) -> None:
    """And each alert fires when it should, and not before: docs/prometheus/alerts.test.yml."""
    recorded = [
        {"record": f"panel:{number}", "expr": expression.replace("$__range", "1h")}
        for number, expression in enumerate(dashboard_expressions())
    ]
    dashboard = tmp_path / "dashboard.yml"
    dashboard.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": recorded}]}))
    promtool("check", "rules", str(dashboard), str(DOCS / "alerts.yml"))
    promtool("test", "rules", str(DOCS / "alerts.test.yml"))
    labels_by_metric(prometheus, registry)
    promtool("check", "metrics", stdin=generate_latest(registry).decode())


def promtool(*arguments: str, stdin: str = "") -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DOCS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alert_expressions() -> list[str]:
    return [rule["expr"] for rule in alert_rules()]


def dashboard_expressions() -> list[str]:
    """As Grafana sends them, with the variables replaced."""
    panels = json.loads((DOCS / "dashboard.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    return [
        expression.replace("$__rate_interval", "5m")
        .replace("$job", ".*")
        .replace("$subscriber", ".*")
        for expression in expressions
    ]


class _SomeOutbox:
    def status(self) -> outbox.Status:
        return outbox.Status(1, 1.0, 1, 1, 1.0, {})


def labels_by_metric(prometheus: Prometheus, registry: CollectorRegistry) -> dict[str, set[str]]:
    """Every metric that there is, by the name that a query uses, and its labels."""
    event = DomainEvent("a")
    prometheus.publishing(Outgoing(Operation.PUBLISH, event, {}, "x"))(None)
    with prometheus.handling(event):
        pass
    prometheus.delivered(Delivered("s", event, Outcome.HANDLED, seconds=0.1))
    state, url = ConnectionState.CONNECTED, "amqp://x"
    prometheus.connection(ConnectionChange(state, "publisher", "publishing", url))
    subscriber = Subscriber("memory://labels")
    subscriber.register(lambda _: None, "s", ["a"])
    prometheus.watch(subscriber)
    OutboxMetrics({"o": _SomeOutbox()}, registry)
    samples = [sample for family in registry.collect() for sample in family.samples]
    return {
        sample.name: set(sample.labels)
        for sample in samples
        if not sample.name.endswith("_created")
    }
