"""How ranks share one model: a copy each (DistributedDataParallel) or a shard each (FSDP2).

Both average gradients over the ranks. Neither sees the loss: they wrap the function from packed rows to
log-probabilities. `Ranks` is what the trainer itself needs to know of the others.
"""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from roro_ray.errors import ConfigError
from roro_ray.learning.packing import PackedScorer


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together (torch.distributed must be up where there are several)."""

    rank: int = 0
    world: int = 1

    def add(self, sums: dict[str, float]) -> dict[str, float]:
        """Named sums over all ranks; a rank may lack a name."""
        if self.world == 1:
            return sums
        shares: list[dict[str, float]] = [{} for _ in range(self.world)]
        dist.all_gather_object(shares, sums)
        return {name: sum(share.get(name, 0.0) for share in shares) for name in sorted({n for s in shares for n in s})}

    def wait(self) -> None:
        """Go on when every rank is here."""
        if self.world > 1:
            dist.barrier()


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
