"""What no type can say about the settings: ranges, choices and contradictions.

Each message names the key, the value, what was expected and what to do; a contradiction names both keys.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import reduce
from typing import Any

from roro_ray.cluster_checks import check_cluster
from roro_ray.config import Config, LoraConfig
from roro_ray.data.sources import check_data
from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.gpu_checks import check_gpus
from roro_ray.ppo_config import check_ppo
from roro_ray.storage_checks import check_storage
from roro_ray.types import PairKind, Peek

_CHOICES: dict[str, tuple[str, ...]] = {
    "pool.placement": ("colocated", "actors"),
    "episode.answer_by": ("large", "small", "last"),
    "pairs.process_source": ("interventions", "agreement", "confidence"),
    "reward.rubric_source": ("learned", "warm", "random", "fixed"),
    "reward.backend": ("local", "engine"),
    "warm.verdicts": ("scores", "text"),
    "router.encoder_dtype": ("float32", "bfloat16"),
    "router.peek": tuple(peek.value for peek in Peek),
    "router.credit": ("trajectory", "step"),
    "router.normalisation": ("dr_grpo", "group", "dapo"),
    "router.objective": ("ppo", "decoupled"),
    "lora.dtype": ("bfloat16", "float32"),
    "lora.attention": ("auto", "segments", "sdpa", "flash_attention_2"),
    "lora.strategy": ("single", "ddp", "fsdp2"),
    "lora.transport": ("storage", "objects"),
    "wandb.mode": ("disabled", "offline", "online"),
}
_AT_LEAST_ONE = (
    "pool.batch_size",
    "data.train_queries",
    "data.router_queries",
    "data.validation_queries",
    "data.test_queries",
    "episode.max_steps",
    "episode.max_step_tokens",
    "episode.max_tokens",
    "episode.max_repeats",
    "episode.max_answer_tokens",
    "data.graders",
    "collect.rollouts",
    "collect.shard_queries",
    "pairs.continuations",
    "pairs.max_per_query",
    "reward.queries_per_update",
    "reward.min_criteria",
    "reward.queue_size",
    "reward.publish_every",
    "reward.rubric_tokens",
    "reward.judge_rows",
    "reward.concurrency",
    "warm.pairs_per_query",
    "warm.max_pairs",
    "warm.attempts",
    "warm.max_tokens",
    "warm.concurrency",
    "warm.batch",
    "router.hidden",
    "router.iterations",
    "router.queries",
    "router.workers",
    "router.checkpoint_every",
    "router.epochs",
    "router.micro_batch",
    "evaluate.thresholds",
    "evaluate.bootstrap",
    "evaluate.oracle_steps",
    "evaluate.every",
    "calibrate.queries",
    "calibrate.bootstrap",
    "lora.rank",
    "lora.token_budget",
    "lora.logits_chunk",
    "lora.workers",
    "lora.checkpoint_every",
    "ray.workers",
    "ray.concurrency",
)
_AT_LEAST_TWO = ("pairs.folds", "reward.rubrics_per_query", "reward.verdicts_per_pair", "router.group_size")
_NOT_NEGATIVE = (
    "pool.memo_entries",
    "episode.temperature",
    "episode.min_step_tokens",
    "reward.rounds",
    "reward.judge_updates",
    "reward.rubricor_updates",
    "reward.entropy",
    "reward.judge_tokens",
    "warm.temperature",
    "warm.margin",
    "warm.epochs",
    "router.beta",
    "router.encoder_rank",
    "router.cache_mb",
    "router.entropy",
    "router.max_lag",
    "router.max_failures",
    "router.cache_mb",
    "lora.sft_updates",
    "lora.sft_warmup",
    "lora.weight_decay",
    "lora.gpus",
    "lora.max_failures",
    "ray.worker_gpus",
    "ray.learner_gpus",
    "ray.reward_gpus",
    "ray.engine_gpus",
    "evaluate.accuracy_slack",
)
_POSITIVE = (
    "episode.timeout_s",
    "data.grade_timeout_s",
    "reward.learning_rate",
    "reward.score_scale",
    "reward.timeout_s",
    "router.cost_weight_low",
    "router.cost_weight_high",
    "router.head_lr",
    "router.encoder_lr",
    "router.clip",
    "router.weight_cap",
    "router.grad_clip",
    "lora.alpha",
    "lora.rubricor_lr",
    "lora.judge_lr",
    "lora.sft_lr",
    "lora.grad_clip",
    "lora.cpus",
    "lora.timeout_s",
    "ray.worker_cpus",
    "ray.learner_cpus",
    "ray.reward_cpus",
    "ray.engine_cpus",
    "ray.object_store_mb",
    "ray.gpu_memory_gb",
    "ray.timeout_s",
    "estimate.tokens",
    "estimate.step_tokens",
    "estimate.gpu_tflops",
    "estimate.gpu_bandwidth",
    "estimate.read_utilisation",
    "estimate.train_utilisation",
    "estimate.write_utilisation",
)
# (smaller, larger): the first may not exceed the second.
_ORDERED = (
    ("router.cost_weight_low", "router.cost_weight_high"),
    ("reward.min_criteria", "reward.max_criteria"),
    ("episode.max_step_tokens", "episode.max_tokens"),
    ("episode.min_step_tokens", "episode.max_step_tokens"),
)


def get_setting(settings: Config, key: str) -> Any:
    """The value at a dotted key."""
    return reduce(getattr, key.split("."), settings)


def check_config(settings: Config) -> None:
    """Refuse settings that cannot work.

    Raises:
        ConfigError: names the key or both keys, the values, and what to do.
    """
    for key, allowed in _CHOICES.items():
        _check_choice(key, str(get_setting(settings, key)), allowed)
    for least, keys in ((1, _AT_LEAST_ONE), (2, _AT_LEAST_TWO), (0, _NOT_NEGATIVE)):
        for key in keys:
            if get_setting(settings, key) < least:
                raise ConfigError(f"{key}: got {get_setting(settings, key)}, expected at least {least}.")
    for key in _POSITIVE:
        if not get_setting(settings, key) > 0:
            raise ConfigError(f"{key}: got {get_setting(settings, key)}, expected more than 0.")
    for low, high in _ORDERED:
        small, large = get_setting(settings, low), get_setting(settings, high)
        if small > large:
            raise ConfigError(f"{low}={small} and {high}={large} contradict each other: raise {high} or lower {low}.")
    _check_lists(settings)
    _check_calibrate(settings)
    _check_lora(settings.lora)
    _check_relations(settings)
    check_gpus(settings)
    check_cluster(settings)
    check_ppo(settings.ppo)


def _check_choice(key: str, got: str, allowed: Collection[str]) -> None:
    if got not in allowed:
        raise ConfigError(f"{key}: got {got!r}, expected one of {', '.join(allowed)}{did_you_mean(got, allowed)}.")


def _check_lists(settings: Config) -> None:
    check_data(settings.data)
    for key in ("data.suites", "data.train_suites", "collect.strategies"):
        values = get_setting(settings, key)
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ConfigError(f"{key} names {', '.join(repeated)} twice: each entry may stand there once.")
    if not settings.collect.strategies:
        raise ConfigError("collect.strategies is empty: give at least two, such as [fixed:0,fixed:1].")
    kinds = {kind.value for kind in PairKind}
    for kind, weight in settings.reward.kind_weights.items():
        _check_choice("reward.kind_weights", kind, kinds)
        if weight < 0:
            raise ConfigError(f"reward.kind_weights: {kind}={weight}, expected 0 or more.")
    for key in (
        "evaluate.cost_weights",
        "evaluate.random_shares",
        "evaluate.curve_cost_weights",
        "calibrate.cost_weights",
    ):
        if not get_setting(settings, key):
            raise ConfigError(f"{key} is empty: a frontier needs at least one point.")


def _check_calibrate(settings: Config) -> None:
    weights = settings.calibrate.cost_weights
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight >= 0)]
    if wrong:
        raise ConfigError(f"calibrate.cost_weights: got {wrong[0]}, expected finite numbers of at least 0.")
    if len(set(weights)) < len(weights):
        raise ConfigError("calibrate.cost_weights names a weight twice: each may stand there once.")
    if not 0 < settings.calibrate.confidence < 1:
        raise ConfigError(f"calibrate.confidence: got {settings.calibrate.confidence}, expected one between 0 and 1.")


def _check_lora(lora: LoraConfig) -> None:
    if lora.strategy == "single" and lora.workers > 1:
        raise ConfigError(
            f"lora.strategy=single and lora.workers={lora.workers} contradict each other: set lora.strategy to ddp "
            "(the base fits one device) or fsdp2 (it does not), or lora.workers=1."
        )
    if lora.attention == "flash_attention_2" and lora.dtype == "float32":
        raise ConfigError(
            "lora.attention=flash_attention_2 and lora.dtype=float32 contradict each other: its kernels compute in "
            "half precision only. Set lora.dtype=bfloat16 or lora.attention=sdpa."
        )


def _check_reward(settings: Config) -> None:
    base, engine = settings.lora.base, settings.reward.engine
    if settings.reward.backend != "engine":
        return
    if not base:
        raise ConfigError(
            "reward.backend=engine and lora.base is empty: name the base on which Rubricor and Judge are adapters."
        )
    if engine.path not in ("", base):
        raise ConfigError(
            f"reward.engine.path={engine.path} and lora.base={base} contradict each other: adapters learned on "
            "one base fit no other. Leave reward.engine.path empty."
        )
    if settings.reward.rubric_source == "learned" and engine.adapters < 2:
        raise ConfigError(
            f"reward.engine.adapters={engine.adapters}: expected at least 2 with reward.backend=engine, since Rubricor "
            "and Judge are two adapters of one engine."
        )


def _check_relations(settings: Config) -> None:
    _check_reward(settings)
    if len(settings.pool.models) < 2:
        raise ConfigError(
            f"pool.models has {len(settings.pool.models)} model(s), expected at least 2, cheap to dear: "
            "with one model there is nothing to route."
        )
    if not 0 < settings.router.prior < 1:
        raise ConfigError(f"router.prior: got {settings.router.prior}, expected a probability between 0 and 1.")
    if settings.router.encoder_dtype != "float32" and not settings.router.encoder_rank:
        raise ConfigError(
            f"router.encoder_dtype={settings.router.encoder_dtype} and router.encoder_rank=0 contradict each other: "
            "small updates of 16-bit weights are lost to rounding. Train an adapter (router.encoder_rank=16) or keep "
            "float32."
        )
    drawn = len(settings.data.train_suites or settings.data.suites) * settings.data.router_queries
    if settings.router.queries > drawn:
        raise ConfigError(
            f"router.queries={settings.router.queries} and data.router_queries={settings.data.router_queries} "
            f"contradict each other: an iteration cannot draw more than the {drawn} queries there are. "
            "Lower the first or raise the second."
        )
    check_storage(settings)
