"""The service: from a checked request to the events of its answer. It knows neither HTTP nor Ray.

A request waits for admission, is given a route, and runs one episode for each choice, by the loop that training runs.
Whoever stops reading ends the episodes, and with them every call to a model that is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from roro_ray.config import EpisodeConfig
from roro_ray.engines.pool import EnginePool
from roro_ray.errors import RoroError
from roro_ray.routing.draws import mix_seed
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.opinion import TILT_CENTRE
from roro_ray.types import Query, Step, Trajectory
from serve.admission import Admission
from serve.backend import Backend, RouterList
from serve.choices import ChoiceJob, ChoiceWatcher, EndEvent, Event, EventQueue
from serve.continuation import UNKNOWN_WRITER, check_beginning, find_beginning
from serve.controls import Route, list_models, plan_route
from serve.facts import RequestFacts
from serve.metrics import Metrics
from serve.problems import deadline, loading
from serve.prompt import render_conversation
from serve.recording import Recorder
from serve.responses import RoutingSummary
from serve.schema import ChatRequest

logger = logging.getLogger(__name__)
LOWEST_WEIGHT, HIGHEST_WEIGHT = 0.01, 10.0  # of the playground's slider where there is no calibration
_POLL_S = 1.0  # how often the routers are asked which versions they have


@dataclass(slots=True)
class ServiceOptions:
    """How answers are made: see `serve.config.AnswerConfig` for the meaning."""

    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    timeout_s: float = 60.0
    max_concurrent: int = 512
    max_queue: int = 128
    cost_weight: float = -1.0
    chat_template: str = "plain"


@dataclass(slots=True)
class Answer:
    """An answer under way: how it is routed, and its events until every choice has ended."""

    request: ChatRequest
    route: Route
    created: int
    facts: RequestFacts
    events: AsyncIterator[list[Event]]
    trajectories: dict[int, Trajectory] = field(default_factory=dict)


class RoutingService:
    """Answers requests with a backend's models and routers.

    Args:
        recorder: keeps served trajectories; None records nothing.
    """

    def __init__(
        self, backend: Backend, options: ServiceOptions, metrics: Metrics, recorder: Recorder | None = None
    ) -> None:
        self.backend = backend
        self.options = options
        self.metrics = metrics
        self.recorder = recorder
        self.admission = Admission(options.max_concurrent, options.max_queue)
        self._pool: EnginePool | None = None
        self._routers: RouterList | None = None
        self._poller: asyncio.Task[None] | None = None

    # Life

    def start(self) -> None:
        """Begin to load, and to watch for new routers; called in the event loop that serves."""
        if self._poller is None:
            self._poller = asyncio.get_running_loop().create_task(self._poll())

    async def close(self) -> None:
        """Stop watching, and write out what is recorded."""
        if self._poller is not None:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller
            self._poller = None
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.close)

    async def _poll(self) -> None:
        while True:
            try:
                if self._pool is None:
                    self._pool = await self.backend.ready()
                await self.refresh()
            except (RoroError, TimeoutError, OSError) as error:
                logger.debug("models or routers could not be asked: %s", error)
            except Exception:  # the border: without this task the server would say for ever that it is loading
                logger.exception("models or routers could not be asked")
                await asyncio.sleep(_POLL_S)
            await asyncio.sleep(_POLL_S if self._routers is not None else _POLL_S / 10)

    async def refresh(self) -> RouterList:
        """Ask which routers there are now."""
        self._routers = await self.backend.routers.describe()
        self.metrics.observe_router(self._routers.default)
        return self._routers

    def loaded(self) -> tuple[EnginePool, RouterList]:
        """The pool and the routers.

        Raises:
            ApiError: 503 while they are loading.
        """
        if self._pool is None or self._routers is None:
            raise loading(1.0)
        return self._pool, self._routers

    def model_names(self) -> list[str]:
        """Every name that `model` may be; none while loading."""
        return [] if self._pool is None or self._routers is None else list_models(self._routers, self._pool)

    def pool_names(self) -> tuple[str, ...]:
        """The models of the pool; none while loading."""
        return () if self._pool is None else self._pool.names

    # Answers

    def plan(self, request: ChatRequest) -> tuple[Route, str]:
        """How a request is routed, and the text that its models continue.

        Raises:
            ApiError: it cannot be routed, or its conversation cannot be rendered.
        """
        pool, routers = self.loaded()
        route = plan_route(request, routers, pool, self.options.cost_weight)
        if request.continues:
            last = len(request.messages) - 1
            check_beginning(request.messages[last].content, f"messages[{last}].content", pool)
        return route, render_conversation(request.messages, self.options.chat_template, request.continues)

    @contextlib.asynccontextmanager
    async def answer(self, request: ChatRequest, facts: RequestFacts) -> AsyncIterator[Answer]:
        """Admit a request and make its answer while the block reads `events`; leaving the block ends all work.

        Raises:
            ApiError: 400, 404, 429, 503 before the block; 503 or 504 from `events`.
        """
        route, text = self.plan(request)
        facts.router_version = route.version if route.version >= 0 else None
        began = time.perf_counter()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._observe_load)  # once the slots are given back, however the answer ends
            try:
                async with asyncio.timeout(self.options.timeout_s):
                    await stack.enter_async_context(self.admission.enter(request.n))
            except TimeoutError:
                raise deadline(self.options.timeout_s) from None
            waited = time.perf_counter() - began
            facts.queue_ms = 1000 * waited
            self.metrics.observe_queue_wait(facts.queue_ms)
            self._observe_load()
            queue = EventQueue()
            answer = Answer(request, route, int(time.time()), facts, _no_events())
            left = self.options.timeout_s - waited
            task = asyncio.create_task(self._run_choices(answer, text, queue, began, left))
            answer.events = self._read(answer, queue)
            try:
                yield answer
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    def _observe_load(self) -> None:
        self.metrics.observe_load(self.admission.waiting, self.admission.used)

    async def _read(self, answer: Answer, queue: EventQueue) -> AsyncIterator[list[Event]]:
        while len(answer.trajectories) < answer.request.n:
            events = await queue.take()
            for event in events:
                if isinstance(event, EndEvent):
                    answer.trajectories[event.choice] = event.trajectory
            yield events

    async def _run_choices(self, answer: Answer, text: str, queue: EventQueue, began: float, timeout_s: float) -> None:
        request, facts = answer.request, answer.facts
        seed = request.seed if request.seed is not None else secrets.randbits(62)

        def count(model: str, step: Step, seconds: float) -> None:
            facts.steps[model] = facts.steps.get(model, 0) + 1
            facts.tokens_in += step.usage.tokens_in
            facts.tokens_out += step.usage.tokens_out
            facts.flops += step.usage.flops
            facts.degraded = facts.degraded or step.degraded
            self.metrics.observe_step(model, step, 1000 * seconds)

        def emit(event: Event) -> None:
            queue.put(event)

        async def run_choice(choice: int) -> None:
            job = self._make_job(answer, text, choice, seed)
            names, thinks = job.pool.names, job.pool.facts[0].format.thinks
            given = len(job.spec.prefix)
            watcher = ChoiceWatcher(choice, names, emit, request.stop, request.stream, thinks, count, given)
            try:
                trajectory = await job.run(watcher)
            finally:
                if watcher.first_text_at is not None:
                    ttft = 1000 * (watcher.first_text_at - began)
                    facts.ttft_ms = ttft if facts.ttft_ms is None else min(ttft, facts.ttft_ms)
            # The steps of an answer that a client began have no decision to learn from.
            if self.recorder is not None and not request.continues:
                self.recorder.record(job.spec.query, trajectory)

        try:
            async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
                for choice in range(request.n):
                    group.create_task(run_choice(choice))
        except TimeoutError:
            queue.fail(deadline(self.options.timeout_s))
        except ExceptionGroup as errors:
            queue.fail(_first(errors))

    def _make_job(self, answer: Answer, text: str, choice: int, seed: int) -> ChoiceJob:
        request, route = answer.request, answer.route
        # The same text and seed give the same answer, whatever the request's id.
        digest = blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()
        query = Query(f"served/{digest}", "served", "served", text, "")
        id = f"{answer.facts.request_id}/{choice}/{secrets.token_hex(4)}"
        given = find_beginning(request)
        seed = mix_seed(seed, choice)
        spec = EpisodeSpec(id, query, "served", seed, route.cost_weight, given.steps, given.opening)
        session = answer.facts.request_id
        policy = route.make_policy(self.backend.routers, session, self._observe_decision)
        pool = self.backend.pool(session)
        episode = replace(limit_tokens(self.options.episode, request.max_tokens, pool), temperature=request.temperature)
        return ChoiceJob(spec, pool, policy, episode, request.top_p)

    def _observe_decision(self, seconds: float) -> None:
        self.metrics.observe_decision(1000 * seconds)

    def weight_range(self) -> dict[str, float]:
        """The cost weight of a request that names none, and the range over which the knob does something."""
        default = self.options.cost_weight if self.options.cost_weight >= 0 else TILT_CENTRE
        return {"default": default, "low": LOWEST_WEIGHT, "high": HIGHEST_WEIGHT}

    def summarise(self, answer: Answer, trace: tuple[Any, ...] | None) -> RoutingSummary:
        """What the answer cost, all choices and all models together."""
        pool, _ = self.loaded()
        trajectories = [answer.trajectories[choice] for choice in sorted(answer.trajectories)]
        steps = [step for each in trajectories for step in each.steps if step.model != UNKNOWN_WRITER]
        counts = {name: sum(step.model == index for step in steps) for index, name in enumerate(pool.names)}
        top = max(pool.size - 1, 1)
        flops = sum(trajectory.usage.flops for trajectory in trajectories)
        large_only = sum(estimate_large_only(trajectory, pool) for trajectory in trajectories)
        answer.facts.flops_large_only = large_only
        answer.facts.ends = tuple(trajectory.end for trajectory in trajectories)
        return RoutingSummary(
            router=answer.route.name if answer.route.version >= 0 else None,
            router_version=answer.route.version,
            cost_weight=answer.route.cost_weight if answer.route.version >= 0 else None,
            steps=counts,
            large_share=sum(step.model for step in steps) / (top * max(len(steps), 1)),
            flops=flops,
            flops_large_only=large_only,
            degraded=any(step.degraded for step in steps),
            ends=answer.facts.ends,
            trace=trace,
        )


def limit_tokens(episode: EpisodeConfig, most: int, pool: EnginePool) -> EpisodeConfig:
    """The episode's limits for a client who wants at most so many tokens.

    Of models that think, a quarter is kept for the answer (or less, if the settings allow it less): a client who asks
    for little shall not get thoughts alone.
    """
    if not pool.facts[0].format.thinks:
        return replace(episode, max_tokens=min(most, episode.max_tokens))
    answer = min(episode.max_answer_tokens, max(most // 4, 1))
    return replace(episode, max_tokens=max(min(most - answer, episode.max_tokens), 1), max_answer_tokens=answer)


def estimate_large_only(trajectory: Trajectory, pool: EnginePool) -> float:
    """FLOPs that the dearest model would have taken to read this prompt and to write this very text.

    An estimate: alone it might have written more or less, and models of another tokenizer count otherwise.
    """
    first = next((step for step in trajectory.steps if step.model != UNKNOWN_WRITER), None)
    if first is None:
        return 0.0
    # Each model that touched the first step read the same prompt.
    readers = 2 if first.discarded else 1
    tokens = first.usage.tokens_in / readers + sum(step.tokens for step in trajectory.steps)
    if trajectory.conclusion is not None:
        tokens += trajectory.conclusion.tokens
    return pool.facts[-1].flops_per_token * tokens


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _no_events() -> AsyncIterator[list[Event]]:
    return
    yield []
