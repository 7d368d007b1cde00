"""RabbitMQ over pika: the only room that knows pika.

``nodes``: addresses and refusals. ``link``: one connection on one I/O thread, kept open. ``loop``,
``stream``, ``wire``: the thread's turns, what goes out and comes in, the frames there are many of.
``publishing``, ``consuming``: what is done on it. ``opening``, ``declaring``: channels and the
topology. ``consumer``, ``browser``: a queue. ``sending``: a message.

Why an I/O thread and pika's SelectConnection: confirms can be pipelined, heartbeats go on however
long a handler runs or a publisher idles, and any thread may publish.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from domain_events import log
from domain_events.broker.rabbitmq.consuming import RabbitConsuming
from domain_events.broker.rabbitmq.nodes import Nodes, check
from domain_events.broker.rabbitmq.publishing import RabbitPublishing
from domain_events.topology import Topology

# pika logs every lost connection a dozen times, with tracebacks, where we say it in one line.
# Whoever wants its lines sets the level of the logger "pika" before.
if logging.getLogger("pika").level == logging.NOTSET:
    logging.getLogger("pika").setLevel(logging.CRITICAL)
# It logs on our I/O threads, and on those of its own on which it looks up names for them.
log.redirect("pika")


class RabbitMQ:
    """One RabbitMQ, or a cluster of them; see `domain_events.broker.Broker`."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        check(urls)  # at once, before any connection is made
        self._urls = urls

    def publishing(self, declare: Topology, name: str) -> RabbitPublishing:
        return RabbitPublishing(Nodes(self._urls), declare, name)

    def consuming(self, name: str, on_failure: Callable[[], None]) -> RabbitConsuming:
        return RabbitConsuming(Nodes(self._urls), name, on_failure)
