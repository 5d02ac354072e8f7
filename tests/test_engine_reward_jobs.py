"""The stages of a reward of adapters with their actors: warm start, learning, and the service, on a tiny base."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from reward_engines import RewardEngine
from simulated import SimulatedRunner
from stored_pairs import StrongWriter

from actors.reward_service import RewardClient
from jobs import reward_stages
from jobs.reward_stages import find_reward, warm_stage
from jobs.stages import reward_stage
from roro_ray.config import Config, PairsConfig
from roro_ray.data.collection import training_queries
from roro_ray.data.run_dir import RunDir, open_run, read_metrics
from roro_ray.data.store import save_pairs, save_trajectories
from roro_ray.errors import ConfigError
from roro_ray.reward.pair_records import RecordCache
from roro_ray.reward.pairs import make_pairs
from roro_ray.reward.warm_run import write_warm_rubrics
from roro_ray.settings import load_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SETTINGS = (
    *("data.suites=[chain]", "data.train_queries=8", "ray.timeout_s=200", "ray.engine_cpus=0.2", "ray.reward_cpus=0.2"),
    *("lora.base=world:rubricor", "lora.dtype=float32", "lora.rank=4", "lora.token_budget=2048", "lora.sft_updates=2"),
    *("lora.cpus=0.2", "reward.backend=engine", "reward.rounds=1", "reward.judge_updates=1"),
    *("reward.rubricor_updates=1", "reward.queries_per_update=2", "reward.rubrics_per_query=3"),
    *("reward.rubric_tokens=96", "reward.judge_tokens=900", "warm.max_pairs=4", "warm.max_tokens=48", "warm.batch=4"),
)


def make_run(directory: Path) -> tuple[Config, RunDir]:
    """A run whose first two stages are done, by simulation."""
    config = load_config([*SETTINGS, f"run_dir={directory}"])
    run = open_run(config)
    runner = SimulatedRunner(("chain",), config.data.train_queries, seed=config.data.seed)
    assert runner.queries == training_queries(config)
    trajectories = runner.collect()
    save_trajectories(run.trajectories / "chain-00000.parquet", trajectories)
    save_pairs(run.pairs / "chain-00000.parquet", make_pairs(runner.queries, trajectories, PairsConfig()))
    run.mark_done("collect")
    run.mark_done("make_pairs")
    return config, run


def test_warm_start_learning_and_service(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = make_run(tmp_path / "run")
    # The pool's tiny large model writes nothing that is kept: the stage says so, and counts what it was paid for.
    with pytest.raises(ConfigError, match="no rubric was kept"):
        warm_stage(config, run)
    counts = json.loads((run.path / "warm" / "counts.json").read_text())
    assert counts["pairs"] == 4 and counts["consistent"] == 0 and counts["tokens_out"] > 0
    assert len(RecordCache(run.path / "warm" / "rubrics.jsonl")) == 4 and not run.is_done("warm_start")

    strong = StrongWriter()

    def write(config: Config, run: RunDir, items: list) -> list:  # type: ignore[type-arg]
        cache = RecordCache(run.path / "warm" / "strong.jsonl")
        return asyncio.run(write_warm_rubrics(config, RewardEngine(strong.write, strong.prefer), items, cache))

    monkeypatch.setattr(reward_stages, "_write", write)
    warm_stage(config, run)
    facts = json.loads((run.path / "warm" / "model" / "reward.json").read_text())
    assert facts["backend"] == "engine" and (facts["rubricor_version"], facts["judge_version"]) == (2, 2)
    assert run.done_facts("warm_start")["consistent"] >= 3

    reward_stage(config, run)
    stages = [(line["phase"], line["update"]) for line in read_metrics(run.metrics_file) if line.get("round") == 0]
    assert stages == [("judge", 0), ("rubricor", 0)]
    summary = json.loads((run.reward / "result.json").read_text())
    assert {"untrained", "warm", "trained", "shuffled_rubrics"} <= set(summary["pair_accuracy"])
    facts = json.loads((run.reward / "model" / "reward.json").read_text())
    assert (facts["rubricor_version"], facts["judge_version"]) == (3, 3), "learning went on with the warm start"

    queries = training_queries(config)[:2]
    groups = [[t for t in SimulatedRunner(("chain",), 8, seed=0).collect() if t.query_id == q.id] for q in queries]
    client = RewardClient.start(config, find_reward(config, run))
    try:
        assert client.facts().version == 6
        verdicts = client.score(queries, groups)
    finally:
        client.stop()
    assert [len(group) for group in verdicts] == [len(group) for group in groups]
    scored = [verdict for group in verdicts for verdict in group if verdict.error is None]
    assert scored and all(-1 <= verdict.score <= 1 and verdict.version == 3 for verdict in scored)
