"""What a message tells of how the broker moved it: the header ``x-death``. Pure.

https://www.rabbitmq.com/docs/dlx#effects
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from domain_events.message import Message


def with_death(message: Message, queue: str, reason: str) -> dict[str, Any]:
    """The headers of the message when it leaves the queue for that reason."""
    headers = dict(message.headers)
    death = {
        "count": 1,
        "reason": reason,
        "queue": queue,
        "time": datetime.fromtimestamp(int(time.time()), timezone.utc),
        "exchange": message.exchange,
        "routing-keys": [message.routing_key],
    }
    others = _deaths(headers)
    for index, other in enumerate(others):
        if (other["queue"], other["reason"]) == (queue, reason):
            death = {**other, "count": other["count"] + 1}
            del others[index]
            break
    headers["x-death"] = [death, *others]
    headers.setdefault("x-first-death-reason", reason)
    headers.setdefault("x-first-death-queue", queue)
    headers.setdefault("x-first-death-exchange", message.exchange)
    return headers


def would_go_in_circles(message: Message, queue: str) -> bool:
    """Whether the message was in that queue, and has come all the way since by itself.

    RabbitMQ drops it then: https://www.rabbitmq.com/docs/dlx#routing
    """
    for death in _deaths(message.headers):
        if death["reason"] == "rejected":
            return False
        if death["queue"] == queue:
            return True
    return False


def _deaths(headers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What can be read of it; anybody may have put anything there."""
    deaths = headers.get("x-death")
    if not isinstance(deaths, list):
        return []
    wanted = {"queue", "reason", "count"}
    return [each for each in deaths if isinstance(each, dict) and wanted <= each.keys()]
