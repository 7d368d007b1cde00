"""Its tests, with the fixture event_broker of domain_events.

They take a database in a file, as in: DATABASE_URL=sqlite:////tmp/test.db pytest test_flask_shop.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask_shop import Base, Invoice, app, engine, make_subscriber, outbox, sessions
from sqlalchemy import select

from domain_events import Outcome
from domain_events.testing import EventBroker


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    Base.metadata.create_all(engine)
    yield
    Base.metadata.drop_all(engine)


def register(email: str) -> int:
    response = app.test_client().post("/users", data={"email": email})
    assert response.status_code == 201
    assert outbox.wait()  # a thread publishes after the commit
    return int(response.get_json()["user_id"])


def test_user_who_is_registered_is_published(event_broker: EventBroker) -> None:
    user_id = register("ada@example.org")
    event_broker.assert_published("user.registered", {"user_id": user_id}, times=1)


def test_user_gets_one_invoice(event_broker: EventBroker) -> None:
    subscriber = make_subscriber()
    user_id = register("ada@example.org")
    (event,) = event_broker.published

    deliveries = event_broker.deliver(subscriber, event, event)  # comes three times

    assert [each.outcome for each in deliveries] == [Outcome.HANDLED] * 3
    assert outbox.wait()
    event_broker.assert_published("invoice.issued", times=1)
    with sessions() as session:
        assert session.scalars(select(Invoice.user_id)).all() == [user_id]


def test_request_that_fails_publishes_nothing(event_broker: EventBroker) -> None:
    assert app.test_client().post("/users", data={}).status_code == 400
    assert outbox.wait()
    event_broker.assert_not_published()
