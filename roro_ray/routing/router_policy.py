"""The router network as a policy: micro-batched opinions, and a decision drawn, greedy or at a price.

The state at a boundary depends on the text alone, not on the signals or the cost weight. So states are
remembered by text for as long as the weights stay: rollouts of one query share their first steps, and a sweep
of cost weights shares most of its texts. New text is read on from where the last decision stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from roro_ray.config import STEP_DELIMITER
from roro_ray.engines.batching import Job, MicroBatcher
from roro_ray.errors import EngineError
from roro_ray.routing.observation import Observation
from roro_ray.routing.opinion import (
    Opinion,
    RouterReading,
    charge_opinion,
    decide_greedy,
    decide_priced,
    decide_sampled,
    make_reading,
)
from roro_ray.routing.reader import TextReader
from roro_ray.routing.router import RouterNetwork, copy_router, fill_router
from roro_ray.types import Decision, Peek

_BATCH_DECISIONS = 512
_STATES_KEPT = 100_000
CACHE_MB = 64  # key/value states of the texts read: about 80,000 tokens of the tiny encoder


_Rule = Callable[[Opinion, Observation], Decision]


@dataclass(frozen=True, slots=True)
class _Job:
    """A reading in the router's tokens; its state is remembered by `texts`."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    last_step_tokens: int
    features: tuple[float, ...]


class _Core:
    """The network, its remembered states, and the batcher; shared by a sampling policy and its twins."""

    def __init__(self, network: RouterNetwork, version: int, cache_mb: int) -> None:
        self.network = network.eval()
        self.version = version
        self.cache_mb = cache_mb
        self.batcher: MicroBatcher[_Job, Opinion] = MicroBatcher(self._run, _BATCH_DECISIONS, 0.0, "router")
        self._lock = threading.Lock()
        self._states: dict[tuple[str, ...], torch.Tensor] = {}
        self._written = -1
        self.reader = None if network.body is None else TextReader(network.body, cache_mb)
        self._flops_per_token = network.flops_per_token

    def load(self, state_dict: dict[str, torch.Tensor], version: int) -> None:
        with self._lock:  # not amid a batch: each decision is one version's
            fill_router(self.network, state_dict)
            self.version = version

    def tokenise(self, reading: RouterReading) -> _Job:
        """The reading's ids, piece by piece."""
        pieces = [self.network.pieces.encode(text + STEP_DELIMITER) for text in reading.texts]
        ids = tuple(token for piece in pieces for token in piece)
        return _Job(reading.texts, ids, len(pieces[-1]) if len(pieces) > 1 else 0, reading.features)

    def _run(self, jobs: list[Job[_Job, Opinion]]) -> None:
        with self._lock:
            opinions = self.compute([job.request for job in jobs])
        self.batcher.answer(list(zip(jobs, opinions, strict=True)))

    @torch.inference_mode()
    def compute(self, jobs: Sequence[_Job]) -> list[Opinion]:
        """What the network thinks of each decision.

        Raises:
            EngineError: the weights give no probabilities (they are NaN or infinite).
        """
        device = next(self.network.head.parameters()).device
        features_BF = torch.tensor([job.features for job in jobs], device=device)
        states_BC = None if self.reader is None else self._read_states(jobs, self.reader)
        log_probs_BN = torch.log_softmax(self.network.decide(states_BC, features_BF).double(), dim=-1)
        if bool(log_probs_BN.isnan().any()):
            raise EngineError(
                f"the router's weights of version {self.version} give no probabilities (NaN): training diverged; "
                "go back to an earlier checkpoint and lower router.head_lr or router.encoder_lr"
            )
        return [
            Opinion(tuple(log_probs_N), self.version, len(job.ids), job.last_step_tokens, self._flops_per_token)
            for job, log_probs_N in zip(jobs, log_probs_BN.tolist(), strict=True)
        ]

    def _read_states(self, jobs: Sequence[_Job], reader: TextReader) -> torch.Tensor:
        # torch counts writes to each tensor: any change of the weights, by `load` or by an optimizer, shows here.
        written = sum(parameter._version for parameter in self.network.parameters())
        if written != self._written:
            self._states.clear()
            reader.forget()
            self._written = written
        if len(self._states) > _STATES_KEPT:
            self._states.clear()
        new = {job.texts: job.ids for job in jobs if job.texts not in self._states}
        if new:
            self._states.update(zip(new, reader.read(list(new.values())).unbind(), strict=True))
        return torch.stack([self._states[job.texts] for job in jobs])


class RouterPolicy:
    """Decides with a router network.

    Sampling takes its uniform from the observation's seed and the step's index, so that a decision does not
    depend on what else is in the batch. `Decision.log_prob` is the log-probability of the action under the
    policy that took it: the network's when sampling, 0 when greedy or priced.

    Args:
        cache_mb: bound, in MiB, of the key/value states kept of the texts read.
    """

    def __init__(
        self,
        network: RouterNetwork,
        version: int | None = None,
        rule: _Rule = decide_sampled,
        cache_mb: int = CACHE_MB,
    ) -> None:
        self._core = _Core(network, network.version if version is None else version, cache_mb)
        self._rule = rule

    @property
    def peek(self) -> Peek:
        """What the network was made to look at."""
        return self._core.network.peek

    @property
    def version(self) -> int:
        """Version of the weights in use."""
        return self._core.version

    @property
    def network(self) -> RouterNetwork:
        """The network that decides."""
        return self._core.network

    @property
    def flops_per_token(self) -> float:
        """FLOPs of reading one token of text."""
        return self._core.network.flops_per_token

    def as_greedy(self) -> RouterPolicy:
        """The same weights (also after `load`), deciding by argmax."""
        return self._twin(lambda opinion, _: decide_greedy(opinion))

    def as_priced(self) -> RouterPolicy:
        """The same weights (also after `load`), deciding at the price of the observation's cost weight."""
        return self._twin(lambda opinion, observation: decide_priced(opinion, observation.cost_weight))

    def copy(self) -> RouterPolicy:
        """The same decisions with weights of its own: `load` into one leaves the other as it is."""
        return RouterPolicy(copy_router(self.network), self.version, self._rule, self._core.cache_mb)

    def _twin(self, rule: _Rule) -> RouterPolicy:
        twin = RouterPolicy.__new__(RouterPolicy)
        twin._core, twin._rule = self._core, rule
        return twin

    def load(self, state_dict: dict[str, torch.Tensor], version: int) -> None:
        """Take over newer weights, between runs.

        Raises:
            CheckpointError: weights of another shape; the old ones stay.
        """
        self._core.load(state_dict, version)

    async def judge_reading(self, reading: RouterReading) -> Opinion:
        """What the network thinks of one decision; concurrent calls are computed together.

        Raises:
            EngineError: the network failed, or its weights are not finite.
        """
        return await self._core.batcher.submit(self._core.tokenise(reading))

    async def decide(self, observation: Observation) -> Decision:
        """Choose a model; concurrent calls are computed together.

        Raises:
            EngineError: the network failed, or its weights are not finite.
            ConfigError: a priced policy got a cost weight that is negative or not finite.
        """
        opinion = await self.judge_reading(make_reading(observation))
        charge_opinion(observation, opinion)
        return self._rule(opinion, observation)
