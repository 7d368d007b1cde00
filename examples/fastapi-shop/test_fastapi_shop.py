"""Its tests, with the fixture event_broker of domain_events.

They take a database in a file, such as DATABASE_URL=sqlite:////tmp/test.db in the environment.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from fastapi_shop import Base, Invoice, app, engine, make_subscriber, outbox, sessions
from sqlalchemy import select

from domain_events import Outcome
from domain_events.testing import EventBroker

client = TestClient(app)


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    Base.metadata.create_all(engine)
    yield
    Base.metadata.drop_all(engine)


def place_order(book: str) -> int:
    response = client.post("/orders", json={"book": book})
    assert response.status_code == 201
    assert outbox.wait()  # a thread publishes after the commit
    return int(response.json()["order"])


def test_order_that_is_placed_is_published(event_broker: EventBroker) -> None:
    order = place_order("Middlemarch")
    event_broker.assert_published("order.placed", {"order": order}, times=1)


def test_order_gets_one_invoice(event_broker: EventBroker) -> None:
    subscriber = make_subscriber()
    order = place_order("Middlemarch")
    (event,) = event_broker.published

    deliveries = event_broker.deliver(subscriber, event, event)  # comes three times

    assert [each.outcome for each in deliveries] == [Outcome.HANDLED] * 3
    assert outbox.wait()
    event_broker.assert_published("invoice.issued", times=1)
    with sessions() as session:
        assert session.scalars(select(Invoice.order_id)).all() == [order]


def test_request_that_fails_publishes_nothing(event_broker: EventBroker) -> None:
    assert client.post("/orders", json={}).status_code == 422
    assert outbox.wait()
    event_broker.assert_not_published()
