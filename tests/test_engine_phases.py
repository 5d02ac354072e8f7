"""Alternating optimisation through an engine: rewards and rows by hand, then on a real tiny base with real adapters."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from reward_engines import CHAT, RewardEngine, make_rubric_json
from simulated import make_trajectory
from stored_pairs import make_stored

from roro_ray.config import LoraConfig, ModelConfig, RewardConfig
from roro_ray.engines.hf import HfEngine
from roro_ray.engines.loading import load_tokenizer
from roro_ray.engines.protocol import StepResult
from roro_ray.errors import CheckpointError, ConfigError
from roro_ray.learning.grpo import EmptyBatchWarning
from roro_ray.learning.lm_run import LocalLearner
from roro_ray.learning.updates import UpdateSettings
from roro_ray.reward.alternate import AlternationResult
from roro_ray.reward.credit import FORMAT_FINE, UNFAITHFUL_FINE
from roro_ray.reward.engine_alternate import Parts, alternate_engine, measure_stored
from roro_ray.reward.engine_batches import Asked, Codec, make_codec, make_rubric_batch, make_verdict_batch
from roro_ray.reward.engine_judge import EngineJudge, Reading, make_judge_prompt
from roro_ray.reward.engine_phases import Metrics, value_rubrics
from roro_ray.reward.engine_reward import EngineReward, open_engine_reward
from roro_ray.reward.engine_rubricor import RubricSample
from roro_ray.reward.generic import make_rubric_of
from roro_ray.reward.pair_store import StoredPairs
from roro_ray.reward.preference import QueryPairs
from roro_ray.reward.rubric import ReadRubric, make_criterion, make_step_criterion, read_rubric
from roro_ray.types import PairKind, Query

pytestmark = pytest.mark.timeout(120)

QUERY = Query("gsm8k/0", "gsm8k", "train", "How many eggs are left of 16?", "9")
BASE = "world:rubricor"


def one_item() -> QueryPairs:
    """The first is preferred to the second by outcome, to the third by cost."""
    group = tuple(
        replace(make_trajectory(QUERY, models, ("plan", "sum"), name), correct=name != "b")
        for name, models in (("a", (1, 0)), ("b", (0, 0)), ("c", (1, 1)))
    )
    return QueryPairs(QUERY, group, ((PairKind.OUTCOME, 0, 1), (PairKind.COST, 0, 2)), 0)


def read(text: str) -> ReadRubric:
    return read_rubric(text, QUERY)


def codec() -> Codec:
    return Codec(load_tokenizer(BASE), chat=False)


# Rewards and rows by hand.


def test_a_rubric_is_worth_how_well_it_orders_the_pairs_less_its_fines() -> None:
    def prefer(prefix: str, choices: tuple[str, ...]) -> float:
        plan = prefix.partition("[L] plan")[1] != ""
        second = "[L] sum" in prefix
        return 1.0 if "planning" in prefix.rpartition("Rubric:\n")[2] and plan and not second else 1e-9

    engine = RewardEngine(prefer=prefer)
    judge = EngineJudge(engine, prompt=make_judge_prompt(asyncio.run(engine.ready())))
    good, unfaithful = read(make_rubric_json(count=3)), read(make_rubric_json(count=3).replace("kind a", "kind 17"))
    assert len(unfaithful.dropped) == 1
    config = RewardConfig(score_scale=0.1, kind_weights={"outcome": 4.0, "cost": 1.0, "process": 1.0})
    values = asyncio.run(value_rubrics(judge, one_item(), [good, unfaithful, read("garbage")], config))
    share = (4 + 1) / 6  # the weights of the kinds that occur, all pairs ordered rightly: sigmoid(.. / 0.1) is about 1
    assert values[0] == pytest.approx(share / (1 + math.exp(-2 / 3 / 0.1)), abs=1e-3)
    assert values[1] == pytest.approx(share - UNFAITHFUL_FINE, abs=2e-3)
    assert values[2] == -FORMAT_FINE
    assert len(engine.scored) == 3 * 3, "each criterion once a trajectory, whichever rubrics share it"


def test_a_trajectory_that_cannot_be_judged_makes_no_reward() -> None:
    engine = RewardEngine(fails=lambda prefix: "[L] sum" in prefix)
    judge = EngineJudge(engine, prompt=make_judge_prompt(asyncio.run(engine.ready())))
    values = asyncio.run(value_rubrics(judge, one_item(), [read(make_rubric_json()), read("x")], RewardConfig()))
    assert math.isnan(values[0]) and values[1] == -FORMAT_FINE


def sample(text: str, finish: str = "stop", **changes: object) -> RubricSample:
    ids = (*codec().tokenizer.encode(text), 2)
    prompt = "Start with 36. A: double.\n\nRubric:\n"
    result = StepResult(text, ids, (-0.5,) * len(ids), finish, len(codec().encode(prompt)), 0.0)
    return RubricSample(QUERY, prompt, replace(result, **changes))  # type: ignore[arg-type]


def test_rubric_rows_have_the_engine_s_tokens_and_one_advantage() -> None:
    samples = [sample("A: double"), sample("B: times 04"), sample("A: double"), sample("A: double")]
    groups = torch.tensor([0, 0, 1, 1])
    batch = make_rubric_batch(codec(), samples, torch.tensor([1.0, 0.0, 0.3, 0.3]), groups)
    assert batch.advantages_B.tolist() == [0.5, -0.5] and batch.group_ids_B.tolist() == [0, 0]
    prompt = codec().encode(samples[0].prompt)
    row = batch.ids_BT[0][batch.attention_mask_BT[0].bool()].tolist()
    result = samples[0].result
    assert result is not None and row == [*prompt, *result.token_ids]
    assert batch.action_mask_BT[0].sum() == len(result.token_ids) and not batch.action_mask_BT[0, : len(prompt)].any()
    assert batch.old_log_probs_BT[0][batch.action_mask_BT[0]].tolist() == pytest.approx([-0.5] * len(result.token_ids))


@pytest.mark.parametrize("changes", [{"prefix_tokens": 3}, {"log_probs": ()}])
def test_rows_whose_tokens_are_not_known_are_left_out(changes: dict[str, object]) -> None:
    lost = [sample("C", **changes), RubricSample(QUERY, "p", None, "gone")]
    samples = [sample("A: double"), sample("B: times 04"), *lost]
    batch = make_rubric_batch(codec(), samples, torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.zeros(4, dtype=torch.long))
    assert batch.advantages_B.tolist() == [0.5, -0.5]
    with pytest.warns(EmptyBatchWarning):
        nothing = make_rubric_batch(codec(), lost, torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long))
    assert len(nothing) == 0 and nothing.action_tokens == 0


def test_ids_that_the_engine_encoded_itself_are_taken_as_they_are() -> None:
    samples = [sample("A", encoded_ids=(5, 6, 7), prefix_tokens=3), sample("B", encoded_ids=(5, 6, 7), prefix_tokens=3)]
    batch = make_rubric_batch(codec(), samples, torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long))
    assert batch.ids_BT[:, :3].tolist() == [[5, 6, 7]] * 2


def test_verdict_rows_push_towards_the_draws_that_ordered_the_pair() -> None:
    rubric = make_rubric_of(QUERY, [make_criterion("planning by the large model", 2.0)])
    asked = [Asked("preferred? ", Reading(0.5, 0.5, 0.8)), Asked("rejected? ", Reading(0.5, 0.5, 0.8))]
    config = RewardConfig(verdicts_per_pair=400)
    batch, metrics = make_verdict_batch(codec(), [(rubric, asked)], config, random.Random(0))
    assert len(batch) == 4 and batch.action_mask_BT.sum(dim=1).tolist() == [1] * 4
    assert metrics["format_errors"] == pytest.approx(0.2)
    assert metrics["reward"] == pytest.approx(2 * 0.25 - 1, abs=0.1)  # +1 where preferred yes and rejected no
    assert batch.old_log_probs_BT[batch.action_mask_BT].tolist() == pytest.approx([math.log(0.4)] * 4)
    ids, advantages = codec().verdict_ids, {}
    for row, mask, advantage in zip(batch.ids_BT, batch.action_mask_BT, batch.advantages_B.tolist(), strict=True):
        prompt = codec().tokenizer.decode(row[: int(mask.nonzero()[0])])
        advantages["preferred" in prompt, int(row[mask][0]) == ids["yes"][0]] = advantage
    assert advantages[True, True] > 0.1 and advantages[False, False] > 0.1
    assert advantages[True, False] < -0.1 and advantages[False, True] < -0.1
    assert sum(advantages.values()) == pytest.approx(0.0, abs=1e-6)


def test_sure_verdicts_teach_nothing_and_many_rows_are_thinned() -> None:
    rubric = make_rubric_of(QUERY, [make_criterion(f"{k} by the large model", 1.0) for k in "abc"])
    sure = [Asked(f"{k}? ", Reading(float(k < 3), float(k >= 3), 1.0)) for k in range(6)]
    batch, metrics = make_verdict_batch(codec(), [(rubric, sure)], RewardConfig(), random.Random(0))
    assert len(batch) == 0 and metrics["reward"] == 1.0
    unsure = [Asked(f"{k}? ", Reading(0.5, 0.5, 1.0)) for k in range(6)]
    batch, _ = make_verdict_batch(codec(), [(rubric, unsure)], RewardConfig(judge_rows=5), random.Random(0))
    assert len(batch) == 5
    assert len(make_verdict_batch(codec(), [], RewardConfig(), random.Random(0))[0]) == 0


# On a real base.


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[StoredPairs]:
    return make_stored(tmp_path_factory.mktemp("stored"), 8, ("chain",))


LORA = LoraConfig(
    base=BASE, dtype="float32", rank=4, token_budget=2048, checkpoint_every=100, rubricor_lr=1e-3, judge_lr=1e-3
)
REWARD = RewardConfig(
    backend="engine", engine=ModelConfig("reward", BASE, adapters=2), rounds=2, judge_updates=2, rubricor_updates=2,
    queries_per_update=3, rubrics_per_query=4, rubric_tokens=96, judge_tokens=1024,
)  # fmt: skip


def open_world(tmp_path: Path, name: str) -> tuple[EngineReward, LocalLearner, Codec]:
    # float64: the same bits in any batch, so that runs can be compared exactly
    reward = open_engine_reward(REWARD, engine=HfEngine("reward", BASE, dtype="float64", adapters=2))
    learner = LocalLearner(LORA, tmp_path / name)
    return reward, learner, make_codec(load_tokenizer(BASE), reward)


@dataclass
class Straight:
    """A run that nothing interrupted."""

    reward: EngineReward
    learner: LocalLearner
    trained: Parts
    result: AlternationResult
    seen: list[Metrics]


@pytest.fixture(scope="module")
def straight(items: list[StoredPairs], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Straight]:
    directory = tmp_path_factory.mktemp("straight")
    reward, learner, coder = open_world(directory, "adapters")
    seen: list[Metrics] = []
    trained, result = alternate_engine(reward, learner, coder, items, 4, 0, directory / "rounds", seen.append)
    yield Straight(reward, learner, trained, result, seen)
    reward.close()


def test_a_whole_alternation_learns_serves_and_measures(straight: Straight) -> None:
    reward, seen, trained, result = straight.reward, straight.seen, straight.trained, straight.result
    assert [(m["round"], m["phase"], m["update"]) for m in seen] == [
        (r, phase, u) for r in (0, 1) for phase in ("judge", "rubricor") for u in (0, 1)
    ]
    assert trained.versions == {"rubricor": 4, "judge": 4} == straight.learner.versions
    assert [(r.round, r.rubricor_version, r.judge_version) for r in result.rounds] == [(-1, 0, 0), (0, 2, 2), (1, 4, 4)]
    assert (reward.rubricor.version, reward.judge.version) == (4, 4), "the engine is left with what was trained"
    summary = result.as_summary()
    controls = ["untrained", "warm", "trained", "trained_rubricor", "trained_judge"]
    controls += ["fixed_rubric", "random_rubrics", "shuffled_rubrics"]
    assert list(summary["pair_accuracy"]) == controls  # type: ignore[call-overload]
    assert all(0 <= accuracy.mean <= 1 and not accuracy.errors for accuracy in result.controls.values())
    assert result.controls["trained"] == result.rounds[-1].accuracy
    assert result.controls["warm"] == result.rounds[0].accuracy
    rubricor_metrics = [m for m in seen if m["phase"] == "rubricor"]
    assert all(m["format_errors"] < 0.5 for m in rubricor_metrics), "the world's base writes rubrics"
    assert any(m["grad_norm"] > 0 for m in rubricor_metrics)


def test_a_killed_alternation_goes_on_in_the_middle_of_a_round(
    items: list[StoredPairs], straight: Straight, tmp_path: Path
) -> None:
    def run(name: str, learner: LocalLearner, reward: EngineReward, coder: Codec, hear: list[Metrics]) -> Parts:
        return alternate_engine(reward, learner, coder, items, 4, 0, tmp_path / f"{name}-rounds", hear.append)[0]

    weights = {name: straight.learner.run.trainer.model.get_state(name) for name in ("rubricor", "judge")}

    class Killed(Exception):
        pass

    class Ears(list[Metrics]):
        def append(self, metrics: Metrics) -> None:
            super().append(metrics)
            if (metrics["round"], metrics["phase"], metrics["update"]) == (1, "judge", 0):
                raise Killed

    reward, learner, coder = open_world(tmp_path, "killed")
    with pytest.raises(Killed):
        run("killed", learner, reward, coder, Ears())
    learner.stop()
    reward.close()
    again: list[Metrics] = []
    reward, learner, coder = open_world(tmp_path, "killed")
    assert learner.versions == {"rubricor": 2, "judge": 3}
    run("killed", learner, reward, coder, again)
    left = [(1, "judge", 1), (1, "rubricor", 0), (1, "rubricor", 1)]
    assert [(m["round"], m["phase"], m["update"]) for m in again] == left
    for name, state in weights.items():
        resumed = learner.run.trainer.model.get_state(name)
        assert all(torch.equal(state[key], resumed[key]) for key in state), name
    strange = LocalLearner(LORA, tmp_path / "other")
    (tmp_path / "killed-rounds" / "round_01.json").unlink()
    with pytest.raises(CheckpointError, match="belongs to another alternation"):
        alternate_engine(reward, strange, coder, items, 4, 0, tmp_path / "killed-rounds")
    (tmp_path / "killed-rounds" / "warm.json").write_text("{")
    with pytest.raises(CheckpointError, match="unreadable"):
        alternate_engine(reward, learner, coder, items, 4, 0, tmp_path / "killed-rounds")
    reward.close()


def test_an_engine_that_fails_leaves_updates_from_which_nothing_is_learned(
    items: list[StoredPairs], tmp_path: Path
) -> None:
    engine = RewardEngine(fails=lambda prefix: True)
    reward = open_engine_reward(REWARD, engine=engine)
    learner = LocalLearner(LORA, tmp_path / "adapters")
    seen: list[Metrics] = []
    with pytest.warns(RuntimeWarning, match="nothing to learn from"):
        trained, _ = alternate_engine(reward, learner, codec(), items, 4, 0, tmp_path / "rounds", seen.append)
    assert trained.versions == {"rubricor": 4, "judge": 4}
    assert all(m["empty"] == 1.0 for m in seen)
    assert {m.get("errors", m.get("unjudged")) for m in seen} == {1.0}
    assert measure_stored(reward, items[:3]).errors == sum(len(item.pairs) for item in items[:3])
    reward.close()


def test_a_base_whose_verdicts_are_several_tokens_is_refused() -> None:
    class Spelling:
        pad_token_id = 0

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return list(map(ord, text))

    reward = open_engine_reward(REWARD, engine=RewardEngine(form=CHAT))
    with pytest.raises(ConfigError, match="in 3 tokens"):
        make_codec(Spelling(), reward)
    reward.close()


def test_the_judge_learns_to_order_a_pair(tmp_path: Path) -> None:
    """Proof of learning on a base that judges well: it unlearns who wrote a step where preferences say the reverse."""
    reward = open_engine_reward(REWARD, engine=HfEngine("reward", "world:judge", adapters=2))
    learner = LocalLearner(replace(LORA, base="world:judge", judge_lr=5e-3), tmp_path / "adapters")
    coder = make_codec(load_tokenizer("world:judge"), reward)
    query = Query("q", "chain", "train", "Start with 36. A: double; B: times 04; C: subtract 38.", "50")
    texts = ("A: dbl 36 = 72", "B: 72 * 04 = 88", "C: 88 - 38 = 50", "Answer: 50")
    sides = [make_trajectory(query, models, texts) for models in ((0, 0, 0, 0), (1, 1, 1, 1))]
    rubric = make_rubric_of(query, [make_step_criterion("B", "times 04", "large", 2.0)])

    def ask() -> list[Asked]:
        judge, asked = reward.judge, []
        for trajectory in sides:
            reading = reward.loop.run(judge.read(query, trajectory, rubric.criteria))[0]
            head = judge.prompt.make_head(query, trajectory)
            asked.append(Asked(judge.prompt.join(head, judge.prompt.make_question(rubric.criteria[0])), reading))
        return asked

    rng, gaps = random.Random(0), []
    config = replace(REWARD, verdicts_per_pair=64)
    for _ in range(25):
        asked = ask()
        gaps.append(asked[0].reading.yes - asked[1].reading.yes)
        batch, _ = make_verdict_batch(coder, [(rubric, asked)], config, rng)
        learner.grpo("judge", batch, UpdateSettings(max_length=1))
        reward.take_over(learner.publish("judge"))
    assert gaps[-1] > gaps[0] + 0.3
    reward.close()
