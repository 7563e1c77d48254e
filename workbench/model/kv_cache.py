"""The KV cache of one generation: per layer a window ring, compressed entries, index keys and the open block.

Everything is preallocated and grows in steps, so a decoded token never copies the cache. ``nbytes`` counts what holds data;
``nbytes_reserved`` the room beyond it. Letters: B batch, W window, D head dim, R compression ratio.
(reference/deepseek-v4.md, section 4)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.config import ModelConfig
from workbench.errors import InputError, WorkbenchError

STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIRST_ROWS, GROWTH = 64, 1.5
PARTS = ("window", "compressed", "index", "tail", "engram")


class GrowingRows:
    """Append-only rows [B, n, D]; capacity grows by half when it is full, so appending costs constant time on average."""

    def __init__(self, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.empty(batch, 0, width, dtype=dtype, device=device)
        self._row_bytes = batch * width * self._rows.element_size()
        self.length = 0

    def append(self, rows: Tensor) -> None:
        needed = self.length + rows.shape[1]
        if needed > self._rows.shape[1]:
            capacity = max(needed, FIRST_ROWS, int(GROWTH * self._rows.shape[1]))
            with torch.inference_mode(False):  # a cache filled in inference mode may be used outside it
                grown = self._rows.new_empty(self._rows.shape[0], capacity, self._rows.shape[2])
            grown[:, : self.length] = self._rows[:, : self.length]
            self._rows = grown
        self._rows[:, self.length : needed] = rows.detach()  # a cache must not keep one call's graph alive in the next
        self.length = needed

    @property
    def rows(self) -> Tensor:
        return self._rows[:, : self.length]

    @property
    def nbytes(self) -> int:
        return self.length * self._row_bytes

    @property
    def nbytes_allocated(self) -> int:
        return self._rows.shape[1] * self._row_bytes


class WindowRing:
    """The keys of the last W tokens; token t lives in slot t mod W."""

    def __init__(self, batch: int, window: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._ring = torch.empty(batch, window, width, dtype=dtype, device=device)
        self._row_bytes = batch * width * self._ring.element_size()
        self.length = 0  # tokens seen

    @property
    def held(self) -> int:
        return min(self.length, self._ring.shape[1])

    def last(self, count: int) -> Tensor:
        """The newest ``count`` keys in token order, [B, count, D]."""
        slots = torch.arange(self.length - count, self.length, device=self._ring.device) % self._ring.shape[1]
        return self._ring[:, slots]

    def append(self, keys: Tensor) -> None:
        window, count = self._ring.shape[1], keys.shape[1]
        kept = min(count, window)
        slots = torch.arange(self.length + count - kept, self.length + count, device=keys.device) % window
        self._ring[:, slots] = keys[:, count - kept :].detach().to(self._ring.dtype)
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
    """Window, entries, index keys and tails of one layer; parts a layer kind lacks are None."""

    def __init__(self, config: ModelConfig, kind: str, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        d, i = config.head_dim, config.index_head_dim
        self.window = WindowRing(batch, config.sliding_window, d, dtype, device)
        self.compressed = GrowingRows(batch, d, dtype, device) if kind != "window" else None
        self.index = GrowingRows(batch, i, dtype, device) if kind == "csa" else None
        self.tail: BlockTail | None = None
        self.index_tail: BlockTail | None = None
        if kind == "csa":
            self.tail = BlockTail(batch, config.csa_ratio, 2 * d, d, device)
            self.index_tail = BlockTail(batch, config.csa_ratio, 2 * i, i, device)
        elif kind == "hca":
            self.tail = BlockTail(batch, config.hca_ratio, d, 0, device)

    def parts(self) -> Iterator[tuple[str, WindowRing | GrowingRows | BlockTail]]:
        named = (("window", self.window), ("compressed", self.compressed), ("index", self.index))
        for part, store in (*named, ("tail", self.tail), ("tail", self.index_tail)):
            if store is not None:
                yield part, store


class EngramState:
    """What Engram layers remember: the last n-gram look-back ids, shared, and the convolution's earlier inputs per layer."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        assert config.engram is not None
        self.lookback = config.engram.max_ngram_size - 1
        self.ids = torch.zeros(batch, 0, dtype=torch.int64)  # on the host, where rows are hashed
        width = config.hc_mult * config.hidden_size
        self.conv = {layer: torch.zeros(batch, 0, width, device=device) for layer in config.engram.layer_ids}

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
        self.batch_size, self.storage = batch_size, storage
        with torch.inference_mode(False):
            self.layers = [LayerCache(config, kind, batch_size, STORAGE[storage], device) for kind in config.layer_kinds]
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
