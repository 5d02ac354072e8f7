"""RoRo beside its controls at equal episodes over several seeds; writes a page of results from what it measured.

Each (seed, method) is a training of its own: a comparison that was stopped goes on with the ones that are missing.
Outcome-only training is also given a cost weight tuned on validation, which is the honest rival.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._cli import make_parser, run_job
from jobs._terminal import say
from jobs.demo import QUICK
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir, open_run, read_json, write_json

if TYPE_CHECKING:
    from actors.rollout import RolloutPool

KEYS = ("data", "reward", "router", "evaluate", "ray", "wandb")
# Beside the run's own range: cost weights in training that outcome-only GRPO may choose from.
TUNING_RANGES = {"grpo_outcome_mid": (0.25, 0.5), "grpo_outcome_high": (0.4, 0.8)}
_TUNING = "tuning.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = make_parser("compare", __doc__ or "", KEYS)
    parser.add_argument("--quick", action="store_const", const=str(QUICK), dest="config", help="a shortened form")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    parser.add_argument("--ppo", action="store_true", help="also the outcome-only baseline by RLlib's PPO")
    parser.add_argument("--output", default="docs/results.md", help="the page to write (default: docs/results.md)")
    return run_job(parser, _main, argv, lambda arguments: ["run_dir=runs/compare"])


def _main(config: Config, run: RunDir, arguments: argparse.Namespace) -> None:
    from jobs.stages import import_before_threads, open_pool
    from roro_ray.evaluation.comparison import format_comparison

    began = time.monotonic()
    summaries, tuning = {}, {}
    with open_pool(config) as pool:
        import_before_threads()
        for seed in range(config.seed, config.seed + arguments.seeds):
            say(f"== Seed {seed}")
            mine = replace(config, seed=seed, run_dir=run.place_of(run.path / f"seed{seed}"))
            with closing(open_run(mine)) as own:
                summaries[seed], tuning[seed] = _run_seed(mine, own, pool, arguments.ppo)
            _write_page(Path(arguments.output), format_comparison(summaries, tuning, arguments.command))
    say(f"Wrote {arguments.output} after {time.monotonic() - began:.0f} s.")
    print(Path(arguments.output).read_text())


def _run_seed(config: Config, run: RunDir, pool: RolloutPool, ppo: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """All methods of one seed; what is there already is only read."""
    from jobs._together import run_together
    from jobs.evaluation_stage import evaluate_stage
    from jobs.stages import collect_stage, pairs_stage, reward_stage, router_stage
    from jobs.train_ppo import ppo_stage

    collect_stage(config, run, pool)
    pairs_stage(config, run, pool)
    train = partial(router_stage, config, run, pool)
    run_together(partial(reward_stage, config, run), partial(train, "grpo_outcome"))
    run_together(partial(train, "roro"), partial(train, "roro_step"))
    run_together(partial(train, "random_rubrics"), partial(train, "fixed_rubric"))
    run_together(
        *(
            partial(router_stage, _with_range(config, bounds), run, pool, "grpo_outcome", name)
            for name, bounds in TUNING_RANGES.items()
        )
    )
    if ppo:
        ppo_stage(config, run)
    tuning = _tune(config, run, pool)
    chosen = run.router(tuning["chosen"])
    return evaluate_stage(config, run, pool, {"grpo_outcome_tuned": chosen}), tuning


def _with_range(config: Config, bounds: tuple[float, float]) -> Config:
    return replace(config, router=replace(config.router, cost_weight_low=bounds[0], cost_weight_high=bounds[1]))


def _tune(config: Config, run: RunDir, pool: RolloutPool) -> dict[str, Any]:
    """Choose the outcome-only training by validation; done once and recorded."""
    from actors.host import ClusterHost
    from jobs.evaluation_stage import fetch_routers, make_query_sets
    from roro_ray.evaluation.tuning import choose_router

    file = run.path / "router" / _TUNING
    run.fetch(file)
    if file.exists():
        return dict(read_json(file))
    own = (config.router.cost_weight_low, config.router.cost_weight_high)
    ranges = {"grpo_outcome": own, **TUNING_RANGES}
    routers = {name: run.router(name) for name in ranges}
    fetch_routers(run, routers.values())
    choice = choose_router(ClusterHost(pool, config.seed), routers, make_query_sets(config), config)
    candidates = {
        name: {"low": low, "high": high, "setting": setting, "accuracy": accuracy, "cost_share": share}
        for (name, (low, high)), (setting, accuracy, share) in zip(
            ranges.items(), choice.candidates.values(), strict=True
        )
    }
    write_json(file, {"chosen": choice.name, "candidates": candidates})
    run.sync(file)
    return dict(read_json(file))


def _write_page(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
