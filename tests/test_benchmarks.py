"""The five benchmarks: every row of the real files, the hub's editions in small, splits, contamination, bad records."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedEngine, make_fake_pool, run_specs, write_notes

from roro_ray.config import Config, DataConfig
from roro_ray.data.benchmarks import BENCHMARKS, Benchmark, Problem, load_benchmark
from roro_ray.data.collection import plan_shards
from roro_ray.data.dataset_files import load_rows
from roro_ray.data.scoring import AnswerScorer
from roro_ray.data.sources import (
    describe_sources,
    digest_text,
    make_queries_of,
    make_stage_queries,
    suite_names,
)
from roro_ray.errors import ConfigError, DataError
from roro_ray.routing.runner import Runner
from roro_ray.settings import load_config
from roro_ray.types import Query, Trajectory
from roro_ray.world.tasks import SPLITS, make_queries

_ROOT = Path(os.environ.get("RORO_BENCHMARKS") or Path(__file__).resolve().parents[2] / "shared" / "benchmarks")
# Rows of each file, and those of them whose answer a program can check.
_ROWS = {
    "gsm8k": (1319, 1319),
    "math500": (500, 500),
    "aime24": (30, 30),
    "amc23": (40, 40),
    "olympiadbench": (675, 674),
}


def load_real(name: str) -> Benchmark:
    if not (_ROOT / name).is_dir():
        pytest.skip(f"{_ROOT / name} is missing: set RORO_BENCHMARKS to the folder of the five benchmarks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_benchmark(name, str(_ROOT / name))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_rows(count: int, tag: str = "") -> list[dict[str, Any]]:
    return [{"problem": f"What is {number} plus {number}{tag}?", "answer": str(2 * number)} for number in range(count)]


def only(benchmark: Benchmark) -> tuple[Problem, ...]:
    (problems,) = benchmark.parts.values()
    return problems


def texts(queries: Sequence[Query]) -> set[str]:
    return {query.text for query in queries}


def take(data: DataConfig, suite: str, split: str, count: int = 10_000) -> list[Query]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_queries_of(data, suite, split, count)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_row_of_the_real_files(name: str) -> None:
    benchmark = load_real(name)
    assert (benchmark.rows, benchmark.size) == _ROWS[name]
    assert benchmark.rows - benchmark.size == sum(benchmark.left_out.values())
    for problem in only(benchmark):
        assert problem.text.strip() and problem.answer.strip() and "####" not in problem.answer
    assert len({problem.text for problem in only(benchmark)}) == benchmark.size


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_gold_answer_is_right_and_the_next_rows_is_not(name: str) -> None:
    """By math-verify itself: the comparison of plain text that a scorer tries first is left out."""
    grading = pytest.importorskip("roro_ray.data.math_grader", reason="math-verify is not installed")
    problems = only(load_real(name))
    wrong, right = [], []
    for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
        written = problem.answer.replace("\\frac", "\\dfrac").replace("+", " + ")
        if grading.grade(grading.Task((written,), "", problem.answer)).correct is not True:
            wrong.append((problem.row, problem.answer))
        if other.answer != problem.answer and grading.grade(grading.Task((other.answer,), "", problem.answer)).correct:
            right.append((problem.answer, other.answer))
    assert wrong == []
    # `x=5` answers a question whose answer is 5.
    assert right == ([("5", "x=5")] if name == "math500" else [])


def test_how_the_real_answers_are_read() -> None:
    def answers(name: str) -> dict[int, str]:
        return {problem.row: problem.answer for problem in only(load_real(name))}

    assert answers("gsm8k")[0] == "18" and "70000" in answers("gsm8k").values()
    assert answers("amc23")[0] == "27" and "-1" in answers("amc23").values()
    assert "025" in answers("aime24").values()
    olympiad = answers("olympiadbench").values()
    assert "69, 84" in olympiad and "(0,4]" in olympiad and "(1,8,19), (2,7,13), (4,5,7)" in olympiad
    assert not any("$" in answer for answer in olympiad)
    graders = [problem.grader for problem in only(load_real("olympiadbench"))]
    assert (graders.count("math"), graders.count("math:0.1")) == (673, 1)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_real_splits_are_disjoint_and_whole(name: str) -> None:
    benchmark = load_real(name)
    data = DataConfig(suites=[name], sources={name: str(_ROOT / name)})
    parts = [texts(take(data, name, split)) for split in SPLITS]
    assert sum(map(len, parts)) == len(set().union(*parts)) == benchmark.size
    alone = DataConfig(suites=[name], train_suites=["chain"], sources=data.sources)
    held_out = [texts(take(alone, name, split)) for split in SPLITS[1:]]
    assert sum(map(len, held_out)) == len(set().union(*held_out)) == benchmark.size


_HUB = {
    "gsm8k": ({"question": "How many?", "answer": "3+4=<<3+4=7>>7\nSo 1,007.\n#### 1,007"}, "1,007"),
    "math500": (
        {"problem": "How many?", "solution": "\\boxed{8}", "answer": "\\frac{7}{2}", "subject": "Algebra", "level": 2},
        "\\frac{7}{2}",
    ),
    "aime24": (
        {"id": 60, "problem": "How many?", "solution": "Long.", "answer": "204", "url": "u", "year": "2024"},
        "204",
    ),
    "aime24 without answer": ({"id": 1, "problem": "How many?", "solution": "So \\boxed{073}.", "url": "u"}, "073"),
    "amc23": ({"id": 0, "question": "How many?", "answer": "27.0", "url": "u"}, "27.0"),
    "amc23 float": ({"id": 0, "question": "How many?", "answer": 27.0, "url": "u"}, "27"),
    "float": ({"question": "How many?", "answer": 0.25}, "0.25"),
    "int": ({"question": "How many?", "answer": 12}, "12"),
    "olympiadbench": (
        {
            "question": "How many?",
            "solution": ["\\boxed{1}"],
            "final_answer": ["$2$,$\\frac{1}{2}$"],
            "context": None,
            "is_multiple_answer": True,
            "answer_type": "Numerical",
            "unit": None,
            "error": None,
            "question_type": "Open-ended",
            "modality": "Text-only",
        },
        "2, \\frac{1}{2}",
    ),
}


@pytest.mark.parametrize("edition", _HUB)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_editions_of_the_hub(tmp_path: Path, edition: str, suffix: str) -> None:
    record, answer = _HUB[edition]
    path = write_rows(tmp_path / f"rows{suffix}", [record])
    assert only(load_benchmark("mine", str(path))) == (Problem(0, "How many?", answer),)


def test_rows_that_no_program_can_check_are_left_out_and_counted(tmp_path: Path) -> None:
    base = {
        "final_answer": ["2"],
        "answer_type": "Numerical",
        "is_multiple_answer": False,
        "question_type": "Open-ended",
    }
    rows = [
        base | {"question": "Good?", "error": "1e-2"},
        base | {"question": "Good?"},
        base | {"question": "Look at <image_1>."},
        base | {"question": "Show it.", "question_type": "Theorem proof", "final_answer": None},
        base | {"question": "Which?", "final_answer": ["$f(x)=a x$, where $a$ is an arbitrary integer"]},
        base | {"question": "How far?", "context": "A train leaves.", "final_answer": ["$2 \\text{ miles}$."]},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.warns(UserWarning, match=r"4 of 6 rows left out: answer in words \(1\), asks for a proof \(1\), needs"):
        benchmark = load_benchmark("mine", str(path))
    assert [(problem.row, problem.grader) for problem in only(benchmark)] == [(0, "math:0.01"), (5, "math")]
    assert only(benchmark)[1].text == "A train leaves.\n\nHow far?"
    assert only(benchmark)[1].answer == "2 \\text{ miles}"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"problem": "How many?", "level": 1},
            ["rows.jsonl, row 1", "no answer", "answer, final_answer", "level (int)"],
        ),
        ({"answer": "5"}, ["rows.jsonl, row 1", "no question", "problem, question"]),
        ({"problem": " ", "answer": "5"}, ["row 1", "no question"]),
        ({"problem": "How many?", "solution": "no box"}, ["row 1", "no answer"]),
        ({"problem": "How many?", "answer": "5", "error": "small"}, ["row 1", "'small'", "1e-1"]),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, record: dict[str, Any], words: list[str]) -> None:
    good = {"problem": "Good?", "answer": "5"}
    path = write_rows(tmp_path / "rows.jsonl", [good, record])
    with pytest.raises(DataError) as caught:
        load_benchmark("mine", str(path))
    assert all(word in str(caught.value) for word in words), caught.value


def test_sources_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.jsonl").write_text('{"problem": "a", "answer": "1"}\n{"problem": \n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    write_rows(tmp_path / "mixed" / "test.jsonl", make_rows(2))
    write_rows(tmp_path / "mixed" / "more.jsonl", make_rows(2))
    for source, words in {
        "broken.jsonl": "broken.jsonl: not readable as json",
        "empty": "holds no file that ends in",
        "notes.txt": "expected a file that ends in",
        "mixed": "cannot tell the split of more.jsonl beside test",
        "nowhere.jsonl": "no such file or folder",
    }.items():
        with pytest.raises(DataError, match=words):
            load_rows(str(tmp_path / source))


def test_the_hub_out_of_reach_says_what_was_tried_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(path: str, name: str | None = None, revision: str | None = None) -> None:
        raise ConnectionError(f"cannot reach {path} {name} {revision}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError) as caught:
        load_benchmark("aime24")
    for words in ("HuggingFaceH4/aime_2024", "math-ai/aime24", "HF_HUB_OFFLINE is set", "data.sources={aime24: PATH}"):
        assert words in str(caught.value)
    with pytest.raises(DataError, match="cannot reach me/mine part v2"):
        load_benchmark("mine", "me/mine:part@v2")


def test_splits_of_the_hub_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {"train": make_rows(200), "test": make_rows(20, " exactly")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    data = DataConfig(suites=["mine"], sources={"mine": "me/hub-splits"})
    assert texts(take(data, "mine", "test")) == {row["problem"] for row in rows["test"]}
    train, validation = texts(take(data, "mine", "train")), texts(take(data, "mine", "validation"))
    assert train | validation == {row["problem"] for row in rows["train"]} and not train & validation
    # Shares 0.6 and 0.2 of what is there: a quarter for validation.
    assert 0.15 < len(validation) / 200 < 0.35


def test_unknown_splits_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {"easy": make_rows(5), "hard": make_rows(6, " exactly")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    with pytest.raises(DataError, match="the splits easy, hard: expected train, validation or test"):
        load_rows("me/levels")
    rows |= {"test": make_rows(2, " again")}
    assert [len(group) for group in load_rows("me/levels").values()] == [2]


def test_files_of_a_folder_are_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_rows(folder / "train-00000-of-00002.parquet", make_rows(3, " a"))
    write_rows(folder / "train-00001-of-00002.parquet", make_rows(3, " b"))
    write_rows(folder / "dev.jsonl", make_rows(4, " c"))
    write_rows(folder / "test.jsonl", make_rows(5, " d"))
    data = DataConfig(suites=["mine"], sources={"mine": str(folder)})
    assert [len(take(data, "mine", split)) for split in SPLITS] == [6, 4, 5]
    assert sorted(query.id for query in take(data, "mine", "train")) == [f"mine/train/{row}" for row in range(6)]
    alone = DataConfig(suites=["mine"], train_suites=["chain"], sources=data.sources)
    assert [len(take(alone, "mine", split)) for split in SPLITS[1:]] == [4, 5]


def test_splits_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = make_rows(300)
    one = DataConfig(suites=["mine"], sources={"mine": str(write_rows(tmp_path / "a.jsonl", rows))})
    other = DataConfig(suites=["mine"], sources={"mine": str(write_rows(tmp_path / "b.jsonl", rows[::-1]))})
    for split, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
        mine = take(one, "mine", split)
        assert [query.text for query in mine] == [query.text for query in take(other, "mine", split)]
        assert abs(len(mine) / 300 - share) < 0.1
        assert take(one, "mine", split, 7) == mine[:7]
        assert make_queries_of(one, "mine", split, 3, offset=4) == mine[4:7]
    reseeded = DataConfig(suites=["mine"], sources=one.sources, seed=1)
    assert texts(take(reseeded, "mine", "test")) == texts(take(one, "mine", "test"))
    assert take(reseeded, "mine", "test") != take(one, "mine", "test")


def test_a_suite_that_is_not_trained_on_is_all_held_out(tmp_path: Path) -> None:
    source = str(write_rows(tmp_path / "a.jsonl", make_rows(300)))
    data = DataConfig(suites=["mine"], train_suites=["chain"], sources={"mine": source}, split_shares=[0.6, 0.1, 0.3])
    validation, test = take(data, "mine", "validation"), take(data, "mine", "test")
    assert len(validation) + len(test) == 300 and 0.6 < len(test) / 300 < 0.9
    with pytest.raises(ConfigError, match="mine has 0 train queries"):
        take(data, "mine", "train")


def test_what_is_evaluated_is_not_trained_on(tmp_path: Path) -> None:
    rows = make_rows(200)
    shouted = [row | {"problem": "  " + row["problem"].upper()} for row in rows[:50]]
    evaluated = write_rows(tmp_path / "evaluated.jsonl", rows[:100])
    trained = write_rows(tmp_path / "trained" / "train.jsonl", [*shouted, *rows[50:]])
    write_rows(tmp_path / "trained" / "test.jsonl", make_rows(3, " again"))
    sources = {"mine": str(evaluated), "practice": str(tmp_path / "trained")}
    data = DataConfig(suites=["mine"], train_suites=["practice"], sources=sources, split_shares=[1.0, 0.0, 0.0])
    with pytest.raises(ConfigError, match="mine has 0 test queries"):
        make_queries_of(data, "mine", "test", 1)
    data = DataConfig(suites=["mine"], train_suites=["practice"], sources=sources, split_shares=[0.5, 0.0, 0.5])
    held_out = {digest_text(query.text) for query in take(data, "mine", "test")}
    assert len(held_out) == 100
    with pytest.warns(UserWarning, match="practice: 100 of 200 training queries dropped"):
        train = make_queries_of(data, "practice", "train", 100)
    assert trained.exists() and len(train) == 100 and not held_out & {digest_text(query.text) for query in train}


def test_fewer_queries_than_asked_for_are_all_taken_and_told(tmp_path: Path) -> None:
    source = str(write_rows(tmp_path / "a.jsonl", make_rows(30)))
    data = DataConfig(suites=["mine"], train_suites=["chain"], sources={"mine": source}, split_shares=[0, 0, 1])
    with pytest.warns(UserWarning, match="mine has 30 of the 100 test queries"):
        assert len(make_queries_of(data, "mine", "test", 100)) == 30
    with pytest.raises(ConfigError, match=r"Lower data\.test_queries"):
        make_queries_of(data, "mine", "test", 5, offset=30)


def test_the_worlds_queries_are_what_they_were() -> None:
    data = DataConfig(seed=3)
    assert make_queries_of(data, "chain", "test", 5) == make_queries("chain", "test", 5, 3)
    assert make_queries_of(data, "chain", "validation", 2, offset=4) == make_queries("chain", "validation", 6, 3)[4:]
    assert describe_sources(data) == {}
    config = Config(data=DataConfig(suites=["chain", "word"], train_suites=["list"]))
    assert {query.suite for query in make_stage_queries(config, "train", 2)} == {"list"}
    assert [query.suite for query in make_stage_queries(config, "test", 1)] == ["chain", "word"]
    assert suite_names(DataConfig(), "train") == suite_names(DataConfig(), "evaluate") == DataConfig().suites
    with pytest.raises(ConfigError, match="expected train or evaluate"):
        suite_names(data, "test")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.suites=[gsm8]"], ["data.suites", "did you mean 'gsm8k'"]),
        (["data.train_suites=[chian]"], ["data.train_suites", "did you mean 'chain'"]),
        (["data.suites=[gsm8k,gsm8k]"], ["data.suites names gsm8k twice"]),
        (["data.split_shares=[0.5,0.5]"], ["data.split_shares", "sum to 1"]),
        (["data.split_shares=[0.5,0.5,0.5]"], ["data.split_shares"]),
        (["data.split_shares=[1.5,-0.5,0]"], ["data.split_shares"]),
        (["data.sources={chain: a.jsonl}"], ["data.sources names chain", "embedded world"]),
        (["data.sources={math50: a.jsonl}"], ["'math50'", "did you mean 'math500'"]),
        (["data.sources={gsm8k: ''}"], ["gsm8k is empty"]),
    ],
)
def test_wrong_settings_are_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert all(word in str(caught.value) for word in words), caught.value


def test_sources_of_ones_own_and_of_unused_benchmarks_are_settings() -> None:
    config = load_config(["data.suites=[mine,chain]", "data.sources={mine: a.jsonl, gsm8k: b.jsonl}"])
    assert describe_sources(config.data)["sources"] == {"mine": "a.jsonl"}


@pytest.mark.slow
def test_a_benchmark_is_collected_and_scored(tmp_path: Path) -> None:
    rows = [
        {"problem": "Half of one?", "answer": "\\frac{1}{2}"},
        {"problem": "Half of two?", "answer": "1"},
        {"problem": "Broken?", "answer": "\\frac{"},
    ]
    path = write_rows(tmp_path / "rows" / "train.jsonl", rows)
    write_rows(tmp_path / "rows" / "test.jsonl", make_rows(1))
    overrides = ["data.suites=[mine]", f"data.sources={{mine: {path.parent}}}", "data.train_queries=9"]
    config = load_config([*overrides, "data.split_shares=[1,0,0]", "collect.strategies=[fixed:0,fixed:1]"])
    pool = make_fake_pool(
        ScriptedEngine("small", write_notes(1, "0.5")), ScriptedEngine("large", write_notes(1, "0.5"))
    )
    scorer = AnswerScorer.from_config(config.data)
    runner = Runner(pool, None, config.episode, scorer=scorer)
    with pytest.warns(UserWarning, match="mine has 3 of the 9 train queries"):
        (shard,) = plan_shards(config)
    try:
        results = run_specs(runner, shard.specs)
    finally:
        scorer.close()
    trajectories = {result.query_id: result for result in results if isinstance(result, Trajectory)}
    assert len(results) == 6 and len(trajectories) == 3
    half, one, broken = (trajectories[f"mine/train/{row}"] for row in range(3))
    assert (half.answer, half.correct, half.error) == ("0.5", True, None)
    assert (one.answer, one.correct, one.error) == ("0.5", False, None)
    assert broken.correct is None and broken.error is not None and "gold answer" in broken.error
    assert scorer.counts == {"right": 2, "wrong": 2, "gold": 2}
