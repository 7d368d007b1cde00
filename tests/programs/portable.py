"""Publishes and consumes where much is missing that other systems do not have.

Usage: portable.py EXCHANGE QUEUE; the broker is in DOMAIN_EVENTS_URL.
"""

import os
import select
import signal
import socket
import sys

# As on Windows, as far as it goes without one: no fork, no epoll nor poll, no AF_UNIX.
for module, names in (
    (os, ("register_at_fork", "fork", "forkpty", "getppid")),
    (select, ("epoll", "poll", "kqueue")),
    (socket, ("socketpair", "AF_UNIX")),
    (signal, ("SIGKILL", "SIGHUP", "SIGALRM", "pthread_kill", "set_wakeup_fd")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

from domain_events import (  # noqa: E402
    DeadLetters,
    DomainEvent,
    Publisher,
    Retry,
    Subscriber,
    publish_domain_event,
)

exchange, queue = sys.argv[1:]
seen: list[int] = []


def handle(event: DomainEvent) -> None:
    if event.retries == 0:
        raise Retry(0.1)
    seen.append(event.data)
    if len(seen) == 10:
        subscriber.stop_consuming()


subscriber = Subscriber(exchange=exchange)
subscriber.register(handle, queue, ["#"], max_retries=1)
with Publisher(exchange=exchange) as publisher:
    publisher.publish_many(DomainEvent("a.b", n) for n in range(10))
publish_domain_event("nobody.listens", {})
subscriber.start_consuming(timeout=30)
assert sorted(seen) == list(range(10)), seen
with DeadLetters(queue) as letters:
    assert letters.count() == 0
print("done", flush=True)
