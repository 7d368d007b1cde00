"""`Subscriber(declare=False)`: an operator declares, the service only uses, on either broker."""

from __future__ import annotations

import logging
from dataclasses import replace

import onlooker
import pytest
from bench import Bench, Events, running, stops_after
from support import wait_until

from conformance.peer import Peer
from domain_events import (
    ConfigurationError,
    DeadLetters,
    DomainEvent,
    Retry,
    Subscriber,
    TopologyError,
)
from domain_events.broker import Exchange, Queue
from domain_events.message import Place, ToDeadLetters, ToSubscriber, UndeliveredOf

WAY_OUT = "domain-events topology apply package.module:subscriber"


def apply(bench: Bench, queue: str, keys: list[str], max_retries: int = 0) -> None:
    """Declare it, as an operator does."""
    with bench.subscriber() as operator:
        operator.register(print, queue, keys, max_retries=max_retries)


def declaring_nothing(bench: Bench) -> Subscriber:
    return Subscriber(bench.url, bench.exchange, declare=False)


def test_what_is_missing_is_named_and_not_declared(peer: Peer, bench: Bench) -> None:
    """In `register`, and with the command that declares it."""
    exchange, name = bench.exchange, bench.names.queue()
    whole = Queue(name, Exchange(exchange), ("#",), dead_letters=True, delays=True)
    places: list[Place] = [ToSubscriber(name), ToDeadLetters(name), UndeliveredOf(exchange)]
    steps: list[tuple[Queue | None, str]] = [
        (None, f"The exchange '{exchange}'"),
        (replace(whole, name=bench.names.queue("other")), f"The queue '{name}'"),
        (replace(whole, dead_letters=False), f"The queue '{name}-dl'"),
    ]
    for declared, missing in steps:
        if declared is not None:
            peer.declare(replace(declared, delays=False))
        before = [peer.exists(place) for place in places]
        with declaring_nothing(bench) as subscriber:
            with pytest.raises(TopologyError) as caught:
                subscriber.register(print, name, ["#"])
            assert f"{missing} does not exist." in str(caught.value)
            assert WAY_OUT in str(caught.value)
            assert not subscriber.subscriptions
        assert [peer.exists(place) for place in places] == before
    peer.declare(replace(whole, delays=False))
    with declaring_nothing(bench) as subscriber:
        with pytest.raises(TopologyError, match=rf"'{exchange}\..*' does not exist"):
            subscriber.register(print, name, ["#"], max_retries=1)
        subscriber.register(print, name, ["#"])


def test_bindings_are_the_operators(bench: Bench) -> None:
    """None is made and none removed: what the release lists in addition does not come."""
    queue = bench.names.queue()
    apply(bench, queue, ["a", "b"])
    seen: Events = []
    subscriber = declaring_nothing(bench)
    subscriber.register(stops_after(1, subscriber, seen), queue, ["b", "c"], retired_keys=["a"])
    bench.publish("a")
    bench.publish("c")
    assert onlooker.count(bench.url, queue) == 1
    wanted = bench.publish("b")
    subscriber.start_consuming(timeout=30)
    assert seen == [wanted]
    assert onlooker.count(bench.url, queue) == 0  # the retired one is acked


def test_retries_dead_letters_and_replays_work(bench: Bench) -> None:
    """As with a subscriber that has declared all of it."""
    queue = bench.names.queue()
    apply(bench, queue, ["#"], max_retries=1)
    retries: list[int] = []
    subscriber = declaring_nothing(bench)

    def handle(event: DomainEvent) -> None:
        retries.append(event.retries)
        raise Retry(0.1)

    subscriber.register(handle, queue, ["#"], max_retries=1)
    bench.publish("a")
    with running(subscriber), DeadLetters(queue, bench.url) as letters:
        wait_until(lambda: letters.count() == 1)
        assert letters.replay_all() == 1
        wait_until(lambda: len(retries) == 4)
        wait_until(lambda: letters.count() == 1)
    assert retries == [0, 1, 0, 1]


def test_unlisted_event_reaches_the_release_that_lists_it(bench: Bench) -> None:
    """Without retries, and with delay levels from others, but no binding back to this queue."""
    queue = bench.names.queue()
    apply(bench, queue, ["old", "new"])
    apply(bench, bench.names.queue("other"), ["none"], max_retries=1)
    old, new = declaring_nothing(bench), declaring_nothing(bench)
    seen: Events = []
    old.register(print, queue, ["old"])
    new.register(seen.append, queue, ["old", "new"])
    with running(old):
        event = bench.publish("new")
        wait_until(lambda: onlooker.count(bench.url, queue) == 0)
        with running(new):
            wait_until(lambda: seen == [event])
    assert onlooker.count(bench.url, f"{bench.exchange}.undelivered") == 0


def test_deleted_queue_is_consumed_again_when_the_operator_has_declared_it(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not declared by the subscriber; meanwhile it says what to do."""
    queue = bench.names.queue()
    apply(bench, queue, ["#"])
    seen: Events = []
    subscriber = declaring_nothing(bench)
    subscriber.register(seen.append, queue, ["#"])

    def is_named() -> bool:
        return any(
            record.levelno == logging.ERROR and WAY_OUT in record.getMessage()
            for record in caplog.records
        )

    with running(subscriber):
        onlooker.delete(bench.url, queues=[queue])
        wait_until(is_named)
        assert not onlooker.exists(bench.url, queue)
        apply(bench, queue, ["#"])
        event = bench.publish("a")
        wait_until(lambda: seen == [event])


@pytest.mark.parametrize(
    "options", [{"durable": False}, {"exclusive": True}, {"auto_delete": True}], ids=str
)
def test_temporary_queue_is_refused(bench: Bench, options: dict[str, bool]) -> None:
    """Each process declares its own."""
    with (
        declaring_nothing(bench) as subscriber,
        pytest.raises(ConfigurationError, match=r"temporary queue.*declare=False"),
    ):
        subscriber.register(print, bench.names.queue(), ["#"], **options)  # type: ignore[arg-type]
