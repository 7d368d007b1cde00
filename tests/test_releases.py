"""Two releases of one subscriber, where one of them may do little."""

from __future__ import annotations

import onlooker
import pytest
from bench import Events, running
from rabbitmq_node import Node
from support import wait_until
from test_security import Users, documented, users

from domain_events import DomainEvent, Publisher, Subscriber

__all__ = ["users"]


def test_event_is_handed_back_also_by_a_user_who_may_not_have_the_delay_levels(
    killable_node: Node, unique: str, users: Users, caplog: pytest.LogCaptureFixture
) -> None:
    """After the same delays; it goes on consuming, also on its next connection."""
    exchange, queue = f"{unique}-x", f"{unique}-q"
    (url,) = users.make(documented("Subscriber without retries", exchange, queue))
    old, new = Subscriber(url, exchange), Subscriber(killable_node.url, exchange)
    by_old: Events = []
    by_new: Events = []
    old.register(by_old.append, queue, ["user.registered"])
    new.register(by_new.append, queue, ["user.*"])
    with Publisher(killable_node.url, exchange) as publisher:
        with running(old):
            publisher.publish_many(DomainEvent("user.deleted", n) for n in range(5))
            wait_until(lambda: "may not be declared by this user" in caplog.text)
            killable_node.ctl("close_all_connections", "to see it come back")
            publisher.publish(DomainEvent("user.registered", {}))
            wait_until(lambda: by_old or by_new)
        with running(old, new):
            wait_until(lambda: len(by_new) == 5)
    assert {event.data for event in by_new} == set(range(5))
    assert [event.routing_key for event in by_old] == ["user.registered"]
    wait_until(lambda: onlooker.count(killable_node.url, queue) == 0)
    assert caplog.text.count("may not be declared by this user") <= 4
