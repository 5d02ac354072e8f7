"""Fields of OpenAI's chat schema that this endpoint cannot honour: refused by name, never ignored.

Each is taken where its value asks for nothing (its neutral value, or null), since clients and frameworks send such
defaults; anything else is a 400 with the field as `param`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.fields import Fields
from serve.problems import bad_request


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A field that is refused: the values that ask for nothing, and what to do instead."""

    reason: str
    neutral: tuple[Any, ...] = ()


_NO_TOOLS = "This endpoint routes reasoning steps and calls no tools"
_NO_AUDIO = "This endpoint reads and writes text only"
_CACHE = "Prefixes are cached on their own, without being told"

UNSUPPORTED: dict[str, Unsupported] = {
    "audio": Unsupported(_NO_AUDIO),
    "frequency_penalty": Unsupported("Penalties would change every step's distribution", (0,)),
    "function_call": Unsupported(_NO_TOOLS, ("none",)),
    "functions": Unsupported(_NO_TOOLS, ([],)),
    "logit_bias": Unsupported("Models of a pool have different tokens", ({},)),
    "logprobs": Unsupported("Ask for routing.trace, which has each step's confidence", (False,)),
    "modalities": Unsupported(_NO_AUDIO, (["text"],)),
    "moderation": Unsupported("Nothing is moderated here"),
    # Without tools there is nothing to call in parallel, so that both values hold.
    "parallel_tool_calls": Unsupported(_NO_TOOLS, (True, False)),
    "prediction": Unsupported("Predicted outputs are not used"),
    "presence_penalty": Unsupported("Penalties would change every step's distribution", (0,)),
    "prompt_cache_key": Unsupported(_CACHE),
    "prompt_cache_options": Unsupported(_CACHE),
    "prompt_cache_retention": Unsupported(_CACHE, ("in_memory",)),
    "reasoning_effort": Unsupported("Use routing.cost_weight or routing.target to say what may be spent"),
    "response_format": Unsupported("Only plain text is written", ({"type": "text"},)),
    "service_tier": Unsupported("There is one tier", ("auto", "default")),
    "store": Unsupported("Completions are not stored for clients", (False,)),
    "tool_choice": Unsupported(_NO_TOOLS, ("none",)),
    "tools": Unsupported(_NO_TOOLS, ([],)),
    "top_logprobs": Unsupported("Ask for routing.trace, which has each step's confidence", (0,)),
    "verbosity": Unsupported("Length is set by max_tokens and stop", ("medium",)),
    "web_search_options": Unsupported("There is no search"),
}

# Fields of an assistant's message, as a client hands an earlier answer back.
UNSUPPORTED_IN_MESSAGE: dict[str, Unsupported] = {
    "annotations": Unsupported("Annotations are not read", ([],)),
    "audio": Unsupported(_NO_AUDIO),
    "function_call": Unsupported(_NO_TOOLS),
    "name": Unsupported("Names of participants are not read; put the name into the content"),
    "refusal": Unsupported("Refusals are not read"),
    "tool_call_id": Unsupported(_NO_TOOLS),
    "tool_calls": Unsupported(_NO_TOOLS, ([],)),
}

UNSUPPORTED_IN_STREAM: dict[str, Unsupported] = {
    "include_obfuscation": Unsupported("Chunks are not padded", (False,)),
}


def refuse_unsupported(fields: Fields, table: Mapping[str, Unsupported]) -> None:
    """Refuse every field of the table that asks for something.

    Raises:
        ApiError: 400 with the field's path as `param`.
    """
    for name, rule in table.items():
        value = fields.get(name)
        if value is None or any(_same(value, neutral) for neutral in rule.neutral):
            continue
        param = fields.param(name)
        allowed = f" (only {_list_values(rule.neutral)} is taken)" if rule.neutral else ""
        raise bad_request(f"{param} is not supported{allowed}. {rule.reason}.", param, "unsupported_parameter")


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON values: false is not 0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _list_values(values: tuple[Any, ...]) -> str:
    return " or ".join("true" if v is True else "false" if v is False else str(v).replace("'", '"') for v in values)
