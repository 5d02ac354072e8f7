"""Rubrics for queries that label no steps: what a criterion about a real problem may say.

A query of the embedded world labels its steps, and a criterion must quote one of them. A real problem has no labels, so
there is nothing to quote, and what remains checkable is what a criterion is about. It must say which of the two models
writes which kind of step. It may count steps and repeat numbers of the query, but must bring no other number: the
Rubricor would state results, and the Judge would reward whoever reaches them. And it must neither state nor ask whether
an answer is right: that is the outcome reward's business, and a Judge that looks for right answers is a verifier in
disguise, whose guesses would be counted twice.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from roro_ray.types import Criterion, Query

_STEP = re.compile(r"([A-Z]): (.+?)(?=(?:[;.]? *[A-Z]: )|[;.]? *$)")
_WRITER = re.compile(r"\b(small|large)(?:r|er|st|est)?[- ](?:language )?models?\b", re.IGNORECASE)
_SUBJECT = r"(?:answers?|results?|solutions?|conclusions?|outcomes?|trajector(?:y|ies)|responses?)"
_RIGHT = r"(?:(?:in)?correct(?:ly|ness)?|wrong(?:ly)?|(?:in)?accura(?:te|tely|cy)|erroneous|ground truth|solved)"
_MAYBE_RIGHT = r"(?:right|true|valid|false|expected|gold)"  # a right triangle is nobody's answer
_CORRECTNESS = re.compile(
    rf"\b{_SUBJECT}\b.*\b{_RIGHT}\b|\b{_RIGHT}\b.*\b{_SUBJECT}\b"
    rf"|\b{_MAYBE_RIGHT} (?:final )?{_SUBJECT}\b|\b{_SUBJECT} (?:is|are|was|were) {_MAYBE_RIGHT}\b"
    # `the answer is 5`, `the result equals x`; `the answer is written by ..` is about who writes.
    r"|\b(?:answers?|results?) (?:is|are|was|equals?|should be|must be|=)(?! (?:\w+(?:ed|en)|made|done|left)\b)"
    r"|\bsolves? the (?:problem|query|question|task)\b|\b(?:is|are) (?:in)?correct\b|\\boxed|\bfull (?:marks?|score)\b",
    re.IGNORECASE | re.DOTALL,
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# `step 2`, `steps 2 and 3`, `the first 3 steps`, `2nd step`, `half of the 10 steps`: places and counts, no results.
_PLACES = re.compile(
    r"\bsteps? \d{1,3}(?:(?:,| and| or| to|-) ?\d{1,3})*|\b(?:first|last) \d{1,3} steps?"
    r"|\b\d{1,3}(?:st|nd|rd|th)? steps?"
    r"|\b\d{1,3} ?(?:%|percent) of (?:the |all )?steps",
    re.IGNORECASE,
)
# Kinds of steps that any worked solution may have, in words that fit every problem: what a random rubric draws from.
STEP_KINDS = (
    "steps that restate the problem",
    "steps that plan the solution",
    "steps that set up an equation",
    "steps that do routine arithmetic",
    "steps that do arithmetic with large or awkward numbers",
    "steps that rearrange or simplify an expression",
    "steps that substitute known values",
    "steps that split the problem into cases",
    "steps that count or enumerate possibilities",
    "steps that recall a theorem or a formula",
    "steps that draw a geometric conclusion",
    "steps that check or verify earlier work",
    "steps that change the approach after a dead end",
    "steps that follow a step of low confidence",
    "the step in which the key insight is found",
    "the step that states the final answer",
)


def find_steps(query: Query) -> list[tuple[str, str]]:
    """The labelled steps that a query states: (label, the query's words for it); empty where it labels none."""
    return [(match[1], match[2]) for match in _STEP.finditer(query.text)]


def is_free(query: Query) -> bool:
    """Whether the query labels no steps, so that its criteria are free text about kinds of steps."""
    return not find_steps(query)


def find_objection(criterion: Criterion, query: Query) -> str | None:
    """Why a free criterion must be dropped, or None where it is about routing and about nothing else."""
    text = criterion.text
    if _WRITER.search(text) is None:
        return "it names neither the small nor the large model"
    if _CORRECTNESS.search(text) is not None:
        return "it is about whether an answer is right"
    known = set(_NUMBER.findall(query.text))
    foreign = [number for number in _NUMBER.findall(_PLACES.sub(" ", text)) if number not in known]
    if foreign:
        return f"it brings the number {foreign[0]}, which is not in the query"
    return None


def read_free(criterion: Criterion) -> Criterion:
    """The criterion without a step label, and with the writer that it asks for where it names only one."""
    named = {match.lower() for match in _WRITER.findall(criterion.text)}
    return replace(criterion, label=None, model=named.pop() if len(named) == 1 else None)


def draw_free_kinds(rng: random.Random, count: int) -> list[str]:
    """Different kinds of steps for a random rubric."""
    return rng.sample(STEP_KINDS, min(count, len(STEP_KINDS)))
