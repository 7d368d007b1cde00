"""Clusters, TLS, permissions and credentials, on brokers that the tests start."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import onlooker
import pytest
from bench import Bench, Events
from rabbitmq_node import Node
from support import Names, wait_until

from domain_events import (
    ConfigurationError,
    DeadLetters,
    DomainEvent,
    Publisher,
    Retry,
    Subscriber,
)

NodeFactory = Callable[..., Node]


# --- clusters ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_cluster_serves_while_any_one_node_is_down(node_factory: NodeFactory, unique: str) -> None:
    """Three nodes, killed in turn: every confirmed event is handled, retries included."""
    # How long a level waits before it hands on again what a dead node has not confirmed to it;
    # three minutes by default.
    hand_on = "[{rabbit, [{dead_letter_worker_publisher_confirm_timeout, 3000}]}]."
    nodes = [node_factory() for _ in range(3)]
    for node in nodes:
        (node.folder / "advanced.config").write_text(hand_on)
        node.start(wait=False)
    nodes[0].start()
    for node in nodes[1:]:
        node.join(nodes[0])
    urls = [node.url for node in nodes]
    exchange, queue = f"{unique}-x", f"{unique}-q"
    number = 60
    done: set[int] = set()
    subscriber = Subscriber(urls, exchange)

    def handle(event: DomainEvent) -> None:
        if event.data % 3 == 0 and event.retries == 0:
            raise Retry(0.5)
        done.add(event.data)

    subscriber.register(handle, queue, ["#"], max_retries=9)
    for node in nodes:
        node.sync()
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    try:
        with Publisher(",".join(urls), exchange) as publisher:
            for victim, node in enumerate(nodes):
                for n in range(number * victim, number * (victim + 1)):
                    if n == number * victim + number // 2:
                        node.kill()
                    publisher.publish(DomainEvent("a.b", n), timeout=60)
                wait_until(lambda: len(done) >= number * victim + 1, timeout=60)  # noqa: B023
                node.start()
        wait_until(lambda: done == set(range(3 * number)), timeout=60)
    finally:
        subscriber.stop_consuming()
        thread.join(30)
        assert not thread.is_alive()


def test_nodes_that_are_down_are_passed_over(
    broker_url: str, names: Names, unused_port: int
) -> None:
    """One of several addresses is enough, and a name that cannot be resolved spoils nothing."""
    exchange = names.exchange()
    down = f"amqp://guest:guest@127.0.0.1:{unused_port}/%2F"
    unknown = "amqp://guest:guest@no-such-host.invalid/%2F"
    for _ in range(5):  # they are shuffled
        with Publisher([down, unknown, broker_url], exchange) as publisher:
            publisher.publish(DomainEvent("user.registered", {}), timeout=30)


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_node() -> Iterator[Node]:
    """A node with a TLS listener that welcomes client certificates."""
    with Node(tls=True) as node:
        yield node


def tls_url(node: Node, **options: object) -> str:
    return f"{node.tls_url}?ssl_options={options!r}".replace(" ", "")


def test_tls_with_a_known_authority(tls_node: Node, unique: str) -> None:
    """`amqps://` with pika's ssl_options; a client certificate too."""
    for options in (
        {"ca_certs": str(tls_node.ca_file)},
        {
            "ca_certs": str(tls_node.ca_file),
            "certfile": str(tls_node.certificate_file),
            "keyfile": str(tls_node.key_file),
        },
    ):
        url = tls_url(tls_node, **options)
        seen: Events = []
        with Publisher(url, unique) as publisher:
            subscriber = Subscriber(url, unique)

            def handle(event: DomainEvent) -> None:
                seen.append(event)  # noqa: B023
                subscriber.stop_consuming()  # noqa: B023

            subscriber.register(handle, f"{unique}-q", ["#"])
            events = [DomainEvent("a.b", "x" * 50_000) for _ in range(20)]
            publisher.publish_many(events)
            subscriber.start_consuming(timeout=20)
            assert seen[0].data == events[0].data
            with onlooker.channel(tls_node.url) as channel:
                channel.queue_purge(f"{unique}-q")


def test_unknown_authority_is_refused_at_once(tls_node: Node, unique: str) -> None:
    """Not retried: nobody should grow used to it."""
    with (
        Publisher(tls_node.tls_url, unique) as publisher,
        pytest.raises(ConfigurationError, match="certificate is not trusted"),
    ):
        publisher.publish(DomainEvent("a.b", {}), timeout=30)


def test_plain_port_is_no_tls_port(tls_node: Node, unique: str) -> None:
    """`amqps://` on the plain port: said in words."""
    url = tls_url(tls_node, ca_certs=str(tls_node.ca_file)).replace(
        str(tls_node.tls_port), str(tls_node.port)
    )
    with (
        Publisher(url, unique) as publisher,
        pytest.raises(ConfigurationError, match=r"TLS|AMQP 0-9-1"),
    ):
        publisher.publish(DomainEvent("a.b", {}), timeout=30)


# --- credentials and permissions -----------------------------------------------------------------


@pytest.fixture
def user(killable_node: Node, unique: str) -> Iterator[Callable[..., str]]:
    """Makes a user with these permissions; its URL."""
    name = f"u{unique[-6:]}"

    def make(configure: str, write: str, read: str) -> str:
        killable_node.ctl("add_user", name, "hunter2")
        killable_node.ctl("set_permissions", name, configure, write, read)
        return killable_node.url.replace("guest:guest", f"{name}:hunter2")

    yield make
    killable_node.ctl("delete_user", name)


@pytest.mark.parametrize(
    ("replaced", "by", "words"),
    [
        ("guest:guest", "guest:hunter2", "password is wrong"),
        ("guest:guest", "nobody:hunter2", "password is wrong"),
        ("%2F", "no-such-vhost", "vhost does not exist"),
        ("127.0.0.1", "no-such-host.invalid", "cannot be resolved"),
    ],
)
def test_wrong_address_is_told_at_once(
    broker_url: str,
    replaced: str,
    by: str,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not retried until the deadline; and no password in error, cause, log or repr."""
    url = broker_url.replace(replaced, by)
    event = DomainEvent("user.registered", {})
    with caplog.at_level(logging.DEBUG, "domain_events"), Publisher(url) as publisher:
        for _ in range(2):  # each call asks anew
            with pytest.raises(ConfigurationError, match=words) as caught:
                publisher.publish(event, timeout=30)
        with pytest.raises(ConfigurationError, match=words):
            publisher.publish_many([event], timeout=30)
        with Subscriber(url, timeout=30) as subscriber:
            with pytest.raises(ConfigurationError, match=words):
                subscriber.register(print, "nothing", ["#"])
            told = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text} {vars(subscriber)}"
        assert "hunter2" not in told + repr(publisher) + str(vars(publisher))


def test_publisher_that_may_not_configure_still_publishes(
    killable_node: Node, unique: str, user: Callable[..., str]
) -> None:
    """Least privilege for a publisher: write on the exchange, and no more."""
    exchange, queue = f"{unique}-x", f"{unique}-q"
    url = user("^$", f"^{exchange}$", "^$")
    with Publisher(url, exchange) as publisher:
        with pytest.raises(Exception, match=exchange) as caught:
            publisher.publish(DomainEvent("a.b", {}))
        assert "may not declare" in str(caught.value)
        onlooker.bind_queue(killable_node.url, queue, exchange, "#")
        publisher.publish(DomainEvent("a.b", {}))
        assert publisher.publish_many(DomainEvent("a.b", n) for n in range(300)) == 300
    assert onlooker.count(killable_node.url, queue) == 301


def test_publisher_that_may_not_write_is_told(
    killable_node: Node, unique: str, user: Callable[..., str]
) -> None:
    """A `ConfigurationError` that names the exchange."""
    exchange = f"{unique}-x"
    url = user(".*", "^$", ".*")
    with (
        Publisher(url, exchange) as publisher,
        pytest.raises(ConfigurationError, match=f"write to the exchange '{exchange}'"),
    ):
        publisher.publish(DomainEvent("a.b", {}))


def test_subscriber_with_the_documented_permissions(
    killable_node: Node, unique: str, user: Callable[..., str]
) -> None:
    """Least privilege for a subscriber: its own names, the exchange, `amq.default`."""
    exchange, queue = f"{unique}-x", f"{unique}-q"
    own = f"{queue}|{queue}-dl|{exchange}(\\..*)?"
    url = user(f"^({own})$", f"^({own}|amq\\.default)$", f"^({own})$")
    bench = Bench(killable_node.url, Names(killable_node.url, unique))
    bench.exchange = exchange
    subscriber = Subscriber(url, exchange)
    counts: list[int] = []

    def handle(event: DomainEvent) -> None:
        counts.append(event.retries)
        if event.retries == 1:
            subscriber.stop_consuming()
        raise Retry(0.1)

    subscriber.register(handle, queue, ["#"], max_retries=1)
    with Publisher(killable_node.url, exchange) as publisher:
        publisher.publish(DomainEvent("a.b", {}))
    bench.publisher.close()
    subscriber.start_consuming(timeout=20)
    assert counts == [0, 1]
    with DeadLetters(queue, url) as dead_letters:
        assert dead_letters.replay_all() == 1
    assert onlooker.count(killable_node.url, queue) == 1


def test_subscriber_that_may_not_declare_is_told(
    killable_node: Node, unique: str, user: Callable[..., str]
) -> None:
    """A `ConfigurationError` that names what it may not declare."""
    url = user("^$", ".*", ".*")
    with (
        Subscriber(url, f"{unique}-x") as subscriber,
        pytest.raises(ConfigurationError, match="may not be declared by this user"),
    ):
        subscriber.register(print, f"{unique}-q", ["#"])


def test_subscriber_that_may_not_read_says_so_and_goes_on(
    killable_node: Node, unique: str, user: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """The permission is missing, then given: it consumes without a restart."""
    exchange, queue = f"{unique}-x", f"{unique}-q"
    url = user(".*", ".*", ".*")
    name = url.split("//")[1].split(":")[0]
    seen: Events = []
    subscriber = Subscriber(url, exchange)
    subscriber.register(seen.append, queue, ["#"])
    killable_node.ctl("set_permissions", name, ".*", ".*", f"^{exchange}$")
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    try:
        wait_until(lambda: f"{queue} cannot consume" in caplog.text)
        killable_node.ctl("set_permissions", name, ".*", ".*", ".*")
        with Publisher(killable_node.url, exchange) as publisher:
            event = publisher.publish(DomainEvent("a.b", {}))
        wait_until(lambda: event in seen, timeout=20)
    finally:
        subscriber.stop_consuming()
        thread.join(20)
        assert not thread.is_alive()
