"""The replicas of the pool's models in metrics.jsonl: when their number changes, and at the end of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from roro_ray.data.run_dir import RunDir

if TYPE_CHECKING:
    from actors.fleet import Facts
    from actors.rollout import RolloutPool


@contextmanager
def log_replicas(run: RunDir, stage: str, pool: RolloutPool) -> Iterator[None]:
    """Write `{"event": "replicas", "stage": .., "models": {..}}` (see `Fleet.facts`) while the block runs, and at its
    end; nothing where the workers host the models themselves."""

    def log(facts: Facts) -> None:
        if facts:
            run.log({"event": "replicas", "stage": stage, "models": facts})

    leave = pool.watch_fleet(log)
    try:
        yield
    finally:
        leave()
        with suppress(OSError):  # a full disk is perhaps what ended the stage
            log(pool.fleet_facts())
