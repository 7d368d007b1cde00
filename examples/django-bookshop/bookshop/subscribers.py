from bookshop.models import Invoice
from domain_events import DomainEvent
from domain_events.django import on, once, publish_on_commit


@on("order.placed", name="bookshop-invoices")
@once
def issue_invoice(event: DomainEvent) -> None:
    invoice = Invoice.objects.create(order_id=event.data["order"])
    publish_on_commit("invoice.issued", {"invoice": invoice.pk}, event.domain_object_id)
