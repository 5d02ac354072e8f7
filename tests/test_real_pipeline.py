"""Twenty problems of each real benchmark through collection, pairs and evaluation: tiny models in the hub's format.

The models are random, so nothing is solved; what is tested is that nothing on the way breaks: prompts by each model's
own chat template, thinking blocks, models of two families in one solution, grading, pairs, frontier and report.
"""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

import pytest

from roro_ray.config import (
    CollectConfig,
    Config,
    DataConfig,
    EpisodeConfig,
    EvaluateConfig,
    ModelConfig,
    PairsConfig,
    PoolConfig,
    RayConfig,
    RouterConfig,
)
from roro_ray.config_checks import check_config
from roro_ray.data.benchmarks import BENCHMARKS
from roro_ray.data.collection import collect, plan_shards, training_queries
from roro_ray.data.sources import make_stage_queries
from roro_ray.data.store import iter_trajectories
from roro_ray.evaluation.evaluate import Inputs, collect_alone, evaluate
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.evaluation.report import save_report
from roro_ray.evaluation.summary import make_summary, save_summary
from roro_ray.evaluation.sweeps import QuerySets
from roro_ray.reward.pairing import pair_shards
from roro_ray.routing.router import make_router
from roro_ray.routing.router_files import save_router
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(120)
SOURCE = Path(os.environ.get("RORO_BENCHMARKS", Path(__file__).parents[2] / "shared" / "benchmarks"))


def make_config(tmp_path: Path, models: Path, benchmark: str, engine: str) -> Config:
    families = {"small": "qwen3", "large": "deepseek_qwen"}
    return Config(
        run_dir=str(tmp_path / "run"),
        pool=PoolConfig(
            models=[
                ModelConfig(name, str(models / family), engine=engine, format="chat")
                for name, family in families.items()
            ],
            cache_mb=64,
        ),
        data=DataConfig(
            suites=[benchmark],
            sources={benchmark: str(SOURCE / benchmark)},
            split_shares=[0.5, 0.25, 0.25],
            train_queries=10,
            validation_queries=4,
            test_queries=6,
            graders=1,
        ),
        episode=EpisodeConfig(
            max_steps=4,
            max_step_tokens=16,
            min_step_tokens=3,
            max_answer_tokens=24,
            temperature=0.8,
            instruction="Put your final answer within \\boxed{}.",
        ),
        collect=CollectConfig(["fixed:0", "fixed:1", "random:0.5"], shard_queries=5),
        pairs=PairsConfig(process_source="confidence"),
        router=RouterConfig(encoder=str(models / "qwen3"), encoder_rank=4, encoder_dtype="bfloat16"),
        evaluate=EvaluateConfig([0.2], [0.5], thresholds=2, bootstrap=20, curve_cost_weights=[0.2]),
        ray=RayConfig(concurrency=32),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "deepseek_qwen"):
        make_tiny_model(root / family, family)
    return root


def run_pipeline(config: Config, root: Path) -> dict:
    """Collect, pair, evaluate with an untrained router, and write the report; the summary."""
    check_config(config)
    queries = training_queries(config)
    held_out = QuerySets(*(tuple(make_stage_queries(config, s, n)) for s, n in (("validation", 4), ("test", 6))))
    with LocalHost(config) as host:
        facts = collect(config, root / "trajectories", host.run)
        assert (facts.trajectories, facts.failed) == (sum(len(shard.specs) for shard in plan_shards(config)), 0)
        found = list(iter_trajectories(root / "trajectories"))
        pairs = pair_shards(config, root / "trajectories", root / "pairs", queries, host.run)
        router = save_router(make_router(config.router, 2), root / "router")
        alone = collect_alone(queries, found)
        evaluation = evaluate(Inputs(config, held_out, {"roro": router}, alone=alone), host)
    assert len({t.query_id for t in found}) == len(queries) == 10
    for trajectory in found:
        assert trajectory.conclusion is not None and trajectory.conclusion.model == 1
        assert 1 <= len(trajectory.steps) <= 4 and not any("</think>" in step.text for step in trajectory.steps)
        # Graded, or told why not; a random model's answer is almost never right.
        assert trajectory.correct is not None or trajectory.error
    assert sum(t.correct is True for t in found) <= 0.2 * len(found)
    assert pairs.unmeasured == 0
    summary = make_summary(evaluation, {}, {}, resamples=20)
    save_summary(summary, evaluation.examples, root / "evaluation")
    save_report(root / "evaluation", root / "report.html", root / "frontier.png")
    return summary


@pytest.mark.parametrize(
    ("benchmark", "engine"),
    [*((benchmark, "hf") for benchmark in sorted(BENCHMARKS)), pytest.param("math500", "vllm", marks=pytest.mark.slow)],
)
def test_twenty_problems_of_each_benchmark_go_through(
    benchmark: str, engine: str, models: Path, tmp_path: Path
) -> None:
    if not (SOURCE / benchmark).exists():
        pytest.skip(f"no benchmark files in {SOURCE}: set RORO_BENCHMARKS to a folder that has them")
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed: make setup-vllm")
    summary = run_pipeline(make_config(tmp_path, models, benchmark, engine), tmp_path)
    overall = summary["suites"]["overall"]
    for method in ("small", "large", "random", "confidence", "roro"):
        entry = overall[method]
        assert entry["n"] + entry["unscorable"] == 6 and entry["failed"] == 0, (method, entry["error"], entry)
        assert entry["accuracy"] is None or (math.isfinite(entry["accuracy"]) and entry["accuracy"] <= 0.5)
    assert "oracle" not in overall and (tmp_path / "report.html").stat().st_size > 10_000
