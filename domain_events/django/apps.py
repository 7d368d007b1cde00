"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import Tags, register

from domain_events.django import configuration


class DomainEventsConfig(AppConfig):
    """Configures the library by the project's settings."""

    name = "domain_events.django"
    # Of its tables, too; nobody else's app has it.
    label = "domain_events_outbox"
    verbose_name = "Domain events"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # Here, since models can only be imported by now.
        from domain_events.django import checks  # noqa: PLC0415

        configuration.configure()
        register(checks.check_settings, "domain_events")
        register(checks.check_deployment, "domain_events", deploy=True)
        register(checks.check_tables, Tags.database)
