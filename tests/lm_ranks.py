"""Ranks of torch.distributed on one machine, for tests: all run the same updates, rank 0 keeps what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_lora import make_config, make_samples, make_texts, spread_out
from torch import Tensor

from roro_ray.learning.lm_run import CHECKPOINTS, LmRun, SftUpdate
from roro_ray.learning.lm_training import LoraTrainer
from roro_ray.learning.lm_wrappers import Ranks
from roro_ray.learning.lora import gather
from roro_ray.learning.updates import UpdateSettings

SETTINGS = UpdateSettings(16, entropy_weight=0.02, kl_weight=0.1, grad_clip=1e9)
Outcome = dict[str, tuple[dict[str, float], dict[str, Tensor]]]


def run_rank(rank: int, world: int, base: str, directory: str) -> None:
    """One process of a group over gloo; writes `STRATEGY.pt` and a checkpoint per strategy."""
    dist.init_process_group("gloo", f"file://{directory}/meet", rank=rank, world_size=world)
    for strategy in ("ddp", "fsdp2"):
        outcome = run_updates(base, strategy, Ranks(rank, world))
        run = LmRun(make_config(base, strategy=strategy), Path(directory) / strategy, ranks=Ranks(rank, world))
        for seed in range(2):
            run.apply(SftUpdate("judge", make_texts(seed=seed)))
        run.save()
        losses = run_half(base, strategy, Ranks(rank, world))
        if rank == 0:
            torch.save((outcome, losses), Path(directory) / f"{strategy}.pt")
            assert (Path(directory) / strategy / CHECKPOINTS).is_dir()
    dist.barrier()
    dist.destroy_process_group()


def run_updates(base: str, strategy: str, ranks: Ranks | None = None) -> Outcome:
    """Metrics and whole gradients of one update of each kind, in float64: many sequences, and fewer than ranks."""
    config = make_config(base, dtype="float64", strategy=strategy, grad_clip=1e9, gradient_checkpointing=True)
    trainer = LoraTrainer(config, ranks=ranks)
    for name in ("rubricor", "judge"):
        if strategy != "fsdp2":
            spread_out(trainer, name)
        else:
            spread_shards(trainer, name)
    outcome: Outcome = {}
    for name, kind, update in (
        ("judge", "sft", lambda: trainer.sft("judge", make_texts())),
        ("rubricor", "grpo", lambda: trainer.grpo("rubricor", make_samples(), SETTINGS)),
        ("judge", "one row", lambda: trainer.grpo("judge", make_samples(20), SETTINGS)),
    ):
        metrics = update()
        outcome[kind] = metrics, get_whole_gradients(trainer, name)
    return outcome


def run_half(base: str, strategy: str, ranks: Ranks | None = None) -> list[float]:
    """Losses of a few updates with a base in bfloat16 below adapters in float32."""
    trainer = LoraTrainer(make_config(base, dtype="bfloat16", strategy=strategy), ranks=ranks)
    return [trainer.sft("judge", make_texts())["loss"] for _ in range(4)]


def spread_shards(trainer: LoraTrainer, name: str) -> None:
    """The values of `spread_out`, which draws whole tensors, in a trainer that holds shards."""
    plain = LoraTrainer(make_config(trainer.config.base, dtype="float64"), names=[name])
    spread_out(plain, name)
    trainer.model.set_state(name, plain.model.get_state(name), "the test")


def get_whole_gradients(trainer: LoraTrainer, name: str) -> dict[str, Any]:
    """Every parameter's gradient, gathered from the ranks."""
    gradients = {key: parameter.grad for key, parameter in trainer.model.parameters_of(name).items()}
    return {key: gather(gradient) for key, gradient in gradients.items() if gradient is not None}
