"""What middleware costs: none, one, three, and each of the library's own, beside each other.

``python -m benchmarks --middleware`` runs this. Each sample is a process of its own, and in each
round every variant has one, so that a busy machine slows all of them alike. Processor time is shown
with the time by the clock, since the broker takes its share of the latter.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from domain_events import (
    Delivered,
    DomainEvent,
    Middleware,
    Outgoing,
    Publisher,
    Subscriber,
    configure,
)

_ROOT = Path(__file__).parent.parent
_EVENTS = 20_000
_WARM = 2_000
_ROUNDS = 5

Figures = dict[str, float]


class Empty(Middleware):
    """Overrides everything, and does nothing."""

    def publishing(self, outgoing: Outgoing) -> Callable[[BaseException | None], None]:
        return self._done

    def _done(self, error: BaseException | None) -> None:
        pass

    @contextlib.contextmanager
    def handling(self, event: DomainEvent) -> Iterator[None]:
        yield

    def delivered(self, delivered: Delivered) -> None:
        pass


def _prometheus() -> list[Middleware]:
    from domain_events.prometheus import Prometheus  # noqa: PLC0415

    return [Prometheus()]


def _opentelemetry() -> list[Middleware]:
    from opentelemetry import trace  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415

    from domain_events.opentelemetry import OpenTelemetry  # noqa: PLC0415

    trace.set_tracer_provider(TracerProvider())  # records everything, exports nothing
    return [OpenTelemetry()]


VARIANTS: dict[str, Callable[[], list[Middleware]]] = {
    "none": list,
    "one": lambda: [Empty()],
    "three": lambda: [Empty(), Empty(), Empty()],
    "Prometheus": _prometheus,
    "OpenTelemetry": _opentelemetry,
}


def sample(url: str, variant: str, events: int = _EVENTS) -> Figures:
    """Microseconds per event, of publishing many and of handling, by the clock and of processor."""
    configure(url, middleware=VARIANTS[variant]())
    exchange, queue = f"bench-middleware-{os.getpid()}", f"bench-middleware-{os.getpid()}-q"
    seen = 0
    marks: list[tuple[float, float]] = []

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def handle(_event: DomainEvent) -> None:
        nonlocal seen
        seen += 1
        if seen == _WARM:
            marks.append(now())
        elif seen == events:
            marks.append(now())
            subscriber.stop_consuming()

    with Subscriber(exchange=exchange) as subscriber, Publisher(exchange=exchange) as publisher:
        subscriber.register(handle, queue, ["#"])
        publisher.publish_many(DomainEvent("a.b", {"n": n}) for n in range(_WARM))
        marks.append(now())
        publisher.publish_many(DomainEvent("a.b", {"n": n}) for n in range(events - _WARM))
        marks.append(now())
        subscriber.start_consuming(timeout=120)
        consuming = subscriber.connections.consuming()
        assert consuming is not None
        consuming.delete([queue], exchange, 30)
    begun, sent, first, last = marks
    scale = 1e6 / (events - _WARM)
    return {
        f"{what}, {by}": (after - before) * scale
        for what, begin, end in (("publish", begun, sent), ("handle", first, last))
        for by, before, after in zip(("by the clock", "processor"), begin, end, strict=True)
    }


def measure(url: str, rounds: int = _ROUNDS, events: int = _EVENTS) -> dict[str, list[Figures]]:
    """Samples of each variant, in turn."""
    taken: dict[str, list[Figures]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        # Forwards and backwards, or the first would always come after the last.
        for name in list(VARIANTS)[:: -1 if number % 2 else 1]:
            command = [sys.executable, "-m", "benchmarks.layers", name, str(events)]
            environment = {**os.environ, "DOMAIN_EVENTS_URL": url}
            done = subprocess.run(
                command, cwd=_ROOT, env=environment, check=True, stdout=subprocess.PIPE, timeout=300
            )
            taken[name].append(json.loads(done.stdout))
    return taken


def show(taken: dict[str, list[Figures]]) -> str:
    """A table: medians in microseconds per event, and their ratio to those of none."""
    names = list(taken["none"][0])
    medians = {
        variant: {name: statistics.median(each[name] for each in samples) for name in names}
        for variant, samples in taken.items()
    }
    none = medians["none"]
    lines = ["us per event".ljust(16) + "".join(name.rjust(26) for name in names)]
    for variant, values in medians.items():
        ratios = [f"{values[each]:.1f} ({values[each] / none[each]:.2f}x)" for each in names]
        lines.append(variant.ljust(16) + "".join(ratio.rjust(26) for ratio in ratios))
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(sample(os.environ["DOMAIN_EVENTS_URL"], sys.argv[1], int(sys.argv[2]))))
