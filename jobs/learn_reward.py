"""Stage 3: learn the process reward, Rubricor and Judge in turn, and measure it on held-out pairs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs._cli import make_parser, run_job
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

KEYS = ("reward", "pairs", "wandb")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    return run_job(make_parser("learn_reward", __doc__ or "", KEYS), _main, argv)


def _main(config: Config, run: RunDir, arguments: argparse.Namespace) -> None:
    from jobs.stages import reward_stage

    reward_stage(config, run)


if __name__ == "__main__":
    sys.exit(main())
