"""Deploys one release of a subscriber after the other, process by process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from faults.programs import Program
from faults.rolling import LABEL, LAST, Plan, Release

_READY = 30.0


class Pause(Protocol):
    """Waits for the given seconds, or until the harness has to end."""

    def __call__(self, seconds: float, until: Callable[[], bool] | None = None) -> bool: ...


class Rollout:
    """The processes of the subscriber, and the release that each runs.

    :param make: creates the program of that name with that release, and supervises it.
    """

    def __init__(
        self,
        seed: int,
        processes: int,
        make: Callable[[str, Release], Program],
        is_ready: Callable[[Program], bool],
        pause: Pause,
    ) -> None:
        self._plan = Plan(seed)
        self._make = make
        self._is_ready = is_ready
        self._pause = pause
        self._number = 0
        self._programs = [self._new(slot, self._plan.current) for slot in range(processes)]

    def forward(self, side_by_side: float) -> str:
        """The next release, replacing all processes."""
        release = self._plan.forward()
        self._deploy(release, len(self._programs), side_by_side)
        return str(release)

    def back(self, side_by_side: float, half_way: bool) -> str:
        """The previous release; or this one again, after half of a deployment."""
        if not half_way:
            release = self._plan.back()
            self._deploy(release, len(self._programs), side_by_side)
            return f"back to {release}"
        release = self._plan.next()
        half = (len(self._programs) + 1) // 2
        self._deploy(release, half, side_by_side)
        self._deploy(self._plan.current, half, side_by_side)
        return f"half way to {release}, back to {self._plan.current}"

    def finish(self) -> None:
        """A last release, which lists all topics."""
        self._deploy(LAST, len(self._programs), 0.5)

    def _deploy(self, release: Release, processes: int, side_by_side: float) -> None:
        for slot in range(processes):
            old = self._programs[slot]
            new = self._new(slot, release)
            new.start()
            # While the broker is down this times out; the old one ends anyway.
            self._pause(_READY, lambda: self._is_ready(new))  # noqa: B023 - called at once
            self._pause(side_by_side)
            old.stop()
            self._programs[slot] = new

    def _new(self, slot: int, release: Release) -> Program:
        self._number += 1
        return self._make(f"{LABEL}{slot}-{self._number}", release)
