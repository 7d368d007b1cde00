"""Its tests: what is published and handled are objects."""

from __future__ import annotations

from datetime import datetime, timezone
from decimal import Decimal
from unittest.mock import ANY
from uuid import UUID

import pytest
from accounts import AccountOpened, greetings, make_subscriber, open_account

from domain_events import BrokerUnavailable, DomainEvent, InvalidEvent
from domain_events.testing import EventBroker

OPENED = datetime(2026, 11, 26, 7, 30, tzinfo=timezone.utc)
ACCOUNT = AccountOpened(UUID(int=7), "Ada Lovelace", OPENED, Decimal("9.90"))


@pytest.fixture(autouse=True)
def nobody_was_greeted() -> None:
    greetings.clear()


def test_account_that_is_opened_is_published(event_broker: EventBroker) -> None:
    open_account("Ada Lovelace", Decimal("9.90"))
    expected = AccountOpened(ANY, "Ada Lovelace", ANY, Decimal("9.90"))
    event_broker.assert_published("account.opened", expected, times=1)
    event_broker.assert_published("account.*", {"plan": "free"})  # the entries that matter


def test_owner_is_greeted(event_broker: EventBroker) -> None:
    event = DomainEvent("account.opened", ACCOUNT, version=2)
    event_broker.deliver(make_subscriber(), event, raising=True)
    assert greetings == ["Dear Ada Lovelace, thank you for 9.90 euros."]


def test_owner_of_an_old_account_is_greeted(event_broker: EventBroker) -> None:
    old = {
        "account_id": "00000000-0000-0000-0000-000000000007",
        "first_name": "Ada",
        "last_name": "Lovelace",
        "opened": "2024-02-29T12:00:00+00:00",
    }
    event_broker.deliver(make_subscriber(), DomainEvent("account.opened", old), raising=True)
    assert greetings == ["Dear Ada Lovelace, thank you for 0.00 euros."]


def test_account_without_an_owner_is_a_dead_letter(event_broker: EventBroker) -> None:
    wrong = DomainEvent("account.opened", {"account_id": str(UUID(int=7))}, version=2)
    with pytest.raises(InvalidEvent, match=r"missing required field .* \(at event\.data\.owner\)"):
        event_broker.deliver(make_subscriber(), wrong, raising=True)
    (letter,) = event_broker.dead_letters("greetings")
    assert letter.error_type == "payload"


def test_account_cannot_be_opened_in_an_outage(event_broker: EventBroker) -> None:
    with event_broker.outage(), pytest.raises(BrokerUnavailable):
        open_account("Ada Lovelace", Decimal(0))
    event_broker.assert_not_published()
