"""Checkpoints: whole or not there, and clear words where one does not fit."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest
import torch

from roro_ray.config import Config
from roro_ray.errors import CheckpointError
from roro_ray.learning.checkpoints import (
    MARKER,
    IncompleteCheckpointWarning,
    check_complete,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from roro_ray.learning.router_training import RouterTrainer
from roro_ray.routing.router import make_router
from tests.scripted_world import make_scripted_config

SETTINGS = {"seed": 0, "beta": 1.0}


def make_trainer(config: Config | None = None, iteration: int = 0) -> RouterTrainer:
    """A trainer that has a router, a used optimizer and nothing to roll out with."""
    config = config or make_scripted_config()
    torch.manual_seed(iteration)
    network = make_router(config.router, 2)
    trainer = RouterTrainer(config, network, [], lambda specs, version: [], None, lambda state, version: None)
    network.head[0].weight.grad = torch.randn_like(network.head[0].weight)
    trainer.optimizer.step()
    trainer.iteration = iteration
    return trainer


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = make_trainer(iteration=7)
    saved.past = {6: {name: value + 1 for name, value in saved.network.state_dict().items()}}
    random.seed(3)
    save_checkpoint(tmp_path, saved, SETTINGS)
    expected = (torch.rand(3), random.random())

    torch.manual_seed(99)
    random.seed(99)
    loaded = make_trainer(iteration=1)
    assert not same(loaded.network.state_dict(), saved.network.state_dict())
    load_checkpoint(tmp_path / "iteration_000007", loaded, SETTINGS)
    assert loaded.iteration == 7
    assert same(loaded.network.state_dict(), saved.network.state_dict())
    assert same(loaded.past[6], saved.past[6])
    moments, expected_moments = (t.optimizer.state_dict()["state"][0] for t in (loaded, saved))
    assert torch.equal(moments["exp_avg"], expected_moments["exp_avg"]) and moments["step"] == expected_moments["step"]
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        save_checkpoint(tmp_path, make_trainer(iteration=iteration), SETTINGS, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["iteration_000002", "iteration_000003"]


def test_none_yet(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "missing") is None


def test_a_killed_save_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, make_trainer(iteration=1), SETTINGS)

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("roro_ray.learning.checkpoints._sync", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, make_trainer(iteration=2), SETTINGS)
    assert find_checkpoint(tmp_path) == tmp_path / "iteration_000001"


@pytest.mark.parametrize("damage", ["marker", "missing", "short", "changed"])
def test_an_incomplete_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, make_trainer(iteration=1), SETTINGS)
    newest = save_checkpoint(tmp_path, make_trainer(iteration=2), SETTINGS)
    weights = newest / "router.safetensors"
    data = weights.read_bytes()
    if damage == "marker":
        (newest / MARKER).unlink()
    elif damage == "missing":
        weights.unlink()
    elif damage == "short":
        weights.write_bytes(data[:-8])
    else:
        weights.write_bytes(data[:-8] + bytes(8))
    with pytest.raises(CheckpointError, match=r"router\.safetensors|marker"):
        check_complete(newest)
    with pytest.warns(IncompleteCheckpointWarning, match="passed over"):
        assert find_checkpoint(tmp_path) == tmp_path / "iteration_000001"


def test_another_shape(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_trainer(iteration=1), SETTINGS)
    config = make_scripted_config()
    config.router.hidden = 24
    trainer = make_trainer(config)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"head.0.weight is \[16, 11\], expected \[24, 11\]") as caught:
        load_checkpoint(path, trainer, SETTINGS)
    assert str(path) in str(caught.value)
    assert same(trainer.network.state_dict(), before)


def test_other_settings(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_trainer(iteration=1), SETTINGS)
    with pytest.raises(CheckpointError, match=r"beta: 1\.0 there, 0\.5 now"):
        load_checkpoint(path, make_trainer(), {**SETTINGS, "beta": 0.5})


def test_unreadable_state(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_trainer(iteration=1), SETTINGS)
    (path / "state.json").write_text("{")
    marker = json.loads((path / MARKER).read_text())
    del marker["state.json"]  # as if it had been whole when it was written
    (path / MARKER).write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="unreadable"):
        load_checkpoint(path, make_trainer(), SETTINGS)


def test_saving_again_replaces(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_trainer(iteration=1), SETTINGS)
    again = make_trainer(iteration=1)
    with torch.no_grad():
        again.network.head[0].weight.fill_(0.25)
    path = save_checkpoint(tmp_path, again, SETTINGS)
    loaded = make_trainer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint(tmp_path) == path
    load_checkpoint(path, loaded, SETTINGS)
    assert bool((loaded.network.head[0].weight == 0.25).all())
