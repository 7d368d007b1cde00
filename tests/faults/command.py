"""The command line: ``python tests/faults --seconds 60 --seed 1``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import fragment
import rabbitmq_node
from rabbitmq_node import NodeError

from faults import lateness, report
from faults.broken import MISTAKES
from faults.harness import HarnessError, Settings, run
from faults.scenarios import SCENARIOS

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0: all promises were kept; 1: they were not; 2: they could not be tested."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    try:
        if options.show:
            _show(options.show, options.report)
            return 0
        if options.lateness:
            return _measure_lateness(options, words)
        settings = _settings(options)
        with _this_process():
            result = run(settings, _say)
    except (NodeError, HarnessError, OSError, ValueError) as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("faults: interrupted; all that was started is ended", file=sys.stderr)
        return _INTERRUPTED
    print(report.text(result), flush=True)
    kept = report.as_json(result, _command(words))
    if options.report:
        fragment.write(options.report, report.rst([json.loads(kept)]))
    if options.json:
        options.json.write_text(kept)
    return 1 if result.verdict.violations() else 0


def _show(files: Sequence[Path], target: Path | None) -> None:
    """A single report of several runs."""
    try:
        text = report.rst([json.loads(file.read_text()) for file in files])
    except (KeyError, ValueError, TypeError) as error:
        raise HarnessError(f"not written by --json: {error!r}") from error
    if target:
        fragment.write(target, text)
    else:
        print(text, end="")


def _measure_lateness(options: argparse.Namespace, words: Sequence[str]) -> int:
    for release in options.lateness:
        _check_release(release)
    with _this_process():
        measured = lateness.measure_all(options.lateness, _say, options.events or lateness.EVENTS)
        measurements = list(measured)
    print(lateness.text(measurements), flush=True)
    if options.report:
        fragment.write(options.report, lateness.rst(measurements, _command(words)))
    return 0


def _check_release(release: str) -> None:
    if release not in rabbitmq_node.RELEASES:
        known = ", ".join(rabbitmq_node.RELEASES)
        raise HarnessError(f"unknown release {release!r}; known are {known}")


def _settings(options: argparse.Namespace) -> Settings:
    _check_release(options.release)
    mistake = MISTAKES.get(options.broken)
    if options.broken and mistake is None:
        raise HarnessError(f"unknown mistake {options.broken!r}; known are {', '.join(MISTAKES)}")
    name = options.scenario or (mistake.scenario if mistake else "mixed")
    if options.cluster:
        name = "cluster"
    if name not in SCENARIOS:
        raise HarnessError(f"unknown scenario {name!r}; known are {', '.join(SCENARIOS)}")
    scenario = SCENARIOS[name]
    if scenario.waiting and options.events:
        scenario = dataclasses.replace(scenario, waiting=options.events)
    if options.url and (scenario.cluster or not options.url.startswith("amqp://")):
        raise HarnessError("--url takes one amqp:// URL, and a scenario without a cluster")
    seconds = options.seconds
    if not seconds and not options.faults:
        seconds = mistake.seconds if mistake else 60.0
    return Settings(
        scenario,
        seconds,
        options.faults,
        options.seed,
        options.release,
        options.url,
        options.broken,
        options.keep,
    )


def _parser() -> argparse.ArgumentParser:
    scenarios = "\n".join(f"  {each.name:26}{each.about}" for each in SCENARIOS.values())
    mistakes = "\n".join(f"  {name:26}{each.about}" for name, each in MISTAKES.items())
    parser = argparse.ArgumentParser(
        prog="python tests/faults",
        description="Programs publish and handle events while their broker, their network and they "
        "themselves fail; at the end every event is accounted for.",
        epilog=f"scenarios:\n{scenarios}\n\n"
        f"mistakes, each tried in its own scenario:\n{mistakes}\n\n"
        "exit status: 0 all promises were kept, 1 they were not, 2 they could not be tested.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seconds", type=float, default=0.0, help="how long faults are injected (default: 60)")
    add("--faults", type=int, default=0, help="number of faults to inject, however long that takes")
    add("--seed", type=int, default=1, help="replays the same schedule (default: 1)")
    add("--release", default="host", help=f"of RabbitMQ: {', '.join(rabbitmq_node.RELEASES)}")
    add("--url", default="", help="a broker to use instead; faults of its process are left out")
    add("--scenario", default="", help="one of those listed below (default: mixed)")
    add("--cluster", action="store_true", help="three nodes: the scenario `cluster`")
    add(
        "--events",
        type=int,
        default=0,
        help="number of waiting retries, for waiting-retries and --lateness",
    )
    add(
        "--lateness",
        nargs="+",
        metavar="RELEASE",
        help="instead, measure how late retries are after a crash of the broker, with "
        "and without the setting that docs/broker.rst recommends",
    )
    add("--broken", default="", metavar="MISTAKE", help="break the library with this mistake")
    add("--report", type=Path, metavar="FILE", help="write the result as an RST fragment")
    add("--keep", type=Path, metavar="FOLDER", help="keep all records and logs there")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    add(
        "--show",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run nothing; make one report from files written by --json",
    )
    return parser


def _command(words: Sequence[str]) -> str:
    """The command that reproduces a run, without its output options."""
    return shlex.join(["python", "tests/faults", *_without_files(words)])


def _without_files(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and not word.startswith(("--report", "--json", "--keep")):
            kept.append(word)
        skip = word in ("--report", "--json", "--keep")
    return kept


@contextmanager
def _this_process() -> Iterator[None]:
    """Process-wide settings of a run; restored afterwards, because the process may run tests."""
    logger = logging.getLogger("domain_events")
    level = logger.level
    # The publisher of the side exchange runs in this process; we cause its failures ourselves.
    logger.setLevel(logging.CRITICAL)
    # Ctrl-C, also if a shell runs us in the background, and SIGTERM both end the run in order.
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt),
    }
    try:
        yield
    finally:
        logger.setLevel(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, flush=True)
