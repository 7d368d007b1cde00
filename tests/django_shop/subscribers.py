"""What the shop does about events."""

import os
from typing import Any

from django.db import connection

from django_shop.models import Invoice, Order
from domain_events import DomainEvent
from domain_events.django import on

PREFIX = os.environ.get("SHOP_QUEUES", "shop")


@on("order.placed", name=f"{PREFIX}-invoices")
def issue_invoice(event: DomainEvent[Any]) -> None:
    Invoice.objects.create(order=event.data["name"])
    assert connection.connection is not None


@on("order.counted", name=f"{PREFIX}-counts")
def count(event: DomainEvent[Any]) -> None:
    event.data["orders"].append(Order.objects.count())
