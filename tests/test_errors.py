"""The tree of errors: domain_events/errors.py."""

from __future__ import annotations

import builtins
import pickle
import re

import pytest

import domain_events
from domain_events import DomainEvent, DomainEventsError, Reject, Retry, errors

TREE = {
    "InvalidEvent",
    "BrokerUnavailable",
    "EventNotConfirmed",
    "EventRejected",
    "EventUnroutable",
    "TopologyError",
    "ConfigurationError",
}


def subclasses() -> dict[str, type[DomainEventsError]]:
    found = list(DomainEventsError.__subclasses__())
    for kind in found:
        found += kind.__subclasses__()
    # Not those that a room has for itself, such as the one for a queue that is taken.
    return {kind.__name__: kind for kind in found if kind.__module__ == "domain_events.errors"}


def test_the_tree_is_as_documented() -> None:
    """One root, everything directly under it: no `except` catches more than it names."""
    assert set(subclasses()) == TREE
    for kind in subclasses().values():
        assert kind.__bases__ == (DomainEventsError,)
    assert DomainEventsError.__bases__ == (Exception,)


def test_the_tree_that_is_drawn_is_the_tree_there_is() -> None:
    """The module's docstring names every error, and none that does not exist."""
    assert set(re.findall(r"[├└]── (\w+)", errors.__doc__ or "")) == TREE


def test_every_error_says_what_it_means() -> None:
    """Each has a docstring of its own."""
    for kind in (DomainEventsError, *subclasses().values()):
        assert kind.__dict__["__doc__"]


def test_every_error_is_a_public_name() -> None:
    """``except domain_events.X`` works for all, and none hides a builtin."""
    for name in TREE | {"DomainEventsError"}:
        assert getattr(domain_events, name) is getattr(errors, name)
        assert name in domain_events.__all__
        assert not hasattr(builtins, name)


def test_all_public_names_exist() -> None:
    """``from domain_events import *`` works, and names nothing twice."""
    assert len(set(domain_events.__all__)) == len(domain_events.__all__)
    for name in domain_events.__all__:
        assert hasattr(domain_events, name)


def test_what_a_handler_says_is_not_in_the_tree() -> None:
    """Retry and Reject are signals."""
    assert not issubclass(Retry, DomainEventsError)
    assert not issubclass(Reject, DomainEventsError)


@pytest.mark.parametrize("name", sorted(TREE))
def test_an_error_knows_no_event_until_it_is_told(name: str) -> None:
    """``event`` and ``unconfirmed`` may be read from any error; one's are not another's."""
    error, other = subclasses()[name]("text"), subclasses()[name]("text")
    assert error.event is None
    assert list(error.unconfirmed) == []
    error.event = DomainEvent("a.b", {})
    error.unconfirmed = [error.event]
    assert other.event is None
    assert list(other.unconfirmed) == []
    assert str(error) == "text"


@pytest.mark.parametrize("name", sorted(TREE))
def test_an_error_survives_pickling_with_its_event(name: str) -> None:
    """The caller of a worker process can publish the same event again."""
    error = subclasses()[name]("text")
    error.event = DomainEvent("a.b", {"x": 1})
    error.unconfirmed = (error.event,)
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == "text"
    assert twin.event == error.event
    assert twin.unconfirmed == error.unconfirmed
