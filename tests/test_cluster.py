"""How a job's Ray is started or joined, as far as no Ray is needed to see it."""

from __future__ import annotations

from typing import Any

import pytest

from actors import cluster
from roro_ray.config import RayConfig

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
