"""What a rubric is worth: how well the Judge's scores under it order a query's preference pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.types import PairKind, PreferencePair, Query, Trajectory, Verdict


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


def rubric_reward(item: QueryPairs, scores: Sequence[float], kind_weights: Mapping[str, float], scale: float) -> float:
    """How well scores order all pairs of a query, in [0, 1].

    For each kind the mean of sigmoid(score difference / scale), weighted by kind. The denominator holds the
    weights of all kinds, present or not: a query with cost pairs only must not shout as loud as one whose
    outcome depends on the routing, or the Rubricor learns `everything small`. Smooth and over all pairs,
    since the sign of a few sampled ones is too noisy to find which step matters.
    """
    sums: dict[PairKind, list[float]] = {}
    for kind, better, worse in item.pairs:
        sums.setdefault(kind, []).append(_sigmoid((scores[better] - scores[worse]) / scale))
    total = sum(kind_weights.get(kind, 0.0) * sum(values) / len(values) for kind, values in sums.items())
    return total / sum(kind_weights.values())


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


@dataclass(frozen=True, slots=True)
class PairAccuracy:
    """Share of pairs whose preferred trajectory scores higher (a tie counts one half), by kind, and the counts.

    `mean` is the unweighted mean over the kinds that occur, so that the most frequent kind does not hide the
    others. `errors` counts pairs that could not be scored; they are in no share.
    """

    by_kind: dict[str, float]
    counts: dict[str, int]
    mean: float
    errors: int


def measure_accuracy(items: Sequence[QueryPairs], verdicts: Sequence[Sequence[Verdict]]) -> PairAccuracy:
    """Pair accuracy of the verdicts (one per trajectory of each item)."""
    hits: dict[str, list[float]] = {kind.value: [] for kind in PairKind}
    errors = 0
    for item, own in zip(items, verdicts, strict=True):
        for kind, better, worse in item.pairs:
            if own[better].error is not None or own[worse].error is not None:
                errors += 1
                continue
            difference = own[better].score - own[worse].score
            # Verdicts are float32 sums: equal ones may differ in the last digits.
            hits[kind.value].append(0.5 if abs(difference) < 1e-6 else float(difference > 0))
    by_kind = {kind: sum(values) / len(values) for kind, values in hits.items() if values}
    mean = sum(by_kind.values()) / len(by_kind) if by_kind else float("nan")
    return PairAccuracy(by_kind, {kind: len(values) for kind, values in hits.items()}, mean, errors)
