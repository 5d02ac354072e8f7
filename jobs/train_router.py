"""Stage 4: train a router by GRPO on Ray Train, with rollouts on the workers and verdicts from the reward service.

`--method` names what the router learns from: `roro` (outcome, cost and the rubric's verdict), or one of the controls.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs._cli import make_parser, run_job
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

KEYS = ("router", "reward", "data", "ray", "faults", "wandb")
METHODS = ("roro", "roro_step", "grpo_outcome", "random_rubrics", "fixed_rubric")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = make_parser("train_router", __doc__ or "", KEYS)
    parser.add_argument("--method", choices=METHODS, default="roro", help="what the router learns from (default: roro)")
    return run_job(parser, _main, argv)


def _main(config: Config, run: RunDir, arguments: argparse.Namespace) -> None:
    from jobs.stages import method_config, open_pool, router_stage

    if method_config(config, arguments.method).router.beta:
        run.require("learn_reward")
    with open_pool(config) as pool:
        router_stage(config, run, pool, arguments.method)


if __name__ == "__main__":
    sys.exit(main())
