"""Typed data: an account is opened, and its owner is greeted.

``python accounts.py`` greets; ``python accounts.py 'Ada Lovelace' 9.90`` opens an account.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID, uuid4

from domain_events import DomainEvent, Subscriber, publish_domain_event


class Plan(Enum):
    FREE = "free"
    PAID = "paid"


@dataclass
class AccountOpened:
    """Version 2: the owner's name is one field."""

    account_id: UUID
    owner: str
    opened: datetime
    deposit: Decimal = Decimal(0)
    plan: Plan = Plan.FREE


def v1_to_v2(data: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had two of them."""
    return {**data, "owner": f"{data['first_name']} {data['last_name']}"}


# --- a service that publishes --------------------------------------------------------------------


def open_account(owner: str, deposit: Decimal) -> None:
    account = AccountOpened(uuid4(), owner, datetime.now(timezone.utc), deposit)
    publish_domain_event("account.opened", account, account.account_id, version=2)


# --- a service that subscribes -------------------------------------------------------------------

greetings: list[str] = []


def greet(event: DomainEvent[AccountOpened]) -> None:
    account = event.data  # an AccountOpened
    greetings.append(f"Dear {account.owner}, thank you for {account.deposit:.2f} euros.")
    print(greetings[-1], flush=True)


def make_subscriber() -> Subscriber:
    subscriber = Subscriber()
    subscriber.register(greet, "greetings", ["account.opened"], upcast={1: v1_to_v2})
    return subscriber


if __name__ == "__main__":
    if len(sys.argv) == 3:
        open_account(sys.argv[1], Decimal(sys.argv[2]))
    else:
        make_subscriber().start_consuming()
