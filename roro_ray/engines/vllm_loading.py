"""Loading a model for engine `vllm`: what is checked before vLLM starts, and which back end it gets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.formats import PromptFormat, make_format
from roro_ray.engines.hub import resolve_model_path
from roro_ray.engines.loading import load_tokenizer, make_fingerprint, tokenizer_digest
from roro_ray.engines.model_facts import ModelShape, read_model_facts
from roro_ray.engines.pool import make_prices
from roro_ray.engines.protocol import EngineFacts
from roro_ray.engines.text import StepText
from roro_ray.engines.vllm_args import make_engine_args
from roro_ray.engines.vllm_backend import Backend
from roro_ray.engines.vllm_env import prepare_vllm
from roro_ray.engines.vllm_heads import is_narrow, widen_adapter, widen_model
from roro_ray.errors import EngineError


@dataclass(slots=True)
class LoadedVllm:
    """A model that vLLM serves, and what its engine must know of it.

    `narrow` is the model's own directory where vLLM was given a widened copy (see `vllm_heads`), which lies in
    `scratch` with its adapters' copies.
    """

    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    text: StepText
    shape: ModelShape
    format: PromptFormat
    max_context: int | None
    fingerprint: str
    narrow: Path | None
    scratch: tempfile.TemporaryDirectory[str] | None

    def place_adapter(self, path: str, label: str) -> str:
        """The directory from which vLLM can load an adapter.

        Raises:
            EngineError: the directory holds none.
        """
        directory = Path(path)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (directory / name).is_file():
                raise EngineError(
                    f"no {name} in {directory}: expected a LoRA adapter in peft's format, as "
                    "`PeftModel.save_pretrained` writes it"
                )
        if self.narrow is None or self.scratch is None:
            return str(directory)
        target = Path(self.scratch.name) / label
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        widen_adapter(directory, target, self.narrow)
        return str(target)

    def close(self) -> None:
        """Free the engine and the copies."""
        self.backend.close()
        if self.scratch is not None:
            self.scratch.cleanup()


def load_vllm(model: ModelConfig, pool: PoolConfig) -> LoadedVllm:
    """Load a model with vLLM; blocks.

    Raises:
        ConfigError: vLLM is not installed, or a setting is wrong.
        EngineError: the model is missing, incomplete, or nothing that vLLM can serve.
    """
    prepare_vllm(model.device)
    directory = resolve_model_path(model.path, model.revision)
    if not (directory / "config.json").is_file():
        raise EngineError(
            f"engine {model.name}: no config.json in {directory}: expected a directory in Hugging Face format, or "
            "OWNER/NAME for a model of the hub"
        )
    shape = read_model_facts(directory)
    tokenizer = load_tokenizer(model.path, model.revision)
    format = make_format(tokenizer, model.format, model.thinking)
    eos_ids = read_eos_ids(directory, tokenizer, shape.vocabulary)
    max_context = min(filter(None, (model.max_context, shape.max_context)), default=None)
    served, scratch = directory, None
    if model.device == "cpu" and is_narrow(directory):
        scratch = tempfile.TemporaryDirectory(prefix="roro-vllm-")
        served = Path(scratch.name) / "model"
        served.mkdir()
        widen_model(directory, served)
    backend = _make_backend(
        model, make_engine_args(model, pool, served, read_model_facts(served), max_context), eos_ids
    )
    backend.start()
    return LoadedVllm(
        backend=backend,
        tokenizer=tokenizer,
        text=StepText(tokenizer, eos_ids, shape.vocabulary, adds_special=model.format == "plain"),
        shape=shape,
        format=format,
        max_context=max_context,
        fingerprint=make_fingerprint(directory),
        narrow=directory if scratch is not None else None,
        scratch=scratch,
    )


def make_facts(model: ModelConfig, loaded: LoadedVllm, seconds: float) -> EngineFacts:
    """What the engine of a loaded model says of itself."""
    return EngineFacts(
        name=model.name,
        model=model.path if ":" in model.path else str(Path(model.path)),
        device=model.device,
        parameters=loaded.shape.parameters,
        flops_per_token=2.0 * loaded.shape.active_parameters,
        seconds=seconds,
        fingerprint=loaded.fingerprint,
        tokenizer=tokenizer_digest(loaded.tokenizer),
        format=loaded.format,
        prices=make_prices(model),
        max_context=loaded.max_context,
    )


def read_eos_ids(directory: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's and those of the generation settings (or else of the model's)."""
    try:
        stated = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    except OSError:
        stated = AutoConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    ids = {tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
    return tuple(sorted(token for token in ids if token is not None and 0 <= token < vocabulary))


def _make_backend(model: ModelConfig, args: dict[str, Any], eos_ids: Sequence[int]) -> Backend:
    if model.device == "cpu":
        from roro_ray.engines.vllm_local import LocalBackend

        return LocalBackend(model.name, args, eos_ids)
    from roro_ray.engines.vllm_async import AsyncBackend

    _, _, first = model.device.partition(":")
    gpus = range(int(first), int(first) + model.tensor_parallel) if first else ()
    return AsyncBackend(model.name, args, eos_ids, gpus)
