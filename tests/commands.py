"""Runs the command ``domain-events`` as its users do: as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from domain_events import settings

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ended:
    """What a command has printed, and its exit status."""

    status: int
    output: str
    errors: str


def run(*arguments: str, folder: Path, url: str | None = None, path: str | None = None) -> Ended:
    """Run it in the folder, to its end.

    :param url: the broker in the environment; none, if left out.
    :param path: where programs such as rabbitmqctl are found; nowhere, if left out.
    """
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(url, path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "domain_events", *arguments]


def environment(url: str | None = None, path: str | None = None) -> dict[str, str]:
    """That of this process, but for what names a broker."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in settings.ENVIRONMENT and name != "DOMAIN_EVENTS_MANAGEMENT_URL"
    }
    environment["PYTHONPATH"] = str(ROOT)
    environment["PATH"] = path or "/nowhere"
    if url is not None:
        environment[settings.ENVIRONMENT[0]] = url
    return environment
