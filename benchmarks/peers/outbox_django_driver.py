"""This library's outbox, with Django."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import outbox_driver
from driver import ROUTING_KEY, Data
from outbox_driver import AFTER, INSERT, ORDERS, OUTBOX, WITHOUT, about, django_database, event_of
from outbox_sqlalchemy_driver import domain_event


class Ours(outbox_driver.Outbox):
    kinds = (WITHOUT, AFTER, OUTBOX)

    def load(self) -> None:
        import django
        from django.conf import settings

        settings.configure(
            DATABASES={"default": django_database(self.database)},
            INSTALLED_APPS=["domain_events.django"],
            DOMAIN_EVENTS={"URL": self.url, "OUTBOX": True},
            USE_TZ=True,
        )
        django.setup()
        from django.db import connection, transaction

        from domain_events.django import publish_on_commit

        self.connection = connection
        self.transaction = transaction
        self.publish = publish_on_commit

    def create(self) -> None:
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        with self.connection.cursor() as cursor:
            cursor.execute(ORDERS)

    def write(self, numbers: Sequence[int]) -> None:
        """Leased to nobody, as what a process that has died left behind half a minute ago."""
        from domain_events import outbox
        from domain_events.django.database import executing

        with self.transaction.atomic():
            for number in numbers:
                outbox.write(executing(self.connection), "postgresql", domain_event(number))

    def transact(self, number: int, kind: str) -> None:
        with self.transaction.atomic():
            with self.connection.cursor() as cursor:
                cursor.execute(f"{INSERT} (%s, %s)", [number, "me"])
            if kind != WITHOUT:
                self._publish(number, kind)

    def _publish(self, number: int, kind: str) -> None:
        data: Data = event_of(number)["data"]
        self.publish(ROUTING_KEY, data, about(number), outbox=kind == OUTBOX)

    def settle(self) -> None:
        from domain_events.django.database import outbox_database
        from domain_events.outbox import courier

        assert courier(outbox_database("default")).wait(60)

    def relay(self, ready: Callable[[], None]) -> None:
        from django.core.management import call_command

        ready()
        call_command("relay_domain_events", stdout=io.StringIO())


if __name__ == "__main__":
    outbox_driver.main(Ours)
