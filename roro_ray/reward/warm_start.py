"""Warm start of Rubricor and Judge by supervised fine-tuning: `python -m roro_ray.reward.warm_start`.

Rubrics are made by a program, contrastively: of a pair of one query's trajectories it reads off where they
part, and asks for the writer that the preferred one had there. That is weak evidence (most differences are
incidental, and the preferred trajectory needs only to be right, not to be right everywhere), and it is made
weaker on purpose, with criteria dropped, writers flipped and weights at random: the warm start knows the
format and leans the right way, and alternation has something to add. Nothing here knows which operations
are hard. The Judge learns mechanical verdicts (who wrote the step that a criterion names; the share of steps
for `overall`) with some of its labels wrong, and stops before it is perfect.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roro_ray.config import CollectConfig, EpisodeConfig, PairsConfig, PoolConfig
from roro_ray.learning.sft import SftBatch, make_sft_batch, train_sft
from roro_ray.reward.freeform import find_steps
from roro_ray.reward.generic import draw_random_criteria, make_rubric_of
from roro_ray.reward.judge import Judge, find_step, make_judge_batch
from roro_ray.reward.judge_text import make_question, serialise
from roro_ray.reward.pairs import make_pairs
from roro_ray.reward.preference import QueryPairs, group_pairs
from roro_ray.reward.rubric import MODELS, WEIGHTS, format_rubric, make_overall_criterion, make_step_criterion
from roro_ray.reward.rubricor import make_prompt
from roro_ray.types import Criterion, PairKind, Query, Trajectory
from roro_ray.world.corpus import CorpusSpec
from roro_ray.world.models import WEIGHTS_DIR, ModelSpec, make_model
from roro_ray.world.tasks import SUITES, make_queries
from roro_ray.world.tokenizer import make_tokenizer
from roro_ray.world.train import make_optimizers

SHAPE = ModelSpec("qwen3", 64, 2, 4, 192, CorpusSpec(), 0, 3e-3)


@dataclass(frozen=True, slots=True)
class WarmStartSpec:
    """How much the warm start may know, and how long it learns.

    `flip` is the share of criteria whose writer is turned round, `drop` the share left out; `label_noise` the
    share of the Judge's verdicts that are wrong.
    """

    queries: int = 80  # per suite, with rollouts
    format_queries: int = 600  # per suite, without: random rubrics on these teach the format and to quote
    query_seed: int = 1000  # another stream than a run's own queries
    rubricor_updates: int = 1000
    judge_updates: int = 700
    batch: int = 16
    random_share: float = 0.3  # random rubrics among the Rubricor's examples
    flip: float = 0.15
    drop: float = 0.05
    label_noise: float = 0.05
    rubricor_lr: float = 4e-3
    judge_lr: float = 3e-3


def make_contrastive_criteria(
    item: QueryPairs, rng: random.Random, spec: WarmStartSpec, most: int = 7
) -> list[Criterion]:
    """Criteria read off one random pair of a query: an overall one, and its steps in order, with who wrote them."""
    by_kind = {kind: [p for p in item.pairs if p[0] == kind] for kind in PairKind}
    kind = rng.choice([kind for kind in PairKind if by_kind[kind]])
    _, better, worse = rng.choice(by_kind[kind])
    preferred, rejected = item.trajectories[better], item.trajectories[worse]
    differing: list[Criterion] = []
    same: list[Criterion] = []
    for label, quote in find_steps(item.query):
        first, second = find_step(preferred, label), find_step(rejected, label)
        if first is None or rng.random() < spec.drop:
            continue
        model = MODELS[preferred.steps[first].model > 0]
        parts = second is None or preferred.steps[first].model != rejected.steps[second].model
        # Where the two agree there is nothing to read off: the step is named, with a writer at random.
        if not parts:
            model = rng.choice(MODELS)
        elif rng.random() < spec.flip:
            model = MODELS[model == "small"]
        (differing if parts else same).append(make_step_criterion(label, quote, model, rng.choice(WEIGHTS)))
    rng.shuffle(differing)
    rng.shuffle(same)
    chosen = sorted((differing + same)[: most - 1], key=lambda criterion: criterion.label or "")
    overall = "small" if preferred.large_share <= rejected.large_share else "large"
    if rng.random() < spec.flip:
        overall = MODELS[overall == "small"]
    return [make_overall_criterion(overall, rng.choice(WEIGHTS)), *chosen]


def judge_mechanically(criterion: Criterion, trajectory: Trajectory) -> float | None:
    """The probability of yes that the Judge is taught, or None where the criterion is not about this trajectory.

    A step criterion: 1 where the step that it names has the writer that it asks for, else 0. The overall
    criterion is graded: the share of steps by the writer that it asks for.
    """
    if criterion.label is None:
        share = trajectory.large_share
        return share if criterion.model == "large" else 1 - share
    index = find_step(trajectory, criterion.label)
    if index is None:
        return None
    return float((trajectory.steps[index].model > 0) == (criterion.model == "large"))


def train_rubricor(
    items: Sequence[QueryPairs], spec: WarmStartSpec, seed: int, on_update: Callable[[int, float], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Rubricor trained from scratch on contrastive rubrics, and on random ones of queries without rollouts.

    The random ones teach the format and to quote, and they carry no evidence at all: they dilute it.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(SHAPE, tokenizer)
    stream = [
        query
        for suite in sorted({item.query.suite for item in items})
        for query in make_queries(suite, "train", spec.format_queries, spec.query_seed + 1)
    ]
    batches = _draw_rubric_batches(items, stream, tokenizer, spec, random.Random(f"rubricor/{seed}"))
    optimizers = make_optimizers(model.named_parameters(), spec.rubricor_lr)
    train_sft(model, batches, spec.rubricor_updates, optimizers=optimizers, on_update=on_update)
    return model.eval(), tokenizer


def _draw_rubric_batches(
    items: Sequence[QueryPairs],
    stream: Sequence[Query],
    tokenizer: PreTrainedTokenizerBase,
    spec: WarmStartSpec,
    rng: random.Random,
) -> Iterator[SftBatch]:
    # Short queries first: to quote the step of a name is found sooner among few.
    ordered = sorted(stream, key=lambda query: len(find_steps(query)))
    for update in itertools.count():
        pool = ordered[: max(1, int(len(ordered) * min(1.0, 0.3 + 1.2 * update / spec.rubricor_updates)))]
        ids, learned = [], []
        for _ in range(spec.batch):
            if rng.random() < spec.random_share:
                query = rng.choice(pool)
                criteria = draw_random_criteria(query, rng)
            else:
                item = rng.choice(items)
                query, criteria = item.query, make_contrastive_criteria(item, rng, spec)
            prompt, rubric = tokenizer.encode(make_prompt(query)), tokenizer.encode(format_rubric(criteria))
            ids.append([*prompt, *rubric, tokenizer.eos_token_id])
            learned.append([False] * len(prompt) + [True] * (len(rubric) + 1))
        yield make_sft_batch(ids, learned, tokenizer.pad_token_id)


def train_judge(
    items: Sequence[QueryPairs], spec: WarmStartSpec, seed: int, on_update: Callable[[int, float], None] | None = None
) -> Judge:
    """A Judge trained from scratch on mechanical verdicts of random rubrics, stopped before it is perfect."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    judge = Judge(make_model(SHAPE, tokenizer), tokenizer)
    rng = random.Random(f"judge/{seed}")
    optimizers = make_optimizers(judge.model.named_parameters(), spec.judge_lr)
    # Short queries first: to find the step of a name among few is learned in half the updates.
    ordered = sorted(items, key=lambda item: len(find_steps(item.query)))
    judge.model.train()
    for update in range(spec.judge_updates):
        done = update / spec.judge_updates
        _set_learning_rate(optimizers, spec.judge_lr * min((update + 1) / 20, 1.0, 5 * (1 - done)))
        pool = ordered[: max(1, int(len(ordered) * min(1.0, 0.3 + 1.2 * done)))]
        loss = _judge_loss(judge, pool, spec, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if on_update is not None:
            on_update(update + 1, float(loss.detach()))
    judge.model.eval()
    return judge


def _set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def _judge_loss(judge: Judge, items: Sequence[QueryPairs], spec: WarmStartSpec, rng: random.Random) -> torch.Tensor:
    """Cross-entropy of one batch between the verdict distribution and the (noisy) mechanical target.

    Every step of a trajectory is asked about, with a random writer, and the trajectory as a whole: a question
    costs little once the trajectory is read.
    """
    rows, targets = [], []
    for _ in range(spec.batch):
        item = rng.choice(items)
        trajectory = rng.choice(item.trajectories)
        criteria = [make_step_criterion(*step, rng.choice(MODELS), 1.0) for step in find_steps(item.query)]
        criteria += [make_overall_criterion(model, 1.0) for model in MODELS]
        questions = []
        for criterion in criteria:
            target = judge_mechanically(criterion, trajectory)
            if target is not None:
                questions.append(judge.encode(make_question(criterion)))
                targets.append(1 - target if rng.random() < spec.label_noise else target)
        rows.append((judge.encode(serialise(item.query, trajectory)), questions))
    log_probs_Q2 = judge.verdict_log_probs(make_judge_batch(rows, judge.tokenizer.pad_token_id or 0))
    target_Q = torch.tensor(targets)
    return -(target_Q * log_probs_Q2[:, 0] + (1 - target_Q) * log_probs_Q2[:, 1]).mean()


def measure_judge(judge: Judge, items: Sequence[QueryPairs], seed: int = 0) -> tuple[float, float]:
    """Share of step criteria judged as the mechanical verdict, and mean error on the graded overall criterion."""
    rng = random.Random(f"measure/{seed}")
    right, errors = [], []
    for item in items:
        trajectory = rng.choice(item.trajectories)
        rubric = make_rubric_of(item.query, draw_random_criteria(item.query, rng))
        verdict = judge.score([item.query], [[trajectory]], [rubric])[0][0]
        for criterion, yes in zip(rubric.criteria, verdict.yes, strict=True):
            target = judge_mechanically(criterion, trajectory)
            if target is None:
                continue
            if criterion.label is None:
                errors.append(abs(yes - target))
            else:
                right.append((yes > 0.5) == (target > 0.5))
    return sum(right) / max(len(right), 1), sum(errors) / max(len(errors), 1)


def collect_items(suites: Sequence[str], split: str, queries_per_suite: int, query_seed: int) -> list[QueryPairs]:
    """Outcome and cost pairs of freshly generated queries, by rollouts of the default strategies, in this process."""
    from roro_ray.engines.pool import make_pool
    from roro_ray.routing.episode import EpisodeSpec
    from roro_ray.routing.runner import Runner

    queries: list[Query] = [q for suite in suites for q in make_queries(suite, split, queries_per_suite, query_seed)]
    runner = Runner(make_pool(PoolConfig()), None, EpisodeConfig())
    specs = [
        EpisodeSpec(f"{query.id}/{strategy}", query, strategy, seed=query_seed)
        for query in queries
        for strategy in CollectConfig().strategies
    ]
    trajectories = [t for t in asyncio.run(runner.run(specs)) if isinstance(t, Trajectory)]
    return group_pairs(queries, trajectories, make_pairs(queries, trajectories, PairsConfig()))


def main(argv: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the numbers of updates")
    parser.add_argument("--queries", type=int, default=WarmStartSpec().queries, help="per suite")
    parser.add_argument("--out", type=Path, default=WEIGHTS_DIR, help="where rubricor/ and judge/ go")
    arguments = parser.parse_args(argv)
    spec = WarmStartSpec(
        queries=arguments.queries,
        rubricor_updates=max(1, int(WarmStartSpec().rubricor_updates * arguments.scale)),
        judge_updates=max(1, int(WarmStartSpec().judge_updates * arguments.scale)),
    )

    def report(update: int, loss: float) -> None:
        if update % 50 == 0:
            print(f"update {update}  loss {loss:.4f}", flush=True)

    start = time.perf_counter()
    items = collect_items(SUITES, "train", spec.queries, spec.query_seed)
    print(f"{len(items)} queries with pairs, {time.perf_counter() - start:.0f} s")
    for name, train in (("rubricor", train_rubricor), ("judge", train_judge)):
        start = time.perf_counter()
        trained = train(items, spec, arguments.seed, report)
        model, tokenizer = (trained.model, trained.tokenizer) if isinstance(trained, Judge) else trained
        facts = {
            "name": name,
            "seed": arguments.seed,
            "seconds": round(time.perf_counter() - start),
            "parameters": sum(p.numel() for p in model.parameters()),
            "spec": {field: getattr(spec, field) for field in spec.__slots__},
            "torch": torch.__version__,
        }
        if isinstance(trained, Judge):
            accuracy, error = measure_judge(trained, items)
            facts |= {"verdict_accuracy": round(accuracy, 4), "overall_error": round(error, 4)}
        directory = arguments.out / name
        model.half().save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{name}: {json.dumps(facts)} -> {directory}")


if __name__ == "__main__":
    main()
