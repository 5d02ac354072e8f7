"""The engine of the embedded world: a Hugging Face causal language model in this process, LoRA adapters beside it.

Concurrent requests are gathered into batches for one worker thread, greedy steps are remembered, and the states of
the text so far are kept, so that the next step of an episode computes only what was written since.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from roro_ray.engines.adapters import AdapterSet
from roro_ray.engines.batching import MicroBatcher, Turn
from roro_ray.engines.decoding import DecodeStats, StepDecoder
from roro_ray.engines.formats import make_format
from roro_ray.engines.loading import LoadedModel, load_model, resolve_model_path
from roro_ray.engines.memo import GreedyMemo, ScoreMemo
from roro_ray.engines.protocol import (
    ChoiceScores,
    EngineFacts,
    Prices,
    StepDelta,
    StepRequest,
    StepResult,
    check_limits,
)
from roro_ray.engines.scoring import ScoreRequest
from roro_ray.engines.streaming import StepStream
from roro_ray.engines.text import StepText
from roro_ray.engines.worker import BatchWorker, EngineJob, Request, Result
from roro_ray.errors import ConfigError

__all__ = ["EngineStats", "HfEngine", "resolve_model_path"]

_TURNS: dict[str, Turn] = {}  # of the devices of this process
_NO_PRICES = Prices()
_LEAST_TOKENS = 1 << 15  # rows x columns of a batch where cache_mb would allow fewer


@dataclass(slots=True)
class EngineStats(DecodeStats):
    """What an engine was asked and what it computed; `merged` requests shared another one's computation."""

    requests: int = 0
    memo_hits: int = 0
    merged: int = 0


class HfEngine:
    """A model behind the `Engine` protocol.

    `path` is a directory in Hugging Face format, a model of the hub (in its `revision`) or `world:NAME`; `batch_size`
    bounds the requests of one batch; `memo_entries` the greedy steps remembered (0: none); `cache_mb` the MiB of
    key/value states kept between steps (0: none) and, again, those of one batch; `max_wait_s` holds batches back for
    more requests. `model_format` and `thinking` choose the prompt format (`make_format`), `prices` are told as they
    are, `adapters` bounds the LoRA adapters served at once, `max_context` the tokens of prefix and step together (0: as
    many as the model has positions).

    Text is what this engine goes by: it takes no ids of prefixes, and what it finds in its own cache depends on the
    batches, so that it counts no prefix as cached.
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
        model_format: str = "plain",
        thinking: str = "auto",
        revision: str = "",
        prices: Prices = _NO_PRICES,
        adapters: int = 0,
        max_context: int = 0,
    ):
        self.name = name
        self.path = path
        self.device = device
        self.dtype = dtype
        self.memo_entries = memo_entries
        self.cache_mb = cache_mb
        self.model_format = model_format
        self.thinking = thinking
        self.revision = revision
        self.prices = prices
        self.adapters = adapters
        self.max_context = max_context
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
            ConfigError: the dtype, the device, the name of a shipped model, the prompt format or the context is wrong.
            EngineError: the model directory is missing, incomplete, has no tokenizer or no safetensors.
        """
        return self._facts if self._facts is not None else await asyncio.to_thread(self._load)

    async def generate_step(self, request: StepRequest) -> StepResult:
        """Write one step; concurrent calls are batched and do not change each other's result.

        Raises:
            EngineError: the request is malformed, longer than the model's positions or under an adapter that is not
                loaded, or its batch failed.
        """
        request = await self._admit(request)
        try:
            known = self._recall(request)
            if known is not None:
                return known
            result = await self._batcher.submit(request, key=request)
        finally:
            self._adapters.release(request.adapter)
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
        request = await self._admit(request)
        try:
            known = self._recall(request)
            if known is not None:
                yield known
                return
            ending = self._text.make_ending(request.delimiter, request.stops, request.min_tokens)
            stream = StepStream(self._text, request.kept_ids, ending)
            # No key: a step shared with others could not be told to each from its beginning.
            answer = self._batcher.enqueue(request, sink=stream)
            try:
                while (delta := await stream.next_delta(answer)) is not None:
                    yield delta
                result = answer.result()
            finally:
                self._batcher.abandon(answer)
        finally:
            self._adapters.release(request.adapter)
        assert isinstance(result, StepResult)
        yield result

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """Score given continuations of a prefix; an empty one has log-probability 0 and no tokens.

        Raises:
            EngineError: prefix and choice are longer than the model's positions, the adapter is not loaded, or the
                batch failed.
        """
        if self._facts is None:
            await self.ready()
        self._requests += 1
        request = ScoreRequest(prefix, tuple(choices), self._adapters.hold(adapter))
        try:
            known = self._scores.find(request)
            if known is not None:
                self._memo_hits += 1
                return known
            result = await self._batcher.submit(request, key=request)
        finally:
            self._adapters.release(request.adapter)
        assert isinstance(result, ChoiceScores)
        self._scores.keep(request, result)
        return result

    async def load_adapter(self, name: str, path: str, version: int) -> None:
        """Serve the LoRA adapter in directory `path` (peft format) under `name`, in place of another version of it.

        Requests under way end with the version that they began with; what is remembered of it is not asked again. The
        same version costs nothing.

        Raises:
            EngineError: the directory holds no adapter for this model, or there would be more than `adapters`.
        """
        if self._facts is None:
            await self.ready()
        if self._adapters.version(name) != version:
            await self._batcher.run_between(lambda: self._adapters.load(name, path, version))

    async def _admit(self, request: StepRequest) -> StepRequest:
        """Check and count a request; gives it as the batches know it, its adapter held until it is released."""
        if self._facts is None:
            await self.ready()
        self._requests += 1
        check_limits(self.name, request)
        if request.known is not None or request.schema or request.adapter:
            # What this engine has no use for must not keep equal requests apart.
            request = replace(request, known=None, schema="", adapter=self._adapters.hold(request.adapter))
        return request

    def _recall(self, request: StepRequest) -> StepResult | None:
        known = self._memo.find(request)
        if known is not None:
            self._memo_hits += 1
        return known

    def _load(self) -> EngineFacts:
        with self._loading:
            if self._facts is not None:
                return self._facts
            started = time.perf_counter()
            loaded = load_model(self.path, self.device, self.dtype, self.revision)
            written = make_format(loaded.tokenizer, self.model_format, self.thinking)
            # A chat prompt spells its own special tokens: the tokenizer's would come twice.
            is_plain = self.model_format == "plain"
            self._text = StepText(loaded.tokenizer, loaded.eos_ids, loaded.vocabulary, adds_special=is_plain)
            self._memo = GreedyMemo(self.memo_entries, self._text.render)
            self._adapters = AdapterSet(loaded.model, self.adapters)
            self._decoder = self._make_decoder(loaded)
            positions = self._read_positions(loaded.max_positions)
            parts = (self._text, self._decoder, self._adapters, self._memo, positions)
            self._worker = BatchWorker(self.name, self._batcher, *parts)
            path = str(Path(self.path)) if ":" not in self.path else self.path
            self._facts = EngineFacts(
                name=self.name,
                model=f"{path}@{self.revision}" if self.revision else path,
                device=str(loaded.shape.device),
                parameters=loaded.parameters,
                flops_per_token=2.0 * loaded.active,
                seconds=time.perf_counter() - started,
                fingerprint=loaded.fingerprint,
                format=written,
                prices=self.prices,
                max_context=positions,
            )
            return self._facts

    def _read_positions(self, most: int | None) -> int | None:
        if most is not None and self.max_context > most:
            raise ConfigError(
                f"max_context={self.max_context} of model {self.name!r} is more than its {most} positions: lower it, "
                "or take a model with a longer context"
            )
        return self.max_context or most

    def _make_decoder(self, loaded: LoadedModel) -> StepDecoder:
        tokens = (self.cache_mb << 20) // loaded.shape.bytes_per_token
        return StepDecoder(loaded.model, self._text, loaded.shape, loaded.masks, tokens, max(tokens, _LEAST_TOKENS))

    def _run(self, jobs: list[EngineJob]) -> None:
        self._worker.run(jobs)
