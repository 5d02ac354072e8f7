"""Measuring a calibration: its figures by hand, interruptions, and which queries it asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from jobs._table import format_calibration
from roro_ray.config import Config, RouterConfig
from roro_ray.engines.protocol import EngineFacts
from roro_ray.errors import ConfigError, EngineError
from roro_ray.evaluation.calibrate import calibrate, calibration_queries, find_current, forget_partial
from roro_ray.evaluation.calibration import Interval, check_calibration, save_calibration
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.evaluation.methods import Outcome
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.routing.router import make_router
from roro_ray.routing.router_files import save_router
from roro_ray.settings import load_config
from roro_ray.types import Decision, Step, Trajectory, Usage
from roro_ray.world.tasks import make_queries
from tests.fakes import ScriptedEngine, make_fake_pool

pytestmark = pytest.mark.timeout(60)
FACTS = tuple(EngineFacts(name, "path", "cpu", 10, 20.0, 0.1, f"mark-{name}") for name in ("small", "large"))


class PlannedHost:
    """Rolls out four steps of 10 FLOPs by the small and 100 by the large model, as a rule of the weight says.

    At weights below 1 the large model writes every step and is right; at 1 it writes the first one, which is enough
    for every second query; above 1 the small model is alone, and right on every fourth. Deciding costs 6 FLOPs.
    """

    def __init__(self, fails: str = "") -> None:
        self.asked: list[str] = []
        self.fails = fails

    def use_router(self, directory: Path) -> None:
        assert (directory / "router.json").is_file()

    def find_oracle(self, queries: object) -> list:
        raise AssertionError("a calibration needs no oracle")

    def run(self, specs: Sequence[EpisodeSpec]) -> list[Outcome]:
        self.asked.append(f"{specs[0].strategy} {specs[0].cost_weight:g}")
        return [self._run_one(spec) for spec in specs]

    def _run_one(self, spec: EpisodeSpec) -> Outcome:
        if self.fails and spec.strategy == self.fails:
            return EpisodeFailure(spec.id, "the engine broke")
        number = int(spec.query.id.rpartition("/")[2])
        weight = {"fixed:1": 0.0, "fixed:0": 9.0}.get(spec.strategy, spec.cost_weight)
        models = (1, 1, 1, 1) if weight < 1 else (1, 0, 0, 0) if weight == 1 else (0, 0, 0, 0)
        correct = weight < 1 or number % (2 if weight == 1 else 4) == 0
        steps = tuple(
            Step(model, "x", 5, 0.9, 0.9, "delimiter", Decision(model, 0.0, (0.5, 0.5)), Usage()) for model in models
        )
        flops = sum(100.0 if model else 10.0 for model in models) + 6.0 * (spec.strategy == "router_priced")
        usage = Usage(flops=flops, flops_decode=flops)
        return Trajectory(
            spec.id, spec.query.id, spec.query.suite, spec.strategy, 0, weight, steps, "1", correct, "answer", usage
        )


def make_config(*overrides: str) -> Config:
    return load_config(
        [
            "data.suites=[chain,list]",
            "data.validation_queries=4",
            "calibrate.queries=20",
            "calibrate.bootstrap=200",
            "calibrate.cost_weights=[1.0,0.1,10]",
            *overrides,
        ]
    )


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router of scalar signals alone."""
    return save_router(make_router(RouterConfig(encoder=""), 2), tmp_path_factory.mktemp("router"), 30)


def test_the_figures_by_hand(router: Path) -> None:
    host = PlannedHost()
    calibration = calibrate(make_config(), router, FACTS, host)
    forget_partial(router)
    assert host.asked == ["fixed:0 0", "fixed:1 0", "router_priced 0.1", "router_priced 1", "router_priced 10"]
    assert (calibration.pool, calibration.models) == (("mark-small", "mark-large"), ("small", "large"))
    assert (calibration.router_version, calibration.queries, calibration.confidence) == (30, 40, 0.95)
    assert [at.cost_weight for at in calibration.points] == [0.1, 1.0, 10.0]
    assert [at.large_share.value for at in calibration.points] == [1.0, 0.25, 0.0]
    assert [at.accuracy.value for at in calibration.points] == [1.0, 0.5, 0.25]
    assert [at.accuracy_gap.value for at in calibration.points] == [0.0, 0.5, 0.75]
    assert [at.flops_ratio.value for at in calibration.points] == pytest.approx([406 / 400, 136 / 400, 46 / 400])
    assert (calibration.large_accuracy.value, calibration.small_accuracy.value) == (1.0, 0.25)
    # The large model is always right, so the gap is as uncertain as the accuracy; shares and FLOPs never differ.
    middle = calibration.points[1]
    assert middle.large_share == Interval(0.25, 0.25, 0.25)
    assert middle.accuracy.low < 0.5 < middle.accuracy.high
    assert middle.accuracy_gap.low == pytest.approx(1 - middle.accuracy.high)
    # 40 queries of probability 1/2: a standard error of 0.079, in suites of 20 each.
    assert middle.accuracy.high - middle.accuracy.low == pytest.approx(2 * 1.96 * 0.079, rel=0.25)
    narrow = calibrate(make_config("calibrate.confidence=0.5"), router, FACTS, PlannedHost()).points[1].accuracy
    forget_partial(router)
    assert middle.accuracy.low < narrow.low < narrow.high < middle.accuracy.high


def test_a_table_names_every_point(router: Path) -> None:
    calibration = calibrate(make_config(), router, FACTS, PlannedHost())
    forget_partial(router)
    lines = format_calibration(calibration, router / "calibration.json").splitlines()
    row = next(line for line in lines if line.startswith("1  "))
    assert row.split()[1] == "0.25" and "50.0%" in row and "0.34 [0.34, 0.34]" in row
    assert any(line.startswith("Alone: small 25.0%") and "large 100.0%" in line for line in lines)


def test_what_is_done_is_not_done_again_and_what_was_interrupted_goes_on(tmp_path: Path, router: Path) -> None:
    straight = calibrate(make_config(), router, FACTS, PlannedHost())
    forget_partial(router)
    config, done = make_config(), []
    with pytest.raises(KeyboardInterrupt):
        calibrate(config, router, FACTS, PlannedHost(), lambda count: stop_after(3, count))
    host = PlannedHost()
    resumed = calibrate(config, router, FACTS, host, done.append)
    assert host.asked == ["router_priced 1", "router_priced 10"] and done == [3, 4, 5]
    assert resumed == straight
    assert find_current(config, router, FACTS) is None
    save_calibration(router, resumed)
    forget_partial(router)
    assert find_current(config, router, FACTS) == resumed
    for change in (
        "calibrate.bootstrap=100",
        "data.validation_queries=5",
        "episode.max_steps=9",
        "calibrate.queries=3",
    ):
        assert find_current(make_config(change), router, FACTS) is None, change
    assert find_current(make_config("ray.workers=1", "episode.timeout_s=9"), router, FACTS) == resumed
    assert find_current(config, router, (FACTS[0], replace(FACTS[1], fingerprint="other"))) is None
    (router / "calibration.json").write_text("{")
    assert find_current(config, router, FACTS) is None, "a damaged one is made again"
    (router / "calibration.json").unlink()


def stop_after(limit: int, count: int) -> None:
    if count == limit:
        raise KeyboardInterrupt


def test_partial_rollouts_of_other_settings_or_damaged_ones_are_not_used(router: Path) -> None:
    partial = router / "calibration.partial.json"
    with pytest.raises(KeyboardInterrupt):
        calibrate(make_config(), router, FACTS, PlannedHost(), lambda count: stop_after(2, count))
    assert partial.is_file()
    host = PlannedHost()
    calibrate(make_config("calibrate.queries=8"), router, FACTS, host)
    assert len(host.asked) == 5
    partial.write_text(partial.read_text()[:-40])
    host = PlannedHost()
    calibrate(make_config("calibrate.queries=8"), router, FACTS, host)
    assert len(host.asked) == 5
    forget_partial(router)
    assert not partial.exists()


def test_rollouts_that_fail_stop_the_calibration_with_their_reason(router: Path) -> None:
    with pytest.raises(EngineError, match=r"large: 40 of 40 rollouts failed .* the engine broke"):
        calibrate(make_config(), router, FACTS, PlannedHost(fails="fixed:1"))
    forget_partial(router)


def test_the_queries_are_neither_those_of_settings_nor_of_training_nor_of_the_test() -> None:
    config = make_config()
    held_out = {query.text for query in calibration_queries(config)}
    assert len(held_out) == 40 and {query.suite for query in calibration_queries(config)} == {"chain", "list"}
    for split, count in (("validation", 4), ("train", 400), ("test", 400)):
        for suite in config.data.suites:
            assert not held_out & {query.text for query in make_queries(suite, split, count, config.data.seed)}, split


def test_the_ends_of_the_grid_are_both_models_alone(tmp_path: Path) -> None:
    """Real episodes, of a router that leans a little to the small model and of engines whose tokens are known."""
    router = save_router(make_router(RouterConfig(encoder="", hidden=8, prior=0.4), 2), tmp_path / "router", 3)
    config = make_config("calibrate.cost_weights=[0,0.01,0.2,0.3,10]", "calibrate.queries=3")
    engines = ScriptedEngine("small"), ScriptedEngine("large", parameters=100)
    with LocalHost(config, make_fake_pool(*engines)) as host:
        facts = host.pool.facts
        calibration = calibrate(config, router, facts, host)
    shares = [at.large_share.value for at in calibration.points]
    assert shares[:2] == [1.0, 1.0] and shares[-1] == 0.0 and shares == sorted(shares, reverse=True)
    assert calibration.points[0].flops_ratio == Interval(1.0, 1.0, 1.0)
    assert calibration.points[-1].flops_ratio.value == pytest.approx(0.1)
    check_calibration(calibration, [engine.fingerprint for engine in facts], 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibrate.cost_weights=[]", "is empty"),
        ("calibrate.cost_weights=[0.1,-1]", "got -1.0, expected finite numbers of at least 0"),
        ("calibrate.cost_weights=[.inf]", "got inf"),
        ("calibrate.cost_weights=[0.1,0.1]", "twice"),
        ("calibrate.confidence=1", "between 0 and 1"),
        ("calibrate.queries=0", "at least 1"),
    ],
)
def test_wrong_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([override])
