"""The Judge: reads a routing trajectory and answers every criterion of its rubric with yes or no.

The text is `{query}`, the steps with `[S] ` or `[L] ` before each (who wrote it), `Rubric:` and one question
`{criterion} (yes/no)? {subject}: `; the verdict is read from the probabilities of `yes` and `no` right after it. A real
language model answers one question a call (`engine_judge`). One that we hold in memory answers all questions about a
trajectory in one forward pass: each question is a branch that sees the trajectory and itself but no other question, at
the positions it would have alone. So the packed verdict equals the one-a-call verdict, does not depend on the order of
the criteria or on the rest of the rubric, the trajectory is read once for all rubrics of its query, and verdicts can be
remembered per (trajectory, question).

Axis suffixes: _B trajectories, _T tokens, _Q questions of all trajectories, flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roro_ray.errors import ConfigError
from roro_ray.reward.judge_text import VERDICTS, make_question, serialise
from roro_ray.types import Query, Rubric, Trajectory, Verdict

_BATCH_TOKENS = 16_384
_MEMO_ENTRIES = 400_000


def make_verdict(
    rubric: Rubric, trajectory: Trajectory, yes: Sequence[float], no: Sequence[float], version: int
) -> Verdict:
    """The verdict from P(yes) and P(no) of each criterion.

    A criterion that names a step's label credits the step whose text starts with that label; step scores and
    the part of the criteria that name no step add up to the score.
    """
    total = sum(criterion.weight for criterion in rubric.criteria)
    if not total:
        return make_error_verdict(f"rubric of query {rubric.query_id!r} has no criteria", version)
    parts = [c.weight * (y - n) / total for c, y, n in zip(rubric.criteria, yes, no, strict=True)]
    steps = [0.0] * len(trajectory.steps)
    for criterion, part in zip(rubric.criteria, parts, strict=True):
        index = find_step(trajectory, criterion.label)
        if index is not None:
            steps[index] += part
    return Verdict(sum(parts), tuple(yes), tuple(steps), None, version)


def make_error_verdict(error: str, version: int = -1) -> Verdict:
    """The value that stands for a trajectory that could not be scored: dropped and counted, never 0."""
    return Verdict(float("nan"), error=error, version=version)


def find_step(trajectory: Trajectory, label: str | None) -> int | None:
    """The first step whose text starts with the label, or None."""
    if label is None:
        return None
    return next((i for i, step in enumerate(trajectory.steps) if step.text.startswith(f"{label}: ")), None)


@dataclass(frozen=True, slots=True)
class JudgeBatch:
    """Trajectories with their questions as branches.

    `ids_BT` and `positions_BT`, padded on the right; `mask_BTT` is added to the attention scores (0 or -inf);
    question q ends at token `columns_Q[q]` of row `rows_Q[q]`.
    """

    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    mask_BTT: torch.Tensor
    rows_Q: torch.Tensor
    columns_Q: torch.Tensor


def make_judge_batch(rows: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], pad: int) -> JudgeBatch:
    """Pack rows of (token ids of the serialised trajectory, token ids of each question)."""
    lengths = [len(head) + sum(map(len, questions)) for head, questions in rows]
    width = max(lengths)
    ids = torch.full((len(rows), width), pad)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    # branch 0 is the trajectory, -1 padding; a token sees earlier tokens of branch 0 and of its own branch
    branches = torch.full((len(rows), width), -1)
    marker_rows, marker_columns = [], []
    for row, (head, questions) in enumerate(rows):
        flat, places, owner = list(head), list(range(len(head))), [0] * len(head)
        for branch, question in enumerate(questions, 1):
            flat.extend(question)
            places.extend(range(len(head), len(head) + len(question)))
            owner.extend([branch] * len(question))
            marker_rows.append(row)
            marker_columns.append(len(flat) - 1)
        ids[row, : len(flat)] = torch.tensor(flat)
        positions[row, : len(flat)] = torch.tensor(places)
        branches[row, : len(flat)] = torch.tensor(owner)
    key = branches[:, None, :]
    visible = ((key == branches[:, :, None]) | (key == 0)) & torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return JudgeBatch(ids, positions, mask, torch.tensor(marker_rows), torch.tensor(marker_columns))


class Judge:
    """A causal language model in memory that judges by packed reading; `version` counts its weight updates."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, version: int = 0) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.version = version
        self.special = tuple(tokenizer.all_special_tokens)
        self.verdict_ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in VERDICTS]
        if self.verdict_ids[0] == self.verdict_ids[1]:
            raise ConfigError("the Judge's tokenizer gives 'yes' and 'no' the same first token: use another tokenizer")
        self._ids: dict[str, list[int]] = {}
        self._memo: dict[tuple[str, str], tuple[float, float]] = {}
        self._memo_version = version

    def encode(self, text: str) -> list[int]:
        """Token ids of a serialised trajectory or of a question (remembered: texts recur)."""
        ids = self._ids.get(text)
        if ids is None:
            if len(self._ids) > _MEMO_ENTRIES:
                self._ids.clear()
            ids = self._ids[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def verdict_log_probs(self, batch: JudgeBatch) -> torch.Tensor:
        """log P(yes) and log P(no) over the whole vocabulary, shape (Q, 2), with gradient where enabled."""
        hidden_BTC = self.model.model(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BTT[:, None].to(self.model.dtype),  # of another dtype it is misread in silence
            position_ids=batch.positions_BT,
            use_cache=False,
        ).last_hidden_state
        logits_QV = self.model.lm_head(hidden_BTC[batch.rows_Q, batch.columns_Q])
        log_probs_Q2: torch.Tensor = logits_QV.float().log_softmax(-1)[:, self.verdict_ids]
        return log_probs_Q2

    def read(self, items: Sequence[tuple[Query, Trajectory, Sequence[str]]]) -> list[list[tuple[float, float]]]:
        """P(yes), P(no) of each question about each trajectory; what was read before is remembered.

        The memo is by (serialised trajectory, question) and is forgotten when `version` changes.
        """
        if self._memo_version != self.version or len(self._memo) > _MEMO_ENTRIES:
            self._memo.clear()
            self._memo_version = self.version
        heads = [serialise(query, trajectory, self.special) for query, trajectory, _ in items]
        missing: dict[str, dict[str, None]] = {}
        for head, (_, _, questions) in zip(heads, items, strict=True):
            fresh = [q for q in questions if (head, q) not in self._memo]
            if fresh:
                missing.setdefault(head, {}).update(dict.fromkeys(fresh))
        self._fill(missing)
        return [[self._memo[head, q] for q in item[2]] for head, item in zip(heads, items, strict=True)]

    @torch.no_grad()
    def _fill(self, missing: dict[str, dict[str, None]]) -> None:
        self.model.eval()
        rows = []
        for head, questions in missing.items():
            packed = (self.encode(head), [self.encode(question) for question in questions])
            rows.append((len(packed[0]) + sum(map(len, packed[1])), head, list(questions), packed))
        rows.sort(key=lambda row: row[0])
        while rows:
            count = max(1, min(len(rows), _BATCH_TOKENS // rows[-1][0]))
            part, rows = rows[-count:], rows[:-count]
            batch = make_judge_batch([packed for *_, packed in part], self.tokenizer.pad_token_id or 0)
            values = iter(self.verdict_log_probs(batch).exp().tolist())
            for _, head, asked, _ in part:
                for question in asked:
                    yes, no = next(values)
                    self._memo[head, question] = (yes, no)

    def score(
        self, queries: Sequence[Query], trajectories: Sequence[Sequence[Trajectory]], rubrics: Sequence[Rubric]
    ) -> list[tuple[Verdict, ...]]:
        """One verdict per trajectory of each query under the query's rubric.

        A rubric without criteria gives error verdicts, never 0.
        """
        work: list[tuple[Query, Trajectory, Sequence[str]]] = []
        for query, group, rubric in zip(queries, trajectories, rubrics, strict=True):
            questions = [make_question(criterion, self.special) for criterion in rubric.criteria]
            work.extend((query, trajectory, questions) for trajectory in group)
        answers = iter(self.read(work))
        result = []
        for group, rubric in zip(trajectories, rubrics, strict=True):
            verdicts = []
            for trajectory in group:
                pairs = next(answers)
                verdicts.append(
                    make_verdict(rubric, trajectory, [y for y, _ in pairs], [n for _, n in pairs], self.version)
                )
            result.append(tuple(verdicts))
        return result
