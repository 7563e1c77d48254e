"""What a decoded token does in fewer operations gives what the general form gives."""

import pytest
import torch
import torch.nn.functional as F

from tests.slow_reference import CONFIG, random_ids, random_model
from workbench.model import hyper_connections, indexer, moe
from workbench.model.attention.core import attend, attend_one
from workbench.model.formats import PlainFormat
from workbench.model.hyper_connections import sinkhorn
from workbench.model.indexer import score_chunk, select_entries, topk_lower_first
from workbench.model.kv_cache import Rows, WindowRing
from workbench.model.layers import rms_norm, rotate


@pytest.mark.parametrize("std", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn_in_plain_numbers_equals_sinkhorn_in_tensors(std, iterations, monkeypatch):
    logits = std * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    few = sinkhorn(logits, iterations, 1e-6)
    monkeypatch.setattr(hyper_connections, "FEW_MATRICES", 0)
    torch.testing.assert_close(few, sinkhorn(logits, iterations, 1e-6), rtol=1e-12, atol=1e-15)


def test_sinkhorn_of_few_matrices_still_has_a_gradient():
    logits = torch.randn(2, 4, 4, requires_grad=True)
    sinkhorn(logits, 20, 1e-6)[:, 0, 0].sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("entries", [0, 1, 7])
def test_one_query_that_sees_everything_equals_attend(gathered, entries):
    g = torch.Generator().manual_seed(entries)
    q, keys = torch.randn(2, 1, 3, 5, generator=g), torch.randn(2, 11, 5, generator=g)
    rows, sinks = torch.randn(2, entries, 5, generator=g), torch.randn(3, generator=g)
    visible = torch.ones(*((2, 1, entries) if gathered else (1, entries)), dtype=torch.bool)
    rows = rows.unsqueeze(1) if gathered else rows
    expected = attend(q, keys, 11, 40, rows, visible, sinks)
    for mine, other in zip(attend_one(q, keys, rows, sinks), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)  # rounding of another order of sums


@pytest.mark.parametrize("hashed", [True, False])
def test_experts_one_by_one_equal_experts_grouped(hashed, monkeypatch):
    layer = random_model().blocks[0 if hashed else -1].ffn
    x, ids = torch.randn(1, 2, CONFIG.hidden_size), random_ids(CONFIG, 1, 2)
    with torch.no_grad():
        few = layer(x, ids)
        monkeypatch.setattr(moe, "FEW_ASSIGNMENTS", 0)
        torch.testing.assert_close(few, layer(x, ids), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("room", [1, 97, 2**18])
def test_scores_by_tiles_equal_scores_at_once_and_the_future_is_not_scored(room, monkeypatch):
    monkeypatch.setattr(indexer, "CACHED_ELEMENTS", room)
    monkeypatch.setattr(indexer, "CACHED_QUERIES", 3)
    g = torch.Generator().manual_seed(room)
    q, w, k = torch.randn(2, 11, 5, 4, generator=g), torch.randn(2, 11, 5, generator=g), torch.randn(2, 17, 4, generator=g)
    closed = torch.arange(2, 13)
    found = select_entries(q, w, Rows(k), closed, 15)
    assert found.entries.shape == (2, 11, 15) and (found.entries[..., 12:] == -1).all()
    full = score_chunk(q, w, k)
    there = found.entries >= 0
    assert (there.sum(-1) == closed.clamp(max=15)).all()
    torch.testing.assert_close(found.scores[there], full.gather(-1, found.entries.clamp(min=0))[there], atol=1e-5, rtol=1e-5)
    everything = select_entries(q, w, Rows(k), None, 4)
    assert torch.equal(everything.entries, topk_lower_first(full, 4)[1])


def test_the_ring_reads_the_last_keys_in_any_order_or_in_token_order():
    ring, keys = WindowRing(1, 5, PlainFormat(2, torch.float32), torch.device("cpu")), torch.arange(26.0).view(1, 13, 2)
    for t in range(13):
        ring.append(keys[:, t : t + 1])
        newest = keys[:, max(0, t - 4) : t + 1]
        assert torch.equal(ring.read(in_order=True), newest)
        assert torch.equal(ring.read(in_order=False).sort(dim=1).values, newest)


@pytest.mark.parametrize("width", [1, 7, 256])
def test_the_norm_of_few_passes_equals_torchs(width):
    x = torch.randn(3, 5, width)
    torch.testing.assert_close(rms_norm(x, 1e-6), F.rms_norm(x, (width,), eps=1e-6), atol=1e-6, rtol=1e-5)
    assert torch.equal(rms_norm(torch.zeros(2, width), 1e-6), torch.zeros(2, width))


@pytest.mark.parametrize("width", [6, 7])  # an odd one takes the other way
def test_rotating_leaves_its_input_alone_and_passes_gradients(width):
    x, angles = torch.randn(2, 3, width), torch.randn(3, 2)
    turns = torch.polar(torch.ones_like(angles), angles)
    before = x.clone()
    turned = rotate(x, turns)
    assert torch.equal(x, before) and torch.equal(turned[..., :-4], x[..., :-4])
    tracked = x.clone().requires_grad_()
    torch.testing.assert_close(rotate(tracked, turns), turned)
    assert torch.autograd.grad(rotate(tracked, turns).square().sum(), tracked)[0].allclose(2 * x, atol=1e-5)
