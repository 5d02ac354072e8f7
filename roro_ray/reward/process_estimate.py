"""Process quality from the writers' confidence alone: no rollout, for models whose continuations are dear.

Of the trajectories of one query, a small step of which its writer was among the least sure is taken for a miss (the
large model should have written it), a large step of which its writer was among the surest for waste (the small one
would have done). Quantiles are taken within query and writer, since confidence differs between models and queries for
reasons that say nothing about steps. An estimate and no evidence: models are sure of some steps that they get wrong,
as the embedded world's small one is. `pairs.process_source=interventions` measures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from roro_ray.reward.process import ProcessQuality, make_quality
from roro_ray.types import Trajectory

UNSURE_SHARE = 0.2  # of a query's small steps: taken for misses
SURE_SHARE = 0.5  # of a query's large steps: taken for waste


def estimate_process(trajectories: Sequence[Trajectory]) -> dict[str, ProcessQuality]:
    """The estimate for each trajectory, by id; one with a step whose engine told no confidence is left out."""
    known = [t for t in trajectories if t.steps and all(step.confidence > 0 for step in t.steps)]
    by_query: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in known:
        by_query[trajectory.query_id].append(trajectory)
    return {
        trajectory.id: make_quality(kinds)
        for group in by_query.values()
        for trajectory, kinds in zip(group, _judge_group(group), strict=True)
    }


def _judge_group(group: Sequence[Trajectory]) -> list[list[str]]:
    small, large = (
        [step.confidence for trajectory in group for step in trajectory.steps if (step.model > 0) == dear]
        for dear in (False, True)
    )
    unsure = float(np.quantile(small, UNSURE_SHARE)) if small else 0.0
    sure = float(np.quantile(large, 1 - SURE_SHARE)) if large else 1.0
    return [
        [
            ("waste" if step.confidence >= sure else "needed")
            if step.model
            else ("miss" if step.confidence <= unsure else "idle")
            for step in trajectory.steps
        ]
        for trajectory in group
    ]
