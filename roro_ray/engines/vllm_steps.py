"""One step as vLLM writes it: tokens are collected until the step is over, and told meanwhile where somebody reads.

A step ends where its text contains the delimiter or a stop, in whatever tokens they come. That is found here, by the
rule that every engine shares, and not by vLLM's own stop strings: these know nothing of a kept peek that may hold half
a delimiter, and forbid the end of sequence where a step must have some tokens before a delimiter counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from roro_ray.engines.protocol import StepRequest, StepResult
from roro_ray.engines.rows import Row
from roro_ray.engines.streaming import StepStream, hand_over
from roro_ray.engines.text import HALF_CHARACTER, Ending, StepText
from roro_ray.engines.vllm_backend import Piece
from roro_ray.engines.vllm_prompts import StepPrompt

Answer = asyncio.Future[StepResult]


@dataclass(frozen=True, slots=True)
class KeptScores:
    """What is known of kept ids: their log-probabilities, and the entropy of the first one's distribution."""

    log_probs: tuple[float, ...] = ()
    first_entropy: float = math.nan


@dataclass(slots=True)
class VllmStats:
    """What an engine was asked and what it computed; `merged` requests shared another one's computation."""

    requests: int = 0
    merged: int = 0
    tokens_prefilled: int = 0
    tokens_reused: int = 0
    tokens_decoded: int = 0


@dataclass(eq=False, slots=True)
class StepJob:
    """A step being written, and everyone who waits for it; a `Receiver`.

    `row` holds the step's own ids (its `start` is 0), `top` is the number of log-probabilities asked for beside each
    token's own. `on_end` is called once, in the back end's thread, when the step is over in whatever way.
    """

    request: StepRequest
    prompt: StepPrompt
    text: StepText
    row: Row
    top: int
    on_end: Callable[[StepJob], None]
    stream: StepStream | None = None
    cached: int = 0
    waiters: list[tuple[asyncio.AbstractEventLoop, Answer]] = field(default_factory=list)
    result: StepResult | None = None
    _done: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def join(self) -> Answer | None:
        """The answer to come, for one more who waits; None where the step is over already."""
        loop = asyncio.get_running_loop()
        answer: Answer = loop.create_future()
        with self._lock:
            if self._done:
                return None
            self.waiters.append((loop, answer))
        return answer

    def leave(self, answer: Answer) -> bool:
        """One less who waits; True where nobody does now and the step should be given up."""
        if not answer.cancel() and not answer.cancelled():
            answer.exception()  # so that the loop does not report an error that nobody took
        with self._lock:
            self.waiters = [waiter for waiter in self.waiters if waiter[1] is not answer]
            return not self.waiters and not self._done

    def give_up(self) -> None:
        """Nobody wants the step any more."""
        self._settle(None, None)

    # Below: the back end's thread.

    def take(self, piece: Piece) -> bool:
        """Take tokens; True where the step is over."""
        row = self.row
        self.cached = max(self.cached, piece.cached)
        if math.isnan(row.first_entropy) and not row.ids and piece.token_ids:
            row.first_entropy = measure_entropy(piece.top_log_probs[: self.top], self.text.vocabulary)
        ended = None
        for token, log_prob in zip(piece.token_ids, piece.log_probs, strict=True):
            row.ids.append(token)
            row.log_probs.append(log_prob)
            ended = self.text.end(row.ids, row.max_tokens, row.ending)
            if ended is not None:
                break
        if ended is None and piece.is_last:  # a grammar may end a text without an end of sequence
            ended = "stop", self.text.render(row.ids)
        if ended is not None:
            self.finish(*ended)
        elif self.stream is not None:
            hand_over([(self.stream, row)])
        return ended is not None

    def finish(self, finish: str, text: str) -> None:
        """The step is over: tell all who wait."""
        row, ids = self.row, self.prompt.ids
        row.finish, row.text = finish, text
        self.result = StepResult(
            text=text,
            token_ids=tuple(row.ids),
            log_probs=tuple(row.log_probs),
            finish=finish,
            prefix_tokens=len(ids),
            first_entropy=row.first_entropy,
            cached_tokens=min(self.cached, len(ids)),
            encoded_ids=ids[len(ids) - self.prompt.encoded :],
            exact=is_exact(self.text.render(row.ids), text, finish, row.ending),
        )
        self._settle(self.result, None)

    def fail(self, error: Exception) -> None:
        """Raise an error in all who wait."""
        self._settle(None, error)

    def _settle(self, result: StepResult | None, error: Exception | None) -> None:
        with self._lock:
            if self._done:
                return
            self._done = True
            waiters, self.waiters = self.waiters, []
        self.on_end(self)
        for loop, answer in waiters:
            with contextlib.suppress(RuntimeError):  # a closed loop waits for nothing
                loop.call_soon_threadsafe(_tell, answer, result, error)


def is_exact(spelled: str, text: str, finish: str, ending: Ending | None) -> bool:
    """Whether a step's tokens spell its text and what ended it, and nothing else."""
    if finish == "delimiter":
        return ending is not None and spelled == text + ending.delimiter
    if finish == "marker":
        return ending is not None and any(spelled == text + stop for stop in ending.stops)
    return spelled == text and not text.endswith(HALF_CHARACTER)  # half a character is no text to go on from


def measure_entropy(top_log_probs: Sequence[float], vocabulary: int) -> float:
    """Entropy in nats of a distribution of which the highest log-probabilities are known.

    Exact where these are all of the vocabulary. Else the rest counts as one lump, which gives a lower bound: a rest of
    probability r, spread evenly over the n other tokens, has r ln n more.
    """
    if not len(top_log_probs):
        return math.nan
    probabilities = [math.exp(log_prob) for log_prob in top_log_probs]
    if len(probabilities) < vocabulary:
        probabilities.append(max(0.0, 1.0 - sum(probabilities)))
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def _tell(answer: Answer, result: StepResult | None, error: Exception | None) -> None:
    if answer.done():
        return
    if result is not None:
        answer.set_result(result)
    else:
        answer.set_exception(error or asyncio.CancelledError())
