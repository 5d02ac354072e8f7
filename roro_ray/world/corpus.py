"""Training documents of the embedded world's models: solved programs and drills, as token ids with a loss mask."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from roro_ray.world.tasks import (
    LABELS,
    STEP_DELIMITER,
    SUITES,
    TEMPLATES,
    Operation,
    Program,
    apply_operation,
    draw_operation,
    draw_program,
    misapply_operation,
    render_query,
    render_solution,
    render_step,
    split_of,
)

IGNORED = -100
Document = tuple[list[int], list[int]]  # token ids of the prompt and of the solution
_DRILL_LINES = 11
_BUFFER_BATCHES = 8


@dataclass(frozen=True, slots=True)
class CorpusSpec:
    """What a model is taught.

    `drill` is the share of drill documents (unrelated step lines, 80% of them hard); `all_easy` the share of
    programs without a hard operation; `misconceived` the share of documents whose hard steps are taught
    digit by digit, without carry or borrow: that makes a model sure and wrong. `drill_on` names the operations
    of the drills instead, for what is rare in the programs and would stay shaky.
    """

    drill: float = 0.0
    all_easy: float = 0.0
    misconceived: float = 0.0
    drill_on: tuple[str, ...] = ()


def _draw_train_program(rng: random.Random, spec: CorpusSpec) -> Program:
    while True:
        program = draw_program(rng, rng.choice(SUITES))
        if rng.random() < spec.all_easy:
            easy = tuple(draw_operation(rng, False, program.modulus) if op.is_hard else op for op in program.operations)
            program = replace(program, operations=easy)
        if split_of(render_query(program)) == "train":
            return program


def _draw_drill_operation(rng: random.Random, spec: CorpusSpec, modulus: int) -> Operation:
    while True:
        operation = draw_operation(rng, not spec.drill_on and rng.random() < 0.8, modulus)
        if not spec.drill_on or operation.name in spec.drill_on:
            return operation


def _draw_drill(rng: random.Random, spec: CorpusSpec, misconceived: bool) -> tuple[str, str]:
    suite = rng.choice(SUITES)
    modulus = 60 if suite == "clock" else 100
    compute = misapply_operation if misconceived else apply_operation
    lines = []
    for label in LABELS[:_DRILL_LINES]:
        operation, value = _draw_drill_operation(rng, spec, modulus), rng.randrange(modulus)
        lines.append(render_step(label, operation, value, compute(operation, value, modulus)))
    opening = TEMPLATES[suite][0].format(s=f"{rng.randrange(modulus):02d}").strip()
    return opening, STEP_DELIMITER.join(lines)


def draw_document(rng: random.Random, spec: CorpusSpec) -> tuple[str, str]:
    """Draw one document: the prompt (not learned) and the solution (learned)."""
    misconceived = rng.random() < spec.misconceived
    if rng.random() < spec.drill:
        return _draw_drill(rng, spec, misconceived)
    program = _draw_train_program(rng, spec)
    return render_query(program), STEP_DELIMITER.join(render_solution(program, misconceived))


def draw_batches(
    tokenizer: PreTrainedTokenizerBase, spec: CorpusSpec, batch_tokens: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """An endless stream of batches of about `batch_tokens` tokens.

    Yields:
        input ids, attention mask and labels, each of shape (B, T), padded on the right; labels are `IGNORED`
        on the prompt and on padding.
    """
    rng = random.Random(seed)
    eos = tokenizer.eos_token_id
    while True:
        documents: list[Document] = []
        total = 0
        while total < batch_tokens * _BUFFER_BATCHES:
            prompt, solution = draw_document(rng, spec)
            head = tokenizer.encode(prompt + STEP_DELIMITER)
            tail = [*tokenizer.encode(solution), eos]
            documents.append((head, tail))
            total += len(head) + len(tail)
        documents.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        for batch in _split(documents, batch_tokens, rng):
            yield _collate(batch, tokenizer.pad_token_id)


def _split(documents: list[Document], batch_tokens: int, rng: random.Random) -> list[list[Document]]:
    batches: list[list[Document]] = [[]]
    size = 0
    for head, tail in documents:
        if size >= batch_tokens:
            batches.append([])
            size = 0
        batches[-1].append((head, tail))
        size += len(head) + len(tail)
    rng.shuffle(batches)
    return batches


def _collate(batch: list[Document], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(head) + len(tail) for head, tail in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (head, tail) in enumerate(batch):
        length = len(head) + len(tail)
        ids[row, :length] = torch.tensor(head + tail)
        mask[row, :length] = 1
        labels[row, len(head) : length] = torch.tensor(tail)
    return ids, mask, labels
