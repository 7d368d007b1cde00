"""The service's tests, with pytest: `event_broker` is a fixture of domain_events."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import shop
from shop import MailServer, database, make_subscriber, register_user

from domain_events import DeadLetters, DomainEvent, EventNotConfirmed
from domain_events.testing import EventBroker, Outcome


@pytest.fixture(autouse=True)
def fresh_shop() -> Iterator[None]:
    yield
    MailServer.up = True
    MailServer.sent.clear()
    with database:
        database.execute("DELETE FROM invoices")
        database.execute("DELETE FROM ledger")


def mails() -> list[str]:
    return list(MailServer.sent.values())


def amounts(table: str) -> list[int]:
    return [amount for (amount,) in database.execute(f"SELECT amount FROM {table}")]


def test_registration_is_published(event_broker: EventBroker) -> None:
    register_user("Ada", "ada@example.org")
    event_broker.assert_published("user.registered", {"name": "Ada"}, times=1)
    event_broker.assert_not_published("invoice.*")


def test_new_user_gets_a_mail_and_an_invoice(event_broker: EventBroker) -> None:
    subscriber = make_subscriber()
    register_user("Ada", "ada@example.org")
    deliveries = event_broker.deliver(subscriber)
    assert [each.outcome for each in deliveries] == ["handled"] * 3
    assert mails() == ["ada@example.org"]
    event_broker.assert_published("invoice.issued", {"amount": 10}, times=1)
    assert amounts("invoices") == amounts("ledger") == [10]


def test_mail_is_sent_when_the_server_is_back(event_broker: EventBroker) -> None:
    subscriber = make_subscriber()
    MailServer.up = False
    register_user("Ada", "ada@example.org")
    deliveries = event_broker.deliver(subscriber)
    (mail,) = [each for each in deliveries if each.subscriber == "welcome-mail"]
    assert (mail.outcome, mail.delay) == ("retry", 600)

    MailServer.up = True
    event_broker.advance(599)
    assert event_broker.deliver(subscriber) == []
    event_broker.advance(1)
    (mail,) = event_broker.deliver(subscriber)
    assert mail.outcome == Outcome.HANDLED
    assert mails() == ["ada@example.org"]


def test_mail_that_cannot_be_sent_for_long_is_kept(event_broker: EventBroker) -> None:
    subscriber = make_subscriber()
    MailServer.up = False
    register_user("Ada", "ada@example.org")
    event_broker.deliver_all(subscriber)  # over all retries
    (letter,) = event_broker.dead_letters("welcome-mail")
    assert letter.retries == 3

    MailServer.up = True
    with DeadLetters("welcome-mail") as dead_letters:
        dead_letters.replay_all()
    event_broker.deliver(subscriber)
    assert mails() == ["ada@example.org"]


def test_event_that_comes_twice_is_invoiced_once(event_broker: EventBroker) -> None:
    event = DomainEvent("user.registered", {"name": "Ada", "address": "ada@example.org"})
    event_broker.deliver_all(make_subscriber(), event, event)
    issued = [each for each in event_broker.published if each.routing_key == "invoice.issued"]
    # Published each time, since the first run may have died before it: one event, for its id.
    assert len(issued) == 2
    assert issued[0].uuid_string == issued[1].uuid_string
    assert issued[0].cause == event.uuid_string
    assert amounts("invoices") == amounts("ledger") == [10]
    assert mails() == ["ada@example.org"]


def test_invoice_is_published_though_it_failed_once(
    event_broker: EventBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscriber = make_subscriber()
    register_user("Ada", "ada@example.org")
    with monkeypatch.context() as broken:
        broken.setattr(shop.publisher, "publish", not_confirmed)
        event_broker.deliver(subscriber)
    event_broker.assert_not_published("invoice.issued")
    event_broker.deliver_all(subscriber)
    event_broker.assert_published("invoice.issued", {"amount": 10}, times=1)
    assert amounts("invoices") == amounts("ledger") == [10]


def not_confirmed(*_arguments: object, **_options: object) -> None:
    raise EventNotConfirmed("no confirm within 10 s")


def test_wrong_invoice_is_a_dead_letter_at_once(event_broker: EventBroker) -> None:
    wrong = DomainEvent("invoice.issued", {"amount": 0})
    (booking,) = event_broker.deliver(make_subscriber(), wrong)
    assert booking.outcome == "dead letter"
    assert str(booking.error) == "an invoice over 0"
