"""PPO by RLlib: the module is the router, training learns what is known to be best, and goes on after every death."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.rllib_module import RouterModule, find_homes
from roro_ray.config import Config
from roro_ray.engines.pool import EnginePool
from roro_ray.errors import CheckpointError, ConfigError, TrainingError
from roro_ray.learning.ppo_run import METHOD, load_finished_ppo
from roro_ray.learning.router_run import read_metrics
from roro_ray.routing.gym_world import RoutingWorld
from roro_ray.routing.opinion import RouterReading
from roro_ray.routing.router_files import load_router, save_router
from roro_ray.routing.router_policy import RouterPolicy
from roro_ray.settings import load_config
from tests.scripted_world import make_engines, make_scripted_config, make_scripted_queries

TEXT_TOKENS = 160


def make_pool(config: Config, engines: Sequence[Any], marker: str = "") -> EnginePool:
    """The scripted models; with a marker, the first process that is asked for many steps dies, once."""
    del engines
    pair = make_engines()
    if marker:
        count = 0

        def fails(prefix: str) -> bool:
            nonlocal count
            count += 1
            if count == 400 and not Path(marker).exists():
                Path(marker).touch()
                os._exit(1)
            return False

        pair[0].fails = fails
    return EnginePool(pair)


def make_ppo_config(directory: Path | str) -> Config:
    """Small settings under which PPO learns the scripted world in seconds."""
    config = make_scripted_config(directory)
    config.ray.workers = 1
    config.ppo = replace(config.ppo, episodes=960, decisions=256, minibatch=128, epochs=4, envs=16, head_lr=1e-2)
    return config


def make_module(config: Config) -> tuple[RouterModule, RoutingWorld]:
    """An untrained module whose head says something (it starts near zero), and the world that it sees."""
    from gymnasium.spaces import Discrete

    from actors.rllib_algorithm import load_pieces

    pieces, vocabulary = load_pieces(config)
    world = RoutingWorld(
        *(EnginePool(make_engines()), make_scripted_queries(), config.episode, config.router),
        *(pieces, vocabulary, TEXT_TOKENS),
    )
    module = RouterModule(
        observation_space=world.observation_space, action_space=Discrete(2), model_config={"config": config}
    )
    with torch.no_grad():
        module.network.head[-1].weight.normal_(std=0.5)
    return module, world


def make_readings() -> list[RouterReading]:
    """Two episodes step by step, begun alike, and one decision twice."""
    random = np.random.default_rng(0)
    words = ["Start with 4. A: plus 03; B: double.", "A: 4 plus 3 = 7", "B: 14", "Answer: 14"]
    other = [*words[:2], "B: 7 and 7 make 14", "C: done"]
    texts = [tuple(each[:count]) for each in (words, other) for count in range(1, 5)]
    return [RouterReading(text, tuple(random.random(11).tolist())) for text in (*texts, texts[2])]


def make_batch(world: RoutingWorld, readings: Sequence[RouterReading]) -> dict[str, Any]:
    seen = [world.observe(reading.texts, reading.features) for reading in readings]
    return {"obs": {key: torch.from_numpy(np.stack([each[key] for each in seen])) for key in seen[0]}}


@pytest.mark.parametrize("encoder", ["world:encoder", ""])
def test_an_exported_router_thinks_what_the_module_thinks(encoder: str, tmp_path: Path) -> None:
    config = Config()
    config.router.encoder = encoder
    module, world = make_module(config)
    readings = make_readings()
    batch = make_batch(world, readings)
    acting = torch.softmax(module.forward_exploration(batch)["action_dist_inputs"], -1)
    learning = torch.softmax(module.forward_train(batch)["action_dist_inputs"], -1)

    async def ask() -> list[tuple[float, ...]]:
        policy = RouterPolicy(load_router(save_router(module.network, tmp_path / "router"), pool_size=2))
        opinions = await asyncio.gather(*(policy.judge_reading(reading) for reading in readings))
        return [opinion.log_probs for opinion in opinions]

    exported = torch.tensor(asyncio.run(ask())).exp()
    assert exported.std(0).min() > 1e-3, "all alike: the test would see nothing"
    torch.testing.assert_close(acting.double(), exported.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(learning.double(), exported.double(), atol=1e-5, rtol=0)


def test_new_weights_are_used_at_once() -> None:
    module, world = make_module(Config())
    batch = make_batch(world, make_readings())
    before = module.forward_exploration(batch)["action_dist_inputs"]
    other, _ = make_module(Config())
    with torch.no_grad():
        for parameter in other.network.body.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    module.set_state(other.get_state())
    after = module.forward_exploration(batch)["action_dist_inputs"]
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, other.forward_train(batch)["action_dist_inputs"], atol=1e-5, rtol=0)


def test_rows_read_together_have_the_gradient_of_rows_read_alone() -> None:
    module, world = make_module(Config())
    readings = make_readings()

    def gradients(batches: list[dict[str, Any]]) -> list[torch.Tensor]:
        module.zero_grad()
        for batch in batches:
            found = module.forward_train(batch)
            values = module.compute_values(batch, found["embeddings"])
            (found["action_dist_inputs"][:, 1].sum() + values.sum()).backward()
        return [parameter.grad.clone() for parameter in module.network.body.parameters()]

    together = gradients([make_batch(world, readings)])
    alone = gradients([make_batch(world, [reading]) for reading in readings])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_text_is_read_with_the_longest_that_continues_it() -> None:
    random = np.random.default_rng(1)
    ids = random.integers(0, 3, (60, 6)).astype(np.int32)
    lengths = random.integers(1, 7, 60)
    texts = [tuple(row[:count]) for row, count in zip(ids, lengths, strict=True)]
    for row, home in enumerate(find_homes(ids, lengths)):
        assert texts[home][: len(texts[row])] == texts[row]
        assert find_homes(ids, lengths)[home] == home
        mine = [text for text in texts if text[: len(texts[home])] == texts[home]]
        assert all(text == texts[home] for text in mine), "a home could itself be read with a longer text"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("ppo.minibatch=2000", "ppo.decisions"),
        ("ppo.epochs=0", "ppo.epochs"),
        ("ppo.clip=0", "ppo.clip"),
        ("ppo.gae_lambda=1.5", "ppo.gae_lambda"),
        ("ppo.episodes=-1", "ppo.episodes"),
    ],
)
def test_settings_that_cannot_work_are_refused(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config([override])


def greedy_choices(directory: Path) -> list[tuple[int, ...]]:
    """What the saved router does on some queries at a low cost weight."""
    from roro_ray.routing.episode import EpisodeSpec
    from roro_ray.routing.runner import Runner

    runner = Runner(EnginePool(make_engines()), RouterPolicy(load_router(directory, 2)), Config().episode)
    specs = [EpisodeSpec(q.id, q, "router_greedy", cost_weight=0.2) for q in make_scripted_queries()]
    return [tuple(step.model for step in found.steps) for found in asyncio.run(runner.run(specs))]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ppo_learns_the_optimum_though_an_env_runner_is_killed(local_ray: None, tmp_path: Path) -> None:
    from actors.rllib import train_ppo

    config = make_ppo_config(tmp_path)
    config.ray.workers = 2
    marker = tmp_path / "killed"
    result = train_ppo(
        config, tmp_path, queries=make_scripted_queries(), make_pool=partial(make_pool, marker=str(marker))
    )
    assert marker.exists(), "nobody was killed"
    assert result.restarts >= 1
    rows = result.finished.metrics
    assert 960 <= sum(row["episodes"] for row in rows) < 960 + 64
    assert rows[0]["outcome"] < 0.6 and rows[-1]["outcome"] > 0.9
    assert set(greedy_choices(result.router_dir)) == {(0, 1, 0, 0)}, "only the hard step needs the large model"
    assert {0, 4, 30} <= set(result.finished.snapshots)
    assert set(greedy_choices(result.finished.snapshots[0])) == {(0, 0, 0, 0)}, "before training"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_training_that_was_stopped_goes_on_from_its_checkpoint(local_ray: None, tmp_path: Path) -> None:
    from actors.rllib import train_ppo

    class Stop(Exception):
        """The job is killed."""

    def stop(done: int, total: int, metrics: dict[str, float]) -> None:
        if metrics["iteration"] == 11:
            raise Stop

    config, queries = make_ppo_config(tmp_path), make_scripted_queries()
    config.ppo.episodes = 960
    train = partial(train_ppo, config, tmp_path, queries=queries, make_pool=make_pool)
    with pytest.raises(Stop):
        train(stop)
    before = read_metrics(tmp_path / "router" / METHOD / "metrics.jsonl")
    assert [row["iteration"] for row in before] == list(range(1, 12))
    told: list[float] = []
    result = train(lambda done, total, metrics: told.append(metrics["iteration"]))
    assert told[0] == 10, "the last checkpoint is of iteration 9"
    rows = read_metrics(result.router_dir / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[:9] == before[:9]
    assert rows[9]["entropy"] < min(row["entropy"] for row in rows[:3]), "not begun anew"
    assert 960 <= sum(row["episodes"] for row in rows) < 960 + 64
    assert train(lambda *_: pytest.fail("finished work was done again")).router_dir == result.router_dir
    with pytest.raises(CheckpointError, match=r"ppo\.head_lr"):
        load_finished_ppo(result.router_dir, replace(config, ppo=replace(config.ppo, head_lr=0.5)))


class EmptyAlgorithm:
    """An RLlib whose env runners never end an episode."""

    def __init__(self, network: Any) -> None:
        self.learner_group = self.env_runner_group = self
        self.network = network
        self.stopped = False

    def get_module(self) -> EmptyAlgorithm:
        return self

    def foreach_learner(self, function: Any) -> None:
        return None

    def num_remote_worker_restarts(self) -> int:
        return 0

    def train(self) -> dict[str, Any]:
        return {"env_runners": {"routing": {"episodes": 3.0, "failed": 3.0}}}

    def save_to_path(self, path: str) -> None:
        Path(path, "file").touch()

    def stop(self) -> None:
        self.stopped = True


def test_a_world_in_which_nothing_is_scored_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actors import rllib

    config = make_ppo_config(tmp_path)
    algorithm = EmptyAlgorithm(make_module(config)[0].network)
    monkeypatch.setattr(rllib, "make_algorithm", lambda *_: algorithm)
    training = rllib._Training(config, tmp_path / "ppo", make_scripted_queries(), (), make_pool, None)
    with pytest.raises(TrainingError, match=r"no episode was scored in 5 iterations \(3 failed in the last\)"):
        training.run()
    assert algorithm.stopped and not (tmp_path / "ppo" / "FINISHED.json").exists()
    assert all(np.isnan(row["reward"]) for row in read_metrics(tmp_path / "ppo" / "metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_job_trains_a_router_that_loads(local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from jobs.train_ppo import main

    run = tmp_path / "run"
    overrides = [f"run_dir={run}", "data.suites=[chain]", "data.router_queries=8", "ray.workers=1", "ppo.episodes=24"]
    overrides += ["ppo.decisions=80", "ppo.minibatch=80", "ppo.epochs=1", "ppo.envs=8", "evaluate.every=1"]
    assert main([*overrides, "router.queries=4", "router.group_size=2"]) == 0
    router = load_router(run / "router" / METHOD, pool_size=2)
    assert router.body is not None and router.version >= 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line.get("stage") == "train_ppo" and "reward" in line]
    assert sum(row["episodes"] for row in rows) >= 24
    assert all(0 <= row["large_share"] <= 1 and row["failed"] == 0 for row in rows)
    assert main([f"run_dir={run}"]) == 0
    assert "already done" in capsys.readouterr().err
    assert main([f"run_dir={run}", "ppo.head_lr=0.1"]) == 2
    assert "train_ppo was made with ppo.head_lr" in capsys.readouterr().err
