"""The engine that serves Rubricor and Judge, and the strong LLM of a warm start, in actors of their own.

Beside the learner of adapters, which computes with the same base, so that each can have its own device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.adapters import deliver
from actors.capacity import wait_for_resources
from actors.engines import MOST_REQUESTS, EngineActor, MakeEngine, RemoteEngine, gathers, make_model_engine
from actors.placement import bundle_options
from actors.waiting import wait_for
from roro_ray.config import Config, ModelConfig, PoolConfig
from roro_ray.data.mirror import Part
from roro_ray.engines.protocol import Engine
from roro_ray.learning.adapter_files import AdapterVersion
from roro_ray.placement import role_bundle


@contextmanager
def open_model(config: Config, model: ModelConfig, make: MakeEngine = make_model_engine) -> Iterator[RemoteEngine]:
    """An actor with one model, ready; it ends with the block.

    Raises:
        ResourceError: the cluster cannot give what it asks for.
        DeadlineError: not ready within `ray.timeout_s`.
        EngineError: the model does not load.
    """
    gpus = model.gpus or config.ray.engine_gpus  # of the actor, however many share one copy of the weights
    bundle = role_bundle(config, model.name, config.ray.engine_cpus, gpus)
    wait_for_resources([bundle], f"model {model.name}", config.ray)
    options = bundle_options(bundle) | {"max_restarts": -1, "max_task_retries": 0, "max_concurrency": MOST_REQUESTS}
    # The pool's settings of memory and batches, and this model alone.
    pool = PoolConfig([model], config.pool.batch_size, config.pool.memo_entries, config.pool.cache_mb)
    actor: Any = ray.remote(EngineActor).options(**options).remote(partial(make, model, pool))
    try:
        wait_for(actor.ready.remote(), f"model {model.name}: ready", config.ray.timeout_s, actor)
        # A call may hold all requests of the moment: as long as the longest deadline of what they belong to.
        longest = max(config.reward.timeout_s, config.episode.timeout_s)
        yield RemoteEngine(model.name, actor, longest, gathers(model))
    finally:
        ray.kill(actor)


def make_deliver(
    transport: str, adapters: Part | None = None
) -> Callable[[Engine, AdapterVersion], Coroutine[Any, Any, None]]:
    """Brings adapters to an engine as `lora.transport` says.

    Args:
        adapters: where a remote run has them. This process then fetches those that it lacks, and they go on as objects:
            the engine's node sees no directory of ours.
    """

    async def bring(engine: Engine, adapter: AdapterVersion) -> None:
        if adapters is not None and adapters.mirror.is_remote:
            await asyncio.to_thread(adapters.pull, Path(adapter.path).relative_to(adapters.path).as_posix())
            await deliver(adapter, [engine], "objects")
        else:
            await deliver(adapter, [engine], transport)

    return bring
