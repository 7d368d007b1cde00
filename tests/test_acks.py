"""When settlements are sent, and as which acks. No broker: a model of what it takes for unacked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain_events.broker import Exchange, Queue
from domain_events.broker.rabbitmq.channel import Channels
from domain_events.broker.rabbitmq.consumer import CarefulStart, RabbitConsumer, Tags
from domain_events.message import Delivery

HOW = st.sampled_from(["ack", "nack", "reject"])
BATCHES = st.lists(st.lists(st.tuples(st.integers(0, 30), HOW), max_size=12), max_size=12)


@given(BATCHES)
def test_acks_settle_what_was_settled_and_nothing_else(
    batches: list[list[tuple[int, str]]],
) -> None:
    """In any order, some given back: the broker closes the channel over an ack too many."""
    tags, unacked, last = Tags(1), set[int](), 0
    for batch in batches:
        for _ in range(len(batch)):
            last += 1
            tags.delivered(last, 0)
            unacked.add(last)
        settled: dict[str, list[int]] = {"ack": [], "nack": [], "reject": []}
        for tag, how in batch:
            if not tags.settle(tag):
                assert tag not in unacked or any(tag in each for each in settled.values())
            else:
                settled[how].append(tag)
                if how == "reject":  # which goes before
                    unacked.remove(tag)
        sent: dict[bool, set[int]] = {True: set(), False: set()}
        for tag, acks, multiple in tags.commands(settled["ack"], settled["nack"]):
            assert tag in unacked
            meant = {each for each in unacked if each <= tag} if multiple else {tag}
            sent[acks] |= meant
            unacked -= meant
        assert sent == {True: set(settled["ack"]), False: set(settled["nack"])}
        assert tags.unsettled() == unacked
        assert tags.all_settled() == (not unacked)
        assert {tag for tag in range(last + 2) if tags.is_unsettled(tag)} == unacked


def test_many_are_given_back_with_few_nacks_in_their_order() -> None:
    """A quorum queue forgets those beyond 32 under way when the channel is closed at once."""
    tags = Tags(1)
    for tag in range(1, 201):
        tags.delivered(tag, 0)
        tags.settle(tag)
    acks, *nacks = tags.commands([1, 2, 3], list(range(4, 201)))
    assert acks == (3, True, True)
    assert [tag for tag, acked, multiple in nacks if multiple and not acked] == [
        *range(35, 200, 32),
        200,
    ]
    assert len(nacks) == 7


@given(st.integers(2, 8), st.lists(st.integers(0, 7), max_size=60), st.booleans())
def test_careful_start_never_takes_more_than_the_prefetch_count(
    prefetch_count: int, choices: list[int], waits: bool
) -> None:
    """While its consumers come one after the other; in the end they take as many as they may."""
    tags, start = Tags(1), CarefulStart(prefetch_count, careful=True)
    held: list[int] = []
    assert start.first_prefetch_count == 1
    tags.delivered(1, 0)
    held.append(1)
    start.trust(1)
    capacity, last = 0, 1  # the first consumer was cancelled; what the others take together
    capacity += start.waited(tags) if waits else 0
    for choice in choices:
        if held and choice % 2:
            tag = held.pop(choice % len(held))
            assert tags.settle(tag)
            list(tags.commands([tag], []))
            capacity += start.settled([tag], tags)
        elif len(held) < capacity:
            last += 1
            tags.delivered(last, 0)
            held.append(last)
        assert capacity + (1 in held) <= prefetch_count
    if 1 not in held:
        assert capacity == prefetch_count


class Clock:
    """Time stands still until it is set on."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_acks_go_together_unless_somebody_may_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The wake-ups of the I/O thread, and what it would send at each."""
    clock = Clock()
    woken: list[Callable[[], None]] = []
    monkeypatch.setattr("domain_events.broker.rabbitmq.consumer.time", clock)
    channels = cast(Channels, SimpleNamespace(link=SimpleNamespace(wake=woken.append)))
    queue = Queue("q", Exchange("x"))
    consumer = RabbitConsumer(channels, cast(Any, None), queue, 200, cast(Any, None))

    def settle() -> bool:
        """Whether the I/O thread was woken for it, which then sends all."""
        consumer.settle(cast(Delivery, SimpleNamespace(receipt=(0, 1))))
        return look()

    def look() -> bool:
        for send in woken:
            send()
        number = len(woken)
        woken.clear()
        return number == 1

    assert settle()  # the first one for long
    assert [settle() for _ in range(25)] == [False] * 24 + [True]
    for seconds, at_once in ((0.0005, False), (0.002, True), (10.0, True), (0.0, False)):
        clock.now += seconds
        assert settle() is at_once, seconds
    consumer.flush()
    assert look()
    consumer.flush()
    assert not look()
