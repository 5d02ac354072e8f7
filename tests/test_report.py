"""The report: one file that stands alone, says what the figures say, and lets nothing from a run into its markup."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser

import pytest

from roro_ray.errors import DataError
from roro_ray.evaluation.charts import Chart, make_ticks
from roro_ray.evaluation.evaluate import Inputs, evaluate
from roro_ray.evaluation.learning_curve import Snapshot
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.evaluation.report import make_report, save_report
from roro_ray.evaluation.summary import load_summary, make_summary, save_summary
from roro_ray.evaluation.sweeps import QuerySets
from tests.test_evaluation import make_config, make_pool, make_queries, router_dir  # noqa: F401

pytestmark = pytest.mark.timeout(60)

JUDGE = {
    "pair_accuracy": {"warm": 0.61, "trained": 0.7531, "shuffled_rubrics": 0.49},
    "by_kind": {"trained": {"outcome": 0.8, "cost": 0.7, "process": None}},
    "by_round": [{"round": -1, "mean": 0.61, "outcome": 0.6}, {"round": 0, "mean": 0.75, "outcome": 0.8}],
    "pairs": {"outcome": 30, "cost": 41},
}
EXAMPLE = {
    "suite": "mixed",
    "query": "a <b>bold</b> query",
    "gold": "42",
    "answer": "41",
    "correct": False,
    "large_share": 0.5,
    "oracle_share": 0.25,
    "setting": "cost weight 0.2",
    "steps": [
        {"model": "small", "large": False, "text": "1 < 2", "probability": 0.03, "small_text": "1 < 2"},
        {"model": "large", "large": True, "text": "A & B", "probability": 0.97, "small_text": "other"},
    ],
    "rubric": [{"text": "B: <times> 04 written by the large model", "weight": 5.0, "yes": 0.9}],
    "score": 0.61,
}


class Page(HTMLParser):
    """Checks that tags close in order, and collects texts and attributes."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close the element that is open"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def saved(router_dir, tmp_path_factory):  # noqa: F811
    """A saved evaluation with everything that a report can show."""
    config = make_config()
    queries = QuerySets(make_queries("validation", 1), make_queries("test", 2))
    snapshots = {"roro": [Snapshot(0, router_dir), Snapshot(128, router_dir)]}
    with LocalHost(config, make_pool()) as host:
        evaluation = evaluate(Inputs(config, queries, {"roro": router_dir}, snapshots), host)
    settings = {"evaluate": {"accuracy_slack": 0.01}, "run_dir": "runs/<x>"}
    summary = make_summary(evaluation, settings, {"torch": "2.13"}, JUDGE, resamples=50)
    directory = tmp_path_factory.mktemp("evaluation")
    save_summary(summary, evaluation.examples, directory)
    return directory


@pytest.fixture
def summary(saved):
    """The saved summary, to be changed at will."""
    return load_summary(saved)[0]


def test_report_and_plot_are_written(saved, tmp_path):
    report, plot = tmp_path / "sub" / "report.html", tmp_path / "sub" / "frontier.png"
    save_report(saved, report, plot)
    first = report.read_bytes()
    assert first.startswith(b"<!doctype html>")
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    save_report(saved, report, plot)
    assert report.read_bytes() == first, "the same summary gives the same report"
    assert sorted(path.name for path in report.parent.iterdir()) == ["frontier.png", "report.html"]


def test_report_without_a_summary_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"jobs\.evaluate"):
        save_report(tmp_path, tmp_path / "report.html", tmp_path / "frontier.png")


def test_page_is_well_formed_and_stands_alone(summary):
    html = make_report(summary, [EXAMPLE])
    page = Page(html)
    assert not page.open
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "link", "iframe", "img"}
    for _, name, value in page.attributes:
        assert name not in ("src", "href"), f"the report must refer to nothing outside: {value}"
        assert not name.startswith("on")
    assert "http://" not in html and "https://" not in html and "url(" not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_page_says_what_the_figures_say(summary):
    text = Page(make_report(summary, [EXAMPLE])).text
    assert summary["headline"]["lead"] in text
    for method in summary["suites"]["overall"]:
        assert summary["methods"][method]["title"] in text
    entry = summary["suites"]["overall"]["confidence"]
    assert f"{100 * entry['cost_share']:.1f}" in text and f"{entry['frontier_area']:.3f}" in text
    assert "75.3%" in text and "Another query's rubric" in text and "41 pairs" in text
    assert "query_level was left out" in text
    assert "answers 41, not 42: wrong" in text and "the oracle needs 25%" in text
    assert "Judge's score +0.61" in text and "small alone: other" in text
    assert "small alone: 1 < 2" not in text, "what the small model writes alike is not worth saying"


def test_hostile_texts_stay_texts(summary):
    evil = "<script>alert('x')</script>"
    summary["suites"]["overall"]["glimpse"].update(failed=2, error=evil)
    summary["headline"]["lead"] = evil
    summary["methods"]["random"]["title"] = evil
    summary["suites"]['"><i>'] = copy.deepcopy(summary["suites"]["mixed"])
    summary["config"]["run_dir"] = "</pre><script>"
    example = copy.deepcopy(EXAMPLE)
    example["steps"][0]["text"] = example["query"] = example["setting"] = evil
    example["rubric"][0]["text"] = evil
    html = make_report(summary, [example])
    page = Page(html)
    assert not page.open
    assert "<script" not in html and "<b>bold" not in html
    assert evil in page.text


def test_failures_are_counted(summary):
    assert "could not be scored; first error" not in make_report(summary, [])
    summary["suites"]["overall"]["glimpse"].update(failed=3, unscorable=1, error="EngineError: gone")
    text = Page(make_report(summary, [])).text
    assert "GlimpRouter: 3 failed, 1 could not be scored; first error: EngineError: gone" in text


def test_page_without_figures_still_opens():
    config = make_config()
    config.faults.max_failed_share, config.faults.pause_s = 1.0, 0.0
    queries = QuerySets(make_queries("validation", 1), make_queries("test", 1))
    with LocalHost(config, make_pool(fails=lambda prefix: True)) as host:
        evaluation = evaluate(Inputs(config, queries, {}), host)
    empty = make_summary(evaluation, {}, {}, resamples=20)
    page = Page(make_report(empty, []))
    assert not page.open
    assert "RoRo was not evaluated in this run." in page.text
    assert not re.search(r"\bnan\b|\binf\b|None", page.text)


def test_plot_of_nothing_is_still_a_plot(saved, tmp_path):
    summary, _ = load_summary(saved)
    for suite in summary["suites"].values():
        for entry in suite.values():
            entry.update(frontier=[], accuracy=None, cost_share=None)
    save_summary(summary, [], tmp_path)
    save_report(tmp_path, tmp_path / "report.html", tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


# --- charts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.37, 1.02, [0.4, 0.6, 0.8, 1.0]),
        (0.0, 3840.0, [0, 1000, 2000, 3000]),
        (0.5, 0.5, [0.5]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert make_ticks(low, high) == pytest.approx(expected)


def test_ticks_can_be_whole_rounds():
    assert make_ticks(0.0, 2.0, 3) == [0.0, 1.0, 2.0]
    assert make_ticks(0.0, 1.0, 2) == [0.0, 1.0]


def test_points_are_placed_on_the_axes():
    chart = Chart("t", "x", "y", (0.0, 2.0), (0.5, 1.0), width=400, height=300)
    left, bottom = chart.place((0.0, 0.5))
    right, top = chart.place((2.0, 1.0))
    assert 0 < left < right < 400 and 0 < top < bottom < 300
    assert chart.place((1.0, 0.75)) == (pytest.approx((left + right) / 2), pytest.approx((top + bottom) / 2))
    chart.add_line([(0.0, 0.5), (2.0, 1.0)], "m-roro")
    assert f'points="{left},{bottom} {right},{top}"' in chart.render()
