"""What a cost weight gives: the measured table that lets a server promise a share or an accuracy.

A router's cost weight is a number without a unit. A calibration says what each of a grid of weights gave on
held-out queries (`evaluation.calibrate` measures it), so that "at most 30% of the steps by the large model" or
"within 1 point of its accuracy" can be turned into a weight. It lies beside the router that it was made of, and
holds for that router and that pool alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roro_ray.data.run_dir import write_json
from roro_ray.errors import CalibrationError

_FILE = "calibration.json"
_WEIGHTS_FILE = "router.safetensors"  # as `routing.router_files`, which needs torch, names it
_SCHEMA_VERSION = 1
_FIGURES = ("large_share", "accuracy", "accuracy_gap", "flops_ratio")
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value and its bootstrap interval over queries."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """What one cost weight gave.

    `large_share` is the share of steps by the dearest model (mean over queries), `accuracy_gap` the large
    model's accuracy minus this one's on the same queries, `flops_ratio` the FLOPs over those of the large model
    alone (the router's own included).
    """

    cost_weight: float
    large_share: Interval
    accuracy: Interval
    accuracy_gap: Interval
    flops_ratio: Interval


@dataclass(frozen=True, slots=True)
class Calibration:
    """Operating points by rising cost weight, and what they were measured with.

    `pool` are the fingerprints of the models, `models` their names, both cheap to dear. `router_digest` is that of the
    router's weights and `settings_digest` of all that shaped the measurement; either may be empty (not recorded).
    """

    pool: tuple[str, ...]
    models: tuple[str, ...]
    router_version: int
    queries: int
    confidence: float
    points: tuple[OperatingPoint, ...]
    large_accuracy: Interval
    small_accuracy: Interval
    router_digest: str = ""
    settings_digest: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """What a client asks for, in place of a cost weight; exactly one of the two.

    Args:
        large_share: most of the steps that the large model may write, 0 to 1.
        accuracy_within: most that the accuracy may lie below the large model's, 0 to 1.

    Raises:
        CalibrationError: none or both given, or a value out of range.
    """

    large_share: float | None = None
    accuracy_within: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(given) != 1:
            raise CalibrationError(
                f"a target names {' and '.join(given) or 'nothing'}: expected exactly one of large_share and "
                "accuracy_within"
            )
        for name, value in given.items():
            if not 0 <= value <= 1:
                raise CalibrationError(f"target {name} is {value}: expected a number from 0 to 1")


def find_point(calibration: Calibration, target: Target) -> OperatingPoint:
    """The operating point that meets a target best, by the measured values.

    For a large share: the most accurate point whose share is at most the target's (of equals the cheapest). For
    an accuracy: the cheapest point whose gap to the large model is at most the target's.

    Raises:
        CalibrationError: no point meets it; the message says which values can be had.
    """
    points = calibration.points
    if target.large_share is not None:
        meeting = [at for at in points if at.large_share.value <= target.large_share + _ROUNDING]
        if not meeting:
            least = min(at.large_share.value for at in points)
            raise CalibrationError(
                f"no cost weight was measured with a large share of at most {target.large_share:g}: the least that "
                f"this router was measured at is {least:.4g}. Ask for at least that"
            )
        return min(meeting, key=lambda at: (-at.accuracy.value, at.flops_ratio.value))
    assert target.accuracy_within is not None, "a target has one of the two"
    meeting = [at for at in points if at.accuracy_gap.value <= target.accuracy_within + _ROUNDING]
    if not meeting:
        least = min(at.accuracy_gap.value for at in points)
        raise CalibrationError(
            f"no cost weight was measured within {target.accuracy_within:g} of the large model's accuracy: the "
            f"nearest that this router comes is {least:.4g} below. Ask for at least that"
        )
    return min(meeting, key=lambda at: (at.flops_ratio.value, -at.accuracy.value))


def check_calibration(calibration: Calibration, fingerprints: Sequence[str], version: int) -> None:
    """Refuse a calibration that was measured with other models or another router.

    Raises:
        CalibrationError: says which of the two differs.
    """
    again = "Calibrate again: `python -m jobs.calibrate`"
    if calibration.pool != tuple(fingerprints):
        raise CalibrationError(
            f"the calibration was measured with the models {_name_pool(calibration.models, calibration.pool)}, and "
            f"the pool has {_name_pool([], fingerprints)}: its figures do not hold for these. {again}"
        )
    if calibration.router_version != version:
        raise CalibrationError(
            f"the calibration was measured with router version {calibration.router_version}, and the router in use "
            f"is version {version}: its figures do not hold for that one. {again}"
        )


def _name_pool(names: Sequence[str], fingerprints: Sequence[str]) -> str:
    shown = [fingerprint[:12] for fingerprint in fingerprints]
    return ", ".join(f"{name} ({mark})" for name, mark in zip(names, shown, strict=True)) if names else ", ".join(shown)


def digest_router(directory: str | Path) -> str:
    """SHA-256 of a saved router's weights; empty where there are none."""
    weights = Path(directory) / _WEIGHTS_FILE
    if not weights.is_file():
        return ""
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_calibration(directory: str | Path, calibration: Calibration) -> Path:
    """Write `calibration.json` beside a saved router, whole or not at all."""
    path = Path(directory) / _FILE
    write_json(path, {"schema": _SCHEMA_VERSION, **dataclasses.asdict(calibration)})
    return path


def load_calibration(directory: str | Path) -> Calibration | None:
    """The calibration beside a saved router, or None where it has none.

    Raises:
        CalibrationError: the file is damaged, of another schema, or older than the router's present weights.
    """
    path = Path(directory) / _FILE
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}). {_mend(path)}") from error
    try:
        content = json.loads(text)
        if content["schema"] != _SCHEMA_VERSION:
            raise ValueError(f"schema {content['schema']}, expected {_SCHEMA_VERSION}")
        calibration = _make_calibration(content)
        _check_values(calibration)
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path} is damaged ({type(error).__name__}: {error}). {_mend(path)}") from error
    if calibration.router_digest and calibration.router_digest != digest_router(directory):
        raise CalibrationError(
            f"{path} was measured with other weights than those in {_WEIGHTS_FILE} beside it: the router was trained "
            f"again since. {_mend(path)}"
        )
    return calibration


def _mend(path: Path) -> str:
    return f"Delete it and calibrate again: `python -m jobs.calibrate --router {path.parent}`"


def _make_calibration(content: Mapping[str, Any]) -> Calibration:
    return Calibration(
        pool=tuple(map(str, content["pool"])),
        models=tuple(map(str, content["models"])),
        router_version=int(content["router_version"]),
        queries=int(content["queries"]),
        confidence=float(content["confidence"]),
        points=tuple(
            OperatingPoint(float(at["cost_weight"]), *(_make_interval(at[figure]) for figure in _FIGURES))
            for at in content["points"]
        ),
        large_accuracy=_make_interval(content["large_accuracy"]),
        small_accuracy=_make_interval(content["small_accuracy"]),
        router_digest=str(content["router_digest"]),
        settings_digest=str(content["settings_digest"]),
    )


def _make_interval(content: Mapping[str, Any]) -> Interval:
    return Interval(float(content["value"]), float(content["low"]), float(content["high"]))


def _check_values(calibration: Calibration) -> None:
    """What a server relies on.

    Raises:
        ValueError: no points, weights that do not rise, or values that are no figures.
    """
    weights = [at.cost_weight for at in calibration.points]
    if not weights:
        raise ValueError("it has no points")
    if weights[0] < 0 or any(later <= earlier for earlier, later in itertools.pairwise(weights)):
        raise ValueError("its cost weights do not rise")
    if len(calibration.models) != len(calibration.pool):
        raise ValueError("it names more or fewer models than it has fingerprints")
    figures = [getattr(at, figure) for at in calibration.points for figure in _FIGURES]
    for each in (*figures, calibration.large_accuracy, calibration.small_accuracy):
        if not all(map(math.isfinite, (each.value, each.low, each.high))) or each.low > each.high:
            raise ValueError(f"{each} is no interval")
    if any(not 0 <= at.large_share.value <= 1 for at in calibration.points):
        raise ValueError("a large share lies outside 0 to 1")
