"""A subscriber whose handler ends its process at an event with the data "poison".

``poisoned.py URL EXCHANGE QUEUE FILE HOW``: starts it again and again, in a process of its own each
time, until one ends in order: when nothing has come for two seconds. Prints how many it took. Each
writes the data of what it has handled to FILE, a line each.

The processes are forks of this one, which has nothing but its imports: those take most of a start.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

from domain_events import DomainEvent, Subscriber


def main(url: str, exchange: str, queue: str, file: str, how: str) -> None:
    subscriber = Subscriber(url, exchange)
    idle = threading.Event()

    def handle(event: DomainEvent) -> None:
        idle.set()
        if event.data == "poison":
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "sys.exit":
                sys.exit("poison")
            os._exit(1)
        with open(file, "a") as lines:  # noqa: PTH123
            lines.write(f"{event.data}\n")

    def watch() -> None:
        while idle.wait(2.0):
            idle.clear()
        subscriber.stop_consuming()

    subscriber.register(handle, queue, ["#"])
    threading.Thread(target=watch, daemon=True).start()
    subscriber.start_consuming()


if __name__ == "__main__":
    starts = 0
    while starts < 40:
        starts += 1
        process = multiprocessing.get_context("fork").Process(target=main, args=sys.argv[1:])
        process.start()
        process.join()
        if process.exitcode == 0:
            break
    print(starts)
