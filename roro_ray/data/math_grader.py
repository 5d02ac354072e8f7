"""Whether a mathematical answer equals the gold answer, by math-verify, and the process in which that is decided.

`grade` is the whole judgement. It runs in a process of its own (`python -m roro_ray.data.math_grader`, started by
`roro_ray.data.grader_pool`), because an answer is hostile input: a tower of powers never ends, and takes all memory on
the way. math-verify's own time limits are signals of the main thread and do not interrupt long integer arithmetic; here
the owner of the process holds the clock. Only that process imports this module, so that nobody else pays for sympy.

Added to math-verify: lists are compared as multisets, item by item, where the sets that it makes of them are not enough
(`16, 3, 1, 1`); number bases must agree; a number in front of a unit in plain letters counts; a tolerance.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import resource
import select
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from roro_ray.data.grader_pool import READY, Grade, Task
from roro_ray.data.verify import split_items, strip_dollars

_IN_BOX = (LatexExtractionConfig(boxed_match_priority=0),)
_IN_TEXT = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_BASE = re.compile(r"_\{?(\d+)\}?\s*$")
# Words behind a number that change it are no unit.
_NO_UNIT = (
    r"(?!(?:sin|cos|tan|cot|log|exp|mod|sqrt|times|plus|minus|over|choose|out|hundred|thousand|[mb]illion|dozen)\b)"
)
_UNIT = rf"(?:{_NO_UNIT}[A-Za-z]{{3,}}|cm|mm|km|kg|ft|in|hrs?|%)"
_WITH_UNIT = re.compile(rf"([-+]?[\d.,]*\d)\s*{_UNIT}(?:[ /][A-Za-z]+)*(?:\^\{{?[23]\}}?)?\.?")
# How much of a text without a box is searched for an answer, from its end.
_TAIL = 2000
# Seconds beyond the owner's limit after which the kernel ends a check whose owner is gone.
_GRACE_S = 5.0
_ORPHAN_CHECK_S = 5.0


def grade(task: Task) -> Grade:
    """Check one answer; may take for ever.

    Returns:
        correct=None where the gold answer cannot be read; False where the text gives none.
    """
    gold = _read_gold(task.gold)
    if not gold:
        return Grade(None, error=f"the gold answer {task.gold[:200]!r} cannot be read as mathematics", failure="gold")
    items = split_items(task.gold)
    if task.boxes:
        answers = [task.boxes[-1]]
        if 1 < len(items) <= len(task.boxes):
            answers.append(", ".join(task.boxes[-len(items) :]))
        right = any(_is_right(answer, task.gold, gold, items, task.tolerance) for answer in answers)
        return Grade(right, answers[-1] if right else answers[0])
    found = _parse(task.text[-_TAIL:], _IN_TEXT)
    if not found:
        return Grade(False)
    shown = next((each for each in found if isinstance(each, str)), None)
    right = _is_right(shown, task.gold, gold, items, task.tolerance) if shown else _equal(gold, found, task.tolerance)
    return Grade(right, shown)


def _is_right(answer: str, gold_text: str, gold: Sequence[Any], items: Sequence[str], tolerance: float) -> bool:
    given = strip_dollars(answer).replace("\n", " ")
    bases = [_BASE.search(text) for text in (gold_text, given)]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return False
    repeats = len(set(items)) < len(items)
    if not repeats and any(_equal(gold, _read(form), tolerance) for form in _forms(given)):
        return True
    # A tuple of the values asked for is a list of them.
    inner = re.fullmatch(r"\s*\(([^()]*)\)\s*", given)
    parts = split_items(inner[1] if inner else given)
    return len(items) == len(parts) > 1 and _match_items(items, parts, tolerance)


def _match_items(items: Sequence[str], parts: Sequence[str], tolerance: float) -> bool:
    """Whether the items can be paired off, each with an equal part, whatever the order."""
    left = [_read(part) for part in parts]
    for item in items:
        gold = _read_gold(item)
        found = next((index for index, part in enumerate(left) if gold and _equal(gold, part, tolerance)), None)
        if found is None:
            return False
        del left[found]
    return True


def _forms(given: str) -> list[str]:
    """An answer as it is, without its percent sign, and without the plain words of its unit."""
    forms = [given]
    if given.rstrip().endswith("%"):
        forms.append(given.rstrip().rstrip("%").rstrip("\\ "))
    unit = _WITH_UNIT.fullmatch(given.strip())
    return [*forms, unit[1]] if unit else forms


def _equal(gold: Sequence[Any], given: Sequence[Any], tolerance: float) -> bool:
    if tolerance > 0:
        return any(_is_near(a, b, tolerance) for a in gold for b in given if not isinstance(a, str | bytes))
    return bool(
        verify(list(gold), list(given), timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=False)
    )


def _is_near(gold: Any, given: Any, tolerance: float) -> bool:
    try:
        # A hair more than the tolerance: 4.2 and 4.3 are 0.09999.. apart.
        return abs(float(gold.doit()) - float(given.doit())) <= tolerance * (1 + 1e-9)
    except (AttributeError, TypeError, ValueError, OverflowError):
        return False


@functools.lru_cache(maxsize=256)
def _read_gold(text: str) -> tuple[Any, ...]:
    """The gold answer's expressions, a percentage also as the bare number; () where it cannot be read."""
    read = [_read(form) for form in _forms(strip_dollars(text))]
    found = tuple(each for expressions in read for each in expressions)
    return found if any(not isinstance(each, str) for each in found) else ()


def _read(formula: str) -> tuple[Any, ...]:
    """A formula's expressions; those of its right-hand side where the whole cannot be read (`m_{\\max }=n^{2}`)."""
    found = _parse(rf"\boxed{{{formula}}}", _IN_BOX)
    if "=" in formula and all(isinstance(each, str) for each in found):
        found += _parse(rf"\boxed{{{formula.rpartition('=')[2]}}}", _IN_BOX)
    return found


def _parse(text: str, config: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(parse(text, list(config), parsing_timeout=None))


def main() -> None:
    """Check what comes through the connection until it closes: `FD PARENT LIMIT_S MEMORY_MB`."""
    connection = Connection(int(sys.argv[1]))
    parent, limit_s, memory = int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]) * 2**20
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # not on every system; the clock still holds
            continue
    with contextlib.suppress(EOFError, OSError):  # the owner is gone or wants no more
        connection.send_bytes(READY)
        while os.getppid() == parent:
            if select.select([connection], [], [], _ORPHAN_CHECK_S)[0]:
                connection.send_bytes(_answer(connection.recv_bytes(), limit_s))


def _answer(request: bytes, limit_s: float) -> bytes:
    task = Task(**json.loads(request))
    signal.setitimer(signal.ITIMER_REAL, limit_s + _GRACE_S)
    try:
        result = grade(task)
    except (MemoryError, RecursionError) as error:
        result = Grade(None, error=f"{type(error).__name__} while the answer was checked", failure="crash")
    signal.setitimer(signal.ITIMER_REAL, 0)
    return json.dumps(asdict(result)).encode()


if __name__ == "__main__":
    main()
