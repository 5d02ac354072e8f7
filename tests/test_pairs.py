"""Preference pairs: kinds, folds, caps, and process quality from interventions."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from simulated import SimulatedRunner, make_trajectory

from roro_ray.config import Config, PairsConfig
from roro_ray.data.store import load_pairs, save_trajectories
from roro_ray.errors import ConfigError, DataError
from roro_ray.reward.pairing import PairFacts, pair_shards
from roro_ray.reward.pairs import fold_of, group_by_query, make_pairs, process_candidates
from roro_ray.reward.process import measure_process
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.types import PairKind, Query, Trajectory
from roro_ray.world.tasks import SUITES, draw_programs, make_queries

pytestmark = pytest.mark.timeout(60)

QUERY = Query("q", "chain", "train", "Start with 36. A: double; B: times 04; C: subtract 38.", "50")
TEXTS = ("A: dbl 36 = 72", "B: 72 * 04 = 88", "C: 88 - 38 = 50", "Answer: 50")


def trajectory(models: tuple[int, ...], name: str, correct: bool | None = True) -> Trajectory:
    return replace(make_trajectory(QUERY, models, TEXTS, name), correct=correct)


def test_kinds_by_hand() -> None:
    cheap, dear = trajectory((0, 1, 0, 0), "cheap"), trajectory((1, 1, 1, 0), "dear")
    wrong, worse = trajectory((0, 0, 1, 0), "wrong", False), trajectory((1, 0, 0, 0), "worse", False)
    unscored = trajectory((1, 1, 1, 1), "unscored", None)
    quality = {"q/wrong": 0.5, "q/worse": 0.0, "q/cheap": 1.0}
    pairs = make_pairs([QUERY], [cheap, dear, wrong, worse, unscored], PairsConfig(), quality)
    assert {(p.kind.value, p.preferred[2:], p.rejected[2:], p.margin) for p in pairs} == {
        ("cost", "cheap", "dear", 0.5),
        ("outcome", "cheap", "wrong", 1.0),
        ("outcome", "cheap", "worse", 1.0),
        ("outcome", "dear", "wrong", 1.0),
        ("outcome", "dear", "worse", 1.0),
        ("process", "wrong", "worse", 0.5),
    }
    assert {(p.query_id, p.suite, p.fold) for p in pairs} == {("q", "chain", fold_of("q", 4))}


def test_margins_decide_and_quality_is_needed_for_process_pairs() -> None:
    first, second = trajectory((0, 0, 1, 0), "a", False), trajectory((1, 0, 0, 0), "b", False)
    assert make_pairs([QUERY], [first, second], PairsConfig()) == []
    assert make_pairs([QUERY], [first, second], PairsConfig(), {"q/a": 0.5}) == []
    close = {"q/a": 0.05, "q/b": 0.0}
    assert make_pairs([QUERY], [first, second], PairsConfig(), close) == []
    assert len(make_pairs([QUERY], [first, second], PairsConfig(process_margin=0.04), close)) == 1
    cheap, dear = trajectory((0, 0, 0, 0), "c"), trajectory((1, 0, 0, 0), "d")
    assert make_pairs([QUERY], [cheap, dear], PairsConfig(cost_margin=0.3)) == []
    assert len(make_pairs([QUERY], [cheap, dear], PairsConfig(cost_margin=0.25))) == 1


def test_the_same_writers_are_never_paired() -> None:
    same = [trajectory((0, 1, 0, 0), "a", True), trajectory((0, 1, 0, 0), "b", False)]
    assert make_pairs([QUERY], same, PairsConfig()) == []


def test_a_pair_is_of_one_query_and_the_order_of_trajectories_does_not_matter() -> None:
    runner = SimulatedRunner(("chain", "word"), 15)
    trajectories = runner.collect()
    quality = {t.id: p.quality for t, p in _measure(runner, trajectories)}
    config = PairsConfig(max_per_query=5)
    pairs = make_pairs(runner.queries, trajectories, config, quality)
    backwards = make_pairs(runner.queries, trajectories[::-1], config, quality)
    by_id = {t.id: t for t in trajectories}

    def texts(pairs: list) -> set:
        return {(p.kind, by_id[p.preferred].steps, by_id[p.rejected].steps) for p in pairs}

    assert all(by_id[p.preferred].query_id == by_id[p.rejected].query_id == p.query_id for p in pairs)
    assert {kind for kind, _, _ in texts(pairs)} == set(PairKind)
    counts = Counter((p.query_id, p.kind) for p in pairs)
    assert max(counts.values()) <= 5
    assert counts == Counter((p.query_id, p.kind) for p in backwards)
    for pair in pairs:
        better, worse = by_id[pair.preferred], by_id[pair.rejected]
        if pair.kind == PairKind.OUTCOME:
            assert better.correct and not worse.correct
        elif pair.kind == PairKind.COST:
            assert better.correct and worse.correct and better.large_share < worse.large_share
        else:
            assert better.correct == worse.correct and quality[better.id] > quality[worse.id]


def _measure(runner: SimulatedRunner, trajectories: Sequence[Trajectory]) -> list:
    candidates = process_candidates(trajectories, PairsConfig())
    result = measure_process(runner.queries, candidates, runner.run, PairsConfig())
    return [(t, result[t.id]) for t in candidates]


def test_folds_are_by_query_stable_and_even() -> None:
    ids = [query.id for suite in SUITES for query in make_queries(suite, "train", 100)]
    folds = Counter(fold_of(identity, 4) for identity in ids)
    assert sorted(folds) == [0, 1, 2, 3]
    assert min(folds.values()) > 90
    assert fold_of("chain/train/0/00000", 4) == fold_of("chain/train/0/00000", 4) == 1
    with pytest.raises(ConfigError, match=r"pairs\.folds is 1"):
        make_pairs([QUERY], [], PairsConfig(folds=1))


def test_unscored_and_empty_trajectories_are_left_out() -> None:
    empty = replace(trajectory((0, 0, 0, 0), "e"), steps=())
    assert group_by_query([empty, trajectory((0, 0, 0, 0), "u", None)]) == {}


class Scripted:
    """`run` for one query whose answer depends on the writers by a given rule; a `set` step forgets."""

    def __init__(self, right: set[tuple[int, ...]], fail: bool = False) -> None:
        self.right, self.fail, self.asked = right, fail, 0

    def run(self, specs: Sequence[EpisodeSpec]) -> list[Trajectory | EpisodeFailure]:
        self.asked += len(specs)
        return [EpisodeFailure(s.id, "boom") if self.fail else self._one(s) for s in specs]

    def _one(self, spec: EpisodeSpec) -> Trajectory:
        models = [int(m) for m in spec.strategy.partition(":")[2].split(",")]
        models = (models + [models[-1]] * 4)[:4]
        assert tuple(step.model for step in spec.prefix) == tuple(models[: len(spec.prefix)])
        return self.make(tuple(models), spec.id)

    def make(self, models: tuple[int, ...], name: str) -> Trajectory:
        key = tuple(models)
        good = key in self.right
        answer = "50" if good else "".join(map(str, key[:2])) + "9"
        texts = [f"{label}: {key[: i + 1]}" for i, label in enumerate("ABC")] + [f"Answer: {answer}"]
        return replace(make_trajectory(QUERY, key, texts, name), correct=good)


def test_process_quality_by_hand() -> None:
    # right exactly where B is written by the large model; A, C and the answer step do not matter
    world = Scripted({m for m in itertools.product((0, 1), repeat=4) if m[1] == 1})
    good, wasteful, missed = (world.make(m, str(m)) for m in ((0, 1, 0, 0), (1, 1, 1, 0), (0, 0, 0, 0)))
    quality = measure_process([QUERY], [good, wasteful, missed], world.run, PairsConfig())
    assert quality[good.id].steps == ("idle", "needed", "idle", "idle")
    assert quality[good.id].quality == 1.0
    assert quality[wasteful.id].steps == ("waste", "needed", "waste", "idle")
    assert quality[wasteful.id].quality == pytest.approx(1 - 2 / 4)
    # after the miss at B everything is dead, and nothing later changes the answer
    assert quality[missed.id].steps == ("idle", "miss", "idle", "idle")
    assert quality[missed.id].quality == pytest.approx(1 - 2 / 4)


def test_a_dead_prefix_is_judged_by_whether_the_answer_changes() -> None:
    world = Scripted(set())  # always wrong; the wrong answer depends on A and B only
    late = world.make((0, 0, 1, 1), "late")
    early = world.make((1, 1, 0, 0), "early")
    quality = measure_process([QUERY], [late, early], world.run, PairsConfig())
    assert quality[late.id].steps == ("miss", "miss", "waste", "waste")
    assert quality[early.id].steps == ("needed", "needed", "idle", "idle")


def test_agreement_compares_the_two_steps_at_the_prefix() -> None:
    world = Scripted({(0, 0, 0, 0)})
    quality = measure_process(
        [QUERY], [world.make((0, 1, 0, 1), "t")], world.run, PairsConfig(process_source="agreement")
    )
    assert quality["t".join(["q/", ""])].steps[:3] == ("miss", "needed", "miss")


def test_each_different_intervention_is_asked_once_and_failures_are_values() -> None:
    world = Scripted(set())
    same = [world.make((0, 1, 0, 0), name) for name in "ab"]
    measure_process([QUERY], same, world.run, PairsConfig())
    assert world.asked == 8
    failing = Scripted(set(), fail=True)
    assert measure_process([QUERY], same, failing.run, PairsConfig()) == {}


def test_sampling_continues_several_times() -> None:
    world = Scripted(set())
    config = PairsConfig(continuations=3)
    measure_process([QUERY], [world.make((0, 1, 0, 0), "a")], world.run, config, temperature=0.7)
    assert world.asked == 24


def test_interventions_agree_with_the_true_need_of_each_step() -> None:
    """The simulated writers are exact, so that a needed step is one whose small result breaks the answer."""
    runner = SimulatedRunner(("chain",), 20)
    programs = dict(zip([q.id for q in runner.queries], draw_programs("chain", "train", 7), strict=False))
    for item, quality in _measure(runner, runner.collect()):
        if not item.correct:
            continue
        for kind, operation in zip(quality.steps, programs[item.query_id].operations, strict=False):
            assert kind in ("idle", "waste") or operation.is_hard
            assert kind != "miss"  # a right trajectory missed nothing


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'interventions'"):
        measure_process([QUERY], [], lambda specs: [], PairsConfig(process_source="intervention"))


def test_confidence_stands_in_for_interventions_without_a_rollout() -> None:
    def shaped(models: tuple[int, ...], confidences: tuple[float, ...], name: str) -> Trajectory:
        made = trajectory(models, name)
        steps = [replace(step, confidence=c) for step, c in zip(made.steps, confidences, strict=True)]
        return replace(made, steps=tuple(steps))

    def refuse(specs: Sequence[EpisodeSpec]) -> list[Trajectory | EpisodeFailure]:
        raise AssertionError("a rollout was asked for")

    first = shaped((0, 0, 1, 0), (0.9, 0.2, 0.5, 0.95), "a")  # unsure where it was small, unsure where large
    second = shaped((0, 1, 0, 0), (0.9, 0.4, 0.8, 0.95), "b")
    third = shaped((1, 0, 0, 0), (0.99, 0.7, 0.8, 0.95), "c")  # large where it was surest
    mute = shaped((0, 0, 0, 0), (0.9, 0.9, 0.0, 0.9), "d")  # an endpoint that tells no log-probabilities
    config = PairsConfig(process_source="confidence")
    quality = measure_process([QUERY], [first, second, third, mute], refuse, config)
    assert quality.keys() == {"q/a", "q/b", "q/c"}
    assert quality["q/a"].steps == ("idle", "miss", "waste", "idle")
    assert quality["q/b"].steps == ("idle", "needed", "idle", "idle") and quality["q/b"].quality == 1.0
    assert quality["q/c"].steps == ("waste", "miss", "idle", "idle")
    assert quality["q/a"].quality == quality["q/c"].quality == 1 - 3 / 4


def test_shards_are_paired_one_by_one_and_an_interrupted_stage_goes_on(tmp_path: Path) -> None:
    config = Config(pairs=PairsConfig(process_source="confidence"))
    queries = [replace(QUERY, id=f"q{n}") for n in range(3)]
    for number, query in enumerate(queries):
        group = [
            replace(make_trajectory(query, models, TEXTS, name), correct=correct)
            for models, name, correct in (((0, 1, 0, 0), "x", True), ((1, 1, 1, 0), "y", True), ((0,) * 4, "z", False))
        ]
        save_trajectories(tmp_path / "trajectories" / f"s{number}.parquet", group)
    ran: list[int] = []

    def pair(stop_at: int = 99) -> PairFacts:
        def progress(done: int, total: int) -> None:
            assert total == 3
            ran.append(done)
            if done == stop_at:
                raise KeyboardInterrupt

        return pair_shards(config, tmp_path / "trajectories", tmp_path / "pairs", queries, lambda specs: [], progress)

    with pytest.raises(KeyboardInterrupt):
        pair(stop_at=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pairs").glob("*.parquet")}
    assert len(before) == 2
    facts = pair()
    assert facts.kinds == {"cost": 3, "outcome": 6} and facts.pairs == len(load_pairs(tmp_path / "pairs")) == 9
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    with pytest.raises(DataError, match=r"jobs\.collect"):
        pair_shards(config, tmp_path / "none", tmp_path / "pairs2", queries, lambda specs: [])
