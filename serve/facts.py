"""What is known of one request when it is over: the one record that the metrics and the access log both read.

It is filled bit by bit by whoever learns something (the HTTP layer, authentication, admission, the episodes), so it is
the one noun here that is not frozen. It never holds a text of the conversation or a key.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestFacts:
    """One request.

    `endpoint` is the route's template (`/v1/models/{id}`), `model` what the client asked for, as given. `status` is
    the HTTP status; 499 where the client left before the end. `error` is the envelope's code (`model_not_found`), also
    where it came amid a stream whose status had been 200 already. `queue_ms` is the wait for admission, `ttft_ms` the
    time until the first text left (None: none did). `steps`: number of steps by the name of the model that wrote them.
    `flops_large_only`: what the large model alone would have cost, None where nothing was answered. `ends`: why each
    choice ended. `user` is the client's own name for its user; the access log keeps a keyed hash of it only.
    """

    request_id: str
    endpoint: str
    client: str = ""
    key_name: str = ""
    model: str = ""
    router_version: int | None = None
    status: int = 200
    error: str | None = None
    stream: bool = False
    duration_ms: float = 0.0
    ttft_ms: float | None = None
    queue_ms: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)
    tokens_in: int = 0
    tokens_out: int = 0
    flops: float = 0.0
    flops_large_only: float | None = None
    degraded: bool = False
    ends: tuple[str, ...] = ()
    user: str = ""

    @property
    def flops_saved(self) -> float | None:
        """FLOPs saved against the large model alone; negative where routing cost more."""
        return None if self.flops_large_only is None else self.flops_large_only - self.flops
