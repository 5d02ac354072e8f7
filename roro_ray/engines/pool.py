"""The models that a router chooses from, in order from cheap to dear."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.protocol import Engine, EngineFacts, Prices
from roro_ray.errors import ConfigError, did_you_mean

_MILLION = 1e6
ENGINES = ("hf", "vllm", "openai")


class EnginePool:
    """Two or more engines, cheap to dear: index 0 is the cheapest.

    Raises:
        ConfigError: fewer than two engines, or two of one name.
    """

    def __init__(self, engines: Sequence[Engine]):
        self.engines = tuple(engines)
        self.names = tuple(engine.name for engine in self.engines)
        if len(self.engines) < 2:
            raise ConfigError(
                f"a pool of {len(self.engines)} models ({', '.join(self.names) or 'none'}): routing needs at least 2, "
                "cheap to dear; add another to pool.models"
            )
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"two models of the pool are named {twice[0]!r}: reports tell them apart by name; rename one in "
                "pool.models"
            )
        self._facts: tuple[EngineFacts, ...] = ()

    @property
    def size(self) -> int:
        """Number of models."""
        return len(self.engines)

    @property
    def facts(self) -> tuple[EngineFacts, ...]:
        """What each engine said of itself; known after `ready`."""
        if not self._facts:
            raise RuntimeError("the pool's facts are known once `await pool.ready()` has returned")
        return self._facts

    async def ready(self) -> tuple[EngineFacts, ...]:
        """Load every model; again at no cost. Engines on one GPU load in turn: each measures what memory is free.

        Raises:
            EngineError: a model directory is missing or incomplete.
        """
        if not self._facts:
            turns: dict[str, asyncio.Lock] = {}

            async def load(engine: Engine) -> EngineFacts:
                async with turns.setdefault(getattr(engine, "gpu", "") or engine.name, asyncio.Lock()):
                    return await engine.ready()

            self._facts = tuple(await asyncio.gather(*map(load, self.engines)))
        return self._facts

    def with_engines(self, engines: Sequence[Engine]) -> EnginePool:
        """The same models through other engines (one trajectory's, say); what is known of them stays known."""
        pool = EnginePool(engines)
        if pool.names != self.names:
            raise ConfigError(f"engines {pool.names} in place of {self.names}: expected the same models")
        pool._facts = self._facts
        return pool


def make_pool(config: PoolConfig) -> EnginePool:
    """The pool that a configuration names, its models not yet loaded.

    Raises:
        ConfigError: fewer than two models, or an unknown engine.
    """
    return EnginePool([make_engine(model, config) for model in config.models])


def make_engine(model: ModelConfig, config: PoolConfig) -> Engine:
    """One engine, its model not yet loaded.

    Raises:
        ConfigError: an unknown engine.
    """
    if model.engine not in ENGINES:
        raise ConfigError(
            f"unknown engine {model.engine!r} of model {model.name!r}: expected one of {', '.join(ENGINES)}"
            f"{did_you_mean(model.engine, ENGINES)}; set pool.models[].engine"
        )
    # Imported here, so that a configuration can be checked without loading torch.
    if model.engine == "vllm":
        from roro_ray.engines.vllm import VllmEngine

        return VllmEngine.from_config(model, config)
    if model.engine == "openai":
        from roro_ray.engines.openai_api import OpenAIEngine

        return OpenAIEngine.from_config(model, config)
    from roro_ray.engines.hf import HfEngine

    return HfEngine(
        name=model.name,
        path=model.path,
        device=model.device,
        dtype=model.dtype,
        batch_size=config.batch_size,
        memo_entries=config.memo_entries,
        cache_mb=config.cache_mb,
        model_format=model.format,
        thinking=model.thinking,
        revision=model.revision,
        prices=make_prices(model),
        adapters=model.adapters,
        max_context=model.max_context,
    )


def make_prices(model: ModelConfig) -> Prices:
    """A model's prices in US dollars a token; the settings give them per million."""
    return Prices(model.price_in / _MILLION, model.price_cached / _MILLION, model.price_out / _MILLION)
