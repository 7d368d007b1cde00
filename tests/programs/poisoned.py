"""A subscriber whose handler ends its process at an event with the data "poison".

``poisoned.py URL EXCHANGE QUEUE FILE HOW``: writes the data of what it has handled to FILE, a line
each; ends when nothing has come for half a second.
"""

from __future__ import annotations

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
    main(*sys.argv[1:])
