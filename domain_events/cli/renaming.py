"""Gives a subscriber another name, with everything that it has, in operation.

Unlike `migration`, it needs no third queue: OLD's messages are moved into NEW's. The stages:

MOVE: there is OLD's queue.
    Declare NEW's, to which retries for OLD return from now on. Bind NEW, unbind OLD; if neither has
    consumers, only when almost all of OLD's messages are moved. Once OLD has no consumers, move
    what is left; when nobody holds an event of it, delete it.
RETIRE: there is no OLD, but ``OLD-dl`` or an exchange of OLD's.
    Move the dead letters, and delete the rest.
DONE: nothing of OLD's is there.

**OLD is a quorum queue**, as a rule. The broker deletes one with whatever is in it, and counts as
its consumers everybody who holds an event of it. So this is its consumer, too, deletes it when it
is the only one and nothing is left, and moves what arrived until then (`Mover.finish`). What the
broker parks in it, since it is to become a dead letter and there is no ``OLD-dl``, is not counted
at all: then ``OLD-dl`` is declared, and the broker has three minutes; the exchange ``.migrate.dl``
shows to a later run that they are not over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.administration import Comparison
from domain_events.broker.rabbitmq.topology import Binding, Queue
from domain_events.cli.moving import FEW, SETTLED, Stage, Unheld, Work
from domain_events.errors import BrokerUnavailable, TopologyError
from domain_events.text import printable


class Renaming(Work):
    """A subscriber gets another name, with everything that it has.

    :param new: its new name.
    """

    def __init__(self, new: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._new = new

    def stage(self) -> Stage:
        """Read from the broker."""
        administration = self._administration
        if administration.queue(self._name) is not None:
            return Stage.MOVE
        if administration.queue(topology.dead_letter_name(self._name)) is not None:
            return Stage.RETIRE
        moving = self._moving
        routes = moving.to_new, moving.to_dead_letters, moving.to_held_dead_letters
        _, dlx = topology.old_broker_names(self._name)
        if any(administration.has_exchange(name) for name in (*(r.name for r in routes), dlx)):
            return Stage.RETIRE
        if administration.queue(self._new) is None:
            raise TopologyError(f"There is no queue {self._name!r} to be renamed.")
        return Stage.DONE

    def check(self, unheld: Unheld) -> None:
        """:raises DomainEventsError: it cannot be done safely."""
        if self.stage() is Stage.DONE:
            return
        self._dead_letters_are_classic()
        self._kind()
        for queue in (topology.subscriber_queue, topology.dead_letter_queue):
            result, why = self._administration.compare(queue(self._new))
            if result is Comparison.DIFFERENT:
                raise TopologyError(
                    f"The queue {queue(self._new).name!r} exists with other arguments than this "
                    f"library's quorum queues: {printable(why, 400)}."
                )

    def _keeping(self) -> Iterator[tuple[Queue, str]]:
        for declared in (topology.subscriber_queue, topology.dead_letter_queue):
            old = declared(self._name)
            yield old, old.name
            yield declared(self._new), old.name

    def plan(self, stage: Stage) -> list[str]:
        """What is left to do, a line for each step."""
        steps = [
            (Stage.MOVE, f"declare {self._new}; retries under way for {self._name} return to it"),
            (Stage.MOVE, f"bind {self._new} by all keys, unbind {self._name}"),
            (Stage.MOVE, f"wait until the consumers of {self._name} have ended"),
            (Stage.MOVE, f"move what is left to {self._new}, delete {self._name}"),
            (Stage.RETIRE, f"move {self._name}-dl to {self._new}-dl, delete it"),
        ]
        return [text for at, text in steps if stage in (at, Stage.MOVE)]

    def _perform(self, stage: Stage) -> None:
        self._report(f"{self._name}: {stage.value}")
        if stage is Stage.MOVE:
            self._move()
        else:
            self._retire()

    def _declare_new(self) -> None:
        self._administration.declare(
            [topology.dead_letter_queue(self._new), topology.subscriber_queue(self._new)]
        )
        self._declare_route(self._moving.to_new, self._new)
        # Retries under way name the old subscriber; these bindings stay, they last up to 19 days.
        due = topology.due_name(self._exchange)
        own = [
            Binding(exchange, self._new, key)
            for exchange, key in self._keys()
            if exchange != self._exchange
        ]
        if self._administration.has_exchange(due):
            own.append(topology.way_back(self._exchange, self._new))
        self._administration.declare(own)

    def _move(self) -> None:
        kind = self._kind()
        if kind is Comparison.MISSING:
            return
        self._declare_new()
        if kind is Comparison.SAME:
            self._release_parked()
        address = self._address(self._moving.to_new, self._new)
        state = self._look(self._name)
        if not state.consumers and not self._look(self._new).consumers:
            # Nobody consumes: what is in the old queue first, then what is published from now on.
            swapped_at = 0.0

            def ready(left: int) -> bool:
                nonlocal swapped_at
                if not swapped_at and left <= FEW:
                    self._bind(self._new)
                    self._unbind(self._name)
                    swapped_at = time.monotonic()
                return bool(swapped_at) and time.monotonic() - swapped_at >= SETTLED

            self._pour("what was in the queue", self._name, address, ready)
        self._bind(self._new)
        if kind is Comparison.SAME:
            self._wait_until_unheld(self._name, address, live=False, quorum=True)
        elif self._wait_until_unheld(self._name, address, live=False):
            self._delete_classic(self._name)

    def _delete_classic(self, queue: str) -> None:
        if not self._administration.delete_classic(queue):
            raise BrokerUnavailable(f"{queue!r} has messages or consumers again.")

    def _release_parked(self) -> None:
        """Let the broker dead-letter what it parks in a quorum queue that has no dead letters.

        The exchange shows to a later run that this is not over.
        """
        dead_letters = topology.dead_letter_queue(self._name)
        mark = self._moving.to_held_dead_letters
        if self._administration.has_exchange(mark.name):
            self._parks = True
        elif self._administration.queue(dead_letters.name) is None:
            self._administration.declare([mark])
            self._parks = True
        if self._parks:
            self._administration.declare([dead_letters])

    def _retire(self) -> None:
        self._declare_new()
        moving, administration = self._moving, self._administration
        old, new = topology.dead_letter_name(self._name), topology.dead_letter_name(self._new)
        if administration.queue(old) is not None:
            quorum = not self._dead_letters_are_classic()
            self._declare_route(moving.to_dead_letters, new)
            self._pour(
                "dead letters",
                old,
                self._dead_letter_address(moving.to_dead_letters, new),
                keep_deaths=True,
                delete=quorum,
            )
            if not quorum:
                self._delete_classic(old)
        self._delete_route(moving.to_held_dead_letters, old)
        self._delete_route(moving.to_dead_letters, new)
        self._delete_route(moving.to_new, self._new)
        _, dlx = topology.old_broker_names(self._name)
        if administration.has_exchange(dlx):
            administration.delete_exchange(dlx)
