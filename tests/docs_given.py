"""What a reader of docs/sqlalchemy.rst and docs/transactions.rst has: a small shop's tables."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from domain_events.sqlalchemy import Outbox, inbox_table, outbox_table, publish_on_commit


def shop(*, switched_on: bool = False, tables: bool = True) -> dict[str, Any]:
    """Its names: ``engine``, ``sessions``, ``User``, ``Invoice``, ``outbox`` and so on."""

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

    class OldRow(Base):
        __tablename__ = "old_outbox"
        id: Mapped[int] = mapped_column(primary_key=True)
        routing_key: Mapped[str]
        data: Mapped[str]
        object_id: Mapped[str]
        event_id: Mapped[str]
        timestamp: Mapped[float]

    if tables:
        outbox_table(Base.metadata)
        inbox_table(Base.metadata)
    file = Path(tempfile.mkdtemp()) / "shop.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        row = {"routing_key": "user.registered", "data": "1", "object_id": "1"}
        session.add(OldRow(**row, event_id=str(uuid.uuid4()), timestamp=1.0))
    outbox = Outbox(engine)
    if switched_on:
        outbox.switch_on()
    return {
        "Base": Base,
        "Invoice": Invoice,
        "OldRow": OldRow,
        "Session": Session,
        "User": User,
        "engine": engine,
        "outbox": outbox,
        "publish_on_commit": publish_on_commit,
        "sessions": sessionmaker(engine),
    }
