"""The outbox in the admin: to look at, and to decide about parked events."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import Any

from django.contrib import admin, messages
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest

from domain_events import outbox
from domain_events.django.database import executing
from domain_events.django.models import OutboxEvent

log = logging.getLogger("domain_events")


class Parked(admin.SimpleListFilter):
    """Whether events are parked."""

    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("parked", "parked"), ("waiting", "waiting")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() == "parked":
            return queryset.filter(parked__gt=0)
        return queryset.filter(parked=0) if self.value() == "waiting" else queryset


@admin.register(OutboxEvent)
class OutboxEventAdmin(admin.ModelAdmin):
    """Read-only: a row is what will be sent. Of the default database, as all of the admin."""

    list_display = ("routing_key", "event_id", "object_key", "written", "state", "error")
    list_filter = (Parked, "exchange")
    search_fields = ("event_id", "routing_key", "object_key")
    ordering = ("id",)
    actions = ("retry", "delete_selected")
    show_full_result_count = False

    @admin.display(ordering="created")
    def written(self, row: OutboxEvent) -> datetime:
        """When it was written."""
        return datetime.fromtimestamp(row.created, timezone.utc)

    def state(self, row: OutboxEvent) -> str:
        """Waiting, or parked since when."""
        if not row.parked:
            return "waiting"
        since = datetime.fromtimestamp(row.parked, timezone.utc)
        return f"parked since {since:%Y-%m-%d %H:%M} UTC"

    @admin.action(description="Send the selected parked events again", permissions=["change"])
    def retry(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        ids = _ids(queryset)
        with transaction.atomic(using=queryset.db):
            number = outbox.retry(_execute(queryset), ids)
        self.message_user(request, f"{number} parked events are sent again.")

    @admin.action(
        description="Discard the selected parked events, for good", permissions=["delete"]
    )
    def delete_selected(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """By the name of Django's own action, which would delete what waits to be sent."""
        ids = _ids(queryset)
        with transaction.atomic(using=queryset.db):
            discarded = outbox.discard(_execute(queryset), ids)
        for each in discarded:
            log.warning("%s has discarded %r of the outbox.", request.user, each.row)
        self.message_user(
            request, f"{len(discarded)} parked events were discarded.", messages.WARNING
        )

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    # Without an object, whether the user may use the actions.

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return obj is None and bool(super().has_change_permission(request))

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return obj is None and bool(super().has_delete_permission(request))


def _execute(queryset: QuerySet[Any]) -> outbox.Execute:
    return executing(transaction.get_connection(queryset.db))


def _ids(queryset: QuerySet[Any]) -> list[int]:
    # Before the transaction, which on SQLite must not begin by reading.
    return list(queryset.values_list("id", flat=True))
