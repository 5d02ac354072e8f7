"""vLLM in a process of its own, for GPUs: `AsyncLLM` in an event loop of its own, asked from any thread.

Scheduling, model and tensor-parallel workers run beside this process, which only hands tokens over. When that process
dies vLLM does not start it again: requests fail with EngineUnavailableError from then on, and whoever hosts the engine
must end, so that it is started anew (`is_dead`).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from roro_ray.engines.vllm_backend import Adapter, Generation, Piece, brief, make_lora, make_params
from roro_ray.engines.vllm_env import import_vllm
from roro_ray.errors import EngineError, EngineUnavailableError

logger = logging.getLogger(__name__)
_START_LOCK = threading.Lock()  # an engine profiles the memory that is free: never two at once
_WAIT_S = 30.0  # for the loop's thread to end


class AsyncBackend:
    """An `AsyncLLM`; see `Backend`. `args` are vLLM's engine arguments, `gpus` the indices of the GPUs (none: any)."""

    def __init__(self, name: str, args: dict[str, Any], eos_ids: Sequence[int], gpus: Sequence[int] = ()):
        self.name = name
        self._args = args
        self._eos_ids = tuple(eos_ids)
        self._gpus = tuple(gpus)
        self._ids = itertools.count()
        self._engine: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"vllm {name}", daemon=True)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._error: EngineError | None = None

    @property
    def is_dead(self) -> bool:
        """Whether vLLM's process is gone."""
        return self._error is not None

    def start(self) -> None:
        """Load the model; blocks."""
        self._thread.start()
        atexit.register(self.close)
        try:
            with _START_LOCK, _see_gpus(self._gpus):
                self._ask(self._load())
        except Exception as error:  # border: whatever vLLM raises on a model
            self.close()
            raise EngineError(f"engine {self.name}: vLLM cannot load the model: {brief(error)}") from error

    def submit(self, generation: Generation) -> None:
        """Begin a request; its receiver hears of it."""
        generation.id = str(next(self._ids))
        self._call(self._begin, generation)

    def abort(self, generation: Generation) -> None:
        """End a request whose receiver wants no more."""
        self._call(self._cancel, generation.id)

    def add_adapter(self, adapter: Adapter) -> None:
        """Load an adapter; blocks."""
        try:
            self._ask(self._engine.add_lora(make_lora(adapter)))
        except Exception as error:  # border: whatever vLLM raises on an adapter
            raise EngineError(f"engine {self.name}: adapter {adapter.path} does not load: {brief(error)}") from error

    def remove_adapter(self, adapter: Adapter) -> None:
        """Forget an adapter that no request uses."""
        asyncio.run_coroutine_threadsafe(self._engine.remove_lora(adapter.id), self._loop)

    def close(self) -> None:
        """Free the engine; requests under way fail."""
        atexit.unregister(self.close)
        self._error = self._error or EngineUnavailableError(f"engine {self.name} was closed")
        if self._thread.is_alive():
            with contextlib.suppress(Exception):
                self._ask(self._shut_down(), _WAIT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_WAIT_S)

    def _ask(self, work: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def _call(self, function: Any, *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # closed: whoever waited was told
            self._loop.call_soon_threadsafe(function, *arguments)

    # Below: the back end's event loop.

    async def _load(self) -> None:
        vllm = import_vllm("vllm")
        engine = import_vllm("vllm.v1.engine.async_llm").AsyncLLM
        self._engine = engine.from_engine_args(vllm.AsyncEngineArgs(**self._args))

    async def _shut_down(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._engine is not None:
            self._engine.shutdown()

    def _begin(self, generation: Generation) -> None:
        task = self._loop.create_task(self._run(generation))
        self._tasks[generation.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(generation.id, None))

    def _cancel(self, request: str) -> None:
        task = self._tasks.get(request)
        if task is not None:
            task.cancel()

    async def _run(self, generation: Generation) -> None:
        receiver = generation.receiver
        try:
            if self._error is not None:
                raise self._error
            outputs = self._engine.generate(
                import_vllm("vllm.inputs").tokens_input(generation.prompt),
                make_params(generation.sampling, self._eos_ids),
                generation.id,
                lora_request=make_lora(generation.adapter) if generation.adapter is not None else None,
            )
            async with contextlib.aclosing(outputs):  # which aborts a request that has not ended
                async for output in outputs:
                    if receiver.take(_read(output)):
                        return
        except asyncio.CancelledError:
            receiver.fail(self._error or EngineUnavailableError(f"engine {self.name}: the request was ended"))
        except Exception as error:  # border: whatever vLLM raises
            receiver.fail(self._translate(error))

    def _translate(self, error: Exception) -> EngineError:
        if isinstance(error, EngineError):
            return error
        if isinstance(error, import_vllm("vllm.v1.engine.exceptions").EngineDeadError) or self._engine.errored:
            logger.error("engine %s: vLLM's process died: %s", self.name, error)
            self._error = EngineUnavailableError(
                f"engine {self.name}: vLLM's process died; the engine must be restarted"
            )
            return self._error
        return EngineError(f"engine {self.name}: vLLM refuses the request: {brief(error)}")


def _read(output: Any) -> Piece:
    completion = output.outputs[0]
    positions = completion.logprobs or []
    ids = list(completion.token_ids)
    return Piece(
        token_ids=ids,
        log_probs=[position[token].logprob for token, position in zip(ids, positions, strict=True)],
        top_log_probs=sorted((entry.logprob for entry in positions[0].values()), reverse=True) if positions else (),
        cached=output.num_cached_tokens or 0,
        is_last=output.finished,
    )


@contextlib.contextmanager
def _see_gpus(gpus: Sequence[int]) -> Iterator[None]:
    """Let the processes that vLLM starts see only some of the GPUs that this one sees."""
    if not gpus:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = before.split(",") if before else [str(index) for index in range(max(gpus) + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[index] for index in gpus if index < len(seen))
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
