"""Fixtures that several test files share: one local Ray for all tests that need one, tiny models of real families.

Under pytest-xdist a file is one process's work, and all files that start a Ray are the same process's: two Rays at once
on two cores start their workers too late for Ray's own deadlines.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import setuptools  # noqa: F401  # vLLM imports it late, and it refuses once the standard library's distutils is there


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of pytest-xdist: who runs what. (Its own `--dist loadgroup` does not see groups under pytest 9.)"""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class OneRayScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if _starts_ray(config.rootpath / file) else file

    return OneRayScheduling(config, log)


@lru_cache
def _starts_ray(file: Path) -> bool:
    """Whether any test of a file does."""
    return re.search(r"\blocal_ray\b|\bmark\.(ray|cluster)\b", file.read_text("utf-8")) is not None


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A cluster of four logical CPUs; tests give back what they start."""
    from actors.cluster import start_local

    tests = str(Path(__file__).parent)  # workers unpickle what test modules define
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    temp_dir = Path(tempfile.mkdtemp(prefix="roro-test-"))  # short: Ray's socket paths must stay below 108 characters
    start_local(object_store_mb=200, temp_dir=temp_dir, num_cpus=4)
    import ray

    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_models.make_tiny_model` with a directory of its own for each set of arguments; nobody may write there."""
    from tiny_models import make_tiny_model

    root = tmp_path_factory.mktemp("tiny-models")
    made: dict[str, Path] = {}

    def get(family: str = "qwen3", **settings: object) -> Path:
        key = "-".join([family, *(f"{name}={settings[name]}" for name in sorted(settings))])
        if key not in made:
            made[key] = make_tiny_model(root / key, family, **settings)
        return made[key]

    return get
