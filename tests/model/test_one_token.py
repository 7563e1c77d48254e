"""The decoded token in few operations is the general form's: same logits, same cache, same bytes read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import workbench as wb
from tests.slow_reference import CONFIG, ENGRAM, random_ids, random_model
from workbench.model import one_token

CONFIG4 = replace(CONFIG, hc_mult=4)  # as many streams as are released, and as the short cut is written for
CONFIGS = {
    "every kind of layer": CONFIG4,
    "with Engram": replace(CONFIG4, engram=ENGRAM),
    "one group, one expert, unclamped": replace(CONFIG4, o_groups=1, num_experts_per_tok=1, swiglu_limit=float("inf")),
    "everything kept": replace(CONFIG4, index_topk=500),
}


@pytest.fixture
def taken(monkeypatch):
    """How often the short cut was taken."""
    calls, run = [], one_token.run_layers
    monkeypatch.setattr(one_token, "run_layers", lambda *a: calls.append(1) or run(*a))
    return calls


def both_ways(model, ids, prefix, monkeypatch, *, storage="fp32", topk=None):
    """(logits, cache) after ``ids`` token by token behind a prefilled prefix, with the short cut and without it."""
    ways = []
    for short in (True, False):
        with monkeypatch.context() as m, torch.inference_mode():
            if not short:
                m.setattr(one_token, "applies", lambda *a: False)
                m.setattr(one_token, "plain", lambda x: False)
            cache = model.new_cache(storage=storage)
            if prefix:
                model(ids[:, :prefix], cache, topk=topk)
            logits = [model(ids[:, t : t + 1], cache, topk=topk) for t in range(prefix, ids.shape[1])]
            ways.append((torch.cat(logits, dim=1), cache))
    return ways


@pytest.mark.parametrize("prefix", [0, 17])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_decoding_with_the_short_cut_equals_decoding_without(config, prefix, monkeypatch, taken):
    model, ids = random_model(config), random_ids(config, 1, 60)
    (short, cache), (general, other) = both_ways(model, ids, prefix, monkeypatch)
    assert len(taken) == 60 - prefix
    torch.testing.assert_close(short, general, atol=1e-5, rtol=1e-5)  # rounding of another order of sums
    assert cache.nbytes_by_part() == other.nbytes_by_part() and cache.bytes_read_by_part() == other.bytes_read_by_part()


@pytest.mark.parametrize("name", ["tiny-v4", "tiny-v4-engram"])
def test_trained_models_decode_alike_over_several_hca_blocks(name, monkeypatch, taken):
    model = wb.load(name, device="cpu")
    ids = random_ids(model.config, 1, 420)
    (short, _), (general, _) = both_ways(model, ids, 100, monkeypatch, topk=5)
    assert len(taken) == 320
    torch.testing.assert_close(short, general, atol=1e-4, rtol=1e-5)


def test_bf16_rows_are_read_alike(monkeypatch, taken):
    model, ids = random_model(CONFIG4), random_ids(CONFIG4, 1, 40)
    (short, cache), (general, other) = both_ways(model, ids, 9, monkeypatch, storage="bf16")
    assert taken and cache.nbytes_by_part() == other.nbytes_by_part()
    torch.testing.assert_close(short, general, atol=0.05, rtol=0.0)  # a rounding step of a stored BF16 row
    assert float((short - general).abs().median()) < 1e-5


def test_equal_scores_choose_the_lower_entry_here_too(monkeypatch, taken):
    model, ids = random_model(CONFIG4), random_ids(CONFIG4, 1, 60)
    with torch.no_grad():
        for block in model.blocks:
            if block.attn.kind == "csa":
                block.attn.indexer.weights_proj.weight.zero_()  # every score is 0
    (short, _), (general, _) = both_ways(model, ids, 3, monkeypatch)
    assert taken
    torch.testing.assert_close(short, general, atol=1e-5, rtol=1e-5)


def test_extreme_mixing_weights_overflow_nothing(monkeypatch, taken):
    model, ids = random_model(CONFIG4), random_ids(CONFIG4, 1, 12)
    with torch.no_grad():
        for block in model.blocks:
            block.hc_attn.base.mul_(4000.0)
        model.hc_head.base.fill_(-1000.0)
    (short, _), (general, _) = both_ways(model, ids, 3, monkeypatch)
    assert taken and bool(torch.isfinite(short).all())
    torch.testing.assert_close(short, general, atol=1e-4, rtol=1e-4)


def test_who_listens_gets_the_general_form(taken):
    model, cache = random_model(CONFIG4), random_model(CONFIG4).new_cache()
    ids, seen = random_ids(CONFIG4, 1, 3), []
    with torch.inference_mode():
        model(ids[:, :1], cache)
        hook = model.blocks[1].attn.attention_tap.register_forward_hook(lambda *a: seen.append(a))
        model(ids[:, 1:2], cache)
        hook.remove()
        model(ids[:, 2:], cache)
    assert len(taken) == 2 and len(seen) == 1


def test_batches_gradients_and_other_stream_counts_take_the_general_form(taken):
    model = random_model(CONFIG4)
    with torch.inference_mode():
        model(random_ids(CONFIG4, 2, 1), model.new_cache(2))
        random_model(CONFIG)(random_ids(CONFIG, 1, 1), random_model(CONFIG).new_cache())
        model(random_ids(CONFIG4, 1, 1))
    model(random_ids(CONFIG4, 1, 1), model.new_cache())
    assert not taken


def test_changed_and_replaced_parameters_count_at_once(monkeypatch, taken):
    model, ids = random_model(CONFIG4), random_ids(CONFIG4, 1, 20)
    both_ways(model, ids, 3, monkeypatch)
    for assign in (False, True):
        state = {name: value.clone() for name, value in random_model(CONFIG4, seed=6 + assign).state_dict().items()}
        model.load_state_dict(state, assign=assign)
        (short, _), (general, _) = both_ways(model, ids, 3, monkeypatch)
        torch.testing.assert_close(short, general, atol=1e-5, rtol=1e-5)
    assert taken
