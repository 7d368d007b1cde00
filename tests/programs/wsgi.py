"""A web service for tests: publishes as it is imported, and with each request.

The broker is in DOMAIN_EVENTS_URL, the exchange in EXCHANGE.
"""

import os
from collections.abc import Callable, Iterable

from domain_events import DomainEvent, DomainEventsError, Publisher, publish_domain_event

publisher = Publisher(exchange=os.environ["EXCHANGE"], timeout=20)
publisher.publish(DomainEvent("from.import", {"pid": os.getpid()}))
publish_domain_event("nobody.listens", {})


def application(
    _environment: dict[str, object], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    try:
        publisher.publish(DomainEvent("from.worker", {"pid": os.getpid()}))
        publish_domain_event("nobody.listens", {})
        publisher.publish_many([DomainEvent("from.worker", {"pid": os.getpid()})])
    except DomainEventsError as error:
        start_response("500 Failed", [("Content-Type", "text/plain")])
        return [str(error).encode()]
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
