"""The subscriber, as ``domain-events run shop.mails:subscriber`` imports it."""

from __future__ import annotations

from domain_events import DomainEvent, Subscriber

subscriber = Subscriber()


@subscriber.on("user.registered", name="shop-mails")
def send_welcome_mail(event: DomainEvent) -> None:
    print("a mail to", event.data["email"], flush=True)
