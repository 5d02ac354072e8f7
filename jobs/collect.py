"""Stage 1: roll out the strategies on the training queries and keep the trajectories as Parquet.

Kill it and run it again: finished shards stay, no trajectory is lost and none is doubled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs._cli import make_parser, run_job
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

KEYS = ("data", "collect", "episode", "pool", "ray", "faults")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    return run_job(make_parser("collect", __doc__ or "", KEYS), _main, argv)


def _main(config: Config, run: RunDir, arguments: argparse.Namespace) -> None:
    from jobs.stages import collect_stage, open_pool

    with open_pool(config) as pool:
        collect_stage(config, run, pool)


if __name__ == "__main__":
    sys.exit(main())
