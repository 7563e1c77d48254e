"""What a recorder notes equals a slow recomputation, costs nothing when off, and never mixes two runs."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.slow_reference import CONFIG, ENGRAM, SlowV4, random_config, random_ids, random_model, random_pieces
from workbench import cost
from workbench.model.attention.hybrid import Attention
from workbench.model.transformer import V4Model
from workbench.recorder import Column, LayerRecord, Recorder, pooled_rows
from workbench.trace import FULL_ROW_TOKENS, ROW_VALUES, entry_pooling, row_tokens

WITH_ENGRAM = replace(CONFIG, engram=ENGRAM)
HALF = 1e-3  # probabilities are kept in float16: 2^-11 relative


def record(model: V4Model, ids: torch.Tensor, sizes: list[int], topk: int | None = None) -> tuple[dict, Recorder]:
    recorder, cache = Recorder(model), model.new_cache(ids.shape[0])
    with recorder, torch.inference_mode():
        for piece in ids.split(sizes, dim=1):
            model(piece, cache, "last", topk=topk)
            recorder.finish_step(piece.shape[1], cache)
    return recorder.snapshot("here"), recorder


def hooks(model: V4Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("seed", range(10))
def test_everything_recorded_equals_a_slow_recomputation(seed):
    config = random_config(400 + seed, engram=seed % 2 == 0)
    model, length = random_model(config, seed), (1, 5, 31, 71, 90)[seed % 5]
    ids = random_ids(config, 1, length, seed)
    slow = SlowV4(model)
    slow.read(ids[0])
    for sizes in ([length], [1] * length, random_pieces(length, seed)):
        found, _ = record(model, ids, sizes)
        assert [(x.layer, x.kind, x.ratio) for x in found["layers"]] == list(
            zip(range(99), config.layer_kinds, config.compress_ratios, strict=False)
        )
        for layer in found["layers"]:
            assert layer.length == length and layer.heads == config.num_attention_heads
            assert layer.window == config.sliding_window
            for t, query in enumerate(slow.seen[layer.layer]):
                check_query(layer, t, query)
        for memory in found["engram"]:
            assert memory.rows.tolist() == slow.rows[memory.layer]
            np.testing.assert_allclose(memory.gates, np.stack(slow.gates[memory.layer]), atol=HALF)
            canonical = model.engram_canonical_ids
            assert memory.ids.tolist() == canonical[ids[0]].tolist()
            assert memory.pad == int(canonical[config.engram.pad_token_id])
        assert found["step_starts"].tolist() == [sum(sizes[:i]) for i in range(len(sizes))]
        ends = np.cumsum(sizes)
        for part, held in found["cache_bytes"].items():
            assert held.tolist() == [cost.kv_bytes(config, int(end), "fp32")[part] for end in ends]
    model.fetcher.close()


def check_query(layer, t: int, query) -> None:
    window = np.zeros_like(layer.window_probs[t], np.float64)
    for token, probs in query.window.items():
        window[:, token - t + layer.window - 1] = probs
    np.testing.assert_allclose(layer.window_probs[t], window, atol=HALF)
    np.testing.assert_allclose(layer.sink_probs[t], query.sink, atol=HALF)
    total = layer.window_probs[t].sum(1, dtype=np.float64) + layer.sink_probs[t]
    if layer.kind == "csa":
        kept = layer.selected[t]
        assert [e for e in kept.tolist() if e >= 0] == query.selected
        n = len(query.selected)
        assert (
            (kept[n:] == -1).all() and np.isnan(layer.selected_scores[t, n:]).all() and not layer.selected_probs[t, :, n:].any()
        )
        np.testing.assert_allclose(layer.selected_scores[t, :n], query.scores[query.selected], atol=1e-4)
        np.testing.assert_allclose(layer.index_scores(t), query.scores, atol=1e-4)
        for place, entry in enumerate(query.selected):
            np.testing.assert_allclose(layer.selected_probs[t, :, place], query.entries[entry], atol=HALF)
        left = sorted(set(range(len(query.scores))) - set(query.selected), key=lambda s: (-query.scores[s], s))
        assert layer.runner_up[t] == (left[0] if left else -1)
        np.testing.assert_allclose(layer.runner_up_scores[t], query.scores[left[0]] if left else np.nan, atol=1e-4)
        total = total + layer.selected_probs[t].sum(1, dtype=np.float64)
    elif layer.kind == "hca":
        entries = np.zeros_like(layer.entry_probs[t], np.float64)
        for entry, probs in query.entries.items():
            entries[:, entry] = probs
        np.testing.assert_allclose(layer.entry_probs[t], entries, atol=HALF)
        total = total + layer.entry_probs[t].sum(1, dtype=np.float64)
    np.testing.assert_allclose(total, 1.0, atol=4 * HALF)


def test_recorded_scores_reproduce_the_selection():
    """The rows recomputed from queries, weights and keys choose exactly the entries that were attended to."""
    found, _ = record(random_model(), random_ids(CONFIG, 1, 131), [64, 1, 66])
    for layer in (x for x in found["layers"] if x.kind == "csa"):
        for t in range(131):
            scores = layer.index_scores(t)
            best = np.lexsort((np.arange(len(scores)), -scores))[: CONFIG.index_topk]
            assert layer.selected[t][layer.selected[t] >= 0].tolist() == best.tolist()


def test_another_topk_is_recorded_as_it_was_used():
    found, _ = record(random_model(), random_ids(CONFIG, 1, 61), [30, *[1] * 31], topk=7)
    layer = next(x for x in found["layers"] if x.kind == "csa")
    assert layer.selected.shape == (61, 7) and ((layer.selected >= 0).sum(1) == np.minimum(7, np.arange(1, 62) // 4)).all()


@pytest.mark.parametrize("ratio", [7, 16, 128, 300])
@pytest.mark.parametrize("sizes", [[2500, 2500], [2047, 1, 1, 2047, 1, 903], [5000]])
def test_rows_beyond_the_full_length_hold_the_maxima_of_all_entries(ratio, sizes):
    """Every visible entry must be found in the column that LayerTrace names, also where the ratio does not divide 2,048."""
    length, heads = 5000, 2
    probs = np.random.default_rng(ratio).random((length, heads, length // ratio)).astype(np.float16)
    visible = (np.arange(length) + 1) // ratio
    probs[np.broadcast_to(np.arange(length // ratio) >= visible[:, None, None], probs.shape)] = 0
    column, start = Column(np.float16), 0
    for size in sizes:
        entries = (start + size) // ratio
        column.append(pooled_rows(torch.from_numpy(probs[start : start + size, :, :entries]), start, ratio))
        start += size
    rows = column.rows()
    assert rows.shape[-1] <= -(-FULL_ROW_TOKENS // ratio)
    for t in [*range(0, length, 97), 2046, 2047, 2048, 4094, 4095, 4096, 4999]:
        pooling, seen = entry_pooling(t), visible[t]
        expected = [probs[t, :, c : min(c + pooling, seen)].max(1) for c in range(0, seen, pooling)]
        np.testing.assert_array_equal(rows[t, :, : len(expected)], np.array(expected).reshape(-1, heads).T)
        assert not rows[t, :, len(expected) :].any()


def test_a_recorded_long_text_pools_what_a_slow_attention_computes():
    config = replace(
        CONFIG,
        layer_kinds=("hca",),
        mlp_kinds=("hash",),
        hca_ratio=7,
        num_attention_heads=2,
        o_groups=1,
        hc_mult=1,
        hidden_size=8,
    )
    model, ids = random_model(config), random_ids(config, 1, 4200)
    found, _ = record(model, ids, [2000, 1, 2100, *[1] * 99])
    slow = SlowV4(model)
    slow.read(ids[0])
    rows = found["layers"][0].entry_probs
    for t in (100, 2046, 2047, 2048, 3001, 4095, 4096, 4199):
        pooling, query = entry_pooling(t), slow.seen[0][t]
        assert len(query.entries) == (t + 1) // 7
        expected = np.zeros(rows.shape[1:])
        for entry, probs in query.entries.items():
            expected[:, entry // pooling] = np.maximum(expected[:, entry // pooling], probs)
        np.testing.assert_allclose(rows[t], expected, atol=1e-4)


def test_recorded_bytes_grow_with_the_length_and_not_with_its_square():
    config = replace(
        CONFIG, layer_kinds=("csa", "hca", "window"), mlp_kinds=("hash",) * 3, hca_ratio=8, max_position_embeddings=20000
    )
    model, sizes = random_model(config), []
    for length in (2048, 4096, 8192):
        found, _ = record(model, random_ids(config, 1, length), [512] * (length // 512))
        arrays = [v for x in found["layers"] for v in (getattr(x, n) for n in x.__slots__) if isinstance(v, np.ndarray)]
        sizes.append(sum(a.nbytes for a in arrays))
    assert sizes[1] <= 2.05 * sizes[0] and sizes[2] <= 2.05 * sizes[1]


@pytest.mark.parametrize("spans_only", [False, True])
def test_hooks_are_gone_after_the_block_also_after_an_error(spans_only):
    model = random_model(WITH_ENGRAM)
    recorder = Recorder(model, spans_only=spans_only)
    assert hooks(model) == 0
    with recorder:
        assert hooks(model) > 0
    assert hooks(model) == 0
    with pytest.raises(KeyboardInterrupt), recorder:
        raise KeyboardInterrupt
    assert hooks(model) == 0


def test_a_call_that_breaks_off_leaves_the_finished_steps():
    model, ids = random_model(WITH_ENGRAM), random_ids(WITH_ENGRAM, 1, 27)
    expected, _ = record(model, ids[:, :25], [20, 1, 4])
    recorder, cache = Recorder(model), model.new_cache()
    with pytest.raises(RuntimeError, match="broken"), recorder, torch.inference_mode():
        for piece in ids.split([20, 1, 4, 2], dim=1):
            if piece.shape[1] == 2:
                model.blocks[2].ffn.register_forward_pre_hook(broken)
            model(piece, cache)
            recorder.finish_step(piece.shape[1], cache)
    same_fields(recorder.snapshot("here"), expected)
    model.fetcher.close()


def broken(*_: object) -> None:
    raise RuntimeError("broken")


def same_fields(found: dict, expected: dict) -> None:
    """Equal but for spans, whose times differ."""
    for one, other in zip((*found["layers"], *found["engram"]), (*expected["layers"], *expected["engram"]), strict=True):
        for name in one.__slots__:
            mine, theirs = getattr(one, name), getattr(other, name)
            if isinstance(mine, np.ndarray):
                np.testing.assert_array_equal(mine, theirs, err_msg=name)
            else:
                assert mine == theirs
    assert found["step_starts"].tolist() == expected["step_starts"].tolist()
    assert {k: v.tolist() for k, v in found["cache_bytes"].items()} == {
        k: v.tolist() for k, v in expected["cache_bytes"].items()
    }
    assert {span.step for span in found["timeline"].spans} == {span.step for span in expected["timeline"].spans}


def test_two_runs_of_one_model_at_once_do_not_mix():
    model = random_model(WITH_ENGRAM)
    lines = [random_ids(WITH_ENGRAM, 1, 37, seed) for seed in (1, 2)]
    alone = [record(model, line, [5] * 7 + [2])[0] for line in lines]
    found, barrier = {}, threading.Barrier(2)

    def work(number: int) -> None:
        recorder, cache = Recorder(model), model.new_cache()
        with recorder, torch.inference_mode():
            for piece in lines[number].split(5, dim=1):
                barrier.wait(30)
                model(piece, cache)
                recorder.finish_step(piece.shape[1], cache)
            barrier.wait(30)  # nobody stops listening while the other is still at work
        found[number] = recorder.snapshot("here")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(2):
        same_fields(found[number], alone[number])
        blocks = [span for span in found[number]["timeline"].spans if span.lane == "compute"]
        assert len(blocks) == 8 * 4  # its own blocks only
    assert hooks(model) == 0
    model.fetcher.close()


def test_recording_changes_no_logit():
    model, ids = random_model(WITH_ENGRAM), random_ids(WITH_ENGRAM, 1, 61)
    with torch.inference_mode():
        plain = model(ids)
        with Recorder(model):
            recorded = model(ids)
    assert torch.equal(plain, recorded)
    model.fetcher.close()


def test_nothing_is_kept_when_nobody_records(monkeypatch):
    """Values made for recording only are not even computed."""
    model = random_model(WITH_ENGRAM)
    monkeypatch.setattr("workbench.model.attention.hybrid.window_rows", broken)
    monkeypatch.setattr("workbench.model.attention.hybrid.Attention", broken)
    with torch.inference_mode():
        model(random_ids(WITH_ENGRAM, 1, 33))
        with Recorder(model, spans_only=True) as recorder:
            model(random_ids(WITH_ENGRAM, 1, 33))
    assert recorder.spans and all(column.length == 0 for layer in recorder.layers for column in layer.columns.values())
    assert all(not layer.pending for layer in recorder.layers)
    model.fetcher.close()


def test_spans_lie_in_order_inside_their_steps():
    model = random_model(WITH_ENGRAM)
    found, recorder = record(model, random_ids(WITH_ENGRAM, 1, 30), [20, *[1] * 10])
    spans = found["timeline"].spans
    assert [s.step for s in spans] == sorted(s.step for s in spans) and {s.step for s in spans} == set(range(11))
    for step in range(11):
        blocks = [s for s in spans if s.step == step and s.lane == "compute"]
        assert [s.name for s in blocks] == [f"layer {n}" for n in range(4)]
        assert all(a.end_s <= b.start_s for a, b in zip(blocks, blocks[1:], strict=False))
    assert {s.lane for s in spans} <= {"ids", "compute", "lookup", "stall"} and recorder.length == 30
    model.fetcher.close()


def test_a_snapshot_stays_as_it_was_while_the_run_goes_on():
    model, ids = random_model(WITH_ENGRAM), random_ids(WITH_ENGRAM, 1, 200)
    recorder, cache = Recorder(model), model.new_cache()
    with recorder, torch.inference_mode():
        model(ids[:, :70], cache)
        recorder.finish_step(70, cache)
        early = recorder.snapshot("here")
        copies = [
            {n: np.copy(getattr(x, n)) for n in x.__slots__ if isinstance(getattr(x, n), np.ndarray)} for x in early["layers"]
        ]
        for t in range(70, 200):
            model(ids[:, t : t + 1], cache)
            recorder.finish_step(1, cache)
        late = recorder.snapshot("here")
    for layer, before, now in zip(early["layers"], copies, late["layers"], strict=True):
        for name, value in before.items():
            np.testing.assert_array_equal(getattr(layer, name), value, err_msg=name)
            if name != "index_keys":
                rest = tuple(slice(0, n) for n in value.shape[1:])
                np.testing.assert_array_equal(getattr(now, name)[(slice(0, 70), *rest)], value, err_msg=name)
    model.fetcher.close()


def test_an_unused_recorder_has_an_empty_snapshot():
    found = Recorder(random_model(WITH_ENGRAM)).snapshot("here")
    assert found["layers"] == () and found["engram"] == () and found["timeline"].spans == () and len(found["step_starts"]) == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_column_pads_narrow_rows_and_widens_for_wide_ones(seed):
    rng, column, rows = np.random.default_rng(seed), Column(np.float32, np.nan), []
    for _ in range(int(rng.integers(1, 12))):
        part = rng.random((int(rng.integers(0, 90)), 2, int(rng.integers(0, 7)))).astype(np.float32)
        column.append(part)
        rows += list(part)
    width = max((row.shape[1] for row in rows), default=0)
    got = column.rows()
    assert len(got) == len(rows) and (not rows or got.shape[2] >= width)
    for mine, row in zip(got, rows, strict=True):
        np.testing.assert_array_equal(mine[:, : row.shape[1]], row)
        assert np.isnan(mine[:, row.shape[1] :]).all()


@pytest.mark.parametrize(("ratio", "length"), [(1, 1000), (3, 1009)])
@pytest.mark.parametrize("sizes", [1, 67, 1009])
def test_rows_over_every_token_are_pooled_further_as_the_text_grows(monkeypatch, ratio, length, sizes):
    """However the text was cut, every row holds the maxima that LayerTrace names for the length it has by now."""
    monkeypatch.setattr("workbench.trace.ROW_VALUES", 2**17)  # instead of 2^24: what else takes 65,536 tokens
    probs = np.random.default_rng(ratio).random((length, 2, length // ratio)).astype(np.float16)
    seen = (np.arange(length) + 1) // ratio
    probs[np.broadcast_to(np.arange(length // ratio) >= seen[:, None, None], probs.shape)] = 0
    layer = LayerRecord(0, "gqa" if ratio == 1 else "hca", ratio)
    for start in range(0, length, sizes):
        part = torch.from_numpy(probs[None, start : start + sizes, :, : (start + sizes) // ratio])
        layer.note(Attention(start, part.new_zeros(*part.shape[:3], 0), part.new_zeros(part.shape[:3]), part))
        if start % 5 == 0:
            layer.flush()
        layer.settle(min(length, start + sizes))
    trace = layer.snapshot(length)
    assert trace.entry_pooling(length - 1) > 1 and trace.entry_probs[0, 0].size <= 2 * 2**17 // length
    for t in range(length):
        pooling = trace.entry_pooling(t)
        expected = [probs[t, :, c : c + pooling].max(1) for c in range(0, seen[t], pooling)]
        np.testing.assert_array_equal(trace.entry_probs[t, :, : len(expected)], np.array(expected).reshape(-1, 2).T)
        assert not trace.entry_probs[t, :, len(expected) :].any()


def test_rows_over_every_token_of_a_long_context_are_bounded_and_do_not_wait_for_the_end_of_a_step():
    layer = LayerRecord(0, "mha", 1)
    for start in range(0, 20_480, 2048):  # more values in each record than may wait
        probs = torch.full((1, 2048, 1, start + 2048), 0.5).expand(1, 2048, 3, -1)
        layer.note(Attention(start, probs[..., :0], probs[..., 0], probs))
        assert not layer.pending
        layer.settle(start + 2048)
    rows = layer.snapshot(20_480).entry_probs
    assert rows.shape == (20_480, 3, 512) and (rows[2048:, :, 0] == 0.5).all()


@pytest.mark.parametrize("ratio", [1, 2, 4, 128])
def test_all_rows_of_a_head_together_stay_within_their_bound(ratio):
    for length in (1, 8192, 8193, 65_536, 131_072, 1_048_576):
        assert length * row_tokens(length, ratio) <= ROW_VALUES * ratio
        assert row_tokens(length, ratio) == FULL_ROW_TOKENS or length > 8192 * ratio
