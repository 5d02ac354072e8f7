"""Published adapters as directories: the noun, where a version lies, and how one travels as bytes.

A directory is in peft's format (`adapter_model.safetensors`, `adapter_config.json`), which vLLM reads as well, and has
the marker of a whole directory (`checkpoints.check_complete`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from roro_ray.learning.checkpoints import MARKER, check_complete, write_directory

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "version_"


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """A published adapter: the name that requests give, the number of updates behind it, and its directory."""

    name: str
    version: int
    path: str


def adapter_directory(root: Path, name: str, version: int) -> Path:
    """Where a version of an adapter lies below a directory of published ones."""
    return root / name / f"{_PREFIX}{version:06d}"


def read_adapter(adapter: AdapterVersion) -> dict[str, bytes]:
    """The files of an adapter by name, marker included.

    Raises:
        CheckpointError: the directory is not whole.
    """
    path = Path(adapter.path)
    check_complete(path)
    names = [*json.loads((path / MARKER).read_text()), MARKER]
    return {name: (path / name).read_bytes() for name in names}


def write_adapter(files: dict[str, bytes], root: Path, name: str, version: int) -> AdapterVersion:
    """Put files that `read_adapter` gave into a directory of this node; one that is there already stays.

    Raises:
        CheckpointError: what arrived is not what was sent.
    """
    final = adapter_directory(root, name, version)
    if not final.is_dir():
        with write_directory(final) as temporary:
            for file, content in files.items():
                (temporary / file).write_bytes(content)
            check_complete(temporary)
            (temporary / MARKER).unlink()  # the directory writes its own
    check_complete(final)
    return AdapterVersion(name, version, str(final))
