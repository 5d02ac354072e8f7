"""The embedded world through vLLM: collection, pairs and evaluation give the figures that they give through hf.

Both decode greedily in float32, so the same steps come out but for ties in the last bits; what is compared is what a
user compares: accuracy, share of large steps and cost of every method.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from roro_ray.config import CollectConfig, Config, DataConfig, EvaluateConfig, ModelConfig, PairsConfig, PoolConfig
from roro_ray.data.collection import collect, training_queries
from roro_ray.data.sources import make_stage_queries
from roro_ray.data.store import iter_trajectories, load_pairs
from roro_ray.evaluation.evaluate import Inputs, collect_alone, evaluate
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.evaluation.summary import make_summary
from roro_ray.evaluation.sweeps import QuerySets
from roro_ray.reward.pairing import pair_shards
from roro_ray.types import Trajectory

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make setup-vllm"),
]
METHODS = ("small", "large", "random", "confidence", "draft_verify", "glimpse", "oracle")
_QUERIES = 8  # per suite and split
_TIES = 0.02  # share of trajectories that a tie in the last bits may change


def make_config(engine: str, run_dir: Path) -> Config:
    return Config(
        run_dir=str(run_dir),
        pool=PoolConfig(
            [ModelConfig(name, f"world:{name}", engine=engine, max_context=1024) for name in ("small", "large")],
            cache_mb=64,
        ),
        data=DataConfig(train_queries=_QUERIES, validation_queries=4, test_queries=_QUERIES),
        collect=CollectConfig(["fixed:0", "fixed:1", "random:0.4"], shard_queries=_QUERIES),
        pairs=PairsConfig(process_source="interventions"),
        evaluate=EvaluateConfig([0.2], [0.5], thresholds=2, bootstrap=100),
    )


def run_pipeline(config: Config, root: Path) -> tuple[list[Trajectory], set, dict]:
    """Collect, pair and evaluate in this process; trajectories, pairs and summary."""
    queries = training_queries(config)
    splits = (("validation", config.data.validation_queries), ("test", config.data.test_queries))
    held_out = QuerySets(*(tuple(make_stage_queries(config, split, count)) for split, count in splits))
    with LocalHost(config) as host:
        facts = collect(config, root / "trajectories", host.run)
        assert facts.failed == 0, facts.first_error
        pair_shards(config, root / "trajectories", root / "pairs", queries, host.run)
        found = list(iter_trajectories(root / "trajectories"))
        evaluation = evaluate(Inputs(config, held_out, {}, alone=collect_alone(queries, found)), host)
    pairs = {(pair.kind, pair.preferred, pair.rejected) for pair in load_pairs(root / "pairs")}
    return found, pairs, make_summary(evaluation, {}, {}, resamples=100)


def show(trajectory: Trajectory) -> tuple[object, ...]:
    return tuple((step.model, step.text, step.finish) for step in trajectory.steps), trajectory.correct


def test_the_figures_are_those_of_hf(tmp_path: Path) -> None:
    runs = {e: run_pipeline(make_config(e, tmp_path / e), tmp_path / e) for e in ("hf", "vllm")}
    (expected, pairs, reference), (got, vllm_pairs, summary) = runs["hf"], runs["vllm"]
    assert len(got) == len(expected) == 3 * 5 * _QUERIES
    same = [show(mine) == show(theirs) for mine, theirs in zip(got, expected, strict=True)]
    assert sum(same) >= (1 - _TIES) * len(same)
    assert len(pairs) > 50 and len(pairs ^ vllm_pairs) <= 2 * _TIES * len(pairs)
    for method in METHODS:
        mine, theirs = summary["suites"]["overall"][method], reference["suites"]["overall"][method]
        assert mine["n"] == theirs["n"] == 5 * _QUERIES, method
        for figure in ("accuracy", "cost_share", "flops"):
            low, high = theirs["ci"][figure]
            assert low <= mine[figure] <= high, (method, figure, mine[figure], theirs[figure])
    # What the engines report of a step, not only its text.
    for mine, theirs in zip(got, expected, strict=True):
        if show(mine) == show(theirs):
            assert mine.usage == theirs.usage
            for a, b in zip(mine.steps, theirs.steps, strict=True):
                assert (a.tokens, a.confidence) == (b.tokens, pytest.approx(b.confidence, abs=1e-4))
