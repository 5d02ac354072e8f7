"""Any OpenAI-compatible endpoint as a model of the pool: vLLM, SGLang and others served elsewhere, or a provider's API.

A step is asked for as a text to complete, or as a chat whose unfinished last message is to be continued (`api_probe`
finds out which the endpoint can). It ends at a stop string, which endpoints cut off; where one does not tell the
delimiter from the end of sequence, the step is taken to end with the delimiter, and the end shows as an empty step.
What an endpoint does not tell stays unknown instead of being made up: no log-probabilities means confidence 0, no
alternatives means entropy NaN. The router then sees 0 for both, and should be trained on what it will see.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.api_client import ApiClient, ApiRefusedError
from roro_ray.engines.api_limits import read_limits
from roro_ray.engines.api_probe import Probe
from roro_ray.engines.api_prompts import ApiTraits, make_chat_format
from roro_ray.engines.api_scoring import score_choices
from roro_ray.engines.api_steps import ApiWriter
from roro_ray.engines.formats import PLAIN, PromptFormat
from roro_ray.engines.pool import make_prices
from roro_ray.engines.protocol import ChoiceScores, EngineFacts, StepDelta, StepRequest, StepResult
from roro_ray.errors import ConfigError, EngineError, did_you_mean

logger = logging.getLogger(__name__)
_MODES = ("auto", "completions", "chat")


class OpenAIEngine:
    """One model of an OpenAI-compatible endpoint behind the `StreamingEngine` protocol.

    The key is read from the environment in the process that asks, and kept nowhere. `engine_args` are `ApiLimits`.

    Raises:
        ConfigError: no url, or a wrong value.
    """

    def __init__(self, model: ModelConfig):
        if not model.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"pool.models[].url of {model.name!r}: got {model.url!r}, expected the address of an OpenAI-compatible "
                "endpoint, such as https://host/v1"
            )
        if model.api_mode not in _MODES:
            raise ConfigError(
                f"pool.models[].api_mode of {model.name!r}: got {model.api_mode!r}, expected one of "
                f"{', '.join(_MODES)}{did_you_mean(model.api_mode, _MODES)}"
            )
        self.name = model.name
        self.model = model
        self.api_model = model.api_model or model.path
        self.limits = read_limits(model.engine_args, model.name)
        self.client = ApiClient(model.name, model.url, model.api_key_env, self.limits)
        self._facts: EngineFacts | None = None
        self._writer: ApiWriter | None = None

    @classmethod
    def from_config(cls, model: ModelConfig, pool: PoolConfig) -> OpenAIEngine:
        """The engine that a model of the pool names; the endpoint is not asked yet."""
        return cls(model)

    @property
    def traits(self) -> ApiTraits | None:
        """What the endpoint was found to do; None before `ready`."""
        return self._writer.traits if self._writer is not None else None

    async def ready(self) -> EngineFacts:
        """Find out how the endpoint continues a step; again at no cost.

        Raises:
            ConfigError: the key is missing.
            EngineError: the endpoint refuses key or model, or cannot continue an unfinished answer.
            EngineUnavailableError: it cannot be reached.
        """
        if self._facts is None:
            self.client.check_key()
            async with self.client.lock:
                if self._facts is None:
                    self._facts = await self._find_out()
        return self._facts

    async def _find_out(self) -> EngineFacts:
        began = time.perf_counter()
        model, limits = self.model, self.limits
        traits, format, reason = await self._choose_mode()
        self._writer = ApiWriter(self.client, self.api_model, traits, model.format == "plain", format.thinks)
        way = traits.style or "completions"
        logger.info(
            "engine %s: %s at %s continues steps by %s%s; log-probabilities: %s",
            *(self.name, self.api_model, model.url, way, f" ({reason})" if reason else ""),
            "none" if traits.top_logprobs < 0 else f"with {traits.top_logprobs} alternatives",
        )
        identity = json.dumps([model.url, self.api_model, way, format.open(""), format.close()])
        return EngineFacts(
            name=self.name,
            model=f"{self.api_model} at {model.url} ({way})",
            device="remote",
            parameters=int(limits.parameters),
            flops_per_token=2.0 * (limits.active_parameters or limits.parameters),
            seconds=time.perf_counter() - began,
            fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16],
            format=format,
            prices=make_prices(model),
            max_context=model.max_context or await self._read_context(),
        )

    async def _choose_mode(self) -> tuple[ApiTraits, PromptFormat, str]:
        """Traits, format, and why it is no completions where those come first."""
        mode, reason = self.model.api_mode, ""
        if mode != "chat":
            try:
                format = await asyncio.to_thread(self._make_text_format)
                probe = self._make_probe(format.thinks)
                return await probe.find_completions(format.open("Hello.")), format, ""
            except EngineError as error:
                final = isinstance(error, ApiRefusedError) and error.status in (401, 403)
                if mode == "completions" or final or not isinstance(error, ApiRefusedError):
                    raise
                reason = f"no completions: {error}"
            except ConfigError as error:
                if mode == "completions":
                    raise
                reason = f"no prompt format for completions: {error}"
                logger.warning("engine %s: %s; trying chat", self.name, reason)
        thinks = self.model.thinking == "on"
        try:
            return await self._make_probe(thinks).find_chat(), make_chat_format(thinks), reason
        except EngineError as error:
            if not reason or isinstance(error, ApiRefusedError):
                raise
            raise EngineError(f"{error}; {reason}") from None

    def _make_probe(self, thinks: bool) -> Probe:
        plain = self.model.format == "plain"
        return Probe(self.client, self.api_model, plain, thinks, self.limits.top_logprobs)

    def _make_text_format(self) -> PromptFormat:
        """The format of a text to complete: the template of the tokenizer that `path` names.

        Raises:
            ConfigError: the tokenizer cannot be had here, or has no template.
        """
        if self.model.format == "plain":
            return PLAIN
        from roro_ray.engines.formats import make_format
        from roro_ray.engines.loading import load_tokenizer

        try:
            tokenizer = load_tokenizer(self.model.path, self.model.revision)
        except EngineError as error:
            raise ConfigError(f"{error} (completions with format=chat need the tokenizer that path names)") from error
        return make_format(tokenizer, self.model.format, self.model.thinking)

    async def _read_context(self) -> int | None:
        """The longest prompt and answer, which vLLM tells with its models."""
        try:
            models = (await self.client.get("/models")).get("data") or []
        except EngineError:
            return None
        found = [entry.get("max_model_len") for entry in models if entry.get("id") == self.api_model]
        return found[0] if found and isinstance(found[0], int) else None

    async def generate_step(self, request: StepRequest) -> StepResult:
        """Write one step, in as many requests as it takes.

        Raises:
            EngineError: the endpoint refuses the request.
            EngineUnavailableError: it cannot be reached, or keeps refusing.
        """
        writer = await self._ready_writer()
        async with aclosing(writer.write(request, live=False)) as parts:
            async for part in parts:
                if isinstance(part, StepResult):
                    return part
        raise AssertionError("unreachable: a step ends with its result")

    async def stream_step(self, request: StepRequest) -> AsyncIterator[StepDelta | StepResult]:
        """Write one step and tell it meanwhile; closing the iterator ends the request at the endpoint.

        Raises:
            EngineError, EngineUnavailableError: as `generate_step`; the latter also where the stream breaks.
        """
        writer = await self._ready_writer()
        async with aclosing(writer.write(request, live=True)) as parts:
            async for part in parts:
                yield part

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """Score continuations: any text where the endpoint scores a prompt, else one word by the next token.

        Raises:
            EngineError: the endpoint tells neither, or not of these choices.
            EngineUnavailableError: it cannot be reached.
        """
        writer = await self._ready_writer()
        return await score_choices(writer, prefix, tuple(choices), adapter)

    async def _ready_writer(self) -> ApiWriter:
        await self.ready()
        assert self._writer is not None  # made with the facts
        return self._writer
