"""Several seeds of the same comparison as one page of Markdown: every figure computed from the runs' summaries.

Means are over seeds with the lowest and the highest seed in brackets; what the page claims in words is decided by the
figures, and says so when they disappoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Summary = Mapping[str, Any]
_OVERALL = "overall"
_TARGET_SHARE = 0.36


def format_comparison(summaries: Mapping[int, Summary], tuning: Mapping[int, Mapping[str, Any]], command: str) -> str:
    """The page.

    Args:
        summaries: of each seed's evaluation.
        tuning: of each seed, what `evaluation.tuning` chose and from what.
        command: that makes this page.
    """
    any_summary = next(iter(summaries.values()))
    router, queries = any_summary["config"]["router"], any_summary["queries"]
    episodes = router["iterations"] * router["queries"] * router["group_size"]
    return "\n".join(
        [
            "# Results",
            "",
            f"Made by `{command}`: {len(summaries)} seeds ({', '.join(map(str, summaries))}), {queries['test']} test "
            f"queries over {', '.join(queries['suites'])}; every router trained for {episodes} episodes; operating "
            "points chosen on validation. Mean over seeds [lowest, highest].",
            "",
            *_claims(summaries),
            "## All methods, over all suites",
            "",
            *_method_table(summaries),
            "## RoRo by suite",
            "",
            *_suite_table(summaries),
            "## Learning curves (validation): accuracy @ large share",
            "",
            *_curve_table(summaries),
            "## Held-out pair accuracy of the reward",
            "",
            *_judge_tables(summaries),
            "## Outcome-only, tuned",
            "",
            *_tuning_table(tuning),
            *_versions(any_summary),
        ]
    )


def _figures(summaries: Mapping[int, Summary], pick: Callable[[Summary], float | None]) -> list[float]:
    values = [pick(summary) for summary in summaries.values()]
    return [value for value in values if value is not None]


def _entry(summary: Summary, method: str, suite: str = _OVERALL) -> Mapping[str, Any]:
    found: Mapping[str, Any] = summary["suites"][suite].get(method, {})
    return found


def _mean(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _method_table(summaries: Mapping[int, Summary]) -> list[str]:
    methods = {method: info["title"] for summary in summaries.values() for method, info in summary["methods"].items()}

    def row(method: str, title: str) -> list[str]:
        def ratio(summary: Summary) -> float | None:
            mine, large = _entry(summary, method).get("flops"), _entry(summary, "large").get("flops")
            return mine / large if mine is not None and large else None

        def mean(name: str) -> str:
            return _mean(_figures(summaries, lambda summary: _entry(summary, method).get(name)))

        flops = _mean(_figures(summaries, ratio), 2)
        return [f"{title} (`{method}`)", mean("accuracy"), mean("cost_share"), flops, mean("frontier_area")]

    header = ("method", "accuracy", "large share", "FLOPs / large", "frontier area")
    return _table(header, [row(method, title) for method, title in methods.items()])


def _suite_table(summaries: Mapping[int, Summary]) -> list[str]:
    suites = next(iter(summaries.values()))["queries"]["suites"]
    accuracies = [(method, "accuracy") for method in ("small", "large", "roro")]
    shown = [*accuracies, ("roro", "cost_share"), ("oracle", "cost_share")]

    def cell(suite: str, method: str, name: str) -> str:
        return _mean(_figures(summaries, lambda summary: _entry(summary, method, suite).get(name)))

    rows = [[suite, *(cell(suite, method, name) for method, name in shown)] for suite in suites]
    return _table(("suite", "small", "large", "RoRo", "RoRo's large share", "oracle's large share"), rows)


def _curve_table(summaries: Mapping[int, Summary]) -> list[str]:
    points: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for summary in summaries.values():
        for method, curve in summary["learning_curves"].items():
            for at in curve:
                if at["accuracy"] is not None:
                    points.setdefault((method, at["episodes"]), []).append((at["accuracy"], at["cost_share"]))
    episodes = sorted({count for _, count in points})
    methods = list(dict.fromkeys(method for method, _ in points))

    def cell(method: str, count: int) -> str:
        found = points.get((method, count))
        return f"{np.mean([a for a, _ in found]):.3f} @ {np.mean([s for _, s in found]):.2f}" if found else "-"

    rows = [[f"`{method}`", *(cell(method, count) for count in episodes)] for method in methods]
    return _table(("episodes", *map(str, episodes)), rows) if rows else ["No snapshots were evaluated.", ""]


def _judge_tables(summaries: Mapping[int, Summary]) -> list[str]:
    judges = [summary["judge"] for summary in summaries.values() if summary.get("judge")]
    if not judges:
        return ["No reward was learned in these runs.", ""]
    kinds = list(dict.fromkeys(kind for judge in judges for by in judge["by_kind"].values() for kind in by))
    rows = []
    for control in dict.fromkeys(name for judge in judges for name in judge["pair_accuracy"]):
        means = [judge["pair_accuracy"][control] for judge in judges if judge["pair_accuracy"].get(control) is not None]
        by_kind = [
            [judge["by_kind"][control][kind] for judge in judges if judge["by_kind"][control].get(kind) is not None]
            for kind in kinds
        ]
        rows.append([f"`{control}`", _mean(means), *map(_mean, by_kind)])
    rounds = sorted({at["round"] for judge in judges for at in judge["by_round"]})
    by_round = [
        [at["mean"] for judge in judges for at in judge["by_round"] if at["round"] == number and at["mean"] is not None]
        for number in rounds
    ]
    names = ["warm start" if number < 0 else f"round {number + 1}" for number in rounds]
    return [
        *_table(("rubrics and Judge", "mean of kinds", *kinds), rows),
        *_table(("", *names), [["mean of kinds", *map(_mean, by_round)]]),
    ]


def _tuning_table(tuning: Mapping[int, Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            str(seed),
            name + (" **(chosen)**" if name == facts["chosen"] else ""),
            f"{candidate['low']:g} to {candidate['high']:g}",
            f"{candidate['accuracy']:.3f}",
            f"{candidate['cost_share']:.3f}",
        ]
        for seed, facts in tuning.items()
        for name, candidate in facts["candidates"].items()
    ]
    return _table(("seed", "training", "cost weights in training", "validation accuracy", "large share"), rows)


def _claims(summaries: Mapping[int, Summary]) -> list[str]:
    lines = []
    change = _figures(summaries, lambda s: (_entry(s, "roro").get("vs_large") or {}).get("accuracy"))
    share = _figures(summaries, lambda s: _entry(s, "roro").get("cost_share"))
    if change and share:
        reached = np.mean(change) >= -0.01 - 1e-9
        cheap = np.mean(share) <= _TARGET_SHARE + 1e-9
        lines.append(
            f"- RoRo's accuracy differs from the large model's by {100 * np.mean(change):+.1f} points on average "
            f"({'within' if reached else '**not** within'} 1 point) at a large share of {np.mean(share):.3f} "
            f"({'at most' if cheap else '**more than**'} {_TARGET_SHARE})."
        )
    for rival in ("grpo_outcome", "grpo_outcome_tuned", "ppo_rllib", "random_rubrics", "fixed_rubric", "roro_step"):
        shares = _differences(summaries, rival, "cost_share")
        accuracies = _differences(summaries, rival, "accuracy")
        if shares and accuracies:
            fewer = sum(value < 0 for value in shares)
            lines.append(
                f"- RoRo against `{rival}`: large share {np.mean(shares):+.3f} (lower in {fewer} of {len(shares)} "
                f"seeds), accuracy {100 * np.mean(accuracies):+.1f} points."
            )
    return [*lines, ""]


def _differences(summaries: Mapping[int, Summary], rival: str, name: str) -> list[float]:
    def difference(summary: Summary) -> float | None:
        mine, other = _entry(summary, "roro").get(name), _entry(summary, rival).get(name)
        return None if mine is None or other is None else mine - other

    return _figures(summaries, difference)


def _versions(summary: Summary) -> list[str]:
    versions = summary["versions"]
    names = ("roro_ray", "python", "torch", "ray", "transformers")
    commit = (versions.get("git") or {}).get("commit")
    shown = ", ".join(f"{name} {versions.get(name)}" for name in names)
    return [f"Versions: {shown}" + (f", commit {commit[:12]}" if commit else "") + ".", ""]
