"""Who may write to a remote run: one job at a time, by an object in the run that says who, and that it still lives.

Two jobs that upload to one run would undo each other's files. A job therefore takes the lease before it reads, renews
it while it works, looks at it before each upload, and gives it back at its end. One that was killed gives nothing back:
its lease is taken over at once where its process can be seen to be gone, and else when it was not renewed for a while.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from roro_ray.data.stores import Store
from roro_ray.errors import DataError

logger = logging.getLogger(__name__)

NAME = ".lease.json"
BEAT_S = 10.0  # how often a job renews its lease
_PATIENCE = 4  # renewals that may be missed
_CLOCKS_S = 300.0  # by how much the clocks of two machines may differ


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the lease, or held it last.

    `session` is of one job; `beat` counts renewals; `process` identifies the process among all of its machine.
    """

    session: str
    owner: str
    process: str
    beat: int = 0
    time: float = 0.0
    released: bool = False


class Lease:
    """The lease on one run, as one process sees it.

    Args:
        sleep: in place of `time.sleep`, for tests.
    """

    def __init__(self, store: Store, beat_s: float = BEAT_S, sleep: Callable[[float], Any] = time.sleep) -> None:
        self._store = store
        self._beat_s = beat_s
        self._sleep = sleep
        self._held: Holder | None = None

    def look(self) -> Holder | None:
        """Who holds the lease or held it last; None where nobody ever did."""
        content = self._store.read(NAME)
        try:
            return None if content is None else Holder(**json.loads(content))
        except (ValueError, TypeError):
            return None  # of another version, or damaged: it protects nobody

    def take(self) -> tuple[str, Holder | None]:
        """Take the lease; gives the session's id, and who held it before.

        Raises:
            DataError: another job holds it and lives.
        """
        before = self.look()
        if before is not None and not before.released:
            self._wait_for_end(before)
        session = uuid.uuid4().hex
        self._held = Holder(session, _name_owner(), _identify(os.getpid()), time=time.time())
        self._write(self._held)
        self.check(session)  # of two that took it at once the later one has it
        return session, before

    def renew(self) -> None:
        """Tell that this job lives; `check` where it may be that another took over."""
        assert self._held is not None, "take comes first"
        self.check(self._held.session)
        self._held = replace(self._held, beat=self._held.beat + 1, time=time.time())
        self._write(self._held)

    def check(self, session: str) -> None:
        """Refuse to go on where another job took over.

        Raises:
            DataError: names it.
        """
        now = self.look()
        if now is None or now.session != session:
            by = "its lease is gone: somebody removed the run" if now is None else f"{now.owner} took over"
            raise DataError(
                f"{self._store.place}: this job may write there no more, {by}. Nothing that was uploaded is lost. Run "
                "one job at a time on a remote run."
            )

    def release(self) -> None:
        """Give the lease back; does nothing where another has it by now."""
        held, self._held = self._held, None
        now = self.look() if held is not None else None
        if held is not None and now is not None and now.session == held.session:
            self._write(replace(held, released=True, time=time.time()))

    def _write(self, holder: Holder) -> None:
        self._store.write(NAME, json.dumps(asdict(holder)).encode())

    def _wait_for_end(self, holder: Holder) -> None:
        """Return once the holder is known to be gone.

        Raises:
            DataError: it lives.
        """
        if _is_gone(holder.process) or time.time() - holder.time > _CLOCKS_S + _PATIENCE * self._beat_s:
            return
        patience_s = _PATIENCE * self._beat_s
        if not _is_alive(holder.process):
            logger.warning(
                "%s: %s works on this run, or was killed. Waiting up to %g s for a sign of life ...",
                self._store.place,
                holder.owner,
                patience_s,
            )
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline:
                self._sleep(min(self._beat_s / 4, 1.0))
                now = self.look()
                if now is None or now.released:
                    return
                if (now.session, now.beat) != (holder.session, holder.beat):
                    holder = now
                    break
            else:
                return
        raise DataError(
            f"{self._store.place}: {holder.owner} is working on this run. Only one job at a time may write to a remote "
            "run: wait until it ends, stop it, or give another run_dir."
        )


def _name_owner() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = str(os.getuid())
    command = " ".join(Path(part).name if index == 0 else part for index, part in enumerate(sys.argv[:2]))
    return f"{user}@{socket.gethostname()} (pid {os.getpid()}, {command[:80]})"


def _identify(pid: int) -> str:
    """A process among all of this boot of this machine and this container, or nothing where /proc tells none of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
        # Behind the name in brackets, which may hold anything: field 22 is the start in ticks since boot.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    ended = fields[0] in ("Z", "X")
    return "" if ended else f"{boot}/{space}/{pid}/{fields[19]}"


def _is_here(process: str) -> bool:
    own = _identify(os.getpid()).split("/")
    return bool(process) and process.split("/")[:2] == own[:2]


def _is_gone(process: str) -> bool:
    """True where the process ran on this machine and does so no more."""
    return _is_here(process) and _identify(int(process.split("/")[2])) != process


def _is_alive(process: str) -> bool:
    return _is_here(process) and not _is_gone(process)
