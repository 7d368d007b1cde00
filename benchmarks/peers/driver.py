"""Shared by the drivers of all peers: the scenarios, and the protocol with the runner.

A driver is a separate program, run by the Python of its peer's virtual environment::

    python peers/kombu_driver.py publish '{"url": "amqp://...", "seconds": 2, ...}'

It prints a line of JSON when it is ready, waits for a line on its standard input if the runner has
to fill a queue first, measures, prints its figures as one line of JSON, and exits. The figures do
not include connecting and declaring, unless a scenario is about that.

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
#: Called with an event's data; returns the delay of its retry, 0 for none.
Handle = Callable[[Data], float]

EXCHANGE = "domain-events"
ROUTING_KEY = "bench.registered"

# The JSON around the text of an event without any.
_ENVELOPE_BYTES = 186
_WARM_UP = 200
# Concurrent tasks of an asynchronous client whose confirms are awaited together.
_GATHERED = 500


# --- the event that all peers publish --------------------------------------------------------


def data_of(number: int, body_bytes: int = 0) -> Data:
    """The data of one event; the body has 200 bytes, or about the requested size."""
    return {"n": number, "text": "x" * max(8, body_bytes - _ENVELOPE_BYTES)}


def envelope(data: Data, routing_key: str = ROUTING_KEY) -> Data:
    """The five keys of a domain event, with a unique id."""
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
    with open("/proc/self/statm") as file:  # noqa: PTH123 - avoids an import that would be measured
        return int(file.read().split()[1]) * resource.getpagesize()


def percentile(values: list[float], percent: float) -> float:
    """The percentile of the values, by nearest rank."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def spread(seconds: list[float], unit: float = 1e6) -> Data:
    """The percentiles of a list of durations, in microseconds by default."""
    return {
        "p50": percentile(seconds, 50) * unit,
        "p99": percentile(seconds, 99) * unit,
        "worst": max(seconds) * unit,
        "count": len(seconds),
    }


class Stopwatch:
    """Wall-clock and CPU time between its creation and `figures`."""

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


# --- the protocol with the runner ------------------------------------------------------------


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def leave(**figures: Any) -> None:
    """Print the figures and exit, from any thread, without closing the peer's connection.

    The shutdown is not measured, and the runner deletes whatever is left on the broker.
    """
    say(**figures)
    sys.stdout.flush()
    os._exit(0)


def wait_for_runner() -> None:
    """Wait until the runner has done its part; without a line, it is gone."""
    if not sys.stdin.readline():
        os._exit(3)


# --- peers ---------------------------------------------------------------------------------------


class Peer:
    """A synchronous client. A driver overrides the methods that its client supports."""

    def __init__(self, options: Data) -> None:
        self.options = options
        self.url: str = options["url"]
        self.queue: str = options.get("queue", "")
        self.queue_type: str = options.get("queue_type", "quorum")
        #: None: the client's default.
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
        """Publish all with confirms, in the best way that the client's documentation describes."""
        for data in many:
            self.publish(data)

    def for_thread(self) -> Callable[[Data], None]:
        """On a new thread: the function with which it publishes."""
        return self.publish

    # -- consuming

    def prepare(self) -> Data:
        """Connect, declare, be ready to consume; returns the information that the runner needs."""
        return {}

    def consume(self, handle: Handle) -> None:
        """Consume forever, acking each event after ``handle`` has returned."""
        raise NotImplementedError

    # -- called by scenarios; overridden for asynchronous clients

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
        """Publish from several threads at a time; returns the number of events."""
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
        """Publish at this rate; the time of sending is in each event's data."""
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
        """Start consuming; the loop then runs forever."""
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
    """Each event of a steady stream, with the time to wait before it.

    A client that is far behind continues with the last one at once, so that the run ends.
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
    """As many confirmed events as possible within the given seconds, from one thread."""
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
    """The publishing half of `latency`, in its own process."""
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
    """From the first handled event to the last one of the given number, or until the time is up."""
    wanted: int = peer.options["count"]
    longest: float = peer.options["seconds"]
    lock = threading.Lock()
    count = 0
    watch: Stopwatch | None = None

    def handle(_data: Data) -> float:
        nonlocal count, watch
        with lock:
            if watch is None:
                watch = Stopwatch()  # the first one is not counted: it ends no interval
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
    """Events that are retried after their first delivery: how late the retry is after its delay."""
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
    """Events whose retries all fall due together: how many arrive per second."""
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
                # All at one moment, if the client supports arbitrary delays.
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
    """Run the scenario given on the command line."""
    import logging

    logging.disable(logging.CRITICAL)
    SCENARIOS[sys.argv[1]](make(json.loads(sys.argv[2])))
