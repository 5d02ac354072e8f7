"""Process quality of trajectories from interventions: was each large step needed, was a needed one missed?

At the prefix of a step, the small model's step and the large model's step are each continued by the large
model to the end; the value of a step is the share of its continuations that end right. A large step whose
value is not above the small one's is waste; a small step whose value is below the large one's is a miss.
Where both values are 0 the prefix is dead (an earlier error stands), and the final answers are compared
instead: a step that does not even change them did not matter. quality = 1 - (waste + 2 miss) / steps.

Nothing here looks at the text of rubrics or at the Judge, so that process pairs are evidence from outside.
All interventions of all trajectories are asked for at once, each different one only once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from roro_ray.config import PairsConfig
from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.types import Query, Step, Trajectory

Run = Callable[[Sequence[EpisodeSpec]], Sequence[Trajectory | EpisodeFailure]]
SOURCES = ("interventions", "agreement", "confidence")
_Key = tuple[str, tuple[str, ...], int]


@dataclass(frozen=True, slots=True)
class ProcessQuality:
    """Quality in [-1, 1], its counts, and for each step `needed`, `waste`, `miss` or `idle` (rightly small)."""

    quality: float
    waste: int
    miss: int
    steps: tuple[str, ...]


@dataclass(slots=True)
class _Outcome:
    """What the continuations of one step ended in."""

    right: int = 0
    total: int = 0
    answers: Counter[str | None] = field(default_factory=Counter)
    step_text: str | None = None

    @property
    def value(self) -> float:
        return self.right / self.total if self.total else 0.0

    @property
    def answer(self) -> str | None:
        return min(self.answers.items(), key=lambda item: (-item[1], str(item[0])))[0] if self.answers else None


def measure_process(
    queries: Sequence[Query],
    trajectories: Sequence[Trajectory],
    run: Run,
    config: PairsConfig,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, ProcessQuality]:
    """The process quality of each trajectory, by id; a trajectory with a failed intervention is left out.

    `run` rolls out episode specs, results in order. `config.process_source` is `interventions`,
    `agreement` (the two models' steps at the prefix say the same: no continuation to the end counts), or `confidence`
    (no rollout at all: see `reward.process_estimate`).

    Raises:
        ConfigError: the source does not exist.
    """
    if config.process_source not in SOURCES:
        raise ConfigError(
            f"pairs.process_source is {config.process_source!r}: expected one of {', '.join(SOURCES)}"
            f"{did_you_mean(config.process_source, SOURCES)}"
        )
    if config.process_source == "confidence":
        from roro_ray.reward.process_estimate import estimate_process

        return estimate_process(trajectories)
    repeats = config.continuations if temperature > 0 and config.process_source == "interventions" else 1
    by_id = {query.id: query for query in queries}
    asked: dict[_Key, list[EpisodeSpec]] = {}
    for trajectory in trajectories:
        for index in range(len(trajectory.steps)):
            for model in (0, _dearest(trajectory)):
                key = _key(trajectory, index, model)
                if key not in asked:
                    query = by_id[trajectory.query_id]
                    asked[key] = _make_specs(
                        query, trajectory.steps[:index], model, _dearest(trajectory), repeats, seed, len(asked)
                    )
    outcomes = _run_all(asked, run)
    result = {}
    for trajectory in trajectories:
        quality = _measure_one(trajectory, outcomes, config.process_source == "agreement")
        if quality is not None:
            result[trajectory.id] = quality
    return result


def _dearest(trajectory: Trajectory) -> int:
    return max(len(trajectory.steps[0].decision.probabilities) - 1, 1)


def _key(trajectory: Trajectory, index: int, model: int) -> _Key:
    return trajectory.query_id, tuple(step.text for step in trajectory.steps[:index]), model


def _make_specs(
    query: Query, prefix: tuple[Step, ...], model: int, dearest: int, repeats: int, seed: int, number: int
) -> list[EpisodeSpec]:
    """The episodes that go on from the prefix with one step by `model` and the rest by the dearest model."""
    script = ",".join(map(str, [*(step.model for step in prefix), model, dearest]))
    return [
        EpisodeSpec(f"{query.id}/process/{number}/{k}", query, f"script:{script}", seed=seed + k, prefix=prefix)
        for k in range(repeats)
    ]


def _run_all(asked: dict[_Key, list[EpisodeSpec]], run: Run) -> dict[_Key, _Outcome]:
    """Outcomes by key; a key with a continuation that failed or could not be scored is left out."""
    results = iter(run([spec for specs in asked.values() for spec in specs]))
    outcomes = {}
    for key, specs in asked.items():
        outcome = _Outcome()
        failed = False
        for _ in specs:
            ended = next(results)
            if isinstance(ended, EpisodeFailure) or ended.correct is None:
                failed = True
                continue
            outcome.right += ended.correct
            outcome.total += 1
            outcome.answers[ended.answer] += 1
            index = len(key[1])
            outcome.step_text = ended.steps[index].text if index < len(ended.steps) else None
        if not failed:
            outcomes[key] = outcome
    return outcomes


def _measure_one(trajectory: Trajectory, outcomes: dict[_Key, _Outcome], agreement: bool) -> ProcessQuality | None:
    kinds = []
    for index, step in enumerate(trajectory.steps):
        small = outcomes.get(_key(trajectory, index, 0))
        large = outcomes.get(_key(trajectory, index, _dearest(trajectory)))
        if small is None or large is None:
            return None
        if agreement:
            matters = small.step_text != large.step_text
        elif small.value == 0 and large.value == 0:
            matters = small.answer != large.answer
        else:
            matters = large.value > small.value
        if step.model:
            kinds.append("needed" if matters else "waste")
        else:
            kinds.append("miss" if matters else "idle")
    return make_quality(kinds)


def make_quality(kinds: Sequence[str]) -> ProcessQuality:
    """The quality of a trajectory of which each step is `needed`, `waste`, `miss` or `idle`."""
    waste, miss = kinds.count("waste"), kinds.count("miss")
    return ProcessQuality(1 - (waste + 2 * miss) / len(kinds), waste, miss, tuple(kinds))
