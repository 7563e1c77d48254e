"""How rows of a KV cache are stored: as they are, rounded to BF16, or packed in the mixed formats of the releases.

A packed row is made of bytes: codes (E4M3, or two E2M1 to a byte), a scale for each block of codes, the channels kept in BF16,
and padding. The last block may be shorter, a last odd E2M1 code is followed by an empty one. Scales are the smallest power of
two that keeps a block within the largest code, or that quotient itself rounded to E4M3.
(reference/deepseek-v4.md, sections 2.1, 2.2 and 5; reference/deepseek-v41.md, sections 8 and 9.1)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.config import DenseConfig, HybridConfig, LatentConfig, ModelConfig
from workbench.config.parts import KV_PART, STORAGES
from workbench.errors import InputError
from workbench.model.quant import E2M1_MAX, E4M3_MAX, E8M0_BIAS, decode_e2m1, encode_e2m1, power_of_two

# The least amax a scale is made for, so that a block of zeros has one; the E4M3 floor makes the least subnormal scale.
FP8_FLOOR, FP4_FLOOR, E4M3_SCALE_FLOOR = 1e-4, E2M1_MAX * 2.0**-126, E2M1_MAX * 2.0**-9
VALUES_AT_ONCE = 2**18
HALF_SHIFT = 256.0  # an E4M3 code read as the bits of a float16 is this much too small


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
        """[..., stored_width] -> [..., width] floating point, what the row is from now on."""

    def as_queries(self, queries: Tensor) -> Tensor:
        """Queries [..., width] as they are to meet decoded rows: rounded and rotated alike where the release does that."""


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

    def as_queries(self, queries: Tensor) -> Tensor:
        return queries


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """Blocks of codes with a scale each; ``bf16_width`` trailing channels stay BF16; rows fill a multiple of ``align`` bytes.

    Scales are powers of two in a byte ("e8m0") or a float32, or E4M3. Encoding rounds to nearest, ties to even, and no gradient
    passes. A block that holds NaN or infinity decodes to NaN; E4M3 scales saturate, at magnitudes above 6 * 448.
    """

    width: int
    codes: Literal["fp8", "fp4"]
    block: int
    scales: Literal["e8m0", "e4m3", "fp32"] = "e8m0"
    bf16_width: int = 0
    align: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def coded(self) -> int:
        """Channels stored as codes, the leading ones."""
        return self.width - self.bf16_width

    @property
    def code_bytes(self) -> int:
        return self.coded if self.codes == "fp8" else -(-self.coded // 2)

    @property
    def scale_bytes(self) -> int:
        return -(-self.coded // self.block) * (4 if self.scales == "fp32" else 1)

    @property
    def stored_width(self) -> int:
        return -(-(self.code_bytes + self.scale_bytes + 2 * self.bf16_width) // self.align) * self.align

    def encode(self, rows: Tensor) -> Tensor:
        flat = rows.detach().reshape(-1, self.width)
        out = torch.zeros(flat.shape[0], self.stored_width, dtype=torch.uint8, device=flat.device)
        for piece in self._pieces(flat):
            self._encode_into(out[piece], flat[piece].float())
        return out.view(*rows.shape[:-1], self.stored_width)

    def decode(self, stored: Tensor) -> Tensor:
        flat = stored.reshape(-1, self.stored_width)
        out = torch.empty(flat.shape[0], self.width, device=flat.device)
        for piece in self._pieces(flat):
            self._decode_into(out[piece], flat[piece])
        return out.view(*stored.shape[:-1], self.width)

    def as_queries(self, queries: Tensor) -> Tensor:
        return self.decode(self.encode(queries))

    def scales_of(self, stored: Tensor) -> Tensor:
        """What the scale of each block of packed rows [n, stored_width] is worth, [n, blocks] float32."""
        return self._factors(self._parts(stored)[1])

    def _factors(self, scales: Tensor) -> Tensor:
        if self.scales == "fp32":
            return scales.clone(memory_format=torch.contiguous_format).view(torch.float32)
        return self._scale_values(scales)

    def _scale(self, amax: Tensor) -> Tensor:
        """The scale of each block as a byte: E4M3, or E8M0 also where it will be stored as a float32."""
        if self.scales == "e4m3":
            # A divisor on the device: dividing by a number multiplies by its reciprocal on some, which rounds otherwise.
            scale = amax.clamp(min=E4M3_SCALE_FLOOR) / torch.full_like(amax[..., :1], E2M1_MAX)
            scale = scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
            return scale.masked_fill(~amax.isfinite(), 0x7F)
        floor, largest = (FP8_FLOOR, E4M3_MAX) if self.codes == "fp8" else (FP4_FLOOR, E2M1_MAX)
        exponent = power_of_two(amax.clamp(min=floor), largest) + E8M0_BIAS
        return exponent.masked_fill(~amax.isfinite(), 0xFF).to(torch.uint8)

    def _pieces(self, rows: Tensor) -> Iterator[slice]:
        """Runs of rows to work on at once: what lies between codes and values then stays in the processor's cache."""
        step = max(1, VALUES_AT_ONCE // self.width if rows.device.type == "cpu" else rows.shape[0])
        return (slice(first, first + step) for first in range(0, rows.shape[0], step))

    def _parts(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and BF16 channels of packed rows [n, stored_width], as views."""
        scales = self.code_bytes + self.scale_bytes
        return (
            packed[:, : self.code_bytes],
            packed[:, self.code_bytes : scales],
            packed[:, scales : scales + 2 * self.bf16_width],
        )

    def _encode_into(self, out: Tensor, rows: Tensor) -> None:
        """rows [n, width] float32 -> out [n, stored_width]."""
        codes, scales, kept = self._parts(out)
        blocks = F.pad(rows[:, : self.coded], (0, -self.coded % self.block)).unflatten(1, (-1, self.block))
        scale = self._scale(blocks.abs().amax(-1))
        values = self._scale_values(scale)
        scaled = (blocks / values.unsqueeze(-1)).flatten(1)[:, : self.coded]
        if self.codes == "fp8":
            codes.copy_(scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8))
        else:
            codes.copy_(encode_e2m1(F.pad(scaled, (0, self.coded % 2))))
        scales.copy_(values.view(torch.uint8) if self.scales == "fp32" else scale)
        if self.bf16_width:
            kept.copy_(rows[:, self.coded :].to(torch.bfloat16).contiguous().view(torch.uint8))

    def _decode_into(self, out: Tensor, packed: Tensor) -> None:
        """packed [n, stored_width] -> out [n, width]."""
        codes, scales, kept = self._parts(packed)
        factors = self._factors(scales)
        if self.codes == "fp8":
            # Sign, four exponent and three mantissa bits moved to where float16 has its own; a widened sign fills the gap.
            half = ((codes.view(torch.int8).to(torch.int16) << 7) & ~0x4000).view(torch.float16)
            values, factors = half.float(), factors * HALF_SHIFT
        else:
            values = decode_e2m1(codes)[:, : self.coded]
        whole = self.coded - self.coded % self.block
        blocks = (-1, self.block)
        by_block = values[:, :whole].unflatten(1, blocks)
        torch.mul(by_block, factors[:, : whole // self.block, None], out=out[:, :whole].unflatten(1, blocks))
        if whole < self.coded:
            torch.mul(values[:, whole:], factors[:, -1:], out=out[:, whole : self.coded])
        if self.bf16_width:
            out[:, self.coded :] = kept.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)

    def _scale_values(self, scales: Tensor) -> Tensor:
        """Scale bytes -> what they are worth, float32."""
        return _scale_table(self.scales == "e4m3", scales.device).index_select(0, scales.flatten().int()).view(scales.shape)


@dataclass(frozen=True, slots=True)
class RotatedFormat:
    """Rows multiplied by a Hadamard matrix before they are packed, which spreads outliers over a block's channels.

    They are read in rotated form and meet rotated queries, so scores stay what they were up to rounding.
    """

    packed: PackedFormat

    @property
    def width(self) -> int:
        return self.packed.width

    @property
    def stored_width(self) -> int:
        return self.packed.stored_width

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    def encode(self, rows: Tensor) -> Tensor:
        return self.packed.encode(hadamard(rows.detach()))

    def decode(self, stored: Tensor) -> Tensor:
        return self.packed.decode(stored)

    def as_queries(self, queries: Tensor) -> Tensor:
        return self.decode(self.encode(queries))


def hadamard(x: Tensor) -> Tensor:
    """x [..., D] times the normalised Hadamard matrix of size D, float32.

    A width that is no power of two is rotated in runs of the largest power of two that divides it.
    """
    size = x.shape[-1] & -x.shape[-1]
    return (x.float().unflatten(-1, (-1, size)) @ _hadamard_matrix(size, x.device)).flatten(-2)


@cache
def _hadamard_matrix(size: int, device: torch.device) -> Tensor:
    """[size, size], orthonormal: doubled from [[1]] as [[H, H], [H, -H]]."""
    with torch.inference_mode(False):
        signs = torch.ones(1, 1)
        while len(signs) < size:
            signs = torch.cat([torch.cat([signs, signs], dim=1), torch.cat([signs, -signs], dim=1)])
        return (signs * size**-0.5).to(device)


@cache
def _scale_table(e4m3: bool, device: torch.device) -> Tensor:
    """What each of the 256 scale bytes is worth as E4M3, or else as E8M0, [256] float32."""
    with torch.inference_mode(False):
        numbers = torch.arange(256)
        if e4m3:
            values = numbers.to(torch.uint8).view(torch.float8_e4m3fn).float()
        else:
            values = torch.exp2(numbers.double() - E8M0_BIAS).masked_fill(numbers == 255, torch.nan).float()
        return values.to(device)


def row_formats(config: ModelConfig, storage: str) -> dict[str, RowFormat]:
    """Part of the cache -> how its rows are stored; parts that no layer of this model has may be among them.

    "released" is, of V4: entries E4M3 in blocks of 64, their rotary channels BF16; index keys rotated, E2M1 in blocks of 32.
    V4.1: window keys E4M3 and index keys E2M1 in blocks of 32; entries E2M1 in blocks of 16 with E4M3 scales. V3.2: latents and
    rotated index keys E4M3 in blocks of 128 with float32 scales (rounded up to powers of two, as its released inference code
    does), the rotary key BF16. Dense caches: BF16. Raises InputError for an unknown storage.
    """
    if storage not in STORAGES:
        raise InputError(f"storage {storage!r} is unknown; choose one of {STORAGES}")
    if isinstance(config, DenseConfig):
        widths = {KV_PART: 2 * config.num_key_value_heads * config.head_dim}
    elif isinstance(config, LatentConfig):
        widths = {KV_PART: config.kv_lora_rank + config.qk_rope_head_dim, "index": config.index_head_dim}
    else:
        widths = {"window": config.head_dim, "compressed": config.head_dim, "index": config.index_head_dim}
    if storage != "released" or isinstance(config, DenseConfig):
        dtype = torch.float32 if storage == "fp32" else torch.bfloat16
        return {part: PlainFormat(width, dtype) for part, width in widths.items()}
    if isinstance(config, LatentConfig):
        latent = PackedFormat(widths[KV_PART], "fp8", 128, "fp32", config.qk_rope_head_dim)
        return {KV_PART: latent, "index": RotatedFormat(PackedFormat(widths["index"], "fp8", 128, "fp32"))}
    index = PackedFormat(widths["index"], "fp4", 32)
    if isinstance(config, HybridConfig):
        entry = PackedFormat(config.head_dim, "fp8", 64, bf16_width=config.qk_rope_head_dim, align=8)
        return {"window": entry, "compressed": entry, "index": RotatedFormat(index)}
    window, entry = PackedFormat(config.head_dim, "fp8", 32), PackedFormat(config.head_dim, "fp4", 16, "e4m3")
    return {"window": window, "compressed": entry, "index": index}
