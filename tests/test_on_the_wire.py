"""What this library puts on a RabbitMQ and takes from it, as any other program sees it there.

The promises are held on every broker, in conformance/; here is how RabbitMQ is made to keep them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import onlooker
import pytest
from bench import Bench, running
from conformance.peer import KEY, TIMEOUT, Peer
from support import DELAY_LEVELS, Names, wait_until

from domain_events import (
    Backoff,
    DeadLetters,
    DomainEvent,
    EventUnroutable,
    Reject,
    Retry,
    Subscriber,
    TopologyError,
)
from domain_events import message as messages
from domain_events.broker import Exchange, Queue
from domain_events.broker.rabbitmq import topology
from domain_events.message import (
    Later,
    Message,
    ToDeadLetters,
    ToExchange,
    ToSubscriber,
    UndeliveredOf,
)


@pytest.fixture
def peer(broker_url: str, names: Names) -> Iterator[Peer]:
    """Someone who talks to RabbitMQ by the broker protocol."""
    peer = Peer(broker_url)
    yield peer
    peer.close()


@pytest.fixture
def queue(names: Names) -> Queue:
    """All that a subscriber may want; not declared yet."""
    return Queue(names.queue(), Exchange(names.exchange()), ("#",), dead_letters=True, delays=True)


def declare(url: str, name: str, **arguments: Any) -> None:
    """A durable queue of another program; an error if there is one with other arguments."""
    with onlooker.channel(url) as channel:
        channel.queue_declare(name, durable=True, arguments=arguments)


# ------------------------------------------------------------------ places and their queues


def test_places_are_queues_that_others_can_find(broker_url: str, peer: Peer, queue: Queue) -> None:
    """By the names that the documentation gives them."""
    peer.declare(queue)
    exchange = queue.exchange.name
    peer.publish(ToSubscriber(queue.name), b"in the queue")
    peer.publish(ToDeadLetters(queue.name), b"dead")
    peer.publish(Later(exchange, f"{queue.name}-gone", 0.1), b"undelivered")
    peer.publish(Later(exchange, queue.name, 19 * 24 * 3600), b"late")
    peer.wait_for_count(UndeliveredOf(exchange), 1)
    expected = {
        queue.name: b"in the queue",
        f"{queue.name}-dl": b"dead",
        f"{exchange}.undelivered": b"undelivered",
        f"{exchange}.delay.{DELAY_LEVELS - 1}": b"late",
    }
    for name, body in expected.items():
        assert onlooker.take_all(broker_url, name) == [body]


@pytest.mark.parametrize("kind", ["durable", "dead letters", "temporary", "level"])
def test_queues_have_the_arguments_that_they_always_had(
    broker_url: str, peer: Peer, queue: Queue, kind: str
) -> None:
    """Else each that exists would be a 406; and a temporary one goes after a minute."""
    level = f"{queue.exchange.name}.delay.00"
    known: dict[str, tuple[str, dict[str, object]]] = {
        "durable": (
            queue.name,
            {
                "x-queue-type": "quorum",
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": f"{queue.name}-dl",
                "x-delivery-limit": 100,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            },
        ),
        "dead letters": (
            f"{queue.name}-dl",
            {"x-queue-type": "quorum", "x-delivery-limit": 10**9},
        ),
        "temporary": (queue.name, {"x-queue-type": "classic", "x-expires": 60_000}),
        "level": (
            level,
            {
                "x-queue-type": "quorum",
                "x-message-ttl": 100,
                "x-dead-letter-exchange": f"{queue.exchange.name}.due",
                "x-delivery-limit": 10**9,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            },
        ),
    }
    if kind == "temporary":
        queue = replace(queue, durable=False, dead_letters=False, delays=False)
    peer.declare(replace(queue, delays=kind == "level"))
    name, arguments = known[kind]
    declare(broker_url, name, **arguments)
    with pytest.raises(Exception, match="PRECONDITION_FAILED"):
        declare(broker_url, name, **{**arguments, "x-max-length": 7})


def test_nothing_is_declared_that_no_subscriber_wants(
    broker_url: str, peer: Peer, queue: Queue
) -> None:
    """Delay levels come with the first subscriber that may retry."""
    level = f"{queue.exchange.name}.delay.00"
    peer.declare(replace(queue, delays=False))
    assert not onlooker.exists(broker_url, level)
    peer.declare(queue)
    assert onlooker.exists(broker_url, level)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"x-queue-type": "quorum"},
        {"x-message-ttl": 1000},
        {"x-queue-type": "classic", "x-expires": 60_000},
    ],
    ids=str,
)
def test_queue_with_other_arguments_is_explained(
    broker_url: str, peer: Peer, queue: Queue, arguments: dict[str, object]
) -> None:
    """What exists, in the broker's words, what was asked for, and the ways out; it stays."""
    declare(broker_url, queue.name, **arguments)
    with pytest.raises(TopologyError) as caught:
        peer.declare(replace(queue, delays=False))
    for words in (queue.name, "inequivalent arg", "x-delivery-limit", "queue_type='classic'"):
        assert words in str(caught.value)
    declare(broker_url, queue.name, **arguments)


def test_classic_queue_is_taken_whatever_its_arguments_are(
    broker_url: str, peer: Peer, queue: Queue
) -> None:
    """A queue of domain-event-broker may have any; a new one has those of domain-event-broker."""
    classic = replace(queue, classic=True, delays=False)
    declare(broker_url, queue.name, **{"x-max-length": 1000})
    peer.declare(classic)
    declare(broker_url, queue.name, **{"x-max-length": 1000})
    onlooker.delete(broker_url, queues=[queue.name])
    peer.declare(classic)
    declare(broker_url, queue.name, **{"x-dead-letter-exchange": f"{queue.name}-dlx"})


def test_exchange_with_other_arguments_is_used_as_it_is(
    broker_url: str, peer: Peer, queue: Queue, names: Names
) -> None:
    """An alternate exchange, for example, is for whoever runs the broker to decide. It stays."""
    exchange, alternate, other = queue.exchange.name, names.exchange("other"), names.queue("other")
    onlooker.bind_queue(broker_url, other, alternate, "#")
    with onlooker.channel(broker_url) as channel:
        channel.exchange_declare(
            exchange, "topic", durable=True, arguments={"alternate-exchange": alternate}
        )
    peer.declare(replace(queue, binding_keys=("a",), delays=False))
    for key in ("a", "b"):
        peer.publish(ToExchange(exchange), key.encode(), key=key, mandatory=True)
    assert peer.take_all(queue.name) == [b"a"]
    assert onlooker.take_all(broker_url, other) == [b"b"]


def test_due_without_its_alternate_exchange_is_a_topology_error(
    broker_url: str, peer: Peer, queue: Queue
) -> None:
    """An exchange of ours that is another one would lose retries."""
    due = f"{queue.exchange.name}.due"
    onlooker.declare_exchange(broker_url, due, "topic")
    with pytest.raises(TopologyError, match=due):
        peer.declare(queue)


# ------------------------------------------------------------------ delays


@pytest.mark.parametrize("broken", ["level", "its queue", "due"])
def test_deleted_delay_levels_are_made_again(
    bench: Bench, broken: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator deleted them under a running subscriber: the event is held, not lost."""
    monkeypatch.setattr("domain_events.forwarding._PAUSES", Backoff(0.2, jitter=0))
    level, due = f"{bench.exchange}.delay.00", f"{bench.exchange}.due"
    deliveries: list[int] = []

    def handle(event: DomainEvent) -> None:
        deliveries.append(event.retries)
        if len(deliveries) == 1:
            queues = [level] if broken != "due" else []
            exchanges = {"level": [level], "its queue": [], "due": [level, due]}[broken]
            onlooker.delete(bench.url, queues=queues, exchanges=exchanges)
        if event.retries == 0:
            raise Retry(0.1)

    subscriber = bench.subscriber()
    queue = bench.names.queue()
    subscriber.register(handle, queue, ["#"], max_retries=1)
    bench.publish("user.registered")
    with caplog.at_level(logging.ERROR, "domain_events"), running(subscriber):
        wait_until(lambda: len(deliveries) == 2)
    assert "could not be forwarded" in caplog.text
    assert deliveries == [0, 1]


def test_delayed_event_comes_by_the_exchanges_that_are_believed(peer: Peer, queue: Queue) -> None:
    """Whatever levels it has waited in: else its count of retries would be forgotten."""
    peer.declare(queue)
    inbox = peer.consume(queue)
    believed = topology.return_exchanges(queue.exchange.name)
    for number, delay in enumerate((0.1, 0.2, 0.3, 0.4, 0.5), 1):
        later = Later(queue.exchange.name, queue.name, delay)
        assert peer.send(Message(later, KEY, b"x", retries=number)) is None
        delivery = inbox.wait(number)[-1]
        assert delivery.exchange in believed  # type: ignore[attr-defined]
        assert delivery.retries == number


# ------------------------------------------------------------------ what RabbitMQ moves by itself


def test_dead_letter_that_rabbitmq_has_made_says_so(
    broker_url: str, peer: Peer, queue: Queue
) -> None:
    """Beyond the delivery limit of the queue; what it writes of that stays in the headers."""
    queue = replace(queue, delays=False)
    peer.declare(queue)
    onlooker.publish(broker_url, queue.exchange.name, "user.x", b"poison", headers={"mine": 1})
    inbox = peer.consume(queue, 1)
    for number in range(1, 102):
        inbox.fail(inbox.wait(number)[-1])
    peer.wait_for_count(ToDeadLetters(queue.name), 1)
    properties, body = onlooker.take(broker_url, f"{queue.name}-dl")
    assert body == b"poison"
    assert properties.headers["mine"] == 1
    assert properties.headers["x-first-death-reason"] == "delivery_limit"
    assert properties.headers["x-first-death-queue"] == queue.name


@pytest.mark.parametrize("nonsense", [7, "text", [{"queue": "x"}], {"a": 1}], ids=str)
def test_nonsense_in_the_brokers_headers_does_no_harm(
    broker_url: str, peer: Peer, queue: Queue, nonsense: object
) -> None:
    """Anybody may have put anything into ``x-death``: it is delivered, retried and buried."""
    peer.declare(queue)
    exchange = queue.exchange.name
    onlooker.publish(broker_url, exchange, "user.x", b"x", headers={"x-death": nonsense})
    inbox = peer.consume(queue)
    (delivery,) = inbox.wait(1)
    assert delivery.original_routing_key == "user.x"
    later = Later(exchange, queue.name, 0.1)
    assert peer.send(messages.retry(delivery, later, ValueError())) is None
    again = inbox.wait(2)[1]
    assert again.retries == 1
    assert peer.send(messages.dead_letter(again, queue.name, ValueError("no"))) is None
    (letter,) = peer.look(ToDeadLetters(queue.name))
    assert letter.failure.error_message == "no"


# ------------------------------------------------------------------ headers and properties


def test_event_that_is_sent_on_keeps_what_others_have_put_into_it(
    broker_url: str, peer: Peer, queue: Queue
) -> None:
    """A retry, a dead letter and its replay have the headers and the properties of others."""
    peer.declare(queue)
    headers = {
        "text": "ü",
        "number": 2**40,
        "negative": -1,
        "yes": True,
        "nothing": None,
        "list": [1, "two", [3]],
        "table": {"a": {"b": "c"}},
    }
    properties = {"content_type": "text/plain", "reply_to": "reply", "type": "kind"}
    onlooker.publish(
        broker_url, queue.exchange.name, "user.x", b"body", headers=headers, **properties
    )
    inbox = peer.consume(queue)
    (first,) = inbox.wait(1)
    later = Later(queue.exchange.name, queue.name, 0.1)
    assert peer.send(messages.retry(first, later, ValueError())) is None
    retried = inbox.wait(2)[1]
    assert peer.send(messages.dead_letter(retried, queue.name, KeyError())) is None
    peer.wait_for_count(ToDeadLetters(queue.name), 1)
    (dead,) = peer.look(ToDeadLetters(queue.name))
    assert peer.send(messages.replay(dead, queue.name)) is None
    replayed = inbox.wait(3)[2]
    for each in (first, retried, dead, replayed):
        found = each.properties
        others = {name: value for name, value in found.headers.items() if name in headers}
        assert others == headers
        assert {name: getattr(found, name) for name in properties} == properties
    left = {name for name in replayed.properties.headers if name not in headers}
    assert not {name for name in left if "death" in name}
    assert left == {"domain-events-routing-key", "domain-events-replays"}


def test_event_without_headers_has_none(broker_url: str, peer: Peer, queue: Queue) -> None:
    """Nothing is made up for an event that a publisher sends."""
    # Not a quorum queue, which writes a header of its own.
    onlooker.bind_queue(broker_url, queue.name, queue.exchange.name, "#")
    peer.publish(ToExchange(queue.exchange.name), b"x", key="user.x")
    properties, _ = onlooker.take(broker_url, queue.name)
    assert not properties.headers
    assert properties.type == "user.x"
    assert properties.message_id is None


class Broken(Exception):
    """What the handler really fails on."""


def test_forged_headers_are_neither_believed_nor_carried_on(bench: Bench) -> None:
    """The library's own headers, on what its publisher sent."""
    queue = bench.names.queue()
    seen: list[int] = []
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        seen.append(event.retries)
        if len(seen) == 1:
            raise Retry(0.1)
        raise Broken("really")

    subscriber.register(handle, queue, ["#"], max_retries=1)
    forged: dict[str, Any] = {
        "domain-events-retries": 7,
        "domain-events-subscriber": "other",
        "domain-events-error-type": "Forged",
        "domain-events-error-message": "forged",
        "domain-events-traceback": "forged" * 100,
        "domain-events-first-error-type": "Forged",
        "domain-events-hand-backs": 99,
        "domain-events-filler": "x" * 1000,
        "domain-events-cause": "a cause",
        "filler": "x" * 120_000,
        "trace": "kept",
    }
    body = DomainEvent("user.x", {"amount": 1}).to_json().encode()
    onlooker.publish(bench.url, bench.exchange, "user.x", body, headers=forged)
    with running(subscriber):
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1, timeout=20)
    assert seen == [0, 1]
    with DeadLetters(queue, bench.url) as dead_letters:
        (letter,) = dead_letters
    assert (letter.subscriber, letter.retries) == (queue, 1)
    assert letter.error_type == f"{Broken.__module__}.Broken"
    assert "forged" not in str(letter.traceback)
    assert str(letter.traceback).rstrip().endswith("Broken: really")
    assert letter.first_error_type == "domain_events.retry.Retry"
    properties, _ = onlooker.take(bench.url, f"{queue}-dl")
    kept = properties.headers
    assert (kept["trace"], kept["domain-events-cause"]) == ("kept", "a cause")
    assert "Forged" not in str({name: kept[name] for name in kept if name != "filler"})


def test_dead_letter_carries_its_reason_in_headers(bench: Bench) -> None:
    """By the names that the documentation gives them, for other programs to read."""
    queue = bench.names.queue()
    subscriber = Subscriber(bench.url, bench.exchange)

    def handle(_event: DomainEvent) -> None:
        subscriber.stop_consuming()
        raise Reject("no such user")

    subscriber.register(handle, queue, ["#"])
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=20)
    properties, _ = onlooker.take(bench.url, f"{queue}-dl")
    headers = properties.headers
    assert headers["domain-events-error-message"] == "no such user"
    assert headers["domain-events-error-type"] == "domain_events.retry.Reject"
    assert headers["domain-events-routing-key"] == "user.registered"
    assert headers["domain-events-subscriber"] == queue
    assert headers["domain-events-retries"] == 0


# ------------------------------------------------------------------ other programs

WIRE = Path(__file__).parent.parent / "docs" / "wire.rst"


def programs_of_the_page(url: str, names: dict[str, str]) -> Iterator[str]:
    """Those of docs/wire.rst, with the address of a broker and with names of the test's own."""
    parts = urlsplit(url)
    user, password = (unquote(each or "guest") for each in (parts.username, parts.password))
    address = f"'{parts.hostname}:{parts.port or 5672}', {user!r}, {password!r}"
    address += f", login_method='PLAIN', virtual_host={unquote(parts.path[1:]) or '/'!r}"
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", WIRE.read_text())
    for block in blocks:
        code = textwrap.dedent(block).replace("'localhost:5672'", address)
        for name, own in names.items():
            code = code.replace(f"'{name}'", f"'{own}'")
        yield code


class Enough(Exception):
    """Ends a program that would consume for ever."""


def test_programs_without_this_library_publish_and_subscribe(bench: Bench) -> None:
    """docs/wire.rst, word by word but for the address and the names."""
    other = bench.names.queue("newsletter")
    names = {"domain-events": bench.exchange, "newsletter": other}
    publish, subscribe = programs_of_the_page(bench.url, names)

    subscriber, seen = bench.subscriber(), list[DomainEvent]()
    subscriber.register(seen.append, bench.names.queue(), ["user.registered"])
    with running(subscriber):
        exec(publish, {})
        wait_until(lambda: seen)
    (event,) = seen
    assert (event.data, event.domain_object_id) == ({"user_id": 42}, "42")

    worked: list[tuple[object, ...]] = []

    def do_the_work(*what: object) -> None:
        if worked:
            raise Enough
        worked.append(what)

    def consume() -> None:
        with contextlib.suppress(Enough):
            exec(subscribe, {"do_the_work": do_the_work})

    def published() -> DomainEvent | None:
        renamed = DomainEvent("user.renamed", {"user_id": 42})
        try:
            return bench.publisher.publish(renamed, mandatory=True)
        except EventUnroutable:  # its queue is not bound yet
            return None

    program = threading.Thread(target=consume, daemon=True)
    program.start()
    renamed = wait_until(published)
    assert renamed is not None
    bench.publish("user.renamed")
    program.join(30)
    assert worked == [("user.renamed", renamed.uuid_string, {"user_id": 42})]
    # The first was acked, and not the second.
    wait_until(lambda: onlooker.count(bench.url, other) == 1)


# ------------------------------------------------------------------ temporary queues


def test_no_temporary_queue_is_both_transient_and_shared(
    broker_url: str, peer: Peer, names: Names
) -> None:
    """RabbitMQ 4.3 may refuse these; here all kinds can be declared, on whatever release it is."""
    exchange = Exchange(names.exchange())
    for exclusive, auto_delete in itertools.product([False, True], repeat=2):
        name = names.queue(f"{exclusive}-{auto_delete}")
        queue = Queue(name, exchange, durable=False, exclusive=exclusive, auto_delete=auto_delete)
        peer.declare(queue)
        assert onlooker.exists(broker_url, name)
        peer.consuming.delete([name], f"{names.prefix}-none", TIMEOUT)
