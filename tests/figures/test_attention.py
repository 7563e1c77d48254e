"""Tiles, thumbnails, strips and descriptions against the arrays of a synthetic trace, without torch."""

from __future__ import annotations

import io
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image
from workbench.figures.query import describe, query_strip, source_probs, top_sources

from tests.synthetic import synthetic_trace
from workbench.errors import InputError
from workbench.figures.attention import (
    THUMBNAIL_BYTES,
    attention_tile,
    composite_tile,
    layer_thumbnails,
    thumbnails,
)
from workbench.trace import LayerTrace, Trace

TRACE = synthetic_trace(97, seed=1)
WINDOW, CSA, HCA = 0, 1, 2


def head_of(values: np.ndarray, head: int | str) -> np.ndarray:
    """[H, N] -> [N], the slow way."""
    rows = values.astype(np.float32)
    return rows[head] if isinstance(head, int) else (rows.max(0) if head == "max" else rows.mean(0))


def full_matrix(layer: LayerTrace, head: int | str, composite: bool = False) -> np.ndarray:
    """The oracle: the whole matrix, filled one probability at a time."""
    length = layer.length
    out = np.zeros((length, length if composite else length + layer.entries), np.float32)

    def put(t: int, entry: int, value: float) -> None:
        first, last = layer.entry_tokens(entry) if composite else (length + entry, length + entry)
        out[t, first : last + 1] = np.maximum(out[t, first : last + 1], value)

    for t in range(length):
        for w, value in enumerate(head_of(layer.window_probs[t], head)):
            if (j := t - layer.window + 1 + w) >= 0:
                out[t, j] = value
        if layer.selected is not None and layer.selected_probs is not None:
            for entry, value in zip(layer.selected[t], head_of(layer.selected_probs[t], head), strict=True):
                if entry >= 0:
                    put(t, int(entry), value)
        if layer.entry_probs is not None:
            pooling = layer.entry_pooling(t)
            last = -(-layer.visible_entries(t) // pooling) * pooling  # a recorded column stands for all of its entries
            for entry in range(min(last, layer.entries)):
                put(t, entry, head_of(layer.entry_probs[t], head)[entry // pooling])
    return out


def pooled(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return np.array(
        [
            [matrix[i : i + rows, j : j + columns].max() for j in range(0, matrix.shape[1], columns)]
            for i in range(0, matrix.shape[0], rows)
        ]
    )


@pytest.mark.parametrize("head", [0, 2, "max", "mean"])
@pytest.mark.parametrize("layer", [WINDOW, CSA, HCA])
@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("max_pixels", [800, 19])
def test_a_tile_is_the_pooled_maximum_of_the_whole_matrix(layer, head, composite, max_pixels):
    tile = (composite_tile if composite else attention_tile)(TRACE, layer, head, max_pixels=max_pixels)
    expected = pooled(full_matrix(TRACE.layer(layer), head, composite), *tile.pooling)
    np.testing.assert_array_equal(tile.values, expected)
    assert not tile.values[~tile.visible].any() and max(expected.shape) <= max_pixels


@pytest.mark.parametrize("composite", [False, True])
def test_hca_rows_recorded_pooled_are_spread_over_the_entries_they_cover(composite):
    trace = synthetic_trace(4409, seed=2, kinds=("hca",), heads=2, window=3, hca_ratio=64)
    tile = (composite_tile if composite else attention_tile)(trace, 0, "max", max_pixels=211)
    exact = full_matrix(trace.layer(0), "max", composite)
    assert trace.layer(0).entry_pooling(4408) == 4
    np.testing.assert_array_equal(tile.values, pooled(exact, *tile.pooling) * tile.visible)


@pytest.mark.parametrize("layer", [WINDOW, CSA, HCA])
@pytest.mark.parametrize("composite", [False, True])
def test_visible_cells_are_those_with_a_causal_pair(layer, composite):
    record = TRACE.layer(layer)
    tile = (composite_tile if composite else attention_tile)(TRACE, layer, max_pixels=19)
    t, column = np.arange(97)[:, None], np.arange(97 if composite else 97 + record.entries)
    closed = (t + 1) // record.ratio if record.ratio else 0 * t
    entry = (column < closed * record.ratio) if composite else (column >= 97) & (column - 97 < closed)
    pairs = ((column <= t) & (column > t - record.window)) | entry
    np.testing.assert_array_equal(tile.visible, pooled(pairs, *tile.pooling))


def test_zooming_in_shows_the_same_numbers_unpooled():
    whole = full_matrix(TRACE.layer(CSA), 1)
    tile = attention_tile(TRACE, CSA, 1, rows=(71, 90), columns=(60, 112))
    assert tile.pooling == (1, 1) and tile.row_range == (71, 90) and tile.column_range == (60, 112)
    np.testing.assert_array_equal(tile.values, whole[71:90, 60:112])
    assert tile.cell(72, 61) == (1, 1)


def test_a_step_keeps_the_rows_it_processed():
    prefill, decode = attention_tile(TRACE, CSA, step=0), attention_tile(TRACE, CSA, step=TRACE.steps - 1)
    assert prefill.row_range == (0, 64) and decode.row_range == (96, 97)


def test_the_png_shows_row_0_on_top_and_enlarges_cells_by_whole_factors():
    tile = composite_tile(TRACE, WINDOW, "max", max_pixels=388)
    picture = Image.open(io.BytesIO(tile.png))
    assert picture.mode == "P" and picture.size == (388, 388) and tile.scale == (4, 4)
    alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    np.testing.assert_array_equal(alpha[::4, ::4] > 0, tile.visible)
    np.testing.assert_array_equal(alpha, alpha[::4, ::4].repeat(4, 0).repeat(4, 1))


def test_a_larger_probability_is_a_brighter_pixel():
    tile = attention_tile(TRACE, HCA, "max", max_pixels=97 + 6)
    rgb = np.asarray(Image.open(io.BytesIO(tile.png)).convert("RGB"))[:: tile.scale[0], :: tile.scale[1]]
    brightness = rgb[tile.visible].astype(float) @ (0.2126, 0.7152, 0.0722)
    order = np.argsort(tile.values[tile.visible])
    assert (np.diff(brightness[order]) >= -1.0).all() and np.ptp(brightness) > 50  # colours are rounded to 8 bits


def test_noise_fits_the_byte_budget():
    trace = synthetic_trace(883, seed=3, kinds=("hca",), heads=1, window=883, hca_ratio=2)
    tile = attention_tile(trace, 0)
    assert len(tile.png) * 4 / 3 <= 250_000 and max(Image.open(io.BytesIO(tile.png)).size) <= 800
    for _, png in thumbnails(trace, 0):
        assert len(png) <= THUMBNAIL_BYTES


def test_a_long_trace_never_becomes_a_square_matrix():
    trace = synthetic_trace(16411, seed=4, kinds=("csa", "hca"), heads=2, window=5, topk=3)
    for layer in (0, 1):
        for view in (attention_tile, composite_tile):
            tracemalloc.start()
            view(trace, layer)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 16411 * 4103  # one byte per query and entry would be more


def test_column_labels_are_the_source_tokens_of_the_trace():
    csa, hca = attention_tile(TRACE, CSA), attention_tile(TRACE, HCA, columns=(97, 103))
    assert csa.column_label(13) == (13,)
    assert csa.column_label(97) == (0, 1, 2, 3) and csa.column_label(97 + 5) == tuple(range(16, 24))  # CSA overlaps
    assert hca.column_label(98) == tuple(range(16, 32))


def test_the_strongest_pair_of_a_pooled_cell_is_found():
    tile = attention_tile(TRACE, CSA, "max", max_pixels=19)
    whole = full_matrix(TRACE.layer(CSA), "max")
    for i, j in zip(*np.nonzero(tile.values), strict=True):
        assert whole[tile.strongest(int(i), int(j))] == tile.values[i, j]


@pytest.mark.parametrize(
    "arguments",
    [
        {"layer": 9},
        {"layer": CSA, "head": 3},
        {"layer": CSA, "head": -1},
        {"layer": CSA, "head": "sum"},
        {"layer": CSA, "rows": (5, 5)},
        {"layer": CSA, "rows": (90, 98)},
        {"layer": CSA, "columns": (-1, 4)},
        {"layer": CSA, "columns": (0, 122)},
        {"layer": CSA, "step": 99},
        {"layer": CSA, "step": 0, "rows": (80, 90)},
        {"layer": CSA, "max_pixels": 0},
    ],
)
def test_what_the_trace_does_not_have_is_refused_in_one_line(arguments):
    with pytest.raises(InputError) as error:
        attention_tile(TRACE, **arguments)
    assert "\n" not in str(error.value)


def test_an_empty_trace_is_refused():
    empty = LayerTrace(0, "window", 0, np.zeros((0, 2, 3), np.float16), np.zeros((0, 2), np.float16))
    with pytest.raises(InputError, match="no token"):
        attention_tile(replace(TRACE, layers=(empty,)), 0)


def test_there_is_a_thumbnail_per_layer_and_per_head():
    assert [head for head, _ in thumbnails(TRACE, CSA)] == ["max", 0, 1, 2]
    assert [layer for layer, _ in layer_thumbnails(TRACE)] == [0, 1, 2, 3]
    for _, png in thumbnails(TRACE, CSA) + layer_thumbnails(TRACE):
        assert len(png) <= THUMBNAIL_BYTES and max(Image.open(io.BytesIO(png)).size) <= 56


def test_a_description_agrees_with_the_matrix_everywhere():
    for layer in (WINDOW, CSA, HCA):
        whole = full_matrix(TRACE.layer(layer), "mean")
        for t in (0, 3, 50, 96):
            described = [describe(TRACE, layer, "mean", t, column)["probability"] for column in range(whole.shape[1])]
            np.testing.assert_array_equal(np.float32(described), whole[t])


def test_ranks_of_visible_entries_follow_their_index_scores():
    record, t = TRACE.layer(CSA), 90
    told = [describe(TRACE, CSA, "max", t, 97 + entry) for entry in range(record.visible_entries(t))]
    assert record.selected is not None and record.runner_up is not None
    by_score = sorted(range(len(told)), key=lambda e: (-told[e]["index_score"], e))
    assert [told[e]["rank"] for e in by_score] == list(range(1, len(told) + 1))
    assert {e for e, d in enumerate(told) if d["selected"]} == set(record.selected[t].tolist())
    assert [e for e, d in enumerate(told) if d["runner_up"]] == [record.runner_up[t]]
    assert told[7]["sources"] == tuple(range(24, 32)) and len(told[7]["source_texts"]) == 8


def test_an_entry_of_the_future_is_not_visible_and_has_no_score():
    told = describe(TRACE, CSA, "max", 10, 97 + 20)
    assert told["visible"] is False and told["index_score"] is None and told["probability"] == 0.0


def test_the_needle_is_the_best_source_of_a_late_query():
    trace = synthetic_trace(97, needle=21)
    best, *rest = top_sources(trace, CSA, "mean", 95, 4)
    assert 21 in best["sources"] and best["rank"] == 1 and best["selected"]
    assert all(best["probability"] >= other["probability"] for other in rest)


@pytest.mark.parametrize("layer", [WINDOW, CSA, HCA])
def test_every_source_of_a_query_is_listed_once(layer):
    columns, probs, _ = source_probs(TRACE.layer(layer), 0, 70)
    row = full_matrix(TRACE.layer(layer), 0)[70]
    assert sorted(columns) == np.flatnonzero(row).tolist()
    np.testing.assert_array_equal(probs, row[columns])


def traces_named(fig: go.Figure, start: str) -> list[Any]:
    return [trace for trace in fig.data if trace.name.startswith(start)]


def test_the_strip_marks_the_kept_entries_and_the_runner_up():
    record, t = TRACE.layer(CSA), 90
    fig = query_strip(TRACE, CSA, t)
    assert record.selected is not None and record.runner_up is not None
    (mark,) = traces_named(fig, "kept (")
    bar = next(trace for trace in traces_named(fig, "kept") if trace.type == "bar")
    entries, scores = np.transpose(bar.customdata)
    assert sorted(entries) == sorted(record.selected[t]) and mark.marker.symbol == "diamond"
    np.testing.assert_allclose(scores, record.index_scores(t)[sorted(record.selected[t])])
    np.testing.assert_allclose(bar.base + np.asarray(bar.y), scores, rtol=1e-5)  # it stands on a floor below all scores
    assert bar.base <= record.index_scores(t).min() and min(bar.y) >= 0
    (runner,) = traces_named(fig, "runner-up")
    assert runner.x[0] == record.runner_up[t] * 4 + 1.5  # the middle of its block of four tokens
    assert TRACE.label in fig.layout.title.text.replace("<br>", " ")  # wrapped to the width beside a map


def test_the_strip_shows_all_of_the_attention_of_a_head():
    for layer in (WINDOW, CSA, HCA):
        fig = query_strip(TRACE, layer, 90, head=1)
        bars = [*traces_named(fig, "window"), *traces_named(fig, "sink"), *traces_named(fig, "compressed")]
        assert sum(float(np.sum(bar.y)) for bar in bars) == pytest.approx(1.0, abs=5e-3)  # float16 sums


def test_a_long_strip_is_pooled_to_a_few_hundred_bars_and_keeps_its_peak():
    trace = synthetic_trace(4409, seed=5, kinds=("csa",), heads=1, window=3, needle=2000)
    fig = query_strip(trace, 0, 4408)
    assert max(len(bar.x) for bar in fig.data) <= 256
    peaks = [np.max(bar.y) + (bar.base or 0) for bar in fig.data if bar.type == "bar"]
    assert max(peaks) == pytest.approx(trace.layer(0).index_scores(4408).max())


def test_markup_in_a_token_is_text_in_the_strip():
    t = next(i for i, text in enumerate(TRACE.token_texts[:97]) if "<b>" in text)
    title = query_strip(TRACE, CSA, t).layout.title.text
    assert "&lt;b&gt;" in title and "<b>" not in title


def test_the_first_token_and_a_trace_without_entries_can_be_drawn():
    short: Trace = synthetic_trace(3)
    for layer in range(4):
        assert attention_tile(short, layer).values.shape == (3, 3)
        assert query_strip(short, layer, 0).data
        assert composite_tile(short, layer).visible[0, 0]
