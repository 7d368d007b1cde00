"""Dead letters: browsed without loss, replayed in one movement, discarded, or left."""

from __future__ import annotations

import logging
import threading
import weakref
from datetime import datetime, timedelta, timezone

import onlooker
import pytest
from bench import Bench, Events, running
from support import wait_until

from domain_events import (
    DISCARD,
    LEAVE,
    RETRY,
    DeadLetters,
    DomainEvent,
    Reject,
    Retry,
    TopologyError,
    replay_all,
    replay_event,
)
from domain_events.broker import Publication, connect
from domain_events.message import Message, ToDeadLetters


def fail_on(bench: Bench, number: int, queue: str) -> Events:
    """Have a subscriber fail on so many events; they are dead letters now."""
    subscriber = bench.subscriber()
    seen: Events = []

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        if len(seen) == number:
            subscriber.stop_consuming()
        raise LookupError(f"no {event.data}")

    subscriber.register(handle, queue, ["#"])
    for n in range(number):
        bench.publish("user.registered", n)
    subscriber.start_consuming(timeout=20)
    assert onlooker.count(bench.url, f"{queue}-dl") == number
    return seen


def fill(bench: Bench, queue: str, number: int) -> list[int]:
    """So many dead letters, numbered; as quickly as can be."""
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["none"])
    confirmed = threading.Semaphore(0)
    publishing = connect((bench.url,)).publishing("test")
    for n in range(number):
        body = DomainEvent("a.b", n).to_json().encode()
        message = Message(ToDeadLetters(queue), "a.b", body, mandatory=True)
        publishing.submit(Publication(message, lambda _publication: confirmed.release()))
    for _ in range(number):
        assert confirmed.acquire(timeout=20)
    publishing.close(10)
    wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == number)
    return list(range(number))


def numbers(dead_letters: DeadLetters) -> list[int]:
    """What a walk shows."""
    return [letter.event.data for letter in dead_letters if letter.event]


@pytest.fixture
def queue(bench: Bench) -> str:
    return bench.names.queue()


def test_dead_letter_tells_what_went_wrong(bench: Bench, queue: str) -> None:
    """The event, the exception with its traceback, when, where, after how many retries."""
    (event,) = fail_on(bench, 1, queue)
    with DeadLetters(queue, bench.url) as dead_letters:
        assert dead_letters.count() == 1
        (letter,) = dead_letters
        assert letter.event == event
        assert letter.body == event.to_json().encode()
        assert letter.routing_key == "user.registered"
        assert letter.subscriber == queue
        assert letter.error_type == "LookupError"
        assert letter.error_message == "no 0"
        assert letter.traceback is not None
        assert "in handle" in letter.traceback
        assert letter.failed_at is not None
        assert abs(letter.failed_at - datetime.now(timezone.utc)) < timedelta(minutes=1)
        assert letter.host
        assert letter.retries == 0
        assert "LookupError: no 0" in repr(letter)


def test_retries_made_are_told(bench: Bench, queue: str) -> None:
    """A dead letter knows how often it was tried."""
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        if event.retries == 2:
            subscriber.stop_consuming()
        raise Retry(0.1)

    subscriber.register(handle, queue, ["#"], max_retries=2)
    bench.publish("user.registered")
    subscriber.start_consuming(timeout=20)
    with DeadLetters(queue, bench.url) as dead_letters:
        (letter,) = dead_letters
        assert letter.retries == 2
        assert letter.error_type == "domain_events.retry.Retry"


def test_browsing_hundreds_of_times_loses_nothing(bench: Bench, queue: str) -> None:
    """Whatever the version counts as a delivery, and in the same order each time.

    A queue's delivery limit is a hundred at most.
    """
    events = fail_on(bench, 2, queue)
    with DeadLetters(queue, bench.url) as dead_letters:
        for _ in range(300):
            assert [letter.event for letter in dead_letters] == events
        assert dead_letters.count() == 2


def test_second_walk_sees_all_that_the_first_has_seen(bench: Bench, queue: str) -> None:
    """Also when they are so many that the broker takes them back in pieces."""
    events = fail_on(bench, 300, queue)
    with DeadLetters(queue, bench.url) as dead_letters:
        for _ in range(3):
            assert len(list(dead_letters)) == len(events)
        assert dead_letters.replay_all() == len(events)
    replayed = {DomainEvent.from_json(body) for body in onlooker.take_all(bench.url, queue)}
    assert replayed == set(events)


def test_walk_that_is_broken_off_loses_nothing(bench: Bench, queue: str) -> None:
    """What it held goes back."""
    events = fail_on(bench, 3, queue)
    with DeadLetters(queue, bench.url) as dead_letters:
        for letter in dead_letters:
            assert letter.event == events[0]
            break
    with DeadLetters(queue, bench.url) as dead_letters:
        assert [letter.event for letter in dead_letters] == events


def test_replayed_event_starts_anew_at_its_subscriber(bench: Bench, queue: str) -> None:
    """`retries == 0`, to that subscriber only, and nothing is left of its first death."""
    other = bench.names.queue("other")
    onlooker.bind_queue(bench.url, other, bench.exchange, "none")
    (event,) = fail_on(bench, 1, queue)
    with DeadLetters(queue, bench.url) as dead_letters:
        for letter in dead_letters:
            letter.replay()
        assert dead_letters.count() == 0
    seen: Events = []
    subscriber = bench.subscriber()

    def handle(event: DomainEvent) -> None:
        seen.append(event)
        subscriber.stop_consuming()
        raise Reject("again")

    subscriber.register(handle, queue, ["#"])
    subscriber.start_consuming(timeout=20)
    assert seen == [event]
    assert seen[0].retries == 0
    with DeadLetters(queue, bench.url) as dead_letters:
        (letter,) = dead_letters
    assert (letter.error_message, letter.routing_key) == ("again", "user.registered")
    assert (letter.retries, letter.first_error_type) == (0, None)
    assert onlooker.count(bench.url, other) == 0


def test_discarded_is_gone_and_left_is_there(bench: Bench, queue: str) -> None:
    """Each dead letter has its own fate in one walk."""
    events = fail_on(bench, 4, queue)
    with DeadLetters(queue, bench.url) as dead_letters:
        for letter in dead_letters:
            assert letter.event is not None
            if letter.event.data in (0, 2):
                letter.discard()
    with DeadLetters(queue, bench.url) as dead_letters:
        assert [letter.event for letter in dead_letters] == [events[1], events[3]]
        assert dead_letters.discard_all() == 2
        assert dead_letters.replay_all() == 0
    assert onlooker.count(bench.url, queue) == 0


def test_replay_without_a_queue_keeps_the_dead_letter(bench: Bench, queue: str) -> None:
    """The replay is confirmed in the subscriber's queue before the dead letter is acked."""
    (event,) = fail_on(bench, 1, queue)
    onlooker.delete(bench.url, queues=[queue])
    with DeadLetters(queue, bench.url) as dead_letters:
        for letter in dead_letters:
            with pytest.raises(TopologyError, match=queue):
                letter.replay()
    with DeadLetters(queue, bench.url) as dead_letters:
        assert [letter.event for letter in dead_letters] == [event]


def test_body_that_is_not_an_event_can_be_seen_and_replayed(bench: Bench, queue: str) -> None:
    """Byte for byte, with its original routing key."""
    subscriber = bench.subscriber()
    subscriber.register(print, queue, ["#"])
    onlooker.publish(bench.url, bench.exchange, "some.thing", b"\xffno event")
    with running(subscriber):
        wait_until(lambda: onlooker.count(bench.url, f"{queue}-dl") == 1)
    with DeadLetters(queue, bench.url) as dead_letters:
        for letter in dead_letters:
            assert letter.event is None
            assert letter.body == b"\xffno event"
            assert letter.routing_key == "some.thing"
            assert letter.error_type == "domain_events.errors.InvalidEvent"
            assert "9 bytes that are not an event" in repr(letter)
            letter.replay()
    _, body = onlooker.take(bench.url, queue)
    assert body == b"\xffno event"


def test_dead_letter_of_another_program_can_be_seen(bench: Bench, queue: str) -> None:
    """What is not known of it is None; nonsense in our headers is not believed."""
    fail_on(bench, 1, queue)
    onlooker.take(bench.url, f"{queue}-dl")
    event = DomainEvent("a.b", {})
    headers = {"domain-events-failed-at": "yesterday", "domain-events-retries": "many"}
    body = event.to_json().encode()
    onlooker.publish(bench.url, "", f"{queue}-dl", body, headers=headers)
    with DeadLetters(queue, bench.url) as dead_letters:
        (letter,) = dead_letters
    assert letter.event == event
    assert (letter.failed_at, letter.error_type, letter.retries) == (None, None, 0)


def test_letter_cannot_be_settled_when_its_walk_is_over(bench: Bench, queue: str) -> None:
    """By then it is back in the queue, and may be somebody else's; and never twice."""
    fail_on(bench, 2, queue)
    with DeadLetters(queue, bench.url) as dead_letters:
        first, second = list(dead_letters)
        first.discard()
        for settle in (first.discard, first.replay):
            with pytest.raises(RuntimeError, match="already"):
                settle()
        assert dead_letters.count() == 1
        assert len(list(dead_letters)) == 1
        with pytest.raises(RuntimeError, match="walk"):
            second.discard()
        assert dead_letters.count() == 1
    assert onlooker.count(bench.url, queue) == 0


def test_subscriber_without_dead_letters_is_a_topology_error(bench: Bench) -> None:
    """There is no queue to look at, and the error names it."""
    name = bench.names.queue("none")
    with DeadLetters(name, bench.url) as dead_letters:
        with pytest.raises(TopologyError, match=f"{name}-dl"):
            dead_letters.count()
        with pytest.raises(TopologyError, match=f"{name}-dl"):
            list(dead_letters)


def test_switched_off_dead_letters_are_none() -> None:
    """`connection_settings=None`: nothing is there, nothing is done."""
    with DeadLetters("nothing", None) as dead_letters:
        assert dead_letters.count() == 0
        assert list(dead_letters) == []
    assert replay_event("nothing", connection_settings=None) == 0
    assert replay_all("nothing", connection_settings=None) == 0


def test_replay_event_decides_about_the_oldest(bench: Bench, queue: str) -> None:
    """It says how many there are behind it; the callback sees frame, header and body."""
    events = fail_on(bench, 3, queue)
    asked: list[dict[str, object]] = []

    def answer(**letter: object) -> str:
        asked.append(letter)
        return RETRY

    assert replay_event(queue, answer, bench.url) == 2
    assert asked[0]["body"] == events[0].to_json().encode()
    assert asked[0]["header"].message_id == events[0].uuid_string  # type: ignore[attr-defined]
    assert asked[0]["frame"].routing_key == f"{queue}-dl"  # type: ignore[attr-defined]
    assert onlooker.count(bench.url, queue) == 1
    assert replay_event(queue, lambda **_: DISCARD, bench.url) == 1
    assert replay_event(queue, lambda **_: LEAVE, bench.url) == 0
    assert onlooker.count(bench.url, f"{queue}-dl") == 1


def test_unknown_answer_leaves_the_dead_letter(bench: Bench, queue: str) -> None:
    """A mistake in the callback loses nothing."""
    fail_on(bench, 1, queue)
    with pytest.raises(ValueError, match="RETRY, LEAVE or DISCARD"):
        replay_event(queue, lambda **_: "perhaps", bench.url)
    assert onlooker.count(bench.url, f"{queue}-dl") == 1


def test_replay_all_ends_while_new_dead_letters_arrive(bench: Bench, queue: str) -> None:
    """It decides about those that were there, each once, and says how many have come since."""
    fail_on(bench, 3, queue)
    asked: list[bytes] = []

    def answer(body: bytes, **_: object) -> str:
        asked.append(body)
        onlooker.publish(bench.url, "", f"{queue}-dl", body)
        return LEAVE if len(asked) == 2 else RETRY

    assert replay_all(queue, answer, bench.url) == 3
    assert len(asked) == 3
    assert onlooker.count(bench.url, queue) == 2
    assert onlooker.count(bench.url, f"{queue}-dl") == 4


def test_order_is_the_same_after_whatever_walks(bench: Bench, queue: str) -> None:
    """Whole ones and such as are broken off, one after the other and by several programs."""
    expected = fill(bench, queue, 500)
    for most in (500, 200, 1, 70, 500):
        with DeadLetters(queue, bench.url) as dead_letters:
            for letter in dead_letters:
                assert letter.event is not None
                if letter.event.data == expected[most - 1]:
                    break
            assert dead_letters.count() == 500
            assert numbers(dead_letters) == expected
    with DeadLetters(queue, bench.url) as dead_letters:
        for letter in dead_letters:
            assert letter.event is not None
            if letter.event.data in (3, 200, 499):
                letter.replay()
            elif letter.event.data in (0, 77):
                letter.discard()
        gone = {0, 3, 77, 200, 499}
        expected = [number for number in expected if number not in gone]
        assert numbers(dead_letters) == expected
    assert replay_event(queue, lambda **_: LEAVE, bench.url) == 494
    assert replay_event(queue, lambda **_: RETRY, bench.url) == 494
    with DeadLetters(queue, bench.url) as dead_letters:
        assert dead_letters.replay_all() == 494
    replayed = [DomainEvent.from_json(each).data for each in onlooker.take_all(bench.url, queue)]
    assert replayed == [3, 200, 499, *expected]


def test_somebody_elses_walk_is_told(
    bench: Bench, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What it holds cannot be seen: who counts, walks or replays meanwhile is warned."""
    fill(bench, queue, 5)

    def warnings() -> int:
        told = [each for each in caplog.records if each.levelno == logging.WARNING]
        caplog.clear()
        assert all(queue in each.getMessage() for each in told)
        return len(told)

    with DeadLetters(queue, bench.url) as one, DeadLetters(queue, bench.url) as other:
        assert other.count() == 5
        assert warnings() == 0
        for letter in one:
            assert letter.event is not None
            if letter.event.data == 2:
                break
        assert one.count() == 5
        assert warnings() == 0
        assert other.count() <= 2  # it may hold more than it has passed
        assert warnings() == 1
        assert set(numbers(other)) <= {3, 4}
        assert warnings() == 1
        assert replay_all(queue, lambda **_: LEAVE, bench.url) == 0
        assert warnings() == 1
    with DeadLetters(queue, bench.url) as dead_letters:
        assert dead_letters.count() == 5
        assert sorted(numbers(dead_letters)) == [0, 1, 2, 3, 4]
    assert warnings() == 0


def test_walk_ends_where_another_one_begins(bench: Bench, queue: str) -> None:
    """Nested walks: the inner one sees all, the outer one says that it is over."""
    fill(bench, queue, 3)
    with DeadLetters(queue, bench.url) as dead_letters:
        outer = iter(dead_letters)
        passed = next(outer)
        assert numbers(dead_letters) == [0, 1, 2]
        with pytest.raises(RuntimeError, match="another one began"):
            next(outer)
        with pytest.raises(RuntimeError, match="walk is over"):
            passed.discard()
        assert dead_letters.count() == 3


def test_closed_dead_letters_say_so(bench: Bench, queue: str) -> None:
    """No connection is made that nobody would close."""
    fill(bench, queue, 2)
    with DeadLetters(queue, bench.url) as dead_letters:
        walk = iter(dead_letters)
        letter = next(walk)
    for use in (dead_letters.count, dead_letters.replay_all, lambda: list(dead_letters)):
        with pytest.raises(RuntimeError, match="was closed"):
            use()
    with pytest.raises(RuntimeError, match="closed"):
        next(walk)
    with pytest.raises(RuntimeError, match="walk is over"):
        letter.replay()
    dead_letters.close()
    assert onlooker.count(bench.url, f"{queue}-dl") == 2


def test_ctrl_c_in_a_walk_leaves_everything_in_its_order(bench: Bench, queue: str) -> None:
    """In the program's own code; what a walk held goes back."""
    expected = fill(bench, queue, 40)

    def look() -> None:
        with DeadLetters(queue, bench.url) as dead_letters:
            assert numbers(dead_letters) == expected
            for letter in dead_letters:
                assert letter.event is not None
                if letter.event.data == 20:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look()
    with DeadLetters(queue, bench.url) as dead_letters:
        assert numbers(dead_letters) == expected


def test_passed_letters_are_let_go_of_unless_the_program_keeps_them(
    bench: Bench, queue: str
) -> None:
    """Those that it keeps can be settled until the walk is over; the others are left."""
    fill(bench, queue, 10)
    kept, passed = [], []
    with DeadLetters(queue, bench.url) as dead_letters:
        for letter in dead_letters:
            assert letter.event is not None
            passed.append(weakref.ref(letter._delivery))
            if letter.event.data == 4:
                kept.append(letter)
        del letter
        # The embedded broker and its last answer may have the last one.
        assert [bool(each()) for each in passed[:9]] == [number == 4 for number in range(9)]
        kept[0].replay()
        assert dead_letters.count() == 9
        assert numbers(dead_letters) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert onlooker.count(bench.url, queue) == 1
