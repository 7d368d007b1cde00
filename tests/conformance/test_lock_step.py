"""Both brokers in lock step: whatever is done to them, the same is seen of them.

Hypothesis makes up what is done. RabbitMQ says what is right; a difference is a mistake of the
embedded broker. ``--hypothesis-profile=thorough`` takes longer and finds more.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import onlooker
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import Names, wait_until

from conformance.peer import TIMEOUT, Kind
from conformance.side import Seen, Side, seen
from domain_events import message as messages
from domain_events.broker import Exchange, Queue, Settlement
from domain_events.message import (
    Delivery,
    Destination,
    Later,
    Message,
    Place,
    ToDeadLetters,
    ToExchange,
    ToSubscriber,
    UndeliveredOf,
)

BINDING_KEYS = st.sampled_from(["a.*", "a.b", "#", "*.c", "b.#"])
ROUTING_KEYS = st.sampled_from(["a.b", "a.c", "b", "b.c", "c.d.e"])
NUMBERS = st.integers(0, 9)
PREFETCH = st.integers(1, 4)
SETTLEMENTS = st.sampled_from(Settlement)
T = TypeVar("T")

_RETRIES: Kind = {"dead_letters": True, "delays": True}
KINDS: dict[str, Kind] = {
    "durable": _RETRIES,
    "another": _RETRIES,
    "temporary": {"durable": False},
    "auto-delete": {"auto_delete": True},
    "classic": {"classic": True, **_RETRIES},
    "exclusive": {"exclusive": True},
}

# How long RabbitMQ may take to be where the embedded broker is at once.
_PATIENCE = 8.0


def chosen(those: Sequence[T], which: int) -> T:
    """One of those that there are."""
    return those[which % len(those)]


class LockStep(RuleBasedStateMachine):
    """Does everything twice."""

    def __init__(self, sides: Sequence[Side], exchange: str, name: Callable[[str], str]) -> None:
        super().__init__()
        self.sides = sides
        self.exchange = Exchange(exchange)
        self.queues = {
            kind: Queue(name(kind), self.exchange, **options) for kind, options in KINDS.items()
        }
        self.names = [queue.name for queue in self.queues.values()]
        self.dead_letters = {
            kind: ToDeadLetters(queue.name)
            for kind, queue in self.queues.items()
            if queue.dead_letters
        }
        self.undelivered = UndeliveredOf(exchange)
        # Kinds that were ever declared: nothing can be seen of the others.
        self.declared: set[str] = set()
        self.places: list[Place] = [
            *map(ToSubscriber, self.names),
            *self.dead_letters.values(),
            self.undelivered,
        ]
        # Queues that count failures and have had something back. From there, how many a consumer
        # takes at first depends on whether RabbitMQ counts what was given back: see `consume`.
        self.returned: set[str] = set()
        # Queues that a retry was for.
        self.retried: set[str] = set()
        self.bodies = (b"%d" % number for number in itertools.count())

    # --- what can be done to what (the embedded broker answers, which is the quicker one) --------

    def there(self) -> list[str]:
        """Kinds whose queue exists."""
        return [
            kind
            for kind, queue in self.queues.items()
            if self.sides[0].count(queue.name) is not None
        ]

    def consumed(self) -> list[str]:
        """Kinds that have somebody who consumes or consumed."""
        return [kind for kind, each in self.queues.items() if each.name in self.sides[0].holders]

    def held(self) -> list[tuple[str, int]]:
        """Deliveries that wait to be settled: the kind, and the number of the delivery."""
        holders = self.sides[0].holders
        return [
            (kind, number)
            for kind in self.consumed()
            for number in holders[self.queues[kind].name].held()
        ]

    def may_crash(self) -> list[str]:
        """Kinds whose consumer holds so little that the order in which it comes back is known.

        A channel that has started carefully has several consumers, and RabbitMQ does not keep the
        order between the deliveries of one and of another.
        """
        holding = [kind for kind, _ in self.held()]
        several = {kind for kind in holding if holding.count(kind) > 1}
        return [kind for kind in self.consumed() if kind not in several or not self.counts(kind)]

    def counts(self, kind: str) -> bool:
        return self.queues[kind].counts_failures

    def held_to_retry(self) -> list[tuple[str, int]]:
        return [each for each in self.held() if self.queues[each[0]].delays]

    def looked_into(self) -> list[Place]:
        """Where a walk can begin that makes no difference to what comes after it.

        RabbitMQ counts looks into some queues up to 4.2; and what a quorum queue gets back goes
        behind what came back before. A walk consumes, so it would end a queue with `auto_delete`;
        and it reads a retry that has returned only where a subscriber's consumer does.
        """
        embedded = self.sides[0]
        holding = {self.queues[kind].name for kind, _ in self.held()}
        queues = [self.queues[kind] for kind in self.there()]
        names = [queue.name for queue in queues if not queue.auto_delete]
        fresh = [name for name in names if name not in self.returned | self.retried | holding]
        others = [each for each in self.places[len(KINDS) :] if embedded.count(each) is not None]
        return [*map(ToSubscriber, fresh), *others]

    # --- helpers ---------------------------------------------------------------------------------

    def gets_back(self, name: str) -> None:
        """Something returns to this queue."""
        if any(each.name == name and each.counts_failures for each in self.queues.values()):
            self.returned.add(name)

    def publish(self, to: Destination, key: str = "a.b", *, mandatory: bool = True) -> None:
        body = next(self.bodies)
        message = Message(to, key, body, f"id-{body.decode()}", mandatory=mandatory)
        first, second = (side.publish(message) for side in self.sides)
        assert first == second, f"{message} is {first!r} on one and {second!r} on the other"

    def move(self, make: Callable[[Delivery], Message], name: str, number: int) -> None:
        """Publish what the delivery becomes, then ack it, on each side."""
        for side in self.sides:
            assert side.publish(make(side.delivery(name, number))) == ""
            side.settle(name, number)

    def wait_until_it_consumes(self, kind: str) -> None:
        """Until something was delivered to it."""
        name = self.queues[kind].name
        probe = Message(ToSubscriber(name), "a.b", b"probe %s" % next(self.bodies), mandatory=True)
        for side in self.sides:
            wait_until(lambda: side.publish(probe) == "", timeout=_PATIENCE)  # noqa: B023
            inbox = side.holders[name].inbox
            wait_until(lambda: inbox.deliveries, timeout=_PATIENCE)  # noqa: B023

    def forget_what_was_held(self, name: str) -> None:
        """The queue is gone: what was held of it is passed over when it is settled."""
        self.returned.discard(name)
        for side in self.sides:
            if old := side.holders.get(name):
                for number in old.held():
                    side.settle(name, number)
                old.inbox.deliveries.clear()
                old.settled.clear()

    def arrived(self, side: Side, name: str) -> int:
        """How many have come to a subscriber, or come to nothing."""
        ready = (side.count(name) or 0) + (side.count(self.undelivered) or 0)
        return ready + len(side.delivered(name))

    def wait_until_nothing_is_delayed(self, name: str, before: list[int], number: int) -> None:
        """Only then anything else is done: what comes back, and when, is not known to the other."""
        for side, was in zip(self.sides, before, strict=True):
            wait_until(
                lambda: self.arrived(side, name) == was + number,  # noqa: B023
                timeout=_PATIENCE,
                message=f"{number} delayed events of {name} on {side.name}",
            )

    # --- rules -----------------------------------------------------------------------------------

    @initialize(keys=st.lists(BINDING_KEYS, min_size=1, max_size=2), prefetch=PREFETCH)
    def begin(self, keys: list[str], prefetch: int) -> None:
        """There is something to do something to."""
        self.declare("durable", keys, [])
        for _ in range(4):
            self.publish(ToSubscriber(self.queues["durable"].name))
        self.consume("durable", prefetch, [])

    @rule(
        kind=st.sampled_from([kind for kind in KINDS if kind != "exclusive"]),
        keys=st.lists(BINDING_KEYS, max_size=2),
        retired=st.lists(BINDING_KEYS, max_size=1),
    )
    def declare(self, kind: str, keys: list[str], retired: list[str]) -> None:
        """Also again, which changes nothing but the bindings."""
        self.declared.add(kind)
        retired = [key for key in retired if key not in keys]
        queue = replace(self.queues[kind], binding_keys=tuple(keys), retired_keys=tuple(retired))
        for side in self.sides:
            assert side.declare(queue) == ""

    @precondition(lambda self: self.there())
    @rule(which=NUMBERS, kind=st.sampled_from(list(KINDS)))
    def declare_as_another_kind(self, which: int, kind: str) -> None:
        """A queue stays what it is."""
        there = chosen(self.there(), which)
        queue = replace(self.queues[kind], name=self.queues[there].name)
        first, second = (side.declare(queue) for side in self.sides)
        assert first == second, f"{queue} is {first!r} on one and {second!r} on the other"

    @rule(key=ROUTING_KEYS, number=st.integers(1, 3), mandatory=st.booleans())
    def publish_to_the_exchange(self, key: str, number: int, mandatory: bool) -> None:
        for _ in range(number):
            self.publish(ToExchange(self.exchange.name), key, mandatory=mandatory)

    @rule(kind=st.sampled_from(list(KINDS)), number=st.integers(1, 4), key=ROUTING_KEYS)
    def publish_to_a_subscriber(self, kind: str, number: int, key: str) -> None:
        """Whether it is there or not."""
        for _ in range(number):
            self.publish(ToSubscriber(self.queues[kind].name), key)

    @rule(kind=st.sampled_from(list(KINDS)), key=ROUTING_KEYS)
    def publish_to_dead_letters(self, kind: str, key: str) -> None:
        """Whether there are any or not."""
        self.publish(ToDeadLetters(self.queues[kind].name), key)

    @precondition(lambda self: len(self.consumed()) < len(KINDS))
    @rule(
        kind=st.sampled_from(list(KINDS)),
        prefetch=PREFETCH,
        keys=st.lists(BINDING_KEYS, max_size=1),
    )
    def consume(self, kind: str, prefetch: int, keys: list[str]) -> None:
        """One consumer at a time: whose turn it is among several is the broker's affair."""
        if kind in self.consumed():
            return
        self.declared.add(kind)
        queue = replace(self.queues[kind], binding_keys=tuple(keys))
        if queue.name in self.returned:
            prefetch = 1
        for side in self.sides:
            side.consume(queue, prefetch)
        self.wait_until_it_consumes(kind)

    @precondition(lambda self: self.held())
    @rule(which=NUMBERS, how=SETTLEMENTS)
    def settle(self, which: int, how: Settlement) -> None:
        kind, number = chosen(self.held(), which)
        self.settle_one(kind, number, how)

    def settle_one(self, kind: str, number: int, how: Settlement) -> None:
        name = self.queues[kind].name
        if how is not Settlement.DONE:
            self.gets_back(name)
        for side in self.sides:
            side.settle(name, number, how)

    @precondition(lambda self: self.held())
    @rule(how=SETTLEMENTS, backwards=st.booleans())
    def settle_all(self, how: Settlement, backwards: bool) -> None:
        """What has arrived by now: given back, it comes again."""
        held = self.held()
        for kind, number in reversed(held) if backwards else held:
            self.settle_one(kind, number, how)
            self.the_same_is_seen()

    @precondition(lambda self: self.held_to_retry())
    @rule(which=NUMBERS)
    def dead_letter(self, which: int) -> None:
        """The handler gives it up."""
        kind, number = chosen(self.held_to_retry(), which)
        name = self.queues[kind].name
        if self.sides[0].count(self.dead_letters[kind]) is not None:
            error = ValueError("given up")
            self.move(lambda each: messages.dead_letter(each, name, error), name, number)

    @precondition(lambda self: self.held_to_retry())
    @rule(which=NUMBERS)
    def hand_back(self, which: int) -> None:
        """At once, to its end."""
        kind, number = chosen(self.held_to_retry(), which)
        name = self.queues[kind].name
        if self.sides[0].count(name) is not None:
            self.move(lambda each: messages.hand_back(each, ToSubscriber(name)), name, number)

    @precondition(lambda self: self.held_to_retry())
    @rule(most=st.integers(1, 3), gone=st.booleans())
    def retry(self, most: int, gone: bool) -> None:
        """Later ones with longer delays; perhaps in vain, for their queue is gone."""
        held = self.held_to_retry()
        kind = held[0][0]
        name = self.queues[kind].name
        self.retried.add(name)
        numbers = [number for each, number in held if each == kind][:most]
        retries = [
            [
                messages.retry(
                    side.delivery(name, number), Later(self.exchange.name, name, delay), KeyError()
                )
                for delay, number in zip((0.1, 0.3, 0.5), numbers, strict=False)
            ]
            for side in self.sides
        ]
        if gone:
            for side in self.sides:
                side.stop(name)
            self.delete(kind)
        self.the_same_is_seen()
        before = [self.arrived(side, name) for side in self.sides]
        for side, made in zip(self.sides, retries, strict=True):
            for message in made:
                assert side.publish(message) == ""
        if not gone:
            for side in self.sides:
                for number in numbers:
                    side.settle(name, number)
        self.wait_until_nothing_is_delayed(name, before, len(numbers))

    @precondition(lambda self: self.consumed())
    @rule(which=NUMBERS)
    def stop(self, which: int) -> None:
        """What it holds it can still settle."""
        for side in self.sides:
            side.stop(self.queues[chosen(self.consumed(), which)].name)

    @precondition(lambda self: self.may_crash())
    @rule(which=NUMBERS)
    def crash(self, which: int) -> None:
        """And nobody settles what it held."""
        name = self.queues[chosen(self.may_crash(), which)].name
        self.gets_back(name)
        for side in self.sides:
            side.crash(name)

    @precondition(lambda self: self.looked_into())
    @rule(
        which=NUMBERS,
        most=st.integers(1, 5),
        acks=st.sets(st.integers(0, 4), max_size=3),
        replay=st.booleans(),
    )
    def browse(self, which: int, most: int, acks: set[int], replay: bool) -> None:
        """Look at some, take out or replay some of those, look again."""
        place = chosen(self.looked_into(), which)
        if isinstance(place, ToSubscriber):
            self.gets_back(place.name)
        looks = []
        for side in self.sides:
            browser, found = side.browse(place, most)
            look: list[object] = [(seen(each), each.message_count) for each in found]
            for number in sorted(acks & set(range(len(found)))):
                if replay and isinstance(place, ToDeadLetters):
                    look.append(side.publish(messages.replay(found[number], place.name)))
                if isinstance(place, UndeliveredOf):
                    look.append(found[number].subscriber)
                browser.ack(found[number], TIMEOUT)
            browser.rewind()
            look += [(seen(each), each.message_count) for each in side.walk(browser, most)]
            browser.close(TIMEOUT)
            looks.append(look)
        assert looks[0] == looks[1], f"browsing {place}"

    @precondition(lambda self: self.there())
    @rule(which=NUMBERS, all_of_it=st.booleans())
    def delete_a_queue(self, which: int, all_of_it: bool) -> None:
        """With its dead letters or without; a consumer of it makes again all that it needs."""
        self.delete(chosen(self.there(), which), all_of_it=all_of_it)

    def delete(self, kind: str, *, all_of_it: bool = False) -> None:
        name = self.queues[kind].name
        for side in self.sides:
            if all_of_it:
                side.peer.delete(name)
            else:
                onlooker.delete(side.url, queues=[name])
        self.forget_what_was_held(name)
        if kind in self.consumed() and not self.sides[0].holders[name].stopped:
            self.wait_until_it_consumes(kind)

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def the_same_is_seen(self) -> None:
        """As soon as RabbitMQ has done what the embedded broker does at once."""
        embedded, rabbitmq = self.sides
        until = time.monotonic() + _PATIENCE
        while (here := self.look(embedded)) != (there := self.look(rabbitmq)):
            if time.monotonic() > until:
                differences = [
                    f"{what}:\n  {embedded.name} has {here[what]}\n"
                    f"  {rabbitmq.name} has {there[what]}"
                    for what in here
                    if here[what] != there[what]
                ]
                raise AssertionError("\n".join(differences))
            time.sleep(0.005)

    def look(self, side: Side) -> dict[object, int | list[Seen] | None]:
        places: list[Place] = [
            *(ToSubscriber(self.queues[kind].name) for kind in self.declared),
            *(place for kind, place in self.dead_letters.items() if kind in self.declared),
            self.undelivered,
        ]
        return side.look(self.names, places)

    def teardown(self) -> None:
        for side in self.sides:
            for name in list(side.holders):
                side.crash(name)
            side.peer.delete(*self.names)
            side.peer.take_all(self.undelivered)


@pytest.mark.timeout(600)
def test_brokers_in_lock_step_show_the_same(
    memory_url: str, rabbitmq_url: str, shared_names: Names
) -> None:
    """Declaring, publishing, consuming, settling, retrying, crashing, browsing, deleting."""
    exchange = shared_names.exchange()
    sides = [Side("memory://", memory_url), Side("RabbitMQ", rabbitmq_url)]
    for side in sides:
        side.peer.declare(Queue(shared_names.queue(), Exchange(exchange), delays=True))
    examples = itertools.count()

    def machine() -> LockStep:
        example = next(examples)
        return LockStep(sides, exchange, lambda kind: shared_names.queue(f"{example}.{kind}"))

    thorough = settings.get_profile("thorough").max_examples
    is_thorough = settings.default is not None and settings.default.max_examples == thorough
    try:
        run_state_machine_as_test(
            machine,  # type: ignore[arg-type]
            settings=settings(
                max_examples=thorough if is_thorough else 12,
                stateful_step_count=40 if is_thorough else 30,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                # Each step takes a broker's time; to make an example smaller takes minutes.
                phases=[Phase.generate, Phase.shrink] if is_thorough else [Phase.generate],
            ),
        )
    finally:
        for side in sides:
            side.peer.close()
