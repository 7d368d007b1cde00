"""A service for tests: handles events and writes down each step, so that a kill loses no record.

Usage: subscriber.py QUEUE EXCHANGE [option=value ...]; the broker is in DOMAIN_EVENTS_URL.
"""

import os
import sys
import time

from domain_events import DomainEvent, Subscriber


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one go, since several threads do it


def handle(event: DomainEvent) -> None:
    say(f"begin {event.data['n']} {event.retries}")
    if event.data.get("seconds"):
        # A slow handler, to be interrupted or killed in the middle.
        time.sleep(event.data["seconds"])
    say(f"end {event.data['n']}")


queue, exchange, *rest = sys.argv[1:]
options = dict(option.split("=") for option in rest)
subscriber = Subscriber(exchange=exchange, workers=int(options.get("workers", 1)))
subscriber.register(handle, queue, ["#"])
print("ready", flush=True)
try:
    subscriber.start_consuming()
except KeyboardInterrupt:
    print("interrupted", flush=True)
else:
    print("returned", flush=True)
