"""One sample: a fresh process of one peer, run through one scenario."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from rabbitmq_node import Node

from benchmarks import brokerside, environments
from benchmarks.registry import Peer
from benchmarks.scenarios import Scenario, Variant

# The time that a sample may take beyond its own; after that the client or the broker hangs.
_GRACE = 60.0
_FROM_AN_OUTAGE = 120.0

_numbers = itertools.count(1)


class SampleFailed(Exception):
    """There are no figures; the message has the reason."""


def take(peer: Peer, scenario: Scenario, variant: Variant, url: str, node: Node | None) -> Any:
    """The figures of one sample.

    :raises SampleFailed: there are none within the deadline.
    """
    if scenario.does == "import":
        return _import(peer)
    options = {
        **variant.options,
        "url": url,
        "queue": f"bench-{peer.name}-{next(_numbers)}",
        "window": _our_window(),
        # Clients with predefined delays retry at their own pace.
        "any_delay": peer.is_ours or peer.name == "dramatiq",
    }
    try:
        # A publisher's events go into a queue without consumers, unless it has its own queues.
        own = peer.declares and (peer.is_task_queue or scenario.does not in _PUBLISHING)
        brokerside.declare(
            url, None if own else options["queue"], options.get("queue_type", "quorum")
        )
        with Driver(peer, scenario.does, options) as driver:
            return _CONDUCTORS.get(scenario.does, _conduct)(driver, options, node)
    except (environments.Unavailable, brokerside.ConnectionFailed, TimeoutError) as error:
        raise SampleFailed(str(error)) from error
    finally:
        with contextlib.suppress(Exception):  # the next sample has its own queue
            brokerside.delete(url, options["queue"], options.get("handlers", 0))


_PUBLISHING = ("publish", "threads", "one", "first", "idle_publisher")


def _our_window() -> int:
    """How many messages this library keeps in flight; librabbitmq gets the same window."""
    from domain_events.broker.rabbitmq import publishing  # noqa: PLC0415

    return publishing._MOST_IN_FLIGHT


def _import(peer: Peer) -> Any:
    code = (
        "import sys, time; begun = time.perf_counter(); __import__(sys.argv[1]);"
        "print(time.perf_counter() - begun)"
    )
    words = [str(environments.python(peer)), "-c", code, peer.module]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_GRACE, check=False)
    if done.returncode:
        raise SampleFailed(_last_line(done.stderr))
    return {"seconds": float(done.stdout), "count": 1}


class Driver:
    """A driver's process: reads its output, writes its input, and ends it."""

    def __init__(self, peer: Peer, does: str, options: dict[str, Any]) -> None:
        words = environments.command(peer)
        options = {**options, "spawned_at": time.monotonic()}
        words += _c_arguments(does, options) if peer.is_c else [does, json.dumps(options)]
        self._peer = peer
        self._options = options
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def twin(self, does: str) -> Driver:
        """Another process of the same peer, for the other half of a scenario."""
        return Driver(self._peer, does, self._options)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(line)
        self._said.put("")

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next line of its output."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise SampleFailed(f"nothing within {seconds:.0f} s{self._reason()}") from None
            if not line:
                self._process.wait(5)
                raise SampleFailed(f"ended with code {self._process.returncode}{self._reason()}")
            with contextlib.suppress(ValueError):  # output of its library
                said = json.loads(line)
                if isinstance(said, dict):
                    if "error" in said:
                        raise SampleFailed(said["error"])
                    return said

    def go(self) -> None:
        """Signal that the runner has done its part."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except OSError:
            raise SampleFailed(f"it has ended{self._reason()}") from None

    def _reason(self) -> str:
        self._errors.seek(0)
        said = _last_line(self._errors.read())
        return f": {said}" if said else ""

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait(10)
        self._reader.join(5)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _c_arguments(does: str, options: dict[str, Any]) -> list[str]:
    keys = ("seconds", "count", "window", "prefetch", "body_bytes")
    defaults = {"body_bytes": 200}
    values = [str(options.get(key) or defaults.get(key, 0)) for key in keys]
    return [does, str(urlsplit(options["url"]).port), options["queue"], *values]


# --- how each scenario is conducted ------------------------------------------------------------


def _patience(options: dict[str, Any]) -> float:
    return _GRACE + float(options.get("seconds", 0)) + float(options.get("delay", 0))


def _conduct(driver: Driver, options: dict[str, Any], _node: Node | None) -> Any:
    return driver.hear(_patience(options))


def _consume(driver: Driver, options: dict[str, Any], _node: Node | None) -> Any:
    told = _fill(driver, options)
    driver.go()
    return {**driver.hear(_patience(options)), **_kept(told)}


def _fill(driver: Driver, options: dict[str, Any]) -> dict[str, Any]:
    told = driver.hear(_GRACE)
    letter = brokerside.Letter.asked_for(told, options)
    handlers = options.get("handlers", 0)
    queues = [f"{options['queue']}-{number}" for number in range(handlers)] or [options["queue"]]
    count = options.get("fill") or options["count"]
    brokerside.fill(options["url"], queues, letter, count, told.get("taken", 0))
    return told


def _kept(told: dict[str, Any]) -> dict[str, Any]:
    return {key: told[key] for key in ("registered_seconds",) if key in told}


def _latency(driver: Driver, options: dict[str, Any], _node: Node | None) -> Any:
    driver.hear(_GRACE)
    with driver.twin("at_rate") as publishing:
        publishing.hear(_GRACE)
        driver.go()
        publishing.go()
        return driver.hear(_patience(options))


def _lateness(driver: Driver, options: dict[str, Any], _node: Node | None) -> Any:
    letter = brokerside.Letter.asked_for(driver.hear(_GRACE), options)
    driver.go()
    brokerside.feed(options["url"], letter, options["count"], options["rate"])
    return driver.hear(_patience(options))


def _restart(driver: Driver, options: dict[str, Any], node: Node | None) -> Any:
    if node is None:
        raise SampleFailed("needs its own broker, to kill it")
    _fill(driver, options)
    node.sync()  # otherwise the broker may forget the queue when it is killed
    driver.go()
    driver.hear(_GRACE)
    node.kill()
    driver.go()
    node.start(wait=False)
    accepted_at = _accepted_at(node.port)
    figures = driver.hear(_FROM_AN_OUTAGE)
    return {"count": 1, "seconds": figures["handled_at"] - accepted_at}


def _accepted_at(port: int) -> float:
    """When the broker answered AMQP again, to a few milliseconds."""
    deadline = time.monotonic() + _FROM_AN_OUTAGE
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=1) as probe,
        ):
            probe.sendall(b"AMQP\x00\x00\x09\x01")
            if probe.recv(1) == b"\x01":
                return time.monotonic()
        time.sleep(0.005)
    raise SampleFailed("the broker did not come back")


_CONDUCTORS = {
    "consume": _consume,
    "drain": _consume,
    "idle_subscriber": _consume,
    "latency": _latency,
    "lateness": _lateness,
    "restart": _restart,
}


def available(peers: tuple[Peer, ...]) -> Iterator[tuple[Peer, str, str]]:
    """Each peer with its version, or with the reason why it cannot be measured here."""
    for peer in peers:
        try:
            environments.command(peer)
            yield peer, environments.version(peer), ""
        except environments.Unavailable as error:
            yield peer, "", str(error)
