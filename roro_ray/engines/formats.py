"""How a model wants a query and an unfinished answer written down: its chat template, taken apart once.

A template is a program, and a router needs it hundreds of times an episode, in processes that have no tokenizer. So it
is rendered once round a mark, and what stands before and behind the mark is kept: two strings that travel with the
engine's facts. An unfinished assistant turn is then continued by writing the steps behind them, and a thinking block
that is open stays open instead of being opened again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roro_ray.config import STEP_DELIMITER
from roro_ray.errors import ConfigError, did_you_mean

if TYPE_CHECKING:  # whoever only reads a format needs no tokenizer library
    from transformers import PreTrainedTokenizerBase

FORMATS = ("plain", "chat")
THINKING = ("auto", "on", "off")
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_MARK = "@@query@@"


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """What stands before the query, between query and first step, and between thinking and final answer.

    `think_close` ends the thinking block (empty: the model has none), `conclusion` follows it before the final answer.
    `special` are the texts of control tokens, which are taken out of queries: a user's text must not end his turn.
    """

    before: str = ""
    after: str = STEP_DELIMITER
    think_close: str = ""
    conclusion: str = STEP_DELIMITER
    special: tuple[str, ...] = ()

    @property
    def thinks(self) -> bool:
        """Whether the answer begins with a thinking block, behind which the final answer stands."""
        return bool(self.think_close)

    def open(self, query: str) -> str:
        """The text up to the first step."""
        return self.before + self._without_control(query) + self.after

    def close(self, thinking: Sequence[str] = ()) -> str:
        """The text that ends the thinking block and opens the final answer."""
        return "".join(thinking) + self.think_close + self.conclusion

    def _without_control(self, query: str) -> str:
        found = True
        while found:  # taking one out may put another together
            found = False
            for token in self.special:
                if token in query:
                    query, found = query.replace(token, ""), True
        return query


PLAIN = PromptFormat()


def make_format(tokenizer: PreTrainedTokenizerBase, kind: str = "plain", thinking: str = "auto") -> PromptFormat:
    """How a model with this tokenizer wants its prompt.

    `kind` is `plain` (query, blank line, steps) or `chat` (the tokenizer's chat template). `thinking` says whether the
    answer begins with a thinking block: `auto` where vocabulary and template know one. A template that leaves opening
    the block to the model has it opened here, as DeepSeek advises for its distills; one that opens it although there
    shall be none has it closed at once.

    Raises:
        ConfigError: an unknown kind; a thinking block for a model without one; no chat template, or a broken one.
    """
    for key, value, allowed in (("format", kind, FORMATS), ("thinking", thinking, THINKING)):
        if value not in allowed:
            raise ConfigError(
                f"unknown {key} {value!r}: expected one of {', '.join(allowed)}{did_you_mean(value, allowed)}; set "
                f"pool.models[].{key}"
            )
    if kind == "plain":
        if thinking == "on":
            raise ConfigError(
                "format=plain and thinking=on: only a chat template opens a thinking block; set format=chat"
            )
        return PLAIN
    template = _find_template(tokenizer)
    thinks = _decide_thinking(tokenizer, template, thinking)
    before, after = _render(tokenizer, thinks)
    if thinks != _is_open(after):
        after += f"{THINK_OPEN}\n" if thinks else f"\n{THINK_CLOSE}\n\n"
    return PromptFormat(
        before=before,
        after=after,
        think_close=THINK_CLOSE if thinks else "",
        special=_find_control_tokens(tokenizer, template),
    )


def _find_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(
            f"format=chat, but the tokenizer of {tokenizer.name_or_path!r} has no chat template "
            f"({str(error).split('. ')[0].splitlines()[0]}): set format=plain, or take the model's instruction-tuned "
            "version"
        ) from error


def _decide_thinking(tokenizer: PreTrainedTokenizerBase, template: str, thinking: str) -> bool:
    has_tokens = {THINK_OPEN, THINK_CLOSE} <= tokenizer.get_vocab().keys()
    if thinking == "on" and not has_tokens:
        raise ConfigError(
            f"thinking=on, but the vocabulary of {tokenizer.name_or_path!r} has no {THINK_OPEN} and {THINK_CLOSE}: set "
            "thinking=off (or auto), or take a reasoning model"
        )
    # Families share a vocabulary among models that think and models that do not.
    is_named = THINK_CLOSE in template or "enable_thinking" in template
    return thinking == "on" or (thinking == "auto" and has_tokens and is_named)


def _render(tokenizer: PreTrainedTokenizerBase, thinks: bool) -> tuple[str, str]:
    """What a template writes before a query, and between it and the answer."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinks,  # Qwen3 and its like
            thinking=thinks,  # DeepSeek V3.1 and its like
        )
        before, after = str(text).split(_MARK)  # once, or the template does more than write it down
    except Exception as error:  # border: a template is somebody's program
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} cannot write down one user message "
            f"({type(error).__name__}: {error}): mend tokenizer_config.json or set format=plain"
        ) from error
    return before, after


def _is_open(after: str) -> bool:
    return after.rfind(THINK_OPEN) > after.rfind(THINK_CLOSE)


def _find_control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    """Tokens that steer: those marked so, and those that the template speaks in (DeepSeek's roles are not marked)."""
    added = {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special or token.content in template
    }
    found = {*added, *tokenizer.all_special_tokens, *({THINK_OPEN, THINK_CLOSE} & tokenizer.get_vocab().keys())}
    return tuple(sorted((token for token in found if token.strip()), key=lambda token: (-len(token), token)))
