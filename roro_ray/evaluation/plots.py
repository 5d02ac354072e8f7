"""`frontier.png`: the frontier of every method over all suites, for slides and README files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roro_ray.data.files import write_whole
from roro_ray.evaluation.report_style import COLOURS

_STYLES = {"oracle": ":", "random": "--"}


def save_frontier_plot(summary: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy over large share and save it as PNG (beside, then renamed).

    A line joins the small model, the settings chosen on validation and the large model; a ring is the
    operating point, with its 95% intervals for RoRo.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    entries = summary["suites"]["overall"]
    figure, axes = plt.subplots(figsize=(8.4, 5.4), dpi=150)
    ends = [(entries[m]["cost_share"], entries[m]["accuracy"]) for m in ("small", "large")]
    ends = [end for end in ends if None not in end]
    order = sorted(entries, key=lambda method: (method.startswith("roro"), method == "roro"))
    for method in order:
        entry = entries[method]
        known = [at for at in entry["frontier"] if at["accuracy"] is not None and at["cost_share"] is not None]
        if not known or not ends:
            continue
        colour = COLOURS.get(method, ("#666666", ""))[0]
        line = sorted([*ends, *((at["cost_share"], at["accuracy"]) for at in known if at["corner"])])
        width = 2.6 if method == "roro" else 1.5
        title = summary["methods"][method]["title"]
        axes.plot(*zip(*line, strict=True), _STYLES.get(method, "-"), color=colour, lw=width, label=title)
        for at in known:
            if at["operating"] and method != "oracle":
                _draw_operating_point(axes, at, entry["ci"] if method == "roro" else {}, colour)
    for name, end in zip(("small", "large"), ends, strict=False):
        axes.plot(*end, "s", color="#222831", ms=6, zorder=5)
        axes.annotate(name, end, textcoords="offset points", xytext=(8, -3) if name == "small" else (-14, 9))
    axes.set(xlabel="steps written by the large model", ylabel="accuracy", xlim=(-0.02, 1.03))
    axes.set_title(f"Accuracy and cost over {summary['queries']['test']} test queries", loc="left")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")
    plt.close(figure)


def _draw_operating_point(axes: Any, at: Mapping[str, Any], ci: Mapping[str, Any], colour: str) -> None:
    x, y = at["cost_share"], at["accuracy"]
    if ci.get("accuracy"):
        axes.plot([x, x], ci["accuracy"], color=colour, lw=1, alpha=0.7)
    if ci.get("cost_share"):
        axes.plot(ci["cost_share"], [y, y], color=colour, lw=1, alpha=0.7)
    axes.plot(x, y, "o", mfc="white", mec=colour, mew=2, ms=7, zorder=6)
