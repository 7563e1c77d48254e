"""Engram, conditional memory: n-grams of token ids are hashed to rows of a large table on the host, gated into the streams.

The paper's form: tokenizer compression, 2- and 3-grams, several hash heads, one gate per stream, short convolution. V4.1 goes
up to 4-grams and leaves the convolution out; DeepSeek-V4 as released has no Engram. Letters: B batch, T tokens, N largest
n-gram, R rows per token, M streams, C model dim.
(reference/engram-and-overlap.md, section 1; arXiv 2601.07372; reference/deepseek-v41.md, section 6)
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor, nn

from workbench.config import DeepSeekV4Config, EngramConfig
from workbench.config.primes import table_primes
from workbench.errors import InputError
from workbench.memory.hot_rows import HotRows
from workbench.memory.rows import TableSource
from workbench.memory.table import EngramTable
from workbench.model.layers import Tap

if TYPE_CHECKING:
    from workbench.model.language_model import LanguageModel
    from workbench.progress import Report


def canonical_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Engram's tokenizer compression: [V] canonical id of every token, numbered in order of first appearance.

    Tokens whose text is the same after NFKC, accents stripped, lower case and white space folded share an id; pieces of a
    multi-byte character keep their own. (reference/engram-and-overlap.md, section 1.1)
    """
    mark = "\ue000"  # protects a token that is exactly one space from being stripped
    normalise = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex("^ $"), mark),
            normalizers.Strip(),
            normalizers.Replace(mark, " "),
        ]
    )
    numbers: dict[str, int] = {}
    out = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token], skip_special_tokens=False)
        raw = tokenizer.id_to_token(token)
        key = str(raw) if "\ufffd" in text else (normalise.normalize_str(text) or text)
        out.append(numbers.setdefault(key, len(numbers)))
    return np.asarray(out, np.int64)


def hash_multipliers(layer: int, orders: int, compressed_vocab_size: int, seed: int = 0) -> list[int]:
    """One odd multiplier per look-back, small enough that canonical id times multiplier never overflows int64."""
    half = max(1, (2**63 - 1) // compressed_vocab_size // 2)
    draws = np.random.default_rng(seed + 10007 * layer).integers(0, half, size=orders, dtype=np.int64)
    return [2 * int(r) + 1 for r in draws]


class NgramHash:
    """Turns canonical ids into row numbers of one layer's table."""

    def __init__(self, engram: EngramConfig, layer: int) -> None:
        self.orders, self.heads = engram.max_ngram_size, engram.n_heads
        primes = table_primes(engram)[engram.layer_ids.index(layer)]
        self.primes = torch.tensor(primes)
        self.offsets = torch.tensor([0, *np.cumsum(primes[:-1]).tolist()])
        self.rows = sum(primes)
        self.multipliers = hash_multipliers(layer, self.orders, engram.compressed_vocab_size, engram.seed)

    def __call__(self, ids: Tensor, lookback: Tensor, pad: int) -> Tensor:
        """Canonical ids [B, T] and those just before them [B, up to N - 1] -> rows [B, T, R] int64, order-major then head.

        mix_n = x_t m_0 XOR x_{t-1} m_1 XOR ...; row = mix_n mod prime + offset. A negative id is a masked token: looking back
        stops there as it does before the sequence, and ``pad`` stands for it and for everything older.
        """
        missing = self.orders - 1 - lookback.shape[1]
        line = torch.cat([F.pad(lookback, (missing, 0), value=-1), ids], dim=1)  # [B, N - 1 + T]
        t = ids.shape[1]
        stopped = ids < 0
        mix = ids.masked_fill(stopped, pad) * self.multipliers[0]
        per_order = []
        for back in range(1, self.orders):
            earlier = line[:, self.orders - 1 - back : self.orders - 1 - back + t]
            stopped = stopped | (earlier < 0)
            mix = mix ^ (earlier.masked_fill(stopped, pad) * self.multipliers[back])
            per_order.append(mix.unsqueeze(-1).expand(-1, -1, self.heads))
        return torch.cat(per_order, dim=-1) % self.primes + self.offsets


class HostTable(nn.Module):
    """Rows that stay in host memory whatever device the model moves to: a ``RowSource`` (memory/prefetch.py)."""

    in_memory = True

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(0.02 * torch.randn(rows, width))
        self._copy: tuple[int, int, Tensor] | None = None  # on a device: the weight's address and version, the rows

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]  # model.to(device) must not move the table
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """rows [n] -> values [n, width], into ``out`` if given; index_select releases the interpreter lock while it works."""
        return torch.index_select(self.weight, 0, rows, out=out)

    def resident(self, device: torch.device) -> Tensor:
        """All rows [rows, width] on ``device``: themselves on the host, elsewhere a copy kept until the rows change."""
        weight = self.weight.detach()
        if device == weight.device:
            return weight
        now = weight.data_ptr(), 0 if weight.is_inference() else self.weight._version
        if self._copy is None or self._copy[:2] != now or self._copy[2].device != device:
            self._copy = (*now, weight.to(device))
        return self._copy[2]


class EngramGates(NamedTuple):
    """rows [B, T, R] that were fetched and gates [B, T, M] that were applied."""

    rows: Tensor
    gates: Tensor


class Engram(nn.Module):
    """H_m <- H_m + Y_m with Y = SiLU(DWConv(RMSNorm(V))) + V, V_m = gate_m W_V e, at the start of its block.

    Without a convolution (``conv_kernel_size`` 0) Y = V.
    """

    def __init__(self, config: DeepSeekV4Config, layer: int) -> None:
        super().__init__()
        engram = config.engram
        assert engram is not None
        m, c = config.hc_mult, config.hidden_size
        self.layer, self.streams, self.width, self.eps = layer, m, c, config.rms_norm_eps
        self.dilation, self.kernel = engram.max_ngram_size, engram.conv_kernel_size
        self.state_length = engram.conv_state_length
        self.hash = NgramHash(engram, layer)
        self.table: HostTable | TableSource = HostTable(self.hash.rows, engram.head_dim)
        self.wkv = nn.Linear(engram.memory_width, (m + 1) * c, bias=False)  # one key per stream, the shared value last
        self.q_weight = nn.Parameter(torch.ones(m, c))
        self.k_weight = nn.Parameter(torch.ones(m, c))
        if self.kernel:
            self.conv_norm = nn.Parameter(torch.ones(m, c))
            self.conv = nn.Parameter(torch.zeros(m * c, self.kernel))  # silent at first: then Y = V
        self.gate_tap = Tap()

    def gates(self, streams: Tensor, keys: Tensor) -> Tensor:
        """sigmoid(sign(s) sqrt(max(|s|, 1e-6))), s = <RMSNorm(k), RMSNorm(h)> / sqrt(C), per stream; [B, T, M]."""
        q = F.rms_norm(streams.float(), (self.width,), eps=self.eps) * self.q_weight
        k = F.rms_norm(keys.float(), (self.width,), eps=self.eps) * self.k_weight
        s = (q * k).sum(-1) / math.sqrt(self.width)
        return torch.sigmoid(s.sign() * s.abs().clamp(min=1e-6).sqrt())

    def forward(
        self, streams: Tensor, rows: Tensor, memory: Tensor, past: Tensor | None = None, masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """streams [B, T, M, C], fetched rows [B, T, R] with their values memory [B, T, R * width], earlier convolution
        inputs past [B, up to 9, M * C], tokens masked [B, T] that take nothing -> the streams with Y added and the convolution
        inputs to keep, if there is a convolution.
        """
        batch, t = streams.shape[:2]
        kv = self.wkv(memory).view(batch, t, self.streams + 1, self.width)
        gates = self.gates(streams, kv[:, :, :-1])
        if masked is not None:
            gates = gates.masked_fill(masked.unsqueeze(-1), 0.0)
        self.gate_tap(EngramGates(rows, gates))
        value = gates.to(kv.dtype).unsqueeze(-1) * kv[:, :, -1:]  # [B, T, M, C]
        if not self.kernel:
            return streams + value, None
        normed = (F.rms_norm(value, (self.width,), eps=self.eps) * self.conv_norm).flatten(2)
        line = normed if past is None else torch.cat([past.to(normed.dtype), normed], dim=1)
        keep = line[:, max(0, line.shape[1] - self.state_length) :]
        line = F.pad(line, (0, 0, self.state_length + t - line.shape[1], 0))
        mixed = sum(line[:, i * self.dilation : i * self.dilation + t] * self.conv[:, i] for i in range(self.kernel))
        return streams + F.silu(mixed).view_as(value) + value, keep  # type: ignore[arg-type]


@contextmanager
def engram_off(model: LanguageModel) -> Iterator[None]:
    """Within the block this thread's calls of ``model`` run with every Engram value zero: the streams pass unchanged.

    The same numbers as from a model whose value projection is zero; rows are looked up and gates worked out as ever, and other
    threads see Engram at work. Nothing of the model changes; the hooks go when the block ends, also after an error. A cache
    filled in the block has no convolution state of Engram's, so do not go on with it outside. Raises InputError for a model
    without Engram.
    """
    layers = [block.engram for block in model.blocks if hasattr(block, "engram")]
    if not layers:
        raise InputError(f"{model.name} has no Engram to switch off; load 'tiny-v4-engram'")
    thread, width = threading.get_ident(), model.config.hidden_size

    def silence(_module: nn.Module, _inputs: tuple[Tensor, ...], kv: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        keys, value = kv.split([kv.shape[-1] - width, width], dim=-1)  # the value that all streams share comes last
        return torch.cat([keys, torch.zeros_like(value)], dim=-1)

    hooks = [layer.wkv.register_forward_hook(silence) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_canonical_ids(canonical: Tensor, engram: EngramConfig) -> None:
    """Raises InputError unless the ids are dense and as many as the configuration says: every hash depends on that number."""
    found = int(canonical.max()) + 1
    if found != engram.compressed_vocab_size or int(canonical.min()) < 0:
        raise InputError(f"tokenizer compression gives {found} ids, the config says {engram.compressed_vocab_size}")


def table_path(folder: str | Path, layer: int) -> Path:
    """Where ``write_tables`` puts the table of a layer."""
    return Path(folder) / f"engram-layer-{layer}.table"


def write_tables(model: LanguageModel, folder: str | Path, dtype: str = "fp16", progress: Report | None = None) -> list[Path]:
    """Write each Engram layer's rows as an ``EngramTable`` in ``folder`` (made if missing), for ``use_tables``.

    "fp16" keeps the rows of a shipped checkpoint, stored so, exactly; "bf16" and "fp8" round. Raises InputError for a model
    without Engram or rows too large for ``dtype``; WorkbenchError if the files cannot be written.
    """
    layers, folder = _engram_layers(model), Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); give a folder you may write in") from None
    paths = []
    for layer, module in layers.items():
        weight = module.table.weight.detach()
        pieces = (piece.float().numpy() for piece in weight.split(2**14))
        path, content = table_path(folder, layer), f"{model.name}, layer {layer}"
        EngramTable.from_rows(path, pieces, dtype, content=content, progress=progress).close()
        paths.append(path)
    return paths


def use_tables(model: LanguageModel, folder: str | Path, *, hot_rows: int = 0, in_memory: bool = False) -> None:
    """Let ``model`` read its Engram rows from the files that ``write_tables`` made, and free those it held.

    Same rows, same logits: bit for bit where the files hold the rows exactly. ``hot_rows`` puts a cache of so many rows before
    each file, for tables that memory cannot hold; ``in_memory`` reads the files whole. Rows on disk are not trained.
    Raises InputError, leaving the model as it was, for a model without Engram or a file that is missing, damaged or of
    another shape.
    """
    layers = _engram_layers(model)
    opened: dict[int, EngramTable] = {}
    try:
        for layer, module in layers.items():
            table = opened[layer] = EngramTable.open(table_path(folder, layer), in_memory=in_memory)
            rows, width = module.hash.rows, model.config.engram.head_dim
            if (table.rows, table.width) != (rows, width):
                shapes = f"{table.rows:,} rows of {table.width} values, but layer {layer} reads {rows:,} of {width}"
                raise InputError(f"{table.path} has {shapes}; make tables of this model with write_tables")
        sources = {layer: HotRows(table, hot_rows) if hot_rows else table for layer, table in opened.items()}
    except BaseException:
        for table in opened.values():
            table.close()
        raise
    for layer, module in layers.items():
        module.table = TableSource(sources[layer])


def _engram_layers(model: LanguageModel) -> dict[int, Engram]:
    if model.config.engram is None:
        raise InputError(f"{model.name} has no Engram layers, so it has no tables; load 'tiny-v4-engram'")
    return {layer: model.blocks[layer].engram for layer in model.config.engram.layer_ids}
