"""Rubricor and Judge behind an engine: prompts, long trajectories, errors as values, versions, the service's face."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
from reward_engines import CHAT, THINKING, RewardEngine, make_rubric_json
from simulated import make_trajectory
from tiny_models import make_tiny_model

from roro_ray.config import Config, LoraConfig, ModelConfig, RewardConfig
from roro_ray.engines.formats import PLAIN
from roro_ray.engines.hf import HfEngine
from roro_ray.engines.loading import load_tokenizer
from roro_ray.errors import CheckpointError, ConfigError, EngineError
from roro_ray.learning.adapter_files import AdapterVersion
from roro_ray.learning.lm_run import LocalLearner
from roro_ray.learning.sft import make_sft_batch
from roro_ray.reward.engine_judge import EngineJudge, make_judge_prompt
from roro_ray.reward.engine_reward import (
    EngineReward,
    list_adapters,
    load_engine_reward,
    open_engine_reward,
    resolve_reward,
    save_engine_reward,
)
from roro_ray.reward.engine_rubricor import EngineRubricor, strip_fence
from roro_ray.reward.fitting import cut_middle, estimate_tokens, fit_steps
from roro_ray.reward.generic import make_rubric_of
from roro_ray.reward.prompts import JudgePrompt, make_rubric_prompt, make_rubric_schema
from roro_ray.reward.rubric import make_criterion, parse_rubric
from roro_ray.types import Query, Rubric, Trajectory
from roro_ray.world.tasks import make_queries

pytestmark = pytest.mark.timeout(60)

QUERY = Query("gsm8k/0", "gsm8k", "train", "How many eggs are left of 16?", "9")
OTHER = Query("gsm8k/1", "gsm8k", "train", "How many bolts?", "3")
RUBRIC = make_rubric_of(
    QUERY,
    [
        make_criterion("steps about planning are written by the large model", 3.0),
        make_criterion("steps about sums are written by the small model", 1.0),
    ],
)


def trajectory(count: int = 4, length: int = 10, query: Query = QUERY, name: str = "t") -> Trajectory:
    texts = [f"step {k}: " + "x" * length for k in range(count)]
    return make_trajectory(query, [k % 2 for k in range(count)], texts, name)


def judge_of(engine: RewardEngine, **options: object) -> EngineJudge:
    return EngineJudge(engine, prompt=make_judge_prompt(asyncio.run(engine.ready())), **options)  # type: ignore[arg-type]


def open_reward(engine: RewardEngine, **settings: object) -> EngineReward:
    return open_engine_reward(RewardConfig(backend="engine", **settings), engine=engine)  # type: ignore[arg-type]


# Prompts.


def test_chat_prompts_give_instructions_and_the_question_last() -> None:
    head = JudgePrompt(CHAT).make_head(QUERY, trajectory(2, 1))
    assert head.startswith("<|im_start|>user\nBelow are a problem and a solution")
    assert head.endswith("How many eggs are left of 16?\n\n[S] step 0: x\n\n[L] step 1: x\n\nRubric:\n")
    prompt = JudgePrompt(CHAT)
    question = prompt.make_question(RUBRIC.criteria[0])
    assert prompt.join(head, question) == (
        head + "steps about planning are written by the large model (yes/no)?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert JudgePrompt(THINKING).join("h", "q").endswith("assistant\n<think>\n</think>\n\n")


def test_the_rubricor_sees_the_query_alone_and_is_told_the_form() -> None:
    prompt = make_rubric_prompt(QUERY, CHAT, 3, 5)
    assert prompt == make_rubric_prompt(Query("x", "y", "z", QUERY.text, "another answer"), CHAT, 3, 5)
    assert "write 3 to 5 criteria" in prompt and prompt.endswith(f"{QUERY.text}<|im_end|>\n<|im_start|>assistant\n")
    assert "labels its steps" not in prompt
    labelled = make_rubric_prompt(make_queries("chain", "train", 1)[0], CHAT)
    assert "labels its steps" in labelled
    assert make_rubric_prompt(QUERY, PLAIN) == f"{QUERY.text}\n\nRubric:\n"


def test_the_schema_allows_what_the_parser_reads() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(make_rubric_schema(3, 7))
    text = make_rubric_json(count=3)
    jsonschema.validate(json.loads(text), schema)
    assert len(parse_rubric(text).criteria) == 3
    for wrong in ([], [{"criterion": "a", "weight": 6}] * 3, [{"criterion": "a"}] * 3, {"criterion": "a"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


# Long trajectories.


def test_what_fits_is_left_alone_and_cuts_say_how_much_is_missing() -> None:
    assert cut_middle("abc", 10) == "abc"
    text = "b" * 100 + "m" * 800 + "e" * 100
    cut = cut_middle(text, 90)
    assert cut == "b" * 60 + " (.. 910 characters left out ..) " + "e" * 30
    assert cut_middle("x" * 30, 20) == "x" * 30, "a mark longer than what it saves"


@pytest.mark.parametrize(("steps", "length"), [(3, 20), (40, 400), (300, 150), (300, 20), (3, 50_000), (1, 9000)])
@pytest.mark.parametrize("budget", [900, 4000])
def test_a_trajectory_of_any_length_fits_its_budget(steps: int, length: int, budget: int) -> None:
    prompt = JudgePrompt(CHAT, budget)
    long = trajectory(steps, length)
    head = prompt.make_head(QUERY, long, question_tokens=40)
    whole = prompt.join(head, "q" * 80)
    assert estimate_tokens(whole) <= budget
    assert head.count("Rubric:\n") == 1 and head.endswith("\n\nRubric:\n") and QUERY.text in head
    lines = head.split("\n\n")[2:-1]
    if len(lines) == steps:  # no step is missing, and each keeps its writer
        assert [line[:4] for line in lines] == ["[S] " if k % 2 == 0 else "[L] " for k in range(steps)]
    else:  # one line tells of the others
        told = [line for line in lines if line.startswith("(.. steps ")]
        assert len(told) == 1 and "left out:" in told[0] and " by L, " in told[0]
    if estimate_tokens(JudgePrompt(CHAT).make_head(QUERY, long)) + 100 < budget:
        assert "left out" not in head
    assert prompt.make_head(QUERY, long, 40) == head


def test_the_ends_of_a_trajectory_keep_more_than_its_middle() -> None:
    head = JudgePrompt(PLAIN, 3000).make_head(QUERY, trajectory(20, 1000))
    lines = head.split("\n\n")[1:-1]
    assert len(lines) == 20
    assert min(len(lines[k]) for k in (0, 1, 2, -3, -2, -1)) > 2 * max(map(len, lines[3:-3]))


def test_a_context_that_cannot_hold_the_query_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match=r"reward\.judge_tokens"):
        JudgePrompt(CHAT, 150).make_head(QUERY, trajectory(50, 100))
    cut = fit_steps("p" * 1000, [], lambda text, _: text, estimate_tokens, 300)
    assert cut is not None and "characters left out" in cut


def test_too_long_for_the_context_is_an_error_verdict() -> None:
    verdict = asyncio.run(judge_of(RewardEngine(max_context=150)).score(QUERY, trajectory(50), RUBRIC))
    assert verdict.error is not None and "context of 150 tokens" in verdict.error and math.isnan(verdict.score)


# The Judge.


def test_verdicts_by_hand_and_the_first_question_alone() -> None:
    engine = RewardEngine(prefer=lambda prefix, _: 0.9 if "planning" in prefix.rpartition("Rubric:\n")[2] else 0.25)
    judge = judge_of(engine)
    verdict = asyncio.run(judge.score(QUERY, trajectory(), RUBRIC))
    assert verdict.yes == pytest.approx((0.9, 0.25))
    assert verdict.score == pytest.approx((3 * 0.8 + 1 * -0.5) / 4)
    reading = asyncio.run(judge.read(QUERY, trajectory(), RUBRIC.criteria))[0]
    assert (reading.yes, reading.mass) == (pytest.approx(0.9), pytest.approx(0.8))


def test_verdicts_are_remembered_until_the_version_changes() -> None:
    engine = RewardEngine()
    judge = judge_of(engine)
    for name in ("a", "b"):  # the same text under two ids
        asyncio.run(judge.score(QUERY, trajectory(name=name), RUBRIC))
    assert len(engine.scored) == 2
    asyncio.run(engine.load_adapter("judge", "somewhere", 3))
    judge.take_over("judge", 3)
    assert asyncio.run(judge.score(QUERY, trajectory(), RUBRIC)).version == 3
    assert [adapter for _, _, adapter in engine.scored] == ["", "", "judge", "judge"]
    judge.take_over("judge", 3)
    asyncio.run(judge.score(QUERY, trajectory(), RUBRIC))
    assert len(engine.scored) == 4


def test_an_engine_that_fails_gives_error_verdicts_for_its_trajectories_alone() -> None:
    engine = RewardEngine(fails=lambda prefix: "step 7" in prefix)
    groups = [[trajectory(4), trajectory(9, name="u")], [trajectory(3, query=OTHER)]]
    verdicts = asyncio.run(judge_of(engine).score_groups([QUERY, OTHER], groups, [RUBRIC, RUBRIC]))
    assert [[verdict.error is None for verdict in group] for group in verdicts] == [[True, False], [True]]
    assert "told to fail" in str(verdicts[0][1].error)
    nothing = asyncio.run(judge_of(engine).score(QUERY, trajectory(), Rubric("q", (), "garbage")))
    assert nothing.error is not None


def test_a_model_that_is_gone_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roro_ray.reward.engine_judge._PAUSE_S", 0.0)
    engine = RewardEngine()
    engine.gone = 2
    assert asyncio.run(judge_of(engine).score(QUERY, trajectory(), RUBRIC)).error is None
    engine.gone = 99
    judge = judge_of(engine)
    assert "gone" in str(asyncio.run(judge.score(QUERY, trajectory(), RUBRIC)).error)


@pytest.mark.parametrize(
    ("word", "yes"), [("yes", 1.0), (" No.", 0.0), ("**Yes**", 1.0), ("maybe", None), ("", None), ("yes and no", None)]
)
def test_a_verdict_in_text_is_one_word_or_an_error(word: str, yes: float | None) -> None:
    verdict = asyncio.run(judge_of(RewardEngine(lambda request: word), by_text=True).score(QUERY, trajectory(), RUBRIC))
    if yes is None:
        assert verdict.error is not None and "expected yes or no" in verdict.error
    else:
        assert verdict.yes == (yes, yes)


def test_no_probabilities_are_an_error_and_not_a_verdict() -> None:
    engine = RewardEngine(mass=1e-300)
    engine.score_choices = _nothing  # type: ignore[method-assign]
    assert "log-probabilities" in str(asyncio.run(judge_of(engine).score(QUERY, trajectory(), RUBRIC)).error)


async def _nothing(prefix: str, choices: tuple[str, ...], adapter: str = "") -> object:
    from roro_ray.engines.protocol import ChoiceScores

    return ChoiceScores((-math.inf, -math.inf), (1, 1), (-math.inf, -math.inf), 1)


# The Rubricor.


def test_the_request_asks_for_a_whole_rubric_under_the_schema() -> None:
    engine = RewardEngine()
    rubricor = EngineRubricor(engine, form=CHAT, criteria=(3, 4), max_tokens=99)
    rubrics = asyncio.run(rubricor.write([QUERY, OTHER], seed=5))
    assert [rubric.query_id for rubric in rubrics] == ["gsm8k/0", "gsm8k/1"]
    assert [criterion.model for criterion in rubrics[0].criteria] == ["large", "small", "small"]
    first = engine.requests[0]
    assert (first.delimiter, first.stops, first.max_tokens, first.temperature) == ("", (), 99, 0.0)
    assert json.loads(first.schema)["maxItems"] == 4
    assert EngineRubricor(engine, form=PLAIN)._schema == ""


def test_what_does_not_parse_is_sampled_again_and_then_a_rubric_without_criteria() -> None:
    texts = iter(["garbage", make_rubric_json(), "x", "y", "the answer is 3", "z"])
    engine = RewardEngine(lambda request: next(texts))
    rubricor = EngineRubricor(engine, form=CHAT, version=4)
    good = asyncio.run(rubricor.write([QUERY]))[0]
    assert len(good.criteria) == 3 and good.version == 4
    assert [request.temperature for request in engine.requests] == [0.0, 0.7]
    assert len({request.seed for request in engine.requests}) == 2
    bad = asyncio.run(rubricor.write([OTHER]))[0]
    assert bad.criteria == () and bad.text == "z" and bad.query_id == "gsm8k/1"


def test_samples_differ_in_seed_and_errors_are_values() -> None:
    engine = RewardEngine(fails=lambda prefix: OTHER.text in prefix)
    rubricor = EngineRubricor(engine, form=CHAT)
    samples = asyncio.run(rubricor.sample([QUERY, OTHER], 3, seed=7))
    assert [sample.query.id for sample in samples] == ["gsm8k/0"] * 3 + ["gsm8k/1"] * 3
    assert [sample.result is not None for sample in samples] == [True] * 3 + [False] * 3
    assert len({request.seed for request in engine.requests[:3]}) == 3
    assert "told to fail" in str(rubricor.read(samples[4]).error)
    cut = EngineRubricor(RewardEngine(finish="length"), form=CHAT)
    assert "did not end" in str(cut.read(asyncio.run(cut.sample([QUERY], 1, 0))[0]).error)


def test_a_code_fence_round_json_is_taken_off_and_nothing_else() -> None:
    assert strip_fence("```json\n[1]\n```") == strip_fence(" ```\n[1]```\n") == "[1]"
    for text in ("[1]", "so:\n```\n[1]\n```", "``` [1] ```"):
        assert strip_fence(text) == text


# Both, as the service sees them.


def test_the_reward_model_s_face() -> None:
    engine = RewardEngine()
    reward = open_reward(engine)
    try:
        rubrics = reward.write_rubrics([QUERY, OTHER], 0)
        verdicts = reward.score([QUERY, OTHER], [[trajectory()], [trajectory(query=OTHER)] * 2], rubrics)
        assert [len(group) for group in verdicts] == [1, 2] and verdicts[0][0].error is None
        assert reward.version == 0
        reward.take_over(AdapterVersion("judge", 5, "/j5"))
        reward.take_over(AdapterVersion("rubricor", 2, "/r2"))
        assert reward.version == 7 and reward.write_rubrics([QUERY])[0].version == 2
        assert engine.requests[-1].adapter == "rubricor"
    finally:
        reward.close()


@pytest.mark.parametrize("source", ["random", "fixed"])
def test_controls_never_ask_the_rubricor(source: str) -> None:
    engine = RewardEngine()
    reward = open_reward(engine, rubric_source=source)
    rubrics = reward.write_rubrics([QUERY, OTHER], 3)
    assert all(3 <= len(rubric.criteria) <= 7 for rubric in rubrics) and not engine.requests
    assert reward.score([QUERY], [[trajectory()]], rubrics[:1])[0][0].error is None
    reward.close()


def test_an_older_adapter_goes_to_the_engine_under_a_newer_number() -> None:
    engine = RewardEngine()
    reward = open_reward(engine)
    new, old = AdapterVersion("judge", 5, "/j5"), AdapterVersion("judge", 2, "/j2")
    for adapter in (new, new, old, new):
        reward.take_over(adapter)
        assert engine.adapters["judge"][0] == adapter.path and reward.judge.version == adapter.version
    assert engine.loaded == [("judge", "/j5", 5), ("judge", "/j2", 6), ("judge", "/j5", 7)]
    reward.use_base("judge")
    assert (reward.judge.adapter, reward.judge.version) == ("", 0)
    reward.close()


def test_an_engine_without_adapters_is_refused() -> None:
    class Plain(RewardEngine):
        load_adapter = None  # type: ignore[assignment]

        def __getattribute__(self, name: str) -> object:
            if name == "load_adapter":
                raise AttributeError(name)
            return super().__getattribute__(name)

    with pytest.raises(EngineError, match="serves no adapters"):
        open_engine_reward(RewardConfig(), [AdapterVersion("judge", 1, "/j")], Plain())


def test_save_and_load_bring_both_adapters_and_refuse_what_does_not_fit(tmp_path: Path) -> None:
    adapters = []
    for name, version in (("rubricor", 4), ("judge", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
        adapters.append(AdapterVersion(name, version, str(tmp_path / name)))
    place = save_engine_reward(adapters, "base", tmp_path / "model")
    assert save_engine_reward(adapters, "base", place) == place  # in place of the older one
    engine = RewardEngine()
    config = RewardConfig(backend="engine", engine=ModelConfig("reward", "base"))
    reward = load_engine_reward(place, config, engine)
    assert (reward.rubricor.version, reward.judge.version, reward.version) == (4, 9, 13)
    assert {name: path for name, (path, _) in engine.adapters.items()} == {
        name: str(place / name) for name in ("rubricor", "judge")
    }
    reward.close()
    with pytest.raises(CheckpointError, match="expected 'engine' on 'other'"):
        list_adapters(place, "other")
    (place / "reward.json").write_text('{"rubricor_version": 1, "judge_version": 1}')
    with pytest.raises(CheckpointError, match="'local'"):
        list_adapters(place)
    (place / "DONE").unlink()
    with pytest.raises(CheckpointError, match="learn_reward"):
        list_adapters(place)


def test_the_judge_reads_no_more_than_can_be_learned_from() -> None:
    config = Config(lora=LoraConfig(base="b", token_budget=5000), reward=RewardConfig(backend="engine"))
    resolved = resolve_reward(config)
    assert (resolved.engine.path, resolved.judge_tokens) == ("b", 5000)
    assert resolve_reward(Config(lora=config.lora, reward=RewardConfig(judge_tokens=3000))).judge_tokens == 3000


def test_real_adapters_on_a_chat_base_change_verdicts_and_break_nothing(tmp_path: Path) -> None:
    base = str(make_tiny_model(tmp_path / "base", thinking=True))
    model = ModelConfig("reward", base, format="chat", thinking="auto", adapters=2)
    config = RewardConfig(backend="engine", engine=model, rubric_tokens=24)
    reward = open_engine_reward(config, engine=HfEngine("reward", base, model_format="chat", adapters=2))
    learner = LocalLearner(LoraConfig(base=base, dtype="float32", rank=4, sft_lr=0.05), tmp_path / "adapters")
    assert reward.rubricor.form.thinks
    assert reward.write_rubrics([QUERY])[0].criteria == (), "a random model writes no rubric"
    before = reward.score([QUERY], [[trajectory(3), trajectory(500)]], [RUBRIC])[0]
    assert before[0].error is None and -1 <= before[0].score <= 1
    reward.take_over(learner.publish("judge"))
    fresh = reward.score([QUERY], [[trajectory(3)]], [RUBRIC])[0][0]
    assert fresh.yes == pytest.approx(before[0].yes, abs=1e-5), "an adapter begins as its base"
    tokenizer = load_tokenizer(base)
    prompt, judge = reward.judge.prompt, reward.judge
    head = prompt.make_head(QUERY, trajectory(3))
    ids = tokenizer.encode(prompt.join(head, prompt.make_question(RUBRIC.criteria[0])), add_special_tokens=False)
    word = tokenizer.encode("yes", add_special_tokens=False)
    batch = make_sft_batch([[*ids, *word]], [[False] * len(ids) + [True] * len(word)])
    learner.sft("judge", [batch] * 8, 8)
    reward.take_over(learner.publish("judge"))
    after = reward.score([QUERY], [[trajectory(3)]], [RUBRIC])[0][0]
    assert after.yes[0] > fresh.yes[0] + 0.05 and after.version == judge.version == 8
    assert before[1].error is None, "500 steps are shortened to fit 4096 positions"
    reward.close()
