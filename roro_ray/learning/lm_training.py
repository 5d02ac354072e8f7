"""Updates of LoRA adapters on a base model of real size: SFT and GRPO in packed rows, alone or in a group of ranks.

The mathematics is that of `learning.grpo` and `learning.sft`; here are rows, ranks and optimisers. Every rank is given
the whole batch and takes its rows of it; the loss is divided by the denominator of the whole batch, so that the
gradient is the same for any number of ranks and any packing. The weights after k updates have version k.

One AdamW per adapter, in float32. Its moments begin anew where an adapter changes from one objective to the other: the
scales of their gradients have nothing to do with each other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from roro_ray.config import LoraConfig
from roro_ray.errors import CheckpointError, ConfigError, TrainingError, did_you_mean
from roro_ray.learning.grpo import make_denominator
from roro_ray.learning.lm_wrappers import Ranks, postpone_sync, replicate, shard
from roro_ray.learning.lora import LoraModel, State, fill, gather, load_base
from roro_ray.learning.packing import (
    PackedScorer,
    check_actions,
    make_idle_batch,
    pack_row,
    scatter_actions,
    spread_rows,
)
from roro_ray.learning.sequences import TokenBatch
from roro_ray.learning.sft import IGNORED, SftBatch
from roro_ray.learning.updates import Score, UpdateSettings, add_metrics, backward_part, mean_metrics

ADAPTERS = ("rubricor", "judge")
_BETAS = (0.9, 0.95)
_MOMENT = "/"  # between a parameter's name and the name of its moment
Backward = Callable[[TokenBatch, Score], dict[str, float]]


@dataclass(frozen=True, slots=True)
class AdapterState:
    """An adapter and its optimiser, whole, on the CPU: `moments` by parameter and name, joined by a slash."""

    weights: State
    moments: State
    version: int
    objective: str


@dataclass(slots=True)
class _Adapter:
    """What is kept of each adapter beside its weights."""

    parameters: dict[str, nn.Parameter]
    scorer: nn.Module
    optimizer: torch.optim.AdamW
    version: int = 0
    objective: str = ""


class LoraTrainer:
    """Base, adapters and their optimisers; each call of `sft` or `grpo` is one update of one adapter.

    With several ranks every one must make the same calls with the same batches.

    Args:
        config: `lora.strategy` decides how ranks share the work: `ddp` and `fsdp2` need an initialised process group.
        names: of the adapters; their learning rates are `lora.NAME_lr` (GRPO) and `lora.sft_lr`.
        device: of this rank.
        seed: of the adapters' first weights; the same on every rank.

    Raises:
        ConfigError: the base does not load, its logits are more than its output layer, or an adapter is unknown.
    """

    def __init__(
        self,
        config: LoraConfig,
        names: Sequence[str] = ADAPTERS,
        device: torch.device | str = "cpu",
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        for name in names:
            if name not in ADAPTERS:
                raise ConfigError(
                    f"no learning rate for adapter {name!r}: expected one of {', '.join(ADAPTERS)}"
                    f"{did_you_mean(name, ADAPTERS)}."
                )
        self.config = config
        self.device = torch.device(device)
        self.ranks = ranks or Ranks()
        self.model = LoraModel(load_base(config, device), config, names, seed)
        scorer = PackedScorer(self.model.causal, config.logits_chunk).train()  # checkpoints layers in train mode only
        if config.strategy == "fsdp2":
            shard(scorer, self.device)
        self._adapters = {name: self._make_adapter(name, scorer) for name in names}
        self.model.activate(names[0])

    @property
    def versions(self) -> dict[str, int]:
        """Updates done of each adapter."""
        return {name: adapter.version for name, adapter in self._adapters.items()}

    def sft(self, name: str, batch: SftBatch, scale: float = 1.0) -> dict[str, float]:
        """One update on labelled tokens (`make_sft_batch`): mean cross-entropy over all of them.

        Args:
            scale: share of `lora.sft_lr` (see `learning.sft.scale_rate`).

        Returns:
            `loss` in nats a token, `tokens`, `rows`, `passes` (forward passes of a rank), `grad_norm` before clipping;
            `empty` is 1 where no token was labelled and nothing was learned.

        Raises:
            ConfigError: a sequence is longer than `lora.token_budget`, or its first token is labelled.
            TrainingError: the gradient is not finite; the adapter is as before.
        """
        ids_BT, mask_BT, labels_BT = batch
        action_BT = labels_BT != IGNORED
        rows = len(ids_BT)
        zeros_B = torch.zeros(rows)
        tokens = TokenBatch(ids_BT, mask_BT, action_BT, torch.zeros(ids_BT.shape), zeros_B, torch.arange(rows))
        count = int(action_BT.sum())

        def backward(part: TokenBatch, score: Score) -> dict[str, float]:
            loss = -score(part)[0].sum() * (self.ranks.world / count)
            loss.backward()
            return {"loss": float(loss.detach()), "tokens": float(part.action_tokens), "rows": float(len(part))}

        return self._update(name, "sft", tokens, self.config.sft_lr * scale, self.config.grad_clip, 1.0, backward)

    def grpo(self, name: str, batch: TokenBatch, settings: UpdateSettings, scale: float = 1.0) -> dict[str, float]:
        """One GRPO update on sampled completions (`make_token_batch`), as `updates.update_model` does it.

        Args:
            batch: leave out the rows that `make_advantages` dropped (`TokenBatch.select`).
            settings: of the loss. The budget of a forward pass is `lora.token_budget`, not its `max_tokens`; the
                reference of its KL term is the base without adapter.
            scale: share of the adapter's learning rate.

        Returns:
            the metrics of `make_loss`, `passes` and `grad_norm`; `empty` is 1 where nothing was learned.

        Raises:
            ConfigError: a sequence is longer than `lora.token_budget`, or its first token is an action.
            TrainingError: the gradient is not finite; the adapter is as before.
        """
        denominator = make_denominator(batch.action_mask_BT, settings.normalisation, settings.max_length)

        def backward(part: TokenBatch, score: Score) -> dict[str, float]:
            reference = partial(self._score_base, score) if settings.kl_weight else None
            return backward_part(part, score, settings, denominator / self.ranks.world, reference)

        rate = float(getattr(self.config, f"{name}_lr", 0.0)) * scale
        return self._update(name, "grpo", batch, rate, settings.grad_clip, settings.temperature, backward)

    def _update(
        self,
        name: str,
        objective: str,
        batch: TokenBatch,
        rate: float,
        grad_clip: float,
        temperature: float,
        backward: Backward,
    ) -> dict[str, float]:
        """Gradients of all rows of all ranks, one step of the optimiser, the metrics."""
        self.model.activate(name)
        adapter = self._adapters[name]
        parts = self._take_share(batch)
        if not parts:
            adapter.version += 1
            return {"empty": 1.0, "tokens": 0.0, "rows": 0.0, "loss": 0.0, "grad_norm": 0.0, "passes": 0.0}
        adapter.optimizer.zero_grad(set_to_none=True)
        score = partial(self._score, adapter.scorer, temperature)
        totals: dict[str, float] = {}
        for index, part in enumerate(parts):
            with postpone_sync(adapter.scorer) if index < len(parts) - 1 else contextlib.nullcontext():
                if part is None:
                    self._idle(backward, score)
                else:
                    add_metrics(totals, backward(part, score))
        norm = self._step(name, objective, rate, grad_clip)
        metrics = mean_metrics(self.ranks.add(totals))
        metrics["loss"] /= self.ranks.world  # wrappers average gradients, so the losses were multiplied
        return metrics | {"grad_norm": norm, "passes": float(len(parts)), "empty": 0.0}

    def _take_share(self, batch: TokenBatch) -> list[TokenBatch | None]:
        """This rank's micro-batches, each one packed row (None: nothing to do in this pass); none where no token is
        an action. What is wrong with a batch is found on every rank, before any waits for another."""
        kept = batch.select(batch.action_mask_BT.any(dim=1)) if len(batch) else batch
        if not len(kept):
            return []
        check_actions(kept.attention_mask_BT, kept.action_mask_BT)
        lengths = kept.attention_mask_BT.sum(dim=1).tolist()
        rows = spread_rows(lengths, self.config.token_budget, self.ranks.world)[self.ranks.rank]
        return [kept.select(torch.tensor(indices)).to(self.device) if indices else None for indices in rows]

    def _score(self, scorer: nn.Module, temperature: float, part: TokenBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [B, T] of sequences that fit one row."""
        row = pack_row(part.ids_BT, part.attention_mask_BT, part.action_mask_BT)
        log_probs_A, entropy_A = scorer(
            row.ids_1N, row.positions_1N, row.predicting_A, row.targets_A, temperature=temperature
        )
        return scatter_actions(log_probs_A, part.action_mask_BT), scatter_actions(entropy_A, part.action_mask_BT)

    def _score_base(self, score: Score, part: TokenBatch) -> tuple[Tensor, Tensor]:
        with self.model.without_adapters():
            return score(part)

    def _idle(self, backward: Backward, score: Score) -> None:
        """Take part in the others' collective operations with a sequence of no weight: zeros are added."""

        def score_zeros(part: TokenBatch) -> tuple[Tensor, Tensor]:
            log_probs_BT, entropy_BT = score(part)
            return 0.0 * log_probs_BT, 0.0 * entropy_BT

        backward(make_idle_batch().to(self.device), score_zeros)

    def _step(self, name: str, objective: str, rate: float, grad_clip: float) -> float:
        """Clip, step and count; the norm of the whole gradient before clipping."""
        adapter = self._adapters[name]
        total = torch.nn.utils.clip_grad_norm_(adapter.parameters.values(), grad_clip)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if not math.isfinite(norm):
            raise TrainingError(
                f"{objective} update {adapter.version + 1} of adapter {name!r}: the gradient's norm is {norm}; nothing "
                "was changed. Look for extreme old log-probabilities or advantages, or lower the learning rate."
            )
        if adapter.objective != objective:
            adapter.optimizer.state.clear()
            adapter.objective = objective
        adapter.optimizer.param_groups[0]["lr"] = rate
        adapter.optimizer.step()
        adapter.version += 1
        return norm

    def _make_adapter(self, name: str, scorer: PackedScorer) -> _Adapter:
        self.model.activate(name, train_only=True)
        # One wrapper per adapter: each waits for the gradients of what was trainable when it was made.
        wrapped: nn.Module = replicate(scorer) if self.config.strategy == "ddp" else scorer
        parameters = self.model.parameters_of(name)
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=self.config.sft_lr, betas=_BETAS, weight_decay=self.config.weight_decay
        )
        return _Adapter(parameters, wrapped, optimizer)

    def get_state(self, name: str) -> AdapterState:
        """What an adapter goes on from; with FSDP2 every rank must ask."""
        adapter = self._adapters[name]
        moments = {
            f"{key}{_MOMENT}{field}": gather(value)
            for key, parameter in adapter.parameters.items()
            for field, value in adapter.optimizer.state.get(parameter, {}).items()
        }
        return AdapterState(self.model.get_state(name), moments, adapter.version, adapter.objective)

    def set_state(self, name: str, state: AdapterState, source: str) -> None:
        """Go on from a state, whatever number of ranks it was made with.

        Raises:
            CheckpointError: it does not fit the adapter; `source` is named.
        """
        adapter = self._adapters[name]
        self.model.set_state(name, state.weights, source)
        adapter.optimizer.state.clear()
        for key, value in state.moments.items():
            parameter_key, _, field = key.rpartition(_MOMENT)
            parameter = adapter.parameters.get(parameter_key)
            if parameter is None or (value.ndim and value.shape != parameter.shape):
                raise CheckpointError(f"{source} does not fit adapter {name!r}: {key} has shape {tuple(value.shape)}.")
            kept = torch.zeros_like(parameter, requires_grad=False) if value.ndim else value.clone()
            if value.ndim:
                fill(kept, value)
            adapter.optimizer.state[parameter][field] = kept
        adapter.version, adapter.objective = state.version, state.objective
