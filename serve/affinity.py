"""Which replica gets a call: the session's own, or on a later try the next one.

Serve's consistent hashing keeps a session on one replica, but a hashed "other session" for a retry may well meet the
same replica again, which is of no use where that one hangs. Here a session id tells its try.
"""

from __future__ import annotations

from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

_MARK = "+"


def make_session(name: str, attempt: int = 0) -> str:
    """The session id of one try: equal names go to the same replica, each further attempt to the next one."""
    return f"{name}{_MARK}{attempt}"


def split_session(session: str) -> tuple[str, int]:
    """Name and try of a session id; an id without a try is a first one."""
    name, mark, attempt = session.rpartition(_MARK)
    return (name, int(attempt)) if mark and attempt.isdecimal() else (session, 0)


class SessionRouter(ConsistentHashRouter):
    """Consistent hashing by the session's name; try N begins N replicas further."""

    def _routing_key(self, pending_request: Any) -> str | None:
        key = super()._routing_key(pending_request)
        return None if key is None else split_session(key)[0]

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> list[list[Any]]:
        """The replicas to try, one after the other."""
        ranks: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
        session = None if pending_request is None else pending_request.metadata.session_id
        if not session or len(ranks) < 2:
            return ranks
        first = split_session(session)[1] % len(ranks)
        return ranks[first:] + ranks[:first]
