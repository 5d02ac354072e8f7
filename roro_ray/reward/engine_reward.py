"""The reward model of real size: Rubricor and Judge as two LoRA adapters on one base, served by one engine.

It offers what `model.RewardModel` offers (`write_rubrics`, `score`, `version`), so that the reward service hosts
either. Engines are asked by coroutines; the service calls from a thread, so there is an event loop in another.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from roro_ray.config import Config, PoolConfig, RewardConfig
from roro_ray.engines.protocol import AdapterEngine, Engine
from roro_ray.errors import CheckpointError, ConfigError, EngineError
from roro_ray.learning.adapter_files import AdapterVersion
from roro_ray.reward.engine_judge import EngineJudge, make_judge_prompt
from roro_ray.reward.engine_rubricor import EngineRubricor
from roro_ray.reward.fitting import CountTokens, estimate_tokens
from roro_ray.reward.generic import make_fixed_rubric, make_random_rubric
from roro_ray.types import Query, Rubric, Trajectory, Verdict

RUBRICOR, JUDGE = "rubricor", "judge"
DONE, FACTS = "DONE", "reward.json"
_BACKEND = "engine"
T = TypeVar("T")
Deliver = Callable[[Engine, AdapterVersion], Coroutine[Any, Any, None]]


class RewardLike(Protocol):
    """What scores trajectories: Rubricor and Judge in memory, or behind an engine."""

    @property
    def version(self) -> int:
        """Changes whenever the weights of either part do."""
        ...

    def write_rubrics(self, queries: Sequence[Query], seed: int = 0) -> list[Rubric]:
        """One rubric a query; without criteria where none could be written."""
        ...

    def score(
        self, queries: Sequence[Query], trajectories: Sequence[Sequence[Trajectory]], rubrics: Sequence[Rubric]
    ) -> list[tuple[Verdict, ...]]:
        """One verdict per trajectory of each query, under that query's rubric."""
        ...


class LoopThread:
    """An event loop in a thread of its own, for callers that are not coroutines."""

    def __init__(self, name: str = "reward engine") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; whoever waits is interrupted together with it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop; what is under way in it is given up."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


class EngineReward:
    """Rubricor and Judge behind one engine; make one with `open_engine_reward`.

    `config.rubric_source` says whose rubrics, as in `RewardModel`: `random` and `fixed` never ask the Rubricor.
    `deliver` brings an adapter to the engine (`load_adapter`, or through the object store).
    """

    def __init__(
        self,
        rubricor: EngineRubricor,
        judge: EngineJudge,
        config: RewardConfig,
        loop: LoopThread,
        deliver: Deliver | None = None,
    ) -> None:
        self._deliver = deliver or load_adapter
        self.rubricor = rubricor
        self.judge = judge
        self.config = config
        self.loop = loop
        self._served: dict[str, AdapterVersion] = {}  # as the engine has them

    @property
    def version(self) -> int:
        """Changes whenever the weights of either adapter do."""
        return self.rubricor.version + self.judge.version

    def write_rubrics(self, queries: Sequence[Query], seed: int = 0) -> list[Rubric]:
        """One rubric a query; without criteria where none could be written (then verdicts are error values)."""
        if self.config.rubric_source == "random":
            return [make_random_rubric(query, seed, self.config.max_criteria) for query in queries]
        if self.config.rubric_source == "fixed":
            return [make_fixed_rubric(query) for query in queries]
        return self.loop.run(self.rubricor.write(queries, seed))

    def score(
        self, queries: Sequence[Query], trajectories: Sequence[Sequence[Trajectory]], rubrics: Sequence[Rubric]
    ) -> list[tuple[Verdict, ...]]:
        """One verdict per trajectory of each query, under that query's rubric."""
        return self.loop.run(self.judge.score_groups(queries, trajectories, rubrics))

    def take_over(self, adapter: AdapterVersion) -> None:
        """Have the engine serve a version of an adapter, and write or judge with it from now on.

        Engines keep the newest version of a name. To go back to an older one (the warm start, for a control) it is
        given to the engine under a newer number.

        Raises:
            EngineError: the directory holds no adapter for this base, or the engine serves none.
        """
        served = self._served.get(adapter.name)
        if served is None or served.path != adapter.path:
            number = adapter.version if served is None else max(adapter.version, served.version + 1)
            sent = replace(adapter, version=number)
            self.loop.run(self._deliver(self.judge.engine, sent))
            self._served[adapter.name] = sent
        part: EngineRubricor | EngineJudge = self.rubricor if adapter.name == RUBRICOR else self.judge
        part.take_over(adapter.name, adapter.version)

    def use_base(self, name: str) -> None:
        """Write or judge with the base alone (a control)."""
        part: EngineRubricor | EngineJudge = self.rubricor if name == RUBRICOR else self.judge
        part.take_over("", 0)

    def close(self) -> None:
        """End the loop's thread."""
        self.loop.close()


async def load_adapter(engine: Engine, adapter: AdapterVersion) -> None:
    """Have an engine serve an adapter.

    Raises:
        EngineError: it serves no adapters, or the directory holds none for its base.
    """
    if not hasattr(engine, "load_adapter"):
        raise EngineError(f"engine {engine.name!r} serves no adapters: choose engine=vllm or engine=hf for the reward")
    await cast(AdapterEngine, engine).load_adapter(adapter.name, adapter.path, adapter.version)


def resolve_reward(config: Config) -> RewardConfig:
    """The reward's settings with what follows from others: the base, and that the Judge reads no more than can be
    learned from in one row."""
    reward, lora = config.reward, config.lora
    bounds = [bound for bound in (reward.judge_tokens, lora.token_budget) if bound]
    path, revision = reward.engine.path or lora.base, reward.engine.revision or lora.revision
    return replace(reward, engine=replace(reward.engine, path=path, revision=revision), judge_tokens=min(bounds))


def open_engine_reward(
    config: RewardConfig,
    adapters: Sequence[AdapterVersion] = (),
    engine: Engine | None = None,
    deliver: Deliver | None = None,
) -> EngineReward:
    """Load the base's engine and the adapters.

    Args:
        deliver: as for `EngineReward`.
        adapters: of Rubricor and Judge, at most one each; without one the base model itself writes or judges.
        engine: in place of the one that `config.engine` names (an actor's handle).

    Raises:
        ConfigError: the settings of the engine are wrong.
        EngineError: the base or an adapter does not load.
    """
    # Imported here: a pool brings torch.
    from roro_ray.engines.pool import make_engine

    served = engine if engine is not None else make_engine(config.engine, PoolConfig(models=[config.engine]))
    loop = LoopThread()
    try:
        facts = loop.run(served.ready())
        count = make_token_counter(config.engine.path)
        rubricor = EngineRubricor(
            served,
            form=facts.format,
            criteria=(config.min_criteria, config.max_criteria),
            max_tokens=config.rubric_tokens,
            concurrency=config.concurrency,
        )
        prompt = make_judge_prompt(facts, config.judge_tokens, count)
        judge = EngineJudge(served, prompt=prompt, concurrency=config.concurrency)
        reward = EngineReward(rubricor, judge, config, loop, deliver)
        for adapter in adapters:
            reward.take_over(adapter)
    except BaseException:
        loop.close()
        raise
    return reward


def make_token_counter(path: str) -> CountTokens:
    """Counts a text's tokens by the tokenizer of a model directory; estimates from above where there is none."""
    from roro_ray.engines.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    except (ConfigError, EngineError):
        return estimate_tokens
    encode = cast(Callable[..., list[int]], tokenizer.encode)
    return lambda text: len(encode(text, add_special_tokens=False))


def save_engine_reward(adapters: Sequence[AdapterVersion], base: str, directory: str | Path) -> Path:
    """Copy adapters to `directory/NAME`, whole or not at all, with the facts and the marker of a reward model."""
    target = Path(directory)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    facts: dict[str, object] = {"backend": _BACKEND, "base": base}
    for adapter in adapters:
        shutil.copytree(adapter.path, temporary / adapter.name)
        facts[f"{adapter.name}_version"] = adapter.version
    (temporary / FACTS).write_text(json.dumps(facts) + "\n")
    (temporary / DONE).touch()
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    return target


def list_adapters(directory: str | Path, base: str = "") -> list[AdapterVersion]:
    """The adapters that `save_engine_reward` saved.

    Raises:
        CheckpointError: nothing complete lies there, a local reward model does, or one on another base.
    """
    path = Path(directory)
    remedy = "run `python -m jobs.learn_reward` with reward.backend=engine, or give the right directory"
    if not (path / DONE).is_file():
        raise CheckpointError(f"no complete reward model in {str(path)!r} (its marker {DONE!r} is missing): {remedy}")
    try:
        facts = json.loads((path / FACTS).read_text())
        backend, made_on = facts.get("backend", "local"), str(facts.get("base", ""))
        versions = {name: int(facts[f"{name}_version"]) for name in (RUBRICOR, JUDGE) if f"{name}_version" in facts}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(path / FACTS)!r} is unreadable ({error!r}): {remedy}") from error
    if backend != _BACKEND or (base and made_on and base != made_on):
        raise CheckpointError(
            f"the reward model in {str(path)!r} is {backend!r} on base {made_on!r}, expected {_BACKEND!r} on {base!r}: "
            f"{remedy}"
        )
    return [AdapterVersion(name, version, str(path / name)) for name, version in versions.items()]


def load_engine_reward(
    directory: str | Path | None, config: RewardConfig, engine: Engine | None = None
) -> EngineReward:
    """The reward model saved in a directory, or the bare base where none is named.

    Raises:
        CheckpointError: nothing complete lies there, or it was made on another base.
    """
    adapters = [] if directory is None else list_adapters(directory, config.engine.path)
    return open_engine_reward(config, adapters, engine)
