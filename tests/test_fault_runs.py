"""Whole runs of the fault harness: with this library nothing is lost, and with a broken one it is.

One after the other, on one worker of pytest-xdist: see conftest.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import lateness
from faults.broken import MISTAKES
from faults.scenarios import SCENARIOS
from support import wait_until

# For what hangs: a run takes a minute, and more on a busy machine.
pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("rabbitmq_release")]

HARNESS = Path(__file__).parent / "faults"
RELEASE = os.environ.get("DOMAIN_EVENTS_TEST_RELEASE") or "host"


def unmeasured() -> dict[str, str]:
    """The environment, without the measuring of coverage."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


def run_harness(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """A run's figures, its exit status and what it printed."""
    file = tmp_path / "figures.json"
    words = [sys.executable, HARNESS, "--release", RELEASE, "--json", file, *arguments]
    done = subprocess.run(
        list(map(str, words)),
        env=unmeasured(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        check=False,
    )
    assert file.exists(), done.stdout
    figures: dict[str, Any] = json.loads(file.read_text())
    return {**figures, "status": done.returncode, "printed": done.stdout}


#: What the verdict says of time: where other tests run as well, it tells how busy the machine was.
#: `make faults`, which has the machine for itself, judges that too.
OF_TIME = ("beyond its deadline", "nothing was handled for")


def wrong(result: dict[str, Any]) -> list[str]:
    """What is not as promised, whatever time it took; the exit status says the same."""
    violations: list[str] = result["violations"]
    assert result["status"] == (1 if violations else 0)
    return [each for each in violations if not any(words in each for words in OF_TIME)]


@pytest.mark.slow
def test_nothing_is_lost_while_everything_fails(tmp_path: Path) -> None:
    """A few of all faults; `make faults` injects them for minutes."""
    file = tmp_path / "report.rst"
    result = run_harness(tmp_path, "--faults", 6, "--seed", 3, "--report", file)
    assert wrong(result) == [], result["printed"]
    assert result["published"] > 100
    assert sum(result["faults"].values()) >= 6
    assert "python tests/faults --release" in file.read_text()


@pytest.mark.slow
def test_nothing_is_lost_while_releases_are_rolled_out_and_back(tmp_path: Path) -> None:
    """Old and new processes of one subscriber side by side, with keys added, removed, retired."""
    result = run_harness(tmp_path, "--scenario", "rolling", "--faults", 6)
    assert wrong(result) == [], result["printed"]
    assert result["published"] > 100
    assert {"rolled-forward", "rolled-back"} == set(result["faults"])


@pytest.mark.slow
def test_neighbours_survive_poison_and_orderly_stops(tmp_path: Path) -> None:
    """The culprit is a dead letter, and nothing else is."""
    result = run_harness(tmp_path, "--scenario", "poison", "--faults", 3)
    assert wrong(result) == [], result["printed"]
    assert {"poisoned", "stopped-in-a-row"} == set(result["faults"])
    assert result["dead_lettered"]["held"] == result["faults"]["poisoned"]


# As few faults as each mistake is found out by every time. Classic delays lose events in some
# crashes only, and only while events fall due, which they do over a share of the seconds.
FAULTS = {
    "ack-first": ("--faults", 3),
    "retry-after-ack": ("--faults", 1),
    "classic-delays": ("--seconds", 80),
    "no-confirms": ("--faults", 4),
    "stale-tags": ("--faults", 2),
    "unlisted-acked": ("--faults", 3),
}

THOROUGH = bool(os.environ.get("DOMAIN_EVENTS_TEST_FAULTS"))
thorough = pytest.mark.skipif(
    not THOROUGH, reason="takes eight minutes: set DOMAIN_EVENTS_TEST_FAULTS=1"
)


def test_every_mistake_is_tried() -> None:
    """None is left out of the tests below; and the whole library meets each of these faults."""
    assert set(FAULTS) == set(MISTAKES)
    for mistake in MISTAKES.values():
        needed = SCENARIOS[mistake.scenario].needed()
        assert needed <= SCENARIOS["mixed"].needed() | SCENARIOS["rolling"].needed()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(mistake, marks=[thorough] if mistake == "classic-delays" else [])
        for mistake in FAULTS
    ],
)
def test_harness_finds_the_mistake(tmp_path: Path, mistake: str) -> None:
    """A library that is broken in a known way is found guilty."""
    broken = run_harness(tmp_path, "--broken", mistake, *FAULTS[mistake])
    assert broken["lost"] > 0, broken["printed"]
    assert broken["status"] == 1


@thorough
@pytest.mark.slow
@pytest.mark.parametrize("mistake", FAULTS)
def test_nothing_is_lost_where_the_mistake_is_found(tmp_path: Path, mistake: str) -> None:
    """The same faults in the same scenario, with this library as it is.

    In short runs of `make test` this library meets these kinds of faults in other scenarios.
    """
    scenario = MISTAKES[mistake].scenario
    whole = run_harness(tmp_path, "--scenario", scenario, *FAULTS[mistake])
    assert wrong(whole) == [], whole["printed"]


@pytest.mark.slow
def test_interrupted_run_leaves_nothing_running(tmp_path: Path) -> None:
    """Ctrl-C ends it in order: no program, no broker."""
    process = subprocess.Popen(
        [sys.executable, str(HARNESS), "--release", RELEASE, "--seconds", "60"],
        env={**unmeasured(), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        with process.stdout as stdout:
            for line in stdout:
                if "faults begin" in line:
                    break
            assert len(processes_with(str(tmp_path))) > 5
            process.send_signal(signal.SIGINT)
            last = stdout.read().splitlines()[-1]
        assert process.wait(60) == 130
        assert "interrupted" in last
        wait_until(lambda: not processes_with(str(tmp_path)))
        assert not list(tmp_path.glob("faults-*"))
    finally:
        process.kill()
        process.wait()


def processes_with(words: str) -> list[int]:
    """The processes that have these words in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_retries_come_within_seconds_of_a_crash_with_the_recommended_setting() -> None:
    """With RabbitMQ's own it may be three minutes; each time is told."""
    said: list[str] = []
    measured = lateness.measure(RELEASE, lateness.RECOMMENDED, 0, said.append, events=500)
    assert len(said) == 1
    assert 0 <= measured.waiting.p50 <= measured.waiting.p99 <= measured.waiting.longest < 60
    assert measured.afterwards.longest < 60
