"""The test suite on every RabbitMQ, Python and pika that the library supports: `make matrix`.

RabbitMQ 3.10, 4.0 and 4.3 with this Python and its pika; then each Python with the newest pika, and
the oldest and the newest Python with the other ones, on the RabbitMQ of this machine. A Python that
is neither on PATH nor pyenv's is taken from Debian testing, if available: unpacked beside the
releases of RabbitMQ (tools/rabbitmq_node.py), with its own RabbitMQ 4.3.

Arguments are passed to pytest. Exits with 1 if a part failed, and with 130 on Ctrl-C, which ends
the running part in order.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rabbitmq_node
from rabbitmq_node import NodeError

PROJECT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
# Version -> the factor in tox.ini.
PIKAS = {"1.4.4": "pika144", "1.3.2": "pika132", "1.5.0rc1": "pika150"}
NEWEST_PIKA = "1.4.4"

# Seconds for a part to end after Ctrl-C, during which tests stop brokers and programs.
END_SECONDS = 90.0


# --------------------------------------------------------------------------- Pythons


def interpreters() -> dict[str, str]:
    """Version -> program, of the Pythons on PATH and of pyenv's."""
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for version in PYTHONS:
        installed = sorted((pyenv / "versions").glob(f"{version}.*/bin/python"))
        for program in (f"python{version}", *map(str, installed)):
            # pyenv's shims are on PATH even for Pythons that are not installed.
            try:
                code = "import sys; print(sys.executable)"
                path = subprocess.check_output([program, "-c", code], stderr=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError):
                continue
            found[version] = path.decode().strip()
            break
    return found


class DebianTesting:
    """The Pythons of Debian testing, run in a separate root, which has RabbitMQ 4.3 as well."""

    PYTHONS = ("3.14", "3.15")
    # In addition: for pip, for the tests with TLS.
    PACKAGES = ("rabbitmq-server", "ca-certificates", "openssl")
    TOX = "/opt/tox"

    def tox(self, *arguments: str) -> list[str]:
        """The command line of tox in that root; the project has the same path there."""
        content = f"Python {' and '.join(self.PYTHONS)}"
        packages = [*self.PACKAGES, *(f"python{version}-venv" for version in self.PYTHONS)]
        suite = rabbitmq_node.SUITES["4.3"]
        root = rabbitmq_node.unpack(f"{suite}-pythons", suite, content, packages)
        # The machine's name servers and certificate authorities, with which pip reaches its index.
        shared = [PROJECT, Path("/etc/resolv.conf"), Path("/etc/ssl/certs")]
        shared = [path for path in shared if path.exists()]
        (root / PROJECT.relative_to("/")).mkdir(parents=True, exist_ok=True)
        unset = [f"--unset={name}" for name in self.foreign()]
        environment = ["HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]

        def inside(*command: str) -> list[str]:
            env = ["/usr/bin/env", f"--chdir={PROJECT}", *unset, *environment]
            return rabbitmq_node.chrooted(root, *env, *command, shared=shared)

        newest = f"python{self.PYTHONS[0]}"
        # A root that is older than this command may lack them.
        commands = [[newest, "tools/databases.py", "install"]]
        if not (root / self.TOX.lstrip("/") / "bin/tox").exists():
            commands += [
                [newest, "-m", "venv", "--clear", self.TOX],
                [f"{self.TOX}/bin/python", "-m", "pip", "install", "--quiet", "tox>=4"],
            ]
        for command in commands:
            if subprocess.call(inside(*command), stdin=subprocess.DEVNULL) != 0:
                raise NodeError(f"failed in {root}: {shlex.join(command)}")
        # Environments that tox created for the machine's own Pythons do not run in that root.
        workdir = f"{PROJECT}/.tox/{suite}"
        return inside(f"{self.TOX}/bin/tox", "run", "--workdir", workdir, *arguments)

    @staticmethod
    def foreign() -> list[str]:
        """The variables that point to programs outside that root."""
        named = ("TMPDIR", "XDG_CACHE_HOME", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
        return [*named, "DOMAIN_EVENTS_TEST_RELEASE"]


# --------------------------------------------------------------------------- parts


@dataclass
class Part:
    """One run of the test suite; `command` returns its command line, and may unpack something."""

    title: str
    command: Callable[[], Sequence[str]]
    environment: dict[str, str] = field(default_factory=dict)
    result: str = "not run"
    seconds: float = 0.0

    def run(self) -> None:
        """Run it, and record the outcome."""
        began = time.monotonic()
        self.result = "interrupted"
        try:
            command = self.command()
            print(shlex.join(command), flush=True)
            code = call(command, {**os.environ, **self.environment})
            self.result = "passed" if code == 0 else "FAILED"
        except NodeError as error:
            print(error, flush=True)
            self.result = "FAILED"
        finally:
            self.seconds = time.monotonic() - began


def call(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run it and return its exit status; on Ctrl-C, and on a second one, end it first."""
    # Its own process group: if the terminal or `kill` interrupts us, its programs get one SIGINT.
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {END_SECONDS:.0f} s at most to end in order", flush=True)
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def with_rabbitmq(release: str, pytest: Sequence[str]) -> Part:
    """On a release of RabbitMQ, with this Python."""

    def command() -> list[str]:
        rabbitmq_node.install([release])
        return [sys.executable, "-m", "pytest", *pytest]

    return Part(f"RabbitMQ {release}", command, {"DOMAIN_EVENTS_TEST_RELEASE": release})


def with_python(version: str, program: str | None, pika: str, pytest: Sequence[str]) -> Part:
    """With a Python and a pika, on this machine's RabbitMQ; or with both from Debian testing."""
    environment = f"py{version.replace('.', '')}-{PIKAS[pika]}"
    title = f"Python {version}, pika {pika}"
    if program is None:
        arguments = ["-e", environment, "--", *pytest]
        return Part(f"{title}, RabbitMQ 4.3", lambda: DebianTesting().tox(*arguments))
    tox = [sys.executable, "-m", "tox", "run", "--discover", program]
    return Part(title, lambda: [*tox, "-e", environment, "--", *pytest])


def parts(pytest: Sequence[str]) -> tuple[list[Part], list[str]]:
    """The parts to run, and the Pythons that are not available here."""
    found: dict[str, str | None] = {**interpreters()}
    if os.geteuid() == 0:  # which unpacking Debian requires
        found = {**dict.fromkeys(DebianTesting.PYTHONS), **found}
    versions = [version for version in PYTHONS if version in found]
    wanted = [(version, NEWEST_PIKA) for version in versions]
    ends = dict.fromkeys([*versions[:1], *versions[-1:]])
    wanted += [(version, pika) for version in ends for pika in PIKAS if pika != NEWEST_PIKA]
    listed = [with_rabbitmq(release, pytest) for release in rabbitmq_node.SUITES]
    listed += [with_python(version, found[version], pika, pytest) for version, pika in wanted]
    return listed, [version for version in PYTHONS if version not in found]


def main() -> int:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    listed, missing = parts(sys.argv[1:])
    code = 0
    try:
        for number, part in enumerate(listed, 1):
            print(f"\n===== {number} of {len(listed)}: {part.title}", flush=True)
            part.run()
            print(f"===== {part.title}: {part.result}, {part.seconds:.0f} s", flush=True)
    except KeyboardInterrupt:
        code = 130

    print("\n===== the matrix")
    for part in listed:
        print(f"{part.title:<42} {part.result:<11} {part.seconds:7.0f} s")
    for version in missing:
        print(f"{f'Python {version}':<42} not found here")
    return code or int(any(part.result != "passed" for part in listed))


if __name__ == "__main__":
    sys.exit(main())
