"""What Prometheus scrapes: domain_events/prometheus.py, on a real RabbitMQ and over real HTTP."""

from __future__ import annotations

import gc
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, running
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families
from rabbitmq_node import Node
from support import Names, wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DeadLetters,
    DomainEvent,
    EventNotConfirmed,
    EventUnroutable,
    Operation,
    Outgoing,
    Publisher,
    Reject,
    Retry,
    Subscriber,
    configure,
)
from domain_events.prometheus import Prometheus, Server, serve

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


def scraped(server: Server | str) -> Scrape:
    port = server if isinstance(server, str) else server.port
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


def test_port_that_is_taken_is_an_error_that_says_what_to_do(
    server: Server, registry: CollectorRegistry
) -> None:
    with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{server.port}: .*another port"):
        serve(server.port, "127.0.0.1", registry)
    with pytest.raises(ConfigurationError, match="65536"):
        serve(65536, "127.0.0.1", registry)
    with pytest.raises(ConfigurationError, match="no-such-host"):
        serve(0, "no-such-host.invalid", registry)


def test_closed_server_leaves_its_port_free(registry: CollectorRegistry) -> None:
    server = serve(0, "127.0.0.1", registry)
    assert scraped(server).samples == []
    server.close()
    server.close()
    with serve(server.port, "127.0.0.1", registry) as again:
        assert scraped(again).samples == []


def test_clients_that_send_nothing_are_disconnected(server: Server) -> None:
    """They would keep a thread each. Meanwhile others are served."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as silent:
        scraped(server)
        assert silent.recv(1) == b""


# ------------------------------------------------------------------ processes, threads, signals


def run_program(scenario: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), scenario],
        env={**os.environ, **environment},
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


def test_child_of_a_busy_process_is_not_stuck_at_a_lock_of_the_parents() -> None:
    """Threads update metrics while the process forks, two hundred times."""
    program = run_program("forks")
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
