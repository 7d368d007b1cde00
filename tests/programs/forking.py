"""A service for tests that forks after it has published, as preloading servers do.

Usage: forking.py EXCHANGE; the broker is in DOMAIN_EVENTS_URL.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable

from domain_events import (
    DomainEvent,
    Middleware,
    Outgoing,
    Publisher,
    configure,
    publish_domain_event,
)


class Process(Middleware):
    """Has each event say which process has announced it, and count how many were confirmed."""

    confirmed = 0

    def publishing(self, outgoing: Outgoing) -> Callable[[BaseException | None], None]:
        outgoing.headers["process"] = os.getpid()
        return self.done

    def done(self, error: BaseException | None) -> None:
        assert error is None
        self.confirmed += 1


middleware = Process()
configure(middleware=[middleware])

exchange = sys.argv[1]
publisher = Publisher(exchange=exchange)


def publish(who: str, number: int) -> None:
    for n in range(number):
        publisher.publish(DomainEvent(f"from.{who}", {"n": n, "process": os.getpid()}))


def child() -> None:
    publish("multiprocessing", 20)
    publish_domain_event("nobody.listens", {})


publish("parent", 1)
publish_domain_event("nobody.listens", {})

# Other threads publish while the process forks: whatever they hold is not in the child.
busy = threading.Thread(target=publish, args=("thread", 500))
busy.start()
children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(3)]
for each in children:
    each.start()
pid = os.fork()
if pid == 0:
    before = middleware.confirmed
    publish("fork", 20)
    assert middleware.confirmed == before + 20
    sys.exit(0)  # runs the atexit functions, unlike the children of multiprocessing
os.waitpid(pid, 0)
for each in children:
    each.join(30)
    assert each.exitcode == 0, each.exitcode
busy.join()
publish("parent-again", 20)
publisher.close()
print("done", flush=True)
