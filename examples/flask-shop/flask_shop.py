"""A small shop with Flask and SQLAlchemy: no event is lost, and each is handled once.

``python flask_shop.py`` is the worker: it handles events, and relays those that a web process has
left behind. The tables come from a migration; `create_tables` is for a first try.
"""

from __future__ import annotations

import os

from flask import Flask, request
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from domain_events import DomainEvent, Subscriber
from domain_events.sqlalchemy import Outbox, inbox_table, once, outbox_table, publish_on_commit


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int]


outbox_table(Base.metadata)
inbox_table(Base.metadata)

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///shop.db"))
sessions = sessionmaker(engine)
outbox = Outbox(engine)
outbox.switch_on()

app = Flask(__name__)


@app.post("/users")
def register_user() -> tuple[dict[str, int], int]:
    with sessions.begin() as session:
        user = User(email=request.form["email"])
        session.add(user)
        session.flush()  # for the id
        publish_on_commit(session, "user.registered", {"user_id": user.id}, user.id)
        return {"user_id": user.id}, 201


@once(sessions)
def issue_invoice(session: Session, event: DomainEvent) -> None:
    invoice = Invoice(user_id=event.data["user_id"])
    session.add(invoice)
    session.flush()
    publish_on_commit(session, "invoice.issued", {"invoice_id": invoice.id}, invoice.user_id)


def make_subscriber() -> Subscriber:
    subscriber = Subscriber()
    subscriber.register(issue_invoice, "billing", ["user.registered"])
    return subscriber


def create_tables() -> None:
    Base.metadata.create_all(engine)


if __name__ == "__main__":
    create_tables()
    with outbox.relay() as relay:
        relay.start()
        make_subscriber().start_consuming()
