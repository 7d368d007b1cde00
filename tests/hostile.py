"""Messages as nobody should send them, each made from a number, so that it can be made again."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

import raw_amqp as raw

# Names that mean something to us, to RabbitMQ, or to neither.
_HEADERS = (
    b"domain-events-retries",
    b"domain-events-routing-key",
    b"domain-events-cause",
    b"domain-events-subscriber",
    b"domain-events-error-type",
    b"domain-events-traceback",
    b"domain-events-failed-at",
    b"x-death",
    b"x-first-death-reason",
    b"x-first-death-queue",
    b"x-last-death-exchange",
    b"x-delivery-count",
    b"x-acquired-count",
    b"x-match",
    b"traceparent",
    b"",
    b"\xff\xfe",
    b"n" * 255,
)
_STRINGS = (
    b"",
    b"0",
    b"-1",
    b"guest",
    b"\x00\r\n\x1b[2J",
    b"\xff\xfe\xfd",
    "\u00e9\U0001f4a3".encode(),
)
_INTEGERS = (0, 1, 2, 2**7, 2**15, 2**31, 2**63 - 1)
_PLAIN: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2**70,
    "",
    "text",
    "\ud800",
    [],
    ["a"],
    {},
    {"a": {"b": []}},
)


class Hostile(NamedTuple):
    """A message, and what must become of it: ``handled``, ``dead``, or either (``any``)."""

    body: bytes
    routing_key: bytes
    properties: raw.Properties
    fate: str


def message(number: int, name: str) -> Hostile:
    """The message of this number; ``name`` goes into its id, and is found again in its body."""
    chance = random.Random(number)
    envelope = {
        "routing_key": "user.registered",
        "data": {"answer": chance.choice(("return", "return", "retry", "reject"))},
        "domain_object_id": chance.choice((None, 3, "3")),
        "uuid_string": name,
        "timestamp": chance.choice((0, 1.5, -1, 2**40)),
    }
    make = chance.choice((_good, _good, _mutated, _mistyped, _no_envelope, _noise))
    body, fate = make(chance, envelope)
    return Hostile(body, _routing_key(chance), _properties(chance), fate)


def _good(chance: random.Random, envelope: dict[str, Any]) -> tuple[bytes, str]:
    envelope["sixth"] = chance.choice(_PLAIN)
    if chance.random() < 0.2:
        envelope["data"]["more"] = [chance.choice(_PLAIN) for _ in range(20)]
    dead = envelope["data"]["answer"] != "return"
    mark = chance.choice((b"", b"", b"", b"\xef\xbb\xbf"))  # as .NET's encoder writes it
    return mark + json.dumps(envelope).encode(), "dead" if dead else "handled"


def _mutated(chance: random.Random, envelope: dict[str, Any]) -> tuple[bytes, str]:
    """Some bytes changed, or a piece missing: perhaps still an event."""
    body = bytearray(json.dumps(envelope).encode())
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(body))
        body[at : at + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 2))
    return bytes(body), "any"


def _mistyped(chance: random.Random, envelope: dict[str, Any]) -> tuple[bytes, str]:
    """JSON, and of an envelope's form, but for one field."""
    field, values = chance.choice(
        (
            ("routing_key", (None, 1, [], {}, True)),
            ("uuid_string", (1, 1.5, [], {}, False)),
            ("timestamp", ("now", [], {}, True, float("nan"), float("inf"), 10**400)),
        )
    )
    envelope[field] = chance.choice(values)
    if chance.random() < 0.1:
        del envelope["data"]
    return json.dumps(envelope).encode(), "dead"


def _no_envelope(chance: random.Random, envelope: dict[str, Any]) -> tuple[bytes, str]:
    """JSON, or nearly."""
    text = json.dumps(envelope)
    made = chance.choice(
        (
            json.dumps([envelope]).encode(),
            json.dumps(text).encode(),
            text[:-1].encode(),
            f"{text}{text}".encode(),
            text.encode("utf-16"),
            b"[" * chance.choice((10, 10_000)),
            b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
            b"1" * 10_000,
            b"null",
            b"",
        )
    )
    return made, "dead"


def _noise(chance: random.Random, envelope: dict[str, Any]) -> tuple[bytes, str]:
    return b"\xff" + chance.randbytes(chance.choice((0, 10, 1_000))), "dead"


def _routing_key(chance: random.Random) -> bytes:
    return chance.choice(
        (b"user.registered", b"", b".", b"*.#", b"a" * 255, b"\xff" * 255, chance.randbytes(9))
    )


def _properties(chance: random.Random) -> raw.Properties:
    def some(*values: Any) -> Any:
        return chance.choice(values) if chance.random() < 0.3 else None

    names = chance.sample(_HEADERS, chance.choice((0, 1, 2, 5)))
    headers = {name: _value(chance, 3) for name in names}
    if chance.random() < 0.1:
        # The broker takes these as more routing keys, and closes the channel over other types.
        headers[b"CC"] = headers[b"BCC"] = raw.array([raw.text(_string(chance))])
    return raw.Properties(
        headers or None,
        content_type=some(b"application/json", b"text/plain", _string(chance)),
        content_encoding=some(b"gzip", b"utf-16", _string(chance)),
        delivery_mode=some(1, 2),
        priority=some(0, 9, 255),
        correlation_id=some(_string(chance), b"c" * 255),
        reply_to=some(b"amq.direct", _string(chance)),
        # Long enough to be handled before it is over.
        expiration=some(b"86400000", b"4294967295"),
        message_id=some(_string(chance), b"m" * 255),
        timestamp=some(*_INTEGERS, 2**64 - 1),
        type=some(_string(chance)),
        user_id=some(b"guest"),
        app_id=some(_string(chance)),
        cluster_id=some(_string(chance)),
    )


def _string(chance: random.Random) -> bytes:
    return chance.choice(_STRINGS) if chance.random() < 0.5 else chance.randbytes(20)


def _value(chance: random.Random, depth: int) -> raw.Value:
    """A value of any type that RabbitMQ knows; mostly of the wrong one."""
    kind = chance.choice("tbBsuIilfdTDSxAFV" if depth else "tbBsuIilfdTDSxV").encode()
    if kind in raw.NUMBERS:
        if kind == b"t":
            return raw.number(kind, chance.random() < 0.5)
        size = len(raw.number(kind, 0).data)
        if kind in b"fd":
            # Not those that are no number: over them, the broker closes the sender's connection.
            return raw.number(kind, chance.choice((0.0, -1.5, 1e30)))
        return raw.Value(kind, chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size))))
    if kind == b"D":
        return raw.decimal(chance.choice((0, 2, 255)), chance.choice((0, 1, 2**32 - 1)))
    if kind == b"V":
        return raw.VOID
    if kind in b"Sx":
        return raw.text(_string(chance), kind)
    if chance.random() < 0.05:
        return raw.nested(chance.choice((40, 500, 5_000)))
    inside = [_value(chance, depth - 1) for _ in range(chance.randint(0, 3))]
    if kind == b"A":
        return raw.array(inside)
    return raw.table({chance.choice(_HEADERS)[: n + 1]: each for n, each in enumerate(inside)})
