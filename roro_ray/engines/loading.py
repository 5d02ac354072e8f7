"""Finding, checking and loading a model directory: everything that can be wrong with one is told here, in words."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from roro_ray.engines.hub import resolve_model_path, resolve_tokenizer_path
from roro_ray.engines.kv import KVShape
from roro_ray.engines.model_facts import BUILDING, count_active_parameters
from roro_ray.errors import ConfigError, EngineError, did_you_mean

__all__ = ["LoadedModel", "load_model", "load_tokenizer", "make_fingerprint", "resolve_model_path", "tokenizer_digest"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_HASHED_BYTES = 1 << 26  # of one file; beyond that its size and its beginning stand for it


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to decode, and what the decoder must know of it.

    `masks` maps each kind of attention layer to its window (None: unlimited); `max_positions` is None where the
    model has no limit of its own; `active` are the parameters that one token passes through.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    vocabulary: int
    shape: KVShape
    masks: dict[str, int | None]
    max_positions: int | None
    parameters: int
    active: int
    fingerprint: str


def load_model(path: str, device: str, dtype: str, revision: str = "") -> LoadedModel:
    """Load a causal language model from safetensors; no code from the directory is run.

    Raises:
        ConfigError: the dtype, the device or the shipped model's name is wrong.
        EngineError: the directory is missing, incomplete, not in safetensors or of a kind that cannot be decoded; a
            model of the hub cannot be fetched.
    """
    torch_dtype, torch_device = _read_dtype(dtype), _read_device(device)
    directory = resolve_model_path(path, revision)
    _check_files(directory)
    tokenizer = _load_tokenizer(directory)
    model = _load_weights(directory, torch_dtype, torch_device)
    embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
    vocabulary = embeddings.num_embeddings
    if tokenizer.vocab_size > vocabulary:  # tokens added later may lie beyond: an error where a text uses them
        raise EngineError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens but the model embeds {vocabulary}: "
            "they are not a pair; save model and tokenizer together"
        )
    eos_ids = _read_eos_ids(model, tokenizer, vocabulary)
    text_config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        vocabulary=vocabulary,
        shape=_probe_shape(model, directory),
        masks=_read_masks(text_config, directory),
        max_positions=getattr(text_config, "max_position_embeddings", None),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        active=count_active_parameters(model),
        fingerprint=make_fingerprint(directory),
    )


def load_tokenizer(path: str, revision: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without the model: of the hub's files the weights are not fetched.

    Raises:
        ConfigError: no shipped model has that name.
        EngineError: there is no tokenizer, it does not load, or it cannot be fetched.
    """
    directory = resolve_tokenizer_path(path, revision)
    _check_tokenizer_files(directory)
    return _load_tokenizer(directory)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that turns text into ids and back: tokenizers of one digest may exchange ids.

    Vocabulary, merges, normaliser, pre-tokenizer, decoder, added tokens, and what is put round a text count; limits of
    length and padding do not, nor does what the tokenizer is called.
    """
    if tokenizer.is_fast:
        told = json.loads(tokenizer.backend_tokenizer.to_str())
        for setting in ("truncation", "padding"):
            told.pop(setting, None)
    else:
        added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        told = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "added": added}
    text = json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def make_fingerprint(directory: Path) -> str:
    """A digest of a model's configuration, tokenizer and weights (of large files, of their size and beginning)."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix in (".json", ".model", ".txt", ".safetensors") and file.name != "facts.json":
            digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_HASHED_BYTES))
    return digest.hexdigest()[:16]


def _read_dtype(name: str) -> torch.dtype:
    allowed = ("float32", "float64", "bfloat16", "float16")
    if name not in allowed:
        raise ConfigError(f"unknown dtype {name!r}: expected one of {', '.join(allowed)}{did_you_mean(name, allowed)}")
    return getattr(torch, name)  # type: ignore[no-any-return]


def _read_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}; expected cpu, or cuda on a machine with "
            "a GPU and a torch built for it"
        ) from error
    return device


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise EngineError(
            f"no model directory {directory}: expected a directory in Hugging Face format, or OWNER/NAME for a model "
            "of the hub; `hf download OWNER/NAME --local-dir DIR` makes a directory of one"
        )
    names = {file.name for file in directory.iterdir()}
    if "config.json" not in names:
        raise EngineError(f"{directory} holds no config.json: expected a directory in Hugging Face format")
    if not any(name.endswith(".safetensors") for name in names):
        other = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf")))
        got = f"only {', '.join(other)}" if other else "no weights at all"
        raise EngineError(
            f"{directory} holds {got}: expected *.safetensors, the only format that is read (pickled weights can "
            "run code); fetch them (`hf download OWNER/NAME`) or convert with "
            "`model.save_pretrained(DIR, safe_serialization=True)`"
        )
    if "model.safetensors.index.json" in names:
        _check_shards(directory, names)
    _check_tokenizer_files(directory)


def _check_shards(directory: Path, names: set[str]) -> None:
    try:
        index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
        shards = set(index["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise EngineError(
            f"model.safetensors.index.json in {directory} is damaged ({type(error).__name__}: {error}): fetch it again"
        ) from error
    lacking = sorted(shards - names)
    if lacking:
        raise EngineError(
            f"{directory} lacks {len(lacking)} of {len(shards)} files of weights (first: {lacking[0]}): the download "
            "ended early; run `hf download` again, which goes on where it stopped"
        )


def _check_tokenizer_files(directory: Path) -> None:
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise EngineError(
            f"{directory} holds no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}; save it beside the "
            "model with `tokenizer.save_pretrained(DIR)`"
        )


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # border: whatever the library raises on a broken file
        raise EngineError(f"the tokenizer in {directory} does not load: {_brief(error)}") from error


def _load_weights(directory: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        # Two models loaded at once by two threads mix up their tied weights: the library's loader keeps global state.
        with BUILDING, quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except Exception as error:  # border: whatever the library raises on a broken file
        raise EngineError(f"the model in {directory} does not load: {_brief(error)}") from error
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        # The library would fill these at random and go on.
        raise EngineError(
            f"the weights in {directory} lack {len(missing)} of the tensors that config.json asks for (first: "
            f"{missing[0]}): the checkpoint is incomplete or of another shape; save the model again"
        )
    return cast(PreTrainedModel, model.to(device).eval().requires_grad_(False))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and notes: what matters in the loading report is raised."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _read_eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[int, ...]:
    stated = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
    return tuple(sorted(token for token in ids if token is not None and 0 <= token < vocabulary))


def _read_masks(config: PreTrainedConfig, directory: Path) -> dict[str, int | None]:
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    windows: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    strange = sorted(set(kinds) - windows.keys())
    if strange:
        raise EngineError(
            f"the model in {directory} has layers of kind {', '.join(strange)}: engine 'hf' decodes full and sliding "
            "attention only; use another engine for it"
        )
    return {kind: windows[kind] for kind in sorted(set(kinds))}


@torch.inference_mode()
def _probe_shape(model: PreTrainedModel, directory: Path) -> KVShape:
    """Heads and widths as one forward pass leaves them: configurations name them in too many ways."""
    cache = DynamicCache(config=model.config)
    try:
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache)
        layers: list[Any] = cache.layers
        states = [part for layer in layers for part in (layer.keys, layer.values)]
        parts = tuple((part.shape[1], part.shape[3]) for part in states)
    except Exception as error:  # border: any model class may come
        raise EngineError(
            f"the model in {directory} keeps no key/value states that engine 'hf' understands: {_brief(error)}"
        ) from error
    return KVShape(parts, states[0].dtype, model.device)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
