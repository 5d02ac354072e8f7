"""The driver's and the workers' side of replicas in actors, on actors that only fail: no Ray."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from actors import group
from actors.engines import ActorReplica
from roro_ray.engines.replica_engine import ReplicaEngine
from roro_ray.engines.replicas import FleetOptions
from roro_ray.engines.scaling import Scaler
from roro_ray.errors import EngineError


async def test_a_model_that_cannot_be_loaded_is_told_at_once_whatever_was_raised() -> None:
    async def fail() -> None:
        raise RayTaskError("ready", "Traceback", RuntimeError("CUDA out of memory")).as_instanceof_cause()

    actor = SimpleNamespace(ready=SimpleNamespace(remote=fail))
    engine = ReplicaEngine("large", {"r0": ActorReplica("large", actor, 5.0)}, FleetOptions())
    with pytest.raises(EngineError, match="model large cannot be loaded: RuntimeError: CUDA out of memory"):
        async with asyncio.timeout(2.0):
            await engine.ready()


def test_replicas_that_fail_together_are_tried_again_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise EngineError("no such model")

    monkeypatch.setattr(group, "wait_some", lambda refs, timeout_s: refs)
    monkeypatch.setattr(group, "wait_for", fail)
    monkeypatch.setattr("ray.kill", lambda actor: None)
    starts: list[float] = []
    now = 0.0

    def start() -> tuple[str, str]:
        starts.append(now)
        return "actor", "ready"

    made = group.Group("large", Scaler(0, 4, 1.0, 1000.0), start, 1.0)
    while now < 40.0:
        made.tick(now, 4)
        now += 0.5
    assert starts == [0.0] * 4 + [5.5] * 4 + [16.0] * 4 + [36.5] * 4  # after 5, 10 and 20 s, each failing a tick later
