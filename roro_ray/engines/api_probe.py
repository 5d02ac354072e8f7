"""Finding out what an endpoint does, by asking: a handful of requests of one token each, and by refusals.

What matters most is whether a step can be continued at all. A chat endpoint that closes the unfinished answer and
begins a new one would return steps that look like steps, and be wrong in silence. So an endpoint is used only where it
reads the field that asks for it (it refuses a value of a wrong type), or is seen to finish a word cut in two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from roro_ray.engines.api_client import FIELD_REFUSALS, ApiClient, ApiRefusedError
from roro_ray.engines.api_prompts import (
    CONTINUE_FIELD,
    PREFIX_FIELD,
    STYLES,
    ApiTraits,
    Body,
    make_chat_format,
    make_options,
    make_prompt,
)
from roro_ray.engines.api_replies import Reply
from roro_ray.errors import EngineError

_QUESTION = "Count from 1 to 9."
_BEGUN = "1, 2, 3"  # ends with a digit: no tokenizer glues a blank line to one
_SENTENCE = "The quick brown fox jumps over the lazy dog."
_CUT = _SENTENCE.index("mps")
_NO_CONTINUATION = (
    "a router needs an endpoint that goes on with an unfinished answer. Use one with /v1/completions (vLLM, SGLang and "
    "llama.cpp have it; set path to the model's tokenizer and format=chat), or with a chat that continues the last "
    "message (continue_final_message, or prefix: true as DeepSeek's /beta)"
)


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks one endpoint about one model. `plain` and `thinks` as in `make_prompt`."""

    client: ApiClient
    model: str
    plain: bool
    thinks: bool
    top_logprobs: int

    async def find_completions(self, prompt: str) -> ApiTraits:
        """What the endpoint does with texts to complete.

        Raises:
            ApiRefusedError: it does not complete texts, or not with this model.
        """
        start = ApiTraits(top_logprobs=self.top_logprobs)
        traits, reply = await self._settle(start, prompt)
        return replace(traits, tells_stop=reply.tells_stop)

    async def find_chat(self) -> ApiTraits:
        """How the endpoint continues an unfinished answer.

        Raises:
            ApiRefusedError: the key or the model is refused.
            EngineError: it cannot continue one, says why for each way tried.
        """
        format = make_chat_format(self.thinks)
        begun = format.open(_QUESTION) + _BEGUN
        refused: list[str] = []
        taken: list[tuple[ApiTraits, Reply]] = []
        for style in STYLES:
            try:
                traits, reply = await self._settle(ApiTraits(style=style, top_logprobs=self.top_logprobs), begun)
            except ApiRefusedError as error:
                if error.status not in FIELD_REFUSALS:
                    raise
                refused.append(f"{style}: {error}")
                continue
            self._check_thought(reply)
            if await self._reads_field(traits, begun):
                return await self._complete(traits, begun, reply)
            taken.append((traits, reply))
        for traits, reply in reversed(taken):  # the plain way first: a field that is not read says nothing
            found = await self._finish_word(traits)
            if found.startswith(_SENTENCE[_CUT : _CUT + 3]):
                return await self._complete(traits, begun, reply)
            refused.append(f"{traits.style}: taken, but {_SENTENCE[:_CUT]!r} went on with {found[:40]!r}")
        raise EngineError(
            f"engine {self.client.name}: {self.client.url} continues no answer ({'; '.join(refused)}): "
            f"{_NO_CONTINUATION}"
        )

    async def _complete(self, traits: ApiTraits, begun: str, reply: Reply) -> ApiTraits:
        """What else there is to know of an endpoint that continues an answer."""
        traits = replace(traits, tells_stop=reply.tells_stop, trims=await self._trims(traits, begun, reply))
        if self.thinks:
            await self._check_thinking(traits, begun)
        return traits

    async def _settle(self, traits: ApiTraits, prefix: str) -> tuple[ApiTraits, Reply]:
        """Leave out what the endpoint refuses, one thing after the other, until it answers."""
        while True:
            try:
                return traits, await self._ask(traits, prefix)
            except ApiRefusedError as error:
                weaker = traits.weaken(str(error)) if error.status in FIELD_REFUSALS else None
                if weaker is None:
                    raise
                traits = weaker

    async def _ask(self, traits: ApiTraits, prefix: str, tokens: int = 1, more: Body | None = None) -> Reply:
        reply = Reply()
        reply.add(await self._post(traits, prefix, tokens, more))
        return reply

    async def _post(
        self, traits: ApiTraits, prefix: str, tokens: int = 1, more: Body | None = None
    ) -> Mapping[str, Any]:
        body = {
            "model": self.model,
            **make_prompt(traits, prefix, self.plain, self.thinks),
            **make_options(traits, tokens, 0.0, 1.0, 0),
            **(more or {}),
        }
        return await self.client.ask(traits.path, body)

    async def _reads_field(self, traits: ApiTraits, begun: str) -> bool:
        """Whether the endpoint refuses nonsense in the field that asks for continuation."""
        body = make_prompt(traits, begun, self.plain, self.thinks)
        if traits.style == CONTINUE_FIELD:
            wrong: Body = {CONTINUE_FIELD: "neither"}
        elif traits.style == PREFIX_FIELD:
            *others, last = body["messages"]
            wrong = {"messages": [*others, {**last, PREFIX_FIELD: "neither"}]}
        else:
            return False
        try:
            await self._ask(traits, begun, more=wrong)
        except ApiRefusedError as error:
            return error.status in FIELD_REFUSALS
        return False

    async def _finish_word(self, traits: ApiTraits) -> str:
        """What follows half a word of a sentence that is to be repeated."""
        asked = f"Repeat this sentence exactly, and write nothing else: {_SENTENCE}"
        prefix = make_chat_format(self.thinks).open(asked) + _SENTENCE[:_CUT]
        return (await self._ask(traits, prefix, tokens=8)).text

    async def _trims(self, traits: ApiTraits, begun: str, reply: Reply) -> bool:
        """Whether the blank line behind a finished step is lost on the way, or refused."""
        try:
            longer = await self._ask(traits, begun + "\n\n")
        except ApiRefusedError as error:
            if error.status not in FIELD_REFUSALS:
                raise
            return True
        return reply.prompt_tokens is not None and longer.prompt_tokens == reply.prompt_tokens

    def _check_thought(self, reply: Reply) -> None:
        if reply.thought:
            raise EngineError(
                f"engine {self.client.name}: {self.client.url} separates thinking from the answer, and only the answer "
                "can be continued: start the server without a reasoning parser, or use a model that does not think"
            )

    async def _check_thinking(self, traits: ApiTraits, begun: str) -> None:
        """Refuse an endpoint whose template drops a closed thinking block, or puts an empty one before an open one."""
        advice = "with thinking=on use api_mode=completions, and set path to the model's tokenizer; or set thinking=off"
        closed = begun + make_chat_format(True).close() + _BEGUN
        try:
            await self._ask(traits, closed)
        except ApiRefusedError as error:
            raise EngineError(
                f"engine {self.client.name}: the chat template of {self.client.url} does not let an answer go on "
                f"behind its thinking block: {advice} ({error})"
            ) from None
        try:
            told = await self._post(traits, begun, more={"prompt_logprobs": 0})
        except ApiRefusedError:
            return  # not a server that shows what it rendered
        rendered = _read_prompt(told.get("prompt_logprobs"))
        if rendered.count("<think>") > 1:
            raise EngineError(
                f"engine {self.client.name}: the chat template of {self.client.url} opens a thinking block of its own "
                f"before the unfinished one: {advice}"
            )


def _read_prompt(prompt_logprobs: Any) -> str:
    """The rendered prompt, as vLLM shows it with `prompt_logprobs`."""
    if not isinstance(prompt_logprobs, list):
        return ""
    tokens = [next(iter(each.values())) for each in prompt_logprobs if isinstance(each, Mapping) and each]
    return "".join(str(token.get("decoded_token", "")) for token in tokens if isinstance(token, Mapping))
