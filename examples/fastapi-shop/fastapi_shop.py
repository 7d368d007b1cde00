"""A small shop with FastAPI and SQLAlchemy: no event is lost, and each is handled once.

``uvicorn fastapi_shop:app`` serves it; its endpoints are plain functions, which FastAPI runs in
threads. ``python fastapi_shop.py`` is the worker: it handles events, and relays those that a web
process has left behind. The tables come from a migration; `create_tables` is for a first try.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from domain_events import DomainEvent, Subscriber
from domain_events.sqlalchemy import Outbox, inbox_table, once, outbox_table, publish_on_commit


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    book: Mapped[str]


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]


outbox_table(Base.metadata)
inbox_table(Base.metadata)

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///shop.db"))
sessions = sessionmaker(engine)
outbox = Outbox(engine)
outbox.switch_on()

app = FastAPI()


class NewOrder(BaseModel):
    book: str


@app.post("/orders", status_code=201)
def place_order(new: NewOrder) -> dict[str, int]:
    with sessions.begin() as session:
        order = Order(book=new.book)
        session.add(order)
        session.flush()  # for the id
        publish_on_commit(session, "order.placed", {"order": order.id}, order.id)
        return {"order": order.id}


@once(sessions)
def issue_invoice(session: Session, event: DomainEvent) -> None:
    invoice = Invoice(order_id=event.data["order"])
    session.add(invoice)
    session.flush()
    publish_on_commit(session, "invoice.issued", {"invoice": invoice.id}, invoice.order_id)


def make_subscriber() -> Subscriber:
    subscriber = Subscriber()
    subscriber.register(issue_invoice, "order-billing", ["order.placed"])
    return subscriber


def create_tables() -> None:
    Base.metadata.create_all(engine)


if __name__ == "__main__":
    create_tables()
    with outbox.relay() as relay:
        relay.start()
        make_subscriber().start_consuming()
