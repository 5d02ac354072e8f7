"""Alternating optimisation through an engine: rounds, held-out accuracy and controls as in `reward.alternate`.

State is in two places: adapters with their optimisers in the learner's checkpoints, and here, one small file a round,
the versions that it began and ended with. A driver that was killed starts both again; how far the learner has come in a
round follows from its versions, and what is left of the round is done. Trajectories are read from disk as they are
needed and let go.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from roro_ray.data.files import write_whole
from roro_ray.errors import CheckpointError
from roro_ray.learning.adapter_files import AdapterVersion
from roro_ray.learning.lm_run import AdapterLearner
from roro_ray.reward.alternate import AlternationResult, RoundResult, split_folds
from roro_ray.reward.engine_batches import Codec
from roro_ray.reward.engine_phases import Metrics, OnUpdate, PhaseContext, run_judge_phase, run_rubricor_phase
from roro_ray.reward.engine_reward import JUDGE, RUBRICOR, EngineReward
from roro_ray.reward.generic import make_fixed_rubric, make_random_rubric, shuffle_rubrics
from roro_ray.reward.pair_store import StoredPairs
from roro_ray.reward.preference import AccuracyTally, PairAccuracy, check_kind_weights
from roro_ray.types import Rubric

_CHUNK = 4  # queries whose trajectories are held while accuracy is measured
_WARM = "warm.json"


@dataclass(frozen=True, slots=True)
class Parts:
    """A version of each adapter, as published."""

    rubricor: AdapterVersion
    judge: AdapterVersion

    @property
    def versions(self) -> dict[str, int]:
        """By name."""
        return {RUBRICOR: self.rubricor.version, JUDGE: self.judge.version}


def alternate_engine(
    reward: EngineReward,
    learner: AdapterLearner,
    codec: Codec,
    items: Sequence[StoredPairs],
    folds: int,
    seed: int,
    state_dir: Path,
    on_update: OnUpdate = lambda metrics: None,
) -> tuple[Parts, AlternationResult]:
    """Train both adapters by `reward.config.rounds` rounds, beginning with what the learner has (a warm start or none).

    Args:
        reward: its engine serves the versions that the learner publishes.
        items: queries with their pairs (`pair_store.index_pairs`).
        folds: as the pairs were made with; the last one is held out.
        state_dir: where the rounds are noted; given again with the same learner, they are not done again.

    Raises:
        ConfigError: too little data, or kind weights that make no sense.
        CheckpointError: the notes are damaged, or the learner's versions do not belong to them.
    """
    config = reward.config
    check_kind_weights(config.kind_weights)
    parts, held_out = split_folds(items, folds, config.rounds)
    state_dir.mkdir(parents=True, exist_ok=True)
    warm, first = _start(reward, learner, held_out, state_dir)
    rounds, trained = [first], warm
    for index, part in enumerate(parts):
        note = state_dir / f"round_{index:02d}.json"
        if note.is_file():
            trained, result = _read_note(note)
            rounds.append(result)
            continue
        began = time.perf_counter()
        context = PhaseContext(reward, learner, codec, seed * 1009 + index, _with_round(on_update, index))
        trained = _run_round(context, part, trained)
        seconds = time.perf_counter() - began
        rounds.append(_make_result(index, measure_stored(reward, held_out), seconds, trained))
        _write_note(note, trained, rounds[-1])
    return trained, AlternationResult(tuple(rounds), measure_controls(reward, warm, trained, held_out, seed))


def use_parts(reward: EngineReward, rubricor: AdapterVersion | None, judge: AdapterVersion | None) -> None:
    """Have the engine serve these versions; None is the base alone."""
    for name, adapter in ((RUBRICOR, rubricor), (JUDGE, judge)):
        if adapter is None:
            reward.use_base(name)
        else:
            reward.take_over(adapter)


def _with_round(on_update: OnUpdate, index: int) -> OnUpdate:
    def report(metrics: Metrics) -> None:
        on_update({"round": index, **metrics})

    return report


def _start(
    reward: EngineReward, learner: AdapterLearner, held_out: Sequence[StoredPairs], state_dir: Path
) -> tuple[Parts, RoundResult]:
    """The versions that the alternation began with, published, and their accuracy; noted once."""
    note = state_dir / _WARM
    if note.is_file():
        return _read_note(note)
    warm = Parts(learner.publish(RUBRICOR), learner.publish(JUDGE))
    use_parts(reward, warm.rubricor, warm.judge)
    result = _make_result(-1, measure_stored(reward, held_out), 0.0, warm)
    _write_note(note, warm, result)
    return warm, result


def _run_round(context: PhaseContext, items: Sequence[StoredPairs], before: Parts) -> Parts:
    """What is left of a round that began with the versions `before`."""
    config = context.config
    done = {name: context.learner.versions[name] - version for name, version in before.versions.items()}
    most = {RUBRICOR: config.rubricor_updates, JUDGE: config.judge_updates}
    for name, count in done.items():
        if not 0 <= count <= most[name]:
            raise CheckpointError(
                f"the learner's {name} has {count} updates since the last finished round, expected 0 to {most[name]}: "
                "its directory belongs to another alternation. Remove both (adapters and reward) and learn again."
            )
    for name, count in done.items():  # also what was learned since the last version that the engine was given
        if count:
            context.publish(name)
        else:
            context.reward.take_over(before.rubricor if name == RUBRICOR else before.judge)
    run_judge_phase(context, items, done[JUDGE])
    run_rubricor_phase(context, items, done[RUBRICOR])
    learner = context.learner
    return Parts(learner.publish(RUBRICOR), learner.publish(JUDGE))


def measure_stored(
    reward: EngineReward, items: Sequence[StoredPairs], rubrics: Sequence[Rubric] | None = None
) -> PairAccuracy:
    """Pair accuracy under the given rubrics, or under those that the reward model writes."""
    own = reward.write_rubrics([item.query for item in items]) if rubrics is None else rubrics
    return measure_rubrics(reward, items, {"own": own})["own"]


def measure_rubrics(
    reward: EngineReward, items: Sequence[StoredPairs], rubrics: dict[str, Sequence[Rubric]]
) -> dict[str, PairAccuracy]:
    """Pair accuracy under several sets of rubrics, by name; each trajectory is read from disk once."""
    tallies = {name: AccuracyTally() for name in rubrics}
    for start in range(0, len(items), _CHUNK):
        loaded = [item.load() for item in items[start : start + _CHUNK]]
        queries, groups = [item.query for item in loaded], [item.trajectories for item in loaded]
        for name, own in rubrics.items():
            verdicts = reward.score(queries, groups, own[start : start + _CHUNK])
            for item, of_item in zip(loaded, verdicts, strict=True):
                tallies[name].add(item, of_item)
    return {name: tally.result() for name, tally in tallies.items()}


def measure_controls(
    reward: EngineReward, warm: Parts, trained: Parts, items: Sequence[StoredPairs], seed: int
) -> dict[str, PairAccuracy]:
    """The controls of `AlternationResult`; `untrained` is the base without an adapter, under the trained rubrics.

    Leaves the engine with the trained versions.
    """
    queries = [item.query for item in items]
    reward.take_over(warm.rubricor)
    warm_rubrics = reward.write_rubrics(queries)
    use_parts(reward, trained.rubricor, trained.judge)
    rubrics = reward.write_rubrics(queries)
    by_trained: dict[str, Sequence[Rubric]] = {
        "trained": rubrics,
        "trained_judge": warm_rubrics,
        "fixed_rubric": [make_fixed_rubric(query) for query in queries],
        "random_rubrics": [make_random_rubric(query, seed, reward.config.max_criteria) for query in queries],
        "shuffled_rubrics": shuffle_rubrics(rubrics, queries),
    }
    result = measure_rubrics(reward, items, by_trained)
    reward.take_over(warm.judge)
    result |= measure_rubrics(reward, items, {"warm": warm_rubrics, "trained_rubricor": rubrics})
    reward.use_base(JUDGE)
    result |= measure_rubrics(reward, items, {"untrained": rubrics})
    use_parts(reward, trained.rubricor, trained.judge)
    order = ("untrained", "warm", "trained", "trained_rubricor", *list(by_trained)[1:])
    return {name: result[name] for name in order}


def _make_result(index: int, accuracy: PairAccuracy, seconds: float, parts: Parts) -> RoundResult:
    return RoundResult(index, accuracy, seconds, parts.rubricor.version, parts.judge.version)


def _write_note(path: Path, parts: Parts, result: RoundResult) -> None:
    # Relative, since the run may be read elsewhere next time: a copy on another node, or a directory that was moved.
    named = {
        adapter.name: asdict(replace(adapter, path=os.path.relpath(adapter.path, path.parent.resolve())))
        for adapter in (parts.rubricor, parts.judge)
    }
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps({"parts": named, "result": asdict(result)}) + "\n")


def _locate(adapter: AdapterVersion, folder: Path) -> AdapterVersion:
    return replace(adapter, path=str((folder / adapter.path).resolve()))


def _read_note(path: Path) -> tuple[Parts, RoundResult]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        parts = Parts(*(_locate(AdapterVersion(**record["parts"][name]), path.parent) for name in (RUBRICOR, JUDGE)))
        result = RoundResult(**{**record["result"], "accuracy": PairAccuracy(**record["result"]["accuracy"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the note of a finished round, {str(path)!r}, is unreadable ({error!r}): remove the run's reward and "
            "adapters directories and learn again"
        ) from error
    return parts, result
