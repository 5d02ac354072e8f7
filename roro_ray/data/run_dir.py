"""The directory of one run: settings, versions, metrics, the stages' outputs, and which stages are finished.

Every stage reads the one before from here, resumes where it stopped, and never does finished work again. Settings that
shaped a stage's output cannot change once it is there: a directory that holds another run is an error, and is never
overwritten. Behind a URI (s3://bucket/run) it is worked on in a local copy (`data.mirror`): a stage fetches what it
reads, and uploads what it finished.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from roro_ray.cluster_config import StorageConfig
from roro_ray.config import Config
from roro_ray.data.files import explain_unusable, write_whole
from roro_ray.data.metrics_file import append_metrics as append_metrics
from roro_ray.data.metrics_file import read_metrics as read_metrics
from roro_ray.data.mirror import METRICS, Mirror
from roro_ray.data.session import BY_RANKS, Session
from roro_ray.data.versions import make_versions as make_versions
from roro_ray.errors import ConfigError, DataError, RoroError
from roro_ray.settings import changed_keys, load_saved_config, save_config

STAGES = ("collect", "make_pairs", "warm_start", "learn_reward", "train_router", "train_ppo", "evaluate")
_SUITE_KEYS = ("data.suites", "data.train_suites", "data.sources", "data.split_shares")
# The settings that shape each stage's output; `ray`, `storage`, `wandb` and `run_dir` never do.
STAGE_KEYS: dict[str, tuple[str, ...]] = {
    "collect": ("seed", "pool.models", *_SUITE_KEYS, "data.train_queries", "data.seed", "episode.", "collect."),
    "make_pairs": ("pairs.",),
    "warm_start": ("warm.",),
    "learn_reward": ("reward.", "lora."),
    "train_router": ("router.", "data.router_queries"),
    "train_ppo": ("ppo.",),
    "evaluate": ("evaluate.", "data.validation_queries", "data.test_queries"),
}
# Limits and sizes that change how fast a result comes, not which.
_FREE_KEYS = (
    "episode.timeout_s",
    "reward.queue_size",
    "reward.timeout_s",
    "reward.concurrency",
    "warm.concurrency",
    *(f"lora.{key}" for key in ("attention", "gradient_checkpointing", "token_budget", "logits_chunk", "strategy")),
    *(f"lora.{key}" for key in ("workers", "cpus", "gpus", "checkpoint_every", "max_failures", "transport")),
    "lora.timeout_s",
    "router.iterations",
    "router.workers",
    "router.max_failures",
    "router.checkpoint_every",
    "router.micro_batch",
    "router.gradient_checkpointing",
    "router.cache_mb",
    *(f"ppo.{key}" for key in ("episodes", "envs", "learners", "text_tokens")),
)


_RECORDS = ("config.yaml", "versions.json", METRICS, "done")  # what every job reads


class RunDir:
    """Paths and records of one run; make one with `open_run`, and `close` it.

    Args:
        place: a path, a URI, or the mirror of one.
    """

    def __init__(self, place: str | Path | Mirror) -> None:
        self.mirror = place if isinstance(place, Mirror) else Mirror(place)
        self._session: Session | None = None

    @property
    def path(self) -> Path:
        """Where its files are on this node: the place itself, or the copy of a remote one."""
        return self.mirror.local

    @property
    def place(self) -> str:
        """What other processes and the user call it: a path or a URI."""
        return self.mirror.place

    def fetch(self, *parts: str | Path) -> None:
        """Bring files and folders of a remote run up to date before they are read; does nothing for a local one.

        Args:
            parts: names below the run (`trajectories`, `reward/model`) or their paths.

        Raises:
            ConfigError, DataError: as `Mirror.pull`.
        """
        self.mirror.pull(*map(self._name, parts))

    def sync(self, *parts: str | Path) -> None:
        """Upload what changed in the given files and folders of a remote run.

        When none is given: everything but what the ranks of a training upload themselves.

        Raises:
            ConfigError, DataError: as `Mirror.push`.
        """
        self.mirror.push(*map(self._name, parts), skip=() if parts else BY_RANKS)

    def close(self) -> None:
        """Upload the rest of a remote run and let other jobs have it; a second call does nothing.

        Raises:
            DataError: not everything could be uploaded.
        """
        if self._session is not None:
            self._session.close()

    def begin(self) -> None:
        """Take a remote run for this job, and read its records.

        Raises:
            DataError: another job works on it, or the store does not answer.
        """
        if self.mirror.is_remote:
            self._session = Session(self.mirror)
            self.mirror.pull(*_RECORDS)

    def place_of(self, path: Path) -> str:
        """What other processes and the user call one of the run's files or folders."""
        return self.mirror.place_of(path)

    def _name(self, part: str | Path) -> str:
        if not self.mirror.is_remote:
            return str(part)
        return Path(part).relative_to(self.path).as_posix() if Path(part).is_absolute() else str(part)

    @property
    def config_file(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line, appended by every stage."""
        return self.path / METRICS

    @property
    def trajectories(self) -> Path:
        """Collected trajectories, one Parquet file per shard of queries."""
        return self.path / "trajectories"

    @property
    def pairs(self) -> Path:
        """Preference pairs."""
        return self.path / "pairs"

    @property
    def reward(self) -> Path:
        """The learned Rubricor and Judge."""
        return self.path / "reward"

    def router(self, method: str) -> Path:
        """The trained router of one method (`roro`, `grpo_outcome`, ..) and its checkpoints."""
        return self.path / "router" / method

    @property
    def evaluation(self) -> Path:
        """Summary and curves."""
        return self.path / "evaluation"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl, safely from several processes (see `append_metrics`)."""
        append_metrics(self.metrics_file, record)

    def is_done(self, stage: str) -> bool:
        """True where the stage finished."""
        return self._marker(stage).exists()

    def mark_done(self, stage: str, **facts: Any) -> None:
        """Record that a stage finished, with facts such as its seconds."""
        marker = self._marker(stage)
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"time": time.time(), **facts})
        self.sync()

    def reopen_after(self, stage: str) -> None:
        """Forget that later stages finished, since what they read is about to change.

        Nothing is built on a calibration, which is no link of this chain: it lies beside its router and names it.
        """
        name = stage.partition("-")[0]
        for later in STAGES[STAGES.index(name) + 1 :] if name != "calibrate" else ():
            for marker in (self.path / "done").glob(f"{later}*.json"):
                marker.unlink(missing_ok=True)  # a stage that runs beside this one may forget it too
        self.sync("done")

    def done_facts(self, stage: str) -> dict[str, Any]:
        """What `mark_done` recorded, or an empty dict."""
        return read_json(self._marker(stage)) if self.is_done(stage) else {}

    def require(self, stage: str) -> None:
        """Refuse to go on where the stage before has not finished.

        Raises:
            DataError: names the stage and its command.
        """
        if not self.is_done(stage):
            command = f"python -m jobs.{stage} run_dir={self.place}"
            raise DataError(f"{self.place}: {stage} has not finished. Run `{command}`.")

    def _marker(self, stage: str) -> Path:
        return self.path / "done" / f"{stage}.json"


def open_run(config: Config) -> RunDir:
    """Make the run's directory, or go on in it where it holds the same run.

    A remote run is this job's alone until it is closed.

    Raises:
        ConfigError: the directory holds something else, or a key changed that shaped a stage that is already there; a
            remote one cannot be reached with these options and credentials; it may not be written.
        DataError: another job works on a remote run, or its store does not answer.
    """
    run = RunDir(Mirror(config.run_dir, config.storage))
    with explain_unusable(f"run_dir={run.place}"):
        _open(run, config)
    return run


def _open(run: RunDir, config: Config) -> None:
    if not run.mirror.has(run.config_file.name) and run.mirror.has(""):
        raise ConfigError(
            f"run_dir={run.place} is not empty and holds no config.yaml, so it is no run. Choose another run_dir."
        )
    try:
        run.begin()
        if run.config_file.exists():
            _check_same_run(run, config)
        run.path.mkdir(parents=True, exist_ok=True)
        save_config(config, run.config_file)
        write_json(run.path / "versions.json", make_versions())
        run.sync()
    except BaseException:
        with suppress(RoroError):  # what went wrong first is what counts
            run.close()
        raise


def saved_config(run_dir: str | Path, storage: StorageConfig | None = None) -> Config | None:
    """The settings of the run that a directory holds, or None where there is none yet.

    Args:
        storage: how to reach a remote one; its cache directory, which is this machine's, stands in the result.
    """
    mirror = Mirror(run_dir, storage)
    mirror.pull("config.yaml")
    file = RunDir(mirror).config_file
    with explain_unusable(f"run_dir={mirror.place}"):
        if not file.exists():
            return None
        config = load_saved_config(file)
    return replace(config, storage=replace(config.storage, cache_dir=mirror.storage.cache_dir))


def _check_same_run(run: RunDir, config: Config) -> None:
    changes = changed_keys(load_saved_config(run.config_file), config)
    for stage in STAGES:
        shaping = {key: change for key, change in changes.items() if key.startswith(STAGE_KEYS[stage])}
        if stage == "evaluate" and shaping:
            # Nothing is built on an evaluation: it is done again under the new settings.
            run.reopen_after("train_router")
        elif _has_output(run, stage):
            for key, (old, new) in ((key, change) for key, change in shaping.items() if key not in _FREE_KEYS):
                raise ConfigError(
                    f"run_dir={run.place} holds a run whose {stage} was made with {key}={old}, now {key}={new}. "
                    f"To resume that run, leave {key} out; for a new run, give another run_dir."
                )


def _has_output(run: RunDir, stage: str) -> bool:
    folders = {
        "collect": "trajectories",
        "make_pairs": "pairs",
        "warm_start": "warm/model",  # what was written before may serve other settings
        "learn_reward": "reward",
        "train_router": "router",
        "train_ppo": "router/ppo_rllib",
        "evaluate": "evaluation",
    }
    return run.mirror.has(folders[stage])


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}). Run the stage that writes it again.") from error
