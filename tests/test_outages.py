"""Nothing is lost, and everything goes on, when brokers and connections fail.

Each test has a broker that it may kill; a subscriber runs in a thread of its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onlooker
import pytest
from bench import Bench, Events
from rabbitmq_node import Node
from support import Names, sooner_than, wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DeadLetters,
    DomainEvent,
    EventNotConfirmed,
    Publisher,
    Retry,
    Subscriber,
)


@pytest.fixture
def outage(killable_node: Node, unique: str) -> Iterator[Bench]:
    """A bench on a broker that the test may kill.

    Its queues are left to go with the broker: RabbitMQ 3.10 breaks down over a quorum queue that
    is deleted while its dead-letter worker starts, which is when the broker has just started.
    """
    bench = Bench(killable_node.url, Names(killable_node.url, unique))
    yield bench
    bench.publisher.close()


@contextmanager
def consuming(
    subscriber: Subscriber, url: str, queue: str, errors: list[BaseException] | None = None
) -> Iterator[None]:
    """Run a subscriber in a thread, from when it consumes until the block ends."""

    def run() -> None:
        try:
            subscriber.start_consuming()
        except Exception as error:
            if errors is None:
                raise
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: onlooker.consumers(url, queue) == 1)
    try:
        yield
    finally:
        subscriber.stop_consuming()
        thread.join(30)
        assert not thread.is_alive()


def ids(events: Events) -> set[str]:
    return {event.uuid_string for event in events}


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_everything_goes_on_after_a_broker_restart(
    outage: Bench, killable_node: Node, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Publisher and subscriber both ride over it; no event is lost, the log says so once."""
    queue = outage.names.queue()
    seen: Events = []
    subscriber = outage.subscriber()
    subscriber.register(seen.append, queue, ["#"])
    with consuming(subscriber, outage.url, queue):
        published = [outage.publish("before.it", n) for n in range(20)]
        wait_until(lambda: len(seen) == 20)
        killable_node.sync()
        getattr(killable_node, fault)()
        late: Events = []
        publishing = threading.Thread(
            target=lambda: late.append(
                outage.publisher.publish(DomainEvent("during.it", {}), timeout=60)
            )
        )
        publishing.start()
        killable_node.start()
        with sooner_than(60):  # the heartbeat, or the publish's own deadline
            publishing.join(60)
            wait_until(lambda: late and ids(late) <= ids(seen))
        published += late
        published += [outage.publish("after.it", n) for n in range(20)]
        wait_until(lambda: ids(published) <= ids(seen))
    assert caplog.text.count(f"{queue} consumes again") == 1


def test_confirmed_events_survive_a_crash_of_the_broker(outage: Bench, killable_node: Node) -> None:
    """What `publish_many` has counted is on disk; what it has not is named."""
    queue = outage.names.queue()
    with outage.subscriber() as subscriber:
        subscriber.register(print, queue, ["#"])
    killable_node.sync()
    events = [DomainEvent("n.n", n) for n in range(10_000)]
    taken = threading.Event()

    def until_the_crash() -> Iterator[DomainEvent]:
        for number, event in enumerate(events):
            if number == 4000:
                taken.set()
            yield event

    def kill_when_taken() -> None:
        assert taken.wait(60)
        killable_node.kill()

    crash = threading.Thread(target=kill_when_taken)
    crash.start()
    with pytest.raises((EventNotConfirmed, BrokerUnavailable)) as caught:
        outage.publisher.publish_many(until_the_crash(), timeout=3)
    crash.join()
    killable_node.start()
    stored = {
        DomainEvent.from_json(body).uuid_string for body in onlooker.take_all(outage.url, queue)
    }
    unconfirmed = ids(list(caught.value.unconfirmed))
    first_unconfirmed = next(n for n, e in enumerate(events) if e.uuid_string in unconfirmed)
    confirmed = ids(events[: first_unconfirmed + len(unconfirmed)]) - unconfirmed
    assert len(confirmed) > 1000
    assert confirmed <= stored


def test_unconfirmed_events_are_published_again_on_the_next_connection(
    outage: Bench, killable_node: Node
) -> None:
    """A broker that crashes in the middle of `publish_many` costs time, not events."""
    queue = outage.names.queue()
    with outage.subscriber() as subscriber:
        subscriber.register(print, queue, ["#"])
    killable_node.sync()

    def events() -> Iterator[DomainEvent]:
        for n in range(4000):
            if n == 2000:
                killable_node.kill()
                killable_node.start()
            yield DomainEvent("n.n", n)

    assert outage.publisher.publish_many(events(), timeout=60) == 4000
    stored = [DomainEvent.from_json(body) for body in onlooker.take_all(outage.url, queue)]
    assert {event.data for event in stored} == set(range(4000))


@pytest.mark.parametrize("how", ["kill", "closed connections"])
def test_retries_that_wait_survive(outage: Bench, killable_node: Node, how: str) -> None:
    """In the delay queues, on their way back, and being moved."""
    number = 300
    queue = outage.names.queue()
    done: set[int] = set()
    asked: set[int] = set()
    subscriber = outage.subscriber()

    def handle(event: DomainEvent) -> None:
        if event.retries == 0:
            asked.add(event.data)
            raise Retry(2.0 + event.data % 10 / 10)
        done.add(event.data)

    subscriber.register(handle, queue, ["#"], max_retries=5)
    killable_node.sync()
    with consuming(subscriber, outage.url, queue):
        outage.publisher.publish_many(DomainEvent("n.n", n) for n in range(number))
        wait_until(lambda: len(asked) > number // 2)
        if how == "kill":
            killable_node.kill()
            killable_node.start()
        else:
            killable_node.ctl("close_all_connections", "test")
        wait_until(lambda: len(done) == number, timeout=40)


def test_event_being_handled_when_the_connection_breaks_comes_again(
    outage: Bench, killable_node: Node
) -> None:
    """Its ack died with its channel: at least once means twice here, never not at all."""
    queue = outage.names.queue()
    subscriber = outage.subscriber()
    seen: Events = []
    began, go_on = threading.Event(), threading.Event()

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        began.set()
        assert go_on.wait(60)

    subscriber.register(handle, queue, ["#"])
    with consuming(subscriber, outage.url, queue):
        first = outage.publish("user.registered", 1)
        second = outage.publish("user.registered", 2)
        assert began.wait(30)
        killable_node.ctl("close_all_connections", "test")
        wait_until(lambda: onlooker.consumers(outage.url, queue) == 1)
        go_on.set()
        wait_until(lambda: len(seen) >= 3)
        third = outage.publish("user.registered", 3)
        wait_until(lambda: third in seen)
    assert seen[0] == first
    assert sorted(event.data for event in seen[1:]) == [1, 2, 3]
    assert second in seen
    assert onlooker.count(outage.url, queue) == 0


def test_deleted_queue_is_made_again(outage: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The broker cancels the consumer; the subscriber is back by itself, and says so."""
    queue = outage.names.queue()
    seen: Events = []
    subscriber = outage.subscriber()
    subscriber.register(seen.append, queue, ["#"])
    with consuming(subscriber, outage.url, queue):
        with onlooker.channel(outage.url) as channel:
            channel.queue_delete(queue)
        wait_until(lambda: onlooker.exists(outage.url, queue))
        wait_until(lambda: onlooker.consumers(outage.url, queue) == 1)
        event = outage.publish("user.registered")
        wait_until(lambda: event in seen)
    assert caplog.text.count(f"{queue} consumes again") == 1


def test_channel_whose_close_is_never_answered_does_not_silence_the_subscriber(
    outage: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The consumer was cancelled, and waits for a CloseOk that never comes: it does not wait long.

    RabbitMQ always answers; what the broker is not told is what it cannot answer.
    """
    queue = outage.names.queue()
    seen: Events = []
    subscriber = outage.subscriber()
    subscriber.register(seen.append, queue, ["#"])
    told = threading.Event()
    with consuming(subscriber, outage.url, queue):
        monkeypatch.setattr("domain_events.broker.rabbitmq.channel._ANSWER_TIMEOUT", 1.0)
        with onlooker.channel(outage.url) as channel, monkeypatch.context() as untold:
            untold.setattr("pika.channel.Channel.close", lambda *_arguments: told.set())
            channel.queue_delete(queue)
            assert told.wait(30)
        wait_until(lambda: onlooker.exists(outage.url, queue))
        wait_until(lambda: onlooker.consumers(outage.url, queue) == 1)
        event = outage.publish("user.registered")
        wait_until(lambda: event in seen)


def test_overdue_ack_does_not_end_the_subscriber(
    outage: Bench, killable_node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """`consumer_timeout`: the broker closes the channel (to 4.2) or cancels (4.3)."""
    killable_node.ctl("eval", "application:set_env(rabbit, consumer_timeout, 1000).")
    # Classic and old quorum queues look at their consumers once a minute only.
    killable_node.ctl("eval", "application:set_env(rabbit, channel_tick_interval, 500).")
    queue = outage.names.queue()
    seen: Events = []
    subscriber = outage.subscriber()
    go_on = threading.Event()

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if event.data == "slow" and len(seen) == 1:
            assert go_on.wait(60)

    subscriber.register(handle, queue, ["#"])
    try:
        with consuming(subscriber, outage.url, queue):
            outage.publish("user.registered", "slow")
            wait_until(lambda: "consumes again" in caplog.text, timeout=90)
            go_on.set()
            event = outage.publish("user.registered", "next")
            wait_until(lambda: event in seen)
    finally:
        go_on.set()
        killable_node.restart()  # back to its own settings


def test_silent_broker_is_an_unconfirmed_event_in_time(outage: Bench, killable_node: Node) -> None:
    """Stopped in its tracks, it neither confirms nor breaks: the deadline holds."""
    event = outage.publish("user.registered")
    killable_node.pause()
    begun = time.monotonic()
    with (
        sooner_than(60),  # the heartbeat, at which the connection would break
        pytest.raises(EventNotConfirmed) as caught,
    ):
        outage.publisher.publish(event, timeout=1)
    assert time.monotonic() - begun > 0.9
    assert caught.value.event is event
    killable_node.resume()
    # The same event again, as the error says.
    outage.publisher.publish(event, timeout=30)


def test_half_open_connection_is_given_up_soon(
    outage: Bench, killable_node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overdue confirm on a silent connection: it is made anew, long before the heartbeat."""
    monkeypatch.setattr("domain_events.broker.rabbitmq.publishing._SUSPICIOUS_SILENCE", 0.5)
    outage.publish("user.registered")
    link = outage.publisher._publishing()._link  # type: ignore[union-attr]
    connection = link.connection
    killable_node.pause()
    with pytest.raises(EventNotConfirmed):
        outage.publisher.publish(DomainEvent("user.registered", {}), timeout=1)
    with sooner_than(60):  # the heartbeat
        wait_until(lambda: link.connection is not connection)
    killable_node.resume()
    outage.publisher.publish(DomainEvent("user.registered", {}), timeout=30)


def test_memory_alarm_blocks_publishers_and_not_acks(outage: Bench, killable_node: Node) -> None:
    """Publishing says why it waits and that nothing was sent; consuming goes on."""
    queue = outage.names.queue()
    subscriber = outage.subscriber()
    seen: Events = []
    subscriber.register(seen.append, queue, ["#"])
    outage.publisher.publish_many(DomainEvent("n.n", n) for n in range(200))
    killable_node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        # RabbitMQ blocks a connection when it publishes the next time.
        with pytest.raises((EventNotConfirmed, BrokerUnavailable)):
            outage.publisher.publish(DomainEvent("n.n", "first"), timeout=1)
        with pytest.raises(BrokerUnavailable, match="blocks publishers"):
            outage.publisher.publish(DomainEvent("n.n", "second"), timeout=1)
        with consuming(subscriber, outage.url, queue):
            wait_until(lambda: len(seen) >= 200)
            waiting = threading.Thread(
                target=lambda: outage.publisher.publish(DomainEvent("n.n", "third"), timeout=60)
            )
            waiting.start()
            killable_node.ctl("set_vm_memory_high_watermark", "0.6")
            waiting.join(60)
            wait_until(lambda: "third" in [event.data for event in seen])
            assert "second" not in [event.data for event in seen]
    finally:
        killable_node.ctl("set_vm_memory_high_watermark", "0.6")


def test_publisher_that_was_closed_while_blocked_says_so(
    outage: Bench, killable_node: Node
) -> None:
    """At once, and not at the next event's deadline."""
    publisher = outage.publisher
    publisher.publish(DomainEvent("n.n"))
    killable_node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        for _ in range(2):
            with pytest.raises((EventNotConfirmed, BrokerUnavailable)):
                publisher.publish(DomainEvent("n.n"), timeout=1)

        def publish_late() -> None:
            with contextlib.suppress(BrokerUnavailable):
                publisher.publish(DomainEvent("n.n"), timeout=3)

        late = threading.Thread(target=publish_late)
        late.start()  # for which `close` waits as long as it may
        publisher.close(timeout=1)
        with sooner_than(60), pytest.raises(BrokerUnavailable, match="This Publisher was closed"):
            publisher.publish(DomainEvent("n.n"), timeout=60)
        late.join(30)
    finally:
        killable_node.ctl("set_vm_memory_high_watermark", "0.6")


def test_changed_password_ends_a_subscriber_with_an_error(
    outage: Bench, killable_node: Node
) -> None:
    """It is not retried, which would lock accounts, and not silent."""
    queue = outage.names.queue()
    killable_node.ctl("add_user", "changing", "first")
    killable_node.ctl("set_permissions", "changing", ".*", ".*", ".*")
    url = outage.url.replace("guest:guest", "changing:first")
    subscriber = Subscriber(url, outage.exchange)
    subscriber.register(print, queue, ["#"])
    errors: list[BaseException] = []
    try:
        with consuming(subscriber, outage.url, queue, errors):
            killable_node.ctl("change_password", "changing", "second")
            killable_node.ctl("close_all_connections", "test")
            wait_until(lambda: errors)
        assert isinstance(errors[0], ConfigurationError)
        assert "password" in str(errors[0])
        assert "first" not in str(errors[0])
    finally:
        killable_node.ctl("delete_user", "changing")


def test_subscriber_starts_while_the_broker_is_away(outage: Bench, killable_node: Node) -> None:
    """Registered before, started during an outage: it consumes as soon as it can."""
    queue = outage.names.queue()
    subscriber = outage.subscriber()
    seen: Events = []
    subscriber.register(seen.append, queue, ["#"])
    event = outage.publish("user.registered")
    killable_node.sync()
    killable_node.stop()
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    killable_node.start()
    wait_until(lambda: event in seen)
    subscriber.stop_consuming()
    thread.join(30)
    assert not thread.is_alive()


def test_stopping_during_an_outage_ends_in_time(outage: Bench, killable_node: Node) -> None:
    """No broker to tell anything: it ends all the same."""
    queue = outage.names.queue()
    subscriber = outage.subscriber()
    subscriber.register(print, queue, ["#"])
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    wait_until(lambda: onlooker.consumers(outage.url, queue) == 1)
    killable_node.kill()
    with sooner_than(60):  # it would wait for a broker that does not come back
        subscriber.stop_consuming()
        thread.join(40)
    assert not thread.is_alive()


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_closing_a_publisher_during_an_outage_ends_in_time(
    outage: Bench, killable_node: Node, fault: str
) -> None:
    """The same for `Publisher.close`, also when the broker is only silent."""
    with Publisher(outage.url, outage.exchange) as publisher:
        publisher.publish(DomainEvent("user.registered", {}))
        getattr(killable_node, fault)()
        with sooner_than(60):  # the heartbeat
            publisher.close(timeout=5)


def test_fault_in_our_own_callback_makes_a_new_connection(
    outage: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug on the I/O thread is logged and survived: no caller waits for ever."""
    outage.publish("user.registered")
    link = outage.publisher._publishing()._link  # type: ignore[union-attr]

    def fail() -> None:
        raise RuntimeError("a bug")

    link.wake(fail)
    wait_until(lambda: caplog.text.count("Internal error") == 1)
    outage.publish("user.registered")
    # And where it kills pika's loop itself.
    loop: Callable[[Callable[[], None]], None] = link._loop.add_callback_threadsafe
    loop(fail)
    wait_until(lambda: caplog.text.count("Internal error") == 2)
    outage.publish("user.registered")


def test_dead_letters_can_be_looked_at_again_after_a_lost_connection(
    outage: Bench, killable_node: Node
) -> None:
    """The walk ends with an error, nothing is lost, and the next one begins anew."""
    queue = outage.names.queue()
    subscriber = outage.subscriber()
    subscriber.register(print, queue, ["#"])
    for _ in range(3):
        onlooker.publish(outage.url, outage.exchange, "a.b", b"no event")
    with consuming(subscriber, outage.url, queue):
        wait_until(lambda: onlooker.count(outage.url, f"{queue}-dl") == 3)
    with DeadLetters(queue, outage.url) as dead_letters:
        letters = iter(dead_letters)
        first = next(letters)
        killable_node.ctl("close_all_connections", "test")
        with pytest.raises(BrokerUnavailable, match="begin again"):
            first.discard()
        with pytest.raises(BrokerUnavailable, match="begin again"):
            next(letters)
        wait_until(lambda: dead_letters.count() == 3)
        assert dead_letters.discard_all() == 3
        assert dead_letters.count() == 0


def test_silent_broker_does_not_hold_up_a_stop_for_each_subscription(
    outage: Bench, killable_node: Node
) -> None:
    """Five seconds for all of them to be cancelled, not for each one."""
    subscriber = outage.subscriber()
    queues = [outage.names.queue(f"q{n}") for n in range(12)]
    for queue in queues:
        subscriber.register(print, queue, ["#"])
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    wait_until(lambda: onlooker.consumers(outage.url, queues[-1]) == 1)
    killable_node.pause()
    with sooner_than(5 * len(queues)):
        subscriber.stop_consuming()
        thread.join(60)
    assert not thread.is_alive()
