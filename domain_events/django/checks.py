"""``manage.py check``: what was forgotten in the settings.

What cannot work is not here: the app refuses to start with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Warning  # noqa: A004

from domain_events.django import configuration
from domain_events.settings import ENVIRONMENT, FALLBACK, resolve


def check_settings(**_: Any) -> list[CheckMessage]:
    """Registered when the app is ready."""
    return [*_broker(), *_databases(), *_peers()]


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


def _peers() -> Iterator[CheckMessage]:
    if apps.is_installed("domain_event_broker.django"):
        yield Warning(
            "domain_event_broker.django is installed beside domain_events.django: both have "
            "publish_on_commit and the command replay_domain_event.",
            hint="Remove it from INSTALLED_APPS.",
            id="domain_events.W004",
        )
