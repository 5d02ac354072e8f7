"""The episode loop and the runner, on scripted engines."""

import asyncio
import time
from dataclasses import replace

import pytest
from fakes import ScriptedEngine, make_fake_pool, make_query, run_specs, write_notes

from roro_ray.config import STEP_DELIMITER, EpisodeConfig
from roro_ray.data.verify import is_correct, read_answer
from roro_ray.errors import ConfigError
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec, run_episode
from roro_ray.routing.policies import make_policy
from roro_ray.routing.runner import Runner
from roro_ray.types import Trajectory

pytestmark = pytest.mark.timeout(60)


def roll_out(
    strategy: str, *engines: ScriptedEngine, config: EpisodeConfig | None = None, **spec: object
) -> Trajectory:
    pool = make_fake_pool(*engines)
    episode = EpisodeSpec("e", make_query(), strategy, **spec)  # type: ignore[arg-type]
    return asyncio.run(run_episode(episode, pool, make_policy(strategy, pool), config or EpisodeConfig()))


def make_pair(**options: object) -> tuple[ScriptedEngine, ScriptedEngine]:
    small = ScriptedEngine("small", **options)  # type: ignore[arg-type]
    return small, ScriptedEngine("large", parameters=100)


def make_specs(count: int, strategy: str) -> list[EpisodeSpec]:
    return [EpisodeSpec(f"e{i}", make_query(name=f"q{i}"), strategy, seed=i % 7) for i in range(count)]


def test_an_episode_from_query_to_answer() -> None:
    trajectory = roll_out("script:0,1", seed=5, cost_weight=0.3)
    assert trajectory.models == (0, 1, 1, 1)
    assert [step.text for step in trajectory.steps] == ["A: note 0", "B: note 1", "C: note 2", "Answer: 42"]
    assert (trajectory.answer, trajectory.correct, trajectory.end) == ("42", True, "answer")
    assert (trajectory.query_id, trajectory.strategy, trajectory.seed, trajectory.cost_weight) == (
        "test/q",
        "script:0,1",
        5,
        0.3,
    )
    assert [step.confidence for step in trajectory.steps] == pytest.approx([0.9] * 4)


def test_the_models_see_the_whole_text_and_hand_over_by_text_alone() -> None:
    small, large = make_pair(chars_per_token=4)
    roll_out("script:0,1,0,1", small, large)
    assert [request.prefix for request in large.requests] == [
        "Say q.\n\nA: note 0\n\n",
        "Say q.\n\nA: note 0\n\nB: note 1\n\nC: note 2\n\n",
    ]
    assert all(request.kept_ids == () for request in small.requests + large.requests)


def test_a_wrong_answer_is_wrong_and_a_missing_gold_answer_is_no_score() -> None:
    engines = ScriptedEngine("small", write_notes(answer="7")), ScriptedEngine("large")
    assert roll_out("fixed:0", *engines).correct is False
    pool = make_fake_pool()
    spec = EpisodeSpec("e", make_query(answer=" "), "fixed:0")
    assert asyncio.run(run_episode(spec, pool, make_policy("fixed:0", pool), EpisodeConfig())).correct is None


def test_a_kept_first_token_is_continued_and_a_kept_step_taken_as_it_is() -> None:
    small, large = make_pair()
    roll_out("glimpse:9", small, large)
    peeks, continued = small.requests[::2], small.requests[1::2]
    assert [request.max_tokens for request in peeks] == [1] * 4 and not any(request.kept_ids for request in peeks)
    assert [len(request.kept_ids) for request in continued] == [1] * 4
    assert [request.seed for request in continued] == [request.seed for request in peeks]
    small.requests.clear()
    roll_out("confidence:0", small, large)
    assert len(small.requests) == 4 and not large.requests


def test_a_peek_that_is_already_the_whole_step_is_not_continued() -> None:
    small, large = make_pair(write=lambda prefix: "" if "x" in prefix else "x")
    trajectory = roll_out("glimpse:9", small, large)
    # "x" and its delimiter are two tokens; the empty step's only token is the delimiter, and it is kept as it is.
    assert [step.text for step in trajectory.steps] == ["x", ""]
    assert [len(request.kept_ids) for request in small.requests] == [0, 1, 0]


@pytest.mark.parametrize(
    ("write", "config", "end", "count"),
    [
        (lambda prefix: "", EpisodeConfig(), "empty", 1),
        (lambda prefix: " \n", EpisodeConfig(), "empty", 1),
        (lambda prefix: "again", EpisodeConfig(), "repeated", 3),
        (lambda prefix: "again", EpisodeConfig(max_repeats=5), "repeated", 5),
        (write_notes(100), EpisodeConfig(max_steps=6), "step_limit", 6),
        (write_notes(100), EpisodeConfig(max_tokens=35), "token_limit", 4),
        (write_notes(5), EpisodeConfig(max_steps=6), "answer", 6),
        (lambda prefix: f"{len(prefix)} and so on without end" * 9, EpisodeConfig(max_steps=3), "step_limit", 3),
    ],
)
def test_degenerate_episodes_end_and_are_wrong(write: object, config: EpisodeConfig, end: str, count: int) -> None:
    for strategy in ("fixed:0", "confidence:0", "glimpse:9"):
        trajectory = roll_out(strategy, *make_pair(write=write), config=config)
        assert (trajectory.end, len(trajectory.steps)) == (end, count), strategy
        assert trajectory.correct is (end == "answer") and (trajectory.answer is None) is (end != "answer")
        assert trajectory.usage.tokens_out == sum(step.tokens for step in trajectory.steps)


def test_token_limits_are_kept_to_the_token() -> None:
    trajectory = roll_out("fixed:0", *make_pair(write=write_notes(100)), config=EpisodeConfig(max_tokens=35))
    assert [step.tokens for step in trajectory.steps] == [10, 10, 10, 5]
    assert trajectory.steps[-1].finish == "length"
    trajectory = roll_out("fixed:0", config=EpisodeConfig(max_step_tokens=4, max_steps=5, max_repeats=9))
    assert [step.tokens for step in trajectory.steps] == [4] * 5
    assert trajectory.end == "step_limit"  # "Answ" and its like, cut off, are no answers


def test_a_cut_off_answer_is_no_answer() -> None:
    trajectory = roll_out("fixed:0", config=EpisodeConfig(max_step_tokens=10, max_steps=4))
    assert trajectory.steps[-1].text == "Answer: 42" and trajectory.steps[-1].finish == "length"
    assert (trajectory.end, trajectory.answer, trajectory.correct) == ("step_limit", None, False)


def test_a_pool_of_three() -> None:
    engines = [ScriptedEngine(name, parameters=10**i) for i, name in enumerate(("a", "b", "c"))]
    trajectory = roll_out("script:0,2,1,1", *engines)
    assert trajectory.models == (0, 2, 1, 1) and trajectory.large_share == 0.5
    assert [len(engine.requests) for engine in engines] == [1, 2, 1]
    with pytest.raises(ConfigError, match="from 0 to 2"):
        make_policy("fixed:3", make_fake_pool(*engines))


def test_going_on_from_a_prefix() -> None:
    whole = roll_out("random:0.5", seed=3)
    for count in range(len(whole.steps) + 1):
        assert roll_out("random:0.5", seed=3, prefix=whole.steps[:count]) == whole
    other = roll_out("fixed:1", seed=3, prefix=whole.steps[:2])
    assert other.steps[:2] == whole.steps[:2] and other.models[2:] == (1, 1)


def test_draws_differ_between_queries_and_seeds_and_agree_between_strategies() -> None:
    runner = Runner(make_fake_pool(), None, EpisodeConfig())
    first = run_specs(runner, make_specs(40, "random:0.5"))
    assert len({trajectory.models for trajectory in first}) > 8
    same = [replace(spec, seed=1) for spec in make_specs(40, "random:0.5")]
    assert len({trajectory.models for trajectory in run_specs(runner, same)}) > 8
    rarer = run_specs(runner, make_specs(40, "random:0.3"))
    pairs = [pair for a, b in zip(first, rarer, strict=True) for pair in zip(a.models, b.models, strict=True)]
    assert (0, 1) not in pairs  # the same uniforms: whoever is below .3 is below .5


def test_sampling_seeds_differ_between_steps_models_and_queries() -> None:
    small, large = make_pair()
    runner = Runner(make_fake_pool(small, large), None, EpisodeConfig(temperature=1.0))
    run_specs(runner, make_specs(20, "confidence:0.95"))
    seeds = [request.seed for request in small.requests + large.requests]
    assert len(set(seeds)) == len(seeds) == 160
    assert {request.temperature for request in small.requests} == {1.0}


@pytest.mark.parametrize("strategy", ["random:0.4", "confidence:0.5", "glimpse:0.4", "draft_verify:0.8", "blocks:2"])
def test_concurrency_and_order_do_not_change_a_trajectory(strategy: str) -> None:
    def run(concurrency: int, delay_s: float, backwards: bool) -> list[Trajectory]:
        engines = [
            ScriptedEngine(name, confidence=lambda prefix: 0.1 + len(prefix) % 9 / 10, delay_s=delay_s)
            for name in ("small", "large")
        ]
        specs = make_specs(60, strategy)
        runner = Runner(make_fake_pool(*engines), None, EpisodeConfig(), concurrency)
        results = run_specs(runner, specs[::-1] if backwards else specs)
        return results[::-1] if backwards else results

    alone = run(1, 0.0, False)
    assert all(isinstance(trajectory, Trajectory) for trajectory in alone)
    assert run(7, 0.001, True) == alone == run(256, 0.0, False)


def test_two_thousand_episodes_at_once() -> None:
    small, large = make_pair(delay_s=0.02)
    runner = Runner(make_fake_pool(small, large), None, EpisodeConfig(), concurrency=2000)
    started = time.perf_counter()
    results = run_specs(runner, make_specs(2000, "random:0.5"))
    seconds = time.perf_counter() - started
    assert all(trajectory.correct for trajectory in results)
    assert [trajectory.id for trajectory in results] == [f"e{i}" for i in range(2000)]
    assert seconds < 10  # one at a time, the delays of the small model's steps alone are 80 s


def test_a_failing_engine_fails_its_own_episodes_only() -> None:
    engines = make_pair(fails=lambda prefix: prefix.startswith("Say q3.") and "B: note" in prefix)
    results = run_specs(Runner(make_fake_pool(*engines), None, EpisodeConfig()), make_specs(6, "fixed:0"))
    assert results[3] == EpisodeFailure("e3", "EngineError: engine 'small' was told to fail")
    assert all(isinstance(result, Trajectory) for i, result in enumerate(results) if i != 3)


def test_a_hanging_engine_is_given_up_at_the_deadline() -> None:
    engines = make_pair(hangs=lambda prefix: prefix.startswith("Say q2."))
    runner = Runner(make_fake_pool(*engines), None, EpisodeConfig(timeout_s=0.3), concurrency=2)
    results = run_specs(runner, make_specs(8, "fixed:0"))
    failure = results[2]
    assert isinstance(failure, EpisodeFailure) and "0.3 s" in failure.error and failure.spec_id == "e2"
    assert sum(isinstance(result, Trajectory) for result in results) == 7


def test_an_unknown_strategy_stops_the_run_before_it_begins() -> None:
    small, large = make_pair()
    runner = Runner(make_fake_pool(small, large), None, EpisodeConfig())
    with pytest.raises(ConfigError, match="did you mean 'fixed'"):
        run_specs(runner, [*make_specs(3, "fixed:0"), *make_specs(1, "fixd:0")])
    assert not small.requests and run_specs(runner, []) == []


def test_a_runner_refuses_weights_that_it_cannot_use() -> None:
    with pytest.raises(ConfigError, match="without a router"):
        Runner(make_fake_pool(), None, EpisodeConfig()).load_router({}, 1)
    with pytest.raises(ConfigError, match="at least 1"):
        Runner(make_fake_pool(), None, EpisodeConfig(), concurrency=0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 50", "50"),
        ("Answer: ", None),
        ("B: 72 * 04 = 88", None),
        ("So it is \\boxed{\\frac{1}{2}} and \\boxed{ 7 }.", "7"),
        ("So it is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("So it is \\boxed{12", None),
    ],
)
def test_reading_an_answer(text: str, answer: str | None) -> None:
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "gold", "expected"),
    [
        ("50", "50", True),
        ("050", "50", True),
        ("50.0", "50", True),
        ("1,000", "1000", True),
        ("0.5", "1/2", True),
        ("$x+1$.", "x+1", True),
        ("5", "50", False),
        ("1/0", "1", False),
        ("1/0", "1/0", True),
        ("", "50", False),
        (None, "50", False),
        ("50", "", None),
    ],
)
def test_comparing_answers(given: str | None, gold: str, expected: bool | None) -> None:
    assert is_correct(given, make_query(answer=gold)) is expected


def test_the_step_delimiter_is_the_worlds() -> None:
    from roro_ray.world.tasks import STEP_DELIMITER as WORLD_DELIMITER

    assert WORLD_DELIMITER == STEP_DELIMITER
