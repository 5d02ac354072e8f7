"""The whole evaluation on engines that follow a rule, so that every figure is known beforehand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from roro_ray.config import Config, EvaluateConfig, RouterConfig
from roro_ray.errors import ConfigError, DataError, RolloutError
from roro_ray.evaluation.evaluate import Inputs, collect_alone, evaluate
from roro_ray.evaluation.examples import choose_examples
from roro_ray.evaluation.headline import make_context, make_headline
from roro_ray.evaluation.learning_curve import Snapshot
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.evaluation.methods import METHODS, make_specs, random_settings, threshold_settings
from roro_ray.evaluation.metrics import Sweep, measure_frontier
from roro_ray.evaluation.oracle import OracleResult
from roro_ray.evaluation.query_level import fit_logistic, train_predictor
from roro_ray.evaluation.summary import load_summary, make_summary, save_summary
from roro_ray.evaluation.sweeps import Anchors, QuerySets, oracle_sweep, query_level_sweep, single_sweep
from roro_ray.routing.router import make_router
from roro_ray.routing.router_files import save_router
from roro_ray.types import Decision, Query, Step, Trajectory, Usage
from tests.fakes import ScriptedEngine, make_fake_pool
from tests.test_metrics import make_row
from tests.test_oracle import write_as

pytestmark = pytest.mark.timeout(60)

# Suite `mixed`: half of the queries need one or two large steps. Suite `easy`: none does.
PLANS = {"mixed": ["aba", "bb", "aa", "aaa"], "easy": ["a", "aa", "aaa", "aaaa"]}


def make_queries(split, copies):
    return tuple(
        Query(f"{suite}/{split}/{copy}/{i}", suite, split, plan, "42")
        for copy in range(copies)
        for suite, plans in PLANS.items()
        for i, plan in enumerate(plans)
    )


def is_hard(prefix: str) -> bool:
    plan, *steps = prefix.strip().split("\n\n")
    return len(steps) < len(plan) and plan[len(steps)] == "b"


def make_pool(**small):
    """A small model that knows where it fails: unsure, and doubted by the large one, at every step b."""
    return make_fake_pool(
        ScriptedEngine("small", write_as(0), confidence=lambda p: 0.3 if is_hard(p) else 0.9, **small),
        ScriptedEngine("large", write_as(1), parameters=100, approval=lambda p, _: 0.2 if is_hard(p) else 0.95),
    )


def make_config():
    config = Config(evaluate=EvaluateConfig(bootstrap=100, thresholds=5, cost_weights=[0.1, 0.5]))
    config.evaluate.random_shares = [0.2, 0.6]
    config.evaluate.curve_cost_weights = [0.1]
    return config


@pytest.fixture(scope="module")
def router_dir(tmp_path_factory):
    """A router of scalar signals alone whose greedy decision is always the large model."""
    router = make_router(RouterConfig(encoder="", hidden=8, prior=0.9), 2)
    return save_router(router, tmp_path_factory.mktemp("router"))


@pytest.fixture(scope="module")
def outcome(router_dir):
    """A whole evaluation and its summary."""
    config = make_config()
    queries = QuerySets(make_queries("validation", 2), make_queries("test", 2))
    alone = [(query, "b" not in query.text) for query in make_queries("train", 8)]
    inputs = Inputs(
        config, queries, {"roro": router_dir}, {"roro": [Snapshot(64, router_dir), Snapshot(0, router_dir)]}, alone
    )
    stages = []
    with LocalHost(config, make_pool()) as host:
        evaluation = evaluate(inputs, host, lambda label, done, total: stages.append((label, done, total)))
    summary = make_summary(
        evaluation, {"evaluate": {"accuracy_slack": 0.01}}, {"torch": torch.__version__}, resamples=100
    )
    return evaluation, summary, stages


def test_models_alone_and_oracle_are_as_planned(outcome):
    _, summary, _ = outcome
    mixed, easy, overall = (summary["suites"][name] for name in ("mixed", "easy", "overall"))
    assert (mixed["small"]["accuracy"], easy["small"]["accuracy"], overall["small"]["accuracy"]) == (0.5, 1.0, 0.75)
    assert [overall["large"][name] for name in ("accuracy", "cost_share", "n")] == [1.0, 1.0, 16]
    # The oracle pays 1 of 4 steps for `aba`, 2 of 3 for `bb` and nothing for the rest.
    assert mixed["oracle"]["accuracy"] == 1.0
    assert mixed["oracle"]["cost_share"] == pytest.approx((1 / 4 + 2 / 3) / 4)
    # Its frontier: .5 at 0, .75 at 1/16, 1 at (1/4 + 2/3)/4, level from there on.
    a, b = 1 / 16, (1 / 4 + 2 / 3) / 4
    assert mixed["oracle"]["frontier_area"] == pytest.approx(a * 0.625 + (b - a) * 0.875 + (1 - b))


def test_a_rule_with_a_perfect_signal_equals_the_oracle(outcome):
    _, summary, _ = outcome
    for method in ("confidence", "draft_verify"):
        entry, oracle = summary["suites"]["mixed"][method], summary["suites"]["mixed"]["oracle"]
        assert (entry["accuracy"], entry["cost_share"]) == (1.0, pytest.approx(oracle["cost_share"]))
        # It pays for its drafts, and the verifier for reading them; the oracle pays for neither.
        assert entry["flops"] > oracle["flops"]
    assert summary["suites"]["mixed"]["draft_verify"]["flops"] > summary["suites"]["mixed"]["confidence"]["flops"]


def test_query_level_sends_whole_queries(outcome):
    _, summary, _ = outcome
    entry = summary["suites"]["overall"]["query_level"]
    assert (entry["accuracy"], entry["cost_share"]) == (1.0, 0.25)  # `aba` and `bb`, wholly


def test_summary_has_the_promised_shape(outcome):
    evaluation, summary, stages = outcome
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert {"suites", "judge", "learning_curves", "config", "versions"} <= set(summary)
    assert list(summary["suites"]) == ["mixed", "easy", "overall"]
    figures = {"accuracy", "cost_share", "flops", "flops_decode", "apgr", "frontier_area"}
    trained = {method for method, info in METHODS.items() if info.peek == "router"}
    expected = [method for method in METHODS if method not in trained - {"roro"}]
    for suite in summary["suites"].values():
        assert list(suite) == expected
        for entry in suite.values():
            assert figures | {"ci", "n", "setting", "failed", "unscorable"} <= set(entry)
            for name in figures:
                assert entry[name] is None or isinstance(entry[name], float)
                if entry["ci"][name] is not None:
                    low, high = entry["ci"][name]
                    assert low <= high
            low, high = entry["ci"]["accuracy"]
            assert 0 <= low <= entry["accuracy"] <= high <= 1
    assert summary["suites"]["overall"]["roro"]["vs_large"]["accuracy"] == 0.0
    assert summary["headline"]["reached"] is True
    assert summary["skipped"] == {}
    assert stages[-1][1] == stages[-1][2] == len(evaluation.seconds)


def test_suite_without_a_gap_has_null_shares_of_it(outcome):
    _, summary, _ = outcome
    easy = summary["suites"]["easy"]["confidence"]
    assert easy["apgr"] is None and easy["cpt95"] is None and easy["ci"]["apgr"] is None
    assert easy["frontier_area"] == 1.0


def test_learning_curve_is_sorted_by_episodes(outcome):
    _, summary, _ = outcome
    curve = summary["learning_curves"]["roro"]
    assert [at["episodes"] for at in curve] == [0, 64]
    assert all(at["accuracy"] == 1.0 and at["cost_share"] == 1.0 for at in curve)


def test_frontier_marks_corners_and_one_operating_point(outcome):
    _, summary, _ = outcome
    for method in ("random", "confidence", "roro", "oracle"):
        frontier = summary["suites"]["overall"][method]["frontier"]
        assert sum(at["operating"] for at in frontier) == 1
        assert all(0 <= at["cost_share"] <= 1 for at in frontier)


def test_saved_summary_reads_back(outcome, tmp_path):
    evaluation, summary, _ = outcome
    save_summary(summary, evaluation.examples, tmp_path)
    loaded, examples = load_summary(tmp_path)
    assert loaded == summary
    assert isinstance(examples, list)
    (tmp_path / "summary.json").write_text('{"suites": ')
    with pytest.raises(DataError, match=r"summary\.json"):
        load_summary(tmp_path)


def test_same_seed_same_summary(outcome, router_dir):
    _, summary, _ = outcome
    config = make_config()
    queries = QuerySets(make_queries("validation", 2), make_queries("test", 2))
    with LocalHost(config, make_pool()) as host:
        again = evaluate(Inputs(config, queries, {"roro": router_dir}), host)
    fresh = make_summary(again, {}, {}, resamples=100)
    for method in ("random", "confidence", "roro", "oracle"):
        assert fresh["suites"]["overall"][method] == summary["suites"]["overall"][method]
    assert "query_level" in again.skipped and "fixed:0" in again.skipped["query_level"]


def test_failed_rollouts_are_dropped_counted_and_shown():
    config = make_config()
    config.faults.max_failed_share, config.faults.pause_s = 0.3, 0.0
    queries = QuerySets(make_queries("validation", 1), make_queries("test", 1))
    pool = make_pool(fails=lambda prefix: prefix.startswith("aaaa\n"))
    with LocalHost(config, pool) as host:
        evaluation = evaluate(Inputs(config, queries, {}), host)
    summary = make_summary(evaluation, {}, {}, resamples=50)
    small = summary["suites"]["overall"]["small"]
    assert (small["n"], small["failed"], small["unscorable"]) == (7, 2, 0)
    assert small["accuracy"] == pytest.approx(5 / 7)
    assert "told to fail" in small["error"]
    assert summary["suites"]["overall"]["large"]["failed"] == 0
    assert summary["suites"]["overall"]["oracle"]["n"] == 7
    assert summary["headline"]["reached"] is None
    tally = evaluation.tally
    assert tally.failed > 2 and tally.failed_tries == 2 * tally.retried == 2 * tally.failed
    assert (evaluation.searches, evaluation.oracle_errors) == (8, 1)


def test_too_many_failed_rollouts_give_no_accuracy():
    config = make_config()
    config.faults.pause_s = 0.0
    queries = QuerySets(make_queries("validation", 1), make_queries("test", 1))
    pool = make_pool(fails=lambda prefix: prefix.startswith("aaaa\n"))
    with (
        LocalHost(config, pool) as host,
        pytest.raises(RolloutError, match=r"evaluate: 2 of 32 .* tried 2 times each; expected at most a share of 0.05"),
    ):
        evaluate(Inputs(config, queries, {}), host)


def test_every_rollout_failing_gives_nulls_and_no_crash():
    config = make_config()
    config.faults.max_failed_share, config.faults.pause_s = 1.0, 0.0
    queries = QuerySets(make_queries("validation", 1), make_queries("test", 1))
    with LocalHost(config, make_pool(fails=lambda prefix: True)) as host:
        evaluation = evaluate(Inputs(config, queries, {}), host)
    summary = make_summary(evaluation, {}, {}, resamples=50)
    overall = summary["suites"]["overall"]
    assert overall["small"]["accuracy"] is None and overall["small"]["n"] == 0
    assert overall["confidence"]["frontier_area"] is None and overall["oracle"]["accuracy"] is None
    assert overall["large"]["accuracy"] == 1.0


def test_inputs_are_checked():
    config = make_config()
    queries = make_queries("test", 1)
    with LocalHost(config, make_pool()) as host:
        with pytest.raises(ConfigError, match="no validation queries"):
            evaluate(Inputs(config, QuerySets((), queries), {}), host)
        with pytest.raises(ConfigError, match="unknown router method 'rorro'"):
            evaluate(Inputs(config, QuerySets(queries, queries), {"rorro": None}), host)


# --- parts ------------------------------------------------------------------------------------------------


def test_specs_of_all_methods_share_the_seed_of_a_query():
    queries = make_queries("test", 1)[:2]
    specs = make_specs("random", random_settings(EvaluateConfig(random_shares=[0.1, 0.3])), queries, seed=5)
    assert [spec.strategy for spec in specs] == ["random:0.1", "random:0.1", "random:0.3", "random:0.3"]
    assert {spec.seed for spec in specs} == {5}
    assert len({spec.id for spec in specs}) == 4


def signal_trajectory(signals):
    steps = tuple(Step(0, "x", 1, 1, 1, "delimiter", Decision(0, 0.0, (1.0, 0.0), signal=s), Usage()) for s in signals)
    return Trajectory("t", "q", "s", "x", 0, 0.0, steps, "1", True, "answer", Usage())


def test_thresholds_are_quantiles_of_the_signal_seen():
    settings = threshold_settings("confidence", [signal_trajectory([0.0, 0.5]), signal_trajectory([1.0, None])], 1)
    assert [setting.strategy for setting in settings] == ["confidence:0.5"]
    assert len(threshold_settings("confidence", [], 3)) == 3


def test_oracle_fills_the_cheapest_queries_first():
    small = make_row([1, 0, 0, 0], share=0.0)

    def found(models, correct):
        steps = tuple(Step(m, "x", 1, 1, 1, "stop", Decision(m, 0.0, (1.0 - m, float(m))), Usage()) for m in models)
        return Trajectory("t", "q", "s", "x", 0, 0.0, steps, "1", correct, "answer", Usage())

    outcomes = [found([0, 0], True), found([1, 1], True), found([1, 0], True), found([0, 0], False)]
    results = [OracleResult("q", solved, 0, ()) for solved in (True, True, True, False)]
    sweep = oracle_sweep(outcomes, results, small)
    points = [(s.of("cost_share").mean(), s.of("accuracy").mean()) for s in sweep.test]
    assert points == [(0.0, 0.25), (0.125, 0.5), (0.375, 0.75)]
    area = measure_frontier(sweep, small, make_row([1, 1, 1, 0], share=1.0), np.ones((1, 4)))["frontier_area"][0]
    assert area == pytest.approx(0.125 * 0.375 + 0.25 * 0.625 + 0.625 * 0.75)


def test_query_level_sweep_by_hand():
    small, large = make_row([1, 0, 1, 0], 0.0, flops=1.0), make_row([1, 1, 1, 1], 1.0, flops=10.0)
    anchors = Anchors(single_sweep("small", small, 2), single_sweep("large", large, 2), 0.0)
    sweep = query_level_sweep(np.array([0.1, 0.9, 0.2, 0.8]), np.array([0.5] * 4), anchors, 1)
    # One threshold, the median .5 of validation: the second query of each set goes to the large model.
    assert sweep.operating.of("accuracy").tolist() == [1, 1]
    assert sweep.operating.of("cost_share").tolist() == [0, 1]
    assert sweep.operating.of("flops").tolist() == [1.5, 10.5]


def test_logistic_regression_is_at_its_optimum():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    y = (rng.random(200) < 1 / (1 + np.exp(-(x @ [2.0, -1.0, 0.0] + 0.5)))).astype(float)
    weights, bias = fit_logistic(x, y, ridge=1.0)
    p = 1 / (1 + np.exp(-(x @ weights + bias)))
    assert x.T @ (p - y) + weights == pytest.approx(np.zeros(3), abs=1e-6)
    assert np.sum(p - y) == pytest.approx(-1e-3 * bias, abs=1e-6)
    assert weights == pytest.approx([2.0, -1.0, 0.0], abs=0.5)


def test_predictor_ranks_held_out_queries():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 20))
    failed = x[:, 0] + 0.3 * rng.normal(size=400) > 0
    scores = train_predictor(x[:300], failed[:300].tolist()).predict(x[300:])
    assert scores[failed[300:]].mean() > scores[~failed[300:]].mean() + 0.4


def test_predictor_of_one_class_and_of_nothing():
    states = np.random.default_rng(2).normal(size=(10, 4))
    predictor = train_predictor(states, [True] * 10)
    assert np.all(predictor.predict(states) > 0.9)
    with pytest.raises(DataError, match="0 queries and 0 outcomes"):
        train_predictor(np.zeros((0, 4)), [])


def test_collect_alone_takes_the_small_model_alone():
    queries = make_queries("train", 1)[:2]
    steps = signal_trajectory([0.1]).steps

    def rolled(query, strategy, correct):
        return Trajectory("t", query, "s", strategy, 0, 0.0, steps, "1", correct, "answer", Usage())

    a, b = queries[0].id, queries[1].id
    kept = collect_alone(queries, [rolled(a, "fixed:0", True), rolled(b, "fixed:1", True), rolled(b, "fixed:0", None)])
    assert kept == [(queries[0], True)]


def test_examples_are_chosen_by_the_rule():
    queries = [Query(str(i), suite, "test", "t", "1") for i, suite in enumerate(["a", "a", "b", "b", "b"])]
    sweeps = {
        name: Sweep(name, (make_row(right, share=np.array(share)),), (), 0, {})
        for name, right, share in (
            ("small", [1, 0, 0, 0, 0], [0.0] * 5),
            ("large", [1, 1, 1, 1, 1], [1.0] * 5),
            ("roro", [1, 1, 1, 1, 0], [0.2, 0.3, 1.0, 0.4, 0.1]),
        )
    }
    # 0 needs no router, 2 was written by the large model alone, 4 is a failure worth showing.
    assert choose_examples(sweeps, queries) == [1, 3, 4]


def overall_entry(change, interval, flops_saved, share=0.3):
    ci = {"accuracy": interval, "flops_saved": [flops_saved - 0.02, flops_saved + 0.02]}
    return {
        "roro": {
            "accuracy": 0.95,
            "cost_share": share,
            "ci": {"cost_share": [share - 0.05, share + 0.05]},
            "vs_large": {"accuracy": change, "flops_saved": flops_saved, "ci": ci},
        }
    }


def test_headline_says_what_happened():
    good = make_headline(overall_entry(0.0, [-0.005, 0.01], 0.4), 0.01)
    assert good["reached"] is True
    assert "keeps the large model's accuracy" in good["text"] and "saves 70% (65 to 75) of its steps" in good["text"]
    assert "40% (38 to 42) of its FLOPs" in good["text"] and "not excluded" not in good["text"]
    unsure = make_headline(overall_entry(-0.004, [-0.03, 0.01], 0.4), 0.01)
    assert unsure["reached"] is True and "not excluded" in unsure["text"]
    bad = make_headline(overall_entry(-0.05, [-0.08, -0.02], 0.4), 0.01)
    assert bad["reached"] is False and "does not reach" in bad["text"] and "-5.0 points (-8.0 to -2.0)" in bad["text"]
    dear = make_headline(overall_entry(0.0, [0.0, 0.0], -0.2), 0.01)
    assert "20% (18 to 22) more FLOPs" in dear["text"]
    assert make_headline({}, 0.01)["reached"] is None


def test_context_names_the_cheapest_methods_that_reach_the_large_model():
    overall = {
        "large": {"flops": 100.0},
        "confidence": {"cost_share": 0.5, "flops": 60.0, "vs_large": {"accuracy": -0.005}},
        "draft_verify": {"cost_share": 0.2, "flops": 120.0, "vs_large": {"accuracy": 0.0}},
        "random": {"cost_share": 0.1, "flops": 30.0, "vs_large": {"accuracy": -0.2}},
        "oracle": {"cost_share": 0.01, "flops": 10.0, "vs_large": {"accuracy": 0.0}},
    }
    text = make_context(overall, 0.01)
    assert "Draft and verify (RSD-like) uses the fewest large steps (20%)" in text
    assert "Confidence (STEER-like) the fewest FLOPs (60% of the large model's)" in text
    del overall["confidence"], overall["draft_verify"]
    assert make_context(overall, 0.01) == "No method is within 1 point of the large model's accuracy on test."
    versus = {"accuracy": 0.004, "cost_share": -0.08, "ci": {"accuracy": [-0.01, 0.02], "cost_share": [-0.1, -0.06]}}
    overall["roro"] = {"cost_share": 0.3, "flops": 50.0, "vs_large": {"accuracy": 0.0}, "vs_grpo_outcome": versus}
    assert "differs by +0.4 points (-1.0 to +2.0) and its large share by -8.0 points (-10.0 to -6.0)" in make_context(
        overall, 0.01
    )
