"""kombu: a pool of producers with confirm_publish, and a ConsumerMixin."""

from __future__ import annotations

from typing import Any

import driver
from driver import EXCHANGE, ROUTING_KEY, Data, Handle, Peer, envelope


class Kombu(Peer):
    def load(self) -> None:
        global kombu, pools, mixins
        import kombu
        from kombu import mixins, pools

    def connection(self) -> Any:
        # kombu would use "%2F" literally, as a name.
        url = self.url.replace("/%2F", "//")
        return kombu.Connection(url, transport_options={"confirm_publish": True})

    # -- publishing

    def open_publisher(self) -> None:
        pools.set_limit(self.options.get("threads", 1))
        self.producers = pools.producers[self.connection()]
        self.exchange = kombu.Exchange(EXCHANGE, "topic", durable=True, passive=True)

    def publish(self, data: Data) -> None:
        with self.producers.acquire(block=True) as producer:
            producer.publish(
                envelope(data),
                exchange=self.exchange,
                routing_key=ROUTING_KEY,
                serializer="json",
                delivery_mode=2,
            )

    # -- consuming

    def consume(self, handle: Handle) -> None:
        def on_message(body: Any, message: Any) -> None:
            handle(body["data"])
            message.ack()

        queue = kombu.Queue(self.queue, no_declare=True)
        prefetch = {"prefetch_count": self.prefetch} if self.prefetch else {}
        connection = self.connection()

        class Worker(mixins.ConsumerMixin):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                self.connection = connection

            def get_consumers(self, consumer: Any, _channel: Any) -> list[Any]:
                callbacks = [on_message]
                return [consumer([queue], callbacks=callbacks, accept=["json"], **prefetch)]

        Worker().run()


if __name__ == "__main__":
    driver.main(Kombu)
