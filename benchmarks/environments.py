"""The environment of each peer: its own virtual environment, or a compiled program.

They are kept below the user's cache folder and rebuilt when their requirements have changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.registry import Peer

_INSTALL_SECONDS = 600
_PEERS = Path(__file__).parent / "peers"


class Unavailable(Exception):
    """A peer cannot be measured here; the message has the reason."""


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "domain-events-rabbitmq" / "bench"


def command(peer: Peer) -> list[str]:
    """Install what the driver needs; returns the beginning of its command line.

    :raises Unavailable: it cannot be installed.
    """
    if peer.is_c:
        return [str(_compiled(peer))]
    return [str(python(peer)), str(_PEERS / peer.driver)]


def python(peer: Peer) -> Path:
    """The Python that can import it; for this library, the running one.

    :raises Unavailable: it cannot be installed.
    """
    if peer.is_ours:
        return Path(sys.executable)
    home = folder() / peer.name
    interpreter = home / "bin" / "python"
    wanted = json.dumps([sys.version, *peer.needs])
    made_for = home / "made-for.json"
    if made_for.exists() and made_for.read_text() == wanted:
        return interpreter
    print(f"bench: installing {peer.title} into its own environment", file=sys.stderr)
    venv.create(home, clear=True, with_pip=True)
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *peer.needs], f"{peer.title} cannot be installed")
    made_for.write_text(wanted)
    return interpreter


def version(peer: Peer) -> str:
    """The measured version, for the table; empty if unknown."""
    if peer.is_c:
        found = subprocess.run(
            ["pkg-config", "--modversion", "librabbitmq"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return found.stdout.strip()
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    return _run([str(python(peer)), "-c", code, peer.distribution], "no version").strip()


def _compiled(peer: Peer) -> Path:
    source = _PEERS / peer.driver
    program = folder() / source.stem
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("no C compiler (Debian: apt-get install gcc libc6-dev librabbitmq-dev)")
    folder().mkdir(parents=True, exist_ok=True)
    _run(
        [compiler, "-O2", "-o", str(program), str(source), "-lrabbitmq"],
        "it does not compile (Debian: apt-get install librabbitmq-dev)",
    )
    return program


def _run(words: list[str], what: str) -> str:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{what}: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(f"{what}: {said[-1] if said else 'no reason given'}")
    return done.stdout
