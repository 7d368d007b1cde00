from django.db import transaction
from django.http import HttpRequest, JsonResponse

from bookshop.models import Order
from domain_events.django import publish_on_commit


def place_order(request: HttpRequest) -> JsonResponse:
    with transaction.atomic():
        order = Order.objects.create(isbn=request.POST["isbn"])
        event = publish_on_commit("order.placed", {"order": order.pk}, domain_object_id=order.pk)
    return JsonResponse({"order": order.pk, "event": event.uuid_string})
