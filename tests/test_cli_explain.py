"""``domain-events explain``: who gets an event, by which binding key, and who nearly does."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from commands import ROOT, run
from hypothesis import given
from hypothesis import strategies as st

from domain_events.cli.routing import Route, distance, matching, nearest
from domain_events.names import matches

EXAMPLES = ROOT / "examples" / "several-handlers"

# ------------------------------------------------------------------ from the code


def test_explanation_names_who_gets_it_by_which_key_and_who_nearly_does() -> None:
    """Offline: no broker is tried, whatever the environment names."""
    done = run(
        "explain",
        "order.placed",
        "orders:subscriber",
        folder=EXAMPLES,
        url="amqp://nobody:secret@host.invalid",
    )
    assert (done.status, done.errors) == (0, "")
    assert (
        done.output
        == """\
3 subscribers get order.placed from the exchange domain-events.

  invoices  order.placed  orders:issue_invoice
  mails     order.*       orders:send_mail
  audit     #             orders:audit; a temporary queue, so only while it runs
"""
    )


def test_nobody_gets_it_is_a_finding_and_says_who_nearly_does(tmp_path: Path) -> None:
    """With status 1: for a check that an event is not published into the void."""
    (tmp_path / "shop.py").write_text(
        """\
from domain_events import Subscriber

def make():
    subscriber = Subscriber()
    subscriber.register(print, 'mails', ['user.registered', 'user.left'], retired_keys=['user.*'])
    subscriber.register(print, 'crm', ['user.registered'])
    subscriber.register(print, 'audit', ['*.registrd.now', 'user'])
    return subscriber

other = Subscriber(exchange='other')
other.register(print, 'others', ['#'])
"""
    )
    done = run("explain", "user.registerd", "shop:make", "shop:other", folder=tmp_path)
    assert (done.status, done.errors) == (1, "")
    assert (
        done.output
        == """\
No subscribers get user.registerd from the exchange domain-events.

Nearly:

  mails   user.*           retired: its events are acked unhandled
  others  #                bound to another exchange, other
  crm     user.registered  perhaps a typo: 'registered' is not 'registerd'
  audit   user             the routing key has one word more: 'registerd'
"""
    )
    records = run(
        "explain", "user.registerd", "shop:make", "--json", folder=tmp_path
    ).output.splitlines()
    assert json.loads(records[1]) == {
        "routing_key": "user.registerd",
        "exchange": "domain-events",
        "subscriber": "crm",
        "gets": False,
        "nearly": "user.registered",
        "reason": "perhaps a typo: 'registered' is not 'registerd'",
        "handler": "builtins:print",
    }


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["user.*", "orders:subscriber"], 2, "'user.*' is a binding key; give the routing key"),
        (["a.b", "orders:missing"], 9, "'orders' has no 'missing'"),
        (["a.b", "missing:subscriber"], 9, "There is no module 'missing'"),
        (["a.b", "orders"], 2, "'orders' does not name a Subscriber"),
        (["a.b", "orders:send_mail"], 9, "cannot be imported"),
        (["a.b"], 2, "bindings cannot be read: the management plugin at http://localhost:15672"),
        (["a.b", "--broker", "memory://"], 2, "Only a RabbitMQ has bindings"),
    ],
)
def test_mistake_is_named_in_one_line_with_the_way_out(
    arguments: list[str], status: int, words: str
) -> None:
    done = run("explain", *arguments, folder=EXAMPLES, url="amqp://localhost:1")
    assert (done.status, done.output) == (status, "")
    assert words in done.errors


def test_odd_routing_key_is_explained_with_a_note(tmp_path: Path) -> None:
    """And shown without its control characters."""
    done = run("explain", "user.\x1b[2Jregistered ", "orders:subscriber", folder=EXAMPLES)
    assert done.errors.startswith("Note: the routing key 'user.\\x1b[2Jregistered '")
    assert "\x1b" not in done.output
    assert "user.\\x1b[2Jregistered" in done.output


def test_hundred_subscribers_with_fifty_keys_each_are_explained_quickly(tmp_path: Path) -> None:
    """Within three seconds more than a single one takes."""
    (tmp_path / "big.py").write_text(
        """\
from domain_events import Subscriber
big, small = Subscriber(), Subscriber()
for n in range(100):
    keys = [f'area{n}.thing{m}.*' for m in range(50)]
    big.register(print, f's{n}', keys)
small.register(print, 'small', ['a'])
"""
    )
    seconds = {}
    for name in ("small", "big"):
        begun = time.monotonic()
        done = run("explain", "area7.thing7.done", f"big:{name}", folder=tmp_path)
        seconds[name] = time.monotonic() - begun
    assert done.status == 0
    assert done.output.splitlines()[2] == "  s7  area7.thing7.*  builtins:print"
    assert seconds["big"] < seconds["small"] + 3


# ------------------------------------------------------------------ the rules


@pytest.mark.parametrize(
    ("key", "routing_key", "reason"),
    [
        ("user.registered", "User.Registered", "upper and lower case differ"),
        ("user.registered", "user_registered", "dots and other separators differ"),
        ("user.registered", "user.registered.", "dots and other separators differ"),
        ("user.*", "user.a.b", "'*' stands for exactly one word; this routing key has 3 words"),
        ("user.*", "user", "'*' stands for exactly one word; this routing key has 1 word"),
        ("user.*.done", "user.import.don", "perhaps a typo: 'done' is not 'don'"),
        ("order.placed", "ordre.placed", "perhaps a typo: 'order' is not 'ordre'"),
        ("user.registered", "user.left", "one word differs: 'registered' is not 'left'"),
        ("user.left.now", "user.left", "the binding key has one word more: 'now'"),
        ("user.left", "user.left.now", "the routing key has one word more: 'now'"),
        ("user.left", "order.placed", None),
        ("left", "placed", None),
        ("user.left.now", "user", None),
    ],
)
def test_reason_why_a_key_does_not_match(key: str, routing_key: str, reason: str | None) -> None:
    found = nearest(Route("q", "x", "topic", (key,)), routing_key, "x")
    assert (found and found.reason) == reason


def test_types_of_exchanges_have_their_own_rules() -> None:
    """A direct exchange has no wildcards, fanout ignores keys, of others it is unknown."""
    keys = ("user.*", "#")
    assert matching(Route("q", "x", "fanout", keys), "a") == keys
    assert matching(Route("q", "x", "direct", keys), "user.left") == ()
    assert matching(Route("q", "x", "headers", keys), "user.left") is None
    found = nearest(Route("q", "x", "direct", keys), "user.left", "x")
    assert found is not None
    assert found.reason == "on a direct exchange '*' and '#' are not wildcards"


words = st.lists(st.sampled_from(["a", "b", "user", "users", "*", "#"]), min_size=1, max_size=4)


@given(words.map(".".join), words.map(lambda found: ".".join(found).translate({42: 99, 35: 100})))
def test_key_matches_or_has_at_most_one_reason(key: str, routing_key: str) -> None:
    """Whoever gets the event is never said to get it nearly."""
    route = Route("q", "x", "topic", (key,))
    assert bool(matching(route, routing_key)) == matches(key, routing_key)
    found = nearest(route, routing_key, "x")
    if matches(key, routing_key):
        return
    assert found is None or found.reason


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_distance_is_that_of_the_simple_definition(one: str, other: str) -> None:
    def simple(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        found = min(
            simple(a[:-1], b) + 1, simple(a, b[:-1]) + 1, simple(a[:-1], b[:-1]) + (a[-1] != b[-1])
        )
        if len(a) > 1 and len(b) > 1 and a[-1] == b[-2] and a[-2] == b[-1]:
            found = min(found, simple(a[:-2], b[:-2]) + 1)
        return found

    expected = simple(one[:4], other[:4])
    assert distance(one[:4], other[:4], 9) == expected
    assert (distance(one[:4], other[:4], 1) <= 1) == (expected <= 1)
