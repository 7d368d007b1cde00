"""What is a mistake ends at once; what passes is waited for; nothing is a storm."""

from __future__ import annotations

import gc
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import onlooker
import pytest
from bench import Bench, Events
from fake_broker import serving
from live import consuming
from rabbitmq_node import Node
from support import Names, wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DeadLetters,
    DomainEvent,
    DomainEventsError,
    Publisher,
    Subscriber,
    TopologyError,
)
from domain_events.broker import Exchange, Queue
from domain_events.broker.rabbitmq import attempts as attempts_module
from domain_events.broker.rabbitmq.transport import Attempt
from domain_events.handling import Subscription
from domain_events.retry import Backoff

pytestmark = pytest.mark.timeout(120)

EVENT = DomainEvent("a.b", {})


# --- refused credentials: one attempt in some seconds --------------------------------------------


def errors_of(ask: Callable[[], object], times: int) -> set[str]:
    errors = set()
    for _ in range(times):
        with pytest.raises(ConfigurationError) as caught:
            ask()
        errors.add(str(caught.value))
    return errors


def test_refused_password_is_not_tried_again_at_once() -> None:
    """Whoever asks, one after the other: one login for all, and one error."""
    with serving(None) as server:
        url = f"amqp://guest:wrong@127.0.0.1:{server.port}/"

        def publish() -> None:
            with Publisher(url) as publisher:
                publisher.publish(EVENT)

        def register() -> None:
            with Subscriber(url) as subscriber:
                subscriber.register(print, "nothing", ["#"])

        def count() -> None:
            with DeadLetters("nothing", url) as letters:
                letters.count()

        begun = time.monotonic()
        errors = errors_of(publish, 30) | errors_of(register, 10) | errors_of(count, 10)
        with Publisher(url) as publisher:
            errors |= errors_of(lambda: publisher.publish(EVENT), 100)
            errors |= errors_of(lambda: publisher.publish_many([EVENT]), 10)
        assert server.logins <= 1 + (time.monotonic() - begun) // 5
        (error,) = errors
        assert "password is wrong" in error
        assert str(server.port) in error


def test_refused_password_is_tried_once_by_many_threads() -> None:
    """All at the same time: as long as nobody is in, one at a time asks."""
    with serving(None) as server:
        url = f"amqp://guest:wrong@127.0.0.1:{server.port}/"
        errors: list[str] = []
        barrier = threading.Barrier(20)

        def publish() -> None:
            with Publisher(url) as publisher:
                barrier.wait(30)
                errors.extend(errors_of(lambda: publisher.publish(EVENT), 1))

        begun = time.monotonic()
        threads = [threading.Thread(target=publish) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert server.logins <= 1 + (time.monotonic() - begun) // 5
        assert len(errors) == 20
        assert len(set(errors)) == 1


def test_refusal_is_known_before_its_attempt_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise another connection could log in between the two."""
    attempts = attempts_module.attempts
    known: list[str | None] = []
    ended = attempts.ended

    def end(url: str, owner: object, **options: bool) -> None:
        known.append(attempts.refusal(url, login_only=True))
        ended(url, owner, **options)

    with serving(None) as server:
        monkeypatch.setattr(attempts, "ended", end)
        with Publisher(f"amqp://guest:wrong@127.0.0.1:{server.port}/") as publisher:
            errors_of(lambda: publisher.publish(EVENT), 1)
    assert known
    assert all(known)


def test_host_with_two_addresses_is_logged_in_to_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the same broker's; a refusal by one is not asked of the other."""
    with serving(None) as server:

        def resolve(*_: Any, **__: Any) -> list[Any]:
            return [(2, 1, 6, "", ("127.0.0.1", server.port))] * 3

        monkeypatch.setattr("socket.getaddrinfo", resolve)
        with Publisher(f"amqp://guest:wrong@broker:{server.port}/") as publisher:
            errors_of(lambda: publisher.publish(EVENT), 1)
        assert server.logins == 1


def test_mended_password_is_found(killable_node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the pause, by the publisher that was refused; the broker's log counts the logins."""
    monkeypatch.setattr(attempts_module, "_REFUSAL_TTL", 2.0)
    killable_node.ctl("add_user", "mended", "old")
    killable_node.ctl("set_permissions", "mended", ".*", ".*", ".*")
    try:
        before = killable_node.log.count("PLAIN login refused")
        with Publisher(killable_node.url.replace("guest:guest", "mended:new")) as publisher:
            begun = time.monotonic()
            errors_of(lambda: publisher.publish(EVENT), 20)
            refused = killable_node.log.count("PLAIN login refused") - before
            assert 1 <= refused <= 1 + (time.monotonic() - begun) // 2
            killable_node.ctl("change_password", "mended", "new")

            def published() -> bool:
                try:
                    publisher.publish(EVENT)
                except ConfigurationError:
                    return False
                return True

            wait_until(published, timeout=20)
    finally:
        killable_node.ctl("delete_user", "mended")


# --- what passes ---------------------------------------------------------------------------------


def unavailable(url: str, timeout: float = 1.5) -> str:
    """The error of a publish and of a register, which waited until the deadline."""
    errors = []
    begun = time.monotonic()
    with Publisher(url, timeout=timeout) as publisher, pytest.raises(BrokerUnavailable) as caught:
        publisher.publish(EVENT)
    errors.append(str(caught.value))
    with Subscriber(url, timeout=timeout) as subscriber, pytest.raises(BrokerUnavailable) as caught:
        subscriber.register(print, "nothing", ["#"])
    errors.append(str(caught.value))
    assert time.monotonic() - begun > 2 * timeout - 0.2
    return "\n".join(errors)


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
@pytest.mark.parametrize(
    ("answer", "greets"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n\r\n<html>hello</html>", False),
        (b"E\x00\x00\x00\x64SFATAL\0" + b"x" * 96, False),  # PostgreSQL
        (b"SSH-2.0-OpenSSH_9\r\n", True),
        (b"\x15\x03\x01\x00\x02\x02\x28", False),  # TLS
        (b"AMQP\x00\x01\x00\x00", False),  # AMQP 1.0
        (b"\0" * 500, False),
    ],
    ids=["http", "postgresql", "ssh", "tls", "amqp-1.0", "noise"],
)
def test_other_servers_are_waited_for_and_named(scheme: str, answer: bytes, greets: bool) -> None:
    """A proxy is up before its broker is."""
    with serving(answer, greets=greets) as server:
        text = unavailable(f"{scheme}://guest:guest@127.0.0.1:{server.port}/", 0.7)
    words = "TLS failed"
    if scheme == "amqp":
        words = "uses TLS" if answer.startswith(b"\x15\x03") else "does not use AMQP 0-9-1"
    assert text.count(words) == 2


def test_silent_server_is_waited_for_and_named() -> None:
    """It takes connections, and that is all; or it is still starting."""
    with serving(b"", hangs_up=False) as server:
        text = unavailable(f"amqp://guest:guest@127.0.0.1:{server.port}/", 0.7)
        assert text.count(f"127.0.0.1:{server.port}/: it has not answered yet") == 2


def test_unknown_name_is_waited_for_and_named(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Services and their broker start together."""
    original = socket.getaddrinfo
    known = threading.Event()

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "broker.invalid" and not known.is_set():
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return original("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = broker_url.replace("127.0.0.1", "broker.invalid")
    assert unavailable(url, 0.5).count("cannot be resolved (Name or service not known)") == 2
    with Publisher(url) as publisher:
        waiting = threading.Timer(0.5, known.set)
        waiting.start()
        publisher.publish(EVENT, timeout=30)
        waiting.join()


def test_one_unknown_name_and_one_node_down(unused_port: int) -> None:
    """Each node's own cause is named, and it is waited for."""
    url = f"amqp://no-such-host.invalid/,amqp://guest:guest@127.0.0.1:{unused_port}/"
    text = unavailable(url)
    assert text.count("cannot be resolved") == text.count("connection refused") == 2


def test_mistake_of_one_node_is_not_one_of_all(unused_port: int) -> None:
    """Only when each node's own last failure is for good, is it a mistake."""
    with serving(None) as one, serving(None) as two:
        urls = [f"amqp://guest:wrong@127.0.0.1:{server.port}/" for server in (one, two)]
        text = unavailable(f"{urls[0]},amqp://guest:guest@127.0.0.1:{unused_port}/", 3)
        assert one.logins <= 3
        assert text.count("ACCESS_REFUSED") + text.count("password is wrong") >= 2
        with Publisher(",".join(urls)) as publisher:
            (error,) = errors_of(lambda: publisher.publish(EVENT), 1)
        assert str(one.port) in error
        assert str(two.port) in error


@contextmanager
def user(node: Node, name: str, **limits: int) -> Iterator[str]:
    """A user of this node, with limits; its URL."""
    node.ctl("add_user", name, "secret")
    node.ctl("set_permissions", name, ".*", ".*", ".*")
    if limits:
        set_to = {limit.replace("_", "-"): value for limit, value in limits.items()}
        node.ctl("set_user_limits", name, json.dumps(set_to))
    try:
        yield node.url.replace("guest:guest", f"{name}:secret")
    finally:
        node.ctl("delete_user", name)


def test_user_at_its_limit_of_connections_is_waited_for(killable_node: Node) -> None:
    """Another one may go any time, and is not far off."""
    with user(killable_node, "limited", max_connections=1) as url:
        with pika_connection(url):
            assert unavailable(url, 3).count("connection limit (1) is reached") == 2
        with Publisher(url) as publisher:
            publisher.publish(EVENT, timeout=30)


@contextmanager
def pika_connection(url: str) -> Iterator[None]:
    with onlooker.channel(url):
        yield


def test_vhost_at_its_limit_of_connections_is_waited_for(killable_node: Node) -> None:
    """The same, and a user without permissions, which may come."""
    killable_node.ctl("add_vhost", "small")
    url = killable_node.url.replace("%2F", "small")
    try:
        text = unavailable(url, 3)
        assert text.count("access to vhost 'small' refused for user 'guest'") == 2
        killable_node.ctl("set_permissions", "-p", "small", "guest", ".*", ".*", ".*")
        killable_node.ctl("set_vhost_limits", "-p", "small", '{"max-connections": 0}')
        assert unavailable(url, 3).count("connection limit (0) is reached") == 2
        killable_node.ctl("clear_vhost_limits", "-p", "small")
        with Publisher(url) as publisher:
            publisher.publish(EVENT, timeout=30)
    finally:
        killable_node.ctl("delete_vhost", "small")


def test_node_at_its_limit_of_connections_is_waited_for(killable_node: Node) -> None:
    """`connection_max`, which RabbitMQ has since 3.13."""
    if killable_node.version.startswith("3.10"):
        pytest.skip("RabbitMQ 3.10 has no limit of connections for a node")
    killable_node.ctl("eval", "application:set_env(rabbit, connection_max, 0).")
    try:
        assert "node connection limit (0) is reached" in unavailable(killable_node.url, 3)
    finally:
        killable_node.ctl("eval", "application:set_env(rabbit, connection_max, infinity).")
    with Publisher(killable_node.url) as publisher:
        publisher.publish(EVENT, timeout=30)


@pytest.mark.parametrize("vhost", ["no such", "n" * 255, "connection limit", "'refused for user'"])
def test_missing_vhost_is_a_mistake(broker_url: str, vhost: str) -> None:
    """At once, whatever its name: RabbitMQ cuts its text at 255 bytes."""
    with Publisher(broker_url.replace("%2F", quote(vhost, safe=""))) as publisher:
        (error,) = errors_of(lambda: publisher.publish(EVENT, timeout=30), 1)
    assert "vhost does not exist" in error


def test_name_server_that_hangs_holds_up_no_other_node(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for ever, if there is no other."""
    original = socket.getaddrinfo
    go_on = threading.Event()

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "broker.invalid":
            go_on.wait(60)
        return original("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("domain_events.broker.rabbitmq.link._LONGEST_ATTEMPT", 0.5)
    hanging = broker_url.replace("127.0.0.1", "broker.invalid") + "?stack_timeout=0.1"
    try:
        assert unavailable(hanging, 2).count("cannot be resolved") == 2
        for _ in range(5):  # in whatever order they are tried
            with Publisher(f"{hanging},{broker_url}") as publisher:
                publisher.publish(EVENT, timeout=30)
    finally:
        go_on.set()


def test_thread_that_never_runs_is_named(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lets no thread run but its own, as uWSGI may: the error says what to do."""
    go_on = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr("domain_events.broker.rabbitmq.link.Link._serve", lambda _: go_on.wait(60))
        assert unavailable(broker_url, 0.5).count("enable-threads = true") == 2
        go_on.set()


# --- mistakes over which the broker closes the connection ----------------------------------------


def started_attempts(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """As many entries as attempts to connect are made from now on."""
    started: list[None] = []
    original = Attempt.start

    def start(attempt: Attempt, *arguments: Any) -> None:
        started.append(None)
        original(attempt, *arguments)

    monkeypatch.setattr(Attempt, "start", start)
    return started


def test_unknown_exchange_type_is_its_own_error(
    bench: Bench, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To publish on it, and to register: once, and at once, on both."""
    kind: Any = "x-consistent-hash"
    name = bench.names.exchange("unknown")
    started = started_attempts(monkeypatch)
    with Publisher(bench.url, name, kind) as publisher:
        for _ in range(20):
            with pytest.raises(TopologyError, match="unknown exchange type") as caught:
                publisher.publish(EVENT, timeout=30)
            assert name in str(caught.value)
        assert len(started) <= 4
        started.clear()
    with Subscriber(bench.url, name, kind) as subscriber:
        with pytest.raises(TopologyError, match="misspelt, or the plugin"):
            subscriber.register(print, bench.names.queue(), ["1"])
        assert len(started) <= 2


def test_mistake_of_one_leaves_the_others_be(bench: Bench) -> None:
    """Several are declared at the same time, on a connection that others consume on."""
    seen: Events = []
    subscriber = bench.subscriber()
    queues = [bench.names.queue(f"q{n}") for n in range(3)]
    for queue in queues:
        subscriber.register(seen.append, queue, ["#"])
    with consuming(subscriber, bench.url, queues[-1]):
        consumer = subscriber.connections.consuming()
        assert consumer is not None
        errors: dict[int, DomainEventsError] = {}
        barrier = threading.Barrier(6)

        def declare(number: int) -> None:
            barrier.wait(30)
            kind = "x-no-such" if number in (2, 4) else "topic"
            try:
                exchange = Exchange(bench.names.exchange(f"x{number}"), kind)
                consumer.declare(Queue(bench.names.queue(f"q{number}"), exchange), 30)
            except DomainEventsError as error:
                errors[number] = error

        threads = [threading.Thread(target=declare, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert set(errors) == {2, 4}
        assert all(isinstance(error, TopologyError) for error in errors.values())
        event = bench.publish("a.b")
        wait_until(lambda: [each.uuid_string for each in seen].count(event.uuid_string) >= 3)


def rewire(subscription: Subscription, **changes: Any) -> None:
    """Change the queue that a subscriber wants, after it was registered."""
    options = subscription.options
    subscription.options = replace(options, queue=replace(options.queue, **changes))


def test_consumer_that_closes_the_connection_leaves_the_others_be(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told once, and kept apart; the others consume."""
    seen: Events = []
    subscriber = bench.subscriber()
    queues = [bench.names.queue(f"q{n}") for n in range(4)]
    for queue in queues:
        subscriber.register(seen.append, queue, ["#"])
    started = started_attempts(monkeypatch)
    # As if the plugin had been switched off since it was registered.
    gone = Exchange(bench.names.exchange("gone"), "x-no-such")
    rewire(subscriber.subscriptions[1], exchange=gone)
    with consuming(subscriber, bench.url, queues[-1]):
        event = bench.publish("a.b")
        wait_until(lambda: [each.uuid_string for each in seen].count(event.uuid_string) >= 3)
        wait_until(lambda: caplog.text.count(f"{queues[1]} cannot consume") == 1)
        attempts = len(started)
        assert attempts <= 4
        event = bench.publish("a.b")
        wait_until(lambda: [each.uuid_string for each in seen].count(event.uuid_string) >= 3)
        assert len(started) == attempts
        assert onlooker.consumers(bench.url, queues[1]) == 0


@pytest.mark.parametrize("where", ["client", "user"])
def test_too_few_channels_are_an_error_of_those_that_have_none(
    killable_node: Node, unique: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Eight subscribers, five channels: five consume; the others say so, once each."""
    seen: list[str] = []
    bench = Bench(killable_node.url, Names(killable_node.url, unique))
    limits = {"max_channels": 5} if where == "user" else {}
    with user(killable_node, "narrow", **limits) as url:
        option = "?channel_max=5" if where == "client" else ""
        subscriber = Subscriber(url + option, bench.exchange)
        queues = [bench.names.queue(f"q{n}") for n in range(8)]
        for queue in queues:
            subscriber.register(lambda event: seen.append(event.uuid_string), queue, ["#"])
        thread = threading.Thread(target=subscriber.start_consuming)
        thread.start()
        try:

            def consumed() -> int:
                return sum(onlooker.consumers(bench.url, queue) for queue in queues)

            def refusals() -> int:
                return caplog.text.count("cannot consume")

            wait_until(lambda: refusals() >= 3 or consumed() == 8, timeout=60)
            if consumed() == 8:
                pytest.skip("RabbitMQ counts the channels of a user late, and let all of them in")
            wait_until(lambda: consumed() == 5, timeout=60)
            event = bench.publish("a.b")
            wait_until(lambda: seen.count(event.uuid_string) >= 5, timeout=30)
            refused = [line for line in caplog.messages if "cannot consume" in line]
            # The channel that `register` used last may still be closing as it begins.
            assert len(refused) == len({line.split()[0] for line in refused}) in (3, 4)
            assert all("No channel is free" in line for line in refused)
            never = Queue(f"{unique}-never", Exchange(bench.exchange))
            with pytest.raises(DomainEventsError, match="No channel is free"):
                subscriber.connections.consuming().declare(never, 1)  # type: ignore[union-attr]
        finally:
            subscriber.stop_consuming()
            thread.join(30)
            bench.publisher.close()
    assert not thread.is_alive()


def test_exclusive_queue_that_is_taken_is_told_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Not at each attempt; when its owner has gone, it is taken."""
    queue = bench.names.queue()
    seen: Events = []
    subscriber = bench.subscriber()
    subscriber.register(seen.append, queue, ["#"])
    rewire(subscriber.subscriptions[0], durable=False, exclusive=True)
    with onlooker.channel(bench.url) as channel:
        channel.queue_delete(queue)
        channel.queue_declare(queue, exclusive=True)
        thread = threading.Thread(target=subscriber.start_consuming)
        thread.start()
        wait_until(lambda: "cannot consume" in caplog.text)
        (consumer,) = subscriber.connections.consuming()._consumers  # type: ignore[union-attr]
        wait_until(lambda: consumer._trouble.failures >= 4, timeout=30)
        assert caplog.text.count("cannot consume") == 1
    try:
        wait_until(lambda: "consumes again" in caplog.text, timeout=30)
        event = bench.publish("a.b")
        wait_until(lambda: event in seen)
    finally:
        subscriber.stop_consuming()
        thread.join(30)


# --- nothing is kept for who no longer waits -----------------------------------------------------


def test_requests_that_were_given_up_leave_nothing(unused_port: int) -> None:
    """Many attempts to register, in an outage that lasts."""
    with Subscriber(f"amqp://guest:guest@127.0.0.1:{unused_port}/", timeout=0.01) as subscriber:

        def register(times: int) -> int:
            for _ in range(times):
                with pytest.raises(BrokerUnavailable):
                    subscriber.register(print, "nothing", ["#"])
            gc.collect()
            return len(gc.get_objects())

        before = register(50)
        after = register(300)
        consuming = subscriber.connections.consuming()
        assert consuming is not None
        assert consuming._requests.is_idle  # type: ignore[attr-defined]
        assert after - before < 300


def test_attempts_to_connect_leave_nothing(
    unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as in an outage of hours."""
    monkeypatch.setattr("domain_events.broker.rabbitmq.link._BACKOFF", Backoff(maximum=0.001))
    started = started_attempts(monkeypatch)
    with Publisher(f"amqp://guest:guest@127.0.0.1:{unused_port}/", timeout=0.2) as publisher:
        with pytest.raises(BrokerUnavailable):
            publisher.publish(EVENT)

        def objects(attempts: int) -> int:
            wait_until(lambda: len(started) >= attempts, timeout=60)
            gc.collect()
            return len(gc.get_objects())

        before = objects(200)
        after = objects(1200)
        assert after - before < 20_000  # each attempt takes some hundred: it would be 100,000


def test_abandoned_link_closes_in_order(bench: Bench) -> None:
    """Without anybody waiting for it: its thread ends, and so does its connection."""
    with Publisher(bench.url, bench.exchange) as publisher:
        publisher.publish(EVENT)
        link = publisher._publishing()._link  # type: ignore[union-attr]
        thread = link._thread
        assert thread is not None
        begun = time.monotonic()
        link.close_soon()
        link.close_soon()
        assert time.monotonic() - begun < 0.5
        thread.join(30)
        assert not thread.is_alive()
        assert link.connection is None
