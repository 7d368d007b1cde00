"""What `Subscriber` promises, whatever broker is behind it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

import onlooker
import pytest
from bench import Bench, Events, running, stops_after
from support import Names, sooner_than, wait_until

from conformance.peer import Peer
from domain_events import (
    ConfigurationError,
    DomainEvent,
    Publisher,
    Reject,
    Retry,
    Subscriber,
    TopologyError,
)
from domain_events.broker import Consumer, Exchange, Queue
from domain_events.message import Delivery, ToSubscriber


def test_events_published_between_register_and_start_are_kept(bench: Bench) -> None:
    """The queue and its bindings exist when `register` returns."""
    seen: Events = []
    subscriber = bench.subscriber()
    queue = bench.names.queue()
    subscriber.register(stops_after(2, subscriber, seen), queue, ["user.*", "shop.#"])
    first = bench.publish("user.registered", {"n": 1})
    bench.publish("invoice.issued")
    second = bench.publish("shop.cart.emptied", {"n": 2})
    subscriber.start_consuming(timeout=10)
    assert seen == [first, second]
    assert [event.retries for event in seen] == [0, 0]
    assert onlooker.count(bench.url, queue) == 0


def test_events_wait_while_a_durable_subscriber_is_away(bench: Bench) -> None:
    """Publisher and subscriber start and stop in any order."""
    queue = bench.names.queue()
    bench_subscriber = bench.subscriber()
    bench_subscriber.register(print, queue, ["user.*"])
    bench_subscriber.close()
    event = bench.publish("user.registered")
    seen: Events = []
    subscriber = bench.subscriber()
    subscriber.register(stops_after(1, subscriber, seen), queue, ["user.*"])
    subscriber.start_consuming(timeout=10)
    assert seen == [event]


def test_several_handlers_each_have_their_queue(bench: Bench) -> None:
    """Each one gets every event it listens to, and no other."""
    seen: dict[str, Events] = {"a": [], "b": []}
    subscriber = bench.subscriber()

    def stop_when_all() -> None:
        if len(seen["a"]) == 1 and len(seen["b"]) == 2:
            subscriber.stop_consuming()

    @subscriber.on("user.registered", name=bench.names.queue("a"))
    def first(event: DomainEvent) -> None:
        seen["a"].append(event)
        stop_when_all()

    @subscriber.on("user.registered", "user.left", name=bench.names.queue("b"), prefetch_count=5)
    def second(event: DomainEvent) -> None:
        seen["b"].append(event)
        stop_when_all()

    events = [bench.publish("user.registered"), bench.publish("user.left")]
    subscriber.start_consuming(timeout=10)
    assert seen == {"a": events[:1], "b": events}
    assert callable(first)
    assert callable(second)


def test_several_processes_share_the_events_of_one_handler(bench: Bench) -> None:
    """Two subscribers of one name: each event is handled by one of them."""
    queue = bench.names.queue()
    seen: list[Events] = [[], []]
    # Each holds its first event until the other has one too.
    both_have_one = threading.Barrier(2)
    subscribers = [bench.subscriber() for _ in seen]

    def handler(mine: Events) -> Callable[[DomainEvent], None]:
        def handle(event: DomainEvent) -> None:
            mine.append(event)
            if len(mine) == 1:
                both_have_one.wait(30)

        return handle

    for subscriber, events in zip(subscribers, seen, strict=True):
        subscriber.register(handler(events), queue, ["#"], prefetch_count=1)
    published = [bench.publish("n.n", n) for n in range(40)]
    with running(*subscribers):
        wait_until(lambda: len(seen[0]) + len(seen[1]) == 40)
    assert sorted(e.data for e in seen[0] + seen[1]) == [e.data for e in published]
    assert seen[0]
    assert seen[1]


def test_start_consuming_ends_after_its_timeout(bench: Bench) -> None:
    """About that time, also when nothing arrives; and it may be started again."""
    seen: Events = []
    subscriber = bench.subscriber()
    subscriber.register(seen.append, bench.names.queue(), ["#"])
    for number in range(2):
        event = bench.publish("user.registered", number)
        begun = time.monotonic()
        with sooner_than(60):  # it would have no end
            subscriber.start_consuming(timeout=1.0)
        assert time.monotonic() - begun >= 1.0
        assert seen[number:] == [event]


def test_running_handler_finishes_when_the_time_is_over(bench: Bench) -> None:
    """What has begun is finished and acked; what has not is given back."""
    done: Events = []
    release = threading.Event()

    def slow(event: DomainEvent) -> None:
        release.wait(2)  # longer than all the time that there is
        done.append(event)

    queue = bench.names.queue()
    subscriber = bench.subscriber()
    subscriber.register(slow, queue, ["#"])
    for n in range(3):
        bench.publish("n.n", n)
    subscriber.start_consuming(timeout=1.0)
    assert len(done) == 1
    wait_until(lambda: onlooker.count(bench.url, queue) == 2)


def test_stop_before_start_is_not_lost(bench: Bench) -> None:
    """A thread that stops faster than the other starts does not leave it running."""
    subscriber = bench.subscriber()
    subscriber.register(print, bench.names.queue(), ["#"])
    subscriber.stop_consuming()
    with sooner_than(60):
        subscriber.start_consuming(timeout=60)


def test_workers_run_side_by_side(bench: Bench) -> None:
    """With four workers four handlers run at the same time, and not five."""
    together = threading.Barrier(4)
    running: set[int] = set()
    most: list[int] = []
    subscriber = bench.subscriber(workers=4)
    lock = threading.Lock()
    done: list[int] = []

    def handle(event: DomainEvent) -> None:
        with lock:
            running.add(threading.get_ident())
            most.append(len(running))
        together.wait(30)
        with lock:
            running.discard(threading.get_ident())
            done.append(event.data)
            if len(done) == 8:
                subscriber.stop_consuming()

    queue = bench.names.queue()
    subscriber.register(handle, queue, ["#"])
    for n in range(8):
        bench.publish("n.n", n)
    subscriber.start_consuming(timeout=50)
    assert sorted(done) == list(range(8))
    assert max(most) == 4
    assert onlooker.count(bench.url, queue) == 0


def test_workers_end_when_the_time_is_over(bench: Bench) -> None:
    """`timeout` holds with several workers too."""
    seen: Events = []
    subscriber = bench.subscriber(workers=3)
    subscriber.register(seen.append, bench.names.queue(), ["#"])
    event = bench.publish("user.registered")
    with sooner_than(60):  # it would have no end
        subscriber.start_consuming(timeout=1.0)
    assert seen == [event]


def test_ordered_keeps_the_events_of_one_object_in_order(bench: Bench) -> None:
    """Never two at a time, in their order; other objects are handled meanwhile."""
    subscriber = bench.subscriber(workers=4)
    lock = threading.Lock()
    running: dict[str | None, int] = {}
    seen: dict[object, list[int]] = {"a": [], "b": [], "c": []}
    side_by_side = threading.Event()

    def handle(event: DomainEvent) -> None:
        about = event.domain_object_id
        with lock:
            assert about not in running, "two events of one object at the same time"
            running[about] = event.data  # type: ignore[index]
            if len(running) > 1:
                side_by_side.set()
        if not side_by_side.is_set():
            side_by_side.wait(1)
        with lock:
            del running[about]  # type: ignore[arg-type]
            seen[about].append(event.data)
            if sum(map(len, seen.values())) == 90:
                subscriber.stop_consuming()

    subscriber.register(handle, bench.names.queue(), ["#"], ordered=True)
    for n in range(30):
        for about in "abc":
            bench.publish("n.n", n, about)
    subscriber.start_consuming(timeout=20)
    assert seen == {about: list(range(30)) for about in "abc"}
    assert side_by_side.is_set()


def test_ordered_events_without_an_object_are_handled_and_given_back(bench: Bench) -> None:
    """Events about nothing have no order; what waits in a lane at the end is not lost."""
    subscriber = bench.subscriber(workers=2)
    queue = bench.names.queue()
    seen: Events = []
    release = threading.Event()

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if event.data == "slow":
            subscriber.stop_consuming()
            release.wait(0.5)

    subscriber.register(handle, queue, ["#"], ordered=True)
    for n in range(5):
        bench.publish("n.n", n)
    onlooker.publish(bench.url, bench.exchange, "n.n", b"no event")
    for _ in range(4):
        bench.publish("n.n", "slow", "one")
    subscriber.start_consuming(timeout=10)
    handled = sum(1 for event in seen if event.data == "slow")
    assert handled == 1
    wait_until(lambda: onlooker.count(bench.url, queue) == 9 - len(seen))
    assert onlooker.count(bench.url, f"{queue}-dl") == 1


def test_failed_event_is_a_dead_letter_and_the_log_says_so(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Subscriber, routing key, event id and traceback are in the log; the payload is not."""
    subscriber = bench.subscriber()
    queue = bench.names.queue()

    def fail(event: DomainEvent) -> None:
        subscriber.stop_consuming()
        raise RuntimeError("out of paper")

    subscriber.register(fail, queue, ["#"])
    event = bench.publish("user.registered", {"secret": "hunter2"})
    with caplog.at_level(logging.INFO, "domain_events"):
        subscriber.start_consuming(timeout=10)
    assert onlooker.count(bench.url, queue) == 0
    assert onlooker.count(bench.url, f"{queue}-dl") == 1
    for words in (queue, "user.registered", event.uuid_string, "out of paper", "Traceback"):
        assert words in caplog.text
    assert "hunter2" not in caplog.text


def test_event_without_dead_letters_is_dropped_and_the_log_says_so(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """`dead_letter=False` loses what fails, and never silently."""
    subscriber = bench.subscriber()
    queue = bench.names.queue()

    def fail(_event: DomainEvent) -> None:
        subscriber.stop_consuming()
        raise Reject("not for us")

    subscriber.register(fail, queue, ["#"], False)
    event = bench.publish("user.registered")
    subscriber.start_consuming(timeout=10)
    assert onlooker.count(bench.url, queue) == 0
    assert not onlooker.exists(bench.url, f"{queue}-dl")
    assert "dropped" in caplog.text
    assert event.uuid_string in caplog.text


def test_body_that_is_no_event_is_kept_byte_for_byte(bench: Bench) -> None:
    """It does not stop the events behind it, and the handler never sees it."""
    seen: Events = []
    subscriber = bench.subscriber()
    queue = bench.names.queue()
    subscriber.register(stops_after(1, subscriber, seen), queue, ["#"])
    bodies = [b"\xff\x00 no JSON", b"[]", b"{}", b"", b'{"routing_key": 1, "data": 2}']
    for body in bodies:
        onlooker.publish(bench.url, bench.exchange, "some.thing", body)
    event = bench.publish("user.registered")
    subscriber.start_consuming(timeout=10)
    assert seen == [event]
    kept = [onlooker.take(bench.url, f"{queue}-dl") for _ in bodies]
    assert [body for _, body in kept] == bodies


def test_event_published_in_a_handler_names_its_cause(bench: Bench, peer: Peer) -> None:
    """It carries the correlation id on, with no word from the user."""
    subscriber = bench.subscriber()
    listener = bench.names.queue("effects")
    onlooker.bind_queue(bench.url, listener, bench.exchange, "effect.#")

    def handle(event: DomainEvent) -> None:
        if event.routing_key == "first.cause":
            bench.publish("second.cause")
        else:
            bench.publish("effect.of")
            subscriber.stop_consuming()

    subscriber.register(handle, bench.names.queue(), ["*.cause"])
    first = bench.publish("first.cause")
    subscriber.start_consuming(timeout=10)
    (effect,) = peer.look(ToSubscriber(listener))
    assert effect.correlation_id == first.uuid_string
    assert effect.cause not in (None, first.uuid_string, effect.message_id)


@pytest.mark.parametrize("exchange_type", ["direct", "fanout"])
def test_other_exchange_types_route_as_they_do(
    broker_url: str, names: Names, exchange_type: Literal["direct", "fanout"]
) -> None:
    """`exchange_type` is the broker's word for how binding keys are understood."""
    exchange = names.exchange("other")
    seen: Events = []
    subscriber = Subscriber(broker_url, exchange, exchange_type)
    subscriber.register(stops_after(1, subscriber, seen), names.queue(), ["user.registered"])
    with Publisher(broker_url, exchange, exchange_type) as publisher:
        event = publisher.publish(DomainEvent("user.registered", {}))
    subscriber.start_consuming(timeout=10)
    assert seen == [event]


@pytest.mark.parametrize(
    "options", [{"durable": False}, {"auto_delete": True}, {"exclusive": True}], ids=str
)
def test_temporary_subscriber_receives_and_retries(bench: Bench, options: dict[str, bool]) -> None:
    """All kinds of temporary queues work, with retries, and keep no dead letters."""
    queue = bench.names.queue()
    seen: Events = []
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if event.retries == 0:
            raise Retry(0.1)
        subscriber.stop_consuming()

    subscriber.register(handle, queue, ["#"], max_retries=1, **options)  # type: ignore[arg-type]
    event = bench.publish("user.registered")
    subscriber.start_consuming(timeout=10)
    assert seen == [event, event]
    assert not onlooker.exists(bench.url, f"{queue}-dl")
    if "durable" not in options:
        wait_until(lambda: not onlooker.exists(bench.url, queue))


def test_exclusive_queue_of_another_is_a_topology_error(bench: Bench) -> None:
    """An exclusive queue belongs to one process; the second one is told."""
    queue = bench.names.queue()
    first, second = bench.subscriber(), bench.subscriber()
    with first, second:
        first.register(print, queue, ["#"], exclusive=True)
        with pytest.raises(TopologyError, match="exclusively used by another connection"):
            second.register(print, queue, ["#"], exclusive=True)


def test_options_may_change_between_deployments(bench: Bench) -> None:
    """No option is in the queue's arguments, so no change of one is a 406."""
    queue = bench.names.queue()
    changes: list[dict[str, object]] = [
        {},
        {"dead_letter": False},
        {"max_retries": 5},
        {"dead_letter": True, "max_retries": 1, "prefetch_count": 1},
        {"ordered": True},
    ]
    for options in changes:
        with bench.subscriber() as subscriber:
            subscriber.register(print, queue, ["#"], **options)  # type: ignore[arg-type]


def test_queue_with_other_arguments_is_explained(bench: Bench) -> None:
    """`TopologyError` names the queue, and the ways out."""
    queue = bench.names.queue()
    onlooker.bind_queue(bench.url, queue, bench.exchange, "#")
    with bench.subscriber() as subscriber:
        with pytest.raises(TopologyError) as caught:
            subscriber.register(print, queue, ["#"])
        for words in (queue, "different settings", "ways out", "delete", "queue_type='classic'"):
            assert words in str(caught.value)
        # The subscriber is none the worse for it.
        subscriber.register(print, bench.names.queue("other"), ["#"])


def test_registering_while_consuming_takes_effect_at_once(bench: Bench) -> None:
    """A handler may register another one."""
    subscriber = bench.subscriber()
    seen: Events = []

    def first(_event: DomainEvent) -> None:
        subscriber.register(stops_after(1, subscriber, seen), bench.names.queue("b"), ["second.#"])
        bench.publish("second.thing")

    subscriber.register(first, bench.names.queue("a"), ["first.#"])
    bench.publish("first.thing")
    subscriber.start_consuming(timeout=10)
    assert [event.routing_key for event in seen] == ["second.thing"]


@pytest.mark.parametrize("workers", [1, 2])
def test_exit_in_a_handler_ends_the_run_and_gives_the_event_back(
    bench: Bench, workers: int
) -> None:
    """`sys.exit()` in a handler is no failure of the event."""
    subscriber = bench.subscriber(workers=workers)
    queue = bench.names.queue()

    def leave(_event: DomainEvent) -> None:
        raise SystemExit(3)

    subscriber.register(leave, queue, ["#"])
    bench.publish("user.registered")
    with pytest.raises(SystemExit):
        subscriber.start_consuming(timeout=10)
    wait_until(lambda: onlooker.count(bench.url, queue) == 1)


def test_prefetch_count_bounds_what_a_process_holds(bench: Bench) -> None:
    """The rest stays in the queue, for others."""
    subscriber = bench.subscriber()
    queue = bench.names.queue()
    left: list[int] = []

    def look(_event: DomainEvent) -> None:
        wait_until(lambda: onlooker.count(bench.url, queue) == 10 - 3)
        left.append(onlooker.count(bench.url, queue))
        subscriber.stop_consuming()

    subscriber.register(look, queue, ["#"], prefetch_count=3)
    for n in range(10):
        bench.publish("n.n", n)
    subscriber.start_consuming(timeout=20)
    assert left == [7]


def test_same_name_twice_is_a_mistake(bench: Bench) -> None:
    """Two handlers on one queue would steal each other's events."""
    with bench.subscriber() as subscriber:
        name = bench.names.queue()
        subscriber.register(print, name, ["#"])
        with pytest.raises(ConfigurationError, match="already"):
            subscriber.register(print, name, ["#"])


def test_starting_twice_is_a_mistake(bench: Bench) -> None:
    """One run at a time."""
    subscriber = bench.subscriber()
    errors: list[Exception] = []

    def start_again(_event: DomainEvent) -> None:
        try:
            subscriber.start_consuming()
        except ConfigurationError as error:
            errors.append(error)
        subscriber.stop_consuming()

    subscriber.register(start_again, bench.names.queue(), ["#"])
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=10)
    assert len(errors) == 1


def test_closing_while_it_consumes_stops_it(bench: Bench) -> None:
    """Nobody is left waiting for deliveries that cannot come."""
    subscriber = bench.subscriber()
    seen: Events = []
    subscriber.register(seen.append, bench.names.queue(), ["#"])
    bench.publish("user.registered")
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    wait_until(lambda: seen)
    subscriber.close()
    thread.join(30)
    assert not thread.is_alive()


def test_stopping_twice_does_not_stop_the_next_run(bench: Bench) -> None:
    """What was asked of one run is not held against the next."""
    subscriber = bench.subscriber()
    seen: Events = []
    subscriber.register(seen.append, bench.names.queue(), ["#"])
    for _ in range(2):
        thread = threading.Thread(target=subscriber.start_consuming)
        thread.start()
        event = bench.publish("user.registered")
        wait_until(lambda: event in seen)  # noqa: B023
        for _ in range(50):
            subscriber.stop_consuming()
        thread.join(30)
        assert not thread.is_alive()


def test_our_own_mistake_over_a_message_does_not_stop_the_subscriber(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, given back after a pause, and the events behind it are handled."""
    monkeypatch.setattr("domain_events.worker._PAUSE_AFTER_INTERNAL_ERROR", 0.2)
    subscriber = bench.subscriber()
    seen: Events = []
    subscriber.register(stops_after(2, subscriber, seen), bench.names.queue(), ["#"])
    (subscription,) = subscriber.subscriptions
    right = subscription.handle
    mistakes: list[object] = []

    def mistaken(delivery: Delivery, consumer: Consumer) -> None:
        if not mistakes:
            mistakes.append(delivery)
            raise AssertionError("a mistake")
        right(delivery, consumer)

    monkeypatch.setattr(subscription, "handle", mistaken)
    events = [bench.publish("user.registered", n) for n in range(2)]
    subscriber.start_consuming(timeout=10)
    assert seen == [events[1], events[0]]
    assert "a mistake" in caplog.text


def test_event_of_a_crashed_process_comes_again(bench: Bench, peer: Peer) -> None:
    """The same event, with the same id, to whoever consumes then."""
    queue = bench.names.queue()
    seen: Events = []
    subscriber = bench.subscriber()
    subscriber.register(stops_after(2, subscriber, seen), queue, ["#"])
    events = [bench.publish("user.registered", n) for n in range(2)]
    connection = peer.another_connection()
    subscribed = Queue(queue, Exchange(bench.exchange), dead_letters=True)
    (delivery,) = peer.consume(subscribed, 1, connection).wait(1)
    assert delivery.message_id == events[0].uuid_string
    connection.close(10)
    subscriber.start_consuming(timeout=10)
    assert sorted(event.data for event in seen) == [0, 1]
    assert {event.uuid_string for event in seen} == {event.uuid_string for event in events}


def test_classic_queue_that_exists_is_taken_over(bench: Bench) -> None:
    """`queue_type="classic"`: whatever its arguments, with what waits in it."""
    queue = bench.names.queue()
    onlooker.bind_queue(bench.url, queue, bench.exchange, "user.*", **{"x-max-length": 1000})
    waiting = bench.publish("user.registered", "waiting")
    seen: Events = []
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if event.data == "new":
            subscriber.stop_consuming()
            raise Reject("kept")
        if event.retries == 0:
            raise Retry(0.1)
        bench.publish("user.registered", "new")

    subscriber.register(handle, queue, ["user.*"], max_retries=1, queue_type="classic")
    subscriber.start_consuming(timeout=10)
    assert [event.data for event in seen] == ["waiting", "waiting", "new"]
    assert seen[0] == waiting
    assert onlooker.count(bench.url, queue) == 0
    assert onlooker.count(bench.url, f"{queue}-dl") == 1


def test_exchanges_are_apart(broker_url: str, names: Names) -> None:
    """Events and retries of one do not reach the subscribers of another."""
    seen: dict[str, list[int]] = {"one": [], "two": []}
    exchanges = {name: names.exchange(name) for name in seen}
    subscribers = {name: Subscriber(broker_url, exchange) for name, exchange in exchanges.items()}

    def handler(name: str) -> Callable[[DomainEvent], None]:
        def handle(event: DomainEvent) -> None:
            seen[name].append(event.retries)
            if event.retries == 0:
                raise Retry(0.1)

        return handle

    for name, subscriber in subscribers.items():
        subscriber.register(handler(name), names.queue(name), ["#"], max_retries=1)
    with running(*subscribers.values()):
        with Publisher(broker_url, exchanges["one"]) as publisher:
            publisher.publish(DomainEvent("user.registered", {}))
        wait_until(lambda: seen["one"] == [0, 1])
    assert seen["two"] == []
