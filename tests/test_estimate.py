"""The estimate of --dry-run, held against figures worked out by hand on round numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import costs
from roro_ray.config import Config
from roro_ray.estimate.costs import make_cost_table
from roro_ray.estimate.describe import describe_estimate, show_count
from roro_ray.estimate.memory import check_together, count_adapter, plan_roles, stage_gpus
from roro_ray.estimate.speed import measure_speed, stage_dollars, stage_hours
from roro_ray.estimate.work import ROUTER, episode_load, plan_stages, strategy_shares
from roro_ray.settings import load_config

pytestmark = pytest.mark.timeout(30)
GIB = 2**30
ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model of a billion parameters, as far as its papers say."""
    shape = {"hidden_size": 1000, "num_attention_heads": 10, "num_key_value_heads": 5, "num_hidden_layers": 10}
    (tmp_path / "config.json").write_text(
        json.dumps({**shape, "intermediate_size": 3000, "vocab_size": 50_000, "max_position_embeddings": 9000})
    )
    (tmp_path / "facts.json").write_text('{"parameters": 1000000000}')
    return str(tmp_path)


def configure(model: str, *overrides: str) -> Config:
    engines = (
        f"pool.models=[{{name: a, path: {model}, engine: vllm, device: cuda, dtype: bfloat16, gpus: 1, "
        f"memory_fraction: 0.5}}, {{name: b, path: {model}, engine: vllm, device: cuda, dtype: bfloat16, gpus: 2, "
        "tensor_parallel: 2, memory_fraction: 0.9}]"
    )
    base = ["pool.placement=actors", "episode.max_tokens=8000", "episode.max_step_tokens=1000", "router.encoder="]
    assumed = ["estimate.tokens=1000", "estimate.step_tokens=100", "estimate.prompt_tokens=200"]
    return load_config([engines, *base, "episode.max_steps=100", *assumed, *overrides])


def test_each_strategy_has_the_shares_that_its_policy_gives() -> None:
    assert strategy_shares("fixed:1", 2, 0.4) == (0.0, 1.0)
    assert strategy_shares("random:0.3", 2, 0.4) == (0.7, 0.3)
    assert strategy_shares("random:0.3", 3, 0.4) == (0.7, 0.15, 0.15)
    assert strategy_shares("blocks:8", 3, 0.4) == (0.5, 0.0, 0.5)
    assert strategy_shares("periodic:4", 2, 0.4) == (0.75, 0.25)
    assert strategy_shares("router", 2, 0.4) == strategy_shares("confidence:0.9", 2, 0.4) == (0.6, 0.4)


def test_a_model_reads_what_it_did_not_write_once_and_is_sent_its_prefix_at_every_step(model: str) -> None:
    load = episode_load(configure(model), "random:0.25")
    assert (load["a"].read, load["a"].written) == (200 + 250, 750)
    assert (load["b"].read, load["b"].written) == (200 + 750, 250)
    assert load["b"].sent == 2.5 * (200 + 500)  # its steps, each after half a trajectory on average
    alone = episode_load(configure(model), "fixed:0")
    assert alone.keys() == {"a"} and (alone["a"].read, alone["a"].written) == (200, 1000)


def test_drafts_are_written_and_thrown_away_and_the_router_reads_once(model: str) -> None:
    drafted = episode_load(configure(model, "estimate.large_share=0.4"), "confidence:0.9")
    assert drafted["a"].written == 1000 and drafted["b"].written == 400
    routed = episode_load(configure(model, f"router.encoder={model}"), "router")
    assert routed[ROUTER].read == 1200 and routed[ROUTER].written == 0


def test_the_final_answer_is_the_large_models(model: str) -> None:
    config = configure(model, "estimate.answer_tokens=90")
    for entry in config.pool.models:
        entry.format = "chat"
    load = episode_load(config, "fixed:0")
    assert (load["b"].read, load["b"].written) == (1200, 90)
    config.episode.answer_by = "last"
    assert episode_load(config, "fixed:0").keys() == {"a"}


def test_memory_is_weights_and_a_reserve_and_the_rest_is_keys_and_values(model: str) -> None:
    first, second = plan_roles(configure(model, "ray.gpu_memory_gb=80"))
    assert first.parts["weights"] == 2e9 and second.parts["weights"] == 1e9  # two GPUs share it
    assert first.kv_token == 2 * 10 * 500 * 2  # keys and values, layers, width, bytes
    assert first.kv_room == 0.5 * 80 * GIB - 2e9 - 2 * GIB
    assert second.kv_room == 2 * (0.9 * 80 * GIB - 1e9 - 2 * GIB)
    assert stage_gpus([first, second])["collect"] == 3 and "learn_reward" not in stage_gpus([first, second])


def test_what_does_not_fit_is_told(model: str) -> None:
    config = configure(model, "ray.gpu_memory_gb=4")
    (warning, *_) = plan_roles(config)[0].warnings
    assert "engine a" in warning and "3.9 GiB" in warning and "2.0 of 4" in warning and "memory_fraction" in warning
    assert any(line.startswith("WARNING") for line in describe_estimate(config))


def test_processes_that_share_a_gpu_may_not_ask_for_more_than_it_has(model: str) -> None:
    config = configure(model)
    config.pool.models[1].tensor_parallel = 1
    for entry, fraction in zip(config.pool.models, (0.5, 0.47), strict=True):
        entry.gpus, entry.memory_fraction = 0.5, fraction
    assert "a, engine b share one GPU" in check_together(plan_roles(config), 80 * GIB)[0]
    config.pool.models[1].memory_fraction = 0.4
    assert check_together(plan_roles(config), 80 * GIB) == []


def test_an_adapter_has_two_factors_for_each_linear_layer(model: str) -> None:
    config = configure(model, "reward.backend=engine", "reward.engine.adapters=2", f"lora.base={model}", "lora.gpus=1")
    learner = next(role for role in plan_roles(config) if role.name == "LoRA learner")
    assert learner.shape is not None
    each = (1000 + 1000) * 2 + (1000 + 500) * 2 + 3 * (1000 + 3000)  # q and o, k and v, gate up and down
    assert count_adapter(learner.shape, 8) == 8 * 10 * each
    assert learner.parts["base"] == 2e9 and learner.parts["two adapters and their optimiser"] == 2 * 16 * 16 * 10 * each


def test_speed_follows_from_flops_and_bandwidth(model: str) -> None:
    config = configure(model, "estimate.gpu_tflops=100", "estimate.gpu_bandwidth=1", "estimate.write_utilisation=0.5")
    config.estimate.read_utilisation = 0.4
    role = plan_roles(config)[0]
    alone = measure_speed(role, 1, 0, config.estimate, 8.0)
    assert alone.reads == pytest.approx(100e12 * 0.4 / 2e9)
    assert alone.writes == pytest.approx(0.5e12 / 2e9)  # the weights once a token
    assert alone.trains == pytest.approx(100e12 * config.estimate.train_utilisation / 8e9)
    many = measure_speed(role, 40, 1000, config.estimate, 8.0)
    assert many.together == 40 and many.writes == pytest.approx(40 * 0.5e12 / (2e9 + 40 * 1000 * 20_000))
    full = measure_speed(role, 10_000, 8000, config.estimate, 8.0)
    assert full.together == pytest.approx(role.kv_room / (8000 * 20_000))
    bound = measure_speed(role, 200, 1, config.estimate, 8.0)
    assert bound.writes == pytest.approx(100e12 * 0.4 / 2e9, rel=0.01)  # by FLOPs, not by bandwidth


def test_roles_work_side_by_side_share_a_gpu_in_turn_and_wait_for_the_learner() -> None:
    busy = {"engine a": 100.0, "engine b": 300.0, "learner": 60.0}
    assert stage_hours(busy, ("learner",), (), 1.0) == pytest.approx(360 / 3600)
    assert stage_hours(busy, ("learner",), ("engine a", "engine b"), 1.5) == pytest.approx(1.5 * 460 / 3600)


def test_dollars_are_for_tokens_read_sent_again_and_written(model: str) -> None:
    config = configure(model, "collect.strategies=[fixed:1]", "data.suites=[chain]", "data.train_queries=10")
    config.pool.models[1].price_in, config.pool.models[1].price_cached = 3.0, 1.0
    config.pool.models[1].price_out = 5.0
    collect = plan_stages(config)[0]
    again = 10 * (200 + 500) - 200  # ten steps
    assert stage_dollars(collect, config) == pytest.approx(10 * (200 * 3 + again * 1 + 1000 * 5) / 1e6)


def test_stages_count_what_the_plan_counts(model: str) -> None:
    config = configure(model, "pairs.process_source=confidence")
    stages = {stage.name: stage for stage in plan_stages(config)}
    assert stages["collect"].episodes == 3200 and stages["train_router"].episodes == 3840
    assert stages["make_pairs"].episodes == 0 and not stages["make_pairs"].work
    config.pairs.process_source = "interventions"
    config.estimate.process_share = 0.5
    pairs = plan_stages(config)[1]
    assert pairs.episodes == 3200 * 0.5 * 10 * 2  # trajectories measured, steps, two ways to go on
    assert pairs.work["b"].written == pairs.episodes * 500


def test_an_unknown_model_stays_unknown(model: str) -> None:
    config = configure(model)
    config.pool.models[1].path = "nobody/nothing"
    text = "\n".join(describe_estimate(config))
    assert "b: unknown (no config.json" in text and "without the models that are unknown" in text
    assert "memory       engine b: unknown" in text


def test_the_embedded_world_in_memory_is_not_estimated() -> None:
    assert describe_estimate(Config()) == []


def test_counts_are_short() -> None:
    assert [show_count(value) for value in (12, 3_400, 1.72e9, 2e18)] == ["12 ", "3.4 k", "1.72 G", "2 E"]


def test_the_cost_table_sets_flops_beside_prices(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(model)
    config.pool.models[1].price_in, config.pool.models[1].price_out = 1.0, 4.0
    table = make_cost_table(config).splitlines()
    small, large = table[1].split(), table[2].split()
    assert small == ["a", "1", "G", "1", "G", "2", "G", "20", "9000", "-", "-", "-", "-"]
    assert large[-4:] == ["1", "-", "4", "2"]  # 4e-6 USD for 2e9 FLOP is 2 USD a PFLOP
    alone = next(line for line in table if line.startswith("b alone")).split()
    assert alone[2:5] == ["2.4", "T", "1.00"]  # 1,200 tokens x 2 GFLOP
    assert alone[6:] == ["1.00", "0.00420", "1.00"]  # 200 x 1 + 1,000 x 4 micro-USD
    speed = measure_speed(plan_roles(config)[1], 512, 200 + 500, config.estimate, 0.0)
    assert float(alone[5]) == pytest.approx(2 * (200 / speed.reads + 1000 / speed.writes), rel=0.01)  # on two GPUs
    assert costs.main(["--config", str(ROOT / "configs" / "api_pair.yaml")]) == 0
    assert "USD/PFLOP" in capsys.readouterr().out
    assert costs.main(["pool.modles=[]"]) == 2 and "did you mean" in capsys.readouterr().err
