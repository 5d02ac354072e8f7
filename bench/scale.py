"""What the coordination of many engines and episodes costs, and where it saturates: engines of simulated latency.

    OMP_NUM_THREADS=1 python -m bench.scale

Everything but the engines is the real thing: the episode loop, policies, the balance over replicas, and in the part on
Ray the actors' calls. The engines sleep as long as a real one of this machine takes, stretched so that a step takes the
seconds that it takes with a large model (`bench/_latency.py`). Parts:

- `episodes`: one rollout worker, 10 to 10,000 concurrent episodes, with as many replicas in its own process as
  can write them all at once;
- `replicas`: one worker, 1 to 64 replicas in its own process, all slots wanted (weak scaling);
- `ray`: the same with every replica an actor of its own;
- `router`: one worker with the trained router in it, which decides every step.

Counted in a window after the ramp: steps a second, processor seconds of the worker a step, how late its event loop
runs. Efficiency of `episodes` is the rate over that of episodes which wait for nothing but their engine; of `replicas`
and `ray` the rate over replicas x the rate of one replica that is never without work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench._latency import LatencyModel, Shape, SimulatedEngine, measure_latency
from roro_ray.config import EpisodeConfig, ModelConfig, PoolConfig, RouterConfig
from roro_ray.engines.pool import EnginePool, make_engine
from roro_ray.engines.protocol import ChoiceScores, Engine, EngineFacts, StepRequest, StepResult
from roro_ray.engines.replica_engine import ReplicaEngine
from roro_ray.engines.replicas import Answer, FleetOptions, Item
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.runner import Runner
from roro_ray.types import Query
from roro_ray.world.tasks import make_queries

PARTS = ("episodes", "replicas", "ray", "router")
_TITLES = ("part", "episodes", "replicas", "steps/s", "ideal", "efficiency", "CPU ms/step", "late ms", "p99", "moved")
_ROW = "{:>9}" + "{:>12}" * (len(_TITLES) - 1)
_OVERFULL = 1.25  # episodes a slot: every slot is wanted, though some episodes are with their coordinator


@dataclass(frozen=True, slots=True)
class Setting:
    """One measurement: `share` of the steps go to the large model."""

    part: str
    episodes: int
    replicas: int
    share: float


@dataclass(frozen=True, slots=True)
class Found:
    """What one measurement gave. `ideal_steps_s` is what `efficiency` compares with."""

    part: str
    episodes: int
    replicas: int
    steps_s: float
    ideal_steps_s: float
    efficiency: float
    cpu_ms_step: float
    late_ms_median: float
    late_ms_p99: float
    moved_share: float
    rss_mib: float
    load: float


class LocalReplica:
    """A replica in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def ready(self) -> EngineFacts:
        return await self.engine.ready()

    async def call(self, items: Sequence[Item], parcels: Sequence[Any]) -> list[Answer]:
        (item,) = items
        assert not isinstance(item, tuple), "nothing is scored here"
        return [await self.engine.generate_step(item)]

    async def load_adapters(self, parcels: Sequence[Any]) -> None: ...

    async def is_well(self, stuck_s: float) -> bool:
        return True

    def end(self) -> None: ...


class Counted:
    """An engine that counts the steps it has given."""

    def __init__(self, engine: ReplicaEngine) -> None:
        self.name = engine.name
        self.engine = engine
        self.steps = 0

    async def ready(self) -> EngineFacts:
        return await self.engine.ready()

    async def generate_step(self, request: StepRequest) -> StepResult:
        result = await self.engine.generate_step(request)
        self.steps += 1
        return result

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        return await self.engine.score_choices(prefix, choices, adapter)


class Worker:
    """A rollout worker's runner over replicas that are given, and what is counted while it runs."""

    def __init__(self, engines: Sequence[ReplicaEngine], shape: Shape, episodes: int, policy: Any = None) -> None:
        self.engines = [Counted(engine) for engine in engines]
        self.shape = shape
        self.episodes = episodes
        tokens = 2 * shape.step_tokens
        config = EpisodeConfig(shape.steps, tokens, max_tokens=shape.steps * tokens + 1, timeout_s=3600.0)
        self.runner = Runner(EnginePool(self.engines), policy, config, episodes)

    async def measure(self, strategy: str, ramp_s: float, window_s: float) -> tuple[float, float, np.ndarray, float]:
        """Steps a second, processor seconds a step, delays of the event loop in seconds, share of moved requests."""
        length = self.shape.steps
        count = self.episodes * 40
        specs = [EpisodeSpec(f"{i}", query, strategy, i) for i, query in enumerate(make_bench_queries(count))]
        running = asyncio.create_task(self.runner.run(specs))
        late: list[float] = []
        ticking = asyncio.create_task(_tick(late))
        # Episodes that began together stay in step for a while: the ramp is at least one of them.
        await self._wait(running, ramp_s)
        late.clear()
        steps, processor, began = self._steps(), time.process_time(), time.perf_counter()
        moved = sum(each.engine.balance.moved for each in self.engines)
        deadline = began + 20 * window_s
        while time.perf_counter() < began + window_s or self._steps() - steps < length:
            if time.perf_counter() > deadline:
                raise RuntimeError(f"{self._steps() - steps} steps in {20 * window_s:.0f} s: is anything answering?")
            await self._wait(running, window_s / 4)
        seconds, done = time.perf_counter() - began, self._steps() - steps
        processor = time.process_time() - processor
        moved = sum(each.engine.balance.moved for each in self.engines) - moved
        for task in (running, ticking):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return done / seconds, processor / done, np.array(late), moved / done

    def _steps(self) -> int:
        return sum(each.steps for each in self.engines)

    @staticmethod
    async def _wait(running: asyncio.Task[Any], seconds: float) -> None:
        done, _ = await asyncio.wait({running}, timeout=seconds)
        if done:
            failed = [each for each in running.result() if hasattr(each, "error") and hasattr(each, "spec_id")]
            raise RuntimeError(f"the episodes ended before the window: {failed[0].error if failed else 'too few'}")


async def _tick(late: list[float]) -> None:
    """How much later than asked for this task is woken."""
    pause = 0.02
    while True:
        began = time.perf_counter()
        await asyncio.sleep(pause)
        late.append(time.perf_counter() - began - pause)


def make_bench_queries(count: int) -> list[Query]:
    """Queries that differ, of the embedded world's length."""
    texts = [query.text for query in make_queries("long", "test", 200)]
    return [Query(f"scale/{i}", "scale", "test", f"{i:07d} {texts[i % len(texts)]}", "0") for i in range(count)]


class Bench:
    """The settings that all measurements share."""

    def __init__(self, options: argparse.Namespace, latency: LatencyModel) -> None:
        self.options = options
        self.shape = Shape(options.steps, options.step_tokens)
        self.large = latency
        self.small = latency.stretch(options.small)
        self._local: list[list[SimulatedEngine]] = []

    def make_engine(self, model: int, number: int = 0) -> SimulatedEngine:
        """A replica of one of the two models."""
        latency = (self.small, self.large)[model]
        return SimulatedEngine(f"{('small', 'large')[model]}-{number}", latency, self.shape, self.options.slots)

    def run(self, setting: Setting, alone: float | None = None) -> Found:
        """One measurement; `alone` is the rate of one replica."""
        with self._open(setting) as engines:
            return asyncio.run(self._measure(setting, engines, alone))

    @contextlib.contextmanager
    def _open(self, setting: Setting) -> Iterator[list[ReplicaEngine]]:
        if setting.part == "ray":
            with open_actors(self, setting.replicas) as replicas:
                yield [self._join(model, each) for model, each in enumerate(replicas)]
        else:
            self._local = [[self.make_engine(model, n) for n in range(setting.replicas)] for model in range(2)]
            yield [self._join(model, list(map(LocalReplica, made))) for model, made in enumerate(self._local)]

    def _join(self, model: int, replicas: Sequence[Any]) -> ReplicaEngine:
        name = ("small", "large")[model]
        named = {f"{name}-{number}": replica for number, replica in enumerate(replicas)}
        return ReplicaEngine(name, named, FleetOptions(3600.0, 3600.0, 600.0, gathers=False))

    async def _measure(self, setting: Setting, engines: Sequence[ReplicaEngine], alone: float | None) -> Found:
        router = make_router_policy() if setting.part == "router" else None
        worker = Worker(engines, self.shape, setting.episodes, router)
        strategy = "router" if router else f"random:{setting.share}"
        window = self.options.window
        rate, processor, late, moved = await worker.measure(strategy, self.options.ramp, window)
        # The smallest number of replicas is the measure of the others; episodes are measured by their engines' seconds.
        scaled = setting.replicas * alone if alone else rate
        ideal = setting.episodes / self._service_s() if alone is None else scaled
        median, p99 = 1e3 * np.quantile(late, [0.5, 0.99])
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        numbers = (rate, ideal, rate / ideal, 1e3 * processor, median, p99, moved, rss, load())
        return Found(setting.part, setting.episodes, setting.replicas, *(round(float(n), 3) for n in numbers))

    def _service_s(self) -> float:
        """Mean seconds of a step as the engines of this process gave them."""
        made = [engine for engines in self._local for engine in engines]
        return sum(each.busy_s for each in made) / sum(each.written for each in made)


@contextlib.contextmanager
def open_actors(bench: Bench, replicas: int) -> Iterator[list[list[Any]]]:
    """A Ray with an actor for every replica of the large model (and of the small one)."""
    import ray

    from actors.cluster import open_cluster
    from actors.engines import MOST_REQUESTS, ActorReplica, EngineActor
    from actors.waiting import wait_for
    from roro_ray.config import RayConfig

    with open_cluster(RayConfig(address="local")):
        make = ray.remote(EngineActor).options(num_cpus=0, max_concurrency=MOST_REQUESTS)
        found = []
        for model in range(2):
            handles = [make.remote(_Maker(bench.make_engine, model, n)) for n in range(replicas if model else 1)]
            wait_for([handle.ready.remote() for handle in handles], "simulated replicas: ready", 600.0, handles)
            found.append([ActorReplica(("small", "large")[model], handle, 600.0) for handle in handles])
        yield found


@dataclass(frozen=True)
class _Maker:
    make: Callable[[int, int], SimulatedEngine]
    model: int
    number: int

    def __call__(self) -> SimulatedEngine:
        return self.make(self.model, self.number)


def make_router_policy() -> Any:
    """The router as a rollout worker has it, untrained: its weights do not change what it costs."""
    from roro_ray.routing.router import make_router
    from roro_ray.routing.router_policy import RouterPolicy

    return RouterPolicy(make_router(RouterConfig(), 2), version=0)


def find_latency(options: argparse.Namespace) -> tuple[LatencyModel, dict[str, Any]]:
    """The latency of the embedded world's large model on this machine, stretched to `step_s` at full slots."""
    engine = make_engine(ModelConfig("large", "world:large", options.engine), PoolConfig(memo_entries=0))
    prompts = [query.text for query in make_queries("long", "test", 64)]
    measured = asyncio.run(measure_latency(engine, prompts))
    step_s = measured.seconds(options.step_tokens, options.step_tokens, options.slots)
    pace = options.step_s / step_s
    return measured.stretch(pace), {"measured": asdict(measured), "pace": pace}


def load() -> float:
    """Processes that want a core, besides what is measured."""
    return float(Path("/proc/loadavg").read_text().split()[0])


def list_settings(options: argparse.Namespace) -> list[Setting]:
    """What is measured, in order."""
    settings = []
    if "episodes" in options.parts:
        settings += [Setting("episodes", count, -(-count // options.slots), 0.4) for count in options.episodes]
    for part in ("replicas", "ray"):
        if part in options.parts:
            settings += [Setting(part, int(_OVERFULL * options.slots * n), n, 1.0) for n in options.replicas]
    if "router" in options.parts:
        settings += [Setting("router", count, -(-count // options.slots), 0.4) for count in options.episodes]
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description="What coordination costs with many replicas and episodes.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--episodes", nargs="+", type=int, default=[10, 100, 500, 1000, 2000, 5000, 10000])
    parser.add_argument("--slots", type=int, default=32, help="steps that a replica writes at once")
    parser.add_argument("--steps", type=int, default=12, help="of an episode")
    parser.add_argument("--step-tokens", type=int, default=120)
    parser.add_argument("--step-s", type=float, default=3.0, help="seconds of a large step at full slots")
    parser.add_argument("--small", type=float, default=0.25, help="seconds of a small step over those of a large one")
    parser.add_argument("--ramp", type=float, default=10.0, help="seconds before counting begins")
    parser.add_argument("--window", type=float, default=20.0, help="seconds of counting")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf", help="whose latency is measured")
    options = parser.parse_args(argv)
    latency, facts = find_latency(options)
    bench = Bench(options, latency)
    print(json.dumps({"latency": facts}))
    print(_ROW.format(*_TITLES))
    found: list[Found] = []
    alone: dict[str, float] = {}
    for setting in list_settings(options):
        scales = setting.part in ("replicas", "ray")
        result = bench.run(setting, alone.get(setting.part, 0.0) if scales else None)
        if scales and setting.part not in alone:
            # The first, smallest number of replicas is the measure of the others.
            alone[setting.part] = result.steps_s / setting.replicas
        found.append(result)
        print(_ROW.format(*list(asdict(result).values())[: len(_TITLES)]), flush=True)
    print(json.dumps([asdict(result) for result in found]))


if __name__ == "__main__":
    main()
