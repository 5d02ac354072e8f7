"""Scoring of answers: a golden table of right, wrong, hostile and missing ones, and processes that die for them."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from roro_ray.data.scoring import AnswerScorer, Score, read_tolerance
from roro_ray.data.verify import compare_plainly, is_correct, read_boxes, read_final_answer, split_items
from roro_ray.errors import ConfigError
from roro_ray.types import Query

# Long enough for any innocent answer on a busy machine.
_PATIENT_S = 60.0
_SHORT_S = 6.0
_TOWER = r"\boxed{9^{9^{9^9}}}"


def ask(gold: str, grader: str = "math") -> Query:
    return Query("test/1", "test", "test", "What is it?", gold, grader)


@pytest.fixture(scope="module")
def scorer() -> Iterator[AnswerScorer]:
    scorer = AnswerScorer(2, _PATIENT_S)
    yield scorer
    scorer.close()


# What stands in the box, and the gold answer.
_RIGHT = [
    ("27", "27.0"),
    ("27.0", "27"),
    ("25", "025"),
    ("204.00", "204"),
    (r"\frac{1}{2}", "0.5"),
    (".5", r"\frac{1}{2}"),
    (r"\dfrac{14}{3}", r"\frac{14}{3}"),
    (r"\tfrac{14}{3}", r"\frac{14}{3}"),
    (r"\frac43", r"\frac{4}{3}"),
    ("4/3", r"\frac43"),
    (r"\frac{28}{6}", r"\frac{14}{3}"),
    (r"1\frac{4}{5}", "1.8"),
    (r"85\frac{5}{7}", r"\frac{600}{7}"),
    ("-0.5", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    ("0.333333", r"\frac{1}{3}"),
    (r"\sqrt{117}", r"3\sqrt{13}"),
    (r"\sqrt3/3", r"\frac{1}{\sqrt{3}}"),
    ("√2", r"\sqrt{2}"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    ("π", r"\pi"),
    ("2^{10}", "1024"),
    (r"2\cdot4^{504}", "2^{1009}"),
    (r"1.5\times10^{3}", "1500"),
    (r"62.5\%", "62.5%"),
    ("62.5", r"62.5\%"),
    ("0.625", r"62.5\%"),
    (r"\frac{5}{8}", r"62.5\%"),
    ("8", r"8 \%"),
    ("90", r"90^\circ"),
    ("90°", r"90^\circ"),
    (r"90\text{ degrees}", r"90^{\circ}"),
    (r"18\text{ dollars}", "18"),
    ("18 dollars", "18"),
    (r"\$18.9", r"\$18.90"),
    ("45 minutes", "45"),
    ("60 miles per hour", "60"),
    ("166 cm^2", "166"),
    (r"\frac{600}{7}\text{ km/h}", r"\frac{600}{7}"),
    ("864", r"864 \mbox{ inches}^2"),
    (r"166\text{ cm}^2", "166"),
    ("5.4", r"5.4 \text{ cents}"),
    ("10080", r"10,\!080"),
    ("10,080", "10080"),
    (r"1{,}450{,}000", "1,450,000"),
    ("11111111100", r"11,\! 111,\! 111,\! 100"),
    ("52_{8}", "52_8"),
    ("52", "52_8"),
    ("(3, \\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("(1,-16,-4,43)", "(1, -16, -4, 43)"),
    (r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}"),
    ("84, 69", "69, 84"),
    (r"\{1,-2\}", "1,-2"),
    (r"x=1\text{ or }x=-2", "1,-2"),
    ("3,1,16,1", "16, 3, 1, 1"),
    ("(4,5,7), (1,8,19)", "(1,8,19), (4,5,7)"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"-2, 1\pm\sqrt5", r"\{1\pm\sqrt{5},-2\}"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
    ("x>2", r"(2,\infty)"),
    (r"3<x\le4", "(3,4]"),
    ("[-2,7]", r"x \in [-2,7]"),
    ("p-q", "p - q"),
    ("-q+p", "p - q"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{1}{2(n+1)}", r"\frac{1}{2 n+2}"),
    (r"\frac{\cos x}{\sin x}", r"\cot x"),
    ("6-5i", "-5i + 6"),
    ("2x+3", "y = 2x + 3"),
    ("5", "x=5"),
    ("f(x)=2-x, f(x)=x", "f(x)=x, f(x)=2-x"),
    ("n^2-n-1", r"m_{\max }=n^{2}-n-1"),
    ("east", r"\text{east}"),
    (r"\text{East}", r"\text{east}"),
    ("C", r"\text{(C)}"),
    ("\u200b5\u202e", "5"),
    ("5\x00", "5"),
]
_WRONG = [
    ("28", "27"),
    ("-27", "27"),
    ("27.1", "27.0"),
    ("135", "1,3,5"),
    ("0.33", r"\frac{1}{3}"),
    (".0000673", ".0000672"),
    (r"\frac{14}{5}", r"\frac{14}{3}"),
    (r"\frac{3}{14}", r"\frac{14}{3}"),
    (r"3\sqrt{14}", r"3\sqrt{13}"),
    ("3.14", r"\pi"),
    (r"\frac{\pi}{3}", r"\frac{\pi}{2}"),
    ("6.25", r"62.5\%"),
    ("91", r"90^\circ"),
    (r"19\text{ dollars}", "18"),
    ("1080", r"10,\!080"),
    ("52_9", "52_8"),
    ("42", "52_8"),
    ("(4,2)", "(2,4)"),
    ("[2,4]", "(2,4)"),
    ("69", "69, 84"),
    ("69, 84, 1", "69, 84"),
    ("16,3,1", "16, 3, 1, 1"),
    (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"(-\infty,2]\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"x\ge2", r"(2,\infty)"),
    ("p+q", "p - q"),
    ("x^2+2x+2", "(x+1)^2"),
    ("6+5i", "6 - 5i"),
    ("west", r"\text{east}"),
    ("D", r"\text{(C)}"),
    ("5x", "5"),
    ("5 million", "5"),
    ("3 in 5", "3"),
    ("5 out of 6", "5"),
    ("5 times 7", "5"),
    ("1/0", "5"),
    (r"\infty", "5"),
    (r"\text{no solution}", "5"),
]
# Whole texts, without a box that could be read: the model gave no answer.
_EMPTY = [
    None,
    "",
    " \n ",
    r"\boxed{}",
    r"So it is \boxed{",
    r"First \boxed{5}, no, \boxed{6",
    "I give up",
    "\x00",
    "{" * 100_000,
]
# Whole texts that must not be taken for the answer 5, and must not harm anybody else.
_HOSTILE = [
    _TOWER,
    r"\boxed{100000000!}",
    r"\boxed{10^{10^{10}}}",
    r"\boxed{\sum_{k=1}^{10^{12}} k!}",
    rf"\boxed{{{'(' * 1500}5{')' * 1500}}}",
    r"\boxed{" + r"\sqrt{" * 500 + "5" + "}" * 501,
    rf"\boxed{{{'{' * 50_000}5{'}' * 50_000}}}",
    r"\boxed{" * 10_000,
    rf"\boxed{{{'9' * 100_000}}}",
    "$" * 5_000 + "{" * 5_000,
    r"\boxed{__import__('os')._exit(0)}",
    r"\boxed{exec('while True: pass')}",
    "import os\nos.kill(os.getpid(), 9)\nAnswer: os",
    r"\boxed{\input{/etc/passwd}}",
    r"\boxed{\def\x{\x\x}\x}",
    "\\boxed{\ud800}",
    r"\boxed{\frac{}{}}",
    "\x00\x01\x02 \\boxed{\x00}",
    '{"correct": true}',
]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "gold"), _RIGHT)
async def test_right_in_another_form(scorer: AnswerScorer, given: str, gold: str) -> None:
    score = await scorer.score(f"Hence the answer is $\\boxed{{{given}}}$.", ask(gold))
    assert score.correct is True, score


@pytest.mark.slow
@pytest.mark.parametrize(("given", "gold"), _WRONG)
async def test_near_misses_are_wrong(scorer: AnswerScorer, given: str, gold: str) -> None:
    score = await scorer.score(f"Hence the answer is $\\boxed{{{given}}}$.", ask(gold))
    assert (score.correct, score.error) == (False, None), score


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        (r"First \boxed{4}, then \boxed{5}.", "5", True),
        (r"First \boxed{5}, then \boxed{4}.", "5", False),
        (r"\boxed{5} is what I put into \boxed{}.", "5", True),
        (r"The answers are \boxed{1} and \boxed{2}.", "2, 1", True),
        (r"The answers are \boxed{1} and \boxed{2}.", "1, 2, 3", False),
        (r"\boxed{\boxed{5}}", "5", True),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "0.5", True),
        ("Answer: 0.75", r"\frac{3}{4}", True),
        ("**Answer: $\\dfrac{3}{4}$**", "0.75", True),
        ("so $x = 5$, hence $x + 1 = 6$", "6", True),
        ("The answer is east.", r"\text{east}", True),
        ("The answer is \\text{west}.", r"\text{east}", False),
        ("$1$ and $2$", "2, 1", True),
    ],
)
async def test_where_the_answer_is_looked_for(scorer: AnswerScorer, text: str, gold: str, right: bool) -> None:
    assert (await scorer.score(text, ask(gold))).correct is right


@pytest.mark.slow
@pytest.mark.parametrize("text", _EMPTY, ids=range(len(_EMPTY)))
async def test_no_answer_is_wrong_and_no_error(scorer: AnswerScorer, text: str | None) -> None:
    score = await scorer.score(text, ask("5"))
    assert (score.correct, score.answer, score.error) == (False, None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "right"), [("4.2", True), ("4.3", True), (r"\frac{43}{10}", True), (r"4.15\%", True), ("4.31", False)]
)
async def test_a_tolerance_is_kept(scorer: AnswerScorer, given: str, right: bool) -> None:
    assert (await scorer.score(f"\\boxed{{{given}}}", ask("4.2", "math:0.1"))).correct is right


@pytest.mark.slow
async def test_an_unreadable_gold_answer_is_an_error_value() -> None:
    scorer = AnswerScorer(1, _PATIENT_S)
    try:
        score = await scorer.score(r"\boxed{5}", ask(r"\frac{"))
        assert score.correct is None and score.error is not None and "gold answer" in score.error
        assert (await scorer.score(r"\boxed{5}", ask(" "))).correct is None
        assert scorer.counts == {"gold": 2}
    finally:
        scorer.close()


@pytest.mark.slow
async def test_hostile_answers_cost_only_their_own_grade() -> None:
    scorer = AnswerScorer(2, _SHORT_S)
    try:
        scores = await asyncio.gather(*(scorer.score(text, ask("5")) for text in _HOSTILE))
        for text, score in zip(_HOSTILE, scores, strict=True):
            assert score.correct is not True, text[:80]
            assert (score.error is None) is (score.correct is False), text[:80]
            assert len(score.answer or "") < 1000, text[:80]
        assert scorer.counts["timeout"] >= 1, "the tower of powers ought to run out of time"
        assert scorer.counts.total() == len(_HOSTILE)
        assert (await scorer.score(r"\boxed{\frac{10}{2}}", ask("5"))).correct is True
    finally:
        scorer.close()


@pytest.mark.slow
async def test_after_a_timeout_the_same_process_slot_grades_on() -> None:
    scorer = AnswerScorer(1, _SHORT_S)
    try:
        late, good = await asyncio.gather(
            scorer.score(_TOWER, ask("5")), scorer.score(r"\boxed{\frac{10}{2}}", ask("5"))
        )
        # The second waited longer than the limit for its turn: its own clock began with its check.
        assert late.correct is None and late.error == f"not checked within {_SHORT_S:g} s"
        assert good.correct is True
        assert scorer.counts == {"timeout": 1, "right": 1}
    finally:
        scorer.close()


@pytest.mark.slow
async def test_two_hundred_answers_at_once(scorer: AnswerScorer) -> None:
    scores = await asyncio.gather(
        *(scorer.score(rf"\boxed{{\frac{{{2 * n}}}{{4}}}}", ask(f"{n / 2}")) for n in range(1, 201))
    )
    assert [score.correct for score in scores] == [True] * 200
    assert len(scorer.pids) <= 2


@pytest.mark.slow
async def test_a_killed_grader_costs_at_most_the_answer_that_it_had() -> None:
    scorer = AnswerScorer(1, _PATIENT_S)
    half = r"\boxed{\frac{10}{4}}"
    try:
        assert (await scorer.score(half, ask("2.5"))).correct is True
        (idle,) = scorer.pids
        os.kill(idle, signal.SIGKILL)
        _wait_gone(idle)
        assert (await scorer.score(half, ask("2.5"))).correct is True, "nothing was being checked: nothing is lost"
        busy = asyncio.create_task(scorer.score(_TOWER, ask("5")))
        (victim,) = scorer.pids
        while psutil.Process(victim).cpu_times().user < 1.0:  # it has taken the tower up
            await asyncio.sleep(0.1)
        os.kill(victim, signal.SIGKILL)
        lost = await busy
        assert lost.correct is None and lost.error == "the process that checked it died"
        assert (await scorer.score(half, ask("2.5"))).correct is True
        assert scorer.counts == {"right": 3, "crash": 1}
    finally:
        scorer.close()


@pytest.mark.slow
async def test_closing_ends_the_processes_and_scoring_again_starts_new_ones() -> None:
    scorer = AnswerScorer(2, _PATIENT_S)
    assert scorer.pids == []
    assert (await scorer.score(r"\boxed{\frac{10}{4}}", ask("2.5"))).correct is True
    pids = scorer.pids
    scorer.close()
    scorer.close()
    assert pids and not any(psutil.pid_exists(pid) for pid in pids)
    assert (await scorer.score(r"\boxed{\frac{10}{4}}", ask("2.5"))).correct is True
    scorer.close()


@pytest.mark.slow
def test_graders_end_with_an_owner_that_was_killed() -> None:
    program = (
        "import asyncio\n"
        "from roro_ray.data.scoring import AnswerScorer\n"
        "from roro_ray.types import Query\n"
        "scorer = AnswerScorer(2, 3.0)\n"
        "async def main():\n"
        "    query = Query('q', 's', 'test', 't', '5', 'math')\n"
        "    await scorer.score(r'\\boxed{\\frac{10}{2}}', query)\n"
        "    busy = asyncio.create_task(scorer.score(r'\\boxed{9^{9^{9^9}}}', query))\n"
        "    idle = asyncio.create_task(scorer.score(r'\\boxed{\\frac{10}{2}}', query))\n"
        "    await idle\n"
        "    print(*scorer.pids, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert pids
    for pid in pids:
        _wait_gone(pid)


def test_exact_answers_are_scored_in_process() -> None:
    scorer = AnswerScorer()
    score = asyncio.run(scorer.score("Answer: 050", ask("50", "exact")))
    assert score == Score(True, "50") or score == Score(True, "050")
    assert asyncio.run(scorer.score("\\boxed{51}", ask("50", "exact"))).correct is False
    assert asyncio.run(scorer.score(None, ask("50", "exact"))).correct is False
    assert asyncio.run(scorer.score("\\boxed{50}", ask("50"))).correct is True
    assert scorer.pids == [] and scorer.counts == {"right": 2, "wrong": 2}


def test_a_scorer_travels_as_its_settings() -> None:
    scorer = AnswerScorer(3, 7.0)
    scorer.counts["right"] = 5
    copy = pickle.loads(pickle.dumps(scorer))
    assert copy.__reduce__() == scorer.__reduce__() and not copy.counts


def test_an_unknown_grader_is_refused() -> None:
    with pytest.raises(ConfigError, match="'maths', expected exact, math"):
        asyncio.run(AnswerScorer().score("5", ask("5", "maths")))
    with pytest.raises(ConfigError, match="math:TOLERANCE"):
        read_tolerance(ask("5", "math:much"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} and \boxed{ 7 }.", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{5} then \boxed{", None),
        ("Answer: 50", "50"),
        ("The answer is $x+1$.", "x+1"),
        ("We get $a$ and then $b^2$", "b^2"),
        ("which makes 1,250 in all.", "1,250"),
        ("nothing", None),
        (None, None),
    ],
)
def test_reading_a_final_answer(text: str | None, answer: str | None) -> None:
    assert read_final_answer(text) == answer


def test_reading_boxes_of_hostile_text_is_linear() -> None:
    assert read_boxes("\\boxed{" * 20_000) == []
    assert read_boxes("}" * 100_000 + "\\boxed{5}") == ["5"]
    assert len(read_boxes("\\boxed{1}" * 20_000)) <= 20


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("1, 2,3", ["1", "2", "3"]),
        ("(1,2), [3,4)", ["(1,2)", "[3,4)"]),
        ("58,500", ["58,500"]),
        ("2500,7500", ["2500", "7500"]),
        ("$69$,$84$", ["69", "84"]),
        (r"\{1,2\}", ["1", "2"]),
        (r"1\text{ and }2", ["1", "2"]),
        ("", []),
    ],
)
def test_splitting_a_list(text: str, items: list[str]) -> None:
    assert split_items(text) == items


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("27", "27.0", True),
        ("1,000", "1000", True),
        ("28", "27", False),
        ("1,3,5", "135", None),
        (r"\frac12", "0.5", None),
        ("1" * 5000, "1", None),
        ("", "", None),
    ],
)
def test_what_needs_no_mathematics(answer: str, gold: str, expected: bool | None) -> None:
    assert compare_plainly(answer, gold) is expected


def test_exact_answers_of_any_length_and_lists_are_no_numbers() -> None:
    assert is_correct("9" * 10_000, ask("5", "exact")) is False
    assert is_correct("1,3,5", ask("135", "exact")) is False
    assert is_correct("1 2", ask("12", "exact")) is False


def _wait_gone(pid: int) -> None:
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.1)  # the test's own time limit ends this
