"""What records of a run say of themselves: spans, entries and their tokens, index scores, steps."""

import dataclasses
import math
import threading
from typing import Any

import numpy as np
import pytest

from tests.synthetic import synthetic_trace
from workbench import scoring
from workbench.errors import InputError
from workbench.trace import FULL_ROW_TOKENS, Span, Timeline, Trace, entry_pooling


@pytest.fixture(scope="module")
def trace() -> Trace:
    return dataclasses.replace(synthetic_trace(61, needle=13), notes={"seed": 3, "topk": None, "text": "Ж\u2028<b>"})


def assert_same(one: Any, other: Any, where: str = "trace") -> None:
    """Equal in every field, array dtypes included; ``origin`` alone may differ."""
    assert type(one) is type(other), where
    if dataclasses.is_dataclass(one):
        for f in dataclasses.fields(one):
            if f.name != "origin":
                assert_same(getattr(one, f.name), getattr(other, f.name), f"{where}.{f.name}")
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, where
        np.testing.assert_array_equal(one, other, err_msg=where)
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    else:
        assert one == other, where


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.5), (-0.1, 0.5), (math.nan, 1.0), (0.0, math.nan)])
def test_a_span_must_run_forwards_from_zero(start, end):
    with pytest.raises(InputError, match="span 'x' runs from"):
        Span("compute", "x", 0, start, end)


def test_a_timeline_adds_up_lookups_and_stalls():
    spans = (
        Span("lookup", "a", 0, 0.0, 0.4),
        Span("lookup", "b", 1, 1.0, 1.4),
        Span("stall", "c", 1, 1.3, 1.5),
        Span("compute", "d", 1, 0, 9),
    )
    timeline = Timeline("modelled", spans)
    assert timeline.lookup_s == pytest.approx(0.8) and timeline.stall_s == pytest.approx(0.2)
    assert timeline.hidden_fraction == pytest.approx(0.75)
    assert timeline.of_step(0).spans == spans[:1] and math.isnan(timeline.of_step(7).hidden_fraction)


def test_entries_know_their_tokens(trace):
    csa, hca = trace.layer(1), trace.layer(2)
    assert [csa.entry_tokens(e) for e in (0, 1, 14)] == [(0, 3), (0, 7), (52, 59)]
    assert [hca.entry_tokens(e) for e in (0, 2)] == [(0, 15), (32, 47)]
    assert [csa.visible_entries(t) for t in (0, 2, 3, 60)] == [0, 0, 1, 15] and trace.layer(0).visible_entries(60) == 0
    for wrong in (-1, 15):
        with pytest.raises(InputError, match="entries 0..14"):
            csa.entry_tokens(wrong)
    with pytest.raises(InputError, match="no lightning indexer"):
        hca.index_scores(3)
    with pytest.raises(InputError, match="has layers"):
        trace.layer(9)


@pytest.mark.parametrize(
    ("at_once", "together", "stretch"), [(1, 1, 1), (2, 6, 5), (4, 8, 64), (4, 4, 7), (5, 5, 2), (64, 64, 64)]
)
def test_index_scores_worked_out_in_pieces_of_any_size_are_the_formula(monkeypatch, trace, at_once, together, stretch):
    for name, entries in (("AT_ONCE", at_once), ("TOGETHER", together), ("STRETCH", stretch)):
        monkeypatch.setattr(f"workbench.scoring.{name}", entries)
    monkeypatch.setattr("workbench.scoring.os.cpu_count", lambda: 3)
    csa = trace.layer(1)
    for t in (0, 3, 19, 35, 60):
        keys = csa.index_keys[: csa.visible_entries(t)].astype(np.float64)
        products = np.maximum(np.einsum("hd,sd->sh", csa.index_queries[t].astype(np.float64), keys), 0)
        expected = products @ csa.index_weights[t].astype(np.float64)
        np.testing.assert_allclose(csa.index_scores(t), expected, rtol=1e-5, atol=1e-6)


def test_what_fails_in_a_thread_of_the_scores_is_raised_where_they_were_asked_for(monkeypatch, trace):
    monkeypatch.setattr("workbench.scoring.STRETCH", 2)
    monkeypatch.setattr("workbench.scoring.os.cpu_count", lambda: 3)
    csa, caller, real = trace.layer(1), threading.current_thread(), scoring._score

    def lacking(*arguments: Any) -> None:
        if threading.current_thread() is not caller:
            raise MemoryError("no room")
        real(*arguments)

    monkeypatch.setattr(scoring, "_score", lacking)
    with pytest.raises(MemoryError, match="no room"):
        csa.index_scores(60)
    assert not [t for t in threading.enumerate() if t.name == "index-scores"]


def test_pooling_is_the_least_power_of_two_that_keeps_a_row_short():
    for t in (0, 1, 2047, 2048, 4095, 4096, 5000, 100_000):
        pooling = entry_pooling(t)
        assert pooling & (pooling - 1) == 0 and pooling * FULL_ROW_TOKENS >= t + 1
        assert pooling == 1 or pooling // 2 * FULL_ROW_TOKENS < t + 1


def test_steps_partition_the_tokens(trace):
    ends = [trace.step_end(step) for step in range(trace.steps)]
    assert ends[-1] == trace.length and ends == sorted(ends)
    for t in range(trace.length):
        step = trace.step_of_token(t)
        assert trace.step_starts[step] <= t < ends[step]
