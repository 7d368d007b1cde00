"""Moves a subscriber's queue while publishers and consumers go on: `Migration`, `Renaming`.

A queue's type cannot change, and its name is the subscriber's: so `Migration` deletes the classic
queue ``<name>`` and declares a quorum queue of that name. What is published meanwhile waits in
``<name>.migrate.new``. Everything is done over AMQP, and **the stage is read from the broker**, by
which queues and exchanges there are; so a run that was killed anywhere is simply run again:

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

`Renaming` needs no third queue; OLD's messages are moved into NEW's queue:

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.administration import Administration, Comparison, QueueState
from domain_events.broker.rabbitmq.errors import ResourceLocked
from domain_events.broker.rabbitmq.mover import Address, Mover
from domain_events.broker.rabbitmq.topology import Binding, Exchange, Queue, Unbinding
from domain_events.cli.management import Management, Source, Unavailable
from domain_events.cli.offline import load_offline
from domain_events.cli.policies import Policy, lossy
from domain_events.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DomainEventsError,
    EventNotConfirmed,
    EventRejected,
    EventUnroutable,
    TopologyError,
)
from domain_events.message import ToDeadLetters
from domain_events.names import matches
from domain_events.text import printable

# Seconds between two looks at the broker, and between two unbindings of the old queue.
_POLL = 0.1
_UNBIND_AGAIN = 1.0
# Seconds in which a message that was routed before an unbinding has reached its queue.
_SETTLED = 1.0
# With so few left, those that are published to the new queue hardly overtake any.
_FEW = 32
# Seconds after which the management plugin's numbers are surely from later than an event: queues
# emit them every 5 s.
_STATISTICS_AGE = 12.0
# The grace that supervisors give a process to end, for example Kubernetes.
_GRACE = 30.0
# Within so many seconds the broker dead-letters what it had to keep: it tries again every 180 s,
# dead_letter_worker_publisher_confirm_timeout.
_DEAD_LETTERED = 200.0
# How many of the unknown routing keys to name.
_MOST_NAMED = 3

#: What may pass: the broker restarts, a queue has no leader.
_PASSING = (BrokerUnavailable, EventNotConfirmed, EventUnroutable, EventRejected)


class Stage(Enum):
    """How far a queue is moved; see above."""

    BEGIN = "not begun"
    DRAIN = "draining the old queue"
    REPLACE = "declaring the new queue"
    RETURN = "filling the new queue"
    MOVE = "moving to the new name"
    RETIRE = "retiring the old name"
    DONE = "done"


class Stopped(DomainEventsError):
    """It did not go on for too long; nothing is lost, and a further run goes on."""


@dataclass(frozen=True)
class Bindings:
    """By which exchanges and keys a subscriber's queue gets events, and how that is known."""

    keys: tuple[tuple[str, str], ...]
    #: Whether they were read from the broker, or from code and options.
    read: bool
    remarks: tuple[str, ...] = ()

    def unknown(self, exchange: str, routing_key: str) -> bool:
        """Whether no key of this exchange accounts for an event."""
        return not any(
            source == exchange and matches(key, routing_key) for source, key in self.keys
        )


def registered_keys(targets: Iterable[str], names: Sequence[str]) -> set[tuple[str, str]]:
    """The exchanges and binding keys with which the targets register one of these names.

    :raises ConfigurationError: none of them is registered.
    """
    targets = list(targets)
    found: set[tuple[str, str]] = set()
    seen: set[str] = set()
    for target in targets:
        for subscription in load_offline(target).subscriptions:
            queue = subscription.options.queue
            seen.add(queue.name)
            if queue.name in names:
                found.update((queue.exchange.name, key) for key in queue.binding_keys)
    if targets and not found:
        raise ConfigurationError(
            f"{printable(' or '.join(names))} is not registered by {', '.join(targets)}, but: "
            f"{printable(', '.join(sorted(seen))) or 'nothing'}."
        )
    return found


def find_bindings(
    administration: Administration,
    name: str,
    others: Sequence[str],
    exchange: str,
    given: set[tuple[str, str]],
    source: Source | None,
    reasons: str,
) -> Bindings:
    """The bindings of ``name``, and of the ``others`` that stand for it meanwhile.

    :param given: those that code and options name.
    :param source: where they can be read, or None for these ``reasons``.
    :raises ConfigurationError: they are not known.
    """
    found = set(given)
    remarks: list[str] = []
    own = {topology.Moving(name).to_new.name, topology.due_name(exchange)}
    if source is not None:
        try:
            found |= {
                (each.exchange, each.binding_key)
                for each in source.bindings()
                if each.destination in (name, *others)
                and not each.to_exchange
                and each.exchange not in own
            }
        except Unavailable as error:
            source, reasons = None, str(error)
    if not found:
        why = (
            f"{source.name} lists none" if source else f"AMQP does not list bindings, and {reasons}"
        )
        raise ConfigurationError(
            f"It is not known by which keys {name!r} is bound: {why}. Name them: "
            "package.module:subscriber that registers it, --binding-key for each, or --management."
        )
    if source is None:
        remarks.append(
            "The broker's bindings cannot be read here. If the queue is bound by other keys than "
            f"{', '.join(printable(key) for _, key in sorted(found))}, name these, too: "
            "--binding-key."
        )
    retry, _ = topology.old_broker_names(name)
    if administration.has_exchange(retry):
        found |= {(retry, key) for source_name, key in found if source_name == exchange}
    for each in sorted({name for name, _ in found}):
        if not administration.has_exchange(each):
            raise ConfigurationError(
                f"There is no exchange {each!r}; name the right one: --exchange."
            )
    due = topology.due_name(exchange)
    if administration.has_exchange(due):
        way_back = topology.way_back(exchange, name)
        found.add((due, way_back.binding_key))
    return Bindings(tuple(sorted(found)), source is not None, tuple(remarks))


class Unheld:
    """Whether consumers hold events of a queue, which AMQP does not show.

    :param source: the broker's statistics, or None.
    :param seconds: where there are none, the longest that one event is held, by the operator.
    """

    def __init__(self, source: Source | None, seconds: float | None) -> None:
        self.source = source
        self._seconds = seconds

    def can_be_proven(self, consumers: int) -> bool:
        """Whether it is possible while there are consumers, or without any."""
        return self.source is not None or self._seconds is not None or not consumers

    def is_proven(self, queue: str, consumers: int, quiet: float) -> bool:
        """:param quiet: for how many seconds the queue has been empty, and unbound."""
        if self.source is not None:
            cached = isinstance(self.source, Management)
            found = self._statistics(queue, quiet, _STATISTICS_AGE if cached else _SETTLED)
            return found.get("messages_unacknowledged") == 0 and found.get("messages_ready") == 0
        if self._seconds is None and consumers:
            return False
        return quiet >= max(_SETTLED, _GRACE if self._seconds is None else self._seconds)

    def has_none(self, queue: str, quiet: float) -> bool:
        """Whether statistics show that it has no message, not even one that it parks."""
        # Those of a quorum queue are that old in rabbitmqctl, too.
        return self._statistics(queue, quiet, _STATISTICS_AGE).get("messages") == 0

    def _statistics(self, queue: str, quiet: float, age: float) -> Mapping[str, Any]:
        """Those from later than the beginning of the quiet; empty if there are none.

        :param age: how old they may be, in seconds.
        """
        if self.source is None or quiet < age:
            return {}
        try:
            return next(each for each in self.source.queues() if each["name"] == queue)
        except (Unavailable, StopIteration):
            return {}


class Work:
    """What `Migration` and `Renaming` have in common.

    :param report: called with a line about each step.
    :param watch: called with what is being done, and how many messages are left; often.
    :param patience: seconds without any progress, after which it stops.
    :param stale: whether events by other keys are left from bindings that were removed.
    """

    def __init__(
        self,
        administration: Administration,
        name: str,
        exchange: str,
        *,
        report: Callable[[str], None],
        watch: Callable[[str, int], None],
        timeout: float,
        patience: float,
        stale: bool = False,
    ) -> None:
        self._administration = administration
        self._name = name
        self._exchange = exchange
        self._bindings = Bindings((), False)
        self._unheld = Unheld(None, None)
        self._report = report
        self._watch = watch
        self._timeout = timeout
        self._patience = patience
        self._stale = stale
        self._moving = topology.Moving(name)
        self._parks = False
        self._unknown: set[str] = set()
        self._observed: object = None
        self._progress: object = None
        self._progressed_at = time.monotonic()

    def run(self, bindings: Bindings, unheld: Unheld) -> None:
        """Go on from whatever stage it is at, to the end.

        :param bindings: of the queue, all of them.
        :raises Stopped: it does not go on.
        :raises DomainEventsError: it cannot go on.
        """
        self._bindings, self._unheld = bindings, unheld
        self._progressed_at = time.monotonic()
        troubled = ""
        while True:
            try:
                self._lock()
                stage = self.stage()
                if stage is Stage.DONE:
                    return
                self._perform(stage)
                troubled = ""
            except _PASSING as error:
                if time.monotonic() - self._progressed_at > self._patience:
                    raise
                if str(error) != troubled:
                    troubled = str(error)
                    self._report(f"{printable(error, 400)} Trying again.")
                time.sleep(_UNBIND_AGAIN)

    def stage(self) -> Stage:
        """Read from the broker."""
        raise NotImplementedError

    def check(self, unheld: Unheld) -> None:
        """:raises DomainEventsError: it cannot be done safely."""
        raise NotImplementedError

    def check_policies(self, source: Source | None) -> list[str]:
        """Remarks, if the policies are not known.

        :param source: where they can be read, or None.
        :raises TopologyError: by a policy, a queue would lose events that wait in it.
        """
        policies: Sequence[Policy] = []
        if source is not None:
            try:
                policies = source.policies()
            except Unavailable:
                source = None
        if source is None:
            names = ", ".join(sorted({queue.name for queue, _ in self._keeping()}))
            remark = (
                f"The broker's policies cannot be read here. If one limits the length or the time "
                f"of what waits in {names}, events are lost."
            )
            return [remark]
        for queue, before in self._keeping():
            known = before and {
                key
                for kind in ("classic", "quorum")
                for key in lossy(policies, before, kind, queue.arguments)
            }
            for (key, value), policy in lossy(
                policies, queue.name, "quorum", queue.arguments
            ).items():
                if known and (key, value) in known and key != "delayed-retry-type":
                    continue
                what = "operator policy" if policy["operator"] else "policy"
                clear = what.replace(" ", "_")
                raise TopologyError(
                    f"The {what} {policy['name']!r} sets {key} = {value} for {queue.name!r}, in "
                    "which events would be lost, hidden or refused meanwhile. Give it a pattern "
                    f"that does not match this name, or remove it: rabbitmqctl clear_{clear} "
                    f"{policy['name']}"
                )
        return []

    def _keeping(self) -> Iterator[tuple[Queue, str]]:
        """The queues in which events are, and for those that stay, which one they replace.

        What a policy does to that one already is its operator's wish.
        """
        raise NotImplementedError

    def plan(self, stage: Stage) -> list[str]:
        """What is left to do, a line for each step."""
        raise NotImplementedError

    def _perform(self, stage: Stage) -> None:
        raise NotImplementedError

    def _kind(self) -> Comparison:
        """Whether the queue is the quorum queue (SAME), or a classic one of ours (DIFFERENT)."""
        result, why = self._administration.compare(topology.subscriber_queue(self._name))
        if result is Comparison.UNKNOWN:
            raise ConfigurationError(f"{self._name!r} cannot be examined: {why}.")
        if result is Comparison.DIFFERENT:
            for queue in topology.known_classic(self._name):
                result, why = self._administration.compare(queue)
                if result is Comparison.SAME:
                    return Comparison.DIFFERENT
            raise TopologyError(
                f"The queue {self._name!r} has arguments that neither domain-event-broker nor this "
                f"library has given it: {printable(why, 400)}. Move it by hand, or start a new one "
                "under another name."
            )
        return result

    def _dead_letters_are_classic(self) -> bool:
        name = topology.dead_letter_name(self._name)
        state = self._administration.queue(name)
        if state is None:
            return False
        if state.consumers:
            raise TopologyError(
                f"The queue {name!r} has {state.consumers} consumers; stop these first, since they "
                "would lose what they hold."
            )
        result, why = self._administration.compare(topology.dead_letter_queue(self._name))
        if result is not Comparison.DIFFERENT:
            return False
        result, why = self._administration.compare(topology.classic_dead_letters(self._name))
        if result is not Comparison.SAME:
            raise TopologyError(
                f"The queue {name!r} has arguments that neither domain-event-broker nor this "
                f"library has given it: {printable(why, 400)}. Export or replay what is in it, "
                "delete it, and run this again."
            )
        return True

    # --- steps -----------------------------------------------------------------------------------

    def _lock(self) -> None:
        """Exclude another run, and walks over the dead letters."""
        walk = topology.walk_marker(ToDeadLetters(self._name))
        for queue, what in (
            (self._moving.lock, "another migrate or rename of it is running"),
            (walk, "another program walks over its dead letters; let that end first"),
        ):
            try:
                self._administration.declare([queue])
            except ResourceLocked:
                raise TopologyError(f"{self._name!r} cannot be moved now: {what}.") from None

    def _keys(self) -> list[tuple[str, str]]:
        """By which exchanges and keys it is bound; a consumer may have declared the last one."""
        keys = set(self._bindings.keys)
        way_back = topology.way_back(self._exchange, self._name)
        if self._administration.has_exchange(way_back.exchange):
            keys.add((way_back.exchange, way_back.binding_key))
        return sorted(keys)

    def _bind(self, queue: str) -> None:
        self._administration.declare(
            [Binding(exchange, queue, key) for exchange, key in self._keys()]
        )

    def _unbind(self, queue: str) -> None:
        self._administration.declare(
            [Unbinding(exchange, queue, key) for exchange, key in self._keys()]
        )

    def _declare_route(self, exchange: Exchange, queue: str) -> None:
        self._administration.declare([exchange, Binding(exchange.name, queue, "")])

    def _delete_route(self, exchange: Exchange, queue: str) -> None:
        if self._administration.has_exchange(exchange.name):
            if self._administration.queue(queue) is not None:
                self._administration.unbind(queue, exchange.name, "")
            self._administration.delete_exchange(exchange.name)

    def _address(self, route: Exchange, queue: str) -> Address:
        """Where to publish what goes to the queue.

        What this library has forwarded goes through the default exchange: its consumers trust its
        headers there, and its routing key is in these. Everything else keeps its routing key, and
        comes through an exchange whose headers are not trusted.
        """
        returning = topology.return_exchanges(self._exchange)

        def address(exchange: str, routing_key: str) -> tuple[str, str]:
            if exchange in returning:
                return "", queue
            if exchange == self._exchange and self._bindings.unknown(exchange, routing_key):
                self._unknown.add(routing_key)
            return route.name, routing_key

        return address

    def _dead_letter_address(self, route: Exchange, queue: str) -> Address:
        return lambda exchange, key: (route.name, key) if exchange else ("", queue)

    def _fence(self, queue: str, address: Address) -> Mover | None:
        """Be the queue's only consumer, and move what is in it; None if there is another one."""
        mover = Mover(self._administration.urls, queue, address, exclusive=True)
        try:
            mover.start(self._timeout)
        except TopologyError:
            mover.close()
            return None
        except BaseException:
            mover.close()
            raise
        return mover

    def _pour(
        self,
        what: str,
        queue: str,
        address: Address,
        ready: Callable[[int], bool] = lambda _left: True,
        *,
        keep_deaths: bool = False,
        delete: bool = False,
    ) -> None:
        """Move all that is in a queue.

        :param ready: called with how many are left: whether it may end once that is none.
        :param delete: delete it then, a quorum queue.
        """
        with Mover(self._administration.urls, queue, address, keep_deaths=keep_deaths) as mover:
            mover.start(self._timeout)
            empty_since: float | None = None
            while True:
                left = self._look(queue).messages + mover.under_way
                mover.check()
                self._watch(what, left)
                self._note((what, mover.moved), f"{left} messages are left in {queue!r}")
                may_end = ready(left)
                now = time.monotonic()
                empty_since = None if left or not may_end else empty_since or now
                if empty_since is not None and now - empty_since >= _POLL:
                    break
                time.sleep(_POLL / 5)
            self._end(mover, queue, delete=delete)
            if mover.moved:
                self._report(f"{what}: {mover.moved} moved")

    def _delete_under(self, mover: Mover, queue: str) -> None:
        """Delete a quorum queue, if the mover is its only consumer and nothing is left in it.

        The broker checks neither, so something may arrive after the check; the mover gets that.
        """

        def delete() -> None:
            if not self._administration.is_empty(queue):
                raise BrokerUnavailable(f"{queue!r} has messages again.")
            try:
                self._administration.delete_queue(queue, own_consumers=1)
            except TopologyError as error:
                raise BrokerUnavailable(str(error)) from None

        mover.finish(delete, self._timeout)

    def _look(self, queue: str) -> QueueState:
        state = self._administration.queue(queue)
        if state is None:
            raise TopologyError(f"The queue {queue!r} was deleted by another program.")
        return state

    def _note(self, progress: object, where: str) -> None:
        """:raises Stopped: this is the same for too long."""
        if progress != self._progress:
            self._progress, self._progressed_at = progress, time.monotonic()
        elif time.monotonic() - self._progressed_at > self._patience:
            raise Stopped(
                f"{self._name!r} is not moved yet: no progress for {self._patience:g} s; {where}. "
                "Nothing is lost; run the same command again to go on."
            )

    def _check_keys(self) -> None:
        """:raises ConfigurationError: there are events for which no key is known."""
        if self._unknown and not self._bindings.read and not self._stale:
            shown = ", ".join(printable(key) for key in sorted(self._unknown)[:_MOST_NAMED])
            raise ConfigurationError(
                f"{self._name!r} has events for which no binding key was named: {shown}. Name "
                "the key, so that the new queue gets them, too: --binding-key; or, if its binding "
                "was removed: --stale."
            )

    def _wait_until_unheld(
        self, queue: str, address: Address, *, live: bool, quorum: bool = False
    ) -> bool:
        """Wait until it is empty and nobody holds an event of it; False if it is gone.

        :param live: whether it may have consumers then.
        :param quorum: it is a quorum queue of ours; it is deleted then.
        """
        fence: Mover | None = None
        quiet_since: float | None = None
        unbound_at = 0.0
        try:
            while True:
                now = time.monotonic()
                if now - unbound_at > _UNBIND_AGAIN:
                    self._unbind(queue)
                    unbound_at = now
                state = self._administration.queue(queue)
                if state is None:
                    return False
                consumers = max(0, state.consumers - (fence is not None))
                fence = self._alone(queue, consumers, fence, address, quorum=quorum)
                left = state.messages + (fence.under_way if fence is not None else 0)
                self._observe(queue, left, consumers, fence, live=live, quorum=quorum)
                quiet_since = None if left or (quorum and consumers) else quiet_since or now
                quiet = 0.0 if quiet_since is None else now - quiet_since
                if self._is_unheld(queue, consumers, quiet, fence, live=live, quorum=quorum):
                    self._check_keys()
                    if fence is not None:
                        self._end(fence, queue, delete=quorum)
                        if fence.moved:
                            self._report(f"{queue}: {fence.moved} moved")
                    return True
                time.sleep(_POLL)
        finally:
            if fence is not None:
                fence.close()

    def _alone(
        self, queue: str, consumers: int, fence: Mover | None, address: Address, *, quorum: bool
    ) -> Mover | None:
        """The fence as it has to be, with so many consumers beside it."""
        if fence is None:
            return None if consumers else self._fence(queue, address)
        fence.check()
        if quorum and consumers:
            # A quorum queue has others beside an exclusive one (3.10, 4.0, 4.3): leave it to them.
            self._end(fence, queue, delete=False)
            fence.close()
            return None
        return fence

    def _end(self, mover: Mover, queue: str, *, delete: bool) -> None:
        if delete:
            self._delete_under(mover, queue)
        else:
            mover.stop(self._timeout)

    def _is_unheld(
        self,
        queue: str,
        consumers: int,
        quiet: float,
        fence: Mover | None,
        *,
        live: bool,
        quorum: bool,
    ) -> bool:
        if not quiet or (consumers and not live):
            return False
        if quorum:
            return fence is not None and self._is_left(queue, quiet)
        return self._unheld.is_proven(queue, consumers, quiet)

    def _is_left(self, queue: str, quiet: float) -> bool:
        """The same for a quorum queue, once no consumer is seen.

        Its number of consumers includes each that holds an event, even one that was cancelled, and
        ``basic.get`` (seen on 3.10, 4.0 and 4.3). But not what the broker itself dead-letters.
        """
        if not self._parks:
            return quiet >= _SETTLED
        return quiet >= _DEAD_LETTERED or self._unheld.has_none(queue, quiet)

    def _observe(
        self,
        queue: str,
        left: int,
        consumers: int,
        fence: Mover | None,
        *,
        live: bool,
        quorum: bool,
    ) -> None:
        """Show how far it is drained.

        :raises Stopped: nothing has changed for too long.
        """
        if left and consumers:
            where = f"{left} events wait for its {consumers} consumers"
        elif consumers:
            where = f"its {consumers} consumers may hold events"
            if not live or not self._unheld.can_be_proven(consumers):
                where += "; stop these processes"
        elif left:
            where = f"{left} events are left"
        elif self._parks:
            where = (
                "it is empty; what the broker parks in it becomes a dead letter within 3 minutes"
            )
        elif quorum:
            where = "it is empty"
        else:
            where = "it is empty; a process that ends may still hold events"
        self._watch(f"{queue}: {where}", left)
        if (left > 0, consumers) != self._observed:
            self._observed = (left > 0, consumers)
            self._report(f"{queue}: {where}")
        parked = self._parks and not left and not consumers and int(time.monotonic())
        self._note((left, consumers, fence and fence.moved, parked), where)


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
        time.sleep(_SETTLED)
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
            swap(left <= _FEW)
            if swapped and not swapped_at:
                swapped_at = time.monotonic()
            return bool(swapped_at) and time.monotonic() - swapped_at >= _SETTLED

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
                if not swapped_at and left <= _FEW:
                    self._bind(self._new)
                    self._unbind(self._name)
                    swapped_at = time.monotonic()
                return bool(swapped_at) and time.monotonic() - swapped_at >= _SETTLED

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
