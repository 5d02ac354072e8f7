"""Stage 2: order the collected trajectories of each query into preference pairs, by outcome, cost and process.

Process quality comes from interventions: real rollouts that go on from a prefix with and without the large model's
step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs._cli import make_parser, run_job
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

KEYS = ("pairs", "data", "episode", "pool", "ray", "faults")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    return run_job(make_parser("make_pairs", __doc__ or "", KEYS), _main, argv)


def _main(config: Config, run: RunDir, arguments: argparse.Namespace) -> None:
    from jobs.stages import open_pool, pairs_stage

    run.require("collect")
    with open_pool(config) as pool:
        pairs_stage(config, run, pool)


if __name__ == "__main__":
    sys.exit(main())
