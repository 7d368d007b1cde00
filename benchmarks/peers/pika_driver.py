"""pika's BlockingConnection, as documented: confirms on, one connection a thread."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import driver
from driver import EXCHANGE, ROUTING_KEY, Data, Handle, Peer, body_of


class Pika(Peer):
    def load(self) -> None:
        global pika
        import pika

        # Deprecated in pika 1.5, but measured here: the warning must not become an error under
        # PYTHONWARNINGS=error. This process does not use pika otherwise.
        warnings.filterwarnings("ignore", "BlockingConnection is deprecated", DeprecationWarning)

    def connect(self) -> Any:
        return pika.BlockingConnection(pika.URLParameters(self.url)).channel()

    # -- publishing

    def open_publisher(self) -> None:
        self.publish = self.for_thread()  # type: ignore[method-assign]

    def for_thread(self) -> Callable[[Data], None]:
        channel = self.connect()
        channel.confirm_delivery()
        persistent = pika.BasicProperties(
            content_type="application/json", delivery_mode=pika.DeliveryMode.Persistent
        )

        def publish(data: Data) -> None:
            channel.basic_publish(EXCHANGE, ROUTING_KEY, body_of(data), persistent)

        return publish

    # -- consuming

    def consume(self, handle: Handle) -> None:
        def on_message(channel: Any, method: Any, _properties: Any, body: bytes) -> None:
            handle(json.loads(body)["data"])
            channel.basic_ack(method.delivery_tag)

        while True:
            try:
                channel = self.connect()
                if self.prefetch:
                    channel.basic_qos(prefetch_count=self.prefetch)
                channel.basic_consume(self.queue, on_message)
                channel.start_consuming()
            except pika.exceptions.AMQPConnectionError:
                # "Connection recovery" in pika's documentation: @retry(..., delay=5, ...)
                time.sleep(5)


if __name__ == "__main__":
    driver.main(Pika)
