"""``manage.py check``: what was forgotten in the settings, and, with ``--database``, the tables.

Settings that cannot work are not here: the app refuses to start with them. About the tables there
are warnings only, since ``migrate`` runs these checks, too, before it makes what is missing; for
``check --fail-level WARNING``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning  # noqa: A004
from django.db import DEFAULT_DB_ALIAS, connections, router

from domain_events import outbox
from domain_events.django import configuration
from domain_events.django.database import executing
from domain_events.django.models import InboxNote, OutboxEvent
from domain_events.outbox.schema import FETCH_INDEX, HANDLED_INDEX, ORDER_INDEX
from domain_events.settings import ENVIRONMENT, FALLBACK, resolve

OUTBOX_INDEXES = (FETCH_INDEX, ORDER_INDEX)
INBOX_INDEXES = (HANDLED_INDEX,)
# Seconds that an event may wait: longer than a courier's lease, and a relay's.
_LATE = 120.0


def check_settings(**_: Any) -> list[CheckMessage]:
    """What is wrong anywhere."""
    return [*_databases(), *_outboxes(), *_peers()]


def check_deployment(**_: Any) -> list[CheckMessage]:
    """With ``--deploy``: what may be on purpose where it is developed or tested."""
    return list(_broker())


def _broker() -> Iterator[CheckMessage]:
    values = configuration.given()
    if "URL" in values and values["URL"] is None:
        yield Warning(
            "The URL of DOMAIN_EVENTS is None: no event is published or received.",
            hint="It may come from an environment variable that is not set.",
            id="domain_events.W001",
        )
        return
    given = values.get("URL") or any(map(os.environ.get, ENVIRONMENT))
    # The program itself may have called configure().
    if not given and not settings.DEBUG and resolve() == (FALLBACK,):
        yield Warning(
            "No broker is given: events go to RabbitMQ on localhost, as the user guest.",
            hint="Give DOMAIN_EVENTS = {'URL': ...}, or set the environment variable "
            f"{ENVIRONMENT[0]}.",
            id="domain_events.W002",
        )


def _databases() -> Iterator[CheckMessage]:
    for alias, database in settings.DATABASES.items():
        pooled = (database.get("OPTIONS") or {}).get("pool")
        if pooled and not database.get("CONN_HEALTH_CHECKS"):
            yield Warning(
                f"The database {alias!r} has a pool of connections, and no CONN_HEALTH_CHECKS: "
                "after it was restarted, the first handler for each pooled connection fails, and "
                "its event becomes a dead letter.",
                hint="Set its CONN_HEALTH_CHECKS to True.",
                id="domain_events.W003",
            )


def _outboxes() -> Iterator[CheckMessage]:
    given = configuration.given().get("OUTBOX", False)
    # With True, others may be replicas, in which nothing is written.
    for alias in [DEFAULT_DB_ALIAS] if given is True else given or ():
        if not router.allow_migrate_model(alias, OutboxEvent):
            yield Error(
                f"Events are written to the outbox of the database {alias!r}, and a router of "
                "DATABASE_ROUTERS does not allow its table there.",
                hint="Let its allow_migrate() return True for the app domain_events_outbox, or "
                "list the other databases as the OUTBOX of DOMAIN_EVENTS.",
                id="domain_events.E001",
            )


def check_tables(databases: Iterable[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Whether the outbox and the inbox are as they should be, and are emptied."""
    return [each for alias in databases or () for each in _tables(alias)]


def _tables(alias: str) -> Iterator[CheckMessage]:
    if not router.allow_migrate_model(alias, OutboxEvent):
        return
    connection = connections[alias]
    wrong = []
    with connection.cursor() as cursor:
        tables = connection.introspection.table_names(cursor)
        for model, indexes in ((OutboxEvent, OUTBOX_INDEXES), (InboxNote, INBOX_INDEXES)):
            table = model._meta.db_table
            if table not in tables:
                wrong.append(f"there is no table {table}")
                continue
            described = connection.introspection.get_table_description(cursor, table)
            missing = {each.column for each in model._meta.concrete_fields} - {None}
            wrong += [f"{table} has no column {each}" for each in missing - _names(described)]
            found = connection.introspection.get_constraints(cursor, table)
            wrong += [f"{table} has no index {each}" for each in indexes if each not in found]
    if wrong:
        yield Warning(
            f"In the database {alias!r} {'; '.join(sorted(wrong))}.",
            hint=f"Run manage.py migrate domain_events_outbox --database {alias}.",
            id="domain_events.W005",
        )
        return
    found = outbox.status(executing(connection), connection.vendor)
    if found.oldest > _LATE:
        yield Warning(
            f"In the database {alias!r} {found.waiting} events wait in the outbox, the oldest for "
            f"{found.oldest:.0f} s.",
            hint="Run manage.py relay_domain_events, and see its log.",
            id="domain_events.W006",
        )
    if found.parked:
        yield Warning(
            f"In the database {alias!r} {found.parked} events of the outbox are parked.",
            hint="See manage.py parked_domain_events.",
            id="domain_events.W007",
        )


def _names(described: Iterable[Any]) -> set[str]:
    return {each.name for each in described}


def _peers() -> Iterator[CheckMessage]:
    if apps.is_installed("domain_event_broker.django"):
        yield Warning(
            "domain_event_broker.django is installed beside domain_events.django: both have "
            "publish_on_commit and the command replay_domain_event.",
            hint="Remove it from INSTALLED_APPS.",
            id="domain_events.W004",
        )
