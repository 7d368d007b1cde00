"""What nobody gets to see: passwords and data; and what is made harmless where it is shown."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pika
import pytest
from bench import running
from support import wait_until

from domain_events import (
    ConfigurationError,
    DeadLetter,
    DeadLetters,
    DomainEvent,
    DomainEventsError,
    Publisher,
    Subscriber,
    address,
    configure,
    printable,
    publish_domain_event,
    replay_all,
    replay_event,
    settings,
)
from domain_events.broker.rabbitmq.envelope import RabbitDelivery
from domain_events.broker.rabbitmq.errors import explain
from domain_events.broker.rabbitmq.nodes import Nodes
from domain_events.message import Failure, Message, ToDeadLetters, ToExchange
from domain_events.undelivered import UndeliveredEvent

# Not in one piece: pytest shows the lines of the test.
SECRET = "s3cr3t-" + "hunter2"


def configure_and_use(theirs: Any) -> None:
    try:
        configure(theirs)
        Publisher()
    finally:
        configure()


MAKERS: dict[str, Callable[[Any], object]] = {
    "configure": configure_and_use,
    "Publisher": Publisher,
    "Publisher, wrong exchange": lambda theirs: Publisher(theirs, ""),
    "Publisher, wrong timeout": lambda theirs: Publisher(theirs, timeout=-1),
    "Subscriber": Subscriber,
    "Subscriber, wrong workers": lambda theirs: Subscriber(theirs, workers=0),
    "Subscriber, wrong exchange": lambda theirs: Subscriber(theirs, ""),
    "publish_domain_event": lambda theirs: publish_domain_event(
        "a.b", {}, connection_settings=theirs
    ),
    "DeadLetters": lambda theirs: DeadLetters("q", theirs),
    "DeadLetters, wrong name": lambda theirs: DeadLetters("", theirs),
    "replay_event": lambda theirs: replay_event("q", connection_settings=theirs),
    "replay_all": lambda theirs: replay_all("q", connection_settings=theirs),
}
BAD: dict[str, Callable[[str], object]] = {
    "a bare slash": lambda secret: f"amqp://guest:{secret}/x@localhost/",
    "a bare hash": lambda secret: f"amqp://guest:{secret}#x@localhost/",
    "no scheme": lambda secret: f"guest:{secret}@localhost",
    "another scheme": lambda secret: f"https://guest:{secret}@localhost/",
    "an unknown option": lambda secret: f"amqp://guest:{secret}@localhost/?no_such=1",
    "a wrong option": lambda secret: f"amqp://guest:{secret}@localhost/?heartbeat={secret}",
    "a wrong port": lambda secret: f"amqp://guest:{secret}@localhost:{secret}/",
    "TLS without verification": lambda secret: f"amqp://g:{secret}@localhost/?tls_verify={secret}",
    "several in one text": lambda secret: f"amqp://g:{secret}@a/,http://g:{secret}@b/",
    "a list": lambda secret: [f"amqp://g:{secret}@a/", f"http://g:{secret}@b/"],
    "a list with something else": lambda secret: [f"amqp://g:{secret}@a/", secret.encode()],
    "bytes": lambda secret: f"amqp://g:{secret}@a/".encode(),
    "a set": lambda secret: {f"amqp://g:{secret}@a/"},
    "a dict": lambda secret: {"url": f"amqp://g:{secret}@a/"},
    "a path": lambda secret: Path(f"amqp://g:{secret}@a/"),
}


def all_that_can_be_seen(error: BaseException | None) -> str:
    """Of an error: text, repr, arguments, and the variables of every function it came through.

    But for those of this module, whose the URLs are.
    """
    seen = ""
    while error is not None:
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        for frame in shown.stack:
            if frame.filename != __file__:
                seen += f"{frame.name}: {frame.locals}\n"
        seen += f"{error} {error!r} {error.args!r} {vars(error)}"
        error = error.__cause__ or error.__context__
    return seen


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("maker", MAKERS)
def test_password_is_not_among_the_variables_of_any_function(maker: str, bad: str) -> None:
    """Whoever reports an error with its variables, as pytest, rich and Sentry do."""
    with pytest.raises(ConfigurationError) as caught:
        MAKERS[maker](BAD[bad](SECRET))
    assert "hunter2" not in all_that_can_be_seen(caught.value)


@pytest.mark.parametrize("maker", ["Publisher", "Subscriber", "DeadLetters"])
def test_password_that_is_refused_is_not_among_the_variables_either(
    broker_url: str, maker: str
) -> None:
    """Neither here, nor in what the connection holds."""
    url = broker_url.replace("guest:guest", f"guest:{SECRET}")
    work: Callable[[Any], object] = {
        "Publisher": lambda made: made.publish(DomainEvent("a.b", {})),
        "Subscriber": lambda made: made.register(print, "q", ["#"]),
        "DeadLetters": lambda made: made.count(),
    }[maker]
    made: Any = MAKERS[maker](url)
    try:
        with pytest.raises(DomainEventsError) as caught:
            work(made)
        assert "hunter2" not in all_that_can_be_seen(caught.value)
        assert "hunter2" not in f"{made!r} {vars(made)}"
    finally:
        made.close()


def test_password_is_not_shown_by_what_is_given_to_pika() -> None:
    """Its parameters and its credentials."""
    nodes = Nodes(settings.resolve(f"amqp://guest:{SECRET}@localhost/") or ())
    parameters = nodes.parameters("test")
    assert isinstance(parameters.credentials, pika.PlainCredentials)
    assert parameters.credentials.password == SECRET
    shown = f"{nodes!r} {vars(nodes)} {parameters!r} {vars(parameters.credentials)}"
    assert "hunter2" not in shown
    again = copy.deepcopy(parameters.credentials)
    assert again.password == SECRET
    assert "hunter2" not in repr(vars(again))


@pytest.mark.parametrize("form", ["{}", "{},{}"])
def test_copied_and_pickled_settings_show_no_password(form: str) -> None:
    """And are the same."""
    url = f"amqp://guest:{SECRET}@localhost/"
    urls = settings.resolve(form.format(url, url))
    assert urls is not None
    assert set(urls) == {url}
    for same in (urls, copy.copy(urls), copy.deepcopy(urls), pickle.loads(pickle.dumps(urls))):
        assert same == urls
        assert "hunter2" not in f"{same!r} {list(same)!r} {same[0]!r} { {'url': same[0]} }"
        assert "amqp://guest@localhost/" in repr(same)


PYTEST = """
import pytest
from test_shown import BAD, MAKERS

SECRET = "s3cr3t-" + "hunter2"

@pytest.mark.parametrize(
    ("maker", "bad"),
    [("Publisher", bad) for bad in BAD] + [(maker, "a bare slash") for maker in MAKERS],
)
def test_fails(maker, bad):
    MAKERS[maker](BAD[bad](SECRET))
"""


@pytest.mark.parametrize("options", [[], ["--tb=long", "-rA"], ["--full-trace"]])
def test_password_is_not_in_the_output_of_pytest(tmp_path: Path, options: list[str]) -> None:
    """It shows the arguments of functions in the tracebacks of tests that fail."""
    (tmp_path / "test_fails.py").write_text(PYTEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "test_fails.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert f"{len(BAD) + len(MAKERS)} failed" in done.stdout
    lines = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        # The argument of a function in this module, which is the user's.
        if "hunter2" in line and not line.startswith("theirs = ")
    ]
    assert not lines


# --- data ----------------------------------------------------------------------------------------

DATA = "a customer's data"


def test_messages_show_no_data() -> None:
    """Neither bodies nor headers: ids and sizes only."""
    headers: dict[str, Any] = {"anything": DATA, DATA: 1}
    properties = pika.BasicProperties(headers=headers, message_id="id-1")
    delivery = RabbitDelivery("x", "a.b", False, properties, DATA.encode())
    failure = Failure(error_message=DATA, traceback=DATA)
    message = Message(
        ToExchange("x"), "a.b", DATA.encode(), "id-1", failure=failure, source=delivery
    )
    for shown in (repr(message), repr(delivery), f"{[message, delivery]}"):
        assert "customer" not in shown
        assert "'a.b' id-1, " in shown
        assert "exchange 'x', 17 bytes" in shown
    letter = a_dead_letter(body=DATA.encode(), _delivery=delivery, traceback=DATA)
    assert "customer" not in repr(letter)


def test_failed_publish_shows_no_data(unused_port: int) -> None:
    """The variables of the functions that it came through."""
    url = f"amqp://guest:guest@127.0.0.1:{unused_port}/"
    with Publisher(url, timeout=0.2) as publisher, pytest.raises(DomainEventsError) as caught:
        publisher.publish(DomainEvent("a.b", DATA))
    assert "customer" not in all_that_can_be_seen(caught.value)


# --- what others have written --------------------------------------------------------------------

EVIL = "\x1b[2J\nERROR forged\u202e" + "x" * 1_000_000


def received(routing_key: str, message_id: Any) -> RabbitDelivery:
    properties = pika.BasicProperties(message_id=message_id)
    return RabbitDelivery(routing_key, routing_key, False, properties, b"")


def a_dead_letter(**changed: Any) -> DeadLetter:
    told: dict[str, Any] = {
        "event": None,
        "body": b"",
        "routing_key": "a.b",
        "subscriber": "q",
        "error_type": "ValueError",
        "error_message": "no",
        "traceback": "",
        "failed_at": datetime.now(timezone.utc),
        "host": "here",
        "retries": 0,
        "first_error_type": None,
        "first_error_message": None,
        "replays": 0,
        "_delivery": None,
        "_owner": None,
    }
    return DeadLetter(**{**told, **changed})


@pytest.mark.parametrize(
    "shown",
    [
        lambda: repr(DomainEvent(EVIL, {})),
        lambda: repr(DomainEvent("a.b", {}, EVIL)),
        lambda: repr(DomainEvent("a.b", {}, {EVIL: [EVIL]})),  # type: ignore[arg-type]
        lambda: repr(DomainEvent("a.b", {}, None, EVIL)),
        lambda: repr(DomainEvent("a.b", {}, "x", "x", 1.0, 10**1000)),
        lambda: repr([DomainEvent(EVIL, {}, EVIL, EVIL)]),
        lambda: repr(a_dead_letter(event=DomainEvent(EVIL, {}, EVIL, EVIL))),
        lambda: repr(a_dead_letter(error_type=EVIL)),
        lambda: repr(a_dead_letter(error_message=EVIL)),
        lambda: repr(a_dead_letter(subscriber=EVIL, host=EVIL, traceback=EVIL, routing_key=EVIL)),
        lambda: repr(Message(ToExchange(EVIL), EVIL, b"", message_id=EVIL)),
        lambda: repr(Message(ToDeadLetters(EVIL), EVIL, b"", message_id=EVIL)),
        lambda: repr(received(EVIL, EVIL)),
        lambda: repr(received("a.b", b"\x1b")),
        lambda: repr(UndeliveredEvent(EVIL, None, EVIL, b"", *(None, None))),  # type: ignore[arg-type]
        lambda: address.shown(f"amqp://{EVIL}@localhost/{EVIL}"),
        lambda: explain(pika.exceptions.ConnectionClosedByBroker(320, EVIL)),
        lambda: explain(pika.exceptions.ChannelClosedByBroker(404, EVIL)),
        lambda: explain(pika.exceptions.UnexpectedFrameError(EVIL)),
        lambda: printable(EVIL),
        lambda: printable({EVIL: EVIL}),
    ],
)
def test_text_of_others_is_shown_on_one_short_line(shown: Callable[[], str]) -> None:
    """It moves no cursor, forges no lines and fills no screen."""
    text = shown()
    assert text.isprintable()
    assert len(text) < 2000


ROOT = Path(__file__).parents[1]
# Those are whole programs, and what they print is their own.
LISTING = re.compile(r"^\.\. listing:.*\n\n\.\. code-block::.*\n(?:\n| .*\n)+", re.MULTILINE)
PRINTED = sorted(
    {
        line.strip()
        for path in [ROOT / "README.rst", *(ROOT / "docs").glob("*.rst")]
        for line in LISTING.sub("", path.read_text()).splitlines()
        if re.match(r"\s+print\(.*(?<!-)\b(event|letter|entry|line)\b", line)
    }
    # Of an event of one's own.
    - {"print(event.uuid_string, event.timestamp)"}
)


@pytest.mark.parametrize("line", PRINTED)
def test_what_the_documentation_prints_moves_no_cursor(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its recipes are copied, and what they print is others'."""
    evil = "\x1b[2J\x9b2J\n"
    event = DomainEvent(evil, {"user_id": evil}, evil, evil)
    shown: dict[str, Any] = {
        "printable": printable,
        "event": event,
        "letter": a_dead_letter(event=event, error_type=evil, error_message=evil, traceback=evil),
        "entry": UndeliveredEvent(evil, event, evil, b"", *(None, None)),  # type: ignore[arg-type]
        "line": evil,
    }
    exec(line, shown)
    out = capsys.readouterr().out
    assert out.endswith("\n")
    assert out[:-1].isprintable()


def test_recipes_that_print_are_found() -> None:
    """Or the test before would see nothing."""
    assert len(PRINTED) >= 5


def test_text_is_escaped_once() -> None:
    """Where it stands in quotes."""
    entry = UndeliveredEvent("mail", None, "a\nb", b"", *(None, None))  # type: ignore[arg-type]
    assert repr(entry) == r"<UndeliveredEvent 'a\nb' for 'mail', 0 bytes>"
    with pytest.raises(ConfigurationError, match=r"^The subscriber's name 'a\\x9bb' begins or"):
        DeadLetters("a\x9bb")
    with pytest.raises(ConfigurationError, match=r"not 'a\\nb' \(of type str\)"):
        Subscriber(workers="a\nb")  # type: ignore[arg-type]


def test_text_that_means_no_harm_is_shown_as_it_is() -> None:
    """In any language."""
    event = DomainEvent("user.registered", {}, "Ådne Über 日本", "id-1")
    assert repr(event) == "<DomainEvent 'user.registered' id-1, about 'Ådne Über 日本'>"


def test_exceptions_text_makes_no_lines_of_its_own_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A handler's error may have in it what a publisher wrote; its traceback stays readable."""
    subscriber = Subscriber("memory://shown")

    def fail(event: DomainEvent) -> None:
        try:
            raise KeyError(event.data)
        except KeyError as error:
            raise ValueError(f"bad {event.data}") from error

    subscriber.register(fail, "shown", ["#"])
    with Publisher("memory://shown") as publisher:
        publisher.publish(DomainEvent("a.b", "\x1b[2J\n2026-01-01 ERROR forged"))
    with running(subscriber):
        wait_until(lambda: any(each.exc_info for each in caplog.records))
    (record,) = [each for each in caplog.records if each.exc_info]
    shown = logging.Formatter("%(message)s").format(record)
    assert "\x1b" not in shown
    assert not any(line.startswith("2026") for line in shown.splitlines())
    assert shown.splitlines()[-1] == r"ValueError: bad \x1b[2J\n2026-01-01 ERROR forged"
    assert "in fail" in shown
    assert "direct cause" in shown
    assert record.funcName == "_failed"
