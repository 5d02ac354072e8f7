"""Learning the reward as adapters while its engine and its learner are killed: no update is lost or done twice."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_engine_reward_jobs import make_run
from test_faults import faults_of, storm

import actors.reward_engine
from actors.engines import make_model_engine
from actors.lm_learner import LmLearner
from jobs.stages import reward_stage
from roro_ray.config import Config, ModelConfig, PoolConfig
from roro_ray.data.run_dir import RunDir, read_json, read_metrics
from roro_ray.engines.loading import load_tokenizer
from roro_ray.learning.lm_run import LocalLearner
from roro_ray.reward.engine_alternate import alternate_engine
from roro_ray.reward.engine_batches import make_codec
from roro_ray.reward.engine_reward import open_engine_reward, resolve_reward
from roro_ray.reward.pair_store import index_pairs
from tests.witness import WatchedEngine, Witness

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


class WatchedModel(WatchedEngine):
    """A real engine, witnessed; what else it can do, it does."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def make_watched_model(witness: Witness, model: ModelConfig, pool: PoolConfig) -> WatchedModel:
    return WatchedModel(make_model_engine(model, pool), witness, "engine")


def learn_straight(config: Config, run: RunDir) -> tuple[Any, Any]:
    """The same in this process, undisturbed: the versions learned, and the updates' metrics."""
    from roro_ray.data.collection import training_queries

    items = index_pairs(training_queries(config), run.trajectories, run.pairs)
    reward = open_engine_reward(resolve_reward(config))
    learner = LocalLearner(config.lora, run.path / "adapters", seed=config.seed)
    tokenizer = load_tokenizer(config.lora.base, "")
    updates: list[dict[str, Any]] = []
    try:
        trained, _ = alternate_engine(
            *(reward, learner, make_codec(tokenizer, reward), items, config.pairs.folds, config.seed),
            *(run.reward / "rounds", updates.append),
        )
    finally:
        reward.close()
    return trained, updates


def test_learn_reward(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "witness").mkdir()
    witness = Witness(str(tmp_path / "witness"))
    config, run = make_run(tmp_path / "run")
    config.reward.judge_updates = 2
    monkeypatch.setattr(
        *("actors.reward_engine.open_model",),
        partial(actors.reward_engine.open_model, make=partial(make_watched_model, witness)),
    )
    learners: list[LmLearner] = []
    start = LmLearner.start

    def catch(*args: Any) -> LmLearner:
        learners.append(start(*args))
        return learners[0]

    monkeypatch.setattr(LmLearner, "start", catch)

    def strike_learner() -> None:
        """Behind the first update, which no checkpoint contains yet."""
        while not any(line.get("phase") == "judge" for line in read_metrics(run.metrics_file)):
            time.sleep(0.05)
        os.kill(learners[0].facts().pids[0], signal.SIGKILL)

    with storm(lambda: witness.kill("engine"), strike_learner, lambda: witness.kill("engine")):
        reward_stage(config, run)
    faults = faults_of(run, "learn_reward")
    assert faults["engine_deaths"] == 2 and faults["learner_restarts"] == 1

    told = [line for line in read_metrics(run.metrics_file) if line.get("round") == 0]
    assert [(line["phase"], line["update"]) for line in told] == [("judge", 0), ("judge", 1), ("rubricor", 0)]
    facts = read_json(run.reward / "model" / "reward.json")
    assert (facts["rubricor_version"], facts["judge_version"]) == (1, 2), "each update once"

    other, straight = make_run(tmp_path / "straight")
    other.reward.judge_updates = 2
    trained, updates = learn_straight(other, straight)
    # In float32 the engine's last bits depend on what shares a batch: equal but for rounding.
    assert [line["loss"] for line in told] == pytest.approx([line["loss"] for line in updates], abs=1e-3)
    for name, adapter in (("rubricor", trained.rubricor), ("judge", trained.judge)):
        expected = load_file(Path(adapter.path) / "adapter_model.safetensors")
        found = load_file(
            next((run.path / "adapters").rglob(f"{name}/version_{adapter.version:06d}")) / "adapter_model.safetensors"
        )
        for key, value in expected.items():
            assert float((found[key] - value).abs().max()) < 1e-2, (name, key)
