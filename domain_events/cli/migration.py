"""Turns a classic queue into a quorum queue of the same name, in operation.

A queue's type cannot change, and its name is the subscriber's: so this deletes the classic queue
``<name>`` and declares a quorum queue of that name. What is published meanwhile waits in
``<name>.migrate.new``. The stages (see `moving`):

BEGIN: ``<name>`` is classic, and there is no exchange ``.migrate.old``.
    Delete the queue ``.new``, if a killed run has left it. Bind ``<name>``, then a fresh ``.new``,
    by all keys. Declare the exchange ``.migrate.old``.
DRAIN: ``<name>`` is classic, and the exchange ``.migrate.old`` is there.
    Unbind ``<name>``, again and again, since consumers that reconnect bind it. Wait until it is
    empty and nobody holds an event of it. Replace ``<name>-dl``, then ``<name>``.
REPLACE: there is no ``<name>``, but ``.new``.
    Declare ``<name>`` as a quorum queue.
RETURN: ``<name>`` is a quorum queue, and any of the others is there.
    Move ``.old``, then ``.new``, into it. Bind it, unbind ``.new``. Return the dead letters. Delete
    the rest.
DONE: ``<name>`` is a quorum queue, and none of the others is there.

**Nothing is lost**, since at each moment every key is bound to ``<name>``, to ``.new``, or to both,
and a queue is deleted only when it is empty, unbound, and nobody holds an event of it.

- ``.new`` of a killed BEGIN has only copies: until the exchange ``.migrate.old`` exists, nothing
  was unbound from ``<name>``, which was bound by the same keys before ``.new`` was.
- While the classic queue has consumers, they drain it; otherwise this does, as its exclusive
  consumer, into the queue ``.old``. So no consumer gets an event from the middle of the queue.
- What a consumer holds is lost when its queue is deleted, and AMQP does not show it. So one of
  three must prove that there is nothing (`Unheld`): the broker's statistics; that there have been
  no consumers for longer than a process takes to end; or the operator, who knows how long an event
  is held at most.
- The broker itself checks that the classic queue is empty, as it deletes it; and the next request
  on the channel declares the quorum queue. This library's consumers (``queue_type='classic'``) are
  back some 0.1 s later and adopt whatever is there. If one was quicker and has declared a classic
  queue, the stage is DRAIN again. (A consumer of domain-event-broker ends instead.)
- Each message is confirmed in the new place before it is acked in the old one (`Mover`).

**Duplicates**, which have the same id: events published between binding one queue and unbinding the
other by the same key, which is some milliseconds, twice. If it is killed there, until it is run
again. If a consumer reconnects and so binds its queue again, until the next unbinding, a second on.
And at each kill those that `Mover` had under way (32).

**Order.** Without consumers it is kept, except for events of the milliseconds between binding the
new queue and unbinding ``.new``. Consumers bind the new queue as soon as they are back: then those
that waited in ``.new`` keep their order, but newer ones may come before the last of them.

**Retries in flight** return by the subscriber's name through ``<exchange>.due``, to which ``.new``
and the new queue are bound as to any other exchange; those of domain-event-broker (its queues
``<name>-delay-<ms>``) through the exchange ``<name>-retry``, which stays, bound to the new queue.
**Dead letters** wait in the queue ``.dl`` while ``<name>-dl`` is replaced. That is done when nobody
can write any, which is when nobody holds an event.

**A binding key that a release adds meanwhile.** Its processes bind ``<name>``, whatever queue that
is. If they do so between the last look at the bindings and the deletion, events by this key alone
have no queue until that process is back, for some 0.1 s. So none should be deployed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.administration import Comparison
from domain_events.broker.rabbitmq.topology import Queue
from domain_events.cli.moving import FEW, SETTLED, Stage, Unheld, Work
from domain_events.errors import ConfigurationError, TopologyError
from domain_events.text import printable


class Migration(Work):
    """A classic queue becomes a quorum queue of the same name."""

    def stage(self) -> Stage:
        """Read from the broker."""
        has = self._administration.has_exchange
        kind = self._kind()
        if kind is Comparison.MISSING:
            if self._administration.queue(self._moving.waiting.name) is None:
                raise TopologyError(f"There is no queue {self._name!r} to be migrated.")
            return Stage.REPLACE
        if kind is Comparison.DIFFERENT:
            return Stage.DRAIN if has(self._moving.to_drained.name) else Stage.BEGIN
        moving = self._moving
        queues = moving.waiting, moving.drained, moving.dead_letters
        routes = moving.to_drained, moving.to_new, moving.to_held_dead_letters
        left = any(self._administration.queue(each.name) for each in queues)
        if left or any(has(each.name) for each in (*routes, moving.to_dead_letters)):
            return Stage.RETURN
        return Stage.DONE

    def check(self, unheld: Unheld) -> None:
        """:raises DomainEventsError: it cannot be done safely."""
        if self.stage() not in (Stage.BEGIN, Stage.DRAIN):
            return
        state = self._look(self._name)
        if not unheld.can_be_proven(state.consumers):
            raise ConfigurationError(
                f"{self._name!r} has {state.consumers} consumers, and it cannot be seen which "
                "events they hold, which would be lost. The ways out: --management, or rabbitmqctl "
                "on the broker's machine; stop these processes; or --held-for SECONDS, the longest "
                "that one event is held (the handler's time, for each event that is prefetched)."
            )
        self._dead_letters_are_classic()

    def _keeping(self) -> Iterator[tuple[Queue, str]]:
        moving = self._moving
        for queue in (moving.waiting, moving.drained, moving.dead_letters):
            yield queue, ""
        for queue in (
            topology.subscriber_queue(self._name),
            topology.dead_letter_queue(self._name),
        ):
            yield queue, queue.name

    def plan(self, stage: Stage) -> list[str]:
        """What is left to do, a line for each step."""
        moving = self._moving
        steps = [
            (Stage.BEGIN, f"bind {moving.waiting.name} by all keys: new events wait there"),
            (Stage.DRAIN, f"unbind {self._name}"),
            (Stage.DRAIN, f"wait until its consumers have drained {self._name}, and hold nothing"),
            (Stage.DRAIN, f"if it has none: move its events to {moving.drained.name}"),
            (Stage.DRAIN, f"replace {self._name}-dl by a quorum queue, if it is a classic one"),
            (Stage.REPLACE, f"replace {self._name} by a quorum queue"),
            (Stage.RETURN, f"bind {self._name}, unbind {moving.waiting.name}"),
            (Stage.RETURN, "move all that was held into it; delete what is not needed any more"),
        ]
        order = list(Stage)
        return [text for at, text in steps if order.index(at) >= order.index(stage)]

    def _perform(self, stage: Stage) -> None:
        self._report(f"{self._name}: {stage.value}")
        {
            Stage.BEGIN: self._begin,
            Stage.DRAIN: self._drain,
            Stage.REPLACE: self._replace,
            Stage.RETURN: self._return,
        }[stage]()

    def _begin(self) -> None:
        moving, administration = self._moving, self._administration
        # See above: it has only copies.
        administration.delete_queue(moving.waiting.name, if_empty=False)
        self._bind(self._name)
        administration.declare([moving.waiting, moving.drained, moving.dead_letters])
        # A broker that is killed within half a second may forget a new quorum queue's member (the
        # directory of Ra is saved at that interval).
        time.sleep(SETTLED)
        self._bind(moving.waiting.name)
        self._declare_route(moving.to_drained, moving.drained.name)

    def _drain(self) -> None:
        moving = self._moving
        self._administration.declare([moving.waiting, moving.drained])
        self._declare_route(moving.to_drained, moving.drained.name)
        self._bind(moving.waiting.name)
        classic = self._dead_letters_are_classic()
        if classic:
            self._hold_dead_letters()
        address = self._address(moving.to_drained, moving.drained.name)
        if not self._wait_until_unheld(self._name, address, live=True):
            return
        if classic:
            if self._look(topology.dead_letter_name(self._name)).messages:
                self._hold_dead_letters()
            new = topology.dead_letter_queue(self._name)
            if not self._administration.replace_classic(new, if_unused=True):
                return  # the stage tells how to go on
            _, dlx = topology.old_broker_names(self._name)
            if self._administration.has_exchange(dlx):
                self._administration.bind(new.name, dlx, "#")
        # Without consumers as far as is known: with one that came back, it is the same stage again.
        state = self._administration.queue(self._name)
        self._administration.replace_classic(
            topology.subscriber_queue(self._name), if_unused=not (state and state.consumers)
        )

    def _replace(self) -> None:
        self._administration.declare([topology.subscriber_queue(self._name)])

    def _return(self) -> None:
        moving, administration = self._moving, self._administration
        self._declare_route(moving.to_new, self._name)
        address = self._address(moving.to_new, self._name)
        swapped = False
        swapped_at = 0.0

        def swap(few: bool) -> None:
            """Consumers bind the queue themselves, so that waiting any longer helps nobody."""
            nonlocal swapped
            if not swapped and (few or self._look(self._name).consumers):
                self._bind(self._name)
                if administration.queue(moving.waiting.name) is not None:
                    self._unbind(moving.waiting.name)
                swapped = True

        def waiting(left: int) -> bool:
            nonlocal swapped_at
            swap(left <= FEW)
            if swapped and not swapped_at:
                swapped_at = time.monotonic()
            return bool(swapped_at) and time.monotonic() - swapped_at >= SETTLED

        def drained(_left: int) -> bool:
            swap(False)
            return True

        if administration.queue(moving.drained.name) is not None:
            name = moving.drained.name
            self._pour("what was in the queue", name, address, drained, delete=True)
        if administration.queue(moving.waiting.name) is not None:
            name = moving.waiting.name
            self._pour("what was published meanwhile", name, address, waiting, delete=True)
        self._return_dead_letters()
        self._delete_route(moving.to_drained, moving.drained.name)
        self._delete_route(moving.to_new, self._name)

    # --- dead letters ----------------------------------------------------------------------------

    def _hold_dead_letters(self) -> None:
        held, route = self._moving.dead_letters, self._moving.to_held_dead_letters
        self._administration.declare([held])
        self._declare_route(route, held.name)
        self._pour(
            "dead letters, to be kept",
            topology.dead_letter_name(self._name),
            self._dead_letter_address(route, held.name),
            keep_deaths=True,
        )

    def _return_dead_letters(self) -> None:
        moving, administration = self._moving, self._administration
        new, held = topology.dead_letter_queue(self._name), moving.dead_letters
        if administration.queue(held.name) is not None:
            administration.declare([new])
            self._declare_route(moving.to_dead_letters, new.name)
            self._pour(
                "dead letters",
                held.name,
                self._dead_letter_address(moving.to_dead_letters, new.name),
                keep_deaths=True,
                delete=True,
            )
        self._delete_route(moving.to_held_dead_letters, held.name)
        self._delete_route(moving.to_dead_letters, new.name)
        _, dlx = topology.old_broker_names(self._name)
        if administration.has_exchange(dlx) and administration.queue(new.name) is not None:
            administration.unbind(new.name, dlx, "#")
            self._delete_unused(dlx)

    def _delete_unused(self, exchange: str) -> None:
        try:
            self._administration.delete_exchange(exchange)
        except TopologyError as error:
            self._report(f"{printable(error, 400)} It is left.")
