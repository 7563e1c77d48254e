"""The KV cache of one generation: per layer a window ring, compressed entries, index keys, the open block, or a row per token.

Everything is preallocated and grows in steps, so a decoded token never copies the cache. ``nbytes`` counts what holds data;
``nbytes_reserved`` the room beyond it. Letters: B batch, W window, D head dim, R compression ratio, K entries per query.
(reference/deepseek-v4.md, section 4)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workbench.config import DenseConfig, HybridConfig, LatentConfig, ModelConfig, SharedStreamConfig
from workbench.errors import InputError, WorkbenchError

STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIRST_ROWS, GROWTH = 64, 1.5
PARTS = ("window", "compressed", "index", "tail", "engram")
KV_PART = "kv"  # one row for every token: the keys and values of MHA and GQA, the latents of MLA


class RowFormat(Protocol):
    """How rows of ``width`` values are stored: ``stored_width`` elements of ``dtype`` each."""

    @property
    def width(self) -> int: ...
    @property
    def stored_width(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, rows: Tensor) -> Tensor:
        """[..., width] floating point -> [..., stored_width]."""

    def decode(self, stored: Tensor) -> Tensor:
        """[..., stored_width] -> [..., width] floating point; decoding what was encoded changes nothing further."""


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """Values as they are, rounded to ``dtype``."""

    width: int
    dtype: torch.dtype

    @property
    def stored_width(self) -> int:
        return self.width

    def encode(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype)

    def decode(self, stored: Tensor) -> Tensor:
        return stored


class Rows:
    """Rows [B, n, D] as attention reads them, here a tensor of one call; a cache's ``GrowingRows`` reads alike."""

    def __init__(self, rows: Tensor) -> None:
        self._tensor = rows

    @property
    def length(self) -> int:
        return self._tensor.shape[1]

    def read(self, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows first..stop-1, [B, n, D]; all of them unless told."""
        return self._tensor[:, first:stop]

    def gather(self, numbers: Tensor) -> Tensor:
        """Row numbers [B, T, K] -> their rows [B, T, K, D]."""
        return gather_rows(self._tensor, numbers)


def gather_rows(rows: Tensor, numbers: Tensor) -> Tensor:
    """rows [B, n, D], numbers [B, T, K] -> [B, T, K, D]. One index_select over all sequences: the fastest gather torch has."""
    batch, length, width = rows.shape
    if batch > 1:
        numbers = numbers + length * torch.arange(batch, device=numbers.device).view(-1, 1, 1)
    return rows.reshape(batch * length, width).index_select(0, numbers.flatten()).view(*numbers.shape, width)


class GrowingRows:
    """Append-only rows [B, n, D]; capacity grows by half when it is full, so appending costs constant time on average."""

    def __init__(self, batch: int, form: RowFormat, device: torch.device) -> None:
        self.form = form
        self._rows = torch.empty(batch, 0, form.stored_width, dtype=form.dtype, device=device)
        self._row_bytes = batch * form.stored_width * self._rows.element_size()
        self.length = 0

    def append(self, rows: Tensor) -> None:
        needed = self.length + rows.shape[1]
        if needed > self._rows.shape[1]:
            self.reserve(max(needed, FIRST_ROWS, int(GROWTH * self._rows.shape[1])))
        self._rows[:, self.length : needed] = self.form.encode(rows.detach())  # no graph of one call may live on in the next
        self.length = needed

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` rows in all, so that growing up to there copies nothing."""
        if capacity <= self._rows.shape[1]:
            return
        with torch.inference_mode(False):  # a cache filled in inference mode may be used outside it
            grown = self._rows.new_empty(self._rows.shape[0], capacity, self._rows.shape[2])
        grown[:, : self.length] = self._rows[:, : self.length]
        self._rows = grown

    def read(self, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows first..stop-1, decoded, [B, n, D]; all of them unless told."""
        return self.form.decode(self._rows[:, first : self.length if stop is None else min(stop, self.length)])

    def gather(self, numbers: Tensor) -> Tensor:
        """Row numbers [B, T, K] -> their rows, decoded, [B, T, K, D]."""
        return self.form.decode(gather_rows(self._rows, numbers))

    @property
    def nbytes(self) -> int:
        return self.length * self._row_bytes

    @property
    def nbytes_allocated(self) -> int:
        return self._rows.shape[1] * self._row_bytes


class WindowRing:
    """The keys of the last W tokens; token t lives in slot t mod W."""

    def __init__(self, batch: int, window: int, form: RowFormat, device: torch.device) -> None:
        self.form = form
        self._ring = torch.empty(batch, window, form.stored_width, dtype=form.dtype, device=device)
        self._row_bytes = batch * form.stored_width * self._ring.element_size()
        self.length = 0  # tokens seen

    @property
    def held(self) -> int:
        return min(self.length, self._ring.shape[1])

    def last(self, count: int) -> Tensor:
        """The newest ``count`` keys in token order, [B, count, D]."""
        slots = torch.arange(self.length - count, self.length, device=self._ring.device) % self._ring.shape[1]
        return self.form.decode(self._ring[:, slots])

    def append(self, keys: Tensor) -> None:
        window, count = self._ring.shape[1], keys.shape[1]
        kept = min(count, window)
        slots = torch.arange(self.length + count - kept, self.length + count, device=keys.device) % window
        self._ring[:, slots] = self.form.encode(keys[:, count - kept :].detach())
        self.length += count

    @property
    def nbytes(self) -> int:
        return self.held * self._row_bytes

    @property
    def nbytes_allocated(self) -> int:
        return self._ring.shape[1] * self._row_bytes


class BlockTail:
    """What a compressor must remember between calls: the open block and, where blocks overlap, half of the last whole one.

    Kept in float32 like the reference. ``values`` and ``scores`` [B, R, width]; the overlap holds the "a" series only, because
    the "b" series of a finished block is never read again.
    """

    def __init__(self, batch: int, ratio: int, width: int, overlap: int, device: torch.device) -> None:
        self.ratio = ratio
        self._open = torch.zeros(2, batch, ratio, width, device=device)  # values, scores
        self._overlap = torch.zeros(2, batch, ratio, overlap, device=device)
        self._row_bytes, self._overlap_bytes = 2 * batch * width * 4, self._overlap.numel() * 4
        self._overlap[1] = -torch.inf  # before the first block there is nothing to look back at
        self.count = 0  # open tokens
        self.blocks = 0  # finished blocks

    @property
    def open(self) -> Tensor:
        return self._open[:, :, : self.count]

    @property
    def overlap(self) -> Tensor:
        return self._overlap

    def keep(self, rest: Tensor, last_block: Tensor | None, finished: int) -> None:
        """rest [2, B, r, width] becomes the open block; last_block [2, B, R, overlap] the new look-back."""
        self.count = rest.shape[2]
        self._open[:, :, : self.count] = rest.detach()
        if last_block is not None:
            self._overlap.copy_(last_block.detach())
        self.blocks += finished

    @property
    def nbytes(self) -> int:
        return self.count * self._row_bytes + (self._overlap_bytes if self.blocks else 0)

    @property
    def nbytes_allocated(self) -> int:
        return self.ratio * self._row_bytes + self._overlap_bytes


class LayerCache:
    """What one layer remembers; parts a layer kind lacks are None. ``kv`` holds one row for every token."""

    window: WindowRing | None = None
    compressed: GrowingRows | None = None
    index: GrowingRows | None = None
    tail: BlockTail | None = None
    index_tail: BlockTail | None = None
    kv: GrowingRows | None = None

    def restart_window(self) -> None:
        """Forget the window, whose keys are not next to the tokens that come now."""
        if self.window is not None:
            self.window.length = 0

    def parts(self) -> Iterator[tuple[str, WindowRing | GrowingRows | BlockTail]]:
        named = (("window", self.window), ("compressed", self.compressed), ("index", self.index))
        for part, store in (*named, ("tail", self.tail), ("tail", self.index_tail), (KV_PART, self.kv)):
            if store is not None:
                yield part, store


def layer_cache(config: ModelConfig, layer: int, batch: int, storage: str, device: torch.device) -> LayerCache:
    """An empty cache for one attention layer."""
    cache, kind, ratio = LayerCache(), config.layer_kinds[layer], config.compress_ratios[layer]
    dtype = STORAGE[storage]
    if isinstance(config, DenseConfig | LatentConfig):
        if isinstance(config, DenseConfig):
            width = 2 * config.num_key_value_heads * config.head_dim
        else:
            width = config.kv_lora_rank + config.qk_rope_head_dim
        cache.kv = GrowingRows(batch, PlainFormat(width, dtype), device)
        if kind == "mla-dsa":
            assert isinstance(config, LatentConfig)
            cache.index = GrowingRows(batch, PlainFormat(config.index_head_dim, dtype), device)
        return cache
    d, i = config.head_dim, config.index_head_dim
    cache.window = WindowRing(batch, config.sliding_window, PlainFormat(d, dtype), device)
    if kind in ("csa", "hca", "csa2-full"):
        cache.compressed = GrowingRows(batch, PlainFormat(d, dtype), device)
    if kind in ("csa", "csa2-full"):
        cache.index = GrowingRows(batch, PlainFormat(i, dtype), device)
    if kind == "csa":
        cache.tail = BlockTail(batch, ratio, 2 * d, d, device)
        cache.index_tail = BlockTail(batch, ratio, 2 * i, i, device)
    elif kind == "hca" or (kind == "csa2-full" and ratio > 1):
        cache.tail = BlockTail(batch, ratio, d, 0, device)
    return cache


class EngramState:
    """What Engram layers remember: the last n-gram look-back ids, shared, and the convolution's earlier inputs per layer."""

    def __init__(self, config: HybridConfig | SharedStreamConfig, batch: int, device: torch.device) -> None:
        assert config.engram is not None
        self.lookback = config.engram.max_ngram_size - 1
        self.ids = torch.zeros(batch, 0, dtype=torch.int64)  # on the host, where rows are hashed
        width = config.hc_mult * config.hidden_size
        convolved = config.engram.layer_ids if config.engram.conv_kernel_size else ()
        self.conv = {layer: torch.zeros(batch, 0, width, device=device) for layer in convolved}

    @property
    def nbytes(self) -> int:
        return self.ids.numel() * 8 + sum(state.numel() * 4 for state in self.conv.values())

    @property
    def nbytes_allocated(self) -> int:
        return self.nbytes  # kept as exact slices: nothing is reserved


class KVCache:
    """An empty cache for ``batch_size`` sequences that grow together; made by ``model.new_cache``."""

    def __init__(self, config: ModelConfig, batch_size: int, storage: str, device: torch.device) -> None:
        if storage not in STORAGE:
            raise InputError(f"storage {storage!r} is unknown; this model stores its cache as {sorted(STORAGE)}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a positive integer, got {batch_size!r}")
        self.config, self.batch_size, self.storage = config, batch_size, storage
        with torch.inference_mode(False):
            self.layers = [layer_cache(config, layer, batch_size, storage, device) for layer in range(config.num_hidden_layers)]
            self.engram = EngramState(config, batch_size, device) if config.engram else None
        self.length = 0  # tokens held; set when a call of the model has gone through all layers
        self.whole = True  # False while a call is under way, and for good if it breaks off

    def check_whole(self) -> None:
        """Raises WorkbenchError if an interrupted call left some layers ahead of others."""
        if not self.whole:
            raise WorkbenchError(
                "this cache was left half-filled by an interrupted call; make a new one with model.new_cache()"
            )

    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes holding data, by part, for all sequences of the batch together."""
        held = dict.fromkeys(PARTS, 0)
        if any(layer.kv is not None for layer in self.layers):
            held[KV_PART] = 0
        for part, store in self._stores():
            held[part] += store.nbytes
        return held

    @property
    def nbytes(self) -> int:
        return sum(self.nbytes_by_part().values())

    @property
    def nbytes_reserved(self) -> int:
        """Bytes allocated ahead of need, beyond ``nbytes``."""
        return sum(store.nbytes_allocated - store.nbytes for _, store in self._stores())

    def _stores(self) -> Iterator[tuple[str, WindowRing | GrowingRows | BlockTail | EngramState]]:
        for layer in self.layers:
            yield from layer.parts()
        if self.engram:
            yield "engram", self.engram
