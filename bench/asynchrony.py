"""What `router.max_lag` gains in wall time and costs in quality: `python -m bench.asynchrony`.

1. Wall time of an iteration of router training with the Judge, on Ray: rollout workers, reward service and learner are
   processes of their own. Each lag trains the same iterations, the lags taking turns; ratios are of one round.
   `here`: the shipped models, every step computed, all on this machine's cores, where rollouts and learning compete.
   `elsewhere`: rollouts take the time that large models would and no processor time, as when engines have machines of
   their own; every episode finds an engine with room (nothing queues), so a batch takes as long beside others as alone.
   `apart`: every role on a machine of its own, played in one process: engines, Judge and learner take time and little
   CPU; once with rollouts that dominate and once with a learner as slow as they.
   `model` is what the stages' times at the first lag would give at this one, if none slowed another down.
2. Quality: routers trained at each lag (the largest with both objectives) on outcome and cost, several seeds, measured
   on test queries; differences to lag 0 are paired by query and seed, with 95% bootstrap intervals over queries.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from bench._lag_quality import Arm, measure_quality
from bench._lag_speed import PACE_S, compare_lags, simulate_lags
from roro_ray.config import Config

PARTS = ("here", "elsewhere", "apart", "quality")
APART_S = {"rollouts dominate": (1.0, 1.5), "a slow learner": (1.0, 5.0)}  # seconds of the Judge and of the learner
APART_PACE = 3  # so much slower than `PACE_S`, for the steps of the embedded world are short
ARMS = (Arm(0), Arm(1), Arm(2), Arm(4), Arm(4, "decoupled"))


def make_speed_config(iterations: int, quick: bool) -> Config:
    """Default settings but for the number of iterations, and few training queries: rubrics are written beforehand."""
    config = Config()
    config.router.iterations = iterations
    config.data.router_queries = 4 if quick else 30
    if quick:
        config.router.queries, config.router.group_size = 4, 4
    return config


def make_apart_config(iterations: int) -> Config:
    """Small batches and a router without encoder: what is computed here is to vanish beside what is waited for."""
    config = Config()
    config.router.iterations, config.router.encoder = iterations, ""
    config.router.queries, config.router.group_size, config.data.router_queries = 4, 4, 4
    return config


def make_quality_config(quick: bool, scalar: bool = False) -> Config:
    """No Judge, half the queries an iteration, fewer iterations than by default, fewer queries to evaluate on.

    `scalar`: a router without encoder and smaller batches still, which takes a fifth of the processor time.
    """
    config = Config()
    config.router.beta, config.router.iterations, config.router.queries = 0.0, 24, 8
    config.data.validation_queries, config.data.test_queries = (2, 2) if quick else (20, 40)
    if scalar:
        config.router.encoder, config.router.queries, config.data.validation_queries = "", 6, 10
    if quick:
        config.router.iterations, config.router.queries, config.router.group_size = 2, 4, 4
        config.data.router_queries = 4
    return config


def show_speed(title: str, found: dict[int, dict[str, Any]]) -> None:
    """A table of one setting."""
    print(f"\n{title}\n  lag   s/iteration  model   speed (range)        rollout  score  learn  waited  overlap")
    for lag, row in found.items():
        low, high = row["speed_range"]
        print(
            f"  {lag:3}   {row['seconds']:11.2f} {row['model']:6.2f}   {row['speed']:5.2f} ({low:.2f} to {high:.2f}) "
            f"{row['rollout']:10.2f} {row['score']:6.2f} {row['learn']:6.2f} {row['waited']:7.2f} "
            f"{row['overlap']:8.2f}",
            flush=True,
        )


def show_quality(found: dict[str, Any]) -> None:
    """A table of all arms."""
    print(
        "\nquality    gain, difference to lag 0                accuracy  share    reward while training   KL of the lag"
    )
    for name, row in found.items():
        print(
            f"  {name:12} {row['gain']:.4f}  {row['gain_difference']:+.4f} {row['gain_interval']}  "
            f"{row['accuracy']:.3f} ({row['accuracy_difference']:+.3f}) {row['large_share']:.3f} "
            f"({row['large_share_difference']:+.3f})  {row['reward_area']:.4f}  {row['lag_kl_mean']:.4f}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description="What router.max_lag gains in wall time and costs in quality.")
    parser.add_argument("--quick", action="store_true", help="every part, too small to mean anything (under a minute)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None)
    parser.add_argument("--lags", nargs="+", type=int, default=None, help="of the wall time; the first is compared to")
    parser.add_argument("--iterations", type=int, default=None, help="of each training that is timed (default: 8)")
    parser.add_argument("--rounds", type=int, default=None, help="of the wall time (default: 2)")
    parser.add_argument("--seeds", type=int, default=None, help="of the quality (default: 3)")
    parser.add_argument("--scalar", action="store_true", help="quality of routers without encoder: much cheaper")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    disable_progress_bar()
    quick = options.quick
    parts = options.parts or (PARTS[1:] if quick else PARTS)
    lags = options.lags or ([0, 1] if quick else [0, 1, 2, 4])
    iterations, rounds = options.iterations or (3 if quick else 8), options.rounds or (1 if quick else 2)
    seeds = range(options.seeds or (1 if quick else 3))
    began, found = time.perf_counter(), {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    results: dict[str, Any] = dict(found)
    speed = make_speed_config(iterations, quick)
    if "here" in parts:
        results["here"] = compare_lags(speed, lags, rounds)
        show_speed("wall time, here", results["here"])
    if "elsewhere" in parts:
        results["elsewhere"] = compare_lags(speed, lags, rounds, PACE_S)
        show_speed("wall time, rollouts elsewhere", results["elsewhere"])
    for name, (score_s, learn_s) in APART_S.items() if "apart" in parts else ():
        pace_s = [APART_PACE * pace for pace in PACE_S]
        apart = simulate_lags(make_apart_config(iterations), lags, 1, pace_s, score_s, learn_s)
        results[f"apart, {name}"] = apart
        show_speed(f"wall time, every role on a machine of its own, {name}", apart)
    if "quality" in parts:
        arms = ARMS[:2] if quick else ARMS
        results["quality"] = measure_quality(
            make_quality_config(quick), arms, seeds, 1 if quick else os.cpu_count() or 1
        )
        show_quality(results["quality"])
    results |= {"load_after": os.getloadavg()[0], "minutes": round((time.perf_counter() - began) / 60, 1)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
