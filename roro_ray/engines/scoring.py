"""Scoring given continuations: which rows a model must read for them, and what their probabilities are then.

A row reads all but a choice's last token. Choices that part only there (such as yes and no) share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roro_ray.engines.protocol import ChoiceScores
from roro_ray.engines.rows import Row


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Ask for the probabilities of given continuations of a prefix, under an adapter (empty: the base model)."""

    prefix: str
    choices: tuple[str, ...]
    adapter: str = ""


class ScoreRows:
    """The rows of a batch of score requests, each read once whoever asks for it."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, ...], Row] = {}

    @property
    def rows(self) -> list[Row]:
        """What the model must read."""
        return list(self._rows.values())

    def add(self, prefix: list[int], choice: Sequence[int]) -> tuple[Row | None, int]:
        """The row that reads all but the last token of a choice (None for an empty one), and that token."""
        if not choice:
            return None, 0
        read = (*prefix, *choice[:-1])
        row = self._rows.setdefault(read, Row(list(read), len(prefix), max_tokens=len(choice) - 1))
        row.alternatives[choice[-1]] = 0.0
        return row, choice[-1]


def read_choices(prefix_tokens: int, found: Sequence[tuple[Row | None, int]]) -> ChoiceScores:
    """The scores of one request from its rows, once the model has read them."""
    logs = [[*row.log_probs, row.alternatives[last]] if row else [] for row, last in found]
    return ChoiceScores(
        log_probs=tuple(map(sum, logs)),
        tokens=tuple(map(len, logs)),
        min_log_probs=tuple(min(values, default=0.0) for values in logs),
        prefix_tokens=prefix_tokens,
    )
