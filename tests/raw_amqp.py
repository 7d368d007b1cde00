"""AMQP properties and header tables byte by byte, including some that no client would write.

The value of a header is a pair: its type, a letter defined by AMQP and RabbitMQ
(https://www.rabbitmq.com/amqp-0-9-1-errata#section_3), and its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pika


class Value(NamedTuple):
    """A header's value."""

    kind: bytes
    data: bytes

    def encoded(self) -> bytes:
        return self.kind + self.data


#: Numbers of a fixed size, and their formats for `struct`.
NUMBERS = {
    b"t": ">?",
    b"b": ">b",
    b"B": ">B",
    b"s": ">h",
    b"u": ">H",
    b"I": ">i",
    b"i": ">I",
    b"l": ">q",
    b"f": ">f",
    b"d": ">d",
    b"T": ">Q",
}

VOID = Value(b"V", b"")


def number(kind: bytes, value: float) -> Value:
    """A number, a bool or a timestamp."""
    return Value(kind, struct.pack(NUMBERS[kind], value))


def decimal(places: int, digits: int) -> Value:
    """digits / 10 ** places"""
    return Value(b"D", struct.pack(">BI", places, digits))


def text(value: str | bytes, kind: bytes = b"S") -> Value:
    """A long string, or bytes with the kind ``x``; it need not be UTF-8."""
    data = value.encode() if isinstance(value, str) else value
    return Value(kind, struct.pack(">I", len(data)) + data)


def array(values: Iterable[Value]) -> Value:
    data = b"".join(value.encoded() for value in values)
    return Value(b"A", struct.pack(">I", len(data)) + data)


def table(entries: Mapping[bytes, Value]) -> Value:
    data = b"".join(short(name) + value.encoded() for name, value in entries.items())
    return Value(b"F", struct.pack(">I", len(data)) + data)


def nested(depth: int) -> Value:
    """Arrays within arrays, to this depth; two levels take ten bytes."""
    # Not through `array`, which would copy the inside at each level.
    sizes = (struct.pack(">cI", b"A", 5 * inner) for inner in range(depth - 1, -1, -1))
    return Value(b"A", b"".join(sizes)[1:])


def short(value: bytes) -> bytes:
    """A short string: names, and most properties."""
    return bytes([len(value)]) + value


# In their order in a frame, with the numbers of their flags.
_PROPERTIES = {
    "content_type": 15,
    "content_encoding": 14,
    "headers": 13,
    "delivery_mode": 12,
    "priority": 11,
    "correlation_id": 10,
    "reply_to": 9,
    "expiration": 8,
    "message_id": 7,
    "timestamp": 6,
    "type": 5,
    "user_id": 4,
    "app_id": 3,
    "cluster_id": 2,
}
_FIXED = {"delivery_mode": ">B", "priority": ">B", "timestamp": ">Q"}


class Properties(pika.BasicProperties):
    """Properties as given, for `pyamqp` and pika; short strings need not be UTF-8."""

    def __init__(
        self, headers: Mapping[bytes, Value] | None = None, **others: bytes | int | None
    ) -> None:
        super().__init__()
        given: dict[str, object] = {"headers": headers, **others}
        flags = 0
        data = b""
        for name, bit in _PROPERTIES.items():
            value = given.pop(name, None)
            if value is None:
                continue
            flags |= 1 << bit
            if isinstance(value, Mapping):
                data += table(value).data
            elif isinstance(value, bytes):
                data += short(value)
            else:
                data += struct.pack(_FIXED[name], value)
        assert not given, f"unknown properties: {given}"
        self.data = struct.pack(">H", flags) + data

    def encode(self) -> list[bytes]:
        return [self.data]
