"""How a job's Ray is started or joined, as far as no Ray is needed to see it."""

from __future__ import annotations

from typing import Any

import pytest

from actors import cluster
from roro_ray.config import RayConfig
from roro_ray.errors import ConfigError

pytestmark = pytest.mark.timeout(60)


def test_train_workers_stay_where_relative_paths_of_models_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    for key in cluster.ENVIRONMENT:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PYTHONPATH", "")
    cluster.set_environment()
    trainer: Any = TorchTrainer(print, scaling_config=ScalingConfig(num_workers=1))
    names = [type(callback).__name__ for callback in trainer._create_default_callbacks()]
    assert "BackendSetupCallback" in names and "WorkingDirectorySetupCallback" not in names


def test_an_empty_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    started: list[int] = []
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "start_local", lambda *given: started.append(given[0]))
    monkeypatch.setattr(cluster, "_look", lambda started: started)
    with cluster.open_cluster(RayConfig()) as own:
        assert own and started == [RayConfig().object_store_mb], "as the doctor says of it"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:1", r"'127\.0\.0\.1:1'.*nobody answers there.*ray status --address=127\.0\.0\.1:1"),
        ("http://10.0.0.1:8265", r"a dashboard's.*10\.0\.0\.1:6379.*ray job submit --address http://10\.0\.0\.1:8265"),
    ],
)
def test_an_address_where_no_ray_is_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, told: str
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **given: pytest.fail("this would wait for ever"))
    for by_setting in (True, False):
        monkeypatch.setenv("RAY_ADDRESS", "" if by_setting else address)
        with pytest.raises(ConfigError, match=told), cluster.open_cluster(
            RayConfig(address=address if by_setting else "auto")
        ):
            pass
