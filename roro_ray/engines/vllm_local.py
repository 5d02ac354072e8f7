"""vLLM inside this process: no second process, no sockets, one thread that steps every engine in turn.

Engines of one process must never step at the same time: vLLM keeps the state of the forward pass in a global, and two
threads corrupt it. So the thread is one for the process, and loading takes the same lock. Its tokens are read before
vLLM's output processor would make Python objects of every log-probability, which costs more than a tiny model's step.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from roro_ray.engines.vllm_backend import Adapter, Generation, Piece, brief, make_lora, make_params
from roro_ray.engines.vllm_env import import_vllm, keep_threads
from roro_ray.errors import EngineError, EngineUnavailableError

logger = logging.getLogger(__name__)
_ENGINE_LOCK = threading.RLock()  # held by whoever loads, steps or frees an engine of this process
_WAIT_S = 30.0  # for the thread to end


class LocalBackend:
    """An `LLMEngine` in this process; see `Backend`. `args` are vLLM's engine arguments."""

    def __init__(self, name: str, args: dict[str, Any], eos_ids: Sequence[int]):
        self.name = name
        self._args = args
        self._eos_ids = tuple(eos_ids)
        self._engine: Any = None
        self._commands: deque[Callable[[], None]] = deque()
        self._running: dict[str, Generation] = {}
        self._ids = itertools.count()
        self._error: EngineError | None = None

    @property
    def is_dead(self) -> bool:
        """Whether the engine is gone for good."""
        return self._error is not None

    def start(self) -> None:
        """Load the model; blocks."""
        vllm = import_vllm("vllm")
        executor = import_vllm("vllm.v1.executor")
        engine = import_vllm("vllm.v1.engine.llm_engine")
        with _ENGINE_LOCK, keep_threads():
            try:
                config = vllm.EngineArgs(**self._args).create_engine_config()
                self._engine = engine.LLMEngine(
                    vllm_config=config, executor_class=executor.Executor.get_class(config), log_stats=False
                )
                self._tasks = self._engine.get_supported_tasks()
            except Exception as error:  # border: whatever vLLM raises on a model
                raise EngineError(f"engine {self.name}: vLLM cannot load the model: {brief(error)}") from error
        _STEPPER.add(self)

    def submit(self, generation: Generation) -> None:
        """Begin a request; its receiver hears of it."""
        generation.id = str(next(self._ids))
        self._do(lambda: self._begin(generation))

    def abort(self, generation: Generation) -> None:
        """End a request whose receiver wants no more."""
        self._do(lambda: self._end([generation.id]))

    def add_adapter(self, adapter: Adapter) -> None:
        """Load an adapter; blocks."""
        try:
            self._ask(lambda: self._engine.add_lora(make_lora(adapter)))
        except EngineError:
            raise
        except Exception as error:  # border: whatever vLLM raises on an adapter
            raise EngineError(f"engine {self.name}: adapter {adapter.path} does not load: {brief(error)}") from error

    def remove_adapter(self, adapter: Adapter) -> None:
        """Forget an adapter that no request uses."""
        self._do(lambda: self._engine.remove_lora(adapter.id))

    def close(self) -> None:
        """Free the engine; requests under way fail."""
        _STEPPER.remove(self)
        with _ENGINE_LOCK:
            self._break(EngineUnavailableError(f"engine {self.name} was closed"))
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.engine_core.shutdown()
                if not _STEPPER.is_busy:
                    # vLLM makes this process the only member of a torch.distributed group, even alone.
                    state = import_vllm("vllm.distributed.parallel_state")
                    state.destroy_model_parallel()
                    state.destroy_distributed_environment()

    def _do(self, command: Callable[[], None]) -> None:
        """Have the stepping thread do something before its next step."""
        self._commands.append(command)
        _STEPPER.wake()

    def _ask(self, command: Callable[[], Any]) -> Any:
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                if self._error is not None:
                    raise self._error
                answer.set_result(command())
            except Exception as error:
                answer.set_exception(error)

        self._do(run)
        return answer.result()

    # Below: the stepping thread, which holds the lock.

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._commands or self._running)

    def turn(self) -> None:
        """Do what was asked, then one step of all running requests."""
        while self._commands:
            self._commands.popleft()()
        if not self._running or self._error is not None:
            return
        try:
            outputs = self._engine.engine_core.get_output().outputs
        except Exception as error:  # border: whatever vLLM raises in a step; the engine's state is lost
            logger.exception("engine %s: vLLM failed in a step", self.name)
            self._break(EngineUnavailableError(f"engine {self.name}: vLLM failed in a step: {brief(error)}"))
            return
        enough = [output.request_id for output in outputs if self._hand_over(output)]
        if enough:
            self._end(enough)

    def _begin(self, generation: Generation) -> None:
        if self._error is not None:
            generation.receiver.fail(self._error)
            return
        try:
            processor = self._engine.input_processor
            request = processor.process_inputs(
                generation.id,
                import_vllm("vllm.inputs").tokens_input(generation.prompt),
                make_params(generation.sampling, self._eos_ids),
                supported_tasks=self._tasks,
                lora_request=make_lora(generation.adapter) if generation.adapter is not None else None,
            )
            request.external_req_id = request.request_id
            self._engine.engine_core.add_request(request)
            self._running[generation.id] = generation
        except Exception as error:  # border: the request is at fault
            generation.receiver.fail(EngineError(f"engine {self.name}: vLLM refuses the request: {brief(error)}"))

    def _end(self, ids: Sequence[str]) -> None:
        known = [request for request in ids if self._running.pop(request, None) is not None]
        if known and self._engine is not None:
            self._engine.engine_core.abort_requests(known)

    def _hand_over(self, output: Any) -> bool:
        """Give new tokens to their receiver; True where vLLM must be told that the request is over."""
        generation = self._running.get(output.request_id)
        if generation is None:
            return False
        if output.finished:
            del self._running[output.request_id]
        try:
            enough = generation.receiver.take(_read(output))
        except Exception as error:  # border: one receiver's fault is not the others'
            logger.exception("engine %s: a step could not be read", self.name)
            generation.receiver.fail(EngineError(f"engine {self.name}: a step could not be read: {brief(error)}"))
            enough = True
        return enough and not output.finished

    def _break(self, error: EngineError) -> None:
        self._error = error
        running, self._running = list(self._running.values()), {}
        for generation in running:
            generation.receiver.fail(error)
        while self._commands:
            self._commands.popleft()()


class _Stepper:
    """The thread that steps the engines of this process in turn; it lives while there are any."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._backends: list[LocalBackend] = []
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this process has engines."""
        return bool(self._backends)

    def add(self, backend: LocalBackend) -> None:
        """Step this engine too."""
        with self._wake:
            self._backends = [*self._backends, backend]
            if self._thread is None:
                # Not waited for by the interpreter itself, which would do so before it lets us end it.
                self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
                self._thread.start()

    def remove(self, backend: LocalBackend) -> None:
        """Step this engine no more; with the last one the thread ends, and is waited for."""
        with self._wake:
            self._backends = [other for other in self._backends if other is not backend]
            thread = self._thread if not self._backends else None
            self._wake.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_WAIT_S)

    def wake(self) -> None:
        """There is something to do."""
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """End the thread: torch does not survive one that computes while the interpreter ends."""
        for backend in self._backends:
            self.remove(backend)

    def _run(self) -> None:
        while backends := self._next():
            for backend in backends:
                with _ENGINE_LOCK:
                    if backend in self._backends:
                        backend.turn()

    def _next(self) -> list[LocalBackend]:
        """The engines with something to do, as soon as there are any; none where the thread shall end."""
        with self._wake:
            while self._backends:
                busy = [backend for backend in self._backends if backend.has_work]
                if busy:
                    return busy
                self._wake.wait()
            self._thread = None
            return []


_STEPPER = _Stepper()
atexit.register(_STEPPER.stop)


def _read(output: Any) -> Piece:
    ids = list(output.new_token_ids)
    found = output.new_logprobs  # column 0 is the token drawn, the others the most probable ones
    stats = output.prefill_stats
    return Piece(
        token_ids=ids,
        log_probs=found.logprobs[: len(ids), 0].tolist() if found is not None else [],
        top_log_probs=found.logprobs[0, 1:] if found is not None and ids else (),
        cached=stats.num_cached_tokens if stats is not None else 0,
        is_last=output.finished,
    )
