"""Dense attention beside the sparse one: exact on short texts, bounded on long ones; reuse counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import workbench as wb
from tests.slow_reference import CONFIG, random_ids, random_model
from tests.synthetic import synthetic_trace
from workbench import beside
from workbench.beside import dense_beside, record_text, with_window
from workbench.errors import InputError, WorkbenchError
from workbench.figures.attention import composite_tile
from workbench.microscope import Forks, keep_all, listened
from workbench.model.selection_edits import edited_selections
from workbench.recorder import selecting_attention

SHIPPED = {name: wb.load(name, device="cpu") for name in ("tiny-v4", "tiny-v41", "tiny-mla-dsa")}
RANDOM = random_model(replace(CONFIG, hc_mult=4))  # windows, ratios and blocks that do not divide one another


def ids_of(model, tokens):
    return model.tokenizer.encode(wb.sample_text()).ids[:tokens]


def fully(model, ids, layer, topk=None):
    """By the model's own code, told to keep everything in this layer alone: window, entries and sink [L, H, ...]."""
    attention, ratio = model.blocks[layer].attn, model.config.compress_ratios[layer]
    with listened(model, [layer]) as heard, edited_selections({attention: keep_all(ratio)}), torch.inference_mode():
        model(torch.tensor([ids]), topk=topk)
    total = len(ids) // ratio
    entries = [torch.nn.functional.pad(a.entry_probs[0], (0, total - a.entry_probs.shape[-1])) for a in heard.attention[layer]]
    others = [(a.window_probs[0], a.sink_probs[0]) for a in heard.attention[layer]]
    window, sink = (torch.cat(part).float().numpy() for part in zip(*others, strict=True))
    return window, torch.cat(entries).float().numpy(), sink


def painted(config, layer, window, entries):
    """[L, L, H] on tokens, one pair at a time: the largest of the token itself and of all entries made from it."""
    length, ratio = len(window), config.compress_ratios[layer]
    back = ratio if config.layer_kinds[layer] == "csa" else 0
    out = np.zeros((length, length, window.shape[1]), np.float32)
    for t in range(length):
        for w in range(window.shape[2]):
            at = t - window.shape[2] + 1 + w
            if at >= 0:
                out[t, at] = np.maximum(out[t, at], window[t, :, w])
        for e in range((t + 1) // ratio):
            for token in range(max(0, e * ratio - back), (e + 1) * ratio):
                out[t, token] = np.maximum(out[t, token], entries[t, :, e])
    return out


@pytest.mark.parametrize("name", [*SHIPPED, "random"])
@pytest.mark.parametrize("pixels", [23, 520])
def test_the_pooled_map_is_that_of_the_full_computation(name, pixels):
    model = SHIPPED.get(name, RANDOM)
    ids = random_ids(CONFIG, 1, 61)[0].tolist() if name == "random" else ids_of(model, 90)
    found = dense_beside(model, ids, topk=2, pixels=pixels)
    first = min(found.dense)  # below it nothing differs, so the model itself can say what dense attention is
    window, entries, _ = fully(model, ids, first)
    full = painted(model.config, first, window, entries)
    pool = found.layer(first).pooling
    cells = -(-len(ids) // pool)
    assert pool == -(-len(ids) // pixels) and found.layer(first).most.shape[1:] == (cells, cells)
    for i in range(cells):
        for j in range(cells):
            cell = full[i * pool : (i + 1) * pool, j * pool : (j + 1) * pool]
            np.testing.assert_allclose(found.layer(first).most[:, i, j], cell.max((0, 1)), atol=2e-6)
    each = window.mean(1, keepdims=True), entries.mean(1, keepdims=True)
    mean = painted(model.config, first, *each)[..., 0]
    np.testing.assert_allclose(found.layer(first).mean[0, 0], mean[:pool, :pool].max(), atol=2e-6)
    np.testing.assert_allclose(found.layer(first).mean[-1].max(), mean[(cells - 1) * pool :].max(), atol=2e-6)
    np.testing.assert_allclose(found.layer(first).on_entries, entries.sum(2), atol=2e-6)
    tile = composite_tile(found.trace, first, max_pixels=pixels)  # the sparse one has the same cells
    assert tile.values.shape == (cells, cells) and tile.pooling == (pool, pool)


@pytest.mark.parametrize("name", [*SHIPPED, "random"])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_shared_out_among_what_was_kept_it_is_the_recorded_attention(name, storage):
    """Of every layer, whatever the layers below chose: the recording knows nothing of how the dense one was worked out."""
    model = SHIPPED.get(name, RANDOM)
    ids = random_ids(CONFIG, 1, 300)[0].tolist() if name == "random" else ids_of(model, 300)
    with selecting_attention(model) as kept:
        found = dense_beside(model, ids, topk=2, storage=storage)
    for layer, dense in found.dense.items():
        assert dense.deviation < 1e-5
        entries = np.concatenate([part.entry_probs[0].float().sum(-1).numpy() for part in kept[layer]])[: len(ids)]
        missed, total = dense.missed.astype(np.float64), dense.on_entries
        np.testing.assert_allclose(total - missed, entries * (1 - missed), atol=1e-5)
        assert missed.max() > 0.01 and (missed[: 2 * model.config.compress_ratios[layer]] == 0).all()


def test_missed_attention_is_what_the_microscope_finds_for_single_queries():
    model = SHIPPED["tiny-v4"]
    ids = ids_of(model, 200)
    found, forks = dense_beside(model, ids), Forks(model, ids)
    for layer in found.dense:
        for query in (20, 150, 199):
            assert found.layer(layer).missed[query].mean() == pytest.approx(forks.choice(layer, query).missed_mass, abs=1e-5)


def test_nothing_changes_for_the_layers_and_nothing_stays_behind():
    model = SHIPPED["tiny-v41"]
    ids = ids_of(model, 300)
    plain = record_text(model, ids)
    found = dense_beside(model, ids, [3])
    assert list(found.dense) == [3]
    for before, after in zip(plain.layers, found.trace.layers, strict=True):
        np.testing.assert_array_equal(before.window_probs, after.window_probs)
        if before.selected is not None:
            np.testing.assert_array_equal(before.selected, after.selected)
    assert not any(block.attn.input_tap.listening or block.attn.attention_tap.listening for block in model.blocks)


def test_a_single_last_token_is_a_query_like_any_other():
    model = SHIPPED["tiny-v4"]
    ids = ids_of(model, beside.PREFILL_CHUNK + 1)  # the last one comes alone, as decoded tokens do
    found = dense_beside(model, ids)
    choice = Forks(model, ids).choice(1, len(ids) - 1)
    assert found.layer(1).missed[-1].mean() == pytest.approx(choice.missed_mass, abs=1e-5)
    assert found.layer(1).deviation < 1e-5


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self.values = max(self.values, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize(("name", "layer"), [("tiny-v4", 1), ("tiny-mla-dsa", 1), ("tiny-v41", 4)])
def test_a_block_of_queries_is_held_and_never_all_of_them(name, layer, monkeypatch):
    monkeypatch.setattr(beside, "BLOCK_VALUES", 2**15)
    model = SHIPPED[name]
    ratio = model.config.compress_ratios[layer]
    most = []
    paint = beside._Picture.paint
    monkeypatch.setattr(
        beside._Picture, "paint", lambda self, start, near, far: (most.append(far.size), paint(self, start, near, far))
    )
    ids = ids_of(model, 1100)
    with Largest() as seen:
        found = dense_beside(model, ids, [layer], pixels=64)
    whole = len(ids) * (len(ids) // ratio) * model.config.num_attention_heads
    assert max(most) <= 2**15 < whole / 25  # what is painted at once
    assert found.layer(layer).most.nbytes <= 4 * model.config.num_attention_heads * 64 * 64
    assert seen.values < whole / 3  # of anything the reading makes, its own chunks and caches included


def test_reuse_is_counted_by_hand():
    model = SHIPPED["tiny-mla-dsa"]
    ids = ids_of(model, 120)
    found = dense_beside(model, ids, topk=4)
    kept = {layer.layer: [set(row[row >= 0].tolist()) for row in layer.selected] for layer in found.trace.layers}
    pair = next(x for x in found.layer_reuse if (x.source, x.layer) == (1, 2))
    queries = [t for t in range(len(ids)) if t + 1 > 4]
    assert pair.queries == len(queries)
    assert pair.overlap == pytest.approx(np.mean([len(kept[2][t] & kept[1][t]) / 4 for t in queries]))
    assert pair.by_chance == pytest.approx(np.mean([4 / (t + 1) for t in queries]))
    lag = next(x for x in found.step_reuse if (x.layer, x.lag) == (2, 8))
    assert lag.overlap == pytest.approx(np.mean([len(kept[2][t] & kept[2][t - 8]) / 4 for t in queries if t - 8 + 1 > 4]))
    _, entries, _ = fully(model, ids, 0)
    first = next(x for x in found.step_reuse if (x.layer, x.lag) == (0, 1))
    lost = [1 - entries[t][:, sorted(kept[0][t - 1])].sum(-1).mean() for t in queries if t > 4]
    assert first.missed_reusing == pytest.approx(np.mean(lost), abs=1e-5)
    assert first.missed == pytest.approx(
        np.mean([1 - entries[t][:, sorted(kept[0][t])].sum(-1).mean() for t in queries if t > 4]), abs=1e-5
    )


def test_using_another_layers_choice_is_what_the_edited_model_does_with_it():
    model = SHIPPED["tiny-v4"]
    ids = ids_of(model, 160)
    found = dense_beside(model, ids, topk=3)
    theirs = np.asarray(found.trace.layer(1).selected)
    pair = found.layer_reuse[0]
    assert (pair.source, pair.layer) == (1, 3)
    _, entries, _ = fully(model, ids, 3, topk=3)
    queries = [t for t in range(len(ids)) if (t + 1) // 4 > 3]
    lost = [entries[t].sum(-1).mean() - entries[t][:, theirs[t][theirs[t] >= 0]].sum(-1).mean() for t in queries]
    assert pair.missed_reusing == pytest.approx(np.mean(lost), abs=1e-5) and pair.missed_reusing > pair.missed


def test_a_layer_that_reuses_agrees_wholly_and_its_chance_is_that_of_the_pool():
    model = SHIPPED["tiny-v41"]
    found = dense_beside(model, ids_of(model, 300))
    by_pair = {(x.source, x.layer): x for x in found.layer_reuse}
    assert set(by_pair) == {(2, 3), (2, 4), (3, 4)}  # layer 1 has entries of another ratio
    reused = by_pair[3, 4]
    assert reused.same_choice and reused.overlap == 1 and reused.missed_reusing == pytest.approx(reused.missed, abs=1e-6)
    pool = model.config.candidate_pool(3)
    visible = np.array([t + 1 for t in range(300) if t + 1 > 16])
    assert by_pair[2, 3].by_chance == pytest.approx((16 / np.minimum(visible, pool)).mean())


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("storage", ["fp32", "released"])
def test_index_bytes_counted_layer_by_layer_are_those_of_the_formula(name, storage):
    model = SHIPPED[name]
    found = dense_beside(model, ids_of(model, 203), storage=storage)
    formula = wb.decode_bytes(model.config, 204, storage)
    assert sum(found.index_bytes.values()) == formula["index"]
    assert found.bytes_read == formula["total"]


def test_a_smaller_window_has_the_same_weights_and_sees_less():
    model = SHIPPED["tiny-v4"]
    twin = with_window(model, 5)
    assert twin.embed.weight.data_ptr() == model.embed.weight.data_ptr()
    assert twin.blocks[1].attn.wkv.weight.data_ptr() == model.blocks[1].attn.wkv.weight.data_ptr()
    assert with_window(model, 16) is model and model.config.sliding_window == 16
    ids = ids_of(model, 100)
    found = dense_beside(model, ids, window=5)
    assert found.trace.layer(1).window == 5 and found.layer(1).deviation < 1e-5
    short = torch.tensor([ids[:5]])
    with torch.inference_mode():  # where all is within the window nothing differs
        torch.testing.assert_close(twin(short), model(short))
        assert (twin(torch.tensor([ids])) - model(torch.tensor([ids]))).abs().max() > 1e-3


def test_progress_is_told_and_stop_ends_it():
    model, shares = SHIPPED["tiny-v4"], []
    ids = ids_of(model, 600)
    dense_beside(model, ids, progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 3
    with pytest.raises(WorkbenchError, match="stopped after 256 of 600 tokens"):
        dense_beside(model, ids, progress=shares.append, stop=lambda: len(shares) > 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [0]}, r"layers \[1, 3\] of tiny-v4 choose entries, got \[0\]"),
        ({"layers": []}, r"choose entries, got \[\]"),
        ({"window": 17}, "window must be 1 to 16"),
        ({"window": 0}, "window must be 1 to 16"),
        ({"topk": 0}, "topk must be positive"),
        ({"pixels": 0}, "pixels must be from 1"),
    ],
)
def test_settings_that_cannot_be_get_one_clear_error(settings, message):
    with pytest.raises(InputError, match=message):
        dense_beside(SHIPPED["tiny-v4"], [1, 2, 3], **settings)


def test_models_without_a_choice_or_a_window_say_so():
    with pytest.raises(InputError, match="attends to every token already"):
        dense_beside(wb.load("tiny-gqa", device="cpu"), [1, 2, 3])
    with pytest.raises(InputError, match="no sliding window to set"):
        record_text(SHIPPED["tiny-mla-dsa"], [1, 2, 3], window=4)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("read", [record_text, dense_beside])
def test_weights_that_are_not_finite_are_said_and_nothing_is_drawn_of_them(read):
    bad = random_model(CONFIG)
    with torch.no_grad():
        bad.embed.weight[5] = np.nan
    ids = [6, 7] * 10
    assert read(bad, ids) is not None
    with pytest.raises(WorkbenchError, match="output is not finite"):
        read(bad, [*ids, 5])


def test_a_text_too_short_to_leave_anything_out_misses_nothing():
    found = dense_beside(SHIPPED["tiny-v4"], [1, 2, 3])
    assert not found.layer_reuse and not found.step_reuse and found.layer(1).missed.max() == 0
    with pytest.raises(InputError, match="left an entry out"):
        wb.reuse_chart(found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": 99}, "choose entries, got"),
        ({"layers": ["a"]}, "whole number"),
        ({"topk": 1.5}, "topk must be a whole number"),
        ({"topk": "a"}, "topk must be a whole number"),
        ({"pixels": 1.5}, "pixels must be a whole number"),
        ({"pixels": 10**6}, "pixels must be from 1"),
    ],
)
def test_settings_that_are_no_numbers_are_refused_in_one_line(settings, words):
    with pytest.raises(InputError, match=words):
        dense_beside(wb.load("tiny-v4"), "Some words here. " * 8, **settings)


def test_what_is_no_model_and_no_recording_is_refused():
    for act in (dense_beside, wb.run, wb.record_text):
        with pytest.raises(InputError, match="a model that wb.load gave"):
            act(None, "text")
    trace = synthetic_trace(20)
    for pair in ((trace, None), (5, trace)):
        with pytest.raises(InputError, match="two recordings"):
            wb.compare_runs(*pair)
    with pytest.raises(InputError, match="a model that wb.load gave"):
        wb.Microscope(trace, model=5)
