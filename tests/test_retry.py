"""What a handler may say: domain_events/retry.py."""

from __future__ import annotations

import dataclasses
import math
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from domain_events import Backoff, DomainEventsError, Reject, Retry
from domain_events.retry import LONGEST_DELAY, SHORTEST_DELAY, checked_delay

# Machines that are shared are slow at times.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NINETEEN_DAYS = 19 * 24 * 3600

delays = st.floats(0, LONGEST_DELAY) | st.integers(0, int(LONGEST_DELAY))

NO_DELAYS = [
    -1,
    -0.001,
    LONGEST_DELAY + 1,
    math.inf,
    -math.inf,
    math.nan,
    "10",
    None,
    Decimal(1),
    1j,
    # An integer that no float can be.
    10**400,
    -(10**400),
]


def short(value: object) -> str:
    return repr(value)[:20]


# ------------------------------------------------------------------ Retry, Reject


def test_a_retry_waits_ten_seconds_unless_told_otherwise() -> None:
    """The default of domain-event-broker."""
    assert Retry().delay == 10.0


@patient
@given(delays)
def test_any_delay_up_to_the_longest_is_taken(delay: float) -> None:
    """By position or by name; it is kept as it was given."""
    assert Retry(delay).delay == delay
    assert Retry(delay=delay).delay == delay


def test_nineteen_days_are_in_reach() -> None:
    """The documented reach is that of the delay levels."""
    assert Retry(NINETEEN_DAYS).delay == NINETEEN_DAYS
    assert LONGEST_DELAY < NINETEEN_DAYS + 24 * 3600
    assert SHORTEST_DELAY == 0.1


@pytest.mark.parametrize("delay", NO_DELAYS, ids=short)
def test_a_delay_that_cannot_be_kept_is_refused(delay: Any) -> None:
    """Negative, too long, or no number: a ValueError that says the bounds."""
    with pytest.raises(ValueError, match=r"^Retry must be 0 to 16777\d\d seconds \(19 days\)"):
        Retry(delay)
    with pytest.raises(ValueError, match=r"^The wait must be 0 to"):
        checked_delay(delay, "The wait")


def test_retry_and_reject_say_what_they_are() -> None:
    """In a log, a retry tells its delay and a rejection its reason."""
    assert str(Retry(2.5)) == "try again in 2.5 s"
    assert str(Reject("no such user")) == "no such user"
    assert Reject("no such user").reason == "no such user"
    assert Reject().reason == ""


def test_retry_and_reject_are_no_errors_of_the_library() -> None:
    """``except DomainEventsError`` in a handler does not swallow what the handler says."""
    for signal in (Retry, Reject):
        assert issubclass(signal, Exception)
        assert not issubclass(signal, DomainEventsError)


def test_retry_and_reject_survive_pickling() -> None:
    """They come back whole from a handler's worker process."""
    assert pickle.loads(pickle.dumps(Retry(2.5))).delay == 2.5
    assert pickle.loads(pickle.dumps(Reject("why"))).reason == "why"


# ------------------------------------------------------------------ Backoff


def test_without_jitter_delays_are_as_documented() -> None:
    """The n-th retry waits first * factor ** (n - 1), at most maximum."""
    backoff = Backoff(first=1, factor=3, maximum=60, jitter=0)
    assert [backoff.delay(retry) for retry in range(1, 7)] == [1, 3, 9, 27, 60, 60]


def test_the_default_backoff_doubles_from_a_second_to_ten_minutes() -> None:
    """With a fifth of each delay left to chance."""
    assert Backoff() == Backoff(1.0, 2.0, 600.0, 0.2)


@patient
@given(
    first=st.floats(0, 1e5),
    factor=st.floats(1, 100) | st.integers(1, 100),
    maximum=st.floats(0, LONGEST_DELAY),
    jitter=st.floats(0, 1),
    retry=st.integers(1, 500) | st.sampled_from([1025, 3000]),
)
# 2.0 ** 2999 is too large for a float, also when it is taken of nothing.
@example(first=0.0, factor=2.0, maximum=600.0, jitter=0.2, retry=3000)
@example(first=1.0, factor=10, maximum=600.0, jitter=0.2, retry=3000)
def test_a_delay_stays_between_its_bounds(
    first: float, factor: float, maximum: float, jitter: float, retry: int
) -> None:
    """Never over the formula's delay, never under it by more than the jitter's share."""
    longest = float(min(Fraction(maximum), Fraction(first) * Fraction(factor) ** (retry - 1)))
    delay = Backoff(first, factor, maximum, jitter).delay(retry)
    assert longest * (1 - jitter) * (1 - 1e-9) <= delay <= longest * (1 + 1e-9)
    assert delay <= maximum
    checked_delay(delay, "A delay from Backoff")


def test_a_factor_that_grows_over_all_bounds_ends_at_the_maximum() -> None:
    """Overflow is no error: the maximum is what counts."""
    assert Backoff(factor=10, maximum=50, jitter=0).delay(100_000) == 50
    assert Backoff(factor=10.0, maximum=50, jitter=0).delay(100_000) == 50
    assert Backoff(factor=math.inf, maximum=50, jitter=0).delay(2) == 50


def test_jitter_spreads_delays_over_its_share() -> None:
    """Events that failed together do not all return together."""
    backoff = Backoff(first=10, jitter=0.2)
    seen = [backoff.delay(1) for _ in range(1000)]
    # Each bound is missed with a probability of 0.95 ** 1000.
    assert 8 <= min(seen) < 8.1
    assert 9.9 < max(seen) <= 10
    assert len(set(seen)) > 900


@pytest.mark.parametrize("delay", NO_DELAYS, ids=short)
def test_a_backoff_with_an_impossible_delay_is_refused(delay: Any) -> None:
    """At once, and not with the first retry; the message names the argument."""
    with pytest.raises(ValueError, match=r"^Backoff\.first must be 0 to"):
        Backoff(first=delay)
    with pytest.raises(ValueError, match=r"^Backoff\.maximum must be 0 to"):
        Backoff(maximum=delay)


@pytest.mark.parametrize("factor", [0, 0.99, -2, math.nan])
def test_a_backoff_that_would_shrink_is_refused(factor: float) -> None:
    """Ever longer: the factor is 1 or more."""
    with pytest.raises(ValueError, match=r"^Backoff\.factor must be 1 or more"):
        Backoff(factor=factor)


@pytest.mark.parametrize("jitter", [-0.1, 1.1, math.nan])
def test_a_jitter_that_is_no_share_is_refused(jitter: float) -> None:
    """From 0, no chance, to 1, all of it."""
    with pytest.raises(ValueError, match=r"^Backoff\.jitter must be from 0 to 1"):
        Backoff(jitter=jitter)
    assert Backoff(jitter=0).jitter == 0
    assert Backoff(jitter=1).jitter == 1


def test_a_backoff_is_a_value() -> None:
    """Frozen, equal by its fields, usable as a key: one may serve many subscribers."""
    assert Backoff(2) == Backoff(2)
    assert len({Backoff(2), Backoff(2), Backoff(3)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Backoff().first = 3  # type: ignore[misc]
