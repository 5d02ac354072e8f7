"""Settings of placement: what is refused, what is warned of, and what --dry-run tells of them."""

from __future__ import annotations

import pytest

from roro_ray.errors import ConfigError
from roro_ray.plan import describe_plan
from roro_ray.settings import load_config


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "ray.resources={rolout: {slot: 1}}",
            r"ray.resources: 'rolout' is neither a role nor a model.*did you mean 'rollout'",
        ),
        (
            "ray.labels={lerner: {tier: gpu}}",
            r"ray.labels: 'lerner' is neither .*one of rollout, learner, reward, engine, .*",
        ),
        ("ray.labels={smal: {tier: gpu}}", r"'smal' is neither a role nor a model.*did you mean 'small'"),
        ("ray.resources={rollout: {GPU: 1}}", r"ray.resources.rollout.GPU: GPUs are asked for by ray.worker_gpus"),
        ("ray.resources={rollout: {slot: 0}}", r"ray.resources.rollout.slot: got 0, expected a number from 0.0001"),
        ("ray.resources={rollout: {slot: -1}}", r"ray.resources.rollout.slot: got -1, expected a number"),
        ("ray.resources={rollout: {slot: inf}}", r"ray.resources.rollout.slot: got inf, expected a number"),
        ("ray.resources={rollout: {slot: nan}}", r"ray.resources.rollout.slot: got nan, expected a number"),
        (
            "ray.labels={rollout: {tier: 'in()'}}",
            r"ray.labels.rollout.tier: got 'in\(\)', expected a value such as gpu, !gpu",
        ),
        ("ray.labels={rollout: {tier: 'a b'}}", r"ray.labels.rollout.tier: got 'a b', expected"),
        (
            "ray.labels={rollout: {-tier: a}}",
            r"ray.labels.rollout: got the label '-tier', expected a name such as tier",
        ),
        ("ray.grow_timeout_s=-1", r"ray.grow_timeout_s: got -1, expected at least 0"),
    ],
)
def test_placement_that_cannot_work_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config([override])


def test_a_model_that_is_named_like_another_role_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a model is named 'learner', as is a role of ray\.resources"):
        load_config(["pool.models[0].name=learner", "ray.labels={rollout: {tier: cheap}}"])


@pytest.mark.parametrize("selector", ["gpu", "!gpu", "in(a, b)", "!in(a,b)", "1", "v1.2_x"])
def test_what_ray_takes_as_a_selector_is_taken(selector: str) -> None:
    config = load_config([f"ray.labels={{rollout: {{a.io/tier: '{selector}'}}}}"])
    assert config.ray.labels == {"rollout": {"a.io/tier": selector}}


def test_a_placement_of_engines_without_actors_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="ray.resources.large will be ignored .pool.placement=colocated"):
        load_config(["ray.resources={large: {h100: 1}}"])
    load_config(["ray.resources={large: {h100: 1}}", "pool.placement=actors"])  # warnings are errors here


def test_the_plan_tells_what_each_role_asks_of_its_node() -> None:
    overrides = ["pool.placement=actors", "ray.engine_gpus=1", "ray.labels={rollout: {tier: 'in(cheap, spot)'}}"]
    plan = describe_plan(load_config([*overrides, "ray.resources={engine: {l4: 1}, large: {h100: 2}}"]))
    placed = [line for line in plan.splitlines() if line.startswith("placement")]
    at = plan.splitlines().index(placed[0])
    assert [line[13:] for line in plan.splitlines()[at : at + 5]] == [
        "2 x rollout: CPU 0.5 on a node with tier=in(cheap, spot)",
        "1 x learner: CPU 0.5",
        "1 x reward: CPU 0.5",
        "1 x small: CPU 0.5, GPU 1, l4 1",
        "1 x large: CPU 0.5, GPU 1, h100 2",
    ]


def test_a_plan_without_placement_says_nothing_of_it() -> None:
    assert "placement" not in [line.split()[0] for line in describe_plan(load_config([])).splitlines() if line.strip()]
