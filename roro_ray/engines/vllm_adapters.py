"""LoRA adapters by name and version: requests end with the version that they began with, then it is forgotten."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

from roro_ray.engines.vllm_backend import Adapter
from roro_ray.errors import EngineError


@dataclass(slots=True)
class _Entry:
    version: int
    adapter: Adapter
    users: int = 0
    is_current: bool = True


class AdapterTable:
    """Which adapter stands for a name, and who still uses it. `forget` is told of one that nobody will use again."""

    def __init__(self, engine: str, forget: Callable[[Adapter], None]):
        self._engine = engine
        self._forget = forget
        self._lock = threading.Lock()
        self._current: dict[str, _Entry] = {}
        self._used: dict[int, _Entry] = {}
        self._ids = itertools.count(1)

    def has(self, name: str, version: int) -> bool:
        """Whether that version is the current one."""
        with self._lock:
            entry = self._current.get(name)
            return entry is not None and entry.version == version

    def make(self, name: str, version: int, path: str) -> Adapter:
        """An adapter with an id that none had before; its label keeps the versions' cached states apart."""
        number = next(self._ids)
        return Adapter(label=f"{name}@{version}#{number}", id=number, path=path)

    def put(self, name: str, version: int, adapter: Adapter) -> None:
        """From now on the name stands for this adapter."""
        with self._lock:
            old = self._current.get(name)
            self._current[name] = self._used[adapter.id] = _Entry(version, adapter)
            gone = self._drop(old) if old is not None else False
        if old is not None and gone:
            self._forget(old.adapter)

    def take(self, name: str) -> Adapter | None:
        """The adapter for one more request (None for the base model); it must be given back.

        Raises:
            EngineError: no adapter of that name was loaded.
        """
        if not name:
            return None
        with self._lock:
            entry = self._current.get(name)
            if entry is None:
                loaded = ", ".join(sorted(self._current)) or "none"
                raise EngineError(
                    f"engine {self._engine}: no adapter {name!r}: loaded are {loaded}; call load_adapter first"
                )
            entry.users += 1
            return entry.adapter

    def give_back(self, adapter: Adapter | None) -> None:
        """A request is over."""
        if adapter is None:
            return
        with self._lock:
            entry = self._used[adapter.id]
            entry.users -= 1
            gone = not entry.is_current and self._drop(entry)
        if gone:
            self._forget(adapter)

    def _drop(self, entry: _Entry) -> bool:
        entry.is_current = False
        if entry.users:
            return False
        del self._used[entry.adapter.id]
        return True
