"""What a project says in its settings.

::

    DOMAIN_EVENTS = {
        'URL': 'amqp://user:password@host/vhost',   # or a list; None switches it off
        'APP_ID': 'shop',
        'MIDDLEWARE': ['domain_events.opentelemetry.OpenTelemetry'],
        'OUTBOX': True,                             # or a list of aliases of databases
        'OUTBOX_LEASE': 30, 'OUTBOX_TIMEOUT': 10,   # seconds; of `domain_events.outbox.Courier`
    }

All of it is optional; without ``URL`` the environment decides, as everywhere.
``DOMAIN_EVENT_BROKER`` is domain-event-broker's name for the URL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

import domain_events
from domain_events import DEFAULT, ConfigurationError, Middleware
from domain_events.outbox.couriers import LEASE, TIMEOUT, check_times

_KEYS = {"URL", "APP_ID", "MIDDLEWARE", "OUTBOX", "OUTBOX_LEASE", "OUTBOX_TIMEOUT"}
# Those of `domain_events.configure`.
_OF_PROCESS = {"URL", "APP_ID", "MIDDLEWARE"}


def given() -> dict[str, Any]:
    """The project's settings, by their names.

    :raises ImproperlyConfigured: when they cannot be meant so.
    """
    found = getattr(settings, "DOMAIN_EVENTS", {})
    if not isinstance(found, Mapping):
        # Not the value itself: it may be a URL with a password.
        raise ImproperlyConfigured(
            f"DOMAIN_EVENTS must be a dict, such as {{'URL': 'amqp://...'}}, not a "
            f"{type(found).__name__}."
        )
    if unknown := set(found) - _KEYS:
        raise ImproperlyConfigured(
            f"DOMAIN_EVENTS has {', '.join(sorted(map(repr, unknown)))}; there are "
            f"{', '.join(sorted(_KEYS))}."
        )
    values = dict(found)
    outbox = values.get("OUTBOX", False)
    aliases = outbox if isinstance(outbox, list | tuple | set) else ()
    if not isinstance(outbox, bool | list | tuple | set) or set(aliases) - set(settings.DATABASES):
        raise ImproperlyConfigured(
            "The OUTBOX of DOMAIN_EVENTS must be True, False, or a list of aliases of DATABASES, "
            f"not {outbox!r}."
        )
    try:
        _times(values)
    except ConfigurationError as error:
        raise ImproperlyConfigured(
            f"The OUTBOX_LEASE and OUTBOX_TIMEOUT of DOMAIN_EVENTS: {error}"
        ) from error
    if hasattr(settings, "DOMAIN_EVENT_BROKER"):
        if "URL" in values:
            raise ImproperlyConfigured(
                "The broker is given twice: remove either DOMAIN_EVENT_BROKER or the URL of "
                "DOMAIN_EVENTS."
            )
        values["URL"] = settings.DOMAIN_EVENT_BROKER
    return values


def has_outbox(alias: str) -> bool:
    """Whether transactions of this database write their events to its outbox.

    :raises ImproperlyConfigured: it should have one, and the app with the tables is not installed,
        which would have checked the settings.
    """
    found = getattr(settings, "DOMAIN_EVENTS", {}).get("OUTBOX", False)
    uses_it = alias in found if isinstance(found, list | tuple | set) else bool(found)
    if uses_it and not apps.is_installed("domain_events.django"):
        raise ImproperlyConfigured(
            "DOMAIN_EVENTS has an OUTBOX, and INSTALLED_APPS does not have 'domain_events.django': "
            "add it, then run manage.py migrate."
        )
    return uses_it


def courier_times() -> tuple[float, float]:
    """Lease and timeout of the process's couriers, in seconds."""
    return _times(getattr(settings, "DOMAIN_EVENTS", {}))


def _times(values: Mapping[str, Any]) -> tuple[float, float]:
    return check_times(values.get("OUTBOX_LEASE", LEASE), values.get("OUTBOX_TIMEOUT", TIMEOUT))


def configure() -> None:
    """Set the process's defaults, if the settings have any; otherwise they stay as they are.

    :raises ImproperlyConfigured: for settings that cannot work.
    """
    values = given()
    if not _OF_PROCESS & set(values):
        return
    try:
        domain_events.configure(
            values.get("URL", DEFAULT),
            app_id=values.get("APP_ID"),
            middleware=[_middleware(each) for each in values.get("MIDDLEWARE", ())],
        )
    except ConfigurationError as error:
        # `from None`: the error's traceback shows the URL.
        raise ImproperlyConfigured(f"DOMAIN_EVENTS: {error}") from None


def _middleware(given: object) -> Middleware:
    """An instance, from itself, its class, or the dotted path of either."""
    found: Any = given
    if isinstance(given, str):
        try:
            found = import_string(given)
        except ImportError as error:
            raise ImproperlyConfigured(f"DOMAIN_EVENTS['MIDDLEWARE']: {error}") from error
    middleware: Middleware = found() if isinstance(found, type) else found
    return middleware
