"""The scenarios: publishers, subscribers, and the faults that are injected. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from faults import kinds, rolling, schedule
from faults.schedule import Fault, Group


@dataclass(frozen=True)
class Publishing:
    """The work of each publisher process."""

    processes: int = 3
    threads: int = 3  # that publish one event at a time
    pause: float = 0.025  # seconds between them
    batch: int = 100  # events at a time with publish_many, on a separate thread; 0: none
    batch_pause: float = 0.7
    timeouts: Sequence[float] = (1.0, 3.0, 8.0, 20.0)
    topics: Mapping[str, float] = field(default_factory=lambda: {"event": 1})
    mix: Mapping[str, float] = field(default_factory=lambda: kinds.MIXED)


@dataclass(frozen=True)
class Subscribing:
    """The work of the processes of one subscriber."""

    processes: int = 2
    workers: int = 3
    max_retries: int = 3
    prefetch_count: int | None = None
    slow: tuple[float, float] = (0.02, 0.15)  # how long a handler of a slow event sleeps


@dataclass(frozen=True)
class Scenario:
    """A load and its faults."""

    name: str
    about: str
    publishing: Publishing = Publishing()
    subscribers: Mapping[str, Subscribing] = field(
        default_factory=lambda: {
            "mailer": Subscribing(),
            "ledger": Subscribing(workers=1, max_retries=1),
        }
    )
    #: Drawn from, in random order ...
    kinds: Sequence[str] = ()
    #: ... or these, again and again, after gaps of this many seconds.
    faults: Sequence[Fault] = ()
    gaps: tuple[float, float] = (1.0, 2.0)
    #: Events that are published first, and all wait for their retry when the faults begin.
    waiting: int = 0
    #: Processes of the subscriber that is deployed release after release.
    rolling: int = 0
    cluster: bool = False

    def schedule(self, seed: int, left_out: Sequence[str] = ()) -> Iterator[Group]:
        """An endless series of groups of faults."""
        if self.faults:
            return schedule.repeated(seed, self.faults, *self.gaps)
        return schedule.mixed(seed, [kind for kind in self.kinds if kind not in left_out])

    def needed(self) -> set[str]:
        """The kinds of faults in it."""
        return {*self.kinds, *(fault.kind for fault in self.faults)}


# All topics, whether a release lists them at the time or not.
_ROLLING = dict.fromkeys(rolling.PUBLISHED, 1.0)
_FEW = Publishing(processes=2, threads=2, pause=0.02, batch=0)
# Slow handlers, so that a queue builds up behind them.
_SLOW_HANDLERS = {"mailer": Subscribing(workers=4, slow=(0.05, 0.2))}

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "mixed",
            "everything, singly and together",
            Publishing(topics={"event": 4 * len(_ROLLING), **_ROLLING}),
            kinds=schedule.MIXED,
            rolling=2,
        ),
        Scenario(
            "rolling",
            "binding keys come, go and are rolled back while old and new releases run side by side",
            Publishing(processes=2, threads=2, batch=50, topics=_ROLLING),
            {},
            kinds=["rolled-forward", "rolled-forward", "rolled-back"],
            rolling=3,
        ),
        Scenario(
            "poison",
            "an event kills its process again and again; orderly stops in a row",
            _FEW,
            kinds=["poisoned", "stopped-in-a-row"],
        ),
        Scenario(
            "cluster",
            "three nodes, killed in turn; a majority lost and regained",
            Publishing(pause=0.05, batch=50, timeouts=(3.0, 8.0, 20.0)),
            kinds=schedule.CLUSTER,
            cluster=True,
        ),
        Scenario(
            "waiting-retries",
            "the broker is killed again and again while events that waited fall due",
            Publishing(processes=1, threads=0),
            {"mailer": Subscribing(processes=2, workers=1, max_retries=3, prefetch_count=200)},
            faults=[Fault("broker-killed")],
            gaps=(0.1, 1.5),
            waiting=20_000,
        ),
        Scenario(
            "killed-subscribers",
            "all subscribers are killed while they hold many deliveries",
            replace(_FEW, pause=0.08, mix={"slow": 1}),
            _SLOW_HANDLERS,
            faults=[Fault("subscribers-killed")],
        ),
        Scenario(
            "killed-in-an-alarm",
            "subscribers whose retries cannot be published now are killed",
            # More than can be handled: there must be work left while publishers are blocked.
            replace(_FEW, pause=0.01, mix={"retry.1": 1, "slow": 1}),
            {"mailer": Subscribing(workers=4, slow=(0.1, 0.25))},
            faults=[Fault("killed-in-alarm", seconds=3.0)],
        ),
        Scenario(
            "cut-in-full-flight",
            "connections are stalled, then cut with all data in flight",
            replace(_FEW, mix={"ok": 1}),
            {"mailer": Subscribing()},
            faults=[Fault("wire-stalled", 0.0, 1.5), Fault("wire-cut", 1.0)],
        ),
        Scenario(
            "closed-under-slow-handlers",
            "connections are closed while handlers hold deliveries; soon the process dies",
            # More events are held than were ever acked, so that old tags exist on the new channel.
            replace(_FEW, pause=0.01, mix={"slow": 1}),
            {"mailer": Subscribing(workers=4, prefetch_count=200, slow=(0.1, 0.25))},
            faults=[Fault("killed-after-close", seconds=1.2)],
            gaps=(1.5, 2.5),
        ),
    )
}
