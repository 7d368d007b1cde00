"""Names and keys, and which routing keys a binding key matches: domain_events/names.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onlooker
import pyamqp
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyamqp import Channel
from support import Names

from domain_events import ConfigurationError
from domain_events.names import check_name, fits, has_wildcards, matches

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
        ("amq.a", "names are reserved"),
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


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", True),
        ("x" * 255, True),
        ("x" * 256, False),
        ("ü" * 127, True),
        ("ü" * 128, False),
        ("\ud800", False),
        (b"a", False),
        (None, False),
        (7, False),
    ],
)
def test_what_amqp_carries_as_a_short_string(text: object, answer: bool) -> None:
    """Valid Unicode of at most 255 bytes."""
    assert fits(text) is answer
