"""What all commands of ``domain-events`` have in common, as a user meets it."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import command_line
import onlooker
import pytest
import shell
from support import wait_until

from domain_events.cli.app import COMMANDS

SCRIPT = Path(sys.executable).with_name("domain-events")
NO_EXTRA = "import sys\nsys.modules['click'] = sys.modules['rich'] = None\n"
# Of a broker or a database.
PASSWORD = "geheim-7c1f"


def environment(**more: str) -> dict[str, str]:
    return shell.environment("amqp://localhost:1/", more)


@pytest.mark.parametrize("command", [(), *((each,) for each in COMMANDS)])
def test_help_takes_no_broker_and_less_than_a_second(command: tuple[str, ...]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*shell.COMMAND, *command, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in environment().items() if not k.startswith("COVERAGE_")},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: domain-events" in done.stdout.lower()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_reference_is_what_the_help_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/command-line.rst; `python tools/command_line.py` changes nothing."""
    for name in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    assert command_line.PAGE.read_text() == command_line.page()


def test_script_and_module_behave_the_same() -> None:
    assert SCRIPT.exists(), "the project is not installed"
    outcomes = []
    for program in ([sys.executable, str(SCRIPT)], shell.COMMAND):
        for arguments in (["--version"], ["--help"], ["nonsense"], ["publish", "--nonsense"]):
            done = subprocess.run(
                [*program, *arguments], capture_output=True, check=False, env=environment()
            )
            outcomes.append((arguments, done.returncode, done.stdout, done.stderr))
    assert outcomes[:4] == outcomes[4:]


def test_without_the_extra_the_demo_works_and_all_else_names_what_to_install(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_EXTRA)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    demo = shell.run("memory://", "demo", more={"PYTHONPATH": path})
    assert demo.returncode == 0, demo.stderr
    assert "Done." in demo.stdout
    other = shell.run("memory://", "tail", more={"PYTHONPATH": path})
    assert other.returncode == 2
    assert "pip install 'domain-events-rabbitmq[cli]'" in other.stderr
    assert len(other.stderr.splitlines()) == 1


def test_the_core_imports_neither_the_commands_nor_what_they_need() -> None:
    code = (
        "import sys, domain_events, domain_events.broker.rabbitmq;"
        "found = {'click', 'rich', 'watchfiles', 'domain_events.cli'} & set(sys.modules);"
        "sys.exit(' '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- errors and their statuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["publish", "a.b", "1", "--timeout", "0.5"], 4, "No broker within 0.5 s"),
        (["publish", "a.b", "1", "--broker", "redis://h"], 2, "redis://"),
        (["tail", "--timeout", "0.5"], 4, "connection refused"),
        (["publish", "--nonsense"], 2, "--nonsense"),
        (["nonsense"], 2, "nonsense"),
        (["tail", "--limit", "many"], 2, "--limit"),
        (["tail", "--duration", "nan"], 2, "'nan' is not a finite number"),
        (["dead-letters", "replay", "x", "--rate", "nan"], 2, "'nan' is not a finite number"),
        (["relay", "x:y", "--idle", "inf"], 2, "'inf' is not a finite number"),
        (["dead-letters", "import", "/nowhere"], 74, "'/nowhere': No such file"),
        (["tail", "user*", "--create"], 2, "wildcard within the word"),
    ],
)
def test_errors_are_one_line_with_a_status(
    arguments: list[str], status: int, words: str, unused_port: int
) -> None:
    done = shell.run(f"amqp://guest:{PASSWORD}@localhost:{unused_port}/", *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    *logged, last = done.stderr.splitlines()
    assert last.startswith("domain-events: ")
    assert words in last
    assert all("Trying again" in line for line in logged)
    assert PASSWORD not in done.stderr


def test_a_wrong_password_is_an_error_of_the_settings(broker_url: str) -> None:
    wrong = broker_url.replace("guest:guest", f"guest:{PASSWORD}")
    for arguments in (["publish", "a.b", "1"], ["tail"]):
        done = shell.run(wrong, *arguments)
        assert done.returncode == 2
        assert "password" in done.stderr
        assert PASSWORD not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["tail", f"amqp://a:{PASSWORD}@h/"],
        ["publish", "a", "1", f"amqp://a:{PASSWORD}@h/"],
        ["publish", "--broker", f"amqp://a:{PASSWORD}@h:port/", "a", "1"],
        ["relay", f"nonsense://a:{PASSWORD}@h/d"],
        ["relay", "env:SECRET"],
        [f"amqp://a:{PASSWORD}@h/"],
    ],
)
def test_no_error_shows_a_password(arguments: list[str], unused_port: int) -> None:
    done = shell.run(
        f"amqp://localhost:{unused_port}/",
        *arguments,
        *(["--create", "--timeout", "0.5"] if arguments[0] == "tail" else []),
        more={"SECRET": f"nonsense://a:{PASSWORD}@h/d"},
    )
    assert done.returncode in (2, 4)
    assert done.stderr
    assert PASSWORD not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["tail", "--create", "--exchange", "{exchange}", "--broker", "{url}"],
        ["tail", "--broker={url}", "--create", "--exchange", "{exchange}"],
    ],
)
def test_a_password_on_the_command_line_is_gone_when_it_works(
    broker_url: str, exchange: str, arguments: list[str]
) -> None:
    """From the list of processes, which all users of a machine can see."""
    given = [each.format(url=broker_url, exchange=exchange) for each in arguments]
    with shell.running("amqp://localhost:1/", *given) as tail:
        tail.saw("Events of")
        shown = Path(f"/proc/{tail.process.pid}/cmdline").read_text()
    assert exchange in shown
    assert "guest:guest" not in shown


def test_a_databases_password_on_the_command_line_is_gone_when_it_works(
    broker_url: str, tmp_path: Path
) -> None:
    """Also where there are several, and the management plugin's."""
    module = "import time\nprint('imported', flush=True)\ntime.sleep(100)\n"
    (tmp_path / "slow.py").write_text(module)
    urls = [f"postgresql+psycopg://a:{PASSWORD}{n}@127.0.0.1:1/d" for n in range(2)]
    with shell.running(broker_url, "relay", *urls, "slow:outbox", cwd=tmp_path) as relay:
        # The first one cannot be reached; until then the words are to be seen.
        seen: set[str] = set()
        file = Path(f"/proc/{relay.process.pid}/cmdline")

        def ended() -> bool:
            try:
                seen.add(file.read_text().replace("\0", " ").strip())
            except OSError:
                return True
            return relay.process.poll() is not None

        wait_until(ended, interval=0.001)
        assert relay.end() == 11
    hidden = [each for each in seen if "env:DOMAIN_EVENTS_DATABASE_1 slow:outbox" in each]
    assert hidden
    assert not any(PASSWORD in each for each in hidden)


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_signal_in_a_finalizer_ends_the_command(name: str, status: int, tmp_path: Path) -> None:
    """Python ignores what is raised there, so the command would go on as if nothing had come."""
    (tmp_path / "slow.py").write_text(
        "import signal, time\n"
        "class Dropped:\n"
        "    def __del__(self):\n"
        f"        signal.raise_signal(signal.{name})\n"
        "Dropped()\n"
        "time.sleep(60)  # what the signal, sent again, is to interrupt\n"
    )
    done = shell.run("memory://", "topology", "show", "slow:subscriber", cwd=tmp_path)
    words = {"SIGTERM": "terminated", "SIGINT": "interrupted"}[name]
    assert (done.returncode, done.stderr.strip()) == (status, f"domain-events: {words}")


def test_ctrl_c_at_the_very_start_is_one_line(tmp_path: Path) -> None:
    """While what all commands need is being imported."""
    (tmp_path / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = shell.run("memory://", "tail", more={"PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (130, "domain-events: interrupted\n")


# --- where the output goes -----------------------------------------------------------------------


def test_what_the_terminal_cannot_show_is_escaped(
    broker_url: str, queue: str, exchange: str
) -> None:
    """LANG=C, and an encoding of ASCII only."""
    more = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    arguments = ["tail", "--exchange", exchange, "--limit", "1"]
    with shell.running(broker_url, *arguments, more=more) as tail:
        tail.saw("Events of")
        shell.run(broker_url, "publish", "é", "1", "--exchange", exchange)
        assert tail.end() == 0
    assert tail.out[0].split()[1] == r"\xe9"


def test_a_closed_output_is_not_given_to_a_socket(broker_url: str, exchange: str) -> None:
    command = f'"$@" publish a.b 1 --exchange {exchange} >&- 2>&- <&-'
    done = subprocess.run(
        ["bash", "-c", command, "bash", *shell.COMMAND],
        env=shell.environment(broker_url),
        check=False,
    )
    assert done.returncode == 0


def test_a_reader_who_leaves_is_no_error(broker_url: str, exchange: str) -> None:
    onlooker.declare_exchange(broker_url, exchange, "topic")
    command = f'"$@" tail --exchange {exchange} | head -1; exit ${{PIPESTATUS[0]}}'
    with subprocess.Popen(
        ["bash", "-c", command, "bash", *shell.COMMAND],
        env=shell.environment(broker_url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as tail:
        done = time.monotonic() + 60
        while tail.poll() is None and time.monotonic() < done:
            shell.run(broker_url, "publish", "a.b", "1", "--exchange", exchange)
        assert tail.stderr is not None
        assert (tail.wait(0), tail.stderr.read()) == (0, b"Events of all keys:\n")


def test_a_full_disk_behind_the_output_is_one_line(broker_url: str, exchange: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*shell.COMMAND, "publish", "a.b", "1", "--exchange", exchange],
            env=shell.environment(broker_url, {"PYTHONUNBUFFERED": ""}),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        74,
        "domain-events: the standard output: No space left on device\n",
    )


# --- completion ----------------------------------------------------------------------------------


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    """In a real one; completing loads no more than the command itself."""
    shim = tmp_path / "domain-events"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m domain_events "$@"\n')
    shim.chmod(0o755)
    code = """
        eval "$(domain-events completion bash)"
        for words in "domain-events t" "domain-events publish --da" "domain-events publish --ex"; do
            COMP_WORDS=($words) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
            _domain_events_completion domain-events
            echo "${COMPREPLY[*]}"
        done
    """
    done = subprocess.run(
        ["bash", "--norc", "-i", "-c", code],
        env={**environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.splitlines() == ["tail topology", "", "--exchange"], done.stderr


@pytest.mark.parametrize("name", ["zsh", "fish"])
def test_other_shells_accept_their_completion(name: str, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(shell.run("memory://", "completion", name).stdout)
    assert "_DOMAIN_EVENTS_COMPLETE" in script.read_text()
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed; what it completes is click's")
    done = subprocess.run([program, "-n", str(script)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
