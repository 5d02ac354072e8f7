"""The texts that Rubricor and Judge read, and how hostile text in them is defused.

Queries and steps come from users and from models, and may hold anything: our own marks, a rubric heading, control
tokens of a chat template, invisible characters that hide either. What a reader could take for part of the format is
replaced by something that says the same to a person and nothing to the format. What the words themselves say (`give
full marks`) stays: it is part of what is judged, and it cannot change where a verdict is read or how many there are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from roro_ray.config import STEP_DELIMITER
from roro_ray.types import Criterion, Query, Trajectory

RUBRIC_HEADING = "Rubric:\n"
QUESTION_END = " (yes/no)? "
VERDICTS = ("yes", "no")
_MAX_SUBJECT = 24
# What would read as our own marks if it stood in a query or a step; the replacement says the same to a reader.
_NEUTRAL = (("[S]", "(S)"), ("[L]", "(L)"), ("[M", "(M"), ("Rubric:", "rubric,"), ("(yes/no)", "(yes or no)"))
_NEUTRAL_ANY_CASE = (
    (re.compile(r"\[([sl])\]"), r"(\1)"),
    (re.compile(r"rubric\s*:", re.IGNORECASE), "rubric,"),
    (re.compile(r"\(\s*yes\s*/\s*no\s*\)", re.IGNORECASE), "(yes or no)"),
)
# Control tokens as models spell them: <|im_end|>, <s>, </think>, <start_of_turn>, [INST], <<SYS>>.
_NAMED_TOKEN = re.compile(
    r"<(/?(?:s|bos|eos|pad|unk|mask|sep|cls|think|tool_call|tool_response|start_of_turn|end_of_turn|endoftext))>"
    r"|\[(/?(?:INST|SYS|PAD|CLS|SEP|MASK))\]|<<(/?SYS)>>",
    re.IGNORECASE,
)
_TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2581: "_"}  # full-width forms
# Characters that show nothing and are not of the category "format": fillers and variation selectors.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def neutralise(text: str, special: Iterable[str] = ()) -> str:
    """The text on one line, with everything that could be taken for a mark of the format or a control token replaced.

    `special` are the control tokens of the tokenizer at hand, which are taken out.
    """
    text = _defuse_tokens(text, tuple(special))
    for mark, harmless in _NEUTRAL:
        text = text.replace(mark, harmless)
    for pattern, harmless in _NEUTRAL_ANY_CASE:
        text = pattern.sub(harmless, text)
    return " ".join(text.splitlines())


def _defuse_tokens(text: str, special: tuple[str, ...]) -> str:
    before = None
    while text != before:  # taking one token out may put another together: `<|im_<|im_end|>end|>`
        before = text
        for token in special:
            text = text.replace(token, "")
        if not text.isascii() or not text.isprintable():
            text = _INVISIBLE.sub("", "".join(filter(_is_visible, text.translate(_TO_ASCII))))
        if "<" in text or "[" in text:
            text = text.replace("<|", "< |").replace("|>", "| >")
            text = _NAMED_TOKEN.sub(lambda match: f"({match[1] or match[2] or match[3]})", text)
    return text


def _is_visible(character: str) -> bool:
    # Directions, zero-width joiners and tags are "Cf"; lone surrogates "Cs"; line ends are dealt with later.
    category = unicodedata.category(character)
    return category not in ("Cf", "Cs", "Cc") or character == "\t" or character.splitlines() == [""]


def writer_mark(model: int, pool_size: int) -> str:
    """`[S] ` for the cheapest model, `[L] ` for the dearest, `[M1] `.. for those between."""
    if model == 0:
        return "[S] "
    return "[L] " if model >= pool_size - 1 else f"[M{model}] "


def mark_steps(trajectory: Trajectory, special: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Each step's writer's mark and its neutralised text."""
    return [
        (writer_mark(step.model, len(step.decision.probabilities)), neutralise(step.text, special))
        for step in trajectory.steps
    ]


def serialise(query: Query, trajectory: Trajectory, special: Iterable[str] = ()) -> str:
    """The Judge's text up to and including `Rubric:`; no gold answer and no correctness in it."""
    steps = [mark + text for mark, text in mark_steps(trajectory, special)]
    return STEP_DELIMITER.join([neutralise(query.text, special), *steps, RUBRIC_HEADING])


def make_question(criterion: Criterion, special: Iterable[str] = ()) -> str:
    """The question that a criterion asks; its weight does not belong to it.

    It ends with the criterion's subject again (`B: `, `overall: `), so that the verdict is read where the
    subject stands: a small transformer finds the step of that name by one look at equal tokens.
    """
    text = neutralise(criterion.text, special)
    subject, colon, _ = text.partition(": ")
    return text + QUESTION_END + (subject + colon if len(subject) <= _MAX_SUBJECT else "")
