"""What a plan must know of a model before anything is loaded or downloaded: how many parameters, how wide, how deep.

It is read from the model's config.json: of a local directory, of the hub's cache on this machine, or of the copies of
the hub's that ship with the package (`roro_ray/model_shapes`), in that order. A model of which none of these knows
anything stays unknown: a plan says so and does not guess.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roro_ray.errors import DataError

SHAPES_DIR = Path(__file__).resolve().parents[1] / "model_shapes"
_WORLD_PREFIX = "world:"
_WORLD_DIR = Path(__file__).resolve().parents[1] / "world" / "weights"
BYTES_OF = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A causal language model by its numbers.

    `active` are the parameters that one token passes through (all of them, but for a mixture of experts), `query_width`
    is that of one layer's queries, `kv_width` the number of values that a token leaves in the caches of all layers.
    `source` says where this comes from: `directory`, `hub cache` or `shipped copy`.
    """

    path: str
    source: str
    parameters: int
    active: int
    layers: int
    hidden: int
    intermediate: int
    query_width: int
    kv_width: int
    vocabulary: int
    max_context: int

    def kv_bytes(self, dtype: str = "bfloat16") -> int:
        """Bytes of keys and values that one token leaves in the cache."""
        return self.kv_width * BYTES_OF[dtype]

    def weight_bytes(self, dtype: str = "bfloat16") -> int:
        """Bytes of the weights, all experts included."""
        return self.parameters * BYTES_OF[dtype]

    @property
    def flops_per_token(self) -> float:
        """2 x active parameters: what reading or writing one token costs."""
        return 2.0 * self.active


@functools.cache
def read_shape(path: str, revision: str = "") -> Shape | None:
    """The shape of a model as settings name it (`world:NAME`, a directory, a model of the hub); None where unknown.

    Raises:
        DataError: a config.json is there and cannot be read.
    """
    for source, directory in _places(path, revision):
        if directory is not None and (directory / "config.json").is_file():
            return _read_directory(path, source, directory)
    return None


def find_config_dir(path: str, revision: str = "") -> Path | None:
    """The directory whose config.json describes the model, or None."""
    found = (place for _, place in _places(path, revision) if place is not None and (place / "config.json").is_file())
    return next(found, None)


def _places(path: str, revision: str) -> list[tuple[str, Path | None]]:
    if path.startswith(_WORLD_PREFIX):
        return [("directory", _WORLD_DIR / path.removeprefix(_WORLD_PREFIX))]
    return [
        ("directory", Path(path).expanduser()),
        ("hub cache", _find_cached(path, revision)),
        ("shipped copy", SHAPES_DIR / path),
    ]


def _find_cached(path: str, revision: str) -> Path | None:
    """The snapshot of a model of the hub in this machine's cache."""
    if path.count("/") != 1:
        return None
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    if not (cache / f"models--{path.replace('/', '--')}").is_dir():
        return None  # most often so, and then the hub's library need not be imported
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", cache_dir=cache, revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


def _read_directory(path: str, source: str, directory: Path) -> Shape:
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        config = config.get("text_config", config)
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        layers, head_dim = int(config["num_hidden_layers"]), int(config.get("head_dim") or hidden // heads)
        counted = _count(directory)
        return Shape(
            path=path,
            source=source,
            parameters=counted["parameters"],
            active=counted.get("active_parameters", counted["parameters"]),
            layers=layers,
            hidden=hidden,
            intermediate=int(config.get("intermediate_size") or 4 * hidden),
            query_width=heads * head_dim,
            kv_width=counted.get("kv_width") or 2 * layers * int(config.get("num_key_value_heads") or heads) * head_dim,
            vocabulary=int(config["vocab_size"]),
            max_context=int(config.get("max_position_embeddings") or 0),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{directory / 'config.json'} does not describe a causal language model ({type(error).__name__}: {error}); "
            f"expected the config.json of a model in Hugging Face format for {path!r}"
        ) from error


def count_shape(directory: Path) -> dict[str, Any]:
    """What is counted from a config.json by building the network without its weights; takes seconds, for torch."""
    from roro_ray.engines.model_facts import read_model_facts

    return dataclasses.asdict(read_model_facts(directory))


def _count(directory: Path) -> dict[str, Any]:
    """The same, from facts.json where it was counted before."""
    facts = directory / "facts.json"
    if facts.is_file():
        known: dict[str, Any] = json.loads(facts.read_text())
        return known
    return count_shape(directory)
