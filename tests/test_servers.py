"""Real servers that fork, and forks that Python does not see."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onlooker
import pytest
from rabbitmq_node import free_port
from support import Names, wait_until

from domain_events import DomainEvent

PROGRAMS = Path(__file__).parent / "programs"
BESIDE_PYTHON = Path(sys.executable).parent


def _environment(url: str, **more: str) -> dict[str, str]:
    # Coverage would have its own idea of forks.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    return {**kept, "DOMAIN_EVENTS_URL": url, "PYTHONUNBUFFERED": "1", **more}


@contextmanager
def server(
    command: Sequence[str], port: int, environment: dict[str, str], log: Path
) -> Iterator[Callable[[], str]]:
    """A server while the block lasts; the function makes a request and returns its answer."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=PROGRAMS)

    def request() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    def is_up() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            request()
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode() + log.read_text()) from error
        except OSError:
            return False
        return True

    try:
        wait_until(is_up, timeout=60, interval=0.05)
        yield request
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def uwsgi(*options: str) -> Callable[[int], list[str]]:
    program = next((str(p) for n in ("pyuwsgi", "uwsgi") if (p := BESIDE_PYTHON / n).exists()), "")

    def command(port: int) -> list[str]:
        if not program and sys.version_info >= (3, 15):
            pytest.skip("pyuwsgi has no wheel for Python 3.15")
        home = sys.prefix if sys.prefix != sys.base_prefix else ""
        return [
            program,
            *("--http-socket", f"127.0.0.1:{port}", "--wsgi-file", "wsgi.py", "--master"),
            *(("--virtualenv", home) if home else ()),
            *("--die-on-term", *options),
        ]

    return command


def gunicorn(*options: str) -> Callable[[int], list[str]]:
    def command(port: int) -> list[str]:
        program = [sys.executable, "-m", "gunicorn", "wsgi:application"]
        return [*program, "--bind", f"127.0.0.1:{port}", *options]

    return command


@pytest.mark.parametrize(
    "command",
    [
        uwsgi("--processes", "2"),
        uwsgi("--processes", "2", "--enable-threads"),
        uwsgi("--processes", "2", "--threads", "2"),
        uwsgi("--processes", "2", "--enable-threads", "--lazy-apps"),
        uwsgi("--processes", "2", "--enable-threads", "--py-call-osafterfork"),
        uwsgi("--processes", "2", "--enable-threads", "--single-interpreter"),
        gunicorn("--workers", "2", "--preload"),
        gunicorn("--workers", "2", "--preload", "--threads", "2"),
        gunicorn("--workers", "2"),
    ],
    ids=[
        *("uwsgi", "uwsgi-enable-threads", "uwsgi-threads", "uwsgi-lazy", "uwsgi-osafterfork"),
        *("uwsgi-single", "gunicorn-preload", "gunicorn-preload-threads", "gunicorn"),
    ],
)
def test_each_worker_publishes_after_the_server_has_forked(
    command: Callable[[int], list[str]], names: Names, broker_url: str, tmp_path: Path
) -> None:
    """An event published at import, then by each worker: all are confirmed, and in the queue."""
    exchange, queue = names.exchange(), names.queue()
    onlooker.bind_queue(broker_url, queue, exchange, "#")
    port = free_port()
    # A heartbeat that would be missed between two requests if no thread ran meanwhile.
    environment = _environment(f"{broker_url}?heartbeat=1", EXCHANGE=exchange)
    answers: list[str] = []
    with server(command(port), port, environment, tmp_path / "log") as request:
        deadline = time.monotonic() + 60
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            while len(set(answers)) < 2:
                assert time.monotonic() < deadline, answers
                answers += [each.result() for each in [pool.submit(request) for _ in range(8)]]
        # It must wait: RabbitMQ closes a connection when it has missed two heartbeats.
        time.sleep(4)
        answers += [request() for _ in range(4)]
    events = [DomainEvent.from_json(body) for body in onlooker.take_all(broker_url, queue)]
    by_workers = [str(event.data["pid"]) for event in events if event.routing_key == "from.worker"]
    assert {event.routing_key for event in events} == {"from.import", "from.worker"}
    for pid in set(answers):
        assert by_workers.count(pid) >= 2 * answers.count(pid)


@pytest.mark.parametrize("kind", ["rabbitmq", "memory"])
def test_fork_that_python_does_not_see(names: Names, broker_url: str, kind: str) -> None:
    """Also while another thread holds every lock; what was closed stays closed."""
    exchange, queue = names.exchange(), names.queue()
    for who in ("parent", "child", "parent-again"):
        names.queue(f"q-{who}")
    url = broker_url if kind == "rabbitmq" else "memory://"
    program = [sys.executable, str(PROGRAMS / "forking_in_c.py"), exchange, queue]
    done = subprocess.run(
        program, env=_environment(url), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines() == ["child done", "parent done"], done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["rabbitmq", "memory"])
def test_it_works_where_there_is_no_fork(names: Names, broker_url: str, kind: str) -> None:
    """What Windows lacks, taken away."""
    url = broker_url if kind == "rabbitmq" else "memory://"
    program = [sys.executable, str(PROGRAMS / "portable.py"), names.exchange(), names.queue()]
    done = subprocess.run(
        program, env=_environment(url), capture_output=True, text=True, timeout=90, check=False
    )
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr
