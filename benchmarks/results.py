"""The results of a run, stored as JSON, so that they can be shown again in another form."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.summary import Summary


@dataclass(frozen=True)
class Sample:
    """One peer, once, in one variant of one scenario: figures, or the reason for their absence."""

    scenario: str
    variant: str
    peer: str
    round: int
    figures: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass
class Results:
    """All samples of one run, and the machine that it ran on."""

    rabbitmq: str
    release: str
    quick: bool
    machine: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)

    def summary(self, scenario: str, variant: str, peer: str, figure: str) -> Summary | None:
        """The summary of the samples of one figure, if there are any."""
        return Summary.of(
            [
                sample.figures[figure]
                for sample in self._of(scenario, variant, peer)
                if figure in sample.figures
            ]
        )

    def median(self, scenario: str, variant: str, peer: str, figure: str) -> float | None:
        summary = self.summary(scenario, variant, peer, figure)
        return None if summary is None else summary.median

    def error(self, scenario: str, variant: str, peer: str) -> str:
        """The reason for the absence of figures, if something failed."""
        return next((each.error for each in self._of(scenario, variant, peer) if each.error), "")

    def peers(self, scenario: str, variant: str | None = None) -> list[str]:
        """The peers that were measured in it."""
        names = [
            sample.peer
            for sample in self.samples
            if sample.scenario == scenario and variant in (None, sample.variant)
        ]
        return list(dict.fromkeys(names))

    def variants(self, scenario: str) -> list[str]:
        """The variants in which it was measured."""
        names = [sample.variant for sample in self.samples if sample.scenario == scenario]
        return list(dict.fromkeys(names))

    def _of(self, scenario: str, variant: str, peer: str) -> list[Sample]:
        return [
            sample
            for sample in self.samples
            if (sample.scenario, sample.variant, sample.peer) == (scenario, variant, peer)
        ]

    def add(self, other: Results) -> None:
        """Add the results of a run of other scenarios, on the same RabbitMQ.

        :raises ValueError: they have a scenario in common: only samples of one run may be compared.
        """
        common = {each.scenario for each in self.samples} & {
            each.scenario for each in other.samples
        }
        if common:
            raise ValueError(f"two runs of the same scenario: {', '.join(sorted(common))}")
        if (self.rabbitmq, self.quick) != (other.rabbitmq, other.quick):
            raise ValueError("runs of different releases, or quick ones and others")
        self.samples += other.samples
        self.versions |= other.versions
        self.missing |= other.missing
        self.seconds += other.seconds

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """:raises ValueError: the file does not contain results."""
        kept: dict[str, Any] = json.loads(path.read_text())
        try:
            samples = [Sample(**sample) for sample in kept.pop("samples")]
            return cls(**kept, samples=samples)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has no results of this bench: {error}") from error
