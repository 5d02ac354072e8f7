"""One base model with several named LoRA adapters (peft): Rubricor and Judge share the weights that cost memory.

Only adapters are trained, and in float32 whatever the base's dtype, so that small updates are not rounded away. There
is no dropout: the ratio of new to old probabilities would measure it.

Adapters are saved in peft's format, which vLLM reads. Everything here that reads or writes adapter tensors takes and
gives whole ones, also where FSDP2 keeps a shard on every rank; then every rank must call it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from roro_ray.config import LoraConfig
from roro_ray.engines.hub import resolve_model_path
from roro_ray.engines.loading import quiet_transformers
from roro_ray.errors import CheckpointError, ConfigError
from roro_ray.learning.adapter_files import CONFIG, WEIGHTS
from roro_ray.learning.packed_attention import SEGMENTS
from roro_ray.routing.draws import mix_seed

State = dict[str, Tensor]
ALL_LINEAR = "all-linear"


def load_base(config: LoraConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The base model, frozen, with the attention and checkpointing that the config asks for.

    Raises:
        ConfigError: what lies there is no model, or it does not support the attention asked for.
        EngineError: the model of the hub cannot be had.
    """
    path = resolve_model_path(config.base, config.revision)
    dtype = getattr(torch, config.dtype)
    attention = choose_attention(config.attention, dtype, torch.device(device))
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True
            )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"lora.base={config.base!r} does not load with attention {attention}: {error}. Give a directory in Hugging "
            "Face format or a model of the hub, and an attention that it supports (lora.attention)."
        ) from error
    model: PreTrainedModel = loaded.to(device).requires_grad_(False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def choose_attention(asked: str, dtype: torch.dtype, device: torch.device) -> str:
    """`auto` resolved: the varlen kernel of flash-attn where it can run, else sequence by sequence through sdpa."""
    if asked != "auto":
        return asked
    half = dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if half and device.type == "cuda" and is_flash_attn_2_available() else SEGMENTS


class LoraModel:
    """A base model with adapters, of which one at a time is active.

    Args:
        base: from `load_base`; it is changed in place.
        names: of the adapters; the first is active.
        seed: of the adapters' random half (the other half begins at 0: an adapter begins as the base).

    Raises:
        ConfigError: the target modules do not exist in this model.
    """

    def __init__(self, base: PreTrainedModel, config: LoraConfig, names: Sequence[str], seed: int = 0) -> None:
        self.names = tuple(names)
        self._base_path = config.base
        options = peft.LoraConfig(
            r=config.rank,
            lora_alpha=cast(int, config.alpha),
            lora_dropout=0.0,
            target_modules=list(config.target_modules) or ALL_LINEAR,
            bias="none",
            task_type="CAUSAL_LM",
        )
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mix_seed(seed, "adapter", self.names[0]))
                self.peft = peft.get_peft_model(base, copy.deepcopy(options), adapter_name=self.names[0])
                for name in self.names[1:]:
                    torch.manual_seed(mix_seed(seed, "adapter", name))
                    self.peft.add_adapter(name, copy.deepcopy(options))
        except ValueError as error:
            raise ConfigError(
                f"lora.target_modules={list(config.target_modules)} fits no module of {type(base).__name__}: {error}"
            ) from error
        self.activate(self.names[0])

    @property
    def causal(self) -> PreTrainedModel:
        """The model itself, with LoRA layers inside."""
        return cast(PreTrainedModel, self.peft.get_base_model())

    def activate(self, name: str, train_only: bool = False) -> None:
        """Compute with this adapter.

        Every adapter stays trainable, unless `train_only`: wrappers of the model record what is, and what is not in
        use gets no gradient anyway.
        """
        if name not in self.names:
            raise ConfigError(f"no adapter {name!r}: expected one of {', '.join(self.names)}.")
        self.peft.set_adapter(name)
        if not train_only:
            self._make_trainable()

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Compute with the base alone (the reference of a KL term)."""
        with self.peft.disable_adapter():
            yield
        self._make_trainable()

    def _make_trainable(self) -> None:
        for name in self.names:
            for parameter in self.parameters_of(name).values():
                parameter.requires_grad_(True)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter by their names in peft's files."""
        infix = f".{name}."
        return {
            key.replace(infix, ".", 1): parameter
            for key, parameter in self.peft.named_parameters()
            if infix in key and ".lora_" in key
        }

    def get_state(self, name: str) -> State:
        """Copies of an adapter's tensors, whole, on the CPU."""
        return {key: gather(parameter) for key, parameter in self.parameters_of(name).items()}

    def set_state(self, name: str, state: Mapping[str, Tensor], source: str) -> None:
        """Fill an adapter.

        Raises:
            CheckpointError: names `source` and what is missing, unknown or of another shape.
        """
        parameters = self.parameters_of(name)
        odd = sorted(parameters.keys() ^ state.keys())
        shapes = [key for key in parameters if key in state and parameters[key].shape != state[key].shape]
        if odd or shapes:
            key = (odd or shapes)[0]
            got = tuple(state[key].shape) if key in state else "nothing"
            expected = tuple(parameters[key].shape) if key in parameters else "nothing"
            raise CheckpointError(
                f"{source} does not fit adapter {name!r}: {key} is {got}, expected {expected} ({len(odd)} tensors "
                f"missing or unknown, {len(shapes)} of another shape). Use the same lora.base, lora.rank and "
                "lora.target_modules."
            )
        with torch.no_grad():
            for key, parameter in parameters.items():
                fill(parameter, state[key])

    def write_files(self, name: str, state: State, directory: Path) -> None:
        """Write an adapter's state as peft and vLLM read it; the directory must exist."""
        save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
        options: Any = copy.copy(self.peft.peft_config[name])
        options.inference_mode = True
        options.target_modules = sorted(options.target_modules)  # a set: the same adapter gives the same bytes
        options.base_model_name_or_path = self._base_path
        options.save_pretrained(str(directory))

    def load_files(self, name: str, directory: Path) -> None:
        """Fill an adapter from a directory in peft's format.

        Raises:
            CheckpointError: it holds no adapter, or one of another shape or scale.
        """
        try:
            options = peft.PeftConfig.from_pretrained(str(directory))
            state = load_file(directory / WEIGHTS)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"{str(directory)!r} holds no adapter ({error}): expected {WEIGHTS} and {CONFIG} in peft's format."
            ) from error
        mine: Any = self.peft.peft_config[name]
        scale, expected = getattr(options, "lora_alpha", None), mine.lora_alpha
        if scale != expected or getattr(options, "r", None) != mine.r:
            raise CheckpointError(
                f"the adapter in {str(directory)!r} has alpha {scale} and rank {getattr(options, 'r', None)}, expected "
                f"{expected} and {mine.r}: use the same lora.alpha and lora.rank."
            )
        self.set_state(name, state, repr(str(directory)))


def gather(tensor: Tensor) -> Tensor:
    """A whole copy on the CPU; of a sharded tensor, every rank must ask at once."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True).contiguous()


def fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, or this rank's shard of it, into another in place."""
    value = whole.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
