"""Covers of intervals, held against counting on a grid of whole numbers."""

import numpy as np
import pytest

from workbench.intervals import before, both, length, shared, union, without

GRID = 97


def random_intervals(rng, most=9):
    start = rng.integers(0, GRID, rng.integers(0, most))
    return start.astype(float), np.minimum(GRID, start + rng.integers(0, 30, len(start))).astype(float)


def cells(start, end):
    """Which of the grid's unit cells an interval covers, one by one."""
    held = np.zeros(GRID, bool)
    for a, b in zip(start, end, strict=True):
        held[int(a) : int(b)] = True
    return held


@pytest.mark.parametrize("seed", range(60))
def test_covers_agree_with_counting_cells(seed):
    rng = np.random.default_rng(seed)
    (a0, a1), (b0, b1) = random_intervals(rng), random_intervals(rng)
    in_a, in_b = cells(a0, a1), cells(b0, b1)
    a, b = union(a0, a1), union(b0, b1)
    assert np.all(a[0][1:] > a[1][:-1])  # disjoint and sorted
    assert length(a) == in_a.sum() and shared(a, b) == (in_a & in_b).sum()
    assert length(both(a, b)) == (in_a & in_b).sum() and length(without(a, b)) == (in_a & ~in_b).sum()
    assert np.array_equal(cells(*both(a, b)), in_a & in_b) and np.array_equal(cells(*without(a, b)), in_a & ~in_b)
    assert before(a, np.arange(GRID + 1)).tolist() == [in_a[:t].sum() for t in range(GRID + 1)]
