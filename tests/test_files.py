"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from roro_ray.data.files import write_whole

pytestmark = pytest.mark.timeout(30)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text("old")
    with write_whole(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old" and temporary.parent == tmp_path
        assert temporary.name.startswith(".") and temporary.name.endswith(".tmp")
        temporary.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["facts.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "facts.json"
    path.write_text("old")
    with pytest.raises(error), write_whole(str(path)) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["facts.json"]


def test_a_block_that_writes_nothing_is_an_error_and_not_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_whole(tmp_path / "facts.json"):
        pass
    assert names(tmp_path) == []
