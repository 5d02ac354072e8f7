"""The pool that the benchmarks of real models run: two models by path, or two tiny random ones in the hub's format.

Arms of one benchmark must write the same number of tokens, and what a random model writes ends anywhere or nowhere. So
every model is given as an endless copy: the same files, but for those that name the tokens that end a text.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.hub import resolve_model_path
from roro_ray.world.tokenizer import make_tokenizer

# Two layers of 128 and four of 256: 0.9 and 4.2 M parameters. As many tokens as make the engine ask for the twenty
# most probable ones, as it does of real models, and not for all.
_TINY = {"small": (2, 128), "large": (4, 256)}
_VOCABULARY = 2112
_POSITIONS = 4096
_ENDS = {"generation_config.json": "eos_token_id", "config.json": "eos_token_id", "tokenizer_config.json": "eos_token"}


def add_pool_options(parser: argparse.ArgumentParser) -> None:
    """Options of the models, the same in every benchmark."""
    group = parser.add_argument_group("models")
    group.add_argument("--models", nargs=2, metavar=("SMALL", "LARGE"), help="directories or names of the hub")
    group.add_argument("--devices", nargs=2, default=["cpu", "cpu"], metavar="DEVICE", help="cpu | cuda | cuda:N")
    group.add_argument("--dtype", default="float32", help="bfloat16 for real models")
    group.add_argument("--memory-fractions", nargs=2, type=float, default=[0.0, 0.0], metavar="SHARE", help="of a GPU")
    group.add_argument("--tensor-parallel", nargs=2, type=int, default=[1, 1], metavar="GPUS")
    group.add_argument("--cache-mb", type=int, default=256, help="of key/value cache per model, on a CPU")


def has_vllm() -> bool:
    """Whether engine `vllm` can be measured; says so where it cannot, since `make bench` runs without it too."""
    found = importlib.util.find_spec("vllm") is not None
    if not found:
        print("skipped: vLLM is not installed (`make setup-vllm` on a CPU, `pip install -e '.[vllm]'` with a GPU)")
    return found


def make_pool_config(
    options: argparse.Namespace, directory: Path, engine: str = "vllm", batch_size: int = 64, **engine_args: Any
) -> PoolConfig:
    """The pool that the options name, its models endless and without a memo; copies are made in `directory`."""
    paths = [resolve_model_path(path) for path in options.models] if options.models else make_tiny_pair(directory)
    settings = zip(paths, options.devices, options.memory_fractions, options.tensor_parallel, strict=True)
    models = [
        ModelConfig(
            name=name,
            path=str(make_endless(path, directory / f"endless-{name}")),
            engine=engine,
            device=device,
            dtype=options.dtype,
            memory_fraction=share,
            tensor_parallel=gpus,
            engine_args=dict(engine_args),
        )
        for name, (path, device, share, gpus) in zip(_TINY, settings, strict=True)
    ]
    return PoolConfig(models=models, batch_size=batch_size, memo_entries=0, cache_mb=options.cache_mb)


def make_tiny_pair(directory: Path) -> list[Path]:
    """Two random Qwen3 models of one tokenizer, which write nothing but printable ASCII without newlines."""
    tokenizer = make_tokenizer()
    written = torch.zeros(_VOCABULARY, 1)
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        written[token] = float(text.isascii() and text.isprintable() and token not in tokenizer.all_special_ids)
    paths = []
    for name, (layers, width) in _TINY.items():
        path = directory / name
        if not path.exists():
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                model = Qwen3ForCausalLM(_make_shape(layers, width))
                # Greedy decoding never takes a token of logit 0 where the others are random.
                model.lm_head.weight.normal_(0.0, width**-0.5).mul_(written)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        paths.append(path)
    return paths


def _make_shape(layers: int, width: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        max_position_embeddings=_POSITIONS,
        initializer_range=width**-0.5,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        dtype="float32",
    )


def make_endless(path: Path, target: Path) -> Path:
    """A copy of a model that no token ends; weights are linked, not copied."""
    target.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir():
        copy = target / file.name
        copy.unlink(missing_ok=True)
        if file.name in _ENDS:
            settings = json.loads(file.read_text(encoding="utf-8"))
            copy.write_text(json.dumps({**settings, _ENDS[file.name]: None}, indent=2), encoding="utf-8")
        elif file.is_file():
            copy.symlink_to(file.resolve())
    return target
