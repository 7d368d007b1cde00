"""Makes both tables by the engine's own statements, which are the same for every framework."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import migrations, models, router

from domain_events.outbox import INBOX, OUTBOX, create


def _inbox_key() -> list[tuple[str, Any]]:
    """The primary key of the inbox: both columns, as far as Django can express that."""
    if not hasattr(models, "CompositePrimaryKey"):  # before 5.2
        key = models.CharField(max_length=255, primary_key=True, serialize=False)
        return [("subscriber", key)]
    both = models.CompositePrimaryKey(
        *("subscriber", "event_id"),
        blank=True,
        editable=False,
        primary_key=True,
        serialize=False,
    )
    return [("pk", both), ("subscriber", models.CharField(max_length=255))]


class CreateTables(migrations.operations.base.Operation):
    """Executes `domain_events.outbox.create`; ``sqlmigrate`` shows its statements."""

    reversible = True
    reduces_to_sql = True

    def state_forwards(self, app_label: str, state: Any) -> None:
        """The models are declared beside this."""

    def database_forwards(self, app_label: str, schema_editor: Any, *_states: Any) -> None:
        self._execute(app_label, schema_editor, create(schema_editor.connection.vendor))

    def database_backwards(self, app_label: str, schema_editor: Any, *_states: Any) -> None:
        self._execute(app_label, schema_editor, [f"DROP TABLE {INBOX}", f"DROP TABLE {OUTBOX}"])

    def _execute(self, app_label: str, schema_editor: Any, statements: list[str]) -> None:
        alias = schema_editor.connection.alias
        if router.allow_migrate(alias, app_label, model_name="outboxevent"):
            for statement in statements:
                schema_editor.execute(statement, params=None)

    def describe(self) -> str:
        return "Create the outbox and the inbox"


class Migration(migrations.Migration):
    initial = True
    dependencies: ClassVar[list[Any]] = []
    operations: ClassVar[list[Any]] = [
        migrations.SeparateDatabaseAndState(
            database_operations=[CreateTables()],
            state_operations=[
                migrations.CreateModel(
                    "OutboxEvent",
                    [
                        ("id", models.BigAutoField(primary_key=True, serialize=False)),
                        ("event_id", models.CharField(max_length=255)),
                        ("exchange", models.CharField(max_length=255)),
                        ("routing_key", models.CharField(max_length=255)),
                        ("object_key", models.CharField(max_length=255, null=True)),
                        ("body", models.TextField()),
                        ("details", models.TextField()),
                        ("created", models.FloatField()),
                        ("token", models.CharField(max_length=36, null=True)),
                        ("leased_until", models.FloatField(default=0)),
                        ("parked", models.FloatField(default=0)),
                        ("error", models.TextField(null=True)),
                    ],
                    options={
                        "db_table": OUTBOX,
                        "verbose_name": "event in the outbox",
                        "verbose_name_plural": "events in the outbox",
                    },
                ),
                migrations.CreateModel(
                    "InboxNote",
                    [
                        *_inbox_key(),
                        ("event_id", models.CharField(max_length=255)),
                        ("handled", models.FloatField()),
                    ],
                    options={
                        "db_table": INBOX,
                        "verbose_name": "note in the inbox",
                        "verbose_name_plural": "notes in the inbox",
                    },
                ),
            ],
        )
    ]
