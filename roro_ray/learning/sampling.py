"""Sample completions of many prompts from a causal LM, with the log-probability of every token.

Each prompt is encoded once and its KV cache expanded to its n samples; rows that finish leave the batch. Plain
sampling only: a group-relative gradient wants the model's own distribution, so there is no top-k and no penalty.

Axes: `_B` rows (prompt-major: n samples of prompt 0, then of prompt 1, ..), `_P` padded prompt tokens, `_V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from roro_ray.errors import ConfigError
from roro_ray.learning.sequences import Completion

_COMPACT_SHARE = 0.8  # the cache is cut to the live rows when fewer than this share of its rows live


@dataclass(slots=True)
class _Rows:
    """What the sampler has written so far, and which rows of the cache are still being written."""

    live: Tensor  # cache row -> index of the sample
    ids: list[list[int]]
    log_probs: list[list[float]]
    done: list[bool]
    may_end: dict[int, bool] = field(default_factory=dict)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and no gradients, the mode restored afterwards."""
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop: str | None = None,
    seed: int = 0,
) -> list[Completion]:
    """Sample n completions of every prompt.

    Args:
        prompts: texts, encoded without special tokens; each must give a token or more.
        temperature: of the distribution that is sampled; 0 takes the likeliest token (log-probabilities are then
            at temperature 1).
        stop: text that ends a completion, whatever the tokens that spell it; the end token always ends it.
        seed: the same seed, prompts and weights give the same completions.

    Returns:
        len(prompts) x n completions, the samples of one prompt together, prompts in order.

    Raises:
        ConfigError: an empty prompt, or numbers out of range.
    """
    if n < 1 or max_new_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"got n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}: expected n and max_new_tokens "
            "of 1 or more and a temperature of 0 or more"
        )
    if not prompts:
        return []
    prompt_ids = [list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if not ids:
            raise ConfigError(f"prompt {prompt!r} has no token: give every prompt a token or more")
    with _evaluating(model):
        rows = _decode(model, tokenizer, prompt_ids, n, max_new_tokens, temperature, stop, seed)
    eos, completions = tokenizer.eos_token_id, []
    for row, ids in enumerate(rows.ids):
        text = _decode_text(tokenizer, [i for i in ids if i != eos])
        completions.append(
            Completion(
                prompt=row // n,
                prompt_ids=tuple(prompt_ids[row // n]),
                ids=tuple(ids),
                log_probs=tuple(rows.log_probs[row]),
                text=text.split(stop, 1)[0] if stop else text,
                finish="stop" if rows.done[row] else "length",
            )
        )
    return completions


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    n: int,
    max_new_tokens: int,
    temperature: float,
    stop: str | None,
    seed: int,
) -> _Rows:
    """The decoding loop: encode prompts once, expand, draw a token for every live row, drop finished rows."""
    device = model.device
    logits_BV, cache, mask_BP = _encode_prompts(model, prompt_ids, n, tokenizer.pad_token_id or 0)
    positions_B = mask_BP.sum(dim=1)
    size = len(prompt_ids) * n
    rows = _Rows(
        torch.arange(size, device=device), [[] for _ in range(size)], [[] for _ in range(size)], [False] * size
    )
    # On the CPU whatever the device, and one number per sample and step even for finished rows: a sample's
    # randomness then depends on its place alone, not on when other rows finish.
    generator = torch.Generator().manual_seed(seed)
    for step in range(max_new_tokens):
        uniform_B = torch.rand(size, generator=generator, dtype=torch.float64).to(device)[rows.live]
        tokens_B, log_probs_B = _draw(logits_BV, uniform_B, temperature)
        alive_B = _append(rows, tokens_B, log_probs_B, tokenizer, stop)
        if step == max_new_tokens - 1 or not any(alive_B):
            break
        if sum(alive_B) < _COMPACT_SHARE * len(alive_B):
            kept = torch.tensor(alive_B, device=device).nonzero().flatten()
            cache.batch_select_indices(kept)
            rows.live, tokens_B, mask_BP, positions_B = (t[kept] for t in (rows.live, tokens_B, mask_BP, positions_B))
        mask_BP = torch.cat([mask_BP, mask_BP.new_ones(len(mask_BP), 1)], dim=1)
        logits_BV = model(
            input_ids=tokens_B[:, None],
            attention_mask=mask_BP,
            position_ids=positions_B[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        positions_B = positions_B + 1
    return rows


def _encode_prompts(
    model: PreTrainedModel, prompt_ids: Sequence[list[int]], n: int, pad_id: int
) -> tuple[Tensor, DynamicCache, Tensor]:
    """One forward pass over the different prompts, left padded; logits, cache and mask repeated n times."""
    width = max(len(ids) for ids in prompt_ids)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in prompt_ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids], device=model.device)
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(n)
    return output.logits[:, -1].repeat_interleave(n, dim=0), cache, mask.repeat_interleave(n, dim=0)


def _draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution, and its log-probability."""
    log_probs_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(dim=-1)
    if temperature == 0:
        tokens_B = log_probs_BV.argmax(dim=-1)
    else:
        cumulative_BV = log_probs_BV.double().exp().cumsum(dim=-1)
        target_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
        tokens_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[1] - 1)
    return tokens_B, log_probs_BV.gather(1, tokens_B[:, None]).squeeze(1)


def _append(
    rows: _Rows, tokens_B: Tensor, log_probs_B: Tensor, tokenizer: PreTrainedTokenizerBase, stop: str | None
) -> list[bool]:
    """Write one token to every live sample; which cache rows are still being written afterwards."""
    alive, eos = [], tokenizer.eos_token_id
    for row, token, log_prob in zip(rows.live.tolist(), tokens_B.tolist(), log_probs_B.tolist(), strict=True):
        if not rows.done[row]:
            rows.ids[row].append(token)
            rows.log_probs[row].append(log_prob)
            rows.done[row] = token == eos or (stop is not None and _ends_with_stop(rows, row, tokenizer, stop))
        alive.append(not rows.done[row])
    return alive


def _decode_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _ends_with_stop(rows: _Rows, row: int, tokenizer: PreTrainedTokenizerBase, stop: str) -> bool:
    """Whether the newest token completed the stop text."""
    token = rows.ids[row][-1]
    if token not in rows.may_end:  # decoding is slow: only a token that holds the stop's last character can end it
        rows.may_end[token] = stop[-1] in _decode_text(tokenizer, [token])
    # Every token of the stop's spelling holds a byte or more of it.
    return rows.may_end[token] and stop in _decode_text(tokenizer, rows.ids[row][-len(stop.encode()) :])
