"""A subscriber under eventlet, where the main thread is not threading.main_thread()."""

import eventlet

eventlet.monkey_patch()

import sys  # noqa: E402
import time  # noqa: E402

from domain_events import DomainEvent, Subscriber  # noqa: E402


def handle(_event: DomainEvent) -> None:
    print("begin", flush=True)
    time.sleep(1.0)  # a slow handler, which SIGTERM must not interrupt
    print("end", flush=True)


subscriber = Subscriber(exchange=sys.argv[2])
subscriber.register(handle, sys.argv[1], ["#"])
print("ready", flush=True)
subscriber.start_consuming()
print("returned", flush=True)
