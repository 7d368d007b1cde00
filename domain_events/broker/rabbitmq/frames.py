"""A connection that no message can break by its headers.

pika decodes headers where it reads frames, and takes an error there for a broken connection: the
broker then delivers the same message on the next one, and so on for ever. A timestamp in
milliseconds is enough (in the year 55,000, which no `datetime` has), or arrays a thousand deep.
"""

from __future__ import annotations

import logging
import struct
from typing import Any

from pika.frame import decode_frame
from pika.spec import FRAME_END, FRAME_HEADER, FRAME_HEADER_SIZE, BasicProperties

from domain_events.broker.rabbitmq.joining import JoiningConnection

log = logging.getLogger("domain_events")

# What stands in front of the properties in their frame: class, weight, size of the body.
_BEFORE_PROPERTIES = struct.Struct(">HHQ")


class Connection(JoiningConnection):
    """pika's, but a message with headers that pika cannot read is taken as one without any."""

    # Not public in pika, but as it is since long before the oldest release we take; there is no
    # public way to it.
    _frame_buffer: bytes

    def _read_frame(self) -> Any:
        buffer = self._frame_buffer
        try:
            return decode_frame(buffer)
        except Exception:
            if buffer[0] != FRAME_HEADER:
                raise
        log.warning("A message has headers that cannot be read; it is taken without them.")
        kind, channel, size = struct.unpack_from(">BHL", buffer)
        payload = without_headers(buffer[FRAME_HEADER_SIZE : FRAME_HEADER_SIZE + size])
        shorter = struct.pack(">BHL", kind, channel, len(payload)) + payload + bytes([FRAME_END])
        _, frame = decode_frame(shorter)
        return FRAME_HEADER_SIZE + size + 1, frame


def without_headers(payload: bytes) -> bytes:
    """The payload of a properties frame, with an empty table for its headers."""
    at = _BEFORE_PROPERTIES.size
    (flags,) = struct.unpack_from(">H", payload, at)
    at += 2
    for flag in (BasicProperties.FLAG_CONTENT_TYPE, BasicProperties.FLAG_CONTENT_ENCODING):
        if flags & flag:
            at += 1 + payload[at]  # a short string, behind its length
    (size,) = struct.unpack_from(">L", payload, at)
    return payload[:at] + bytes(4) + payload[at + 4 + size :]


def text(value: str | bytes | None) -> str:
    """A name or a key, which pika leaves as bytes where it is not UTF-8."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value or ""
