"""A router on disk: safetensors and JSON, with its encoder's shape or the name of the encoder that it adapts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from roro_ray.data.files import write_whole
from roro_ray.errors import CheckpointError
from roro_ray.routing.observation import FEATURE_NAMES
from roro_ray.routing.router import EncoderBase, RouterNetwork, fill_router, load_encoder
from roro_ray.types import Peek

_FACTS_FILE = "router.json"
_WEIGHTS_FILE = "router.safetensors"
_ENCODER_DIR = "encoder"
# What whoever only loads a router needs of its directory, the calibration that may lie beside it included.
ROUTER_FILES = (_FACTS_FILE, _WEIGHTS_FILE, _ENCODER_DIR, "calibration.json")


def save_router(router: RouterNetwork, directory: Path | str, version: int = 0) -> Path:
    """Save a router as safetensors and JSON, with its encoder's shape and tokenizer; the JSON comes last.

    Each file is written beside and renamed, so that an interrupted save leaves the one before readable.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if router.body is not None and router.tokenizer is not None and router.base is None:
        router.body.config.save_pretrained(directory / _ENCODER_DIR)
        router.tokenizer.save_pretrained(directory / _ENCODER_DIR)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in router.learned_state().items()}
    with write_whole(directory / _WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary)
    facts = {
        "pool_size": router.pool_size,
        "hidden": router.hidden,
        "prior": router.prior,
        "peek": router.peek.value,
        "encoder": router.body is not None,
        "base": asdict(router.base) if router.base is not None else None,
        "features": list(FEATURE_NAMES),
        "version": version,
    }
    with write_whole(directory / _FACTS_FILE) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
    return directory


def load_router(directory: Path | str, pool_size: int | None = None) -> RouterNetwork:
    """Load a saved router, in eval mode; its `version` is the one that it was saved with.

    Args:
        pool_size: what the pool at hand needs; None takes the saved router's.

    Raises:
        CheckpointError: files are missing or damaged, or it was trained for another pool or other features.
    """
    directory = Path(directory)
    facts = _read_facts(directory)
    if pool_size is not None and facts["pool_size"] != pool_size:
        raise CheckpointError(
            f"router {directory} chooses among {facts['pool_size']} models and the pool has {pool_size}: "
            "use the pool that it was trained with, or train a router for this one"
        )
    if tuple(facts["features"]) != FEATURE_NAMES:
        raise CheckpointError(
            f"router {directory} was trained on the features {facts['features']}, "
            f"expected {list(FEATURE_NAMES)}: train anew"
        )
    body, tokenizer = None, None
    base = EncoderBase(**facts["base"]) if facts.get("base") else None
    if base is not None:
        body, tokenizer = load_encoder(base)
    elif facts["encoder"]:
        try:
            body = AutoModel.from_config(AutoConfig.from_pretrained(directory / _ENCODER_DIR), dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(directory / _ENCODER_DIR)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"router {directory}: its {_ENCODER_DIR}/ is missing or damaged: {error}") from error
    shape = (facts["pool_size"], facts["hidden"], facts["prior"], Peek(facts["peek"]))
    router = RouterNetwork(body, tokenizer, *shape, base)
    try:
        tensors = load_file(directory / _WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"router {directory}: {_WEIGHTS_FILE} is missing or truncated: {error}") from error
    fill_router(router, tensors, str(directory))
    router.version = int(facts["version"])
    return router.eval()


def load_version(directory: str | Path) -> int:
    """The version of a saved router's weights, without loading them.

    Raises:
        CheckpointError: the directory holds no router.
    """
    return int(_read_facts(Path(directory))["version"])


def _read_facts(directory: Path) -> dict[str, Any]:
    path = directory / _FACTS_FILE
    keys = ("pool_size", "hidden", "prior", "peek", "encoder", "features", "version")
    try:
        facts = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"no router could be read from {directory}: {path.name} is missing or damaged ({error}). "
            "Expected a directory written by save_router; train a router first"
        ) from error
    missing = [key for key in keys if key not in facts]
    if missing:
        raise CheckpointError(f"router {directory}: {path.name} lacks {', '.join(missing)}; save the router again")
    return cast("dict[str, Any]", facts)
