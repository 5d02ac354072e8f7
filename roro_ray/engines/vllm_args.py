"""vLLM's engine arguments from the pool's settings; what the user gives in `engine_args` comes on top."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.model_facts import ModelShape
from roro_ray.engines.vllm_env import import_vllm
from roro_ray.errors import ConfigError, did_you_mean

ALL_LOG_PROBS = 2048  # up to this many tokens, all log-probabilities of a first token are asked for
SOME_LOG_PROBS = 20
_BLOCK = 32  # tokens: the smallest that vLLM's CPU attention takes, and the grain of its prefix cache
_LEAST_CACHE = 1 << 26  # bytes
_LEAST_BATCH = 4096  # tokens
_OWN = {"model": "path", "tokenizer": "path", "max_model_len": "max_context", "tensor_parallel_size": "tensor_parallel"}
_OWN |= {"gpu_memory_utilization": "memory_fraction", "dtype": "dtype", "revision": "revision"}


def count_top(vocabulary: int) -> int:
    """How many log-probabilities to ask for beside each token's own."""
    return vocabulary if vocabulary <= ALL_LOG_PROBS else SOME_LOG_PROBS


def make_engine_args(
    model: ModelConfig, pool: PoolConfig, directory: Path, shape: ModelShape, max_context: int | None
) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs`.

    On a CPU: one process, no compilation, `pool.cache_mb` of key/value cache. On GPUs: vLLM's defaults, but for the
    share of memory, tensor parallelism and adapters.

    Raises:
        ConfigError: `engine_args` names an argument that vLLM does not have, or one that has a setting of its own.
    """
    args: dict[str, Any] = {
        "model": str(directory),
        "dtype": model.dtype,
        "seed": 0,
        "max_num_seqs": pool.batch_size,
        "max_logprobs": max(count_top(shape.vocabulary), SOME_LOG_PROBS),
        "enable_prefix_caching": pool.cache_mb > 0,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # A model that loves blank lines may otherwise fill its whole answer with them between two brackets.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "trust_remote_code": False,
    }
    if max_context is not None:
        args["max_model_len"] = max_context
    if model.adapters:
        args |= {
            "enable_lora": True,
            "max_loras": model.adapters,
            "max_cpu_loras": 2 * model.adapters,  # the old version of each stays until its requests have ended
            "max_lora_rank": _round_rank(model.adapter_rank),
        }
    args |= _for_cpu(model, pool, shape, max_context) if model.device == "cpu" else _for_gpu(model)
    return args | _check(model)


def _for_cpu(model: ModelConfig, pool: PoolConfig, shape: ModelShape, max_context: int | None) -> dict[str, Any]:
    if model.tensor_parallel > 1:
        raise ConfigError(
            f"pool.models[].tensor_parallel={model.tensor_parallel} of {model.name!r} with device=cpu: only GPUs share "
            "a model; set tensor_parallel=1"
        )
    one_text = shape.kv_bytes_per_token(model.dtype) * (max_context or 1024) + (1 << 20)
    return {
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "block_size": _BLOCK,
        "kv_cache_memory_bytes": max(pool.cache_mb << 20, _LEAST_CACHE, one_text),
        "async_scheduling": False,
        # A prompt in several pieces would take back a seeded draw, which generators of CPUs cannot: vLLM fails then.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_context or 0, _LEAST_BATCH),
    }


def _for_gpu(model: ModelConfig) -> dict[str, Any]:
    args: dict[str, Any] = {"tensor_parallel_size": model.tensor_parallel}
    if model.memory_fraction:
        args["gpu_memory_utilization"] = model.memory_fraction
    return args


def _check(model: ModelConfig) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(import_vllm("vllm").AsyncEngineArgs)}
    for key in model.engine_args:
        if key in _OWN:
            raise ConfigError(
                f"pool.models[].engine_args of {model.name!r} sets {key}: set pool.models[].{_OWN[key]} instead"
            )
        if key not in fields:
            raise ConfigError(
                f"pool.models[].engine_args of {model.name!r} has {key!r}, which vLLM does not know"
                f"{did_you_mean(key, fields)}; its arguments are listed by `vllm serve --help=all`, with _ for -"
            )
    return dict(model.engine_args)


def _round_rank(rank: int) -> int:
    """The next rank that vLLM has kernels for."""
    return next((allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank), rank)
