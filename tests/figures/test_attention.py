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

from tests.synthetic import FAMILIES, synthetic_trace
from workbench.errors import InputError
from workbench.figures.attention import (
    THUMBNAIL_BYTES,
    attention_tile,
    composite_tile,
    describe_layer,
    layer_thumbnails,
    thumbnails,
)
from workbench.figures.pooling import column_count
from workbench.figures.query import _bars, _bars_without, describe, query_facts, query_strip, source_probs, top_sources
from workbench.trace import LayerTrace, Trace

TRACE = synthetic_trace(97, seed=1)
WINDOW, CSA, HCA = 0, 1, 2
TRACES = {
    family: TRACE if family == "deepseek_v4" else synthetic_trace(61, seed=1, kinds=FAMILIES[family]) for family in FAMILIES
}
LAYERS = [(family, layer) for family, kinds in FAMILIES.items() for layer in range(len(kinds))]
every_layer = pytest.mark.parametrize(("family", "layer"), LAYERS, ids=[f"{FAMILIES[f][n]}-{n}" for f, n in LAYERS])


def head_of(values: np.ndarray, head: int | str) -> np.ndarray:
    """[H, N] -> [N], the slow way."""
    rows = values.astype(np.float32)
    return rows[head] if isinstance(head, int) else (rows.max(0) if head == "max" else rows.mean(0))


def full_matrix(layer: LayerTrace, head: int | str, composite: bool = False) -> np.ndarray:
    """The oracle: the whole matrix, filled one probability at a time."""
    length = layer.length
    tokens = 0 if layer.kind in ("mla-dsa", "mla", "gqa", "mha") else length  # window columns
    out = np.zeros((length, length if composite else tokens + layer.entries), np.float32)

    def put(t: int, entry: int, value: float) -> None:
        first, last = sources_of(layer, entry) if composite else (tokens + entry, tokens + entry)
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


def sources_of(layer: LayerTrace, entry: int) -> tuple[int, int]:
    """First and last token an entry is made from: its block, and in CSA the block before."""
    tokens = [t for t in range(layer.length) if entry in (t // layer.ratio, t // layer.ratio + (layer.kind == "csa"))]
    return tokens[0], tokens[-1]


def pooled(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return np.array(
        [
            [matrix[i : i + rows, j : j + columns].max() for j in range(0, matrix.shape[1], columns)]
            for i in range(0, matrix.shape[0], rows)
        ]
    )


@pytest.mark.parametrize("head", [0, 2, "max", "mean"])
@every_layer
@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("max_pixels", [800, 19])
def test_a_tile_is_the_pooled_maximum_of_the_whole_matrix(family, layer, head, composite, max_pixels):
    trace = TRACES[family]
    tile = (composite_tile if composite else attention_tile)(trace, layer, head, max_pixels=max_pixels)
    expected = pooled(full_matrix(trace.layer(layer), head, composite), *tile.pooling)
    np.testing.assert_array_equal(tile.values, expected)
    assert not tile.values[~tile.visible].any() and max(expected.shape) <= max_pixels


@pytest.mark.parametrize("head", [0, "max", "mean"])
@every_layer
@pytest.mark.parametrize(("rows", "columns", "max_pixels"), [(None, None, 19), ((5, 90), (2, 41), 11), (None, None, 800)])
def test_a_mean_tile_is_the_mean_over_the_pairs_that_may_see_each_other(family, layer, head, rows, columns, max_pixels):
    trace = TRACES[family]
    record = trace.layer(layer)
    if rows is not None:
        rows, columns = (rows[0], min(rows[1], record.length)), (columns[0], min(columns[1], column_count(record)))
    tile = attention_tile(trace, layer, head, rows, columns, max_pixels, pool="mean")
    exact = full_matrix(record, head).astype(np.float64)
    t, column = np.arange(record.length)[:, None], np.arange(exact.shape[1])
    tokens = record.length if record.window else 0
    entry_seen = column - tokens < (t + 1) // record.ratio if record.ratio else False
    visible = np.where(column < tokens, (column <= t) & (column > t - record.window), entry_seen)
    for i, j in np.ndindex(tile.values.shape):
        cells = tuple(
            slice(start + at * pool, min(start + (at + 1) * pool, stop))
            for at, pool, (start, stop) in zip((i, j), tile.pooling, (tile.row_range, tile.column_range), strict=True)
        )
        pairs = visible[cells].sum()
        assert tile.values[i, j] == pytest.approx(exact[cells].sum() / max(pairs, 1), abs=1e-6)
        assert tile.visible[i, j] == bool(pairs)


def test_what_was_recorded_as_maxima_has_no_mean():
    trace = synthetic_trace(4409, seed=2, kinds=("hca",), heads=2, window=3, hca_ratio=64)
    with pytest.raises(InputError, match="maxima of 4 entries.*pool='max'"):
        attention_tile(trace, 0, "max", max_pixels=211, pool="mean")
    early = attention_tile(trace, 0, "max", rows=(0, 1000), max_pixels=50, pool="mean")
    assert early.values.any() and early.pool == "mean"
    with pytest.raises(InputError, match="pool is 'max' or 'mean'"):
        attention_tile(trace, 0, pool="median")


@pytest.mark.parametrize("composite", [False, True])
def test_hca_rows_recorded_pooled_are_spread_over_the_entries_they_cover(composite):
    trace = synthetic_trace(4409, seed=2, kinds=("hca",), heads=2, window=3, hca_ratio=64)
    tile = (composite_tile if composite else attention_tile)(trace, 0, "max", max_pixels=211)
    exact = full_matrix(trace.layer(0), "max", composite)
    assert trace.layer(0).entry_pooling(4408) == 4
    np.testing.assert_array_equal(tile.values, pooled(exact, *tile.pooling) * tile.visible)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_rows_over_all_tokens_of_a_long_trace_are_spread_over_the_tokens_they_cover(monkeypatch, kind):
    monkeypatch.setattr("workbench.trace.ROW_VALUES", 2**15)  # as if this were a trace of tens of thousands of tokens
    trace = synthetic_trace(613, seed=2, kinds=(kind,), heads=2)
    record = trace.layer(0)
    assert [record.entry_pooling(t) for t in (31, 32, 63, 64, 612)] == [1, 2, 2, 4, 32]
    for view, pixels in ((attention_tile, 211), (composite_tile, 800)):
        tile = view(trace, 0, "max", max_pixels=pixels)
        np.testing.assert_array_equal(tile.values, pooled(full_matrix(record, "max"), *tile.pooling) * tile.visible)
    told = describe(trace, 0, "max", 612, 600)
    assert told["pooled"] == 32 and told["probability"] == np.float32(record.entry_probs[612].max(0)[600 // 32])


@every_layer
@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("max_pixels", [800, 19])
def test_visible_cells_are_those_with_a_causal_pair(family, layer, composite, max_pixels):
    record = TRACES[family].layer(layer)
    tile = (composite_tile if composite else attention_tile)(TRACES[family], layer, max_pixels=max_pixels)
    length = record.length
    tokens = length if record.window else 0
    t, column = np.arange(length)[:, None], np.arange(length if composite else tokens + record.entries)
    closed = (t + 1) // record.ratio if record.ratio else 0 * t
    entry = (column < closed * record.ratio) if composite else (column >= tokens) & (column - tokens < closed)
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


def test_column_labels_of_shared_streams_and_of_tokens():
    shared = TRACES["deepseek_v41"]
    two, one = attention_tile(shared, 1), attention_tile(shared, 4)
    assert two.column_label(61 + 5) == (10, 11) and one.column_label(61 + 5) == (5,)  # no overlap
    for family in ("deepseek_v32", "deepseek_v3", "llama"):
        tile = attention_tile(TRACES[family], 0)
        assert tile.column_range == (0, 61) and [tile.column_label(i) for i in (0, 60)] == [(0,), (60,)]
        with pytest.raises(InputError, match="0 window and 61 entry columns"):
            describe(TRACES[family], 0, 0, 5, 61)


@pytest.mark.parametrize(
    ("family", "layer", "words"),
    [
        ("deepseek_v4", 1, "CSA, 4 tokens per entry"),
        ("deepseek_v41", 0, "sliding window of 7"),
        ("deepseek_v41", 1, "CSA2 full, 2 tokens per entry"),
        ("deepseek_v41", 2, "CSA2 reuse, 2 tokens per entry"),
        ("deepseek_v41", 3, "CSA2 reindex, 2 tokens per entry"),
        ("deepseek_v41", 4, "CSA2 full, 1 token per entry"),
        ("deepseek_v32", 0, "MLA + DSA, chosen tokens"),
        ("deepseek_v3", 0, "MLA, every token"),
        ("llama", 0, "GQA, every token"),
        ("llama, a KV head for each head", 0, "MHA, every token"),
    ],
)
def test_a_layer_is_called_what_it_is(family, layer, words):
    assert describe_layer(TRACES[family].layer(layer)) == words


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
        {"layer": np.array([1, 2])},
        {"layer": "1"},
        {"layer": CSA, "head": True},
        {"layer": CSA, "head": 1.0},
        {"layer": CSA, "head": np.array([0, 1])},
        {"layer": CSA, "rows": (0.5, 5.5)},
        {"layer": CSA, "rows": (float("nan"), 5)},
        {"layer": CSA, "rows": (3,)},
        {"layer": CSA, "rows": (1, 2, 3)},
        {"layer": CSA, "rows": 3},
        {"layer": CSA, "rows": ("0", "5")},
        {"layer": CSA, "columns": (None, 5)},
        {"layer": CSA, "step": 1.5},
        {"layer": CSA, "step": "0"},
        {"layer": CSA, "max_pixels": 10.5},
        {"layer": CSA, "max_pixels": 10**9},
        {"layer": CSA, "max_pixels": None},
        {"layer": CSA, "pool": None},
    ],
)
def test_what_the_trace_does_not_have_is_refused_in_one_line(arguments):
    with pytest.raises(InputError) as error:
        attention_tile(TRACE, **arguments)
    assert "\n" not in str(error.value)


def test_what_is_no_trace_is_refused_and_numbers_of_numpy_are_numbers():
    with pytest.raises(InputError, match=r"expected a Trace .of a live run: run.trace., got None"):
        attention_tile(None, CSA)
    tile = attention_tile(TRACE, np.int64(CSA), np.int64(1), (np.int32(3), np.int64(9)))
    assert np.array_equal(tile.values, attention_tile(TRACE, CSA, 1, (3, 9)).values) and type(tile.row_range[0]) is int
    for wrong in (1.5, "a", None, float("nan"), 10**6):
        with pytest.raises(InputError):
            tile.column_label(wrong)


def test_a_noisy_picture_of_very_many_pixels_gets_larger_cells_instead_of_more_bytes():
    rng = np.random.default_rng(0)
    probs = rng.random((2048, 1, 2048)).astype(np.float16)
    layer = LayerTrace(0, "window", 0, probs, np.zeros((2048, 1), np.float16))
    trace = replace(TRACE, layers=(layer,), token_ids=np.zeros(2048, np.int32), token_texts=("x",) * 2048)
    tile = attention_tile(trace, 0, rows=(0, 2048), max_pixels=2048)
    assert len(tile.png) <= 180_000 and max(tile.pooling) > 1
    assert max(Image.open(io.BytesIO(tile.png)).size) <= 2048


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
    for family, layer in LAYERS:
        trace = TRACES[family]
        whole = full_matrix(trace.layer(layer), "mean")
        for t in (0, 3, 50, trace.length - 1):
            described = [describe(trace, layer, "mean", t, column)["probability"] for column in range(whole.shape[1])]
            np.testing.assert_array_equal(np.float32(described), whole[t])


@pytest.mark.parametrize(
    ("family", "layer", "chosen_by", "sources_of_7"),
    [
        ("deepseek_v4", 1, 1, range(24, 32)),
        ("deepseek_v41", 1, 1, range(14, 16)),
        ("deepseek_v41", 2, 1, range(14, 16)),  # reuses what layer 1 chose
        ("deepseek_v41", 3, 3, range(14, 16)),
        ("deepseek_v41", 5, 4, range(7, 8)),
        ("deepseek_v32", 1, 1, range(7, 8)),
    ],
)
def test_ranks_of_visible_entries_follow_the_scores_of_the_indexer_that_chose(family, layer, chosen_by, sources_of_7):
    trace, t = TRACES[family], 57
    record, chooser, first = trace.layer(layer), trace.layer(chosen_by), trace.length if family != "deepseek_v32" else 0
    told = [describe(trace, layer, "max", t, first + entry) for entry in range(record.visible_entries(t))]
    assert record.selected is not None and chooser.runner_up is not None
    assert {d["chosen_by"] for d in told} == {chosen_by}
    by_score = sorted(range(len(told)), key=lambda e: (-told[e]["index_score"], e))
    assert [told[e]["rank"] for e in by_score] == list(range(1, len(told) + 1))
    assert {e for e, d in enumerate(told) if d["selected"]} == set(record.selected[t].tolist())
    assert [e for e, d in enumerate(told) if d["runner_up"]] == [chooser.runner_up[t]]
    assert told[7]["sources"] == tuple(sources_of_7) and len(told[7]["source_texts"]) == len(sources_of_7)


def test_a_choice_whose_indexer_was_not_recorded_has_no_scores():
    trace = replace(TRACES["deepseek_v41"], layers=TRACES["deepseek_v41"].layers[2:3])
    entry = int(trace.layers[0].selected[57, 0])
    told = describe(trace, 2, "max", 57, 61 + entry)
    assert told["selected"] and told["index_score"] is told["rank"] is told["chosen_by"] is None
    assert query_strip(trace, 2, 57).data


@pytest.mark.parametrize("entries", [1, 2, 199, 200, 201, 202, 1000, 4097])
def test_bars_of_all_but_the_kept_entries_are_those_of_each_named(entries):
    record, rng = TRACES["deepseek_v4"].layer(1), np.random.default_rng(entries)
    for many in {0, 1, min(entries, 8), entries}:
        scores = rng.normal(size=entries).astype(np.float32)
        kept = np.sort(rng.choice(entries, many, replace=False))
        others = np.setdiff1d(np.arange(entries), kept)
        found, named = _bars_without(record, scores, kept), _bars(record, others, scores[others])
        for one, other in zip(found, named, strict=True):
            np.testing.assert_array_equal(one, other)


def test_an_entry_of_the_future_is_not_visible_and_has_no_score():
    told = describe(TRACE, CSA, "max", 10, 97 + 20)
    assert told["visible"] is False and told["index_score"] is None and told["probability"] == 0.0


def test_the_needle_is_the_best_source_of_a_late_query():
    trace = synthetic_trace(97, needle=21)
    best, *rest = top_sources(trace, CSA, "mean", 95, 4)
    assert 21 in best["sources"] and best["rank"] == 1 and best["selected"]
    assert all(best["probability"] >= other["probability"] for other in rest)


@every_layer
def test_every_source_of_a_query_is_listed_once(family, layer):
    columns, probs, _ = source_probs(TRACES[family].layer(layer), 0, 57)
    row = full_matrix(TRACES[family].layer(layer), 0)[57]
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


@every_layer
def test_the_strip_shows_all_of_the_attention_of_a_head_and_no_place_the_layer_lacks(family, layer):
    record = TRACES[family].layer(layer)
    fig = query_strip(TRACES[family], layer, 57, head=1)
    places = {name: traces_named(fig, name) for name in ("window", "sink", "compressed", "tokens")}
    total = sum(float(np.sum(bar.y)) for bars in places.values() for bar in bars)
    assert total == pytest.approx(1.0, abs=5e-3)  # float16 sums
    of_tokens = family not in ("deepseek_v4", "deepseek_v41")
    shown = {"tokens"} if of_tokens else {"window", "sink"} | ({"compressed"} if record.ratio else set())
    assert {name for name, bars in places.items() if bars} == shown


def test_a_layer_that_reuses_a_choice_shows_the_scores_it_rests_on():
    trace = TRACES["deepseek_v41"]
    fig, scores = query_strip(trace, 2, 57), trace.layer(1).index_scores(57)
    assert fig.layout.yaxis.title.text == "index score of layer 1"
    bars = [bar for bar in fig.data if bar.type == "bar" and bar.yaxis == "y"]
    assert sum(len(bar.y) for bar in bars) == len(scores)
    np.testing.assert_allclose(
        np.sort(np.concatenate([bar.base + np.asarray(bar.y) for bar in bars])), np.sort(scores), rtol=1e-5
    )
    assert query_strip(trace, 1, 57).layout.yaxis.title.text == "index score"


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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_and_a_trace_with_few_entries_can_be_drawn(family):
    short: Trace = synthetic_trace(3, kinds=FAMILIES[family])
    for layer, kind in enumerate(FAMILIES[family]):
        entries = {"csa2-full": 1, "csa2-reuse": 1, "csa2-reindex": 1}.get(kind, 0) if layer < 4 else 3
        assert attention_tile(short, layer).values.shape == (3, 3 + entries)
        assert query_strip(short, layer, 0).data
        assert composite_tile(short, layer).visible[0, 0]


@every_layer
def test_facts_of_a_query_add_up_and_overlaps_are_counted_by_hand(family, layer):
    trace, t = TRACES[family], 57
    record, facts = trace.layer(layer), query_facts(trace, layer, t, 1)
    shares = [facts[name] for name in ("window", "entries", "sink") if facts[name] is not None]
    assert sum(shares) == pytest.approx(1.0, abs=5e-3)
    assert (facts["window"] is None) == (not record.window) and (facts["sink"] is None) == (not record.window)
    if record.selected is None:
        assert facts["kept"] is facts["before"] is None and facts["layers"] == {}
        return
    kept = {int(e) for e in record.selected[t] if e >= 0}
    assert (facts["kept"], facts["visible"]) == (len(kept), (t + 1) // record.ratio)
    assert facts["before"] == sum(int(e) in kept for e in record.selected[t - 1])
    alike = [x for x in trace.layers if x.layer != layer and x.selected is not None and x.ratio == record.ratio]
    assert facts["layers"] == {x.layer: sum(int(e) in kept for e in x.selected[t]) for x in alike}
    assert query_facts(trace, layer, 0)["before"] is None


def test_maxima_of_pooled_rows_are_not_added_up():
    trace = synthetic_trace(4409, seed=2, kinds=("hca",), heads=2, window=3, hca_ratio=64)
    assert query_facts(trace, 0, 4408)["entries"] is None and query_facts(trace, 0, 400)["entries"] > 0
