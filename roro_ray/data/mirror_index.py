"""What a node knows of its copy of a remote run, and which files of it travel."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from roro_ray.data.files import write_whole

LOCAL_ONLY = ("wandb", "ray_train")  # folders that are of no use elsewhere, or uploaded by others
_THREADS = 8  # transfers side by side
Stat = list[int]  # size, time of the last change, inode


@dataclass(slots=True)
class Index:
    """What this node knows: the session that last used the copy, and each file's stat and signature when it was the
    same here and in the store."""

    session: str = ""
    files: dict[str, tuple[Stat, str | None]] = field(default_factory=dict)

    def save(self, file: Path, place: str) -> None:
        """Write it, whole."""
        with write_whole(file) as temporary:
            temporary.write_text(json.dumps({"place": place, "session": self.session, "files": self.files}))


def read_index(file: Path) -> Index:
    """The saved index, or an empty one where none can be read."""
    try:
        content = json.loads(file.read_text())
        files = {str(name): (list(stat), signature) for name, (stat, signature) in content["files"].items()}
        return Index(str(content["session"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Index()  # a copy that nothing is known of is downloaded again


def scan(root: Path) -> dict[str, Stat]:
    """The files of a copy, but for hidden ones (they are being written) and what stays on this node."""
    found: dict[str, Stat] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in LOCAL_ONLY]
        for file in (Path(folder) / name for name in files if not name.startswith(".")):
            try:
                found[file.relative_to(root).as_posix()] = stat_file(file)
            except FileNotFoundError:
                continue  # renamed or dropped meanwhile
    return found


def side_by_side(action: Callable[[str], None], names: Sequence[str]) -> None:
    """Do it for all; the first error is raised once those under way are over."""
    if len(names) <= 1:
        for name in names:
            action(name)
        return
    with ThreadPoolExecutor(min(_THREADS, len(names))) as pool:
        futures = [pool.submit(action, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def stat_file(file: Path) -> Stat:
    """What tells that a file changed."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def is_below(name: str, parts: Sequence[str]) -> bool:
    """True where the name is one of the parts or lies below one; the empty part is the whole."""
    return any(not part or name == part or name.startswith(f"{part}/") for part in parts)


def is_ours(name: str) -> bool:
    """False for hidden objects (the lease) and for what others than the mirror write."""
    return not any(step.startswith(".") or step in LOCAL_ONLY for step in name.split("/"))
