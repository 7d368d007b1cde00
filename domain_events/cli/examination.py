"""What the checks of `doctor` look at: the broker, and the subscribers that were named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from domain_events import broker
from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.administration import Administration, QueueState
from domain_events.broker.rabbitmq.errors import ResourceLocked
from domain_events.cli.management import BindingFound, Source, Unavailable
from domain_events.errors import BrokerUnavailable, ConfigurationError, TopologyError
from domain_events.subscriber import Subscriber

Found = TypeVar("Found")

_READABLE = (
    "Give --management http://user:password@host:15672, with a user that has the tag 'monitoring', "
    "or run this on the broker's machine as a user who may run rabbitmqctl."
)
_ON_THE_MACHINE = "Run this on the broker's machine, as a user who may run rabbitmqctl."
_WHICH = "Name the subscribers, as package.module:subscriber or with --name. Or: "


class Role(Enum):
    """What a queue of this library is for."""

    SUBSCRIBER = "a subscriber's queue"
    DEAD_LETTERS = "dead letters"
    DELAYS = "a delay level"
    UNDELIVERED = "undelivered retries"


@dataclass(frozen=True)
class Subscribed:
    """A subscriber that was named."""

    queue: broker.Queue
    #: Whether its options are known, or only its name.
    is_known: bool = False
    handler_limit: float | None = None
    prefetch: int = 0
    workers: int = 1


def of_target(subscriber: Subscriber) -> list[Subscribed]:
    """The subscribers that are registered there."""
    workers = subscriber.workers
    return [
        Subscribed(
            each.options.queue,
            True,
            each.options.handler_limit,
            each.options.prefetch(workers),
            workers,
        )
        for each in subscriber.subscriptions
    ]


def of_name(name: str, exchange: str) -> Subscribed:
    """A durable subscriber of which only the name is known."""
    return Subscribed(broker.Queue(name, broker.Exchange(exchange), dead_letters=True))


class Unknown(Unavailable):
    """Something cannot be read; ``do`` is what would make it readable."""

    def __init__(self, reason: str, do: str = _READABLE) -> None:
        super().__init__(reason)
        self.do = do


class Examination:
    """The broker, as far as it can be read; each thing is read once.

    :param connect: makes another connection, for what may block this one.
    """

    def __init__(
        self,
        administration: Administration,
        connect: Callable[[], Administration],
        sources: Sequence[Source],
        reasons: Sequence[str],
        exchange: str,
        subscribed: Sequence[Subscribed],
    ) -> None:
        self.administration = administration
        self.connect = connect
        self.sources = sources
        self.exchange = exchange
        self.subscribed = subscribed
        self._reasons = tuple(reasons)
        self._read: dict[str, Any] = {}
        self._states: dict[str, QueueState | None] = {}
        version = str(administration.server.get("version", ""))
        #: The numbers of the version, such as ``(4, 3, 6)``; empty if it has none.
        self.version = tuple(
            int(each) for each in version.partition("-")[0].split(".") if each.isdigit()
        )

    # --- what AMQP does not show -----------------------------------------------------------------

    def read(self, what: str, get: Callable[[Source], Found]) -> Found:
        """From the first source that has it.

        :raises Unknown: none has.
        """
        if what not in self._read:
            self._read[what] = self._first(get)
        found: Found | Unknown = self._read[what]
        if isinstance(found, Unknown):
            raise found
        return found

    def _first(self, get: Callable[[Source], Found]) -> Found | Unknown:
        reasons = []
        for source in self.sources:
            try:
                return get(source)
            except Unavailable as error:
                reasons.append(str(error))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reasons.append(f"{source.name}: its answer is not understood: {error!r}")
        return Unknown("; ".join([*reasons, *self._reasons]))

    @property
    def environment(self) -> dict[str, Any]:
        """The settings of a node; see `Source.environment`."""
        try:
            return self.read("environment", lambda source: source.environment())
        except Unknown as error:
            raise Unknown(str(error), _ON_THE_MACHINE) from None

    @property
    def queues(self) -> dict[str, dict[str, Any]]:
        """All queues of the vhost, by name; see `Source.queues`."""
        return {each["name"]: each for each in self.read("queues", lambda source: source.queues())}

    @property
    def bindings(self) -> list[BindingFound]:
        """All bindings of the vhost."""
        return self.read("bindings", lambda source: source.bindings())

    @property
    def policies(self) -> list[dict[str, Any]]:
        """All policies and operator policies of the vhost."""
        return self.read("policies", lambda source: source.policies())

    @property
    def exchanges(self) -> dict[str, dict[str, Any]]:
        """All exchanges of the vhost, by name."""
        found = self.read("exchanges", lambda source: source.exchanges())
        return {each["name"]: each for each in found}

    # --- the queues of this library --------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The subscribers: those that were named; else those bound to the exchange.

        :raises Unknown: none were named, and bindings cannot be read.
        """
        if self.subscribed:
            return [each.queue.name for each in self.subscribed]
        try:
            bindings = self.bindings
        except Unknown as error:
            raise Unknown(
                f"which subscribers there are, since bindings cannot be read: {error}",
                _WHICH + error.do,
            ) from None
        return sorted(
            {
                each.destination
                for each in bindings
                if each.exchange == self.exchange and not each.to_exchange
            }
        )

    @property
    def exchange_names(self) -> list[str]:
        """The exchanges of the subscribers that were named; else the one of the options."""
        found = {each.queue.exchange.name: None for each in self.subscribed}
        return list(found or {self.exchange: None})

    @property
    def roles(self) -> dict[str, Role]:
        """The queues of this library, as far as their names are known; not all need exist."""
        try:
            names = self.names
        except Unknown:
            names = []
        found = dict.fromkeys(names, Role.SUBSCRIBER)
        found |= {topology.dead_letter_name(name): Role.DEAD_LETTERS for name in names}
        for exchange in self.exchange_names:
            for each in topology.delays(exchange):
                if isinstance(each, topology.Queue):
                    found[each.name] = Role.DELAYS
            found[topology.undelivered_name(exchange)] = Role.UNDELIVERED
        return found

    def rows(self) -> list[tuple[dict[str, Any], Role]]:
        """Those of `roles` that exist, as `queues` has them."""
        queues = self.queues
        return [(queues[name], role) for name, role in self.roles.items() if name in queues]

    def state(self, name: str) -> QueueState | None:
        """A queue's counts, by AMQP; None if there is none.

        :raises Unknown: this user may not look, or the queue does not answer.
        """
        if name not in self._states:
            try:
                self._states[name] = self.administration.queue(name)
            except ResourceLocked:
                # Its process is there, and consumes.
                self._states[name] = QueueState(messages=0, consumers=1)
            except ConfigurationError as error:
                self._states[name] = self._state_elsewhere(name, error)
            except (TopologyError, BrokerUnavailable) as error:
                raise Unknown(
                    str(error), "Look at the other findings: a node may be down."
                ) from None
        return self._states[name]

    def _state_elsewhere(self, name: str, refusal: ConfigurationError) -> QueueState | None:
        """The same, for a user who may not look by AMQP."""
        do = "Run this with a user that has a permission on it. Or: "
        try:
            row = self.queues.get(name)
        except Unknown as error:
            raise Unknown(f"{refusal}; {error}", do + error.do) from None
        if row is None:
            return None
        messages, consumers = row.get("messages_ready"), row.get("consumers")
        if messages is None or consumers is None:
            raise Unknown(
                f"{refusal}; the management plugin has not counted yet", do + "try again in 10 s."
            )
        return QueueState(int(messages), int(consumers))
