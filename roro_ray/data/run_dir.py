"""The directory of one run: settings, versions, metrics, the stages' outputs, and which stages are finished.

Every stage reads the one before from here, resumes where it stopped, and never does finished work again. Settings that
shaped a stage's output cannot change once it is there: a directory that holds another run is an error, and is never
overwritten.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from roro_ray.config import Config
from roro_ray.data.files import write_whole
from roro_ray.errors import ConfigError, DataError
from roro_ray.settings import changed_keys, load_saved_config, save_config

STAGES = ("collect", "make_pairs", "warm_start", "learn_reward", "train_router", "evaluate")
_SUITE_KEYS = ("data.suites", "data.train_suites", "data.sources", "data.split_shares")
# The settings that shape each stage's output; `ray`, `wandb` and `run_dir` never do.
STAGE_KEYS: dict[str, tuple[str, ...]] = {
    "collect": ("seed", "pool.models", *_SUITE_KEYS, "data.train_queries", "data.seed", "episode.", "collect."),
    "make_pairs": ("pairs.",),
    "warm_start": ("warm.",),
    "learn_reward": ("reward.", "lora."),
    "train_router": ("router.", "data.router_queries"),
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
)
_PACKAGES = ("ray", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy", "wandb", "omegaconf")


class RunDir:
    """Paths and records of one run; make one with `open_run`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line, appended by every stage."""
        return self.path / "metrics.jsonl"

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

    def reopen_after(self, stage: str) -> None:
        """Forget that later stages finished, since what they read is about to change.

        Nothing is built on a calibration, which is no link of this chain: it lies beside its router and names it.
        """
        name = stage.partition("-")[0]
        for later in STAGES[STAGES.index(name) + 1 :] if name != "calibrate" else ():
            for marker in (self.path / "done").glob(f"{later}*.json"):
                marker.unlink()

    def done_facts(self, stage: str) -> dict[str, Any]:
        """What `mark_done` recorded, or an empty dict."""
        return read_json(self._marker(stage)) if self.is_done(stage) else {}

    def require(self, stage: str) -> None:
        """Refuse to go on where the stage before has not finished.

        Raises:
            DataError: names the stage and its command.
        """
        if not self.is_done(stage):
            raise DataError(f"{self.path}: {stage} has not finished. Run `python -m jobs.{stage} run_dir={self.path}`.")

    def _marker(self, stage: str) -> Path:
        return self.path / "done" / f"{stage}.json"


def open_run(config: Config) -> RunDir:
    """Make the run's directory, or go on in it where it holds the same run.

    Raises:
        ConfigError: the directory holds something else, or a key changed that shaped a stage that is already there.
    """
    run = RunDir(config.run_dir)
    if run.config_file.exists():
        _check_same_run(run, config)
    elif run.path.exists() and any(run.path.iterdir()):
        raise ConfigError(
            f"run_dir={run.path} is not empty and holds no config.yaml, so it is no run. Choose another run_dir."
        )
    run.path.mkdir(parents=True, exist_ok=True)
    save_config(config, run.config_file)
    write_json(run.path / "versions.json", make_versions())
    return run


def saved_config(run_dir: str | Path) -> Config | None:
    """The settings of the run that a directory holds, or None where there is none yet."""
    file = RunDir(run_dir).config_file
    return load_saved_config(file) if file.exists() else None


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
                    f"run_dir={run.path} holds a run whose {stage} was made with {key}={old}, now {key}={new}. "
                    f"To resume that run, leave {key} out; for a new run, give another run_dir."
                )


def _has_output(run: RunDir, stage: str) -> bool:
    folders = {
        "collect": run.trajectories,
        "make_pairs": run.pairs,
        "warm_start": run.path / "warm" / "model",  # what was written before may serve other settings
        "learn_reward": run.reward,
        "train_router": run.path / "router",
        "evaluate": run.evaluation,
    }
    return folders[stage].is_dir() and any(folders[stage].iterdir())


def append_metrics(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line in a single write, so that processes do not mix; closes off a half line that a kill left."""
    path = Path(path)
    line = json.dumps(_finite({"time": round(time.time(), 3), **record}), default=str) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # Look and write as one: else the look may meet another process's write halfway and take it for a cut line.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = "\n" + line
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; a line that a kill cut off is left out."""
    file = Path(path)
    if not file.exists():
        return
    for line in file.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def make_versions() -> dict[str, Any]:
    """Versions of what a result depends on, and the state of the git tree."""
    found: dict[str, str | None] = {}
    for package in ("roro_ray", *_PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {"python": platform.python_version(), "platform": platform.platform(), **found, "git": _git_state()}


def _git_state() -> dict[str, Any] | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed_files": len(changed.splitlines())}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


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
