"""``domain-events doctor``: each state is brought about on a real broker, found, and undone."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any

import onlooker
import pyamqp
import pytest
import shell
from live import consuming
from managed import CONSUMER_TIMEOUT, Managed
from rabbitmq_node import Node, free_port
from support import wait_until

from domain_events import Subscriber, broker
from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.administration import Administration
from domain_events.cli import broker_checks
from domain_events.cli.checks import CHECKS
from domain_events.cli.examination import Examination, Subscribed, Unknown, of_target
from domain_events.cli.findings import Finding, Severity
from domain_events.cli.management import Management, Rabbitmqctl, Source
from domain_events.cli.policies import clear_command, in_force

DOCS = Path(__file__).parent.parent / "docs"
ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE


class Patient:
    """A subscriber on the managed node, with a name and an exchange of its own."""

    def __init__(self, node: Managed, unique: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.node = node
        self.url = node.url
        self.name, self.exchange = f"{unique}-q", f"{unique}-x"
        self.dead_letters = f"{self.name}-dl"
        self.undelivered = f"{self.exchange}.undelivered"
        self._monkeypatch = monkeypatch

    def register(self, **options: Any) -> list[Subscribed]:
        with Subscriber(self.url, self.exchange) as subscriber:
            subscriber.register(print, self.name, ["a.*"], max_retries=1, **options)
            return of_target(subscriber)

    @property
    def subscribed(self) -> Subscribed:
        return Subscribed(
            broker.Queue(
                self.name, broker.Exchange(self.exchange), ("a.*",), dead_letters=True, delays=True
            )
        )

    def sources(self) -> list[Source]:
        """The management plugin, then rabbitmqctl."""
        self._monkeypatch.setenv("PATH", f"{self.node.programs}:/usr/bin:/bin")
        return [Management(self.node.management, self.url), Rabbitmqctl(self.url)]

    def check(
        self,
        check: str,
        subscribed: Sequence[Subscribed] | None = None,
        *,
        sources: Sequence[Source] | None = None,
        url: str | None = None,
    ) -> list[Finding]:
        """What this check finds now."""

        def connect() -> Administration:
            return Administration(url or self.url)

        with connect() as administration:
            examination = Examination(
                administration,
                connect,
                self.sources() if sources is None else sources,
                ["no other source"],
                self.exchange,
                [self.subscribed] if subscribed is None else subscribed,
            )
            return list(CHECKS[check](examination))

    def clean(self) -> None:
        queues = [row["name"] for row in self.node.get("queues/%2F")]
        exchanges = [row["name"] for row in self.node.get("exchanges/%2F")]
        onlooker.delete(
            self.url,
            queues=queues,
            exchanges=[each for each in exchanges if each and not each.startswith("amq.")],
        )


@pytest.fixture
def patient(
    managed_node: Managed, unique: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Patient]:
    patient = Patient(managed_node, unique, monkeypatch)
    yield patient
    patient.clean()


def release_of(patient: Patient) -> tuple[int, ...]:
    return tuple(map(int, patient.node.node.version.split(".")))


def one(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


# --- the command ---------------------------------------------------------------------------------

MODULE = """
from domain_events import Subscriber

subscriber = Subscriber(exchange={exchange!r})
subscriber.register(print, {name!r}, ["a.*"], max_retries=1)
"""


@pytest.fixture
def doctor(patient: Patient, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command, with the patient as the module `shop`."""
    (tmp_path / "shop.py").write_text(MODULE.format(exchange=patient.exchange, name=patient.name))

    def run(
        *arguments: str, url: str = patient.url, path: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "domain_events", "doctor", *arguments],
            env={
                **os.environ,
                "DOMAIN_EVENTS_URL": url,
                "DOMAIN_EVENTS_MANAGEMENT_URL": patient.node.management,
                "PATH": f"{path}:/usr/bin:/bin",
                "PYTHONPATH": str(DOCS.parent),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_healthy_broker_has_no_finding_and_all_of_it_is_read(
    patient: Patient, doctor: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Notes apart. The management plugin counts messages some seconds after a queue is declared."""
    patient.register()
    counted = f"queues/%2F/{patient.exchange}.delay.00?columns=messages_ready"
    wait_until(lambda: patient.node.get(counted))
    subscriber = Subscriber(patient.url, patient.exchange)
    subscriber.register(print, patient.name, ["a.*"], max_retries=1)
    with consuming(subscriber, patient.url, patient.name):
        done = doctor("shop:subscriber", "--json", path=str(patient.node.programs))
        assert done.returncode == 0, done.stdout
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert {each["severity"] for each in found} <= {"note"}, found
        assert done.stderr.startswith("20 checks: ")
        assert "could not be read" not in done.stderr
        assert doctor("--exchange", patient.exchange).returncode == 0


def test_sick_broker_is_shown_with_what_to_do_and_nothing_is_changed(
    patient: Patient, doctor: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Also by the import of a module that registers: here one that would declare everything."""
    before = patient.node.get("queues/%2F"), patient.node.get("exchanges/%2F?columns=name")
    done = doctor("shop:subscriber")
    assert done.returncode == 1, done.stderr
    assert f"WARNING consumers: '{patient.name}' has no queue\n" in done.stdout
    assert "\n        do:    Start it once, or: domain-events topology apply" in done.stdout
    assert "\n        docs:  https://" in done.stdout
    assert re.match(r"20 checks: 1 warning\b", done.stdout.splitlines()[-1])
    assert before == (
        patient.node.get("queues/%2F"),
        patient.node.get("exchanges/%2F?columns=name"),
    )
    patient.register()
    onlooker.publish(patient.url, "", patient.name, b"{}")
    onlooker.publish(patient.url, "", patient.dead_letters, b"{}")
    by_name = doctor("--name", patient.name, "--exchange", patient.exchange)
    for done in (doctor("shop:subscriber"), by_name):
        assert done.returncode == 1, done.stderr
        assert f"nobody consumes from '{patient.name}'; events that wait: 1" in done.stdout
        assert "dead-letters: dead letters: 1" in done.stdout
    for queue in (patient.name, patient.dead_letters):
        properties, body = onlooker.take(patient.url, queue)
        assert body == b"{}"
        assert not any((properties.headers or {}).values())  # it was never delivered


def test_session_of_the_page_is_what_it_prints(
    managed_node: Managed,
    patient: Patient,
    doctor: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """docs/operating-doctor.rst, but for notes about the release and about a start."""
    page = (DOCS / "operating-doctor.rst").read_text()
    _, _, rest = page.partition("    $ domain-events doctor shop:subscriber\n")
    *shown, summary = findings_of(rest.split("\n\n")[0].replace("\n    ", "\n").lstrip())
    (tmp_path / "shop.py").write_text(MODULE.format(exchange="domain-events", name="mailer"))
    subscriber = Subscriber(patient.url)
    subscriber.register(print, "mailer", ["a.*"], max_retries=1)
    with consuming(subscriber, patient.url, "mailer"):
        for _ in range(3):
            onlooker.publish(patient.url, "", "mailer-dl", b"{}")
        with managed_node.policy("tidy", ".*", {"message-ttl": 86_400_000}):
            wait_until(
                lambda: (managed_node.get("queues/%2F/mailer") or {}).get("policy") == "tidy"
            )
            done = doctor("shop:subscriber", path=str(managed_node.programs))
    assert done.returncode == 1, done.stderr
    *found, counts = findings_of(done.stdout)
    assert [each for each in found if not each.startswith("NOTE ")] == [
        each for each in shown if not each.startswith("NOTE ")
    ]
    assert set(shown) <= set(found)
    assert summary == "20 checks: 1 error, 1 warning, 1 note"
    assert counts.startswith(summary.rpartition(",")[0])


def findings_of(text: str) -> list[str]:
    """Each with its lines; the last is the summary."""
    return re.split(r"\n(?=\S)", text.rstrip())


@pytest.mark.parametrize(("columns", "more"), [(80, {}), (60, {"NO_COLOR": "1"})])
def test_lines_fit_the_terminal_and_no_color_is_honoured(
    patient: Patient, columns: int, more: dict[str, str]
) -> None:
    arguments = ["doctor", "--name", patient.name, "--exchange", patient.exchange]
    with shell.on_terminal(patient.url, *arguments, columns=columns, more=more) as terminal:
        assert terminal.end() == 1
    assert any("\x1b[" in line for line in terminal.out) == (not more)
    details = [each for each in terminal.out if each.startswith(" ") and "://" not in each]
    assert details
    assert max(map(len, details)) <= columns


def test_mistakes_end_it_in_one_line(
    patient: Patient, doctor: Callable[..., subprocess.CompletedProcess[str]], unused_port: int
) -> None:
    for arguments, url, status, text in [
        (["--timeout", "0.5"], f"amqp://127.0.0.1:{unused_port}", 4, "No broker within 0.5 s"),
        ([], patient.url.replace("guest:guest", "guest:wrong"), 2, "password is wrong"),
        (["nowhere:subscriber"], patient.url, 9, "no module 'nowhere'"),
        (["--name", "x-dl"], patient.url, 2, "is that of a dead-letter queue"),
    ]:
        done = doctor(*arguments, url=url)
        assert done.returncode == status, done.stderr
        assert text in done.stderr
        assert "Traceback" not in done.stderr
        assert "wrong@" not in done.stderr


def test_what_cannot_be_read_is_named_with_what_would_make_it_readable(patient: Patient) -> None:
    """With AMQP alone: each check that finds nothing either knows that, or is unknown."""
    patient.register()
    unknown: dict[str, Unknown] = {}
    for check in CHECKS:
        try:
            patient.check(check, sources=[])
        except Unknown as error:
            unknown[check] = error
    by_amqp = {"version", "connection", "alarms", "permissions", "arguments", "consumers"}
    by_amqp |= {"dead-letters", "queue-type", "consumer-timeout"}
    by_amqp |= {"deprecated"} if release_of(patient) < (3, 13) else set()
    assert {*unknown} == {*CHECKS} - by_amqp
    for each in unknown.values():
        assert "no other source" in str(each)
        assert "rabbitmqctl" in each.do
    with pytest.raises(Unknown, match="which subscribers there are"):
        patient.check("consumers", [], sources=[])


def test_every_check_is_documented_and_every_link_leads_somewhere() -> None:
    table = (DOCS / "operating-doctor.rst").read_text()
    for name in CHECKS:
        assert f"* - ``{name}``" in table, name
    anchors = set()
    for module in ("broker_checks", "queue_checks", "checks"):
        text = (DOCS.parent / "domain_events" / "cli" / f"{module}.py").read_text()
        anchors |= set(re.findall(r'"(\w+\.rst#[\w-]+)"', text))
    assert len(anchors) > 10
    for anchor in anchors:
        file, _, wanted = anchor.partition("#")
        lines = (DOCS / file).read_text().splitlines()
        titles = [
            line
            for line, below in itertools.pairwise(lines)
            if line and re.fullmatch(r"[-=]{4,}", below) and len(below) >= len(line)
        ]
        slugs = {re.sub(r"[^a-z0-9]+", "-", each.lower()).strip("-") for each in titles}
        assert wanted in slugs, anchor


# --- the broker ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("product", "version", "severity", "text"),
    [
        ("RabbitMQ", "3.9.29", ERROR, "too old"),
        ("RabbitMQ", "3.10.8", NOTE, "x-death"),
        ("RabbitMQ", "4.1.0-rc.1", None, ""),
        ("RabbitMQ", "4.2.6", WARNING, "demands the permission configure"),
        ("RabbitMQ", "4.3.0", WARNING, "demands the permission configure"),
        ("RabbitMQ", "4.2.7", None, ""),
        ("RabbitMQ", "4.4.0", NOTE, "newer"),
        ("LavinMQ", "2.0.0", WARNING, "not RabbitMQ"),
    ],
)
def test_release_is_judged(
    product: str, version: str, severity: Severity | None, text: str
) -> None:
    """Releases that are not installed here: by what they state about themselves."""

    class Stated:
        server = {"product": product, "version": version}  # noqa: RUF012

    stated: Any = Stated
    examination = Examination(stated, stated, [], [], "x", [])
    found = list(broker_checks.version(examination))
    assert [each.severity for each in found] == ([] if severity is None else [severity])
    assert all(text in each.what for each in found)


def test_plain_connection_to_another_machine_is_found_and_guest(patient: Patient) -> None:
    node = patient.node
    assert patient.check("connection", sources=[]) == []
    outside = f"amqp://guest:guest@{node.outer_host}:{node.outer_port}"
    found = patient.check("connection", sources=[], url=outside)
    assert ["not encrypted" in each.what or "guest" in each.what for each in found] == [True] * 2
    assert not any("guest:guest" in str(each) for each in found)
    with node.user("shop", (".*", ".*", ".*")):
        outside = outside.replace("guest:guest", "shop:shop")
        assert "not encrypted" in one(patient.check("connection", sources=[], url=outside)).what


def test_operation_that_fails_for_lack_of_a_permission_is_named(patient: Patient) -> None:
    """A user who has all but one permission; those of docs/topology.rst suffice."""
    name, exchange = re.escape(patient.name), re.escape(patient.exchange)
    levels = rf"{exchange}\.(due|undelivered|delay\.\d\d)"
    enough = (
        rf"^({exchange}|{levels}|{name}(-dl)?)$",
        rf"^(amq\.default|{levels}|{name})$",
        rf"^({exchange}|{levels}|{name})$",
    )

    def errors(permissions: tuple[str, str, str], check: str = "permissions") -> set[str]:
        with patient.node.user("mailer", permissions) as url:
            found = patient.check(check, sources=[], url=url)
        return {each.what.split(" may not ")[1].split(" '")[0] for each in found if each.is_bad}

    for patient_exists in (False, True):
        if patient_exists:
            patient.register()
        assert errors(enough) == set()
        for action, lacking, operations in [
            (0, patient.exchange, {"subscribe as"}),
            (0, patient.name, {"subscribe as"}),
            (2, patient.name, {"subscribe as"}),
            (2, patient.exchange, {"subscribe as"}),
            (0, patient.dead_letters, {"keep dead letters of"}),
            (1, "amq.default", {"keep dead letters of"}),
            (1, patient.name, {"subscribe as", "retry as"}),
            (0, f"{patient.exchange}.delay.23", {"retry as"}),
            (1, f"{patient.exchange}.delay.00", {"retry as"}),
            (2, f"{patient.exchange}.due", {"retry as"}),
        ]:
            changed = list(enough)
            changed[action] = rf"(?!^{re.escape(lacking)}$)" + changed[action]
            assert errors((changed[0], changed[1], changed[2])) == operations, lacking
    # One that declares nothing may do without configure.
    queue = replace(patient.subscribed.queue, must_exist=True)
    with patient.node.user("mailer", ("^$", *enough[1:])) as url:
        subscribed = [replace(patient.subscribed, queue=queue)]
        found = patient.check("permissions", subscribed, sources=[], url=url)
        assert not any(each.is_bad for each in found)
        found = patient.check("permissions", sources=[], url=url)
        assert any(each.is_bad for each in found)
    with patient.node.user("reader", (".*", "^$", ".*")) as url:
        found = patient.check("permissions", [], sources=[], url=url)
        assert one(found).severity is ERROR
        assert "publish" in one(found).what
    with patient.node.user("writer", ("^$", f"^{exchange}$", "^$")) as url:
        assert patient.check("permissions", [], sources=[], url=url) == []


def test_alarm_is_found_by_each_source_and_over_amqp(patient: Patient) -> None:
    management, rabbitmqctl = patient.sources()
    ways = [[management], [rabbitmqctl], []]
    assert [patient.check("alarms", sources=way) for way in ways] == [[], [], []]
    node = patient.node.node
    node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        for way in ways:
            found = one(wait_until(lambda: patient.check("alarms", sources=way)))  # noqa: B023
            assert found.severity is ERROR
            assert "low on memory" in found.what
    finally:
        node.ctl("set_vm_memory_high_watermark", "0.6")
    wait_until(lambda: not patient.check("alarms", sources=[]))


def test_deprecated_feature_in_use_is_found(patient: Patient) -> None:
    if release_of(patient) < (3, 13):
        assert patient.check("deprecated", sources=[]) == []
        pytest.skip("this RabbitMQ has no list of deprecated features")
    assert patient.check("deprecated") == []
    with pyamqp.Connection(patient.url) as connection:
        connection.channel().queue_declare("transient", durable=False)
        for source in patient.sources():
            found = one(patient.check("deprecated", sources=[source]))
            assert "transient_nonexcl_queues" in found.what


def test_clock_of_another_time_is_found(patient: Patient) -> None:
    """Behind a proxy that changes the date of the management plugin's answers."""
    assert patient.check("clock") == []
    for seconds, text in [(60, "60 s ahead"), (-60, "60 s behind")]:
        with shifted(patient.node.management, seconds) as url:
            found = one(patient.check("clock", sources=[Management(url, patient.url)]))
        number = int(re.findall(r"(\d+) s", found.what)[0])
        assert text.split()[2] in found.what
        assert 55 <= number <= 60


@contextmanager
def shifted(management: str, seconds: float) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {"Authorization": self.headers["Authorization"]}
            request = urllib.request.Request(management + self.path, headers=headers)
            with urllib.request.urlopen(request, timeout=30) as answer:
                body = answer.read()
                date = parsedate_to_datetime(answer.headers["Date"]).timestamp() + seconds
            self.send_response_only(200)
            self.send_header("Date", formatdate(date, usegmt=True))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_default_queue_type_matters_where_queues_have_none(patient: Patient) -> None:
    assert patient.check("queue-type", []) == []
    # The second is the name of 3.10.
    patient.node.put("vhosts/quorum", default_queue_type="quorum", defaultqueuetype="quorum")
    patient.node.put("permissions/quorum/guest", configure=".*", write=".*", read=".*")
    url = patient.node.url_of("guest", "quorum")
    classic = Subscribed(broker.Queue(patient.name, broker.Exchange("x"), classic=True))
    try:
        for source in (Management(patient.node.management, url), Rabbitmqctl(url)):
            patient.sources()  # the PATH
            for subscribed, severity in [
                ([], NOTE),
                ([classic], WARNING),
                ([patient.subscribed], None),
            ]:
                found = patient.check("queue-type", subscribed, sources=[source], url=url)
                assert [each.severity for each in found] == ([] if severity is None else [severity])
    finally:
        patient.node.delete("vhosts/quorum")


# --- queues --------------------------------------------------------------------------------------


def test_queue_with_other_arguments_is_found(patient: Patient) -> None:
    assert patient.check("arguments", sources=[]) == []
    with onlooker.channel(patient.url) as channel:
        channel.queue_declare(patient.name, durable=True)
        channel.exchange_declare(f"{patient.exchange}.due", "topic", durable=True)
    found = patient.check("arguments", sources=[])
    assert {each.where for each in found} == {patient.name, f"{patient.exchange}.due"}
    assert {each.severity for each in found} == {ERROR}
    with (
        patient.node.user("nobody", ("^$", ".*", ".*")) as url,
        pytest.raises(Unknown, match="2 of them cannot be compared"),
    ):
        patient.check("arguments", sources=[], url=url)


POLICIES: list[tuple[dict[str, Any], str, Severity | None]] = [
    ({"message-ttl": 60_000}, "name", WARNING),
    ({"message-ttl": 60_000}, "dead_letters", ERROR),
    ({"message-ttl": 60_000}, "undelivered", ERROR),
    ({"message-ttl": 60_000}, "high level", WARNING),
    ({"message-ttl": 60_000}, "low level", None),
    ({"expires": 60_000}, "name", ERROR),
    ({"expires": 60_000}, "low level", ERROR),
    ({"max-length": 5}, "name", WARNING),
    ({"max-length": 5}, "dead_letters", ERROR),
    ({"max-length": 5, "overflow": "reject-publish"}, "dead_letters", WARNING),
    ({"max-length-bytes": 5}, "undelivered", ERROR),
    ({"delivery-limit": 5}, "name", WARNING),
    ({"delivery-limit": 500}, "name", None),
    ({"delivery-limit": 500}, "dead_letters", ERROR),
    ({"dead-letter-exchange": "x"}, "name", NOTE),
    ({"delayed-retry-type": "all", "delayed-retry-min": 1000}, "name", WARNING),
    ({"delayed-retry-type": "disabled"}, "name", None),
    ({"queue-leader-locator": "balanced"}, "name", None),
]


def test_policy_that_harms_a_queue_is_found(patient: Patient) -> None:
    """By the docs' table of policies; one that does no harm is not."""
    names = {
        "low level": f"{patient.exchange}.delay.00",
        "high level": f"{patient.exchange}.delay.23",
    }
    patient.register()
    for definition, queue, severity in POLICIES:
        if "delayed-retry-type" in definition and release_of(patient) < (4, 3, 1):
            continue  # it has no such policy
        name = names.get(queue) or getattr(patient, queue)
        with patient.node.policy("harm", f"^{re.escape(name)}$", definition):
            found = patient.check("policies")
        case = definition, queue, found
        assert [each.severity for each in found] == ([] if severity is None else [severity]), case
        assert all(each.where == name and "'harm'" in each.what for each in found), case
        assert patient.check("policies") == [], case


def test_only_the_policy_in_force_counts(patient: Patient) -> None:
    """By pattern, apply-to and priority, as the broker itself decides: it names the policy."""
    patient.register()
    node, name = patient.node, f"^{re.escape(patient.name)}$"
    limit = {"delivery-limit": 5}
    harmless = {"queue-leader-locator": "balanced"}
    own = node.policy
    cases: list[tuple[list[Any], bool]] = [
        ([own("one", "^another$", limit)], False),
        ([own("one", name, limit), own("two", name, harmless, priority=1)], False),
        ([own("one", name, limit, priority=2), own("two", name, harmless, priority=1)], True),
        ([own("one", name, limit, apply_to="exchanges")], False),
        ([own("one", name, limit, apply_to="all")], True),
        ([own("one", name, limit, operator=True), own("two", name, harmless, priority=1)], True),
        # Quorum queues have no modes, so the whole policy is not for them.
        ([own("one", name, {**limit, "queue-mode": "lazy"})], False),
        ([own("one", name, {**limit, "max-in-memory-length": 5})], True),
    ]
    if release_of(patient) >= (4, 0):
        cases += [
            ([own("one", name, limit, apply_to="classic_queues")], False),
            ([own("one", name, limit, apply_to="quorum_queues")], True),
        ]
    for managers, harms in cases:
        for each in managers:
            each.__enter__()
        found = patient.check("policies")
        in_effect = {
            each["name"]
            for each in in_force(
                Management(node.management, patient.url).policies(), patient.name, "quorum"
            )
        }
        row = node.get(f"queues/%2F/{patient.name}")
        assert {row.get("policy"), row.get("operator_policy")} - {
            None,
            "",
            "undefined",
        } <= in_effect
        for each in managers:
            each.__exit__(None, None, None)
        assert bool(found) is harms, found
        assert all(each.severity is WARNING for each in found)


def test_policy_for_a_queue_that_does_not_exist_yet_is_found(patient: Patient) -> None:
    assert patient.check("policies") == []
    with patient.node.policy("harm", ".*", {"expires": 60_000}):
        assert one(patient.check("policies")).where == patient.name
    with patient.node.policy("harm", ".*", {"delivery-limit": 500}):
        assert patient.check("policies") == []


def test_command_that_removes_a_policy_names_its_vhost() -> None:
    policy = {"name": "a b", "vhost": "shop", "operator": False}
    assert clear_command(policy) == "rabbitmqctl clear_policy -p shop 'a b'"
    policy = {"name": "tidy", "vhost": "/", "operator": True}
    assert clear_command(policy) == "rabbitmqctl clear_operator_policy tidy"


def test_alternate_exchange_by_policy_is_found(patient: Patient) -> None:
    assert patient.check("alternate-exchange") == []
    alternate = {"alternate-exchange": "amq.fanout"}
    with patient.node.policy("other", ".*", alternate, apply_to="exchanges"):
        assert one(patient.check("alternate-exchange")).severity is NOTE
    with patient.node.policy("other", ".*", {"expires": 9000}, apply_to="queues"):
        assert patient.check("alternate-exchange") == []


def test_handler_longer_than_the_consumer_timeout_is_found(patient: Patient) -> None:
    """Of the server's settings, and of a policy for the queue."""

    def found(limit: float | None, prefetch: int = 1, workers: int = 1) -> list[Severity]:
        queue = broker.Queue(patient.name, broker.Exchange(patient.exchange))
        subscribed = Subscribed(queue, True, limit, prefetch, workers)
        return [each.severity for each in patient.check("consumer-timeout", [subscribed])]

    seconds = CONSUMER_TIMEOUT / 1000
    assert found(None) == []
    assert found(seconds - 1) == []
    assert found(seconds) == [ERROR]
    assert found(10, prefetch=200) == [NOTE]
    assert found(10, prefetch=200, workers=8) == []
    if release_of(patient) >= (4, 0):
        policy = {"consumer-timeout": 90_000}
        with patient.node.policy("short", f"^{re.escape(patient.name)}$", policy):
            assert found(89) == []
            assert found(91) == [ERROR]
    management = patient.sources()[:1]
    subscribed = Subscribed(patient.subscribed.queue, True, seconds)
    with pytest.raises(Unknown, match="30 minutes, was assumed"):
        patient.check("consumer-timeout", [subscribed], sources=management)


def test_binding_key_with_many_hashes_is_found(patient: Patient) -> None:
    """Before 4.3.5, which refuses it: in the code, and among the bindings."""
    key = "#.a.#.b.#"
    patient.register()
    assert patient.check("binding-keys") == []
    queue = broker.Queue(patient.name, broker.Exchange(patient.exchange), (key,))
    assert key in one(patient.check("binding-keys", [Subscribed(queue)])).where
    if release_of(patient) < (4, 3, 5):
        onlooker.bind_queue(patient.url, "another", patient.exchange, key)
        assert patient.check("binding-keys") == []
        found = one(patient.check("binding-keys", []))
        assert found.where == f"another: {key}"


# domain-event-broker uses pika's BlockingConnection, which pika 1.5 deprecates.
@pytest.mark.filterwarnings("ignore:BlockingConnection is deprecated:DeprecationWarning")
def test_leftovers_of_domain_event_broker_are_found(patient: Patient) -> None:
    old: Any = pytest.importorskip("domain_event_broker")
    assert patient.check("leftovers") == []
    subscriber = old.Subscriber(patient.url, patient.exchange)
    subscriber.register(print, patient.name, ["a.*"], dead_letter=True, max_retries=1)
    subscriber.channel.queue_declare(
        f"{patient.name}-delay-9000",
        durable=True,
        arguments={"x-dead-letter-exchange": f"{patient.name}-retry", "x-message-ttl": 9000},
    )
    subscriber.workers.shutdown()
    subscriber.disconnect()
    classic = Subscribed(
        broker.Queue(patient.name, broker.Exchange(patient.exchange), classic=True)
    )
    for source in patient.sources():
        found = patient.check("leftovers", sources=[source])
        assert {each.where for each in found} == {patient.name, f"{patient.name}-delay-9000"}
        assert {each.severity for each in found} == {WARNING}
        accepted = patient.check("leftovers", [classic], sources=[source])
        assert {each.severity for each in accepted} == {WARNING, NOTE}
    onlooker.delete(patient.url, queues=[patient.name, f"{patient.name}-delay-9000"])
    left = one(patient.check("leftovers"))
    assert left.where == f"{patient.name}-dlx, {patient.name}-retry"
    assert left.severity is NOTE


def test_retries_that_are_due_and_stand_still_are_found(patient: Patient) -> None:
    """As after a restart: the level cannot hand them on."""
    patient.register()
    source = patient.sources()[1:]  # which counts at once

    def found() -> list[Finding]:
        return [each for each in patient.check("restart", sources=source) if each.is_bad]

    assert found() == []
    onlooker.delete(patient.url, exchanges=[f"{patient.exchange}.due"])
    exchange, key = topology.delay_address(patient.exchange, patient.name, 0.1)
    for _ in range(2):
        onlooker.publish(patient.url, exchange, key, b"{}", delivery_mode=2)
    held = wait_until(found)
    assert f"{patient.exchange}.delay.00" in one(held).where
    assert "passed of 2 retries" in one(held).why


def test_time_that_retries_may_stand_still_is_shown(patient: Patient) -> None:
    assert "180 s" in one(patient.check("confirm-timeout")).what


def test_dead_letters_and_undelivered_retries_are_counted(patient: Patient) -> None:
    patient.register()
    assert patient.check("dead-letters", sources=[]) == []
    for queue in (patient.dead_letters, patient.dead_letters, patient.undelivered):
        onlooker.publish(patient.url, "", queue, b"{}")
    for subscribed, sources in [([patient.subscribed], []), ([], patient.sources())]:
        found = patient.check("dead-letters", subscribed, sources=sources)
        assert {each.what for each in found} == {"dead letters: 2", "undelivered retries: 1"}


def test_queue_without_consumers_is_found(patient: Patient) -> None:
    assert "has no queue" in one(patient.check("consumers", sources=[])).what
    patient.register()
    onlooker.publish(patient.url, "", patient.name, b"{}")
    for subscribed, sources in [([patient.subscribed], []), ([], patient.sources())]:
        found = one(patient.check("consumers", subscribed, sources=sources))
        assert found.what == f"nobody consumes from '{patient.name}'; events that wait: 1"
    onlooker.take(patient.url, patient.name)
    subscriber = Subscriber(patient.url, patient.exchange)
    subscriber.register(print, patient.name, ["a.*"], max_retries=1)
    with consuming(subscriber, patient.url, patient.name):
        assert patient.check("consumers", sources=[]) == []


# --- a cluster -----------------------------------------------------------------------------------


def test_disabled_feature_flags_are_found(
    node_factory: Callable[..., Node], patient: Patient
) -> None:
    """On a node that was new when all flags were disabled."""
    assert patient.check("feature-flags") == []
    if release_of(patient) >= (4, 3):
        pytest.skip("this RabbitMQ requires all its feature flags")
    port = free_port()
    node = node_factory(plugins=["rabbitmq_management"], config=f"management.tcp.port = {port}")
    (node.folder / "advanced.config").write_text(
        "[{rabbit, [{forced_feature_flags_on_init, []}]}]."
    )
    node.start()
    source = Management(f"http://127.0.0.1:{port}", node.url)
    found = one(patient.check("feature-flags", sources=[source], url=node.url))
    assert found.severity is WARNING
    assert "feature flags are disabled: " in found.what


@pytest.mark.slow
def test_queues_with_few_members_and_without_majority_are_found(
    node_factory: Callable[..., Node], unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes that join a cluster after queues were declared, and that go down."""
    port = free_port()
    first = node_factory(plugins=["rabbitmq_management"], config=f"management.tcp.port = {port}")
    second = node_factory()
    for node in (first, second):
        node.start(wait=False)
    first.start()

    class Alone:
        node, url, management = first, first.url, f"http://127.0.0.1:{port}"

    alone: Any = Alone
    patient = Patient(alone, unique, monkeypatch)
    source = [Management(alone.management, first.url)]
    wait_until(lambda: not source[0].disabled_feature_flags())
    patient.register()
    assert patient.check("members", sources=source) == []
    assert patient.check("nodes", sources=source) == []
    second.join(first)
    few = one(patient.check("members", sources=source))
    assert "fewer members than the cluster of 2 nodes" in few.what
    assert one(patient.check("nodes", sources=source)).what == "the cluster has two nodes"
    onlooker.delete(first.url, queues=[patient.name])
    patient.register()
    first.sync()
    second.kill()
    found = wait_until(
        lambda: [
            each for each in patient.check("members", sources=source) if each.severity is ERROR
        ]
    )
    assert patient.name in one(found).where
    down = [each for each in patient.check("nodes", sources=source) if each.severity is ERROR]
    assert one(down).where == second.name
