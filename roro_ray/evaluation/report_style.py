"""The report's style sheet: light and dark by the reader's setting, one column on a phone."""

from __future__ import annotations

# method: colour on light, colour on dark
COLOURS: dict[str, tuple[str, str]] = {
    "roro": ("#d1495b", "#ff7b8a"),
    "roro_step": ("#e07a5f", "#ffa07a"),
    "grpo_outcome": ("#2a6fbb", "#74b3f5"),
    "grpo_outcome_tuned": ("#5b4fc4", "#a99bff"),
    "ppo_rllib": ("#0f8f8f", "#4fd0d0"),
    "random_rubrics": ("#8a6d3b", "#d8b46a"),
    "fixed_rubric": ("#a0522d", "#e09a6f"),
    "confidence": ("#2e8b57", "#6fd39b"),
    "draft_verify": ("#00838f", "#5ccbd6"),
    "glimpse": ("#8e44ad", "#cf9be6"),
    "query_level": ("#b7791f", "#f0c05a"),
    "random": ("#8d99a6", "#8d99a6"),
    "oracle": ("#222831", "#e8ecf1"),
    "small": ("#546270", "#aab6c2"),
    "large": ("#111827", "#f4f6f8"),
    "outcome": ("#2e8b57", "#6fd39b"),
    "cost": ("#b7791f", "#f0c05a"),
    "process": ("#8e44ad", "#cf9be6"),
    "mean": ("#111827", "#f4f6f8"),
}

_LIGHT = {
    "paper": "#fbfaf8", "card": "#ffffff", "ink": "#1c2430", "soft": "#5d6875", "rule": "#e3e1dc",
    "small": "#e8eef4", "small-ink": "#33475b", "large": "#fbe3e0", "large-ink": "#8c2f2a", "good": "#2e7d4f",
    "bad": "#b3402f", "bar": "#c9d3dd",
}  # fmt: skip
_DARK = {
    "paper": "#14181d", "card": "#1c2229", "ink": "#e6eaef", "soft": "#98a4b1", "rule": "#2e363f",
    "small": "#25303b", "small-ink": "#b9cbdc", "large": "#43262a", "large-ink": "#ffb3ac", "good": "#6fd39b",
    "bad": "#ff8f7d", "bar": "#3c4854",
}  # fmt: skip

_RULES = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 15px; font-weight: 600; letter-spacing: .04em; margin: 0 0 14px; color: var(--soft); }
h2 { font-size: 21px; margin: 52px 0 6px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 0 0 4px; }
p { margin: 6px 0 14px; max-width: 74ch; }
.lead { font-size: clamp(20px, 3.1vw, 28px); line-height: 1.32; letter-spacing: -.015em; font-weight: 600;
  max-width: 34em; margin: 0 0 24px; text-wrap: pretty; }
.soft, .note { color: var(--soft); }
.note { font-size: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 215px), 1fr)); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 18px; min-width: 0; }
.tile b { display: block; font-size: 30px; line-height: 1.15; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 14px; color: var(--soft); }
.chart { display: block; width: 100%; height: auto; }
.wide { max-width: 780px; margin: 0 auto; }
.narrow { max-width: 540px; margin-bottom: 14px; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px; }
.grid3 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick, .mark { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.mark { fill: var(--ink); font-weight: 600; }
.axis { fill: var(--soft); font-size: 13px; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line.m-roro { stroke-width: 3.4; }
.line.m-oracle { stroke-dasharray: 2 4; stroke-width: 1.8; }
.line.m-random { stroke-dasharray: 7 4; }
.band { fill: var(--c); opacity: .14; }
.whisker { stroke: var(--c); stroke-width: 1.4; opacity: .7; }
.dot { fill: var(--c); }
.stray { fill: var(--c); opacity: .3; }
.ring { fill: var(--card); stroke: var(--c); stroke-width: 2.6; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 0; padding: 0; list-style: none;
  font-size: 14px; }
.legend i { display: inline-block; width: 20px; height: 0; border-top: 3px solid var(--c); vertical-align: middle;
  margin-right: 7px; }
.legend .m-oracle i { border-top-style: dotted; }
.legend .m-random i { border-top-style: dashed; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; font-size: 13px; line-height: 1.3;
  white-space: normal; min-width: 62px; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card);
  white-space: normal; min-width: 128px; }
td:first-child small { padding-left: 17px; }
td small { display: block; color: var(--soft); font-size: 12px; }
td i.key { display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--c);
  margin-right: 8px; }
tr.own td { font-weight: 600; }
tr.own td small { font-weight: 400; }
tr:last-child td { border-bottom: 0; }
.meter { display: inline-block; width: 74px; height: 8px; border-radius: 4px; background: var(--rule); overflow: hidden;
  vertical-align: middle; margin-right: 8px; }
.meter i { display: block; height: 100%; background: var(--c, var(--bar)); }
.example { margin-top: 14px; }
.example header { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; margin-bottom: 4px; }
.tag { font-size: 12px; border-radius: 20px; padding: 2px 10px; border: 1px solid var(--rule); color: var(--soft); }
.right { color: var(--good); } .wrong { color: var(--bad); }
.query { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 14px; margin: 8px 0 12px;
  overflow-wrap: anywhere; }
.split { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 22px; }
.split.alone { grid-template-columns: 1fr; }
.steps, .rubric { list-style: none; margin: 0; padding: 0; }
.steps li { display: grid; grid-template-columns: 58px minmax(0, 1fr) 104px; gap: 4px 12px; align-items: center;
  border-radius: 6px; padding: 5px 10px; margin-bottom: 4px; background: var(--small); color: var(--small-ink); }
.steps li.large { background: var(--large); color: var(--large-ink); }
.steps code { font: 14px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.steps .who { font-size: 12px; font-weight: 600; overflow-wrap: anywhere; }
.steps s, .steps em { display: block; font-size: 12px; opacity: .8; font-style: normal; text-decoration: none; }
.chance { font-size: 12px; white-space: nowrap; text-align: right; }
.chance .meter { width: 44px; background: color-mix(in srgb, currentColor 18%, transparent); margin-right: 6px; }
.chance .meter i { background: currentColor; }
.rubric li { display: flex; gap: 10px; align-items: baseline; font-size: 14px; padding: 5px 0;
  border-bottom: 1px solid var(--rule); }
.rubric li > span:first-child { flex: 1; overflow-wrap: anywhere; }
.rubric .soft { white-space: nowrap; font-size: 13px; }
details { margin-top: 10px; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow: auto; max-height: 460px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px; }
a { color: inherit; }
@media (max-width: 640px) {
  main { padding: 20px 14px 44px; }
  .card { padding: 12px 12px; }
  h2 { margin-top: 40px; }
  .split { grid-template-columns: 1fr; gap: 14px; }
  .steps li { grid-template-columns: 46px minmax(0, 1fr) 84px; padding: 5px 8px; gap: 4px 8px; }
  .wide .tick, .wide .mark, .wide .axis { font-size: 17px; }
  td > .meter { display: none; }
}
@media print { .scroll { overflow: visible; } .card { break-inside: avoid; } }
"""


def make_style() -> str:
    """The whole style sheet."""
    light = _variables(_LIGHT) + "".join(_colour(name, pair[0]) for name, pair in COLOURS.items())
    dark = _variables(_DARK) + "".join(_colour(name, pair[1]) for name, pair in COLOURS.items())
    return f":root {{ color-scheme: light dark; }}\n{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{_RULES}"


def _variables(values: dict[str, str]) -> str:
    return ":root {" + "".join(f"--{name}: {value};" for name, value in values.items()) + "}\n"


def _colour(name: str, value: str) -> str:
    return f".m-{name} {{ --c: {value}; }}\n"
