"""A small service: it publishes when somebody registers, and has three handlers."""

from __future__ import annotations

from domain_events import DomainEvent, Reject, Retry, Subscriber, publish_domain_event

outbox: list[str] = []  # stands for a mail server
invoices: dict[str, int] = {}  # stands for a table


class MailServer:
    """Stands for one that is down at times."""

    up = True

    @classmethod
    def send(cls, address: str) -> None:
        if not cls.up:
            raise ConnectionError("the mail server is down")
        outbox.append(address)


def register_user(name: str, address: str) -> None:
    """What a web request does, for example."""
    publish_domain_event("user.registered", {"name": name, "address": address})


def send_welcome_mail(event: DomainEvent) -> None:
    try:
        MailServer.send(event.data["address"])
    except ConnectionError as error:
        raise Retry(delay=600) from error


def issue_invoice(event: DomainEvent) -> None:
    if event.uuid_string not in invoices:  # an event may come twice
        invoices[event.uuid_string] = 10
        publish_domain_event("invoice.issued", {"amount": 10})


def book_invoice(event: DomainEvent) -> None:
    if event.data["amount"] <= 0:
        raise Reject(f"an invoice over {event.data['amount']}")


def make_subscriber() -> Subscriber:
    subscriber = Subscriber()
    subscriber.register(send_welcome_mail, "welcome-mail", ["user.registered"], max_retries=3)
    subscriber.register(issue_invoice, "invoices", ["user.registered"])
    subscriber.register(book_invoice, "ledger", ["invoice.*"])
    return subscriber


if __name__ == "__main__":
    make_subscriber().start_consuming()
