"""Names, queues and bindings as data, and how a topic exchange reads keys: topology.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import onlooker
import pyamqp
import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from pyamqp import Channel
from support import DELAY_LEVELS, Names

from domain_events import ConfigurationError
from domain_events.retry import LONGEST_DELAY
from domain_events.topology import (
    LEVELS,
    Binding,
    Exchange,
    Queue,
    bindings,
    check_name,
    classic_queue,
    dead_letter_name,
    dead_letter_queue,
    delay_address,
    delays,
    has_wildcards,
    matches,
    subscriber_queue,
    temporary_queue,
    way_back,
)

# Machines that are shared are slow at times.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# ------------------------------------------------------------------ matches, as the broker does


@contextmanager
def channel_to(url: str) -> Iterator[Channel]:
    with onlooker.channel(url) as channel:
        channel.confirm_delivery()
        yield channel


def routed(
    channel: Channel,
    exchange: str,
    binding_keys: Sequence[str],
    routing_keys: Sequence[str],
) -> set[tuple[str, str]]:
    """The pairs of a binding key and a routing key that the broker's topic exchange matches."""
    queues = {}
    for binding_key in binding_keys:
        queue = channel.queue_declare("", exclusive=True).queue
        channel.queue_bind(queue, exchange, binding_key)
        queues[queue] = binding_key
    for number, routing_key in enumerate(routing_keys):
        channel.basic_publish(exchange, routing_key, str(number).encode())
    found = set()
    for queue, binding_key in queues.items():
        while (received := channel.basic_get(queue, auto_ack=True)) is not None:
            found.add((binding_key, routing_keys[int(received.body)]))
        channel.queue_delete(queue)
    return found


def most_hashes(channel: Channel, exchange: str) -> int:
    """How many ``#`` the broker takes in one binding key: two, from RabbitMQ 4.3 on."""
    attempt = channel.connection.channel()
    queue = attempt.queue_declare("", exclusive=True).queue
    try:
        attempt.queue_bind(queue, exchange, "#.#.#")
    except pyamqp.PreconditionFailed:
        return 2
    attempt.close()
    return 100


def matched(binding_keys: Iterable[str], routing_keys: Iterable[str]) -> set[tuple[str, str]]:
    return {
        pair for pair in itertools.product(binding_keys, routing_keys) if matches.__wrapped__(*pair)
    }


def keys_of(words: Sequence[str], most: int) -> list[str]:
    return sorted(
        {
            ".".join(key)
            for length in range(most + 1)
            for key in itertools.product(words, repeat=length)
        }
    )


def test_all_short_keys_match_as_on_the_broker(broker_url: str, names: Names) -> None:
    """All binding keys of up to three words against routing keys of up to three."""
    exchange = names.exchange()
    binding_keys = keys_of(["a", "*", "#", ""], 3)
    routing_keys = keys_of(["a", "b", ""], 3)
    assert len(binding_keys) * len(routing_keys) > 3000
    with channel_to(broker_url) as channel:
        channel.exchange_declare(exchange, "topic")
        most = most_hashes(channel, exchange)
        binding_keys = [key for key in binding_keys if key.count("#") <= most]
        found = routed(channel, exchange, binding_keys, routing_keys)
    assert found
    assert matched(binding_keys, routing_keys) == found


def keys(words: Sequence[str], most: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words), max_size=most).map(".".join)


def test_keys_match_as_on_the_broker(broker_url: str, names: Names) -> None:
    """Longer keys, several wildcards, wildcards in words and in routing keys."""
    exchange = names.exchange()
    pairs = 0

    with channel_to(broker_url) as channel:
        channel.exchange_declare(exchange, "topic")
        most = most_hashes(channel, exchange)

        @settings(
            max_examples=12,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.large_base_example, HealthCheck.too_slow],
            # Each example takes a broker's time; the pair that differs is shown by the assertion.
            phases=[Phase.generate],
        )
        @given(
            st.lists(keys(["a", "b", "*", "#", "#", ""], 7), min_size=6, max_size=12, unique=True),
            st.lists(keys(["a", "b", "", "*", "#"], 7), min_size=6, max_size=12, unique=True),
            st.lists(keys(["aa", "a*", "#a", "ü", "*", "#"], 4), max_size=4, unique=True),
        )
        def check(binding_keys: list[str], routing_keys: list[str], more: list[str]) -> None:
            nonlocal pairs
            binding_keys = sorted(
                key for key in {*binding_keys, *more} if key.split(".").count("#") <= most
            )
            routing_keys = sorted({*routing_keys, *more})
            pairs += len(binding_keys) * len(routing_keys)
            assert matched(binding_keys, routing_keys) == routed(
                channel, exchange, binding_keys, routing_keys
            )

        check()
    assert pairs > 300


@patient
@given(
    st.lists(st.sampled_from(["a", "b", "*", "#", ""]), max_size=6).map(".".join),
    st.lists(st.sampled_from(["a", "b", ""]), max_size=6).map(".".join),
)
def test_remembered_answers_are_the_answers(binding_key: str, routing_key: str) -> None:
    """`matches` keeps what it has answered; nothing else changes by that."""
    assert matches(binding_key, routing_key) == matches.__wrapped__(binding_key, routing_key)
    assert matches(binding_key, routing_key) == matches.__wrapped__(binding_key, routing_key)


@pytest.mark.parametrize(
    ("binding_key", "routing_key", "answer"),
    [
        ("user.*", "user.registered", True),
        ("user.*", "user", False),
        ("user.*", "user.name.changed", False),
        ("user.#", "user", True),
        ("user.#", "user.name.changed", True),
        ("#", "", True),
        ("*", "", False),
        ("#.changed", "user.name.changed", True),
        ("user.registered", "user.registered", True),
        ("user.registered", "user.renamed", False),
    ],
)
def test_the_examples_of_the_manual(binding_key: str, routing_key: str, answer: bool) -> None:
    """``*`` is one word, ``#`` any number of them."""
    assert matches(binding_key, routing_key) is answer


def test_many_wildcards_take_no_time() -> None:
    """No key can stall a subscriber: the work grows with words, not with ways to match."""
    assert not matches(".".join(["#.a"] * 60), ".".join(["a"] * 120) + ".b")
    assert matches(".".join(["#.a"] * 60), ".".join(["a"] * 120))


def test_only_a_whole_word_is_a_wildcard() -> None:
    """``a*`` is a word like others."""
    assert has_wildcards("a.*")
    assert has_wildcards("#")
    assert has_wildcards("*.a.b")
    assert not has_wildcards("a*.#b.c**")
    assert not has_wildcards("")


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
    assert classic_queue("mail", dead_letter=False) == Queue("mail", {}, as_found=True)
    assert classic_queue("mail", dead_letter=True) == Queue(
        "mail", {"x-dead-letter-exchange": "mail-dlx"}, as_found=True
    )
    assert dead_letter_queue("mail", classic=True) == Queue("mail-dl", {}, as_found=True)


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
    with channel_to(broker_url) as channel:
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


def test_every_binding_key_is_bound() -> None:
    """In their order, from the exchange to the queue."""
    assert bindings("x", "mail", ["user.*", "order.#"]) == [
        Binding("x", "mail", "user.*"),
        Binding("x", "mail", "order.#"),
    ]


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    ["a", "print-user-event", "shop.mail", "ü", "a*", "#1", "x" * 207, "ü" * 103, "amq", "a b/c"],
)
def test_a_name_is_taken_as_it_is(name: str) -> None:
    """Any text that the broker can carry with what belongs to it."""
    assert check_name(name, "subscriber") == name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "needs a name"),
        (None, "needs a name"),
        (7, "needs a name"),
        (b"a", "needs a name"),
        ("x" * 208, "longer than 207 bytes"),
        ("ü" * 104, "longer than 207 bytes"),
        ("amq.a", "belong to the broker"),
        ("*", "wildcard"),
        ("a.#", "wildcard"),
        ("\ud800", "Unicode"),
        (" ", "space"),
        ("mail ", "space"),
        ("a\nb", "control character"),
    ],
)
def test_a_name_that_cannot_work_is_refused(name: Any, words: str) -> None:
    """At once, in words, and naming whose name it is."""
    with pytest.raises(ConfigurationError, match=f"The subscriber.*{words}"):
        check_name(name, "subscriber")


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
