"""The embedded world's tokenizers, built from fixed pieces (nothing is learned).

`make_tokenizer` gives the shared one: a token for every byte, so that any text survives a round trip, and
one token for every phrase of the world's templates, rubrics and trajectories, for the blank line and for the
step labels. `make_char_tokenizer` gives the cross-family model's: one token a character.
"""

from __future__ import annotations

import re
import string

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from roro_ray.world.tasks import ANSWER_LABEL, LABELS, STEP_DELIMITER, TEMPLATES

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_STEP_PIECES = (" + ", " - ", " * ", " % ", "dbl ", "rev ", "max ", "min ", "set ", " = ")
_RUBRIC_PIECES = (
    "Rubric:\n",
    " written by the small model (",
    " written by the large model (",
    "overall: ",
    "mostly",
    ")? ",
    "[S] ",
    "[L] ",
    "yes",
    "no",
)


def _template_pieces() -> list[str]:
    pieces: set[str] = set()
    for opening, separator, closing, phrases in TEMPLATES.values():
        for text in (opening, separator, closing, *phrases.values()):
            pieces.update(part for part in re.split(r"\{[sk]\}", text) if len(part) > 1)
    return sorted(pieces)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that the Qwen3-shaped models, the router, the Rubricor and the Judge share."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    labels = [f"{label}: " for label in LABELS]
    pieces = [STEP_DELIMITER, ANSWER_LABEL, *labels, *_STEP_PIECES, *_RUBRIC_PIECES, *_template_pieces()]
    tokenizer.add_special_tokens([PAD, EOS])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(pieces)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_char_tokenizer() -> PreTrainedTokenizerFast:
    """The cross-family model's own tokenizer: printable ASCII and the newline, one token a character."""
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    vocab = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
