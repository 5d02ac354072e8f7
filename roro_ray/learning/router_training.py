"""One iteration of GRPO on the router: take scored rollouts, weigh, update, publish.

Everything outside the mathematics comes in as a callable, so the same code trains in a test's process and in the
ranks of a Ray Train worker group. The weights after k updates have version k. Iteration i learns from rollouts of
version max(i - max_lag, 0), exactly (see `router_pipeline`).

The learner computes the old log-probabilities anew with the weights that made them (it keeps the last `max_lag`
versions) instead of trusting numbers computed in another process in batches of another make-up; the largest
difference to the reported ones is a metric.

Axes: `_B` trajectories, `_D` decisions of a trajectory, `_N` models of the pool.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roro_ray.config import Config, RouterConfig
from roro_ray.learning.grpo import EmptyBatchWarning, LossInputs, make_denominator, make_loss
from roro_ray.learning.lag import correct_lag
from roro_ray.learning.router_pipeline import RolloutPipeline, Run, ScoredBatch
from roro_ray.learning.router_rewards import Advantages, Score, finish_metrics, weigh_rollouts
from roro_ray.routing.failures import make_policy
from roro_ray.routing.router import RouterNetwork, copy_router, fill_router
from roro_ray.routing.router_batch import RouterBatch, encode_trajectories, score_decisions
from roro_ray.types import Query

State = dict[str, Tensor]
Publish = Callable[[State, int], None]
_TOKEN_METRICS = ("entropy", "clip_fraction", "old_kl", "advantage_abs")
_LAG_METRICS = ("lag_kl", "lag_cut")


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the work this learner rank has: groups rank, rank + world, ..; `add` sums a tensor over ranks."""

    rank: int = 0
    world: int = 1
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """One micro-batch, its advantages, and the log-probabilities that its ratios refer to."""

    batch: RouterBatch
    advantages_BD: Tensor
    reference_BD: Tensor


class RouterTrainer:
    """Holds the network, its optimizer and the versions that are still needed; `step` does one iteration.

    Args:
        queries: what iterations draw from.
        run: rolls specs out under a published version; with `router.max_lag` > 0 called from several threads.
        score: the Judge, or None where `router.beta` is 0; never called by two threads at once.
        publish: makes weights available to `run` under a version.
        share: this rank's part; every rank must call `step` the same number of times.
    """

    def __init__(
        self,
        config: Config,
        network: RouterNetwork,
        queries: Sequence[Query],
        run: Run,
        score: Score | None,
        publish: Publish,
        share: Share | None = None,
    ) -> None:
        self.config = config
        self.network = network
        self.optimizer = make_optimizer(network, config)
        self.iteration = 0
        self.past: dict[int, State] = {}
        self._publish = publish
        self._share = share or Share()
        self._pipeline = RolloutPipeline(config, queries, run, score, self._share.rank, self._share.world)
        self._behind = copy_router(network) if config.router.max_lag else None

    def begin(self) -> None:
        """Publish the present weights and the past ones that rollouts may still ask for."""
        for version, state in self.past.items():
            self._publish(state, version)
        self._publish(self.network.learned_state(), self.iteration)

    def step(self) -> dict[str, float]:
        """Do one iteration; returns its metrics, over all ranks.

        `reward`, `outcome`, `large_share`, `process` and `steps` are means over trajectories (NaN where there was
        none), `dropped`, `failed`, `stale` and the like counts. `lag` is how many versions behind the trajectories
        were, `lag_kl` how far that is (KL of the acting policy to the present one, nats a decision), `lag_cut` the
        share of decisions whose weight was cut. `seconds_*` are wall time of this rank: `seconds_rollout` and
        `seconds_score` from start to end, whatever ran beside them, `seconds_waited` what the learner stood idle
        for them, and `overlap` the share of the two that it did not.

        Raises:
            RoroError: rollouts or scoring failed as a whole.
        """
        started = time.perf_counter()
        batch = self._pipeline.take(self.iteration)
        waited_s = time.perf_counter() - started
        lag = self.iteration - batch.version
        assert 0 <= lag <= self.config.router.max_lag, f"rollouts lag {lag} versions"
        clock = time.perf_counter()
        weighed = weigh_rollouts(
            batch.rollouts, batch.verdicts, self.config.router, make_policy(self.config.faults).least_group
        )
        learned = self._update(weighed, batch.version)
        learn_s = time.perf_counter() - clock
        clock = time.perf_counter()
        self.iteration += 1
        for old in [v for v in self.past if v < self.iteration - self.config.router.max_lag]:
            del self.past[old]  # no rollout will be made with it any more
        self._publish(self.network.learned_state(), self.iteration)
        metrics = {"iteration": float(self.iteration), "lag": float(lag)}
        metrics |= finish_metrics(self._add_sums(weighed.sums)) | learned | _time_metrics(batch, waited_s)
        metrics |= {
            "seconds_learn": learn_s,
            "seconds_publish": time.perf_counter() - clock,
            "seconds": time.perf_counter() - started,
        }
        return metrics

    def close(self) -> None:
        """Wait for no more rollouts."""
        self._pipeline.close()

    def _update(self, weighed: Advantages, version: int) -> dict[str, float]:
        """`router.epochs` optimizer steps on all ranks' trajectories together; metrics of the last one."""
        settings = self.config.router
        parts = [
            self._encode(weighed, start, start + settings.micro_batch)
            for start in range(0, len(weighed.trajectories), settings.micro_batch)
        ]
        longest = self.config.episode.max_steps
        own = sum(make_denominator(batch.decision_mask_BD, settings.normalisation, longest) for batch, _ in parts)
        if settings.normalisation != "dapo" and weighed.trajectories:
            # Dropped rows count: late in training a handful is left, and must not move the weights as all did.
            own *= weighed.sums["episodes"] / len(weighed.trajectories)
        denominator = float(self._share.add(torch.tensor([own], dtype=torch.float64)))
        if self.config.router.max_lag:
            self.past[self.iteration] = {k: v.detach().clone() for k, v in self.network.learned_state().items()}
        if denominator == 0:
            warnings.warn(
                f"iteration {self.iteration}: every group's reward is constant or missing, nothing was learned",
                EmptyBatchWarning,
                stacklevel=2,
            )
            return {"empty": 1.0, "loss": 0.0, "grad_norm": 0.0, "entropy": math.nan, "log_prob_gap": 0.0}
        inputs, lagged = self._refer([batch for batch, _ in parts], [each for _, each in parts], version)
        decay_learning_rates(self.optimizer, self.iteration, settings)
        for _ in range(settings.epochs):
            metrics = self._descend(inputs, denominator)
        return metrics | lagged | {"empty": 0.0}

    def _descend(self, parts: Sequence[_Part], denominator: float) -> dict[str, float]:
        """One optimizer step on all micro-batches of all ranks; its metrics."""
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = dict.fromkeys(("decisions", "loss", *_TOKEN_METRICS), 0.0)
        for part in parts:
            metrics = self._backward(part, denominator)
            totals["decisions"] += metrics["tokens"]
            totals["loss"] += metrics["loss"]
            for name in _TOKEN_METRICS:
                totals[name] += metrics[name] * metrics["tokens"]
        parameters = self._add_gradients()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.router.grad_clip)
        self.optimizer.step()
        totals = self._add_sums(totals)
        means = {name: totals[name] / totals["decisions"] for name in _TOKEN_METRICS}
        return {"loss": totals["loss"], "grad_norm": float(norm), **means}

    def _encode(self, weighed: Advantages, start: int, stop: int) -> tuple[RouterBatch, Tensor]:
        """One micro-batch and its advantages [B, D]."""
        device = next(self.network.parameters()).device
        batch = encode_trajectories(self.network, weighed.queries[start:stop], weighed.trajectories[start:stop])
        advantages_BD = torch.zeros(batch.decision_mask_BD.shape)
        for row, values in enumerate(weighed.values[start:stop]):
            advantages_BD[row, : len(values)] = torch.tensor(values)
        return batch.to(device), advantages_BD.to(device)

    def _refer(
        self, batches: Sequence[RouterBatch], advantages: Sequence[Tensor], version: int
    ) -> tuple[list[_Part], dict[str, float]]:
        """The micro-batches with what their ratios refer to, and the metrics of the lag."""
        settings = self.config.router
        acting = self.network
        if version != self.iteration:
            assert self._behind is not None, "a version behind the present one, and max_lag is 0"
            acting = self._behind
            fill_router(acting, self.past[version])
        parts, gap = [], 0.0
        totals = dict.fromkeys(("decisions", *_LAG_METRICS), 0.0)
        for batch, advantages_BD in zip(batches, advantages, strict=True):
            mask_BD = batch.decision_mask_BD
            with torch.no_grad():
                acting_BD = score_decisions(acting, batch)[0]
                present_BD = acting_BD if acting is self.network else score_decisions(self.network, batch)[0]
            lagged = correct_lag(acting_BD, present_BD, mask_BD, settings.objective, settings.weight_cap)
            parts.append(_Part(batch, advantages_BD * lagged.weights_BD, lagged.reference_BD))
            gap_D = (acting_BD - batch.old_log_probs_BD).abs()[mask_BD]
            gap = max(gap, float(gap_D.max()) if gap_D.numel() else 0.0)
            totals["decisions"] += float(mask_BD.sum())
            for name in _LAG_METRICS:
                totals[name] += lagged.sums[name]
        totals = self._add_sums(totals)
        means = {name: totals[name] / totals["decisions"] for name in _LAG_METRICS}
        return parts, {"log_prob_gap": gap, **means}

    def _backward(self, part: _Part, denominator: float) -> dict[str, float]:
        """Add a micro-batch's gradient; its metrics."""
        settings = self.config.router
        log_probs_BD, entropy_BD = score_decisions(self.network, part.batch)
        output = make_loss(
            LossInputs(log_probs_BD, part.reference_BD, part.advantages_BD, part.batch.decision_mask_BD, entropy_BD),
            settings.clip,
            settings.clip,
            settings.normalisation,
            settings.entropy,
            denominator=denominator,
        )
        output.loss.backward()
        return output.metrics

    def _add_gradients(self) -> list[torch.nn.Parameter]:
        """Sum every gradient over the ranks; a rank without a trajectory adds zeros."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if self._share.world > 1:
            for parameter in parameters:
                grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = self._share.add(grad)
        return parameters

    def _add_sums(self, sums: dict[str, float]) -> dict[str, float]:
        names = sorted(sums)
        added = self._share.add(torch.tensor([sums[name] for name in names], dtype=torch.float64))
        return dict(zip(names, added.tolist(), strict=True))


def _time_metrics(batch: ScoredBatch, waited_s: float) -> dict[str, float]:
    work_s = batch.rollout_s + batch.score_s
    return {
        "seconds_rollout": batch.rollout_s,
        "seconds_score": batch.score_s,
        "seconds_waited": waited_s,
        "overlap": min(max(1 - waited_s / work_s, 0.0), 1.0) if work_s else math.nan,
    }


def make_optimizer(network: RouterNetwork, config: Config) -> torch.optim.Optimizer:
    """Adam with one learning rate for the encoder and one for the head."""
    groups = [{"params": list(network.head.parameters()), "lr": config.router.head_lr}]
    if network.body is not None:
        learned = [parameter for parameter in network.body.parameters() if parameter.requires_grad]
        groups.append({"params": learned, "lr": config.router.encoder_lr})
    return torch.optim.Adam(groups)


def decay_learning_rates(optimizer: torch.optim.Optimizer, iteration: int, settings: RouterConfig) -> None:
    """Linear decay from the configured rates to `final_lr` of them; a function of the iteration alone."""
    done = iteration / max(settings.iterations - 1, 1)
    factor = 1 - (1 - settings.final_lr) * min(done, 1.0)
    for group, rate in zip(optimizer.param_groups, (settings.head_lr, settings.encoder_lr), strict=False):
        group["lr"] = rate * factor
