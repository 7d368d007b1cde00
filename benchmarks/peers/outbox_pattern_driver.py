"""django-outbox-pattern: its model in the transaction, and ``manage.py publish``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import outbox_driver
from driver import EXCHANGE, ROUTING_KEY
from outbox_driver import INSERT, ORDERS, OUTBOX, django_database, event_of

_DESTINATION = f"/exchange/{EXCHANGE}/{ROUTING_KEY}"
#: So that RabbitMQ stores it.
_HEADERS = {"persistent": "true"}


class DjangoOutboxPattern(outbox_driver.Outbox):
    def load(self) -> None:
        import django
        from django.conf import settings

        settings.configure(
            DATABASES={"default": django_database(self.database)},
            INSTALLED_APPS=["django_outbox_pattern"],
            DJANGO_OUTBOX_PATTERN={
                "DEFAULT_STOMP_HOST_AND_PORTS": [("127.0.0.1", self.options["stomp"])],
                "DEFAULT_STOMP_USERNAME": "guest",
                "DEFAULT_STOMP_PASSCODE": "guest",
            },
            USE_TZ=True,
        )
        django.setup()
        from django.db import connection, transaction
        from django_outbox_pattern.models import Published

        self.connection = connection
        self.transaction = transaction
        self.published = Published

    def create(self) -> None:
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        with self.connection.cursor() as cursor:
            cursor.execute(ORDERS)

    def write(self, numbers: Sequence[int]) -> None:
        with self.transaction.atomic():
            for number in numbers:
                self._publish(number)

    def transact(self, number: int, kind: str) -> None:
        with self.transaction.atomic():
            with self.connection.cursor() as cursor:
                cursor.execute(f"{INSERT} (%s, %s)", [number, "me"])
            if kind == OUTBOX:
                self._publish(number)

    def _publish(self, number: int) -> None:
        body = event_of(number)
        self.published.objects.create(destination=_DESTINATION, body=body, headers=_HEADERS)

    def relay(self, ready: Callable[[], None]) -> None:
        from django.core.management import call_command

        ready()
        call_command("publish")


if __name__ == "__main__":
    outbox_driver.main(DjangoOutboxPattern)
