"""The adapters' learner in groups: the same gradient for any number of ranks, no update lost or done twice."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.multiprocessing as multiprocessing
from fakes import ScriptedEngine
from lm_ranks import run_half, run_rank, run_updates
from safetensors.torch import load_file
from test_lora import SETTINGS, make_config, make_samples, make_texts
from tiny_models import make_tiny_model

from actors.adapters import deliver
from actors.command_board import CommandBoard
from actors.engines import EngineActor, RemoteEngine
from actors.lm_learner import LmLearner
from roro_ray.config import Config
from roro_ray.engines.protocol import StepRequest
from roro_ray.errors import CheckpointError, ConfigError, EngineError, TrainingError
from roro_ray.learning.adapter_files import AdapterVersion, check_complete, read_adapter
from roro_ray.learning.lm_run import LmRun, LocalLearner
from roro_ray.learning.sft import SftBatch

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("base")))


# The board


def test_commands_stay_up_until_a_checkpoint_contains_them() -> None:
    async def main() -> None:
        board = CommandBoard()
        await board.begin(0, 7, serial=4, versions={"judge": 2}, seconds=0.1)
        assert [await board.submit((name,)) for name in "abc"] == [5, 6, 7]
        assert await board.take(5, 0.0) == ("a",) and await board.take(5, 0.0) == ("a",)
        assert await board.take(8, 0.01) is None
        await board.report(5, "done")
        await board.saved(5)
        assert await board.result(5, 0.0) == (True, "done", 1)
        # The group is started again from its checkpoint of command 5, and does 6 once more.
        await board.report(6, "first")
        await board.begin(0, 8, serial=5, versions={"judge": 3}, seconds=0.1)
        await board.report(6, "again")
        assert await board.result(6, 0.0) == (True, "first", 2)
        await board.report(6, "and again")
        assert (await board.result(6, 0.01))[0] is False
        assert await board.submit(("d",)) == 8  # numbers go on
        with pytest.raises(TrainingError, match="command 5 is no longer on the board"):
            await board.take(5, 0.0)
        facts, starts, fatal = await board.state(0.0)
        assert facts is not None and facts.pids == {0: 8} and starts == 2 and fatal is None

    asyncio.run(main())


def test_a_waiting_call_ends_with_the_news() -> None:
    async def main() -> None:
        board = CommandBoard()
        waiting = asyncio.create_task(board.take(1, 30.0)), asyncio.create_task(board.state(30.0))
        await asyncio.sleep(0)
        await board.begin(0, 7, serial=0, versions={}, seconds=0.1)
        await board.submit(("a",))
        assert (await waiting[0], (await waiting[1])[1]) == (("a",), 1)

    asyncio.run(main())


# Ranks


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one(base: str, tmp_path: Path) -> None:
    expected, expected_losses = run_updates(base, "single"), run_half(base, "single")
    # torch ends the other process where one fails.
    multiprocessing.spawn(run_rank, (2, base, str(tmp_path)), nprocs=2, join=True)
    for strategy in ("ddp", "fsdp2"):
        outcome, losses = torch.load(tmp_path / f"{strategy}.pt", weights_only=False)
        assert losses == pytest.approx(expected_losses, abs=0.02) and losses[-1] < losses[0] - 0.3
        for kind, (metrics, gradients) in outcome.items():
            own_metrics, own = expected[kind]
            assert gradients.keys() == own.keys() and len(own) == 28
            for key in own:
                assert torch.allclose(gradients[key], own[key], atol=1e-9, rtol=1e-6), (strategy, kind, key)
            assert max(float(value.abs().max()) for value in own.values()) > 1e-4
            assert metrics["passes"] <= own_metrics["passes"]
            for name in own_metrics.keys() - {"passes"}:
                assert metrics[name] == pytest.approx(own_metrics[name], rel=1e-9, abs=1e-12), (strategy, kind, name)
    # What two ranks saved, in copies or in shards, one goes on from.
    states = []
    for strategy in ("ddp", "fsdp2"):
        run = LmRun(make_config(base), tmp_path / strategy)
        assert run.serial == 2 and run.trainer.versions == {"rubricor": 0, "judge": 2}
        states.append(run.trainer.get_state("judge"))
    assert states[0].moments.keys() == states[1].moments.keys() and len(states[0].moments) == 3 * 28
    for key, value in states[0].weights.items():
        assert torch.allclose(value, states[1].weights[key], atol=1e-5), key


# The group


def make_group_config(base: str, directory: Path, **changes: Any) -> Config:
    config = Config(run_dir=str(directory), lora=make_config(base, checkpoint_every=3, timeout_s=60.0, **changes))
    config.ray.timeout_s = 30.0
    return config


def make_batches(kill: Callable[[], None] | None = None, at: int = -1) -> Iterator[SftBatch]:
    """Different batches; before the `at`-th is given, while the group learns from the one before, something dies."""
    for number in range(100):
        if number == at and kill is not None:
            kill()
        yield make_texts(seed=number)


@pytest.mark.slow
def test_a_killed_group_goes_on_and_no_update_is_lost_or_done_twice(base: str, tmp_path: Path, local_ray: None) -> None:
    straight = LocalLearner(make_config(base), tmp_path / "straight")
    expected = straight.sft("judge", make_batches(), updates=7)
    expected_grpo = straight.grpo("rubricor", make_samples(), SETTINGS)
    config = make_group_config(base, tmp_path)
    with LmLearner.start(config) as learner:
        first = learner.facts().pids

        def kill() -> None:
            os.kill(first[0], signal.SIGKILL)

        # Commands 1 to 3 are in a checkpoint, 4 is done and reported, and 5 is under way.
        metrics = learner.sft("judge", make_batches(kill, at=5), updates=7)
        assert learner.restarts == 1 and learner.facts().pids != first and learner.facts().serial == 3
        assert metrics == expected
        with pytest.raises(ConfigError, match="sequence 0 has 50 tokens"):
            learner.sft("judge", [make_texts(50)], updates=1)
        assert learner.grpo("rubricor", make_samples(), SETTINGS) == expected_grpo  # an error ends nothing
        published = learner.publish("judge")
        assert (published.name, published.version) == ("judge", 7)
        assert learner.versions == straight.versions == {"judge": 7, "rubricor": 1}
    own = Path(straight.publish("judge").path)
    check_complete(Path(published.path))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (Path(published.path) / name).read_bytes() == (own / name).read_bytes()
    with pytest.raises(TrainingError, match="was stopped"):
        learner.publish("judge")
    assert LocalLearner(config.lora, tmp_path / "adapters").versions == straight.versions  # whoever goes on from there
    config.lora.rank = 2
    with pytest.raises(CheckpointError, match=r"lora\.rank: 4 there, 2 now"):
        LmLearner.start(config)


@pytest.mark.slow
def test_two_workers_with_shards_survive_the_loss_of_one(base: str, tmp_path: Path, local_ray: None) -> None:
    straight = LocalLearner(make_config(base), tmp_path / "straight")
    expected = straight.sft("judge", make_batches(), updates=5)
    config = make_group_config(base, tmp_path, strategy="fsdp2", workers=2)
    with LmLearner.start(config) as learner:

        def kill() -> None:
            os.kill(learner.facts().pids[1], signal.SIGKILL)

        metrics = learner.sft("judge", make_batches(kill, at=3), updates=5)
        assert learner.restarts == 1
        published = learner.publish("judge")
    for one, other in zip(metrics, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4) and one["version"] == other["version"]
    weights, own = (
        load_file(Path(p.path) / "adapter_model.safetensors") for p in (published, straight.publish("judge"))
    )
    assert all(torch.allclose(weights[key], own[key], atol=1e-4) for key in own)


# To the engines


class AdapterEngine(ScriptedEngine):
    """A scripted engine that answers with the adapter that it serves."""

    def __init__(self) -> None:
        super().__init__("engine")
        self.served: dict[str, tuple[int, str]] = {}

    async def load_adapter(self, name: str, path: str, version: int) -> None:
        read_adapter(AdapterVersion(name, version, path))
        self.served[name] = version, path

    async def generate_step(self, request: StepRequest) -> Any:
        if request.adapter and request.adapter not in self.served:
            raise EngineError(f"no adapter {request.adapter!r}")
        return self.served.get(request.adapter), os.getpid()


@pytest.mark.slow
def test_every_engine_serves_what_was_delivered_also_after_a_restart(
    base: str, tmp_path: Path, local_ray: None
) -> None:
    learner = LocalLearner(make_config(base), tmp_path)
    first = learner.publish("judge")
    learner.sft("judge", make_batches(), updates=1)
    second = learner.publish("judge")
    actor = ray.remote(EngineActor).options(num_cpus=0, max_restarts=-1, max_task_retries=3)
    near, far = AdapterEngine(), RemoteEngine("engine", actor.remote(AdapterEngine), 60.0)

    async def ask() -> Any:
        return await far.generate_step(StepRequest("x", 1, adapter="judge"))

    async def main() -> None:
        await deliver(first, [near, far], "storage")
        assert near.served["judge"] == (await ask())[0] == (0, first.path)
        await deliver(second, [near, far], "objects")
        (version, path), pid = await ask()
        assert near.served["judge"][0] == version == 1
        assert second.path not in (path, near.served["judge"][1])  # each process has a copy of its own
        os.kill(pid, signal.SIGKILL)
        (version, path), other = await ask()
        assert version == 1 and other != pid
        with pytest.raises(EngineError, match="serves no adapters"):
            await deliver(second, [ScriptedEngine("plain")], "storage")

    asyncio.run(main())
    ray.kill(far.actor)
