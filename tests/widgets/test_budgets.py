"""What views send stays small however long the trace: 250 KB for each view that takes one, 3 MB for a notebook of all of them.

Counted is all that a page gets for a view: the state of each of its parts with pictures and charts, and the outputs, as the
base64 and JSON a saved notebook keeps. Scripts and styles that are the same for every trace are left out.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import ipywidgets as ipw
import numpy as np
import pytest

import workbench as wb
from benchmarks.tiles import sparse_trace
from tests.synthetic import synthetic_trace
from workbench.trace import Span, Timeline, Trace

VIEW_BYTES, NOTEBOOK_BYTES = 250_000, 3_000_000
LENGTHS = (128, 512, 2048, 8192, 65_536)
VIEWS = ("AttentionExplorer", "KVCacheGrowth", "OverlapTimeline", "EngramExplorer", "CacheSlots", "RunControls")
SAME_FOR_ALL = ("_esm", "_css")


@cache
def long_trace(length: int) -> Trace:
    """Sparse records of ``length`` tokens with Engram, spans and cache bytes of every step; the last eighth was decoded."""
    pattern = synthetic_trace(64)
    decoded = min(length // 8, 4096)
    starts = np.array([*range(0, length - decoded, 256), *range(length - decoded, length)], np.int32)
    ends = np.append(starts[1:], length)
    turns = np.arange(length) % 64
    spans = [
        Span(lane, name, step, step * 1e-2 + at, step * 1e-2 + at + 4e-3)
        for step in range(len(starts))
        for lane, name, at in (
            ("compute", "layer 0", 0.0),
            ("lookup", "layer 1 gather", 1e-3),
            ("stall", "layer 1 waits", 5e-3),
        )
    ]
    bare = sparse_trace(length)
    return replace(
        pattern,
        token_ids=np.zeros(length, np.int32),
        token_texts=(*bare.token_texts, "."),
        prompt_length=length - decoded,
        layers=bare.layers,
        engram=tuple(replace(e, rows=e.rows[turns], gates=e.gates[turns]) for e in pattern.engram),
        timeline=Timeline("measured", tuple(spans), "CPU"),
        step_starts=starts,
        cache_bytes={part: np.linspace(0, 1e6, len(starts)).astype(np.int64) for part in pattern.cache_bytes},
        cache_reserved=np.full(len(ends), 4096, np.int64),
        top_ids=np.zeros((len(starts), 5), np.int32),
        top_probs=np.full((len(starts), 5), 0.2, np.float32),
        next_ids=np.zeros(len(starts), np.int32),
    )


def parts(widget: Any) -> Iterator[Any]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def plain(value: Any) -> Any:
    """As JSON takes it; bytes as a notebook keeps them."""
    if isinstance(value, bytes | memoryview):
        return b64encode(value).decode()
    return "IPY_MODEL_" + value.model_id if isinstance(value, ipw.Widget) else str(value)


def sent_bytes(widget: Any) -> int:
    states = [{k: v for k, v in part.get_state().items() if k not in SAME_FOR_ALL} for part in parts(widget)]
    return len(json.dumps(states, default=plain).encode())


@pytest.mark.parametrize("length", LENGTHS)
def test_every_view_and_a_notebook_of_them_stay_within_their_budgets(length):
    trace = long_trace(length)
    sent = {}
    for name in VIEWS:
        view = getattr(wb, name)(trace)
        sizes = []
        for layer in range(len(trace.layers)):
            view.session.layer = layer
            for token in (0, length // 2, length - 1):
                view.session.choose_token(token)
                sizes.append(sent_bytes(view))
        sent[name] = max(sizes)
        view.close()
    assert all(size <= VIEW_BYTES for size in sent.values()), sent
    assert sum(sent.values()) <= NOTEBOOK_BYTES, sent
    assert sent["AttentionExplorer"] > 5_000  # pictures and charts are among what is counted


def test_views_of_a_model_beside_the_trace_stay_small():
    model = wb.load("tiny-v4", device="cpu")
    run = wb.run(model, wb.sample_text()[:1400], max_new_tokens=1)
    assert run.wait(120)
    for view in (wb.Microscope(run), wb.Stepper(run), wb.HideANeedle(run, model)):
        view.session.layer = 1
        assert sent_bytes(view) <= VIEW_BYTES, type(view).__name__


@pytest.mark.slow
def test_a_thousand_moves_leave_memory_as_it_is():
    view = wb.AttentionExplorer(long_trace(8192))
    held = []
    for move in range(1001):
        view.session.choose_token(move * 7919 % 8192)
        if move in (200, 1000):
            held.append(resident_bytes())
    assert held[1] - held[0] <= 20_000_000


def resident_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * 4096
    except OSError:
        pytest.skip("this system does not say how much memory a process holds")
