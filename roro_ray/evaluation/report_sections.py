"""The report's sections as HTML: tiles, tables, examples. Every text from a run is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from roro_ray.evaluation.report_texts import ALL_WELL, DROPPED

Entry = Mapping[str, Any]

_DASH = "&ndash;"


def show_percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage, or a dash."""
    return _DASH if value is None else f"{100 * value:.{digits}f}%"


def _cell(value: float | None, interval: Sequence[float] | None, scale: float, digits: int, sign: bool = False) -> str:
    if value is None:
        return f"<td>{_DASH}</td>"
    shape = f"{'+' if sign else ''}.{digits}f"
    text = format(scale * value, shape)
    if interval:
        low, high = (format(scale * end, shape) for end in interval)
        text += f"<small>{low} to {high}</small>"
    return f"<td>{text}</td>"


def make_tiles(headline: Entry) -> str:
    """Three figures beside the headline."""
    if headline.get("reached") is None:
        return ""
    parts = (
        ("accuracy_change", "points of accuracy against the large model alone", 100, "+.1f", ""),
        ("saved_steps", "of the steps saved", 100, ".0f", "%"),
        ("saved_flops", "of the FLOPs saved, prefill and drafts included", 100, ".0f", "%"),
    )
    tiles = []
    for name, label, scale, shape, unit in parts:
        value, interval = headline[name]["value"], headline[name]["ci"]
        if value is None:
            continue
        span = f"{scale * interval[0]:{shape}} to {scale * interval[1]:{shape}}{unit}" if interval else "no interval"
        shown = f"{scale * value:{shape}}{unit}"
        tiles.append(f'<div class="card tile"><b>{shown}</b><span>{escape(label)}</span><span>{span}</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def make_method_table(entries: Mapping[str, Entry], titles: Mapping[str, str]) -> str:
    """All methods over all suites, with 95% intervals."""
    head = (
        "Method", "Accuracy, %", "Large share, %", "Points against large", "FLOPs of large", "Decoded of large",
        "Frontier area", "APGR", "CPT 95, %",
    )  # fmt: skip
    large = entries.get("large", {})
    priced = any(entry.get("usd") is not None for entry in entries.values())
    rows = []
    for method, entry in entries.items():
        ci, versus = entry["ci"], entry.get("vs_large", {})
        setting = f"<small>{escape(entry['setting'])}</small>" if entry["frontier"] and method != "oracle" else ""
        cells = [
            f'<td><i class="key m-{method}"></i>{escape(titles.get(method, method))}{setting}</td>',
            _cell(entry["accuracy"], ci["accuracy"], 100, 1),
            _cell(entry["cost_share"], ci["cost_share"], 100, 1),
            _cell(versus.get("accuracy"), versus.get("ci", {}).get("accuracy"), 100, 1, sign=True),
            _cell(_ratio(entry["flops"], large.get("flops")), None, 1, 2),
            _cell(_ratio(entry["flops_decode"], large.get("flops_decode")), None, 1, 2),
            _cell(entry["frontier_area"], ci["frontier_area"], 1, 3),
            _cell(entry["apgr"], ci["apgr"], 1, 2),
            _cell(entry["cpt95"], ci["cpt95"], 100, 0),
        ]
        if priced:
            cells.append(_cell(entry.get("usd"), ci.get("usd"), 1000, 3))
        rows.append(f'<tr class="{"own" if method.startswith("roro") else ""}">{"".join(cells)}</tr>')
    header = "".join(f"<th>{name}</th>" for name in (*head, *(("USD / 1,000 queries",) if priced else ())))
    return _table(header, rows)


def _ratio(value: float | None, whole: float | None) -> float | None:
    return None if value is None or not whole else value / whole


def _table(header: str, rows: Sequence[str]) -> str:
    body = "".join(rows)
    return f'<div class="card scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def make_suite_table(suites: Mapping[str, Mapping[str, Entry]], titles: Mapping[str, str]) -> str:
    """Accuracy at large share, suite by suite."""
    names = [name for name in suites if name != "overall"]
    rows = []
    for method in suites["overall"]:
        cells = [f'<td><i class="key m-{method}"></i>{escape(titles.get(method, method))}</td>']
        for name in names:
            entry = suites[name][method]
            share = f"<small>at {show_percent(entry['cost_share'], 0)} large</small>"
            cells.append(f"<td>{show_percent(entry['accuracy'], 0)}{share}</td>")
        rows.append(f'<tr class="{"own" if method.startswith("roro") else ""}">{"".join(cells)}</tr>')
    return _table("<th>Method</th>" + "".join(f"<th>{escape(name)}</th>" for name in names), rows)


_CONTROLS = {
    "untrained": "Untrained Judge, learned rubrics",
    "warm": "Warm start of both",
    "trained": "Both trained by alternation",
    "trained_rubricor": "Trained Rubricor, warm Judge",
    "trained_judge": "Warm Rubricor, trained Judge",
    "fixed_rubric": "One fixed rubric",
    "random_rubrics": "Random rubrics",
    "shuffled_rubrics": "Another query's rubric",
}


def make_judge_table(judge: Entry, kinds: Sequence[str]) -> str:
    """Held-out pair accuracy of the trained Judge and of its controls, by kind of pair."""
    rows = []
    for name, mean in judge.get("pair_accuracy", {}).items():
        by_kind = judge.get("by_kind", {}).get(name, {})
        width = 100 * max(0.0, min(1.0, mean or 0.0))
        bar = f'<span class="meter m-roro"><i style="width:{width:.0f}%"></i></span>'
        cells = [f"<td>{escape(_CONTROLS.get(name, name))}</td>", f"<td>{bar}{show_percent(mean)}</td>"]
        cells += [f"<td>{show_percent(by_kind.get(kind))}</td>" for kind in kinds]
        rows.append(f'<tr class="{"own" if name == "trained" else ""}">{"".join(cells)}</tr>')
    counts = judge.get("pairs", {})
    header = "<th>Rubrics and Judge</th><th>Mean of the kinds</th>"
    for kind in kinds:
        header += f"<th>{escape(kind)}{f'<br>{counts[kind]} pairs' if kind in counts else ''}</th>"
    return _table(header, rows)


def make_example(example: Entry) -> str:
    """One trajectory, its steps coloured by writer, with the rubric beside it."""
    verdict = "right" if example["correct"] else "wrong"
    answer = "no answer" if example["answer"] is None else f"answers {example['answer']}"
    facts = [f"{show_percent(example['large_share'], 0)} large steps"]
    if example["oracle_share"] is not None:
        facts.append(f"the oracle needs {show_percent(example['oracle_share'], 0)}")
    tags = "".join(f'<span class="tag">{escape(fact)}</span>' for fact in facts)
    gold = "" if example["correct"] else f", not {escape(str(example['gold']))}"
    header = (
        f'<header><h3>{escape(example["suite"])}</h3><span class="{verdict}">{escape(answer)}{gold}: {verdict}</span>'
    )
    steps = "".join(_make_step(step) for step in example["steps"])
    rubric = _make_rubric(example)
    return (
        f'<article class="card example">{header}{tags}</header><div class="query">{escape(example["query"])}</div>'
        f'<div class="split{"" if rubric else " alone"}"><ol class="steps">{steps}</ol>{rubric}</div></article>'
    )


def _make_step(step: Entry) -> str:
    chance = step["probability"]
    other = ""
    if step["small_text"] is not None and step["small_text"] != step["text"]:
        other = f"<em>small alone: {escape(step['small_text'])}</em>"
    return (
        f'<li class="{"large" if step["large"] else "small"}"><span class="who">{escape(step["model"])}</span>'
        f"<code>{escape(step['text'])}{other}</code>"
        f'<span class="chance" title="the router\'s probability of the large model"><span class="meter">'
        f'<i style="width:{100 * chance:.0f}%"></i></span>{100 * chance:.0f}%</span></li>'
    )


def _make_rubric(example: Entry) -> str:
    if not example["rubric"]:
        return ""
    lines = "".join(
        f"<li><span>{escape(line['text'])}</span><span class='soft'>weight {line['weight']:g}</span>"
        f"<span class='soft'>{_DASH if line['yes'] is None else 'yes ' + show_percent(line['yes'], 0)}</span></li>"
        for line in example["rubric"]
    )
    score = "" if example["score"] is None else f'<p class="note">Judge\'s score {example["score"]:+.2f} of 1</p>'
    return f'<div><h3>Its rubric, and the Judge</h3><ul class="rubric">{lines}</ul>{score}</div>'


def make_failures(entries: Mapping[str, Entry], titles: Mapping[str, str], summary: Entry) -> str:
    """What was dropped or left out: counted, with the first error of each method."""
    lines = [
        f"<li>{escape(titles.get(method, method))}: {entry['failed']} failed, {entry['unscorable']} could not be scored"
        + (f"; first error: <code>{escape(entry['error'])}</code>" if entry["error"] else "")
        + "</li>"
        for method, entry in entries.items()
        if entry["failed"] or entry["unscorable"]
    ]
    lines += [f"<li>{escape(name)} was left out: {escape(why)}</li>" for name, why in summary["skipped"].items()]
    if summary.get("oracle_inexact"):
        lines.append(f"<li>The oracle's search was cut off on {summary['oracle_inexact']} queries.</li>")
    if not lines:
        return ALL_WELL
    return f"{DROPPED}<ul>{''.join(lines)}</ul>"


def make_details(title: str, content: Any) -> str:
    """A folded block of JSON."""
    text = escape(json.dumps(content, indent=1, ensure_ascii=False))
    return f"<details><summary>{escape(title)}</summary><pre>{text}</pre></details>"
