"""The whole method on the embedded world: collect, pair, learn the reward, train two routers, evaluate, report,
and calibrate the router for serving.

Starts a local Ray (or joins the one that runs the job) and stops it again. A demo that was stopped goes on where it
was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jobs._cli import make_parser, run_job
from jobs._terminal import say
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

QUICK = Path(__file__).with_name("configs") / "quick.yaml"
KEYS = ("data", "reward", "router", "evaluate", "calibrate", "ray", "wandb")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = make_parser("demo", __doc__ or "", KEYS)
    parser.add_argument(
        "--quick", action="store_const", const=str(QUICK), dest="config", help="every stage in a shortened form"
    )
    return run_job(parser, _main, argv)


def _main(config: Config, run: RunDir, arguments: argparse.Namespace) -> None:
    from jobs._table import format_results
    from jobs._together import run_together
    from jobs.calibrate import calibrate_stage
    from jobs.evaluation_stage import evaluate_stage, fetch_routers
    from jobs.stages import collect_stage, import_before_threads, open_pool, pairs_stage, reward_stage, router_stage

    began = time.monotonic()
    with open_pool(config) as pool:
        import_before_threads()
        collect_stage(config, run, pool)
        pairs_stage(config, run, pool)
        # The control needs no learned reward, so it trains meanwhile. Both routers at once would be no faster on two
        # cores, and take 1.4 GiB more.
        run_together(partial(reward_stage, config, run), partial(router_stage, config, run, pool, "grpo_outcome"))
        router_stage(config, run, pool, "roro")
        summary = evaluate_stage(config, run, pool)
        fetch_routers(run, [run.router("roro")])
        calibrate_stage(config, run, pool, run.router("roro"))
    print(format_results(summary, run))
    say(f"Done in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    sys.exit(main())
