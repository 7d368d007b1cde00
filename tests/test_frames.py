"""Headers that pika cannot read: domain_events/broker/rabbitmq/frames.py. On a broker, see
`test_hostile_input`.
"""

from __future__ import annotations

import struct

import pika
import pytest
import raw_amqp as raw

from domain_events.broker.rabbitmq.frames import text, without_headers

UNREADABLE = {b"sent-at": raw.number(b"T", 2**64 - 1)}


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"content_type": b"application/json"},
        {"content_encoding": b"gzip", "message_id": b"1"},
        {"content_type": b"", "content_encoding": b"", "timestamp": 1, "app_id": b"tests"},
    ],
)
def test_only_the_headers_are_left_out(others: dict[str, bytes | int]) -> None:
    """What stands before and behind them is as it was."""
    before = struct.pack(">HHQ", 60, 0, 1)
    sent = raw.Properties(UNREADABLE, **others)
    with pytest.raises((ValueError, OverflowError)):
        pika.BasicProperties().decode(sent.data)
    payload = without_headers(before + sent.data)
    assert payload.startswith(before)
    received = pika.BasicProperties()
    received.decode(payload[len(before) :])
    expected = {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in others.items()
    }
    found = {name: value for name, value in vars(received).items() if value is not None}
    assert found == {**expected, "headers": {}}


@pytest.mark.parametrize(
    ("given", "shown"), [("a.b", "a.b"), (b"a.\xff", "a.\\xff"), (None, ""), ("", "")]
)
def test_name_that_is_not_utf8_is_shown_with_its_bytes_escaped(
    given: str | bytes | None, shown: str
) -> None:
    """Never as bytes, which nobody expects there."""
    assert text(given) == shown
