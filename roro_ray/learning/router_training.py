"""One iteration of GRPO on the router: plan, roll out, score, weigh, update, publish.

Everything outside the mathematics comes in as a callable, so the same code trains in a test's process and in the
ranks of a Ray Train worker group. The weights after k updates have version k. Iteration i learns from rollouts of
version max(i - max_lag, 0), exactly: a run is the same whatever the timing, and a resumed run the same as a straight
one. With `max_lag` > 0 the rollouts of the next iterations are in flight while this one learns.

The learner computes the old log-probabilities anew with the weights that made them (it keeps the last `max_lag`
versions) instead of trusting numbers computed in another process in batches of another make-up; the largest
difference to the reported ones is a metric.

Axes: `_B` trajectories, `_D` decisions of a trajectory, `_N` models of the pool.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from roro_ray.config import Config, RouterConfig
from roro_ray.learning.grpo import EmptyBatchWarning, LossInputs, make_denominator, make_loss
from roro_ray.learning.router_plan import GroupPlan, make_plan
from roro_ray.learning.router_rewards import (
    Advantages,
    Rollouts,
    Score,
    collect_rollouts,
    finish_metrics,
    score_rollouts,
    weigh_rollouts,
)
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.routing.router import RouterNetwork, fill_router
from roro_ray.routing.router_batch import RouterBatch, encode_trajectories, score_decisions
from roro_ray.types import Query, Trajectory

State = dict[str, Tensor]
Run = Callable[[Sequence[EpisodeSpec], int], Sequence[Trajectory | EpisodeFailure]]
Publish = Callable[[State, int], None]
_TOKEN_METRICS = ("entropy", "clip_fraction", "old_kl", "advantage_abs")


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the work this learner rank has: groups rank, rank + world, ..; `add` sums a tensor over ranks."""

    rank: int = 0
    world: int = 1
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor


class RouterTrainer:
    """Holds the network, its optimizer and the versions that are still needed; `step` does one iteration.

    Args:
        queries: what iterations draw from.
        run: rolls specs out under a published version; may be called from several threads.
        score: the Judge, or None where `router.beta` is 0.
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
        self._queries = list(queries)
        self._run = run
        self._score = score
        self._publish = publish
        self._share = share or Share()
        self._behind = copy.deepcopy(network) if config.router.max_lag else None
        self._threads = ThreadPoolExecutor(config.router.max_lag) if config.router.max_lag else None
        self._flying: dict[int, Future[tuple[Rollouts, float]]] = {}

    def begin(self) -> None:
        """Publish the present weights and the past ones that rollouts may still ask for."""
        for version, state in self.past.items():
            self._publish(state, version)
        self._publish(self.network.learned_state(), self.iteration)

    def step(self) -> dict[str, float]:
        """Do one iteration; returns its metrics, over all ranks.

        `reward`, `outcome`, `large_share`, `process` and `steps` are means over trajectories (NaN where there was
        none), `dropped`, `failed`, `stale` and the like counts, `lag` versions, `seconds_*` wall time of this rank.
        """
        started = time.perf_counter()
        version = max(self.iteration - self.config.router.max_lag, 0)
        rollouts, rollout_s = self._collect(self.iteration)
        waited_s = time.perf_counter() - started
        clock = time.perf_counter()
        verdicts = score_rollouts(rollouts, self._score if self.config.router.beta else None)
        score_s = time.perf_counter() - clock
        clock = time.perf_counter()
        weighed = weigh_rollouts(rollouts, verdicts, self.config.router)
        learned = self._update(weighed, version)
        learn_s = time.perf_counter() - clock
        clock = time.perf_counter()
        lag = self.iteration - version
        self.iteration += 1
        for old in [v for v in self.past if v < self.iteration - self.config.router.max_lag]:
            del self.past[old]  # no rollout will be made with it any more
        self._publish(self.network.learned_state(), self.iteration)
        sums = self._add_sums(weighed.sums)
        metrics = {"iteration": float(self.iteration), "lag": float(lag), **finish_metrics(sums), **learned}
        metrics |= {
            "seconds_rollout": rollout_s,
            "seconds_waited": waited_s,
            "seconds_score": score_s,
            "seconds_learn": learn_s,
            "seconds_publish": time.perf_counter() - clock,
            "seconds": time.perf_counter() - started,
        }
        return metrics

    def close(self) -> None:
        """Wait for no more rollouts."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _collect(self, iteration: int) -> tuple[Rollouts, float]:
        """This iteration's rollouts (seconds spent beside them), with those of the next ones sent on their way."""
        if self._threads is None:
            return self._roll_out(iteration)
        last = min(iteration + self.config.router.max_lag, self.config.router.iterations - 1)
        for ahead in range(iteration, max(last, iteration) + 1):
            if ahead not in self._flying:
                self._flying[ahead] = self._threads.submit(self._roll_out, ahead)
        return self._flying.pop(iteration).result()

    def _roll_out(self, iteration: int) -> tuple[Rollouts, float]:
        started = time.perf_counter()
        version = max(iteration - self.config.router.max_lag, 0)
        plan = make_plan(self._queries, self.config.router, self.config.seed, iteration)
        groups: list[GroupPlan] = plan[self._share.rank :: self._share.world]
        results = self._run([spec for group in groups for spec in group.specs], version) if groups else []
        return collect_rollouts(groups, results, version), time.perf_counter() - started

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
        old_BD = [self._old_log_probs(batch, version) for batch, _ in parts]
        decay_learning_rates(self.optimizer, self.iteration, settings)
        for _ in range(settings.epochs):
            metrics = self._descend(parts, old_BD, denominator)
        return metrics | {"empty": 0.0}

    def _descend(
        self, parts: Sequence[tuple[RouterBatch, Tensor]], old_BD: Sequence[Tensor], denominator: float
    ) -> dict[str, float]:
        """One optimizer step on all micro-batches of all ranks; its metrics."""
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = dict.fromkeys(("decisions", "loss", *_TOKEN_METRICS), 0.0)
        gap = 0.0
        for (batch, advantages_BD), part_old_BD in zip(parts, old_BD, strict=True):
            metrics, part_gap = self._backward(batch, advantages_BD, part_old_BD, denominator)
            gap = max(gap, part_gap)
            totals["decisions"] += metrics["tokens"]
            totals["loss"] += metrics["loss"]
            for name in _TOKEN_METRICS:
                totals[name] += metrics[name] * metrics["tokens"]
        parameters = self._add_gradients()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.router.grad_clip)
        self.optimizer.step()
        totals = self._add_sums(totals)
        means = {name: totals[name] / totals["decisions"] for name in _TOKEN_METRICS}
        return {"loss": totals["loss"], "grad_norm": float(norm), "log_prob_gap": gap, **means}

    def _encode(self, weighed: Advantages, start: int, stop: int) -> tuple[RouterBatch, Tensor]:
        """One micro-batch and its advantages [B, D]."""
        device = next(self.network.parameters()).device
        batch = encode_trajectories(self.network, weighed.queries[start:stop], weighed.trajectories[start:stop])
        advantages_BD = torch.zeros(batch.decision_mask_BD.shape)
        for row, values in enumerate(weighed.values[start:stop]):
            advantages_BD[row, : len(values)] = torch.tensor(values)
        return batch.to(device), advantages_BD.to(device)

    def _old_log_probs(self, batch: RouterBatch, version: int) -> Tensor:
        """Log-probabilities of the actions under the version that acted."""
        network = self.network
        if version != self.iteration:
            assert self._behind is not None, "a version behind the present one, and max_lag is 0"
            network = self._behind
            fill_router(network, self.past[version])
        with torch.no_grad():
            return score_decisions(network, batch)[0]

    def _backward(
        self, batch: RouterBatch, advantages_BD: Tensor, old_BD: Tensor, denominator: float
    ) -> tuple[dict[str, float], float]:
        """Add a micro-batch's gradient; its metrics, and the largest gap to the log-probabilities reported."""
        settings = self.config.router
        log_probs_BD, entropy_BD = score_decisions(self.network, batch)
        inputs = LossInputs(log_probs_BD, old_BD, advantages_BD, batch.decision_mask_BD, entropy_BD)
        output = make_loss(
            inputs,
            settings.clip,
            settings.clip,
            settings.normalisation,
            settings.entropy,
            denominator=denominator,
        )
        output.loss.backward()
        gap_BD = (old_BD - batch.old_log_probs_BD).abs()[batch.decision_mask_BD]
        return output.metrics, float(gap_BD.max()) if gap_BD.numel() else 0.0

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
