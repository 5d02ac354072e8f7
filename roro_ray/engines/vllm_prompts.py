"""From requests to the token ids that vLLM is given, checked before they are queued with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from roro_ray.engines.protocol import StepRequest, check_limits
from roro_ray.engines.text import StepText
from roro_ray.errors import EngineError


@dataclass(frozen=True, slots=True)
class StepPrompt:
    """The ids of a prefix, of which the engine encoded the last `encoded` itself."""

    ids: tuple[int, ...]
    encoded: int


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Encodes for the engine of that name, whose model takes at most `max_context` tokens (None: any number)."""

    engine: str
    tokenizer: PreTrainedTokenizerBase
    text: StepText
    max_context: int | None

    def read_step(self, request: StepRequest) -> StepPrompt:
        """The ids of a request's prefix: those that are known, and of the rest those that follow them.

        Raises:
            EngineError: an id that the model does not embed, or more tokens than it takes.
        """
        known = request.known
        if known is None:
            ids = self.text.encode([request.prefix])[0]
            encoded = len(ids)
        else:
            tail = request.prefix[known.characters :].encode("utf-8", "replace").decode("utf-8")
            new = self.tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
            ids, encoded = [*known.ids, *new], len(new)
        self._check([*ids, *request.kept_ids], len(ids) + request.max_tokens)
        return StepPrompt(tuple(ids), encoded)

    def read_choices(self, prefix: str, choices: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """The ids of a prefix and of each continuation.

        Raises:
            EngineError: as `read_step`.
        """
        (ids,) = self.text.encode([prefix])
        found = [self.text.encode_continuation(prefix, ids, choice) for choice in choices]
        self._check(
            [*ids, *(token for choice in found for token in choice)], len(ids) + max(map(len, found), default=0)
        )
        return ids, found

    def _check(self, ids: Sequence[int], length: int) -> None:
        vocabulary = self.text.vocabulary
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise EngineError(
                f"engine {self.engine}: token id {max(ids, default=-1)} lies beyond the {vocabulary} tokens that the "
                "model embeds: known and kept ids must come from an engine with this tokenizer, and text must not use "
                "tokens that were added to the tokenizer alone"
            )
        if self.max_context is not None and length > self.max_context:
            raise EngineError(
                f"engine {self.engine}: prefix and step may take {length} tokens, more than the model's "
                f"{self.max_context} positions: lower episode.max_step_tokens or episode.max_steps, or take a model "
                "with a longer context"
            )


def check_request(engine: str, request: StepRequest) -> None:
    """Refuse limits that contradict each other, and ids of more than the prefix.

    Raises:
        EngineError: names the values.
    """
    check_limits(engine, request)
    if request.known is not None and request.known.characters > len(request.prefix):
        raise EngineError(
            f"engine {engine}: the ids of {request.known.characters} characters are given, but the prefix has "
            f"{len(request.prefix)}: expected the ids of its beginning"
        )
