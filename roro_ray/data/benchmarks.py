"""Five benchmarks of mathematics, and any data set of the same shape, as problems with an answer that can be checked.

| suite | rows | where its answer stands |
|---|---|---|
| gsm8k | 1,319 | `answer`, behind `####` |
| math500 | 500 | `answer`, LaTeX |
| aime24 | 30 | `answer`, else the last box of `solution` |
| amc23 | 40 | `answer`, a float |
| olympiadbench | 675 | `final_answer`, a list; `is_multiple_answer`, `error` (a tolerance) |

A record is read by its fields and not by its suite, so that local copies, the hub's several editions and a user's own
files are all read alike. A record that lacks a question or an answer is an error. One whose answer no program can check
(a proof, a picture, an answer in words) is left out and counted.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from roro_ray.data.dataset_files import RawRow, Record, load_rows
from roro_ray.data.verify import read_boxes, split_items, strip_dollars
from roro_ray.errors import DataError

# suite: its names on the hub, tried in this order where data.sources names no other.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "gsm8k": ("openai/gsm8k:main",),
    "math500": ("HuggingFaceH4/MATH-500", "math-ai/math500"),
    "aime24": ("HuggingFaceH4/aime_2024", "math-ai/aime24"),
    "amc23": ("math-ai/amc23",),
    "olympiadbench": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP",),
}
_QUESTIONS = ("problem", "question")
_ANSWERS = ("answer", "final_answer", "solution")
_COMMAND = re.compile(r"\\(?:text|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")
_BRACKET = re.compile(r"\\left|[(\[]")


@dataclass(frozen=True, slots=True)
class Problem:
    """One row: its number in its split of the source, the question, the gold answer, and how to compare with it."""

    row: int
    text: str
    answer: str
    grader: str = "math"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The problems of a source by its own splits (`all` where it has one group), and what was left out of `rows`."""

    name: str
    source: str
    parts: Mapping[str, tuple[Problem, ...]]
    rows: int
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Problems that can be scored."""
        return sum(map(len, self.parts.values()))


class _Unscorable(Exception):
    """No program can check this row's answer; says why."""


def load_benchmark(name: str, source: str = "", stamp: str = "") -> Benchmark:
    """The problems of a benchmark, read once in a process; warns of rows that are left out.

    Args:
        name: one of `BENCHMARKS`, or any name where `source` is given.
        source: as of `load_rows`; empty: the hub, by the benchmark's own names.
        stamp: of the source's files (`stamp_source`): another one reads them anew.

    Raises:
        DataError: the source cannot be read, or a row lacks something; names file, row and field.
    """
    return _load(name, source, stamp)


@functools.lru_cache(maxsize=32)
def _load(name: str, source: str, stamp: str) -> Benchmark:
    found, groups = _find(name, source)
    left_out: Counter[str] = Counter()
    parts, rows = {}, 0
    for split, raws in groups.items():
        problems, seen = [], set()
        for index, raw in enumerate(raws):
            try:
                problem = read_problem(raw, index)
                if problem.text in seen:
                    raise _Unscorable("repeats another row")
            except _Unscorable as reason:
                left_out[str(reason)] += 1
                continue
            seen.add(problem.text)
            problems.append(problem)
        parts[split] = tuple(problems)
        rows += len(raws)
    benchmark = Benchmark(name, found, parts, rows, dict(left_out))
    if left_out:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(left_out.items()))
        warnings.warn(f"{name} ({found}): {left_out.total()} of {rows} rows left out: {reasons}.", stacklevel=3)
    if not benchmark.size:
        raise DataError(f"{name} ({found}): none of its {rows} rows can be scored.")
    return benchmark


def _find(name: str, source: str) -> tuple[str, dict[str, list[RawRow]]]:
    if source:
        return source, load_rows(source)
    reasons = []
    for candidate in BENCHMARKS.get(name, ()):
        try:
            return candidate, load_rows(candidate)
        except DataError as error:
            reasons.append(str(error))
    if not reasons:
        raise DataError(f"{name} has no source: give data.sources={{{name}: PATH or owner/name of the hub}}.")
    raise DataError("\n".join(reasons).replace("SUITE", name))


def read_problem(raw: RawRow, index: int) -> Problem:
    """A record as a problem.

    Raises:
        DataError: it lacks a question or an answer, or one of them is of a wrong type.
    """
    record = raw.record
    question = _first(raw, _QUESTIONS, "question")
    context = record.get("context")
    text = f"{context.strip()}\n\n{question}" if isinstance(context, str) and context.strip() else question
    _refuse_unscorable(record, text)
    return Problem(index, text, _read_gold(raw), _read_grader(raw))


def _refuse_unscorable(record: Record, text: str) -> None:
    if "<image_" in text or str(record.get("modality", "")).casefold() == "multimodal":
        raise _Unscorable("needs a picture")
    if str(record.get("question_type", "")).casefold().startswith("theorem"):
        raise _Unscorable("asks for a proof")


def _first(raw: RawRow, names: tuple[str, ...], what: str) -> str:
    for name in names:
        value = raw.record.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise _lacks(raw, what, f"text in one of the fields {', '.join(names)}")


def _read_gold(raw: RawRow) -> str:
    for name in _ANSWERS:
        value = raw.record.get(name)
        answer = _read_list(raw.record, value) if name == "final_answer" else _read_value(value, name == "solution")
        if answer:
            return answer
    raise _lacks(raw, "answer", "answer, final_answer, or a solution with \\boxed{..} or ####")


def _read_value(value: Any, is_solution: bool) -> str | None:
    """An answer as text: the last number behind `####`, the last box of a solution, `27` of 27.0."""
    if isinstance(value, str):
        if "####" in value:
            return value.rpartition("####")[2].strip()
        if is_solution:
            boxes = read_boxes(value)
            return boxes[-1] if boxes else None
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else repr(value)


def _read_list(record: Record, value: Any) -> str | None:
    """OlympiadBench's answers: a list of texts in dollar signs, several answers of one text parted by commas."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    plain = [strip_dollars(str(text)).strip().rstrip(".").strip() for text in texts if text is not None]
    if any(_WORD.search(_COMMAND.sub(" ", text)) for text in plain):
        raise _Unscorable("answer in words")
    if record.get("answer_type") == "Interval":
        # One row writes `t(0,4]` for the interval.
        plain = [text[match.start() :] if (match := _BRACKET.search(text)) else text for text in plain]
    if record.get("is_multiple_answer") or len(plain) > 1:
        # A blank behind each comma: `100, 200` is no number of hundred thousands.
        return ", ".join(item for text in plain for item in split_items(text)) or None
    return plain[0] if plain else None


def _read_grader(raw: RawRow) -> str:
    """`math`, or `math:0.1` where the record allows that error (the largest, where it allows several)."""
    given = raw.record.get("error")
    if given in (None, ""):
        return "math"
    try:
        tolerance = max(float(part) for part in str(given).split(","))
    except ValueError:
        tolerance = math.nan
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise DataError(f"{raw.place}, row {raw.number}: error is {given!r}, expected a number such as 1e-1.")
    return f"math:{tolerance:g}"


def _lacks(raw: RawRow, what: str, expected: str) -> DataError:
    fields = ", ".join(f"{name} ({type(value).__name__})" for name, value in raw.record.items())
    return DataError(
        f"{raw.place}, row {raw.number}: no {what}: expected {expected}; the row has {fields or 'nothing'}."
    )
