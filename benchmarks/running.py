"""A run: every sample of a plan, interleaved, one after the other, with the remaining time."""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rabbitmq_node import Node

from benchmarks import samples
from benchmarks.registry import Peer
from benchmarks.results import Results, Sample
from benchmarks.scenarios import Scenario, Variant

T = TypeVar("T")

# After this many failures in one variant, a peer is left out of its other rounds.
_FAILURES = 2


@dataclass(frozen=True)
class Turn:
    """One sample to be taken."""

    scenario: Scenario
    variant: Variant
    peer: Peer
    round: int

    @property
    def seconds(self) -> float:
        return self.scenario.seconds(self.variant)


def shuffled(items: Sequence[T], seed: str) -> list[T]:
    """The same items in an order determined only by the seed."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def plan(chosen: Sequence[Scenario], peers: tuple[Peer, ...], rounds: int | None) -> list[Turn]:
    """The turns in their order: in each round each peer once, in another order each time.

    So a drift during a run (a busy machine, a warmer one) affects all peers alike.
    """
    turns = []
    for scenario in chosen:
        for variant in scenario.variants:
            taking_part = scenario.taking_part(variant, peers)
            for number in range(1, min(scenario.rounds, rounds or scenario.rounds) + 1):
                seed = f"{scenario.name} {variant.label} {number}"
                order = shuffled(taking_part, seed)
                turns += [Turn(scenario, variant, peer, number) for peer in order]
    return turns


def machine() -> dict[str, str]:
    """The properties of this machine that affect the figures."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def run(results: Results, turns: Sequence[Turn], url: str, node: Node | None) -> None:
    """Take every sample, and add it to the results; a failed one is only shown.

    Each scenario has a freshly started broker, because a broker is slower after millions of events.
    """
    begun = time.monotonic()
    current = turns[0].scenario if turns else None
    failures: dict[tuple[str, str, str], int] = {}
    for progress, turn in _with_progress(turns):
        key = (turn.scenario.name, turn.variant.label, turn.peer.name)
        if failures.get(key, 0) >= _FAILURES:
            continue
        if turn.scenario.own_node and node is None:
            continue
        if node is not None and turn.scenario is not current:
            node.restart()
        current = turn.scenario
        figures, error = {}, ""
        try:
            figures = samples.take(turn.peer, turn.scenario, turn.variant, url, node)
        except Exception as problem:  # noqa: BLE001 - the others are measured in any case
            error = f"{problem}" or type(problem).__name__
            failures[key] = failures.get(key, 0) + 1
        sample = Sample(*key, turn.round, figures, error)
        results.samples.append(sample)
        came_out = f"FAILED, {error}" if error else _shown(turn, figures)
        say(f"{progress} {_named(turn)}: {came_out}")
        if node is not None:
            node.start()  # if a sample left it dead
    results.seconds += time.monotonic() - begun


def _with_progress(turns: Sequence[Turn]) -> Iterator[tuple[str, Turn]]:
    """Each turn with the beginning of its line: the progress, and the remaining time."""
    begun = time.monotonic()
    total = sum(turn.seconds for turn in turns)
    done = 0.0
    for number, turn in enumerate(turns, 1):
        pace = (time.monotonic() - begun) / done if done else 1.0
        left = (total - done) * pace
        yield f"[{number}/{len(turns)}, {left / 60:.0f} min left]", turn
        done += turn.seconds


def _named(turn: Turn) -> str:
    words = [turn.scenario.name, turn.variant.label, turn.peer.name, f"round {turn.round}"]
    return ", ".join(word for word in words if word)


def _shown(turn: Turn, figures: dict[str, float]) -> str:
    from benchmarks.tables import value  # noqa: PLC0415 - tables need the definitions above

    return ", ".join(
        f"{figure.title} {value(figures[figure.key], figure)}"
        for figure in turn.scenario.figures
        if figure.key in figures
    )


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
