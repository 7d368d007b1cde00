"""A release of a service: its handler writes down the id of each event, so that a kill loses none.

Usage: released.py LIBRARY NAME EXCHANGE BINDING_KEY [option=value ...]; the broker is in
DOMAIN_EVENTS_URL. LIBRARY is domain_events or domain_event_broker, whose options these are.
"""

import importlib
import os
import signal
import sys
from typing import Any

library, name, exchange, binding_key, *rest = sys.argv[1:]
module: Any = importlib.import_module(library)
options: dict[str, Any] = dict(option.split("=") for option in rest)
options = {key: int(value) if value.isdigit() else value for key, value in options.items()}


def handle(event: Any) -> None:
    if event.data.get("retry") and not event.retries:
        os.write(1, f"retry {event.uuid_string}\n".encode())
        raise module.Retry(event.data["retry"])
    os.write(1, f"event {event.uuid_string}\n".encode())


def stop(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if library == "domain_event_broker":
    signal.signal(signal.SIGTERM, stop)  # as its users do: it has no handler of its own
subscriber = module.Subscriber(os.environ["DOMAIN_EVENTS_URL"], exchange)
subscriber.register(handle, name, [binding_key], **options)
print("ready", flush=True)
subscriber.start_consuming()
print("returned", flush=True)
