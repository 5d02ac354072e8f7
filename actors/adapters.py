"""Published adapters on their way to the engines, by version.

A parcel names an adapter and its version, and either the directory that every node sees (shared storage) or a reference
to its bytes in Ray's object store, which the engine's process writes to a directory of its own. `deliver` hands one to
every engine and returns when all of them serve it, so that whoever asks then knows which version answers.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import ray

from actors.waiting import wait_async
from roro_ray.engines.protocol import AdapterEngine, Engine
from roro_ray.errors import EngineError

if TYPE_CHECKING:  # it brings torch, which an actor that serves no adapters may do without
    from roro_ray.learning.adapter_files import AdapterVersion

_FETCH_S = 300.0  # deadline of fetching an adapter from another node
_KEPT = 2  # versions of an adapter that stay on an engine's node: requests under way end with the older one


@dataclass(frozen=True, slots=True)
class Parcel:
    """An adapter for an engine elsewhere: through storage, or with a reference (in a tuple, so that Ray hands it on
    instead of fetching it for whoever is called) to its files."""

    adapter: AdapterVersion
    refs: tuple[Any, ...] = ()


@runtime_checkable
class ParcelEngine(Protocol):
    """The near side of an engine in another process."""

    async def take_parcel(self, parcel: Parcel) -> None:
        """Serve the adapter, there."""
        ...


def make_parcel(adapter: AdapterVersion, transport: str) -> Parcel:
    """A parcel by `lora.transport`; with `objects` the files are read now, and the caller's process owns them.

    Raises:
        CheckpointError: the directory is not whole.
    """
    from roro_ray.learning.adapter_files import read_adapter

    return Parcel(adapter, (ray.put(read_adapter(adapter)),) if transport == "objects" else ())


async def deliver(adapter: AdapterVersion, engines: Sequence[Engine], transport: str = "storage") -> None:
    """Have every engine serve an adapter, in place of older versions of it; again costs nothing where it is served.

    Raises:
        EngineError: an engine serves no adapters, or this one is none for its model.
        CheckpointError: the adapter's files are not whole.
    """
    parcel = make_parcel(adapter, transport)
    await asyncio.gather(*(_hand_over(parcel, engine) for engine in engines))


async def _hand_over(parcel: Parcel, engine: Engine) -> None:
    if isinstance(engine, ParcelEngine):
        await engine.take_parcel(parcel)
    else:
        await install(parcel, engine)


async def install(parcel: Parcel, engine: Engine) -> None:
    """Load a parcel's adapter into an engine of this process."""
    if not hasattr(engine, "load_adapter"):
        raise EngineError(
            f"model {engine.name!r} serves no adapters, and {parcel.adapter.name!r} is to be loaded into it: use an "
            "engine that does (hf or vllm, with pool.models[].adapters of 1 or more)."
        )
    adapter = parcel.adapter
    if parcel.refs:
        from roro_ray.learning.adapter_files import write_adapter

        files = await wait_async(parcel.refs[0], f"adapter {adapter.name} of version {adapter.version}", _FETCH_S)
        adapter = await asyncio.to_thread(write_adapter, files, _own_directory(), adapter.name, adapter.version)
    await cast(AdapterEngine, engine).load_adapter(adapter.name, adapter.path, adapter.version)
    if parcel.refs:
        for old in sorted(Path(adapter.path).parent.glob("version_*"))[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


def _own_directory() -> Path:
    """Where this process keeps what came as bytes; removed when it ends."""
    return Path(_make_own_directory().name)


@functools.cache
def _make_own_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="roro-adapters-", ignore_cleanup_errors=True)
