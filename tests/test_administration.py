"""What an operator does over AMQP, one request at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import onlooker
import pytest
from faults.proxy import Proxy
from managed import Managed
from pika.channel import Channel
from support import Names, wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEvent,
    Publisher,
    Subscriber,
    TopologyError,
)
from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.administration import Administration, Comparison, QueueState
from domain_events.broker.rabbitmq.permissions import Permission, to_bind


@pytest.fixture
def administration(broker_url: str) -> Iterator[Administration]:
    with Administration(broker_url) as administration:
        yield administration


@pytest.fixture
def name(broker_url: str, names: Names) -> str:
    """A subscriber's queue, on the exchange of `names`."""
    name, exchange = names.queue(), names.exchange()
    with Subscriber(broker_url, exchange) as subscriber:
        subscriber.register(print, name, ["a.b"])
    return name


def test_server_states_what_it_is(administration: Administration) -> None:
    server = administration.server
    assert server["product"] == "RabbitMQ"
    assert server["version"].count(".") == 2
    assert "@" in server["cluster_name"]


def test_queue_is_counted_and_a_missing_one_is_none(
    administration: Administration, broker_url: str, name: str
) -> None:
    assert administration.queue(name) == QueueState(messages=0, consumers=0)
    onlooker.publish(broker_url, "", name, b"{}")
    assert administration.queue(name) == QueueState(messages=1, consumers=0)
    assert administration.queue(f"{name}-missing") is None


def test_exchange_exists_or_not(
    administration: Administration, broker_url: str, names: Names
) -> None:
    exchange = names.exchange()
    assert not administration.has_exchange(exchange)
    onlooker.declare_exchange(broker_url, exchange, "fanout")
    assert administration.has_exchange(exchange)


def test_comparison_shows_what_is_the_same_different_or_missing_and_creates_nothing(
    administration: Administration, broker_url: str, names: Names, name: str
) -> None:
    other = names.queue("other")
    onlooker.declare_exchange(broker_url, names.exchange("fanout"), "fanout")
    declarations: list[topology.Declaration] = [
        topology.subscriber_queue(name),
        topology.subscriber_queue(other),
        topology.temporary_queue(name, exclusive=False, auto_delete=False),
        topology.Exchange(names.exchange("fanout")),
        topology.Binding(names.exchange(), name, "a.b"),
    ]
    results = [administration.compare(each)[0] for each in declarations]
    assert results == [
        Comparison.SAME,
        Comparison.MISSING,
        Comparison.DIFFERENT,
        Comparison.DIFFERENT,
        Comparison.UNKNOWN,
    ]
    assert "inequivalent arg" in administration.compare(declarations[2])[1]
    assert not onlooker.exists(broker_url, other)


def test_binding_is_made_and_removed_and_both_may_be_repeated(
    administration: Administration, broker_url: str, names: Names, name: str
) -> None:
    exchange = names.exchange()
    with Publisher(broker_url, exchange) as publisher:
        for change in (administration.bind, administration.unbind):
            for _ in range(2):
                change(name, exchange, "c.d")
            publisher.publish(DomainEvent("c.d", {}))
    assert onlooker.count(broker_url, name) == 1


def test_queue_with_events_is_not_deleted_unless_that_is_meant(
    administration: Administration, broker_url: str, name: str
) -> None:
    onlooker.publish(broker_url, "", name, b"{}")
    with pytest.raises(TopologyError, match="1 messages and 0 consumers"):
        administration.delete_queue(name)
    administration.delete_queue(name, if_empty=False)
    administration.delete_queue(name)
    assert not onlooker.exists(broker_url, name)


def test_classic_queue_in_use_is_kept_by_the_broker_itself(
    administration: Administration, broker_url: str, names: Names
) -> None:
    name = names.queue()
    with onlooker.channel(broker_url) as channel:
        channel.queue_declare(name, durable=True)
        channel.basic_consume(name, lambda _message: None)
        assert not administration.delete_classic(name)
    onlooker.publish(broker_url, "", name, b"{}")
    assert not administration.delete_classic(name)
    onlooker.take_all(broker_url, name)
    assert administration.delete_classic(name)
    assert administration.delete_classic(name)
    assert not onlooker.exists(broker_url, name)


def test_queue_is_not_deleted_again_after_the_connection_was_lost(
    broker_url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may have declared it anew, and have events in it."""
    parts = urlsplit(broker_url)
    proxy = Proxy(parts.hostname or "", parts.port or 5672)
    queue_delete = Channel.queue_delete

    def without_answer(channel: Channel, *arguments: Any, **options: Any) -> None:
        proxy.slow(back=1)
        queue_delete(channel, *arguments, **options)

    url = broker_url.replace(f":{parts.port}", f":{proxy.port}")
    try:
        with Administration(url, timeout=30) as administration, ThreadPoolExecutor(1) as executor:
            monkeypatch.setattr(Channel, "queue_delete", without_answer)
            deleted = executor.submit(administration.delete_queue, name)
            wait_until(lambda: not onlooker.exists(broker_url, name))
            with onlooker.channel(broker_url) as channel:
                channel.queue_declare(name, durable=True)
            onlooker.publish(broker_url, "", name, b"{}")
            monkeypatch.setattr(Channel, "queue_delete", queue_delete)
            proxy.cut()
            proxy.flow()
            with pytest.raises(BrokerUnavailable, match="connection was lost"):
                deleted.result()
    finally:
        proxy.close()
    assert onlooker.count(broker_url, name) == 1


def test_exchange_in_use_is_not_deleted(
    administration: Administration, names: Names, name: str
) -> None:
    exchange = names.exchange()
    with pytest.raises(TopologyError, match="in use"):
        administration.delete_exchange(exchange)
    administration.delete_queue(name)
    administration.delete_exchange(exchange)
    administration.delete_exchange(exchange)
    assert not administration.has_exchange(exchange)


def test_only_a_rabbitmq_is_administered() -> None:
    with pytest.raises(ConfigurationError, match="amqp"):
        Administration("memory://")


# --- permissions ---------------------------------------------------------------------------------


def permissions(name: str, exchange: str) -> dict[Permission, tuple[str, str, str]]:
    """Each of them, and what a user must have for it: configure, write, read."""
    return {
        Permission("configure", "queue", name): (name, "^$", "^$"),
        Permission("configure", "exchange", exchange): (exchange, "^$", "^$"),
        Permission("write", "exchange", exchange): ("^$", exchange, "^$"),
        Permission("write", "exchange", ""): ("^$", "amq.default", "^$"),
        Permission("read", "queue", name): ("^$", "^$", name),
        to_bind(name, exchange): ("^$", name, exchange),
    }


@pytest.mark.parametrize("exists", [True, False])
def test_each_permission_is_probed_and_nothing_changes(
    managed_node: Managed, unique: str, exists: bool
) -> None:
    """Neither by a user who has it, nor by one who has not; whether its object exists or not."""
    name, exchange, url = f"{unique}-q", f"{unique}-x", managed_node.url
    if exists:
        with Subscriber(url, exchange) as subscriber:
            subscriber.register(print, name, ["#"])
        onlooker.publish(url, "", name, b"{}")

    def everything() -> list[object]:
        of_vhost = ("queues", "exchanges", "bindings")
        found = [managed_node.get(f"{each}/%2F?columns=name,arguments,source") for each in of_vhost]
        return [sorted(map(str, each)) for each in found]

    before = everything()
    for permission, needed in permissions(name, exchange).items():
        others = tuple(r"^(?!{})".format(each.strip("^$") or "$") for each in needed)
        with (
            managed_node.user("has", needed) as has,
            managed_node.user("lacks", others) as lacks,  # type: ignore[arg-type]
            Administration(has) as of_has,
            Administration(lacks) as of_lacks,
        ):
            assert of_has.refusal(permission) == "", permission
            refusal = of_lacks.refusal(permission)
            assert "ACCESS_REFUSED" in refusal, permission
            assert "lacks" in refusal
    assert everything() == before
    if exists:
        with onlooker.channel(url) as channel:
            received = channel.basic_get(name)
            assert received is not None
            # Where a quorum queue counts how often it was delivered before.
            assert not any((received.properties.headers or {}).values())
        onlooker.delete(url, queues=[name, f"{name}-dl"], exchanges=[exchange])


def test_exclusive_consumer_is_not_a_missing_permission(
    administration: Administration, broker_url: str, names: Names
) -> None:
    name = names.queue("classic")
    with onlooker.channel(broker_url) as channel:
        channel.queue_declare(name, durable=True)
        channel.basic_consume(name, print, exclusive=True)
        assert administration.refusal(Permission("read", "queue", name)) == ""
