"""Scores final answers: exact ones in process, mathematical ones by math-verify in processes of their own.

Three outcomes, never mixed up: right, wrong (a model that gave no answer is wrong), and an error value where the answer
could not be checked, which is counted and drops out of every accuracy and reward.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from roro_ray.data.grader_pool import GraderPool, Task
from roro_ray.data.verify import compare_plainly, is_correct, read_answer, read_boxes, read_final_answer
from roro_ray.errors import ConfigError
from roro_ray.types import Query

if TYPE_CHECKING:
    from roro_ray.config import DataConfig

# No answer of a benchmark has 300 characters; the parser's time grows faster than its input.
_LONGEST_ANSWER = 4000
_SHOWN = 300
# Control characters, zero-width ones and marks of direction change no value.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
_SIGNS = str.maketrans({"\u2212": "-", "°": "^\\circ ", "∞": "\\infty ", "\u00a0": " ", "\u202f": " "})
_ROOT = re.compile(r"√\s*(\d+|[a-z])")


@dataclass(frozen=True, slots=True)
class Score:
    """Whether an answer is right (None: it could not be checked, and `error` says why), and what it says."""

    correct: bool | None
    answer: str | None = None
    error: str | None = None


def is_mathematical(query: Query) -> bool:
    """Whether a query's answers are compared by math-verify."""
    return query.grader.partition(":")[0] == "math"


def read_tolerance(query: Query) -> float:
    """How far a mathematical answer may be off: 0.1 where the grader is `math:0.1`, 0 where it is `math`.

    Raises:
        ConfigError: something else stands behind the colon.
    """
    _, _, given = query.grader.partition(":")
    try:
        tolerance = float(given or 0)
    except ValueError:
        tolerance = math.nan
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"query {query.id}: grader {query.grader!r}, expected exact, math, or math:TOLERANCE.")
    return tolerance


class AnswerScorer:
    """Scores answers from any number of episodes at once; one for each rollout worker.

    Pickles as its settings: the copy has processes and counts of its own. Use it from one event loop at a time.

    Args:
        processes: how many answers are checked at once.
        timeout_s: of one check, from when it begins.
        memory_mb: address space of each process, in MiB.
    """

    def __init__(self, processes: int = 2, timeout_s: float = 10.0, memory_mb: int = 1024) -> None:
        self._settings = (processes, timeout_s, memory_mb)
        self._pool: GraderPool | None = None
        self.counts: Counter[str] = Counter()

    @classmethod
    def from_config(cls, data: DataConfig) -> AnswerScorer:
        """The scorer that `data.graders` and `data.grade_timeout_s` ask for."""
        return cls(data.graders, data.grade_timeout_s)

    async def score(self, text: str | None, query: Query) -> Score:
        """Score the final answer's text (the conclusion behind a thinking block, or the last step).

        `counts` then counts it as `right`, `wrong`, or by what failed: `timeout`, `crash`, `gold` (the gold answer
        cannot be read), `long`.

        Raises:
            ConfigError: the query's grader does not exist, or math-verify is not installed.
            DataError: no grader process can be started.
        """
        score, failure = await self._score(text, query)
        self.counts[failure or {True: "right", False: "wrong", None: "gold"}[score.correct]] += 1
        return score

    @property
    def pids(self) -> list[int]:
        """The grader processes alive."""
        return self._pool.pids if self._pool is not None else []

    def close(self) -> None:
        """End the processes; the next mathematical answer would start new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._settings

    async def _score(self, text: str | None, query: Query) -> tuple[Score, str | None]:
        if query.grader == "exact":
            answer = read_answer(text) if text is not None else None
            correct = is_correct(answer, query)
            return Score(correct, answer, None if correct is not None else "the query has no gold answer"), None
        if not is_mathematical(query):
            raise ConfigError(f"query {query.id}: grader {query.grader!r}, expected exact, math, or math:TOLERANCE.")
        return await self._score_mathematics(text, query, read_tolerance(query))

    async def _score_mathematics(self, text: str | None, query: Query, tolerance: float) -> tuple[Score, str | None]:
        if not query.answer.strip():
            return Score(None, None, "the query has no gold answer"), "gold"
        text = _ROOT.sub(r"\\sqrt{\1}", _INVISIBLE.sub("", text or "").translate(_SIGNS))
        answer = read_final_answer(text)
        if not text.strip() or (answer is None and "\\boxed" in text):
            return Score(False), None
        if answer is not None:
            if len(answer) > _LONGEST_ANSWER:
                error = f"an answer of {len(answer):,} characters, expected at most {_LONGEST_ANSWER:,}"
                return Score(None, answer[:_SHOWN], error), "long"
            plain = compare_plainly(answer, query.answer)
            if plain or (plain is False and not tolerance):
                return Score(plain, answer), None
        return await self._ask(text, query, tolerance, answer)

    async def _ask(self, text: str, query: Query, tolerance: float, answer: str | None) -> tuple[Score, str | None]:
        if self._pool is None:
            if importlib.util.find_spec("math_verify") is None:
                raise ConfigError("math-verify is not installed: pip install 'math-verify[antlr4_13_2]'.")
            self._pool = GraderPool(*self._settings)
        boxes = tuple(box for box in read_boxes(text) if len(box) <= _LONGEST_ANSWER)
        task = Task(boxes, text[-_LONGEST_ANSWER:], query.answer, tolerance)
        grade = await asyncio.wrap_future(self._pool.submit(task))
        shown = grade.answer if grade.answer is not None else answer if grade.correct is not False else None
        return Score(grade.correct, shown and shown[:_SHOWN], grade.error), grade.failure
