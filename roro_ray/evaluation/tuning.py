"""Choosing among routers that were trained alike but for one setting: on validation, by the operating point's rule.

The honest rival of a process reward is outcome-only training whose cost weight was tuned, so the tuning is given the
same rule, the same validation queries and the same sweep of cost weights as everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roro_ray.config import Config
from roro_ray.evaluation.methods import Host, fixed_setting, router_settings, score_settings
from roro_ray.evaluation.operating_point import choose_setting
from roro_ray.evaluation.sweeps import QuerySets


@dataclass(frozen=True, slots=True)
class Choice:
    """The router chosen, and of each candidate its best setting with accuracy and cost share on validation."""

    name: str
    candidates: dict[str, tuple[str, float, float]]


def choose_router(host: Host, routers: Mapping[str, Path], queries: QuerySets, config: Config) -> Choice:
    """The router whose best setting is cheapest within the slack of the large model's accuracy, else most accurate."""
    settings, seed = router_settings(config.evaluate.cost_weights), config.seed
    top = len(config.pool.models) - 1
    (large,) = score_settings(host, "alone", [fixed_setting(top, "large")], queries.validation, seed)
    best = {}
    for name, directory in routers.items():
        host.use_router(directory)
        scores = score_settings(host, name, settings, queries.validation, seed)
        best[name] = scores[choose_setting(scores, large, config.evaluate.accuracy_slack)]
    names = list(best)
    chosen = names[choose_setting(list(best.values()), large, config.evaluate.accuracy_slack)]
    shown = {
        name: (scores.setting, float(np.nanmean(scores.of("accuracy"))), float(np.nanmean(scores.of("cost_share"))))
        for name, scores in best.items()
    }
    return Choice(chosen, shown)
