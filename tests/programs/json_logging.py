"""A service for tests that writes its log as JSON, one object a line.

Usage: json_logging.py QUEUE EXCHANGE WORKERS; the broker is in DOMAIN_EVENTS_URL.
"""

import logging
import sys
import time

from pythonjsonlogger.json import JsonFormatter

from domain_events import DomainEvent, Subscriber

handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(JsonFormatter("%(levelname)s %(message)s"))
logging.basicConfig(level=logging.INFO, handlers=[handler])


def handle(event: DomainEvent) -> None:
    logging.getLogger("service").info("begin")
    time.sleep(event.data["seconds"])  # a handler that is as slow as the test wants it
    if event.data.get("fails"):
        raise ValueError("broken")


queue, exchange, workers = sys.argv[1:]
subscriber = Subscriber(exchange=exchange, workers=int(workers))
subscriber.register(handle, queue, ["#"])
subscriber.start_consuming()
