"""Mixing matrices: what is recorded is what the live model used, gains are plain products', comparisons as named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from tests import slow_reference as slow
from workbench.errors import InputError
from workbench.mixing import (
    EXP,
    MHC,
    SIGNS,
    SOFTMAX,
    balance,
    compared,
    gains,
    loss_by_iterations,
    record_mixing,
    sinkhorn_iterations,
    stacked,
    sum_errors,
)
from workbench.model.hyper_connections import sinkhorn

IDS = [5, 9, 200, 31, 7, 7, 44, 1203, 9, 88, 5, 9, 200]


@pytest.fixture(scope="module")
def model():
    return wb.load("tiny-v4", device="cpu")


@pytest.fixture(scope="module")
def mixing(model):
    return record_mixing(model, IDS)


def test_recorded_matrices_are_the_live_ones_and_follow_from_the_logits(model, mixing):
    seen = []
    hook = model.blocks[2].hc_ffn.mix_tap.register_forward_hook(lambda _m, _i, mix: seen.append(mix[0].double().numpy()))
    with torch.inference_mode():
        model(torch.tensor([IDS]))
    hook.remove()
    assert mixing.names[5] == "layer 2 MoE" and mixing.mix.shape == (8, len(IDS), 4, 4) == mixing.logits.shape
    np.testing.assert_allclose(mixing.mix[5], seen[0], atol=1e-6)
    np.testing.assert_allclose(mixing.balanced(mixing.iterations), mixing.mix, atol=1e-5)
    assert mixing.iterations == 20 and "tiny-v4 (toy, trained), measured on CPU" in mixing.label
    assert not any(
        hook for block in model.blocks for hook in (block.hc_attn._forward_pre_hooks, block.hc_ffn.mix_tap._forward_hooks)
    )


def test_text_is_a_prompt_too_and_its_tokens_are_named(model):
    found = record_mixing(model, "Return a list")
    assert "".join(found.token_texts) == "Return a list" and found.mix.shape[1] == len(found.token_texts)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_balancing_equals_the_models_sinkhorn_and_the_plain_loop(iterations):
    logits = 3 * np.random.default_rng(0).standard_normal((7, 4, 4))
    found = balance(logits, iterations)
    np.testing.assert_allclose(found, sinkhorn(torch.from_numpy(logits), iterations, 1e-6).numpy(), rtol=1e-12)
    np.testing.assert_allclose(found[3], slow.sinkhorn(logits[3], iterations, 1e-6), rtol=1e-12)


def test_without_iterations_it_is_the_row_softmax():
    a = balance(np.array([[0.0, np.log(3.0)], [0.0, 0.0]]), 0, eps=0.0)
    np.testing.assert_allclose(a, [[0.25, 0.75], [0.5, 0.5]])


def test_columns_are_exact_from_one_iteration_on_and_rows_come_closer(mixing):
    rows, columns = zip(*(sum_errors(mixing.balanced(n)) for n in (0, 1, 5, 20)), strict=True)
    assert rows[0].max() < 1e-5 and columns[0].max() > 0.1
    assert all(error.max() < 1e-5 for error in columns[1:])
    worst = [error.max() for error in rows[1:]]
    assert worst[0] > worst[1] > worst[2] > 1e-4, "twenty iterations leave something"


def test_gains_are_those_of_the_plain_product(mixing):
    product = np.eye(4)
    for p, a in enumerate(mixing.mix[:, 3]):
        product = a.T @ product
        assert gains(mixing.mix, "energy")[p, 3] == pytest.approx(np.linalg.svd(product)[1][0])
        assert gains(mixing.mix, "forward")[p, 3] == pytest.approx(np.abs(product).sum(1).max())
        assert gains(mixing.mix, "backward")[p, 3] == pytest.approx(np.abs(product).sum(0).max())


def test_a_single_transfer_shows_which_way_is_forward():
    """Two streams, of which the first gives to both: column 1 holds what stream 1 takes, row 0 what stream 0 gives."""
    a = np.array([[[[1.0, 1.0], [0.0, 0.0]]]])
    assert gains(a, "forward")[0, 0] == 1 and gains(a, "backward")[0, 0] == 2
    assert gains(a, "energy")[0, 0] == pytest.approx(2**0.5)


def test_comparisons_are_what_their_names_say(mixing):
    found = compared(mixing, seed=3)
    identity = np.eye(4)
    np.testing.assert_array_equal(found[MHC], mixing.mix)
    np.testing.assert_allclose(found[EXP], np.exp(mixing.logits))
    np.testing.assert_allclose(found[SOFTMAX].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(np.abs(found[SIGNS] - identity), np.abs(mixing.mix - identity))
    signs = np.sign((found[SIGNS] - identity) * (mixing.mix - identity))
    assert 0.4 < (signs > 0).mean() < 0.6
    assert not np.array_equal(found[SIGNS], compared(mixing, seed=4)[SIGNS])


def test_constrained_streams_stay_and_the_others_grow(mixing):
    deep = {
        name: gains(stacked(matrices, 122), "energy")[-1].max() for name, matrices in compared(mixing).items() if name != EXP
    }
    assert deep[MHC] < 1.1 and deep[SIGNS] > 100 > deep[SOFTMAX] > deep[MHC]


def test_a_stack_is_drawn_from_the_recorded_matrices(mixing):
    drawn = stacked(mixing.mix, 11, paths=5, seed=1)
    known = {a.tobytes() for a in mixing.mix.reshape(-1, 4, 4)}
    assert drawn.shape == (11, 5, 4, 4) and all(a.tobytes() in known for a in drawn.reshape(-1, 4, 4))


def test_fewer_iterations_are_run_inside_the_block_and_change_the_loss(model):
    with sinkhorn_iterations(model, 1):
        assert {hc.iterations for block in model.blocks for hc in (block.hc_attn, block.hc_ffn)} == {1}
        changed = record_mixing(model, IDS)
    np.testing.assert_allclose(changed.mix, changed.balanced(1), atol=1e-5)
    assert model.blocks[0].hc_attn.iterations == 20
    found = loss_by_iterations(model, (1, 20))
    assert found[1] > found[20] and model.blocks[3].hc_ffn.iterations == 20


def test_what_cannot_be_is_one_clear_error(model, mixing):
    with pytest.raises(InputError, match="one residual stream; choose tiny-v4"):
        record_mixing(wb.load("tiny-gqa", device="cpu"), IDS)
    with pytest.raises(InputError, match="empty"):
        record_mixing(model, [])
    with pytest.raises(InputError, match="measure must be"):
        gains(mixing.mix, "size")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 or more"):
        balance(mixing.logits, -1)
    with pytest.raises(InputError, match="1 or more"), sinkhorn_iterations(model, 0):
        pass
    with pytest.raises(InputError, match="depth"):
        stacked(mixing.mix, 0)


def test_logits_that_do_not_give_the_live_matrices_are_refused(model, monkeypatch):
    monkeypatch.setattr("workbench.mixing.balance", lambda logits, n, eps: balance(logits + 0.1 * np.eye(4), n, eps))
    with pytest.raises(InputError, match="differ from the live ones"):
        record_mixing(model, IDS)


def test_a_model_with_another_number_of_streams_is_recorded_too(mixing):
    assert replace(mixing, mix=mixing.mix[..., :2, :2]).streams == 2
