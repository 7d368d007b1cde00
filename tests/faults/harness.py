"""A run: starts everything, injects the faults, waits until all events are handled, and judges."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import DELAY_LEVELS, Names

from faults import held, rolling
from faults.broker import Broker, together, uninterrupted
from faults.evidence import Evidence, Usage
from faults.held import Held
from faults.injectors import NotNow, World, inject
from faults.programs import Program
from faults.records import Reader
from faults.rolling import Release
from faults.rollout import Rollout
from faults.scenarios import Scenario, Subscribing
from faults.schedule import KINDS, Group
from faults.side import Side, all_handled
from faults.verdict import LONGEST_SILENCE, Injected, Remains, Verdict, judge

_START_SECONDS = 90.0
_DRAIN_SECONDS = 240.0
# When nothing has been handled for this long, nothing is in flight in the broker any more ...
_QUIET = 2.5
# ... and any missing event must have been redelivered by now: a failed move after five seconds.
_QUIET_ENOUGH = 12.0
_HELD_PATIENCE = 15.0
_SIDE = "side"
_HELD = held.LABEL
# The waiting events fall due over this fraction of the time, so that each kill affects some.
_SPREAD = 0.6


class HarnessError(Exception):
    """The harness itself cannot go on; the message is for its user."""


@dataclass(frozen=True)
class Settings:
    """The options of the user."""

    scenario: Scenario
    #: Faults are injected for at least this time, and at least this number of them.
    seconds: float = 60.0
    faults: int = 0
    seed: int = 1
    release: str = "host"
    url: str = ""
    broken: str = ""
    keep: Path | None = None  # a folder for the records, and the logs of programs and nodes


@dataclass
class Result:
    """The result of a run."""

    settings: Settings
    version: str
    verdict: Verdict = field(default_factory=Verdict)
    faults: list[Injected] = field(default_factory=list)
    #: Faults that could not be injected, with the reason.
    left_out: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    usage: dict[str, tuple[Usage, Usage]] = field(default_factory=dict)
    starts: int = 0
    deaths: int = 0
    seconds: float = 0.0


class Harness:
    """One run. ``say`` is called with each line of progress."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._scenario = settings.scenario
        self._say = say
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._evidence = Evidence()
        self._programs: list[Program] = []
        self._faults: list[Injected] = []
        self._left_out: list[str] = []

    def run(self) -> Result:
        """Run everything. Whatever happens, nothing is left running."""
        settings = self._settings
        if not settings.url:
            self._say(f"starting RabbitMQ ({settings.release})")
        self._broker = Broker(settings.release, cluster=self._scenario.cluster, url=settings.url)
        self._folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self._reader = Reader(self._folder)
        prefix = "faults" if not settings.url else f"faults-{secrets.token_hex(3)}"
        self._names = Names(settings.url, prefix)
        self._side: Side | None = None
        self._held: Held | None = None
        self._rollout: Rollout | None = None
        try:
            with self._looked_after():
                return self._run()
        finally:
            with uninterrupted():
                self._ending.set()
                self._close()

    def _run(self) -> Result:
        result = Result(self._settings, self._broker.version)
        self._set_up()
        begun = time.monotonic()
        self._say(f"RabbitMQ {result.version}; {len(self._programs)} programs; faults begin")
        self._inject(begun)
        if self._rollout is not None:
            self._say("faults are over; a last release of the subscriber, which lists all keys")
            self._rollout.finish()
        self._say("faults are over; waiting until everything is handled")
        stopped = self._stop_publishers()
        remains = self._drain(stopped)
        with self._lock:
            self._poll()
            verdict = judge(self._evidence, remains, self._limits(), self._faults, stopped)
        for program in self._programs:
            verdict.misbehaved += program.misbehaved
        result.verdict = verdict
        result.faults = self._faults
        result.left_out += self._left_out
        result.outcomes = self._evidence.outcomes
        result.usage = self._evidence.usage
        result.starts = sum(program.starts for program in self._programs)
        result.deaths = sum(program.deaths for program in self._programs)
        result.seconds = time.monotonic() - begun
        return result

    # --- before ----------------------------------------------------------------------------------

    def _set_up(self) -> None:
        self._exchange = self._names.exchange("events")
        for label, subscribing in self._scenario.subscribers.items():
            self._add_subscriber(label, self._exchange, "event", subscribing)
        self._side_exchange = self._names.exchange(_SIDE)
        if {"queue-deleted", "exchange-deleted"} & self._scenario.needed():
            self._add_subscriber(_SIDE, self._side_exchange, _SIDE, Subscribing(1, 1, 0))
            self._side = Side(self._broker.urls, self._side_exchange, self._folder)
        if {"poisoned", "stopped-in-a-row"} & self._scenario.needed():
            holding = Subscribing(1, 1, 0, prefetch_count=200)
            self._add_subscriber(_HELD, self._exchange, _HELD, holding, held.DELIVERY_LIMIT)
            self._held = Held(self._broker.urls, self._exchange, self._folder)
        if self._scenario.rolling:
            self._rollout = Rollout(
                self._settings.seed,
                self._scenario.rolling,
                self._add_release,
                self._is_ready,
                self._pause,
            )
        subscribers = list(self._programs)
        for program in subscribers:
            program.start()
        if not self._pause(_START_SECONDS, lambda: all(map(self._is_ready, subscribers))):
            raise HarnessError(f"the subscribers are not ready within {_START_SECONDS:.0f} s")
        # From here on a crash of the broker must not lose anything.
        self._broker.sync()
        due = time.monotonic() + 4 + self._scenario.waiting / 1000
        for number in range(self._scenario.publishing.processes):
            self._add_publisher(f"p{number}", due)
        for program in self._publishers:
            program.start()
        if self._side is not None:
            self._side.start()
        if self._scenario.waiting:
            self._pause(due - time.monotonic())
        else:
            self._pause(_START_SECONDS, lambda: all(map(self._is_ready, self._publishers)))

    def _add_subscriber(
        self,
        label: str,
        exchange: str,
        topic: str,
        subscribing: Subscribing,
        delivery_limit: int = 0,
    ) -> None:
        name = self._names.queue(label)
        # On RabbitMQ 3.10 a node fails when a quorum queue that dead-letters at least once is
        # deleted soon after a start; so there the queue to delete is a classic one.
        queue_type = "classic" if label == _SIDE and self._broker.old else "quorum"
        configuration = {
            "name": name,
            "label": label,
            "exchange": exchange,
            "topics": [topic],
            "workers": subscribing.workers,
            "max_retries": subscribing.max_retries,
            "prefetch_count": subscribing.prefetch_count,
            "queue_type": queue_type,
            "slow": subscribing.slow,
            "delivery_limit": delivery_limit,
        }
        for number in range(subscribing.processes):
            self._add_subscriber_program(f"{label}{number}", configuration)

    def _add_release(self, program: str, release: Release) -> Program:
        """A process of the subscriber with several releases; not started yet."""
        configuration = {
            "name": self._names.queue(rolling.LABEL),
            "label": rolling.LABEL,
            "topics": release.topics,
            "retired": release.retired,
            "max_retries": release.max_retries,
            "dead_letter": release.dead_letter,
            "announce": True,
        }
        return self._add_subscriber_program(program, configuration)

    def _add_subscriber_program(self, name: str, configuration: Mapping[str, Any]) -> Program:
        def configure(process: str) -> dict[str, Any]:
            return {
                "process": process,
                "urls": self._broker.urls,
                "exchange": self._exchange,
                "folder": str(self._folder),
                "retired": [],
                "workers": 2,
                "prefetch_count": None,
                "dead_letter": True,
                "queue_type": "quorum",
                "slow": Subscribing().slow,
                "delivery_limit": 0,
                "announce": False,
                "broken": self._settings.broken,
                **configuration,
            }

        program = Program("subscriber", name, self._folder, configure)
        self._programs.append(program)
        return program

    def _add_publisher(self, name: str, due: float) -> None:
        publishing = self._scenario.publishing

        def configure(process: str) -> dict[str, Any]:
            return {
                "name": process,
                "urls": self._broker.urls,
                "exchange": self._exchange,
                "folder": str(self._folder),
                "seed": f"{self._settings.seed} {process}",
                "threads": publishing.threads,
                "pause": publishing.pause,
                "batch": publishing.batch,
                "batch_pause": publishing.batch_pause,
                "timeouts": list(publishing.timeouts),
                "topics": dict(publishing.topics),
                "mix": dict(publishing.mix),
                "broken": self._settings.broken,
                "waiting": self._scenario.waiting,
                "due": due,
                "spread": self._settings.seconds * _SPREAD,
            }

        self._programs.append(Program("publisher", name, self._folder, configure))

    @property
    def _publishers(self) -> list[Program]:
        return [program for program in self._programs if program.role == "publisher"]

    @property
    def _subscribers(self) -> list[Program]:
        return [program for program in self._programs if program.role == "subscriber"]

    def _limits(self) -> dict[str, dict[str, int]]:
        limits = {
            "event": {name: each.max_retries for name, each in self._scenario.subscribers.items()}
        }
        if self._side:
            limits[_SIDE] = {_SIDE: 0}
        if self._held:
            limits[_HELD] = {_HELD: 0}
        return limits

    def _labels(self) -> list[str]:
        """Of all subscribers."""
        labels = [name for subscribers in self._limits().values() for name in subscribers]
        return [*labels, rolling.LABEL] if self._rollout else labels

    # --- the faults ------------------------------------------------------------------------------

    def _inject(self, begun: float) -> None:
        impossible = self._impossible()
        for kind in sorted(impossible):
            self._left_out.append(f"{kind} (needs control over the node)")
        world = World(
            self._broker,
            self._publishers,
            # The others have their own faults.
            [each for each in self._subscribers if each.name.startswith(tuple(self._plain()))],
            self._side,
            self._side_exchange,
            f"{self._names.prefix}-{_SIDE}",
            self._is_ready,
            self._side_is_handled,
            self._rollout,
            self._held,
            next((each for each in self._subscribers if each.name.startswith(_HELD)), None),
            self._neighbours_are_handled,
            self._pause,
        )
        groups = self._scenario.schedule(self._settings.seed, sorted(impossible))
        # When nothing more is published, silence may also mean that nothing is left. And the next
        # crash should happen while a restarted broker dead-letters the events that fell due
        # meanwhile.
        patience = LONGEST_SILENCE if not self._scenario.waiting else 1.5
        for number, group in enumerate(groups):
            self._pause(group.gap)
            if self._is_done() or self._is_enough(time.monotonic() - begun):
                return
            at = time.monotonic() - begun
            told = self._inject_group(world, group, number)
            over = time.monotonic()
            going_on = self._pause(patience, lambda: self._all_handled_since(over))  # noqa: B023
            with self._lock:
                counts = (
                    f"{self._evidence.published:,} published, {self._evidence.handled:,} handled"
                )
            silence = f"{time.monotonic() - over:.1f} s" if going_on else "SILENCE"
            self._say(f"{at:6.1f} s  {told}; resumes after {silence}; {counts}")

    def _impossible(self) -> set[str]:
        if self._broker.nodes:
            return set()
        return {kind for kind in self._scenario.needed() if KINDS[kind].needs}

    def _is_enough(self, seconds: float) -> bool:
        """Whether faults were injected for the requested time, and in the requested number."""
        settings = self._settings
        return seconds >= settings.seconds and len(self._faults) >= settings.faults

    def _is_done(self) -> bool:
        """Whether all the waiting events have been handled."""
        waiting = self._scenario.waiting
        return bool(waiting) and all(
            len(self._evidence.ended_at[name]) >= 2 * waiting for name in self._scenario.subscribers
        )

    def _inject_group(self, world: World, group: Group, number: int) -> str:
        """Inject the faults of a group, each on its own thread; returns their targets."""
        told = [""] * len(group.faults)
        errors: list[BaseException] = []

        def run(index: int) -> None:
            fault = group.faults[index]
            self._pause(fault.offset)
            begun = time.monotonic()
            try:
                victim = inject(world, fault)
            except NotNow as error:
                told[index] = f"not now: {fault.kind}, {error}"
                self._left_out.append(f"{fault.kind} ({error})")
                return
            except Exception as error:  # noqa: BLE001 - raised below, by the main thread
                errors.append(error)
                return
            self._faults.append(Injected(fault.kind, begun, time.monotonic(), number))
            told[index] = f"{fault.kind} ({victim})" if victim else fault.kind

        threads = [
            threading.Thread(target=run, args=(index,), daemon=True)
            for index in range(len(group.faults))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise HarnessError(f"{group}: {errors[0]}") from errors[0]
        return " + ".join(told)

    def _all_handled_since(self, time: float) -> bool:
        """Whether each subscriber has handled something since then, or has nothing to handle."""
        names = [*self._plain(), *([rolling.LABEL] if self._rollout else [])]
        return self._is_done() or all(
            self._evidence.ended_at[name] and self._evidence.ended_at[name][-1] > time
            for name in names
        )

    def _plain(self) -> Sequence[str]:
        """The subscribers that always have something to do, and always in the same way."""
        return list(self._scenario.subscribers)

    def _neighbours_are_handled(self) -> bool:
        with self._lock:
            return held.neighbours_handled(self._evidence)

    def _side_is_handled(self) -> bool:
        with self._lock:
            return all_handled(self._evidence, _SIDE)

    def _is_ready(self, program: Program) -> bool:
        return program.process_name in self._evidence.ready

    # --- afterwards ------------------------------------------------------------------------------

    def _stop_publishers(self) -> float:
        """The time from which silence is no longer significant."""
        if self._side is not None:
            self._side.close()
        stopped = time.monotonic()
        if self._held is not None:
            self._held.close()
        together(*(program.stop for program in self._publishers))
        if self._scenario.waiting:
            with self._lock:
                return max(
                    (times[-1] for times in self._evidence.ended_at.values()), default=stopped
                )
        return stopped

    def _drain(self, stopped: float) -> Remains:
        """Wait until nothing is in flight; then stop the subscribers, and check what is left."""
        labels = self._labels()
        queues = {label: f"{self._names.prefix}-{label}" for label in labels}
        shared = [f"{self._exchange}.delay.{level:02}" for level in range(DELAY_LEVELS)]
        shared.append(f"{self._exchange}.undelivered")
        dead: dict[str, Counter[str]] = {label: Counter() for label in labels}
        self._reasons: dict[str, str] = {}
        deadline = time.monotonic() + _DRAIN_SECONDS
        told = time.monotonic()
        while time.monotonic() < deadline and not self._ending.is_set():
            self._pause(0.5)
            quiet = max(0.0, time.monotonic() - self._latest())
            counts = self._broker.counts([*queues.values(), *shared])
            if time.monotonic() - told > 5:
                told = time.monotonic()
                self._say(f"          {_listed(counts)}; quiet for {quiet:.0f} s")
            if any(counts.values()) or quiet < _QUIET:
                continue
            self._take_dead_letters(queues, dead)
            with self._lock:
                remains = Remains(dead, {}, reasons=self._reasons)
                verdict = judge(self._evidence, remains, self._limits(), self._faults, stopped)
            if verdict.lost and quiet <= _QUIET_ENOUGH:
                continue
            held = self._broker.held([*queues.values(), *shared])
            if not held:
                break
            self._say(f"          {held:,} are being dead-lettered; quiet for {quiet:.0f} s")
            self._pause(2.0)
        together(*(program.stop for program in self._subscribers))
        self._pause(1.0)  # the events that they requeued are still on their way into the queues
        self._take_dead_letters(queues, dead)
        waiting = {label: self._broker.take_all(queue) for label, queue in queues.items()}
        waiting[""] = Counter()
        for queue in shared:
            taken = self._broker.take_all(queue)
            if taken:
                self._say(f"          {queue} held {', '.join(sorted(taken)[:10])}")
            waiting[""] += taken
        everywhere = [*queues.values(), *shared]
        # A node's figures are up to five seconds old.
        self._pause(_HELD_PATIENCE, until=lambda: not self._broker.held(everywhere))
        return Remains(dead, waiting, self._broker.held(everywhere), self._reasons)

    def _take_dead_letters(self, queues: dict[str, str], dead: dict[str, Counter[str]]) -> None:
        for label, queue in queues.items():
            reasons = self._reasons if label == rolling.LABEL else None
            dead[label] += self._broker.take_all(f"{queue}-dl", reasons)

    def _latest(self) -> float:
        """When a handler last started or ended."""
        with self._lock:
            self._poll()
            return self._evidence.latest

    # --- all the time ----------------------------------------------------------------------------

    @contextmanager
    def _looked_after(self) -> Iterator[None]:
        """Restart programs that end, and read the records, on a separate thread."""
        stopping = threading.Event()

        def look_after() -> None:
            while not stopping.wait(0.1):
                for program in list(self._programs):
                    program.look_after()
                with self._lock:
                    self._poll()

        thread = threading.Thread(target=look_after, name="look-after", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join(30)

    def _poll(self) -> None:
        for process, words in self._reader.new():
            self._evidence.add(process, words)

    def _pause(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Wait for the time, or until the condition is true; returns False if it never was."""
        deadline = time.monotonic() + seconds
        while not (until and until()):
            left = deadline - time.monotonic()
            if left <= 0 or self._ending.wait(min(left, 0.05 if until else left)):
                return False
        return True

    def _close(self) -> None:
        for program in self._programs:
            program.close()
        for publishing in (self._side, self._held):
            if publishing is not None:
                with contextlib.suppress(Exception):
                    publishing.close()
        with contextlib.suppress(Exception):
            if self._settings.url:
                self._names.delete()
        if self._settings.keep is not None:
            shutil.copytree(self._folder, self._settings.keep, dirs_exist_ok=True)
            for node in self._broker.nodes:
                (self._settings.keep / f"{node.name}.log").write_text(node.log)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._broker.close()


def _listed(counts: Mapping[str, int]) -> str:
    """The number of waiting events, with their queues."""
    places = [f"{queue} {count:,}" for queue, count in counts.items() if count]
    return f"{sum(counts.values()):,} wait in queues ({', '.join(places) or 'nowhere'})"


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """One run; see `Harness`."""
    return Harness(settings, say).run()
