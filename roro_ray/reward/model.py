"""The reward model: a Rubricor and a Judge that score the trajectories of a query under the query's rubric."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from roro_ray.config import RewardConfig
from roro_ray.data.files import explain_full_disk
from roro_ray.errors import CheckpointError, ConfigError, did_you_mean
from roro_ray.reward.generic import make_fixed_rubric, make_random_rubric
from roro_ray.reward.judge import Judge
from roro_ray.reward.rubricor import Rubricor
from roro_ray.types import Query, Rubric, Trajectory, Verdict

RUBRIC_SOURCES = ("learned", "warm", "random", "fixed")
DONE = "DONE"
_FACTS = "reward.json"


class RewardModel:
    """Writes rubrics and scores trajectories under them.

    `config.rubric_source` says whose rubrics: `learned` and `warm` are written by the Rubricor that was given
    (trained, or warm-started only); `random` and `fixed` are the controls and never ask it.
    """

    def __init__(self, rubricor: Rubricor, judge: Judge, config: RewardConfig) -> None:
        if config.rubric_source not in RUBRIC_SOURCES:
            raise ConfigError(
                f"reward.rubric_source is {config.rubric_source!r}: expected one of {', '.join(RUBRIC_SOURCES)}"
                f"{did_you_mean(config.rubric_source, RUBRIC_SOURCES)}"
            )
        self.rubricor = rubricor
        self.judge = judge
        self.config = config

    @property
    def version(self) -> int:
        """Changes whenever the weights of either model do."""
        return self.rubricor.version + self.judge.version

    def write_rubrics(self, queries: Sequence[Query], seed: int = 0) -> list[Rubric]:
        """One rubric a query; without criteria where none could be written (then verdicts are error values)."""
        if self.config.rubric_source == "random":
            return [make_random_rubric(q, seed, self.config.max_criteria) for q in queries]
        if self.config.rubric_source == "fixed":
            return [make_fixed_rubric(query) for query in queries]
        return self.rubricor.write(queries, seed)

    def score(
        self, queries: Sequence[Query], trajectories: Sequence[Sequence[Trajectory]], rubrics: Sequence[Rubric]
    ) -> list[tuple[Verdict, ...]]:
        """One verdict per trajectory of each query, under that query's rubric."""
        return self.judge.score(queries, trajectories, rubrics)


def make_reward(config: RewardConfig) -> RewardModel:
    """The reward model with the weights that `config.rubricor` and `config.judge` name: the warm start.

    Raises:
        ConfigError: a model directory does not exist.
    """
    from roro_ray.engines.hf import resolve_model_path

    return _load_parts(resolve_model_path(config.rubricor), resolve_model_path(config.judge), config, (0, 0))


def _load_parts(rubricor: Path, judge: Path, config: RewardConfig, versions: tuple[int, int]) -> RewardModel:
    writer_model, writer_tokenizer = load_lm(rubricor)
    judge_model, judge_tokenizer = load_lm(judge)
    writer = Rubricor(writer_model, writer_tokenizer, versions[0], config.min_criteria, config.max_criteria)
    return RewardModel(writer, Judge(judge_model, judge_tokenizer, versions[1]), config)


def load_lm(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer.

    Raises:
        CheckpointError: the directory is missing or incomplete.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load a language model and its tokenizer from {str(path)!r}: {error}; expected config.json, "
            "model.safetensors and tokenizer.json there"
        ) from error
    for parameter in model.parameters():
        # Own, aligned memory instead of a slice of the file: matrix kernels round differently on unaligned data,
        # and a resumed run must end with the same bits as a straight one.
        parameter.data = parameter.data.clone()
    return model.eval(), tokenizer


def save_reward(reward: RewardModel, directory: str | Path) -> Path:
    """Save Rubricor and Judge under a directory, whole or not at all (temp, rename, marker), replacing an older one."""
    target = Path(directory)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    facts = {"rubricor_version": reward.rubricor.version, "judge_version": reward.judge.version}
    try:
        with explain_full_disk(target):
            for name, part in (("rubricor", reward.rubricor), ("judge", reward.judge)):
                part.model.save_pretrained(temporary / name)
                part.tokenizer.save_pretrained(temporary / name)
            (temporary / _FACTS).write_text(json.dumps(facts) + "\n")
            (temporary / DONE).touch()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a disk that is full would stay so
        raise
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    return target


def load_reward(directory: str | Path, config: RewardConfig) -> RewardModel:
    """Load what `save_reward` saved.

    Raises:
        CheckpointError: nothing complete lies there.
    """
    path = Path(directory)
    if not (path / DONE).is_file():
        raise CheckpointError(
            f"no complete reward model in {str(path)!r} (its marker {DONE!r} is missing): run the stage "
            "`python -m jobs.learn_reward` again, or give the right directory"
        )
    try:
        facts = json.loads((path / _FACTS).read_text())
        versions = (int(facts["rubricor_version"]), int(facts["judge_version"]))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{str(path / _FACTS)!r} is unreadable ({error!r}): learn the reward again") from error
    return _load_parts(path / "rubricor", path / "judge", config, versions)
