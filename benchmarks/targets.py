"""The goals of this library, as ratios within one run, and whether it reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.registry import DOMAIN_EVENT_BROKER, LIBRABBITMQ, OURS, PEERS, PIKA, Peer
from benchmarks.results import Results
from benchmarks.summary import short

#: From results and a variant: the ratio or the number, or None if something was not measured.
Measure = Callable[[Results, str], float | None]


@dataclass(frozen=True)
class Target:
    """One goal."""

    text: str
    scenario: str
    measure: Measure
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    def verdict(self, results: Results, variant: str) -> Verdict:
        measured = self.measure(results, variant)
        bound = self.at_least if self.at_least is not None else self.at_most
        assert bound is not None
        sign = ">=" if self.at_least is not None else "<="
        wanted = f"{sign} {short(bound)}{self.unit}"
        if measured is None:
            return Verdict(self.text, variant, wanted, "-", None)
        reached = measured >= bound if self.at_least is not None else measured <= bound
        return Verdict(self.text, variant, wanted, f"{short(measured)}{self.unit}", reached)


@dataclass(frozen=True)
class Verdict:
    """A target, and the measured value; `reached` is None if it was not measured."""

    text: str
    variant: str
    wanted: str
    measured: str
    reached: bool | None

    @property
    def word(self) -> str:
        return {True: "reached", False: "NOT reached", None: "not measured"}[self.reached]


def verdicts(results: Results) -> list[Verdict]:
    """Every target, in every kind of queue that it was measured in."""
    return list(_verdicts(results))


def _verdicts(results: Results) -> Iterator[Verdict]:
    for target in TARGETS:
        variants = results.variants(target.scenario)
        by_kind = variants if set(variants) <= {"classic", "quorum"} else [""]
        for variant in by_kind or [""]:
            yield target.verdict(results, variant)


# --- how they are measured -----------------------------------------------------------------------


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def _against(scenario: str, figure: str, peer: str) -> Measure:
    """Ours over one peer's."""

    def measure(results: Results, variant: str) -> float | None:
        return _ratio(
            results.median(scenario, variant, OURS, figure),
            results.median(scenario, variant, peer, figure),
        )

    return measure


def _any(_peer: Peer) -> bool:
    return True


def _against_best(
    scenario: str, among: Callable[[Peer], bool] = _any, only_variant: str = ""
) -> Measure:
    """Our rate over the best rate of the Python peers that confirm; in one variant, or in each."""
    peers = [
        peer.name
        for peer in PEERS
        if not (peer.is_ours or peer.is_c or peer.name == DOMAIN_EVENT_BROKER) and among(peer)
    ]

    def measure(results: Results, variant: str) -> float | None:
        variant = only_variant or variant
        rates = [results.median(scenario, variant, peer, "rate") for peer in peers]
        known = [rate for rate in rates if rate is not None]
        return _ratio(results.median(scenario, variant, OURS, "rate"), max(known, default=None))

    return measure


def _own(scenario: str, figure: str, scale: float = 1.0) -> Measure:
    """Our own number."""

    def measure(results: Results, variant: str) -> float | None:
        median = results.median(scenario, variant, OURS, figure)
        return None if median is None else median * scale

    return measure


def _import_beyond_pika(results: Results, variant: str) -> float | None:
    ours = results.median("import", variant, OURS, "seconds")
    pika = results.median("import", variant, PIKA, "seconds")
    return None if ours is None or pika is None else (ours - pika) * 1000


def _against_domain_event_broker(scenario: str) -> Measure:
    """Our rate over that of domain-event-broker, which declares classic queues only."""
    measure = _against(scenario, "rate", DOMAIN_EVENT_BROKER)
    return lambda results, _variant: measure(results, "classic")


def _growth(figure: str) -> Measure:
    """The deepest backlog's figure over the shallowest one's."""

    def measure(results: Results, _variant: str) -> float | None:
        depths = results.variants("backlog")
        if len(depths) < 2:
            return None
        return _ratio(
            results.median("backlog", depths[-1], OURS, figure),
            results.median("backlog", depths[0], OURS, figure),
        )

    return measure


TARGETS = (
    Target(
        "Bulk publishing, of librabbitmq's with the same window",
        "publish",
        _against("publish", "rate", LIBRABBITMQ),
        at_least=0.8,
        unit="x",
    ),
    Target(
        "Bulk publishing, of the best synchronous peer's",
        "publish",
        _against_best("publish", lambda peer: peer.synchronous),
        at_least=12,
        unit="x",
    ),
    Target(
        "Bulk publishing, of the best Python peer's",
        "publish",
        _against_best("publish"),
        at_least=3,
        unit="x",
    ),
    Target(
        "From 16 threads, of the best peer's",
        "threads",
        _against_best("threads"),
        at_least=1.5,
        unit="x",
    ),
    Target(
        "From 16 threads, of the best peer's that has threads",
        "threads",
        _against_best("threads", lambda peer: peer.has_threads),
        at_least=1.5,
        unit="x",
    ),
    Target(
        "One at a time, p50 of pika's blocking channel's",
        "one",
        _against("one", "p50", PIKA),
        at_most=1.0,
        unit="x",
    ),
    Target(
        "publish_domain_event one at a time, of domain-event-broker's rate",
        "faster",
        _against_domain_event_broker("one"),
        at_least=500,
        unit="x",
    ),
    Target(
        "publish_many, of domain-event-broker's rate",
        "faster",
        _against_domain_event_broker("publish"),
        at_least=500,
        unit="x",
    ),
    Target(
        "Consuming, of librabbitmq's that acks each",
        "consume",
        _against("consume", "rate", LIBRABBITMQ),
        at_least=0.5,
        unit="x",
    ),
    Target(
        "Consuming, of the best Python peer's, default options",
        "consume",
        _against_best("consume"),
        at_least=2.5,
        unit="x",
    ),
    Target(
        "Consuming, of the best Python peer's, all with a prefetch of 200",
        "prefetch",
        _against_best("prefetch", only_variant="200"),
        at_least=2.5,
        unit="x",
    ),
    Target(
        "Lateness of retries at 100/s, p99",
        "lateness",
        _own("lateness", "p99"),
        at_most=50,
        unit=" ms",
    ),
    Target(
        "First event after the broker's return",
        "restart",
        _own("restart", "seconds"),
        at_most=1.0,
        unit=" s",
    ),
    Target("Import, beyond pika's", "import", _import_beyond_pika, at_most=80, unit=" ms"),
    Target(
        "CPU per event, deepest backlog in the shallowest's",
        "backlog",
        _growth("cpu_us"),
        at_most=1.2,
        unit="x",
    ),
    Target(
        "Memory, deepest backlog in the shallowest's",
        "backlog",
        _growth("bytes"),
        at_most=1.1,
        unit="x",
    ),
)
