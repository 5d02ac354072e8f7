"""Checking answers."""

from __future__ import annotations

from dataclasses import dataclass

from roro_ray.types import Query


@dataclass(frozen=True, slots=True)
class Score:
    """Whether an answer is right (None: it could not be checked, and `error` says why), and what it says."""

    correct: bool | None
    answer: str | None = None
    error: str | None = None


class AnswerScorer:
    async def score(self, text: str | None, query: Query) -> Score:
        raise NotImplementedError
