"""How one row of a host table is stored: fp16, bf16, or FP8 E4M3 with one UE8M0 scale per 32 values. numpy only.

    fp16   2 bytes a value, read as float16
    bf16   2 bytes a value, read as float32
    fp8    W codes, then a scale byte for each run of 32: 264 bytes for 256 values, read as float32: e4m3 * 2^(s - 127)

(reference/deepseek-v41.md, section 6, "Row storage".) Decoding is exact: float32 holds every one of these values. Stored rows
are arrays of bytes [n, row bytes]; values are arrays [n, W].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.errors import InputError

FORMATS = ("fp16", "bf16", "fp8")
SCALE_RUN = 32  # values that share one scale
SCALE_BIAS = 127
_NO_SCALE, _NO_CODE = 255, 0x7F  # NaN as a scale, and as a code without its sign
_ALWAYS_FINITE = 246  # the largest scale byte with which no code leaves float32
_SIGN_AND_VALUE = np.int32(-0x78100000)  # 0x87F00000: where a code, moved up by 20 bits, lies in a float32
_BIAS_DIFFERENCE = np.float32(2.0**120)  # float32's exponents count from -127, E4M3's from -7
_SCALES = np.ldexp(np.float32(1), np.arange(_NO_SCALE) - SCALE_BIAS).astype(np.float32)


def row_bytes(dtype: str, width: int) -> int:
    """Bytes of a row. Raises InputError for an unknown dtype."""
    if dtype not in FORMATS:
        raise InputError(f"a table's dtype is one of {', '.join(FORMATS)}, got {dtype!r}")
    return width + -(-width // SCALE_RUN) if dtype == "fp8" else 2 * width


def width_of(dtype: str, nbytes: int) -> int:
    """Values of a row of that many bytes."""
    return nbytes - -(-nbytes // (SCALE_RUN + 1)) if dtype == "fp8" else nbytes // 2


def value_dtype(dtype: str) -> np.dtype:
    """What rows are read as: float16 where that is what is stored, else float32."""
    return np.dtype(np.float16 if dtype == "fp16" else np.float32)


def decode(raw: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """Stored rows [n, row bytes], contiguous, to values [n, W], into ``out`` if given; fp16 without ``out`` is a view."""
    if dtype == "fp16":
        values = raw.view(np.float16)
        if out is None:
            return values
        np.copyto(out, values)
        return out
    width = width_of(dtype, raw.shape[1])
    out = np.empty((len(raw), width), np.float32) if out is None else out
    if dtype == "bf16":  # the upper half of a float32
        bits = out.view(np.uint32)
        np.copyto(bits, raw.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
        return out
    # An E4M3 code's exponent and mantissa, moved up, are those of a float32 that is 2^120 times smaller, subnormals included.
    moved = out.view(np.int32)
    np.copyto(moved, raw[:, :width].view(np.int8))  # the sign fills the upper bits
    np.left_shift(moved, 20, out=moved)
    np.bitwise_and(moved, _SIGN_AND_VALUE, out=moved)
    np.multiply(out, _BIAS_DIFFERENCE, out=out)
    scales = np.repeat(np.take(_SCALES, raw[:, width:], mode="clip"), SCALE_RUN, axis=1)
    with np.errstate(over="ignore"):  # only the largest scales, which no encoder chooses, go beyond float32
        return np.multiply(out, scales[:, :width], out=out)


def encode(values: Any, dtype: str) -> np.ndarray:
    """Values [n, W] to stored rows [n, row bytes], rounded to nearest, ties to even; an fp8 scale is the smallest power of two
    that keeps its 32 values within 448.

    Raises InputError for values that are not finite, before or after rounding.
    """
    array = np.ascontiguousarray(values)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(f"rows to store are floating-point values [n, width], got {array.dtype} {list(array.shape)}")
    nbytes = row_bytes(dtype, array.shape[1])
    if not np.isfinite(array).all():
        raise InputError(f"{_first_not_finite(array)} is not finite; every value of a table must be")
    with np.errstate(over="ignore"):
        stored = array.astype(np.float16 if dtype == "fp16" else np.float32)
    if dtype == "bf16" and stored.size:
        bits = stored.view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
        bits &= np.uint32(0xFFFF0000)
    if not np.isfinite(stored).all():
        raise InputError(f"{_first_not_finite(stored)} is too large for {dtype}; scale the rows or choose another dtype")
    if dtype == "fp16":
        return stored.view(np.uint8)
    if dtype == "bf16":
        return (stored.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    import torch

    from workbench.model.quant import quantise_fp8_blocks

    raw = np.empty((len(stored), nbytes), np.uint8)
    codes, scales = quantise_fp8_blocks(torch.from_numpy(stored), (1, SCALE_RUN))
    raw[:, : array.shape[1]] = codes.view(torch.uint8).numpy()
    raw[:, array.shape[1] :] = scales.view(torch.uint8).numpy()
    return raw


def check_stored(raw: np.ndarray, dtype: str, width: int) -> np.ndarray:
    """Rows [n, row bytes] that are stored as they are. Raises InputError for another shape, NaN or infinity."""
    if raw.ndim != 2 or raw.shape[1] != row_bytes(dtype, width):
        raise InputError(f"stored {dtype} rows of {width} values have {row_bytes(dtype, width)} bytes, got {list(raw.shape)}")
    raw = np.ascontiguousarray(raw)
    if dtype == "fp8":
        bad = bool(((raw[:, :width] & _NO_CODE) == _NO_CODE).any() or (raw[:, width:] == _NO_SCALE).any())
        if not bad and (raw[:, width:] > _ALWAYS_FINITE).any():
            with np.errstate(over="ignore"):
                bad = not np.isfinite(decode(raw, dtype)).all()
    else:
        exponent = np.uint16(0x7C00 if dtype == "fp16" else 0x7F80)
        bad = bool(((raw.view(np.uint16) & exponent) == exponent).any())
    if bad:
        raise InputError(f"the stored {dtype} rows hold NaN or infinity; every value of a table must be finite")
    return raw


def random_rows(draw: np.random.Generator, n: int, width: int, dtype: str) -> np.ndarray:
    """Stored random rows [n, row bytes]: both signs, magnitudes spread over the powers of two below 2^-7 (fp8: 2^-5)."""
    if dtype == "fp8":
        raw = draw.integers(0, 256, (n, row_bytes(dtype, width)), np.uint8)
        codes, scales = raw[:, :width], raw[:, width:]
        codes -= (codes & _NO_CODE) == _NO_CODE
        scales &= 3
        scales += np.uint8(SCALE_BIAS - 17)  # 2^-17 to 2^-14: 448 * 2^-14 is 0.027
        return raw
    bits = draw.integers(0, 2**16, (n, width), np.uint16)
    if dtype == "fp16":
        bits &= 0x9FFF  # three bits of the exponent stay: 2^-14 to 2^-8, and subnormals
    else:
        bits &= 0x83FF
        bits |= 0x3800  # 2^-15 to 2^-8
    return bits.view(np.uint8)


def _first_not_finite(array: np.ndarray) -> str:
    row, column = np.argwhere(~np.isfinite(array))[0]
    return f"value {column} of row {row}"
