"""The KV cache of one generation: per layer a window ring, compressed entries, index keys, the open block, or a row per token.

Everything is preallocated and grows in steps, so a decoded token never copies the cache. ``nbytes`` counts what holds data;
``nbytes_reserved`` the room beyond it; ``bytes_read_by_part`` the stored rows handed out to attention. Attention reads what is
stored, of the present call too, so that it makes no difference how a sequence is split into calls.
Letters: B batch, W window, D head dim, R compression ratio, K entries per query.
(reference/deepseek-v4.md, section 4)
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from workbench.config import DenseConfig, HybridConfig, LatentConfig, ModelConfig, SharedStreamConfig
from workbench.config.parts import KV_PART, PARTS
from workbench.errors import InputError, WorkbenchError
from workbench.model.formats import RowFormat, row_formats

FIRST_ROWS, GROWTH = 64, 1.5

Mark = dict[str, Any]  # what it takes to come back to a moment: counts, and copies of what later tokens overwrite


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

    def as_queries(self, queries: Tensor) -> Tensor:
        """Queries [..., D] as they are to meet these rows: as they are."""
        return queries


def gather_rows(rows: Tensor, numbers: Tensor) -> Tensor:
    """rows [B, n, D], numbers [B, T, K] -> [B, T, K, D]. One index_select over all sequences: the fastest gather torch has."""
    batch, length, width = rows.shape
    if batch > 1:
        numbers = numbers + length * torch.arange(batch, device=numbers.device).view(-1, 1, 1)
    return rows.reshape(batch * length, width).index_select(0, numbers.flatten()).view(*numbers.shape, width)


def _put(target: Tensor, values: Tensor) -> None:
    """Copy values of a mark into their place. Raises InputError if they are not of its shape and dtype."""
    if (values.shape, values.dtype) != (target.shape, target.dtype):
        raise InputError(
            f"expected {list(target.shape)} values of {target.dtype}, got {list(values.shape)} of {values.dtype}; is this"
            " another cache's mark?"
        )
    target.copy_(values)


class GrowingRows:
    """Append-only rows [B, n, D]; capacity grows by half when it is full, so appending costs constant time on average."""

    def __init__(self, batch: int, form: RowFormat, device: torch.device) -> None:
        self.form = form
        self._rows = torch.empty(batch, 0, form.stored_width, dtype=form.dtype, device=device)
        self._row_bytes = batch * form.stored_width * self._rows.element_size()
        self.length = 0
        self.bytes_read = 0

    def append(self, rows: Tensor) -> None:
        if not rows.shape[1]:
            return
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
        stored = self._rows[:, first : self.length if stop is None else min(stop, self.length)]
        self.bytes_read += stored.shape[1] * self._row_bytes
        return self.form.decode(stored)

    def gather(self, numbers: Tensor) -> Tensor:
        """Row numbers [B, T, K] -> their rows, decoded, [B, T, K, D]."""
        self.bytes_read += numbers.shape[1] * numbers.shape[2] * self._row_bytes
        return self.form.decode(gather_rows(self._rows, numbers))

    def as_queries(self, queries: Tensor) -> Tensor:
        """Queries [..., D] as they are to meet these rows: rounded and rotated alike where the release does that."""
        return self.form.as_queries(queries)

    @property
    def stored(self) -> Tensor:
        """The rows as they lie in memory, [B, length, stored width]."""
        return self._rows[:, : self.length]

    def mark(self) -> Mark:
        return {"length": self.length}

    def rewind(self, mark: Mark) -> None:
        """Back to an earlier ``mark``, forgetting rows appended since; ``rows``, if it has them, are taken as ``stored``."""
        if "rows" in mark:
            self.reserve(mark["length"])
            _put(self._rows[:, : mark["length"]], mark["rows"])
        self.length = mark["length"]

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
        self.bytes_read = 0

    @property
    def held(self) -> int:
        return min(self.length, self._ring.shape[1])

    def last(self, count: int) -> Tensor:
        """The newest ``count`` keys in token order, decoded, [B, count, D]."""
        self.bytes_read += count * self._row_bytes
        slots = torch.arange(self.length - count, self.length, device=self._ring.device) % self._ring.shape[1]
        return self.form.decode(self._ring[:, slots])

    def read(self, in_order: bool) -> Tensor:
        """All keys held, the newest just handed out by ``append``, decoded, [B, held, D].

        ``in_order`` of tokens, or as they lie in the ring: then nothing is copied, and a softmax does not mind.
        """
        self.bytes_read += (self.held - 1) * self._row_bytes
        slots: slice | Tensor = slice(0, self.held)
        if in_order and self.length > self.held:
            slots = torch.arange(self.length, self.length + self.held, device=self._ring.device) % self.held
        return self.form.decode(self._ring[:, slots])

    def append(self, keys: Tensor) -> Tensor:
        """Take in keys [B, T, D]; returns them all as stored and decoded, the ones attention is to use."""
        window, count = self._ring.shape[1], keys.shape[1]
        kept = min(count, window)
        first = (self.length + count - kept) % window
        slots: slice | Tensor = slice(first, first + kept)  # as those of one token always are
        if first + kept > window:
            slots = torch.arange(first, first + kept, device=keys.device) % window
        stored = self.form.encode(keys)
        self._ring[:, slots] = stored[:, count - kept :].detach()
        self.length += count
        self.bytes_read += count * self._row_bytes
        return self.form.decode(stored)

    def skip(self, count: int) -> None:
        """Let ``count`` tokens pass whose keys nobody will read, because W more are appended before anyone looks."""
        self.length += count

    def mark(self) -> Mark:
        return {"length": self.length, "ring": self._ring[:, : self.held].clone()}

    def rewind(self, mark: Mark) -> None:
        """Back to an earlier ``mark``."""
        self.length = mark["length"]
        _put(self._ring[:, : self.held], mark["ring"])

    @property
    def nbytes(self) -> int:
        return self.held * self._row_bytes

    @property
    def nbytes_allocated(self) -> int:
        return self._ring.shape[1] * self._row_bytes


class BlockTail:
    """What a compressor must remember between calls: the open block and, where blocks overlap, half of the last whole one.

    Kept in float32 like the reference. ``values`` and ``scores`` [B, R, width]; the overlap holds the "a" series only, because
    the "b" series of a finished block is never read again. Its reading is not counted, as in the published figures.
    """

    bytes_read = 0

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

    def add(self, pair: Tensor) -> None:
        """More tokens for the open block, pair [2, B, t, width]; they must not fill it."""
        first, self.count = self.count, self.count + pair.shape[2]
        self._open[:, :, first : self.count] = pair.detach()

    def next_row(self) -> tuple[Tensor, Tensor]:
        """Where values and scores of one more token of the open block are to be written, [width] each, in a batch of one."""
        self.count += 1
        values, scores = self._open[:, 0, self.count - 1]
        return values, scores

    def keep(self, rest: Tensor, last_block: Tensor | None, finished: int) -> None:
        """rest [2, B, r, width] becomes the open block; last_block [2, B, R, overlap] the new look-back."""
        self.count = rest.shape[2]
        self._open[:, :, : self.count] = rest.detach()
        if last_block is not None:
            self._overlap.copy_(last_block.detach())
        self.blocks += finished

    def mark(self) -> Mark:
        return {"count": self.count, "blocks": self.blocks, "open": self.open.clone(), "overlap": self._overlap.clone()}

    def rewind(self, mark: Mark) -> None:
        """Back to an earlier ``mark``."""
        self.count, self.blocks = mark["count"], mark["blocks"]
        _put(self.open, mark["open"])
        _put(self._overlap, mark["overlap"])

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
    forms = row_formats(config, storage)
    if kind in ("csa", "csa2-full", "mla-dsa"):
        cache.index = GrowingRows(batch, forms["index"], device)
    if isinstance(config, DenseConfig | LatentConfig):
        cache.kv = GrowingRows(batch, forms[KV_PART], device)
        return cache
    d, i = config.head_dim, config.index_head_dim
    cache.window = WindowRing(batch, config.sliding_window, forms["window"], device)
    if kind in ("csa", "hca", "csa2-full"):
        cache.compressed = GrowingRows(batch, forms["compressed"], device)
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
        self.bytes_read = 0

    def count_read(self) -> None:
        """Every call reads all of it, as the calls before left it."""
        self.bytes_read += self.nbytes

    @property
    def nbytes(self) -> int:
        return self.ids.numel() * 8 + sum(state.numel() * 4 for state in self.conv.values())

    @property
    def nbytes_allocated(self) -> int:
        return self.nbytes  # kept as exact slices: nothing is reserved


class KVCache:
    """An empty cache for ``batch_size`` sequences that grow together; made by ``model.new_cache``."""

    def __init__(self, config: ModelConfig, batch_size: int, storage: str, device: torch.device) -> None:
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

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens in all and no more, so that growing up to there copies nothing."""
        for layer, ratio in zip(self.layers, self.config.compress_ratios, strict=True):
            for _, store in layer.parts():
                if isinstance(store, GrowingRows):
                    store.reserve(tokens // ratio)

    def fork(self) -> KVCache:
        """A copy that shares nothing with this one but its configuration: what it takes in leaves this one as it is."""
        self.check_whole()
        with torch.inference_mode(False):
            return deepcopy(self, {id(self.config): self.config})

    def mark(self) -> Mark:
        """What it takes to come back here with ``rewind``: a few numbers, and copies of windows and open blocks."""
        self.check_whole()
        stores = [store.mark() for layer in self.layers for _, store in layer.parts()]
        engram = (self.engram.ids, dict(self.engram.conv)) if self.engram else None  # replaced, never written to
        return {"length": self.length, "stores": stores, "engram": engram}

    def rewind(self, mark: Mark) -> None:
        """Back to an earlier ``mark`` of this cache, forgetting the tokens taken in since."""
        for store, before in zip((s for layer in self.layers for _, s in layer.parts()), mark["stores"], strict=True):
            store.rewind(before)
        if self.engram:
            self.engram.ids, self.engram.conv = mark["engram"][0], dict(mark["engram"][1])
        self.length, self.whole = mark["length"], True

    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes holding data, by part, for all sequences of the batch together."""
        return self._by_part("nbytes")

    def bytes_read_by_part(self) -> dict[str, int]:
        """Bytes of stored rows that calls have read since the cache was made or ``reset_bytes_read`` was called.

        A decoded token reads every index key, the selected entries, its window with its own key, and dense rows whole. The
        open block (``tail``) is left out; rows that several chunks of a long call read count each time.
        """
        return self._by_part("bytes_read")

    def reset_bytes_read(self) -> None:
        for _, store in self._stores():
            store.bytes_read = 0

    def _by_part(self, what: str) -> dict[str, int]:
        found = dict.fromkeys(PARTS, 0)
        if any(layer.kv is not None for layer in self.layers):
            found[KV_PART] = 0
        for part, store in self._stores():
            found[part] += getattr(store, what)
        return found

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
