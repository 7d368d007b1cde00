"""Moves a subscriber's queue while publishers and consumers go on: what both ways have in common.

`migration` gives a queue another type, `renaming` another name. Everything is done over AMQP, and
**the stage is read from the broker**, by which queues and exchanges there are; so a run that was
killed anywhere is simply run again.

**Nothing is lost**, since at each moment every key is bound to one of the queues at least, and a
queue is deleted only when it is empty, unbound, and nobody holds an event of it (`Unheld`). Each
message is confirmed in the new place before it is acked in the old one (`Mover`).
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
from domain_events.cli.policies import Policy, clear_command, lossy
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
SETTLED = 1.0
# With so few left, those that are published to the new queue hardly overtake any.
FEW = 32
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
            found = self._statistics(queue, quiet, _STATISTICS_AGE if cached else SETTLED)
            return found.get("messages_unacknowledged") == 0 and found.get("messages_ready") == 0
        if self._seconds is None and consumers:
            return False
        return quiet >= max(SETTLED, _GRACE if self._seconds is None else self._seconds)

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
    """What a `Migration` and a `Renaming` have in common.

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
                raise TopologyError(
                    f"The {what} {policy['name']!r} sets {key} = {value} for {queue.name!r}, in "
                    "which events would be lost, hidden or refused meanwhile. Give it a pattern "
                    f"that does not match this name, or remove it: {clear_command(policy)}"
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
            return quiet >= SETTLED
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
