"""Preference pairs of trajectories of one query, each tagged with the kind of evidence that ordered it.

outcome: right over wrong. cost: both right, the clearly cheaper over the dearer. process: same outcome, like
cost, the clearly better process quality (see `reward.process`) over the worse. Folds are by query, decided by
a digest of its id, so that no query is on both sides of a held-out comparison, whatever else was collected.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from roro_ray.config import PairsConfig
from roro_ray.errors import ConfigError
from roro_ray.types import PairKind, PreferencePair, Query, Trajectory


def fold_of(query_id: str, folds: int) -> int:
    """The fold of a query, 0 .. folds - 1; the last fold is held out."""
    return int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:8], "big") % folds


def group_by_query(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """Trajectories by query id, in order of first appearance; those that could not be scored are left out."""
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        if trajectory.correct is not None and trajectory.steps:
            groups[trajectory.query_id].append(trajectory)
    return dict(groups)


def make_pairs(
    queries: Sequence[Query],
    trajectories: Sequence[Trajectory],
    config: PairsConfig,
    quality: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[PreferencePair]:
    """All pairs of every query, at most `config.max_per_query` of a kind, drawn by seed where there are more.

    `quality` maps trajectory ids to process quality; without it there are no process pairs. Two trajectories
    in which every step has the same writer are never paired: they differ by chance only.

    Raises:
        ConfigError: fewer than two folds.
    """
    if config.folds < 2:
        raise ConfigError(f"pairs.folds is {config.folds}: expected at least 2, since the last fold is held out")
    known = {query.id for query in queries}
    pairs = []
    for query_id, group in group_by_query(trajectories).items():
        if query_id not in known:
            continue
        by_kind: dict[PairKind, list[PreferencePair]] = {kind: [] for kind in PairKind}
        for first, second in itertools.combinations(_drop_same(group), 2):
            pair = _make_pair(first, second, config, quality or {})
            if pair is not None:
                by_kind[pair.kind].append(pair)
        for kind, found in by_kind.items():
            pairs.extend(_cap(found, config.max_per_query, f"{seed}/{query_id}/{kind}"))
    return pairs


def _drop_same(group: list[Trajectory]) -> list[Trajectory]:
    """One trajectory of each (writers, texts), that of the least id: duplicates would count one comparison twice."""
    seen: dict[tuple[tuple[int, str], ...], Trajectory] = {}
    for trajectory in sorted(group, key=lambda t: t.id):
        seen.setdefault(tuple((step.model, step.text) for step in trajectory.steps), trajectory)
    return list(seen.values())


def _make_pair(
    first: Trajectory, second: Trajectory, config: PairsConfig, quality: Mapping[str, float]
) -> PreferencePair | None:
    def pair(kind: PairKind, better: Trajectory, worse: Trajectory, margin: float) -> PreferencePair:
        fold = fold_of(better.query_id, config.folds)
        return PreferencePair(better.query_id, better.suite, fold, kind, better.id, worse.id, margin)

    if first.models == second.models:
        return None
    if first.correct != second.correct:
        better, worse = (first, second) if first.correct else (second, first)
        return pair(PairKind.OUTCOME, better, worse, 1.0)
    cheaper, dearer = sorted((first, second), key=lambda t: t.large_share)
    difference = dearer.large_share - cheaper.large_share
    if first.correct and difference >= config.cost_margin:
        return pair(PairKind.COST, cheaper, dearer, difference)
    if difference > config.process_cost_slack or first.id not in quality or second.id not in quality:
        return None
    better, worse = sorted((first, second), key=lambda t: -quality[t.id])
    margin = quality[better.id] - quality[worse.id]
    return pair(PairKind.PROCESS, better, worse, margin) if margin >= config.process_margin else None


def _cap(pairs: list[PreferencePair], most: int, seed: str) -> list[PreferencePair]:
    if len(pairs) <= most:
        return pairs
    # A digest, not a random stream: which pairs are kept does not depend on the order of the others.
    order = sorted(pairs, key=lambda p: hashlib.sha256(f"{seed}/{p.preferred}/{p.rejected}".encode()).digest())
    kept = set(order[:most])
    return [pair for pair in pairs if pair in kept]


def process_candidates(trajectories: Sequence[Trajectory], config: PairsConfig) -> list[Trajectory]:
    """The trajectories whose process quality can decide a pair; the others need no interventions."""
    wanted: dict[str, Trajectory] = {}
    for group in group_by_query(trajectories).values():
        for first, second in itertools.combinations(_drop_same(group), 2):
            gap = abs(first.large_share - second.large_share)
            cost_pair = first.correct and gap >= config.cost_margin
            same_outcome = first.correct == second.correct and first.models != second.models
            if same_outcome and gap <= config.process_cost_slack and not cost_pair:
                wanted[first.id] = first
                wanted[second.id] = second
    return list(wanted.values())
