"""Reproducible draws without a generator's state: a uniform is a pure function of its keys.

Thousands of episodes run interleaved, so a shared generator would make every draw depend on who came first.
Here a draw depends only on (seed, keys), whatever the concurrency and the batch (splitmix64, Steele et al. 2014).
"""

from __future__ import annotations

import zlib

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _scramble(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def mix_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed made of a seed and keys; a text counts by its checksum (`hash` differs between processes)."""
    x = _scramble(seed & _MASK)
    for key in keys:
        x = _scramble(x ^ ((zlib.crc32(key.encode()) if isinstance(key, str) else key) & _MASK))
    return x >> 1


def draw_uniform(seed: int, *keys: int | str) -> float:
    """A uniform in [0, 1) fixed by its arguments."""
    return (mix_seed(seed, *keys) >> 10) * 2.0**-53
