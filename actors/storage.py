"""What a group of Ray Train workers needs of a run's storage: one state to begin with, a place for Train's notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from roro_ray.data.mirror import Part
from roro_ray.data.stores import check_shared
from roro_ray.errors import CheckpointError
from roro_ray.learning.checkpoints import list_checkpoints
from roro_ray.learning.lm_run import CHECKPOINTS

_TRAIN_NOTES = "ray_train"


def meet(part: Part, rank: int, world: int, names: Sequence[str]) -> None:
    """Bring every rank's copy of a remote training to one state; on a shared file system there is nothing to do.

    Rank 0 first uploads what it could not upload before it was started again; the others then see that too.

    Args:
        names: of what a rank reads, checkpoints among it.

    Raises:
        CheckpointError: the ranks see different checkpoints.
        ConfigError, DataError: as `Mirror.pull` and `Mirror.push`.
    """
    import torch

    if not part.mirror.is_remote:
        return
    if rank == 0:
        part.mirror.join()
        part.pull(*names)
        part.push()
    if world == 1:
        return
    torch.distributed.barrier()
    if rank > 0:
        part.mirror.join()
        part.pull(*names)
    seen: list[Any] = [None] * world
    torch.distributed.all_gather_object(seen, [path.name for path in list_checkpoints(part.path / CHECKPOINTS)])
    if any(names != seen[0] for names in seen):
        told = "; ".join(f"rank {index}: {', '.join(names) or 'none'}" for index, names in enumerate(seen))
        raise CheckpointError(
            f"{part.place}: the ranks see different checkpoints ({told}). Another job writes there: run one at a time."
        )


def train_storage(part: Part) -> dict[str, Any]:
    """Where Ray Train keeps its own notes, as arguments of `RunConfig`: every node must see the place.

    Raises:
        ConfigError: only this process sees it.
    """
    check_shared(part.mirror.place)
    if not part.mirror.is_remote:
        return {"storage_path": str(part.path / _TRAIN_NOTES)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    store = part.mirror.store
    return {
        "storage_path": f"{store.root}/{part.name}/{_TRAIN_NOTES}",
        "storage_filesystem": PyFileSystem(FSSpecHandler(store.system)),
    }


def drop_train_notes(part: Part) -> None:
    """Remove Ray Train's notes of a training that is over, where they are of no use any more."""
    part.remove(_TRAIN_NOTES)
