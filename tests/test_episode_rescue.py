"""Episodes that go on when a model or the router is gone: nothing lost, nothing said twice, all of it charged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from fakes import ScriptedEngine, make_fake_pool, make_query

from roro_ray.config import STEP_DELIMITER, EpisodeConfig
from roro_ray.engines.protocol import StepResult
from roro_ray.errors import EngineUnavailableError
from roro_ray.routing.cost import CostLedger
from roro_ray.routing.episode import EpisodeSpec, run_episode
from roro_ray.routing.observation import Observation
from roro_ray.routing.policies import FixedPolicy, Policy
from roro_ray.routing.step_writer import StepWriter, nearest_models
from roro_ray.routing.transcript import Transcript
from roro_ray.routing.watch import EpisodeOptions
from roro_ray.types import Decision, Peek, Step, Trajectory

pytestmark = pytest.mark.timeout(60)
STEPS = ("A: one and two", "B: three", "Answer: 42")
Dying = Callable[[str], int | None]


def go_on(prefix: str) -> str:
    """The rest of the step that the prefix has begun."""
    *done, begun = prefix.split(STEP_DELIMITER)
    whole = STEPS[len(done) - 1]
    return whole[len(begun) :] if whole.startswith(begun) else whole


def make_engines(small_dies: Dying | None = None, large_dies: Dying | None = None) -> list[ScriptedEngine]:
    def never(prefix: str) -> None:
        return None

    return [
        ScriptedEngine("small", go_on, dies=small_dies or never),
        ScriptedEngine("large", go_on, parameters=100, dies=large_dies or never),
    ]


@dataclass
class Listener:
    """Keeps what it is told."""

    wants_text: bool = True
    texts: dict[int, str] = field(default_factory=dict)
    decisions: list[tuple[int, int, bool]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def on_decision(self, index: int, decision: Decision, degraded: bool) -> None:
        self.decisions.append((index, decision.model, degraded))

    def on_text(self, index: int, text: str) -> None:
        self.texts[index] = self.texts.get(index, "") + text

    def on_step(self, index: int, step: Step, seconds: float) -> None:
        self.steps.append(step)

    def wants_more(self) -> bool:
        return True


class GonePolicy:
    """A router that cannot be reached."""

    peek = Peek.NONE
    version = 7

    async def decide(self, observation: Observation) -> Decision:
        raise EngineUnavailableError("the router is gone")


class PeekingPolicy(GonePolicy):
    """Always the small model, after a look at the beginning of its step."""

    peek = Peek.FIRST_TOKEN

    async def decide(self, observation: Observation) -> Decision:
        return Decision(0, 0.0, (1.0, 0.0), version=7)


def serve(
    engines: list[ScriptedEngine], policy: Policy, listener: Listener | None = None, rescue: bool = True
) -> Trajectory:
    spec = EpisodeSpec("e", make_query(), "test")
    options = EpisodeOptions(listener, rescue)
    return asyncio.run(run_episode(spec, make_fake_pool(*engines), policy, EpisodeConfig(), options))


def in_step(index: int, tokens: int) -> Dying:
    """Dies in one step, after so many tokens."""
    return lambda prefix: tokens if prefix.count(STEP_DELIMITER) == index + 1 else None


@pytest.mark.parametrize("tokens", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("writer", [0, 1])
def test_another_model_goes_on_where_one_was_lost(tokens: int, live: bool, writer: int) -> None:
    dies = in_step(1, tokens)
    engines = make_engines(dies if writer == 0 else None, dies if writer == 1 else None)
    listener = Listener(live)
    trajectory = serve(engines, FixedPolicy(writer), listener)
    assert tuple(step.text for step in trajectory.steps) == STEPS
    assert trajectory.models == (writer, 1 - writer, writer)
    assert [step.degraded for step in trajectory.steps] == [False, True, False]
    if live:
        assert listener.texts == dict(enumerate(STEPS))
    assert listener.decisions == [
        (0, writer, False),
        (1, writer, False),
        (1, 1 - writer, True),
        (2, writer, False),
    ]


@pytest.mark.parametrize("tokens", [3, 8])
def test_what_a_lost_model_wrote_is_charged_and_counts_for_the_limit(tokens: int) -> None:
    listener = Listener()
    trajectory = serve(make_engines(large_dies=in_step(0, tokens)), FixedPolicy(1), listener)
    first = trajectory.steps[0]
    whole = len(STEPS[0]) + 1  # one token a letter, and the delimiter
    assert first.tokens == whole
    assert first.usage.tokens_out == whole
    # The large model's tokens at 200 FLOPs, the small one's at 20; and the small one read query and beginning.
    read = len("Say q.") + 1 + tokens
    assert first.usage.flops == 200 * tokens + 20 * (whole - tokens + read)


def test_a_rescued_step_keeps_to_its_limit() -> None:
    engines = make_engines(large_dies=in_step(0, 5))
    config = EpisodeConfig(max_step_tokens=8, max_steps=1)
    spec = EpisodeSpec("e", make_query(), "test")
    options = EpisodeOptions(Listener(), rescue=True)
    trajectory = asyncio.run(run_episode(spec, make_fake_pool(*engines), FixedPolicy(1), config, options))
    assert trajectory.steps[0].text == STEPS[0][:8]
    assert trajectory.steps[0].tokens == 8
    assert trajectory.steps[0].finish == "length"


def test_the_decision_of_a_rescued_step_is_nobodys() -> None:
    trajectory = serve(make_engines(large_dies=in_step(0, 2)), FixedPolicy(1), Listener())
    decision = trajectory.steps[0].decision
    assert (decision.model, decision.version, decision.log_prob) == (0, -1, 0.0)


def test_without_rescue_the_error_ends_the_episode() -> None:
    with pytest.raises(EngineUnavailableError, match="after 2 tokens"):
        serve(make_engines(large_dies=in_step(1, 2)), FixedPolicy(1), Listener(), rescue=False)


@pytest.mark.parametrize("live", [True, False])
def test_with_every_model_gone_the_error_is_told(live: bool) -> None:
    engines = make_engines(in_step(1, 2), in_step(1, 4))
    listener = Listener(live)
    with pytest.raises(EngineUnavailableError):
        serve(engines, FixedPolicy(0), listener)
    assert len(listener.steps) == 1
    assert all(engine.active == 0 for engine in engines)


def test_a_router_that_is_gone_leaves_the_dearest_model() -> None:
    listener = Listener()
    trajectory = serve(make_engines(), GonePolicy(), listener)
    assert tuple(step.text for step in trajectory.steps) == STEPS
    assert trajectory.models == (1, 1, 1)
    assert all(step.degraded for step in trajectory.steps)
    assert listener.decisions == [(index, 1, True) for index in range(3)]


def test_a_small_model_that_is_gone_at_a_peek_leaves_the_dearest() -> None:
    trajectory = serve(make_engines(in_step(1, 0)), PeekingPolicy(), Listener())
    assert tuple(step.text for step in trajectory.steps) == STEPS
    assert trajectory.models == (0, 1, 0)
    assert [step.degraded for step in trajectory.steps] == [False, True, False]


def test_a_small_model_that_is_gone_after_its_peek() -> None:
    class DiesSecond(ScriptedEngine):
        """Answers one call for each prefix."""

        def _die(self, request: object, tokens: int) -> None:
            prefixes = [asked.prefix for asked in self.requests]
            if prefixes.count(prefixes[-1]) > 1 and STEP_DELIMITER + "B" not in prefixes[-1]:
                raise EngineUnavailableError("gone")

    small = DiesSecond("small", go_on)
    listener = Listener()
    trajectory = serve([small, make_engines()[1]], PeekingPolicy(), listener)
    assert tuple(step.text for step in trajectory.steps) == STEPS
    assert listener.texts == dict(enumerate(STEPS))
    assert trajectory.models[0] == 1
    # The peek's letter is not written anew: it was charged to the small model, and counts for the step.
    assert trajectory.steps[0].tokens == len(STEPS[0]) + 1
    assert trajectory.steps[0].usage.tokens_out == len(STEPS[0]) + 1


def test_text_that_was_held_back_is_forgotten_with_its_writer() -> None:
    """A peek that ends in half a delimiter is not told; the next model must not be taken to follow it."""
    listener = Listener()
    small = ScriptedEngine("small", lambda prefix: "ab", dies=lambda prefix: 0)
    large = ScriptedEngine("large", lambda prefix: "xyz", parameters=100)
    pool = make_fake_pool(small, large)
    ledger = CostLedger([facts.flops_per_token for facts in pool.facts])
    page = Transcript(make_query(), (), pool.facts).page()
    writer = StepWriter(pool, ledger, 0.0, 0, page, 9, 0, EpisodeOptions(listener, rescue=True))
    ids = tuple(small._vocabulary.setdefault(letter, len(small._vocabulary)) for letter in "ab")
    draft = StepResult("a\n", ids, (-0.1, -0.1), "length", 2, 0.5)

    async def write() -> Step:
        return (await writer.write(Decision(0, 0.0, (1.0, 0.0)), draft))[0]

    step = asyncio.run(write())
    assert step.text == "axyz" == listener.texts[0]


def test_three_models_are_tried_from_near_to_far() -> None:
    assert nearest_models(1, 3) == [2, 0]
    assert nearest_models(0, 3) == [1, 2]
    assert nearest_models(2, 3) == [1, 0]
    names = ("small", "middle", "large")
    limits = {"middle": 3, "large": 2}
    engines = [
        ScriptedEngine(name, go_on, dies=lambda prefix, name=name: limits.get(name))  # type: ignore[misc]
        for name in names
    ]
    listener = Listener()
    trajectory = serve(engines, FixedPolicy(1), listener)
    assert tuple(step.text for step in trajectory.steps) == STEPS
    assert listener.texts == dict(enumerate(STEPS))
    assert trajectory.models == (0, 0, 0)
    # Three letters by the middle model, two by the large one, the rest by the small one.
    assert trajectory.steps[0].tokens == len(STEPS[0]) + 1
    assert trajectory.steps[0].usage.tokens_out == len(STEPS[0]) + 1
