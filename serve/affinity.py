"""Which replica gets a call: the session's own, or on a later try the next one; a silent one must give a sign of life.

Serve's consistent hashing keeps a session on one replica, but a hashed "other session" for a retry may well meet the
same replica again, which is of no use where that one hangs. Here a session id tells its try.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from ray.serve._private.request_router.request_router import RequestRouter
from ray.serve._private.utils import generate_request_id
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

_MARK = "+"
_SILENT_S = 2.0


def make_session(name: str, attempt: int = 0) -> str:
    """The session id of one try: equal names go to the same replica, each further attempt to the next one."""
    return f"{name}{_MARK}{attempt}"


def split_session(session: str) -> tuple[str, int]:
    """Name and try of a session id; an id without a try is a first one."""
    name, mark, attempt = session.rpartition(_MARK)
    return (name, int(attempt)) if mark and attempt.isdecimal() else (session, 0)


class SessionRouter(ConsistentHashRouter):
    """Consistent hashing by the session's name; try N begins N replicas further.

    Serve trusts what it last knew of a replica's queue, and would send call after call to a process that hangs until
    its health checks have failed. A replica that was sent something and has not been heard of for 2 s is therefore
    asked first: one that works answers in a millisecond, and for one that hangs the next is taken.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._unheard: dict[Any, float] = {}  # replica: when it was first sent something that it has not taken yet

    async def _choose_replica_for_request(self, pending_request: Any, *, is_retry: bool = False) -> Any:
        """The replica of one call.

        Calls made while one request is handled share its internal id, by which Serve's own routers of this kind find
        the call that a replica was chosen for: two at once, and one is never sent (seen with Ray 2.60). So each gets
        an id of its own. The handle's copy keeps the shared one, by which a request that ends ends its calls.
        """
        if not is_retry:
            metadata = dataclasses.replace(pending_request.metadata, internal_request_id=generate_request_id())
            pending_request.metadata = metadata
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)

    async def _fulfill_pending_requests(self) -> None:
        """Routes what waits, by the base class's loop: that of ConsistentHashRouter may overlook what just arrived."""
        await RequestRouter._fulfill_pending_requests(self)

    def _routing_key(self, pending_request: Any) -> str | None:
        key = super()._routing_key(pending_request)
        return None if key is None else split_session(key)[0]

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> list[list[Any]]:
        """The replicas to try, one after the other."""
        ranks: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
        now = time.monotonic()
        for replica in (replica for rank in ranks for replica in rank):
            if now - self._unheard.get(replica.replica_id, now) > _SILENT_S:
                self.replica_queue_len_cache.invalidate_key(replica.replica_id)
        session = None if pending_request is None else pending_request.metadata.session_id
        if not session or len(ranks) < 2:
            return ranks
        first = split_session(session)[1] % len(ranks)
        return ranks[first:] + ranks[:first]

    def on_send_request(self, replica_id: Any) -> None:
        """Something goes out to a replica."""
        self._unheard.setdefault(replica_id, time.monotonic())
        super().on_send_request(replica_id)

    def on_new_queue_len_info(self, replica_id: Any, num_ongoing_requests: int) -> None:
        """A replica took a call, or told how many it has."""
        self._unheard.pop(replica_id, None)
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)

    def update_replicas(self, replicas: list[Any]) -> None:
        """The replicas have changed."""
        super().update_replicas(replicas)
        gone = self._unheard.keys() - {replica.replica_id for replica in replicas}
        for replica_id in gone:
            del self._unheard[replica_id]
