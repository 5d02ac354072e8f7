"""Makes a long trajectory fit a context: every step keeps its line and its writer, and loses text from its middle.

Who wrote a step is what a Judge of routing needs most, so steps are shortened before any is left out, those in the
middle of the trajectory first; each cut says how much is missing. Only where hundreds of steps do not fit even as stubs
is a run of them told in one line, with how many each model wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

CountTokens = Callable[[str], int]
Compose = Callable[[str, list[str]], str]
_ENDS = 3  # steps at either end of a trajectory that are cut last
_ENDS_TIMES = 4  # how much longer than the others they may be
_LEAST = 24  # characters of a step that is a stub
_BYTES_PER_TOKEN = 2  # dense LaTeX has about 2.5 in byte-level tokenizers, prose about 4


def estimate_tokens(text: str) -> int:
    """Tokens of a text, estimated from above where no tokenizer is at hand."""
    return len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN + 1


def cut_middle(text: str, most: int) -> str:
    """The text with about `most` of its characters: beginning and end, and between them how many are missing."""
    missing = len(text) - most
    if missing <= 0:
        return text
    mark = f" (.. {missing} characters left out ..) "
    if missing <= len(mark):
        return text  # the mark would be longer than what it saves
    head = (most * 2 + 2) // 3
    return text[:head].rstrip() + mark + text[len(text) - (most - head) :].lstrip()


def fit_steps(
    problem: str,
    steps: Sequence[tuple[str, str]],
    compose: Compose,
    count: CountTokens,
    budget: int,
    whole: str | None = None,
) -> str | None:
    """The composed text within a budget of tokens, shortened as little as that needs; None where nothing helps.

    Args:
        steps: (mark, text) of each step.
        compose: makes the whole text of the problem and the steps' lines.
        whole: what `compose` gives of everything, where the caller has it.
    """
    whole = compose(problem, [mark + text for mark, text in steps]) if whole is None else whole
    tokens = count(whole)
    if tokens <= budget:
        return whole
    rate = len(whole) / tokens  # characters a token
    spare = max(budget, 0) * rate - (len(whole) - len(problem) - sum(len(text) for _, text in steps))
    longest = max((len(text) for _, text in steps), default=0)
    # A long query is cut as well, but keeps half of what there is.
    problem = cut_middle(problem, max(int(spare / 2), 4 * _LEAST))
    lines = _cut_steps(steps, longest)
    if count(compose(problem, lines)) <= budget:  # the query alone was too long
        return compose(problem, lines)
    low, high, best = 0, longest, None
    while low < high:  # the largest cap that fits; what a cap gives grows with it
        cap = (low + high + 1) // 2
        text = compose(problem, _cut_steps(steps, max(cap, _LEAST)))
        fits = count(text) <= budget
        best = text if fits else best
        if cap <= _LEAST:
            break
        low, high = (cap, high) if fits else (low, cap - 1)
    return best if best is not None else _fold_steps(problem, steps, compose, count, budget)


def _cut_steps(steps: Sequence[tuple[str, str]], cap: int) -> list[str]:
    last = len(steps) - _ENDS
    return [
        mark + cut_middle(text, cap * (1 if _ENDS <= index < last else _ENDS_TIMES))
        for index, (mark, text) in enumerate(steps)
    ]


def _fold_steps(
    problem: str, steps: Sequence[tuple[str, str]], compose: Compose, count: CountTokens, budget: int
) -> str | None:
    """The text with as few steps as needed told in one line, all others as stubs."""
    low, high, best = 0, len(steps) - 1, None
    while low <= high:
        kept = (low + high) // 2
        first = (kept + 1) // 2
        after = len(steps) - (kept - first)
        lines = [*_stubs(steps[:first]), _tell(steps[first:after], first), *_stubs(steps[after:])]
        text = compose(cut_middle(problem, 4 * _LEAST) if kept == 0 else problem, lines)
        if count(text) <= budget:
            low, best = kept + 1, text
        else:
            high = kept - 1
    return best


def _stubs(steps: Sequence[tuple[str, str]]) -> list[str]:
    return [mark + cut_middle(text, _LEAST) for mark, text in steps]


def _tell(steps: Sequence[tuple[str, str]], before: int) -> str:
    writers = ", ".join(f"{n} by {mark.strip('[] ')}" for mark, n in sorted(Counter(mark for mark, _ in steps).items()))
    return f"(.. steps {before + 1} to {before + len(steps)} left out: {writers} ..)"
