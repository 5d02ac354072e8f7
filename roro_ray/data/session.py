"""One job's work on a remote run: its lease, and two threads that renew it and upload what changed meanwhile.

A stage's results are uploaded as they are finished; the thread is for what grows between them, such as metrics.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from roro_ray.data.lease import BEAT_S, Lease
from roro_ray.data.mirror import Mirror
from roro_ray.errors import RoroError

logger = logging.getLogger(__name__)

# What the ranks of a training write and upload, from whichever node they run on.
BY_RANKS = ("router", "adapters")


class Session:
    """Begins by taking the lease and making the copy fit; `close` uploads the rest and gives the lease back.

    Raises:
        ConfigError: the store refuses (credentials, bucket, package).
        DataError: it does not answer, or another job works on the run.
    """

    def __init__(self, mirror: Mirror, beat_s: float = BEAT_S) -> None:
        self._mirror = mirror
        self._lease = Lease(mirror.store, beat_s)
        mirror.session, before = self._lease.take()
        try:
            mirror.join("" if before is None else before.session)
        except BaseException:
            self._lease.release()
            raise
        sync_s = mirror.storage.sync_s
        self._threads = [_Repeated("lease", self._lease.renew, beat_s), _Repeated("sync", self.push, sync_s)]
        for thread in self._threads:
            thread.start()

    def push(self) -> None:
        """Upload what changed, but for what the ranks of a training upload themselves."""
        self._mirror.push(skip=BY_RANKS)

    def close(self) -> None:
        """End the threads, upload the rest, give the lease back; a second call does nothing.

        Raises:
            DataError: not everything could be uploaded; the copy of this node keeps it.
        """
        threads, self._threads = self._threads, []
        if not threads:
            return
        for thread in threads:
            thread.stop()
        try:
            self.push()
        finally:
            self._lease.release()


class _Repeated(threading.Thread):
    """Does something every few seconds; what fails is told once and tried again."""

    def __init__(self, name: str, action: Callable[[], object], every_s: float) -> None:
        super().__init__(name=f"storage {name}", daemon=True)
        self._action = action
        self._every_s = every_s
        self._end = threading.Event()

    def run(self) -> None:
        told = ""
        while not self._end.wait(self._every_s):
            try:
                self._action()
                told = ""
            except (RoroError, OSError) as error:
                if str(error) != told:
                    logger.warning("%s", error)
                told = str(error)

    def stop(self) -> None:
        self._end.set()
        self.join()
