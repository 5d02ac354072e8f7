"""What is decoded: a row for each sequence, the batch that they form, and what a row reads off the logits.

Axes: B rows, N last positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from roro_ray.engines.text import Ending


@dataclass(slots=True)
class Row:
    """A sequence being decoded or scored.

    `ids` are the prefix and the step so far; `start` is the length of the prefix. `log_probs` holds those of the
    step's tokens that are known: kept ids have none at first. `alternatives` are tokens that could come next, to be
    given their log-probabilities (scoring). `ending` says what ends the step (None: what ends any other).
    """

    ids: list[int]
    start: int
    max_tokens: int
    temperature: float = 0.0
    key: int = 0
    top_p: float = 1.0
    log_probs: list[float] = field(default_factory=list)
    alternatives: dict[int, float] = field(default_factory=dict)
    first_entropy: float = math.nan
    finish: str | None = None
    text: str = ""
    ending: Ending | None = None

    @property
    def needed(self) -> int:
        """How many of the last positions' logits are needed."""
        return len(self.ids) - self.start - len(self.log_probs) + 1

    @property
    def room(self) -> int:
        """Tokens that may still be decoded."""
        return self.max_tokens - (len(self.ids) - self.start)


class Batch:
    """Rows in the buffer's order, the column at which each begins, and the first column not yet computed."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.column = max(len(row.ids) for row in rows)
        self.firsts = [self.column - len(row.ids) for row in rows]


def read_scores(rows: list[Row], logits_BNV: torch.Tensor) -> None:
    """Fill first entropies and the log-probabilities of given tokens from the logits of the last positions."""
    keep = logits_BNV.shape[1]
    fresh = [i for i, row in enumerate(rows) if not row.log_probs]
    if not fresh:
        return
    log_probs_BNV = torch.log_softmax(logits_BNV.float(), -1)
    first_FV = log_probs_BNV[fresh, [keep - rows[i].needed for i in fresh]]
    entropies = torch.special.entr(first_FV.exp()).sum(-1).tolist()
    at: list[tuple[int, int, int]] = []
    for i, entropy in zip(fresh, entropies, strict=True):
        row = rows[i]
        row.first_entropy = entropy
        at.extend((i, keep - row.needed + j, token) for j, token in enumerate(row.ids[row.start :]))
        at.extend((i, keep - 1, token) for token in row.alternatives)
    if not at:
        return
    which, positions, tokens = (list(part) for part in zip(*at, strict=True))
    for (i, position, token), log_prob in zip(at, log_probs_BNV[which, positions, tokens].tolist(), strict=True):
        if position == keep - 1:
            rows[i].alternatives[token] = log_prob
        else:
            rows[i].log_probs.append(log_prob)
