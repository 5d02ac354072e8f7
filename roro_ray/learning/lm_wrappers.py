"""How ranks share one model: a copy each (DistributedDataParallel) or a shard each (FSDP2).

Both average gradients over the ranks. Neither sees the loss: they wrap the function from packed rows to
log-probabilities.
"""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from roro_ray.errors import ConfigError
from roro_ray.learning.packing import PackedScorer


def replicate(scorer: PackedScorer) -> nn.Module:
    """DDP over the parameters that are trainable now; the base has no buffer that changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument's new name is unknown to torch 2.9
        return DistributedDataParallel(scorer, broadcast_buffers=False)


def postpone_sync(scorer: nn.Module) -> AbstractContextManager[None]:
    """Gradients of all but the last pass stay on their rank (DDP); other strategies have nothing to postpone."""
    if isinstance(scorer, DistributedDataParallel):
        return cast(AbstractContextManager[None], scorer.no_sync())
    return contextlib.nullcontext()


def shard(scorer: PackedScorer, device: torch.device) -> None:
    """FSDP2: every decoder layer is a unit that is gathered for its own computation only; the rest is one more."""
    blocks = set(scorer.model._no_split_modules or ())
    layers = [module for module in scorer.modules() if type(module).__name__ in blocks]
    if not layers:
        raise ConfigError(
            f"lora.strategy=fsdp2: {type(scorer.model).__name__} does not say which modules may be sharded "
            "(_no_split_modules): use lora.strategy=ddp."
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(scorer, mesh=mesh)
