"""Two recordings one minus the other: pooled as one pair at a time would be, numbers by hand, and what cannot be compared."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import workbench as wb
from workbench.differences import common_entries
from workbench.errors import InputError
from workbench.figures import difference, pooling
from workbench.figures.difference import difference_html, difference_map
from workbench.figures.query import source_probs

MODEL = wb.load("tiny-v4", device="cpu")
IDS = MODEL.tokenizer.encode(wb.sample_text()).ids[:150]


@pytest.fixture(scope="module")
def runs():
    return wb.record_text(MODEL, IDS), wb.record_text(MODEL, IDS, topk=2)


def painted(trace, layer, head):
    """[L, L], one query at a time, from what the explorer says of it."""
    record = trace.layer(layer)
    out = np.zeros((trace.length, trace.length), np.float32)
    for t in range(trace.length):
        for column, prob, _ in zip(*source_probs(record, head, t), strict=True):
            tokens = [column]
            if column >= trace.length:
                first, last = record.entry_tokens(column - trace.length)
                tokens = range(first, last + 1)
            out[t, list(tokens)] = np.maximum(out[t, list(tokens)], prob)
    return out


@pytest.mark.parametrize(("layer", "head"), [(0, "mean"), (1, "mean"), (1, "max"), (2, 1), (3, 0)])
@pytest.mark.parametrize("pixels", [520, 37])
def test_a_cell_holds_the_difference_that_is_largest_whatever_its_sign(runs, layer, head, pixels, monkeypatch):
    monkeypatch.setattr(pooling, "CHUNK_VALUES", 1000)  # blocks that begin inside a cell
    tile = wb.difference_tile(*runs, layer, head, max_pixels=pixels)
    change = painted(runs[1], layer, head) - painted(runs[0], layer, head)
    pool = -(-150 // pixels)
    assert tile.pooling == (pool, pool) and tile.limit == pytest.approx(np.abs(tile.values).max())
    for i, j in np.ndindex(tile.values.shape):
        cell = change[i * pool : (i + 1) * pool, j * pool : (j + 1) * pool]
        high, low = max(cell.max(), 0), min(cell.min(), 0)
        assert tile.values[i, j] == pytest.approx(high if high >= -low else low, abs=1e-6)
    if layer == 1:
        assert tile.values.min() < -0.01 and tile.values.max() > 0.01


def test_rows_and_columns_cut_the_same_picture_out(runs):
    whole, part = wb.difference_tile(*runs, 3), wb.difference_tile(*runs, 3, rows=(40, 90), columns=(10, 77))
    np.testing.assert_array_equal(part.values, whole.values[40:90, 10:77])


def test_the_colours_carry_the_sign_and_what_is_not_visible_is_clear(runs):
    tile = wb.difference_tile(*runs, 1)
    pixels = np.asarray(Image.open(io.BytesIO(tile.png)).convert("RGBA"))[:: tile.scale[0], :: tile.scale[1]].astype(int)
    assert pixels.shape[:2] == tile.values.shape and len(tile.png) <= difference.TILE_BYTES
    assert (pixels[..., 3] > 0).tolist() == tile.visible.tolist()
    more, less = (
        np.unravel_index(tile.values.argmax(), tile.values.shape),
        np.unravel_index(tile.values.argmin(), tile.values.shape),
    )
    strongest = more if tile.values[more] > -tile.values[less] else less
    assert pixels[more][0] > pixels[more][2] and pixels[less][2] > pixels[less][0] and pixels[strongest][3] == 255
    same = wb.difference_tile(runs[0], runs[0], 1)
    assert not same.values.any() and same.limit == 0


def test_numbers_are_those_of_each_query_head_and_place(runs):
    a, b = runs
    found = {x.layer: x for x in wb.compare_runs(a, b).layers}
    assert found[0].moved == 0 == found[0].largest and found[0].common is None and found[2].common is None
    moved, each, common = [], [], []
    one, other = a.layer(3), b.layer(3)
    for t in range(a.length):
        kept = [{int(e): i for i, e in enumerate(x.selected[t]) if e >= 0} for x in (one, other)]
        for head in range(one.heads):
            change = [float(q) - float(p) for p, q in zip(one.window_probs[t, head], other.window_probs[t, head], strict=True)]
            used = [p > 0 or q > 0 for p, q in zip(one.window_probs[t, head], other.window_probs[t, head], strict=True)]
            change.append(float(other.sink_probs[t, head]) - float(one.sink_probs[t, head]))
            used.append(True)
            for entry in kept[0].keys() | kept[1].keys():
                probs = [float(x.selected_probs[t, head, of[entry]]) if entry in of else 0.0
                         for x, of in zip((one, other), kept, strict=True)]  # fmt: skip
                change.append(probs[1] - probs[0])
                used.append(max(probs) > 0)
            moved.append(np.abs(change).sum() / 2)
            each += [abs(c) for c, u in zip(change, used, strict=True) if u]
        if (t + 1) // 4 > min(len(kept[0]), len(kept[1])) and kept[0]:
            common.append(len(kept[0].keys() & kept[1].keys()) / len(kept[0]))
    assert found[3].moved == pytest.approx(np.mean(moved), abs=1e-6)
    assert found[3].mean_abs == pytest.approx(np.mean(each), abs=1e-6)
    assert found[3].largest == pytest.approx(np.max(each), abs=1e-6)
    assert found[3].common == pytest.approx(np.mean(common))


def test_the_kl_is_exact_with_logits_and_else_a_lower_bound(runs):
    with torch.inference_mode():
        ours, theirs = (MODEL(torch.tensor([IDS]), topk=k)[0] for k in (8, 2))
    exact = torch.nn.functional.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    found = wb.compare_runs(*runs, logits=(ours.numpy(), theirs.numpy()))
    assert not found.kl_at_least and found.kl_tokens == 150 and found.kl_nats == pytest.approx(float(exact.mean()), rel=1e-4)
    guessed = wb.compare_runs(*runs)
    assert guessed.kl_at_least and guessed.kl_tokens == 1
    assert 0 < guessed.kl_nats <= float(exact[-1]) + 1e-6
    assert wb.compare_runs(runs[0], runs[0]).kl_nats == 0
    with pytest.raises(InputError, match=r"one shape, got \(3, 5\) and \(4, 5\)"):
        wb.compare_runs(*runs, logits=(np.zeros((3, 5)), np.zeros((4, 5))))


def test_caches_and_engram_can_be_compared():
    model = wb.load("tiny-v4-engram", device="cpu")
    exact, packed = (wb.record_text(model, IDS, storage=storage) for storage in ("bf16", "released"))
    found = wb.compare_runs(exact, packed)
    assert 0 < found.layers[1].moved < 0.2 and 0.7 < found.layers[1].common < 1
    assert "cache bf16" in found.labels[0] and "cache released" in found.labels[1]
    with wb.engram_off(model):
        off = wb.record_text(model, IDS, storage="bf16")
    changed = wb.compare_runs(exact, off)
    assert changed.layers[0].moved == 0 and changed.layers[1].moved > found.layers[1].moved


def test_unlike_recordings_are_refused_with_what_differs(runs):
    a = runs[0]
    with pytest.raises(InputError, match="150 and 149 tokens"):
        wb.compare_runs(a, wb.record_text(MODEL, IDS[:-1]))
    other = [*IDS[:30], 5 if IDS[30] != 5 else 6, *IDS[31:]]
    with pytest.raises(InputError, match="differ from token 30 on"):
        wb.difference_tile(a, wb.record_text(MODEL, other), 1)
    with pytest.raises(InputError, match=r"layers \[0, 1, 2, 3\] and \[0, 1, 2, 3, 4\]"):
        wb.compare_runs(a, wb.record_text(wb.load("tiny-v41", device="cpu"), IDS))
    with pytest.raises(InputError, match="layer 0 is window, ratio 0, 4 heads in one recording and mla-dsa, ratio 1, 4 heads"):
        wb.compare_runs(a, wb.record_text(wb.load("tiny-mla-dsa", device="cpu"), IDS))
    with pytest.raises(InputError, match="without tokens"):
        wb.compare_runs(replace(a, token_ids=a.token_ids[:0]), a)
    bare = np.zeros((150, 0), np.float16)
    captured = replace(a.layer(1), window_probs=bare[:, :, None], sink_probs=bare, selected_probs=None)
    known = replace(a, layers=(captured,))
    with pytest.raises(InputError, match="layer 1 comes from a capture"):
        wb.difference_tile(known, known, 1)
    for settings, message in (
        ({"layer": 7}, "got 7"),
        ({"layer": 1, "head": 9}, "heads 0..3"),
        ({"layer": 1, "rows": (5, 5)}, "non-empty"),
        ({"layer": 1, "max_pixels": 0}, "from 1 to"),
        ({"layer": 1, "max_pixels": "wide"}, "must be a whole number"),
        ({"layer": 1, "limit": 0.0}, "above 0"),
        ({"layer": 1, "limit": "a"}, "above 0 and at most 1, got 'a'"),
        ({"layer": "first"}, "layer"),
    ):
        with pytest.raises(InputError, match=message):
            wb.difference_tile(*runs, **settings)


def test_common_entries_are_counted_row_by_row():
    ours, theirs = np.array([[3, 1, -1], [0, 5, 2], [-1, -1, -1]]), np.array([[1, 9], [2, 0], [-1, -1]])
    assert common_entries(ours, theirs).tolist() == [1, 2, 0]


def test_chart_and_table_say_what_was_compared_and_escape_it(runs):
    a, b = replace(runs[0], model="<i>x</i>"), replace(runs[1], model="<i>x</i>")
    fig = difference_map(wb.difference_tile(a, b, 1), ("", "Engram <off>"))
    title = fig.layout.title.text
    assert "&lt;i&gt;x" in title and "top-8, cache fp32" in title and "top-2" in title and "(Engram &lt;off&gt;)" in title
    assert len(fig.layout.images) == 1 and len(fig.to_json()) < 250_000
    table = difference_html(wb.compare_runs(a, b))
    assert "at least" in table and table.count("<tr>") == 5
