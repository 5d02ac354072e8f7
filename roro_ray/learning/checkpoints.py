"""Checkpoints of router training that are either whole or not there.

A checkpoint is written to a temporary directory, gets its marker last, and is then renamed: a process that is
killed at any point leaves the checkpoint before it. The marker lists every file with its size and checksum, so that
one that was cut short later (a full disk, a broken copy) is refused with a clear error instead of half loaded.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from roro_ray.data.files import explain_full_disk
from roro_ray.errors import CheckpointError
from roro_ray.learning.router_training import RouterTrainer
from roro_ray.routing.router import fill_router

MARKER = "COMPLETE.json"
PREFIX = "iteration_"
_STATE, _WEIGHTS, _TRAINING = "state.json", "router.safetensors", "training.pt"


class IncompleteCheckpointWarning(RuntimeWarning):
    """A checkpoint was passed over because it is not whole."""


def save_checkpoint(directory: Path, trainer: RouterTrainer, settings: dict[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint of the trainer's present state and remove all but the newest `keep`.

    Args:
        directory: where checkpoints of this training go.
        settings: what a resumed run must agree with (see `check_settings`).
    """
    final = directory / f"{PREFIX}{trainer.iteration:06d}"
    with write_directory(final) as temporary:
        save_file(_own(trainer.network.learned_state()), temporary / _WEIGHTS)
        for version, state in trainer.past.items():
            save_file(_own(state), temporary / f"past_{version:06d}.safetensors")
        rng = {"torch": torch.get_rng_state(), "python": random.getstate()}
        torch.save({"optimizer": trainer.optimizer.state_dict(), "rng": rng}, temporary / _TRAINING)
        state_json = {"iteration": trainer.iteration, "version": trainer.iteration, "settings": settings}
        state_json["past"] = sorted(trainer.past)
        (temporary / _STATE).write_text(json.dumps(state_json, indent=1) + "\n")
    drop_old(directory, keep)
    return final


@contextmanager
def write_directory(final: Path) -> Iterator[Path]:
    """A temporary directory to write files to; it takes the place of `final`, with its marker, when the block ends.

    Raises:
        FullDiskError: there was no room for it; what stood there before still does.
    """
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explain_full_disk(final):
            temporary.mkdir(parents=True)
            yield temporary
            _mark(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a disk that is full would stay so
        raise
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(final.parent)


def _mark(directory: Path) -> None:
    """Write the marker and put everything on disk."""
    files = {path.name: [path.stat().st_size, zlib.crc32(path.read_bytes())] for path in sorted(directory.iterdir())}
    (directory / MARKER).write_text(json.dumps(files) + "\n")
    for path in directory.iterdir():
        _sync(path)


def drop_old(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a directory."""
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(directory: Path) -> list[Path]:
    """Every checkpoint directory, oldest first, whole or not."""
    return sorted(directory.glob(f"{PREFIX}*")) if directory.is_dir() else []


def find_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint, or None; newer ones that are not whole are passed over with a warning."""
    for path in reversed(list_checkpoints(directory)):
        try:
            check_complete(path)
        except CheckpointError as error:
            warnings.warn(f"passed over: {error}", IncompleteCheckpointWarning, stacklevel=2)
            continue
        return path
    return None


def check_complete(path: Path) -> None:
    """Raise CheckpointError unless every file that the marker lists is there, whole."""
    remedy = "remove it and resume from an earlier one, or train again"
    try:
        files: dict[str, list[int]] = json.loads((path / MARKER).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is incomplete: its marker {MARKER} is missing or unreadable ({error}); {remedy}."
        ) from None
    for name, (size, checksum) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {str(path)!r} is incomplete: {name} is missing; {remedy}.")
        got = file.stat().st_size
        if got != size:
            raise CheckpointError(
                f"checkpoint {str(path)!r} is incomplete: {name} has {got} bytes, expected {size}; {remedy}."
            )
        if zlib.crc32(file.read_bytes()) != checksum:
            raise CheckpointError(f"checkpoint {str(path)!r}: {name} was changed after it was written; {remedy}.")


def load_checkpoint(path: Path, trainer: RouterTrainer, settings: dict[str, Any]) -> None:
    """Put the trainer (and the random generators) into the state that was saved.

    Raises:
        CheckpointError: incomplete, made with other settings, or of another shape than the trainer's network.
    """
    check_complete(path)
    state = read_state(path)
    try:
        weights = load_file(path / _WEIGHTS)
        past = {version: load_file(path / f"past_{version:06d}.safetensors") for version in state["past"]}
        training = torch.load(path / _TRAINING, weights_only=True)
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} is unreadable ({error!r}); train again.") from error
    fill_router(trainer.network, weights, f"the weights of checkpoint {str(path)!r}")
    check_settings(state["settings"], settings, path)
    trainer.optimizer.load_state_dict(training["optimizer"])
    trainer.past = past
    trainer.iteration = int(state["iteration"])
    torch.set_rng_state(training["rng"]["torch"])
    version, words, gauss = training["rng"]["python"]
    random.setstate((version, tuple(words), gauss))


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: `iteration`, `version`, `past`, `settings`.

    Raises:
        CheckpointError: it says nothing.
    """
    try:
        state: dict[str, Any] = json.loads((path / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} is unreadable ({error!r}); train again.") from error
    return state


def check_settings(got: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError that names the settings in which a checkpoint and a run differ."""
    keys = sorted(key for key in {*got, *expected} if got.get(key) != expected.get(key))
    if keys:
        told = "; ".join(f"{key}: {got.get(key)!r} there, {expected.get(key)!r} now" for key in keys[:4])
        raise CheckpointError(
            f"checkpoint {str(path)!r} was made with other settings ({told}): resume with the same ones, "
            "or use another run directory."
        )


def _own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU that share no memory, as safetensors wants them."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
