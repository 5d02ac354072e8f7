"""LoRA adapters beside a base model in this process: loaded by version, taken up for a batch, let go when unused.

A version under way is never changed: a newer one is added beside it, requests that come from then on take the newer
one, and the older is removed once no request holds it. Calls that touch the model (`load`, `use`) belong to the thread
that computes with it; `hold` and `release` may come from any.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from roro_ray.errors import EngineError, did_you_mean

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(slots=True)
class _Loaded:
    """One version of an adapter in the model; `index` tells it from all others that there ever were."""

    index: int
    name: str
    version: int
    holders: int = 0

    @property
    def key(self) -> str:
        """What requests and the model's modules call it."""
        return f"served{self.index}"


class AdapterSet:
    """At most `most` adapters of one model, by name, each in its newest version."""

    def __init__(self, model: PreTrainedModel, most: int):
        self._model: Any = model
        self._most = most
        self._lock = threading.Lock()
        self._current: dict[str, _Loaded] = {}
        self._loaded: dict[str, _Loaded] = {}  # by key, superseded versions included
        self._active: str | None = ""  # None: whatever the library made active
        self._made = 0

    def version(self, name: str) -> int | None:
        """The version that is served under a name."""
        with self._lock:
            return self._current[name].version if name in self._current else None

    def hold(self, name: str) -> str:
        """The key of an adapter's newest version, which stays until it is released; empty for the base model.

        Raises:
            EngineError: no adapter of that name is loaded.
        """
        if not name:
            return ""
        with self._lock:
            found = self._current.get(name)
            if found is None:
                names = ", ".join(sorted(self._current)) or "none"
                raise EngineError(
                    f"no adapter {name!r} is loaded (loaded: {names}){did_you_mean(name, self._current)}: load it with "
                    "load_adapter first"
                )
            found.holders += 1
            return found.key

    def release(self, key: str) -> None:
        """A holder is done with a version."""
        if key:
            with self._lock:
                self._loaded[key].holders -= 1

    def root(self, key: str) -> int:
        """A number for the states that this version makes: 0 for the base model's, negative for an adapter's."""
        return -self._loaded[key].index if key else 0

    def load(self, name: str, path: str, version: int) -> None:
        """Put an adapter into the model under a name, in place of another version of it.

        Raises:
            EngineError: the directory holds no adapter for this model, or there are too many.
        """
        self._check(name, path, version)
        if self.version(name) == version:
            return
        self._made += 1
        self._active = None
        adapter = _Loaded(self._made, name, version)
        try:
            self._inject(adapter.key, Path(path))
        except Exception as error:  # border: whatever the libraries raise on somebody's files
            self._remove(adapter.key)
            if isinstance(error, EngineError):
                raise
            raise EngineError(
                f"adapter {name!r} in {path} does not fit the model: {type(error).__name__}: "
                f"{(str(error).splitlines() or ['no message'])[0]}; expected a LoRA adapter in peft format trained on "
                "this base model"
            ) from error
        finally:
            self._switch("")
        with self._lock:
            self._loaded[adapter.key] = self._current[name] = adapter
        self._drop_unused()

    @contextlib.contextmanager
    def use(self, key: str) -> Iterator[None]:
        """Compute with a version (empty: the base model) as long as the context lasts."""
        self._drop_unused()
        self._switch(key)
        yield

    def _check(self, name: str, path: str, version: int) -> None:
        if not name or version < 0:
            raise EngineError(f"adapter {name!r} in version {version}: expected a name and a version from 0 on")
        with self._lock:
            names = {*self._current, name}
        if len(names) > self._most:
            raise EngineError(
                f"adapter {name!r} would be number {len(names)}, and this engine serves at most {self._most}: raise "
                "pool.models[].adapters"
            )
        missing = [file for file in (_CONFIG, _WEIGHTS) if not (Path(path) / file).is_file()]
        if missing:
            raise EngineError(
                f"{path} lacks {', '.join(missing)}: expected a LoRA adapter in peft format with its weights in "
                "safetensors (`model.save_pretrained(DIR)` of a peft model writes both)"
            )

    def _inject(self, key: str, path: Path) -> None:
        from peft import PeftConfig, inject_adapter_in_model
        from peft.utils.save_and_load import set_peft_model_state_dict
        from safetensors.torch import load_file

        config = PeftConfig.from_pretrained(str(path))
        config.inference_mode = True
        weights = {key.removeprefix("base_model.model."): part for key, part in load_file(path / _WEIGHTS).items()}
        with warnings.catch_warnings():  # that there are several adapters is what is wanted
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, self._model, key)
            report: Any = set_peft_model_state_dict(self._model, weights, adapter_name=key)
        parts = {name: part for name, part in self._model.named_parameters() if key in name.split(".")}
        lacking = [name for name in report.missing_keys if name in parts]
        if lacking or report.unexpected_keys or not parts:
            wrong = (lacking or report.unexpected_keys or ["no module that it adapts"])[0]
            raise EngineError(
                f"the adapter in {path} was trained on another model or is incomplete: it lacks {len(lacking)} tensors "
                f"that its configuration asks for and has {len(report.unexpected_keys)} too many (first: {wrong})"
            )
        for part in parts.values():
            part.requires_grad_(False)
            part.data = part.data.to(self._model.device, self._model.dtype)
        self._model.eval()

    def _switch(self, key: str) -> None:
        if key == self._active:
            return
        for layer in self._find_layers():
            layer.enable_adapters(bool(key))
            if key:  # last, since enabling asks for gradients
                layer.set_adapter(key, inference_mode=True)
        self._active = key

    def _drop_unused(self) -> None:
        with self._lock:
            unused = [
                adapter.key
                for adapter in self._loaded.values()
                if not adapter.holders and self._current[adapter.name] is not adapter
            ]
            for key in unused:
                del self._loaded[key]
        for key in unused:
            self._remove(key)

    def _remove(self, key: str) -> None:
        with warnings.catch_warnings():  # that another one becomes active: the next batch says which
            warnings.simplefilter("ignore")
            for layer in self._find_layers():
                layer.delete_adapter(key)
        getattr(self._model, "peft_config", {}).pop(key, None)
        if self._active == key:
            self._active = None

    def _find_layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
