"""The engine of the embedded world: a Hugging Face causal language model in this process.

Concurrent requests are gathered into batches for one worker thread, greedy steps are remembered, and the states of
the text so far are kept, so that the next step of an episode computes only what was written since.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from roro_ray.engines.batching import Job, MicroBatcher, Turn
from roro_ray.engines.decoding import DecodeStats, StepDecoder
from roro_ray.engines.loading import LoadedModel, load_model, resolve_model_path
from roro_ray.engines.memo import GreedyMemo, ScoreMemo
from roro_ray.engines.protocol import ChoiceScores, EngineFacts, StepDelta, StepRequest, StepResult
from roro_ray.engines.rows import Row
from roro_ray.engines.sampling import make_stream_key
from roro_ray.engines.scoring import ScoreRequest, ScoreRows, read_choices
from roro_ray.engines.streaming import StepStream, hand_over
from roro_ray.engines.text import StepText
from roro_ray.errors import EngineError

__all__ = ["EngineStats", "HfEngine", "resolve_model_path"]

_TURNS: dict[str, Turn] = {}  # of the devices of this process
_LEAST_TOKENS = 1 << 15  # rows x columns of a batch where cache_mb would allow fewer
_TAIL_SHARE = 4  # a batch shrunk below 1/4 makes way for waiting requests


@dataclass(slots=True)
class EngineStats(DecodeStats):
    """What an engine was asked and what it computed; `merged` requests shared another one's computation."""

    requests: int = 0
    memo_hits: int = 0
    merged: int = 0


Request = StepRequest | ScoreRequest
Result = StepResult | ChoiceScores
EngineJob = Job[Request, Result]


class HfEngine:
    """A model directory behind the `Engine` protocol.

    `path` is a directory in Hugging Face format or `world:NAME`; `batch_size` bounds the requests of one batch;
    `memo_entries` the greedy steps remembered (0: none); `cache_mb` the MiB of key/value states kept between steps
    (0: none) and, again, those of one batch; `max_wait_s` holds batches back for more requests.
    """

    def __init__(
        self,
        name: str,
        path: str,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 256,
        memo_entries: int = 400_000,
        max_wait_s: float = 0.0,
        cache_mb: int = 256,
    ):
        self.name = name
        self.path = path
        self.device = device
        self.dtype = dtype
        self.memo_entries = memo_entries
        self.cache_mb = cache_mb
        self._scores = ScoreMemo(memo_entries)
        self._requests = 0
        self._memo_hits = 0
        self._loading = threading.Lock()
        self._facts: EngineFacts | None = None
        self._batcher: MicroBatcher[Request, Result] = MicroBatcher(
            self._run, batch_size, max_wait_s, f"engine {name}", _TURNS.setdefault(device, Turn())
        )

    @property
    def stats(self) -> EngineStats:
        """Counts since the engine was made."""
        decoded = asdict(self._decoder.stats) if self._facts is not None else {}
        return EngineStats(requests=self._requests, memo_hits=self._memo_hits, merged=self._batcher.merged, **decoded)

    @property
    def active(self) -> int:
        """Requests that wait or are being computed; one that was given up counts until its row is free."""
        return self._batcher.active

    async def ready(self) -> EngineFacts:
        """Load the model; again at no cost.

        Raises:
            ConfigError: the dtype, the device or the name of a shipped model is wrong.
            EngineError: the model directory is missing, incomplete, has no tokenizer or no safetensors.
        """
        return self._facts if self._facts is not None else await asyncio.to_thread(self._load)

    async def generate_step(self, request: StepRequest) -> StepResult:
        """Write one step; concurrent calls are batched and do not change each other's result.

        Raises:
            EngineError: the request is malformed or longer than the model's positions, or its batch failed.
        """
        known = await self._admit(request)
        if known is not None:
            return known
        result = await self._batcher.submit(request, key=request)
        assert isinstance(result, StepResult)
        return result

    async def stream_step(self, request: StepRequest) -> AsyncIterator[StepDelta | StepResult]:
        """Write one step and tell it meanwhile: deltas, then the result of `generate_step`.

        Streamed steps share batches with all others. A consumer that is slower than the model gets fewer, longer
        deltas; a step that the memo knows comes as its result alone. Closing the iterator frees the step's row
        after the forward pass that runs at the moment.

        Raises:
            EngineError: as `generate_step`.
        """
        known = await self._admit(request)
        if known is not None:
            yield known
            return
        stream = StepStream(self._text, request.kept_ids)
        # No key: a step shared with others could not be told to each from its beginning.
        answer = self._batcher.enqueue(request, sink=stream)
        try:
            while (delta := await stream.next_delta(answer)) is not None:
                yield delta
            result = answer.result()
        finally:
            self._batcher.abandon(answer)
        assert isinstance(result, StepResult)
        yield result

    async def _admit(self, request: StepRequest) -> StepResult | None:
        """Check and count a request; gives its result where the memo knows it."""
        if self._facts is None:
            await self.ready()
        self._requests += 1
        if request.max_tokens < max(1, len(request.kept_ids)):
            raise EngineError(
                f"engine {self.name}: max_tokens={request.max_tokens} with {len(request.kept_ids)} kept ids: expected "
                "at least 1 and at least the number of kept ids, since it bounds the whole step"
            )
        if not 0 < request.top_p <= 1:
            raise EngineError(
                f"engine {self.name}: top_p={request.top_p}: expected a number above 0 and at most 1 (1 samples from "
                "the whole distribution, temperature=0 takes the most probable token)"
            )
        known = self._memo.find(request)
        if known is not None:
            self._memo_hits += 1
        return known

    async def score_choices(self, prefix: str, choices: tuple[str, ...]) -> ChoiceScores:
        """Score given continuations of a prefix; an empty one has log-probability 0 and no tokens.

        Raises:
            EngineError: prefix and choice are longer than the model's positions, or the batch failed.
        """
        if self._facts is None:
            await self.ready()
        self._requests += 1
        request = ScoreRequest(prefix, tuple(choices))
        known = self._scores.find(prefix, request.choices)
        if known is not None:
            self._memo_hits += 1
            return known
        result = await self._batcher.submit(request, key=request)
        assert isinstance(result, ChoiceScores)
        self._scores.keep(prefix, request.choices, result)
        return result

    def _load(self) -> EngineFacts:
        with self._loading:
            if self._facts is not None:
                return self._facts
            started = time.perf_counter()
            loaded = load_model(self.path, self.device, self.dtype)
            self._text = StepText(loaded.tokenizer, loaded.eos_ids, loaded.vocabulary)
            self._memo = GreedyMemo(self.memo_entries, self._text.render)
            self._max_positions = loaded.max_positions
            self._decoder = self._make_decoder(loaded)
            self._facts = EngineFacts(
                name=self.name,
                model=str(Path(self.path)) if ":" not in self.path else self.path,
                device=str(loaded.shape.device),
                parameters=loaded.parameters,
                flops_per_token=2.0 * loaded.parameters,
                seconds=time.perf_counter() - started,
                fingerprint=loaded.fingerprint,
            )
            return self._facts

    def _make_decoder(self, loaded: LoadedModel) -> StepDecoder:
        tokens = (self.cache_mb << 20) // loaded.shape.bytes_per_token
        return StepDecoder(loaded.model, self._text, loaded.shape, loaded.masks, tokens, max(tokens, _LEAST_TOKENS))

    # Below: the worker thread.

    def _run(self, jobs: list[EngineJob]) -> None:
        scores = [job for job in jobs if isinstance(job.request, ScoreRequest)]
        steps = [job for job in jobs if isinstance(job.request, StepRequest)]
        if scores:
            self._score(scores)
        if steps:
            self._decode(steps)

    def _decode(self, jobs: list[EngineJob]) -> None:
        job_of = {id(row): job for job, row in zip(jobs, self._make_rows(jobs), strict=True) if row is not None}
        rows = [job.state for job in job_of.values() if isinstance(job.state, Row)]
        streams = [(job_of[id(row)].sink, row) for row in rows]
        streamed = [(stream, row) for stream, row in streams if isinstance(stream, StepStream)]
        cancelled = self._batcher.cancelled

        def on_finish(finished: list[Row]) -> None:
            self._answer_steps([(job_of[id(row)], row) for row in finished])

        def keep(alive: list[Row]) -> list[Row]:
            nonlocal cancelled
            if streamed:
                hand_over(streamed)
            if self._batcher.cancelled != cancelled:
                cancelled = self._batcher.cancelled
                # Of all rows, since those of a later chunk would otherwise be computed for nobody.
                self._batcher.drop_abandoned([job for job in job_of.values() if not job.done])
            alive = [row for row in alive if not job_of[id(row)].done]
            if _TAIL_SHARE * len(alive) > len(rows) or self._batcher.pending < _TAIL_SHARE * len(alive):
                return alive
            # A few long steps would hold up many waiting ones: they go on in the next batch.
            self._batcher.put_back([job_of[id(row)] for row in alive])
            return []

        self._decoder.decode(rows, on_finish, keep)

    def _make_rows(self, jobs: list[EngineJob]) -> list[Row | None]:
        """A row for each job (None where it cannot be: then the job has failed)."""
        new = [job for job in jobs if job.state is None]
        for job, ids in zip(new, self._text.encode([job.request.prefix for job in new]), strict=True):
            request = job.request
            assert isinstance(request, StepRequest)
            whole = [*ids, *request.kept_ids]
            if self._fits(job, whole, len(ids) + request.max_tokens):
                key = make_stream_key(request.seed, request.prefix)
                job.state = Row(whole, len(ids), request.max_tokens, request.temperature, key, request.top_p)
        return [job.state if isinstance(job.state, Row) else None for job in jobs]

    def _fits(self, job: EngineJob, ids: list[int], length: int) -> bool:
        """Whether the model can take these ids and so many positions; fails the job where not."""
        if min(ids) < 0 or max(ids) >= self._text.vocabulary:
            message = (
                f"token id {max(ids)} lies beyond the {self._text.vocabulary} tokens that the model embeds: kept ids "
                "must come from the same engine, and text must not use tokens that were added to the tokenizer alone"
            )
        elif self._max_positions is not None and length > self._max_positions:
            message = (
                f"prefix and step may take {length} tokens, more than the model's {self._max_positions} positions: "
                "lower episode.max_step_tokens or episode.max_steps, or take a model with a longer context"
            )
        else:
            return True
        self._batcher.fail([job], EngineError(f"engine {self.name}: {message}"))
        return False

    def _answer_steps(self, finished: Sequence[tuple[EngineJob, Row]]) -> None:
        answers: list[tuple[EngineJob, Result]] = []
        for job, row in finished:
            assert isinstance(job.request, StepRequest) and row.finish is not None
            result = StepResult(
                text=row.text,
                token_ids=tuple(row.ids[row.start :]),
                log_probs=tuple(row.log_probs),
                finish=row.finish,
                prefix_tokens=row.start,
                first_entropy=row.first_entropy,
            )
            self._memo.keep(job.request, result)
            answers.append((job, result))
        self._batcher.answer(answers)

    def _score(self, jobs: list[EngineJob]) -> None:
        encoded = self._text.encode([job.request.prefix for job in jobs])
        rows = ScoreRows()
        wanted: list[tuple[EngineJob, int, list[tuple[Row | None, int]]]] = []
        for job, prefix in zip(jobs, encoded, strict=True):
            assert isinstance(job.request, ScoreRequest)
            choices = [self._text.encode_continuation(job.request.prefix, prefix, c) for c in job.request.choices]
            whole = [*prefix, *itertools.chain(*choices)]
            if self._fits(job, whole, len(prefix) + max(map(len, choices), default=0)):
                wanted.append((job, len(prefix), [rows.add(prefix, choice) for choice in choices]))
        self._decoder.score(rows.rows)
        self._batcher.answer([(job, read_choices(length, found)) for job, length, found in wanted])
