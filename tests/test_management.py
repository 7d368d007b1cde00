"""What AMQP does not show: the management plugin and rabbitmqctl show the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onlooker
import pytest
from managed import Managed
from support import wait_until

from domain_events import ConfigurationError
from domain_events.broker.rabbitmq.administration import Administration
from domain_events.cli.management import (
    BindingFound,
    Management,
    Rabbitmqctl,
    Source,
    Unavailable,
    find,
    find_all,
)


@pytest.fixture
def rabbitmqctl(managed_node: Managed, monkeypatch: pytest.MonkeyPatch) -> Rabbitmqctl:
    monkeypatch.setenv("PATH", f"{managed_node.programs}:/usr/bin:/bin")
    return Rabbitmqctl(managed_node.url)


@pytest.fixture
def management(managed_node: Managed) -> Management:
    return Management(managed_node.management, managed_node.url)


def by_name(found: list[dict[str, Any]], *keys: str) -> dict[str, list[Any]]:
    return {each["name"]: [each[key] for key in keys] for each in found}


COLUMNS = "arguments", "type", "durable"

READ: dict[str, Callable[[Source], Any]] = {
    "bindings": lambda source: sorted(map(str, source.bindings())),
    "queues": lambda source: by_name(source.queues(), *COLUMNS),
    "members": lambda source: by_name(
        [each for each in source.queues() if each["type"] == "quorum"], "members", "online"
    ),
    "exchanges": lambda source: by_name(source.exchanges(), "type", "arguments"),
    "policies": lambda source: by_name(
        source.policies(), "pattern", "apply-to", "definition", "priority", "operator"
    ),
    "cluster name": lambda source: source.cluster_name(),
    "nodes": lambda source: [(each.name, each.running) for each in source.nodes()],
    "alarms": lambda source: source.alarms(),
    "feature flags": lambda source: source.disabled_feature_flags(),
    "default queue type": lambda source: source.default_queue_type(),
}


def test_management_plugin_and_rabbitmqctl_show_the_same(
    managed_node: Managed, management: Management, rabbitmqctl: Rabbitmqctl, unique: str
) -> None:
    name = f"{unique}-q"
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": 7}
    onlooker.bind_queue(managed_node.url, name, f"{unique}-x", "a.*", **arguments)
    with (
        managed_node.policy("one", "^never", {"expires": 5000}, priority=3),
        managed_node.policy("two", "^never", {"max-length": 5}, operator=True),
    ):
        found = {
            what: [read(source) for source in (management, rabbitmqctl)]
            for what, read in READ.items()
        }
    for what, (by_http, by_command) in found.items():
        assert by_http == by_command, what
    assert str(BindingFound(f"{unique}-x", name, "a.*")) in found["bindings"][0]
    assert found["queues"][0][name] == [arguments, "quorum", True]
    assert found["members"][0][name] == [[managed_node.node.name], [managed_node.node.name]]
    assert found["policies"][0] == {
        "one": ["^never", "queues", {"expires": 5000}, 3, False],
        "two": ["^never", "queues", {"max-length": 5}, 0, True],
    }
    assert found["nodes"][0] == [(managed_node.node.name, True)]
    onlooker.delete(managed_node.url, queues=[name], exchanges=[f"{unique}-x"])


def test_uptime_and_settings_of_a_node(
    managed_node: Managed, management: Management, rabbitmqctl: Rabbitmqctl
) -> None:
    assert wait_until(lambda: management.nodes()[0].uptime)
    assert rabbitmqctl.nodes()[0].uptime
    assert rabbitmqctl.environment()["consumer_timeout"] == 600_000
    with pytest.raises(Unavailable, match="does not show the settings"):
        management.environment()


def test_user_without_a_tag_reads_which_one_it_needs(managed_node: Managed) -> None:
    """And not that its password is wrong, which the plugin answers with the same status."""
    nothing = ("^$", "^$", "^$")
    with (
        managed_node.user("plain", nothing) as url,
        pytest.raises(Unavailable, match="it needs the tag 'management'"),
    ):
        Management(managed_node.management, url).queues()
    with managed_node.user("some", nothing, tags="management") as url:
        source = Management(managed_node.management, url)
        assert source.alarms() == []
        with pytest.raises(Unavailable, match="it needs the tag 'monitoring'"):
            source.nodes()
    wrong = managed_node.url.replace("guest:guest", "guest:wrong")
    with pytest.raises(Unavailable, match="user or password is wrong"):
        Management(managed_node.management, wrong).queues()


def test_given_management_plugin_must_be_that_of_the_broker(
    managed_node: Managed, broker_url: str, unused_port: int
) -> None:
    with Administration(broker_url) as administration:
        cluster = administration.server["cluster_name"]
    with pytest.raises(ConfigurationError, match="is that of another broker"):
        find_all(managed_node.management, [broker_url], cluster=cluster)
    for url in ("here", "http://", f"http://127.0.0.1:{unused_port}"):
        with pytest.raises(ConfigurationError, match="--management: "):
            find(url, [broker_url], cluster)


def test_sources_are_those_of_the_same_broker(
    managed_node: Managed, rabbitmqctl: Rabbitmqctl, broker_url: str
) -> None:
    """A rabbitmqctl belongs to whatever broker its machine has."""
    with Administration(managed_node.url) as administration:
        cluster = administration.server["cluster_name"]
    found, reasons = find_all(managed_node.management, [managed_node.url], cluster=cluster)
    assert [type(each) for each in found] == [Management, Rabbitmqctl]
    assert reasons == []
    found, reasons = find_all(None, [broker_url], cluster="another@cluster")
    assert found == []
    assert any("rabbitmqctl is that of another broker" in each for each in reasons)


def test_rabbitmqctl_of_another_broker_is_not_the_one_source(
    managed_node: Managed, rabbitmqctl: Rabbitmqctl, broker_url: str
) -> None:
    """Its bindings are not those of the broker that AMQP leads to, by whatever port or machine."""
    for url, expected in ((managed_node.url, rabbitmqctl.name), (broker_url, None)):
        with Administration(url) as administration:
            source, reasons = find(None, administration.urls, administration.cluster)
        assert (source and source.name) == expected
        assert ("that of another broker" in reasons) is (expected is None)
    source, reasons = find(None, [managed_node.url], "")
    assert source is None
    assert "rabbitmqctl may be that of another broker" in reasons
