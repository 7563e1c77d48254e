"""Gate weights against the compressor recomputed, splits that add up, and texts that may be moved without anything changing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.slow_reference import CONFIG, random_model
from workbench.checkpoint import load
from workbench.compressing import attention_split, gate_weights, moved_text
from workbench.errors import InputError
from workbench.live import run

LENGTH = 45


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(5).integers(0, CONFIG.vocab_size, LENGTH).tolist()


@pytest.mark.parametrize("layer", [1, 2])
def test_weights_are_those_of_the_equation_in_section_2_1(model, ids, layer):
    gates = gate_weights(model, ids, layer)
    compressor, seen = model.blocks[layer].attn.compressor, []
    hook = compressor.register_forward_hook(lambda _, args, out: seen.append((args[0][0], out[0])))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    x, _ = seen[0]
    m, d, ape = compressor.ratio, compressor.width, compressor.ape.detach()
    scores = x @ compressor.wgate.weight.detach().T
    for j in range(LENGTH // m):
        rows = []
        if layer == 1:
            before = [scores[t, :d] + ape[t % m, :d] for t in range((j - 1) * m, j * m)]
            rows = before if j else [torch.full((d,), -torch.inf)] * m
        own = slice(d, None) if layer == 1 else slice(None)
        rows = rows + [scores[t, own] + ape[t % m, own] for t in range(j * m, (j + 1) * m)]
        expected = torch.stack(rows).softmax(0)
        assert torch.allclose(torch.from_numpy(gates.weights[j]), expected, atol=1e-5)
        tokens = list(range((j - 1) * m if layer == 1 else j * m, (j + 1) * m))
        assert gates.tokens[j].tolist() == [t if t >= 0 else -1 for t in tokens]
    assert len(gates.weights) == LENGTH // m


def test_summaries_of_weights(model, ids):
    gates = gate_weights(model, ids, 1)
    received = gates.received(LENGTH)
    assert received.sum() == pytest.approx(len(gates.weights)) and received[-1] == 0, "the last token's block is open"
    t = 18
    expected = gates.by_token[t // 4, 4 + t % 4] + gates.by_token[t // 4 + 1, t % 4]
    assert received[t] == pytest.approx(expected)
    assert gates.own_share == pytest.approx(gates.weights[1:, 4:].sum(1).mean(), abs=1e-6)
    some = gates.weights[3, :, 2]
    assert gates.effective_tokens[3, 2] == pytest.approx(np.exp(-(some * np.log(some)).sum()), rel=1e-4)
    assert gates.effective_tokens.min() >= 1 and gates.effective_tokens[0].max() <= 4 + 1e-9


def test_weights_need_a_layer_that_compresses_and_enough_tokens(model, ids):
    with pytest.raises(InputError, match=r"\[1, 2, 3\]"):
        gate_weights(model, ids, 0)
    with pytest.raises(InputError, match="takes 7 tokens"):
        gate_weights(model, ids[:6], 2)


def test_splits_add_up_and_say_where_attention_went(model, ids):
    live = run(model, ids, max_new_tokens=0)
    live.wait(60)
    splits = attention_split(live.trace, [LENGTH - 1, 2])
    assert [(s.layer, s.token) for s in splits] == [(layer, t) for t in (LENGTH - 1, 2) for layer in range(4)]
    for split in splits:
        assert np.allclose(split.shares.sum(1), 1.0, atol=5e-3)  # recorded in float16
        assert (split.shares[:, 1] > 0).all() == (split.layer > 0 and split.token == LENGTH - 1)
    with pytest.raises(InputError, match="tokens 0"):
        attention_split(live.trace, [LENGTH])


def test_a_moved_text_changes_nothing_because_outputs_are_turned_back(model, ids):
    moved = moved_text(model, ids, 3, [0, 1, 7])
    assert moved.turned_back.max() < 1e-4 < 1e-2 < moved.left_turned[1:].min() and moved.left_turned[0] == 0
    assert np.abs(moved.after - moved.after[0]).max() < 1e-4, "after turning back a value's place is a distance"
    apart = np.abs(moved.before[1:] - moved.before[0]).max((1, 2, 3))
    assert (apart > 1e-2).all()
    assert np.allclose(np.linalg.norm(moved.before, axis=-1), np.linalg.norm(moved.after, axis=-1), atol=1e-5), "only turned"
    assert moved.before.shape == (3, CONFIG.num_attention_heads, CONFIG.qk_rope_head_dim // 2, 2)


def test_the_model_is_as_before_after_a_move(model, ids):
    with torch.inference_mode():
        before = model(torch.tensor([ids]))
        moved_text(model, ids, 0, [3])
        assert torch.equal(model(torch.tensor([ids])), before)


def test_moves_that_cannot_be_are_refused(model, ids):
    for layer, by, words in ((9, [1], "layers 0..3"), (1, [], "moved by"), (1, [-1], "moved by"), (1, [10_001], "moved by")):
        with pytest.raises(InputError, match=words):
            moved_text(model, ids, layer, by)
    with pytest.raises(InputError, match="does not turn"):
        moved_text(load("tiny-mla-dsa", device="cpu"), [1, 2, 3], 0, [1])
