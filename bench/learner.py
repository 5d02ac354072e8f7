"""Speed of the learner: `python -m bench.learner`.

Three comparisons, each on the same weights and the same batch, in one process of one thread, the
contestants taking turns; seconds are CPU seconds:

1. Router: one causal pass over each finished trajectory, against one pass over the text so far for every
   decision. Same loss, same gradient (checked).
2. Language model: `update_model` against a training step of TRL's GRPOTrainer, in one piece and in four. Same
   loss (checked). A step is forward, loss, backward, gradient clipping and AdamW; tokens are sampled tokens,
   without prompts and padding.
3. Sampling: `sample_completions` against transformers' `generate`, both with the log-probability of every token.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from roro_ray.config import RouterConfig
from roro_ray.learning.grpo import LossInputs, make_advantages, make_denominator, make_loss
from roro_ray.learning.sampling import sample_completions
from roro_ray.learning.sequences import TokenBatch, make_token_batch
from roro_ray.learning.updates import UpdateSettings, update_model
from roro_ray.routing.observation import make_features
from roro_ray.routing.router import RouterNetwork, make_router
from roro_ray.routing.router_batch import RouterBatch, encode_trajectories, score_decisions
from roro_ray.types import Decision, Query, Step, Trajectory, Usage
from roro_ray.world.models import WEIGHTS_DIR
from roro_ray.world.tasks import draw_programs, make_queries, render_query, render_solution

STEPS = 8
GROUP = 8
CLIP_NORM = 1.0
NEW_TOKENS = 96
TRL_PARTS = (1, 4)  # micro-batches of TRL's step: the faster one counts


def time_in_turns(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each contestant, which take turns.

    With one thread CPU seconds are what a quiet machine takes; a busy one stretches the wall clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 2):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            if repeat >= 2:  # the first turns warm up
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# Router


def make_trajectories(count: int) -> tuple[list[Query], list[Trajectory]]:
    """Solved programs of seven operations and an answer, with steps routed at random."""
    rng = random.Random(0)
    queries, trajectories = [], []
    suites = [draw_programs(suite, "train", 0) for suite in ("chain", "word", "list", "clock")]
    for program in itertools.chain.from_iterable(zip(*suites, strict=False)):
        texts = render_solution(program)
        if len(texts) != STEPS:
            continue
        name = f"{len(queries):04d}"
        queries.append(Query(name, "bench", "train", render_query(program), texts[-1]))
        steps: list[Step] = []
        for text in texts:
            decision = Decision(rng.randrange(2), 0.0, (0.5, 0.5), 0)
            features = make_features(steps, 0.2, 2)
            steps.append(Step(decision.model, text, 10, 0.9, 0.5, "delimiter", decision, Usage(), features=features))
        trajectories.append(
            Trajectory(name, name, "bench", "router", 0, 0.2, tuple(steps), "", True, "answer", Usage())
        )
        if len(queries) == count:
            return queries, trajectories
    raise AssertionError("draw_programs is endless")


def router_loss(network: RouterNetwork, batch: RouterBatch, advantages_B: torch.Tensor, denominator: float):
    """GRPO loss of every decision in the batch."""
    log_probs_BD, entropy_BD = score_decisions(network, batch)
    inputs = LossInputs(log_probs_BD, log_probs_BD.detach(), advantages_B, batch.decision_mask_BD, entropy_BD)
    return make_loss(inputs, entropy_weight=0.02, denominator=denominator).loss


def cut_per_decision(batch: RouterBatch, decision: int) -> RouterBatch:
    """The same trajectories, each ending at one decision: what a pass per decision reads."""
    boundaries_B1 = batch.boundaries_BD[:, decision : decision + 1]
    width = int(boundaries_B1.max()) + 1
    at = slice(decision, decision + 1)
    return RouterBatch(
        batch.ids_BT[:, :width],
        batch.mask_BT[:, :width] & (torch.arange(width) <= boundaries_B1),
        boundaries_B1,
        batch.features_BDF[:, at],
        batch.actions_BD[:, at],
        batch.old_log_probs_BD[:, at],
        batch.decision_mask_BD[:, at],
        batch.versions_BD[:, at],
    )


def bench_router(rows: int, repeats: int) -> dict[str, float]:
    """Seconds of a gradient in one pass per trajectory and in one pass per decision."""
    torch.manual_seed(0)
    network = make_router(RouterConfig(), 2)
    batch = encode_trajectories(network, *make_trajectories(rows))
    advantages_B = torch.randn(rows)
    denominator = make_denominator(batch.decision_mask_BD)
    cuts = [cut_per_decision(batch, decision) for decision in range(STEPS)]

    def step(parts: list[RouterBatch]) -> torch.Tensor:
        network.zero_grad()
        for part in parts:
            router_loss(network, part, advantages_B, denominator).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    whole, cut = step([batch]), step(cuts)
    error = float((whole - cut).norm() / whole.norm())
    assert error < 1e-4, f"the two ways differ by {error}"
    seconds = time_in_turns({"trajectory": lambda: step([batch]), "decision": lambda: step(cuts)}, repeats)
    return {
        "trajectories": rows,
        "tokens_per_trajectory": round(float(batch.mask_BT.sum()) / rows, 1),
        "pass_per_trajectory_ms": round(1000 * seconds["trajectory"], 1),
        "pass_per_decision_ms": round(1000 * seconds["decision"], 1),
        "speedup": round(seconds["decision"] / seconds["trajectory"], 2),
        "gradient_difference": error,
    }


# Language model


def make_lm_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> TokenBatch:
    """Completions of the world's queries, sampled from the model, with random rewards."""
    suites = ("chain", "word", "long", "list", "clock")
    queries = [q for suite in suites for q in make_queries(suite, "train", rows // GROUP // len(suites) + 1)]
    prompts = [query.text + "\n\n" for query in queries[: rows // GROUP]]
    completions = sample_completions(model, tokenizer, prompts, GROUP, NEW_TOKENS)
    group_ids = torch.tensor([completion.prompt for completion in completions])
    rewards = torch.randn(len(completions), generator=torch.Generator().manual_seed(0))
    return make_token_batch(completions, make_advantages(rewards, group_ids)[0], group_ids, tokenizer.pad_token_id)


def make_trl_step(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: TokenBatch, directory: str, parts: int
) -> Callable[[], float]:
    """A step of TRL's GRPOTrainer on the batch, in `parts` accumulated micro-batches: its loss, its backward, its
    clipping, AdamW. Returns the loss of the whole batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import split_tensor_dict

    arguments = GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=len(batch) // parts,
        gradient_accumulation_steps=parts,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        gradient_checkpointing=False,  # it would trade time for memory that is not short here
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["36"] * len(batch)}),
        processing_class=tokenizer,
    )
    trainer._prepare_inputs = lambda inputs: inputs  # the batch at hand instead of one that it would generate
    trainer.current_gradient_accumulation_steps = parts
    micro_batches = split_tensor_dict(make_trl_inputs(batch, tokenizer.pad_token_id), parts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> float:
        optimizer.zero_grad()
        loss = sum(float(trainer.training_step(model, inputs, None)) for inputs in micro_batches)
        trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        return loss

    return step


def make_trl_inputs(batch: TokenBatch, pad_id: int) -> dict[str, torch.Tensor]:
    """The batch as TRL lays it out: prompts padded on the left, completions on the right."""
    prompts, completions, old = [], [], []
    for row in range(len(batch)):
        length = int(batch.attention_mask_BT[row].sum())
        start = length - int(batch.action_mask_BT[row].sum())
        prompts.append(batch.ids_BT[row, :start])
        completions.append(batch.ids_BT[row, start:length])
        old.append(batch.old_log_probs_BT[row, start:length])
    masks = [torch.ones_like(ids) for ids in completions]
    return {
        "prompt_ids": pad_sequence(prompts, True, pad_id, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(ids) for ids in prompts], True, 0, padding_side="left"),
        "completion_ids": pad_sequence(completions, True, pad_id),
        "completion_mask": pad_sequence(masks, True, 0),
        "old_per_token_logps": pad_sequence(old, True, 0.0),
        "advantages": batch.advantages_B,
        "num_items_in_batch": batch.action_mask_BT.sum(),
    }


def bench_lm(name: str, rows: int, repeats: int) -> dict[str, float]:
    """Action tokens a second of our update and of TRL's training step."""
    path = WEIGHTS_DIR / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = make_lm_batch(model, tokenizer, rows)
    ours = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6)
    settings = UpdateSettings(max_length=NEW_TOKENS, grad_clip=CLIP_NORM)
    contestants: dict[str, Callable[[], float]] = {
        "ours": lambda: update_model(ours, [optimizer], batch, settings)["loss"]
    }
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        for parts in TRL_PARTS:
            trained = copy.deepcopy(model).train()
            contestants[f"trl_{parts}"] = make_trl_step(trained, tokenizer, batch, directory, parts)
        losses = {contestant: run() for contestant, run in contestants.items()}
        difference = max(abs(loss - losses["ours"]) for loss in losses.values())
        assert difference < 1e-5, f"the losses differ: {losses}"
        seconds = time_in_turns(contestants, repeats)
    best = min((name for name in seconds if name != "ours"), key=seconds.__getitem__)
    tokens = batch.action_tokens
    return {
        "model": name,
        "rows": rows,
        "action_tokens": tokens,
        "ours_tokens_per_s": round(tokens / seconds["ours"]),
        **{f"{run}_tokens_per_s": round(tokens / seconds[run]) for run in seconds if run != "ours"},
        "speedup_over_best_trl": round(seconds[best] / seconds["ours"], 2),
        "loss_difference": difference,
    }


# Sampling


def bench_sampling(name: str, rows: int, repeats: int) -> dict[str, float]:
    """Tokens a second of our sampler and of `generate`, which encodes a prompt once for each of its samples."""
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS_DIR / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS_DIR / name)
    prompts = [query.text + "\n\n" for query in make_queries("chain", "train", rows // GROUP)]
    tokens: dict[str, list[int]] = {"ours": [], "generate": []}

    def sample() -> None:
        tokens["ours"].append(sum(len(c.ids) for c in sample_completions(model, tokenizer, prompts, GROUP, NEW_TOKENS)))

    @torch.no_grad()
    def generate() -> None:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_k=0,
            top_p=1.0,
            num_return_sequences=GROUP,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        model.compute_transition_scores(output.sequences, output.logits, normalize_logits=True)
        ids_BT = output.sequences[:, inputs["input_ids"].shape[1] :]
        tokens["generate"].append(int((ids_BT != tokenizer.pad_token_id).sum()))

    seconds = time_in_turns({"ours": sample, "generate": generate}, repeats)
    speeds = {run: statistics.mean(tokens[run]) / seconds[run] for run in tokens}
    return {
        "model": name,
        "rows": rows,
        **{f"{run}_tokens_per_s": round(speed) for run, speed in speeds.items()},
        "speedup": round(speeds["ours"] / speeds["generate"], 2),
    }


def main(argv: list[str] | None = None) -> None:
    """Command line: prints one JSON line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="trajectories or completions in the batch")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns of each contestant")
    parser.add_argument("--models", nargs="*", default=["small", "large"], help="shipped models of parts 2 and 3")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    disable_progress_bar()
    print(json.dumps({"router": bench_router(arguments.rows, arguments.repeats)}), flush=True)
    for name in arguments.models:
        print(json.dumps({"language_model": bench_lm(name, arguments.rows, arguments.repeats)}), flush=True)
        print(json.dumps({"sampling": bench_sampling(name, arguments.rows, arguments.repeats)}), flush=True)


if __name__ == "__main__":
    main()
