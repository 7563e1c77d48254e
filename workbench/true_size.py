"""One attention layer at its published size with random weights, and a cache of up to a million tokens filled for real.

No MoE: the experts of one layer alone are 13 GB. Filling takes every token through the layer's own compressor and index-key
path but attends to nothing, so a million tokens take minutes; then decode steps are timed at that length.
Letters: B batch (always 1), T tokens, C model dim. (reference/deepseek-v4.md, sections 1 to 5)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from workbench import cost
from workbench.checkpoint import convert
from workbench.config import HybridConfig, LatentConfig, ModelConfig, SharedStreamConfig
from workbench.errors import InputError
from workbench.measurements import ONE_LAYER, LayerMeasurement
from workbench.model.attention.dense import DenseAttention, TokenPositions
from workbench.model.attention.hybrid import HybridAttention, Positions
from workbench.model.attention.latent import LatentAttention
from workbench.model.attention.shared_stream import SharedStreamAttention
from workbench.model.kv_cache import GrowingRows, KVCache, Mark
from workbench.model.layers import Rotary
from workbench.presets import Preset, presets
from workbench.runtime import available_bytes, copy_bandwidth, device_name, pick_device, size_text, synchronise
from workbench.trace import INDEXING, SELECTING, Trace

STORAGE_OF = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MAX_LENGTH = 2**20  # tokens
DECODE_ROOM = 256  # tokens that can be decoded beyond a filled length before the cache must move
CHUNK = 1024  # tokens taken in at once; more only costs memory
MEASURED_STEPS = 8
STATE_BLOCK = 256  # tokens whose hidden states are drawn together
WORKING_COPIES = 4  # of a chunk's projections in float32, alive at once while they are stacked, weighed and summed
DECODE_BYTES_PER_LOGIT = 16  # logits of a decode step in float32: as they are, masked, their softmax, and its rounding
SCORE_BYTES = 48  # of an index score in float32: its parts, masked, and the 64-bit numbers it is sorted by
GROWING_PARTS = ("compressed", "index", "kv")
KEY_PROJECTIONS = ("wkv", "wgate", "wk", "wv", "wkv_a")  # what a token goes through on its way into a cache
FORMAT, VERSION = "workbench-true-size-layer", "1"


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One decoded token: ``output`` [1, 1, C], and the ``seconds`` from its hidden state to there.

    ``read``: part -> bytes of the cache that attention was handed for it. ``length``: tokens held, this one included.
    """

    output: Tensor
    seconds: float
    read: dict[str, int]
    length: int


def true_size_layer(
    preset: str | Preset,
    kind: str,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    storage: str | None = None,
) -> TrueSizeLayer:
    """The first layer of ``kind`` of a published model, alone, with random weights drawn from ``seed``; its cache is empty.

    ``kind`` is one of ``wb.presets[preset].layer_kinds``; V3.2 also has "mla", its dense ancestor without an indexer. It
    computes in ``dtype``, bfloat16 unless float32 is asked for, and its cache is stored alike unless ``storage`` says "bf16",
    "fp32" or "released".
    V4.1's "csa2-reindex" and "csa2-reuse" come with the layer that owns their stream, which is filled too: its cache is part of
    ``cache``, but what is timed and counted of a decode step is the layer's own.
    Raises InputError for an unknown preset, kind, dtype or storage, and for weights that do not fit in memory.
    """
    preset = presets[preset] if isinstance(preset, str) else preset
    dtype = dtype or torch.bfloat16  # half the memory, and about three times as fast on a CPU that multiplies in it
    if dtype not in STORAGE_OF:
        raise InputError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise InputError(f"seed must be a whole number from 0 to {2**31 - 1}, got {seed!r}")
    config = one_layer(preset, kind)
    where = pick_device(device)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Sublayer(config).parameters())
    for place, needed in ((torch.device("cpu"), parameters * 4), (where, parameters * dtype.itemsize)):
        if needed > available_bytes(place):  # built in float32 on the host, then converted
            free = size_text(available_bytes(place))
            raise InputError(f"the weights of one {kind} layer need {size_text(needed)} on {place} but {free} are free")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        sublayer = Sublayer(config)
    if dtype is not torch.float32:
        convert(sublayer, dtype)
    return TrueSizeLayer(preset, kind, config, sublayer.to(where).eval(), dtype, seed, storage or STORAGE_OF[dtype])


def one_layer(preset: Preset, kind: str) -> ModelConfig:
    """The preset's configuration cut down to its first layer of ``kind``, free to grow to a million tokens and a few more."""
    config, limit = preset.config, MAX_LENGTH + DECODE_ROOM
    dense_ancestor = isinstance(config, LatentConfig) and kind == "mla"
    if kind not in preset.layer_kinds and not dense_ancestor:
        known = sorted({*preset.layer_kinds, *(["mla"] if isinstance(config, LatentConfig) else [])})
        raise InputError(f"{preset.name} has no {kind!r} layer; its kinds are {', '.join(known)}")
    if isinstance(config, HybridConfig):
        kinds = tuple(found for found in config.layer_kinds if found == kind)[:1]
        return replace(config, layer_kinds=kinds, mlp_kinds=("score",), max_position_embeddings=limit)
    if isinstance(config, LatentConfig):
        topk = 0 if dense_ancestor else config.index_topk
        return replace(config, num_hidden_layers=1, index_topk=topk, max_position_embeddings=limit)
    if isinstance(config, SharedStreamConfig):
        return replace(_stream_layers(replace(config, engram=None), kind), max_position_embeddings=limit)
    return replace(config, num_hidden_layers=1, max_position_embeddings=limit)


def _stream_layers(config: SharedStreamConfig, kind: str) -> SharedStreamConfig:
    """The first layer of ``kind``, behind the layer whose stream it reads if that is another one."""
    layer = config.layer_kinds.index(kind)  # type: ignore[arg-type]
    ratio = config.compress_ratios[layer]
    if not ratio:
        return replace(
            config, compress_ratios=(0,), kv_source_layer_ids=(), index_source_layer_ids=(), candidate_source_layer_id=-1
        )
    owner = max(source for source in config.kv_source_layer_ids if source <= layer)
    return replace(
        config,
        compress_ratios=(ratio,) if owner == layer else (ratio, ratio),
        kv_source_layer_ids=(0,),
        index_source_layer_ids=(0, 1) if kind == "csa2-reindex" else (0,),
        candidate_source_layer_id=0 if config.candidate_source_layer_id == owner else -1,
    )


class Sublayer(nn.Module):
    """The attention of every layer of a configuration and its rotary tables, without anything else."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shares = isinstance(config, SharedStreamConfig)
        self.windowed = isinstance(config, HybridConfig | SharedStreamConfig)
        self.attn = nn.ModuleList(_attention(config, layer) for layer in range(config.num_hidden_layers))
        if self.windowed:
            self.window_rotary, self.compressed_rotary = Rotary(config, compressed=False), Rotary(config, compressed=True)
        else:
            self.rotary = Rotary(config)

    @property
    def layers(self) -> list[Any]:
        """The attention modules, typed."""
        return list(self.attn)

    def positions(self, start: int, count: int) -> Positions | TokenPositions:
        numbers = torch.arange(start, start + count, device=next(self.parameters()).device)
        if self.windowed:
            return Positions(start, self.window_rotary(numbers), self.compressed_rotary(numbers))
        return TokenPositions(start, self.rotary(numbers))

    def remember(self, x: Tensor, at: Positions | TokenPositions, cache: KVCache) -> None:
        """Take x [1, T, C] into every layer's cache, without attending."""
        for attention, mine in zip(self.layers, cache.layers, strict=True):
            attention.remember(x, at, mine)

    def handed_on(self, x: Tensor, at: Positions | TokenPositions, cache: KVCache) -> tuple[Any, ...]:
        """What the last layer gets besides x: in V4.1 the stream of its owner, which reads the same x; elsewhere nothing."""
        if not self.shares:
            return ()
        stream = None
        for owner, mine in zip(self.layers[:-1], cache.layers[:-1], strict=True):
            _, stream = owner(x, at, mine, stream)
        return (stream,)


def _attention(config: ModelConfig, layer: int) -> nn.Module:
    if isinstance(config, HybridConfig):
        return HybridAttention(config, config.layer_kinds[layer])
    if isinstance(config, SharedStreamConfig):
        return SharedStreamAttention(config, layer)
    return LatentAttention(config) if isinstance(config, LatentConfig) else DenseAttention(config)


class TrueSizeLayer:
    """A layer made by ``true_size_layer``; ``cache`` is its KVCache, batch 1, and grows by ``fill`` and ``decode_step``.

    What the layer reads are hidden states of unit variance drawn from ``seed`` and the position alone: however a fill is cut,
    stopped and resumed, the cache comes out the same up to rounding.
    """

    def __init__(
        self,
        preset: Preset,
        kind: str,
        config: ModelConfig,
        sublayer: Sublayer,
        dtype: torch.dtype,
        seed: int,
        storage: str,
    ) -> None:
        self.preset, self.kind, self.config, self.dtype, self.seed, self.storage = preset, kind, config, dtype, seed, storage
        self.sublayer = sublayer
        self.device = next(sublayer.parameters()).device
        self.cache = KVCache(config, 1, storage, self.device)
        self.measurements: list[LayerMeasurement] = []
        self._history: list[tuple[int, dict[str, int], int]] = []  # tokens, bytes by part, bytes reserved
        self._room = 0  # tokens there is room for
        self._fixed_bytes = self.cache.nbytes_reserved  # of an empty cache: windows and open blocks, which never grow

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.sublayer.parameters())

    @property
    def layers(self) -> int:
        """How many layers of this kind and ratio the published model has; of plain MLA as many as V3.2 has of MLA + DSA."""
        config = self.preset.config
        alike = list(zip(config.layer_kinds, config.compress_ratios, strict=True))
        return alike.count((self.kind, self.config.compress_ratios[-1])) or len(alike)

    def bytes_needed(self, length: int, *, chunk: int = CHUNK) -> int:
        """Memory that filling the cache to ``length`` tokens takes in all: weights, cache, and the work on a chunk.

        Raises InputError for a length that is no whole number from 0 to 1,048,576.
        """
        return self.weight_bytes + self._cache_bytes(_checked_length(length) + DECODE_ROOM) + self._work_bytes(length, chunk)

    def longest_fit(self, *, chunk: int = CHUNK) -> int:
        """The longest length, up to 1,048,576 tokens, that ``fill`` can reach in the memory that is free now."""
        low, high = 0, MAX_LENGTH
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._lacking(middle, chunk) <= 0 else (low, middle - 1)
        return low

    @torch.inference_mode()
    def fill(
        self,
        length: int,
        *,
        chunk: int = CHUNK,
        measure_at: Sequence[int] = (),
        progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[LayerMeasurement]:
        """Go on to ``length`` tokens in the cache, ``chunk`` at a time, attending to nothing; returns what was measured.

        At each length of ``measure_at`` the last few tokens up to it are decoded one by one and timed. After each chunk
        ``progress(held, length)`` is called, before each ``should_stop`` is asked; what is held by then stays, and the next
        ``fill`` goes on from there. An interruption (Ctrl-C) or error undoes the chunk it falls into, and nothing else.
        Raises InputError for a length below what is held or above 1,048,576, for a length to measure at that does not lie
        between, and, before anything is done, for what does not fit in memory: with the bytes and the longest length that does.
        """
        self._check(length, chunk, measure_at)
        if measure_at:
            _ = self.bandwidth_bytes_per_s  # measured while there is room for the copy
        self._reserve(length + DECODE_ROOM, chunk)
        found: list[LayerMeasurement] = []
        for stop in sorted({*measure_at, length}):
            steps = min(MEASURED_STEPS, stop - self.cache.length) if stop in measure_at else 0
            while self.cache.length < stop - steps:
                if should_stop is not None and should_stop():
                    return found
                self._take(min(chunk, stop - steps - self.cache.length))
                if progress is not None:
                    progress(self.cache.length, length)
            if steps:
                if should_stop is not None and should_stop():
                    return found
                found.append(self._measure(steps))
        return found

    @torch.inference_mode()
    def decode_step(self) -> DecodeStep:
        """One more token, drawn like all others, attends to the cache; the first 256 beyond a filled length copy nothing.

        Raises InputError at the end of the positions, and where the cache would have to grow and cannot.
        """
        if self.cache.length >= self._room:
            self._reserve(self.cache.length + DECODE_ROOM, 1)
        x, at = self._states(self.cache.length, 1), self.sublayer.positions(self.cache.length, 1)
        with self._all_or_nothing(1):
            handed_on = self.sublayer.handed_on(x, at, self.cache)
            self.cache.reset_bytes_read()
            synchronise(self.device)
            start = time.perf_counter()
            output = self.sublayer.layers[-1](x, at, self.cache.layers[-1], *handed_on)
            synchronise(self.device)
            seconds = time.perf_counter() - start
        output = output[0] if handed_on else output
        return DecodeStep(output, seconds, self.cache.bytes_read_by_part(), self.cache.length)

    @cached_property
    def bandwidth_bytes_per_s(self) -> float:
        """The copy bandwidth of this layer's device, measured when first asked for."""
        return copy_bandwidth(str(self.device))

    @property
    def trace(self) -> Trace:
        """How the cache grew while it was filled, as a run would record it: ``wb.KVCacheGrowth`` draws it."""
        steps = [entry for entry in self._history if entry[0]]
        length = steps[-1][0] if steps else 0
        parts = self.cache.nbytes_by_part()
        return Trace(
            model=f"{self.preset.title} {self.kind}",
            what=f"{ONE_LAYER}; random weights",
            device=device_name(self.device),
            config=self.config.to_dict(),
            token_ids=np.zeros(length, np.int32),
            token_texts=("",) * length,
            prompt_length=length,
            step_starts=np.array([0, *(held for held, _, _ in steps)][: len(steps)], np.int32),
            cache_bytes={part: np.array([held[part] for _, held, _ in steps], np.int64) for part in parts},
            cache_reserved=np.array([reserved for _, _, reserved in steps], np.int64),
            storage=self.storage,
            notes={"measurements": [found.to_dict() for found in self.measurements]},
        )

    def save(self, path: str | Path) -> Path:
        """Write the cache as it is into one safetensors file, from which ``resume`` goes on; needs as much memory again."""
        path = Path(path)
        if self.cache.nbytes > available_bytes():
            needed, free = size_text(self.cache.nbytes), size_text(available_bytes())
            raise InputError(f"saving needs {needed} of memory beside the cache but {free} are free")
        tensors: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for name, store in self._stores(self.cache):
            for key, value in _saved(store).items():
                kept = tensors if isinstance(value, Tensor) else counts
                kept[f"{name}.{key}"] = value
        about = {"format": FORMAT, "version": VERSION, "settings": self._settings(), "counts": json.dumps(counts)}
        about["length"] = str(self.cache.length)
        unfinished = path.with_name(path.name + ".part")
        safetensors.torch.save_file(tensors, unfinished, metadata=about)
        unfinished.replace(path)
        return path

    def resume(self, path: str | Path) -> int:
        """Take over the cache that ``save`` wrote for a layer of the same settings; returns the tokens it holds.

        Raises InputError for a file that is missing, truncated or foreign, of other settings, or too large for the memory;
        the cache at hand then stays as it was.
        """
        path, fresh = Path(path), KVCache(self.config, 1, self.storage, self.device)
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT or about.get("version") != VERSION:
                    raise InputError(f"{path} holds no {FORMAT} of version {VERSION}")
                if about["settings"] != self._settings():
                    raise InputError(f"{path} was saved by another layer: {_difference(about['settings'], self._settings())}")
                length, counts = int(about["length"]), json.loads(about["counts"])
                if (lacking := self._lacking(_checked_length(min(length, MAX_LENGTH)), 1)) > 0:
                    raise InputError(f"{path} holds {length:,} tokens, for which {size_text(lacking)} of memory are missing")
                for name, store in self._stores(fresh):
                    store.rewind({key: _read(file, counts, f"{name}.{key}", of) for key, of in _saved(store).items()})
                fresh.length = length
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())
            raise InputError(f"{path} is damaged, truncated or no saved layer ({type(error).__name__}: {reason})") from None
        expected = cost.kv_bytes(self.config, length, self.storage)
        if fresh.nbytes_by_part() != {part: expected[part] for part in fresh.nbytes_by_part()}:
            raise InputError(
                f"{path} is damaged: {length:,} tokens would hold {expected['total']:,} B, it has {fresh.nbytes:,}"
            )
        self.cache, self._room = fresh, length
        self._history = [(length, fresh.nbytes_by_part(), fresh.nbytes_reserved)]
        return length

    def _take(self, count: int) -> None:
        """The next ``count`` tokens into the cache, without attending."""
        x, at = self._states(self.cache.length, count), self.sublayer.positions(self.cache.length, count)
        with self._all_or_nothing(count):
            self.sublayer.remember(x, at, self.cache)
        self._history.append((self.cache.length, self.cache.nbytes_by_part(), self.cache.nbytes_reserved))

    def _measure(self, steps: int) -> LayerMeasurement:
        """Decode the next ``steps`` tokens and say what the median one took."""
        taken = [self.decode_step() for _ in range(steps)]
        length, held = self.cache.length, dict.fromkeys(self.cache.nbytes_by_part(), 0)
        for part, store in self.cache.layers[-1].parts():
            held[part] += store.nbytes
        self._history.append((length, self.cache.nbytes_by_part(), self.cache.nbytes_reserved))
        found = LayerMeasurement(
            preset=self.preset.name,
            kind=self.kind,
            length=length,
            storage=self.storage,
            device=device_name(self.device),
            held=held,
            read=taken[-1].read,
            weight_bytes=sum(p.nbytes for p in self.sublayer.layers[-1].parameters()),
            step_s=median(step.seconds for step in taken),
            steps=steps,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
        )
        self.measurements.append(found)
        return found

    @contextmanager
    def _all_or_nothing(self, count: int) -> Iterator[None]:
        """``count`` tokens go in whole, or the cache is as before: an error or Ctrl-C may come between any two of its parts."""
        before: list[tuple[Any, Mark]] = [(store, store.mark()) for _, store in self._stores(self.cache)]
        try:
            yield
            self.cache.length += count
        except BaseException:
            for store, mark in before:
                store.rewind(mark)
            raise

    def _states(self, first: int, count: int) -> Tensor:
        """Hidden states of ``count`` tokens from ``first`` on, [1, count, C], of unit variance.

        Drawn in blocks with a seed of their own, so that a token's state does not depend on how a fill is cut. A random byte a
        value, because a normal number takes thirty times as long and projections of thousands of values cannot tell.
        """
        generator, width = torch.Generator(self.device), self.config.hidden_size
        states = torch.empty(1, count, width, dtype=self.dtype, device=self.device)
        words = torch.empty(STATE_BLOCK, -(-width // 8), dtype=torch.int64, device=self.device)
        for block in range(first // STATE_BLOCK, -(-(first + count) // STATE_BLOCK)):
            words.random_(-(2**63), None, generator=generator.manual_seed(self.seed * 2**32 + block))
            start = max(first, block * STATE_BLOCK)
            drawn = words.view(torch.int8)[start - block * STATE_BLOCK : first + count - block * STATE_BLOCK, :width]
            states[0, start - first : start - first + len(drawn)] = drawn
        return states.add_(0.5).mul_(math.sqrt(12) / 256)

    def _check(self, length: int, chunk: int, measure_at: Sequence[int]) -> None:
        held = self.cache.length
        if _checked_length(length) < held:
            raise InputError(f"the cache holds {held:,} tokens already and cannot shrink to {length:,}; make a new layer")
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise InputError(f"chunk must be a whole number of tokens from 1, got {chunk!r}")
        for point in measure_at:
            if not held < _checked_length(point) <= length:
                raise InputError(f"measure_at must lie between the {held:,} tokens held and {length:,}, got {point:,}")

    def _reserve(self, tokens: int, chunk: int) -> None:
        """Room for ``tokens`` tokens, or an InputError that says what they need and what would fit."""
        length = tokens - DECODE_ROOM
        if self._lacking(length, chunk) > 0:
            needed = {"weights": self.weight_bytes, "cache": self._cache_bytes(tokens), "work": self._work_bytes(length, chunk)}
            parts = ", ".join(f"{name} {nbytes:,}" for name, nbytes in needed.items())
            raise InputError(
                f"one {self.kind} layer of {self.preset.name} needs {sum(needed.values()):,} bytes at {length:,} tokens"
                f" ({parts}); beside the weights {size_text(available_bytes(self.device))} are free on {self.device};"
                f" the longest length that fits is {self.longest_fit(chunk=chunk):,} tokens"
            )
        if tokens > self._room:
            self.cache.reserve(tokens)
            self._room = tokens

    def _lacking(self, length: int, chunk: int) -> float:
        """Bytes missing to fill up to ``length`` now, 0 or less if it fits; a cache that grows is copied, so it counts anew."""
        cache = self._cache_bytes(length + DECODE_ROOM)
        grows = cache > self.cache.nbytes + self.cache.nbytes_reserved
        return (cache if grows else 0) + self._work_bytes(length, chunk) - available_bytes(self.device)

    def _cache_bytes(self, tokens: int) -> int:
        """Bytes a cache with room for ``tokens`` tokens allocates: what grows, by formula, and what does not."""
        by_part = cost.kv_bytes(self.config, tokens, self.storage)
        return self._fixed_bytes + sum(by_part.get(part, 0) for part in GROWING_PARTS)

    def _work_bytes(self, length: int, chunk: int) -> int:
        """About what a chunk, or a decode step at ``length``, holds for a moment beside weights and cache."""
        modules = self.sublayer.named_modules()
        width = sum(m.out_features for name, m in modules if name.rpartition(".")[2] in KEY_PROJECTIONS)  # type: ignore[misc]
        taking_in = chunk * (WORKING_COPIES * 4 * width + self.config.hidden_size * (4 + self.dtype.itemsize))
        ratio = self.config.compress_ratios[-1]
        rows = length // ratio if ratio else 0
        attended = min(rows, self.config.index_topk) if self.kind in SELECTING and self.config.index_topk else rows
        scored = rows * SCORE_BYTES if self.kind in INDEXING else 0
        return max(taking_in, DECODE_BYTES_PER_LOGIT * self.config.num_attention_heads * attended + scored)

    def _settings(self) -> str:
        settings = {"preset": self.preset.name, "kind": self.kind, "config": asdict(self.config), "seed": self.seed}
        return json.dumps(settings | {"dtype": str(self.dtype), "storage": self.storage, "device": self.device.type})

    @staticmethod
    def _stores(cache: KVCache) -> list[tuple[str, Any]]:
        """The stores of all layers under names of their own."""
        return [(f"layer.{i}.{n}", s) for i, layer in enumerate(cache.layers) for n, (_, s) in enumerate(layer.parts())]


def _saved(store: Any) -> Mark:
    """What brings a store back on another day: its mark, and the rows where it holds any."""
    return store.mark() | ({"rows": store.stored.contiguous()} if isinstance(store, GrowingRows) else {})


def _read(file: Any, counts: dict[str, Any], name: str, like: Any) -> Any:
    """One value of a mark from a file: a tensor where the same value of an empty store is one, else a count."""
    if isinstance(like, Tensor):
        return file.get_tensor(name)
    if not isinstance(counts[name], int) or not 0 <= counts[name] <= MAX_LENGTH + DECODE_ROOM:
        raise InputError(f"{name} must be a count of tokens or entries, got {counts[name]!r}")
    return counts[name]


def _difference(saved: str, own: str) -> str:
    """Which settings of a saved layer differ, in words."""
    theirs, ours = json.loads(saved), json.loads(own)
    return ", ".join(f"{name} is {theirs.get(name)!r}, not {ours[name]!r}" for name in ours if theirs.get(name) != ours[name])


def _checked_length(length: int) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= MAX_LENGTH:
        raise InputError(f"length must be a whole number from 0 to {MAX_LENGTH:,} tokens, got {length!r}")
    return length
