"""The report: one HTML file that opens anywhere, made from a saved summary and its examples.

It needs no network and no script: style, figures and data are inside. The first sentence is computed from the
figures, whatever they say; the rest follows from what decides a reader's trust: the frontier, the table with
intervals, learning curves, the Judge and its controls, whole examples, costs, failures, settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from roro_ray.data.files import write_whole
from roro_ray.evaluation.plots import save_frontier_plot
from roro_ray.evaluation.report_figures import draw_curves, draw_frontier, draw_rounds, make_legend
from roro_ray.evaluation.report_sections import (
    make_details,
    make_example,
    make_failures,
    make_judge_table,
    make_method_table,
    make_suite_table,
    make_tiles,
)
from roro_ray.evaluation.report_style import make_style
from roro_ray.evaluation.report_texts import COSTS, CURVES, EXAMPLES, FRONTIER, JUDGE, TABLE
from roro_ray.evaluation.summary import OVERALL, load_summary
from roro_ray.types import PairKind

_KINDS = tuple(kind.value for kind in PairKind)


def save_report(directory: Path, report: Path, plot: Path) -> None:
    """Write `report.html` and `frontier.png` from a saved evaluation.

    Args:
        directory: holds `summary.json` and `examples.json`.

    Raises:
        DataError: the summary is missing or unreadable.
    """
    summary, examples = load_summary(directory)
    report.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(report) as temporary:
        temporary.write_text(make_report(summary, examples), encoding="utf-8")
    save_frontier_plot(summary, plot)


def make_report(summary: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    entries = summary["suites"][OVERALL]
    titles = {method: info["title"] for method, info in summary["methods"].items()}
    sections = [
        _header(summary),
        _frontier_section(summary["suites"], titles),
        _table_section(summary["suites"], entries, titles),
        _curves_section(summary["learning_curves"], titles),
        _judge_section(summary["judge"]),
        _examples_section(examples),
        COSTS,
        f"<h2>Dropped and left out</h2>{make_failures(entries, titles, summary)}",
        _settings_section(summary),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>RoRo: routing by the step</title>'
        f"<style>{make_style()}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _header(summary: Mapping[str, Any]) -> str:
    queries, headline = summary["queries"], summary["headline"]
    caveat = f"<p>{escape(headline['caveat'])}</p>" if headline["caveat"] else ""
    return (
        "<h1>RoRo: which model writes the next step?</h1>"
        f'<p class="lead">{escape(headline["lead"])}</p>{caveat}{make_tiles(headline)}'
        f'<p style="margin-top:16px">{escape(headline["context"])}</p>'
        f'<p class="note">{queries["test"]} test queries in {len(queries["suites"])} suites '
        f"({escape(', '.join(queries['suites']))}). Settings were chosen on {queries['validation']} other queries. "
        f"Ranges are 95% intervals from {summary['bootstrap']['resamples']} resamples of the test queries, "
        "the same for every method.</p>"
    )


def _frontier_section(suites: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    shown = [method for method in suites[OVERALL] if method not in ("small", "large")]
    small = "".join(
        f'<div class="card"><h3>{escape(name)}</h3>{draw_frontier(name, entries, titles, large=False)}</div>'
        for name, entries in suites.items()
        if name != OVERALL
    )
    overall = draw_frontier("all suites", suites[OVERALL], titles, large=True)
    return (
        f'{FRONTIER}<div class="card"><div class="wide">{overall}</div>'
        f'{make_legend(shown, titles)}</div><div class="grid3" style="margin-top:14px">{small}</div>'
    )


def _table_section(suites: Mapping[str, Any], entries: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    return (
        f"{TABLE}{make_method_table(entries, titles)}<h3 style='margin-top:22px'>Suite by suite</h3>"
        f"{make_suite_table(suites, titles)}"
    )


def _curves_section(curves: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    if not any(curves.values()):
        return ""
    return (
        CURVES
        + f'<div class="grid2"><div class="card"><h3>Accuracy</h3>{draw_curves(curves, "accuracy", "accuracy")}</div>'
        f'<div class="card"><h3>Large share</h3>{draw_curves(curves, "cost_share", "large share")}</div></div>'
        f"{make_legend([method for method, curve in curves.items() if curve], titles)}"
    )


def _judge_section(judge: Mapping[str, Any]) -> str:
    if not judge.get("pair_accuracy"):
        return ""
    rounds = judge.get("by_round", [])
    lines = [kind for kind in ("mean", *_KINDS) if any(at.get(kind) is not None for at in rounds)]
    figure = ""
    if len(rounds) > 1:
        figure = f'<div class="card narrow">{draw_rounds(rounds, lines)}'
        figure += f"{make_legend(lines, {})}</div>"
    return f"{JUDGE}{figure}{make_judge_table(judge, _KINDS)}"


def _examples_section(examples: Sequence[Mapping[str, Any]]) -> str:
    if not examples:
        return ""
    note = f"<p class='note'>All at RoRo's operating point, {escape(examples[0]['setting'])}.</p>"
    return f"{EXAMPLES}{note}{''.join(make_example(example) for example in examples)}"


def _settings_section(summary: Mapping[str, Any]) -> str:
    versions = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in summary["versions"].items()
        if not isinstance(value, dict | list)
    )
    table = f'<div class="card scroll"><table><tbody>{versions}</tbody></table></div>' if versions else ""
    return (
        f"<h2>Settings and versions</h2>{table}{make_details('All settings of this run', summary['config'])}"
        f"{make_details('Seconds of each stage of the evaluation', summary['seconds'])}"
    )
