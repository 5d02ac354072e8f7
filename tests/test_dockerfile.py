"""The Dockerfile: what it copies is there and let through, and it installs what pyproject.toml says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster_files import PROJECT
from tests.documents import ROOT

pytestmark = pytest.mark.timeout(60)
TEXT = (ROOT / "Dockerfile").read_text("utf-8")
REQUIREMENTS = ROOT / "docker" / "requirements.py"


def read_instructions() -> list[tuple[str, str]]:
    """Each instruction with its arguments on one line."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines()]


INSTRUCTIONS = read_instructions()


def read_ignored() -> list[str]:
    return [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def list_sources() -> set[str]:
    """What is copied from the project, not from another stage."""
    copied = [rest.split()[:-1] for name, rest in INSTRUCTIONS if name == "COPY"]
    return {source for sources in copied for source in sources if not sources[0].startswith("--from=")}


def list_requirements(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(REQUIREMENTS), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_what_is_copied_is_there_and_nothing_else_is_let_in() -> None:
    sources, ignored = list_sources(), read_ignored()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)


def test_the_packages_of_the_project_are_all_in_the_image() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "bench"}
    assert packages <= list_sources() and "configs" in list_sources()


def test_every_stage_stands_on_one_before_it() -> None:
    known: set[str] = set()
    for name, rest in INSTRUCTIONS:
        if name == "FROM":
            base, _, stage = rest.split()
            assert base in {*known, "scratch"} or base.startswith("python:${PYTHON}-"), base
            known.add(stage)
    assert {"cpu", "gpu"} <= known


def test_versions_are_those_of_the_project() -> None:
    arguments = dict(rest.split("=", 1) for name, rest in INSTRUCTIONS if name == "ARG")
    low, high = re.findall(r"3\.\d+", PROJECT["requires-python"])
    assert low <= arguments["PYTHON"] < high
    pinned = re.search(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    assert pinned and arguments["TORCH"] == pinned[1]
    # No other version of what pyproject.toml names is asked for in a line of its own.
    named = {re.split(r"[\[><=]", each)[0] for each in PROJECT["dependencies"]} - {"torch"}
    installed = " ".join(rest for name, rest in INSTRUCTIONS if name == "RUN")
    assert not [name for name in named if re.search(rf"['\" ]{re.escape(name)}(\[[^]]*\])?[=<>]", installed)]


def test_the_requirements_are_read_from_the_project() -> None:
    extras = PROJECT["optional-dependencies"]
    assert list_requirements("s3", "gcs", "openai") == [
        *PROJECT["dependencies"],
        *extras["s3"],
        *extras["gcs"],
        *extras["openai"],
    ]
    assert list_requirements("vllm", "--extras-only") == extras["vllm"]
    lines = [rest for name, rest in INSTRUCTIONS if name == "RUN" and "requirements.py" in rest]
    used = {word for line in lines for word in re.findall(r"requirements\.py ([a-z0-9 ]+)", line)[0].split()}
    assert used <= set(extras) and "vllm" in used


def test_a_requirement_that_the_project_does_not_have_is_an_error() -> None:
    done = subprocess.run([sys.executable, str(REQUIREMENTS), "s4"], cwd=ROOT, capture_output=True, timeout=30)
    assert done.returncode != 0 and b"s4" in done.stderr


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_an_image_runs_as_nobody_special(stage: str) -> None:
    start = next(i for i, (name, rest) in enumerate(INSTRUCTIONS) if name == "FROM" and rest.endswith(f" AS {stage}"))
    rest = INSTRUCTIONS[start + 1 :]
    end = next((i for i, (name, _) in enumerate(rest) if name == "FROM"), len(rest))
    assert [text for name, text in rest[:end] if name == "USER"] == ["1000"]
    assert "--uid 1000" in TEXT and "HF_HOME=/var/lib/roro/huggingface" in TEXT


def test_docker_is_told_of_every_file_that_a_package_ships(tmp_path: Path) -> None:
    """What pyproject.toml ships beside code must not be held back by .dockerignore."""
    held = [line for line in read_ignored() if line.startswith("**")]
    assert held == ["**/__pycache__", "**/*.pyc"]
