"""GPU memory of each process of a run, from shapes and settings; all figures are bytes on one GPU.

    engine          parameters x bytes of the dtype / GPUs that share them, keys and values in what is left
    LoRA learner    base (in shards under fsdp2) + 16 bytes a parameter of each adapter (weight, gradient, Adam's two)
    router learner  16 bytes a parameter of the encoder, or of its adapter beside the frozen encoder
    activations     tokens x layers x what one layer keeps per token; with checkpointing, its input alone, and the
                    layer that is computed again whole
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from roro_ray.config import Config, LoraConfig, ModelConfig
from roro_ray.engines.shapes import BYTES_OF, Shape, read_shape

GIB = 2**30
GPUS_PER_NODE = 8
_VLLM_FRACTION = 0.92  # vLLM's own default where pool.models[].memory_fraction is 0
_ENGINE_RESERVE = 2 * GIB  # activations of a forward pass and CUDA graphs
_TRAINED_BYTES = 16  # per float32 parameter: weight, gradient, Adam's two moments
_MOST_TOGETHER = 0.95  # of one GPU's memory, over the processes that share it
STAGES = ("collect", "make_pairs", "warm_start", "learn_reward", "train_router", "evaluate", "calibrate")
POOL_STAGES = ("collect", "make_pairs", "train_router", "evaluate", "calibrate")
_REWARD_STAGES = ("learn_reward", "train_router")
_IN_TURN = ("warm_start",)  # its writer ends before its learner begins


@dataclass(frozen=True, slots=True)
class Role:
    """One kind of process on GPUs.

    `gpus` are those of one process (a fraction where it shares one), `parts` its memory on each of them by name,
    `limit` what it may take there. `kv_room` are the bytes left for keys and values over all its GPUs, `kv_token` those
    of one token. `warnings` say what does not fit.
    """

    name: str
    stages: tuple[str, ...]
    gpus: float
    processes: int
    parts: Mapping[str, float]
    limit: float
    shape: Shape | None = None
    dtype: str = "bfloat16"
    kv_room: float = 0.0
    kv_token: float = 0.0
    warnings: tuple[str, ...] = field(default=())

    @property
    def total_gpus(self) -> float:
        """GPUs of all its processes."""
        return self.gpus * self.processes

    @property
    def needed(self) -> float:
        """Bytes on each GPU without keys and values."""
        return sum(self.parts.values())


def plan_roles(config: Config) -> list[Role]:
    """Every kind of process that asks for GPUs, in the order of the settings."""
    roles = [role for model in config.pool.models if (role := _plan_engine(model, config)) is not None]
    roles += [role for role in (_plan_worker(config), *_plan_reward(config), _plan_router(config)) if role is not None]
    return roles


def stage_gpus(roles: Sequence[Role]) -> dict[str, float]:
    """GPUs held at once in each stage that holds any."""
    held = {}
    for stage in STAGES:
        gpus = [role.total_gpus for role in roles if stage in role.stages]
        held[stage] = max(gpus, default=0.0) if stage in _IN_TURN else sum(gpus)
    return {stage: gpus for stage, gpus in held.items() if gpus}


def check_together(roles: Sequence[Role], memory: float) -> list[str]:
    """Warnings about processes that share one GPU and together ask for more than it has."""
    warnings = []
    for stage in stage_gpus(roles).keys() - set(_IN_TURN):
        sharing = [role for role in roles if stage in role.stages and 0 < role.gpus < 1]
        held = sum(role.gpus * role.processes for role in sharing)
        asked = sum((role.limit if role.kv_token else role.needed) * role.processes for role in sharing)
        if 0 < held <= 1 and asked > _MOST_TOGETHER * memory:
            names = ", ".join(role.name for role in sharing)
            warnings.append(
                f"{stage}: {names} share one GPU and ask for {asked / GIB:.1f} GiB of {memory / GIB:.0f}, expected at "
                f"most {_MOST_TOGETHER:.0%}: lower pool.models[].memory_fraction or choose smaller models"
            )
    return warnings


def kept_per_token(shape: Shape, width: int, checkpointing: bool) -> float:
    """Bytes of activations per token of a training pass, at `width` bytes a number.

    One layer keeps its input, the normed input, queries, keys, values and attention's output, the second norm's two,
    and three intermediates (gate, up, their product).
    """
    layer = 5 * shape.hidden + 2 * shape.query_width + shape.kv_width / shape.layers + 3 * shape.intermediate
    return float(width * ((shape.layers * shape.hidden + layer) if checkpointing else shape.layers * layer))


def count_adapter(shape: Shape, rank: int) -> int:
    """Parameters of one LoRA adapter on every linear layer of a dense model."""
    h, q, kv, i = shape.hidden, shape.query_width, shape.kv_width // (2 * shape.layers), shape.intermediate
    return rank * shape.layers * ((h + q) + 2 * (h + kv) + (q + h) + 3 * (h + i))


def _plan_engine(model: ModelConfig, config: Config) -> Role | None:
    colocated = config.pool.placement == "colocated"
    if model.engine == "openai" or (model.device == "cpu" and not model.gpus):
        return None
    gpus = config.ray.worker_gpus if colocated else model.gpus or config.ray.engine_gpus or model.tensor_parallel
    processes = config.ray.workers if colocated else 1
    fraction = model.memory_fraction or (_VLLM_FRACTION if model.engine == "vllm" else min(gpus, 1.0) or 1.0)
    stages = (*POOL_STAGES, "warm_start") if config.warm.writer == model.name else POOL_STAGES
    return make_engine_role(
        f"engine {model.name}", model, stages, gpus, processes, fraction, config.ray.gpu_memory_gb * GIB
    )


def make_engine_role(
    name: str, model: ModelConfig, stages: tuple[str, ...], gpus: float, processes: int, fraction: float, memory: float
) -> Role:
    """An engine's memory: weights and adapters, and what is left of its share for keys and values."""
    shape = read_shape(model.path, model.revision)
    limit = fraction * memory
    if shape is None:
        return Role(name, stages, gpus, processes, {}, limit)
    shared = model.tensor_parallel
    adapters = model.adapters * count_adapter(shape, model.adapter_rank) * BYTES_OF[model.dtype]
    parts = {"weights": shape.weight_bytes(model.dtype) / shared, "working memory": float(_ENGINE_RESERVE)}
    if adapters:
        parts["adapters"] = adapters / shared
    room = limit - sum(parts.values())
    warnings = () if room > 0 else (_too_large(name, shape, sum(parts.values()), limit, memory),)
    kv_token = shape.kv_bytes(model.dtype)
    return Role(
        name, stages, gpus, processes, parts, limit, shape, model.dtype, max(room, 0.0) * shared, kv_token, warnings
    )


def _too_large(name: str, shape: Shape, needed: float, limit: float, memory: float) -> str:
    return (
        f"{name}: {shape.path} needs {needed / GIB:.1f} GiB on each GPU before the first token, and may take "
        f"{limit / GIB:.1f} of {memory / GIB:.0f} (ray.gpu_memory_gb): raise memory_fraction or tensor_parallel, or "
        "take a smaller model"
    )


def _plan_worker(config: Config) -> Role | None:
    """Rollout workers with a router encoder on their GPU (those with engines in them are told under the engines)."""
    settings, router = config.ray, config.router
    if not settings.worker_gpus or not router.encoder or config.pool.placement == "colocated":
        return None
    limit = min(settings.worker_gpus, 1.0) * settings.gpu_memory_gb * GIB
    shape = read_shape(router.encoder, router.encoder_revision)
    parts = {}
    if shape is not None:
        parts = {
            "router encoder": float(shape.weight_bytes(router.encoder_dtype)),
            "texts kept": float(router.cache_mb * 2**20),
            "one text in work": float(_longest(config) * shape.kv_bytes(router.encoder_dtype)),
        }
    role = Role("rollout workers", POOL_STAGES, settings.worker_gpus, settings.workers, parts, limit, shape)
    return _checked(replace(role, dtype=router.encoder_dtype), "lower router.cache_mb, or raise ray.worker_gpus")


def _plan_router(config: Config) -> Role | None:
    settings, router = config.ray, config.router
    if not settings.learner_gpus:
        return None
    limit = min(settings.learner_gpus, 1.0) * settings.gpu_memory_gb * GIB
    shape = read_shape(router.encoder, router.encoder_revision) if router.encoder else None
    parts = {}
    if shape is not None:
        width, tokens = BYTES_OF[router.encoder_dtype], router.micro_batch * _longest(config)
        trained = count_adapter(shape, router.encoder_rank) if router.encoder_rank else shape.parameters
        parts = {
            "encoder": float(shape.weight_bytes(router.encoder_dtype)) if router.encoder_rank else 0.0,
            "what is trained, with its optimiser": float(_TRAINED_BYTES * trained),
            "activations": tokens * kept_per_token(shape, width, router.gradient_checkpointing),
        }
    role = Role("router learner", ("train_router",), settings.learner_gpus, router.workers, parts, limit, shape)
    role = replace(role, dtype=router.encoder_dtype)
    return _checked(role, "set router.gradient_checkpointing=true and router.encoder_rank, or lower router.micro_batch")


def _plan_reward(config: Config) -> list[Role]:
    """The engine that serves both adapters, and their learner."""
    if config.reward.backend != "engine":
        return []
    lora, engine, memory = config.lora, config.reward.engine, config.ray.gpu_memory_gb * GIB
    roles = []
    gpus = engine.gpus or config.ray.reward_gpus
    if gpus:
        served = replace(engine, path=engine.path or lora.base, revision=engine.revision or lora.revision)
        fraction = engine.memory_fraction or min(gpus, _VLLM_FRACTION)
        roles.append(make_engine_role("reward engine", served, _REWARD_STAGES, gpus, 1, fraction, memory))
    if lora.gpus:
        shape = read_shape(lora.base, lora.revision)
        parts = {} if shape is None else _lora_parts(shape, lora)
        limit, stages = min(lora.gpus, 1.0) * memory, ("warm_start", "learn_reward")
        role = Role("LoRA learner", stages, lora.gpus, lora.workers, parts, limit, shape, lora.dtype)
        roles.append(_checked(role, "set lora.strategy=fsdp2 over more lora.workers, or lower lora.token_budget"))
    return roles


def _lora_parts(shape: Shape, lora: LoraConfig) -> dict[str, float]:
    width = BYTES_OF[lora.dtype]
    shards = lora.workers if lora.strategy == "fsdp2" else 1
    return {
        "base": shape.weight_bytes(lora.dtype) / shards,
        "two adapters and their optimiser": 2.0 * _TRAINED_BYTES * count_adapter(shape, lora.rank),
        "activations": lora.token_budget * kept_per_token(shape, width, lora.gradient_checkpointing),
        "logits": 6.0 * 4 * lora.logits_chunk * shape.vocabulary,
    }


def _longest(config: Config) -> int:
    """Tokens of the longest trajectory with its prompt."""
    return config.episode.max_tokens + config.estimate.prompt_tokens


def _checked(role: Role, remedy: str) -> Role:
    if role.needed <= role.limit:
        return role
    warning = (
        f"{role.name}: needs {role.needed / GIB:.1f} GiB on its GPU and has {role.limit / GIB:.1f} "
        f"({role.gpus:g} of ray.gpu_memory_gb): {remedy}"
    )
    return replace(role, warnings=(warning,))
