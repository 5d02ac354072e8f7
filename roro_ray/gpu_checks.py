"""Which models of the pool share a GPU, and whether what they ask of its memory can be had.

vLLM takes its share of a GPU's memory when it starts, whatever else will want some later: two engines that together
ask for more than there is fail in the middle of a run, or worse, start only in one order.
"""

from __future__ import annotations

from collections.abc import Sequence

from roro_ray.config import Config, ModelConfig, RayConfig
from roro_ray.errors import ConfigError

MOST_MEMORY = 0.95  # of one GPU, by all engines together: the rest is CUDA's own
_Shared = tuple[str, list[ModelConfig], int]  # a GPU, in words; the models on it; copies of each


def count_gpus(model: ModelConfig, ray: RayConfig) -> float:
    """GPUs that the actor of a model asks for: its own number, at least one for each part of its weights."""
    gpus = model.gpus or ray.engine_gpus
    return max(gpus, float(model.tensor_parallel)) if model.tensor_parallel > 1 else gpus


def shares_gpu(model: ModelConfig, ray: RayConfig) -> bool:
    """Whether Ray may put the model's actor on one GPU with others."""
    return 0 < count_gpus(model, ray) < 1


def check_gpus(settings: Config) -> None:
    """Refuse GPU settings that cannot work.

    Raises:
        ConfigError: names the models, what they ask for, and what to do.
    """
    for model in settings.pool.models:
        _check_model(model)
    colocated = settings.pool.placement == "colocated"
    for place, models, copies in _find_colocated(settings) if colocated else _find_packed(settings):
        _check_shared(place, models, copies)


def _check_model(model: ModelConfig) -> None:
    at = f"pool.models[] {model.name!r}"
    if not 0 <= model.memory_fraction <= MOST_MEMORY:
        raise ConfigError(
            f"{at}: memory_fraction={model.memory_fraction}, expected a share between 0 (vLLM's own default) and "
            f"{MOST_MEMORY}: the rest of a GPU is CUDA's own."
        )
    if model.tensor_parallel < 1:
        raise ConfigError(f"{at}: tensor_parallel={model.tensor_parallel}, expected at least 1.")
    if model.tensor_parallel > 1 and model.engine != "vllm":
        raise ConfigError(
            f"{at}: tensor_parallel={model.tensor_parallel} and engine={model.engine} contradict each other: only vllm "
            "spreads one model over several GPUs; set engine=vllm or tensor_parallel=1."
        )
    if model.tensor_parallel > 1 and 0 < model.gpus < model.tensor_parallel:
        raise ConfigError(
            f"{at}: gpus={model.gpus} and tensor_parallel={model.tensor_parallel} contradict each other: each part of "
            "the weights needs a GPU; raise gpus or lower tensor_parallel."
        )


def _find_colocated(settings: Config) -> list[_Shared]:
    """The GPUs that one worker's models use; several workers may share a GPU in turn."""
    ray = settings.ray
    copies = min(ray.workers, max(1, int(1 / ray.worker_gpus))) if 0 < ray.worker_gpus < 1 else 1
    by_gpu: dict[int, list[ModelConfig]] = {}
    for model in _vllm_models(settings.pool.models):
        first = int(model.device.partition(":")[2] or 0)
        for gpu in range(first, first + model.tensor_parallel):
            by_gpu.setdefault(gpu, []).append(model)
    return [(f"GPU {gpu}", models, copies) for gpu, models in sorted(by_gpu.items())]


def _find_packed(settings: Config) -> list[_Shared]:
    """Actors with less than a GPU each, packed in order as tightly as their shares allow."""
    packed: list[list[ModelConfig]] = []
    for model in _vllm_models(settings.pool.models):
        if shares_gpu(model, settings.ray):
            gpus = count_gpus(model, settings.ray)
            fitting = (p for p in packed if sum(count_gpus(other, settings.ray) for other in p) + gpus <= 1 + 1e-9)
            place = next(fitting, None)
            if place is None:
                packed.append(place := [])
            place.append(model)
    return [("one GPU", models, 1) for models in packed]


def _vllm_models(models: Sequence[ModelConfig]) -> list[ModelConfig]:
    return [model for model in models if model.engine == "vllm" and model.device.startswith("cuda")]


def _check_shared(place: str, models: Sequence[ModelConfig], copies: int) -> None:
    if len(models) * copies < 2:
        return
    names = ", ".join(model.name for model in models) + (f" ({copies} workers' copies of each)" if copies > 1 else "")
    lacking = [model.name for model in models if not model.memory_fraction]
    if lacking:
        raise ConfigError(
            f"models {names} share {place}, and {', '.join(lacking)} of them has no memory_fraction: without one vLLM "
            f"takes nearly all of the GPU. Set pool.models[].memory_fraction of each, at most {MOST_MEMORY} together."
        )
    total = copies * sum(model.memory_fraction for model in models)
    if total > MOST_MEMORY + 1e-9:
        told = " + ".join(f"{model.memory_fraction:g}" for model in models)
        raise ConfigError(
            f"models {names} share {place} and ask for memory_fraction {told} = {total:.2f} of its memory, expected at "
            f"most {MOST_MEMORY} together: lower them, or give a model a GPU of its own (device=cuda:1, or gpus=1 with "
            "pool.placement=actors)."
        )
