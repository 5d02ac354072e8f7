"""The summary: every number of an evaluation as plain JSON, per suite and overall, with intervals.

Shape: `{"suites": {suite or "overall": {method: entry}}, "judge", "learning_curves", "headline", "methods",
"skipped", "config", "versions", ..}`. An entry has the figures of `evaluation.metrics` at the operating point,
`ci` with a 95% interval for each, the frontier's points, and paired differences to the large model and to
outcome-only GRPO. What does not exist is null.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roro_ray.data.files import write_whole
from roro_ray.errors import DataError
from roro_ray.evaluation.bootstrap import Floats, interval, make_resamples, point
from roro_ray.evaluation.evaluate import Evaluation, columns_by_suite
from roro_ray.evaluation.frontier import hull_area
from roro_ray.evaluation.headline import make_headline
from roro_ray.evaluation.methods import METHODS
from roro_ray.evaluation.metrics import (
    FRONTIER_METRICS,
    QUANTITIES,
    Scores,
    Sweep,
    measure_difference,
    measure_frontier,
    measure_setting,
)

OVERALL = "overall"
BASELINES = ("large", "grpo_outcome")
SETTING_METRICS = (*QUANTITIES, "pgr")
_SCHEMA_VERSION = 1


def make_summary(
    evaluation: Evaluation,
    config: Mapping[str, Any],
    versions: Mapping[str, Any],
    judge: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of an evaluation, ready for `json.dump`.

    Args:
        config: the resolved settings of the run, as plain values.
        judge: what reward learning measured of the Judge, passed through.
        resamples, seed: of the bootstrap over test queries (within suites; the same for every method).
    """
    queries = evaluation.queries.test
    weights_RQ = make_resamples([query.suite for query in queries], resamples, seed)
    columns = columns_by_suite(queries)
    groups = {**columns, OVERALL: np.arange(len(queries))}
    suites = {
        name: _summarise_group(evaluation.sweeps, places, weights_RQ[:, places]) for name, places in groups.items()
    }
    slack = float(config.get("evaluate", {}).get("accuracy_slack", 0.01))
    summary = {
        "schema": _SCHEMA_VERSION,
        "headline": make_headline(suites[OVERALL], slack),
        "suites": suites,
        "judge": dict(judge or {}),
        "learning_curves": {
            method: [dataclasses.asdict(at) for at in curve] for method, curve in evaluation.curves.items()
        },
        "methods": {method: dataclasses.asdict(METHODS[method]) for method in evaluation.sweeps},
        "skipped": dict(evaluation.skipped),
        "oracle_inexact": evaluation.oracle_inexact,
        "queries": {"validation": len(evaluation.queries.validation), "test": len(queries), "suites": list(columns)},
        "bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95},
        "seconds": dict(evaluation.seconds),
        "config": dict(config),
        "versions": dict(versions),
    }
    plain: dict[str, Any] = _to_plain(summary)
    return plain


def _summarise_group(sweeps: Mapping[str, Sweep], columns: np.ndarray, weights_RQ: Floats) -> dict[str, Any]:
    """The entries of all methods on some of the test queries."""
    taken = {method: sweep.take(columns) for method, sweep in sweeps.items()}
    small, large = taken["small"].operating, taken["large"].operating
    frontiers = {
        method: measure_frontier(sweep, small, large, weights_RQ) for method, sweep in taken.items() if sweep.corners
    }
    priced = any(np.nansum(scores.of("usd")) > 0 for sweep in sweeps.values() for scores in sweep.test)
    entries = {}
    for method, sweep in taken.items():
        figures = measure_setting(sweep.operating, small, large, weights_RQ)
        nothing = dict.fromkeys(FRONTIER_METRICS, np.full(len(weights_RQ), np.nan))
        figures |= frontiers.get(method, nothing)
        entry: dict[str, Any] = {name: point(values) for name, values in figures.items()}
        entry["ci"] = {name: interval(values) for name, values in figures.items()}
        entry["n"] = int(np.isfinite(sweep.operating.of("accuracy")).sum())
        entry["setting"] = sweep.operating.setting
        entry["failed"] = sum(scores.failed for scores in (*sweep.test, *sweep.validation))
        entry["unscorable"] = sum(scores.unscorable for scores in (*sweep.test, *sweep.validation))
        entry["error"] = next((scores.error for scores in (*sweep.test, *sweep.validation) if scores.error), None)
        entry["frontier"] = _frontier_points(sweep, small, large, weights_RQ[:1]) if sweep.corners else []
        entry["frontier_area_test_hull"] = _test_hull_area(entry["frontier"], small, large, weights_RQ[:1])
        for baseline in BASELINES:
            if baseline in taken and baseline != method:
                versus = measure_difference(sweep.operating, taken[baseline].operating, weights_RQ)
                if method in frontiers and baseline in frontiers:
                    for name in ("frontier_area", "apgr"):
                        versus[name] = frontiers[method][name] - frontiers[baseline][name]
                entry[f"vs_{baseline}"] = {
                    **{name: point(values) for name, values in versus.items()},
                    "ci": {name: interval(values) for name, values in versus.items()},
                }
        entries[method] = entry if priced else _without_money(entry)
    return entries


def _without_money(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of a pool without prices: it cost no 0 dollars, the price is not known."""
    kept = {name: value for name, value in entry.items() if not name.startswith("usd")}
    return {name: _without_money(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _frontier_points(sweep: Sweep, small: Scores, large: Scores, one_RQ: Floats) -> list[dict[str, Any]]:
    """Every setting of the sweep with its test figures; `corner` marks those that the frontier joins."""
    points = []
    for index, scores in enumerate(sweep.test):
        figures = measure_setting(scores, small, large, one_RQ)
        points.append(
            {
                "setting": scores.setting,
                **{name: point(figures[name]) for name in ("accuracy", "cost_share", "flops", "flops_decode")},
                "corner": index in sweep.corners["cost_share"],
                "operating": index == sweep.chosen,
            }
        )
    return points


def _test_hull_area(points: Sequence[Mapping[str, Any]], small: Scores, large: Scores, one_RQ: Floats) -> float | None:
    """Area under the concave hull of the test points themselves: flattering, shown beside the honest one."""
    if not points:
        return None
    ends = [measure_setting(scores, small, large, one_RQ) for scores in (small, large)]
    inner = [(at["cost_share"], at["accuracy"]) for at in points if at["accuracy"] is not None]
    return hull_area([*((float(end["cost_share"][0]), float(end["accuracy"][0])) for end in ends), *inner])


def save_summary(summary: Mapping[str, Any], examples: Sequence[Any], directory: Path) -> None:
    """Write `summary.json` and `examples.json` whole or not at all (beside, then renamed)."""
    directory.mkdir(parents=True, exist_ok=True)
    shown = [dataclasses.asdict(example) for example in examples]
    for name, content in (("summary.json", summary), ("examples.json", _to_plain(shown))):
        with write_whole(directory / name) as temporary:
            # No NaN or infinity: they are no JSON, and none can be here.
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def load_summary(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a saved summary and its examples.

    Raises:
        DataError: a file is missing or no JSON.
    """
    contents = []
    for name in ("summary.json", "examples.json"):
        try:
            contents.append(json.loads((directory / name).read_text()))
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read {directory / name}: {error}. Expected the output of an evaluation: "
                "run `python -m jobs.evaluate` for this run directory"
            ) from error
    return contents[0], contents[1]


def _to_plain(value: Any) -> Any:
    """Plain JSON values: numpy numbers unwrapped, tuples as lists, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
