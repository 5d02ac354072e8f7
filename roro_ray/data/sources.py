"""The queries of every stage, from the embedded world's suites and from benchmarks alike.

A suite of the world is an endless stream. A benchmark is a table: where its source names no splits, the digest of each
text decides the one split that it may appear in, so that splits never overlap and do not depend on the order of rows.
Splits that a source names are kept; validation or test where it names none is cut from its training rows. A benchmark
that nothing is trained on (`data.train_suites` is given without it) goes to validation and test alone. What is both
trained on and evaluated, as the same text in two suites, is dropped from training.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from roro_ray.config import Config, DataConfig
from roro_ray.data.benchmarks import BENCHMARKS, Problem, load_benchmark
from roro_ray.data.dataset_files import ALL, stamp_source
from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.types import Query
from roro_ray.world.tasks import SPLITS, SUITES, make_queries

_TRAIN, _VALIDATION, _TEST = SPLITS
_SHARE_SLACK = 1e-6
_HELD_OUT = (_VALIDATION, _TEST)


def known_suites(data: DataConfig) -> list[str]:
    """Every name that `data.suites` may hold: the world's, the benchmarks', and those that `data.sources` adds."""
    return list(dict.fromkeys((*SUITES, *BENCHMARKS, *data.sources)))


def suite_names(data: DataConfig, stage: str) -> list[str]:
    """The suites of a stage: `train` (collection, reward, router) or `evaluate` (validation and test)."""
    if stage not in ("train", "evaluate"):
        raise ConfigError(f"stage {stage!r}: expected train or evaluate")
    return list(data.train_suites or data.suites) if stage == "train" else list(data.suites)


def check_data(data: DataConfig) -> None:
    """Refuse suites, sources and shares that cannot work, without reading a source.

    Raises:
        ConfigError: names the key, what it holds, and what to do.
    """
    known = known_suites(data)
    if not data.suites:
        raise ConfigError(f"data.suites is empty: name at least one of {', '.join(known)}.")
    for key, suites in (("data.suites", data.suites), ("data.train_suites", data.train_suites)):
        for suite in suites:
            if suite not in known:
                hint = did_you_mean(suite, known)
                raise ConfigError(
                    f"{key}: got {suite!r}, expected one of {', '.join(known)}{hint}. A data set of your own is named "
                    "in data.sources."
                )
    used = {*data.suites, *data.train_suites, *BENCHMARKS}
    for suite, source in data.sources.items():
        if suite in SUITES:
            raise ConfigError(f"data.sources names {suite}, a suite of the embedded world, which is generated.")
        if suite not in used:
            raise ConfigError(
                f"data.sources names {suite!r}, which neither data.suites nor data.train_suites does"
                f"{did_you_mean(suite, used)}."
            )
        if not source.strip():
            raise ConfigError(f"data.sources: {suite} is empty, expected a path or a data set of the hub (owner/name).")
    shares = data.split_shares
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > _SHARE_SLACK:
        raise ConfigError(
            f"data.split_shares: got {list(shares)}, expected three shares that sum to 1: train, validation, test."
        )


def describe_sources(data: DataConfig) -> dict[str, object]:
    """What besides suites, counts and seed decides the queries; empty where all are of the embedded world."""
    suites = {*data.suites, *data.train_suites}
    if suites <= set(SUITES) and not data.train_suites:
        return {}
    sources = {suite: source for suite, source in sorted(data.sources.items()) if suite in suites}
    return {
        "train_suites": list(data.train_suites),
        "sources": sources,
        "split_shares": list(data.split_shares),
    }


def make_stage_queries(config: Config, split: str, count: int, offset: int = 0) -> list[Query]:
    """`count` queries of a split from each suite that uses it: training suites for `train`, else the evaluated ones.

    Raises:
        ConfigError, DataError: as of `make_queries_of`.
    """
    suites = suite_names(config.data, "train" if split == _TRAIN else "evaluate")
    return [query for suite in suites for query in make_queries_of(config.data, suite, split, count, offset)]


def make_queries_of(data: DataConfig, suite: str, split: str, count: int, offset: int = 0) -> list[Query]:
    """The queries `offset` to `offset + count` of a suite's split; the same arguments give the same queries.

    Where a benchmark has fewer, all there are come back, with a warning.

    Raises:
        ConfigError: the suite or the split does not exist, or the split holds nothing from `offset` on.
        DataError: the suite's source cannot be read.
    """
    for what, got, allowed in (("suite", suite, known_suites(data)), ("split", split, SPLITS)):
        if got not in allowed:
            hint = did_you_mean(got, allowed)
            raise ConfigError(f"unknown {what} {got!r}: expected one of {', '.join(allowed)}{hint}")
    if suite in SUITES:
        return make_queries(suite, split, offset + count, data.seed)[offset:]
    problems = _split_problems(data, suite)[split]
    chosen = _shuffle(problems, data.seed)[offset : offset + count]
    if not chosen and count:
        raise ConfigError(
            f"{suite} has {len(problems)} {split} queries, asked for {count} from number {offset} on. "
            + _advice(data, split, offset)
        )
    if len(chosen) < count:
        warnings.warn(f"{suite} has {len(chosen)} of the {count} {split} queries asked for: taking all.", stacklevel=2)
    return [
        Query(f"{suite}/{split}/{problem.row}", suite, split, problem.text, problem.answer, problem.grader)
        for problem in chosen
    ]


def digest_text(text: str) -> str:
    """What two texts share that differ only in case and white space."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True, slots=True)
class _Suite:
    """What decides the splits of one benchmark."""

    name: str
    source: str
    stamp: str
    shares: tuple[float, ...]
    trained: bool


def _split_problems(data: DataConfig, suite: str) -> Mapping[str, Sequence[Problem]]:
    evaluated = tuple(_describe(data, name) for name in data.suites if name not in SUITES)
    return _clean_splits(_describe(data, suite), evaluated)


def _describe(data: DataConfig, suite: str) -> _Suite:
    source = data.sources.get(suite, "")
    trained = suite in suite_names(data, "train")
    return _Suite(suite, source, stamp_source(source), tuple(data.split_shares), trained)


@functools.lru_cache(maxsize=64)
def _clean_splits(suite: _Suite, evaluated: tuple[_Suite, ...]) -> Mapping[str, Sequence[Problem]]:
    """The suite's splits, without training problems that this or another suite evaluates."""
    splits = dict(_divide(suite))
    held_out = {digest_text(problem.text) for split in _HELD_OUT for problem in splits[split]}
    for other in evaluated:
        held_out |= {digest_text(problem.text) for split in _HELD_OUT for problem in _divide(other)[split]}
    kept = tuple(problem for problem in splits[_TRAIN] if digest_text(problem.text) not in held_out)
    dropped = len(splits[_TRAIN]) - len(kept)
    if dropped:
        warnings.warn(
            f"{suite.name}: {dropped} of {len(splits[_TRAIN])} training queries dropped: validation or test holds "
            "the same text.",
            stacklevel=2,
        )
    return splits | {_TRAIN: kept}


@functools.lru_cache(maxsize=64)
def _divide(suite: _Suite) -> Mapping[str, tuple[Problem, ...]]:
    """Every problem of a benchmark in at most one split."""
    parts = load_benchmark(suite.name, suite.source, suite.stamp).parts
    named = {split: tuple(parts.get(split, ())) for split in SPLITS}
    missing = [split for split in _HELD_OUT if not named[split]]
    pool = parts[ALL] if ALL in parts else named[_TRAIN]
    wanted = [split for split in SPLITS if split in missing or (split == _TRAIN and suite.trained)]
    shares = dict(zip(SPLITS, suite.shares, strict=True))
    cut = _cut(pool, {split: shares[split] for split in wanted}) if missing else {_TRAIN: pool if suite.trained else ()}
    splits = {split: cut[split] if split in cut else named[split] if split != _TRAIN else () for split in SPLITS}
    tested = {digest_text(problem.text) for problem in splits[_TEST]}
    splits[_VALIDATION] = tuple(each for each in splits[_VALIDATION] if digest_text(each.text) not in tested)
    return splits


def _cut(problems: Iterable[Problem], shares: Mapping[str, float]) -> dict[str, tuple[Problem, ...]]:
    """Problems by split, each decided by the digest of its own text, in the ratio of the shares."""
    total = sum(shares.values())
    members: dict[str, list[Problem]] = {split: [] for split in shares}
    for problem in problems:
        if not total:
            break
        place, border = int(digest_text(problem.text)[:12], 16) / 16**12 * total, 0.0
        for split, share in shares.items():
            border += share
            if share and place < border:
                members[split].append(problem)
                break
    return {split: tuple(chosen) for split, chosen in members.items()}


def _shuffle(problems: Sequence[Problem], seed: int) -> list[Problem]:
    """An order that depends on texts and seed alone."""
    return sorted(problems, key=lambda problem: hashlib.sha256(f"{seed}/{digest_text(problem.text)}".encode()).digest())


def _advice(data: DataConfig, split: str, offset: int) -> str:
    if offset:
        return f"Lower data.{split}_queries to leave some, or raise its share in data.split_shares."
    if split == _TRAIN and data.train_suites:
        return "Raise the share of train in data.split_shares, or take it out of data.train_suites."
    return f"Raise the share of {split} in data.split_shares ({data.split_shares}), or give a source that has some."
