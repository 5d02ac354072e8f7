"""The wire to an OpenAI-compatible endpoint: the official client, with this project's patience round it.

The official client is kept from retrying by itself: waits are drawn at random over the whole interval (full jitter), so
that the hundreds of episodes that one refusal meets do not come back together; they honour Retry-After, and end at a
number of attempts and at a deadline. The key is read from the environment when a connection is made. It is in no
attribute of ours, in no message and in no pickle.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from roro_ray.engines.api_limits import ApiLimits, Clock, TokenBucket, read_retry_after
from roro_ray.errors import ConfigError, EngineError, EngineUnavailableError

logger = logging.getLogger(__name__)
FIELD_REFUSALS = (400, 422)  # of a request that the endpoint read and did not take
_RETRIED = (408, 409, 425, 429)  # and everything from 500 on
_FINAL_CODES = ("insufficient_quota", "billing_hard_limit_reached")  # a 429 that no waiting cures
_MAX_MESSAGE_CHARS = 600
_ADVICE = {
    401: "set the environment variable {key} to a valid key",
    403: "the key in {key} may not use this model",
    404: "check url (it usually ends in /v1) and api_model",
}
Sleep = Callable[[float], Awaitable[None]]


class ApiRefusedError(EngineError):
    """The endpoint refused a request in a way that asking again does not cure; `status` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(slots=True)
class _Session:
    """What belongs to one event loop."""

    client: Any
    slots: asyncio.Semaphore
    lock: asyncio.Lock


@dataclass(frozen=True, slots=True)
class _Failure:
    """One attempt that failed in a way that may pass: what happened, and how long the endpoint asks to wait."""

    message: str
    retry_after_s: float | None = None


class ApiClient:
    """Calls to one endpoint, with retries, rates and a bound on how many are under way.

    Args:
        name: of the engine, for messages.
        url: of the endpoint, such as https://host/v1.
        key_env: environment variable that holds the key; may be unset for an endpoint on this machine.
        clock, sleep, draw: time and chance, which tests replace.
    """

    def __init__(
        self,
        name: str,
        url: str,
        key_env: str,
        limits: ApiLimits,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.name = name
        self.url = url
        self.key_env = key_env
        self.limits = limits
        self._clock, self._sleep, self._draw = clock, sleep, draw
        self._requests = TokenBucket(limits.requests_per_minute, clock)
        self._tokens = TokenBucket(limits.tokens_per_minute, clock)
        # Connections belong to the event loop that opened them.
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, _Session] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sessions": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._sessions = WeakKeyDictionary()

    @property
    def lock(self) -> asyncio.Lock:
        """A lock for the running event loop."""
        return self._session().lock

    def check_key(self) -> None:
        """Refuse to start without a key where one is needed.

        Raises:
            ConfigError: the variable is unset and the endpoint is not on this machine.
        """
        self._read_key()

    async def ask(self, path: str, body: Mapping[str, Any], tokens: int = 0) -> dict[str, Any]:
        """The reply to one POST, as JSON.

        Args:
            path: below the endpoint's url, such as /chat/completions.
            tokens: an estimate of prompt and answer together, for the rate limit; the reply's usage corrects it.

        Raises:
            ApiRefusedError: the endpoint refused; the message has its own words.
            EngineUnavailableError: it could not be reached, or kept refusing for now, until the attempts were spent.
        """
        async with self._session().slots:
            posted = self._retry(lambda client: client.post(path, cast_to=object, body=dict(body)), tokens)
            reply = self._check(await posted)
        self._settle(tokens, reply)
        return reply

    async def stream(self, path: str, body: Mapping[str, Any], tokens: int = 0) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed reply. Retried until it begins; closing the iterator ends the request.

        Raises:
            ApiRefusedError, EngineUnavailableError: as `ask`; the latter also where a stream breaks.
        """
        import openai

        last: dict[str, Any] = {}
        broken = ""
        async with self._session().slots:
            chunks = await self._retry(lambda client: _open(client, path, body), tokens)
            try:
                async with chunks:
                    async for chunk in chunks:
                        last = self._check(chunk)
                        yield last
            except (openai.APIError, ValueError) as error:
                broken = self._redact(f"{type(error).__name__}: {error}")
        if broken:
            raise EngineUnavailableError(f"engine {self.name}: the stream from {self.url} broke: {broken}")
        self._settle(tokens, last)

    async def get(self, path: str) -> dict[str, Any]:
        """The reply to one GET, as JSON; errors as `ask`."""
        async with self._session().slots:
            return self._check(await self._retry(lambda client: client.get(path, cast_to=object), 0))

    async def _retry(self, send: Callable[[Any], Awaitable[Any]], tokens: int) -> Any:
        import openai

        client, until = self._session().client, math.inf
        for attempt in range(self.limits.attempts):
            await self._wait_for_rate(tokens)
            until = self._clock() + self.limits.deadline_s if attempt == 0 else until
            # The client's errors hold its request, and so the key: none of them goes on as a cause or a context.
            try:
                return await send(client)
            except openai.APIStatusError as error:
                failure = self._read_failure(error)
            except (openai.APIConnectionError, ValueError) as error:
                failure = _Failure(self._redact(f"{type(error).__name__}: {error.__cause__ or error}"))
            if isinstance(failure, ApiRefusedError):
                raise failure
            most = min(self.limits.backoff_s * 2.0**attempt, self.limits.backoff_most_s)
            wait = (failure.retry_after_s or 0.0) + self._draw(0.0, most)
            if attempt + 1 == self.limits.attempts or self._clock() + wait > until:
                raise self._give_up(attempt + 1, wait, failure)
            logger.debug("engine %s: %s; next attempt in %.2f s", self.name, failure.message, wait)
            await self._sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _give_up(self, attempts: int, wait: float, failure: _Failure) -> EngineUnavailableError:
        return EngineUnavailableError(
            f"engine {self.name}: {self.url} does not answer. The last of {attempts} attempts: {failure.message}. "
            f"Tried at most {self.limits.attempts} times (engine_args.attempts) within {self.limits.deadline_s:g} s "
            f"(engine_args.deadline_s); the next one would have been due in {wait:.1f} s"
        )

    async def _wait_for_rate(self, tokens: int) -> None:
        wait = max(self._requests.take(1), self._tokens.take(tokens))
        if wait <= 0:
            return
        try:
            await self._sleep(wait)
        except asyncio.CancelledError:
            self._requests.give_back(1)
            self._tokens.give_back(tokens)
            raise

    def _settle(self, tokens: int, reply: Mapping[str, Any]) -> None:
        used = (reply.get("usage") or {}).get("total_tokens")
        if isinstance(used, int):
            self._tokens.give_back(tokens - used)

    def _check(self, reply: Any) -> dict[str, Any]:
        if isinstance(reply, dict):
            return reply
        raise EngineError(
            f"engine {self.name}: {self.url} answered {self._redact(str(reply))[:200]!r}: expected a JSON object; is "
            "this the url of an OpenAI-compatible endpoint (it usually ends in /v1)?"
        )

    def _read_failure(self, error: Any) -> _Failure | ApiRefusedError:
        """What a status means: a failure that may pass, or a refusal."""
        status: int = error.status_code
        body = error.body if isinstance(error.body, dict) else {}
        told = body.get("message") or error.message
        message = self._redact(f"{status}: {told}")
        final = body.get("code") in _FINAL_CODES
        if (status in _RETRIED or status >= 500) and not final:
            return _Failure(message, read_retry_after(error.response.headers))
        advice = _ADVICE.get(status, "").format(key=self.key_env or "api_key_env")
        text = f"engine {self.name}: {self.url} refused with {message}"
        return ApiRefusedError(f"{text}; {advice}" if advice else text, status)

    def _session(self) -> _Session:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            session = _Session(self._connect(), asyncio.Semaphore(self.limits.concurrency), asyncio.Lock())
            self._sessions[loop] = session
        return session

    def _connect(self) -> Any:
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError as error:
            raise EngineError(
                f"engine {self.name}: the package openai is not installed, which speaks to remote endpoints: "
                "pip install 'roro_ray[openai]'"
            ) from error
        own: dict[str, Any] = {}
        if is_loopback(self.url):
            own["http_client"] = DefaultAsyncHttpxClient(trust_env=False)  # no proxy stands before this machine
        return AsyncOpenAI(
            base_url=self.url, api_key=self._read_key(), max_retries=0, timeout=self.limits.timeout_s, **own
        )

    def _read_key(self) -> str:
        key = os.environ.get(self.key_env, "").strip() if self.key_env else ""
        if key:
            return key
        if is_loopback(self.url):
            return "none"
        raise ConfigError(
            f"engine {self.name}: the environment variable {self.key_env or '(api_key_env is empty)'} is not set: it "
            f"must hold the key for {self.url} (pool.models[].api_key_env names it) in every process that asks, on "
            "Ray workers too"
        )

    def _redact(self, text: str) -> str:
        """A message without the key, which some endpoints quote back."""
        key = os.environ.get(self.key_env, "").strip() if self.key_env else ""
        return (text.replace(key, "[key]") if key else text)[:_MAX_MESSAGE_CHARS]


def is_loopback(url: str) -> bool:
    """Whether a url names this very machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open(client: Any, path: str, body: Mapping[str, Any]) -> Awaitable[Any]:
    from openai import AsyncStream

    streamed = {**body, "stream": True}
    opened: Awaitable[Any] = client.post(
        path, cast_to=object, body=streamed, stream=True, stream_cls=AsyncStream[object]
    )
    return opened
