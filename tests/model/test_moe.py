"""Mixture of experts: who is chosen, how they are weighed, and that grouping tokens by expert changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import slow_reference as slow
from tests.slow_reference import CONFIG, random_ids, random_model
from workbench.model.moe import MoE, clamped_swiglu


def layer(hashed: bool, seed: int = 0, **changes: object) -> MoE:
    config = replace(CONFIG, layer_kinds=("window",), mlp_kinds=("hash" if hashed else "score",), **changes)  # type: ignore[arg-type]
    return random_model(config, seed).blocks[0].ffn


def by_hand(moe: MoE, x: torch.Tensor, ids: torch.Tensor, limit: float) -> np.ndarray:
    """Section 7, one token and one expert at a time."""
    w = {name: v.double().numpy() if v.is_floating_point() else v.numpy() for name, v in moe.state_dict().items()}
    out = []
    for token, one in zip(ids.flatten().tolist(), x.flatten(0, -2).double().numpy(), strict=True):
        scores = np.sqrt(np.log1p(np.exp(w["gate.weight"] @ one)))
        chosen = w["gate.tid2eid"][token] if moe.gate.hashed else np.argsort(-(scores + w["gate.bias"]))[: moe.gate.k]
        y = slow.expert(one, *(w[f"shared_experts.{name}.weight"] for name in ("w1", "w3", "w2")), limit)
        for e in chosen:
            share = scores[e] / scores[chosen].sum() * moe.gate.scaling
            y = y + share * slow.expert(one, *np.split(w["experts.w13"][e], 2), w["experts.w2"][e], limit)
        out.append(y)
    return np.stack(out).reshape(x.shape)


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("limit", [0.3, 10.0])
def test_equals_one_token_and_one_expert_at_a_time(hashed, limit):
    moe = layer(hashed, swiglu_limit=limit, n_shared_experts=2)
    x, ids = torch.randn(3, 17, CONFIG.hidden_size), random_ids(CONFIG, 3, 17)
    with torch.no_grad():
        np.testing.assert_allclose(moe(x, ids), by_hand(moe, x, ids, limit), atol=1e-5)


def test_weights_come_from_scores_without_the_bias_and_sum_to_the_scaling():
    moe = layer(hashed=False)
    x, ids = torch.randn(29, CONFIG.hidden_size), torch.zeros(29, dtype=torch.int64)
    with torch.no_grad():
        moe.gate.bias.zero_()
        moe.gate.bias[4] = 100.0  # everybody must choose expert 4 now
        weights, chosen = moe.gate(x, ids)
        scores = torch.nn.functional.softplus(x @ moe.gate.weight.T).sqrt()
    assert (chosen == 4).any(1).all()
    torch.testing.assert_close(weights.sum(1), torch.full((29,), CONFIG.routed_scaling_factor))
    kept = scores.gather(1, chosen)
    torch.testing.assert_close(weights, kept / kept.sum(1, keepdim=True) * CONFIG.routed_scaling_factor)


def test_hash_layers_choose_by_token_id_alone():
    moe = layer(hashed=True)
    ids = random_ids(CONFIG, 1, 31)[0]
    with torch.no_grad():
        first, second = (moe.gate(torch.randn(31, CONFIG.hidden_size), ids) for _ in range(2))
    assert torch.equal(first[1], second[1]) and torch.equal(first[1], moe.gate.tid2eid[ids])
    assert not torch.allclose(first[0], second[0])  # the weights still come from the hidden state
    assert all(len(set(row)) == CONFIG.num_experts_per_tok for row in moe.gate.tid2eid.tolist())


def test_the_gate_is_bounded_from_above_only():
    gate, up = torch.tensor([50.0, -50.0, 1.0]), torch.tensor([1.0, 1.0, -50.0])
    expected = [10 / (1 + np.exp(-10)), -50 / (1 + np.exp(50)), -10 / (1 + np.exp(-1))]
    np.testing.assert_allclose(clamped_swiglu(gate, up, 10.0), expected, rtol=1e-6)


def test_a_tokens_output_does_not_depend_on_its_neighbours():
    moe = layer(hashed=False)
    x, ids = torch.randn(1, 23, CONFIG.hidden_size), random_ids(CONFIG, 1, 23)
    with torch.no_grad():
        together = moe(x, ids)
        for t in range(23):
            torch.testing.assert_close(moe(x[:, t : t + 1], ids[:, t : t + 1]), together[:, t : t + 1], atol=1e-5, rtol=1e-5)


def test_one_expert_for_all_tokens_leaves_the_others_without_gradient():
    moe = layer(hashed=True, num_experts_per_tok=1)
    with torch.no_grad():
        moe.gate.tid2eid.fill_(3)
    moe(torch.randn(1, 5, CONFIG.hidden_size), random_ids(CONFIG, 1, 5)).sum().backward()
    touched = moe.experts.w13.grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [False, False, False, True, False]
