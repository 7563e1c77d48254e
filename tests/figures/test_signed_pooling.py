"""Differences pooled from sparse records are those of one pair of a query and a token at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.synthetic import synthetic_trace
from workbench import trace as traces
from workbench.figures import pooling
from workbench.figures.pooling import Head, of_head
from workbench.figures.signed_pooling import largest_change
from workbench.trace import LayerTrace

LENGTH = 101
V4, V41 = ("window", "csa", "hca"), ("window", "csa2-full", "csa2-reuse", "csa2-reindex", "csa2-full", "csa2-reuse")
FAMILIES = (V4, V41, ("mla-dsa",), ("mla",), ("gqa",), ("mha",))


def painted(record: LayerTrace, head: Head) -> np.ndarray:
    """[L, L]: what a query gives to a token, in its window or through a complete entry that was made from it."""
    out = np.zeros((LENGTH, LENGTH), np.float32)
    for t in range(LENGTH):
        near = of_head(record.window_probs[t], head)
        for back in range(min(t + 1, record.window)):
            out[t, t - back] = near[record.window - 1 - back]
        if record.entry_probs is not None:
            each, probs = record.entry_pooling(t), of_head(record.entry_probs[t], head)
            given = {entry: probs[entry // each] for entry in range(record.visible_entries(t))}
        elif record.selected is not None:
            probs = of_head(record.selected_probs[t], head)
            given = {int(entry): prob for entry, prob in zip(record.selected[t], probs, strict=True) if entry >= 0}
        else:
            given = {}
        for entry, prob in given.items():
            first, last = record.entry_tokens(entry)
            out[t, first : last + 1] = np.maximum(out[t, first : last + 1], prob)
    return out


def one_by_one(runs, head, rows, columns, pool):
    change = (painted(runs[1], head) - painted(runs[0], head))[slice(*rows), slice(*columns)]
    height, width = (-(-side // each) for side, each in zip(change.shape, pool, strict=True))
    out = np.zeros((height, width), np.float32)
    for i, j in np.ndindex(out.shape):
        cell = change[i * pool[0] : (i + 1) * pool[0], j * pool[1] : (j + 1) * pool[1]]
        more, less = max(cell.max(), 0), min(cell.min(), 0)
        out[i, j] = more if more >= -less else less
    return out


def runs_of(kinds, number, **others):
    """One layer of two recordings whose numbers, choices, windows and numbers of kept entries differ."""
    settings = {"prompt_length": LENGTH, "heads": 2, "csa_ratio": 4, "hca_ratio": 16}
    one = synthetic_trace(LENGTH, 1, kinds=kinds, window=7, topk=5, **settings)
    other = synthetic_trace(LENGTH, 2, kinds=kinds, **({"window": 4, "topk": 3} | others), **settings)
    return one.layers[number], other.layers[number]


@pytest.fixture(params=[2048, 16], ids=["each entry", "rows pooled"])
def recorded(request, monkeypatch):
    """Rows over all entries recorded as they are, or as maxima of ever more of them; and some rows worked out at once, so
    that blocks begin within a cell."""
    monkeypatch.setattr(traces, "FULL_ROW_TOKENS", request.param)
    monkeypatch.setattr(pooling, "CHUNK_VALUES", 400)


@pytest.mark.parametrize(("kinds", "number"), [(kinds, n) for kinds in FAMILIES for n in range(len(kinds))])
@pytest.mark.parametrize(
    ("head", "rows", "columns", "pool"),
    [
        ("mean", (0, LENGTH), (0, LENGTH), (7, 7)),
        ("max", (0, LENGTH), (0, LENGTH), (1, 1)),
        (1, (23, 90), (5, 71), (5, 3)),
        ("mean", (40, 41), (38, 41), (1, 1)),
        ("max", (0, LENGTH), (60, 99), (11, 20)),
    ],
)
def test_a_cell_is_the_largest_change_of_its_pairs(recorded, kinds, number, head, rows, columns, pool):
    runs = runs_of(kinds, number)
    for pair in (runs, runs[::-1]):
        found = largest_change(pair, head, rows, columns, pool)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, one_by_one(pair, head, rows, columns, pool))


def test_no_entry_kept_and_windows_that_reach_over_entries(recorded):
    one, other = runs_of(V4, 1, window=19, topk=9)
    assert one.selected is not None and other.selected is not None
    none = replace(one, selected=np.full_like(one.selected, -1), selected_probs=np.zeros_like(one.selected_probs))
    some = other.selected.copy()
    some[::3, ::2] = -1  # in the middle of a row, its probability left standing
    for pair in ((none, other), (none, none), (one, replace(other, selected=some))):
        for pool in ((1, 1), (6, 9)):
            found = largest_change(pair, 0, (0, LENGTH), (0, LENGTH), pool)
            np.testing.assert_array_equal(found, one_by_one(pair, 0, (0, LENGTH), (0, LENGTH), pool))


def test_of_two_changes_of_one_size_the_one_above_0_is_kept():
    one, other = (replace(run, window_probs=np.zeros_like(run.window_probs[..., :1])) for run in runs_of(V4, 0))
    one.window_probs[0], other.window_probs[1] = 0.5, 0.5
    for pair in ((one, other), (other, one)):
        assert largest_change(pair, "max", (0, 2), (0, 2), (2, 2)).tolist() == [[0.5]]


def test_what_is_worked_out_at_once_does_not_grow_with_the_text(monkeypatch):
    """At most some values of a query for each of a block of them, whatever the length."""
    widest = 0
    real = np.sort

    def sort(values, axis=-1):
        nonlocal widest
        widest = max(widest, values.size)
        return real(values, axis=axis)

    monkeypatch.setattr(pooling, "CHUNK_VALUES", 400)
    runs = runs_of(V4, 1)
    monkeypatch.setattr(np, "sort", sort)
    largest_change(runs, "mean", (0, LENGTH), (0, LENGTH), (5, 5))
    assert 0 < widest <= 400
