"""Packed cache rows one value at a time in exact fractions, written from the rules and not from our modules.

What a row is after it has been stored and read again, as floats. (reference/deepseek-v4.md, sections 2.1, 2.2 and 5;
reference/deepseek-v41.md, section 8)
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction

E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
# Exponent 0 is subnormal; the 128th code is NaN.
E4M3 = [Fraction(c % 8, 2**9) if c < 8 else (8 + c % 8) * Fraction(2) ** (c // 8 - 10) for c in range(127)]


def nearest(value: Fraction, grid: list[Fraction]) -> Fraction:
    """The nearest member with the sign of ``value``, at most the last; of two equally near the one with the even code."""
    above = min(bisect.bisect_left(grid, abs(value)), len(grid) - 1)
    code = min((max(above - 1, 0), above), key=lambda c: (abs(grid[c] - abs(value)), c % 2))
    return grid[code] if value >= 0 else -grid[code]


def power_of_two_from(value: Fraction) -> Fraction:
    """The smallest power of two that is not below ``value``."""
    power = Fraction(1)
    while power < value:
        power *= 2
    while power / 2 >= value:
        power /= 2
    return power


def stored_block(block: Sequence[float], codes: str, scales: str) -> list[float]:
    values = [Fraction(x) for x in block]
    amax = max((abs(v) for v in values), default=Fraction(0))
    grid = E4M3 if codes == "fp8" else E2M1
    if scales == "e4m3":
        scale = nearest(max(amax, 6 * Fraction(1, 2**9)) / 6, E4M3)
    elif codes == "fp8":
        floor = Fraction.from_float(float.fromhex("0x1.a36e2ep-14"))  # 1e-4 as a float32
        scale = power_of_two_from(max(amax, floor) / 448)
    else:
        scale = power_of_two_from(max(amax, 6 * Fraction(1, 2**126)) / 6)
    return [float(nearest(v / scale, grid) * scale) for v in values]


def stored_row(row: Sequence[float], codes: str, block: int, scales: str = "e8m0", bf16_width: int = 0) -> list[float]:
    """A row after storing: blocks of codes, the last one perhaps shorter, and ``bf16_width`` trailing channels in BF16."""
    coded = len(row) - bf16_width
    out: list[float] = []
    for first in range(0, coded, block):
        out += stored_block(row[first : min(coded, first + block)], codes, scales)
    return out + [bf16(x) for x in row[coded:]]


def bf16(value: float) -> float:
    """Eight significant bits or multiples of 2^-133, ties to even (Python's own rule for ``round``)."""
    if value == 0:
        return value
    unit = Fraction(2) ** max(math.frexp(value)[1] - 8, -133)
    return float(round(Fraction(value) / unit) * unit)


def rotated(row: Sequence[float]) -> list[float]:
    """The row times the Hadamard matrix whose entry (i, j) is -1 to the number of common one bits of i and j, over sqrt(D)."""
    size = len(row)
    return [sum(x * (-1) ** (i & j).bit_count() for i, x in enumerate(row)) / math.sqrt(size) for j in range(size)]
