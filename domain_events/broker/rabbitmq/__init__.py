"""RabbitMQ over pika: the only package that uses AMQP and pika.

From the top: `publishing` and `consuming` are the two kinds of connections; `consumer`, `browser`
and `walk` use a queue. `channel` opens a channel and declares on it; `topology` holds the
declarations, `envelope` the properties of messages, `errors` the meaning of refusals. `link` keeps
a connection open on an I/O thread, to one of the `nodes`; `loop`, `transport` and `wire` are its
loop, its bytes and its frames; `attempts` and `turns` keep connections and channels from harming
one another; `doorbell` wakes the thread.

Why an I/O thread and pika's SelectConnection: confirms can be pipelined, heartbeats go on however
long a handler runs or a publisher idles, and any thread may publish.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from domain_events import log
from domain_events.broker import Exchange, OnChange, ignore_change
from domain_events.broker.rabbitmq.consuming import RabbitConsuming
from domain_events.broker.rabbitmq.nodes import Nodes, check
from domain_events.broker.rabbitmq.publishing import RabbitPublishing

# pika logs every lost connection a dozen times, with tracebacks; this library logs one line. To see
# pika's lines, set the level of the logger "pika" before this import.
if logging.getLogger("pika").level == logging.NOTSET:
    logging.getLogger("pika").setLevel(logging.CRITICAL)
# It logs on our I/O threads, and on its own threads that resolve host names for them.
log.redirect("pika")


class RabbitMQ:
    """One RabbitMQ, or a cluster of them; see `domain_events.broker.Broker`."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        check(urls)  # at once, before any connection is made
        self._urls = urls

    def publishing(
        self, name: str, declare: Exchange | None = None, on_change: OnChange = ignore_change
    ) -> RabbitPublishing:
        return RabbitPublishing(Nodes(self._urls), declare, name, on_change)

    def consuming(
        self, name: str, on_failure: Callable[[], None], on_change: OnChange = ignore_change
    ) -> RabbitConsuming:
        return RabbitConsuming(Nodes(self._urls), name, on_failure, on_change)
