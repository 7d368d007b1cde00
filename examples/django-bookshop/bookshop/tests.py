from django.test import TestCase

from bookshop.models import Invoice
from domain_events.django import make_subscriber
from domain_events.django.testing import EventBroker


class OrderTest(TestCase):
    def setUp(self) -> None:
        self.event_broker = EventBroker().start()
        self.addCleanup(self.event_broker.stop)

    def test_order_is_published(self) -> None:
        order = self.client.post("/orders", {"isbn": "9780321125217"}).json()["order"]
        self.event_broker.assert_published("order.placed", {"order": order}, times=1)

    def test_invoice_is_issued_once(self) -> None:
        subscriber = make_subscriber()
        self.client.post("/orders", {"isbn": "9780321125217"})
        self.event_broker.deliver(subscriber)
        self.event_broker.deliver(subscriber, self.event_broker.published[0])  # a duplicate
        self.assertEqual(Invoice.objects.count(), 1)
        self.event_broker.assert_published("invoice.issued", times=1)
