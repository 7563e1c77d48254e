"""The number formats of released weights: FP8 E4M3 in square blocks and FP4 E2M1 in runs of 32, both with E8M0 scales.

E4M3: 1 sign, 4 exponent, 3 mantissa bits, largest value 448. E2M1: 1, 2 and 1 bits, magnitudes 0 to 6. E8M0: a bare
exponent byte s, worth 2^(s - 127), 255 meaning NaN. (Open Compute Project, Microscaling Formats v1.0; which tensor uses
which format: reference/deepseek-v4.md, section 0.) Products of a value and a power-of-two scale are exact in float32.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import InputError

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits of a code; bit 3 is the sign
FP4_BLOCK = 32  # values along K that share one scale
E8M0_BIAS = 127
FLOAT32_MANTISSA = 23  # bits


def decode_scale(scale: Tensor) -> Tensor:
    """Scales as float32: E8M0 (its own dtype or raw bytes) becomes 2^(s - 127), floating point is only widened.

    Raises InputError for NaN, infinity or another dtype.
    """
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    if not scale.dtype.is_floating_point:
        raise InputError(f"a scale must be E8M0 bytes or floating point, got {scale.dtype}")
    return _finite(scale.float(), "scale")


def dequantise_fp8_blocks(weight: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """E4M3 values times the scale of their block, float32.

    weight [..., R, C] E4M3; scale [..., r, c], one per ``block`` (rows, columns) tile, the last tiles possibly cut short.
    Without ``block`` its size follows from the shapes: a power of two where one fits (128 and 32 are the released ones).
    Raises InputError for shapes that do not match, or NaN or infinity in either tensor or in the product.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise InputError(f"FP8 weights must be float8_e4m3fn, got {weight.dtype}")
    if weight.ndim < 2 or scale.shape[:-2] != weight.shape[:-2] or scale.ndim != weight.ndim or 0 in scale.shape:
        raise InputError(f"scales {_shape(scale)} do not tile FP8 weights {_shape(weight)}; expected one per block")
    out, factors = weight.float(), decode_scale(scale)
    for axis, given in ((-2, block and block[0]), (-1, block and block[1])):
        size, tiles = weight.shape[axis], scale.shape[axis]
        step = given or _block_size(size, tiles)
        if not step or -(-size // step) != tiles:
            raise InputError(f"scales {_shape(scale)} do not tile FP8 weights {_shape(weight)} ({block or 'one size'})")
        factors = factors.repeat_interleave(min(step, size), dim=axis).narrow(axis, 0, size)
    return _finite(out.mul_(factors), "FP8 tensor")


def quantise_fp8_blocks(values: Tensor, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """The inverse: E4M3 codes and one E8M0 scale per block, the smallest power of two that keeps the block within 448.

    values [..., R, C] -> weight [..., R, C] float8_e4m3fn, scale [..., ceil(R / rows), ceil(C / columns)] float8_e8m0fnu.
    Rounds to nearest, ties to even. Raises InputError for NaN, infinity or fewer than two axes.
    """
    if values.ndim < 2 or min(block) < 1:
        raise InputError(f"FP8 blocks need a matrix and a positive block, got {_shape(values)} and {block}")
    (rows, columns), (height, width) = values.shape[-2:], block
    padded = F.pad(_finite(values.float(), "values"), (0, -columns % width, 0, -rows % height))
    tiles = padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))  # [..., r, height, c, width]
    scale = _power_of_two_scale(tiles.abs().amax((-3, -1)), E4M3_MAX)  # [..., r, c]
    codes = (tiles / scale.float().unsqueeze(-1).unsqueeze(-3)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    whole = codes.view(torch.uint8).flatten(-4, -3).flatten(-2)[..., :rows, :columns]
    return whole.contiguous().view(torch.float8_e4m3fn), scale


def dequantise_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """E2M1 values times the scale of their run of 32, float32.

    packed [..., K / 2], two codes per byte with the earlier value in the low four bits, as uint8, int8 or
    float4_e2m1fn_x2; scale [..., K / 32]. Returns [..., K].
    Raises InputError for shapes that do not match, or NaN or infinity in the scales or the product.
    """
    if packed.dtype not in (torch.uint8, torch.int8, torch.float4_e2m1fn_x2):
        raise InputError(f"FP4 weights must be packed in uint8, int8 or float4_e2m1fn_x2, got {packed.dtype}")
    if not packed.ndim or scale.shape[:-1] != packed.shape[:-1] or 2 * packed.shape[-1] != FP4_BLOCK * scale.shape[-1]:
        raise InputError(f"scales {_shape(scale)} do not fit packed FP4 {_shape(packed)}; expected one per {FP4_BLOCK} values")
    runs = decode_e2m1(packed.view(torch.uint8)).unflatten(-1, (-1, FP4_BLOCK))  # [..., K / 32, 32]
    return _finite(runs.mul_(decode_scale(scale).unsqueeze(-1)), "FP4 tensor").flatten(-2)


def quantise_fp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: packed E2M1 codes and one E8M0 scale per 32, the smallest power of two that keeps the run within 6.

    values [..., K], K a multiple of 32 -> packed [..., K / 2] uint8, scale [..., K / 32] float8_e8m0fnu.
    Rounds to nearest, ties to the even code. Raises InputError for NaN, infinity or another K.
    """
    if not values.ndim or values.shape[-1] % FP4_BLOCK:
        raise InputError(f"FP4 needs a last axis that is a multiple of {FP4_BLOCK}, got {_shape(values)}")
    runs = _finite(values.float(), "values").unflatten(-1, (-1, FP4_BLOCK))
    scale = _power_of_two_scale(runs.abs().amax(-1), E2M1_MAX)
    return encode_e2m1((runs / scale.float().unsqueeze(-1)).flatten(-2)), scale


def encode_e2m1(values: Tensor) -> Tensor:
    """Values [..., K], K even and magnitudes within 6, to the nearest E2M1 code, ties to even: [..., K / 2] uint8.

    The earlier value of a pair takes the low four bits.
    """
    values = values.float()
    magnitude = values.abs().clamp_(max=E2M1_MAX)
    # From 1 on a code is the float's own exponent and first mantissa bit, rounded, less an offset; below, neighbours lie 0.5
    # apart. Each of the two is at most the code where it does not apply.
    bits = magnitude.view(torch.int32)
    upper = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - 2 * (E8M0_BIAS - 1)
    lower = torch.round(2 * magnitude).clamp_(max=2).to(torch.int32)
    codes = torch.maximum(upper, lower) | ((values.view(torch.int32) >> 28) & 8)
    pairs = codes.to(torch.uint8).view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def decode_e2m1(packed: Tensor) -> Tensor:
    """Packed codes [..., K / 2] uint8 -> values [..., K] float32."""
    pairs = _e2m1_pairs(packed.device).index_select(0, packed.reshape(-1).to(torch.int32))
    return pairs.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])


@cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """[256]: a byte's low and high value, two float32 side by side under one float64 so that one look-up fetches both."""
    with torch.inference_mode(False):
        signed = torch.tensor([*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)])
        both = torch.stack([signed.repeat(16), signed.repeat_interleave(16)], dim=-1)
        return both.view(torch.float64).squeeze(-1).to(device)


def power_of_two(amax: Tensor, largest: float) -> Tensor:
    """The exponent of the smallest power of two with amax / 2^exponent <= largest, int32; ``amax`` float32, normal, positive.

    Bits of positive floats count up like the numbers, so their difference shifted by a mantissa is the exponent's: no
    division or logarithm rounds here.
    """
    one_less_than_an_exponent = (1 << FLOAT32_MANTISSA) - 1
    origin = int(torch.tensor(largest).view(torch.int32)) - one_less_than_an_exponent
    return (amax.contiguous().view(torch.int32) - origin) >> FLOAT32_MANTISSA


def _power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """The smallest E8M0 scale with amax / scale <= largest; 1 for a block of zeros."""
    exponent = power_of_two(amax, largest).masked_fill(amax == 0, 0)  # below the normal numbers it is clamped anyway
    return (exponent.clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def _block_size(size: int, tiles: int) -> int:
    """The power of two that cuts ``size`` into ``tiles``, else the exact divisor; 0 if neither does."""
    powers = (1 << power for power in range(max(size, 1).bit_length() + 1))
    return next((b for b in powers if -(-size // b) == tiles), 0 if size % tiles else size // tiles)


def _finite(values: Tensor, what: str) -> Tensor:
    if not values.isfinite().all():
        raise InputError(f"the {what} holds NaN or infinity; every number must be finite")
    return values


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
