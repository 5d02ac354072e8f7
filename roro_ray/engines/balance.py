"""Which replica of a model gets the next request: the one that knows its prefix, unless it is busy, slow or down.

A trajectory's requests repeat each other's beginning, which a replica that wrote it holds in its prefix cache: a
request goes to the replica that served the longest prefix of it. One that nobody knows goes by consistent hashing, so
that all workers send one query to the same replica without asking each other. Both yield to load (bounded as in arXiv
1608.01350) and to slowness: a replica whose mean time for a token exceeds the others' by a factor gets that much less,
and now and then a probe, by which its recovery is seen. No Ray and no waiting: a class of decisions.
"""

from __future__ import annotations

import bisect
import math
import statistics
import time
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

from roro_ray.config import STEP_DELIMITER

_POINTS = 32  # of each replica on the ring
_LOAD_SLACK = 1.25  # a replica may have this much more in hand than its share
_FREE = 4  # in hand of a replica of usual speed: below, its caches weigh more than its load
_SLOW = 2.0  # times the median from which a replica counts as slow
_FLOOR_S = 1e-3  # differences below this, for a token, do not make a replica slow
_WEIGHT, _PROBE_WEIGHT = 0.2, 0.5  # of a new observation in the mean; of one that probes a slow replica
_PROBE_EVERY = 16  # picks, times the slowness, between two probes: probing costs the same however slow it is
_LOOK_S = 0.1  # the age of what is still in hand is looked at this often
_WORST = 32.0  # an observation counts as this many times the usual at most
_MOST_HOMES = 65_536  # prefixes whose replica is remembered


class State(Enum):
    """Of a replica: it answers, it is late and being probed, it is dead or being started again."""

    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"


@dataclass(slots=True)
class _Member:
    """What is known of one replica."""

    state: State = State.UP
    in_hand: int = 0
    means: dict[str, float] = field(default_factory=dict)  # kind of request: seconds a unit
    began: dict[int, float] = field(default_factory=dict)  # calls under way, oldest first
    share: float = 1.0  # of what a replica of usual speed gets
    picks: int = 0  # since it was last probed


class Balance:
    """The replicas of one model as one worker sees them. For one event loop; not thread-safe.

    Attributes:
        moved: requests that went elsewhere than their prefix is known, or hashed to, since that replica was too busy,
            slow or down.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._members: dict[str, _Member] = {}
        self._ring: list[tuple[int, str]] = []
        self._homes: dict[int, str] = {}
        self._up: dict[str, _Member] = {}
        self._total = 0  # in hand of those that are up
        self._shares = 0.0
        self._usual: dict[str, float] = {}
        self._slow: list[str] = []
        self._calls = self._finished = 0
        self._look_at = 0.0
        self.moved = 0

    def set_members(self, keys: Collection[str]) -> None:
        """The replicas that there are; new ones are up, of known ones everything stays known."""
        self._members = {key: self._members.get(key) or _Member() for key in keys}
        self._ring = sorted((zlib.crc32(f"{key}/{point}".encode()), key) for key in keys for point in range(_POINTS))
        self._arrange()

    @property
    def members(self) -> tuple[str, ...]:
        """All replicas, whatever their state."""
        return tuple(self._members)

    @property
    def up(self) -> tuple[str, ...]:
        """The replicas that may get requests."""
        return tuple(self._up)

    def state(self, key: str) -> State | None:
        """The state of a replica, None where there is no such one."""
        return self._members[key].state if key in self._members else None

    def set_state(self, key: str, state: State) -> None:
        """Take a replica out of the choice, or back into it; one that comes back from the dead is known of nothing."""
        member = self._members.get(key)
        if member is not None and member.state is not state:
            if member.state is State.DOWN:
                self._members[key] = member = _Member(in_hand=member.in_hand)
            member.state = state
            self._arrange()

    def share(self, key: str) -> float:
        """The share of requests that a replica is thought good for, 1 for one of usual speed."""
        return self._members[key].share

    def in_hand(self, key: str) -> int:
        """Requests that a replica has in hand, of this worker."""
        return self._members[key].in_hand if key in self._members else 0

    def pick(self, prefix: str) -> str | None:
        """The replica for a request and its prefix, None where none is up. The caller tells `take` and `give_back`."""
        if len(self._members) < 2 or not self._up:
            return next(iter(self._up), None)
        if self._clock() >= self._look_at:
            self._weigh()
        digest, home = self._trace(prefix)
        chosen = self._find_probe()
        if chosen is None:
            first, chosen = self._choose(digest, home)
            self.moved += chosen != first
        self._remember(digest, chosen)
        return chosen

    def take(self, key: str) -> None:
        """A request was handed to a replica."""
        member = self._members.get(key)
        if member is not None:
            member.in_hand += 1
            self._total += key in self._up

    def give_back(self, key: str) -> None:
        """A request of a replica is answered, or was taken from it."""
        member = self._members.get(key)
        if member is not None and member.in_hand:
            member.in_hand -= 1
            self._total -= key in self._up

    def begin(self, key: str) -> int:
        """A call to a replica starts; its number, for `finish`."""
        self._calls += 1
        if key in self._members:
            self._members[key].began[self._calls] = self._clock()
        return self._calls

    def finish(self, key: str, call: int, kind: str = "", units: int = 0) -> None:
        """A call is over: `units` (tokens) of a `kind` of work were done in it, none where it was given up."""
        member = self._members.get(key)
        began = member.began.pop(call, None) if member is not None else None
        if member is None or began is None or units < 1:
            return
        seconds = min((self._clock() - began) / units, _WORST * (self._usual.get(kind, math.inf) + _FLOOR_S))
        weight = _PROBE_WEIGHT if member.share < 1 else _WEIGHT
        member.means[kind] = member.means.get(kind, seconds) * (1 - weight) + seconds * weight
        self._finished += 1
        if self._finished >= len(self._up):  # weighing all costs as much as there are
            self._look_at = 0.0

    def _arrange(self) -> None:
        self._up = {key: member for key, member in self._members.items() if member.state is State.UP}
        self._total = sum(member.in_hand for member in self._up.values())
        self._weigh()

    def _weigh(self) -> None:
        """Each replica's share, from the mean times and from how long its oldest call has been under way."""
        now = self._clock()
        self._look_at, self._finished = now + _LOOK_S, 0
        kinds = {kind for member in self._up.values() for kind in member.means}
        self._usual = {
            kind: statistics.median_low(m.means[kind] for m in self._up.values() if kind in m.means) for kind in kinds
        }
        ages = {key: now - next(iter(member.began.values()), now) for key, member in self._up.items()}
        usual_age = statistics.median_low(ages.values()) if ages else 0.0
        for key, member in self._up.items():
            slowness = self._slowness(member)
            if self._usual and ages[key] > 1.0:  # nothing has come for long: do not wait for it to tell how slow it is
                slowness = max(slowness, ages[key] / max(usual_age, 1.0))
            member.share = 1.0 if slowness < _SLOW else 1.0 / min(slowness, _WORST)
        self._shares = sum(member.share for member in self._up.values())
        self._slow = [key for key, member in self._up.items() if member.share < 1]

    def _slowness(self, member: _Member) -> float:
        ratios = [(mean + _FLOOR_S) / (self._usual[kind] + _FLOOR_S) for kind, mean in member.means.items()]
        return max(ratios, default=1.0)

    def _trace(self, prefix: str) -> tuple[int, str | None]:
        """The digest of a prefix, and the replica that served the longest known beginning of it."""
        digest, start, home = 0, 0, None
        while (end := prefix.find(STEP_DELIMITER, start)) >= 0:
            end += len(STEP_DELIMITER)
            digest = zlib.crc32(prefix[start:end].encode(), digest)
            home = self._homes.get(digest, home)
            start = end
        if start < len(prefix):
            digest = zlib.crc32(prefix[start:].encode(), digest)
            home = self._homes.get(digest, home)
        return digest, home

    def _remember(self, digest: int, key: str) -> None:
        self._homes[digest] = key
        if len(self._homes) > _MOST_HOMES:
            del self._homes[next(iter(self._homes))]

    def _choose(self, digest: int, home: str | None) -> tuple[str, str]:
        """Where a request belongs, and where it goes."""
        at = bisect.bisect(self._ring, (digest, ""))
        first = home if home in self._members else None
        seen = {first} if first is not None else set()
        if first is not None and self._fits(first):
            return first, first
        for step in range(len(self._ring)):
            key = self._ring[(at + step) % len(self._ring)][1]
            if key in seen:
                continue
            seen.add(key)
            first = first or key
            if self._fits(key):
                return first, key
            if len(seen) == len(self._members):
                break
        least = min(self._up, key=lambda key: (self._up[key].in_hand + 1) / self._up[key].share)
        return first or least, least

    def _fits(self, key: str) -> bool:
        member = self._up.get(key)
        if member is None:
            return False
        most = _LOAD_SLACK * (self._total + 1) * member.share / self._shares
        return member.in_hand + 1 <= (max(_FREE, -(-most // 1)) if member.share == 1 else most)

    def _find_probe(self) -> str | None:
        """A slow replica with nothing in hand whose turn it is to show how slow it still is."""
        for key in self._slow:
            member = self._up[key]
            member.picks += 1
            if member.picks * member.share >= _PROBE_EVERY and not member.in_hand:
                member.picks = 0
                return key
        return None
