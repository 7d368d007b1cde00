"""What the drivers of all peers share: the scenarios, and how they talk to the runner.

A driver is a program of its own, run by the Python of its peer's own virtual environment::

    python peers/kombu_driver.py publish '{"url": "amqp://...", "seconds": 2, ...}'

It says so in a line of JSON when it is ready, waits for a line on its standard input where the
runner has to fill a queue first, measures, prints its figures as one line of JSON, and ends. What
it takes to connect and to declare is not in the figures, unless a scenario is about that.

Only the standard library is imported here, and a peer's library not before `Peer.load`.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

Data = dict[str, Any]
#: Called with an event's data; gives the delay after which it is wanted again, 0 for never.
Handle = Callable[[Data], float]

EXCHANGE = "domain-events"
ROUTING_KEY = "bench.registered"

# The JSON around the text of an event without any.
_ENVELOPE_BYTES = 186
_WARM_UP = 200
# Concurrent tasks of an asynchronous client whose confirms are awaited together.
_GATHERED = 500


# --- the event that everybody publishes ------------------------------------------------------


def data_of(number: int, body_bytes: int = 0) -> Data:
    """The data of one event; the body has 200 bytes, or about as many as asked for."""
    return {"n": number, "text": "x" * max(8, body_bytes - _ENVELOPE_BYTES)}


def envelope(data: Data, routing_key: str = ROUTING_KEY) -> Data:
    """The five keys of a domain event, with an id of its own."""
    return {
        "routing_key": routing_key,
        "data": data,
        "domain_object_id": "user-4711",
        "uuid_string": str(uuid.uuid4()),
        "timestamp": time.time(),
    }


def body_of(data: Data) -> bytes:
    return json.dumps(envelope(data)).encode()


# --- measuring -----------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def resident_bytes() -> int:
    """The memory that this process has now (not its peak)."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 - an import less in what is measured
        return int(file.read().split()[1]) * resource.getpagesize()


def percentile(values: list[float], percent: float) -> float:
    """The value below which so many percent of the values are; nearest rank."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def spread(seconds: list[float], unit: float = 1e6) -> Data:
    """The percentiles of a list of durations, in microseconds unless said otherwise."""
    return {
        "p50": percentile(seconds, 50) * unit,
        "p99": percentile(seconds, 99) * unit,
        "worst": max(seconds) * unit,
        "count": len(seconds),
    }


class Stopwatch:
    """Wall clock and CPU between its making and `figures`."""

    def __init__(self) -> None:
        self.at = time.perf_counter()
        self.cpu = cpu_seconds()

    def figures(self, count: int) -> Data:
        seconds = time.perf_counter() - self.at
        cpu = cpu_seconds() - self.cpu
        return {
            "count": count,
            "seconds": seconds,
            "rate": count / seconds,
            "cpu_us": cpu / max(1, count) * 1e6,
        }


# --- talking to the runner -------------------------------------------------------------------


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def leave(**figures: Any) -> None:
    """Print the figures and end, from any thread, without the peer's own way of closing.

    How long that takes is not measured, and what it leaves on the broker the runner deletes.
    """
    say(**figures)
    sys.stdout.flush()
    os._exit(0)


def wait_for_runner() -> None:
    """Until the runner has done its part; it went away if there is no line."""
    if not sys.stdin.readline():
        os._exit(3)


# --- peers ---------------------------------------------------------------------------------------


class Peer:
    """A synchronous client. A driver fills in what its client can do."""

    def __init__(self, options: Data) -> None:
        self.options = options
        self.url: str = options["url"]
        self.queue: str = options.get("queue", "")
        self.queue_type: str = options.get("queue_type", "quorum")
        #: None: what the client has by default.
        self.prefetch: int | None = options.get("prefetch")
        self.workers: int | None = options.get("workers")
        self.delay: float = options.get("delay", 1.0)
        self.body_bytes: int = options.get("body_bytes", 0)

    def load(self) -> None:
        """Import the client's library."""

    # -- publishing

    def open_publisher(self) -> None:
        """Connect, for publishing."""

    def publish(self, data: Data) -> None:
        """Publish one event; return when it is confirmed."""
        raise NotImplementedError

    def publish_many(self, many: Iterable[Data]) -> None:
        """Publish all, in the best way that the client's documentation has; confirmed."""
        for data in many:
            self.publish(data)

    def for_thread(self) -> Callable[[Data], None]:
        """On a new thread: what it is to publish with."""
        return self.publish

    # -- consuming

    def prepare(self) -> Data:
        """Connect, declare, be ready to consume; what the runner needs to know."""
        return {}

    def consume(self, handle: Handle) -> None:
        """Consume for ever, each event acked after ``handle`` returned."""
        raise NotImplementedError

    # -- how scenarios call it; an asynchronous client has its own ways

    def start(self) -> None:
        self.load()
        self.open_publisher()

    def one_by_one(self, many: Iterable[Data]) -> list[float]:
        latencies = []
        for data in many:
            begun = time.perf_counter()
            self.publish(data)
            latencies.append(time.perf_counter() - begun)
        return latencies

    def from_many(self, threads: int, seconds: float) -> int:
        """Publish from so many threads at a time; how many events."""
        barrier = threading.Barrier(threads + 1)
        counts = [0] * threads
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                publish = self.for_thread()
                publish(data_of(0))
                barrier.wait(30)
                for data in until(time.perf_counter() + seconds):
                    publish(data)
                    counts[number] += 1
            except BaseException as error:
                failures.append(error)
                barrier.abort()
                raise

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        barrier.wait(30)
        self.watch = Stopwatch()
        for worker in workers:
            worker.join()
        if failures:
            raise failures[0]
        return sum(counts)

    def at_rate(self, rate: float, seconds: float) -> None:
        """Publish so many a second; the time of sending is in each event's data."""
        for data, pause in paced(rate, seconds):
            if pause > 0:
                time.sleep(pause)
            self.publish({**data, "sent": time.monotonic()})


class AsyncPeer(Peer):
    """An asynchronous client: threads are tasks, and bulk is `gather`."""

    async def open(self) -> None:
        """Connect, for publishing."""

    async def apublish(self, data: Data) -> None:
        """Publish one event; return when it is confirmed."""
        raise NotImplementedError

    async def aprepare(self) -> Data:
        return {}

    async def aconsume(self, handle: Handle) -> None:
        """Start to consume; the loop then runs for ever."""
        raise NotImplementedError

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    def start(self) -> None:
        self.load()
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.run(self.open())

    def publish(self, data: Data) -> None:
        self.run(self.apublish(data))

    def publish_many(self, many: Iterable[Data]) -> None:
        self.run(self.gather(many))

    async def gather(self, many: Iterable[Data]) -> None:
        batch = []
        for data in many:
            batch.append(self.apublish(data))
            if len(batch) == _GATHERED:
                await asyncio.gather(*batch)
                batch = []
        await asyncio.gather(*batch)

    def one_by_one(self, many: Iterable[Data]) -> list[float]:
        async def publish() -> list[float]:
            latencies = []
            for data in many:
                begun = time.perf_counter()
                await self.apublish(data)
                latencies.append(time.perf_counter() - begun)
            return latencies

        latencies: list[float] = self.run(publish())
        return latencies

    def from_many(self, threads: int, seconds: float) -> int:
        async def work() -> int:
            count = 0
            for data in until(time.perf_counter() + seconds):
                await self.apublish(data)
                count += 1
            return count

        async def all_of_them() -> int:
            self.watch = Stopwatch()
            return sum(await asyncio.gather(*(work() for _ in range(threads))))

        count: int = self.run(all_of_them())
        return count

    def at_rate(self, rate: float, seconds: float) -> None:
        async def publish() -> None:
            for data, pause in paced(rate, seconds):
                if pause > 0:
                    await asyncio.sleep(pause)
                await self.apublish({**data, "sent": time.monotonic()})

        self.run(publish())

    def prepare(self) -> Data:
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        told: Data = self.run(self.aprepare())
        return told

    def consume(self, handle: Handle) -> None:
        self.run(self.aconsume(handle))
        self.loop.run_forever()


def until(deadline: float, body_bytes: int = 0) -> Iterator[Data]:
    """Events until a time of `time.perf_counter`."""
    number = 0
    while time.perf_counter() < deadline:
        yield data_of(number, body_bytes)
        number += 1


def paced(rate: float, seconds: float) -> Iterator[tuple[Data, float]]:
    """Each event of a steady stream, and how long to wait before it.

    Who is far behind goes on with the last one at once, so that it comes to an end.
    """
    total = int(rate * seconds)
    begun = time.monotonic()
    for number in range(total):
        pause = begun + number / rate - time.monotonic()
        if pause < -seconds:
            yield {**data_of(total - 1), "behind": True}, 0.0
            return
        yield data_of(number), pause


# --- scenarios: publishing -------------------------------------------------------------------


def publish(peer: Peer) -> None:
    """As many confirmed events as possible in so many seconds, from one thread."""
    peer.start()
    size = peer.body_bytes
    warm_up = _WARM_UP if size < 100_000 else 3
    peer.publish_many(until(time.perf_counter() + 0.3, size) if size else some(warm_up))
    taken = 0

    def counted() -> Iterator[Data]:
        nonlocal taken
        for data in until(time.perf_counter() + peer.options["seconds"], size):
            taken += 1
            yield data

    watch = Stopwatch()
    peer.publish_many(counted())
    leave(**watch.figures(taken))


def some(count: int) -> Iterator[Data]:
    return (data_of(number) for number in range(count))


def threads(peer: Peer) -> None:
    """The same from many threads, each of which waits for its own confirm."""
    peer.start()
    count = peer.from_many(peer.options["threads"], peer.options["seconds"])
    leave(**peer.watch.figures(count))


def one(peer: Peer) -> None:
    """One event at a time: how long the caller waits for its confirm."""
    peer.start()
    peer.one_by_one(some(20))
    watch = Stopwatch()
    latencies = peer.one_by_one(until(time.perf_counter() + peer.options["seconds"]))
    leave(**{**watch.figures(len(latencies)), **spread(latencies)})


def first(peer: Peer) -> None:
    """From the start of the process to its first confirmed event."""
    peer.start()
    peer.publish(data_of(0))
    leave(seconds=time.monotonic() - peer.options["spawned_at"], count=1)


def idle_publisher(peer: Peer) -> None:
    """Memory of a process that has published, and waits."""
    peer.start()
    peer.publish(data_of(0))
    time.sleep(peer.options["seconds"])
    leave(bytes=resident_bytes(), count=1)


def at_rate(peer: Peer) -> None:
    """The publishing half of `latency`, in a process of its own."""
    peer.start()
    say(ready=True)
    wait_for_runner()
    peer.at_rate(peer.options["rate"], peer.options["seconds"])
    leave(count=int(peer.options["rate"] * peer.options["seconds"]))


# --- scenarios: consuming --------------------------------------------------------------------


def _ready(peer: Peer) -> None:
    peer.load()
    say(ready=True, **peer.prepare())
    wait_for_runner()


def consume(peer: Peer) -> None:
    """From the first event handled to the last of so many, or until the time is over."""
    wanted: int = peer.options["count"]
    longest: float = peer.options["seconds"]
    lock = threading.Lock()
    count = 0
    watch: Stopwatch | None = None

    def handle(_data: Data) -> float:
        nonlocal count, watch
        with lock:
            if watch is None:
                watch = Stopwatch()  # the first one is not counted, as it ends nothing
                return 0
            count += 1
            if count >= wanted - 1 or time.perf_counter() - watch.at > longest:
                leave(**watch.figures(count), bytes=resident_bytes())
        return 0

    _ready(peer)
    peer.consume(handle)


def latency(peer: Peer) -> None:
    """From just before publishing, in another process, to the call of the handler."""
    total = int(peer.options["rate"] * peer.options["seconds"])
    skipped = total // 10  # the first tenth warms up
    latencies: list[float] = []
    lock = threading.Lock()

    def handle(data: Data) -> float:
        with lock:
            if data.get("behind"):
                leave(error=f"it publishes less than {peer.options['rate']} events/s")
            if data["n"] >= skipped:
                latencies.append(time.monotonic() - data["sent"])
            if data["n"] >= total - 1:
                leave(**spread(latencies))
        return 0

    _ready(peer)
    peer.consume(handle)


def lateness(peer: Peer) -> None:
    """Events that ask for a retry when they first come: how late after their delay it is."""
    total: int = peer.options["count"]
    asked: dict[int, float] = {}
    late: list[float] = []
    lock = threading.Lock()

    def handle(data: Data) -> float:
        now = time.monotonic()
        number = data["n"]
        if number not in asked:
            asked[number] = now
            return peer.delay
        with lock:
            late.append(now - asked[number] - peer.delay)
            if len(late) >= total:
                leave(**spread(late, 1e3))
        return 0

    _ready(peer)
    peer.consume(handle)


def drain(peer: Peer) -> None:
    """Events whose retries all fall due together: how many come a second."""
    total: int = peer.options["count"]
    asked: set[int] = set()
    again = 0
    begun = 0.0
    due = 0.0
    lock = threading.Lock()

    def handle(data: Data) -> float:
        nonlocal again, begun, due
        now = time.monotonic()
        with lock:
            due = due or now + peer.delay
            if data["n"] not in asked:
                asked.add(data["n"])
                # All at one moment, where the client can delay each as it likes.
                return max(0.1, due - now) if peer.options.get("any_delay") else peer.delay
            again += 1
            begun = begun or now
            if again >= total:
                seconds = now - begun
                leave(count=total, seconds=seconds, rate=(total - 1) / seconds)
        return 0

    _ready(peer)
    peer.consume(handle)


def restart(peer: Peer) -> None:
    """An event is being handled while the broker dies; when is it handled again?"""
    seen = 0

    def handle(_data: Data) -> float:
        nonlocal seen
        seen += 1
        if seen == 1:
            say(holding=True)
            wait_for_runner()  # the broker is down now; the ack will be lost
        else:
            leave(handled_at=time.monotonic(), count=1)
        return 0

    _ready(peer)
    peer.consume(handle)


def idle_subscriber(peer: Peer) -> None:
    """Memory of a process that has handled one event, and waits."""

    def report() -> None:
        leave(bytes=resident_bytes(), count=1)

    def handle(_data: Data) -> float:
        timer = threading.Timer(peer.options["seconds"], report)
        timer.daemon = True
        timer.start()
        return 0

    _ready(peer)
    peer.consume(handle)


SCENARIOS: dict[str, Callable[[Peer], None]] = {
    each.__name__: each
    for each in (
        publish,
        threads,
        one,
        first,
        idle_publisher,
        at_rate,
        consume,
        latency,
        lateness,
        drain,
        restart,
        idle_subscriber,
    )
}


def main(make: Callable[[Data], Peer]) -> None:
    """Run the scenario that the command line names."""
    import logging

    logging.disable(logging.CRITICAL)
    SCENARIOS[sys.argv[1]](make(json.loads(sys.argv[2])))
