"""Read the answer that a step states, and decide whether it is the gold answer.

The embedded world states `Answer: 50`; real models put theirs in `\\boxed{..}`. Numbers are compared as
numbers, so that `50`, `050` and `50.0` agree; anything else as text. An answer that cannot be checked gives
None, an error value: a trajectory that was never scored must not count as a wrong one.
"""

from __future__ import annotations

import re
from fractions import Fraction

from roro_ray.types import Query
from roro_ray.world.tasks import read_answer as read_world_answer

_BOXED = re.compile(r"\\boxed\s*\{")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(/\d+)?")


def read_answer(text: str) -> str | None:
    """The answer that a step states (`Answer: ..` or the last `\\boxed{..}`), or None where it states none."""
    answer = read_world_answer(text)
    return answer if answer is not None else _read_boxed(text)


def _read_boxed(text: str) -> str | None:
    openings = list(_BOXED.finditer(text))
    if not openings:
        return None
    start = openings[-1].end()
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index].strip() or None
    return None  # the box was never closed: the step was cut off


def _read_number(text: str) -> Fraction | None:
    plain = text.replace(",", "").replace(" ", "")
    if not _NUMBER.fullmatch(plain):
        return None
    numerator, _, denominator = plain.partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / (int(denominator) if denominator else 1)


def _normalise(text: str) -> str:
    return " ".join(text.replace("$", "").strip().rstrip(".").split()).casefold()


def is_correct(answer: str | None, query: Query) -> bool | None:
    """Whether an answer equals the query's gold answer.

    Returns:
        False where no answer was given (an episode that ran out of steps is wrong, not unscored); None where
        the query has no gold answer to compare with.
    """
    gold = _normalise(query.answer)
    if not gold:
        return None
    if answer is None:
        return False
    given = _normalise(answer)
    if given == gold:
        return True
    given_number, gold_number = _read_number(given), _read_number(gold)
    return given_number is not None and given_number == gold_number
