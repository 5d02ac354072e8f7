"""PPO by RLlib on rollout env runners: the outcome-only baseline that another library trains.

Everything that a fair comparison needs is shared with GRPO: the episode loop (behind `routing.gym_env`), the router
network and its first weights, the queries, the range of cost weights, the reward, and the number of episodes. The
algorithm is RLlib's own, on its new API stack. Env runners hold nothing that cannot be had again, so RLlib restarts the
ones that die; the training itself goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.capacity import wait_for_resources
from actors.fleet import start_engines
from actors.rllib_algorithm import MakePool, learner_bundle, make_algorithm, make_engine_pool
from actors.rollout import pool_bundles
from roro_ray.config import Config
from roro_ray.errors import TrainingError
from roro_ray.learning.checkpoints import check_settings, drop_old, find_checkpoint, write_directory
from roro_ray.learning.ppo_run import CHECKPOINTS, METHOD, PpoRun, fix_ppo_settings, load_finished_ppo
from roro_ray.learning.router_run import Finished, make_train_queries
from roro_ray.placement import Bundle
from roro_ray.routing.draws import mix_seed
from roro_ray.types import Query

Progress = Callable[[int, int, dict[str, float]], None]
_ALGORITHM, _STATE = "algorithm.zip", "state.json"
_EMPTY_ROUNDS = 5  # iterations in a row without an episode that was scored


@dataclass(frozen=True, slots=True)
class PpoResult:
    """A finished training: its directory (a saved router), one row of metrics per iteration, runners restarted."""

    router_dir: Path
    finished: Finished
    restarts: int = 0


def ppo_bundles(config: Config) -> list[Bundle]:
    """What the training asks of the cluster, one bundle an actor: env runners are placed as rollout workers are."""
    return pool_bundles(config) + [learner_bundle(config)] * config.ppo.learners


def train_ppo(
    config: Config,
    run_dir: str | Path,
    progress: Progress | None = None,
    queries: Sequence[Query] | None = None,
    make_pool: MakePool = make_engine_pool,
) -> PpoResult:
    """Train a router by PPO, or go on with a training that was stopped; a finished one is only read.

    Args:
        run_dir: the training writes to `run_dir/router/ppo_rllib`.
        progress: called with (episodes done, episodes, metrics) after each iteration.
        queries: what episodes draw from; those of GRPO when None.
        make_pool: gives each env runner its models.

    Raises:
        ResourceError: the cluster cannot give what the env runners ask for.
        CheckpointError: what lies there was made with other settings.
        TrainingError: no episode could be scored for several iterations.
    """
    directory = Path(run_dir).resolve() / "router" / METHOD
    finished = load_finished_ppo(directory, config)
    if finished is not None:
        return PpoResult(directory, finished)
    wait_for_resources(ppo_bundles(config), "PPO's env runners", config.ray)
    drawn = list(queries if queries is not None else make_train_queries(config))
    fleet = start_engines(config) if config.pool.placement == "actors" else None
    engines = fleet.engines if fleet is not None else ()
    try:
        restarts = _Training(config, directory, drawn, engines, make_pool, progress).run()
    finally:
        if fleet is not None:
            fleet.stop()
    finished = load_finished_ppo(directory, config)
    if finished is None:
        raise TrainingError(f"PPO ended without a finished router in {directory}: run it again.")
    return PpoResult(directory, finished, restarts)


class _Training:
    """The loop of iterations: sample and learn (RLlib), record, checkpoint."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        queries: Sequence[Query],
        engines: Sequence[Any],
        make_pool: MakePool,
        progress: Progress | None,
    ) -> None:
        self._config, self._directory, self._progress = config, directory, progress
        self._settings = fix_ppo_settings(config)
        self._checkpoint = find_checkpoint(directory / CHECKPOINTS)
        state = {"iteration": 0, "episodes": 0}
        if self._checkpoint is not None:
            state = json.loads((self._checkpoint / _STATE).read_text())
            check_settings(state["settings"], self._settings, self._checkpoint)
        self._run = PpoRun(config, directory, state["iteration"], state["episodes"])
        seed = mix_seed(config.seed, "ppo episodes", state["iteration"]) % 2**31
        self._algorithm = make_algorithm(config, queries, engines, make_pool, seed)

    def run(self) -> int:
        """Train to the end; returns how often env runners were restarted."""
        try:
            if self._checkpoint is not None:
                self._restore(self._checkpoint)
            else:
                self._run.save_snapshot(self._network)
            empty = 0
            while not self._run.is_over:
                metrics = self._iterate()
                empty = empty + 1 if not metrics["scored"] else 0
                if empty >= _EMPTY_ROUNDS:
                    raise TrainingError(
                        f"PPO: no episode was scored in {empty} iterations ({int(metrics['failed'])} failed in the "
                        "last). See whether the pool's models answer (python -m jobs.doctor), and Ray's logs of the "
                        "env runners."
                    )
            self._run.finish(self._network)
            return int(self._algorithm.env_runner_group.num_remote_worker_restarts())
        finally:
            self._algorithm.stop()

    @property
    def _network(self) -> Any:
        return self._algorithm.get_module().network

    def _iterate(self) -> dict[str, float]:
        """One iteration, written before its metrics are told."""
        began, share = time.perf_counter(), self._run.progress
        self._algorithm.learner_group.foreach_learner(lambda learner: setattr(learner, "progress", share))
        result = self._algorithm.train()
        metrics = {"iteration": float(self._run.iteration + 1), **read_result(result)}
        metrics["restarts"] = float(self._algorithm.env_runner_group.num_remote_worker_restarts())
        metrics["seconds"] = time.perf_counter() - began
        self._run.write(metrics, self._network)
        if self._run.iteration % self._config.router.checkpoint_every == 0 or self._run.is_over:
            self._save()
        if self._progress is not None:
            self._progress(self._run.episodes, self._run.budget, metrics)
        return metrics

    def _save(self) -> None:
        final = self._directory / CHECKPOINTS / f"iteration_{self._run.iteration:06d}"
        with tempfile.TemporaryDirectory(prefix="roro-ppo-") as folder, write_directory(final) as temporary:
            self._algorithm.save_to_path(folder)
            shutil.make_archive(str(temporary / Path(_ALGORITHM).stem), "zip", folder)
            state = {"iteration": self._run.iteration, "episodes": self._run.episodes, "settings": self._settings}
            (temporary / _STATE).write_text(json.dumps(state, indent=1) + "\n")
        drop_old(self._directory / CHECKPOINTS, keep=2)

    def _restore(self, checkpoint: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="roro-ppo-") as folder:
            shutil.unpack_archive(checkpoint / _ALGORITHM, folder)
            self._algorithm.restore_from_path(folder)


def read_result(result: dict[str, Any]) -> dict[str, float]:
    """An iteration's metrics from RLlib's result: means over its scored episodes, counts, losses.

    `episodes` ended, `failed` ended without an outcome (their steps count as cut short), `scored` is the rest; `lr` is
    the head's.
    """
    runners, learners = result.get("env_runners", {}), result.get("learners", {}).get("default_policy", {})
    sums = {name: float(value) for name, value in runners.get("routing", {}).items()}
    episodes, failed = sums.get("episodes", 0.0), sums.get("failed", 0.0)
    scored = episodes - failed
    metrics = {"episodes": episodes, "failed": failed, "scored": scored}
    for name in ("reward", "outcome", "large_share", "steps"):
        metrics[name] = sums.get(name, 0.0) / scored if scored else float("nan")
    metrics["decisions"] = float(runners.get("num_env_steps_sampled", 0.0))
    timers = result.get("timers", {})
    for name, timer in (("sample", "env_runner_sampling_timer"), ("learn", "learner_update_timer")):
        metrics[f"seconds_{name}"] = float(timers.get(timer, float("nan")))
    for name in ("policy_loss", "vf_loss", "vf_explained_var", "entropy"):
        metrics[name] = float(learners.get(name, float("nan")))
    return metrics
