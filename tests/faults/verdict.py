"""Derives the verdict from the evidence: lost events, and what must not happen. Pure."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from faults import held, rolling
from faults.evidence import Evidence, Handling, Publication
from faults.kinds import DEAD_LETTER, RETURNED, fate

#: Maximum seconds that a publish may take beyond its deadline.
LATEST = 1.0
#: Maximum seconds of silence after faults are over.
LONGEST_SILENCE = 60.0


@dataclass(frozen=True)
class Injected:
    """An injected fault; the group is the number shared by all faults injected together."""

    kind: str
    begun: float
    ended: float
    group: int


@dataclass(frozen=True)
class Remains:
    """The ids of the events in the broker's queues after everything has ended, by subscriber.

    The name ``""`` stands for queues that all subscribers share.
    """

    dead_letters: Mapping[str, Counter[str]]
    waiting: Mapping[str, Counter[str]]
    #: Further messages in the queues, of which only the number is known.
    held: int = 0
    #: The reasons of the dead letters of the subscriber with several releases, by the event's id.
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Verdict:
    """The figures of a run."""

    published: int = 0
    handled: dict[str, int] = field(default_factory=dict)  # events, by subscriber
    dead_lettered: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    #: Subscriber, event, routing key, and the time of its last record.
    lost: list[tuple[str, str, str, float]] = field(default_factory=list)
    duplicates: int = 0
    calls: int = 0  # of handlers
    forbidden: list[str] = field(default_factory=list)
    beyond_limit: list[str] = field(default_factory=list)
    below_limit: list[str] = field(default_factory=list)
    #: Handled, but dead letters all the same.
    innocent: list[str] = field(default_factory=list)
    #: Handled by a process whose release does not list them.
    strayed: list[str] = field(default_factory=list)
    #: Dead letters that no handler has received, and that have no reason.
    unexplained: list[str] = field(default_factory=list)
    #: Events that a release had bound, and those dead-lettered because no process listed them any
    #: more.
    rolled: int = 0
    unlisted: int = 0
    latest_publish: float = 0.0
    #: The longest silence after each group of faults, with its subscriber.
    silences: dict[int, tuple[float, str]] = field(default_factory=dict)
    #: Lost events by the group of faults during which they had their last record.
    lost_in: Counter[int] = field(default_factory=Counter)
    #: Programs that ended without a request, or did not end on request.
    misbehaved: list[str] = field(default_factory=list)

    @property
    def longest_silence(self) -> float:
        return max((seconds for seconds, _ in self.silences.values()), default=0.0)

    def violations(self) -> list[str]:
        """The violations, in words; empty if all is well."""
        return list(self._violations())

    def _violations(self) -> Iterator[str]:
        if not self.published:
            yield "no event was published: nothing was tested"
        if self.lost:
            yield f"{len(self.lost):,} events were LOST"
        if self.waiting:
            yield f"{self.waiting:,} events still wait in a queue"
        if self.forbidden:
            yield f"{len(self.forbidden):,} events were handled that were definitely not sent"
        if self.beyond_limit:
            yield f"{len(self.beyond_limit):,} events were retried beyond their limit"
        if self.below_limit:
            yield f"{len(self.below_limit):,} events were given up before their last retry"
        if self.innocent:
            yield f"{len(self.innocent):,} events were handled and are dead letters all the same"
        if self.strayed:
            yield f"{len(self.strayed):,} events were handled by a process that does not list them"
        if self.unexplained:
            yield f"{len(self.unexplained):,} dead letters that were never handled have no reason"
        if self.latest_publish >= LATEST:
            yield f"a publish took {self.latest_publish:.2f} s beyond its deadline"
        if self.longest_silence >= LONGEST_SILENCE:
            yield f"nothing was handled for {self.longest_silence:.0f} s after a fault was over"
        yield from self.misbehaved


def judge(
    evidence: Evidence,
    remains: Remains,
    limits: Mapping[str, Mapping[str, int]],
    faults: Sequence[Injected],
    until: float,
) -> Verdict:
    """Compare the published events with the handled ones.

    :param limits: first word of the routing key -> subscribers that must get such an event, each
        with its ``max_retries``.
    :param until: when the last publisher ended; silence is not measured after that.
    """
    verdict = Verdict(published=evidence.published, latest_publish=evidence.latest_publish)
    for event, publication in evidence.publications.items():
        topic = publication.routing_key.split(".")[0]
        if topic in rolling.PUBLISHED:
            _judge_rolled(verdict, evidence, remains, publication, event, topic)
        for name, limit in limits.get(topic, {}).items():
            handling = evidence.handlings.get((name, event))
            _judge_event(verdict, remains, publication, event, name, limit, handling)
    names = {name for subscribers in limits.values() for name in subscribers}
    for name in {*names, rolling.LABEL} if evidence.announced else names:
        verdict.handled[name] = sum(
            1
            for (each, _), handling in evidence.handlings.items()
            if each == name and handling.last
        )
        verdict.dead_lettered[name] = len(remains.dead_letters.get(name, ()))
    verdict.waiting = sum(ids.total() for ids in remains.waiting.values()) + remains.held
    # It is unknown which ones are held, but this many of the missing ones are not lost.
    verdict.lost = verdict.lost[remains.held :]
    begun = [handling.begun for handling in evidence.handlings.values()]
    verdict.calls = sum(each.total() for each in begun)
    verdict.duplicates = verdict.calls - sum(len(each) for each in begun)
    _measure_silences(verdict, evidence, faults, until)
    for *_, last in verdict.lost:
        verdict.lost_in[_group_at(faults, last)] += 1
    return verdict


def _judge_event(
    verdict: Verdict,
    remains: Remains,
    publication: Publication,
    event: str,
    name: str,
    limit: int,
    handling: Handling | None,
) -> None:
    end, last_retry = fate(publication.routing_key, limit)
    dead = event in remains.dead_letters.get(name, ())
    label = f"{event} ({publication.routing_key}) at {name}"
    if publication.surely_not_sent and (handling or dead):
        verdict.forbidden.append(label)
    seen = set(handling.begun) if handling else set()
    if any(retries > last_retry for retries in seen):
        verdict.beyond_limit.append(label)
    returned = handling is not None and last_retry in handling.returned
    finished = (end == RETURNED and returned) or (end == DEAD_LETTER and dead)
    given_up = dead and end == RETURNED and not returned
    if dead and end == RETURNED and returned:
        verdict.innocent.append(label)
    if given_up or (finished and not seen.issuperset(range(last_retry + 1))):
        verdict.below_limit.append(label)
    elif publication.returned and not finished and not _waits(remains, event, name):
        last = max(publication.last, handling.last if handling else 0.0)
        verdict.lost.append((name, event, publication.routing_key, last))


def _judge_rolled(
    verdict: Verdict,
    evidence: Evidence,
    remains: Remains,
    publication: Publication,
    event: str,
    topic: str,
) -> None:
    """An event for the subscriber with several releases."""
    name = rolling.LABEL
    handling = evidence.handlings.get((name, event)) or Handling()
    dead = event in remains.dead_letters.get(name, ())
    label = f"{event} ({publication.routing_key}) at {name}"
    if publication.surely_not_sent and (handling.begun or dead):
        verdict.forbidden.append(label)
    if any(retries > rolling.MAX_RETRIES for retries in handling.begun):
        verdict.beyond_limit.append(label)
    if any(
        topic not in evidence.announced[process].release.topics for process in handling.begun_by
    ):
        verdict.strayed.append(label)
    if dead and not handling.begun:
        verdict.unlisted += 1
        if publication.routing_key not in remains.reasons.get(event, ""):
            verdict.unexplained.append(label)
    if not publication.returned or not rolling.required(
        list(evidence.announced.values()), topic, publication.first
    ):
        return
    verdict.rolled += 1
    finished = dead or rolling.finished(handling.ends, evidence.announced)
    if not finished and not _waits(remains, event, name):
        last = max(publication.last, handling.last)
        verdict.lost.append((name, event, publication.routing_key, last))


def _waits(remains: Remains, event: str, name: str) -> bool:
    return any(event in remains.waiting.get(each, ()) for each in (name, ""))


def _measure_silences(
    verdict: Verdict, evidence: Evidence, faults: Sequence[Injected], until: float
) -> None:
    """From the end of each group of faults to the next event that each subscriber handles."""
    handled_at = {
        name: sorted(times)
        for name, times in evidence.ended_at.items()
        if name != held.LABEL  # does not always have something to do
    }
    for group in sorted({fault.group for fault in faults}):
        over = max(fault.ended for fault in faults if fault.group == group)
        following = [fault.begun for fault in faults if fault.group == group + 1]
        end = min([*following, until])
        for name, times in handled_at.items():
            at = bisect.bisect(times, over)
            # None until the next fault began: a lower bound.
            first = times[at] if at < len(times) else end
            silence = max(0.0, min(first, max(end, over)) - over)
            if silence >= verdict.silences.get(group, (0.0, ""))[0]:
                verdict.silences[group] = (silence, name)


def _group_at(faults: Sequence[Injected], time: float) -> int:
    """The group of faults that was active, or came next; otherwise the last one."""
    later = [fault for fault in faults if fault.ended >= time]
    if later:
        return min(later, key=lambda fault: fault.ended).group
    return max((fault.group for fault in faults), default=0)
