"""The measured clients, with their capabilities and guarantees."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Peer:
    """A client library, and the driver that uses it as its own documentation recommends.

    :ivar needs: what pip installs into its virtual environment; empty if it needs none.
    :ivar module: what a program imports before it can publish.
    :ivar synchronous: its best documented way to publish in bulk is a synchronous one.
    :ivar has_threads: it may be used from many; others have tasks, on one thread.
    :ivar declares: it declares its own queue; for the others the runner does.
    :ivar is_task_queue: it publishes to its own queues only.
    :ivar can: the scenarios it is measured in; all, if empty.
    :ivar cannot: the ones it is left out of, and why.
    :ivar lacks: which of the guarantees it cannot give, for the footnotes of the table.
    """

    name: str
    title: str
    driver: str
    needs: tuple[str, ...] = ()
    module: str = ""
    distribution: str = ""
    synchronous: bool = True
    has_threads: bool = True
    declares: bool = False
    is_task_queue: bool = False
    can: frozenset[str] = frozenset()
    cannot: dict[str, str] = field(default_factory=dict, hash=False)
    lacks: str = ""
    way: str = ""

    @property
    def is_ours(self) -> bool:
        return self.name == OURS

    @property
    def is_c(self) -> bool:
        return self.driver.endswith(".c")

    def takes_part(self, scenario: str) -> bool:
        """Whether it is measured in a scenario, as far as the client itself decides."""
        return scenario not in self.cannot and (not self.can or scenario in self.can)


OURS = "domain_events"
PIKA = "pika"
LIBRABBITMQ = "librabbitmq"
DOMAIN_EVENT_BROKER = "domain-event-broker"

_NO_RETRIES = "no retries with a delay"
_WITHOUT_RETRIES = {"lateness": _NO_RETRIES, "drain": _NO_RETRIES}
_ONE_WORKER = "one at a time"

PEERS = (
    Peer(
        OURS,
        "this library",
        "ours_driver.py",
        module="domain_events.broker.rabbitmq",  # with pika, which the first event loads
        distribution="domain-events-rabbitmq",
        declares=True,
        way="publish_many; publish_domain_event one at a time and from threads",
    ),
    Peer(
        DOMAIN_EVENT_BROKER,
        "domain-event-broker",
        "domain_event_broker_driver.py",
        needs=("domain-event-broker==3.0.2",),
        module="domain_event_broker",
        distribution="domain-event-broker",
        declares=True,
        cannot={
            "prefetch": "always 1",
            "workers": _ONE_WORKER,
            "restart": "ends when the connection is lost",
            "quorum": "declares classic queues",
        },
        lacks="publishes without confirms, over a connection for every event",
        way="publish_domain_event",
    ),
    Peer(
        PIKA,
        "pika (blocking)",
        "pika_driver.py",
        needs=("pika>=1.4.4,<2",),
        module="pika",
        distribution="pika",
        cannot={**_WITHOUT_RETRIES, "workers": _ONE_WORKER},
        way="BlockingChannel with confirm_delivery, a connection for each thread",
    ),
    Peer(
        "kombu",
        "kombu",
        "kombu_driver.py",
        needs=("kombu>=5.6,<6",),
        module="kombu",
        distribution="kombu",
        cannot={**_WITHOUT_RETRIES, "workers": _ONE_WORKER},
        way="pools.producers with confirm_publish; ConsumerMixin",
    ),
    Peer(
        "amqpstorm",
        "AMQPStorm",
        "amqpstorm_driver.py",
        needs=("AMQPStorm>=3.1,<4",),
        module="amqpstorm",
        distribution="AMQPStorm",
        cannot={**_WITHOUT_RETRIES, "workers": _ONE_WORKER},
        way="a channel with confirm_deliveries for each thread",
    ),
    Peer(
        "aio-pika",
        "aio-pika",
        "aio_pika_driver.py",
        needs=("aio-pika>=10,<11",),
        module="aio_pika",
        distribution="aio-pika",
        synchronous=False,
        has_threads=False,
        cannot={**_WITHOUT_RETRIES, "workers": _ONE_WORKER},
        way="connect_robust; gather of 500; 16 tasks instead of 16 threads",
    ),
    Peer(
        "faststream",
        "FastStream",
        "faststream_driver.py",
        needs=("faststream[rabbit]>=0.7,<0.8",),
        module="faststream.rabbit",
        distribution="faststream",
        synchronous=False,
        has_threads=False,
        cannot={**_WITHOUT_RETRIES, "workers": _ONE_WORKER},
        way="publish(persist=True); gather of 500; 16 tasks instead of 16 threads",
    ),
    Peer(
        "dramatiq",
        "dramatiq",
        "dramatiq_driver.py",
        needs=("dramatiq[rabbitmq]>=2.2,<3",),
        module="dramatiq",
        distribution="dramatiq",
        declares=True,
        is_task_queue=True,
        cannot={
            "prefetch": "twice the number of threads",
            "quorum": "declares classic queues",
        },
        lacks="sends a task to one actor instead of an event to all subscribers",
        way="RabbitmqBroker(confirm_delivery=True); 8 worker threads unless said",
    ),
    Peer(
        "rabbitkit",
        "rabbitkit",
        "rabbitkit_driver.py",
        needs=("rabbitkit[all-brokers]>=0.19.1,<0.20",),
        module="rabbitkit",
        distribution="rabbitkit",
        synchronous=False,
        declares=True,
        way="AsyncBroker with batches in bulk, SyncBatchPublisher from threads, else SyncBroker",
    ),
    Peer(
        LIBRABBITMQ,
        "librabbitmq (C)",
        "librabbitmq_driver.c",
        can=frozenset({"publish", "one", "consume", "prefetch", "size", "backlog", "quorum"}),
        lacks="the practical limit: no JSON, no events, no reconnecting",
        way="the same window as this library; each delivery acked by itself",
    ),
)

BY_NAME = {peer.name: peer for peer in PEERS}
