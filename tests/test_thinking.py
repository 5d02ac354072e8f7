"""Solutions with a thinking block, and how they are handed from model to model: ids where they can be, else text."""

import asyncio
from collections.abc import Callable

import pytest
from fakes import CharacterEngine, make_fake_pool, make_query

from roro_ray.config import EpisodeConfig
from roro_ray.engines.formats import PLAIN, PromptFormat
from roro_ray.engines.protocol import Prices
from roro_ray.errors import ConfigError
from roro_ray.routing.episode import EpisodeSpec, run_episode
from roro_ray.routing.policies import make_policy
from roro_ray.types import Trajectory

pytestmark = pytest.mark.timeout(30)
CHAT = PromptFormat("<u>", "</u><a><think>\n", "</think>", "\n\n", ("<u>", "</u>", "<a>"))
OTHER = PromptFormat("[user]", "[model]<think>\n", "</think>", "\n\n")
FINAL = "It is \\boxed{42}."


def think(steps: int, closing: str = "So that is it.\n</think>\n\n") -> Callable[[str], str]:
    """A writer of numbered paragraphs, then the end of the thinking block, then the answer."""

    def write(prefix: str) -> str:
        if "</think>" in prefix:
            return FINAL
        done = prefix.partition("<think>\n")[2].count("\n\n")
        return f"Thought {done}.\n\n" if done < steps else closing

    return write


def roll_out(strategy: str, *engines: CharacterEngine, **settings: object) -> Trajectory:
    pool = make_fake_pool(*engines)
    spec = EpisodeSpec("e", make_query(), strategy)
    config = EpisodeConfig(max_step_tokens=200, **settings)  # type: ignore[arg-type]
    return asyncio.run(run_episode(spec, pool, make_policy(strategy, pool), config))


def make_pair(write: Callable[[str], str], **other: object) -> tuple[CharacterEngine, CharacterEngine]:
    small = CharacterEngine("small", write, format=CHAT)
    settings: dict = {"format": CHAT, "parameters": 100, **other}
    return small, CharacterEngine("large", write, **settings)


def test_the_final_answer_follows_the_thinking_block_and_is_no_routed_step() -> None:
    small, large = make_pair(think(3))
    trajectory = roll_out("script:0,1,0", small, large)
    assert [step.text for step in trajectory.steps] == ["Thought 0.", "Thought 1.", "Thought 2.", "So that is it.\n"]
    assert [step.finish for step in trajectory.steps] == ["delimiter"] * 3 + ["marker"]
    assert trajectory.conclusion is not None and trajectory.conclusion.text == FINAL
    assert trajectory.conclusion.model == 1 and trajectory.models == (0, 1, 0, 0)
    assert (trajectory.end, trajectory.answer, trajectory.correct) == ("answer", "42", True)
    assert trajectory.large_share == 1 / 4
    final = large.requests[-1]
    thoughts = "Thought 0.\n\nThought 1.\n\nThought 2.\n\nSo that is it.\n"
    assert final.prefix == f"<u>Say q.</u><a><think>\n{thoughts}</think>\n\n"
    assert (final.delimiter, final.stops) == ("", ())


def test_every_method_has_its_final_answer_by_the_same_model() -> None:
    writers = {}
    for by in ("large", "small", "last"):
        for strategy in ("fixed:0", "fixed:1", "periodic:2"):
            conclusion = roll_out(strategy, *make_pair(think(2)), answer_by=by).conclusion
            assert conclusion is not None
            writers[by, strategy] = conclusion.model
    assert {strategy: writers["large", strategy] for strategy in ("fixed:0", "fixed:1", "periodic:2")} == {
        "fixed:0": 1,
        "fixed:1": 1,
        "periodic:2": 1,
    }
    assert {writers["small", strategy] for strategy in ("fixed:0", "fixed:1", "periodic:2")} == {0}
    assert (writers["last", "fixed:0"], writers["last", "fixed:1"]) == (0, 1)


def test_a_block_that_no_model_closes_is_closed_at_the_limit() -> None:
    small, large = make_pair(think(99))
    trajectory = roll_out("fixed:0", small, large, max_steps=5)
    assert len(trajectory.steps) == 5 and trajectory.correct is True
    assert large.requests[-1].prefix.endswith("Thought 4.\n\n</think>\n\n")
    assert large.requests[-1].prefix.count("</think>") == 1


def test_an_answer_inside_the_thinking_block_ends_nothing() -> None:
    def write(prefix: str) -> str:
        if "</think>" in prefix:
            return FINAL
        return "Maybe \\boxed{41}.\n\n" if "Maybe" not in prefix else "No.\n</think>"

    trajectory = roll_out("fixed:0", *make_pair(write))
    assert (len(trajectory.steps), trajectory.answer) == (2, "42")


def test_a_conclusion_without_an_answer_says_why_the_thinking_ended() -> None:
    def write(prefix: str) -> str:
        return "I do not know." if "</think>" in prefix else "Hm.</think>"

    ended = roll_out("fixed:0", *make_pair(write))
    assert (ended.end, ended.answer, ended.correct) == ("stop", None, False)
    limited = roll_out("fixed:0", *make_pair(lambda p: "No." if "</think>" in p else f"{len(p)}\n\n"), max_steps=2)
    assert (limited.end, limited.correct) == ("step_limit", False)


def test_models_of_one_tokenizer_hand_over_ids_and_encode_nothing_twice() -> None:
    small, large = make_pair(think(6))
    trajectory = roll_out("script:0,1,0,1,1,0", small, large)
    assert trajectory.correct is True
    first, *others = [request for engine in (small, large) for request in engine.requests]
    assert first.known is None
    # Each engine checks that known ids spell what they claim; here that they claim all there is but the block's end.
    assert all(request.known is not None for request in others)
    for request in others:
        assert request.known is not None
        rest = request.prefix[request.known.characters :]
        assert rest in ("", "\n\n"), rest


def test_across_tokenizers_the_text_is_handed_over() -> None:
    write = think(6)
    small, large = make_pair(write, tokenizer="others", offset=7)
    trajectory = roll_out("script:0,1,0,1,1,0", small, large)
    assert trajectory.correct is True
    told = [request.known.characters if request.known else 0 for request in large.requests]
    assert told[0] == 0 and all(later > 0 for later in told[1:])
    # What the other wrote in between is left to encode, and nothing else.
    assert large.requests[1].prefix[told[1] :] == "Thought 2.\n\n"


def test_across_families_each_model_reads_its_own_template() -> None:
    small, large = make_pair(think(2), tokenizer="others", format=OTHER, offset=3)
    assert roll_out("script:0,1", small, large).correct is True
    assert small.requests[0].prefix == "<u>Say q.</u><a><think>\n"
    assert large.requests[0].prefix == "[user]Say q.[model]<think>\nThought 0.\n\n"


def test_a_step_whose_ids_run_on_behind_the_blank_line_is_handed_over_as_text() -> None:
    class Careless(CharacterEngine):
        async def generate_step(self, request):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            result = await super().generate_step(request)
            return replace(result, token_ids=(*result.token_ids, 99), exact=False)

    small = Careless("small", think(3), format=CHAT)
    large = CharacterEngine("large", think(3), format=CHAT)
    assert roll_out("script:0,1,0", small, large).correct is True  # the engines compare all ids that they are given


def test_tiny_paragraphs_are_merged() -> None:
    def write(prefix: str) -> str:
        if "</think>" in prefix:
            return FINAL
        return "A.\n\nB.\n\nA longer paragraph.\n\nC.\n\n</think>"[len(prefix.partition("<think>\n")[2]) :]

    steps = roll_out("fixed:0", *make_pair(write), min_step_tokens=12).steps
    assert [step.text for step in steps] == ["A.\n\nB.\n\nA longer paragraph.", "C.\n\n"]


def test_control_tokens_in_a_query_stay_out_of_the_prompt() -> None:
    assert CHAT.open("stop</u><a>me") == "<u>stopme</u><a><think>\n"


def test_thinking_and_other_models_do_not_share_a_pool() -> None:
    small, large = make_pair(think(1), format=PLAIN)
    with pytest.raises(ConfigError, match="small thinks, large does not"):
        roll_out("fixed:0", small, large)


def test_hundreds_of_steps_are_not_cut_short() -> None:
    small, large = make_pair(think(700))
    trajectory = roll_out("periodic:3", small, large, max_steps=1000, max_tokens=100_000)
    assert len(trajectory.steps) == 701 and trajectory.correct is True


def test_prices_are_charged_for_what_is_read_read_again_and_written() -> None:
    price = Prices(read=1.0, cached=0.1, written=10.0)
    small = CharacterEngine("small", think(1), format=CHAT, prices=price)
    large = CharacterEngine("large", think(1), format=CHAT, prices=price)
    trajectory = roll_out("fixed:0", small, large)
    prompt, first, second = len(CHAT.open("Say q.")), len("Thought 0.\n\n"), len("So that is it.\n</think>")
    assert trajectory.steps[0].usage.usd == pytest.approx(prompt + 10 * first)
    assert trajectory.steps[1].usage.usd == pytest.approx(0.1 * (prompt + first) + 10 * second)
    assert trajectory.conclusion is not None
    whole = prompt + first + second + len("\n\n")
    assert trajectory.conclusion.usage.usd == pytest.approx(whole + 10 * (len(FINAL) + 1))
    assert trajectory.usage.usd == pytest.approx(sum(s.usage.usd for s in (*trajectory.steps, trajectory.conclusion)))
