"""How a step is asked of an endpoint: as a text to complete, or as a chat whose last message is to be continued.

A chat endpoint renders its own template, so the engine's format has marks in place of one: by them the text so far is
taken apart again into the user's message and the unfinished answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from roro_ray.engines.formats import PromptFormat

Body = dict[str, Any]
_USER, _ASSISTANT = "<|roro:user|>", "<|roro:assistant|>"
_THINK, _THINK_CLOSE = "<think>\n", "</think>"
# How an endpoint is told to go on with the last message: by a field of the request (vLLM, SGLang, TGI, our own), by one
# of the message (DeepSeek, LiteLLM), or not at all (endpoints that do it anyway).
CONTINUE_FIELD, PREFIX_FIELD, TRAILING = "continue_final_message", "prefix", "trailing"
STYLES = (CONTINUE_FIELD, PREFIX_FIELD, TRAILING)
_TOP_LOGPROBS = (5, 0, -1)  # asked for one after the other where an endpoint refuses more


@dataclass(frozen=True, slots=True)
class ApiTraits:
    """What an endpoint was found to do.

    `style` is how it continues a chat's last message (empty: it completes texts). `top_logprobs` alternatives come with
    each token; -1: no log-probabilities at all. `trims`: it drops white space at the end of the text to be continued.
    `tells_stop`: it tells stop strings from the end of sequence. `seeds`, `bare` (it can be told to add no special
    tokens), `no_think` (its template can be told to open no thinking block), `echoes` (it scores a prompt), `schemas`
    and `usage` (in streams): whether it takes these. `new_limit`: it calls the limit of tokens max_completion_tokens.
    """

    style: str = ""
    top_logprobs: int = 20
    seeds: bool = True
    bare: bool = True
    no_think: bool = True
    echoes: bool = True
    schemas: bool = True
    usage: bool = True
    trims: bool = False
    tells_stop: bool = False
    new_limit: bool = False

    @property
    def path(self) -> str:
        """Below the endpoint's url."""
        return "/chat/completions" if self.style else "/completions"

    def weaken(self, message: str) -> ApiTraits | None:
        """The same without what a refusal names, or without the next thing that can be left out; None: nothing is left.

        Args:
            message: the refusal, which often quotes the field that it does not take.
        """
        named = [
            ("max_completion_tokens" in message and not self.new_limit, replace(self, new_limit=True)),
            ("logprobs" in message and self.top_logprobs >= 0, self._fewer_logprobs()),
            ("seed" in message and self.seeds, replace(self, seeds=False)),
            ("add_special_tokens" in message and self.bare, replace(self, bare=False)),
            ("chat_template_kwargs" in message and self.no_think, replace(self, no_think=False)),
        ]
        unnamed = [
            (self.no_think, replace(self, no_think=False)),
            (self.bare, replace(self, bare=False)),
            (self.top_logprobs >= 0, self._fewer_logprobs()),
            (self.seeds, replace(self, seeds=False)),
        ]
        return next((weaker for applies, weaker in (*named, *unnamed) if applies), None)

    def _fewer_logprobs(self) -> ApiTraits:
        return replace(self, top_logprobs=next(few for few in _TOP_LOGPROBS if few < max(self.top_logprobs, 0)))


def make_chat_format(thinks: bool) -> PromptFormat:
    """A format of marks, for endpoints that render their own template."""
    return PromptFormat(
        before=_USER,
        after=_ASSISTANT + (_THINK if thinks else ""),
        think_close=_THINK_CLOSE if thinks else "",
        special=(_USER, _ASSISTANT, *((_THINK.strip(), _THINK_CLOSE) if thinks else ())),
    )


def split_chat(prefix: str) -> tuple[str, str]:
    """(user's message, unfinished answer) of a text in the format above; a text without marks is the user's."""
    if not prefix.startswith(_USER):
        return prefix, ""
    user, _, answer = prefix.removeprefix(_USER).partition(_ASSISTANT)
    return user, answer


def make_prompt(traits: ApiTraits, prefix: str, plain: bool, thinks: bool) -> Body:
    """The part of a request that says what is to be continued.

    Args:
        plain: the prompt spells no control tokens, so that the tokenizer is to add its own.
        thinks: the answer begins with a thinking block.
    """
    if not traits.style:
        return {"prompt": prefix} | ({"add_special_tokens": plain} if traits.bare else {})
    user, answer = split_chat(prefix)
    body: Body = {"messages": [{"role": "user", "content": user}]}
    if traits.no_think and not thinks:
        body["chat_template_kwargs"] = {"enable_thinking": False}
    if not answer:
        return body
    message: Body = {"role": "assistant", "content": answer.rstrip() if traits.trims else answer}
    if traits.style == PREFIX_FIELD:
        message["prefix"] = True
    if traits.style == CONTINUE_FIELD:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    body["messages"].append(message)
    return body


def make_options(traits: ApiTraits, max_tokens: int, temperature: float, top_p: float, seed: int) -> Body:
    """The part of a request that says how to decode."""
    body: Body = {"max_completion_tokens" if traits.new_limit else "max_tokens": max_tokens, "temperature": temperature}
    if temperature > 0 and top_p < 1:
        body["top_p"] = top_p
    if traits.seeds:
        body["seed"] = seed % 2**31  # some servers keep it in 32 bits
    if traits.top_logprobs >= 0:
        if not traits.style:
            body["logprobs"] = max(traits.top_logprobs, 1)  # 0 is "none" for some
        else:
            body |= {"logprobs": True} | ({"top_logprobs": traits.top_logprobs} if traits.top_logprobs else {})
    return body


def make_schema(schema: Any) -> Body:
    """The part of a request that asks for JSON under a schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}}
