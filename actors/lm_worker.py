"""The loop of each rank of the adapters' learner: load, then carry out the board's commands until one says stop.

What a command does is `learning.lm_run`. Every rank takes every command in the order of its number, so that no rank has
to tell another what comes next.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError

from actors.storage import meet
from actors.waiting import wait_for
from roro_ray.config import LoraConfig
from roro_ray.data.mirror import Part
from roro_ray.errors import CheckpointError, ConfigError, DataError, EngineError, RoroError
from roro_ray.learning.lm_run import CHECKPOINTS, Command, LmRun, Result
from roro_ray.learning.lm_wrappers import Ranks

logger = logging.getLogger(__name__)

POLL_S = 1.0  # of one waiting call to the board
CALL_S = 60.0  # deadline of such a call


@dataclass(frozen=True, slots=True)
class Stop:
    """The command that ends the loop."""


@dataclass(frozen=True, slots=True)
class LmJob:
    """What every rank is given: `board` is the handle of a CommandBoard."""

    config: LoraConfig
    adapters: Part
    names: tuple[str, ...]
    seed: int
    board: Any

    def ask(self, method: str, *args: Any) -> Any:
        """Call the board and wait for its answer."""
        return wait_for(
            getattr(self.board, method).remote(*args), f"the board of commands: {method}", CALL_S, self.board
        )


def serve_commands(settings: dict[str, Any]) -> None:
    """What each rank runs.

    An error of the project from a command is its result. Any other goes to Ray Train, which starts the group again; one
    in loading that no restart cures is told to the driver. Without a board there is no driver, and nothing to do.
    """
    job: LmJob = settings["job"]
    try:
        run, ranks = _load(job)
        while _serve_one(job, run, ranks):
            pass
    except (ConfigError, CheckpointError, DataError, EngineError) as error:
        job.ask("fail", error)
    except RayActorError:
        logger.warning("the board of commands is gone, and so is the driver: the adapters' learner ends")


def _load(job: LmJob) -> tuple[LmRun, Ranks]:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    started = time.perf_counter()
    meet(job.adapters, ranks.rank, ranks.world, (CHECKPOINTS,))
    device, directory = ray.train.torch.get_device(), job.adapters.path
    run = LmRun(job.config, directory, job.names, device, job.seed, ranks, job.adapters.push)
    job.ask("begin", ranks.rank, os.getpid(), run.serial, run.trainer.versions, time.perf_counter() - started)
    return run, ranks


def _serve_one(job: LmJob, run: LmRun, ranks: Ranks) -> bool:
    """Wait for the next command a while and carry it out; False behind the last."""
    refs = job.ask("take", run.serial + 1, POLL_S)
    if refs is None:
        return True
    command: Command | Stop = wait_for(refs[0], f"command {run.serial + 1}", CALL_S)
    if isinstance(command, Stop):
        run.save()
        if ranks.rank == 0:
            job.ask("report", run.serial + 1, {})
        return False
    result: Result | RoroError
    try:
        result = run.apply(command)
    except RoroError as error:
        result = error
    if ranks.rank == 0:
        job.ask("report", run.serial, result)
        job.ask("saved", run.saved)
    return True
