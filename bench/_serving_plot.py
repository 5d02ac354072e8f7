"""The serving benchmark's picture: streams a second, and how long the first text takes, against concurrency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import NullLocator

_COLOURS = {"shipped": "tab:blue", "slowed": "tab:orange"}
_LINES = {"default": "-", "haproxy": "--"}
_PROXIES = {"default": "Serve's proxy", "haproxy": "HAProxy"}


def plot_streams(proxies: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of what `measure_streams` found for each proxy and regime."""
    figure, (rate, wait) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for proxy, found in proxies.items():
        for regime, colour in _COLOURS.items():
            levels = found[regime]["streams"]
            xs = [level["concurrency"] for level in levels]
            pace = "shipped models" if regime == "shipped" else f"{found[regime]['token_ms']:g} ms more per token"
            style: dict[str, Any] = {"color": colour, "linestyle": _LINES[proxy], "marker": "o", "markersize": 4}
            label = f"{pace}, {_PROXIES[proxy]}"
            rate.plot(xs, [level["streams_per_s"] for level in levels], label=label, **style)
            wait.plot(xs, [level["ttft_ms"]["p50"] for level in levels], label=label, **style)
    for axes, title in ((rate, "streams finished per second"), (wait, "time to first text, median (ms)")):
        axes.set(xscale="log", xlabel="concurrent streams", title=title)
        axes.set_xticks(sorted({level for found in proxies.values() for level in _levels(found)}), minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    rate.set_ylim(bottom=0)
    wait.set_yscale("log")
    rate.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _levels(found: Mapping[str, Any]) -> list[int]:
    return [level["concurrency"] for regime in _COLOURS for level in found[regime]["streams"]]
