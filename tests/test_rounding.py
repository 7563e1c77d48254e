"""Rounding on live tensors: what is shown is what a released cache holds, and selections differ by rounded keys alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.errors import InputError
from workbench.model.quant import E2M1_MAGNITUDES
from workbench.rounding import Selections, relative_error, rounded_selections, stored_rows


@pytest.fixture(scope="module")
def model():
    return wb.load("tiny-v4", device="cpu")


@pytest.fixture(scope="module")
def ids(model):
    return wb.hide_needle(model, wb.sample_text(), "river", "52", depth=0.3, tokens=160).ids


@pytest.fixture(scope="module")
def stored(model, ids):
    return stored_rows(model, ids)


def test_rows_are_what_a_released_cache_reads_back(model, ids, stored):
    """Of the first layer that compresses: its input is the same in both caches up to layer 0's rounded window."""
    exact = model.new_cache(storage="fp32")
    with torch.inference_mode():
        model(torch.tensor([ids]), exact)
    entries, keys = stored
    assert entries.layer == keys.layer == 1 and len(entries.values) == len(ids) // 4 == len(keys.values)
    np.testing.assert_array_equal(entries.values, exact.layers[1].compressed.read()[0].numpy())
    released = model.new_cache(storage="released")
    released.layers[1].compressed.append(exact.layers[1].compressed.read())
    released.layers[1].index.append(exact.layers[1].index.read())
    np.testing.assert_array_equal(entries.stored, released.layers[1].compressed.read()[0].numpy())
    np.testing.assert_array_equal(keys.stored, released.layers[1].index.read()[0].numpy())


def test_a_stored_value_is_a_level_times_the_scale_of_its_block(stored):
    entries, keys = stored
    for rows in stored:
        scale = np.repeat(rows.scales, rows.block, axis=1)[:, : rows.coded]
        assert np.isin(rows.stored[:, : rows.coded] / scale, rows.levels).all()
        assert (np.log2(rows.scales) % 1 == 0).all()
    assert sorted(set(np.abs(keys.levels))) == sorted(E2M1_MAGNITUDES) and len(keys.levels) == 15
    assert entries.levels.max() == 448 and len(entries.levels) == 253
    assert np.abs(keys.values).max() <= 6 * keys.scales.max()


def test_bytes_of_a_row_add_up_to_the_formula(model, stored):
    held = wb.kv_bytes(model.config, 160, storage="released")
    csa = model.config.layer_kinds.count("csa")
    assert sum(stored[1].nbytes.values()) * csa * 40 == held["index"]
    assert stored[0].nbytes == {"codes": 56, "scales": 1, "BF16": 16, "padding": 7}
    assert stored[1].nbytes == {"codes": 16, "scales": 1}


def test_errors_are_relative_and_rotation_is_what_makes_fp4_bearable(stored):
    entries, keys = stored
    assert relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(0.1)
    assert 0 < entries.relative_error < 0.04 < keys.relative_error < 0.2
    assert keys.unrotated_error > keys.relative_error and entries.unrotated_error is None
    assert keys.rotated and not entries.rotated and "tiny-v4 (toy, trained), measured on CPU" in keys.label


def test_every_value_goes_to_the_nearest_level(stored):
    keys = stored[1]
    row, scale = keys.values[3], keys.scales[3, 0]
    grid = keys.levels * scale
    nearest = np.abs(row[:, None] - grid).min(axis=1)
    np.testing.assert_allclose(np.abs(keys.stored[3] - row), nearest, atol=1e-9)


@pytest.fixture(scope="module")
def selections(model, ids):
    return rounded_selections(model, ids)


def test_exact_choices_are_the_models_own(model, ids, selections):
    from workbench.training.score import selected_entries

    own = selected_entries(model, torch.tensor([ids]))
    assert set(own) == set(selections.exact) == {1, 3}
    for layer, entries in own.items():
        np.testing.assert_array_equal(selections.exact[layer], entries[0])
    assert selections.choosing.sum() == len(ids) - (9 * 4 - 1) and selections.topk == 8


def test_only_index_keys_are_rounded_so_the_first_choosing_layer_differs_by_them_alone(model, ids, selections):
    """With the first choosing layer's scores recomputed from packed keys and rounded queries."""
    from workbench.model.formats import row_formats
    from workbench.recorder import Recorder

    recorder, cache = Recorder(model), model.new_cache()
    with recorder, torch.inference_mode():
        model(torch.tensor([ids]), cache)
    recorder.finish_step(len(ids), cache)
    layer = recorder.layers[1].snapshot(len(ids))
    form = row_formats(model.config, "released")["index"]
    q = form.as_queries(torch.from_numpy(layer.index_queries[-1]))
    k = form.decode(form.encode(torch.from_numpy(layer.index_keys)))
    scores = torch.from_numpy(layer.index_weights[-1]) @ torch.relu(q @ k.T)
    assert set(scores.topk(8).indices.tolist()) == set(selections.rounded[1][-1].tolist())


def made_up():
    exact = np.array([[0, -1], [3, 1], [2, 0], [4, 5]])
    rounded = np.array([[0, -1], [1, 3], [2, 7], [8, 9]])
    attention = np.array([[9.0, 9.0], [0.5, 0.25], [0.5, 0.25], [0.25, 0.25]])
    choosing = np.array([False, True, True, True])
    return Selections(exact={1: exact}, rounded={1: rounded}, attention={1: attention}, choosing=choosing, label="made up")


def test_shares_are_counted_over_the_queries_that_choose():
    found = made_up()
    np.testing.assert_array_equal(found.still_kept(1), [[True, True], [True, False], [False, False]])
    np.testing.assert_allclose(found.share_by_rank(1), [2 / 3, 1 / 3])
    assert found.share(1) == pytest.approx(0.5) and found.same(1) == pytest.approx(1 / 3)
    assert found.attention_on_entries(1) == pytest.approx(2 / 3)
    assert found.attention_lost(1) == pytest.approx((0.25 + 0.5) / 2.0)


def test_what_cannot_be_shown_is_one_clear_error(model):
    for call in (stored_rows, rounded_selections):
        with pytest.raises(InputError, match="no CSA layers.*choose tiny-v4"):
            call(wb.load("tiny-gqa", device="cpu"), [1, 2, 3])
    with pytest.raises(InputError, match="close no block of 4"):
        stored_rows(model, [1, 2, 3])
    with pytest.raises(InputError, match="more than 32 are needed"):
        rounded_selections(model, [1] * 32)
