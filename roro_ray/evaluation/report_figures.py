"""The report's figures: frontiers, learning curves, the Judge by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from roro_ray.evaluation.charts import Chart, Point

_NO_LINE = ("small", "large")


def draw_frontier(suite: str, entries: Mapping[str, Any], titles: Mapping[str, str], large: bool) -> str:
    """Accuracy over the large model's share of steps: a line per method, its operating point as a ring.

    Args:
        large: the full figure, with intervals and strays, or a small one for one suite.
    """
    alone = {name: _end(entries[name]) for name in _NO_LINE if name in entries}
    ends = {name: end for name, end in alone.items() if end is not None}
    seen = [at["accuracy"] for entry in entries.values() for at in entry["frontier"] if at["accuracy"] is not None]
    lowest = min([*seen, *(end[1] for end in ends.values()), 0.9])
    chart = Chart(
        title=f"Accuracy over large share, {suite}",
        x_label="steps written by the large model",
        y_label="accuracy",
        x_range=(0.0, 1.0),
        y_range=(max(0.0, lowest - 0.04), 1.02),
        width=620 if large else 380,
        height=430 if large else 280,
        percent_x=True,
    )
    # RoRo last, so that it lies on top.
    order = sorted(entries, key=lambda method: (method.startswith("roro"), method == "roro"))
    for method in order:
        if method not in _NO_LINE and ends and entries[method]["frontier"]:
            _draw_method(chart, method, entries[method], titles.get(method, method), [*ends.values()], large)
    for name, end in ends.items():
        chart.add_point(end, f"dot m-{name}", f"{titles.get(name, name)}: {_tip(end)}", 5)
        shift = (9, 4) if name == "small" else (-2, -10)
        if large:
            chart.add_text(end, name, "start" if name == "small" else "end", shift)
    return chart.render()


def _draw_method(
    chart: Chart, method: str, entry: Mapping[str, Any], title: str, ends: Sequence[Point], large: bool
) -> None:
    known = [at for at in entry["frontier"] if at["accuracy"] is not None and at["cost_share"] is not None]
    corners = [(at["cost_share"], at["accuracy"]) for at in known if at["corner"]]
    chart.add_line(sorted([*ends, *corners]), f"m-{method}", title)
    if large and method != "oracle":
        for at in known:
            if not at["corner"]:
                place = (at["cost_share"], at["accuracy"])
                chart.add_point(place, f"stray m-{method}", f"{title}, {at['setting']}: {_tip(place)}", 2.6)
    for at in known:
        if at["operating"] and method != "oracle":
            place = (at["cost_share"], at["accuracy"])
            if large and method.startswith("roro"):
                ci = entry["ci"]
                chart.add_cross(place, _pair(ci.get("cost_share")), _pair(ci.get("accuracy")), f"m-{method}")
            tip = f"{title}, operating point ({at['setting']}): {_tip(place)}"
            chart.add_point(place, f"ring m-{method}", tip, 5 if large else 4)


def _end(entry: Mapping[str, Any]) -> Point | None:
    if entry["accuracy"] is None or entry["cost_share"] is None:
        return None
    return entry["cost_share"], entry["accuracy"]


def _pair(interval: Sequence[float] | None) -> Point | None:
    return (interval[0], interval[1]) if interval else None


def _tip(at: Point) -> str:
    return f"{100 * at[1]:.1f}% accurate at {100 * at[0]:.1f}% large steps"


def make_legend(methods: Sequence[str], titles: Mapping[str, str]) -> str:
    """A list of line samples and names."""
    items = "".join(f'<li class="m-{method}"><i></i>{escape(titles.get(method, method))}</li>' for method in methods)
    return f'<ul class="legend">{items}</ul>'


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], name: str, label: str) -> str:
    """One quantity (`accuracy` or `cost_share`) over training episodes, a line and a band per method."""
    points = [at for curve in curves.values() for at in curve if at[name] is not None]
    values = [value for at in points for value in (at[name], *(at[f"{name}_interval"] or ()))]
    last = max((at["episodes"] for at in points), default=1)
    low = min(values, default=0.0)
    chart = Chart(
        title=f"{label} over training episodes",
        x_label="training episodes",
        y_label=label,
        x_range=(0.0, float(last) or 1.0),
        y_range=(max(0.0, low - 0.04), min(1.02, max(values, default=1.0) + 0.04)),
        width=470,
        height=300,
    )
    for method, curve in sorted(curves.items(), key=lambda item: item[0] == "roro"):
        known = [at for at in curve if at[name] is not None]
        banded = [at for at in known if at[f"{name}_interval"]]
        lows, highs = ([at[f"{name}_interval"][side] for at in banded] for side in (0, 1))
        chart.add_band([at["episodes"] for at in banded], lows, highs, f"m-{method}")
        chart.add_line([(at["episodes"], at[name]) for at in known], f"m-{method}")
        for at in known:
            tip = f"{method}, {at['episodes']} episodes, {at['setting']}: {100 * at[name]:.1f}%"
            chart.add_point((at["episodes"], at[name]), f"dot m-{method}", tip)
    return chart.render()


def draw_rounds(rounds: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """Held-out pair accuracy of the Judge by round of alternation, a line per kind of pair (round 0: warm start)."""
    values = [at[kind] for at in rounds for kind in kinds if at.get(kind) is not None]
    chart = Chart(
        title="Pair accuracy by round",
        x_label="round (0: warm start)",
        y_label="held-out pair accuracy",
        x_range=(0.0, float(max(len(rounds) - 1, 1))),
        y_range=(max(0.0, min([*values, 0.5]) - 0.05), min(1.02, max([*values, 0.6]) + 0.05)),
        width=470,
        height=300,
        x_ticks=max(len(rounds), 2),
    )
    for kind in kinds:
        points = [(float(i), at[kind]) for i, at in enumerate(rounds) if at.get(kind) is not None]
        chart.add_line(points, f"m-{kind}", kind)
        for point in points:
            chart.add_point(point, f"dot m-{kind}", f"{kind}, round {point[0]:g}: {100 * point[1]:.1f}%")
    return chart.render()
