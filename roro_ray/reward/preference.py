"""What a rubric is worth: how well the Judge's scores under it order a query's preference pairs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.types import PairKind, PreferencePair, Query, Trajectory, Verdict

OUTCOME_TIMES = 3
KIND_SHARES = {PairKind.OUTCOME: 2, PairKind.COST: 1, PairKind.PROCESS: 1}


@dataclass(frozen=True, slots=True)
class QueryPairs:
    """One query, its trajectories, and its pairs as (kind, index of the preferred, index of the rejected)."""

    query: Query
    trajectories: tuple[Trajectory, ...]
    pairs: tuple[tuple[PairKind, int, int], ...]
    fold: int

    @property
    def has_outcome(self) -> bool:
        """True where some rollouts of the query are right and some wrong: which step is escalated matters."""
        return any(kind == PairKind.OUTCOME for kind, _, _ in self.pairs)

    @property
    def draw_weight(self) -> int:
        """How often the query is drawn, relative to others."""
        return OUTCOME_TIMES if self.has_outcome else 1


def group_pairs(
    queries: Sequence[Query], trajectories: Sequence[Trajectory], pairs: Sequence[PreferencePair]
) -> list[QueryPairs]:
    """Pairs by query, in the order of `queries`; queries without a pair are left out."""
    by_id = {trajectory.id: trajectory for trajectory in trajectories}
    of_query: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        of_query.setdefault(pair.query_id, []).append(pair)
    result = []
    for query in queries:
        own = of_query.get(query.id, [])
        if not own:
            continue
        ids = list(dict.fromkeys(i for pair in own for i in (pair.preferred, pair.rejected)))
        place = {identity: index for index, identity in enumerate(ids)}
        result.append(
            QueryPairs(
                query,
                tuple(by_id[identity] for identity in ids),
                tuple((pair.kind, place[pair.preferred], place[pair.rejected]) for pair in own),
                own[0].fold,
            )
        )
    return result


class Item(Protocol):
    """A query with pairs, its trajectories in memory (`QueryPairs`) or on disk (`pair_store.StoredPairs`)."""

    @property
    def query(self) -> Query:
        """The query."""
        ...

    @property
    def fold(self) -> int:
        """The fold of the query."""
        ...

    @property
    def draw_weight(self) -> int:
        """How often the query is drawn, relative to others."""
        ...


AnyItem = TypeVar("AnyItem", bound=Item)


def draw_items(items: Sequence[AnyItem], count: int, rng: random.Random) -> list[AnyItem]:
    """Different items, those with outcome pairs more often."""
    # Weighted sampling without replacement: the largest of u^(1/w) (Efraimidis and Spirakis, 2006).
    keys = {id(item): rng.random() ** (1 / item.draw_weight) for item in items}
    return sorted(items, key=lambda item: -keys[id(item)])[:count]


def check_kind_weights(weights: Mapping[str, float]) -> None:
    """Raise ConfigError for a kind that does not exist or weights that add up to nothing."""
    kinds = [kind.value for kind in PairKind]
    for name in weights:
        if name not in kinds:
            raise ConfigError(
                f"reward.kind_weights names {name!r}: expected {', '.join(kinds)}{did_you_mean(name, kinds)}"
            )
    if any(weight < 0 for weight in weights.values()) or sum(weights.values()) <= 0:
        raise ConfigError(f"reward.kind_weights are {dict(weights)}: expected no negative one and a sum above 0")


def weigh_pairs(item: QueryPairs, kind_weights: Mapping[str, float]) -> torch.Tensor:
    """The weight of each pair of a query in a rubric's reward, shape (P,); their sum is at most 1.

    A kind's weight is shared by its pairs in the query and divided by the weights of all kinds, present or
    not: a query with cost pairs only must not shout as loud as one whose outcome depends on the routing.
    """
    counts = Counter(kind for kind, _, _ in item.pairs)
    total = sum(kind_weights.values())
    return torch.tensor([kind_weights.get(kind, 0.0) / counts[kind] / total for kind, _, _ in item.pairs])


def find_dearer(item: QueryPairs) -> torch.Tensor:
    """For each pair of a query, shape (P,): 1 where the preferred trajectory is dearer, -1 where cheaper, else 0."""
    shares = [trajectory.large_share for trajectory in item.trajectories]
    return torch.tensor([shares[better] - shares[worse] for _, better, worse in item.pairs]).sign()


def reward_scores(item: QueryPairs, weights_P: torch.Tensor, scores_RN: torch.Tensor, scale: float) -> torch.Tensor:
    """How well each row of scores (R rubrics x N trajectories) orders all pairs of a query: (R,), in [0, 1].

    The weighted sum of sigmoid(score difference / scale): smooth and over all pairs, since the sign of a few
    sampled ones is too noisy to find which step matters.
    """
    better = torch.tensor([pair[1] for pair in item.pairs])
    worse = torch.tensor([pair[2] for pair in item.pairs])
    return torch.sigmoid((scores_RN[:, better] - scores_RN[:, worse]) / scale) @ weights_P


@dataclass(frozen=True, slots=True)
class PairAccuracy:
    """Share of pairs whose preferred trajectory scores higher (a tie counts one half), by kind, and the counts.

    `mean` is over the kinds that occur, with the outcome counted twice (`KIND_SHARES`). `balanced` is the mean
    of the accuracy where the preferred trajectory is the dearer one and where it is the cheaper one: 0.5 for
    whoever only knows how many steps are large, so that it shows how well the steps are told apart. `errors`
    counts pairs that could not be scored; they are in no share.
    """

    by_kind: dict[str, float]
    counts: dict[str, int]
    mean: float
    balanced: float
    errors: int


class AccuracyTally:
    """Adds up pair accuracy one query at a time, so that no trajectory need be kept."""

    def __init__(self) -> None:
        self._hits: dict[str, list[float]] = {kind.value: [] for kind in PairKind}
        self._sides: dict[bool, list[float]] = {True: [], False: []}
        self._errors = 0

    def add(self, item: QueryPairs, verdicts: Sequence[Verdict]) -> None:
        """Count the pairs of one query, given one verdict per trajectory."""
        for kind, better, worse in item.pairs:
            if verdicts[better].error is not None or verdicts[worse].error is not None:
                self._errors += 1
                continue
            difference = verdicts[better].score - verdicts[worse].score
            # Verdicts are float32 sums: equal ones may differ in the last digits.
            hit = 0.5 if abs(difference) < 1e-6 else float(difference > 0)
            self._hits[kind.value].append(hit)
            dearer = item.trajectories[better].large_share - item.trajectories[worse].large_share
            if dearer:
                self._sides[dearer > 0].append(hit)

    def result(self) -> PairAccuracy:
        """The accuracy over all that was added."""
        by_kind = {kind: _mean(values) for kind, values in self._hits.items() if values}
        shares = {kind: KIND_SHARES[PairKind(kind)] for kind in by_kind}
        mean = sum(shares[kind] * value for kind, value in by_kind.items()) / max(sum(shares.values()), 1)
        counts = {kind: len(values) for kind, values in self._hits.items()}
        balanced = (_mean(self._sides[True]) + _mean(self._sides[False])) / 2
        return PairAccuracy(by_kind, counts, mean if by_kind else float("nan"), balanced, self._errors)


def measure_accuracy(items: Sequence[QueryPairs], verdicts: Sequence[Sequence[Verdict]]) -> PairAccuracy:
    """Pair accuracy of the verdicts (one per trajectory of each item)."""
    tally = AccuracyTally()
    for item, own in zip(items, verdicts, strict=True):
        tally.add(item, own)
    return tally.result()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
