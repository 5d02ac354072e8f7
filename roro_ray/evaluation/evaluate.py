"""The whole evaluation: every method's sweep on validation and test queries, learning curves, examples.

Reads top to bottom: the two models alone, the baselines, the trained routers, the oracle, the curves. Nothing
is decided on test queries: operating points, thresholds and the settings that a frontier joins come from
validation. A method that cannot be run (no such router in this run) is left out and named with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from roro_ray.config import Config
from roro_ray.errors import ConfigError
from roro_ray.evaluation.examples import Example, Explain, collect_examples
from roro_ray.evaluation.learning_curve import CurvePoint, CurveRule, Snapshot, measure_curve
from roro_ray.evaluation.methods import (
    KEEP_ALL,
    METHODS,
    Host,
    Setting,
    fixed_setting,
    make_specs,
    random_settings,
    router_settings,
    run_settings,
    threshold_settings,
)
from roro_ray.evaluation.metrics import Sweep, make_scores
from roro_ray.evaluation.query_level import QueryEncoder, train_predictor
from roro_ray.evaluation.steady_host import SteadyHost
from roro_ray.evaluation.sweeps import Anchors, QuerySets, oracle_sweep, query_level_sweep, run_sweep, single_sweep
from roro_ray.routing.failures import Tally
from roro_ray.types import Query, Trajectory

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What an evaluation needs beside a host.

    `routers` maps a method (`roro`, `grpo_outcome`, ..) to the directory of its router, `snapshots` to the
    routers along its training. `alone` are training queries with whether the small model alone was right
    (`collect_alone`), from which the query-level router learns. `explain` writes and judges the rubrics that
    are shown beside the examples.
    """

    config: Config
    queries: QuerySets
    routers: dict[str, Path]
    snapshots: dict[str, Sequence[Snapshot]] = field(default_factory=dict)
    alone: Sequence[tuple[Query, bool]] = ()
    explain: Explain | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results: a sweep per method, learning curves, examples, what was left out and why, and the seconds.

    `tally` counts rollouts, tries and failures of all stages together, `searches` the oracle's searches and
    `oracle_errors` those of them that failed for good.
    """

    queries: QuerySets
    sweeps: dict[str, Sweep]
    curves: dict[str, list[CurvePoint]]
    examples: list[Example]
    skipped: dict[str, str]
    seconds: dict[str, float]
    oracle_inexact: int = 0
    tally: Tally = field(default_factory=Tally)
    searches: int = 0
    oracle_errors: int = 0


def collect_alone(queries: Sequence[Query], trajectories: Iterable[Trajectory]) -> list[tuple[Query, bool]]:
    """The scored trajectories of the small model alone (strategy `fixed:0`) with their queries, one per query."""
    by_id = {query.id: query for query in queries}
    alone = {
        trajectory.query_id: bool(trajectory.correct)
        for trajectory in trajectories
        if trajectory.strategy == "fixed:0" and trajectory.correct is not None and trajectory.query_id in by_id
    }
    return [(by_id[query_id], correct) for query_id, correct in alone.items()]


def evaluate(inputs: Inputs, host: Host, progress: Progress = lambda label, done, total: None) -> Evaluation:
    """Run the evaluation.

    Args:
        progress: called before each stage with its name, the stages done and their number.

    Raises:
        ConfigError: no validation or no test queries, or a router of an unknown method.
        RolloutError: more rollouts failed for good than the settings under `faults` bear.
    """
    _check(inputs)
    run = _Run(inputs, host)
    stages = list(run.stages())
    seconds = {}
    for done, (label, stage) in enumerate(stages):
        progress(label, done, len(stages))
        start = time.perf_counter()
        stage()
        seconds[label] = round(time.perf_counter() - start, 2)
    progress("done", len(stages), len(stages))
    ordered = {method: run.sweeps[method] for method in METHODS if method in run.sweeps}
    host = run.host
    return Evaluation(
        *(inputs.queries, ordered, run.curves, run.examples, run.skipped, seconds, run.oracle_inexact),
        *(host.tally, host.searches.rollouts, host.searches.failed),
    )


def _check(inputs: Inputs) -> None:
    for name, queries in (("validation", inputs.queries.validation), ("test", inputs.queries.test)):
        if not queries:
            raise ConfigError(f"no {name} queries: expected at least one; set data.{name}_queries and data.suites")
    unknown = [method for method in (*inputs.routers, *inputs.snapshots) if method not in METHODS]
    if unknown:
        raise ConfigError(f"unknown router method {unknown[0]!r}: expected one of {', '.join(METHODS)}")


class _Run:
    """The evaluation under way: one method per stage, results kept as they come."""

    def __init__(self, inputs: Inputs, host: Host) -> None:
        self.inputs, self.host = inputs, SteadyHost(host, inputs.config.faults)
        self.config, self.queries = inputs.config.evaluate, inputs.queries
        self.seed = inputs.config.seed
        self.large_model = len(inputs.config.pool.models) - 1
        self.sweeps: dict[str, Sweep] = {}
        self.curves: dict[str, list[CurvePoint]] = {}
        self.examples: list[Example] = []
        self.skipped: dict[str, str] = {}
        self.oracle_inexact = 0

    def stages(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is to be done, in order; the models alone come first, since every choice is measured against them."""
        yield "small and large alone", self.run_anchors
        yield "random", partial(self.run_method, "random", random_settings(self.config))
        for method in KEEP_ALL:
            yield method, partial(self.run_threshold, method)
        yield "query_level", self.run_query_level
        for method, directory in self.inputs.routers.items():
            yield method, partial(self.run_router, method, directory)
        yield "oracle", self.run_oracle
        if self.inputs.snapshots:
            yield "learning curves", self.run_curves
        yield "examples", self.run_examples

    @property
    def anchors(self) -> Anchors:
        """The two models alone."""
        return Anchors(self.sweeps["small"], self.sweeps["large"], self.config.accuracy_slack)

    def run_anchors(self) -> None:
        """Each model alone on all queries."""
        settings = [fixed_setting(0, "small"), fixed_setting(self.large_model, "large")]
        runs = run_settings(self.host, "alone", settings, self.queries.all, self.seed)
        for setting, outcomes in zip(settings, runs, strict=True):
            scores = make_scores("alone", outcomes)
            self.sweeps[setting.label] = single_sweep(setting.label, scores, len(self.queries.validation))

    def run_method(self, method: str, settings: Sequence[Setting]) -> None:
        """A sweep whose settings are known beforehand."""
        if not settings:
            self.skipped[method] = "its sweep has no settings"
            return
        self.sweeps[method] = run_sweep(self.host, method, settings, self.queries, self.seed, self.anchors)

    def run_threshold(self, method: str) -> None:
        """A threshold rule: watch its signal on validation, then sweep the quantiles."""
        watch = [Setting("watched", KEEP_ALL[method])]
        watched = run_settings(self.host, method, watch, self.queries.validation, self.seed)[0]
        self.run_method(method, threshold_settings(method, watched, self.config.thresholds))

    def run_query_level(self) -> None:
        """Train the query-level router on the small model's collected results, then put its sweep together."""
        alone = self.inputs.alone
        if not alone:
            self.skipped["query_level"] = "no collected trajectories of the small model alone (collect with fixed:0)"
            return
        settings, cheapest = self.inputs.config.router, self.inputs.config.pool.models[0]
        if not settings.encoder and cheapest.engine == "openai":
            self.skipped["query_level"] = "no router.encoder and no local model that could read the queries"
            return
        encoder = QueryEncoder(settings.encoder or cheapest.path, settings.encoder_dtype)
        states_QF = encoder.encode([query.text for query, _ in alone]).states_QF
        predictor = train_predictor(states_QF, [not correct for _, correct in alone])
        encoded = encoder.encode([query.text for query in self.queries.all])
        fails_Q = predictor.predict(encoded.states_QF)
        self.sweeps["query_level"] = query_level_sweep(fails_Q, encoded.flops_Q, self.anchors, self.config.thresholds)

    def run_router(self, method: str, directory: Path) -> None:
        """A trained router over the cost weights."""
        self.host.use_router(directory)
        self.run_method(method, router_settings(self.config.cost_weights))

    def run_oracle(self) -> None:
        """Search the test queries, then roll the found assignments out like any other strategy."""
        if not self.config.oracle:
            self.skipped["oracle"] = "evaluate.oracle=false"
            return
        if any(model.format == "chat" for model in self.inputs.config.pool.models):
            self.skipped["oracle"] = "the search is for short plain solutions, and this pool's models chat"
            return
        results = self.host.find_oracle(self.queries.test)
        self.oracle_inexact = sum(not result.exact for result in results)
        specs = [
            make_specs("oracle", [Setting("found", result.strategy)], [query], self.seed)[0]
            for result, query in zip(results, self.queries.test, strict=True)
        ]
        self.sweeps["oracle"] = oracle_sweep(self.host.run(specs), results, self.sweeps["small"].test[0])

    def run_curves(self) -> None:
        """The learning curve of each method that has snapshots."""
        large = self.sweeps["large"].validation[0]
        config = self.config
        rule = CurveRule(config.curve_cost_weights, large, config.accuracy_slack, self.seed, min(config.bootstrap, 500))
        for method, snapshots in self.inputs.snapshots.items():
            self.curves[method] = measure_curve(self.host, method, snapshots, self.queries.validation, rule)

    def run_examples(self) -> None:
        """A few whole trajectories of RoRo at its operating point."""
        if "roro" not in self.sweeps:
            self.skipped["examples"] = "this run has no router trained by RoRo"
            return
        self.host.use_router(self.inputs.routers["roro"])
        weight = self.config.cost_weights[self.sweeps["roro"].chosen]
        names = [model.name for model in self.inputs.config.pool.models]
        setting = router_settings([weight])[0]
        self.examples = collect_examples(
            self.host, self.sweeps, self.queries.test, setting, self.seed, names, self.inputs.explain
        )


def columns_by_suite(queries: Sequence[Query]) -> dict[str, np.ndarray]:
    """The positions of each suite's queries, suites in order of appearance."""
    suites = [query.suite for query in queries]
    return {suite: np.flatnonzero(np.asarray(suites) == suite) for suite in dict.fromkeys(suites)}
