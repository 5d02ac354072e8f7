"""Key/value states: of the batch being decoded, and of prefixes kept between steps.

`BatchKV` is the cache that a Hugging Face model writes into: one preallocated buffer, rows left-padded to a common
column, so that a forward pass over any slice of rows and columns costs no copy. `PrefixKV` keeps the states of
earlier prefixes token by token: the next step of an episode then computes only what was written since. Keys hold
their rotation, so a state depends on its token's own position and text before it, never on its column.

Axes: B rows, N new tokens, T columns, H key/value heads, D head width, S slots of the prefix store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KVShape:
    """(heads, width) of the keys and values of each layer, in order k0, v0, k1, v1, .."""

    parts: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes of all layers' keys and values of one token."""
        return sum(heads * width for heads, width in self.parts) * self.dtype.itemsize


class BatchKV(Cache):
    """The states of one batch; `resize` before each, then `aim` before each forward pass."""

    def __init__(self, shape: KVShape):
        super().__init__(layers=[])
        self.shape = shape
        self._flat = [torch.zeros(0, dtype=shape.dtype, device=shape.device) for _ in shape.parts]
        self.parts: list[torch.Tensor] = []
        self._rows = slice(0, 0)
        self._column = 0

    def resize(self, rows: int, columns: int) -> None:
        """Give every layer a (rows, columns, H, D) view; contents are finite but meaningless."""
        self.parts = []
        for index, (heads, width) in enumerate(self.shape.parts):
            size = rows * columns * heads * width
            if self._flat[index].numel() < size:
                # Zeros, since a masked column still takes part as 0 x its value, and 0 x NaN is NaN.
                # With room to spare, as the texts of a batch of episodes grow step by step.
                self._flat[index] = torch.zeros(size * 3 // 2, dtype=self.shape.dtype, device=self.shape.device)
            self.parts.append(self._flat[index][:size].view(rows, columns, heads, width))

    def aim(self, rows: slice, column: int) -> None:
        """The next forward pass is over these rows and writes its tokens from this column on."""
        self._rows, self._column = rows, column

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model: store the new states (B, H, N, D), give all up to them."""
        return self.write(key_states.transpose(1, 2), value_states.transpose(1, 2), layer_idx)

    def write(
        self, keys_BNHD: torch.Tensor, values_BNHD: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new states of a layer; gives all up to them as (B, H, T, D)."""
        end = self._column + keys_BNHD.shape[1]
        keys = self.parts[2 * layer][self._rows, :end]
        values = self.parts[2 * layer + 1][self._rows, :end]
        keys[:, self._column :] = keys_BNHD
        values[:, self._column :] = values_BNHD
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns filled before the next forward pass."""
        return self._column

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(columns attended to, offset)."""
        return self._column + query_length, 0

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], columns: int) -> None:
        """Copy the first `columns` columns of some rows over others."""
        device = self.shape.device
        source, target = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for part in self.parts:
            view = part[:, :columns]
            view.index_copy_(0, target, view.index_select(0, source))


class PrefixKV:
    """The states of up to `capacity` tokens of earlier sequences, found by their ids, least recently used evicted.

    A token's slot is found by its parent's slot and its id, so the table is a trie with the slots as nodes. Slot 0
    is the root and holds zeros. Touching a token touches its ancestors: no token outlives its parent. Sequences that
    were read with other weights have a `root` of their own: 0, or a negative number, which is no slot.
    """

    def __init__(self, shape: KVShape, capacity: int, vocabulary: int):
        self.capacity = capacity
        self._vocabulary = vocabulary
        self._parts = [
            torch.empty((capacity + 1, heads * width), dtype=shape.dtype, device=shape.device)
            for heads, width in shape.parts
        ]
        for part in self._parts:
            part[0].zero_()
        self._device = shape.device
        self._slots: dict[int, int] = {}
        self._keys: Indices = np.zeros(capacity + 1, dtype=np.int64)
        self._ticks: Indices = np.zeros(capacity + 1, dtype=np.int64)
        self._tick = 0
        self._unused = list(range(capacity, 0, -1))

    def match(self, ids: Sequence[int], limit: int, root: int = 0) -> list[int]:
        """The slots of the longest known beginning of `ids`, at most `limit` tokens."""
        found: list[int] = []
        slot, get, vocabulary = root, self._slots.get, self._vocabulary
        for token in ids[:limit]:
            following = get(slot * vocabulary + token)
            if following is None:
                break
            slot = following
            found.append(slot)
        self._tick += 1
        self._ticks[found] = self._tick
        return found

    def load(self, slots_BT: Indices, target: BatchKV) -> None:
        """Fill the batch's first columns from the given slots (0 for none)."""
        rows, columns = slots_BT.shape
        if not columns:
            return
        index = torch.from_numpy(slots_BT.reshape(-1)).to(self._device)
        for part, own in zip(target.parts, self._parts, strict=True):
            part[:rows, :columns] = own.index_select(0, index).view(rows, columns, *part.shape[2:])

    def store(
        self,
        sequences: Sequence[Sequence[int]],
        rows: Sequence[int],
        firsts: Sequence[int],
        source: BatchKV,
        root: int = 0,
    ) -> None:
        """Keep the states of these sequences, which lie in `source` at the given rows from the given columns on."""
        slots: list[int] = []
        row_of: list[int] = []
        column_of: list[int] = []
        for ids, row, first in zip(sequences, rows, firsts, strict=True):
            known = len(self.match(ids, len(ids), root))
            added = self._add(ids, known, root)
            slots.extend(added)
            row_of.extend([row] * len(added))
            column_of.extend(range(first + known, first + known + len(added)))
        if not slots:
            return
        # Eviction may have handed a slot on to a later sequence of this call: the last owner's states count.
        last = {slot: position for position, slot in enumerate(slots)}
        keep = list(last.values())
        index = torch.tensor(list(last), device=self._device)
        row_index = torch.tensor([row_of[k] for k in keep], device=self._device)
        column_index = torch.tensor([column_of[k] for k in keep], device=self._device)
        for part, own in zip(source.parts, self._parts, strict=True):
            own.index_copy_(0, index, part[row_index, column_index].flatten(1))

    def _add(self, ids: Sequence[int], known: int, root: int) -> list[int]:
        wanted = len(ids) - known
        if len(self._unused) < wanted:
            self._evict(wanted)
        added: list[int] = []
        slot = self._walk(ids, known, root)
        for token in ids[known : known + len(self._unused)]:
            key = slot * self._vocabulary + token
            slot = self._unused.pop()
            self._slots[key] = slot
            self._keys[slot] = key
            added.append(slot)
        self._ticks[added] = self._tick
        return added

    def _walk(self, ids: Sequence[int], length: int, root: int) -> int:
        slot = root
        for token in ids[:length]:
            slot = self._slots[slot * self._vocabulary + token]
        return slot

    def _evict(self, wanted: int) -> None:
        """Free the oldest slots, an eighth of all at least; never those of the sequence just touched."""
        used = self._ticks[self._ticks > 0]
        if not len(used):
            return
        count = min(max(wanted, self.capacity // 8), len(used)) - 1
        threshold = min(int(np.partition(used, count)[count]), self._tick - 1)
        freed = np.nonzero((self._ticks > 0) & (self._ticks <= threshold))[0]
        self._ticks[freed] = 0
        for key in self._keys[freed].tolist():
            del self._slots[key]
        self._unused.extend(freed.tolist())


def make_masks(
    columns_T: torch.Tensor, queries_N: torch.Tensor, firsts_B1: torch.Tensor, windows: dict[str, int | None]
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What each new token sees, (B, 1, N, T): its own row's columns up to itself, within the layer's window."""
    real_B11T = (columns_T >= firsts_B1)[:, None, None]
    queries_N1 = queries_N[:, None]
    # Padding sees itself: a softmax over nothing is NaN, and NaN would spread through the buffer.
    seen = real_B11T & (columns_T <= queries_N1) | (columns_T == queries_N1)
    masks = {
        kind: seen if window is None else seen & (columns_T > queries_N1 - window) for kind, window in windows.items()
    }
    # Models with one kind of layer take the mask itself, those that mix kinds a mask for each.
    return masks if len(masks) > 1 else next(iter(masks.values()))
