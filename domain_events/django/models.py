"""The two tables of `domain_events.outbox`, for migrations, the admin and ``TransactionTestCase``.

Nothing writes to them by these models: the engine has SQL of its own, on the connection of the
transaction that an event belongs to, so that no database router takes part.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from django.db import models

from domain_events.outbox import INBOX, OUTBOX


class OutboxEvent(models.Model):
    """An event that is written and not yet confirmed."""

    id = models.BigAutoField(primary_key=True)
    event_id = models.CharField(max_length=255)
    exchange = models.CharField(max_length=255)
    routing_key = models.CharField(max_length=255)
    object_key = models.CharField(max_length=255, null=True)
    body = models.TextField()
    details = models.TextField()
    created = models.FloatField()
    token = models.CharField(max_length=36, null=True)
    leased_until = models.FloatField(default=0)
    parked = models.FloatField(default=0)
    error = models.TextField(null=True)

    class Meta:
        db_table = OUTBOX
        verbose_name = "event in the outbox"
        verbose_name_plural = "events in the outbox"

    def __str__(self) -> str:
        return f"{self.routing_key} {self.event_id}"

    @property
    def created_at(self) -> datetime:
        """When it was written."""
        return datetime.fromtimestamp(self.created, timezone.utc)


class InboxNote(models.Model):
    """An event that a subscriber has handled."""

    # Both columns are the primary key, which Django can express from 5.2 on.
    if hasattr(models, "CompositePrimaryKey"):
        pk: Any = models.CompositePrimaryKey("subscriber", "event_id")
        subscriber = models.CharField(max_length=255)
    else:
        subscriber = models.CharField(max_length=255, primary_key=True)
    event_id = models.CharField(max_length=255)
    handled = models.FloatField()

    class Meta:
        db_table = INBOX
        verbose_name = "note in the inbox"
        verbose_name_plural = "notes in the inbox"

    def __str__(self) -> str:
        return f"{self.subscriber} {self.event_id}"
