"""mHC: Sinkhorn's columns are exact and its rows nearly, and streams are read and written as the reference says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import slow_reference as slow
from tests.slow_reference import CONFIG
from workbench.model.hyper_connections import HyperConnection, HyperHead, sinkhorn


def random_connection(seed: int) -> HyperConnection:
    torch.manual_seed(seed)
    connection = HyperConnection(CONFIG)
    with torch.no_grad():
        for p in connection.parameters():
            p.copy_(torch.randn(p.shape) * (0.1 if p.dim() > 1 else 1.0))
    return connection


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("m", [1, 2, 4, 5])
def test_sinkhorn_equals_the_plain_loop_on_each_matrix(m, iterations):
    logits = 3 * torch.randn(11, m, m, generator=torch.Generator().manual_seed(m))
    mixed = sinkhorn(logits.double(), iterations, 1e-6)
    for one, raw in zip(mixed, logits.double(), strict=True):
        np.testing.assert_allclose(one, slow.sinkhorn(raw.numpy(), iterations, 1e-6), rtol=1e-12)


@pytest.mark.parametrize(("std", "rows_within"), [(0.5, 1e-5), (2.0, 0.1), (5.0, 0.25)])
def test_columns_sum_to_one_and_rows_nearly_do(std, rows_within):
    """Twenty iterations end on a column step, so a wide spread of logits leaves the rows visibly short of one."""
    mix = sinkhorn(std * torch.randn(2003, 4, 4, generator=torch.Generator().manual_seed(0)), 20, 1e-6)
    assert (mix > 0).all()
    assert (mix.sum(1) - 1).abs().max() < 3e-6  # the eps in the divisor, and float32 rounding
    row_error = (mix.sum(2) - 1).abs().max()
    assert row_error < rows_within and (std < 1 or row_error > 1e-4)


def test_more_iterations_bring_the_rows_closer_to_one():
    logits = 2 * torch.randn(503, 4, 4, generator=torch.Generator().manual_seed(1))
    errors = [float((sinkhorn(logits, n, 1e-6).sum(2) - 1).abs().mean()) for n in (1, 3, 20)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_products_over_depth_stay_bounded():
    """The point of mHC: 122 doubly stochastic maps amplify by about 1, not by hundreds."""
    mix = sinkhorn(torch.randn(122, 7, 4, 4, generator=torch.Generator().manual_seed(2)).flatten(0, 1), 20, 1e-6)
    gain = torch.eye(4).expand(7, 4, 4)
    for layer in mix.view(122, 7, 4, 4):
        gain = layer.mT @ gain
    assert gain.abs().sum(-1).max() < 1.1 and gain.abs().sum(-2).max() < 1.1


def test_reading_and_writing_equal_the_equations():
    connection, m = random_connection(3), CONFIG.hc_mult
    streams, y = torch.randn(2, 5, m, CONFIG.hidden_size), torch.randn(2, 5, CONFIG.hidden_size)
    with torch.no_grad():
        x, post, mix = connection(streams)
        out = connection.write(streams, y, post, mix)
    w = {name: p.detach().double().numpy() for name, p in connection.named_parameters()}
    for b in range(2):
        for t in range(5):
            one = streams[b, t].double().numpy()
            z = slow.rms(one.ravel(), CONFIG.rms_norm_eps) @ w["fn"].T
            z = z * np.repeat(w["scale"], [m, m, m * m]) + w["base"]
            a = slow.sinkhorn(z[2 * m :].reshape(m, m), CONFIG.hc_sinkhorn_iters, CONFIG.hc_eps)
            np.testing.assert_allclose(mix[b, t], a, atol=1e-5)
            np.testing.assert_allclose(x[b, t], (slow.sigmoid(z[:m]) + CONFIG.hc_eps) @ one, atol=1e-5)
            written = [2 * slow.sigmoid(z[m + k]) * y[b, t].numpy() + sum(a[j, k] * one[j] for j in range(m)) for k in range(m)]
            np.testing.assert_allclose(out[b, t], np.stack(written), atol=1e-5)


def test_the_mix_is_transposed_when_it_is_applied():
    connection = HyperConnection(replace(CONFIG, hc_mult=2))
    mix = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])  # only A[0, 1]: stream 1 takes stream 0
    streams = torch.tensor([[[[3.0], [5.0]]]])
    written = connection.write(streams, torch.zeros(1, 1, 1), torch.zeros(1, 1, 2), mix)
    assert written.flatten().tolist() == [0.0, 3.0]


def test_with_zero_terms_it_is_a_plain_residual_network():
    """phi 0 and base 0: each stream of equal copies becomes x + y, and the sublayer reads 2 x, whose factor a norm removes."""
    connection = HyperConnection(replace(CONFIG, hc_mult=4))
    with torch.no_grad():
        for p in connection.parameters():
            p.zero_()
        x = torch.randn(1, 3, 1, CONFIG.hidden_size).expand(-1, -1, 4, -1)
        read, post, mix = connection(x)
        y = torch.randn(1, 3, CONFIG.hidden_size)
        out = connection.write(x, y, post, mix)
    assert torch.allclose(mix, torch.full_like(mix, 0.25), atol=1e-6)
    assert torch.allclose(read, 2 * x[:, :, 0], atol=1e-4)
    assert torch.allclose(out, x + y.unsqueeze(2), atol=1e-4)


def test_the_head_merges_streams_by_a_sigmoid_and_no_sinkhorn():
    torch.manual_seed(5)
    head, streams = HyperHead(CONFIG), torch.randn(2, 3, CONFIG.hc_mult, CONFIG.hidden_size)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_()
        merged = head(streams)
    fn, base, scale = (p.detach().double().numpy() for p in (head.fn, head.base, head.scale))
    for b in range(2):
        for t in range(3):
            one = streams[b, t].double().numpy()
            pre = slow.sigmoid(scale * (slow.rms(one.ravel(), CONFIG.rms_norm_eps) @ fn.T) + base) + CONFIG.hc_eps
            np.testing.assert_allclose(merged[b, t], pre @ one, atol=1e-4)
