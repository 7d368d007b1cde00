"""A service for tests with all probes, whose handler takes as long as each event demands.

Usage: probed.py QUEUE EXCHANGE FILE; the broker is in DOMAIN_EVENTS_URL. Prints its port.
"""

import sys
import time

from domain_events import DomainEvent, Subscriber
from domain_events.probes import HealthBeat, HealthServer


def handle(event: DomainEvent) -> None:
    print("begin", flush=True)
    time.sleep(event.data["seconds"])
    print("end", flush=True)


queue, exchange, file = sys.argv[1:]
subscriber = Subscriber(exchange=exchange)
subscriber.register(handle, queue, ["#"], handler_limit=0.5)
with (
    HealthServer(subscriber, host="127.0.0.1", port=0) as server,
    HealthBeat(subscriber, file=file, every=0.1),
):
    print("port", server.port, flush=True)
    subscriber.start_consuming()
print("returned", flush=True)
