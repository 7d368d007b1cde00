"""Nothing that runs inside logging, callbacks or finalizers reaches a connection or a delivery.

Each test makes its mischief, cuts the connections, and then wants every event that is published
to be confirmed and handled.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
from bench import Bench
from faults.proxy import Proxy
from live import consuming
from pika.channel import Channel
from support import sooner_than, wait_until

from domain_events import (
    BrokerUnavailable,
    DeadLetters,
    DomainEvent,
    Publisher,
    Subscriber,
    log,
    publish_domain_event,
)
from domain_events.broker.rabbitmq.consumer import RabbitConsumer
from domain_events.broker.rabbitmq.consuming import RabbitConsuming
from domain_events.broker.rabbitmq.link import Link
from domain_events.broker.rabbitmq.loop import Loop
from domain_events.broker.rabbitmq.publishing import RabbitPublishing
from domain_events.broker.rabbitmq.transport import Attempt, Connection, Transport
from domain_events.broker.rabbitmq.wire import Writer


class Line:
    """A publisher and a subscriber behind a wire that can be cut."""

    def __init__(self, bench: Bench, proxy: Proxy, url: str) -> None:
        self.bench = bench
        self.proxy = proxy
        self.url = url
        self.queue = bench.names.queue()
        self.seen: set[str] = set()
        self.publisher = Publisher(url, bench.exchange, timeout=30)
        self.subscriber = Subscriber(url, bench.exchange)
        self.subscriber.register(lambda event: self.seen.add(event.uuid_string), self.queue, ["#"])

    @property
    def links(self) -> tuple[Link, Link]:
        """The publishing connection and the consuming one."""
        return self.publisher._publishing()._link, self.subscriber.connections.consuming()._link  # type: ignore[union-attr]

    def works(self, number: int = 20) -> None:
        """Whatever is published is confirmed and handled."""
        events = [self.publisher.publish(DomainEvent("a.b", n)) for n in range(number)]
        wait_until(lambda: {event.uuid_string for event in events} <= self.seen)


@pytest.fixture
def line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    # Each connection counts as one that had lasted: without this the pauses would grow.
    monkeypatch.setattr("domain_events.broker.rabbitmq.link._LASTING", 0.0)
    broker = urlsplit(bench.url)
    assert broker.hostname is not None
    assert broker.port is not None
    with closing(Proxy(broker.hostname, broker.port)) as proxy:
        line = Line(bench, proxy, bench.url.replace(f":{broker.port}/", f":{proxy.port}/"))
        with line.publisher, consuming(line.subscriber, bench.url, line.queue):
            line.works()
            yield line


# --- logging -------------------------------------------------------------------------------------


class Mischief(logging.Handler):
    """A handler of the application's, on the root logger."""

    def __init__(self, act: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self.act = act
        self.acted = threading.Semaphore(0)

    def handle(self, record: logging.LogRecord) -> bool:  # as a filter that raises would do it
        if record.name == "domain_events":
            self.acted.release()
            self.act(record)
        return True


@contextmanager
def installed(handler: logging.Handler) -> Iterator[None]:
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_logging_that_raises_breaks_nothing(line: Line, kind: type[BaseException]) -> None:
    """A filter that reads `flask.request` on a thread that has none, for example."""

    def act(_record: logging.LogRecord) -> None:
        raise kind

    handler = Mischief(act)
    with installed(handler):
        for _ in range(3):
            line.proxy.cut()
            line.works()
        assert handler.acted.acquire(timeout=30)


@pytest.mark.parametrize("of_its_own", [True, False])
def test_logging_that_publishes_breaks_nothing(line: Line, of_its_own: bool) -> None:
    """Also on the very connection that the line is about, under a lock of its own."""
    lock = threading.Lock()
    published: list[DomainEvent] = []

    def act(_record: logging.LogRecord) -> None:
        with lock:
            if of_its_own:
                with Publisher(line.url, line.bench.exchange, timeout=30) as publisher:
                    published.append(publisher.publish(DomainEvent("log.line", {})))
            else:
                published.append(line.publisher.publish(DomainEvent("log.line", {})))

    with installed(Mischief(act)):
        line.proxy.cut()
        with lock:  # as if it had been held by somebody who waits for a confirm
            line.works()
        wait_until(lambda: published)
        wait_until(lambda: {event.uuid_string for event in published} <= line.seen)
        assert log.flush(30)


def test_logging_that_blocks_holds_nobody_up(line: Line) -> None:
    """A disk that hangs: the connections are back, however long it takes."""
    go_on = threading.Event()

    def act(_record: logging.LogRecord) -> None:
        go_on.wait(60)

    handler = Mischief(act)
    try:
        with installed(handler):
            line.proxy.cut()
            assert handler.acted.acquire(timeout=30)
            line.works()
            line.proxy.cut()
            line.works()
    finally:
        go_on.set()
        assert log.flush(30)


def test_logger_of_another_class_breaks_nothing(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`logging.setLoggerClass`, a record factory, `logging.disable`."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("mischief")

    class Broken(logging.Logger):
        makeRecord = isEnabledFor = fail  # noqa: N815

    with monkeypatch.context() as changed:
        changed.setattr(logging.getLogger("domain_events"), "__class__", Broken)
        line.proxy.cut()
        line.works()
        assert log.flush(30)
    with monkeypatch.context() as changed:
        changed.setattr(logging, "_logRecordFactory", fail)
        line.proxy.cut()
        line.works()
        assert log.flush(30)
    logging.disable()
    try:
        line.proxy.cut()
        line.works()
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_pikas_own_log_breaks_nothing(
    line: Line, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody has switched it on: it is written on the same threads."""
    lines: list[str] = []

    def act(record: logging.LogRecord) -> None:
        lines.append(record.getMessage())
        raise kind

    handler = Mischief(act)
    monkeypatch.setattr(handler, "handle", act)
    pika_logger = logging.getLogger("pika")
    level = pika_logger.level
    pika_logger.setLevel(logging.DEBUG)
    pika_logger.addHandler(handler)
    try:
        line.proxy.cut()
        line.works()
        assert log.flush(30)
        assert any("connecting to" in each for each in lines)
    finally:
        pika_logger.removeHandler(handler)
        pika_logger.setLevel(level)


# --- finalizers ----------------------------------------------------------------------------------


class Garbage:
    """Something whose finalizer runs when the garbage collector comes by."""

    def __init__(self, act: Callable[[], object], done: threading.Event) -> None:
        self.act = act
        self.done = done
        self.itself = self

    def __del__(self) -> None:
        try:
            self.act()
        finally:
            self.done.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", [0, 1], ids=["publishing", "consuming"])
@pytest.mark.parametrize(
    "act",
    [
        lambda line: line.publisher.publish(DomainEvent("from.finalizer", {}), timeout=60),
        lambda line: publish_domain_event(
            "from.finalizer", {}, connection_settings=line.url, timeout=60
        ),
        lambda line: Publisher(line.url, timeout=60).publish(DomainEvent("from.finalizer", {})),
        lambda line: Publisher(line.url, timeout=60).publish_many([DomainEvent("a.b", {})]),
        lambda line: DeadLetters(line.queue, line.url, timeout=60).count(),
        lambda line: Subscriber(line.url, timeout=60).register(print, f"{line.queue}-never", ["#"]),
        lambda _line: 1 / 0,
        lambda _line: (_ for _ in ()).throw(SystemExit),
    ],
    ids=["own", "process", "new", "many", "count", "register", "raises", "exits"],
)
def test_finalizer_on_an_io_thread_reaches_no_connection(
    line: Line, where: int, act: Callable[[Line], object]
) -> None:
    """Where it would wait for a broker, it gets an error at once; the thread goes on."""
    done = threading.Event()

    def collect() -> None:
        Garbage(lambda: act(line), done)
        gc.collect()

    link = line.links[where]
    connection = link.connection
    link.wake(collect)
    with sooner_than(60):  # the timeouts of what it asks for
        assert done.wait(40)
    line.works()
    assert link.connection is connection


@pytest.mark.parametrize("where", [0, 1], ids=["publishing", "consuming"])
def test_finalizer_on_an_io_thread_may_close_and_stop(line: Line, where: int) -> None:
    """Without waiting for itself. What is closed is closed, in order; what was stopped ends."""
    done = threading.Event()
    threads = [link._thread for link in line.links]

    def act() -> None:
        line.publisher.close()
        line.subscriber.stop_consuming()

    def collect() -> None:
        Garbage(act, done)
        gc.collect()

    line.links[where].wake(collect)
    assert done.wait(30)
    for thread in threads:
        assert thread is not None
        thread.join(30)
        assert not thread.is_alive()
    with pytest.raises(BrokerUnavailable, match="Publisher was closed"):
        line.publisher.publish(DomainEvent("a.b", {}))


# --- the I/O thread itself -----------------------------------------------------------------------


class Death(BaseException):
    """What nobody catches."""


# Where it strikes.
POINTS: list[tuple[Any, str]] = [
    (Attempt, "start"),
    (Attempt, "create_streaming_connection"),
    (Connection, "channel"),
    (Connection, "add_on_close_callback"),
    (Channel, "queue_declare"),
    (Channel, "exchange_declare"),
    (Channel, "confirm_delivery"),
    (Channel, "basic_qos"),
    (Channel, "basic_consume"),
    (Channel, "basic_ack"),
    (Writer, "frames"),
    (Transport, "buffer"),
    (Transport, "write"),
    (Transport, "flush"),
    (Transport, "_on_ready"),
    (Transport, "_received"),
    (Transport, "_lose"),
    (Loop, "_on_wake"),
    (Loop, "call_later"),
    (Loop, "start"),
    (Loop, "add_handler"),
    (Loop, "_get_remaining_interval"),
    (RabbitPublishing, "opened"),
    (RabbitPublishing, "lost"),
    (RabbitPublishing, "_pump"),
    (RabbitPublishing, "answered"),
    (RabbitConsuming, "opened"),
    (RabbitConsuming, "lost"),
    (RabbitConsumer, "open"),
    (RabbitConsumer, "lost"),
    (RabbitConsumer, "_on_delivery"),
    (RabbitConsumer, "_send_settled"),
    (Link, "_connect"),
    (Link, "_attempted"),
    (Link, "_on_closed"),
    (Link, "_connect_later"),
    (Link, "_serve"),
    (Link, "_recover"),
    (Link, "_new_loop"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[f"{o.__name__}.{n}" for o, n in POINTS])
def test_link_connects_again_whatever_it_died_of(
    line: Line, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once on each of the two threads, before what was to be done and after it."""
    for late in (False, True):
        struck: set[threading.Thread] = set()
        original = getattr(owner, name)

        def strike(
            *arguments: Any,
            _struck: set[threading.Thread] = struck,
            _late: bool = late,
            _original: Any = original,
            **options: Any,
        ) -> Any:
            result = _original(*arguments, **options) if _late else None
            thread = threading.current_thread()
            if thread.name.startswith("domain-events-") and thread not in _struck:
                _struck.add(thread)
                raise Death
            return result if _late else _original(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, strike)
            # Some are looked up when a connection or a loop is made: hence the second time.
            for crash in (False, True, True, False):
                for link in line.links if crash else ():
                    link.wake(_die)
                line.proxy.cut()
                line.works()
            assert struck
        line.works()


def test_io_thread_that_is_killed_from_outside_comes_back(line: Line) -> None:
    """As debuggers and libraries for time limits do, wherever it is just then."""
    for _ in range(10):
        for link in line.links:
            thread = link._thread
            assert thread is not None
            assert thread.ident is not None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
            )
        line.works(5)
    line.proxy.cut()
    line.works()


def test_io_thread_that_is_traced_to_death_comes_back(line: Line) -> None:
    """A tracer that raises, wherever it is called: Python takes it away then."""
    for patience in (1, 5, 50, 500):
        for link in line.links:
            calls = iter(range(patience))

            def trace(*_: Any, _calls: Iterator[int] = calls) -> Any:
                if next(_calls, None) is None:
                    raise Death
                return trace

            link.wake(lambda: sys.settrace(trace))
        line.proxy.cut()
        line.works()


def test_thread_that_has_ended_is_followed_by_another(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last net: what a dead thread left behind is let go of before the next one connects."""
    (link, _) = line.links
    dead = link._thread
    assert dead is not None
    hostile_time = SimpleNamespace(sleep=_die, monotonic=time.monotonic)
    monkeypatch.setattr("domain_events.broker.rabbitmq.link.time", hostile_time)
    monkeypatch.setattr(threading, "excepthook", lambda _arguments: None)
    monkeypatch.setattr(link, "_serve", _die)
    link._loop.add_callback_threadsafe(lambda: 1 / 0)  # type: ignore[union-attr]
    wait_until(lambda: not dead.is_alive())
    monkeypatch.undo()
    line.works()
    assert link._thread is not dead


def _die(*_: object) -> NoReturn:
    raise Death
