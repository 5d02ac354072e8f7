"""The Parquet store: exact round trips, whole files only, clear errors, and other readers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from roro_ray.data.records import make_decoder
from roro_ray.data.store import (
    finished_shards,
    iter_trajectories,
    load_pairs,
    load_trajectories,
    remove_leftovers,
    save_pairs,
    save_trajectories,
)
from roro_ray.errors import DataError
from roro_ray.types import Decision, PairKind, PreferencePair, Step, Trajectory, Usage

pytestmark = pytest.mark.timeout(60)


def make_trajectory(number: int, steps: int = 3) -> Trajectory:
    made = tuple(
        Step(
            model=index % 2,
            text=f"{'AB'[index % 2]}: ünï \n code {number}",
            tokens=7,
            confidence=1 / 3 + number,
            confidence_min=math.nextafter(0.1, 1),
            finish="delimiter",
            decision=Decision(index % 2, math.log(1 / 7), (1 / 3, 2 / 3), 4),
            usage=Usage(10, 7, 1.23456789e15 + number, 0.1),
            discarded=2,
            features=(0.1, 1e-300, math.pi),
        )
        for index in range(steps)
    )
    return Trajectory(
        id=f"t{number}",
        query_id=f"q{number // 2}",
        suite="chain",
        strategy="random:0.2",
        seed=2**40 + number,
        cost_weight=0.1,
        steps=made,
        answer=None if number == 1 else "42",
        correct=None if number == 1 else number % 2 == 0,
        end="answer",
        usage=Usage(1, 2, 3.3, 4.4),
    )


PAIR = PreferencePair("q", "word", 3, PairKind.PROCESS, "a", "b", 0.1 + 0.2)


def test_trajectories_come_back_exactly(tmp_path: Path) -> None:
    trajectories = [make_trajectory(n, steps=n % 4) for n in range(50)]
    save_trajectories(tmp_path / "one.parquet", trajectories)
    assert load_trajectories(tmp_path / "one.parquet") == trajectories
    assert list(iter_trajectories(tmp_path, batch_size=7)) == trajectories


def test_not_a_number_comes_back(tmp_path: Path) -> None:
    odd = replace(make_trajectory(0), cost_weight=math.nan)
    save_trajectories(tmp_path / "x.parquet", [odd])
    assert math.isnan(load_trajectories(tmp_path)[0].cost_weight)


def test_pairs_come_back_exactly_with_their_kind(tmp_path: Path) -> None:
    save_pairs(tmp_path / "pairs.parquet", [PAIR])
    (loaded,) = load_pairs(tmp_path)
    assert loaded == PAIR and loaded.kind is PairKind.PROCESS


def test_no_record_is_a_file_too(tmp_path: Path) -> None:
    save_pairs(tmp_path / "none.parquet", [])
    assert load_pairs(tmp_path) == []


def test_a_directory_is_read_in_the_order_of_names_and_leftovers_are_not_read(tmp_path: Path) -> None:
    save_trajectories(tmp_path / "b.parquet", [make_trajectory(2)])
    save_trajectories(tmp_path / "a.parquet", [make_trajectory(0), make_trajectory(1)])
    (tmp_path / ".c.parquet.123.tmp").write_bytes(b"PAR1 half")
    assert [t.id for t in load_trajectories(tmp_path)] == ["t0", "t1", "t2"]
    assert finished_shards(tmp_path) == {"a": 2, "b": 1}
    assert remove_leftovers(tmp_path) == 1 and not list(tmp_path.glob(".*"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    save_trajectories(path, [make_trajectory(0)])

    def failing():
        yield make_trajectory(1)
        raise RuntimeError("worker died")

    with pytest.raises(RuntimeError, match="worker died"):
        save_trajectories(path, failing())
    assert [t.id for t in load_trajectories(path)] == ["t0"]


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named_with_the_cure_and_the_rest_is_untouched(tmp_path: Path, keep: float) -> None:
    save_trajectories(tmp_path / "good.parquet", [make_trajectory(0)])
    bad = tmp_path / "z.parquet"
    save_trajectories(bad, [make_trajectory(n) for n in range(1, 40)])
    bad.write_bytes(bad.read_bytes()[: int(bad.stat().st_size * keep)])
    for read in (load_trajectories, finished_shards):
        with pytest.raises(DataError, match=r"z\.parquet is truncated.*Delete it and run its stage again"):
            read(tmp_path)
    assert [t.id for t in load_trajectories(tmp_path / "good.parquet")] == ["t0"]


def test_a_damaged_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    save_trajectories(path, [make_trajectory(n) for n in range(200)])
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a\.parquet is truncated or damaged"):
        load_trajectories(path)


def test_what_is_missing_or_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"jobs\.collect"):
        load_trajectories(tmp_path)
    save_pairs(tmp_path / "p.parquet", [PAIR])
    with pytest.raises(DataError, match="holds PreferencePair, expected Trajectory"):
        load_trajectories(tmp_path)


def test_the_same_trajectory_twice_is_refused(tmp_path: Path) -> None:
    save_trajectories(tmp_path / "a.parquet", [make_trajectory(0)])
    save_trajectories(tmp_path / "b.parquet", [make_trajectory(0)])
    with pytest.raises(DataError, match="t0 stands there twice"):
        load_trajectories(tmp_path)


def test_a_field_that_an_older_file_lacks_takes_its_default() -> None:
    @dataclass(frozen=True)
    class Newer:
        name: str
        size: int = 7

    # Decoding needs the class in its module's namespace only for nested hints; these are plain.
    assert make_decoder(Newer)({"name": "x"}) == Newer("x", 7)
    with pytest.raises(KeyError):
        make_decoder(Newer)({"size": 1})


def test_other_readers_see_the_nested_records(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    save_trajectories(tmp_path / "a.parquet", [make_trajectory(n) for n in range(5)])
    (tmp_path / ".b.parquet.1.tmp").write_bytes(b"half")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column("steps").to_pylist()[0][0]["decision"]["probabilities"] == [1 / 3, 2 / 3]
    loaded = datasets.load_dataset("parquet", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded.num_rows == 5
    assert loaded[1]["answer"] is None and loaded[0]["steps"][2]["features"][2] == math.pi
