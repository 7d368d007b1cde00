"""A service for tests that forks after it has published, as preloading servers do.

Usage: forking.py EXCHANGE; the broker is in DOMAIN_EVENTS_URL.
"""

import multiprocessing
import os
import sys
import threading

from domain_events import DomainEvent, Publisher, publish_domain_event

exchange = sys.argv[1]
publisher = Publisher(exchange=exchange)


def publish(who: str, number: int) -> None:
    for n in range(number):
        publisher.publish(DomainEvent(f"from.{who}", {"n": n}))


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
    publish("fork", 20)
    sys.exit(0)  # runs the atexit functions, unlike the children of multiprocessing
os.waitpid(pid, 0)
for each in children:
    each.join(30)
    assert each.exitcode == 0, each.exitcode
busy.join()
publish("parent-again", 20)
publisher.close()
print("done", flush=True)
