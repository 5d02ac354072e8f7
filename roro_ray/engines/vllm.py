"""Engine `vllm`: continuous batching, a prefix cache for every step, LoRA adapters, one GPU or several.

Token ids go in and out, so that what this model's tokenizer wrote is not encoded again, and what the model computed of
it is found in the cache. On a CPU vLLM runs in this process (`vllm_local`), on GPUs in one of its own (`vllm_async`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.protocol import ChoiceScores, EngineFacts, StepDelta, StepRequest, StepResult
from roro_ray.engines.rows import Row
from roro_ray.engines.sampling import make_stream_key
from roro_ray.engines.streaming import StepStream
from roro_ray.engines.vllm_adapters import AdapterTable
from roro_ray.engines.vllm_args import count_top
from roro_ray.engines.vllm_backend import Adapter, Generation, Sampling
from roro_ray.engines.vllm_loading import load_vllm, make_facts
from roro_ray.engines.vllm_prompts import PromptReader, StepPrompt, check_request
from roro_ray.engines.vllm_scoring import PeekMemo, score_kept, score_tokens
from roro_ray.engines.vllm_steps import Answer, KeptScores, StepJob, VllmStats
from roro_ray.errors import EngineError

_SEEDS = (1 << 63) - 1
_PER_KEPT = 0x9E3779B97F4A7C15  # so that a continued peek does not draw the numbers of its beginning again


class VllmEngine:
    """A model behind the `StreamingEngine` and `AdapterEngine` protocols; see `ModelConfig` for the settings.

    Greedy steps are those of engine `hf`, but for numerical ties: its sums run in another order, so where the two best
    tokens are within about 1e-4 of each other either may win. Sampled steps are fixed by the request's seed, but they
    are other draws than those of `hf`, and a continued peek is a draw of its own, not what the whole step had been.
    """

    def __init__(self, model: ModelConfig, pool: PoolConfig):
        self.name = model.name
        self._model = model
        self._pool = pool
        self._loading = threading.Lock()
        self._lock = threading.Lock()
        self._facts: EngineFacts | None = None
        self._jobs: dict[tuple[StepRequest, int], StepJob] = {}
        self._generations: dict[StepJob, Generation] = {}
        self._active = 0
        self._peeks = PeekMemo()
        self.stats = VllmStats()

    @classmethod
    def from_config(cls, model: ModelConfig, pool: PoolConfig) -> VllmEngine:
        """The engine that a model of the pool names; nothing is loaded yet."""
        return cls(model, pool)

    @property
    def active(self) -> int:
        """Steps and scorings under way."""
        return self._active

    async def ready(self) -> EngineFacts:
        """Load the model; again at no cost.

        Raises:
            ConfigError: vLLM is not installed, or a setting is wrong.
            EngineError: the model is missing, incomplete, or nothing that vLLM can serve.
        """
        return self._facts if self._facts is not None else await asyncio.to_thread(self._load)

    @property
    def gpu(self) -> str:
        """The GPU whose memory it takes a share of; empty on a CPU."""
        return "cuda:0" if self._model.device == "cuda" else self._model.device.removeprefix("cpu")

    @property
    def is_dead(self) -> bool:
        """Whether vLLM is gone for good: whoever hosts the engine should end, to be started anew."""
        return self._facts is not None and self._loaded.backend.is_dead

    def close(self) -> None:
        """Free the engine; requests under way fail, and so do later ones."""
        if self._facts is not None:
            self._loaded.close()

    async def generate_step(self, request: StepRequest) -> StepResult:
        """Write one step; concurrent calls are batched, identical ones share a computation.

        Raises:
            EngineError: the request is malformed, longer than the model's positions, or names an unknown adapter.
            EngineUnavailableError: vLLM failed or its process died.
        """
        job, answer = await self._begin(request, streams=False)
        try:
            return await answer
        finally:
            self._leave(job, answer)

    async def stream_step(self, request: StepRequest) -> AsyncIterator[StepDelta | StepResult]:
        """Write one step and tell it meanwhile: deltas, then the result of `generate_step`.

        A reader that is slower than the model gets fewer, longer deltas. Closing the iterator aborts the request.

        Raises:
            EngineError, EngineUnavailableError: as `generate_step`.
        """
        job, answer = await self._begin(request, streams=True)
        try:
            assert job.stream is not None
            while (delta := await job.stream.next_delta(answer)) is not None:
                yield delta
            result = answer.result()
        finally:
            self._leave(job, answer)
        yield result

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """Score given continuations of a prefix; an empty one has log-probability 0 and no tokens.

        Raises:
            EngineError: prefix and choice are longer than the model's positions, or the adapter is unknown.
            EngineUnavailableError: vLLM failed or its process died.
        """
        await self.ready()
        ids, continuations = self._reader.read_choices(prefix, choices)
        lease = self._adapters.take(adapter)
        self._count(1)
        try:
            logs = await score_tokens(self._loaded.backend, ids, continuations, lease)
        finally:
            self._count(-1)
            self._adapters.give_back(lease)
        return ChoiceScores(
            log_probs=tuple(map(sum, logs)),
            tokens=tuple(map(len, logs)),
            min_log_probs=tuple(min(values, default=0.0) for values in logs),
            prefix_tokens=len(ids),
        )

    async def load_adapter(self, name: str, path: str, version: int) -> None:
        """Serve an adapter in peft's format; requests under way end with the version that they began with.

        Raises:
            ConfigError: the engine was not configured for adapters.
            EngineError: the directory holds no adapter for this model.
        """
        await self.ready()
        if not self._model.adapters:
            raise EngineError(
                f"engine {self.name} was asked to load adapter {name!r} but serves none: set pool.models[].adapters to "
                "how many it shall serve at once"
            )
        if not name or self._adapters.has(name, version):
            return
        await asyncio.to_thread(self._load_adapter, name, path, version)

    def _load(self) -> EngineFacts:
        with self._loading:
            if self._facts is not None:
                return self._facts
            started = time.perf_counter()
            self._loaded = loaded = load_vllm(self._model, self._pool)
            self._reader = PromptReader(self.name, loaded.tokenizer, loaded.text, loaded.max_context)
            self._top = count_top(loaded.shape.vocabulary)
            self._adapters = AdapterTable(self.name, loaded.backend.remove_adapter)
            self._facts = make_facts(self._model, loaded, time.perf_counter() - started)
            return self._facts

    def _load_adapter(self, name: str, path: str, version: int) -> None:
        with self._loading:
            if self._adapters.has(name, version):
                return
            adapter = self._adapters.make(name, version, path)
            adapter = Adapter(adapter.label, adapter.id, self._loaded.place_adapter(path, adapter.label))
            self._loaded.backend.add_adapter(adapter)
            self._adapters.put(name, version, adapter)

    async def _begin(self, request: StepRequest, streams: bool) -> tuple[StepJob, Answer]:
        """A step that was started, or joined where the same one is under way; and its answer to come."""
        await self.ready()
        check_request(self.name, request)
        self.stats.requests += 1
        adapter = self._adapters.take(request.adapter)
        try:
            key = (request, adapter.id if adapter is not None else 0)
            same = self._jobs.get(key) if not streams else None
            answer = same.join() if same is not None else None
            if same is not None and answer is not None:
                self.stats.merged += 1
                self._adapters.give_back(adapter)
                return same, answer
            prompt = self._reader.read_step(request)
            kept = await self._find_kept(request, prompt, adapter)
        except BaseException:
            self._adapters.give_back(adapter)
            raise
        job = self._make_job(request, prompt, kept, key, adapter, streams)
        answer = job.join()
        assert answer is not None
        self._start(job, adapter, None if streams else key)
        return job, answer

    def _make_job(
        self,
        request: StepRequest,
        prompt: StepPrompt,
        kept: KeptScores,
        key: tuple[StepRequest, int],
        adapter: Adapter | None,
        streams: bool,
    ) -> StepJob:
        text = self._loaded.text
        ending = text.make_ending(request.delimiter, request.stops, request.min_tokens)
        row = Row(
            ids=list(request.kept_ids),
            start=0,
            max_tokens=request.max_tokens,
            log_probs=list(kept.log_probs),
            first_entropy=kept.first_entropy,
            ending=ending,
        )

        def on_end(job: StepJob) -> None:
            self._end(job, key, adapter)

        stream = StepStream(text, request.kept_ids, ending) if streams else None
        return StepJob(request, prompt, text, row, self._top, on_end, stream)

    def _start(self, job: StepJob, adapter: Adapter | None, key: tuple[StepRequest, int] | None) -> None:
        request = job.request
        self._count(1)
        ended = job.text.end(job.row.ids, request.max_tokens, job.row.ending)
        if ended is not None:  # a kept peek that is a whole step
            job.finish(*ended)
            return
        seed = make_stream_key(request.seed, request.prefix) + _PER_KEPT * len(request.kept_ids)
        sampling = Sampling(
            max_tokens=request.max_tokens - len(request.kept_ids),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=seed & _SEEDS,
            top=self._top if not request.kept_ids else 0,
            schema=request.schema,
        )
        generation = Generation([*job.prompt.ids, *request.kept_ids], sampling, job, adapter)
        with self._lock:
            if key is not None:
                self._jobs[key] = job
            self._generations[job] = generation
        self._loaded.backend.submit(generation)

    def _leave(self, job: StepJob, answer: Answer) -> None:
        if job.leave(answer):
            with self._lock:
                generation = self._generations.get(job)
            if generation is not None:
                self._loaded.backend.abort(generation)
            job.give_up()

    def _end(self, job: StepJob, key: tuple[StepRequest, int], adapter: Adapter | None) -> None:
        """A step is over, in whatever way (any thread)."""
        with self._lock:
            if self._jobs.get(key) is job:
                del self._jobs[key]
            self._generations.pop(job, None)
            self.stats.tokens_decoded += len(job.row.ids) - len(job.request.kept_ids)
            self.stats.tokens_reused += job.cached
            self.stats.tokens_prefilled += len(job.prompt.ids) + len(job.request.kept_ids) - job.cached
        self._count(-1)
        result = job.result
        if result is not None and result.finish == "length":
            self._peeks.keep(
                adapter, job.prompt.ids, result.token_ids, KeptScores(result.log_probs, result.first_entropy)
            )
        self._adapters.give_back(adapter)

    def _count(self, change: int) -> None:
        with self._lock:
            self._active += change

    async def _find_kept(self, request: StepRequest, prompt: StepPrompt, adapter: Adapter | None) -> KeptScores:
        kept = request.kept_ids
        if not kept:
            return KeptScores()
        known = self._peeks.find(adapter, prompt.ids, kept)
        if known is not None:
            return known
        loaded = self._loaded
        return await score_kept(loaded.backend, prompt.ids, kept, adapter, self._top, loaded.shape.vocabulary)
