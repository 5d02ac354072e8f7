"""The nouns of routing, in the order in which a reader meets them.

A router sends each step of a query to one model of a pool. Model indices run from cheap to dear:
0 is the cheapest ("small"), the last one the dearest ("large").
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum


class Peek(StrEnum):
    """What of the cheapest model's next step the router sees before it decides."""

    NONE = "none"
    FIRST_TOKEN = "first_token"
    STEP = "step"


class PairKind(StrEnum):
    """By what a preference pair was ordered."""

    OUTCOME = "outcome"
    COST = "cost"
    PROCESS = "process"


@dataclass(frozen=True, slots=True)
class Query:
    """A problem to solve; `answer` is the gold answer and is never shown to router, Rubricor or Judge.

    `grader` says how an answer is compared with it: `exact` (text and numbers), `math` (math-verify), or
    `math:0.1` (within that error).
    """

    id: str
    suite: str
    split: str
    text: str
    answer: str
    grader: str = "exact"


@dataclass(frozen=True, slots=True)
class Usage:
    """What was computed, in tokens and FLOPs, and its price.

    `flops` counts 2 x (active) parameters for every token decoded or prefilled, by every model touched, the router
    included; `flops_decode` only the tokens decoded into kept or discarded text (the papers' convention). `usd` is the
    price of the tokens in US dollars, 0 where the models have no prices.
    """

    tokens_in: int = 0
    tokens_out: int = 0
    flops: float = 0.0
    flops_decode: float = 0.0
    usd: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            self.flops + other.flops,
            self.flops_decode + other.flops_decode,
            self.usd + other.usd,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """One routing decision: the model chosen, the policy's probabilities over the pool, and who decided.

    `version` is the version of the router's weights that decided (-1 for a policy without weights). `signal` is
    what a threshold rule compared with its threshold, where it had one.
    """

    model: int
    log_prob: float
    probabilities: tuple[float, ...]
    version: int = -1
    signal: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a solution: who wrote it, what, how sure, at what cost and by which decision.

    `model` is -1 where nobody of the pool wrote it (a client gave it). `text` has no trailing delimiter. `confidence`
    is the mean probability of the step's tokens under the model that wrote it, `confidence_min` the smallest.
    `finish` is `delimiter`, `stop` (end of sequence), `marker` (the end of the thinking block) or `length` (token
    limit). `discarded` counts the tokens of a draft that was thrown away before this step. `features` are the
    scalar signals that the router saw when it decided (see `routing.observation`). `degraded`: the model that
    should have written, or the router, was gone, so that another model wrote.
    """

    model: int
    text: str
    tokens: int
    confidence: float
    confidence_min: float
    finish: str
    decision: Decision
    usage: Usage
    discarded: int = 0
    features: tuple[float, ...] = ()
    degraded: bool = False


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One routed solution of one query.

    `correct` is None where the answer could not be scored (an error value, never False), and `error` says why.
    `conclusion` is the final answer behind the thinking block of models that have one: written by one fixed model,
    whatever the policy, and so no routed step. `end` says why the episode stopped: `answer`, `stop` (a model ended
    its text without an answer), `step_limit`, `token_limit`, `repeated`, `empty`, `stop_string` (the client asked
    for no more).
    """

    id: str
    query_id: str
    suite: str
    strategy: str
    seed: int
    cost_weight: float
    steps: tuple[Step, ...]
    answer: str | None
    correct: bool | None
    end: str
    usage: Usage
    conclusion: Step | None = None
    error: str | None = None

    @property
    def models(self) -> tuple[int, ...]:
        """Who wrote each step."""
        return tuple(step.model for step in self.steps)

    @property
    def large_share(self) -> float:
        """Share of steps written by a model other than the cheapest, weighted by its index in the pool."""
        if not self.steps:
            return 0.0
        top = max(len(self.steps[0].decision.probabilities) - 1, 1)
        return sum(step.model for step in self.steps) / (top * len(self.steps))


@dataclass(frozen=True, slots=True)
class Criterion:
    """One yes/no question of a rubric about how the query's steps should be routed.

    `label` names the step that the criterion is about (`B`), or is None where it is about the whole
    trajectory; `model` is `small` or `large` where the criterion says who should write it.
    """

    text: str
    weight: float
    label: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Rubric:
    """Three to seven weighted criteria for one query, and the version of the Rubricor that wrote them."""

    query_id: str
    criteria: tuple[Criterion, ...]
    text: str
    version: int = -1


@dataclass(frozen=True, slots=True)
class Verdict:
    """The Judge's reading of one trajectory under one rubric.

    `score` in [-1, 1] is sum_k w_k (p_k(yes) - p_k(no)) / sum_k w_k; `step_scores` credits each step with the
    criteria that name it (0 where none does). `error` is None, or why no score could be given: then `score`
    is NaN and the trajectory must be dropped, not scored 0.
    """

    score: float
    yes: tuple[float, ...] = ()
    step_scores: tuple[float, ...] = ()
    error: str | None = None
    version: int = -1


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two trajectories of one query, the preferred one first, and the kind of evidence that ordered them."""

    query_id: str
    suite: str
    fold: int
    kind: PairKind
    preferred: str
    rejected: str
    margin: float


@dataclass(frozen=True, slots=True)
class Group:
    """G rollouts of one query at one cost weight under one rubric: the unit in which advantages are centred."""

    id: int
    query: Query
    cost_weight: float
    trajectories: tuple[Trajectory, ...]
    verdicts: tuple[Verdict, ...] = ()
    weights_version: int = -1
    errors: tuple[str, ...] = field(default=())

    def with_verdicts(self, verdicts: tuple[Verdict, ...]) -> Group:
        """The same group with the Judge's verdicts, one per trajectory."""
        return replace(self, verdicts=verdicts)
