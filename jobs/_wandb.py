"""Mirrors metrics.jsonl to Weights & Biases, where that is asked for.

The file is always written, by whichever process measures something; this one thread in the job's own process reads what
was added and hands it on. So no worker needs to know of W&B, and nothing is lost where its service is away.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

_INTERVAL_S = 5.0


class WandbMirror:
    """A context in which new lines of metrics.jsonl are logged to W&B; does nothing where `wandb.mode=disabled`."""

    def __init__(self, config: Config, run: RunDir) -> None:
        self._config = config
        self._run = run
        self._offset = 0
        self._wandb_run: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="wandb-mirror", daemon=True)

    def __enter__(self) -> WandbMirror:
        mode: Any = self._config.wandb.mode
        if mode == "disabled":
            return self
        import wandb

        file = self._run.metrics_file
        self._offset = file.stat().st_size if file.exists() else 0
        self._wandb_run = wandb.init(
            project=self._config.wandb.project,
            mode=mode,
            dir=str(self._run.path),
            name=self._run.path.name,
            config=dataclasses.asdict(self._config),
        )
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wandb_run is None:
            return
        self._stop.set()
        self._thread.join(timeout=30)
        self._copy()
        self._wandb_run.finish(exit_code=0 if kind is None else 1)
        import wandb

        wandb.teardown()  # ends its service, and so writes what it still holds

    def _follow(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._copy()

    def _copy(self) -> None:
        file = self._run.metrics_file
        if not file.exists():
            return
        with file.open("rb") as handle:
            handle.seek(self._offset)
            added = handle.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            prefix = record.get("stage") or record.get("event") or "run"
            numbers = {f"{prefix}/{key}": value for key, value in _flatten(record) if key != "time"}
            if numbers:
                self._wandb_run.log(numbers)


def _flatten(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found.append((f"{prefix}{key}", float(value)))
    return found
