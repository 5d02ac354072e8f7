"""Scoring given continuations at an endpoint: by its log-probabilities of a prompt, or of the next token.

Only an endpoint that completes texts and echoes them with log-probabilities (vLLM does) can score any text. Elsewhere a
one-word verdict can still be read from the alternatives of the next token.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

from roro_ray.engines.api_client import FIELD_REFUSALS, ApiRefusedError
from roro_ray.engines.api_replies import Reply, TokenScore
from roro_ray.engines.api_steps import ApiWriter
from roro_ray.engines.protocol import ChoiceScores
from roro_ray.errors import EngineError

Scores = list[TokenScore]


async def score_choices(writer: ApiWriter, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
    """Score choices in whichever way the endpoint can.

    Raises:
        EngineError: it tells no log-probabilities, or not of these choices.
    """
    traits = writer.traits
    if traits.top_logprobs >= 0 and traits.echoes and not traits.style:
        try:
            return await _score_by_echo(writer, prefix, choices, adapter)
        except ApiRefusedError as error:
            if error.status not in FIELD_REFUSALS:
                raise
            writer.traits = replace(traits, echoes=False)
    if traits.top_logprobs <= 0:
        raise EngineError(
            f"engine {writer.client.name}: {writer.client.url} tells "
            f"{'no log-probabilities' if traits.top_logprobs < 0 else 'no alternatives (top_logprobs)'}, and so cannot "
            "score choices: use another endpoint or engine for the model that judges"
        )
    return await _score_by_next_token(writer, prefix, choices, adapter)


async def _score_by_echo(writer: ApiWriter, prefix: str, choices: tuple[str, ...], adapter: str) -> ChoiceScores:
    """Each choice by a request that echoes prefix and choice."""
    # One token is written for nothing: not every server takes max_tokens=0.
    options = {"echo": True, "logprobs": 1}
    replies = await asyncio.gather(*(writer.ask(prefix + choice, options, adapter) for choice in choices))
    found = [_read_echo(reply, choice) for reply, choice in zip(replies, choices, strict=True)]
    return ChoiceScores(
        tuple(sum(score.log_prob for score in scores) for scores, _ in found),
        tuple(len(scores) for scores, _ in found),
        tuple(min((score.log_prob for score in scores), default=0.0) for scores, _ in found),
        max((length for _, length in found), default=0),
    )


def _read_echo(reply: Reply, choice: str) -> tuple[Scores, int]:
    """The scores of the choice's tokens, and the number of tokens before them."""
    written = 1 if reply.completion_tokens is None else reply.completion_tokens
    scores = reply.scores[: len(reply.scores) - written]
    spelt, first = "", len(scores)
    while first and len(spelt) < len(choice):
        first -= 1
        spelt = scores[first].text + spelt
    if not spelt.endswith(choice):
        raise EngineError(
            f"an echoed prompt ends with {spelt[-40:]!r}, expected the choice {choice[:40]!r}: this endpoint does not "
            "score a prompt; use another engine for the model that judges"
        )
    before = (reply.prompt_tokens or len(scores)) - (len(scores) - first)
    return scores[first:], before


async def _score_by_next_token(writer: ApiWriter, prefix: str, choices: tuple[str, ...], adapter: str) -> ChoiceScores:
    """Score one-word choices by the alternatives of the next token.

    Of a choice that is not among the alternatives the log-probability is the least that was told, which bounds its own
    from above.

    Raises:
        EngineError: none of the choices is among the alternatives, or one is longer than a word.
    """
    reply = await writer.ask(prefix, {}, adapter)
    top = reply.scores[0].top if reply.scores else ()
    if not top:
        raise EngineError("the endpoint told no alternatives of the next token (top_logprobs): it cannot score choices")
    found = [_find(choice, top) for choice in choices]
    if all(value is None for value in found):
        told = ", ".join(repr(text) for text, _ in top[:5])
        raise EngineError(
            f"none of the choices {', '.join(map(repr, choices))} is among the likeliest next tokens ({told}, ..): an "
            "endpoint without echo can score one-word choices only; say in the prompt that one of them must follow"
        )
    least = min(value for _, value in top)
    logs = tuple(least if value is None else value for value in found)
    return ChoiceScores(logs, (1,) * len(logs), logs, reply.prompt_tokens or 0)


def _find(choice: str, top: tuple[tuple[str, float], ...]) -> float | None:
    """The log-probability of a word, with or without the space before it."""
    word = choice.strip()
    if not word or len(word.split()) > 1:
        raise EngineError(
            f"choice {choice!r} is not one word: an endpoint without echo can score one-word choices only"
        )
    same = [value for text, value in top if text.strip(" \u2581\u0120") == word]
    return math.log(sum(math.exp(value) for value in same)) if same else None
