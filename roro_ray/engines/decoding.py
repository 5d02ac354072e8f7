"""Batched decoding of steps: left-padded, with key/value states, rows leaving as they finish.

One batch goes through three phases. *Place*: each row takes the states of its longest known beginning from the
prefix store. *Prefill*: what is left is computed, in groups of rows that miss about as many tokens. *Decode*: one
forward pass a token; a row that ends is handed over at once, its states stored, and its place filled by the last
row. The batch may be left before it is empty: an unfinished row is decoded on from where it stands.

Axes: B rows, N new tokens, T columns (a row's tokens end at one common column), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from roro_ray.engines.kv import BatchKV, KVShape, PrefixKV, make_masks
from roro_ray.engines.lean import make_lean
from roro_ray.engines.rows import Batch, Row, read_scores
from roro_ray.engines.sampling import draw_tokens
from roro_ray.engines.text import StepText

_MOST_PREFILL = 8192  # tokens in one prefill pass, to bound its activations
_MOST_LOGITS = 1 << 26  # logits kept by one prefill pass
_PASS_FLOPS = 2e7  # arithmetic that takes about as long as starting one more forward pass


_Found = tuple[Row, list[int]]  # a row, and the slots of its known beginning


@dataclass(slots=True)
class DecodeStats:
    """What was computed: forward passes, tokens computed from prefixes, tokens taken from the store, decoded ones."""

    forward_passes: int = 0
    tokens_prefilled: int = 0
    tokens_reused: int = 0
    tokens_decoded: int = 0


class StepDecoder:
    """Decodes and scores rows with one model. Not thread-safe: one caller at a time.

    `masks` maps each kind of attention layer of the model to its window (None: unlimited). `capacity` is the number
    of tokens whose states are kept between calls; `most_tokens` bounds rows x columns of one batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        text: StepText,
        shape: KVShape,
        masks: dict[str, int | None],
        capacity: int,
        most_tokens: int,
    ):
        self.stats = DecodeStats()
        self.capacity = capacity
        self._root = 0
        self._model = model
        self._text = text
        self._masks = masks
        self._device = shape.device
        self._kv = BatchKV(shape)
        self._lean = make_lean(model, shape, masks)
        self._known = PrefixKV(shape, capacity, text.vocabulary) if capacity else None
        self._most_tokens = most_tokens
        # Padding that is cheaper than one more pass for the rows that need less.
        self._slack = _PASS_FLOPS / (2 * sum(parameter.numel() for parameter in model.parameters()))

    @torch.inference_mode()
    def decode(
        self,
        rows: Sequence[Row],
        on_finish: Callable[[list[Row]], None],
        keep: Callable[[list[Row]], list[Row]] = lambda alive: alive,
        root: int = 0,
    ) -> None:
        """Decode rows, handing over each as it finishes.

        `keep(alive)` is asked after every token which of the unfinished rows to go on with: the others stay
        unfinished, a token further, and may come again. `root` tells the weights apart whose states are kept: 0 for the
        model's own, a negative number for those of an adapter that is active in it.
        """
        self._root = root
        for chunk in self._split(rows):
            batch, logits_BV = self._prefill(chunk)
            self._decode_batch(batch, logits_BV, on_finish, keep)

    @torch.inference_mode()
    def score(self, rows: Sequence[Row], root: int = 0) -> None:
        """Fill the log-probabilities of rows that are only read."""
        self._root = root
        for chunk in self._split(rows):
            batch, _ = self._prefill(chunk)
            self._store(batch, range(len(chunk)))

    def _split(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Chunks of rows of like length that fit the buffer."""
        chunks: list[list[Row]] = []
        columns = 0
        for row in sorted(rows, key=lambda row: len(row.ids)):
            columns = max(columns, len(row.ids) + row.room)
            if not chunks or (len(chunks[-1]) + 1) * columns > self._most_tokens:
                chunks.append([])
                columns = len(row.ids) + row.room
            chunks[-1].append(row)
        return chunks

    def _prefill(self, rows: list[Row]) -> tuple[Batch, torch.Tensor]:
        """Place rows and compute what their prefixes miss; gives the batch and its next tokens' logits (B, V)."""
        known, root = self._known, self._root
        found = [known.match(row.ids, len(row.ids) - row.needed, root) if known else [] for row in rows]
        groups = self._group(list(zip(rows, found, strict=True)))
        pairs = [pair for group in groups for pair in group]
        batch = Batch([row for row, _ in pairs])
        missing = [len(row.ids) - len(slots) for row, slots in pairs]
        self._kv.resize(len(rows), batch.column + max(max(row.room, 0) for row in rows))
        if self._known is not None:
            slots_BT = np.zeros((len(rows), batch.column - min(missing)), dtype=np.int64)
            for line, (_, slots), first in zip(slots_BT, pairs, batch.firsts, strict=True):
                line[first : first + len(slots)] = slots
            self._known.load(slots_BT, self._kv)
        self.stats.tokens_prefilled += sum(missing)
        self.stats.tokens_reused += sum(len(slots) for slots in found)
        logits, start = [], 0
        for group in groups:
            end = start + len(group)
            logits.append(self._prefill_group(batch, start, end, max(missing[start:end])))
            start = end
        return batch, torch.cat(logits)

    def _group(self, pairs: list[_Found]) -> list[list[_Found]]:
        """Rows for one prefill pass each: those that miss about as many tokens, padded up to the most."""
        groups: list[list[_Found]] = []
        most = padding = needed = 0
        for pair in sorted(pairs, key=lambda pair: len(pair[1]) - len(pair[0].ids)):
            row, missing = pair[0], len(pair[0].ids) - len(pair[1])
            size = len(groups[-1]) + 1 if groups else 1
            padding += most - missing
            needed = max(needed, row.needed)
            too_padded = padding > self._slack
            too_large = size * most > _MOST_PREFILL or size * needed * self._text.vocabulary > _MOST_LOGITS
            if not groups or too_padded or too_large:
                groups.append([])
                most, padding, needed = missing, 0, row.needed
            groups[-1].append(pair)
        return groups

    def _prefill_group(self, batch: Batch, start: int, end: int, count: int) -> torch.Tensor:
        """Compute the last `count` tokens of some rows (known ones again where a row misses fewer)."""
        rows = batch.rows[start:end]
        ids = [[0] * (count - len(row.ids)) + row.ids[-count:] for row in rows]
        keep = max(row.needed for row in rows)
        logits_BNV = self._forward(ids, start, batch.firsts[start:end], batch.column - count, keep)
        read_scores(rows, logits_BNV)
        # A copy, so that the other positions' logits are freed.
        return logits_BNV[:, -1].clone()

    def _decode_batch(
        self,
        batch: Batch,
        logits_BV: torch.Tensor,
        on_finish: Callable[[list[Row]], None],
        keep: Callable[[list[Row]], list[Row]],
    ) -> None:
        logits_BV = self._let_go(batch, self._ended(batch), logits_BV, on_finish)
        while batch.rows:
            tokens_B = self._choose(batch.rows, logits_BV)
            tokens_B = self._let_go(batch, self._ended(batch), tokens_B, on_finish)
            kept = set(map(id, keep(batch.rows)))
            tokens_B = self._let_go(batch, [i for i, row in enumerate(batch.rows) if id(row) not in kept], tokens_B)
            if batch.rows:
                logits_BV = self._forward(tokens_B[:, None], 0, batch.firsts, batch.column, 1)[:, -1]
                batch.column += 1

    def _choose(self, rows: list[Row], logits_BV: torch.Tensor) -> torch.Tensor:
        """Append the next token and its log-probability to every row."""
        counters = [len(row.ids) - row.start for row in rows]
        temperatures, keys = [row.temperature for row in rows], [row.key for row in rows]
        tokens_B = draw_tokens(logits_BV, temperatures, keys, counters, [row.top_p for row in rows])
        log_probs_B = torch.log_softmax(logits_BV.float(), -1).gather(1, tokens_B[:, None]).squeeze(1)
        for row, token, log_prob in zip(rows, tokens_B.tolist(), log_probs_B.tolist(), strict=True):
            row.ids.append(token)
            row.log_probs.append(log_prob)
        self.stats.tokens_decoded += len(rows)
        return tokens_B

    def _ended(self, batch: Batch) -> list[int]:
        """Which rows' steps are over; sets their finish and text."""
        ended = []
        for i, row in enumerate(batch.rows):
            length = len(row.ids) - row.start
            ending = row.ending or self._text.ending
            if length and (ending.may_end[row.ids[-1]] or length >= row.max_tokens):
                end = self._text.end(row.ids[row.start :], row.max_tokens, ending)
                if end is not None:
                    row.finish, row.text = end
                    ended.append(i)
        return ended

    def _let_go(
        self,
        batch: Batch,
        ended: list[int],
        values_B: torch.Tensor,
        on_finish: Callable[[list[Row]], None] = lambda rows: None,
    ) -> torch.Tensor:
        """Let rows go, the last rows taking their places; gives the others' values, in their new order."""
        if not ended:
            return values_B
        self._store(batch, ended)
        on_finish([batch.rows[i] for i in ended])
        gone = set(ended)
        left = len(batch.rows) - len(gone)
        movers = [i for i in range(left, len(batch.rows)) if i not in gone]
        holes = [i for i in ended if i < left]
        order = list(range(left))
        for mover, hole in zip(movers, holes, strict=True):
            order[hole] = mover
        if movers:
            self._kv.move_rows(movers, holes, batch.column)
        batch.rows = [batch.rows[i] for i in order]
        batch.firsts = [batch.firsts[i] for i in order]
        return values_B[torch.tensor(order, dtype=torch.long, device=values_B.device)]

    def _store(self, batch: Batch, which: Sequence[int]) -> None:
        """Keep the states of some rows, as far as they are computed."""
        if self._known is None or not which:
            return
        firsts = [batch.firsts[i] for i in which]
        sequences = [batch.rows[i].ids[: batch.column - first] for i, first in zip(which, firsts, strict=True)]
        self._known.store(sequences, which, firsts, self._kv, self._root)

    def _forward(
        self, ids_BN: list[list[int]] | torch.Tensor, start: int, firsts: list[int], column: int, keep: int
    ) -> torch.Tensor:
        """Logits (B, keep, V) of the last `keep` of some new tokens, which lie from `column` on."""
        tokens_BN = torch.as_tensor(ids_BN, device=self._device)
        end = column + tokens_BN.shape[1]
        columns_T = torch.arange(end, device=self._device)
        queries_N = columns_T[column:]
        firsts_B1 = torch.tensor(firsts, device=self._device)[:, None]
        masks = make_masks(columns_T, queries_N, firsts_B1, self._masks)
        self._kv.aim(slice(start, start + len(firsts)), column)
        self.stats.forward_passes += 1
        positions_BN = (queries_N - firsts_B1).clamp_(min=0)
        if self._lean is not None and not self._root and isinstance(masks, torch.Tensor):
            return self._lean.forward(tokens_BN, positions_BN, masks, self._kv, keep)
        output: Any = self._model(
            input_ids=tokens_BN,
            attention_mask=masks,
            position_ids=positions_BN,
            past_key_values=self._kv,
            use_cache=True,
            logits_to_keep=keep,
        )
        return cast(torch.Tensor, output.logits)
