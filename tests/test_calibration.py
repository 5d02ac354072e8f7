"""A calibration as a file and as a table: what may be asked of it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_ray.config import RouterConfig
from roro_ray.errors import CalibrationError, ConfigError
from roro_ray.evaluation.calibration import (
    Calibration,
    Interval,
    OperatingPoint,
    Target,
    check_calibration,
    digest_router,
    find_point,
    load_calibration,
    save_calibration,
)
from roro_ray.routing.router import make_router
from roro_ray.routing.router_files import save_router

pytestmark = pytest.mark.timeout(60)


def make_point(weight: float, share: float, accuracy: float, flops: float, large: float = 1.0) -> OperatingPoint:
    values = (share, accuracy, large - accuracy, flops)
    return OperatingPoint(weight, *(Interval(value, value - 0.01, value + 0.01) for value in values))


def make_calibration(*points: OperatingPoint) -> Calibration:
    points = points or (
        make_point(0.01, 1.0, 1.0, 1.07),
        make_point(0.1, 0.5, 1.0, 1.02),
        make_point(0.3, 0.3, 0.97, 0.86),
        make_point(1.0, 0.28, 0.98, 0.85),
        make_point(5.0, 0.0, 0.4, 0.13),
    )
    ends = Interval(1.0, 1.0, 1.0), Interval(0.4, 0.3, 0.5)
    return Calibration(("mark-small", "mark-large"), ("small", "large"), 30, 250, 0.95, points, *ends)


@pytest.mark.parametrize(
    ("target", "weight"),
    [
        (Target(large_share=1.0), 0.1),  # as accurate as 0.01, and cheaper
        (Target(large_share=0.5), 0.1),
        (Target(large_share=0.49), 1.0),  # more accurate than 0.3, which has a larger share
        (Target(large_share=0.28), 1.0),
        (Target(large_share=0.279), 5.0),
        (Target(large_share=0.0), 5.0),
        (Target(accuracy_within=0.0), 0.1),
        (Target(accuracy_within=0.02), 1.0),
        (Target(accuracy_within=0.03), 1.0),
        (Target(accuracy_within=0.59), 1.0),
        (Target(accuracy_within=0.6), 5.0),
        (Target(accuracy_within=1.0), 5.0),
    ],
)
def test_a_target_chooses_its_point(target: Target, weight: float) -> None:
    assert find_point(make_calibration(), target).cost_weight == weight


def test_a_target_that_cannot_be_met_is_told_what_can() -> None:
    calibration = make_calibration(make_point(0.1, 0.8, 0.95, 1.0), make_point(1.0, 0.25, 0.6, 0.5))
    with pytest.raises(CalibrationError, match=r"at most 0\.1: the least that this router was measured at is 0\.25"):
        find_point(calibration, Target(large_share=0.1))
    with pytest.raises(CalibrationError, match=r"within 0\.01 .* the nearest that this router comes is 0\.05 below"):
        find_point(calibration, Target(accuracy_within=0.01))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 1.2)), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_asking_for_less_never_costs_accuracy_and_never_more(rows, one, other) -> None:
    """Whatever the noise of a measurement: a larger share is never less accurate, more room never dearer."""
    points = tuple(make_point(0.1 * (i + 1), *row) for i, row in enumerate(rows))
    calibration = make_calibration(*points)
    tight, loose = sorted((one, other))

    def find(**target: float) -> OperatingPoint | None:
        try:
            return find_point(calibration, Target(**target))
        except CalibrationError:
            return None

    few, many = find(large_share=tight), find(large_share=loose)
    assert few is None or (many is not None and many.accuracy.value >= few.accuracy.value)
    near, far = find(accuracy_within=tight), find(accuracy_within=loose)
    assert near is None or (far is not None and far.flops_ratio.value <= near.flops_ratio.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "names nothing"),
        ({"large_share": 0.5, "accuracy_within": 0.1}, "names large_share and accuracy_within"),
        ({"large_share": 1.01}, "large_share is 1.01"),
        ({"large_share": -0.1}, "expected a number from 0 to 1"),
        ({"accuracy_within": float("nan")}, "accuracy_within is nan"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Target(**values)


def test_a_calibration_holds_for_its_own_pool_and_router_alone() -> None:
    calibration = make_calibration()
    check_calibration(calibration, ["mark-small", "mark-large"], 30)
    with pytest.raises(CalibrationError, match=r"large \(mark-large\), and the pool has mark-small, mark-other"):
        check_calibration(calibration, ["mark-small", "mark-other"], 30)
    with pytest.raises(CalibrationError, match="router version 30, and the router in use is version 31"):
        check_calibration(calibration, ["mark-small", "mark-large"], 31)


def test_saving_and_loading(tmp_path: Path) -> None:
    assert load_calibration(tmp_path) is None
    save_calibration(tmp_path, make_calibration())
    assert load_calibration(tmp_path) == make_calibration()
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, expected 1"),
        ({"points": []}, "no points"),
        ({"models": ["small"]}, "more or fewer models"),
        ({"router_version": "x"}, "ValueError"),
        ({"large_accuracy": {"value": 1.0}}, "KeyError: 'low'"),
        ({"large_accuracy": {"value": 1.0, "low": 1.0, "high": 0.5}}, "no interval"),
        ({"small_accuracy": {"value": None, "low": 0.0, "high": 0.5}}, "TypeError"),
        ({"small_accuracy": {"value": float("nan"), "low": 0.0, "high": 0.5}}, "no interval"),
    ],
)
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, change: dict, message: str) -> None:
    file = save_calibration(tmp_path, make_calibration())
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CalibrationError, match=message) as caught:
        load_calibration(tmp_path)
    assert f"jobs.calibrate --router {tmp_path}" in str(caught.value)


def test_a_cut_file_and_points_out_of_order_are_refused(tmp_path: Path) -> None:
    file = save_calibration(tmp_path, make_calibration())
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    with pytest.raises(CalibrationError, match="damaged"):
        load_calibration(tmp_path)
    save_calibration(tmp_path, make_calibration(make_point(1.0, 0.2, 0.9, 0.5), make_point(0.1, 0.8, 0.9, 0.8)))
    with pytest.raises(CalibrationError, match="do not rise"):
        load_calibration(tmp_path)
    save_calibration(tmp_path, make_calibration(make_point(1.0, 1.2, 0.9, 0.5)))
    with pytest.raises(CalibrationError, match="outside 0 to 1"):
        load_calibration(tmp_path)


def test_weights_trained_since_make_a_calibration_void(tmp_path: Path) -> None:
    save_router(make_router(RouterConfig(encoder=""), 2), tmp_path, 30)
    save_calibration(tmp_path, replace(make_calibration(), router_digest=digest_router(tmp_path)))
    assert load_calibration(tmp_path) is not None
    save_router(make_router(RouterConfig(encoder="", prior=0.4), 2), tmp_path, 30)
    with pytest.raises(CalibrationError, match="trained again since"):
        load_calibration(tmp_path)
