"""The two tables, in the MetaData of the application; and whether a database has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    inspect,
    text,
)
from sqlalchemy.dialects.mysql import LONGTEXT
from sqlalchemy.event import listen

from domain_events.outbox.database import LONGEST_TEXT
from domain_events.outbox.schema import (
    FETCH_INDEX,
    HANDLED_INDEX,
    INBOX,
    ORDER_INDEX,
    OUTBOX,
    tuning,
)

_TEXT = Text().with_variant(LONGTEXT(), "mysql", "mariadb")
_ID = BigInteger().with_variant(Integer(), "sqlite")
# Otherwise MySQL takes two names for one that differ in upper and lower case.
_OPTIONS: dict[str, Any] = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}


def outbox_table(metadata: MetaData) -> Table:
    """The outbox, ``domain_events_outbox``, as a table of these MetaData.

    Alembic's autogenerate then adds it to a migration, and finds no difference afterwards. On
    PostgreSQL, execute the statements of ``domain_events.outbox.tuning('postgresql')`` in that
    migration, too; ``metadata.create_all`` does it by itself.
    """
    table = Table(
        OUTBOX,
        metadata,
        Column("id", _ID, primary_key=True),
        _string("event_id"),
        _string("exchange"),
        _string("routing_key"),
        _string("object_key", nullable=True),
        Column("body", _TEXT, nullable=False),
        Column("details", _TEXT, nullable=False),
        Column("created", Double(), nullable=False),
        Column("token", String(36), nullable=True),
        Column("leased_until", Double(), server_default=text("0"), nullable=False),
        Column("parked", Double(), server_default=text("0"), nullable=False),
        Column("error", _TEXT, nullable=True),
        Index(FETCH_INDEX, "parked", "id"),
        Index(ORDER_INDEX, "object_key", "id"),
        sqlite_autoincrement=True,
        **_OPTIONS,
    )
    for statement in tuning("postgresql"):
        ddl: Any = DDL(statement)  # type: ignore[no-untyped-call]
        listen(table, "after_create", ddl.execute_if(dialect="postgresql"))
    return table


def inbox_table(metadata: MetaData) -> Table:
    """The inbox, ``domain_events_inbox``, as a table of these MetaData; `once` needs it."""
    return Table(
        INBOX,
        metadata,
        _string("subscriber", primary_key=True),
        _string("event_id", primary_key=True),
        Column("handled", Double(), nullable=False),
        Index(HANDLED_INDEX, "handled"),
        **_OPTIONS,
    )


def _string(name: str, *, primary_key: bool = False, nullable: bool = False) -> Column[str]:
    return Column(name, String(LONGEST_TEXT), primary_key=primary_key, nullable=nullable)


def differences(connection: Connection, table: Table) -> Iterator[str]:
    """How the table in a database differs from what it should be, as far as that matters."""
    inspector = inspect(connection)
    if not inspector.has_table(table.name):
        yield f"there is no table {table.name}"
        return
    found = {column["name"]: column for column in inspector.get_columns(table.name)}
    for column in table.columns:
        have = found.pop(column.name, None)
        where = f"the column {table.name}.{column.name}"
        if have is None:
            yield f"{where} is missing"
            continue
        kind = column.type.dialect_impl(connection.dialect)
        if kind._type_affinity is not have["type"]._type_affinity:
            yield f"{where} is {have['type']} instead of {column.type.compile(connection.dialect)}"
        elif (have_length := getattr(have["type"], "length", None)) and (
            have_length < (getattr(kind, "length", None) or have_length + 1)
        ):
            yield f"{where} is {have['type']}, too short"
        if not column.primary_key and bool(have["nullable"]) != bool(column.nullable):
            yield f"{where} is {'nullable' if have['nullable'] else 'not nullable'}"
    for name, have in found.items():
        if not have["nullable"] and have["default"] is None:
            yield f"{table.name}.{name} is not a column of ours, and must have a default"
    wanted = {tuple(each.columns.keys()) for each in table.indexes}
    indexes = {tuple(each["column_names"]) for each in inspector.get_indexes(table.name)}
    for columns in sorted(wanted - indexes):
        yield f"there is no index on {table.name} ({', '.join(columns)})"
    key = inspector.get_pk_constraint(table.name)["constrained_columns"]
    if key != table.primary_key.columns.keys():
        yield f"the primary key of {table.name} is ({', '.join(key)})"
