"""Measure what each cost weight of a trained router gives, so that a server can promise a share or an accuracy.

Writes calibration.json beside the router: large share, accuracy, gap to the large model and FLOPs at each weight of a
grid, with intervals, on queries that neither training, nor the choice of settings, nor the test uses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs._cli import make_parser, run_job, run_stage
from jobs._progress import Progress
from jobs._terminal import say
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir
from roro_ray.errors import DataError

if TYPE_CHECKING:
    from actors.rollout import RolloutPool
    from roro_ray.evaluation.calibration import Calibration

KEYS = ("calibrate", "data", "episode", "ray")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = make_parser("calibrate", __doc__ or "", KEYS)
    parser.add_argument("--router", metavar="DIR", type=Path, help="a saved router (default: RUN_DIR/router/roro)")
    return run_job(parser, _main, argv)


def calibrate_stage(config: Config, run: RunDir, pool: RolloutPool, router: Path) -> Calibration:
    """Calibrate the router in a directory, or give the calibration that is there and still holds."""
    from actors.host import ClusterHost
    from roro_ray.evaluation.calibrate import calibrate, find_current, forget_partial, make_settings
    from roro_ray.evaluation.calibration import save_calibration
    from roro_ray.plan import count_calibrated

    engines = pool.facts[0].engines
    current = find_current(config, router, engines)
    if current is not None:
        say(f"calibrate: already done in {_name(run, router)}")
        return current
    total = count_calibrated(config)
    each = total // len(make_settings(config))
    with run_stage(run, "calibrate", "Calibrate the router") as facts, Progress("calibrate", total, "episodes") as bar:
        host = ClusterHost(pool, config.seed, bar.advance)

        def move(done: int) -> None:
            bar.start_at(done * each)
            _upload(run, router)

        calibration = calibrate(config, router, engines, host, move)
        save_calibration(router, calibration)
        forget_partial(router)
        _upload(run, router)
        facts.update(router=_name(run, router), version=calibration.router_version, points=len(calibration.points))
    return calibration


def _upload(run: RunDir, router: Path) -> None:
    if router.is_relative_to(run.path):
        run.sync(router)


def _name(run: RunDir, file: Path) -> str:
    return run.place_of(file) if file.is_relative_to(run.path) else str(file)


def _main(config: Config, run: RunDir, arguments: argparse.Namespace) -> None:
    from jobs._table import format_calibration
    from jobs.evaluation_stage import fetch_routers
    from jobs.stages import open_pool
    from roro_ray.evaluation.calibrate import PARTIAL

    router = arguments.router or run.router("roro")
    if router.is_relative_to(run.path):
        fetch_routers(run, [router])
        run.fetch(router / PARTIAL)
    if not (router / "router.json").is_file():
        raise DataError(
            f"{_name(run, router)} holds no trained router. Run `python -m jobs.train_router run_dir={run.place}`, or "
            "give the directory of one with --router (a path)."
        )
    with open_pool(config) as pool:
        calibration = calibrate_stage(config, run, pool, router)
    print(format_calibration(calibration, _name(run, (router / "calibration.json").resolve())))


if __name__ == "__main__":
    sys.exit(main())
