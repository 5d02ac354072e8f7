"""Settings of the replicas: what is refused, what is ignored, and how the plan tells them."""

from __future__ import annotations

import pytest

from actors.fleet import make_options
from roro_ray.errors import ConfigError
from roro_ray.placement import count_replicas
from roro_ray.plan import describe_plan
from roro_ray.settings import load_config


def test_replicas_of_a_model() -> None:
    config = load_config(["pool.placement=actors", "ray.replicas={large: [0, 4]}"])
    assert count_replicas(config, "large") == (0, 4)
    assert count_replicas(config, "small") == (1, 1)
    assert "engines in actors (small 1, large 0 to 4)" in describe_plan(config)
    assert "one actor per model" in describe_plan(load_config(["pool.placement=actors"]))


def test_a_first_replica_whose_node_is_launched_is_waited_for_as_long_as_that_may_take() -> None:
    waits = ["pool.placement=actors", "ray.grow_timeout_s=1800", "ray.timeout_s=200"]
    config = load_config([*waits, "ray.replicas={small: [1, 2], large: [0, 4]}"])
    small, large = (make_options(config, model) for model in config.pool.models)
    assert small.elastic and large.elastic and small.timeout_s == 600
    assert 100 < small.ready_timeout_s < 200  # its first one's resources are there, or the stage would not have begun
    assert 1800 < large.ready_timeout_s < 2000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ray.replicas={larg: [0, 4]}", r"'larg' is no model of the pool.*did you mean 'large'"),
        ("ray.replicas={large: [2, 1]}", r"ray.replicas.large: got \[2, 1\], expected \[least, most\]"),
        ("ray.replicas={large: [0, 0]}", r"got \[0, 0\]"),
        ("ray.replicas={large: [1]}", r"got \[1\]"),
        ("ray.replicas={large: [-1, 1]}", r"got \[-1, 1\]"),
        ("ray.replica_target=0", "ray.replica_target: got 0, expected more than 0"),
        ("ray.replica_idle_s=-1", "ray.replica_idle_s: got -1"),
        ("ray.step_timeout_s=601", "ray.step_timeout_s=601 and episode.timeout_s=600 contradict each other"),
    ],
)
def test_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(["pool.placement=actors", override])


def test_replicas_of_colocated_models_are_ignored() -> None:
    with pytest.warns(UserWarning, match=r"ray.replicas will be ignored \(pool.placement=colocated"):
        load_config(["ray.replicas={large: [0, 4]}"])
