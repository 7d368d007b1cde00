"""A message's properties byte for byte, without what the broker would act upon.

They are not decoded and encoded again: a header that pika reads may be one that it cannot write,
or that it writes as another type. Bytes in, bytes out.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator

from pika.spec import BasicProperties as P

from domain_events.broker.rabbitmq.envelope import BROKER_HEADER_PREFIXES, BROKER_HEADERS

_NAMES = frozenset(name.encode() for name in BROKER_HEADERS)
_PREFIXES = tuple(prefix.encode() for prefix in BROKER_HEADER_PREFIXES)
_COUNTS = _NAMES - {b"x-death"}
_FLAGS = struct.Struct(">H")
_LENGTH = struct.Struct(">I")

# Properties that begin with their length.
_SHORT, _TABLE = -1, -2
# In the order in which AMQP encodes them, with their sizes.
_PROPERTIES = (
    (P.FLAG_CONTENT_TYPE, _SHORT),
    (P.FLAG_CONTENT_ENCODING, _SHORT),
    (P.FLAG_HEADERS, _TABLE),
    (P.FLAG_DELIVERY_MODE, 1),
    (P.FLAG_PRIORITY, 1),
    (P.FLAG_CORRELATION_ID, _SHORT),
    (P.FLAG_REPLY_TO, _SHORT),
    (P.FLAG_EXPIRATION, _SHORT),
    (P.FLAG_MESSAGE_ID, _SHORT),
    (P.FLAG_TIMESTAMP, 8),
    (P.FLAG_TYPE, _SHORT),
    (P.FLAG_USER_ID, _SHORT),
    (P.FLAG_APP_ID, _SHORT),
    (P.FLAG_CLUSTER_ID, _SHORT),
)
# A message must not expire where it is held, and its user is another one than the operator.
_LEFT_OUT = P.FLAG_EXPIRATION | P.FLAG_USER_ID

# Sizes of the values of headers by type; -4 for those that begin with their length.
_SIZES = {
    **dict.fromkeys(b"tbB", 1),
    **dict.fromkeys(b"suU", 2),
    **dict.fromkeys(b"Iif", 4),
    **dict.fromkeys(b"lLdT", 8),
    **dict.fromkeys(b"SxAF", -4),
    b"D"[0]: 5,
    b"V"[0]: 0,
}


def without_broker_headers(properties: bytes, *, keep_deaths: bool = False) -> bytes:
    """These properties, encoded, without what the broker would act upon again.

    :param keep_deaths: keep the broker's record of how it dead-lettered the message. Only for
        a place from which it is not dead-lettered again: the broker drops what goes in a cycle.
    :raises ValueError: they are not properties of AMQP 0-9-1.
    """
    try:
        return _without(properties, _COUNTS if keep_deaths else _NAMES, keep_deaths)
    except (IndexError, KeyError, struct.error) as error:
        raise ValueError("the properties of a message cannot be read") from error


def _without(properties: bytes, names: Collection[bytes], keep_deaths: bool) -> bytes:
    (flags,) = _FLAGS.unpack_from(properties)
    if not flags & (P.FLAG_HEADERS | _LEFT_OUT):
        return properties
    kept = bytearray()
    at = _FLAGS.size
    for flag, kind in _PROPERTIES:
        if not flags & flag:
            continue
        size = kind
        if kind == _SHORT:
            size = 1 + properties[at]
        elif kind == _TABLE:
            size = _LENGTH.size + int(_LENGTH.unpack_from(properties, at)[0])
        piece = properties[at : at + size]
        at += size
        if kind == _TABLE:
            kept += _table(piece, names, () if keep_deaths else _PREFIXES)
        elif not flag & _LEFT_OUT:
            kept += piece
    return _FLAGS.pack(flags & ~_LEFT_OUT) + kept


def _table(table: bytes, names: Collection[bytes], prefixes: tuple[bytes, ...]) -> bytes:
    # Mostly there is nothing to leave out.
    if not any(each in table for each in (*names, *prefixes)):
        return table
    kept = b"".join(
        entry
        for name, entry in _entries(table)
        if name not in names and not name.startswith(prefixes)
    )
    return _LENGTH.pack(len(kept)) + kept


def _entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The name of each header, and all of it."""
    at = _LENGTH.size
    while at < len(table):
        begin = at
        at += 1 + table[at]
        name = table[begin + 1 : at]
        size = _SIZES[table[at]]
        at += 1
        if size == -4:
            size = _LENGTH.size + int(_LENGTH.unpack_from(table, at)[0])
        at += size
        yield name, table[begin:at]
