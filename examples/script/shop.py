"""A small service: it publishes when somebody registers, and has three handlers.

``python shop.py`` handles events; ``python shop.py Ada ada@example.org`` registers a user.

An event may be delivered twice, and a handler may fail halfway. So a row is stored under a key that
is the same each time. A follow-up event is published after that, with an id that is the same each
time (`derived`), and even if the row existed before: the first run may have ended between the two.
With Django or SQLAlchemy, ``once`` and the outbox do all of this.
"""

from __future__ import annotations

import sqlite3
import sys
from typing import ClassVar

from domain_events import (
    BrokerUnavailable,
    DomainEvent,
    EventNotConfirmed,
    Publisher,
    Reject,
    Retry,
    Subscriber,
    publish_domain_event,
)

database = sqlite3.connect(":memory:", check_same_thread=False)  # instead of one on a server
database.executescript("""
    CREATE TABLE invoices (id TEXT PRIMARY KEY, amount INTEGER);
    CREATE TABLE ledger (event TEXT PRIMARY KEY, amount INTEGER);
""")
publisher = Publisher()


class MailServer:
    """A fake that is down at times; it sends two mails with the same id only once."""

    up = True
    sent: ClassVar[dict[str, str]] = {}  # addresses, by id

    @classmethod
    def send(cls, mail_id: str, address: str) -> None:
        if not cls.up:
            raise ConnectionError("the mail server is down")
        cls.sent[mail_id] = address
        print("a mail to", address, flush=True)


def register_user(name: str, address: str) -> None:
    """The work of a web request, for example."""
    publish_domain_event("user.registered", {"name": name, "address": address})


def send_welcome_mail(event: DomainEvent) -> None:
    try:
        MailServer.send(event.uuid_string, event.data["address"])
    except ConnectionError as error:
        raise Retry(delay=600) from error


def issue_invoice(event: DomainEvent) -> None:
    issued = event.derived("invoice.issued", {"amount": 10})
    with database:
        database.execute(
            "INSERT INTO invoices VALUES (?, 10) ON CONFLICT DO NOTHING", (issued.uuid_string,)
        )
    publisher.publish(issued)


def book_invoice(event: DomainEvent) -> None:
    amount = event.data["amount"]
    if amount <= 0:
        raise Reject(f"an invoice over {amount}")
    with database:
        database.execute(
            "INSERT INTO ledger VALUES (?, ?) ON CONFLICT DO NOTHING", (event.uuid_string, amount)
        )


def make_subscriber() -> Subscriber:
    subscriber = Subscriber()
    subscriber.register(send_welcome_mail, "welcome-mail", ["user.registered"], max_retries=3)
    subscriber.register(
        issue_invoice,
        "invoices",
        ["user.registered"],
        max_retries=8,
        retry_on=(BrokerUnavailable, EventNotConfirmed),
    )
    subscriber.register(book_invoice, "ledger", ["invoice.*"])
    return subscriber


if __name__ == "__main__":
    if len(sys.argv) == 3:
        register_user(*sys.argv[1:])
    else:
        make_subscriber().start_consuming()
