"""The tool that all other tests stand on: tools/rabbitmq_node.py."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import onlooker
import pyamqp
import pytest
import rabbitmq_node
from rabbitmq_node import Node, NodeError
from support import Names, wait_until

TOOL = Path(rabbitmq_node.__file__)


def processes_with(text: str) -> list[int]:
    """The processes with `text` in their command line or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                known = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue  # ended meanwhile, or somebody else's
            if text.encode() in known:
                found.append(int(entry.name))
    return found


def test_data_survives_a_kill_and_the_port_stays(killable_node: Node, unique: str) -> None:
    url = killable_node.url
    with onlooker.channel(url) as channel:
        channel.queue_declare(unique, durable=True, arguments={"x-queue-type": "quorum"})
    onlooker.publish(url, "", unique, b"kept", delivery_mode=2)
    killable_node.sync()

    killable_node.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", killable_node.port))
    # A thread that ends does not take the broker along: see _Household.
    thread = threading.Thread(target=killable_node.start)
    thread.start()
    thread.join()

    assert killable_node.url == url
    with onlooker.channel(url) as channel:
        received = wait_until(lambda: channel.basic_get(unique, auto_ack=True))
        assert received is not None
        assert received.body == b"kept"
        channel.queue_delete(unique)


def test_a_failing_rabbitmqctl_says_why(killable_node: Node) -> None:
    with pytest.raises(NodeError, match="no-such-command"):
        killable_node.ctl("no-such-command")


def test_a_paused_broker_says_nothing_until_it_goes_on(killable_node: Node) -> None:
    killable_node.pause()
    with pytest.raises(NodeError, match="no broker answered"):
        rabbitmq_node.wait_for_broker(killable_node.port, seconds=0.2)
    killable_node.resume()
    rabbitmq_node.wait_for_broker(killable_node.port, seconds=10)


def test_tls_shows_a_certificate_of_the_nodes_own_authority(
    node_factory: Callable[..., Node],
) -> None:
    node = node_factory(tls=True)
    node.start()
    tls = {
        "cert_reqs": ssl.CERT_REQUIRED,
        "ca_certs": str(node.ca_file),
        "certfile": str(node.certificate_file),
        "keyfile": str(node.key_file),
    }
    for host in ("127.0.0.1", "localhost"):
        pyamqp.Connection(node.tls_url, tls={**tls, "server_hostname": host}).close()

    stranger = ssl.create_default_context()
    with (
        socket.create_connection(("127.0.0.1", node.tls_port)) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        stranger.wrap_socket(plain, server_hostname="localhost")


def test_a_broken_configuration_is_shown(node_factory: Callable[..., Node]) -> None:
    with pytest.raises(NodeError, match="no_such_option"):
        node_factory(config="no_such_option = 1").start()


def test_nodes_form_a_cluster_and_leave_no_process(node_factory: Callable[..., Node]) -> None:
    nodes = [node_factory() for _ in range(2)]  # test_cluster.py has three
    for node in nodes:
        node.start(wait=False)  # two cores: to boot side by side is faster
    nodes[1].join(nodes[0])
    status = nodes[0].ctl("cluster_status", "--formatter", "json")
    assert all(node.name in status for node in nodes)

    for node in nodes:
        node.close()
    folders = [node.folder for node in nodes]
    wait_until(lambda: not any(processes_with(folder.name) for folder in folders))
    assert not any(folder.exists() for folder in folders)


def listening(pid: int) -> set[str]:
    """The addresses on which the process listens, as /proc/net/tcp and tcp6 write them."""
    inodes = set()
    for handle in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            inodes.add(str(handle.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:  # LISTEN
                found.add(words[1].partition(":")[0])
    return found


LOOPBACK = {
    "0100007F",  # 127.0.0.1
    "00000000000000000000000001000000",  # ::1
    "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
}


def test_nothing_of_a_node_listens_for_other_machines(node_factory: Callable[..., Node]) -> None:
    """Neither the broker, with its ports for nodes and plugins, nor epmd or rabbitmqctl."""
    node = node_factory(plugins=["rabbitmq_management", "rabbitmq_prometheus"], tls=True)
    node.start()
    asking = threading.Thread(target=node.ctl, args=("eval", "timer:sleep(3000)."))
    asking.start()
    seen: dict[int, set[str]] = {}

    def all_seen() -> bool:
        for pid in processes_with(node.folder.name):
            with contextlib.suppress(OSError):
                seen[pid] = seen.get(pid, set()) | listening(pid)
        return not asking.is_alive()

    wait_until(all_seen, timeout=60, interval=0.1)
    asking.join()
    assert node.pid is not None
    seen[node._household._epmd.pid] = listening(node._household._epmd.pid)
    # The broker, epmd, and (where it listens at all) rabbitmqctl.
    assert len([addresses for addresses in seen.values() if addresses]) >= 2
    assert seen[node.pid]
    assert set().union(*seen.values()) <= LOOPBACK


def test_cookie_is_never_readable_by_others(
    node_factory: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for the moment until its mode is changed, whatever the umask is."""

    def too_late(*_arguments: object, **_options: object) -> None:
        raise AssertionError("others could read it until now")

    before = os.umask(0)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "chmod", too_late)
            node = node_factory()
    finally:
        os.umask(before)
    cookie = node.folder / ".erlang.cookie"
    assert stat.S_IMODE(cookie.stat().st_mode) == 0o400
    assert cookie.read_text() == node.cookie


def test_no_node_is_made_where_none_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes it: `make check` must start none, wherever RabbitMQ is installed."""
    installation = rabbitmq_node.Installation(None, "4.3.6")
    monkeypatch.setattr(rabbitmq_node, "find", lambda _release: installation)
    monkeypatch.setenv("DOMAIN_EVENTS_TEST_RELEASE", "none")
    with pytest.raises(NodeError, match="DOMAIN_EVENTS_TEST_RELEASE=none"):
        Node("4.3")


def pytest_without_a_rabbitmq(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest as `make check` runs it."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=TOOL.parents[1],
        env={**os.environ, "DOMAIN_EVENTS_TEST_RELEASE": "none"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
    )


def test_test_that_takes_a_rabbitmq_fails_where_there_is_to_be_none() -> None:
    """It neither starts one nor is skipped."""
    done = pytest_without_a_rabbitmq(
        "tests/test_node.py::test_a_failing_rabbitmqctl_says_why",  # a node of its own
        "tests/test_security.py::test_tls_with_a_known_authority",  # of its module's
        "tests/conformance/test_topics.py::test_same_queues_are_reached_on_both_brokers",
    )
    assert done.stdout.count("This test takes a RabbitMQ") >= 3
    assert "3 errors" in done.stdout
    assert done.returncode == 1


def test_check_leaves_out_what_takes_a_rabbitmq_and_nothing_else() -> None:
    """Told from the fixtures of a test, and in conformance/ from the broker it is run on."""
    collected = pytest_without_a_rabbitmq(
        "--collect-only", "-m", "not rabbitmq", "tests/conformance", "tests/test_node.py"
    ).stdout
    assert "[memory]" in collected
    assert "test_no_node_is_made_where_none_may_be" in collected
    assert "[rabbitmq]" not in collected
    assert "test_same_queues_are_reached_on_both_brokers" not in collected
    assert "test_a_failing_rabbitmqctl_says_why" not in collected
    assert "test_a_run_that_is_ended_leaves_nothing" not in collected


def run_tool(*arguments: str) -> list[str]:
    return [sys.executable, str(TOOL), *arguments]


def test_run_gives_the_url_and_passes_the_exit_code_on(killable_node: Node) -> None:
    script = "import os, sys; print(os.environ['DOMAIN_EVENTS_URL'], sys.argv[1]); sys.exit(7)"
    command = run_tool("run", "--", sys.executable, "-c", script, "<{url}>")

    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)

    url, argument = done.stdout.split()
    assert url.startswith("amqp://guest:guest@127.0.0.1:")
    assert argument == f"<{url}>"
    assert done.returncode == 7


@pytest.mark.usefixtures("rabbitmq_release")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    mark = f"--mark={secrets.token_hex(8)}"  # of no earlier run that was cut off
    script = "import os, signal; print(os.getppid(), flush=True); signal.pause()"
    command = run_tool("run", "--", sys.executable, "-c", script, mark)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline()
        assert processes_with(mark)
        if number is signal.SIGINT:
            os.killpg(run.pid, number)  # as a terminal does: to the command as well
        else:
            run.send_signal(number)
        if number is signal.SIGKILL:
            os.killpg(run.pid, number)  # the command is nobody's to end
        run.wait(20)

    wait_until(lambda: not processes_with(mark))
    wait_until(lambda: not processes_with(str(tmp_path)))
    wait_until(lambda: not list(tmp_path.iterdir()))


def test_what_a_program_started_just_before_it_was_killed_is_ended() -> None:
    """The watcher has not even looked yet when there is nobody any more to watch for."""
    mark = f"--mark={secrets.token_hex(8)}"
    script = f"""
import os, subprocess, sys
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", {mark!r}])
watcher = subprocess.Popen(
    [sys.executable, "-I", "-S", {str(TOOL)!r}, "_watch", str(os.getpid())], stdin=subprocess.PIPE
)
watcher.stdin.write(f"watch {{sleeper.pid}}\\n".encode())
watcher.stdin.flush()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
    wait_until(lambda: not processes_with(mark))


def test_names_are_deleted_with_all_that_belongs_to_them(names: Names) -> None:
    queue, exchange = names.queue(), names.exchange()
    quorum = {"x-queue-type": "quorum"}
    with onlooker.channel(names.url) as channel:
        channel.exchange_declare(exchange, "topic", durable=True)
        for name in (queue, f"{queue}-dl", f"{exchange}.delay.23"):
            channel.queue_declare(name, durable=True, arguments=quorum)

        names.delete()

        for name in (queue, f"{queue}-dl", f"{exchange}.delay.23"):
            with pytest.raises(pyamqp.NotFound):
                channel.queue_declare(name, passive=True)
