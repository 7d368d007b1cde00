"""The fault harness: that it finds what is wrong, and that with this library nothing is."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import rabbitmq_node
from faults import command, injectors, lateness, report, rolling, schedule
from faults.broken import MISTAKES
from faults.evidence import Evidence
from faults.harness import Result, Settings
from faults.kinds import DEAD_LETTER, RETURNED, fate
from faults.proxy import Proxy
from faults.records import Reader, Recorder
from faults.rolling import Plan, Release
from faults.scenarios import SCENARIOS
from faults.verdict import Injected, Remains, Verdict, judge
from support import sooner_than, wait_until

HARNESS = Path(__file__).parent / "faults"
RELEASE = os.environ.get("DOMAIN_EVENTS_TEST_RELEASE") or "host"


# --- the schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_same_seed_gives_the_same_schedule(scenario: str) -> None:
    """And another seed another one."""
    one, same, other = (
        list(itertools.islice(SCENARIOS[scenario].schedule(seed), 50)) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_mixed_schedule_has_every_kind_of_fault_singly_and_together() -> None:
    """Within the first round; and none that would undo the other."""
    groups = list(itertools.islice(SCENARIOS["mixed"].schedule(7), len(schedule.MIXED)))
    faults = [fault for group in groups for fault in group.faults]
    assert {fault.kind for fault in faults} == set(schedule.MIXED)
    assert {len(group.faults) for group in groups} == {1, 2}
    for group in groups:
        lanes = [schedule.KINDS[fault.kind].lane for fault in group.faults]
        assert len(set(lanes)) == len(lanes)
    for fault in faults:
        kind = schedule.KINDS[fault.kind]
        assert kind.shortest <= fault.seconds <= kind.longest


def test_faults_that_are_impossible_are_left_out() -> None:
    """With a broker that somebody else runs, for example."""
    groups = itertools.islice(SCENARIOS["mixed"].schedule(1, ["broker-killed"]), 50)
    assert "broker-killed" not in {fault.kind for group in groups for fault in group.faults}


def test_every_kind_of_fault_can_be_injected() -> None:
    """The schedule and the injectors know the same ones."""
    assert set(schedule.KINDS) == injectors.KINDS
    for scenario in SCENARIOS.values():
        assert scenario.needed() <= injectors.KINDS


# --- releases ------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_releases() -> None:
    """And another seed others."""
    one, same, other = (list(itertools.islice(rolling.releases(seed), 50)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_releases_add_remove_and_retire_topics_and_change_handlers() -> None:
    """One topic each time; one is always listed; only what may be retired is, until it is back."""
    releases = list(itertools.islice(rolling.releases(5), 200))
    for before, after in itertools.pairwise(releases):
        assert len({*before.topics} ^ {*after.topics}) == 1
        assert rolling.ALWAYS in after.topics
        assert not {*after.topics} & {*after.retired}
        assert {*after.retired} <= {*rolling.RETIRABLE}
    for topic in rolling.PUBLISHED[1:]:
        assert 20 < sum(topic in release.topics for release in releases) < 180
    assert {release.max_retries for release in releases} == {0, rolling.MAX_RETRIES}
    assert {release.dead_letter for release in releases} == {True, False}


def test_roll_back_returns_to_the_release_before() -> None:
    """And further, but not beyond the first."""
    plan = Plan(1)
    first = plan.current
    second, third = plan.forward(), plan.forward()
    assert plan.current == third != second != first
    assert [plan.back() for _ in range(3)] == [second, first, first]
    assert plan.current == first


# --- the proxy -----------------------------------------------------------------------------------


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                while data := connection.recv(65_536):
                    connection.sendall(data)

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    proxy = Proxy("127.0.0.1", echo)
    yield proxy
    proxy.close()


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connected(proxy) as client:
        yield client


@contextlib.contextmanager
def connected(proxy: Proxy) -> Iterator[socket.socket]:
    """A connection through the proxy that works."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        assert said(client, b"hello") == b"hello"
        yield client


def said(client: socket.socket, words: bytes) -> bytes:
    """What comes back of them."""
    sender = threading.Thread(target=client.sendall, args=(words,))
    sender.start()
    back = bytearray()
    while len(back) < len(words):
        back += client.recv(65_536)
    sender.join()
    return bytes(back)


def test_cut_connection_is_reset(proxy: Proxy, client: socket.socket) -> None:
    """At once, and the next one is good."""
    assert proxy.connections() == 1
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_until(lambda: proxy.connections() == 0)
    with connected(proxy) as other:
        assert said(other, b"again") == b"again"


def test_stalled_wire_keeps_what_it_has(proxy: Proxy, client: socket.socket) -> None:
    """Nothing passes until it flows again, and then all of it."""
    proxy.stall()
    client.sendall(b"late")
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.recv(1)
    proxy.flow()
    client.settimeout(10)
    assert client.recv(10) == b"late"


def test_stalled_wire_that_is_cut_loses_what_it_has(proxy: Proxy, client: socket.socket) -> None:
    """As a dead network does."""
    proxy.stall()
    client.sendall(b"lost")
    proxy.cut()
    proxy.flow()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_slow_wire_is_slow(proxy: Proxy, client: socket.socket) -> None:
    """100 kB take about a second there, and the echo comes while more is under way."""
    proxy.slow()
    begun = time.monotonic()
    assert said(client, b"x" * 100_000) == b"x" * 100_000
    assert time.monotonic() - begun > 0.8
    proxy.flow()
    with sooner_than(60):  # as it would take if it were slow still
        assert said(client, b"x" * 6_000_000) == b"x" * 6_000_000


def test_client_of_a_half_open_connection_is_told_nothing(
    proxy: Proxy, client: socket.socket
) -> None:
    """It can write on and on; until it gives up, the proxy counts it."""
    proxy.half_open()
    for _ in range(10):
        client.sendall(b"anybody?" * 1000)
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.recv(1)
    with connected(proxy) as other:
        assert said(other, b"new") == b"new"
    assert proxy.half_open_connections() == 1
    client.close()
    wait_until(lambda: proxy.half_open_connections() == 0)


# --- the records ---------------------------------------------------------------------------------


def test_records_are_read_as_they_are_written(tmp_path: Path) -> None:
    """Each once, with the name of its process; a torn one when it is complete, or never."""
    recorder = Recorder(tmp_path / "p0.1.records")
    reader = Reader(tmp_path)
    recorder.write("take", "id-1", "event.ok")
    recorder.write("done", "id-1", "returned", "0")
    records = list(reader.new())
    assert [(process, words[:-1]) for process, words in records] == [
        ("p0.1", ["take", "id-1", "event.ok"]),
        ("p0.1", ["done", "id-1", "returned", "0"]),
    ]
    assert not list(reader.new())
    with (tmp_path / "p0.1.records").open("ab") as file:
        file.write(b"take id-2 eve")
    assert not list(reader.new())
    with (tmp_path / "p0.1.records").open("ab") as file:
        file.write(b"nt.ok 1.0\n")
    assert [words[1] for _, words in reader.new()] == ["id-2"]
    recorder.close()


def test_kill_loses_no_record(tmp_path: Path) -> None:
    """What was written before a SIGKILL is there."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from faults.records import Recorder\n"
        f"recorder = Recorder(Path({str(tmp_path / 'x.records')!r}))\n"
        "for n in range(1000): recorder.write('take', n, 'event.ok')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Without the measuring of coverage, which would be killed as well.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    environment["PYTHONPATH"] = str(HARNESS.parent)
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [int(words[1]) for _, words in Reader(tmp_path).new()] == list(range(1000))


# --- the verdict ---------------------------------------------------------------------------------

LIMITS = {"event": {"mailer": 2}}


class Story:
    """Records as processes would write them, and what was left in the queues."""

    def __init__(self) -> None:
        self.evidence = Evidence()
        self.dead: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self.time = 0.0

    def tell(self, *words: object) -> None:
        self.time += 1
        self.evidence.add("process.1", [*map(str, words), str(self.time)])

    def published(self, event: str, kind: str, outcome: str = "returned") -> None:
        self.tell("take", event, f"event.{kind}")
        self.tell("done", event, outcome, "-1")

    def handled(self, event: str, *outcomes: str) -> None:
        """With no retries, with one, and so on."""
        for retries, outcome in enumerate(outcomes):
            self.tell("begin", "mailer", event, retries)
            self.tell("ended", "mailer", event, retries, outcome)

    def verdict(self, *faults: Injected) -> Verdict:
        remains = Remains({"mailer": self.dead}, {"mailer": self.waiting})
        return judge(self.evidence, remains, LIMITS, faults, self.time)


@pytest.fixture
def story() -> Story:
    """One in which all is well, with an event of each kind."""
    story = Story()
    for event, kind, outcomes in (
        ("a", "ok", ["returned"]),
        ("b", "raise", ["ValueError"]),
        ("c", "retry.2", ["Retry", "Retry", "returned"]),
        ("d", "exhaust", ["Retry", "Retry", "Retry"]),
    ):
        story.published(event, kind)
        story.handled(event, *outcomes)
    story.dead.update(["b", "d"])
    return story


def test_fates() -> None:
    """What must become of each kind of event."""
    assert fate("event.ok", 3) == (RETURNED, 0)
    assert fate("event.raise", 3) == (DEAD_LETTER, 0)
    assert fate("event.retry.2", 3) == (RETURNED, 2)
    assert fate("event.retry.2", 1) == (DEAD_LETTER, 1)
    assert fate("event.exhaust", 3) == (DEAD_LETTER, 3)


def test_nothing_wrong_is_found_where_nothing_is(story: Story) -> None:
    """Four published, four handled, two of them dead letters."""
    verdict = story.verdict()
    assert verdict.violations() == []
    assert verdict.published == 4
    assert verdict.handled == {"mailer": 4}
    assert verdict.dead_lettered == {"mailer": 2}
    assert verdict.duplicates == 0


def test_lost_event_is_found(story: Story) -> None:
    """Never handled; begun and not ended; handled and not dead-lettered; asked for, not retried."""
    story.published("lost-1", "ok")
    story.published("lost-2", "ok")
    story.tell("begin", "mailer", "lost-2", 0)
    story.published("lost-3", "raise")
    story.handled("lost-3", "ValueError")
    story.published("lost-4", "retry.1")
    story.handled("lost-4", "Retry")
    verdict = story.verdict()
    assert [event for _, event, _, _ in verdict.lost] == ["lost-1", "lost-2", "lost-3", "lost-4"]
    assert verdict.violations() == ["4 events were LOST"]


def test_event_is_not_lost_whose_publish_did_not_return(story: Story) -> None:
    """Its publisher was killed, or got an error."""
    story.published("perhaps", "ok", "EventNotConfirmed")
    story.tell("take", "killed", "event.ok")
    assert story.verdict().violations() == []


def test_event_that_still_waits_is_not_lost(story: Story) -> None:
    """But it is no happy end either."""
    story.published("waits", "ok")
    story.waiting["waits"] += 1
    verdict = story.verdict()
    assert verdict.lost == []
    assert verdict.violations() == ["1 events still wait in a queue"]


def test_lost_event_is_put_to_the_fault_in_which_it_was_last_heard_of(story: Story) -> None:
    """Or to the next one."""
    first = Injected("broker-killed", story.time + 0.1, story.time + 0.2, 0)
    story.published("lost", "ok")
    second = Injected("wire-cut", story.time + 0.1, story.time + 0.2, 1)
    third = Injected("wire-cut", story.time + 0.3, story.time + 0.4, 2)
    verdict = story.verdict(first, second, third)
    assert verdict.lost_in == {1: 1}


def test_duplicate_is_counted_and_forgiven(story: Story) -> None:
    """At least once is the promise."""
    story.handled("a", "returned")
    verdict = story.verdict()
    assert verdict.duplicates == 1
    assert verdict.violations() == []


@pytest.mark.parametrize("error", ["BrokerUnavailable", "InvalidEvent"])
def test_handled_event_that_was_surely_not_sent_is_found(story: Story, error: str) -> None:
    """Unless another attempt may have sent it."""
    story.published("forbidden", "ok", error)
    story.handled("forbidden", "returned")
    story.published("perhaps", "ok", "EventNotConfirmed")
    story.published("perhaps", "ok", error)
    story.handled("perhaps", "returned")
    verdict = story.verdict()
    assert verdict.forbidden == ["forbidden (event.ok) at mailer"]
    assert verdict.violations() == ["1 events were handled that were definitely not sent"]


def test_retry_beyond_the_limit_is_found(story: Story) -> None:
    """Of one that asks for ever, and of one that did not ask any more."""
    story.tell("begin", "mailer", "d", 3)
    story.tell("begin", "mailer", "a", 1)
    assert story.verdict().violations() == ["2 events were retried beyond their limit"]


def test_event_given_up_too_early_is_found(story: Story) -> None:
    """Among the dead letters before its last retry, or with a retry left out."""
    story.published("early", "exhaust")
    story.handled("early", "Retry")
    story.published("skipped", "retry.2")
    story.tell("begin", "mailer", "skipped", 0)
    story.tell("begin", "mailer", "skipped", 2)
    story.tell("ended", "mailer", "skipped", 2, "returned")
    story.published("wrong", "ok")
    story.dead.update(["early", "wrong"])
    verdict = story.verdict()
    assert verdict.violations() == ["3 events were given up before their last retry"]


def test_late_publish_is_found(story: Story) -> None:
    """A second beyond its deadline is too late."""
    story.tell("take", "late", "event.ok")
    story.tell("done", "late", "EventNotConfirmed", "1.25")
    assert story.verdict().violations() == ["a publish took 1.25 s beyond its deadline"]


def test_silence_is_measured_from_the_end_of_the_faults_to_the_next_event() -> None:
    """Of the subscriber that was silent for longest; and never beyond the next fault."""
    story = Story()
    for event in "abc":
        story.published(event, "ok")
    story.time = 100
    story.handled("a", "returned")  # 101, 102
    story.time = 200
    story.handled("b", "returned")
    story.time = 300
    story.handled("c", "returned")
    faults = [
        Injected("wire-cut", 90, 95, 0),
        Injected("wire-cut", 103, 104, 1),
        Injected("wire-cut", 110, 190, 2),
    ]
    verdict = story.verdict(*faults)
    assert verdict.silences == {0: (7, "mailer"), 1: (6, "mailer"), 2: (12, "mailer")}


def test_run_in_which_nothing_was_published_proves_nothing() -> None:
    """And says so."""
    assert Story().verdict().violations() == ["no event was published: nothing was tested"]


def test_report_has_the_figures_and_the_command(story: Story) -> None:
    """For the terminal, for the docs, and for programs."""
    story.published("lost", "ok")
    result = Result(Settings(SCENARIOS["mixed"]), "4.0.5")
    result.faults = [Injected("wire-cut", 0, story.time, 0)]
    result.verdict = story.verdict(*result.faults)
    text = report.text(result)
    assert "NOT AS PROMISED: 1 events were LOST." in text
    assert "lost: lost (event.ok) at mailer" in text
    kept = json.loads(report.as_json(result, "python tests/faults --seed 1"))
    assert kept["lost"] == 1
    rst = report.rst([kept, {**kept, "version": "4.3.6", "by_fault": {}}])
    assert "    python tests/faults --seed 1\n" in rst
    assert "   * - Fault\n     - RabbitMQ 4.0.5\n     - RabbitMQ 4.3.6\n" in rst
    assert "   * - wire-cut\n     - 1 / 1 / 0.0 s\n     - -\n" in rst
    assert "**Not as promised** with RabbitMQ 4.0.5: 1 events were LOST." in rst


# --- the verdict on releases ---------------------------------------------------------------------

OLD, NEW = Release(("t0",)), Release(("t0", "t1"))


def announce(story: Story, process: str, release: Release, ready: bool = True) -> None:
    """A process that registers."""
    story.time += 1
    topics, retired = (",".join(each) or "-" for each in (release.topics, release.retired))
    words = ["release", topics, retired, str(release.max_retries), str(release.dead_letter)]
    story.evidence.add(process, [*words, str(story.time)])
    if ready:
        story.evidence.add(process, ["ready", str(story.time)])


def roll(story: Story, event: str, key: str) -> None:
    """An event for the subscriber that has several releases."""
    story.tell("take", event, key)
    story.tell("done", event, "returned", "-1")


def handle(story: Story, process: str, event: str, retries: int, outcome: str) -> None:
    """By one of its processes."""
    for words in (["begin"], ["ended", outcome]):
        record = [words[0], rolling.LABEL, event, str(retries), *words[1:], str(story.time)]
        story.evidence.add(process, record)


def rolled(story: Story, dead: dict[str, str] | None = None) -> Verdict:
    """The verdict, with these dead letters and their reasons."""
    remains = Remains({rolling.LABEL: Counter(dead or {})}, {}, 0, dead or {})
    return judge(story.evidence, remains, LIMITS, [], story.time)


def test_event_that_one_release_lists_and_nobody_handles_is_lost() -> None:
    """Not before a release had bound it, nor if the publish did not return."""
    story = Story()
    announce(story, "old", OLD)
    roll(story, "too-early", "t1.ok")
    announce(story, "not-ready", NEW, ready=False)
    roll(story, "still-too-early", "t1.ok")
    announce(story, "new", NEW)
    roll(story, "acked", "t1.ok")
    roll(story, "handled", "t1.ok")
    handle(story, "new", "handled", 0, "returned")
    story.tell("take", "not-returned", "t1.ok")
    verdict = rolled(story)
    assert [event for _, event, _, _ in verdict.lost] == ["acked"]
    assert verdict.rolled == 2
    assert verdict.violations() == ["1 events were LOST"]


def test_dead_letter_that_nobody_handled_must_say_why() -> None:
    """With its routing key; one whose handler has failed says that."""
    story = Story()
    announce(story, "new", NEW)
    roll(story, "said", "t1.ok")
    roll(story, "unsaid", "t1.ok")
    roll(story, "failed", "t1.raise")
    handle(story, "new", "failed", 0, "ValueError")
    reasons = {"said": "X: no process lists 't1.ok'", "unsaid": ": ", "failed": "ValueError: x"}
    verdict = rolled(story, reasons)
    assert verdict.unlisted == 2
    assert verdict.unexplained == ["unsaid (t1.ok) at rolling"]
    assert verdict.violations() == ["1 dead letters that were never handled have no reason"]


def test_event_handled_by_another_release_is_found() -> None:
    """As a retry that returned to a process that does not list its key."""
    story = Story()
    announce(story, "old", OLD)
    announce(story, "new", NEW)
    roll(story, "strayed", "t1.retry.1")
    handle(story, "new", "strayed", 0, "Retry")
    handle(story, "old", "strayed", 1, "returned")
    assert rolled(story).violations() == [
        "1 events were handled by a process that does not list them"
    ]


def test_event_of_a_retired_topic_may_be_dropped() -> None:
    """While a process that retires it lives, and so long before; not when it is listed again."""
    story = Story()
    announce(story, "new", Release(("t0", "t4")))
    roll(story, "long-before", "t4.ok")
    story.time += rolling.RETIREMENT
    roll(story, "just-before", "t4.ok")
    announce(story, "retiring", Release(("t0",), ("t4",)))
    roll(story, "meanwhile", "t4.ok")
    story.time += 100
    roll(story, "not-bound", "t4.ok")
    announce(story, "again", Release(("t0", "t4")))
    roll(story, "afterwards", "t4.ok")
    verdict = rolled(story)
    assert [event for _, event, _, _ in verdict.lost] == ["long-before", "afterwards"]


def test_event_may_be_dropped_by_a_release_without_dead_letters() -> None:
    """When its handler failed for good: not when a retry was left."""
    story = Story()
    announce(story, "quiet", Release(("t0",), (), 1, False))
    for event, outcomes in {
        "failed": ["ValueError"],
        "exhausted": ["Retry", "Retry"],
        "lost": ["Retry"],
    }.items():
        roll(story, event, "t0.exhaust")
        for retries, outcome in enumerate(outcomes):
            handle(story, "quiet", event, retries, outcome)
    assert [event for _, event, _, _ in rolled(story).lost] == ["lost"]


def test_innocent_dead_letter_is_found(story: Story) -> None:
    """Handled, and given up together with a neighbour that killed the process."""
    story.dead["a"] += 1
    assert story.verdict().violations() == [
        "1 events were handled and are dead letters all the same"
    ]


# --- lateness ------------------------------------------------------------------------------------


def test_lateness_is_told_by_the_nearest_rank() -> None:
    """Of one retry, all three are its own."""
    assert lateness.lateness([7.0]) == lateness.Lateness(7.0, 7.0, 7.0)
    hundred = [float(number) for number in range(1, 201)]
    assert lateness.lateness(hundred[::-1]) == lateness.Lateness(100.0, 198.0, 200.0)


def test_lateness_is_shown_by_release_and_setting() -> None:
    """Oldest release first; the default before what is recommended."""
    late, soon = lateness.Lateness(4, 180, 181), lateness.Lateness(0.5, 2, 3)
    measured = [
        lateness.Measurement("4.0.5", lateness.RECOMMENDED, soon, soon),
        lateness.Measurement("3.10.8", lateness.RECOMMENDED, soon, soon),
        lateness.Measurement("3.10.8", lateness.DEFAULT, late, soon),
    ]
    rst = lateness.rst(measured, "python tests/faults --lateness 3.10 4.0")
    assert "    python tests/faults --lateness 3.10 4.0\n" in rst
    assert (
        "   * - 3.10.8\n     - 3 minutes (default)\n     - 4.0 / 180.0 / 181.0 s\n"
        "     - 0.5 / 2.0 / 3.0 s\n   * - 3.10.8\n     - 3 seconds\n"
    ) in rst
    assert rst.index("3.10.8") < rst.index("4.0.5")


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--release", "2.8"], "unknown release '2.8'; known are host, 3.10"),
        (["--scenario", "picnic"], "unknown scenario 'picnic'"),
        (["--broken", "all"], "unknown mistake 'all'"),
        (["--lateness", "2.8"], "unknown release '2.8'; known are host, 3.10"),
        (["--url", "amqp://localhost/", "--cluster"], "a scenario without a cluster"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And exit status 2."""
    assert command.main(arguments) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"faults: {words}") or words in captured
    assert captured.count("\n") == 1


def test_runs_are_shown_side_by_side(
    story: Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From what each has kept; a file that is something else is named an error."""
    result = Result(Settings(SCENARIOS["mixed"]), "4.0.5")
    result.verdict = story.verdict()
    kept, target, wrong = tmp_path / "a.json", tmp_path / "report.rst", tmp_path / "b.json"
    kept.write_text(report.as_json(result, "python tests/faults --seed 1"))
    assert command.main(["--show", str(kept), str(kept), "--report", str(target)]) == 0
    assert target.read_text().count("python tests/faults --seed 1") == 2
    wrong.write_text("{}")
    assert command.main(["--show", str(wrong)]) == 2
    assert "not written by --json" in capsys.readouterr().err


def test_missing_rabbitmq_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the way to install it."""
    monkeypatch.setattr(rabbitmq_node, "find", lambda _release: None)
    assert command.main([]) == 2
    captured = capsys.readouterr()
    assert "is not installed" in captured.err
    assert captured.err.count("\n") == 1


def test_help_names_scenarios_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them."""
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in (*SCENARIOS, *MISTAKES):
        assert name in text
