"""The headline: one sentence on what RoRo saves at the large model's accuracy, computed from the figures.

It says what happened, also when that is a disappointment: the accuracy at the operating point is compared with
the large model's (a paired difference with its interval), and only within the allowed distance is a saving
claimed at "the same accuracy".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roro_ray.evaluation.methods import METHODS


def make_headline(overall: Mapping[str, Any], slack: float) -> dict[str, Any]:
    """The sentence and the figures in it.

    Args:
        overall: the entries of all methods over all suites.
        slack: the largest loss of accuracy that still counts as the large model's accuracy.

    Returns:
        `text`, which is `lead` and, where something must be added, `caveat`; `context`, how the other methods did;
        `reached` (None where RoRo was not evaluated); `saved_flops`, `saved_steps` and `accuracy_change`, each a
        value with `ci`.
    """
    context = make_context(overall, slack)
    entry = overall.get("roro")
    versus = (entry or {}).get("vs_large") or {}
    change, share = versus.get("accuracy"), (entry or {}).get("cost_share")
    if entry is None or change is None or share is None:
        text = "RoRo was not evaluated in this run."
        return {"text": text, "lead": text, "caveat": "", "context": context, "reached": None}
    interval = versus["ci"].get("accuracy")
    reached = change >= -slack - 1e-9
    certain = reached and interval is not None and interval[0] >= -slack - 1e-9
    steps, steps_ci = 1 - share, _flip(entry["ci"].get("cost_share"))
    flops, flops_ci = versus.get("flops_saved"), versus["ci"].get("flops_saved")
    accuracy = f"{100 * entry['accuracy']:.1f}%"
    large = f"{100 * (entry['accuracy'] - change):.1f}%"
    caveat = ""
    if reached:
        lead = f"RoRo keeps the large model's accuracy ({accuracy} against {large}) and saves {_percent(steps)}"
        lead += f"{_span(steps_ci)} of its steps"
        if not certain and interval is not None:
            caveat = (
                f"The accuracy differs by {_points(change)} points, and with an interval of {_points(interval[0])} to "
                f"{_points(interval[1])} a loss of more than {100 * slack:g} is not excluded."
            )
    else:
        lead = (
            f"RoRo does not reach the large model's accuracy here: {accuracy} against {large}, "
            f"{_points(change)} points{_span_points(interval)}, while it leaves {_percent(steps)}{_span(steps_ci)} of "
            f"the steps to the small model"
        )
    lead += _flops_clause(flops, flops_ci, "and saves " if not reached else "and ")
    lead += _money_clause(versus.get("usd_saved"), versus["ci"].get("usd_saved"))
    return {
        "text": f"{lead} {caveat}".strip(),
        "lead": lead,
        "caveat": caveat,
        "context": context,
        "reached": reached,
        "accuracy_change": {"value": change, "ci": interval},
        "saved_steps": {"value": steps, "ci": steps_ci},
        "saved_flops": {"value": flops, "ci": flops_ci},
    }


def make_context(overall: Mapping[str, Any], slack: float) -> str:
    """Which methods reach the large model's accuracy most cheaply, and RoRo beside outcome-only GRPO."""
    large = overall.get("large", {})
    near = {
        method: entry
        for method, entry in overall.items()
        if method not in ("small", "large", "oracle")
        and (entry.get("vs_large") or {}).get("accuracy") is not None
        and entry["vs_large"]["accuracy"] >= -slack - 1e-9
    }
    within = f"within {100 * slack:g} point{'' if slack == 0.01 else 's'} of the large model's accuracy on test"
    if not near:
        text = f"No method is {within}."
    else:
        steps = min(near, key=lambda method: near[method]["cost_share"])
        text = f"Of the methods {within}, {METHODS[steps].title} uses the fewest large steps"
        text += f" ({_percent(near[steps]['cost_share'])})"
        if large.get("flops"):
            flops = min(near, key=lambda method: near[method]["flops"])
            part = near[flops]["flops"] / large["flops"]
            text += f" and {METHODS[flops].title} the fewest FLOPs ({_percent(part)} of the large model's)."
        else:
            text += "."
    versus = (overall.get("roro") or {}).get("vs_grpo_outcome") or {}
    if versus.get("accuracy") is not None and versus.get("cost_share") is not None:
        ci = versus["ci"]
        text += (
            f" Against GRPO on the outcome alone, RoRo's accuracy differs by {_points(versus['accuracy'])} points"
            f"{_span_points(ci.get('accuracy'))} and its large share by {_points(versus['cost_share'])} points"
            f"{_span_points(ci.get('cost_share'))}."
        )
    return text


def _flops_clause(saved: float | None, interval: list[float] | None, join: str) -> str:
    if saved is None:
        return "."
    if saved < 0:
        return f", but computes {_percent(-saved)}{_span(_negate(interval))} more FLOPs, prefill and drafts included."
    return f" {join}{_percent(saved)}{_span(interval)} of its FLOPs, prefill and drafts included."


def _money_clause(saved: float | None, interval: list[float] | None) -> str:
    """What the pool's prices make of it; nothing where no model has one."""
    if saved is None:
        return ""
    if saved < 0:
        return f" By the pool's prices it costs {_percent(-saved)}{_span(_negate(interval))} more."
    return f" By the pool's prices it saves {_percent(saved)}{_span(interval)} of the money."


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _span(interval: list[float] | None) -> str:
    return f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})" if interval else ""


def _span_points(interval: list[float] | None) -> str:
    return f" ({_points(interval[0])} to {_points(interval[1])})" if interval else ""


def _flip(interval: list[float] | None) -> list[float] | None:
    return [1 - interval[1], 1 - interval[0]] if interval else None


def _negate(interval: list[float] | None) -> list[float] | None:
    return [-interval[1], -interval[0]] if interval else None
