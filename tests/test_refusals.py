"""What a broker refuses, each provoked on a real one: the class of the error, and its words.

The words are the broker's own, and the advice is about what is the case. What has to do with the
permissions of a user is in `test_security`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

import onlooker
import pytest
from bench import Events
from live import consuming
from pyamqp import Channel
from rabbitmq_node import Node
from support import wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DeadLetters,
    DomainEvent,
    DomainEventsError,
    InvalidEvent,
    Publisher,
    Subscriber,
    TopologyError,
)
from domain_events.broker.rabbitmq import errors
from domain_events.broker.rabbitmq.topology import Binding, Exchange, Queue
from domain_events.message import Message, ToDeadLetters, ToExchange


class Vhost(NamedTuple):
    """A vhost of a test's own, and how to reach it."""

    node: Node
    name: str
    url: str

    def evaluate(self, *calls: str) -> str:
        """Have the broker evaluate Erlang; `V` is the vhost's name."""
        text = ", ".join(call.replace("V", f'<<"{self.name}">>') for call in calls)
        return self.node.ctl("eval", f"[{text}].")


@pytest.fixture
def vhost(killable_node: Node, unique: str) -> Iterator[Vhost]:
    url = f"{killable_node.url.rpartition('/')[0]}/{quote(unique, safe='')}"
    vhost = Vhost(killable_node, unique, url)
    vhost.evaluate(
        'rabbit_vhost:add(V, <<"test">>)',
        'rabbit_auth_backend_internal:set_permissions(<<"guest">>, V, <<".*">>, <<".*">>, <<".*">>,'
        ' <<"test">>)',
    )
    yield vhost
    vhost.evaluate('rabbit_vhost:delete(V, <<"test">>)')


def publish(url: str) -> None:
    with Publisher(url, "x", timeout=5) as publisher:
        publisher.publish(DomainEvent("a.b", {}))


def register(url: str) -> None:
    with Subscriber(url, "x", timeout=5) as subscriber:
        subscriber.register(print, "q", ["#"])


def count(url: str) -> None:
    with DeadLetters("q", url, timeout=5) as dead_letters:
        dead_letters.count()


def browse(url: str) -> None:
    with DeadLetters("q", url, timeout=5) as dead_letters:
        next(iter(dead_letters))


Prepare = Callable[[Channel], object]


def limit_queues(vhost: Vhost) -> None:
    vhost.evaluate('rabbit_vhost_limit:set(V, [{<<"max-queues">>, 0}], <<"test">>)')


def deny_topic(kind: str) -> Callable[[Vhost], None]:
    def deny(vhost: Vhost) -> None:
        patterns = ['<<".*">>', '<<"^user">>'] if kind == "read" else ['<<"^user">>', '<<".*">>']
        vhost.evaluate(
            'rabbit_auth_backend_internal:set_topic_permissions(<<"guest">>, V, <<"x">>, '
            f'{", ".join(patterns)}, <<"test">>)'
        )

    return deny


def exchange(*, type: str = "topic", **options: Any) -> Prepare:  # noqa: A002
    return lambda channel: channel.exchange_declare("x", type, **options)


def queue(name: str, **options: Any) -> Prepare:
    return lambda channel: channel.queue_declare(name, **options)


class Case(NamedTuple):
    """A refusal: how it comes about, what is done, and what is said."""

    action: Callable[[str], None]
    error: type[DomainEventsError]
    words: str
    prepare: Prepare | None = None
    arrange: Callable[[Vhost], None] | None = None
    not_said: str = "delete the queue"


REFUSALS = {
    "exchange of another type": Case(
        publish, TopologyError, "type it has", exchange(type="fanout", durable=True)
    ),
    "exchange of another type, subscriber": Case(
        register, TopologyError, "type it has", exchange(type="fanout", durable=True)
    ),
    "internal exchange": Case(
        publish,
        TopologyError,
        "internal",
        exchange(internal=True, durable=True),
        None,
        "permission",
    ),
    "queue with other arguments": Case(
        register, TopologyError, "ways out", queue("q", durable=True), None, "permission"
    ),
    "dead letters with other arguments": Case(
        register, TopologyError, "ways out", queue("q-dl", durable=True), None, "permission"
    ),
    "limit of queues": Case(register, TopologyError, "limit", None, limit_queues, "ways out"),
    "topic permission to write": Case(
        publish,
        ConfigurationError,
        "topic permission",
        exchange(durable=True),
        deny_topic("write"),
        "permission write",
    ),
    "topic permission to read": Case(
        register,
        ConfigurationError,
        "topic permission",
        exchange(durable=True),
        deny_topic("read"),
        "permissions write",
    ),
    "no queue to count": Case(count, TopologyError, "There is no queue 'q-dl'"),
    "no queue to browse": Case(browse, TopologyError, "There is no queue 'q-dl'"),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal_is_told_for_what_it_is(vhost: Vhost, case: Case) -> None:
    """With the broker's words, and no advice for another one."""
    if case.prepare is not None:
        with onlooker.channel(vhost.url) as channel:
            case.prepare(channel)
    if case.arrange is not None:
        case.arrange(vhost)
    with pytest.raises(case.error) as caught:
        case.action(vhost.url)
    assert type(caught.value) is case.error
    assert case.words in str(caught.value)
    assert case.not_said not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"durable": True, "arguments": {"alternate-exchange": "elsewhere"}},
        {"durable": True, "auto_delete": True},
        {"durable": False},
        {"durable": False, "auto_delete": True, "arguments": {"alternate-exchange": "elsewhere"}},
    ],
    ids=str,
)
def test_exchange_of_the_same_type_is_used_as_found(vhost: Vhost, options: dict[str, Any]) -> None:
    """By publishers and by subscribers, retries included; again after a lost connection."""
    seen: Events = []
    with onlooker.channel(vhost.url) as channel:
        channel.exchange_declare("x", "topic", **options)
    subscriber = Subscriber(vhost.url, "x")
    with Publisher(vhost.url, "x") as publisher:
        event = publisher.publish(DomainEvent("nobody.listens", {}))
        subscriber.register(seen.append, "q", ["a.#"], max_retries=1)
        with consuming(subscriber, vhost.url, "q"):
            event = publisher.publish(DomainEvent("a.b", {}))
            wait_until(lambda: seen == [event])
            vhost.node.ctl("close_all_connections", "-p", vhost.name, "test")
            event = publisher.publish(DomainEvent("a.c", {}))
            wait_until(lambda: event in seen)


def test_internal_exchange_may_be_subscribed_to(vhost: Vhost) -> None:
    """Other exchanges publish to it."""
    with onlooker.channel(vhost.url) as channel:
        channel.exchange_declare("x", "topic", durable=True, internal=True)
        channel.exchange_declare("front", "topic", durable=True)
        channel.exchange_bind("x", "front", "#")
    seen: Events = []
    subscriber = Subscriber(vhost.url, "x")
    subscriber.register(seen.append, "q", ["#"])
    with (
        consuming(subscriber, vhost.url, "q"),
        Publisher(vhost.url, "front") as publisher,
    ):
        event = publisher.publish(DomainEvent("a.b", {}))
        wait_until(lambda: seen == [event])


def test_queue_that_another_consumer_has_for_itself_is_told_as_that(
    vhost: Vhost, caplog: pytest.LogCaptureFixture
) -> None:
    """Not as a permission that is missing; once it is free, it is consumed."""
    seen: Events = []
    subscriber = Subscriber(vhost.url, "x")
    subscriber.register(seen.append, "q", ["#"], queue_type="classic")
    with onlooker.channel(vhost.url) as channel:
        channel.basic_consume("q", lambda _: None, exclusive=True)
        with consuming(subscriber, vhost.url, "q"):
            wait_until(lambda: "in exclusive use" in caplog.text)
            assert "permission" not in caplog.text
            channel.connection.close()
            publish(vhost.url)
            wait_until(lambda: seen, timeout=20)


def test_message_that_is_too_large_is_told_as_that(
    node_factory: Callable[..., Node], unique: str
) -> None:
    """With the broker's own limit."""
    node = node_factory(config="max_message_size = 1000")
    node.start()
    with (
        Publisher(node.url, unique) as publisher,
        pytest.raises(InvalidEvent, match="1000"),
    ):
        publisher.publish(DomainEvent("a.b", "x" * 2000))


# As RabbitMQ 3.10.8, 4.0.5 and 4.3.6 say it; to provoke it takes a cluster that has lost a node.
@pytest.mark.parametrize(
    "said",
    [
        "NOT_FOUND - home node 'b@b' of durable queue 'q' in vhost '/' is down or inaccessible",
        "NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor",
        "NOT_FOUND - failed to perform operation on queue 'q' in vhost '/' due to timeout",
    ],
)
def test_queue_whose_node_is_down_is_unavailable_and_not_missing(said: str) -> None:
    """Nobody should go and declare it anew."""
    error = errors.read_error("q", 404, said)
    assert type(error) is BrokerUnavailable
    assert said in str(error)


def test_names_in_the_brokers_words_are_printable() -> None:
    """They may be anybody's."""
    said = "NOT_FOUND - no exchange '\x1b[2J\n" + "x" * 10_000
    message = Message(ToExchange("x"), "a.b", b"")
    for code in (403, 404, 405, 406):
        for error in (
            errors.declare_error(Queue("q"), code, said),
            errors.declare_error(Exchange("x"), code, said),
            errors.declare_error(Binding("x", "q", "#"), code, said),
            errors.read_error("q", code, said),
            errors.read_permission_error(said),
            errors.write_error(message, said),
            errors.missing_exchange_error(message, said),
            errors.no_channel_error(said),
        ):
            assert str(error).isprintable()
            assert len(str(error)) < 1500


def test_error_over_a_message_names_where_it_was_published_to() -> None:
    """As AMQP has it: the exchange, which of a dead letter is the default one."""
    event = Message(ToExchange("x"), "a.b", b"")
    letter = Message(ToDeadLetters("q"), "a.b", b"")
    assert "exchange 'x' for the routing key 'a.b'" in str(errors.unroutable_error(event))
    assert "exchange '' for the routing key 'q-dl'" in str(errors.unroutable_error(letter))
    assert "The exchange 'x' does not exist" in str(
        errors.missing_exchange_error(event, "NOT_FOUND")
    )
    assert "write to the exchange 'x'" in str(errors.write_error(event, "refused"))
    assert "write to the exchange 'amq.default'" in str(errors.write_error(letter, "refused"))
    topic = errors.write_error(event, "access to topic 'a.b' refused")
    assert "publish 'a.b' to the exchange 'x'" in str(topic)
