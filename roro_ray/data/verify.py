"""Read the answer that a text states, and decide in process whether it is the gold answer.

The embedded world states `Answer: 50`; real models put theirs in `\\boxed{..}`. Numbers are compared as numbers, so
that `50`, `050` and `50.0` agree; anything else as text. What needs mathematics (`\\frac{1}{2}` against `0.5`) is for
`roro_ray.data.scoring`. An answer that cannot be checked gives None, an error value: a trajectory that was never
scored must not count as a wrong one.
"""

from __future__ import annotations

import re
from fractions import Fraction

from roro_ray.types import Query
from roro_ray.world.tasks import read_answer as read_world_answer

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_MOST_BOXES = 20
_STATED = re.compile(r"(?i)\banswer(?:\s+is|\s*:)[:\s]*([^\n]+)")
_FORMULA = re.compile(r"\$([^$\n]+)\$")
# Commas only as separators of thousands: `1,3,5` is a list and not the number 135.
_DECIMAL = re.compile(r"[+-]?((\d{1,3}(,\d{3})+|\d+)(\.\d*)?|\.\d+)")
_NUMBER = re.compile(rf"{_DECIMAL.pattern}(/\d+)?")
_LAST_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
# Python itself refuses to convert more than 4,300 digits.
_MOST_DIGITS = 1000
_SPACING = re.compile(r"\\[!,;:]|\{,\}|\\left\b|\\right\b")
_BETWEEN = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*(?:and|or)\s*\}|(?<=[\s\d}])(?:and|or)(?=[\s\d\\])")
_DOLLAR = re.compile(r"(?<!\\)\$")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,(?:\\!)?\s?\d{3})+(?:\.\d+)?")
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


def read_answer(text: str) -> str | None:
    """The answer that a step states (`Answer: ..` or the last `\\boxed{..}`), or None where it states none."""
    answer = read_world_answer(text)
    return answer if answer is not None else _last_box(text)


def read_boxes(text: str) -> list[str]:
    """What the last boxes (`\\boxed{..}`) of a text hold, in order; empty ones left out.

    Nothing where the last one was never closed: the text was cut off, and an earlier box is not its answer. One pass:
    the text may be a hundred thousand braces.
    """
    opened: list[tuple[int, bool]] = []
    boxes: list[tuple[int, int]] = []
    last = -1
    for match in _BRACES.finditer(text):
        if match[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            if is_box:
                boxes.append((start, match.start()))
        elif match[0] not in ("\\{", "\\}"):
            opened.append((match.end(), match[0] != "{"))
            last = match.end() if match[0] != "{" else last
    if any(start == last for start, _ in opened):
        return []
    return [box for start, end in sorted(boxes)[-_MOST_BOXES:] if (box := text[start:end].strip())]


def read_final_answer(text: str | None) -> str | None:
    """The answer that a final text gives, for display: its last box, else what it calls the answer, else the last
    formula or number. None where it gives none, or was cut off within a box.
    """
    if text is None:
        return None
    if "\\boxed" in text:
        boxes = read_boxes(text)
        return boxes[-1] if boxes else None
    stated = _STATED.findall(text)
    if stated and stated[-1].strip():
        answer: str = stated[-1].strip()
        formulas = _FORMULA.findall(answer)
        return formulas[-1].strip() if formulas else answer.rstrip(".").strip() or None
    for pattern in (_FORMULA, _LAST_NUMBER):
        found: list[str] = pattern.findall(text)
        if found:
            return found[-1].strip()
    return None


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


def compare_plainly(answer: str, gold: str) -> bool | None:
    """Whether two mathematical answers are equal, where that needs no mathematics; None where it does.

    Equal text is equal. Two plain decimals are decided here for good: math-verify rounds them to six places.
    """
    given, expected = (_normalise(_unwrap(text)) for text in (answer, gold))
    if given == expected != "":
        return True
    if _DECIMAL.fullmatch(given) and _DECIMAL.fullmatch(expected) and max(len(given), len(expected)) < _MOST_DIGITS:
        return _read_number(given) == _read_number(expected)
    return None


def strip_dollars(formula: str) -> str:
    """A formula without the signs that open and close mathematics, and with commas for `and` and `or`."""
    return _BETWEEN.sub(",", _DOLLAR.sub("", formula))


def split_items(text: str) -> list[str]:
    """The items of a list at the commas outside all brackets; one item where the commas part thousands."""
    text = _strip_braces(strip_dollars(text))
    if _THOUSANDS.fullmatch(text.strip()):
        return [text]
    items, depth, start = [], 0, 0
    for index, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0 and text[index - 1 : index] != "\\" and text[index + 1 : index + 3] != "\\!":
            items.append(text[start:index])
            start = index + 1
    return [item.strip() for item in (*items, text[start:]) if item.strip()]


def _last_box(text: str) -> str | None:
    boxes = read_boxes(text)
    return boxes[-1] if boxes else None


def _read_number(text: str) -> Fraction | None:
    plain = re.sub(r"\s*([/+-])\s*", r"\1", text)
    if len(plain) > _MOST_DIGITS or not _NUMBER.fullmatch(plain):
        return None
    numerator, _, denominator = plain.replace(",", "").partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / (int(denominator) if denominator else 1)


def _unwrap(text: str) -> str:
    """A formula without what changes only its looks: spacing commands, dollar signs, `\\text{..}` around words."""
    return _WORDS.sub(r"\1", _SPACING.sub(lambda match: "," if match[0] == "{,}" else "", text.replace("\\$", "")))


def _normalise(text: str) -> str:
    return " ".join(text.replace("$", "").strip().rstrip(".").split()).casefold()


def _strip_braces(text: str) -> str:
    """A list without the braces of a set round all of it."""
    inner = re.fullmatch(r"\s*(?:\\left)?\\\{(.*?)(?:\\right)?\\\}\s*", text, flags=re.DOTALL)
    return inner[1] if inner and "\\{" not in inner[1] else text
