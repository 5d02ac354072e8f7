"""Frontier arithmetic against values worked out by hand, the bootstrap against scipy and exact enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from roro_ray.errors import ConfigError
from roro_ray.evaluation.bootstrap import interval, make_resamples, point, weighted_means
from roro_ray.evaluation.frontier import accuracy_at_cost, curve_area, first_cost_at, hull_area, hull_corners
from roro_ray.evaluation.metrics import (
    COST_AXES,
    QUANTITIES,
    Scores,
    Sweep,
    choose_corners,
    make_scores,
    measure_difference,
    measure_frontier,
    measure_setting,
)
from roro_ray.evaluation.operating_point import choose_setting, choose_thresholds
from roro_ray.routing.episode import EpisodeFailure
from roro_ray.types import Decision, Step, Trajectory, Usage

NAN = float("nan")


def make_row(accuracy, share=0.0, flops=1.0, large_tokens=None, setting="s"):
    """Scores with the given values per query; FLOPs and tokens may be one number for all."""
    accuracy = np.asarray(accuracy, dtype=float)
    values_KQ = np.zeros((len(QUANTITIES), len(accuracy)))
    values = {"accuracy": accuracy, "cost_share": share, "flops": flops, "flops_decode": flops, "steps": 4.0}
    values["large_tokens"] = np.asarray(share) * 100.0 if large_tokens is None else large_tokens
    for name, value in values.items():
        values_KQ[QUANTITIES.index(name)] = value
    values_KQ[:, ~np.isfinite(accuracy)] = NAN
    return Scores(setting, values_KQ)


def make_trajectory(models, correct=True, flops=100.0):
    """A trajectory of two-model decisions whose steps have 10 tokens each."""
    steps = tuple(
        Step(m, "x", 10, 0.9, 0.8, "delimiter", Decision(m, 0.0, (1.0 - m, float(m))), Usage(5, 10)) for m in models
    )
    return Trajectory("t", "q", "chain", "s", 0, 0.0, steps, "1", correct, "answer", Usage(20, 40, flops, flops / 2))


# --- frontier ---------------------------------------------------------------------------------------------


def test_hull_corners_by_hand():
    # (0.5, 0.6) lies under the line from (0.2, 0.8) to (1, 1); (0.2, 0.7) under the better point of equal cost.
    costs = [0.0, 0.2, 0.2, 0.5, 1.0]
    accuracies = [0.4, 0.7, 0.8, 0.6, 1.0]
    assert hull_corners(costs, accuracies) == [0, 2, 4]


def test_hull_corners_leave_out_points_on_a_line_and_points_without_a_value():
    assert hull_corners([0.0, 0.5, 1.0], [0.0, 0.5, 1.0]) == [0, 2]
    assert hull_corners([0.0, NAN, 0.4, 1.0], [0.0, 1.0, NAN, 1.0]) == [0, 3]
    assert hull_corners([], []) == []


def test_hull_is_above_every_point():
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs, accuracies = rng.random(12), rng.random(12)
        corners = hull_corners(costs, accuracies)
        xs, ys = costs[corners], accuracies[corners]
        inside = (costs >= xs[0]) & (costs <= xs[-1])
        assert np.all(np.interp(costs[inside], xs, ys) >= accuracies[inside] - 1e-12)
        assert np.all(np.diff(np.diff(ys) / np.diff(xs)) < 0)


def test_area_by_hand():
    # (0,.4) -> (.2,.8): .12; -> (1,1): .72
    area = curve_area(np.array([[1.0, 0.0, 0.2]]), np.array([[1.0, 0.4, 0.8]]))
    assert area[0] == pytest.approx(0.84)
    # Level beyond the ends: .5 up to .25, then a line to .75 at .75, then level.
    area = curve_area(np.array([[0.25, 0.75]]), np.array([[0.5, 0.75]]))
    assert area[0] == pytest.approx(0.25 * 0.5 + 0.5 * 0.625 + 0.25 * 0.75)


def test_area_does_not_hide_a_point_below_the_line():
    # A chosen setting that disappoints on test pulls the frontier down: no envelope is taken.
    good = curve_area(np.array([[0.0, 1.0]]), np.array([[0.4, 1.0]]))
    bent = curve_area(np.array([[0.0, 0.5, 1.0]]), np.array([[0.4, 0.5, 1.0]]))
    assert bent[0] == pytest.approx(0.5 * 0.45 + 0.5 * 0.75)
    assert bent[0] < good[0]
    assert hull_area([(0.0, 0.4), (0.5, 0.5), (1.0, 1.0)]) == pytest.approx(good[0])


def test_first_cost_at_by_hand():
    cost = np.array([[0.0, 0.2, 1.0]] * 5)
    accuracy = np.array([[0.4, 0.8, 1.0]] * 5)
    found = first_cost_at(cost, accuracy, np.array([0.3, 0.6, 0.8, 0.9, 1.1]))
    assert found[:4] == pytest.approx([0.0, 0.1, 0.2, 0.6])
    assert math.isnan(found[4])


def test_first_cost_at_takes_the_first_crossing_of_a_bent_line():
    found = first_cost_at(np.array([[0.0, 0.4, 0.6, 1.0]]), np.array([[0.0, 0.8, 0.4, 1.0]]), np.array([0.6]))
    assert found[0] == pytest.approx(0.3)


def test_accuracy_at_cost_by_hand():
    cost = np.array([[1.0, 3.0, 5.0]] * 5)
    accuracy = np.array([[0.2, 0.6, 1.0]] * 5)
    found = accuracy_at_cost(cost, accuracy, np.array([0.5, 1.0, 2.0, 4.5, 9.0]))
    assert math.isnan(found[0])  # not even the cheapest point can be paid
    assert found[1:] == pytest.approx([0.2, 0.4, 0.9, 1.0])


def test_curves_agree_with_numpy_interp():
    rng = np.random.default_rng(1)
    cost = np.sort(rng.random((40, 6)), axis=1)
    accuracy = rng.random((40, 6))
    budget = cost[:, 0] + 0.7 * (cost[:, -1] - cost[:, 0])
    expected = [np.interp(b, c, a) for b, c, a in zip(budget, cost, accuracy, strict=True)]
    shuffle = rng.permutation(6)
    assert accuracy_at_cost(cost[:, shuffle], accuracy[:, shuffle], budget) == pytest.approx(expected)
    grid = np.linspace(0, 1, 20001)
    fine = [np.interp(grid, c, a).mean() for c, a in zip(cost, accuracy, strict=True)]
    assert curve_area(cost[:, shuffle], accuracy[:, shuffle]) == pytest.approx(fine, abs=1e-3)


# --- bootstrap --------------------------------------------------------------------------------------------


def test_resamples_keep_the_size_of_every_suite():
    strata = ["a"] * 7 + ["b"] * 3
    weights = make_resamples(strata, 200, seed=3)
    assert weights.shape == (201, 10)
    assert np.all(weights[0] == 1)
    assert np.all(weights[:, :7].sum(1) == 7) and np.all(weights[:, 7:].sum(1) == 3)
    assert np.array_equal(weights, make_resamples(strata, 200, seed=3))
    assert not np.array_equal(weights, make_resamples(strata, 200, seed=4))
    with pytest.raises(ConfigError, match="bootstrap is -1"):
        make_resamples(strata, -1, 0)


def test_bootstrap_agrees_with_exact_enumeration():
    values = np.array([0.0, 1.0, 1.0])
    exact = [np.mean(draw) for draw in itertools.product(values, repeat=3)]
    means = weighted_means(values, make_resamples(["a"] * 3, 40_000, seed=0))[1:]
    for level in sorted(set(exact)):
        assert np.mean(means == level) == pytest.approx(np.mean(np.isclose(exact, level)), abs=0.01)


def test_interval_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(5).random(80)
    ours = interval(weighted_means(values, make_resamples(["a"] * 80, 20_000, seed=1)))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    assert ours == pytest.approx([theirs.low, theirs.high], abs=0.003)


def test_dropped_queries_count_nowhere():
    weights = np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    means = weighted_means(np.array([0.0, NAN, 1.0]), weights)
    assert means[:2] == pytest.approx([0.5, 0.0])
    assert math.isnan(means[2])


def test_interval_without_enough_values_is_none():
    assert interval(np.array([0.5])) is None
    assert interval(np.array([0.5, NAN, NAN, 0.4])) is None
    assert interval(np.array([0.5, 0.1, 0.1, NAN])) == [pytest.approx(0.1), pytest.approx(0.1)]
    assert point(np.array([NAN, 1.0])) is None


# --- metrics ----------------------------------------------------------------------------------------------


def test_scores_of_trajectories_by_hand():
    wrong_steps = [make_trajectory([0, 1, 1, 0]), make_trajectory([0, 0], correct=False, flops=50.0)]
    scores = make_scores("s", [*wrong_steps, EpisodeFailure("x", "EngineError: gone"), make_trajectory([1], None)])
    assert scores.of("accuracy")[:2].tolist() == [1.0, 0.0]
    assert scores.of("cost_share")[:2].tolist() == [0.5, 0.0]
    assert scores.of("large_tokens")[:2].tolist() == [20.0, 0.0]
    assert scores.of("flops")[:2].tolist() == [100.0, 50.0]
    assert scores.of("flops_decode")[:2].tolist() == [50.0, 25.0]
    assert np.isnan(scores.of("accuracy")[2:]).all()
    assert (scores.failed, scores.unscorable, scores.error) == (1, 1, "EngineError: gone")
    assert (scores.take([0, 1]).failed, scores.take([2]).failed, scores.take([3]).unscorable) == (0, 1, 1)
    # An unscorable rollout has steps, and still enters no mean.
    figures = measure_setting(scores, scores, scores, np.ones((1, 4)))
    assert point(figures["steps"]) == pytest.approx(3.0)
    assert point(figures["accuracy"]) == pytest.approx(0.5)


def by_hand():
    """Ten queries: the small model alone .4, the large alone 1, one setting .8 at a share of .2."""
    small = make_row([1] * 4 + [0] * 6, share=0.0, flops=10.0)
    large = make_row([1] * 10, share=1.0, flops=100.0)
    setting = make_row([1] * 8 + [0] * 2, share=0.2, flops=40.0)
    corners = choose_corners([setting], small, large)
    return small, large, Sweep("m", (setting,), (setting,), 0, corners), np.ones((1, 10))


def test_frontier_figures_by_hand():
    small, large, sweep, weights = by_hand()
    assert sweep.corners == dict.fromkeys(COST_AXES, (0,))
    figures = {name: point(values) for name, values in measure_frontier(sweep, small, large, weights).items()}
    assert figures["frontier_area"] == pytest.approx(0.84)
    assert figures["apgr"] == pytest.approx((0.84 - 0.4) / 0.6)
    assert figures["cpt50"] == pytest.approx(0.15)  # .7 on the way from (0, .4) to (.2, .8)
    assert figures["cpt80"] == pytest.approx(0.2 + 0.8 * (0.88 - 0.8) / 0.2)
    assert figures["cpt95"] == pytest.approx(0.2 + 0.8 * (0.97 - 0.8) / 0.2)
    assert figures["cpt50_tokens"] == pytest.approx(0.15)  # tokens are proportional to steps here
    assert figures["accuracy_at_60_flops"] == pytest.approx(0.8 + 0.2 * 20 / 60)
    assert figures["flops_at_98_accuracy"] == pytest.approx(40 + 60 * (0.98 - 0.8) / 0.2)
    assert figures["flops_share_at_98_accuracy"] == pytest.approx(0.94)
    setting = measure_setting(sweep.operating, small, large, weights)
    assert point(setting["pgr"]) == pytest.approx((0.8 - 0.4) / 0.6)


def test_random_routing_on_the_diagonal_recovers_half_the_gap():
    small, large, _, weights = by_hand()
    diagonal = [make_row([0.4 + 0.6 * p] * 10, share=p, flops=10 + 90 * p) for p in (0.25, 0.5, 0.75)]
    sweep = Sweep("random", tuple(diagonal), (), 0, dict.fromkeys(COST_AXES, (0, 1, 2)))
    figures = measure_frontier(sweep, small, large, weights)
    assert point(figures["apgr"]) == pytest.approx(0.5)
    for level in (50, 80, 95):
        assert point(figures[f"cpt{level}"]) == pytest.approx(level / 100)


def test_without_a_gap_there_is_no_share_of_it():
    _, large, sweep, weights = by_hand()
    figures = measure_frontier(sweep, large, large, weights)
    assert [point(figures[name]) for name in ("apgr", "cpt50", "cpt95", "cpt80_tokens")] == [None] * 4
    assert point(measure_setting(sweep.operating, large, large, weights)["pgr"]) is None
    # A large model that is never right has no 98% of its accuracy.
    nothing = make_row([0] * 10, share=1.0)
    figures = measure_frontier(sweep, nothing, nothing, weights)
    assert point(figures["flops_at_98_accuracy"]) is None


def test_difference_is_paired():
    weights = make_resamples(["a"] * 50, 400, seed=0)
    accuracy = np.random.default_rng(0).integers(0, 2, 50).astype(float)
    worse, better = make_row(accuracy * 0.5, flops=25.0), make_row(accuracy * 0.5 + 0.1, flops=100.0)
    figures = measure_difference(better, worse, weights)
    # Each query gains exactly 0.1, so that the difference has no spread although each accuracy has.
    assert interval(figures["accuracy"]) == pytest.approx([0.1, 0.1])
    assert point(measure_difference(worse, better, weights)["flops_saved"]) == pytest.approx(0.75)


def test_difference_uses_only_queries_that_both_have():
    one, other = make_row([1, 0, NAN, 1]), make_row([0, NAN, 1, 1])
    assert point(measure_difference(one, other, np.ones((1, 4)))["accuracy"]) == pytest.approx(0.5)
    assert point(measure_difference(make_row([NAN]), make_row([1]), np.ones((1, 1)))["accuracy"]) is None


# --- operating point --------------------------------------------------------------------------------------


def test_operating_point_is_the_cheapest_within_the_slack():
    large = make_row([1] * 100, share=1.0)
    settings = [
        make_row([1] * 95 + [0] * 5, share=0.1),
        make_row([1] * 99 + [0], share=0.3),
        make_row([1] * 100, share=0.5),
    ]
    assert choose_setting(settings, large, slack=0.01) == 1
    assert choose_setting(settings, large, slack=0.0) == 2
    assert choose_setting(settings[:1], large, slack=0.01) == 0


def test_operating_point_without_a_good_setting_is_the_most_accurate():
    large = make_row([1] * 10, share=1.0)
    settings = [make_row([0] * 10, share=0.0), make_row([1] * 5 + [0] * 5, share=0.4)]
    settings.append(make_row([0] * 5 + [1] * 5, share=0.2))
    assert choose_setting(settings, large, 0.01) == 2
    assert choose_setting([make_row([NAN]), make_row([1])], make_row([1]), 0.01) == 1
    assert choose_setting([make_row([NAN])], make_row([1]), 0.01) == 0
    with pytest.raises(ConfigError, match="no setting"):
        choose_setting([], large, 0.01)


def test_thresholds_are_inner_quantiles():
    assert choose_thresholds(list(range(101)), 3) == pytest.approx([25, 50, 75])
    assert choose_thresholds([0.5, 0.5, NAN], 4) == [0.5]
    assert choose_thresholds([], 4) == [0.5]
    with pytest.raises(ConfigError, match="thresholds is 0"):
        choose_thresholds([1.0], 0)
