"""Between text and token ids, and where a step ends.

A step ends where its *text* contains the delimiter, since tokenizers cut a blank line into one token, into two, or
glue it to a full stop. Decoding the step after every token would cost more than the model does, so a table says
which tokens can end a step at all, and only those are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from roro_ray.config import STEP_DELIMITER
from roro_ray.errors import EngineError

HALF_CHARACTER = "\ufffd"  # what tokenizers render bytes as that make no character (yet)


class StepText:
    """One tokenizer, its end-of-sequence ids and the vocabulary size of the model that it feeds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int], vocabulary: int):
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            # A tokenizer.json may ask for truncation or padding, which would change a prefix in silence.
            self._backend.no_truncation()
            self._backend.no_padding()
        self.vocabulary = vocabulary
        tokens = range(min(len(tokenizer), vocabulary))
        pieces = tokenizer.batch_decode([[token] for token in tokens], skip_special_tokens=False)
        characters = set(STEP_DELIMITER)
        self.may_end = [not characters.isdisjoint(piece) for piece in pieces] + [False] * (vocabulary - len(pieces))
        for token in self._eos_ids:
            self.may_end[token] = True
        # Tokenizers with byte fallback render a run of byte tokens as characters only if the whole run is valid.
        # This byte never is: rendered behind a step, it shows which characters a later byte could still undo.
        spoiler = tokenizer.get_vocab().get("<0xFF>")
        self._spoiler = [spoiler] if spoiler is not None and self.render([spoiler]) == HALF_CHARACTER else []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, with whatever the tokenizer puts in front of a text; never empty."""
        # A lone surrogate is no text that a tokenizer takes.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        if self._backend is not None:
            found = [encoding.ids for encoding in self._backend.encode_batch_fast(clean)]
        else:
            found = [list(self._tokenizer(text)["input_ids"]) for text in clean]
        return [ids or self._opening() for ids in found]

    def encode_continuation(self, prefix: str, prefix_ids: list[int], choice: str) -> list[int]:
        """Token ids of `choice` where it follows `prefix`: as the whole text is cut, if the prefix is cut alike."""
        if not choice:
            return []
        whole = self.encode([prefix + choice])[0]
        if prefix and len(whole) > len(prefix_ids) and whole[: len(prefix_ids)] == prefix_ids:
            return whole[len(prefix_ids) :]
        clean = choice.encode("utf-8", "replace").decode("utf-8")
        return list(self._tokenizer(clean, add_special_tokens=False)["input_ids"])

    def render(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens written out (a model's own markers are part of its text)."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def certain(self, ids: Sequence[int]) -> str:
        """What no further token can change of the text of an unfinished step.

        Bytes that are not yet a character are rendered as replacement characters at the end, and the beginning of a
        delimiter may become one: both are left out.
        """
        text = self.render([*ids, *self._spoiler]).split(STEP_DELIMITER, 1)[0].rstrip(HALF_CHARACTER)
        for length in range(len(STEP_DELIMITER) - 1, 0, -1):
            if text.endswith(STEP_DELIMITER[:length]):
                return text[:-length]
        return text

    def end(self, ids: Sequence[int], max_tokens: int) -> tuple[str, str] | None:
        """(finish, text) of a step that ends with its last token, or None where it goes on."""
        if not ids:
            return None
        if ids[-1] in self._eos_ids:
            return "stop", self.render(ids[:-1])
        if self.may_end[ids[-1]]:
            text = self.render(ids)
            if STEP_DELIMITER in text:
                return "delimiter", text.split(STEP_DELIMITER, 1)[0]
        return ("length", self.render(ids)) if len(ids) >= max_tokens else None

    def _opening(self) -> list[int]:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id):
            if token is not None:
                return [int(token)]
        raise EngineError(
            "an empty prefix has no tokens, and this tokenizer has no begin-of-sequence, end-of-sequence or padding "
            "token to start from: give a prefix with text"
        )
