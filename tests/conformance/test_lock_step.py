"""Both brokers in lock step: whatever is done to them, the same is seen of them.

Hypothesis makes up what is done. RabbitMQ says what is right; a difference is a mistake of the
embedded broker. ``--hypothesis-profile=thorough`` takes longer and finds more.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

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

from conformance.peer import TIMEOUT
from conformance.side import Side, seen
from domain_events import message as messages
from domain_events.message import Delivery, Message
from domain_events.topology import (
    Binding,
    Declaration,
    Exchange,
    Queue,
    dead_letter_name,
    dead_letter_queue,
    delays,
    subscriber_queue,
    temporary_queue,
    way_back,
)

BINDING_KEYS = st.sampled_from(["a.*", "a.b", "#", "*.c", "b.#"])
ROUTING_KEYS = st.sampled_from(["a.b", "a.c", "b", "b.c", "c.d.e"])
NUMBERS = st.integers(0, 9)
PREFETCH = st.integers(1, 4)
T = TypeVar("T")

# The first two may retry and have dead letters.
KINDS = ["durable", "another", "temporary", "auto-delete"]

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
        self.exchange = exchange
        self.queues = {kind: name(kind) for kind in KINDS}
        self.looked_at = [
            *self.queues.values(),
            *(dead_letter_name(self.queues[kind]) for kind in KINDS[:2]),
            f"{exchange}.undelivered",
        ]
        self.bodies = (b"%d" % number for number in itertools.count())

    # --- what can be done to what (the embedded broker is asked, which is the quicker one) -------

    def there(self) -> list[str]:
        """Queues that exist, of subscribers and of dead letters."""
        return [queue for queue in self.looked_at[:-1] if self.sides[0].count(queue) is not None]

    def consumed(self) -> list[str]:
        """Kinds that have somebody who consumes or consumed."""
        return [kind for kind in KINDS if self.queues[kind] in self.sides[0].holders]

    def held(self) -> list[tuple[str, int]]:
        """Deliveries that wait to be settled: the kind, and the number of the delivery."""
        holders = self.sides[0].holders
        return [
            (kind, number)
            for kind in self.consumed()
            for number in holders[self.queues[kind]].held()
        ]

    def held_by_durable(self) -> list[tuple[str, int]]:
        return [each for each in self.held() if each[0] in KINDS[:2]]

    # --- helpers ---------------------------------------------------------------------------------

    def topology(self, kind: str, binding_keys: Sequence[str] = ()) -> list[Declaration]:
        queue = self.queues[kind]
        declarations: list[Declaration] = []
        if kind in KINDS[:2]:
            declarations += [dead_letter_queue(queue), subscriber_queue(queue)]
            declarations.append(way_back(self.exchange, queue))
        else:
            auto_delete = kind == "auto-delete"
            declarations.append(temporary_queue(queue, exclusive=False, auto_delete=auto_delete))
        return [*declarations, *(Binding(self.exchange, queue, key) for key in binding_keys)]

    def publish(self, message: Message) -> None:
        first, second = (side.publish(message) for side in self.sides)
        assert first == second, f"{message} is {first!r} on one and {second!r} on the other"

    def move(self, make: Callable[[Delivery], Message], kind: str, number: int) -> None:
        """Publish what the delivery becomes, then ack it, on each side."""
        queue = self.queues[kind]
        for side in self.sides:
            assert side.publish(make(side.delivery(queue, number))) == ""
            side.settle(queue, number)

    def wait_until_it_consumes(self, kind: str) -> None:
        """Until something was delivered to it."""
        queue = self.queues[kind]
        body = b"probe %s" % next(self.bodies)
        for side in self.sides:
            probe = Message("", queue, body, mandatory=True)
            wait_until(lambda: side.publish(probe) == "", timeout=_PATIENCE)  # noqa: B023
            inbox = side.holders[queue].inbox
            wait_until(lambda: inbox.deliveries, timeout=_PATIENCE)  # noqa: B023

    def delete(self, kind: str) -> None:
        queue = self.queues[kind]
        for side in self.sides:
            side.peer.delete(Queue(queue))
        if kind not in self.consumed():
            return
        for side in self.sides:
            # What it held is gone, and is passed over when it is settled.
            old = side.holders[queue]
            for number in old.held():
                side.settle(queue, number)
            old.inbox.deliveries.clear()
            old.settled.clear()
        if not self.sides[0].holders[queue].stopped:
            self.wait_until_it_consumes(kind)

    def wait_until_nothing_is_delayed(self) -> None:
        """Only then anything else is done: what comes back, and when, is not known to the other."""
        levels = [f"{self.exchange}.delay.{level:02}" for level in range(2)]
        # A message on its way between two levels is in neither of them, for a moment.
        over = time.monotonic() + 0.35
        for side in self.sides:
            wait_until(
                lambda: time.monotonic() > over and not any(map(side.count, levels)),  # noqa: B023
                timeout=_PATIENCE,
            )

    # --- rules -----------------------------------------------------------------------------------

    @initialize(keys=st.lists(BINDING_KEYS, min_size=1, max_size=2), prefetch=PREFETCH)
    def begin(self, keys: list[str], prefetch: int) -> None:
        """There is something to do something to."""
        self.declare("durable", keys)
        self.publish_to_a_queue(0, 4)
        self.consume("durable", prefetch, [])

    @rule(kind=st.sampled_from(KINDS), keys=st.lists(BINDING_KEYS, max_size=2))
    def declare(self, kind: str, keys: list[str]) -> None:
        """Also again, which changes nothing but for new bindings."""
        for side in self.sides:
            side.peer.declare(*self.topology(kind, keys))

    @rule(key=ROUTING_KEYS, number=st.integers(1, 3), mandatory=st.booleans())
    def publish_to_the_exchange(self, key: str, number: int, mandatory: bool) -> None:
        for _ in range(number):
            self.publish(Message(self.exchange, key, next(self.bodies), mandatory=mandatory))

    @precondition(lambda self: self.there())
    @rule(which=NUMBERS, number=st.integers(1, 4))
    def publish_to_a_queue(self, which: int, number: int) -> None:
        for _ in range(number):
            queue = chosen(self.there(), which)
            self.publish(Message("", queue, next(self.bodies), mandatory=True))

    @precondition(lambda self: len(self.consumed()) < len(KINDS))
    @rule(kind=st.sampled_from(KINDS), prefetch=PREFETCH, keys=st.lists(BINDING_KEYS, max_size=1))
    def consume(self, kind: str, prefetch: int, keys: list[str]) -> None:
        """One consumer at a time: whose turn it is among several is the broker's affair."""
        if kind in self.consumed():
            return
        for side in self.sides:
            side.consume(self.queues[kind], prefetch, self.topology(kind, keys))
        self.wait_until_it_consumes(kind)

    @precondition(lambda self: self.held())
    @rule(which=NUMBERS, requeue=st.booleans())
    def settle(self, which: int, requeue: bool) -> None:
        kind, number = chosen(self.held(), which)
        for side in self.sides:
            side.settle(self.queues[kind], number, requeue=requeue)

    @precondition(lambda self: self.held())
    @rule(requeue=st.booleans(), backwards=st.booleans())
    def settle_all(self, requeue: bool, backwards: bool) -> None:
        """What has arrived by now: requeued, it comes again."""
        held = self.held()
        for kind, number in reversed(held) if backwards else held:
            for side in self.sides:
                side.settle(self.queues[kind], number, requeue=requeue)
            self.the_same_is_seen()

    @precondition(lambda self: self.held_by_durable())
    @rule(which=NUMBERS)
    def dead_letter(self, which: int) -> None:
        """The handler gives it up."""
        kind, number = chosen(self.held_by_durable(), which)
        queue = self.queues[kind]
        if self.sides[0].count(dead_letter_name(queue)) is not None:
            error = ValueError("given up")
            self.move(lambda each: messages.dead_letter(each, queue, error), kind, number)

    @precondition(lambda self: self.held_by_durable())
    @rule(most=st.integers(1, 3), delete=st.booleans())
    def retry(self, most: int, delete: bool) -> None:
        """By way of the delay levels, the later ones with longer delays; perhaps in vain."""
        held = self.held_by_durable()
        kind = held[0][0]
        queue = self.queues[kind]
        numbers = [number for each, number in held if each == kind]
        for delay, number in zip((0.1, 0.2, 0.3), numbers[:most], strict=False):
            self.move(
                lambda each: messages.retry(each, self.exchange, queue, delay, ValueError()),  # noqa: B023
                kind,
                number,
            )
        if delete:
            for side in self.sides:
                side.stop(queue)
            self.delete(kind)
        self.wait_until_nothing_is_delayed()

    @precondition(lambda self: self.consumed())
    @rule(which=NUMBERS)
    def stop(self, which: int) -> None:
        """What it holds it can still settle."""
        for side in self.sides:
            side.stop(self.queues[chosen(self.consumed(), which)])

    @precondition(lambda self: self.consumed())
    @rule(which=NUMBERS)
    def crash(self, which: int) -> None:
        kind = chosen(self.consumed(), which)
        for side in self.sides:
            side.crash(self.queues[kind])

    @precondition(lambda self: self.there())
    @rule(
        which=NUMBERS,
        most=st.integers(1, 5),
        acks=st.sets(st.integers(0, 4), max_size=3),
        replay=st.booleans(),
    )
    def browse(self, which: int, most: int, acks: set[int], replay: bool) -> None:
        """Look at some, take out or replay some of those, look again."""
        queue = chosen(self.there(), which)
        looks = []
        for side in self.sides:
            browser, found = side.browse(queue, most)
            look: list[object] = [(seen(each), each.message_count) for each in found]
            for number in sorted(acks & set(range(len(found)))):
                if replay and queue.endswith("-dl"):
                    name = queue.removesuffix("-dl")
                    look.append(side.publish(messages.replay(found[number], name)))
                browser.ack(found[number], TIMEOUT)
            browser.rewind()
            again = [browser.next(TIMEOUT) for _ in range(most)]
            look += [(seen(each), each.message_count) for each in again if each]
            browser.close(TIMEOUT)
            looks.append(look)
        assert looks[0] == looks[1], f"browsing {queue}"

    @precondition(lambda self: self.there())
    @rule(which=NUMBERS)
    def delete_a_queue(self, which: int) -> None:
        """A consumer of it makes it again, with what it was given to declare."""
        queue = chosen(self.there(), which)
        kinds = [kind for kind in KINDS if self.queues[kind] == queue]
        if kinds:
            self.delete(kinds[0])
        else:
            for side in self.sides:
                side.peer.delete(Queue(queue))

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def the_same_is_seen(self) -> None:
        """As soon as RabbitMQ has done what the embedded broker does at once."""
        embedded, rabbitmq = self.sides
        until = time.monotonic() + _PATIENCE
        while (here := embedded.look(self.looked_at)) != (there := rabbitmq.look(self.looked_at)):
            if time.monotonic() > until:
                differences = [
                    f"{queue}: {embedded.name} has {here[queue]}\n"
                    f"{' ' * len(queue)}  {rabbitmq.name} has {there[queue]}"
                    for queue in here
                    if here[queue] != there[queue]
                ]
                raise AssertionError("\n".join(differences))
            time.sleep(0.005)

    def teardown(self) -> None:
        for side in self.sides:
            for queue in list(side.holders):
                side.crash(queue)
            for kind in KINDS:
                queue = self.queues[kind]
                side.peer.delete(Queue(queue), dead_letter_queue(queue))
            side.peer.take_all(f"{self.exchange}.undelivered")


@pytest.mark.timeout(600)
def test_brokers_in_lock_step_show_the_same(
    memory_url: str, rabbitmq_url: str, shared_names: Names
) -> None:
    """Declaring, publishing, consuming, settling, retrying, crashing, browsing, deleting."""
    exchange = shared_names.exchange()
    sides = [Side("memory://", memory_url), Side("RabbitMQ", rabbitmq_url)]
    for side in sides:
        side.peer.declare(Exchange(exchange), *delays(exchange))
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
