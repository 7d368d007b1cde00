"""``python -m benchmarks``: this library compared with its peers, on one broker, in one run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(_TOOLS))

import fragment  # noqa: E402
from rabbitmq_node import RELEASES, Node, NodeError, install  # noqa: E402

from benchmarks import (  # noqa: E402
    bloat,
    layers,
    outbox,
    pieces,
    plots,
    profiling,
    running,
    samples,
    scenarios,
    tables,
)
from benchmarks.registry import BY_NAME, PEERS, Peer  # noqa: E402
from benchmarks.results import Results  # noqa: E402

# A bench fills a private node beyond the default limits of its alarms.
_NODE_CONFIG = "vm_memory_high_watermark.absolute = 8GiB\ndisk_free_limit.absolute = 500MB\n"


def parser() -> argparse.ArgumentParser:
    """The options, as ``--help`` shows them."""
    options = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    broker = options.add_mutually_exclusive_group()
    broker.add_argument(
        "--release",
        default="host",
        choices=RELEASES,
        help="RabbitMQ of the private node that is started",
    )
    broker.add_argument(
        "--url", help="a broker to use instead; scenarios that kill it are left out"
    )
    options.add_argument(
        "--only",
        nargs="+",
        metavar="SCENARIO",
        choices=scenarios.names(),
        help=f"some of: {', '.join(scenarios.names())}",
    )
    options.add_argument(
        "--peers",
        nargs="+",
        metavar="PEER",
        choices=list(BY_NAME),
        help=f"some of: {', '.join(BY_NAME)}",
    )
    options.add_argument("--quick", action="store_true", help="short samples, one round")
    options.add_argument(
        "--rounds", type=_at_least_one, help="number of times that each sample is taken"
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="where to store the results")
    options.add_argument(
        "--show",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing; show stored results, of one run or of runs of different scenarios",
    )
    options.add_argument(
        "--rst", type=Path, metavar="FILE", help="the page of the docs for the tables"
    )
    options.add_argument("--svg", type=Path, metavar="FOLDER", help="the plots")
    options.add_argument(
        "--profile", choices=profiling.WHAT, help="only show where this library spends its time"
    )
    options.add_argument(
        "--pieces", action="store_true", help="only show the cost of each step of an event"
    )
    options.add_argument(
        "--middleware", action="store_true", help="only show what middleware costs"
    )
    options.add_argument(
        "--outbox", action="store_true", help="only measure the outbox, beside others"
    )
    options.add_argument(
        "--bloat", action="store_true", help="only measure the outbox beside a long transaction"
    )
    return options


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("a number from 1 up")
    return number


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parser().parse_args(words)
    try:
        if options.outbox:
            _outboxes(options)
            return 0
        if options.bloat:
            table = bloat.table(bloat.measure(options.release))
            if options.rst:
                fragment.write(options.rst, tables.list_table(table) + "\n")
            print(tables.aligned(table))
            return 0
        if options.show:
            results = Results.load(options.show[0])
            for path in options.show[1:]:
                results.add(Results.load(path))
        elif options.pieces:
            pieces.show()
            return 0
        elif options.middleware:
            with _Broker(options) as broker:
                running.say("none, one, three, and the library's own, in turn")
                print(layers.show(layers.measure(broker.url, options.rounds or 5)))
            return 0
        elif options.profile:
            with _Broker(options) as broker:
                profiling.profile(options.profile, broker.url)
            return 0
        else:
            results = _measure(options)
    except (NodeError, OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    _show(results, options)
    return 0


def _outboxes(options: argparse.Namespace) -> None:
    if options.show:
        outcome = outbox.Outcome.load(options.show[0])
    else:
        effort = outbox.Effort.of(quick=options.quick, rounds=options.rounds)
        outcome = outbox.measure(options.release, effort)
    if options.json:
        outcome.save(options.json)
    if options.rst:
        fragment.write(options.rst, outbox.as_rst(outcome))
    print(outbox.as_text(outcome))


class _Broker:
    """The broker to measure: a private node, or the one that the user specifies."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.node: Node | None = None
        self.url: str = options.url or ""
        if not options.url:
            install([options.release])
            running.say(f"starting RabbitMQ ({options.release})")
            self.node = Node(options.release, config=_NODE_CONFIG)

    @property
    def version(self) -> str:
        return self.node.version if self.node else "at the given URL"

    def __enter__(self) -> _Broker:
        if self.node is not None:
            self.node.__enter__()
            self.url = self.node.url
        return self

    def __exit__(self, *_error: object) -> None:
        if self.node is not None:
            self.node.close()


def _measure(options: argparse.Namespace) -> Results:
    chosen = [
        scenario
        for scenario in scenarios.scenarios(quick=options.quick)
        if not options.only or scenario.name in options.only
    ]
    asked = tuple(peer for peer in PEERS if not options.peers or peer.name in options.peers)
    peers: list[Peer] = []
    results = Results("", options.release, options.quick, running.machine())
    for peer, version, missing in samples.available(asked):
        if missing:
            running.say(f"{peer.title} is left out: {missing}")
            results.missing[peer.name] = missing
        else:
            results.versions[peer.name] = version
            peers.append(peer)
    rounds = options.rounds or (1 if options.quick else None)
    turns = running.plan(chosen, tuple(peers), rounds)
    with _Broker(options) as broker:
        results.rabbitmq = broker.version
        try:
            running.run(results, turns, broker.url, broker.node)
        except KeyboardInterrupt:
            running.say("interrupted; partial results follow")
    return results


def _show(results: Results, options: argparse.Namespace) -> None:
    if options.json:
        results.save(options.json)
    words = plots.write(results, options.svg) if options.svg else {}
    if options.rst:
        # As seen from the page that includes the tables.
        paths = {
            os.path.relpath(options.svg / name, options.rst.parent): shown
            for name, shown in words.items()
            if not name.startswith("headline-")
        }
        fragment.write(options.rst, tables.as_rst(results, paths))
    print(tables.as_text(results))


if __name__ == "__main__":
    sys.exit(main())
