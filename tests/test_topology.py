"""Exchanges, queues and bindings as data: domain_events/broker/rabbitmq/topology.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal

import onlooker
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support import DELAY_LEVELS, Names

from domain_events import ConfigurationError, broker
from domain_events.broker.rabbitmq.topology import (
    LEVELS,
    Binding,
    Exchange,
    Queue,
    Unbinding,
    address,
    all_of,
    classic_queue,
    dead_letter_name,
    dead_letter_queue,
    delay_address,
    delays,
    needed,
    queue_of,
    registered,
    return_exchanges,
    subscriber_of,
    subscriber_queue,
    temporary_queue,
    walk_marker,
    way_back,
)
from domain_events.message import Later, ToDeadLetters, ToExchange, ToSubscriber, UndeliveredOf
from domain_events.names import check_name, matches
from domain_events.retry import LONGEST_DELAY

# Machines that are shared are slow at times.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# ------------------------------------------------------------------ delays


class World:
    """A broker of data: what `delays` and `way_back` declare, and how a message moves in it."""

    def __init__(self, exchange: str, subscribers: Iterable[str]) -> None:
        self.exchanges: dict[str, Exchange] = {}
        self.queues: dict[str, Queue] = {}
        self.bindings: list[Binding] = []
        for declaration in [*delays(exchange), *(way_back(exchange, name) for name in subscribers)]:
            if isinstance(declaration, Exchange):
                self.exchanges[declaration.name] = declaration
            elif isinstance(declaration, Queue):
                self.queues[declaration.name] = declaration
            elif isinstance(declaration, Binding):
                assert declaration.exchange in self.exchanges, "bound before it is declared"
                self.bindings.append(declaration)

    def route(self, exchange: str, key: str) -> list[str]:
        """The queues that a message reaches from an exchange."""
        kind = self.exchanges[exchange]
        reached = []
        for binding in self.bindings:
            if binding.exchange != exchange:
                continue
            if kind.type != "fanout" and not matches(binding.binding_key, key):
                continue
            if binding.to_exchange:
                reached += self.route(binding.destination, key)
            else:
                reached.append(binding.destination)
        alternate = kind.arguments.get("alternate-exchange")
        if not reached and alternate is not None:
            return self.route(str(alternate), key)
        return reached

    def walk(self, exchange: str, key: str) -> tuple[list[str], int]:
        """Where a message comes to rest, and how many milliseconds it waited on its way."""
        waited = 0
        for _ in range(LEVELS + 1):
            reached = self.route(exchange, key)
            if len(reached) != 1 or "x-message-ttl" not in self.queue(reached[0]).arguments:
                return reached, waited
            arguments = self.queue(reached[0]).arguments
            waited += int(str(arguments["x-message-ttl"]))
            exchange = str(arguments["x-dead-letter-exchange"])
        raise AssertionError("it goes in circles")

    def queue(self, name: str) -> Queue:
        return self.queues.get(name, Queue(name))


# Names that end or begin as others do, that look like bits, and that have empty words.
NAMES = ["a", "b.a", "a.b", "b", "0.a", "1.0.a", "a-b", ".a", "a.", "..", "y.delay.00", "mail"]
WORLD = World("x", NAMES)


def tenths(delay: float | Decimal) -> int:
    return max(1, math.ceil(Decimal(delay) * 10))


@patient
@given(st.integers(0, 2**24 - 1), st.sampled_from(NAMES))
@example(2**24 - 1, "a")
@example(0, "a")
@example(1, "b.a")
@example(0b101, "0.a")
def test_a_delay_of_whole_tenths_is_kept_exactly(units: int, name: str) -> None:
    """The event is back at its subscriber, and at no other, after just this time."""
    reached, waited = WORLD.walk(*delay_address("x", name, units / 10))
    assert reached == [name]
    assert waited == max(1, units) * 100


@patient
@given(st.decimals(0, 1677721, places=3), st.sampled_from(NAMES))
def test_a_delay_is_rounded_up(delay: Decimal, name: str) -> None:
    """To the next tenth of a second: a retry must not come early."""
    reached, waited = WORLD.walk(*delay_address("x", name, float(delay)))
    assert reached == [name]
    assert waited == tenths(delay) * 100


@patient
@given(st.floats(0, LONGEST_DELAY))
@example(LONGEST_DELAY)
@example(0.3)
@example(1e-300)
def test_no_delay_is_cut_short(delay: float) -> None:
    """Never early by more than a float's error, never late by more than a tenth."""
    reached, waited = WORLD.walk(*delay_address("x", "a", delay))
    assert reached == ["a"]
    assert delay - 1e-6 <= waited / 1000 < max(delay, 0.0) + 0.1 + 1e-6


def test_a_short_delay_waits_in_the_lowest_levels_only() -> None:
    """It starts at its highest bit: the levels above have nothing to add."""
    assert delay_address("x", "a", 0.1) == ("x.delay.00", "0." * 23 + "1.a")
    assert delay_address("x", "a", 0.5) == ("x.delay.02", "0." * 21 + "1.0.1.a")
    assert delay_address("x", "a", LONGEST_DELAY) == ("x.delay.23", "1." * 24 + "a")


def test_a_delay_that_was_computed_is_not_a_tenth_longer() -> None:
    """0.1 + 0.2 is a little more than 0.3 in binary; the user means 0.3."""
    assert WORLD.walk(*delay_address("x", "a", 0.1 + 0.2)) == (["a"], 300)
    assert WORLD.walk(*delay_address("x", "a", sum([0.1] * 8))) == (["a"], 800)
    assert WORLD.walk(*delay_address("x", "a", 1.1 * 3)) == (["a"], 3300)


def test_a_delay_that_is_too_long_is_refused() -> None:
    """And not wrapped round to a short one."""
    with pytest.raises(ValueError, match="longer than the delay levels reach"):
        delay_address("x", "a", LONGEST_DELAY + 0.1)


@patient
@given(st.integers(0, 2**24 - 1), st.text("ab01.", min_size=1, max_size=4))
def test_a_retry_whose_queue_is_gone_is_kept(units: int, name: str) -> None:
    """In ``<exchange>.undelivered``: it must not block the retries of others."""
    assume(name not in NAMES)
    reached, waited = WORLD.walk(*delay_address("x", name, units / 10))
    assert reached == ["x.undelivered"]
    assert waited == max(1, units) * 100


def test_every_level_keeps_its_events_safely() -> None:
    """Quorum, at least once, reject-publish: all three, or an expiry can lose an event."""
    levels = [queue for queue in WORLD.queues.values() if ".delay." in queue.name]
    assert [queue.name for queue in levels] == [f"x.delay.{level:02}" for level in range(24)]
    for level, queue in enumerate(levels):
        assert queue.durable
        assert queue.arguments == {
            "x-queue-type": "quorum",
            "x-message-ttl": 100 * 2**level,
            "x-dead-letter-exchange": f"x.delay.{level - 1:02}" if level else "x.due",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
            "x-delivery-limit": 10**9,
        }


def test_all_names_of_an_exchange_start_with_its_name() -> None:
    """Two exchanges on one broker share nothing; the helper that cleans up knows them all."""
    assert {*WORLD.queues} == {"x.undelivered", *(f"x.delay.{n:02}" for n in range(DELAY_LEVELS))}
    assert {*WORLD.exchanges} == {*WORLD.queues, "x.due"}
    assert LEVELS == DELAY_LEVELS
    assert WORLD.queues["x.undelivered"].arguments == {
        "x-queue-type": "quorum",
        "x-delivery-limit": 10**9,
    }


# ------------------------------------------------------------------ queues


def test_a_subscribers_queue_never_changes() -> None:
    """These are on brokers everywhere: another argument would be a 406 for each of them."""
    assert subscriber_queue("mail") == Queue(
        "mail",
        {
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": "mail-dl",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
            "x-delivery-limit": 100,
        },
    )
    assert dead_letter_queue("mail") == Queue(
        "mail-dl", {"x-queue-type": "quorum", "x-delivery-limit": 10**9}
    )


def test_a_classic_queue_is_that_of_domain_event_broker() -> None:
    """With its arguments where it is new; one that exists is taken as it is found."""
    assert classic_queue("mail", dead_letter=False) == Queue("mail", {}, adopt_existing=True)
    assert classic_queue("mail", dead_letter=True) == Queue(
        "mail", {"x-dead-letter-exchange": "mail-dlx"}, adopt_existing=True
    )
    assert dead_letter_queue("mail", classic=True) == Queue("mail-dl", {}, adopt_existing=True)


def test_no_temporary_queue_is_both_transient_and_shared() -> None:
    """RabbitMQ 4.3 may refuse these and close the connection; nor does one live for ever."""
    for exclusive, auto_delete in itertools.product([False, True], repeat=2):
        queue = temporary_queue("q", exclusive=exclusive, auto_delete=auto_delete)
        assert queue.durable or queue.exclusive
        assert queue.exclusive == exclusive
        assert queue.auto_delete == auto_delete
        assert queue.exclusive or queue.auto_delete or "x-expires" in queue.arguments


def test_a_temporary_queue_can_be_declared(broker_url: str, names: Names) -> None:
    """All three kinds, on whatever release the broker is."""
    with onlooker.channel(broker_url) as channel:
        for exclusive, auto_delete in itertools.product([False, True], repeat=2):
            queue = temporary_queue(
                names.queue(f"{exclusive}-{auto_delete}"),
                exclusive=exclusive,
                auto_delete=auto_delete,
            )
            declared = channel.queue_declare(
                queue.name,
                durable=queue.durable,
                exclusive=queue.exclusive,
                auto_delete=queue.auto_delete,
                arguments=dict(queue.arguments),
            )
            assert declared.queue == queue.name
            # Here: an exclusive one is locked for others until its connection is quite gone.
            channel.queue_delete(queue.name)


# ------------------------------------------------------------------ what a subscriber needs

X = broker.Exchange("x")


def test_a_subscriber_needs_its_exchange_its_queues_and_their_bindings() -> None:
    """In an order in which each can be declared: dead letters before the queue that has them."""
    queue = broker.Queue("mail", X, ("user.*", "order.#"), dead_letters=True)
    assert needed(queue) == [
        Exchange("x"),
        dead_letter_queue("mail"),
        subscriber_queue("mail"),
        Binding("x", "mail", "user.*"),
        Binding("x", "mail", "order.#"),
    ]


def test_retired_keys_are_unbound() -> None:
    """After the binding keys, so that a key which both match is bound all the time."""
    queue = broker.Queue("mail", X, ("user.#",), ("user.*", "order.*"))
    assert needed(queue)[-3:] == [
        Binding("x", "mail", "user.#"),
        Unbinding("x", "mail", "user.*"),
        Unbinding("x", "mail", "order.*"),
    ]


def test_delays_are_declared_where_events_come_back() -> None:
    """All levels, and the subscriber's own way back from them."""
    with_delays = needed(broker.Queue("mail", X, ("#",), delays=True))
    without = needed(broker.Queue("mail", X, ("#",)))
    assert with_delays == [*without, *delays("x"), way_back("x", "mail")]
    assert not [each for each in without if isinstance(each, Queue) and "delay" in each.name]


def test_the_exchange_has_the_type_asked_for() -> None:
    """And the delay levels their own, whatever it is."""
    queue = broker.Queue("mail", broker.Exchange("x", "fanout"), ("#",), delays=True)
    exchanges = [each for each in needed(queue) if isinstance(each, Exchange)]
    assert exchanges[0] == Exchange("x", "fanout")
    assert exchanges[1:] == [each for each in delays("x") if isinstance(each, Exchange)]


@pytest.mark.parametrize("classic", [False, True])
@pytest.mark.parametrize("dead_letters", [False, True])
def test_the_queue_is_of_the_kind_asked_for(classic: bool, dead_letters: bool) -> None:
    """Quorum, classic as it is found, or temporary; each beside the dead letters that fit it."""
    found = needed(broker.Queue("q", X, ("#",), classic=classic, dead_letters=dead_letters))
    own = classic_queue("q", dead_letters) if classic else subscriber_queue("q")
    beside = [dead_letter_queue("q", classic=classic)] if dead_letters else []
    assert [each for each in found if isinstance(each, Queue)] == [*beside, own]


@pytest.mark.parametrize("classic", [False, True])
@pytest.mark.parametrize(
    ("durable", "exclusive", "auto_delete"),
    [(False, False, False), (True, True, False), (True, False, True), (False, True, True)],
)
def test_what_goes_with_its_subscriber_is_temporary(
    durable: bool, exclusive: bool, auto_delete: bool, classic: bool
) -> None:
    """Whichever of the three options says so; a classic one is taken as it is found."""
    wanted = broker.Queue(
        "q",
        X,
        ("#",),
        durable=durable,
        exclusive=exclusive,
        auto_delete=auto_delete,
        classic=classic,
    )
    (queue,) = (each for each in needed(wanted) if isinstance(each, Queue))
    assert queue == temporary_queue(
        "q", exclusive=exclusive, auto_delete=auto_delete, adopt_existing=classic
    )
    assert wanted.is_temporary
    assert not wanted.counts_failures


def test_a_registered_queue_is_any_that_a_subscriber_with_retries_declares() -> None:
    """Compared strictly; without a name given, only those that nobody has by chance."""
    strict = list(registered("q", strict=True))
    lenient = list(registered("q", strict=False))
    assert lenient[: len(strict)] == strict
    assert all(len(queue.arguments) >= 1 for queue in strict)
    assert not [queue for queue in lenient if queue.adopt_existing]
    for classic, dead_letters, durable, auto_delete in itertools.product([False, True], repeat=4):
        wanted = broker.Queue(
            "q",
            X,
            ("#",),
            dead_letters=dead_letters,
            durable=durable,
            auto_delete=auto_delete,
            classic=classic,
        )
        (queue,) = (e for e in needed(wanted) if isinstance(e, Queue) and e.name == "q")
        alike = Queue(queue.name, queue.arguments, queue.durable, False, queue.auto_delete)
        assert alike in lenient
        assert (alike in strict) == (durable and not auto_delete and (dead_letters or not classic))


def test_to_delete_a_subscriber_and_its_exchange_leaves_nothing() -> None:
    """Whatever was ever declared for them, by whichever options."""
    deleted = {(type(each), each.name) for each in all_of(["q"], "x") if hasattr(each, "name")}
    for classic, delayed in itertools.product([False, True], repeat=2):
        wanted = broker.Queue("q", X, ("#",), classic=classic, dead_letters=True, delays=delayed)
        declared = {(type(each), each.name) for each in needed(wanted) if hasattr(each, "name")}
        assert declared <= deleted


# ------------------------------------------------------------------ addresses


def test_every_destination_has_its_address() -> None:
    """By the exchange, by the default exchange into a queue, or by the levels of the delay."""
    assert address(ToExchange("x"), "user.registered") == ("x", "user.registered")
    assert address(ToSubscriber("mail"), "user.registered") == ("", "mail")
    assert address(ToDeadLetters("mail"), "user.registered") == ("", "mail-dl")
    assert address(Later("x", "mail", 2.5), "a.b") == delay_address("x", "mail", 2.5)


def test_every_place_has_its_queue_and_the_sign_of_a_walk_over_it() -> None:
    """The sign is exclusive: it is gone with the connection that walks, and others see it."""
    for place, name in (
        (ToSubscriber("mail"), "mail"),
        (ToDeadLetters("mail"), "mail-dl"),
        (UndeliveredOf("x"), "x.undelivered"),
    ):
        assert queue_of(place) == name
        sign = walk_marker(place)
        assert sign.name == f"{name}.walk"
        assert sign.exclusive
        assert not sign.auto_delete  # it has no consumer to go with
        assert sign.arguments == {"x-queue-type": "classic"}


@pytest.mark.parametrize("name", NAMES)
def test_the_address_of_a_retry_names_its_subscriber(name: str) -> None:
    """From whichever level; also where the name looks like a part of it."""
    for delay in (0.1, 0.5, 1.0, LONGEST_DELAY):
        assert subscriber_of(delay_address("x", name, delay)[1]) == name


@pytest.mark.parametrize(
    "forged",
    ["", "a", "0." * 23 + "a", "0." * 24, "0." * 24 + "#", "0." * 23 + "2.a", "0." * 24 + "amq.a"],
)
def test_what_is_not_the_address_of_a_retry_names_nobody(forged: str) -> None:
    """Anybody may publish to the exchange of the undelivered retries."""
    assert subscriber_of(forged) is None


def test_what_returns_comes_through_exchanges_of_this_library_only() -> None:
    """Exactly these, since anybody may make an exchange that has a similar name."""
    levels = {queue.name for queue in WORLD.queues.values() if ".delay." in queue.name}
    assert return_exchanges("x") == {"", "x.due", *levels}


# ------------------------------------------------------------------ names


@patient
@given(st.text(min_size=1, max_size=255), st.text(min_size=1, max_size=255))
@example("x" * 207, "y" * 207)
def test_all_that_is_built_from_a_good_name_can_be_declared(exchange: str, name: str) -> None:
    """No name, binding key or routing key is longer than AMQP carries."""
    try:
        check_name(exchange, "exchange")
        check_name(name, "subscriber")
    except ConfigurationError:
        assume(False)
    texts = [name, dead_letter_name(name), f"{name}-dlx", way_back(exchange, name).binding_key]
    for declaration in delays(exchange):
        if isinstance(declaration, Binding):
            texts += [declaration.exchange, declaration.destination, declaration.binding_key]
        elif isinstance(declaration, Exchange | Queue):
            texts.append(declaration.name)
    texts += delay_address(exchange, name, 0.1)
    assert max(len(text.encode()) for text in texts) <= 255


def test_subscriber_that_declares_nothing_looks_for_what_another_one_declares() -> None:
    """For the same exchanges and queues, its own queue before its dead letters."""
    queue = broker.Queue("q", broker.Exchange("x"), ("a",), ("b",), dead_letters=True, delays=True)
    found = needed(replace(queue, must_exist=True))
    assert all(isinstance(each, Exchange | Queue) and each.must_exist for each in found)
    others = [each for each in needed(queue) if isinstance(each, Exchange | Queue)]
    assert {*map(str, found)} == {str(replace(each, must_exist=True)) for each in others}
    names = [each.name for each in found if isinstance(each, Queue)]
    assert names.index("q") < names.index("q-dl")
