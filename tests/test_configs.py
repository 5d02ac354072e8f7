"""The settings in configs/: they parse without a warning, fit their GPUs, and every job can plan with them."""

from __future__ import annotations

import importlib
import re
import socket
import warnings
from pathlib import Path

import pytest

from roro_ray.config import Config
from roro_ray.engines.shapes import read_shape
from roro_ray.errors import ConfigError
from roro_ray.estimate.memory import check_together, plan_roles, stage_gpus
from roro_ray.settings import load_config

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
ON_GPUS = {"same_family", "cross_family", "one_gpu", "three_models"}
VERBS = ("collect", "make_pairs", "learn_reward", "train_router", "evaluate", "calibrate", "demo", "compare")
GIB = 2**30


def load(name: str) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a setting that another makes idle has no place in a file to be copied
        return load_config([], ROOT / "configs" / f"{name}.yaml")


def test_the_files_are_those_that_the_documents_name() -> None:
    assert {file.stem for file in FILES} == ON_GPUS | {"api_pair", "tiny_vllm", "cluster"}
    documents = {file.stem: "cluster.md" if file.stem == "cluster" else "real-models.md" for file in FILES}
    for name, document in documents.items():
        assert f"configs/{name}.yaml" in (ROOT / "docs" / document).read_text("utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_parses_and_writes_to_a_run_of_its_own_name(file: Path) -> None:
    assert load(file.stem).run_dir == f"runs/{file.stem}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_explains_itself(file: Path) -> None:
    lines = file.read_text("utf-8").splitlines()
    comments = [line for line in lines if "#" in line]
    assert lines[0].startswith("# ") and len(comments) > 6
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_job_plans_with_every_config_and_asks_nobody(
    file: Path, verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    module = importlib.import_module(f"jobs.{verb}")
    assert module.main(["--dry-run", "--config", str(file), f"run_dir={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert "WARNING" not in printed and not (tmp_path / "run").exists()
    assert "assumed      " in printed and re.search(r"collect: [\d,]+ episodes", printed)
    if file.stem in ON_GPUS | {"cluster"}:
        assert "GPU hours in all" in printed and "unknown" not in printed
    if file.stem == "api_pair":
        assert "USD in all" in printed and "GPUs         none" in printed


@pytest.mark.parametrize("name", sorted(ON_GPUS))
def test_a_gpu_config_asks_for_no_more_than_its_gpus_have(name: str) -> None:
    config = load(name)
    roles = plan_roles(config)
    held = stage_gpus(roles)
    assert max(held.values()) <= (1 if name == "one_gpu" else 8)
    assert all(role.shape is not None and not role.warnings for role in roles)
    assert check_together(roles, config.ray.gpu_memory_gb * GIB) == []
    for role in roles:  # room for at least one trajectory of full length
        if role.kv_token:
            assert role.kv_room / role.kv_token > config.episode.max_tokens + config.episode.max_answer_tokens


def test_the_processes_on_one_gpu_share_out_at_most_095_of_its_memory() -> None:
    config = load("one_gpu")
    fractions = [model.memory_fraction for model in (*config.pool.models, config.reward.engine)]
    others = [role.needed for role in plan_roles(config) if role.name in ("rollout workers", "router learner")]
    assert len(others) == 2
    assert sum(fractions) + sum(others) / (config.ray.gpu_memory_gb * GIB) <= 0.95


@pytest.mark.parametrize("name", sorted(ON_GPUS))
def test_reasoning_is_not_cut_off(name: str) -> None:
    config = load(name)
    episode = config.episode
    assert episode.max_tokens >= 16_384 and episode.max_steps * episode.min_step_tokens >= episode.max_tokens
    assert r"\boxed{}" in episode.instruction and episode.answer_by == "large"
    longest = episode.max_tokens + episode.max_answer_tokens + 1024
    for model in config.pool.models:
        shape = read_shape(model.path)
        assert shape is not None and longest <= model.max_context <= shape.max_context
        assert (model.engine, model.format, model.thinking) == ("vllm", "chat", "on")
    # The Judge reads a whole trajectory, and what the learner packs is at least as long.
    assert episode.max_tokens < config.reward.judge_tokens < config.lora.token_budget < config.reward.engine.max_context
    assert config.lora.rank <= config.reward.engine.adapter_rank


def test_the_models_are_those_that_were_asked_for() -> None:
    pools = {name: [model.path for model in load(name).pool.models] for name in ON_GPUS}
    assert pools == {
        "same_family": ["Qwen/Qwen3-1.7B", "Qwen/Qwen3-14B"],
        "cross_family": ["Qwen/Qwen3-1.7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"],
        "one_gpu": ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"],
        "three_models": ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", "Qwen/Qwen3-14B"],
    }
    for name in ON_GPUS:
        config = load(name)
        assert config.router.encoder == "Qwen/Qwen3-0.6B" and config.lora.base == "Qwen/Qwen3-4B"


def test_a_model_that_is_spread_over_gpus_asks_for_them_all() -> None:
    with pytest.raises(ConfigError, match=r"gpus=1.* and tensor_parallel=2 contradict"):
        load_config(["pool.models[1].gpus=1"], ROOT / "configs" / "same_family.yaml")
    for name in ON_GPUS:
        config = load(name)
        assert all(model.tensor_parallel <= max(model.gpus, 1) for model in config.pool.models)
