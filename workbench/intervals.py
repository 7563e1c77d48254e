"""Sets of time intervals as arrays of starts and ends: what they cover together, and how much of one lies under another.

A *cover* is a pair (start, end) of float64 arrays [N], sorted and disjoint; `union` makes one. All times in one unit.
"""

from __future__ import annotations

import numpy as np

Cover = tuple[np.ndarray, np.ndarray]


def union(start: np.ndarray, end: np.ndarray) -> Cover:
    """What intervals cover together: they may overlap, nest and come in any order."""
    start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
    if not len(start):
        return start, end
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order])
    first = np.concatenate([[True], start[1:] > reach[:-1]])  # begins after everything before it has ended
    last = np.concatenate([first[1:], [True]])
    return start[first], reach[last]


def length(cover: Cover) -> float:
    return float(np.sum(cover[1] - cover[0]))


def before(cover: Cover, t: np.ndarray) -> np.ndarray:
    """How much of a cover lies before each time ``t``."""
    start, end = cover
    t = np.asarray(t, np.float64)
    if not len(start):
        return np.zeros_like(t)
    whole = np.concatenate([[0.0], np.cumsum(end - start)])
    i = np.searchsorted(start, t, side="right")  # intervals begun by then; the last of them may be under way
    under_way = np.minimum(t, end[i - 1]) - end[i - 1]
    return np.where(i > 0, whole[i] + under_way, 0.0)


def shared(a: Cover, b: Cover) -> float:
    """How long both cover."""
    return float(np.sum(before(b, a[1]) - before(b, a[0])))


def both(a: Cover, b: Cover) -> Cover:
    """What both cover."""
    edges = np.unique(np.concatenate([*a, *b]))
    if len(edges) < 2:
        return edges[:0], edges[:0]
    middle = (edges[1:] + edges[:-1]) / 2
    inside = _contains(a, middle) & _contains(b, middle)
    return union(edges[:-1][inside], edges[1:][inside])


def without(a: Cover, b: Cover) -> Cover:
    """What ``a`` covers and ``b`` does not."""
    edges = np.unique(np.concatenate([*a, *b]))
    if len(edges) < 2:
        return edges[:0], edges[:0]
    middle = (edges[1:] + edges[:-1]) / 2
    inside = _contains(a, middle) & ~_contains(b, middle)
    return union(edges[:-1][inside], edges[1:][inside])


def _contains(cover: Cover, t: np.ndarray) -> np.ndarray:
    i = np.searchsorted(cover[0], t, side="right")
    ends = np.concatenate([[-np.inf], cover[1]])
    return t < ends[i]


def busy_stretches(
    cover: Cover, low: float, high: float, pixels: int, levels: int = 16
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A cover as a screen of ``pixels`` columns shows it: stretches (start, length, share), share being how much is covered.

    The share is rounded up to one of ``levels``, neighbouring columns of one level are one stretch, empty columns none. So the
    result has at most ``pixels`` stretches however many intervals there are, and none is too short to be seen.
    """
    edges = np.linspace(low, high, pixels + 1)
    share = np.diff(before(cover, edges)) * (pixels / (high - low)) if high > low else np.zeros(pixels)
    level = np.ceil(np.clip(share, 0.0, 1.0) * levels - 1e-6)
    first = np.flatnonzero(np.concatenate([[True], level[1:] != level[:-1]]))
    last = np.append(first[1:], pixels)
    shown = level[first] > 0
    return edges[first][shown], (edges[last] - edges[first])[shown], level[first][shown] / levels
