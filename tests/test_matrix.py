"""`make matrix`: which parts it has, and what it says and does at their ends: tools/matrix.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import matrix
import pytest
from matrix import Part
from rabbitmq_node import NodeError
from support import wait_until

FOUND = {"3.10": "/usr/bin/python3.10", "3.11": "/usr/bin/python3.11"}


def titles(listed: list[Part]) -> list[str]:
    return [part.title for part in listed]


def test_every_python_and_every_pika_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed comes from Debian testing, or is said to be missing."""
    monkeypatch.setattr(matrix, "interpreters", lambda: FOUND)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    listed, missing = matrix.parts([])
    assert titles(listed) == [
        *("RabbitMQ 3.10", "RabbitMQ 4.0", "RabbitMQ 4.3"),
        *("Python 3.10, pika 1.4.4", "Python 3.11, pika 1.4.4"),
        *("Python 3.14, pika 1.4.4, RabbitMQ 4.3", "Python 3.15, pika 1.4.4, RabbitMQ 4.3"),
        *("Python 3.10, pika 1.3.2", "Python 3.10, pika 1.5.0rc1"),
        *("Python 3.15, pika 1.3.2, RabbitMQ 4.3", "Python 3.15, pika 1.5.0rc1, RabbitMQ 4.3"),
    ]
    assert missing == ["3.12", "3.13"]

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    listed, missing = matrix.parts([])
    assert titles(listed)[-1] == "Python 3.11, pika 1.5.0rc1"
    assert missing == ["3.12", "3.13", "3.14", "3.15"]


def test_its_pythons_and_pikas_are_those_of_tox_and_of_the_classifiers() -> None:
    root = Path(matrix.__file__).parents[1]
    numbers = ",".join(version.partition(".")[2] for version in matrix.PYTHONS)
    factors = ",".join(sorted(factor.removeprefix("pika") for factor in matrix.PIKAS.values()))
    tox = (root / "tox.ini").read_text()
    assert f"py3{{{numbers}}}-pika{{{factors}}}" in tox
    for version, factor in matrix.PIKAS.items():
        assert f"{factor}: pika=={version}\n" in tox
    metadata = (root / "pyproject.toml").read_text()
    for version in matrix.PYTHONS:
        assert f'"Programming Language :: Python :: {version}"' in metadata


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_table_shows_each_part_and_one_failure_fails_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also when what a part stands on cannot be installed; the parts behind it are run."""

    def cannot() -> list[str]:
        raise NodeError("debootstrap failed")

    listed = [
        Part("good", lambda: python("pass")),
        Part("bad", lambda: python("raise SystemExit(3)")),
        Part("impossible", cannot),
        Part("told", lambda: python("import os; assert os.environ['A'] == 'b'"), {"A": "b"}),
    ]
    monkeypatch.setattr(matrix, "parts", lambda _arguments: (listed, ["3.9"]))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert matrix.main() == 1
    printed = capfd.readouterr().out
    table = printed.partition("===== the matrix")[2].splitlines()[1:]
    assert [line.split()[:2] for line in table] == [
        ["good", "passed"],
        ["bad", "FAILED"],
        ["impossible", "FAILED"],
        ["told", "passed"],
        ["Python", "3.9"],
    ]
    assert "===== 2 of 4: bad" in printed
    assert "debootstrap failed" in printed
    del listed[1:3]
    assert matrix.main() == 0


INTERRUPTED = """
import sys
import matrix

code = '''
import signal, sys
from pathlib import Path
def stop(*_):
    print("stopped in order", flush=True)
    sys.exit(2)
signal.signal(signal.SIGINT, stop)
Path(sys.argv[1]).touch()
signal.pause()
'''
matrix.parts = lambda arguments: (
    [
        matrix.Part("first", lambda: [sys.executable, "-c", code, arguments[0]]),
        matrix.Part("second", lambda: [sys.executable, "-c", "print('never')"]),
    ],
    [],
)
sys.exit(matrix.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_in_order_and_still_shows_its_table(
    tmp_path: Path, number: signal.Signals
) -> None:
    """What is running gets its SIGINT, and nothing else is begun."""
    running = tmp_path / "running"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(running)],
        env={**os.environ, "PYTHONPATH": str(Path(matrix.__file__).parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(running.exists)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130, printed
    assert "stopped in order" in printed.splitlines()
    table = printed.partition("===== the matrix")[2].splitlines()[1:]
    assert [line.split()[:2] for line in table] == [["first", "interrupted"], ["second", "not"]]
    assert "never" not in printed
