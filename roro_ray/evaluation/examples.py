"""Example trajectories for the report, chosen by a rule and not by hand.

Per suite: the first test query that the small model alone gets wrong and the router right with some small and
some large steps; and, over all suites, the first two that the router gets wrong though the large model alone
is right, because a report that only shows what went well teaches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from roro_ray.evaluation.methods import Host, Setting, fixed_setting, run_settings
from roro_ray.evaluation.metrics import Sweep
from roro_ray.types import Query, Rubric, Trajectory, Verdict

Explain = Callable[[Sequence[Query], Sequence[Trajectory]], Sequence[tuple[Rubric | None, Verdict | None]]]

_FAILURES_SHOWN = 2


@dataclass(frozen=True, slots=True)
class ExampleStep:
    """One step: who wrote it, what, how likely the router was to call the large model, the writer's confidence.

    `small_text` is what the small model wrote at the same place when it worked alone, None past its end.
    """

    model: str
    large: bool
    text: str
    probability: float
    confidence: float
    small_text: str | None


@dataclass(frozen=True, slots=True)
class ExampleCriterion:
    """One line of the rubric and the Judge's P(yes), None where no verdict was given."""

    text: str
    weight: float
    yes: float | None


@dataclass(frozen=True, slots=True)
class Example:
    """A routed solution with everything that the report shows beside it."""

    suite: str
    query: str
    gold: str
    answer: str | None
    correct: bool
    large_share: float
    oracle_share: float | None
    setting: str
    steps: tuple[ExampleStep, ...]
    rubric: tuple[ExampleCriterion, ...] = ()
    score: float | None = None


def choose_examples(sweeps: dict[str, Sweep], queries: Sequence[Query]) -> list[int]:
    """Positions of the queries to show, by the rule of this module."""
    small, large, router = (sweeps[name].operating for name in ("small", "large", "roro"))
    right, share = router.of("accuracy"), router.of("cost_share")
    chosen: dict[str, int] = {}
    failures: list[int] = []
    for i, query in enumerate(queries):
        saved = right[i] == 1 and small.of("accuracy")[i] == 0 and 0 < share[i] < 1
        if saved and query.suite not in chosen:
            chosen[query.suite] = i
        if right[i] == 0 and large.of("accuracy")[i] == 1 and len(failures) < _FAILURES_SHOWN:
            failures.append(i)
    return [*chosen.values(), *failures]


def collect_examples(
    host: Host,
    sweeps: dict[str, Sweep],
    queries: Sequence[Query],
    setting: Setting,
    seed: int,
    model_names: Sequence[str],
    explain: Explain | None,
) -> list[Example]:
    """Roll the chosen queries out again (the same spec gives the same trajectory) and put the examples together.

    Args:
        setting: the router's operating point.
        explain: writes each query's rubric and judges the trajectory under it; None shows no rubrics.
    """
    places = choose_examples(sweeps, queries)
    shown = [queries[i] for i in places]
    if not shown:
        return []
    routed, alone = run_settings(host, "roro", [setting, fixed_setting(0, "small")], shown, seed)
    kept = [(i, query, t, s) for i, query, t, s in zip(places, shown, routed, alone, strict=True) if _is_shown(t)]
    trajectories = [t for _, _, t, _ in kept if isinstance(t, Trajectory)]
    explained = explain([query for _, query, _, _ in kept], trajectories) if explain else [(None, None)] * len(kept)
    oracle = sweeps["oracle"].operating.of("cost_share") if "oracle" in sweeps else None
    examples = []
    for (i, query, _, small), trajectory, (rubric, verdict) in zip(kept, trajectories, explained, strict=True):
        bound = float(oracle[i]) if oracle is not None and oracle[i] == oracle[i] else None
        examples.append(_make_example(query, trajectory, small, bound, setting, model_names, rubric, verdict))
    return examples


def _is_shown(outcome: object) -> bool:
    return isinstance(outcome, Trajectory) and outcome.correct is not None


def _make_example(
    query: Query,
    trajectory: Trajectory,
    small: object,
    oracle_share: float | None,
    setting: Setting,
    model_names: Sequence[str],
    rubric: Rubric | None,
    verdict: Verdict | None,
) -> Example:
    small_texts = [step.text for step in small.steps] if isinstance(small, Trajectory) else []
    yes = verdict.yes if verdict is not None and verdict.error is None else ()
    return Example(
        suite=query.suite,
        query=query.text,
        gold=query.answer,
        answer=trajectory.answer,
        correct=bool(trajectory.correct),
        large_share=trajectory.large_share,
        oracle_share=oracle_share,
        setting=setting.label,
        steps=tuple(
            ExampleStep(
                model=model_names[step.model],
                large=step.model > 0,
                text=step.text,
                probability=sum(step.decision.probabilities[1:]),
                confidence=step.confidence_min,
                small_text=small_texts[i] if i < len(small_texts) else None,
            )
            for i, step in enumerate(trajectory.steps)
        ),
        rubric=tuple(
            ExampleCriterion(criterion.text, criterion.weight, yes[k] if k < len(yes) else None)
            for k, criterion in enumerate(rubric.criteria if rubric else ())
        ),
        score=verdict.score if verdict is not None and yes else None,
    )
