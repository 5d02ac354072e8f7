"""What a run found, as a table for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from roro_ray.data.run_dir import RunDir
from roro_ray.evaluation.calibration import Calibration, Interval

_WIDTH = 100
_CALIBRATED = ("large_share", "accuracy", "accuracy_gap", "flops_ratio")


def format_results(summary: Mapping[str, Any], run: RunDir) -> str:
    """Method by method over all suites: accuracy, large share, FLOPs; then the headline and where the report lies."""
    entries = summary["suites"]["overall"]
    large = entries.get("large", {}).get("flops")
    rows: list[tuple[str, ...]] = [_row(summary, method, entry, large) for method, entry in entries.items()]
    header: tuple[str, ...] = ("method", "accuracy", "large share", "FLOPs/large", "decoded/large")
    if any(entry.get("usd") is not None for entry in entries.values()):
        header += ("USD/1000 queries",)
        rows = [(*row, _dollars(entry.get("usd"))) for row, entry in zip(rows, entries.values(), strict=True)]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    rule = "  ".join("-" * width for width in widths)
    queries = summary["queries"]
    return "\n".join(
        [
            "",
            f"Test queries: {queries['test']} over {', '.join(queries['suites'])}. Brackets: 95% interval.",
            "",
            lines[0],
            rule,
            *lines[1:],
            "",
            *textwrap.wrap(summary["headline"]["text"], _WIDTH),
            *(f"Left out: {method} ({reason})" for method, reason in summary["skipped"].items()),
            f"Report: {run.place_of(run.report.resolve())}",
        ]
    )


def _dollars(each: float | None) -> str:
    return "-" if each is None else f"{1000 * each:.3f}"


def format_calibration(calibration: Calibration, saved: str) -> str:
    """What each cost weight gave, and both models alone; then where the calibration lies."""
    rows = [
        (f"{at.cost_weight:g}", *(_interval(getattr(at, name), name.startswith("accuracy")) for name in _CALIBRATED))
        for at in calibration.points
    ]
    header = ("cost weight", "large share", "accuracy", "below large", "FLOPs/large")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    small, large = (_interval(each, True) for each in (calibration.small_accuracy, calibration.large_accuracy))
    return "\n".join(
        [
            "",
            f"Router version {calibration.router_version} at a price, on {calibration.queries} held-out queries. "
            f"Brackets: {calibration.confidence:.0%} interval.",
            "",
            lines[0],
            "  ".join("-" * width for width in widths),
            *lines[1:],
            "",
            f"Alone: {calibration.models[0]} {small}, {calibration.models[-1]} {large}",
            f"Calibration: {saved}",
        ]
    )


def _interval(measured: Interval, percent: bool) -> str:
    return _value(measured.value, [measured.low, measured.high], percent)


def _row(
    summary: Mapping[str, Any], method: str, entry: Mapping[str, Any], large: float | None
) -> tuple[str, str, str, str, str]:
    large_decoded = summary["suites"]["overall"].get("large", {}).get("flops_decode")
    return (
        summary["methods"][method]["title"],
        _value(entry.get("accuracy"), entry["ci"].get("accuracy"), percent=True),
        _value(entry.get("cost_share"), entry["ci"].get("cost_share")),
        _ratio(entry.get("flops"), large),
        _ratio(entry.get("flops_decode"), large_decoded),
    )


def _value(value: float | None, interval: list[float] | None, percent: bool = False) -> str:
    if value is None:
        return "-"

    def show(number: float) -> str:
        return f"{100 * number:.1f}" if percent else f"{number:.2f}"

    text = show(value) + ("%" if percent else "")
    return f"{text} [{show(interval[0])}, {show(interval[1])}]" if interval else text


def _ratio(value: float | None, whole: float | None) -> str:
    return "-" if value is None or not whole else f"{value / whole:.2f}"
