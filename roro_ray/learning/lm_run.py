"""A training of adapters on disk: numbered commands, checkpoints, and what is published.

Layout of its directory: `checkpoints/iteration_N/` (adapters and optimisers after command N) and
`published/NAME/version_V/` (peft format). Commands are numbered without gaps, and a checkpoint says up to which one
it has come. Whoever is started again goes on behind that command: none is lost, and none counts twice.

`LocalLearner` runs commands in this process; `actors.lm_learner.LmLearner` in a group of Ray Train workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from roro_ray.config import LoraConfig
from roro_ray.errors import CheckpointError, ConfigError, RoroError
from roro_ray.learning.adapter_files import AdapterVersion, adapter_directory
from roro_ray.learning.checkpoints import (
    PREFIX,
    check_complete,
    check_settings,
    drop_old,
    find_checkpoint,
    read_state,
    write_directory,
)
from roro_ray.learning.lm_training import ADAPTERS, AdapterState, LoraTrainer
from roro_ray.learning.lm_wrappers import Ranks
from roro_ray.learning.sequences import TokenBatch
from roro_ray.learning.sft import SftBatch, scale_rate
from roro_ray.learning.updates import UpdateSettings

CHECKPOINTS, PUBLISHED = "checkpoints", "published"
_STATE = "state.json"
_KEEP = 2
# What a resumed run must agree with; the rest changes speed, memory or where it runs.
_FIXED = ("base", "revision", "dtype", "rank", "alpha", "target_modules", "weight_decay")


@dataclass(frozen=True, slots=True)
class SftUpdate:
    """One update of an adapter on labelled tokens, at a share of the peak learning rate."""

    name: str
    batch: SftBatch
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class GrpoUpdate:
    """One update of an adapter on sampled completions."""

    name: str
    batch: TokenBatch
    settings: UpdateSettings
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Publish:
    """Write an adapter as it now is for the engines."""

    name: str


Command = SftUpdate | GrpoUpdate | Publish
Result = dict[str, float] | AdapterVersion


class AdapterLearner(Protocol):
    """What trains adapters for the phases of alternating optimisation, in this process or in a worker group."""

    @property
    def versions(self) -> dict[str, int]:
        """Updates done of each adapter; a driver that was started again goes on from there."""
        ...

    def sft(
        self, name: str, batches: Iterable[SftBatch], updates: int | None = None, start: int = 0
    ) -> list[dict[str, float]]:
        """One update per batch, read as they are needed; metrics of each (see `LoraTrainer.sft`).

        Args:
            updates: of the whole schedule (warm-up, decay to 0); None: `lora.sft_updates`. No more are read.
            start: updates of the schedule that are done already; `batches` begins behind them.
        """
        ...

    def grpo(self, name: str, batch: TokenBatch, settings: UpdateSettings) -> dict[str, float]:
        """One update; its metrics (see `LoraTrainer.grpo`)."""
        ...

    def publish(self, name: str) -> AdapterVersion:
        """Write the adapter for the engines, and a checkpoint first: a published version is never taken back."""
        ...

    def stop(self) -> None:
        """Write a checkpoint and end."""
        ...


class LmRun:
    """A trainer with a directory; every rank has one, and rank 0 writes.

    Args:
        directory: of this training, on a file system that all ranks see, or this node's copy of it.
        names, device, seed, ranks: as for `LoraTrainer`.
        upload: called by rank 0 when a checkpoint or an adapter has been written, before any rank goes on.

    Raises:
        CheckpointError: the checkpoint there was made with other settings or is damaged.
    """

    def __init__(
        self,
        config: LoraConfig,
        directory: Path,
        names: Sequence[str] = ADAPTERS,
        device: torch.device | str = "cpu",
        seed: int = 0,
        ranks: Ranks | None = None,
        upload: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self._upload = upload
        self.directory = directory
        self.serial = 0  # of the last command done
        self._saved = 0
        self._ranks = ranks or Ranks()
        self._settings = fix_settings(config, names, seed)
        self.trainer = LoraTrainer(config, names, device, seed, self._ranks)
        checkpoint = find_checkpoint(directory / CHECKPOINTS)
        if checkpoint is not None:
            self._load(checkpoint)
        self._ranks.wait()  # all have chosen theirs before a newer one is written

    def apply(self, command: Command) -> Result:
        """Carry a command out and count it, also where it fails with an error of the project (nothing is learned then).

        Writes the checkpoints that are due.
        """
        self.serial += 1
        try:
            result = self._do(command)
        except RoroError:  # found on every rank alike; any other error ends the process, and saves nothing
            self._save_if_due()
            raise
        self._save_if_due()
        return result

    def _do(self, command: Command) -> Result:
        if command.name not in self.trainer.versions:
            raise ConfigError(f"no adapter {command.name!r}: expected one of {', '.join(self.trainer.versions)}.")
        if isinstance(command, Publish):
            return self._publish(command.name)
        if isinstance(command, SftUpdate):
            metrics = self.trainer.sft(command.name, command.batch, command.scale)
        else:
            metrics = self.trainer.grpo(command.name, command.batch, command.settings, command.scale)
        return metrics | {"version": float(self.trainer.versions[command.name])}

    def _save_if_due(self) -> None:
        if self.serial - self._saved >= self.config.checkpoint_every:
            self.save()

    @property
    def saved(self) -> int:
        """The last command that the newest checkpoint contains."""
        return self._saved

    def save(self) -> None:
        """Write a checkpoint, unless nothing was done since the last."""
        if self.serial == self._saved:
            return
        names = list(self.trainer.versions)
        states = {name: self.trainer.get_state(name) for name in names}
        if self._ranks.rank == 0:
            with write_directory(self.directory / CHECKPOINTS / f"{PREFIX}{self.serial:06d}") as temporary:
                for name, state in states.items():
                    save_file(state.weights, temporary / f"{name}.safetensors")
                    save_file(state.moments, temporary / f"{name}.moments.safetensors")
                facts: dict[str, Any] = {"serial": self.serial, "settings": self._settings}
                facts["adapters"] = {n: {"version": s.version, "objective": s.objective} for n, s in states.items()}
                (temporary / _STATE).write_text(json.dumps(facts, indent=1) + "\n")
            drop_old(self.directory / CHECKPOINTS, _KEEP)
            self._upload()
        self._saved = self.serial
        self._ranks.wait()

    def _load(self, path: Path) -> None:
        check_complete(path)
        facts = read_state(path)
        check_settings(facts["settings"], self._settings, path)
        for name, adapter in facts["adapters"].items():
            try:
                weights = load_file(path / f"{name}.safetensors")
                moments = load_file(path / f"{name}.moments.safetensors")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"checkpoint {str(path)!r} is unreadable ({error!r}); train again.") from error
            state = AdapterState(weights, moments, int(adapter["version"]), str(adapter["objective"]))
            self.trainer.set_state(name, state, f"checkpoint {str(path)!r}")
        self.serial = self._saved = int(facts["serial"])

    def _publish(self, name: str) -> AdapterVersion:
        self.save()
        version = self.trainer.versions[name]
        state = self.trainer.model.get_state(name)
        final = adapter_directory((self.directory / PUBLISHED).resolve(), name, version)
        if self._ranks.rank == 0:
            with write_directory(final) as temporary:
                self.trainer.model.write_files(name, state, temporary)
            self._upload()
        self._ranks.wait()
        return AdapterVersion(name, version, str(final))


def fix_settings(config: LoraConfig, names: Sequence[str], seed: int) -> dict[str, Any]:
    """The settings that a checkpoint and the run that goes on from it must share."""
    settings: dict[str, Any] = {f"lora.{key}": getattr(config, key) for key in _FIXED}
    plain: dict[str, Any] = json.loads(json.dumps(settings | {"adapters": sorted(names), "seed": seed}, default=list))
    return plain


def check_resumable(config: LoraConfig, directory: Path, names: Sequence[str], seed: int) -> None:
    """Raise CheckpointError where a training lies there that these settings cannot go on with."""
    checkpoint = find_checkpoint(directory / CHECKPOINTS)
    if checkpoint is not None:
        check_settings(read_state(checkpoint)["settings"], fix_settings(config, names, seed), checkpoint)


def plan_sft(
    config: LoraConfig, name: str, batches: Iterable[SftBatch], updates: int | None, start: int
) -> Iterable[SftUpdate]:
    """The commands of a schedule, made as they are asked for; no batch is read beyond its end."""
    total = config.sft_updates if updates is None else updates
    for update, batch in zip(range(start, total), batches, strict=False):
        yield SftUpdate(name, batch, scale_rate(update, total, config.sft_warmup))


class LocalLearner:
    """An `AdapterLearner` in this process."""

    def __init__(
        self,
        config: LoraConfig,
        directory: Path,
        names: Sequence[str] = ADAPTERS,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.run = LmRun(config, directory, names, device, seed)

    @property
    def versions(self) -> dict[str, int]:
        """Updates done of each adapter."""
        return self.run.trainer.versions

    def sft(
        self, name: str, batches: Iterable[SftBatch], updates: int | None = None, start: int = 0
    ) -> list[dict[str, float]]:
        """One update per batch."""
        return [self._learn(command) for command in plan_sft(self.run.config, name, batches, updates, start)]

    def grpo(self, name: str, batch: TokenBatch, settings: UpdateSettings) -> dict[str, float]:
        """One update."""
        return self._learn(GrpoUpdate(name, batch, settings))

    def publish(self, name: str) -> AdapterVersion:
        """Write the adapter for the engines."""
        result = self.run.apply(Publish(name))
        assert isinstance(result, AdapterVersion)
        return result

    def stop(self) -> None:
        """Write a checkpoint."""
        self.run.save()

    def _learn(self, command: SftUpdate | GrpoUpdate) -> dict[str, float]:
        result = self.run.apply(command)
        assert isinstance(result, dict)
        return result
