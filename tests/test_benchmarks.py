"""The bench: what it computes and shows is right, and it measures this library."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from databases import Server

# At the end: a domain_events that is installed is the one that is tested.
sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import layers, outbox, pieces, plots, running, samples, scenarios, tables, targets
from benchmarks.__main__ import parser
from benchmarks.brokerside import Letter, event_template
from benchmarks.peers import driver
from benchmarks.registry import BY_NAME, OURS, PEERS
from benchmarks.results import Results, Sample
from benchmarks.summary import Summary, short
from domain_events import DomainEvent, configure


def results(*taken: Sample) -> Results:
    made = Results("4.3.6", "4.3", True, {"cores": "2", "processor": "a processor"})
    made.samples += taken
    made.versions |= {"pika": "1.4.4", OURS: "1.0"}
    return made


def rate(
    peer: str, *values: float, scenario: str = "publish", variant: str = "quorum"
) -> list[Sample]:
    return [
        Sample(scenario, variant, peer, number, {"rate": value, "cpu_us": 1e6 / value})
        for number, value in enumerate(values, 1)
    ]


# --- statistics ----------------------------------------------------------------------------------


def test_a_summary_is_the_median_between_the_lowest_and_the_highest() -> None:
    assert Summary.of([3, 1, 10]) == Summary(3, 1, 10, 3)
    assert Summary.of([]) is None


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 50.0), (99, 99.0), (100, 100.0), (0.1, 1.0)]
)
def test_a_percentile_is_a_value_that_was_measured(percent: float, expected: float) -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert driver.percentile(values, percent) == expected


def test_a_spread_is_in_the_unit_asked_for() -> None:
    assert driver.spread([0.001, 0.002], 1e3) == {"p50": 1, "p99": 2, "worst": 2, "count": 2}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.0523, "0.052"),
        (3.456, "3.46"),
        (34.56, "34.6"),
        (345.6, "346"),
        (21_449, "21,400"),
        (1_234_567, "1,230,000"),
    ],
)
def test_numbers_are_shown_in_three_digits(number: float, text: str) -> None:
    assert short(number) == text


# --- the event -----------------------------------------------------------------------------------


def test_everybody_publishes_the_same_event_of_about_200_bytes() -> None:
    filled = Letter(event_template()).body(7)
    published = driver.body_of(driver.data_of(7))
    assert abs(len(filled) - 200) < 30
    assert abs(len(published) - len(filled)) < 5
    assert DomainEvent.from_json(filled).data == DomainEvent.from_json(published).data


@pytest.mark.parametrize("size", [1_000, 100_000, 1_048_576])
def test_a_body_has_the_size_asked_for(size: int) -> None:
    assert abs(len(driver.body_of(driver.data_of(0, size))) - size) < 40


def test_a_client_with_messages_of_its_own_gets_those() -> None:
    told = {"body": '{"id": "__ID__", "n": __N__}', "exchange": "", "routing_key": "its-queue"}
    letter = Letter.asked_for(told, {})
    assert b'"n": 3' in letter.body(3)
    assert letter.body(3) != letter.body(3)
    assert letter.routing_key(3) == "its-queue"


def test_events_are_spread_over_handlers() -> None:
    letter = Letter.asked_for({}, {"handlers": 2})
    assert [letter.routing_key(number) for number in range(3)] == [
        "bench.k0",
        "bench.k1",
        "bench.k0",
    ]


# --- the plan ------------------------------------------------------------------------------------


def chosen(*names: str, quick: bool = False) -> list[scenarios.Scenario]:
    return [each for each in scenarios.scenarios(quick=quick) if each.name in names]


def test_samples_are_interleaved_and_every_round_has_everybody_once() -> None:
    turns = running.plan(chosen("one"), PEERS, 3)
    for variant in ("classic", "quorum"):
        rounds = [
            [
                turn.peer.name
                for turn in turns
                if turn.variant.label == variant and turn.round == number
            ]
            for number in (1, 2, 3)
        ]
        assert all(sorted(each) == sorted(rounds[0]) for each in rounds)
        assert rounds[0] != rounds[1] or rounds[1] != rounds[2]
    rounds_in_order = [turn.round for turn in turns if turn.variant.label == "quorum"]
    assert rounds_in_order == sorted(rounds_in_order)


def test_a_plan_is_the_same_each_time() -> None:
    everything = scenarios.scenarios()
    assert running.plan(everything, PEERS, None) == running.plan(everything, PEERS, None)


def test_a_peer_is_not_measured_in_what_it_cannot_do() -> None:
    turns = running.plan(scenarios.scenarios(), PEERS, 1)
    measured = {(turn.scenario.name, turn.variant.label, turn.peer.name) for turn in turns}
    assert ("publish", "classic", "dramatiq") in measured
    assert ("publish", "quorum", "dramatiq") not in measured
    assert ("lateness", "", "kombu") not in measured
    assert not [each for each in measured if each[0] == "threads" and each[2] == "librabbitmq"]


def test_this_library_is_measured_in_everything() -> None:
    turns = running.plan(scenarios.scenarios(), PEERS, 1)
    assert {turn.scenario.name for turn in turns if turn.peer.is_ours} == set(scenarios.names())


def test_a_quick_run_takes_a_fraction_of_a_full_one() -> None:
    full = running.plan(scenarios.scenarios(), PEERS, None)
    quick = running.plan(scenarios.scenarios(quick=True), PEERS, 1)
    assert sum(turn.seconds for turn in quick) < sum(turn.seconds for turn in full) / 4


def test_scenarios_and_drivers_agree() -> None:
    for scenario in scenarios.scenarios():
        assert scenario.does == "import" or scenario.does in driver.SCENARIOS
    for peer in PEERS:
        assert (Path(driver.__file__).parent / peer.driver).exists()
        assert set(peer.cannot) <= {*scenarios.names(), "quorum"}


# --- options -------------------------------------------------------------------------------------


def test_options_choose_scenarios_and_peers() -> None:
    options = parser().parse_args(["--only", "publish", "one", "--peers", "pika", "--quick"])
    assert (options.only, options.peers, options.quick) == (["publish", "one"], ["pika"], True)
    assert options.release == "host"


@pytest.mark.parametrize(
    "words",
    [
        ["--only", "nothing-like-it"],
        ["--peers", "nobody"],
        ["--release", "2.8"],
        ["--rounds", "0"],
        ["--url", "amqp://localhost", "--release", "4.3"],
    ],
)
def test_options_that_cannot_work_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(words)
    assert words[0] in capsys.readouterr().err


# --- what is shown -------------------------------------------------------------------------------


def test_results_can_be_shown_again_from_their_file(tmp_path: Path) -> None:
    made = results(*rate("pika", 100, 300, 200))
    made.save(tmp_path / "kept.json")
    assert Results.load(tmp_path / "kept.json") == made


def test_a_file_without_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no results"):
        Results.load(tmp_path / "other.json")


def test_a_table_shows_median_lowest_and_highest() -> None:
    text = tables.as_text(results(*rate("pika", 1000, 3000, 2000), *rate(OURS, 20_000)))
    assert "2,000 (1,000-3,000)" in text
    assert "20,000" in text
    assert "RabbitMQ 4.3.6" in text


def test_a_failure_is_shown_with_its_reason() -> None:
    failed = Sample("publish", "quorum", "pika", 1, error="the broker is on fire")
    text = tables.as_text(results(failed, *rate(OURS, 20_000)))
    assert "failed" in text
    assert "the broker is on fire" in text


def test_a_peer_that_cannot_promise_as_much_is_marked() -> None:
    made = results(*rate("domain-event-broker", 15, variant="classic"))
    made.versions["domain-event-broker"] = "3.0.2"
    text = tables.as_text(made)
    assert "domain-event-broker [*]" in text
    assert "without confirms" in text


def test_the_documentation_gets_tables_and_pictures() -> None:
    text = tables.as_rst(results(*rate("pika", 1000)), {"publish-quorum.svg": "Bulk"})
    assert "Confirmed publishing in bulk, one thread\n----" in text
    assert ".. image:: publish-quorum.svg\n   :alt: Bulk\n" in text
    assert text.index("image::") < text.index("list-table::")


def test_pictures_are_well_formed_and_show_everybody(tmp_path: Path) -> None:
    series = [
        Sample("prefetch", str(prefetch), peer, 1, {"rate": prefetch * 100.0})
        for prefetch in (1, 50, 200)
        for peer in (OURS, "pika")
    ]
    made = results(*rate("pika", 1000, 2000), *rate(OURS, 20_000), *series)
    names = plots.write(made, tmp_path)
    assert list(names) == ["headline-publish.svg", "publish-quorum.svg", "prefetch.svg"]
    assert names["headline-publish.svg"] == (
        "Publishing in bulk: 13 times the best synchronous client. "
        "From the best to the worst: this library 20,000, pika (blocking) 1,500."
    )
    assert "this library from 100 to 20,000" in names["prefetch.svg"]
    for name in names:
        root = ET.parse(tmp_path / name).getroot()
        words = " ".join(root.itertext())
        assert "this library" in words
        assert "pika (blocking)" in words


def test_tables_of_the_documentation_fit_on_a_phone() -> None:
    """There is one for each kind of queue, and an axis is named once."""
    kinds = [*rate("pika", 1000, variant="classic"), *rate("pika", 2000, variant="quorum")]
    series = [
        Sample("prefetch", each, peer, 1, {"rate": 100.0})
        for each in ("1", "2,000")
        for peer in (OURS, "pika")
    ]
    text = tables.as_rst(
        results(*kinds, *series), {"publish-quorum.svg": "B", "publish-classic.svg": "A"}
    )
    order = (
        "publish-classic.svg",
        "- classic: events/s",
        "publish-quorum.svg",
        "- quorum: events/s",
    )
    assert sorted(order, key=text.index) == list(order)
    assert "   * - events/s by prefetch\n     - 1\n     - 2,000\n" in text


@pytest.mark.parametrize(("figures", "lowest"), [((11.9, 12.2), ">0<"), ((10.0, 900.0), ">10<")])
def test_an_axis_begins_with_zero_where_figures_hardly_differ(
    figures: tuple[float, ...], lowest: str
) -> None:
    line = plots.Line("this library", tuple(enumerate(figures, 1)))
    svg = plots.line_chart("CPU per event", "events queued", [line]).svg()
    assert lowest in svg
    assert (">0<" in svg) == (lowest == ">0<")


def test_runs_of_different_scenarios_are_shown_together() -> None:
    made = results(*rate(OURS, 20_000))
    made.add(results(Sample("one", "quorum", OURS, 1, {"p50": 600.0})))
    assert made.median("one", "quorum", OURS, "p50") == 600
    with pytest.raises(ValueError, match="two runs of the same scenario: publish"):
        made.add(results(*rate("pika", 1000)))


def test_pieces_are_what_an_event_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_TIMES", 50)
    for steps in (pieces.publishing(), pieces.consuming(), pieces.pika_s_frames()):
        assert any(name.startswith("three frames") for name, _ in steps)
        assert 1 < sum(microseconds for _, microseconds in steps) < 10_000


def test_what_middleware_costs_is_shown_beside_none() -> None:
    try:
        figures = [layers.sample("memory://layers", kind, 2500) for kind in ("none", "three")]
    finally:
        configure()
    assert all(0 < value < 10_000 for each in figures for value in each.values())
    table = layers.show({"none": figures[:1], "three": [dict.fromkeys(figures[0], 1.0)]})
    header, none, _three = table.splitlines()
    assert header.count("publish") == header.count("handle") == 2
    assert none.count("(1.00x)") == 4


# --- targets -------------------------------------------------------------------------------------


def verdict(made: Results, beginning: str) -> targets.Verdict:
    return next(each for each in targets.verdicts(made) if each.text.startswith(beginning))


def test_a_target_is_a_ratio_within_one_run() -> None:
    made = results(*rate(OURS, 21_000), *rate("librabbitmq", 30_000), *rate("pika", 1_000))
    limit = verdict(made, "Bulk publishing, of librabbitmq")
    assert (limit.measured, limit.word) == ("0.700x", "NOT reached")
    assert verdict(made, "Bulk publishing, of the best synchronous").word == "reached"


def test_the_best_synchronous_peer_is_not_an_asynchronous_one() -> None:
    made = results(*rate(OURS, 20_000), *rate("pika", 1_000), *rate("aio-pika", 5_000))
    assert verdict(made, "Bulk publishing, of the best synchronous").measured == "20.0x"
    assert verdict(made, "Bulk publishing, of the best Python").measured == "4.00x"


def test_a_peer_without_confirms_is_not_the_best() -> None:
    made = results(*rate(OURS, 20_000), *rate("domain-event-broker", 50_000))
    assert verdict(made, "Bulk publishing, of the best Python").word == "not measured"


def test_tasks_are_no_threads() -> None:
    """A client that has only tasks is beaten or not; it is not the best of those with threads."""
    taken = [
        Sample("threads", "quorum", peer, 1, {"rate": rate})
        for peer, rate in ((OURS, 6000.0), ("aio-pika", 5000.0), ("rabbitkit", 3000.0))
    ]
    made = results(*taken)
    assert verdict(made, "From 16 threads, of the best peer's").measured == "1.20x"
    assert verdict(made, "From 16 threads, of the best peer's that has").measured == "2.00x"


def test_prefetch_is_compared_where_all_have_the_same() -> None:
    taken = [
        Sample("prefetch", prefetch, peer, 1, {"rate": rate})
        for prefetch, peer, rate in (
            ("1", OURS, 1000.0),
            ("1", "pika", 1000.0),
            ("200", OURS, 20_000.0),
            ("200", "pika", 5000.0),
        )
    ]
    made = results(*taken)
    assert verdict(made, "Consuming, of the best Python peer's, all with").measured == "4.00x"


def test_what_was_not_measured_is_not_called_reached() -> None:
    assert {each.word for each in targets.verdicts(results())} == {"not measured"}


def test_growth_is_from_the_shallowest_backlog_to_the_deepest() -> None:
    taken = [
        Sample("backlog", depth, OURS, 1, {"cpu_us": cpu, "bytes": 30.0 * 2**20})
        for depth, cpu in (("10,000", 20.0), ("1,000,000", 30.0))
    ]
    made = results(*taken)
    assert verdict(made, "CPU per event").measured == "1.50x"
    assert verdict(made, "Memory").word == "reached"


# --- measuring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["publish", "one", "consume", "lateness", "latency", "import"])
def test_this_library_is_measured(name: str, broker_url: str) -> None:
    [scenario] = chosen(name, quick=True)
    variant = scenario.variants[-1]
    few = {"count": 20, "seconds": 1.0, "delay": 0.1, "rate": 20}
    options = {key: few.get(key, value) for key, value in variant.options.items()}
    figures = samples.take(
        BY_NAME[OURS], scenario, replace(variant, options=options), broker_url, None
    )
    assert figures["count"] > 0
    assert all(figures[figure.key] > -1 for figure in scenario.figures)


def test_a_driver_that_fails_says_why(broker_url: str) -> None:
    [scenario] = chosen("publish", quick=True)
    unknown = replace(scenario, does="nothing-like-it")
    with pytest.raises(samples.SampleFailed, match="KeyError: 'nothing-like-it'"):
        samples.take(BY_NAME[OURS], unknown, scenario.variants[0], broker_url, None)


def test_without_a_broker_a_sample_fails(unused_port: int) -> None:
    [scenario] = chosen("publish", quick=True)
    url = f"amqp://127.0.0.1:{unused_port}/"
    with pytest.raises(samples.SampleFailed, match="connection"):
        samples.take(BY_NAME[OURS], scenario, scenario.variants[0], url, None)


# --- the outbox ----------------------------------------------------------------------------------

OURS_IN = {each.title: each for each in outbox.MEASURED[:2]}


@pytest.mark.parametrize(
    ("take", "title", "keys"),
    [
        (outbox.relay, "this library, Django", {"relay"}),
        (outbox.latency, "this library, SQLAlchemy", {"p50", "p99"}),
        (outbox.cost, "this library, Django", {"without", "after more", "outbox more"}),
    ],
)
def test_the_outbox_is_measured(
    take: Any, title: str, keys: set[str], broker_url: str, postgresql_server: Server
) -> None:
    """Relayed events are counted in a queue; handled ones are waited for."""
    few = outbox.Effort(rounds=1, relayed=150, rate=100, committed=20, transactions=25)
    place = outbox.Place(postgresql_server, broker_url)
    assert set(take(place, OURS_IN[title], few)) == keys


def test_a_relay_that_loses_events_has_no_figures(
    broker_url: str, postgresql_server: Server
) -> None:
    """It deletes them all, and is fast."""
    ours = OURS_IN["this library, SQLAlchemy"]
    nothing = replace(ours, waiting="domain_events_outbox WHERE false")
    few = outbox.Effort(rounds=1, relayed=150, rate=100, committed=20, transactions=25)
    place = outbox.Place(postgresql_server, broker_url)
    with pytest.raises(samples.SampleFailed, match="0 of 150 events have arrived"):
        outbox.relay(place, nothing, few, patience=0.0)


def test_outboxes_are_shown_with_what_is_missing_and_as_kept(tmp_path: Path) -> None:
    effort = outbox.Effort.of(quick=False, rounds=None)
    made = outbox.Outcome(effort, "PostgreSQL 15, RabbitMQ 4.3", running.machine())
    ours, _, peer, *_ = outbox.MEASURED
    for rate in (5_000.0, 7_000.0, 6_000.0):
        made.add(ours.title, {"relay": rate, "p50": rate / 1e6})
    made.versions[ours.title] = "1.0"
    made.failed[peer.title] = "cannot be installed: no such version"
    kept = tmp_path / "kept.json"
    made.save(kept)
    text = outbox.as_text(made)
    assert outbox.as_text(outbox.Outcome.load(kept)) == text
    assert "6,000 (5,000-7,000)" in text
    assert "6.00 (5.00-7.00)" in text  # milliseconds
    assert f"{peer.title}: cannot be installed: no such version" in text
    assert ".. list-table:: Outboxes in PostgreSQL" in outbox.as_rst(made)
    kept.write_text("[]")
    with pytest.raises(ValueError, match="no results of outboxes"):
        outbox.Outcome.load(kept)
