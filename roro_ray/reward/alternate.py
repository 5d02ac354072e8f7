"""Alternating optimisation of Judge and Rubricor over rounds, with held-out accuracy and controls.

Each round takes queries that no other round has seen (the folds but the last, dealt out over the rounds);
the last fold is never learned from and is what is reported. Every random draw comes from the seed and the
round, and the weights are saved at the end of a round, so that a run that was killed goes on with the next
round and ends with the same weights.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from roro_ray.config import RewardConfig
from roro_ray.data.files import write_whole
from roro_ray.errors import CheckpointError, ConfigError
from roro_ray.reward.generic import make_fixed_rubric, make_random_rubric, shuffle_rubrics
from roro_ray.reward.judge import Judge
from roro_ray.reward.model import DONE, RewardModel, load_reward, save_reward
from roro_ray.reward.phases import OnUpdate, run_judge_phase, run_rubricor_phase
from roro_ray.reward.preference import AnyItem, PairAccuracy, QueryPairs, check_kind_weights, measure_accuracy
from roro_ray.types import Rubric

_RESULT = "result.json"


@dataclass(frozen=True, slots=True)
class RoundResult:
    """Held-out accuracy after a round (-1: the warm start), its seconds, and the weights' versions."""

    round: int
    accuracy: PairAccuracy
    seconds: float
    rubricor_version: int
    judge_version: int


@dataclass(frozen=True, slots=True)
class AlternationResult:
    """The rounds, the warm start first, and the controls, all on the held-out fold.

    Controls: `untrained` (a Judge of random weights under the trained rubrics), `warm`, `trained`,
    `fixed_rubric`, `random_rubrics`, `shuffled_rubrics` (another query's), and the two halves of the gain,
    `trained_rubricor` (with the warm Judge) and `trained_judge` (with the warm Rubricor).
    """

    rounds: tuple[RoundResult, ...]
    controls: dict[str, PairAccuracy]

    def as_summary(self) -> dict[str, object]:
        """The `judge` part of summary.json."""
        return {
            "pair_accuracy": {name: accuracy.mean for name, accuracy in self.controls.items()},
            "by_kind": {name: accuracy.by_kind for name, accuracy in self.controls.items()},
            "by_round": [
                {"round": r.round, "mean": r.accuracy.mean, **r.accuracy.by_kind, "seconds": r.seconds}
                for r in self.rounds
            ],
            "pairs": self.controls["trained"].counts,
        }


def split_folds(
    items: Sequence[AnyItem], folds: int, rounds: int
) -> tuple[list[list[AnyItem]], list[AnyItem]]:
    """Items of each round, and the held-out ones (the last fold).

    The other folds are dealt out over the rounds; where there are more rounds than folds, folds come again.

    Raises:
        ConfigError: no round would have data, or nothing is held out.
    """
    held_out = [item for item in items if item.fold == folds - 1]
    train = [item for item in items if item.fold < folds - 1]
    if not held_out or not train:
        raise ConfigError(
            f"{len(items)} queries with pairs leave {len(train)} to learn from and {len(held_out)} held out in "
            f"{folds} folds: collect more queries (data.train_queries) or set fewer pairs.folds"
        )
    parts = min(rounds, folds - 1)
    by_part = [[item for item in train if item.fold % parts == part] for part in range(parts)]
    return [by_part[index % parts] or train for index in range(rounds)], held_out


def alternate(
    reward: RewardModel,
    items: Sequence[QueryPairs],
    folds: int,
    seed: int,
    state_dir: str | Path | None = None,
    on_update: OnUpdate | None = None,
) -> tuple[RewardModel, AlternationResult]:
    """Train Rubricor and Judge by `reward.config.rounds` rounds.

    Args:
        reward: the warm start; its models are copied, not changed.
        items: queries with their pairs (`preference.group_pairs`).
        folds: as the pairs were made with.
        state_dir: where finished rounds are kept; given again, they are not done again.
        on_update: called with the metrics of every update (`phase`, `round`, `update`, ..).

    Raises:
        ConfigError: too little data, or kind weights that make no sense.
        CheckpointError: a round that was marked as finished does not load.
    """
    config = reward.config
    check_kind_weights(config.kind_weights)
    parts, held_out = split_folds(items, folds, config.rounds)
    trained = copy_reward(reward)
    rounds = [RoundResult(-1, measure(trained, held_out), 0.0, trained.rubricor.version, trained.judge.version)]
    for index, part in enumerate(parts):
        directory = Path(state_dir) / f"round_{index:02d}" if state_dir is not None else None
        if directory is not None and (directory / DONE).is_file():
            trained = load_reward(directory, config)
            rounds.append(_load_result(directory))
            continue
        start = time.perf_counter()
        _run_round(trained, part, config, seed * 1009 + index, index, on_update)
        seconds = time.perf_counter() - start
        versions = (trained.rubricor.version, trained.judge.version)
        rounds.append(RoundResult(index, measure(trained, held_out), seconds, *versions))
        if directory is not None:
            _save_round(trained, rounds[-1], directory)
    return trained, AlternationResult(tuple(rounds), measure_controls(reward, trained, held_out, seed))


def _run_round(
    reward: RewardModel,
    items: list[QueryPairs],
    config: RewardConfig,
    seed: int,
    index: int,
    on_update: OnUpdate | None,
) -> None:
    def report(metrics: dict[str, float | str]) -> None:
        if on_update is not None:
            on_update({"round": index, **metrics})

    run_judge_phase(reward.judge, reward.rubricor, items, config, seed, report)
    run_rubricor_phase(reward.rubricor, reward.judge, items, config, seed, report)


def copy_reward(reward: RewardModel) -> RewardModel:
    """The same weights in new models; memos are not copied."""
    writer = copy.copy(reward.rubricor)
    writer.model = copy.deepcopy(writer.model)
    judge = Judge(copy.deepcopy(reward.judge.model), reward.judge.tokenizer, reward.judge.version)
    return RewardModel(writer, judge, reward.config)


def measure(reward: RewardModel, items: Sequence[QueryPairs], rubrics: Sequence[Rubric] | None = None) -> PairAccuracy:
    """Pair accuracy under the given rubrics, or under those that the reward model writes."""
    queries = [item.query for item in items]
    own = reward.write_rubrics(queries) if rubrics is None else rubrics
    return measure_accuracy(items, reward.score(queries, [item.trajectories for item in items], own))


def measure_controls(
    warm: RewardModel, trained: RewardModel, items: Sequence[QueryPairs], seed: int
) -> dict[str, PairAccuracy]:
    """The controls of `AlternationResult` on the given items."""
    queries = [item.query for item in items]
    warm_rubrics, rubrics = warm.write_rubrics(queries), trained.write_rubrics(queries)
    untrained = copy_reward(trained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained.judge.model = type(trained.judge.model)(trained.judge.model.config).eval()
    return {
        "untrained": measure(untrained, items, rubrics),
        "warm": measure(warm, items, warm_rubrics),
        "trained": measure(trained, items, rubrics),
        "trained_rubricor": measure(warm, items, rubrics),
        "trained_judge": measure(trained, items, warm_rubrics),
        "fixed_rubric": measure(trained, items, [make_fixed_rubric(query) for query in queries]),
        "random_rubrics": measure(trained, items, [make_random_rubric(query, seed) for query in queries]),
        "shuffled_rubrics": measure(trained, items, shuffle_rubrics(rubrics, queries)),
    }


def _save_round(reward: RewardModel, result: RoundResult, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    # The result first: the marker of `save_reward` then says that both are there.
    with write_whole(directory.with_name(f"{directory.name}.{_RESULT}")) as temporary:
        temporary.write_text(json.dumps(asdict(result)) + "\n")
    save_reward(reward, directory)


def _load_result(directory: Path) -> RoundResult:
    path = directory.with_name(f"{directory.name}.{_RESULT}")
    try:
        record = json.loads(path.read_text())
        return RoundResult(**{**record, "accuracy": PairAccuracy(**record["accuracy"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the result of a finished round, {str(path)!r}, is unreadable ({error!r}): "
            f"remove {str(directory)!r} to do the round again"
        ) from error
