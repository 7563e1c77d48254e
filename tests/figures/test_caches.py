"""Charts of caches: their numbers are those given, with labels that say what they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.synthetic import synthetic_trace
from workbench.caches import CacheUse, modelled_cache
from workbench.errors import InputError
from workbench.figures.caches import falling_steps, held_and_read, kv_changes, read_shares, size

USES = (
    CacheUse("<a>", "toy", "measured on CPU", 100, "fp32", {"window": 300, "index": 100}, {"window": 30, "index": 10}),
    CacheUse("b", "toy", "measured on CPU", 100, "fp32", {"kv": 8000}, {"kv": 8000}),
)


def test_totals_held_and_read_are_bars_with_their_sizes():
    fig = held_and_read(USES)
    held, read = fig.data
    assert list(held.x) == [400, 8000] and list(read.x) == [40, 8000] and list(held.text) == ["400 B", "8 KB"]
    assert list(held.y) == ["&lt;a&gt;", "b"] and fig.layout.xaxis.type == fig.layout.xaxis2.type == "log"
    assert "window: 300 B" in held.hovertext[0] and "measured on CPU" in fig.layout.title.text
    assert "100 tokens" in fig.layout.title.text and "fp32" in fig.layout.title.text
    assert fig.layout.xaxis.range == fig.layout.xaxis2.range, "one scale, or the panels cannot be compared"


def test_bars_with_a_pattern_have_a_ground_too_or_they_would_be_empty():
    for bar in (*held_and_read(USES).data, *read_shares(USES).data):
        assert not bar.marker.pattern.shape or bar.marker.pattern.bgcolor == bar.marker.color


def test_shares_of_the_reading_add_up_to_all_of_it():
    fig = read_shares(USES)
    assert np.allclose(np.sum([data.x for data in fig.data], axis=0), 100)
    assert next(data for data in fig.data if data.name == "index").x[0] == pytest.approx(25)


def test_modelled_and_measured_caches_are_told_apart_in_the_title():
    title = held_and_read((USES[0], modelled_cache("v4-pro", 1000))).layout.title.text
    assert "measured on CPU" in title and "modelled (formula)" in title and "published size" in title


def trace_with(window, tail):
    """Three prompt tokens at once, then one token a step."""
    trace = synthetic_trace(8, prompt_length=3, prefill_chunk=3)
    return replace(trace, cache_bytes={"window": np.array(window), "tail": np.array(tail)})


def test_changes_are_those_between_steps_and_falls_are_counted():
    trace = trace_with([30, 40, 50, 50, 50, 50], [0, 8, 16, 0, 8, 0])
    fig = kv_changes(trace)
    by_name = {data.name: list(data.y) for data in fig.data}
    assert by_name["window"] == [10, 10, 0, 0, 0] and by_name["tail"] == [8, 8, -16, 8, -8]
    assert by_name["sum"] == [18, 18, -16, 8, -8] and list(fig.data[0].x) == [4, 5, 6, 7, 8]
    assert falling_steps(trace) == 2 and "falls at 2 of 5" in fig.layout.title.text
    assert list(kv_changes(trace, 5, 6).data[0].x) == [5, 6]


def test_a_prompt_alone_has_no_decoded_token_to_show():
    with pytest.raises(InputError, match="decoded alone"):
        kv_changes(synthetic_trace(8, prompt_length=8, prefill_chunk=8))


@pytest.mark.parametrize("chart", [held_and_read, read_shares])
def test_no_cache_is_one_clear_error(chart):
    with pytest.raises(InputError, match="at least one"):
        chart(())


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (50.4e9, "50.4 GB"), (4.19e12, "4.19 TB"), (131072, "131 KB")],
)
def test_sizes_read_well(nbytes, text):
    assert size(nbytes) == text
