"""Measure what each cost weight of a router gives: the rollouts and the intervals behind a calibration.

The router decides at a price (`router_priced`) on queries that neither training, nor any choice of settings, nor the
test uses; both models alone run on the same queries, so that gaps and ratios are paired. What was rolled out is kept
beside the router until all is, so that a calibration that was stopped goes on where it was.

Axes: _K quantity, _Q query, _R bootstrap row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roro_ray.config import Config
from roro_ray.data.run_dir import read_json, write_json
from roro_ray.data.sources import describe_sources, make_stage_queries
from roro_ray.engines.protocol import EngineFacts
from roro_ray.errors import CalibrationError, DataError, EngineError
from roro_ray.evaluation.bootstrap import Floats, interval, make_resamples, point
from roro_ray.evaluation.calibration import Calibration, Interval, OperatingPoint, digest_router, load_calibration
from roro_ray.evaluation.methods import Host, Setting, fixed_setting, score_settings
from roro_ray.evaluation.metrics import Scores, measure_difference, measure_setting
from roro_ray.routing.router_files import load_version
from roro_ray.types import Query

PARTIAL = "calibration.partial.json"
_SMALL, _LARGE = "small", "large"
# Above this share of failed rollouts the figures would be those of the queries that happened to work.
_MAX_FAILED_SHARE = 0.05


def calibration_queries(config: Config) -> list[Query]:
    """Queries of the validation split from where the evaluation's own part of its stream ends, all suites.

    The split keeps them apart from training and test, their place in the stream from the queries on which thresholds,
    operating points and trainings are chosen.
    """
    return make_stage_queries(config, "validation", config.calibrate.queries, offset=config.data.validation_queries)


def make_settings(config: Config) -> list[Setting]:
    """What is rolled out: both models alone, then the router at each cost weight by rising weight."""
    top = len(config.pool.models) - 1
    return [
        fixed_setting(0, _SMALL),
        fixed_setting(top, _LARGE),
        *(
            Setting(f"cost weight {weight!r}", "router_priced", weight)
            for weight in sorted(config.calibrate.cost_weights)
        ),
    ]


def find_current(config: Config, router: Path, facts: Sequence[EngineFacts]) -> Calibration | None:
    """The calibration beside a router, where it was made of these weights, this pool and these settings.

    A damaged or outdated one is None: it is made again.
    """
    try:
        calibration = load_calibration(router)
    except CalibrationError:
        return None
    same = calibration is not None and calibration.settings_digest == _digest_settings(config, router, facts)
    return calibration if same else None


def calibrate(
    config: Config,
    router: Path,
    facts: Sequence[EngineFacts],
    host: Host,
    on_setting: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Roll out what is missing, and measure.

    Args:
        router: a saved router; what is rolled out is kept here until the calibration is done (`forget_partial`).
        facts: of the pool behind `host`.
        on_setting: told how many settings of `make_settings` are done, first those of an interrupted call.

    Raises:
        CheckpointError: the directory holds no router for this pool.
        EngineError: too many rollouts failed.
    """
    queries, settings = calibration_queries(config), make_settings(config)
    partial = _Partial(router / PARTIAL, _digest_rollouts(config, router, facts))
    host.use_router(router)
    on_setting(sum(setting.label in partial.scores for setting in settings))
    for done, setting in enumerate(settings, start=1):
        if setting.label not in partial.scores:
            [scores] = score_settings(host, "calibrate", [setting], queries, config.seed)
            _check_failed(scores, len(queries))
            partial.add(scores)
            on_setting(done)
    return _measure(config, router, facts, queries, {setting: partial.scores[setting.label] for setting in settings})


def forget_partial(router: Path) -> None:
    """Remove the rollouts that `calibrate` kept, once their calibration is saved."""
    (router / PARTIAL).unlink(missing_ok=True)


def _measure(
    config: Config,
    router: Path,
    facts: Sequence[EngineFacts],
    queries: Sequence[Query],
    scores: dict[Setting, Scores],
) -> Calibration:
    level = config.calibrate.confidence
    weights_RQ = make_resamples([query.suite for query in queries], config.calibrate.bootstrap, config.seed)
    small, large = (next(each for each in scores.values() if each.setting == name) for name in (_SMALL, _LARGE))

    def measure(each: Scores, figure: str) -> Interval:
        return _make_interval(measure_setting(each, small, large, weights_RQ)[figure], level)

    points = []
    for setting, each in scores.items():
        if setting.strategy != "router_priced":
            continue
        against = measure_difference(each, large, weights_RQ)
        points.append(
            OperatingPoint(
                setting.cost_weight,
                large_share=measure(each, "cost_share"),
                accuracy=measure(each, "accuracy"),
                accuracy_gap=_make_interval(0.0 - against["accuracy"], level),
                flops_ratio=_make_interval(1.0 - against["flops_saved"], level),
            )
        )
    return Calibration(
        pool=tuple(engine.fingerprint for engine in facts),
        models=tuple(engine.name for engine in facts),
        router_version=load_version(router),
        queries=len(queries),
        confidence=level,
        points=tuple(points),
        large_accuracy=measure(large, "accuracy"),
        small_accuracy=measure(small, "accuracy"),
        router_digest=digest_router(router),
        settings_digest=_digest_settings(config, router, facts),
    )


def _make_interval(values_R: Floats, level: float) -> Interval:
    value, bounds = point(values_R), interval(values_R, level)
    assert value is not None and bounds is not None, "nearly all rollouts are scored, so every figure exists"
    return Interval(value, bounds[0], bounds[1])


def _check_failed(scores: Scores, count: int) -> None:
    """Refuse a setting with too many holes.

    Raises:
        EngineError: names the setting and the first failure.
    """
    dropped = scores.failed + scores.unscorable
    if dropped > _MAX_FAILED_SHARE * count:
        raise EngineError(
            f"calibration, {scores.setting}: {dropped} of {count} rollouts failed or could not be scored, expected at "
            f"most {_MAX_FAILED_SHARE:.0%}. The first: {scores.error or 'an answer that could not be checked'}. Mend "
            "that and run the same command again: it goes on from here"
        )


def _digest_rollouts(config: Config, router: Path, facts: Sequence[EngineFacts]) -> str:
    """What shapes the rollouts of one setting."""
    episode = {key: value for key, value in dataclasses.asdict(config.episode).items() if key != "timeout_s"}
    return _digest(
        [engine.fingerprint for engine in facts],
        digest_router(router),
        load_version(router),
        [config.data.suites, sources] if (sources := describe_sources(config.data)) else config.data.suites,
        [config.data.seed, config.data.validation_queries, config.calibrate.queries, config.seed],
        episode,
    )


def _digest_settings(config: Config, router: Path, facts: Sequence[EngineFacts]) -> str:
    """What shapes a whole calibration."""
    settings = config.calibrate
    weights = sorted(settings.cost_weights)
    return _digest(_digest_rollouts(config, router, facts), weights, settings.bootstrap, settings.confidence)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Partial:
    """Scores by the label of their setting, on disk as soon as they are there; those of other rollouts are dropped."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path, self._digest = path, digest
        self.scores: dict[str, Scores] = {}
        if not path.is_file():
            return
        try:
            content = read_json(path)
            if content["digest"] == digest:
                self.scores = {
                    label: Scores(label, np.array(saved["values"], dtype=float), saved["failed"], saved["unscorable"])
                    for label, saved in content["scores"].items()
                }
        except (DataError, KeyError, TypeError, ValueError):
            self.scores = {}  # only a shortcut: what cannot be read is rolled out again

    def add(self, scores: Scores) -> None:
        self.scores[scores.setting] = scores
        saved = {
            label: {"values": each.values_KQ.tolist(), "failed": each.failed, "unscorable": each.unscorable}
            for label, each in self.scores.items()
        }
        write_json(self._path, {"digest": self._digest, "scores": saved})
