"""A shop's subscribers, to be shown by ``domain-events topology show orders:subscriber``."""

from __future__ import annotations

from dataclasses import dataclass

from domain_events import Backoff, DomainEvent, Subscriber

subscriber = Subscriber(workers=4)


@dataclass
class OrderPlaced:
    order: str
    amount: int


@subscriber.on(
    "order.placed",
    name="invoices",
    max_retries=5,
    retry_on=(ConnectionError, TimeoutError),
    backoff=Backoff(first=10),
    ordered=True,
)
def issue_invoice(event: DomainEvent[OrderPlaced]) -> None:
    print("an invoice of", event.data.amount)


@subscriber.on("user.registered", "order.*", name="mails", max_retries=3)
def send_mail(event: DomainEvent) -> None:
    print("a mail about", event.routing_key)


@subscriber.on("#", name="audit", durable=False)
def audit(event: DomainEvent) -> None:
    print(event.routing_key)
