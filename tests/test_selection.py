"""Which dead letters are meant: filters, times, conditions on data, groups. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from domain_events import ConfigurationError, DomainEvent
from domain_events.cli.selection import (
    Selection,
    Where,
    grouped,
    innermost_frame,
    parse_time,
)

NOON = datetime(2026, 11, 26, 12, tzinfo=timezone.utc)
DATA = {"user": {"country": "DE", "age": 41, "vip": True, "tags": ["a", "b"], "name": None}}


@dataclass
class Letter:
    """As much of a dead letter as a selection reads."""

    event: DomainEvent[Any] | None
    routing_key: str = "user.registered"
    subscriber: str | None = "mailer"
    error_type: str | None = "shop.errors.OutOfStock"
    failed_at: datetime | None = NOON
    traceback: str | None = None
    id: str | None = "1"


LETTER = Letter(DomainEvent("user.registered", DATA))


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("user.country=DE", True),
        ("user.country=de", False),
        ("user.country!=FR", True),
        ("user.country = DE", True),
        ("user.age=41", True),
        ("user.age=41.0", True),
        ("user.age>40", True),
        ("user.age>=42", False),
        ("user.age<=41", True),
        ("user.age=old", False),
        ("user.age<old", False),
        ("user.vip=true", True),
        ("user.vip=1", False),
        ("user.name=null", True),
        ("user.name<1", False),
        ("user.tags.1=b", True),
        ("user.tags.7=b", False),
        ("user.tags=a", False),
        ("user.street=x", False),
        ("user.street!=x", True),
        ("user.country=a=b", False),
    ],
)
def test_condition_on_the_data(condition: str, holds: bool) -> None:
    """By dots into it; numbers by value, text as it stands, and nothing raises."""
    assert Selection(where=(Where.parse(condition),))(LETTER) is holds


def test_condition_does_not_hold_for_what_is_not_an_event() -> None:
    """Also not that something differs."""
    assert not Selection(where=(Where.parse("a!=1"),))(Letter(None))


@pytest.mark.parametrize(
    ("conditions", "selected"),
    [
        ({}, True),
        ({"error_type": "shop.errors.OutOfStock"}, True),
        ({"error_type": "OutOfStock"}, True),
        ({"error_type": "shop.*"}, True),
        ({"error_type": "Out"}, False),
        ({"routing_key": "user.*"}, True),
        ({"routing_key": "user.#"}, True),
        ({"routing_key": "*"}, False),
        ({"since": NOON}, True),
        ({"since": NOON + timedelta(seconds=1)}, False),
        ({"until": NOON}, True),
        ({"until": NOON - timedelta(seconds=1)}, False),
        ({"ids": frozenset(["1", "2"])}, True),
        ({"ids": frozenset(["2"])}, False),
        ({"subscriber": "mail*"}, True),
        ({"subscriber": "mail"}, False),
        ({"error_type": "OutOfStock", "ids": frozenset(["2"])}, False),
    ],
)
def test_each_condition_must_be_met(conditions: dict[str, Any], selected: bool) -> None:
    """Of the error, the key, the time, the id, the subscriber."""
    assert Selection(**conditions)(LETTER) is selected


@pytest.mark.parametrize("text", ["", "country", "=DE", "!"])
def test_what_is_not_a_condition_is_refused(text: str) -> None:
    """With the form that it should have."""
    with pytest.raises(ConfigurationError, match=r"user\.country=DE"):
        Where.parse(text)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2h", NOON - timedelta(hours=2)),
        ("1.5d", NOON - timedelta(hours=36)),
        ("90s", NOON - timedelta(seconds=90)),
        ("2026-11-26T10:00Z", NOON - timedelta(hours=2)),
        ("2026-11-26T10:00+01:00", NOON - timedelta(hours=3)),
    ],
)
def test_times(text: str, time: datetime) -> None:
    """As ISO has them, or how long ago."""
    assert parse_time(text, NOON) == time


def test_time_without_a_zone_is_local() -> None:
    """As the times that are shown."""
    assert parse_time("2026-11-26T10:00") == datetime(2026, 11, 26, 10).astimezone()


@pytest.mark.parametrize("text", ["", "5x", "yesterday", "99999999999d", "2026-13-01"])
def test_what_is_not_a_time_is_refused(text: str) -> None:
    """With the forms that it may have."""
    with pytest.raises(ConfigurationError, match="is not a time; write"):
        parse_time(text)


TRACEBACK = """Traceback (most recent call last):
  File "/srv/shop/handlers.py", line 10, in handle
    send(event)
  File "/srv/shop/mail.py", line 22, in send
    session.post(url)
  File "/srv/venv/lib/python3.12/site-packages/requests/sessions.py", line 637, in post
    return self.request("POST", url)
  File "/usr/lib/python3.12/socket.py", line 852, in create_connection
    raise exceptions[0]
{error}
"""


def test_groups_leave_out_what_differs_from_event_to_event() -> None:
    """The exception's class and the application's innermost frame make one, its message none."""
    letters = [
        Letter(
            None,
            error_type="OSError",
            traceback=TRACEBACK.format(error=f"OSError: connection {n} was refused"),
            failed_at=NOON + timedelta(hours=n),
        )
        for n in (1, 0, 2)
    ] + [Letter(None, error_type="KeyError", traceback=None, failed_at=None)]
    most, other = grouped(letters, ["error", "frame"])
    assert most.values == ("OSError", "/srv/shop/mail.py:22 in send")
    assert (most.count, most.oldest, most.newest) == (3, NOON, NOON + timedelta(hours=2))
    assert (other.values, other.count, other.oldest) == (("KeyError", None), 1, None)


def test_innermost_frame_of_a_library_if_there_is_no_other() -> None:
    """Also within an exception group, whose frames are indented."""
    text = '  | File "/usr/lib/python3.12/json/decoder.py", line 355, in raw_decode\nValueError\n'
    assert innermost_frame(text) == "/usr/lib/python3.12/json/decoder.py:355 in raw_decode"
    assert innermost_frame("ValueError: no frame") is None
