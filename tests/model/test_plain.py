"""Dense, MLA and MLA + DSA layers: forms agree, any split gives the same, the record equals a slow recomputation.

``transformers`` is not needed here; test_plain_against_transformers.py has the comparison with it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.test_attention import LargestTensor
from tests.slow_reference import in_pieces, random_ids, random_pieces
from workbench.config import DenseConfig, LatentConfig, RopeConfig
from workbench.errors import InputError
from workbench.model.attention import latent
from workbench.model.attention.dense import TokenPositions, attend_all
from workbench.model.kv_cache import layer_cache
from workbench.model.plain import PlainModel
from workbench.recorder import Recorder

DENSE = DenseConfig(
    vocab_size=53,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=37,
    max_position_embeddings=8192,
)
SPARSE = LatentConfig(
    vocab_size=53,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    q_lora_rank=11,
    kv_lora_rank=14,
    qk_nope_head_dim=7,
    qk_rope_head_dim=4,
    v_head_dim=5,
    intermediate_size=37,
    index_n_heads=16,
    index_head_dim=6,
    index_topk=5,
    first_k_dense_replace=1,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=13,
    n_group=3,
    topk_group=2,
    rope=RopeConfig(theta=10000.0, factor=4, original_max_position_embeddings=64),
    max_position_embeddings=8192,
)
CONFIGS = {
    "mha": replace(DENSE, num_key_value_heads=6),
    "gqa": DENSE,
    "mqa": replace(DENSE, num_key_value_heads=1),
    "mla": replace(SPARSE, index_topk=0),
    "mla-dsa": SPARSE,
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
LATENTS = [CONFIGS["mla"], SPARSE]
ROUNDING = 1e-4  # float32; anything wrong is 1e-2 and more


def random_plain(config: DenseConfig | LatentConfig, seed: int = 0) -> PlainModel:
    """A model in which every term is random, also those that start at zero and would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    model = PlainModel(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("bias"):
                tensor.copy_(0.3 * noise)
            else:
                tensor.copy_(1 + 0.1 * noise if "norm" in name else noise * tensor.shape[-1] ** -0.5)
    return model.eval()


def listen(tap: torch.nn.Module) -> list[Any]:
    seen: list[Any] = []
    tap.register_forward_hook(lambda _module, _inputs, record: seen.append(record))
    return seen


# --- what a layer computes ---


def turned(x: np.ndarray, t: int, config: LatentConfig | DenseConfig, pairs: list[tuple[int, int]]) -> np.ndarray:
    """x [..., D] with the given channel pairs rotated by position t; frequencies from ``rotary_frequencies``' own formula."""
    rope, channels, out = config.rope, 2 * len(pairs), x.copy()
    for i, (a, b) in enumerate(pairs):
        frequency = rope.theta ** -(2 * i / channels)
        if rope.factor > 1:
            edge = [
                channels * np.log(rope.original_max_position_embeddings / (2 * np.pi * turns)) / (2 * np.log(rope.theta))
                for turns in (rope.beta_fast, rope.beta_slow)
            ]
            low, high = max(np.floor(edge[0]), 0), min(np.ceil(edge[1]), channels - 1)
            share = min(1.0, max(0.0, (i - low) / max(high - low, 0.001)))
            frequency = frequency / rope.factor * share + frequency * (1 - share)
        c, s = np.cos(t * frequency), np.sin(t * frequency)
        out[..., a], out[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return out


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def slow_dense(config: DenseConfig, w: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """(attention output [T, C], probabilities [H, t + 1] of every query) of one layer, token by token in float64."""
    heads, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    pairs = [(i, i + d // 2) for i in range(d // 2)]
    keys, values, out, seen = [], [], [], []
    for t, token in enumerate(x):
        keys.append(turned((w["wk"] @ token).reshape(kv, d), t, config, pairs))
        values.append((w["wv"] @ token).reshape(kv, d))
        q = turned((w["wq"] @ token).reshape(heads, d), t, config, pairs)
        mine = [h // (heads // kv) for h in range(heads)]
        p = np.stack([softmax(np.array([k[mine[h]] @ q[h] for k in keys]) / d**0.5) for h in range(heads)])
        out.append(w["wo"] @ np.concatenate([sum(p[h, s] * values[s][mine[h]] for s in range(t + 1)) for h in range(heads)]))
        seen.append(p)
    return np.stack(out), seen


def slow_latent(
    config: LatentConfig, w: dict[str, np.ndarray], x: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """(attention output, probabilities [H, t + 1], index scores [t + 1]) of one layer, per head and token in float64."""
    heads, nope, r, v = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    woven, halves = [(nope + 2 * i, nope + 2 * i + 1) for i in range(r // 2)], [(i, i + r // 2) for i in range(r // 2)]
    stretch = 0.1 * config.mscale_all_dim * np.log(config.rope.factor) + 1
    scale = (nope + r) ** -0.5 * stretch**2
    keys, values, index_keys = [], [], []
    out, seen, scores = [], [], []
    for t, token in enumerate(x):
        latent_, shared = np.split(w["wkv_a"] @ token, [config.kv_lora_rank])
        parts = (w["wkv_b"] @ normed(latent_, w["kv_norm"])).reshape(heads, nope + v)
        key = np.concatenate([parts[:, :nope], np.tile(shared, (heads, 1))], axis=1)
        keys.append(turned(key, t, config, woven))
        values.append(parts[:, nope:])
        qr = normed(w["wq_a"] @ token, w["q_norm"])
        q = turned((w["wq_b"] @ qr).reshape(heads, nope + r), t, config, woven)
        allowed = np.arange(t + 1)
        if config.index_topk:
            raw = w["indexer.wk"] @ token
            raw = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-6) * w["indexer.k_norm"] + w["indexer.k_norm.bias"]
            index_keys.append(turned(raw, t, config, halves))
            iq = turned((w["indexer.wq_b"] @ qr).reshape(config.index_n_heads, -1), t, config, halves)
            weights = w["indexer.weights_proj"] @ token * config.index_n_heads**-0.5 * config.index_head_dim**-0.5
            score = np.array([weights @ np.maximum(iq @ k, 0) for k in index_keys])
            allowed = np.argsort(-score, kind="stable")[: config.index_topk]
            scores.append(score)
        p = np.zeros((heads, t + 1))
        for h in range(heads):
            p[h, allowed] = softmax(np.array([keys[s][h] @ q[h] for s in allowed]) * scale)
        out.append(w["wo"] @ np.concatenate([sum(p[h, s] * values[s][h] for s in range(t + 1)) for h in range(heads)]))
        seen.append(p)
    return np.stack(out), seen, scores


def weights_of(attention: torch.nn.Module) -> dict[str, np.ndarray]:
    return {n.removesuffix(".weight"): p.detach().double().numpy() for n, p in attention.named_parameters()}


@EVERY
@pytest.mark.parametrize("sizes", [[37], [1] * 37, [11, 1, 1, 24]], ids=["at once", "one by one", "in pieces"])
def test_a_layer_equals_a_slow_recomputation(config, sizes):
    model = random_plain(config, 3)
    attention, x = model.blocks[1].attn, torch.randn(1, 37, config.hidden_size, generator=torch.Generator().manual_seed(1))
    records, cache = listen(attention.attention_tap), layer_cache(config, 1, 1, "fp32", x.device)
    outputs, start = [], 0
    with torch.inference_mode():
        for piece in x.split(sizes, dim=1):
            positions = torch.arange(start, start + piece.shape[1])
            outputs.append(attention(piece, TokenPositions(start, model.rotary(positions)), cache))
            start += piece.shape[1]
    if isinstance(config, DenseConfig):
        expected, probs = slow_dense(config, weights_of(attention), x[0].double().numpy())
        scores: list[np.ndarray] = []
    else:
        expected, probs, scores = slow_latent(config, weights_of(attention), x[0].double().numpy())
    np.testing.assert_allclose(torch.cat(outputs, 1)[0].numpy(), expected, atol=ROUNDING)
    queries = [(record, i) for record in records for i in range(record.entry_probs.shape[1])]
    assert len(queries) == 37
    for t, (record, i) in enumerate(queries):
        assert record.start + i == t
        assert record.window_probs.shape[-1] == 0 and not record.sink_probs.any()
        assert record.sink_probs.shape == record.entry_probs.shape[:3]
        found = record.entry_probs[0, i].numpy()
        if not scores:
            np.testing.assert_allclose(found[:, : t + 1], probs[t], atol=ROUNDING)
            assert not found[:, t + 1 :].any() and record.selection is None
            continue
        kept = record.selection.entries[0, i].numpy()
        order = np.argsort(-scores[t], kind="stable")
        there = kept[kept >= 0]
        assert there.tolist() == order[: min(5, t + 1)].tolist() and (kept[len(there) :] == -1).all()
        np.testing.assert_allclose(record.selection.scores[0, i, : len(there)], scores[t][there], atol=ROUNDING)
        np.testing.assert_allclose(found[:, : len(there)], probs[t][:, there], atol=ROUNDING)
        assert not found[:, len(there) :].any()
        runner_up = record.runner_up.entries[0, i].tolist()
        assert [e for e in runner_up if e >= 0] == order[5:6].tolist()


@pytest.mark.parametrize("seed", range(8))
def test_absorbed_and_naive_mla_agree(seed):
    """Folding the projections into queries and outputs changes no value and no probability."""
    draw = random.Random(seed)
    config = replace(
        CONFIGS["mla"],
        num_attention_heads=draw.choice([1, 3, 4]),
        kv_lora_rank=draw.choice([3, 14, 31]),
        qk_nope_head_dim=draw.choice([2, 7, 12]),
        qk_rope_head_dim=draw.choice([2, 6]),
        v_head_dim=draw.choice([1, 5, 13]),
    )
    attention = random_plain(config, seed).blocks[0].attn
    start, t = draw.choice([0, 1, 23]), draw.choice([1, 2, 17])
    width = config.kv_lora_rank + config.qk_rope_head_dim
    q = torch.randn(2, t, config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim)
    rows = torch.randn(2, start + t + 3, width)  # rows after the last query, which must not matter
    with torch.inference_mode():
        for want_probs in (False, True):
            one, other = (form(q, rows, start, want_probs) for form in (attention.naive, attention.absorbed))
            assert (one.out - other.out).abs().max() < ROUNDING and one.out.shape == (2, t, attention.heads, config.v_head_dim)
            if want_probs:
                assert (one.probs - other.probs).abs().max() < ROUNDING and (one.probs.sum(-1) - 1).abs().max() < ROUNDING
            else:
                assert one.probs is None and other.probs is None


@pytest.mark.parametrize("config", LATENTS, ids=["mla", "mla-dsa"])
@pytest.mark.parametrize("limit", [0, 2**40])
def test_whichever_form_is_chosen_the_logits_are_the_same(monkeypatch, config, limit):
    wide = replace(config, kv_lora_rank=64)  # so that many queries prefer the naive form
    model, ids = random_plain(wide), random_ids(wide, 2, 97)
    topk = 1000 if config.index_topk else None  # all tokens, so that either form may serve
    expected = model(ids, topk=topk)
    used = {"naive": 0, "absorbed": 0}
    for name in used:
        form = getattr(latent.LatentAttention, name)
        monkeypatch.setattr(latent.LatentAttention, name, lambda *a, f=form, n=name: used.__setitem__(n, used[n] + 1) or f(*a))
    monkeypatch.setattr(latent, "NAIVE_ELEMENTS", limit)
    assert (model(ids, topk=topk) - expected).abs().max() < ROUNDING
    assert bool(used["naive"]) == bool(limit) and bool(used["absorbed"]) == (not limit)


@pytest.mark.parametrize("want_probs", [False, True])
def test_attending_to_everything_takes_keys_and_values_of_different_widths(want_probs):
    generator = torch.Generator().manual_seed(0)
    q, keys = torch.randn(2, 7, 6, 5, generator=generator), torch.randn(2, 18, 3, 5, generator=generator)
    for width in (5, 4):
        values = torch.randn(2, 18, 3, width, generator=generator)
        done = attend_all(q, keys, values, 9, 0.3, want_probs)
        for b, t, h in [(0, 0, 0), (1, 3, 4), (1, 6, 5)]:
            p = torch.softmax(keys[b, : 9 + t + 1, h // 2] @ q[b, t, h] * 0.3, 0)
            assert (done.out[b, t, h] - p @ values[b, : 9 + t + 1, h // 2]).abs().max() < ROUNDING
            if want_probs:
                assert (done.probs[b, t, h, : 9 + t + 1] - p).abs().max() < ROUNDING


# --- the whole model ---


@EVERY
@pytest.mark.parametrize("seed", range(3))
def test_one_call_equals_any_split(config, seed):
    model, ids = random_plain(config, seed), random_ids(config, 2, 61, seed)
    with torch.inference_mode():
        once = model(ids)
    for sizes in ([61], [1] * 61, random_pieces(61, seed), random_pieces(61, seed + 10)):
        assert (in_pieces(model, ids, sizes) - once).abs().max() < ROUNDING


@EVERY
def test_later_tokens_never_change_earlier_logits(config):
    model, ids = random_plain(config), random_ids(config, 1, 47)
    with torch.inference_mode():
        whole = model(ids)
        for cut in (1, 2, 17, 46):
            other = ids.clone()
            other[:, cut:] = (other[:, cut:] + 1) % config.vocab_size
            assert (model(other)[:, :cut] - whole[:, :cut]).abs().max() < ROUNDING
            assert (model(other)[:, cut:] - whole[:, cut:]).abs().max() > 0.01


@EVERY
def test_sequences_of_a_batch_do_not_see_each_other(config):
    model, ids = random_plain(config), random_ids(config, 3, 41)
    together = in_pieces(model, ids, random_pieces(41, 1))
    for row in range(3):
        assert (in_pieces(model, ids[row : row + 1], [41]) - together[row]).abs().max() < ROUNDING


@pytest.mark.parametrize("topk", [1, 3, 1000])
def test_another_topk_for_one_call_is_what_a_model_configured_so_computes(topk):
    model, other, ids = random_plain(SPARSE), random_plain(replace(SPARSE, index_topk=topk)), random_ids(SPARSE, 1, 59)
    with torch.inference_mode():
        assert (model(ids, topk=topk) - other(ids)).abs().max() < ROUNDING
        assert (model(ids, topk=topk) - model(ids)).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["mha", "gqa", "mla"])
def test_a_topk_is_refused_where_every_token_is_attended_to(kind):
    with pytest.raises(InputError, match="attends to every token"):
        random_plain(CONFIGS[kind])(torch.tensor([[1]]), topk=3)


def test_a_sparse_layer_that_may_keep_everything_is_plain_mla():
    ids, plain = random_ids(SPARSE, 2, 67), random_plain(replace(SPARSE, index_topk=0))
    sparse = random_plain(replace(SPARSE, index_topk=67))
    sparse.load_state_dict(plain.state_dict(), strict=False)  # all but the indexers
    with torch.inference_mode():
        assert (sparse(ids) - plain(ids)).abs().max() < ROUNDING


def test_the_indexer_learns_from_its_own_loss_only():
    model, ids = random_plain(SPARSE).train(), random_ids(SPARSE, 1, 29)
    records = listen(model.blocks[2].attn.attention_tap)
    model(ids).square().mean().backward()
    assert all(p.grad is None or not p.grad.any() for n, p in model.named_parameters() if ".indexer." in n)
    model.zero_grad()
    model(ids)
    scores = records[-1].selection.scores
    scores[scores > -torch.inf].sum().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {n for n, _ in model.named_parameters() if n.startswith("layers.2.attn.indexer.")}


# --- the cache ---


@EVERY
@pytest.mark.parametrize(("storage", "size"), [("fp32", 4), ("bf16", 2)])
def test_a_cache_holds_one_row_a_token_and_an_index_key_where_an_indexer_is(config, storage, size):
    model, cache = random_plain(config), random_plain(config).new_cache(2, storage)
    if isinstance(config, DenseConfig):
        row, key = 2 * config.num_key_value_heads * config.head_dim, 0
    else:
        row, key = 14 + 4, 6 if config.index_topk else 0
    ids = random_ids(config, 2, 131)
    held = []
    for first, stop in [(0, 0), (0, 1), (1, 2), (2, 7), (7, 63), (63, 64), (64, 65), (65, 66), (66, 97), (97, 127), (127, 131)]:
        with torch.inference_mode():
            if stop > first:
                model(ids[:, first:stop], cache, "last")
        held.append(cache.nbytes_by_part())
        assert held[-1]["kv"] == 3 * 2 * stop * row * size and held[-1]["index"] == 3 * 2 * stop * key * size
        assert cache.nbytes == held[-1]["kv"] + held[-1]["index"]
    stores = [s for layer in cache.layers for s in (layer.kv, layer.index) if s is not None]
    assert cache.nbytes + cache.nbytes_reserved == sum(s.read().untyped_storage().nbytes() for s in stores)


@EVERY
def test_remembering_leaves_the_cache_that_attending_leaves(config):
    model, ids = random_plain(config), torch.arange(23).unsqueeze(0)
    attention, x = model.blocks[0].attn, model.embed(ids)
    filled, told = (layer_cache(config, 0, 1, "fp32", x.device) for _ in range(2))
    with torch.inference_mode():
        for start, piece in ((0, x[:, :17]), (17, x[:, 17:])):
            at = TokenPositions(start, model.rotary(torch.arange(start, start + piece.shape[1])))
            attention(piece, at, filled)
            attention.remember(piece, at, told)
    for (part, one), (_, other) in zip(filled.parts(), told.parts(), strict=True):
        assert one.length == other.length == 23 and torch.equal(one.read(), other.read()), part


@EVERY
def test_reading_in_bfloat16_stays_close_to_float32(config):
    """Without a selection and a router no near tie can flip; what remains is rounding, 2^-8 a value."""
    if isinstance(config, LatentConfig):
        config = replace(config, first_k_dense_replace=3, index_topk=1000 if config.index_topk else 0)
    model, ids = random_plain(config), random_ids(config, 1, 61)
    with torch.inference_mode():
        exact = model(ids)
        cache = model.new_cache(1, "bf16")
        got = torch.cat([model(piece, cache) for piece in ids.split([30, 1, 1, 29], dim=1)], dim=1)
    assert 0 < (got - exact).abs().max() < 0.15 and (got - exact).abs().mean() < 0.02


# --- cost of recording, memory ---


@EVERY
def test_recording_changes_no_logit(config):
    model, ids = random_plain(config), random_ids(config, 1, 71)
    with torch.inference_mode():
        before, recorder, cache = model(ids), Recorder(model), model.new_cache()
        with recorder:
            out = torch.cat([model(piece, cache) for piece in ids.split([31, 1, 39], dim=1)], dim=1)
    assert (out - before).abs().max() < ROUNDING


@pytest.mark.parametrize("kind", ["gqa", "mla", "mla-dsa"])
def test_nothing_is_made_for_a_recorder_that_is_not_there(monkeypatch, kind):
    config = replace(CONFIGS[kind], index_topk=1000) if kind == "mla-dsa" else CONFIGS[kind]
    model, ids = random_plain(config), random_ids(config, 1, 31)

    def unwanted(*_: object) -> None:
        raise AssertionError("made for nobody")

    monkeypatch.setattr(latent, "select_entries", unwanted)
    monkeypatch.setattr(latent, "Attention", unwanted)
    for name in ("workbench.model.attention.dense.everything_seen", "workbench.model.attention.latent.everything_seen"):
        monkeypatch.setattr(name, unwanted)
    with torch.inference_mode():
        model(ids)
        with pytest.raises(AssertionError, match="made for nobody"), Recorder(model):
            model(ids)


@pytest.mark.parametrize("kind", ["gqa", "mla", "mla-dsa"])
def test_a_long_prefill_never_holds_queries_times_tokens(kind):
    length = 4096
    config = replace(CONFIGS[kind], num_hidden_layers=1)
    if kind == "mla-dsa":
        config = replace(config, index_topk=64)
    model, ids = random_plain(config), random_ids(config, 1, length)
    with torch.inference_mode(), LargestTensor() as seen:
        model(ids, model.new_cache(), "last")
    # Chunks bound logits to 2**21 elements and index products to 2**22, whatever the length.
    assert seen.numel <= 2**22 + 2**16 < length * length, seen.what
