"""Log-probabilities of given tokens by vLLM, without giving up its prefix cache.

vLLM's `prompt_logprobs` computes a whole prompt anew. Instead one token is asked for behind each beginning of a
continuation, the only one allowed there: its log-probability is told before that restriction, and the prompt comes out
of the cache but for its last block. A verdict of one token thus costs at most one block a choice. Long continuations
cost one request a token, all in one batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from roro_ray.engines.vllm_backend import Adapter, Backend, Generation, Piece, Sampling
from roro_ray.engines.vllm_steps import KeptScores, measure_entropy

_PEEKS = 4096  # unfinished steps whose log-probabilities are remembered


@dataclass(eq=False, slots=True)
class _OneToken:
    """The receiver of one token: its future gets the piece."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Piece]

    def take(self, piece: Piece) -> bool:
        """Take the token."""
        self._call(self.future.set_result, piece)
        return True

    def fail(self, error: Exception) -> None:
        """Take the error."""
        self._call(self.future.set_exception, error)

    def _call(self, settle: object, value: object) -> None:
        with contextlib.suppress(RuntimeError):  # a closed loop waits for nothing
            self.loop.call_soon_threadsafe(_settle, self.future, settle, value)


def _settle(future: asyncio.Future[Piece], settle: object, value: object) -> None:
    if not future.done():
        assert callable(settle)
        settle(value)


async def score_tokens(
    backend: Backend, prefix: Sequence[int], continuations: Sequence[Sequence[int]], adapter: Adapter | None
) -> list[list[float]]:
    """The log-probability of every token of every continuation; beginnings that several share are read once."""
    wanted = {(*choice[:index], token): None for choice in continuations for index, token in enumerate(choice)}
    pieces = await _ask_all(
        backend,
        [
            Generation([*prefix, *read[:-1]], Sampling(max_tokens=1, allowed=(read[-1],)), _make_receiver(), adapter)
            for read in wanted
        ],
    )
    found = {read: piece.log_probs[0] for read, piece in zip(wanted, pieces, strict=True)}
    return [[found[(*choice[: index + 1],)] for index in range(len(choice))] for choice in continuations]


async def score_kept(
    backend: Backend, prefix: Sequence[int], kept: Sequence[int], adapter: Adapter | None, top: int, vocabulary: int
) -> KeptScores:
    """What a peek would have told of these ids: for a peek that this engine did not make, or forgot."""
    first = Generation(list(prefix), Sampling(max_tokens=1, top=top), _make_receiver(), adapter)
    scores, pieces = await asyncio.gather(
        score_tokens(backend, prefix, [tuple(kept)], adapter), _ask_all(backend, [first])
    )
    return KeptScores(tuple(scores[0]), measure_entropy(pieces[0].top_log_probs[:top], vocabulary))


def _make_receiver() -> _OneToken:
    loop = asyncio.get_running_loop()
    return _OneToken(loop, loop.create_future())


async def _ask_all(backend: Backend, generations: list[Generation]) -> list[Piece]:
    futures = []
    for generation in generations:
        backend.submit(generation)
        assert isinstance(generation.receiver, _OneToken)
        futures.append(generation.receiver.future)
    try:
        return list(await asyncio.gather(*futures))
    finally:
        for generation, future in zip(generations, futures, strict=True):
            if future.cancelled() or not future.done():
                backend.abort(generation)


class PeekMemo:
    """What is known of unfinished steps that may be continued; the oldest are forgotten first. For any thread."""

    def __init__(self) -> None:
        self._scores: dict[bytes, KeptScores] = {}
        self._lock = threading.Lock()

    def keep(self, adapter: Adapter | None, prefix: Sequence[int], ids: Sequence[int], scores: KeptScores) -> None:
        """Remember what was told of the ids that followed a prefix."""
        with self._lock:
            while len(self._scores) >= _PEEKS:
                del self._scores[next(iter(self._scores))]
            self._scores[_digest(adapter, prefix, ids)] = scores

    def find(self, adapter: Adapter | None, prefix: Sequence[int], ids: Sequence[int]) -> KeptScores | None:
        """What was told of them, or None."""
        with self._lock:
            return self._scores.get(_digest(adapter, prefix, ids))


def _digest(adapter: Adapter | None, prefix: Sequence[int], ids: Sequence[int]) -> bytes:
    numbers = array("q", (adapter.id if adapter is not None else 0, len(prefix), *prefix, *ids))
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()
