"""Learning the reward: pair weights, values of rubrics and lines, both phases, rounds, resume, warm start."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from simulated import SimulatedRunner, make_trajectory

from roro_ray.config import PairsConfig, RewardConfig
from roro_ray.errors import CheckpointError, ConfigError
from roro_ray.reward.alternate import alternate, copy_reward, measure, split_folds
from roro_ray.reward.credit import (
    FORMAT_FINE,
    MISSING_FINE,
    UNFAITHFUL_FINE,
    RubricValue,
    balance_pairs,
    gain_lines,
    make_credit_batch,
    read_verdicts,
    turn_round,
    value_rubrics,
)
from roro_ray.reward.generic import draw_random_criteria, find_steps, make_random_rubric, make_rubric_of
from roro_ray.reward.model import RewardModel, make_reward
from roro_ray.reward.pairs import make_pairs, process_candidates
from roro_ray.reward.phases import reward_verdicts, run_rubricor_phase
from roro_ray.reward.preference import (
    QueryPairs,
    check_kind_weights,
    draw_items,
    find_dearer,
    group_pairs,
    measure_accuracy,
    reward_scores,
    weigh_pairs,
)
from roro_ray.reward.process import measure_process
from roro_ray.reward.rubric import make_overall_criterion, make_step_criterion, read_rubric
from roro_ray.reward.warm_start import (
    WarmStartSpec,
    judge_mechanically,
    make_contrastive_criteria,
    measure_judge,
    train_judge,
    train_rubricor,
)
from roro_ray.types import PairKind, Query, Rubric, Verdict
from roro_ray.world.tasks import LABELS, draw_programs

pytestmark = pytest.mark.timeout(120)

QUERY = Query("q", "chain", "train", "Start with 36. A: double; B: times 04; C: subtract 38.", "50")
TEXTS = ("A: dbl 36 = 72", "B: 72 * 04 = 88", "C: 88 - 38 = 50", "Answer: 50")
WEIGHTS = {"outcome": 4.0, "cost": 1.0, "process": 1.0}


def make_items(count: int = 9, suites: tuple[str, ...] = ("chain", "word")) -> list[QueryPairs]:
    runner = SimulatedRunner(suites, count)
    trajectories = runner.collect()
    candidates = process_candidates(trajectories, PairsConfig())
    quality = measure_process(runner.queries, candidates, runner.run, PairsConfig())
    pairs = make_pairs(runner.queries, trajectories, PairsConfig(), {k: v.quality for k, v in quality.items()})
    return group_pairs(runner.queries, trajectories, pairs)


@pytest.fixture(scope="module")
def items() -> list[QueryPairs]:
    return make_items()


@pytest.fixture(scope="module")
def warm() -> RewardModel:
    return make_reward(RewardConfig(rounds=2, judge_updates=1, rubricor_updates=2, queries_per_update=3))


def one_item() -> QueryPairs:
    """B is needed: the first is right and cheap, the second right and dear, the third wrong."""
    group = tuple(
        replace(make_trajectory(QUERY, models, TEXTS, str(models)), correct=bool(models[1]))
        for models in ((0, 1, 0, 0), (1, 1, 1, 0), (1, 0, 0, 0))
    )
    pairs = ((PairKind.COST, 0, 1), (PairKind.OUTCOME, 1, 2), (PairKind.OUTCOME, 0, 2))
    return QueryPairs(QUERY, group, pairs, 0)


def pair_weights() -> dict[str, torch.Tensor]:
    return {QUERY.id: weigh_pairs(one_item(), WEIGHTS)}


def test_pair_weights_by_hand() -> None:
    # cost 1/6, outcome 4/6 over two pairs; process pairs do not occur, but their weight counts
    assert weigh_pairs(one_item(), WEIGHTS).tolist() == pytest.approx([1 / 6, 2 / 6, 2 / 6])
    assert find_dearer(one_item()).tolist() == [-1, 1, 0]


def test_balance_lets_neither_writer_pay_more_in_random_rubrics(items: list[QueryPairs], warm: RewardModel) -> None:
    weights = balance_pairs(warm.judge, items, warm.config, 0)
    for item in items:
        base, balanced = weigh_pairs(item, warm.config.kind_weights), weights[item.query.id]
        dearer = find_dearer(item) > 0
        for side in (True, False):
            ratios = (balanced / base)[dearer == side]
            assert ratios.numel() == 0 or torch.allclose(ratios, ratios[0].expand_as(ratios))
    lean = size = 0.0
    rng = random.Random(5)
    for item in items * 6:
        criteria = draw_random_criteria(item.query, rng)
        table = read_verdicts(warm.judge, [(item, [*criteria, *map(turn_round, criteria)])])[item.query.id]
        value = gain_lines(item, criteria, table, weights[item.query.id], warm.config.score_scale)
        signed = [w if c.model == "large" else -w for w, c in zip(value.writers, criteria, strict=True) if c.label]
        lean += item.draw_weight * sum(signed)
        size += item.draw_weight * sum(map(abs, signed))
    assert abs(lean) < 0.25 * size


def test_reward_of_scores_rises_with_every_pair_ordered_rightly() -> None:
    item = one_item()
    perfect, flat, inverse = reward_scores(
        item, weigh_pairs(item, WEIGHTS), torch.tensor([[1.0, 0, -1], [0, 0, 0], [-1, 0, 1]]), 0.1
    )
    total = float(weigh_pairs(item, WEIGHTS).sum())
    assert float(flat) == pytest.approx(total / 2)
    assert float(perfect) == pytest.approx(total, abs=1e-3)
    assert float(inverse) == pytest.approx(0, abs=1e-3)


def test_accuracy_by_hand() -> None:
    verdicts = [[Verdict(0.5), Verdict(0.5), Verdict(-0.5)]]
    accuracy = measure_accuracy([one_item()], verdicts)
    assert accuracy.by_kind == {"outcome": 1.0, "cost": 0.5}
    assert accuracy.mean == pytest.approx((2 * 1.0 + 0.5) / 3)
    assert accuracy.balanced == pytest.approx((1.0 + 0.5) / 2)
    assert accuracy.counts == {"outcome": 2, "cost": 1, "process": 0}
    broken = [[Verdict(0.5), Verdict(float("nan"), error="boom"), Verdict(-0.5)]]
    assert measure_accuracy([one_item()], broken).errors == 2


def test_a_rubric_that_names_the_needed_step_is_worth_more_and_its_line_gets_the_credit(warm: RewardModel) -> None:
    def read(model: str, quote: str = "times 04"):  # type: ignore[no-untyped-def]
        criteria = [
            make_overall_criterion("small", 1.0),
            make_step_criterion("A", "double", "small", 1.0),
            make_step_criterion("B", quote, model, 5.0),
            make_step_criterion("C", "subtract 38", "small", 1.0),
        ]
        return read_rubric(make_rubric_of(QUERY, criteria).text, QUERY)

    bad = read_rubric("nonsense", QUERY)
    reads = [read("large"), read("small"), read("large", "times 05"), bad]
    good, wrong, unfaithful, broken = value_rubrics(warm.judge, [one_item()] * 4, reads, pair_weights(), warm.config)
    assert good.reward > wrong.reward + 0.2
    assert max(range(4), key=lambda k: good.writers[k]) == 2
    assert min(range(4), key=lambda k: wrong.writers[k]) == 2
    assert good.writers[2] == pytest.approx(-wrong.writers[2], abs=1e-5)  # the same two options, all else equal
    assert unfaithful.writers[2] == unfaithful.writers[2] == -UNFAITHFUL_FINE
    assert (broken.reward, broken.writers) == (-FORMAT_FINE, ())


def test_parts_of_a_line_by_hand() -> None:
    """One criterion and verdicts of +1 and -1: the weight cannot matter, the writer decides everything."""
    item = replace(one_item(), pairs=((PairKind.OUTCOME, 0, 2),))
    criterion = make_step_criterion("B", "times 04", "large", 2.0)
    table = {
        criterion.text: torch.tensor([1.0, 1.0, -1.0]),
        turn_round(criterion).text: torch.tensor([-1.0, -1.0, 1.0]),
    }
    value = gain_lines(item, [criterion], table, torch.tensor([0.6]), 1.0)
    high, low = 0.6 / (1 + math.exp(-2)), 0.6 / (1 + math.exp(2))
    assert value.reward == pytest.approx(high)
    assert value.gains[0] == pytest.approx(high - 0.3)
    assert value.writers[0] == pytest.approx((high - low) / 2)
    assert value.weights[0] == pytest.approx(0.0, abs=1e-6)


def test_a_criterion_turned_round_twice_is_itself() -> None:
    for criterion in draw_random_criteria(QUERY, random.Random(0)):
        assert turn_round(turn_round(criterion)) == criterion
        assert turn_round(criterion).model != criterion.model
        assert turn_round(criterion).label == criterion.label


def test_missing_criteria_are_fined(warm: RewardModel) -> None:
    lines = make_random_rubric(QUERY).text.split("\n")
    assert len(lines) == 4
    reads = [read_rubric("\n".join(lines), QUERY), read_rubric("\n".join(lines[:3]), QUERY)]
    full, short = value_rubrics(warm.judge, [one_item()] * 2, reads, pair_weights(), warm.config)
    # what the last line adds is its gain; beyond that the shorter rubric pays the fine
    table = read_verdicts(warm.judge, [(one_item(), [*c, *map(turn_round, c)]) for c in [reads[0].rubric.criteria]])
    value = gain_lines(one_item(), reads[0].rubric.criteria, table[QUERY.id], pair_weights()[QUERY.id], 0.1)
    assert full.reward - short.reward == pytest.approx(value.gains[3] + MISSING_FINE, abs=1e-5)


def test_line_credit_falls_on_the_line_s_tokens(warm: RewardModel) -> None:
    queries = [QUERY]
    completions = warm.rubricor.sample(queries, 2, seed=0)
    counts = [completion.text.count("\n") + 1 for completion in completions]
    zeros = [(0.0,) * count for count in counts]
    values = [
        RubricValue(1.0, zeros[0], (0.5, *zeros[0][1:]), (-0.25, *zeros[0][1:])),
        RubricValue(0.0, zeros[1], zeros[1], zeros[1]),
    ]
    batch = make_credit_batch(warm.rubricor, completions, values, torch.tensor([0, 0]))
    start = len(completions[0].prompt_ids)
    places = warm.rubricor.find_places(completions[0].ids)
    expected = {(0, 0): 0.5 + 4 * 0.5, (0, 1): 0.5 - 4 * 0.25}
    row = batch.advantages_B[0, start : start + len(places)].tolist()
    assert row == pytest.approx([expected.get(place, 0.5) for place in places])
    assert {place for place in places if place[0] == 0} == {(0, 0), (0, 1)}
    assert float(batch.advantages_B[0, :start].abs().sum()) == 0
    assert batch.action_mask_BT.shape == batch.advantages_B.shape
    assert len(make_credit_batch(warm.rubricor, completions, [values[0]] * 2, torch.tensor([0, 0]))) == 0


def test_places_follow_lines_and_the_weight(warm: RewardModel) -> None:
    ids = warm.rubricor.tokenizer.encode("overall: mostly written by the small model (3)\nB: double written by")
    texts = [warm.rubricor.tokenizer.decode([token]) for token in ids]
    places = dict(zip(texts, warm.rubricor.find_places(ids), strict=True))
    assert places["overall: "] == places[" written by the small model ("] == (0, 0)
    assert places["3"] == places[")"] == (0, 1)
    assert places["\n"] == places["B: "] == (1, 0)


def test_verdict_rewards_by_hand_and_with_sides_swapped() -> None:
    rubric = make_rubric_of(
        QUERY, [make_overall_criterion("small", 3.0), make_step_criterion("A", "double", "small", 1.0)]
    )
    draws = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 2], [1, 1, 0, 0]])
    rewards = reward_verdicts(rubric, draws)
    assert rewards == [1.0, -1.0, -1.0, -1.0, -1.0]
    swapped = reward_verdicts(rubric, draws.roll(2, dims=1))
    for reward, other, draw in zip(rewards, swapped, draws.tolist(), strict=True):
        if 2 not in draw and draw[:2] != draw[2:]:
            assert reward == -other


def test_queries_that_differ_in_outcome_are_drawn_more_often(items: list[QueryPairs]) -> None:
    rng = random.Random(0)
    drawn = [item for _ in range(300) for item in draw_items(items, 4, rng)]
    share = sum(item.has_outcome for item in items) / len(items)
    assert sum(item.has_outcome for item in drawn) / len(drawn) > share + 0.1
    assert len({id(item) for item in draw_items(items, 8, rng)}) == 8


def test_folds_are_disjoint_and_the_last_is_held_out(items: list[QueryPairs]) -> None:
    for rounds in (1, 2, 3, 5):
        parts, held_out = split_folds(items, 4, rounds)
        assert len(parts) == rounds
        ids = [{item.query.id for item in part} for part in parts]
        assert {item.fold for item in held_out} == {3}
        assert set().union(*ids) == {item.query.id for item in items if item.fold < 3}
        if rounds <= 3:
            assert sum(map(len, ids)) == len(set().union(*ids))
    with pytest.raises(ConfigError, match=r"data\.train_queries"):
        split_folds([item for item in items if item.fold == 3], 4, 2)


@pytest.mark.parametrize("weights", [{"outcom": 1.0}, {"outcome": -1.0, "cost": 3.0}, {"outcome": 0.0}])
def test_kind_weights_that_make_no_sense_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"reward\.kind_weights"):
        check_kind_weights(weights)


def test_a_killed_alternation_goes_on_and_ends_with_the_same_weights(
    items: list[QueryPairs], warm: RewardModel, tmp_path: Path
) -> None:
    def weights(reward: RewardModel) -> list[torch.Tensor]:
        return [*reward.rubricor.model.parameters(), *reward.judge.model.parameters()]

    before = [parameter.clone() for parameter in weights(warm)]
    updates: list[dict[str, float | str]] = []
    straight, result = alternate(warm, items, 4, 0, None, updates.append)
    assert [(u["round"], u["phase"]) for u in updates] == [
        (0, "judge"), (0, "rubricor"), (0, "rubricor"), (1, "judge"), (1, "rubricor"), (1, "rubricor")
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, weights(warm), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(straight), strict=True))

    class Killed(Exception):
        pass

    def kill(metrics: dict[str, float | str]) -> None:
        if metrics["round"] == 1:
            raise Killed

    with pytest.raises(Killed):
        alternate(warm, items, 4, 0, tmp_path / "state", kill)
    again: list[dict[str, float | str]] = []
    resumed, resumed_result = alternate(warm, items, 4, 0, tmp_path / "state", again.append)
    assert {metrics["round"] for metrics in again} == {1}
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))
    assert [r.accuracy for r in resumed_result.rounds] == [r.accuracy for r in result.rounds]
    assert resumed_result.controls == result.controls
    done, _ = alternate(warm, items, 4, 0, tmp_path / "state", kill)  # nothing is done again
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(done), strict=True))
    (tmp_path / "state" / "round_00.result.json").write_text("{")
    with pytest.raises(CheckpointError, match="do the round again"):
        alternate(warm, items, 4, 0, tmp_path / "state")


def test_summary_has_every_control_by_kind(items: list[QueryPairs], warm: RewardModel) -> None:
    short = RewardModel(warm.rubricor, warm.judge, replace(warm.config, rounds=1, rubricor_updates=1))
    _, result = alternate(short, items, 4, 0)
    summary = result.as_summary()
    assert {"untrained", "warm", "trained", "fixed_rubric", "shuffled_rubrics", "random_rubrics"} <= set(
        summary["pair_accuracy"]  # type: ignore[call-overload]
    )
    assert [entry["round"] for entry in summary["by_round"]] == [-1, 0]  # type: ignore[attr-defined]
    assert all(0 <= value <= 1 for value in summary["pair_accuracy"].values())  # type: ignore[attr-defined]


def measure_selectivity(reward: RewardModel, items: list[QueryPairs], hard: set[tuple[str, str]]) -> float:
    """P(large | hard step) - P(large | easy step) in sampled rubrics."""
    large: dict[bool, list[bool]] = {True: [], False: []}
    for completion in reward.rubricor.sample([item.query for item in items], 4, seed=9):
        query = items[completion.prompt].query
        rubric = reward.rubricor.read(completion.text, query).rubric
        for criterion in rubric.criteria if rubric else ():
            if criterion.label:
                large[(query.id, criterion.label) in hard].append(criterion.model == "large")
    return sum(large[True]) / len(large[True]) - sum(large[False]) / len(large[False])


def find_hard(items: list[QueryPairs]) -> set[tuple[str, str]]:
    """(query id, step label) of every hard step: known to the test, and to nobody else."""
    hard = set()
    for item in items:
        suite, split, seed, index = item.query.id.split("/")
        program = next(itertools.islice(draw_programs(suite, split, int(seed)), int(index), None))
        for label, operation in zip(LABELS, program.operations, strict=False):
            if operation.is_hard:
                hard.add((item.query.id, label))
    return hard


def make_ideal_rubric(item: QueryPairs, hard: set[tuple[str, str]]) -> Rubric:
    """Hard steps by the large model, the others by the small one."""
    steps = [
        make_step_criterion(label, quote, "large" if (item.query.id, label) in hard else "small", 3.0)
        for label, quote in find_steps(item.query)
    ]
    return make_rubric_of(item.query, steps)


def test_the_rubricor_learns_which_steps_matter(warm: RewardModel) -> None:
    """Proof of learning on writers whose hard steps are known to the test, and to nobody else."""
    items = make_items(40, ("chain",))
    hard = find_hard(items)
    start = copy_reward(warm)
    config = RewardConfig(rubricor_updates=20, queries_per_update=12)
    run_rubricor_phase(start.rubricor, start.judge, items, config, 0, lambda metrics: None)
    assert start.rubricor.version == warm.rubricor.version + 20
    assert measure_selectivity(start, items, hard) > measure_selectivity(warm, items, hard) + 0.05


def test_contrastive_criteria_follow_the_preferred_trajectory(items: list[QueryPairs]) -> None:
    spec = WarmStartSpec(flip=0.0, drop=0.0)
    for item in items:
        criteria = make_contrastive_criteria(item, random.Random(0), spec)
        assert not read_rubric(make_rubric_of(item.query, criteria).text, item.query, min_criteria=1).dropped
        assert len(criteria) == min(len(find_steps(item.query)) + 1, 7)
    noisy = replace(spec, flip=0.5)
    rubrics = {tuple(make_contrastive_criteria(items[0], random.Random(i), noisy)) for i in range(20)}
    assert len(rubrics) > 10


def test_mechanical_verdicts_by_hand() -> None:
    trajectory = make_trajectory(QUERY, (0, 1, 0, 0), TEXTS)
    verdicts = [
        (make_step_criterion("B", "times 04", "large", 1.0), 1.0),
        (make_step_criterion("B", "times 04", "small", 1.0), 0.0),
        (make_step_criterion("A", "double", "small", 1.0), 1.0),
        (make_step_criterion("D", "double", "small", 1.0), None),
        (make_overall_criterion("small", 1.0), 0.75),
        (make_overall_criterion("large", 1.0), 0.25),
    ]
    assert [judge_mechanically(criterion, trajectory) for criterion, _ in verdicts] == [value for _, value in verdicts]


def test_warm_start_training_learns_from_scratch_in_seconds(items: list[QueryPairs]) -> None:
    spec = WarmStartSpec(rubricor_updates=25, judge_updates=25, batch=4, format_queries=20)
    losses: list[float] = []
    model, _ = train_rubricor(items, spec, 0, lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.8 * losses[0]
    again, _ = train_rubricor(items, spec, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    losses.clear()
    train_judge(items, spec, 0, lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_the_shipped_warm_start_is_good_at_format_and_leaves_room(items: list[QueryPairs], warm: RewardModel) -> None:
    accuracy, error = measure_judge(warm.judge, items)
    assert accuracy > 0.9
    assert error < 0.15
    completions = warm.rubricor.sample([item.query for item in items], 2, seed=0)
    reads = [warm.rubricor.read(c.text, items[c.prompt].query) for c in completions]
    assert sum(read.rubric is not None for read in reads) / len(reads) > 0.9
    hard = find_hard(items)
    ideal = measure(warm, items, [make_ideal_rubric(item, hard) for item in items])
    # The room is where it counts: in telling right from wrong trajectories.
    assert measure(warm, items).by_kind["outcome"] < ideal.by_kind["outcome"] - 0.05
