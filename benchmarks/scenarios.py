"""The scenarios that are measured, each in some variants, with their figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.registry import (
    LIBRABBITMQ,
    OURS,
    PIKA,
    Peer,
)


@dataclass(frozen=True)
class Figure:
    """One number of a sample, and how to show it.

    :ivar key: its name in the output of a driver.
    :ivar scale: the factor for its unit.
    """

    key: str
    title: str
    unit: str
    more_is_better: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Variant:
    """A scenario with one set of options for the drivers."""

    label: str
    options: dict[str, Any] = field(hash=False)

    @property
    def is_quorum(self) -> bool:
        return self.options.get("queue_type") == "quorum"


@dataclass(frozen=True)
class Scenario:
    """What is measured, for which peers, and how often.

    :ivar does: the driver's scenario.
    :ivar series: its variants are numbers along one axis, to be drawn as lines.
    :ivar peers: the peers that take part; all, if empty.
    :ivar rounds: the maximum number of rounds.
    """

    name: str
    title: str
    does: str
    figures: tuple[Figure, ...]
    variants: tuple[Variant, ...]
    series: str = ""
    peers: tuple[str, ...] = ()
    rounds: int = 5
    own_node: bool = False
    note: str = ""

    def taking_part(self, variant: Variant, peers: tuple[Peer, ...]) -> list[Peer]:
        """The peers of these that are measured in this variant."""
        return [
            peer
            for peer in peers
            if (not self.peers or peer.name in self.peers)
            and peer.takes_part(self.name)
            and not (variant.is_quorum and "quorum" in peer.cannot)
        ]

    def seconds(self, variant: Variant) -> float:
        """About how long one sample takes, for the remaining time."""
        options = variant.options
        filled = float(options.get("fill") or options.get("count", 0)) / 20_000
        delay = float(options.get("delay", 0))
        extra = 14.0 if self.own_node else 1.0
        return extra + float(options.get("seconds", 0)) + filled + delay


_RATE = Figure("rate", "events", "/s", more_is_better=True)
_CPU = Figure("cpu_us", "CPU per event", "us")
_P50 = Figure("p50", "p50", "us")
_P99 = Figure("p99", "p99", "us")
_MEMORY = Figure("bytes", "memory", "MiB", scale=1 / 2**20)
_MILLISECONDS = Figure("seconds", "time", "ms", scale=1000)

# Enough waiting events that the fastest consumer is not done at once.
_EVENTS = (60_000, 10_000)

_Choice = Callable[[Any, Any], Any]


def scenarios(*, quick: bool = False) -> tuple[Scenario, ...]:
    """All of them; ``quick`` makes samples short and series sparse."""

    def either(full: Any, fast: Any) -> Any:
        return fast if quick else full

    return (*_headline(either), *_single(either), *_series(either))


def _kinds(**options: Any) -> tuple[Variant, ...]:
    return tuple(Variant(kind, {"queue_type": kind, **options}) for kind in ("classic", "quorum"))


def _along(key: str, values: tuple[int, ...], **options: Any) -> tuple[Variant, ...]:
    return tuple(Variant(f"{value:,}", {key: value, **options}) for value in values)


def _headline(either: _Choice) -> tuple[Scenario, ...]:
    seconds = either(1.5, 0.5)
    events = either(*_EVENTS)
    return (
        Scenario(
            "publish",
            "Confirmed publishing in bulk, one thread",
            "publish",
            (_RATE, _CPU),
            _kinds(seconds=seconds),
        ),
        Scenario(
            "threads",
            "Confirmed publishing from 16 threads",
            "threads",
            (_RATE, _CPU),
            _kinds(seconds=seconds, threads=16),
        ),
        Scenario(
            "one",
            "One confirmed event at a time",
            "one",
            (_P50, _P99, _CPU),
            _kinds(seconds=seconds),
        ),
        Scenario(
            "consume",
            "Consuming, with each client's default options",
            "consume",
            (_RATE, _CPU),
            _kinds(seconds=seconds, count=events),
        ),
        Scenario(
            "latency",
            "From publishing to handling, two processes, 500 events/s",
            "latency",
            (_P50, _P99),
            _kinds(seconds=either(5.0, 1.0), rate=500),
            rounds=3,
        ),
    )


def _single(either: _Choice) -> tuple[Scenario, ...]:
    once = (Variant("", {}),)
    retrying = {"retrying": True}
    late = (Figure("p50", "p50", "ms"), Figure("p99", "p99", "ms"))
    return (
        Scenario(
            "lateness",
            "Retries after 1 s, 100 events/s: how late they come",
            "lateness",
            late,
            (Variant("", {"rate": 100, "count": either(1000, 200), "delay": 1.0, **retrying}),),
            rounds=3,
        ),
        Scenario(
            "drain",
            "Retries that fall due at once: how fast they come",
            "drain",
            (_RATE,),
            (Variant("", {"count": either(5000, 1000), "delay": either(6.0, 3.0), **retrying}),),
            rounds=3,
            note="Where a client has fixed delays only, its retries fall due as fast as it asks.",
        ),
        Scenario(
            "restart",
            "From the broker's return after a crash to the first event handled",
            "restart",
            (_MILLISECONDS,),
            (Variant("", {"count": 1}),),
            rounds=either(2, 1),
            peers=either((), (OURS,)),
            own_node=True,
        ),
        Scenario(
            "first",
            "From the start of a process to its first confirmed event",
            "first",
            (_MILLISECONDS,),
            once,
        ),
        Scenario("import", "Import in a fresh process", "import", (_MILLISECONDS,), once),
        Scenario(
            "idle_publisher",
            "Memory of an idle publisher",
            "idle_publisher",
            (_MEMORY,),
            (Variant("", {"seconds": 0.3}),),
            rounds=3,
        ),
        Scenario(
            "idle_subscriber",
            "Memory of an idle subscriber",
            "idle_subscriber",
            (_MEMORY,),
            (Variant("", {"seconds": 0.3, "count": 1}),),
            rounds=3,
        ),
    )


def _series(either: _Choice) -> tuple[Scenario, ...]:
    seconds = either(1.5, 0.4)
    events = either(20_000, 8_000)
    reach = either((1, 10, 100, 1000), (1, 100))
    few = either(20_000, 4_000)
    return (
        Scenario(
            "prefetch",
            "Consuming by prefetch, quorum queue",
            "consume",
            (_RATE,),
            _along(
                "prefetch",
                either((1, 10, 50, 200, 2000), (1, 200)),
                queue_type="quorum",
                seconds=seconds,
                count=events,
            ),
            series="prefetch",
            rounds=2,
        ),
        Scenario(
            "workers",
            "Consuming by worker threads, classic queue",
            "consume",
            (_RATE, _CPU),
            _along(
                "workers",
                either((1, 4, 16), (1, 4)),
                queue_type="classic",
                seconds=seconds,
                count=events,
            ),
            series="workers",
            rounds=3,
        ),
        Scenario(
            "size",
            "Confirmed publishing in bulk by size of the body, quorum queue",
            "publish",
            (_RATE,),
            _along(
                "body_bytes",
                either((200, 1024, 10_240, 102_400, 1_048_576), (1024, 1_048_576)),
                queue_type="quorum",
                seconds=either(1.0, 0.4),
            ),
            series="bytes",
            peers=(OURS, PIKA, "aio-pika", LIBRABBITMQ),
            rounds=3,
        ),
        Scenario(
            "handlers",
            "Consuming by number of handlers, classic queues",
            "consume",
            (_CPU, Figure("registered_seconds", "register", "s")),
            _along("handlers", reach, seconds=4.0, count=few),
            series="handlers",
            peers=(OURS,),
            rounds=3,
        ),
        Scenario(
            "bindings",
            "Consuming by number of binding keys, quorum queue",
            "consume",
            (_CPU, Figure("registered_seconds", "register", "s")),
            _along("bindings", reach, seconds=4.0, count=few),
            series="binding keys",
            peers=(OURS,),
            rounds=3,
        ),
        Scenario(
            "backlog",
            "Consuming from a backlog, quorum queue",
            "consume",
            (_CPU, _RATE, _MEMORY),
            _along(
                "fill",
                either((10_000, 100_000, 1_000_000), (10_000, 40_000)),
                queue_type="quorum",
                seconds=6.0,
                count=either(10_000, 8_000),
            ),
            series="events queued",
            peers=(OURS, LIBRABBITMQ),
            rounds=either(2, 1),
        ),
    )


def names() -> list[str]:
    """The names of the scenarios, in order."""
    return [scenario.name for scenario in scenarios()]
