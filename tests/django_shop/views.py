"""An order is placed by a request."""

from typing import Any

from django.db import transaction
from django.http import HttpRequest, HttpResponse

from django_shop.models import Order
from domain_events.django import publish_on_commit


def place(request: HttpRequest, name: str) -> HttpResponse:
    """Fails, after it has published, for a name that begins with "bad"."""
    Order.objects.create(name=name)
    event = publish_on_commit("order.placed", {"name": name})
    if name.startswith("bad"):
        raise ValueError(name)
    answer: Any = HttpResponse(event.uuid_string, headers={"within": in_atomic_block()})
    return answer


def in_atomic_block() -> bool:
    return bool(transaction.get_connection().in_atomic_block)
