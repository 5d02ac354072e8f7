"""What `ray job submit --working-dir .` sends to a cluster, computed by Ray's own packaging from a tree in use."""

from __future__ import annotations

import logging
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[1]
RUNTIME_ENV = ROOT / "jobs" / "runtime_env.yaml"
MOST_BYTES = 8 * 2**20  # Ray's own limit is 500 MiB
# What a tree collects that is worked in. Each is a megabyte of what does not compress.
JUNK = (
    *("runs/one/router/roro/router.safetensors", "runs/one/trajectories/chain-00000.parquet", "wandb/run-1/run.wandb"),
    *("checkpoints/step-100/model.safetensors", "models/qwen/model-00001-of-00002.safetensors", "models/q.gguf"),
    *("roro_ray/world/checkpoints/model.safetensors", "roro_ray/world/weights.tar.gz", "adapters/optimizer.pt"),
    *(".venv/lib/torch/libtorch.so", ".git/objects/pack/pack-1.pack", ".mypy_cache/3.11/a.json"),
    *(".hypothesis/examples/a", "tests/data.json", "docs/images/page.png", "bench/out.json", "build/lib/a.py"),
    *("jobs/__pycache__/collect.cpython-311.pyc", "job.log"),
)


def pack(tree: Path, target: Path, excludes: list[str]) -> dict[str, int]:
    """The files that Ray would upload, with their sizes; as `ray job submit` calls it."""
    both = [*get_runtime_env_default_excludes(), *excludes]
    create_package(str(tree), target, include_gitignore=True, excludes=both, logger=logging.getLogger("upload"))
    with zipfile.ZipFile(target) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}


@pytest.fixture
def used_tree(tmp_path: Path) -> Path:
    """The project as a checkout holds it, with what work leaves in it."""
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "wandb", ".*_cache", ".hypothesis", "__pycache__")
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=skipped, symlinks=True)
    for name in JUNK:
        file = tree / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\0" * 2**20)
    return tree


def test_an_upload_is_the_code_and_its_tiny_models_and_nothing_else(used_tree: Path, tmp_path: Path) -> None:
    excludes = yaml.safe_load(RUNTIME_ENV.read_text())["excludes"]
    sent = pack(used_tree, tmp_path / "upload.zip", excludes)
    assert not set(sent) & set(JUNK)
    assert (tmp_path / "upload.zip").stat().st_size < MOST_BYTES
    assert not {name.partition("/")[0] for name in sent} & {"tests", "docs", "bench", "cluster", "runs", ".ci"}
    # Whatever a stage imports or reads: the packages' own files, whole.
    for package in ("roro_ray", "actors", "jobs", "serve", "configs"):
        files = {str(file.relative_to(ROOT)) for file in (ROOT / package).rglob("*") if file.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= set(sent), package
    weights = {name: size for name, size in sent.items() if name.endswith(".safetensors")}
    assert {name.split("/")[3] for name in weights} == {"cross", "encoder", "judge", "large", "rubricor", "small"}
    assert sum(weights.values()) < 4 * 2**20


def test_the_list_is_what_keeps_the_upload_small(used_tree: Path, tmp_path: Path) -> None:
    """Without .rayignore the same tree sends weights and tests: so the test above can fail."""
    (used_tree / ".rayignore").unlink()
    sent = pack(used_tree, tmp_path / "upload.zip", [])
    assert {"checkpoints/step-100/model.safetensors", "models/q.gguf", "tests/data.json", "job.log"} <= set(sent)


def test_the_shipped_runtime_env_is_one_that_ray_takes() -> None:
    content = yaml.safe_load(RUNTIME_ENV.read_text())
    checked = RuntimeEnv(**content)  # refuses wrong types and unknown fields
    assert checked["env_vars"]["OMP_NUM_THREADS"] == "1" and int(checked["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    # An example is a comment until somebody wants it; none of them reinstalls what must fit the nodes.
    packages = [line.split()[2] for line in RUNTIME_ENV.read_text().splitlines() if line.startswith("#   - ")]
    assert packages and not any(name.startswith(("torch", "ray", "vllm", "transformers")) for name in packages)
