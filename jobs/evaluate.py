"""Stage 5: every method on the test queries; writes evaluation/summary.json, frontier.png and report.html."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs._cli import make_parser, run_job
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

KEYS = ("evaluate", "data", "episode", "ray", "faults")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    return run_job(make_parser("evaluate", __doc__ or "", KEYS), _main, argv)


def _main(config: Config, run: RunDir, arguments: argparse.Namespace) -> None:
    from jobs._table import format_results
    from jobs.evaluation_stage import evaluate_stage
    from jobs.stages import open_pool

    run.require("collect")
    with open_pool(config) as pool:
        summary = evaluate_stage(config, run, pool)
    print(format_results(summary, run))


if __name__ == "__main__":
    sys.exit(main())
