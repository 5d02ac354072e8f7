"""The router network as a policy: micro-batched decisions, sampled or greedy.

The state at a boundary depends on the text alone, not on the signals or the cost weight. So states are
remembered by text for as long as the weights stay: rollouts of one query share their first steps, and a sweep
of cost weights shares most of its texts. New text is read on from where the last decision stopped.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from roro_ray.config import STEP_DELIMITER
from roro_ray.engines.batching import Job, MicroBatcher
from roro_ray.errors import EngineError
from roro_ray.routing.draws import draw_uniform
from roro_ray.routing.observation import Observation
from roro_ray.routing.reader import TextReader
from roro_ray.routing.router import RouterNetwork, fill_router
from roro_ray.types import Decision, Peek

_BATCH_DECISIONS = 512
_STATES_KEPT = 100_000
_CACHE_MB = 64  # key/value states of the texts read: about 80,000 tokens of the tiny encoder


@dataclass(frozen=True, slots=True)
class _Reading:
    """What the network needs for one decision: the text (as key and as ids) and the scalar signals."""

    prefix: str
    ids: tuple[int, ...]
    features: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Opinion:
    """Log-probabilities over the pool, and the version of the weights that gave them."""

    log_probs: tuple[float, ...]
    version: int


class _Core:
    """The network, its remembered states, and the batcher; shared by a sampling policy and its greedy twin."""

    def __init__(self, network: RouterNetwork, version: int) -> None:
        self.network = network.eval()
        self.version = version
        self.batcher: MicroBatcher[_Reading, _Opinion] = MicroBatcher(self._run, _BATCH_DECISIONS, 0.0, "router")
        self._lock = threading.Lock()
        self._states: dict[str, torch.Tensor] = {}
        self._written = -1
        self.reader = None if network.body is None else TextReader(network.body, _CACHE_MB)
        self._flops_per_token = network.flops_per_token

    def load(self, state_dict: dict[str, torch.Tensor], version: int) -> None:
        with self._lock:  # not amid a batch: each decision is one version's
            fill_router(self.network, state_dict)
            self.version = version

    def read(self, observation: Observation) -> _Reading:
        """Tokenise, and charge the router for the text that it has not read before."""
        encode = self.network.pieces.encode
        pieces = [encode(observation.query.text + STEP_DELIMITER)]
        pieces.extend(encode(step.text + STEP_DELIMITER) for step in observation.steps)
        ids = tuple(token for piece in pieces for token in piece)
        last_step_tokens = len(pieces[-1]) if observation.steps else 0
        observation.ledger.charge_router(len(ids), last_step_tokens, self._flops_per_token)
        return _Reading(observation.prefix, ids, observation.features)

    def _run(self, jobs: list[Job[_Reading, _Opinion]]) -> None:
        with self._lock:
            opinions = self.compute([job.request for job in jobs])
        self.batcher.answer(list(zip(jobs, opinions, strict=True)))

    @torch.inference_mode()
    def compute(self, readings: Sequence[_Reading]) -> list[_Opinion]:
        """What the network thinks of each decision.

        Raises:
            EngineError: the weights give no probabilities (they are NaN or infinite).
        """
        device = next(self.network.head.parameters()).device
        features_BF = torch.tensor([reading.features for reading in readings], device=device)
        states_BC = None if self.reader is None else self._read_states(readings, self.reader)
        log_probs_BN = torch.log_softmax(self.network.decide(states_BC, features_BF).double(), dim=-1)
        if bool(log_probs_BN.isnan().any()):
            raise EngineError(
                f"the router's weights of version {self.version} give no probabilities (NaN): training diverged; "
                "go back to an earlier checkpoint and lower router.head_lr or router.encoder_lr"
            )
        return [_Opinion(tuple(log_probs_N), self.version) for log_probs_N in log_probs_BN.tolist()]

    def _read_states(self, readings: Sequence[_Reading], reader: TextReader) -> torch.Tensor:
        # torch counts writes to each tensor: any change of the weights, by `load` or by an optimizer, shows here.
        written = sum(parameter._version for parameter in self.network.parameters())
        if written != self._written:
            self._states.clear()
            reader.forget()
            self._written = written
        if len(self._states) > _STATES_KEPT:
            self._states.clear()
        new = {reading.prefix: reading.ids for reading in readings if reading.prefix not in self._states}
        if new:
            self._states.update(zip(new, reader.read(list(new.values())).unbind(), strict=True))
        return torch.stack([self._states[reading.prefix] for reading in readings])


class RouterPolicy:
    """Decides with a router network.

    Sampling takes its uniform from the observation's seed and the step's index, so that a decision does not
    depend on what else is in the batch. `Decision.log_prob` is the log-probability of the action under the
    policy that took it: the network's when sampling, 0 when greedy.
    """

    def __init__(self, network: RouterNetwork, version: int | None = None, greedy: bool = False) -> None:
        self._core = _Core(network, network.version if version is None else version)
        self._greedy = greedy

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
        return self._twin(greedy=True)

    def _twin(self, greedy: bool) -> RouterPolicy:
        twin = RouterPolicy.__new__(RouterPolicy)
        twin._core, twin._greedy = self._core, greedy
        return twin

    def load(self, state_dict: dict[str, torch.Tensor], version: int) -> None:
        """Take over newer weights, between runs.

        Raises:
            CheckpointError: weights of another shape; the old ones stay.
        """
        self._core.load(state_dict, version)

    async def decide(self, observation: Observation) -> Decision:
        """Choose a model; concurrent calls are computed together.

        Raises:
            EngineError: the network failed, or its weights are not finite.
        """
        reading = self._core.read(observation)
        opinion = await self._core.batcher.submit(reading)
        probabilities = tuple(math.exp(log_prob) for log_prob in opinion.log_probs)
        if self._greedy:
            return Decision(probabilities.index(max(probabilities)), 0.0, probabilities, opinion.version)
        uniform = draw_uniform(observation.seed, len(observation.steps), "router")
        model = _invert(probabilities, uniform)
        return Decision(model, opinion.log_probs[model], probabilities, opinion.version)


def _invert(probabilities: Sequence[float], uniform: float) -> int:
    """The model at which the cumulative probability passes the uniform."""
    total = 0.0
    for model, probability in enumerate(probabilities):
        total += probability
        if uniform < total:
            return model
    return len(probabilities) - 1  # rounding left the total just below 1
