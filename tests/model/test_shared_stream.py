"""V4.1's shared streams: who makes, chooses and reads; any cut of a text; the candidate pool; the cache; bounded replay."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.test_kv_cache import storage_bytes
from tests.oracles import V41_SCHEDULES, random_v41_config
from tests.slow_reference import in_pieces, random_ids, random_model, random_pieces, settled
from workbench.config import SharedStreamConfig
from workbench.errors import InputError
from workbench.live import run
from workbench.model.attention.hybrid import Attention
from workbench.model.indexer import IndexQueries, candidate_blocks, keep_best, score_entries, select_candidates
from workbench.model.kv_cache import Rows
from workbench.trace import Trace

ROUNDING = 1e-4  # float32 over eight layers gives about 1e-5; a wrong entry gives 1e-2 and more
LENGTHS = (1, 2, 3, 5, 8, 13, 29, 47, 61, 101)


def tiny(seed: int, **overrides: Any) -> SharedStreamConfig:
    """A configuration of ``random_v41_config`` with some settings changed."""
    return SharedStreamConfig.from_dict({"model_type": "deepseek_v41"} | random_v41_config(seed) | overrides)


def records(model: Any, ids: torch.Tensor, **settings: Any) -> list[Attention]:
    """What each layer's attention saw of one call."""
    seen: list[Attention] = []
    hooks = [b.attn.attention_tap.register_forward_hook(lambda _m, _i, record: seen.append(record)) for b in model.blocks]
    with torch.inference_mode():
        model(ids, **settings)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("seed", range(24))
def test_chunks_and_single_tokens_give_the_logits_of_one_pass(seed):
    config = tiny(seed)
    model, ids = random_model(config, seed), random_ids(config, 2, LENGTHS[seed % len(LENGTHS)], seed)
    compared = settled(model, ids)
    assert compared.float().mean() > 0.7
    with torch.inference_mode():
        once = model(ids)
    assert once.std() > 0.3
    for sizes in ([1] * ids.shape[1], random_pieces(ids.shape[1], seed), [ids.shape[1]]):
        assert (in_pieces(model, ids, sizes) - once)[compared].abs().max() < ROUNDING


@pytest.mark.parametrize("seed", range(len(V41_SCHEDULES)))
def test_later_tokens_never_change_earlier_logits(seed):
    config = tiny(seed)
    model, ids = random_model(config, seed), random_ids(config, 1, 47, seed)
    with torch.inference_mode():
        before = model(ids)
        for cut in (1, 8, 30, 46):
            changed = ids.clone()
            changed[:, cut:] = (ids[:, cut:] + 1) % config.vocab_size
            after = model(changed)
            assert (after - before)[:, :cut].abs().max() < 1e-5
            assert (after - before)[:, cut:].abs().max() > 1e-2


def test_a_reusing_layer_takes_its_owners_choice_and_a_reindexing_one_its_own():
    config = tiny(0, candidate_source_layer_id=-1)  # window, window, full, reuse, full, reuse, reindex, reuse
    seen = records(random_model(config), random_ids(config, 1, 61))
    choice = [record.selection and record.selection.entries for record in seen]
    assert choice[0] is None and choice[1] is None
    assert torch.equal(choice[3], choice[2]) and torch.equal(choice[5], choice[4]) and torch.equal(choice[7], choice[6])
    assert not torch.equal(choice[6], choice[4])
    assert [record.runner_up is not None for record in seen] == [False, False, True, False, True, False, True, False]
    assert int(choice[2].max()) < 30 <= int(choice[4].max())  # ratio 2 has half as many entries as ratio 1
    for record in seen:
        total = record.window_probs.sum(-1) + record.entry_probs.sum(-1) + record.sink_probs
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def test_keeping_another_number_of_entries_changes_the_choice_of_every_layer():
    config = tiny(0)
    model, ids = random_model(config), random_ids(config, 1, 61)
    one, everything = records(model, ids, topk=1), records(model, ids, topk=61)
    assert {r.selection.entries.shape[-1] for r in one if r.selection} == {1}
    assert [r.selection.entries.shape[-1] for r in everything[2:]] == [30, 30, 61, 61, 61, 61]  # also beyond the pool
    for record in everything[4:]:
        assert (record.selection.entries[0, -1].sort().values == torch.arange(61)).all()


def test_a_full_layer_attends_to_the_best_scores_of_its_own_index():
    config = tiny(0)
    model, ids = random_model(config), random_ids(config, 1, 37)
    queries: list[IndexQueries] = []
    model.blocks[2].attn.indexer.index_tap.register_forward_hook(lambda _m, _i, out: queries.append(out))
    record = records(model, ids)[2]
    q, w, k = queries[0].q[0].double(), queries[0].w[0].double(), queries[0].k.read()[0].double()
    for t in range(37):
        scores = np.array([float(w[t] @ (q[t] @ k[s]).relu()) for s in range((t + 1) // 2)])
        best = sorted(range(len(scores)), key=lambda s: (-scores[s], s))[: config.index_topk]
        assert [e for e in record.selection.entries[0, t].tolist() if e >= 0] == best


@pytest.mark.parametrize(("entries", "size", "blocks"), [(37, 4, 2), (64, 8, 3), (5, 4, 9), (1, 3, 1)])
def test_the_pool_is_the_best_blocks_and_always_the_newest(entries, size, blocks):
    generator = torch.Generator().manual_seed(entries)
    scores = torch.randn(2, entries + 1, entries, generator=generator).round(decimals=1)  # with ties
    closed = torch.arange(entries + 1)
    scores = scores.masked_fill(torch.arange(entries) >= closed.unsqueeze(-1), -torch.inf)
    pool = candidate_blocks(scores, closed, blocks, size)
    for b in range(2):
        for t in range(entries + 1):
            row = scores[b, t, :t].tolist()
            best = {n: max(row[n * size : (n + 1) * size]) for n in range(-(-t // size))}
            if t:
                best[(t - 1) // size] = np.inf
            expected = sorted(sorted(best, key=lambda n: (-best[n], n))[:blocks])
            assert [n for n in pool[b, t].tolist() if n >= 0] == expected


@pytest.mark.parametrize("topk", [1, 4, 50])
@pytest.mark.parametrize("entries", [40, 200])
def test_a_pool_is_scored_by_itself_with_the_result_of_scoring_everything(entries, topk):
    """200 entries against pools of 20: only those are read. Masking all scores is the obvious way to the same choice."""
    generator = torch.Generator().manual_seed(topk)
    t, size, blocks = 13, 4, 5
    index = IndexQueries(
        torch.randn(2, t, 16, 8, generator=generator),
        torch.randn(2, t, 16, generator=generator),
        Rows(torch.randn(2, entries, 8, generator=generator)),
    )
    closed = torch.linspace(0, entries, t).long()
    scores = score_entries(index.q, index.w, index.k, closed)
    pool = candidate_blocks(torch.randn(scores.shape, generator=generator) + 0 * scores, closed, blocks, size)
    inside = ((torch.arange(entries) // size).view(1, 1, -1, 1) == pool.unsqueeze(2)).any(-1)
    expected = keep_best(scores.masked_fill(~inside, -torch.inf), min(topk, blocks * size))
    found = select_candidates(index, pool, size, closed, topk)
    assert torch.equal(found.entries, expected.entries)
    assert torch.allclose(found.scores.nan_to_num(neginf=-1), expected.scores.nan_to_num(neginf=-1), atol=1e-5)


def held_bytes(config: SharedStreamConfig, length: int, value_bytes: int) -> dict[str, int]:
    """What a cache must hold, counted from the rules: a window a layer, a stream and open block a Full layer, look-back ids."""
    d, i = config.head_dim, config.index_head_dim
    rows = config.num_hidden_layers * min(length, config.sliding_window)
    return {
        "window": rows * d * value_bytes,
        "compressed": sum(length // ratio for ratio in config.stream_ratios) * d * value_bytes,
        "index": sum(length // ratio for ratio in config.stream_ratios) * i * value_bytes,
        "tail": sum(length % ratio for ratio in config.stream_ratios) * 2 * d * 4,
        "engram": min(length, config.engram.max_ngram_size - 1) * 8 if config.engram else 0,
    }


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(len(V41_SCHEDULES)))
def test_the_cache_holds_what_the_rules_say_and_allocates_what_it_reports(seed, storage):
    config = tiny(seed)
    model, ids = random_model(config, seed), random_ids(config, 3, 131)
    cache = model.new_cache(3, storage)
    with torch.inference_mode():
        for length in (0, 1, 2, 3, 4, 5, 7, 11, 12, 64, 65, 131):
            if length:
                model(ids[:, cache.length : length], cache, "last")
            per_sequence = held_bytes(config, length, {"fp32": 4, "bf16": 2}[storage])
            assert cache.nbytes_by_part() == {part: 3 * count for part, count in per_sequence.items()}
            assert storage_bytes(cache) == cache.nbytes + cache.nbytes_reserved


def test_a_packed_cache_is_read_as_it_is_stored_whatever_the_split():
    """The same values are rounded in every split, but one on a rounding edge may fall to either side: a coarse step, seldom."""
    config, near, rounding = tiny(0, index_topk=1000, candidate_source_layer_id=-1), 0, []
    for seed in range(6):
        model, ids = random_model(config, seed), random_ids(config, 1, 41, seed)
        with torch.inference_mode():
            whole = model(ids, model.new_cache(1, "released"))
            cache = model.new_cache(1, "released")
            pieces = torch.cat([model(p, cache) for p in ids.split(random_pieces(41, seed), dim=1)], dim=1)
            rounding.append(float((model(ids) - whole).abs().mean()))
        near += bool((whole - pieces).abs().median() < ROUNDING)
    assert near >= 4 and min(rounding) > 100 * ROUNDING


def test_remembering_fills_the_cache_as_attending_does():
    config = tiny(0)
    model, ids = random_model(config), random_ids(config, 1, 23)
    attending, remembering = model.new_cache(), model.new_cache()

    def keep(block_number: int) -> Any:
        def note(module: Any, inputs: tuple) -> None:
            module.remember(inputs[0], inputs[1], remembering.layers[block_number])

        return note

    hooks = [block.attn.register_forward_pre_hook(keep(number)) for number, block in enumerate(model.blocks)]
    with torch.inference_mode():
        for piece in ids.split([10, 1, 12], dim=1):
            model(piece, attending)
    for hook in hooks:
        hook.remove()
    for one, other in zip(attending.layers, remembering.layers, strict=True):
        assert torch.allclose(one.window.last(one.window.held), other.window.last(one.window.held), atol=1e-5)  # other products
        for part in ("compressed", "index"):
            if getattr(one, part) is not None:
                assert torch.allclose(getattr(one, part).read(), getattr(other, part).read(), atol=1e-5)


REPLAYABLE = {"sliding_window": 4, "engram_layer_ids": [0, 1], "index_topk": 3}


@pytest.mark.parametrize("before", [0, 9])
@pytest.mark.parametrize("length", [3, 4, 41])
def test_replay_leaves_stream_keys_and_pool_exact_and_logits_close(before, length):
    """Replayed decoder windows lack what lies before them; the first replayed layer reads its pool from the encoder alone."""
    config = tiny(0, **REPLAYABLE)
    model, ids = random_model(config), random_ids(config, 2, before + length + 1)
    caches, pools, logits = [], [], []
    for mode in ("exact", "replay"):
        cache, pool = model.new_cache(2), []
        owner = model.blocks[4].attn
        hook = owner.register_forward_hook(lambda _m, _i, out, pool=pool: pool.append(out[1].candidates))
        with torch.inference_mode():
            if before:
                model(ids[:, :before], cache)
            logits.append(model.prefill(ids[:, before:-1], cache, mode))
            assert logits[-1].shape == (2, 1, config.vocab_size) and cache.length == before + length
            pools.append(pool[-1][:, -min(length, 4) :])
            logits.append(model(ids[:, -1:], cache))
        hook.remove()
        caches.append(cache)
    exact, replayed = caches
    assert torch.equal(pools[0], pools[1])
    for layer in (2, 4):
        for part in ("compressed", "index"):
            # Equal up to the rounding of products over other numbers of tokens.
            one, other = (getattr(cache.layers[layer], part).read() for cache in caches)
            assert one.shape == other.shape and (one - other).abs().max() < 1e-5
    assert exact.nbytes_by_part() == replayed.nbytes_by_part() or length < 4
    difference = max(float((logits[0] - logits[2]).abs().max()), float((logits[1] - logits[3]).abs().max()))
    if length <= config.sliding_window:
        assert difference < ROUNDING  # every token was replayed: nothing is approximate
    else:
        assert 1e-4 < difference < 0.75 * float(logits[0].max() - logits[0].min())


def test_replay_leaves_the_decoder_out_for_all_but_the_last_window():
    config = tiny(0, **REPLAYABLE)
    model, ids = random_model(config), random_ids(config, 1, 41)
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.streams.shape[1]))
    with torch.inference_mode():
        model.prefill(ids, model.new_cache(), "replay")
    assert seen == [41, 41, 41, 41, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        ({"engram_layer_ids": [1, 5]}, {}, r"Engram layers \[5\] at or after the split 4"),
        (REPLAYABLE, {"split": 2}, r"KV sources \[4\] after the split 2"),
        (REPLAYABLE, {"split": 3}, r"one of the KV sources \(2, 4\), got 3"),
        (REPLAYABLE, {"mode": "fast"}, "'exact' or 'replay', got 'fast'"),
    ],
)
def test_a_replay_that_the_configuration_does_not_allow_is_refused(overrides, settings, message):
    overrides = {"engram_num_embeddings": None} | overrides
    model = random_model(tiny(0, **overrides))
    cache = model.new_cache()
    with pytest.raises(InputError, match=message):
        model.prefill(random_ids(model.config, 1, 9), cache, **({"mode": "replay"} | settings))
    assert cache.whole and cache.length == 0


def test_a_model_without_streams_cannot_replay():
    model = random_model(tiny(5))
    with pytest.raises(InputError, match="no KV source"):
        model.prefill(random_ids(model.config, 1, 9), model.new_cache(), "replay")


def test_images_take_nothing_from_engram_and_nothing_looks_back_across_them():
    settings = random_v41_config(8)
    assert settings["engram_layer_ids"]
    config = tiny(8, image_token_id=63)
    model, ids = random_model(config), random_ids(config, 1, 21)
    ids[0, 7] = 63
    gates: list[torch.Tensor] = []
    for layer in config.engram.layer_ids:
        tap = model.blocks[layer].engram.gate_tap
        tap.register_forward_hook(lambda _m, _i, out: gates.append(out.gates[0].abs().amax(-1)))
    with torch.inference_mode():
        once = model(ids)
    assert all((g == 0).tolist() == [t == 7 for t in range(21)] for g in gates)
    assert (in_pieces(model, ids, [1] * 21) - once).abs().max() < ROUNDING


def test_a_live_run_records_every_layer_and_its_trace_comes_back(tmp_path):
    config = replace(tiny(0), max_position_embeddings=4096)
    model = random_model(config)
    live = run(model, random_ids(config, 1, 33)[0].tolist(), max_new_tokens=5)
    live.wait()
    assert live.error is None
    trace = Trace.load(live.trace.save(tmp_path / "trace"))
    assert [layer.kind for layer in trace.layers] == list(config.layer_kinds)
    for layer in trace.layers[2:]:
        assert layer.selected.shape == (trace.length, layer.selected.shape[1]) and layer.length == trace.length
        if layer.indexes:
            t = trace.length - 1
            scores, kept = layer.index_scores(t), layer.selected[t]
            np.testing.assert_allclose(layer.selected_scores[t][kept >= 0], scores[kept[kept >= 0]], rtol=1e-4, atol=1e-5)
        else:
            assert (layer.runner_up == -1).all() and np.isnan(layer.runner_up_scores).all()
    assert np.array_equal(trace.layers[3].selected, trace.layers[2].selected)
