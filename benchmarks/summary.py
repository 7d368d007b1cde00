"""Median, lowest and highest of a few samples; so few do not support more."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """The summary of several samples of one figure."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        """None, without values."""
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values), len(values))


def short(value: float) -> str:
    """A number in three significant digits, as people write it: 21,400, 3.46, 0.052."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        digits = len(str(int(size))) - 3
        return f"{round(value / 10**digits) * 10**digits:,}"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3f}"
