"""Train the embedded world's models from scratch: `python -m roro_ray.world.train`.

Muon for the matrices, AdamW for the rest, batches of about 2,048 tokens, loss on the solution only. The
router's encoder also learns, at every step boundary, to predict the tokens of the next step (multi-token
prediction): without it the boundary's state does not hold the next operation, and GRPO cannot route on it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.world.corpus import IGNORED, draw_batches
from roro_ray.world.models import MODELS, WEIGHTS_DIR, ModelSpec, make_model, make_tokenizer_for
from roro_ray.world.tasks import STEP_DELIMITER

BATCH_TOKENS = 2048
WARMUP_STEPS = 40
BF16_PARAMETERS = 500_000


class Lookahead(torch.nn.Module):
    """K linear heads that predict the next K tokens from the state at a step boundary."""

    def __init__(self, width: int, vocab: int, depth: int) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, vocab) for _ in range(depth))

    def forward(
        self, hidden_BTC: torch.Tensor, ids_BT: torch.Tensor, labels_BT: torch.Tensor, boundary: int
    ) -> torch.Tensor:
        """Mean cross-entropy of the tokens 1..K after every boundary token."""
        rows, columns = (ids_BT == boundary).nonzero(as_tuple=True)
        padded = F.pad(labels_BT, (0, len(self.heads)), value=IGNORED)
        state = hidden_BTC[rows, columns]
        losses = [
            F.cross_entropy(head(state), padded[rows, columns + k + 1], ignore_index=IGNORED)
            for k, head in enumerate(self.heads)
        ]
        return torch.stack(losses).mean()


def make_optimizers(parameters: Iterable[tuple[str, torch.nn.Parameter]], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, heads and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in parameters:
        inner = parameter.ndim == 2 and "embed" not in name and "head" not in name
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_model(spec: ModelSpec, seed: int, report_every: int = 200) -> tuple[PreTrainedModel, list[float]]:
    """Train one model.

    Returns:
        the model in eval mode, and the mean loss of each `report_every` updates.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer_for(spec)
    model = make_model(spec, tokenizer)
    lookahead = Lookahead(spec.width, len(tokenizer), spec.lookahead) if spec.lookahead else None
    modules = torch.nn.ModuleDict({"model": model} | ({"lookahead_head": lookahead} if lookahead else {}))
    optimizers = make_optimizers(modules.named_parameters(), spec.learning_rate)
    updates = spec.tokens // BATCH_TOKENS
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / WARMUP_STEPS, 1.0) * (1 - i / updates))
        for o in optimizers
    ]
    boundary = tokenizer.encode(STEP_DELIMITER)[-1]
    bf16 = sum(p.numel() for p in model.parameters()) > BF16_PARAMETERS
    losses: list[float] = []
    window = 0.0
    batches = draw_batches(tokenizer, spec.corpus, BATCH_TOKENS, seed)
    for update, (ids, mask, labels) in enumerate(itertools.islice(batches, updates)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(input_ids=ids, attention_mask=mask, output_hidden_states=lookahead is not None)
        logits = output.logits[:, :-1].float().flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
        if lookahead is not None:
            loss = loss + lookahead(output.hidden_states[-1], ids, labels, boundary)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedule, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        window += loss.item()
        if (update + 1) % report_every == 0:
            losses.append(window / report_every)
            window = 0.0
            print(f"update {update + 1}/{updates}  loss {losses[-1]:.4f}", flush=True)
    return model.eval(), losses


def save_model(name: str, spec: ModelSpec, model: PreTrainedModel, facts: dict[str, object], directory: Path) -> Path:
    """Save fp16 safetensors, tokenizer and `facts.json` (seed, seconds, losses) under `directory / name`."""
    path = directory / name
    model.half().save_pretrained(path)
    make_tokenizer_for(spec).save_pretrained(path)
    (path / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    return path


def main(argv: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"which of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every token budget")
    parser.add_argument("--out", type=Path, default=WEIGHTS_DIR, help="where the model directories go")
    arguments = parser.parse_args(argv)
    for name in arguments.models:
        if name not in MODELS:
            hint = did_you_mean(name, MODELS)
            raise ConfigError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}{hint}")
    for name in arguments.models:
        spec = replace(MODELS[name], tokens=int(MODELS[name].tokens * arguments.scale))
        start = time.perf_counter()
        model, losses = train_model(spec, arguments.seed)
        seconds = time.perf_counter() - start
        parameters = sum(p.numel() for p in model.parameters())
        facts = {
            "name": name,
            "seed": arguments.seed,
            "tokens": spec.tokens,
            "seconds": round(seconds),
            "parameters": parameters,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "final_loss": round(losses[-1], 4) if losses else None,
        }
        path = save_model(name, spec, model, facts, arguments.out)
        print(f"{name}: {parameters} parameters, {seconds:.0f} s -> {path}")


if __name__ == "__main__":
    main()
