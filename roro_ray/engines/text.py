"""Between text and token ids, and where a step ends.

A step ends where its *text* contains the delimiter (or another mark, such as the end of a thinking block), since
tokenizers cut a blank line into one token, into two, or glue it to a full stop. Decoding the step after every token
would cost more than the model does, so a table says which tokens can end a step at all, and only those are looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from roro_ray.config import STEP_DELIMITER
from roro_ray.errors import EngineError

HALF_CHARACTER = "\ufffd"  # what tokenizers render bytes as that make no character (yet)


@dataclass(frozen=True, slots=True)
class Ending:
    """What ends a step, short of end-of-sequence and token limit.

    The first `delimiter` (none where empty) that is complete after at least `min_tokens` tokens, or one of `stops`;
    `may_end` says of each token of the vocabulary whether a step can end with it.
    """

    delimiter: str
    stops: tuple[str, ...]
    min_tokens: int
    may_end: list[bool]


class StepText:
    """One tokenizer, its end-of-sequence ids and the vocabulary size of the model that it feeds.

    `adds_special`: whether the tokenizer puts its special tokens round a text (a chat prompt spells its own).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Iterable[int],
        vocabulary: int,
        adds_special: bool = True,
    ):
        self._tokenizer = tokenizer
        self._adds_special = adds_special
        self._eos_ids = frozenset(eos_ids)
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            # A tokenizer.json may ask for truncation or padding, which would change a prefix in silence.
            self._backend.no_truncation()
            self._backend.no_padding()
        # Then the text of a run of tokens, cut between two characters, is that of its parts.
        self.concatenates = self._backend is not None and isinstance(self._backend.decoder, decoders.ByteLevel)
        self.vocabulary = vocabulary
        tokens = range(min(len(tokenizer), vocabulary))
        self._pieces: list[str] = tokenizer.batch_decode([[token] for token in tokens], skip_special_tokens=False)
        self._make_table = functools.lru_cache(maxsize=32)(self._make_may_end)
        self.ending = self.make_ending()
        self.may_end = self.ending.may_end
        # Tokenizers with byte fallback render a run of byte tokens as characters only if the whole run is valid.
        # This byte never is: rendered behind a step, it shows which characters a later byte could still undo.
        spoiler = tokenizer.get_vocab().get("<0xFF>")
        self._spoiler = [spoiler] if spoiler is not None and self.render([spoiler]) == HALF_CHARACTER else []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, with whatever the tokenizer puts round a text (if it may); never empty."""
        # A lone surrogate is no text that a tokenizer takes.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        special = self._adds_special
        if self._backend is not None:
            found = [encoding.ids for encoding in self._backend.encode_batch_fast(clean, add_special_tokens=special)]
        else:
            found = [list(self._tokenizer(text, add_special_tokens=special)["input_ids"]) for text in clean]
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

    def make_ending(self, delimiter: str = STEP_DELIMITER, stops: tuple[str, ...] = (), min_tokens: int = 0) -> Ending:
        """What ends a request's steps; its table is made once for each set of marks."""
        stops = tuple(filter(None, stops))
        return Ending(delimiter, stops, min_tokens, self._make_table((delimiter, *stops) if delimiter else stops))

    def certain(self, ids: Sequence[int], ending: Ending | None = None, rendered: str | None = None) -> str:
        """What no further token can change of the text of an unfinished step.

        Bytes that are not yet a character are rendered as replacement characters at the end, and the beginning of a
        delimiter or another mark may become one: both are left out. `rendered` is the text of the ids, where it is
        known (of a tokenizer that `concatenates`).
        """
        rule = ending or self.ending
        text = self.render([*ids, *self._spoiler]) if rendered is None else rendered
        found = self._find_mark(text, ids, rule)
        text = (text[: found[0]] if found else text).rstrip(HALF_CHARACTER)
        return text[: len(text) - max((_overlap(text, mark) for mark in (rule.delimiter, *rule.stops)), default=0)]

    def end(self, ids: Sequence[int], max_tokens: int, ending: Ending | None = None) -> tuple[str, str] | None:
        """(finish, text) of a step that ends with its last token, or None where it goes on."""
        rule = ending or self.ending
        if not ids:
            return None
        if ids[-1] in self._eos_ids:
            return "stop", self.render(ids[:-1])
        if rule.may_end[ids[-1]]:
            text = self.render(ids)
            found = self._find_mark(text, ids, rule)
            if found is not None:
                return found[1], text[: found[0]]
        return ("length", self.render(ids)) if len(ids) >= max_tokens else None

    def _find_mark(self, text: str, ids: Sequence[int], rule: Ending) -> tuple[int, str] | None:
        """Where the text of these ids first meets a mark, and the finish that this is."""
        found = [(at, "marker") for stop in rule.stops if (at := text.find(stop)) >= 0]
        if rule.delimiter and len(ids) >= rule.min_tokens:
            # One that was complete before is part of the step; its last newline may still begin another.
            start = self._count_certain(ids[: rule.min_tokens - 1]) - len(rule.delimiter) + 1 if rule.min_tokens else 0
            at = text.find(rule.delimiter, max(start, 0))
            found += [(at, "delimiter")] if at >= 0 else []
        return min(found, default=None)

    def _count_certain(self, ids: Sequence[int]) -> int:
        return len(self.render([*ids, *self._spoiler]).rstrip(HALF_CHARACTER)) if ids else 0

    def _make_may_end(self, marks: tuple[str, ...]) -> list[bool]:
        """By token: whether it can be the last one of a step that one of the marks ends."""
        lasts = {mark[-1] for mark in marks}
        if any(last.isspace() and last != "\n" for last in lasts):  # some tokenizers drop a token's space at the start
            table = [True] * self.vocabulary
        else:
            # A character of several bytes may end in a token that is no character alone.
            lasts |= {HALF_CHARACTER} if any(not last.isascii() for last in lasts) else set()
            table = [not lasts.isdisjoint(piece) for piece in self._pieces]
            table += [False] * (self.vocabulary - len(table))
        for token in self._eos_ids:
            table[token] = True
        return table

    def _opening(self) -> list[int]:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id):
            if token is not None:
                return [int(token)]
        raise EngineError(
            "an empty prefix has no tokens, and this tokenizer has no begin-of-sequence, end-of-sequence or padding "
            "token to start from: give a prefix with text"
        )


def _overlap(text: str, mark: str) -> int:
    """Length of the longest beginning of a mark, short of the whole, that the text ends with."""
    longest = min(len(mark) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(mark[:length])), 0)
