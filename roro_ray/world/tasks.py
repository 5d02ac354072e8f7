"""The embedded world's tasks: five suites of generated register programs.

A program starts from a two-digit number and applies three to eleven labelled operations to it, modulo
100 (modulo 60 in the clock suite); a solution writes one operation a step and then the answer. Some
operations are easy for a tiny language model and some are hard, errors cascade, and a `set` forgets
everything before it: which step is given to the large model matters, not only how many.

Splits never overlap: the digest of a program's own text decides the one split that it may appear in.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.types import Query

SUITES = ("chain", "word", "long", "list", "clock")
SPLITS = ("train", "validation", "test")
STEP_DELIMITER = "\n\n"
ANSWER_LABEL = "Answer: "
LABELS = "ABCDEFGHIJK"

_EASY_WEIGHTS = {"add1": 3, "sub1": 3, "rev": 2, "dbl": 2, "max": 1, "min": 1, "set": 1}
_HARD = ("mul", "mod", "add2", "sub2")
_MAX_HARD = 5
_SPLIT_OF_DIGEST = ("train",) * 6 + ("validation",) * 2 + ("test",) * 2


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a program: its name (`add`, `mul`, ..) and its operand (0 where it has none)."""

    name: str
    operand: int = 0

    @property
    def is_hard(self) -> bool:
        """True for the operations that a tiny model finds hard (for analysis only, never for training)."""
        return self.name in ("mul", "mod") or (self.name in ("add", "sub") and self.operand >= 10)


@dataclass(frozen=True, slots=True)
class Program:
    """A start value and the operations applied to it, modulo `modulus`."""

    suite: str
    start: int
    operations: tuple[Operation, ...]

    @property
    def modulus(self) -> int:
        return 60 if self.suite == "clock" else 100


def apply_operation(operation: Operation, value: int, modulus: int) -> int:
    """The true result of one operation."""
    k = operation.operand
    results = {
        "add": value + k,
        "sub": value - k,
        "mul": value * k,
        "mod": value % k if k else 0,
        "dbl": value * 2,
        "rev": value % 10 * 10 + value // 10,
        "max": max(value, k),
        "min": min(value, k),
        "set": k,
    }
    return results[operation.name] % modulus


def misapply_operation(operation: Operation, value: int, modulus: int) -> int:
    """The result under the small model's misconception: digit by digit, the carry or borrow forgotten."""
    k, tens, units = operation.operand, value // 10, value % 10
    if operation.name == "mul":
        return (tens * k % 10 * 10 + units * k % 10) % modulus
    if operation.name == "sub" and operation.is_hard:
        return ((tens - k // 10) % 10 * 10 + (units - k % 10) % 10) % modulus
    return apply_operation(operation, value, modulus)


def render_step(label: str, operation: Operation, value: int, result: int) -> str:
    """One solution step, without its delimiter: `B: 72 * 04 = 88`."""
    k = f"{operation.operand:02d}"
    left = {
        "add": f"{value:02d} + {k}",
        "sub": f"{value:02d} - {k}",
        "mul": f"{value:02d} * {k}",
        "mod": f"{value:02d} % {k}",
        "dbl": f"dbl {value:02d}",
        "rev": f"rev {value:02d}",
        "max": f"max {value:02d} {k}",
        "min": f"min {value:02d} {k}",
        "set": f"set {k}",
    }[operation.name]
    return f"{label}: {left} = {result:02d}"


def render_solution(program: Program, misconceived: bool = False) -> list[str]:
    """The steps of a solution, the answer step last; with the small model's misconceptions if asked."""
    compute = misapply_operation if misconceived else apply_operation
    value, steps = program.start, []
    for label, operation in zip(LABELS, program.operations, strict=False):
        result = compute(operation, value, program.modulus)
        steps.append(render_step(label, operation, value, result))
        value = result
    return [*steps, f"{ANSWER_LABEL}{value:02d}"]


_CHAIN = {
    "add": "plus {k}",
    "sub": "subtract {k}",
    "mul": "times {k}",
    "mod": "remainder by {k}",
    "dbl": "double",
    "rev": "reverse",
    "max": "at least {k}",
    "min": "at most {k}",
    "set": "reset to {k}",
}
# suite: (opening, separator between operations, closing, phrase of each operation)
TEMPLATES: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "chain": ("Start with {s}. ", "; ", ".", _CHAIN),
    "long": ("Start with {s}. ", "; ", ".", _CHAIN),
    "word": (
        "Mia has {s} beads. ",
        "; ",
        ".",
        {
            "add": "she finds {k}",
            "sub": "{k} are lost",
            "mul": "the pile grows {k} times",
            "mod": "what groups of {k} leave over",
            "dbl": "the pile doubles",
            "rev": "she swaps the digits",
            "max": "she tops up to {k}",
            "min": "she keeps no more than {k}",
            "set": "she starts anew with {k}",
        },
    ),
    "list": (
        "Fold {s} through ",
        " ",
        ".",
        {
            "add": "<+ {k}>",
            "sub": "<- {k}>",
            "mul": "<* {k}>",
            "mod": "<% {k}>",
            "dbl": "<dbl>",
            "rev": "<rev>",
            "max": "<max {k}>",
            "min": "<min {k}>",
            "set": "<set {k}>",
        },
    ),
    "clock": (
        "The clock shows minute {s}. ",
        "; ",
        ".",
        {
            "add": "wind on {k}",
            "sub": "turn back {k}",
            "mul": "run {k} times as far",
            "mod": "past the last mark of {k}",
            "dbl": "run twice as far",
            "rev": "swap the digits",
            "max": "not before {k}",
            "min": "not after {k}",
            "set": "set it to {k}",
        },
    ),
}


def render_query(program: Program) -> str:
    """The query's text, operations labelled A, B, C, .. in order."""
    opening, separator, closing, phrases = TEMPLATES[program.suite]
    parts = [
        f"{label}: {phrases[op.name].format(k=f'{op.operand:02d}')}"
        for label, op in zip(LABELS, program.operations, strict=False)
    ]
    return opening.format(s=f"{program.start:02d}") + separator.join(parts) + closing


def draw_operation(rng: random.Random, hard: bool, modulus: int) -> Operation:
    """Draw one easy or one hard operation."""
    kind = rng.choice(_HARD) if hard else rng.choices(list(_EASY_WEIGHTS), list(_EASY_WEIGHTS.values()))[0]
    if kind in ("add1", "sub1"):
        return Operation(kind[:3], rng.randint(1, 9))
    if kind in ("add2", "sub2"):
        return Operation(kind[:3], rng.randint(11, modulus - 1))
    if kind in ("mul", "mod"):
        return Operation(kind, rng.randint(3, 9))
    if kind in ("max", "min", "set"):
        return Operation(kind, rng.randint(5, modulus - 6))
    return Operation(kind)


def draw_program(rng: random.Random, suite: str) -> Program:
    """Draw a program: 3-7 operations (8-11 in `long`), 0 to 5 of them hard."""
    count = rng.randint(8, 11) if suite == "long" else rng.randint(3, 7)
    hard = rng.randint(0, min(round(0.7 * count), _MAX_HARD))
    flags = [True] * hard + [False] * (count - hard)
    rng.shuffle(flags)
    modulus = 60 if suite == "clock" else 100
    operations = tuple(draw_operation(rng, flag, modulus) for flag in flags)
    return Program(suite, rng.randint(1, modulus - 1), operations)


def split_of(text: str) -> str:
    """The only split in which a query with this text may appear (decided by its digest)."""
    return _SPLIT_OF_DIGEST[hashlib.sha256(text.encode()).digest()[0] % len(_SPLIT_OF_DIGEST)]


def draw_programs(suite: str, split: str, seed: int) -> Iterator[Program]:
    """An endless, reproducible stream of different programs of one suite and split.

    Raises:
        ConfigError: the suite or the split does not exist.
    """
    for what, got, allowed in (("suite", suite, SUITES), ("split", split, SPLITS)):
        if got not in allowed:
            hint = did_you_mean(got, allowed)
            raise ConfigError(f"unknown {what} {got!r}: expected one of {', '.join(allowed)}{hint}")
    rng = random.Random(f"{suite}/{split}/{seed}")
    seen = set()
    while True:
        program = draw_program(rng, suite)
        text = render_query(program)
        if split_of(text) == split and text not in seen:
            seen.add(text)
            yield program


def make_queries(suite: str, split: str, count: int, seed: int = 0) -> list[Query]:
    """The first `count` queries of a suite's split; the same arguments give the same queries.

    Raises:
        ConfigError: the suite or the split does not exist.
    """
    stream = draw_programs(suite, split, seed)
    queries = []
    for index in range(count):
        program = next(stream)
        answer = render_solution(program)[-1].removeprefix(ANSWER_LABEL)
        queries.append(Query(f"{suite}/{split}/{seed}/{index:05d}", suite, split, render_query(program), answer))
    return queries


def read_answer(text: str) -> str | None:
    """The answer that a final step states, or None where the text is no answer step."""
    if not text.startswith(ANSWER_LABEL):
        return None
    return text.removeprefix(ANSWER_LABEL).strip() or None
