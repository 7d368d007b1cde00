"""Forks as uWSGI does, in C, where Python does not notice; then uses all that it made before.

Usage: forking_in_c.py EXCHANGE QUEUE; the broker is in DOMAIN_EVENTS_URL.
"""

import ctypes
import os
import sys
import threading
import time
from typing import Any

from domain_events import (
    BrokerUnavailable,
    DeadLetters,
    DomainEvent,
    DomainEventsError,
    Publisher,
    Subscriber,
    publish_domain_event,
)
from domain_events import (
    publisher as publishers,
)
from domain_events.broker import memory

exchange, queue = sys.argv[1:]
embedded = os.environ["DOMAIN_EVENTS_URL"].startswith("memory://")
publisher = Publisher(exchange=exchange)
closed = Publisher(exchange=exchange)
subscriber = Subscriber(exchange=exchange)
letters = DeadLetters(queue)
seen: list[object] = []


def use(who: str) -> None:
    subscriber.register(lambda event: seen.append(event.data), f"{queue}-{who}", ["#"])
    publisher.publish(DomainEvent("a.b", who))
    assert publisher.publish_many([DomainEvent("a.b", who)]) == 1
    publish_domain_event("nobody.listens", {})
    assert letters.count() == 0
    stopping = threading.Thread(target=stop, args=(who,))
    stopping.start()
    subscriber.start_consuming()
    stopping.join()
    assert seen.count(who) >= 2, seen
    assert not publishes(closed)


def publishes(publisher: Publisher) -> bool:
    try:
        publisher.publish(DomainEvent("a.b", "closed"))
    except BrokerUnavailable:
        return False
    return True


def stop(who: str) -> None:
    deadline = time.monotonic() + 30
    while seen.count(who) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    subscriber.stop_consuming()


def hold_our_locks(held: threading.Event, go_on: threading.Event) -> None:
    """As a thread does that is in the middle of something while another one forks."""
    with publishers._publishers_lock, memory._stores_lock, subscriber._lock:
        connection: Any = publisher._publishing()
        inner = [memory.store("").lock] if embedded else [connection._lock, connection._link._lock]
        for lock in inner:
            lock.acquire()
        held.set()
        go_on.wait()
        for lock in inner:
            lock.release()


subscriber.register(print, queue, ["never"])
closed.publish(DomainEvent("a.b", "closed"))
closed.close()
use("parent")
seen.clear()
held, go_on = threading.Event(), threading.Event()
holder = threading.Thread(target=hold_our_locks, args=(held, go_on))
holder.start()
held.wait()
# Not `CDLL`, which would let other threads run meanwhile, perhaps in the middle of taking the GIL.
pid = ctypes.PyDLL(None).fork()
if pid == 0:
    try:
        if embedded:
            subscriber.subscriptions.clear()  # the queues are the parent's, too
            Subscriber().register(print, queue, ["never"])
        use("child")
        print("child done", flush=True)
    except DomainEventsError as error:
        print(f"child failed: {error!r}", flush=True)
    finally:
        os._exit(0)
go_on.set()
holder.join()
deadline = time.monotonic() + 60
while os.waitpid(pid, os.WNOHANG) == (0, 0):
    assert time.monotonic() < deadline, "the child hangs"
    time.sleep(0.05)
use("parent-again")
publisher.close()
letters.close()
print("parent done", flush=True)
