"""Choosing the next token of every row of a batch, so that no row's draw depends on the others.

A row's random numbers come from a counter-based generator: a pure function of the row's key (its seed and its
prefix) and of the token's index in the step. The token is the inverse of the cumulative distribution in float64 at
that number. A continued peek therefore draws exactly what the whole step would have drawn. A row with a nucleus (top-p:
Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration") draws from its most probable tokens only.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def make_stream_key(seed: int, prefix: str) -> int:
    """The key of a row's random numbers; the prefix takes part so that one seed serves every step of an episode."""
    digest = zlib.crc32(prefix.encode("utf-8", "replace"))
    return (seed * int(_GOLDEN) + (digest << 20)) & _MASK


def draw_uniforms(keys_B: npt.NDArray[np.uint64], counters_B: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (key, counter) pair, by the finaliser of SplitMix64 applied twice."""
    with np.errstate(over="ignore"):
        z = _mix(keys_B + _GOLDEN) + (counters_B + np.uint64(1)) * _GOLDEN
        return (_mix(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def keep_nucleus(probabilities_BV: torch.Tensor, top_ps_B: torch.Tensor) -> torch.Tensor:
    """Each row's smallest set of most probable tokens that reaches its top_p, the others at 0; not renormalised.

    The token that crosses the threshold belongs to the set; of equally probable tokens the lower id comes first.
    """
    sorted_BV, order_BV = probabilities_BV.sort(stable=True, dim=-1, descending=True)
    dropped_BV = torch.zeros_like(sorted_BV, dtype=torch.bool)  # the first token always stays
    dropped_BV[:, 1:] = sorted_BV.cumsum(-1)[:, :-1] >= top_ps_B[:, None]
    return torch.zeros_like(probabilities_BV).scatter_(-1, order_BV, sorted_BV.masked_fill_(dropped_BV, 0.0))


def draw_tokens(
    logits_BV: torch.Tensor,
    temperatures_B: list[float],
    keys_B: list[int],
    counters_B: list[int],
    top_ps_B: list[float],
) -> torch.Tensor:
    """The next token of each row: the most probable one where the temperature is 0, else a seeded draw."""
    tokens_B = logits_BV.argmax(-1)
    drawn = [row for row, temperature in enumerate(temperatures_B) if temperature > 0]
    if not drawn:
        return tokens_B
    uniforms = draw_uniforms(
        np.array([keys_B[row] for row in drawn], dtype=np.uint64),
        np.array([counters_B[row] for row in drawn], dtype=np.uint64),
    )
    device = logits_BV.device
    index = torch.tensor(drawn, device=device)
    temperatures = torch.tensor([temperatures_B[row] for row in drawn], dtype=torch.float64, device=device)
    probabilities = torch.softmax(logits_BV[index].double() / temperatures[:, None], -1)
    narrowed = [i for i, row in enumerate(drawn) if top_ps_B[row] < 1]
    if narrowed:
        top_ps = torch.tensor([top_ps_B[drawn[i]] for i in narrowed], dtype=torch.float64, device=device)
        probabilities[narrowed] = keep_nucleus(probabilities[narrowed], top_ps)
    cumulative = probabilities.cumsum(-1)
    # Scaled by the last value: rounding may leave it just below 1, and a draw above it would fall off the vocabulary.
    targets = torch.from_numpy(uniforms).to(device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    tokens_B[index] = tokens.clamp_(max=logits_BV.shape[-1] - 1)
    return tokens_B
