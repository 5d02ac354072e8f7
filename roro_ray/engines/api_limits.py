"""How hard a remote endpoint may be asked: rates, retries and deadlines, as `pool.models[].engine_args` gives them.

The rate limit is the client's own, so that a pool of many episodes stays below what the provider grants instead of
running into refusals. It holds for one process: divide the provider's limit by the number of rollout workers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from typing import Any

from roro_ray.errors import ConfigError, did_you_mean

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """What `engine_args` of an `openai` engine may hold."""

    requests_per_minute: float = 0.0  # of this process; 0: no limit
    tokens_per_minute: float = 0.0  # of this process, prompt and answer together; 0: no limit
    concurrency: int = 64  # requests under way at once
    attempts: int = 6  # of one request, the first included
    deadline_s: float = 300.0  # of one request with all its attempts
    timeout_s: float = 120.0  # of one attempt
    backoff_s: float = 0.5  # the wait before attempt n is drawn from 0 to backoff_s * 2^(n - 1)
    backoff_most_s: float = 30.0  # and never drawn above this
    top_logprobs: int = 20  # alternatives asked for with each token, where the endpoint gives them; 0: none
    parameters: float = 0.0  # of the model, where its maker tells: what its FLOPs are reckoned from; 0: not known
    active_parameters: float = 0.0  # those that one token passes through; 0: all of them

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine_args.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("deadline_s", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"engine_args.{name}: got {getattr(self, name)}, expected more than 0 seconds")
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise ConfigError(f"engine_args.{field.name}: got {getattr(self, field.name)}, expected 0 or more")


def read_limits(given: Mapping[str, Any], model: str) -> ApiLimits:
    """The limits that `engine_args` of a model hold.

    Raises:
        ConfigError: an unknown key, or a value that is no number.
    """
    defaults = {field.name: field.default for field in fields(ApiLimits)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in defaults:
            raise ConfigError(
                f"unknown engine_args.{key} of model {model!r}{did_you_mean(key, defaults)}: an openai engine takes "
                f"{', '.join(defaults)}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"engine_args.{key} of model {model!r}: got {value!r}, expected a number")
        values[key] = int(value) if isinstance(defaults[key], int) else float(value)
    return ApiLimits(**values)


class TokenBucket:
    """A rate: a minute's worth at first, filled evenly; who takes more than there is waits for it.

    Args:
        per_minute: 0 for no limit.
    """

    def __init__(self, per_minute: float, clock: Clock = time.monotonic) -> None:
        self._rate = per_minute / 60.0
        self._most = self._level = per_minute
        self._clock = clock
        self._filled_at = clock()

    def take(self, amount: float) -> float:
        """Take an amount out; gives the seconds to wait until it is there. First come, first served."""
        if self._rate <= 0:
            return 0.0
        now = self._clock()
        self._level = min(self._level + (now - self._filled_at) * self._rate, self._most) - amount
        self._filled_at = now
        return max(-self._level / self._rate, 0.0)

    def give_back(self, amount: float) -> None:
        """Put back what was taken and not used (or, below 0, take what was used beyond it)."""
        self._level = min(self._level + amount, self._most)


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a refusal asks to wait: a number (RFC 9110: of seconds), or a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(name, "")) * unit
            return seconds if 0 <= seconds < math.inf else None
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None
