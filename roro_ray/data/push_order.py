"""In which order changed files are uploaded and removed ones deleted, so that no reader takes half a result for whole.

A reader trusts markers: a checkpoint has `COMPLETE.json`, a reward model `DONE`, a router `router.json`, a training
`FINISHED.json`, a stage `done/STAGE.json`. Each says that what it vouches for is there. So a marker is uploaded behind
all that it covers; where what it covers is replaced, it goes first; where what it covers is dropped, it goes before
the rest does, and only once everything new is there. Whoever reads in between, or after a kill, finds the old state,
the new one, or no marker and so the one before.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

_FIRST = ("config.yaml", "versions.json")  # what makes a directory a run
# Marker: which files beside it, or below folders beside it, it covers; empty: all of them.
_MARKERS: dict[str, tuple[str, ...]] = {
    "COMPLETE.json": (),
    "DONE": (),
    "router.json": ("router.safetensors", "encoder"),
}
_FINISHED, _DONE = "FINISHED.json", "done"


@dataclass(frozen=True, slots=True)
class Phase:
    """Operations that may run side by side: files to upload, objects to delete."""

    uploads: tuple[str, ...] = ()
    deletions: tuple[str, ...] = ()


def plan_push(changed: Collection[str], removed: Collection[str], there: Collection[str]) -> list[Phase]:
    """The phases of a push, one after the other.

    Args:
        changed: names of files that are new or other than in the store.
        removed: names of objects whose file is gone.
        there: names of all objects that are in the store.
    """
    stages = {name for name in {*changed, *removed, *there} if _is_stage(name)}
    markers = {name for name in {*changed, *removed, *there} if PurePosixPath(name).name in _MARKERS} - stages
    replaced = {marker for marker in markers if any(_covers(marker, name) for name in changed)}
    dropped = {marker for marker in markers - replaced if any(_covers(marker, name) for name in removed)}
    first = {name for name in changed if name in _FIRST}
    plain = {name for name in changed if name not in {*first, *markers, *stages}}
    rewritten = stages & set(changed) if plain or markers & set(changed) else set()
    gone_stages = (stages & set(removed)) | (rewritten & set(there))
    phases = [
        Phase(uploads=_sort(first)),
        *(Phase(deletions=(name,)) for name in sorted(gone_stages, key=_stage_rank, reverse=True)),
        # The outer ones first: each vouches for the inner ones too.
        *(Phase(deletions=(marker,)) for marker in _by_depth((replaced - dropped) & set(there))),
        Phase(uploads=_sort(plain)),
        # A marker that was taken away is put back where its file still stands.
        *(
            Phase(uploads=(marker,))
            for marker in reversed(_by_depth((markers & set(changed)) | (replaced & set(there)) - set(removed)))
        ),
        *(Phase(uploads=(name,)) for name in sorted(stages & set(changed), key=_stage_rank)),
        *(Phase(deletions=(marker,)) for marker in _by_depth((dropped | (markers & set(removed))) & set(there))),
        Phase(deletions=_sort(set(removed) - markers - gone_stages)),
    ]
    return [phase for phase in phases if phase.uploads or phase.deletions]


def _covers(marker: str, name: str) -> bool:
    """Whether a marker vouches for a file other than itself."""
    path, folder = PurePosixPath(name), PurePosixPath(marker).parent
    if name == marker or not path.is_relative_to(folder):
        return False
    inner = path.relative_to(folder).parts
    only = _MARKERS[PurePosixPath(marker).name]
    return not only or inner[0] in only


def _is_stage(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name == _FINISHED or (path.parent.name == _DONE and path.suffix == ".json")


def _stage_rank(name: str) -> tuple[int, str]:
    """A stage's marker behind those of the trainings that it tells of."""
    return (0 if PurePosixPath(name).name == _FINISHED else 1, name)


def _by_depth(names: Collection[str]) -> list[str]:
    return sorted(names, key=lambda name: (name.count("/"), name))


def _sort(names: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(names))
