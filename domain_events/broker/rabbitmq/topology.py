"""Every exchange, queue and binding on the broker, as data. Pure: declares nothing itself.

::

    publisher ──► <exchange> ──binding keys──► <name> ──► handler
                                                 ▲  │ Retry                  │ gave up
                    <exchange>.due ──────────────┘  ▼                        ▼
                          ▲              <exchange>.delay.NN              <name>-dl
                          └── TTL expires ◄── (a queue per bit)

**Delays.** Level *i* of 24 is a topic exchange and a quorum queue ``<exchange>.delay.<i>`` that
keeps a message 2**i tenths of a second and hands it to level *i - 1*; level 0 hands it to
``<exchange>.due``. A delay is written in binary in front of the queue's name, highest bit first
(``0.0.1.0.1.<name>``): at each level a set bit waits in the queue, a clear bit goes straight on
to the next exchange. So a fixed number of queues keeps any delay up to 19 days, a short one is
never behind a long one, and a retry returns to its own subscriber only. NServiceBus and Celery
delay this way.

**Safety.** A queue that dead-letters does so at least once only as a quorum queue with
``x-dead-letter-strategy=at-least-once`` and ``x-overflow=reject-publish``
(https://www.rabbitmq.com/docs/quorum-queues#dead-lettering). A retry whose subscriber's queue is
gone would block that for all others, so ``<exchange>.due`` hands it to ``<exchange>.undelivered``.

**No options in arguments.** A queue's arguments cannot change once it exists, so a subscriber's
queue has the same ones whatever its options are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias

from domain_events import broker
from domain_events.errors import ConfigurationError
from domain_events.message import (
    Destination,
    Later,
    Place,
    ToDeadLetters,
    ToExchange,
    ToSubscriber,
)
from domain_events.names import usable_name
from domain_events.retry import SHORTEST_DELAY, units_of

LEVELS = 24

#: Without a limit of its own a quorum queue has 20 from RabbitMQ 4.0 on, and browsing counts.
#: -1 ("no limit") drops at the first requeue on 3.10.
_AS_GOOD_AS_UNLIMITED = 10**9

_CONFIRMED_DEAD_LETTERING = {
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


@dataclass(frozen=True)
class Exchange:
    """An exchange; durable. One that exists with the same type is used as it is.

    ``strict``: it must have these very arguments. ``shared``: see `is_shared`. ``must_exist``: it
    is only looked for, whatever its type and arguments.
    """

    name: str
    type: str = "topic"
    arguments: Mapping[str, object] = field(default_factory=dict)
    strict: bool = False
    shared: bool = False
    must_exist: bool = False


@dataclass(frozen=True)
class Queue:
    """A queue. ``adopt_existing``: when one of that name exists, take it whatever its arguments.

    ``must_exist``: the same, and a missing one is not declared but an error.
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    adopt_existing: bool = False
    shared: bool = False
    must_exist: bool = False


@dataclass(frozen=True)
class Binding:
    """From an exchange to a queue, or with ``to_exchange`` to another exchange."""

    exchange: str
    destination: str
    binding_key: str
    to_exchange: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Unbinding:
    """The queue must no longer be bound to the exchange by this key."""

    exchange: str
    destination: str
    binding_key: str


Declaration: TypeAlias = Exchange | Queue | Binding | Unbinding
Topology: TypeAlias = Sequence[Declaration]


def dead_letter_name(name: str) -> str:
    """The queue that keeps what subscriber ``name`` failed on."""
    return f"{name}-dl"


def undelivered_name(exchange: str) -> str:
    """The queue (and the exchange) for retries whose subscriber's queue is gone."""
    return f"{exchange}.undelivered"


def subscriber_queue(name: str) -> Queue:
    """A durable subscriber's queue.

    Its own dead-lettering is only a safety net, for an event whose handler kills the process a
    hundred times; events that a handler fails on are moved by this library, with the reason.
    """
    return Queue(
        name,
        {
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": dead_letter_name(name),
            "x-delivery-limit": 100,
            **_CONFIRMED_DEAD_LETTERING,
        },
    )


def classic_queue(name: str, dead_letter: bool) -> Queue:
    """The queue that domain-event-broker declares, and any that it has declared before."""
    arguments = {"x-dead-letter-exchange": f"{name}-dlx"} if dead_letter else {}
    return Queue(name, arguments, adopt_existing=True)


def temporary_queue(
    name: str, *, exclusive: bool, auto_delete: bool, adopt_existing: bool = False
) -> Queue:
    """The queue of a subscriber whose events need not be kept while it is away.

    Never a transient queue that is not exclusive: RabbitMQ 4.3 may refuse these (the deprecated
    feature transient_nonexcl_queues) and close the connection. One that is neither exclusive nor
    deleted with its consumer outlives a restart of the broker, and expires a minute after it was
    last used.
    """
    # Explicit, since the vhost's default may be quorum.
    arguments: dict[str, object] = {"x-queue-type": "classic"}
    if not exclusive and not auto_delete:
        arguments["x-expires"] = 60_000
    return Queue(
        name,
        arguments,
        durable=not exclusive,
        exclusive=exclusive,
        auto_delete=auto_delete,
        adopt_existing=adopt_existing,
    )


def dead_letter_queue(name: str, *, classic: bool = False) -> Queue:
    """The dead letters of subscriber ``name``; no TTL: they wait for an operator."""
    if classic:
        return Queue(dead_letter_name(name), adopt_existing=True)
    return _quorum_queue(dead_letter_name(name))


def needed(queue: broker.Queue) -> list[Declaration]:
    """All that must exist on the broker for a subscriber.

    For one that declares nothing: its exchanges and queues. Whether a binding exists cannot be seen
    over AMQP.
    """
    if queue.must_exist:
        declared = needed(replace(queue, must_exist=False))
        found = [each for each in declared if isinstance(each, Exchange | Queue)]
        # Its own queue before the others, whose absence says less.
        found.sort(key=lambda each: each.name != queue.name)
        return [replace(each, must_exist=True) for each in found]
    name, exchange = queue.name, queue.exchange.name
    topology: list[Declaration] = [Exchange(exchange, queue.exchange.type)]
    if queue.dead_letters:
        topology.append(dead_letter_queue(name, classic=queue.classic))
    if queue.is_temporary:
        topology.append(
            temporary_queue(
                name,
                exclusive=queue.exclusive,
                auto_delete=queue.auto_delete,
                adopt_existing=queue.classic,
            )
        )
    elif queue.classic:
        topology.append(classic_queue(name, queue.dead_letters))
    else:
        topology.append(subscriber_queue(name))
    topology += [Binding(exchange, name, key) for key in queue.binding_keys]
    topology += [Unbinding(exchange, name, key) for key in queue.retired_keys]
    if queue.delays:
        topology += [*delays(exchange), way_back(exchange, name)]
    return topology


def registered(name: str, *, strict: bool) -> Iterator[Queue]:
    """The queues of a subscriber that may retry, whatever its options.

    :param strict: only those with arguments that no other program's would have by chance.
    """
    yield subscriber_queue(name)
    yield replace(classic_queue(name, True), adopt_existing=False)
    if not strict:
        yield replace(classic_queue(name, False), adopt_existing=False)
        yield temporary_queue(name, exclusive=False, auto_delete=False)
        yield temporary_queue(name, exclusive=False, auto_delete=True)


def all_of(names: Sequence[str], exchange: str) -> list[Declaration]:
    """All that was ever declared for these subscribers and this exchange, to be deleted."""
    queues = [Queue(each) for name in names for each in (name, dead_letter_name(name))]
    return [Exchange(exchange), *queues, *delays(exchange)]


def queue_of(place: Place) -> str:
    """The queue that holds the messages of a place."""
    if isinstance(place, ToSubscriber):
        return place.name
    if isinstance(place, ToDeadLetters):
        return dead_letter_name(place.name)
    return undelivered_name(place.exchange)


def walk_marker(place: Place) -> Queue:
    """An exclusive queue that exists while a connection walks over the place."""
    return temporary_queue(f"{queue_of(place)}.walk", exclusive=True, auto_delete=False)


def address(destination: Destination, routing_key: str) -> tuple[str, str]:
    """The exchange and the routing key to publish a message with.

    :param routing_key: the event's own.
    """
    if isinstance(destination, ToExchange):
        return destination.exchange, routing_key
    if isinstance(destination, Later):
        return delay_address(destination.exchange, destination.name, destination.seconds)
    return "", queue_of(destination)


def delays(exchange: str) -> list[Declaration]:
    """All that delayed retries on ``exchange`` need, apart from each subscriber's `way_back`."""
    undelivered = undelivered_name(exchange)
    alternate = {"alternate-exchange": undelivered}
    due = Exchange(due_name(exchange), arguments=alternate, strict=True, shared=True)
    topology: list[Declaration] = [
        Exchange(undelivered, "fanout", strict=True, shared=True),
        replace(_quorum_queue(undelivered), shared=True),
        Binding(undelivered, undelivered, "", shared=True),
        due,
    ]
    following = due.name
    for level in range(LEVELS):
        name = _level(exchange, level)
        # In a key, the bit of this level comes after those of all higher levels.
        higher_bits = "*." * (LEVELS - 1 - level)
        topology += [
            Exchange(name, strict=True, shared=True),
            Queue(
                name,
                {
                    "x-queue-type": "quorum",
                    "x-message-ttl": round(SHORTEST_DELAY * 1000) << level,
                    "x-dead-letter-exchange": following,
                    "x-delivery-limit": _AS_GOOD_AS_UNLIMITED,
                    **_CONFIRMED_DEAD_LETTERING,
                },
                shared=True,
            ),
            Binding(name, name, f"{higher_bits}1.#", shared=True),
            Binding(name, following, f"{higher_bits}0.#", to_exchange=True, shared=True),
        ]
        following = name
    return topology


def is_shared(declaration: Declaration) -> bool:
    """Whether it is one of `delays`, which all subscribers of an exchange have in common.

    Their names are reserved: no subscriber and no exchange of a user's can have one of them.
    """
    return not isinstance(declaration, Unbinding) and declaration.shared


def must_exist(declaration: Declaration) -> bool:
    """Whether it is not declared, but only looked for."""
    return isinstance(declaration, Exchange | Queue) and declaration.must_exist


def way_back(exchange: str, name: str) -> Binding:
    """The binding by which a retry that is due returns to the queue ``name``."""
    return Binding(due_name(exchange), name, "*." * LEVELS + name)


@dataclass(frozen=True)
class Moving:
    """What exists while an operator moves a subscriber's queue; see `domain_events.cli.moving`.

    The fanout exchanges carry the messages to where they are moved: through them each keeps its
    routing key, and does not seem to be one that this library forwarded.
    """

    #: The subscriber whose queue is moved.
    name: str

    @property
    def waiting(self) -> Queue:
        """Holds what is published meanwhile."""
        return self._holding("new")

    @property
    def drained(self) -> Queue:
        """Holds what was in the queue before."""
        return self._holding("old")

    @property
    def dead_letters(self) -> Queue:
        """Holds the dead letters."""
        return self._holding("dl")

    @property
    def lock(self) -> Queue:
        """Exists as long as the connection that moves it."""
        return temporary_queue(f"{self.name}.migrate.lock", exclusive=True, auto_delete=False)

    @property
    def to_drained(self) -> Exchange:
        """The exchange to the queue `drained`."""
        return Exchange(f"{self.name}.migrate.old", "fanout", strict=True)

    @property
    def to_new(self) -> Exchange:
        """The exchange to the new queue."""
        return Exchange(f"{self.name}.migrate", "fanout", strict=True)

    @property
    def to_held_dead_letters(self) -> Exchange:
        """The exchange to the queue `dead_letters`."""
        return Exchange(f"{self.name}.migrate.dl", "fanout", strict=True)

    @property
    def to_dead_letters(self) -> Exchange:
        """The exchange to the new dead-letter queue."""
        return Exchange(f"{self.name}.migrate.dlx", "fanout", strict=True)

    def _holding(self, what: str) -> Queue:
        queue = _quorum_queue(f"{self.name}.migrate.{what}")
        # A policy's length limit must not make it drop the oldest.
        return replace(queue, arguments={**queue.arguments, "x-overflow": "reject-publish"})


def old_broker_names(name: str) -> tuple[str, str]:
    """domain-event-broker's exchanges of a subscriber: of its retries, and of its dead letters."""
    return f"{name}-retry", f"{name}-dlx"


def known_classic(name: str) -> Iterator[Queue]:
    """The classic queues of a subscriber, as domain-event-broker and this library declare them.

    With their type, since the vhost's default may be another one.
    """
    for dead_letter in (True, False):
        queue = replace(classic_queue(name, dead_letter), adopt_existing=False)
        yield replace(queue, arguments={"x-queue-type": "classic", **queue.arguments})


def classic_dead_letters(name: str) -> Queue:
    """The same for its dead letters."""
    return Queue(dead_letter_name(name), {"x-queue-type": "classic"})


def delay_address(exchange: str, name: str, delay: float) -> tuple[str, str]:
    """The exchange and the routing key that bring a message to ``name`` after ``delay`` seconds.

    The delay is rounded up to whole tenths of a second; it starts at the level of its highest bit.
    """
    units = units_of(delay)
    if units >> LEVELS:
        raise ValueError(f"A delay of {delay} s is longer than the delay levels reach.")
    bits = ".".join(f"{units:0{LEVELS}b}")
    return _level(exchange, units.bit_length() - 1), f"{bits}.{name}"


def subscriber_of(address: str) -> str | None:
    """The subscriber in an address of `delay_address`; None if it is not such an address."""
    *bits, name = address.split(".", LEVELS)
    if len(bits) < LEVELS or not name or not set(bits) <= {"0", "1"}:
        return None
    try:
        return usable_name(name, "subscriber")
    except ConfigurationError:
        return None


@lru_cache(maxsize=256)
def return_exchanges(exchange: str) -> frozenset[str]:
    """The exchanges through which this library forwards events of ``exchange``.

    Retries return through ``<exchange>.due``, or from the queue of the last level that they waited
    in through the next level's exchange; replays through the default one. Exactly these: anybody
    may declare an exchange with a similar name.
    """
    levels = (_level(exchange, level) for level in range(LEVELS))
    return frozenset(("", due_name(exchange), *levels))


def due_name(exchange: str) -> str:
    """The exchange from which retries that are due return to their subscribers."""
    return f"{exchange}.due"


def _level(exchange: str, level: int) -> str:
    return f"{exchange}.delay.{level:02}"


def _quorum_queue(name: str) -> Queue:
    return Queue(name, {"x-queue-type": "quorum", "x-delivery-limit": _AS_GOOD_AS_UNLIMITED})
