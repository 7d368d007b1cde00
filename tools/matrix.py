"""The test-suite on every RabbitMQ, Python and pika that the library supports: `make matrix`.

RabbitMQ 3.10, 4.0 and 4.3 with this Python and the newest pika; then each Python found here, and
the oldest pika on the oldest of them, with the RabbitMQ of this machine. Arguments go to pytest.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import rabbitmq_node

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def interpreters() -> dict[str, str]:
    """Version -> program, of the Pythons on PATH and of pyenv's."""
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for version in PYTHONS:
        installed = sorted((pyenv / "versions").glob(f"{version}.*/bin/python"))
        for program in (f"python{version}", *map(str, installed)):
            # The shims of pyenv are on PATH for Pythons that are not.
            try:
                code = "import sys; print(sys.executable)"
                path = subprocess.check_output([program, "-c", code], stderr=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError):
                continue
            found[version] = path.decode().strip()
            break
    return found


def run(title: str, command: list[str], **environment: str) -> tuple[str, bool, float]:
    print(f"\n===== {title}: {shlex.join(command)}", flush=True)
    began = time.monotonic()
    code = subprocess.call(command, env={**os.environ, **environment})
    return title, code == 0, time.monotonic() - began


def main() -> int:
    pytest = sys.argv[1:]
    results = []
    for release in rabbitmq_node.SUITES:
        title = f"RabbitMQ {release}"
        try:
            rabbitmq_node.install([release])
        except rabbitmq_node.NodeError as error:
            print(f"{title}: {error}", flush=True)
            results.append((title, False, 0.0))
            continue
        command = [sys.executable, "-m", "pytest", *pytest]
        results.append(run(title, command, DOMAIN_EVENTS_TEST_RELEASE=release))

    found = interpreters()
    wanted = [(version, "new") for version in found]
    wanted += [(version, "132") for version in list(found)[:1]]
    for version, pika in wanted:
        environment = f"py{version.replace('.', '')}-pika{pika}"
        command = [sys.executable, "-m", "tox", "run", "--discover", found[version]]
        command += ["-e", environment, "--", *pytest]
        name = "newest" if pika == "new" else ".".join(pika)
        results.append(run(f"Python {version}, pika {name}", command))

    print("\n===== the matrix")
    for title, passed, seconds in results:
        print(f"{title:<26} {'passed' if passed else 'FAILED'} {seconds:7.0f} s")
    for version in PYTHONS:
        if version not in found:
            print(f"{f'Python {version}':<26} not found here")
    return 0 if all(passed for _, passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
