"""The reward service: one actor that hosts Rubricor and Judge and scores groups of trajectories.

It writes one rubric per query and version of the reward model and keeps it, works requests off one after the other in
batches of their own (a request's verdicts do not depend on who else asks), and holds a bounded number of trajectories:
beyond that it refuses (QueueFullError) instead of growing. What it could not score comes back as an error verdict,
never as 0; the learner drops and counts those.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.capacity import wait_for_resources
from actors.placement import bundle_options
from actors.waiting import wait_for
from roro_ray.cluster_config import StorageConfig
from roro_ray.config import Config, RewardConfig
from roro_ray.data.mirror import fetch, name_place
from roro_ray.errors import ConfigError, DeadlineError, QueueFullError, did_you_mean
from roro_ray.placement import role_bundle
from roro_ray.types import Query, Rubric, Trajectory, Verdict

logger = logging.getLogger(__name__)

Verdicts = list[tuple[Verdict, ...]]
LoadReward = Callable[[str | None, RewardConfig], Any]
_RUBRICS_KEPT = 100_000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


def load_model(directory: str | None, config: RewardConfig) -> Any:
    """The reward model saved in a directory, or the shipped warm start (of adapters: their base) where none is named.

    The Judge computes in `reward.judge_dtype`: in float32 the last bits of a verdict depend on what is judged with it.
    """
    import torch

    if config.backend == "engine":
        from roro_ray.reward.engine_reward import load_engine_reward

        return load_engine_reward(directory, config)
    from roro_ray.reward.model import load_reward, make_reward

    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    if config.judge_dtype not in dtypes:
        hint = did_you_mean(config.judge_dtype, dtypes)
        raise ConfigError(f"reward.judge_dtype is {config.judge_dtype!r}: expected one of {', '.join(dtypes)}{hint}")
    reward = make_reward(config) if directory is None else load_reward(directory, config)
    judge: torch.nn.Module = reward.judge.model  # transformers' own `to` is typed as a plain function
    judge.to(dtypes[config.judge_dtype])
    return reward


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """The service as it stands: its process, the reward model's version, and what it has done so far."""

    pid: int
    version: int
    seconds: float
    requests: int
    trajectories: int
    errors: int
    refused: int
    rubrics: int
    rubric_hits: int
    waiting: int


class RewardService:
    """The actor. The constructor stores; `ready` (or the first request after a restart) loads.

    Args:
        directory: of the reward model: a path or a URI (None: the warm start).
        seed: of the rubrics' sampling, where the Rubricor samples.
        load: makes the reward model from its directory.
        storage: how to reach a directory that is a URI.
    """

    def __init__(
        self,
        directory: str | None,
        config: RewardConfig,
        seed: int,
        load: LoadReward,
        storage: StorageConfig | None = None,
    ) -> None:
        self._storage = storage or StorageConfig()
        self._directory = directory
        self._config = config
        self._seed = seed
        self._load_model = load
        self._model: Any = None
        self._seconds = 0.0
        self._thread = ThreadPoolExecutor(1)  # one model, one computation at a time, beside the event loop
        self._loading = asyncio.Lock()
        self._rubrics: dict[tuple[str, int], Rubric] = {}
        self._waiting = 0
        self._counts = dict.fromkeys(("requests", "trajectories", "errors", "refused", "rubric_hits"), 0)

    async def ready(self) -> ServiceFacts:
        """Load the reward model once and tell the facts."""
        async with self._loading:
            if self._model is None:
                started = time.perf_counter()
                await self._in_thread(self._take_over, self._directory)
                self._seconds = time.perf_counter() - started
        return self.facts()

    def facts(self) -> ServiceFacts:
        """Counts since the start of this process."""
        version = -1 if self._model is None else self._model.version
        return ServiceFacts(
            os.getpid(), version, self._seconds, **self._counts, rubrics=len(self._rubrics), waiting=self._waiting
        )

    async def load(self, directory: str) -> ServiceFacts:
        """Take over another reward model; requests that arrive later are scored by it."""
        async with self._loading:
            await self._in_thread(self._take_over, directory)
        return self.facts()

    async def score(self, queries: Sequence[Query], groups: Sequence[Sequence[Trajectory]]) -> Verdicts:
        """One verdict per trajectory of each query, under that query's rubric.

        Raises:
            QueueFullError: more trajectories are waiting than `reward.queue_size` allows.
        """
        size = sum(len(group) for group in groups)
        if self._waiting + size > self._config.queue_size:
            self._counts["refused"] += 1
            raise QueueFullError(
                f"the reward service has {self._waiting} trajectories waiting and was sent {size} more, expected at "
                f"most {self._config.queue_size} in all (reward.queue_size): try again later, or send fewer at a time."
            )
        self._waiting += size
        try:
            await self.ready()
            verdicts: Verdicts = await self._in_thread(self._score_batch, queries, groups)
        finally:
            self._waiting -= size
        self._counts["requests"] += 1
        self._counts["trajectories"] += size
        self._counts["errors"] += sum(verdict.error is not None for group in verdicts for verdict in group)
        return verdicts

    async def write_rubrics(self, queries: Sequence[Query]) -> list[Rubric]:
        """The rubrics that the queries are scored under."""
        await self.ready()
        rubrics: list[Rubric] = await self._in_thread(self._get_rubrics, queries)
        return rubrics

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    # Below: the worker thread.

    def _take_over(self, directory: str | None) -> None:
        here = None if directory is None else str(fetch(directory, self._storage))
        self._model = self._load_model(here, self._config)
        self._directory = directory
        self._rubrics.clear()  # another reward model may bear the same version

    def _get_rubrics(self, queries: Sequence[Query]) -> list[Rubric]:
        version = self._model.version
        new = {query.id: query for query in queries if (query.id, version) not in self._rubrics}
        self._counts["rubric_hits"] += len(queries) - len(new)
        if len(self._rubrics) + len(new) > _RUBRICS_KEPT:
            wanted = {query.id for query in queries}
            self._rubrics = {key: value for key, value in self._rubrics.items() if key[0] in wanted}
        if new:
            written = self._model.write_rubrics(list(new.values()), self._seed)
            self._rubrics.update({(rubric.query_id, version): rubric for rubric in written})
        return [self._rubrics[query.id, version] for query in queries]

    def _score_batch(self, queries: Sequence[Query], groups: Sequence[Sequence[Trajectory]]) -> Verdicts:
        """All groups at once; where that fails, each alone, so that one bad query does not cost the others."""
        try:
            rubrics = self._get_rubrics(queries)
            return _check_verdicts(self._model.score(queries, groups, rubrics), groups)
        except Exception as error:  # the border: what cannot be scored is an error value
            if len(queries) == 1:
                logger.warning("no verdict for query %s: %r", queries[0].id, error)
                reason = f"{type(error).__name__}: {error}"
                return [tuple(Verdict(math.nan, error=reason) for _ in groups[0])]
        return [
            verdicts for q, group in zip(queries, groups, strict=True) for verdicts in self._score_batch([q], [group])
        ]


def _check_verdicts(verdicts: Sequence[Sequence[Verdict]], groups: Sequence[Sequence[Trajectory]]) -> Verdicts:
    """The verdicts, with every score that is not a number turned into an error."""
    return [
        tuple(
            verdict
            if verdict.error is not None or math.isfinite(verdict.score)
            else Verdict(math.nan, error=f"the score is {verdict.score}", version=verdict.version)
            for verdict, _ in zip(of_group, group, strict=True)
        )
        for of_group, group in zip(verdicts, groups, strict=True)
    ]


@dataclass(frozen=True)
class RewardClient:
    """A picklable handle on the service; `score` is what the learner calls.

    `timeout_s` is the deadline of one call, waiting for room in the queue included.
    """

    actor: Any
    timeout_s: float
    queue_size: int

    @classmethod
    def start(cls, config: Config, directory: str | Path | None = None, load: LoadReward = load_model) -> RewardClient:
        """Start the service with the reward model in `directory` (None: the shipped warm start); wait until ready.

        Raises:
            ResourceError: the cluster cannot give `ray.reward_cpus`.
            CheckpointError: no complete reward model lies in the directory, a path or a URI.
            DeadlineError: not ready within `ray.timeout_s`.
        """
        settings, reward = config.ray, config.reward
        gpus = settings.reward_gpus
        if reward.backend == "engine":  # the service's process hosts the engine
            from roro_ray.reward.engine_reward import resolve_reward

            reward = resolve_reward(config)
            gpus = gpus or reward.engine.gpus
        bundle = role_bundle(config, "reward", settings.reward_cpus, gpus)
        wait_for_resources([bundle], "the reward service", settings)
        actor = ray.remote(RewardService).options(**bundle_options(bundle), max_restarts=-1, max_task_retries=2)
        place = None if directory is None else name_place(directory)
        handle: Any = actor.remote(place, reward, config.seed, load, config.storage)
        try:
            wait_for(handle.ready.remote(), "reward service: ready", settings.timeout_s, handle)
        except BaseException:
            ray.kill(handle)
            raise
        return cls(handle, config.reward.timeout_s, config.reward.queue_size)

    def score(self, queries: Sequence[Query], groups: Sequence[Sequence[Trajectory]]) -> Verdicts:
        """One verdict per trajectory of each query; parts that are too large for the queue are sent one by one.

        Raises:
            QueueFullError: there was no room in the queue until the deadline.
            DeadlineError: no answer until the deadline.
            ConfigError: one group alone is larger than the queue.
        """
        verdicts: Verdicts = []
        part: list[int] = []
        size = 0
        for index, group in enumerate(groups):
            if len(group) > self.queue_size:
                raise ConfigError(
                    f"a group of {len(group)} trajectories can never enter a queue of {self.queue_size}: raise "
                    "reward.queue_size or lower router.group_size."
                )
            if part and size + len(group) > self.queue_size:
                verdicts += self._send([queries[i] for i in part], [groups[i] for i in part])
                part, size = [], 0
            part.append(index)
            size += len(group)
        return verdicts + (self._send([queries[i] for i in part], [groups[i] for i in part]) if part else [])

    def _send(self, queries: Sequence[Query], groups: Sequence[Sequence[Trajectory]]) -> Verdicts:
        """Ask, and ask again after a pause while the queue is full."""
        what = f"verdicts on {sum(map(len, groups))} trajectories"
        deadline, pause = time.monotonic() + self.timeout_s, _FIRST_PAUSE_S
        while True:
            try:
                remaining = max(deadline - time.monotonic(), 0.1)
                ref = self.actor.score.remote(list(queries), list(groups))
                verdicts: Verdicts = wait_for(ref, what, remaining, self.actor)
                return verdicts
            except QueueFullError:
                if time.monotonic() + pause > deadline:
                    raise
            except DeadlineError as error:
                raise DeadlineError(f"{error} (reward.timeout_s is {self.timeout_s:g} s in all)") from None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def write_rubrics(self, queries: Sequence[Query]) -> list[Rubric]:
        """The rubrics that the queries are scored under."""
        ref = self.actor.write_rubrics.remote(list(queries))
        rubrics: list[Rubric] = wait_for(ref, f"{len(queries)} rubrics", self.timeout_s, self.actor)
        return rubrics

    def load(self, directory: str | Path) -> ServiceFacts:
        """Make the service take over another reward model."""
        ref = self.actor.load.remote(name_place(directory))
        facts: ServiceFacts = wait_for(ref, "reward service: loading", self.timeout_s, self.actor)
        return facts

    def facts(self) -> ServiceFacts:
        """What the service has done so far."""
        ref = self.actor.ready.remote()
        facts: ServiceFacts = wait_for(ref, "reward service: facts", self.timeout_s, self.actor)
        return facts

    def stop(self) -> None:
        """End the service's process."""
        ray.kill(self.actor)
