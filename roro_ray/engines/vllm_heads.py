"""Models with narrow attention heads, made wide enough for vLLM's CPU attention, which takes 32 and a few widths more.

The embedded world's smallest models have heads of 14 and 16. Zeros beside a head's values change nothing, if what
depends on the width is undone: the scale 1/sqrt(width) of the scores, the mean in the norm of queries and keys, and the
angles of the rotary embedding, whose halves the zeros push apart. So the widened model computes the same function, and
steps are the same but for rounding. Only CPUs need this, and only models of a toy's size.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from roro_ray.errors import EngineError

WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_FAMILIES = ("llama", "qwen2", "qwen3")


def read_head(directory: Path) -> int:
    """The width of a model's attention heads; 0 where it has none."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False).get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    return int(getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))


def is_narrow(directory: Path) -> bool:
    """Whether vLLM's CPU attention cannot take a model's heads as they are."""
    return 0 < read_head(directory) < WIDTHS[-1] and read_head(directory) not in WIDTHS


def widen_model(directory: Path, target: Path) -> None:
    """Write to `target` the same model with heads of the next width that is taken.

    Raises:
        EngineError: the model is of a family whose attention this module does not know.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    old = read_head(directory)
    if config.get("model_type") not in _FAMILIES or rope.get("rope_type", "default") != "default" or old % 2:
        raise EngineError(
            f"the model in {directory} has attention heads of {old}, and vLLM's CPU attention takes "
            f"{', '.join(map(str, WIDTHS))} only; expected such heads, or a {' / '.join(_FAMILIES)} model with plain "
            "rotary embeddings, which can be widened: use engine=hf for this one"
        )
    widener = _Widener(old, _next_width(old), normed=config["model_type"] == "qwen3")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= {name: widener.widen(name, value.float()) for name, value in load_file(file).items()}
    # Frequency i of a width is theta^(-2i/width): theta^(new/old) gives a wider head the old ones.
    theta = float(rope.get("rope_theta") or config.pop("rope_theta", 1e4)) ** (widener.new / old)
    config |= {"head_dim": widener.new, "dtype": "float32", "rope_parameters": rope | {"rope_theta": theta}}
    for file in directory.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".index.json")) and file.name != "config.json":
            shutil.copy2(file, target)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def widen_adapter(directory: Path, target: Path, model: Path) -> None:
    """Write to `target` the same LoRA adapter for the widened copy of the model in directory `model`."""
    kind = json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"]
    old = read_head(model)
    widener = _Widener(old, _next_width(old), normed=kind == "qwen3")
    tensors = load_file(directory / "adapter_model.safetensors")
    shutil.copy2(directory / "adapter_config.json", target)
    save_file(
        {name: widener.widen_lora(name, value.float()) for name, value in tensors.items()},
        target / "adapter_model.safetensors",
        {"format": "pt"},
    )


@dataclass(frozen=True, slots=True)
class _Widener:
    """From heads of width `old` to `new`; `normed`: queries and keys pass through a norm of their own."""

    old: int
    new: int
    normed: bool

    @property
    def scale(self) -> float:
        """Makes up for 1/sqrt(new) in place of 1/sqrt(old), and gives a norm the mean of squares that it had."""
        return math.sqrt(self.new / self.old)

    def widen(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A weight or bias of the model, by its name."""
        part = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if part == "q_proj":
            return self._spread(value) * self.scale
        if part == "k_proj":
            return self._spread(value) * (self.scale if self.normed else 1.0)
        if part == "q_norm":
            return self._spread(value)
        if part == "k_norm":
            return self._spread(value) / self.scale
        if part == "v_proj":
            return self._append(value)
        if part == "o_proj" and not name.endswith(".bias"):
            return self._append(value.T).T.contiguous()
        return value

    def widen_lora(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Of the two factors B A of an update: B writes queries, keys and values; A reads what o_proj is given."""
        module, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        whole = f"{module}.weight"
        if (factor == "A") == module.endswith(".o_proj"):
            return self.widen(whole, value)
        return value

    def _spread(self, value: torch.Tensor) -> torch.Tensor:
        """Rows of heads, the two halves of each at the beginnings of the wider halves (rotary pairs stay pairs)."""
        half = self.old // 2
        rows = value.reshape(-1, 2, half, *value.shape[1:])
        wide = rows.new_zeros(rows.shape[0], 2, self.new // 2, *value.shape[1:])
        wide[:, :, :half] = rows
        return wide.reshape(-1, *value.shape[1:])

    def _append(self, value: torch.Tensor) -> torch.Tensor:
        """Rows of heads, zeros behind each head's own."""
        rows = value.reshape(-1, self.old, *value.shape[1:])
        wide = rows.new_zeros(rows.shape[0], self.new, *value.shape[1:])
        wide[:, : self.old] = rows
        return wide.reshape(-1, *value.shape[1:])


def _next_width(old: int) -> int:
    return next(width for width in WIDTHS if width >= old)
