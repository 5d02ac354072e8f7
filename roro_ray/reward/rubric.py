"""The rubric format: what a Rubricor may write, read strictly.

A rubric is 3 to 7 lines `TEXT (WEIGHT)`, or the same as a JSON list `[{"criterion": TEXT, "weight": WEIGHT}]`
(the form that a large language model writes more readily); weights are whole numbers from 1 to 5. A criterion
about one step starts with the step's label and quotes the query's own words for it, `B: times 04 written by
the large model`; one about the whole trajectory starts with `overall: `. The quotation makes a rubric
checkable: a criterion that quotes what its query does not say is dropped and the rubric fined, or else
reinforcement learning drifts into words that the Judge happens to like. Where the query labels no steps (real
problems), criteria are free text about who writes which kind of step: see `reward.freeform`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from roro_ray.errors import RubricError
from roro_ray.reward.freeform import find_objection, is_free, read_free
from roro_ray.types import Criterion, Query, Rubric

OVERALL = "overall: "
WRITTEN_BY = " written by the {} model"
MODELS = ("small", "large")
WEIGHTS = (1.0, 2.0, 3.0, 4.0, 5.0)
_OVERALL_TEXTS = tuple(f"{OVERALL}mostly{WRITTEN_BY.format(model)}" for model in MODELS)
_MAX_CHARACTERS = 8000
_LINE = re.compile(r"(?P<text>\S[^\n]*?) \((?P<weight>[0-9]{1,3})\)")
_LABEL = re.compile(r"(?P<label>[A-Z][0-9]{0,2}): (?=\S)")
_MODEL = re.compile(r"(?P<quote>.*) written by the (?P<model>small|large) model", re.DOTALL)
_EXPECTED = "expected lines such as 'B: times 04 written by the large model (5)'"


def make_criterion(text: str, weight: float) -> Criterion:
    """A criterion with its step label and model read off its text (None where the text names none)."""
    label = _LABEL.match(text)
    model = _MODEL.fullmatch(text)
    return Criterion(text, weight, label and label["label"], model and model["model"])


def make_step_criterion(label: str, quote: str, model: str, weight: float) -> Criterion:
    """The criterion that `model` (small or large) writes the step `label`, quoting the query's words for it."""
    return Criterion(f"{label}: {quote}{WRITTEN_BY.format(model)}", weight, label, model)


def make_overall_criterion(model: str, weight: float) -> Criterion:
    """The graded criterion that `model` (small or large) writes most steps."""
    return Criterion(f"{OVERALL}mostly{WRITTEN_BY.format(model)}", weight, None, model)


def format_rubric(criteria: Sequence[Criterion]) -> str:
    """The lines of a rubric; `parse_rubric` reads them back."""
    return "\n".join(f"{criterion.text} ({criterion.weight:g})" for criterion in criteria)


def format_json(criteria: Sequence[Criterion]) -> str:
    """The JSON form of a rubric; `parse_rubric` reads it back."""
    return json.dumps([{"criterion": criterion.text, "weight": criterion.weight} for criterion in criteria])


def parse_rubric(
    text: str, query_id: str = "", version: int = -1, min_criteria: int = 3, max_criteria: int = 7
) -> Rubric:
    """Read a rubric, lines or JSON; nothing is guessed or repaired.

    Raises:
        RubricError: a line or an entry does not fit the format, a weight is not a whole number from 1 to 5,
            two criteria have the same text, or there are fewer or more criteria than allowed.
    """
    stripped = text.strip()
    if not stripped:
        raise RubricError(f"rubric of query {query_id!r} is empty: {_EXPECTED}; sample it again")
    if len(stripped) > _MAX_CHARACTERS:
        raise RubricError(
            f"rubric of query {query_id!r} has {len(stripped)} characters: expected at most {_MAX_CHARACTERS}"
        )
    entries = _read_json(stripped, query_id) if stripped[0] in "[{" else _read_lines(stripped, query_id)
    if not min_criteria <= len(entries) <= max_criteria:
        raise RubricError(
            f"rubric of query {query_id!r} has {len(entries)} criteria: expected {min_criteria} to {max_criteria}; "
            "sample it again or change reward.min_criteria and reward.max_criteria"
        )
    seen: set[str] = set()
    for criterion, _ in entries:
        if criterion in seen:
            raise RubricError(f"rubric of query {query_id!r} says {criterion!r} twice: expected different criteria")
        seen.add(criterion)
    criteria = tuple(make_criterion(criterion, weight) for criterion, weight in entries)
    return Rubric(query_id, criteria, text, version)


def _read_lines(text: str, query_id: str) -> list[tuple[str, float]]:
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            raise RubricError(f"rubric of query {query_id!r}, line {number}: got {line[:120]!r}, {_EXPECTED}")
        entries.append((match["text"], _check_weight(int(match["weight"]), f"line {number}", query_id)))
    return entries


def _read_json(text: str, query_id: str) -> list[tuple[str, float]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RubricError(
            f"rubric of query {query_id!r} starts like JSON but does not parse ({error}): "
            'expected [{"criterion": "..", "weight": 1..5}, ..]'
        ) from None
    if not isinstance(records, list):
        raise RubricError(f"rubric of query {query_id!r}: got a JSON {type(records).__name__}, expected a list")
    entries = []
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or set(record) != {"criterion", "weight"}:
            raise RubricError(
                f"rubric of query {query_id!r}, entry {number}: got {str(record)[:120]!r}, "
                'expected exactly the keys "criterion" and "weight"'
            )
        criterion = record["criterion"]
        if not isinstance(criterion, str) or not criterion.strip() or "\n" in criterion:
            raise RubricError(
                f"rubric of query {query_id!r}, entry {number}: got criterion {str(criterion)[:120]!r}, "
                "expected one line of text"
            )
        entries.append((criterion.strip(), _check_weight(record["weight"], f"entry {number}", query_id)))
    return entries


def _check_weight(weight: object, where: str, query_id: str) -> float:
    if isinstance(weight, int | float) and not isinstance(weight, bool) and float(weight) in WEIGHTS:
        return float(weight)
    raise RubricError(
        f"rubric of query {query_id!r}, {where}: got weight {weight!r}, expected a whole number from 1 to 5"
    )


@dataclass(frozen=True, slots=True)
class ReadRubric:
    """A Rubricor's text after parse and check: the faithful rubric or why there is none, and what was dropped."""

    rubric: Rubric | None
    dropped: tuple[Criterion, ...] = ()
    error: str | None = None
    written: tuple[Criterion, ...] = ()  # all that parsed, in order, kept or dropped


def is_faithful(criterion: Criterion, query: Query) -> bool:
    """True for the overall criterion in its one form, and where a labelled step of the query is quoted literally.

    Where the query labels no steps: where `freeform.find_objection` has none.
    """
    if is_free(query):
        return find_objection(criterion, query) is None
    if criterion.label is None:
        return criterion.text in _OVERALL_TEXTS
    match = _MODEL.fullmatch(criterion.text)
    if match is None:
        return False
    quote = match["quote"]
    start = query.text.find(quote)
    # The quotation must be the whole phrase: `B: times 0` is literally part of `B: times 04`.
    return start >= 0 and not query.text[start + len(quote) : start + len(quote) + 1].isalnum()


def read_rubric(text: str, query: Query, version: int = -1, min_criteria: int = 3, max_criteria: int = 7) -> ReadRubric:
    """Parse a rubric and drop what is not faithful to its query; errors are values here, to be punished or shown.

    Two criteria on one step (large and small) cannot both be meant: the second is dropped as unfaithful.
    Criteria on a query that labels no steps name none (see `reward.freeform`).
    """
    try:
        rubric = parse_rubric(text, query.id, version, min_criteria, max_criteria)
    except RubricError as error:
        return ReadRubric(None, error=str(error))
    free = is_free(query)
    if free:
        rubric = replace(rubric, criteria=tuple(map(read_free, rubric.criteria)))
    kept: list[Criterion] = []
    dropped: list[Criterion] = []
    named: set[str] = set()
    for criterion in rubric.criteria:
        name = criterion.text.lower() if free else criterion.label or OVERALL
        good = is_faithful(criterion, query) and name not in named
        (kept if good else dropped).append(criterion)
        if good:
            named.add(name)
    if not kept:
        wanted = "says which model writes which steps and nothing else" if free else "quotes its query"
        reason = (
            f"rubric of query {query.id!r} has no criterion that {wanted}: got {text[:200]!r}; sample it again"
        )
        return ReadRubric(None, tuple(dropped), reason)
    return ReadRubric(replace(rubric, criteria=tuple(kept)), tuple(dropped), written=rubric.criteria)
