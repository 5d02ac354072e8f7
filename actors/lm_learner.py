"""The learner of LoRA adapters: one Ray Train worker group that stays up while the phases alternate.

Starting a group and loading a base of billions of parameters takes minutes, an update seconds; so the group's loop
(`actors.lm_worker`) takes commands from a board (`actors.command_board`) until it is told to stop. A group that loses a
process is started again by Ray Train, loads the last checkpoint and does the commands behind it once more; the driver,
which waits for a result, notices nothing but the time.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray

from actors.capacity import wait_for_resources
from actors.cluster import note_caller
from actors.command_board import CommandBoard, GroupFacts
from actors.lm_worker import POLL_S, LmJob, Stop, serve_commands
from actors.placement import make_scaling
from actors.storage import drop_train_notes, train_storage
from roro_ray.config import Config
from roro_ray.data.mirror import Mirror, Part
from roro_ray.errors import ConfigError, DeadlineError, RoroError, TrainingError
from roro_ray.learning.adapter_files import AdapterVersion, adapter_directory
from roro_ray.learning.lm_run import (
    CHECKPOINTS,
    PUBLISHED,
    GrpoUpdate,
    Publish,
    Result,
    check_resumable,
    plan_sft,
)
from roro_ray.learning.lm_training import ADAPTERS
from roro_ray.learning.sequences import TokenBatch
from roro_ray.learning.sft import SftBatch
from roro_ray.learning.updates import UpdateSettings
from roro_ray.placement import Bundle, role_bundle

logger = logging.getLogger(__name__)

_STOP_S = 60.0  # for the group to end after its last checkpoint


class LmLearner:
    """The driver's handle of the group, an `AdapterLearner`; make it with `start`. Calls come from one thread."""

    def __init__(self, job: LmJob, bundle: Bundle) -> None:
        self._job = job
        self._bundle = bundle  # of each worker
        self._versions: dict[str, int] = {}
        self._failure: BaseException | None = None
        self._starts = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._fit, name="adapter learner", daemon=True)

    @classmethod
    def start(
        cls, config: Config, directory: str | Path | Part | None = None, names: Sequence[str] = ADAPTERS
    ) -> LmLearner:
        """Start the group and wait until it has loaded base and checkpoint.

        Args:
            directory: of this training, on a file system that driver and workers share, or a folder of a remote run;
                `RUN_DIR/adapters` when None. A training that lies there is gone on with (see `versions`).
            names: of the adapters.

        Raises:
            ConfigError: `lora.base` is empty or does not load.
            CheckpointError: what lies there was made with other settings or is of another shape.
            ResourceError: the cluster cannot give what the workers ask for.
            DeadlineError: the group was not up after `lora.timeout_s`.
        """
        lora = config.lora
        if not lora.base:
            raise ConfigError(
                "lora.base is empty: name the base model of the adapters, such as lora.base=Qwen/Qwen3-4B."
            )
        adapters = _find_part(config, directory)
        adapters.pull(CHECKPOINTS)
        check_resumable(lora, adapters.path, names, config.seed)
        bundle = role_bundle(config, "learner", lora.cpus, lora.gpus)
        wait_for_resources([bundle] * lora.workers, "the learner of adapters", config.ray)
        adapters.path.mkdir(parents=True, exist_ok=True)
        board = ray.remote(CommandBoard).options(num_cpus=0).remote()
        learner = cls(LmJob(lora, adapters, tuple(names), config.seed, board), bundle)
        learner._thread.start()
        note_caller(learner._thread)
        try:
            learner._wait_until_up()
        except BaseException:
            learner._close()
            raise
        return learner

    @property
    def versions(self) -> dict[str, int]:
        """Updates done of each adapter; a driver that was started again goes on from there."""
        return dict(self._versions)

    @property
    def restarts(self) -> int:
        """How often the group was started again."""
        return max(self._starts - 1, 0)

    def facts(self) -> GroupFacts:
        """Of the group as it was last started."""
        facts, _, _ = self._job.ask("state", 0.0)
        assert isinstance(facts, GroupFacts), "the group was up"
        return facts

    def sft(
        self, name: str, batches: Iterable[SftBatch], updates: int | None = None, start: int = 0
    ) -> list[dict[str, float]]:
        """One update per batch (see `AdapterLearner.sft`); the next batch is made while the group learns from one."""
        metrics: list[dict[str, float]] = []
        waiting: int | None = None
        for command in plan_sft(self._job.config, name, batches, updates, start):
            ref = ray.put(command)
            if waiting is not None:
                metrics.append(self._metrics(name, waiting))
            waiting = self._submit(ref)
        if waiting is not None:
            metrics.append(self._metrics(name, waiting))
        return metrics

    def grpo(self, name: str, batch: TokenBatch, settings: UpdateSettings) -> dict[str, float]:
        """One update; its metrics (see `LoraTrainer.grpo`)."""
        return self._metrics(name, self._submit(ray.put(GrpoUpdate(name, batch, settings))))

    def publish(self, name: str) -> AdapterVersion:
        """Write the adapter for the engines, and a checkpoint first: a published version is never taken back."""
        result = self._result(self._submit(ray.put(Publish(name))))
        assert isinstance(result, AdapterVersion)
        name = adapter_directory(Path(PUBLISHED), result.name, result.version).as_posix()
        self._job.adapters.pull(name)
        return replace(result, path=str(self._job.adapters.path / name))  # as this node sees it

    def stop(self) -> None:
        """Write a checkpoint and end the group; a second call does nothing."""
        if self._stopped:
            return
        try:
            self._result(self._submit(ray.put(Stop())))
            self._thread.join(_STOP_S)
        finally:
            self._close()
        drop_train_notes(self._job.adapters)

    def __enter__(self) -> LmLearner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
        else:
            self._close()

    def _close(self) -> None:
        """End the board; a group that still asks it for commands fails and ends with it."""
        self._stopped = True
        ray.kill(self._job.board)

    def _submit(self, ref: Any) -> int:
        if self._stopped:
            raise TrainingError("the learner of adapters was stopped: start another.")
        return int(self._job.ask("submit", (ref,)))

    def _metrics(self, name: str, serial: int) -> dict[str, float]:
        metrics = self._result(serial)
        assert isinstance(metrics, dict)
        self._versions[name] = int(metrics["version"])
        return metrics

    def _result(self, serial: int) -> Result:
        """The result of a command, however often the group must be started for it.

        Raises:
            RoroError: what the command raised on every rank; the adapter is then as before.
            TrainingError: the group failed more often than `lora.max_failures`.
            DeadlineError: no result for `lora.timeout_s` since the group was last (re)started or the command given.
        """
        last = time.monotonic()
        while True:
            done, result, starts = self._job.ask("result", serial, POLL_S)
            if starts != self._starts:
                self._starts, last = starts, time.monotonic()
                logger.warning("the group of the adapters' learner was started again (%d times)", self.restarts)
            if done:
                if isinstance(result, RoroError):
                    raise result
                return result  # type: ignore[no-any-return]
            self._check_up()
            if time.monotonic() - last > self._job.config.timeout_s:
                raise DeadlineError(
                    f"learner of adapters: command {serial} gave no result in {self._job.config.timeout_s:g} s. Raise "
                    "lora.timeout_s if the update is merely slow; else see the Train workers' logs."
                )

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self._job.config.timeout_s
        while True:
            facts, starts, fatal = self._job.ask("state", POLL_S)
            if fatal is not None:
                raise fatal
            if facts is not None:
                self._versions, self._starts = dict(facts.versions), starts
                return
            self._check_up()
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"learner of adapters: the group was not up after {self._job.config.timeout_s:g} s. Raise "
                    "lora.timeout_s if loading the base is merely slow; else see the Train workers' logs."
                )

    def _check_up(self) -> None:
        if self._thread.is_alive():
            return
        _, _, fatal = self._job.ask("state", 0.0)
        if fatal is not None:
            raise fatal
        cause = "it ended by itself" if self._failure is None else f"the last time with: {_last_line(self._failure)}"
        raise TrainingError(
            f"the learner of adapters failed {self._job.config.max_failures + 1} times, {cause}. What was learned up "
            f"to its last checkpoint is kept in {self._job.adapters.place}: start it again to go on."
        ) from self._failure

    def _fit(self) -> None:
        from ray.train import FailureConfig, RunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        lora = self._job.config
        try:
            TorchTrainer(
                serve_commands,
                train_loop_config={"job": self._job},
                torch_config=TorchConfig(timeout_s=int(lora.timeout_s)),
                scaling_config=make_scaling(self._bundle, lora.workers),
                run_config=RunConfig(
                    name=f"adapters-{uuid.uuid4().hex[:8]}",  # never used before: resuming is our checkpoints' business
                    **train_storage(self._job.adapters),
                    failure_config=FailureConfig(max_failures=lora.max_failures),
                ),
            ).fit()
        except Exception as error:  # the thread's border: the next call raises it in the driver
            self._failure = error


def _find_part(config: Config, directory: str | Path | Part | None) -> Part:
    if isinstance(directory, Part):
        return directory
    if directory is None:
        return Mirror(config.run_dir, config.storage).part("adapters")
    return Mirror(Path(directory).parent).part(Path(directory).name)


def _last_line(error: BaseException) -> str:
    """The line of a Ray Train failure that names the cause (the last one of its traceback)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
