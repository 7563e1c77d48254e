"""The lightning indexer: scores, the k best, and ties, which the lower entry number wins everywhere."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.slow_reference import CONFIG, SlowV4, in_pieces, random_ids, random_model, random_pieces
from workbench.errors import InputError
from workbench.model import indexer
from workbench.model.indexer import score_chunk, select_entries, topk_lower_first
from workbench.model.kv_cache import Rows
from workbench.training.score import selected_entries

ORDERED = [-torch.inf, -3.4e38, -2.0, -1e-38, -1e-45, 0.0, 1e-45, 1e-38, 2.0, 3.4e38, torch.inf]


def by_hand(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda s: (-row[s], s))[:k]  # -0.0 == 0.0 here


@pytest.mark.parametrize("seed", range(40))
def test_topk_is_a_sort_in_which_the_lower_number_wins(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 80))
    pool = [*ORDERED, -0.0] if seed % 2 else [0.0, -0.0, 1.0]  # few values: ties nearly everywhere
    scores = torch.tensor(rng.choice(pool, (2, 3, length)), dtype=torch.float32)
    for k in {1, min(length, 7), length}:
        best, entries = topk_lower_first(scores, k)
        for b, t in itertools.product(range(2), range(3)):
            assert entries[b, t].tolist() == by_hand(scores[b, t].tolist(), k)
        assert torch.equal(best, scores.gather(-1, entries))


@pytest.mark.parametrize("levels", [7, 401, 2**20])
@pytest.mark.parametrize("length", [160, 163, 1024, 1031])
def test_long_rows_are_chosen_from_exactly_whether_or_not_scores_are_equal(levels, length):
    """Long rows are looked at in groups first; entries left over, hidden ones and equal scores must not mislead that."""
    draw = torch.Generator().manual_seed(length + levels)
    scores = torch.randint(levels, (2, 11, length), generator=draw).float()
    scores[:, 3:6, length // 3 :] = -torch.inf
    scores[:, 6, 5:] = -torch.inf  # fewer than k are there
    scores[:, 7, -1] = scores[:, 8, -length % 8] = levels + 1.0
    for k in (1, 4, 20):
        expected = scores.sort(dim=-1, descending=True, stable=True)
        best, entries = topk_lower_first(scores, k)
        assert torch.equal(best, expected.values[..., :k]) and torch.equal(entries, expected.indices[..., :k])
        best, entries = topk_lower_first(scores, k, least=-torch.inf)
        real = best > -torch.inf
        assert torch.equal(best, expected.values[..., :k]) and torch.equal(entries[real], expected.indices[..., :k][real])


def test_a_tie_is_broken_alike_however_many_entries_follow():
    """What plain topk does not promise: a longer row may not reorder the ties of its start."""
    zeros = torch.zeros(1, 1, 3001)
    for length in (5, 16, 17, 64, 257, 1024, 3001):
        assert topk_lower_first(zeros[..., :length], 5)[1].flatten().tolist() == [0, 1, 2, 3, 4]


def test_topk_passes_gradients_to_the_kept_scores_only():
    scores = torch.tensor([[1.0, 3.0, 2.0]], requires_grad=True)
    topk_lower_first(scores, 2)[0].sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [[0.0, 1.0, 1.0]]


@pytest.mark.parametrize("seed", range(6))
def test_scores_and_selection_equal_the_equation(seed, monkeypatch):
    monkeypatch.setattr(indexer, "SCORE_ELEMENTS", 61)  # several chunks of entries
    g = torch.Generator().manual_seed(seed)
    b, t, s, h, d, k = 2, 5, 23, 3, 7, 6
    q, w, keys = (torch.randn(*shape, generator=g) for shape in ((b, t, h, d), (b, t, h), (b, s, d)))
    closed = torch.randint(0, s + 1, (t,), generator=g)
    closed[0] = 0
    full = torch.einsum("bth,bths->bts", w.double(), torch.einsum("bthd,bsd->bths", q.double(), keys.double()).relu())
    assert torch.allclose(score_chunk(q, w, keys).double(), full, atol=1e-4)
    best, entries = select_entries(q, w, Rows(keys), closed, k)
    assert best.shape == entries.shape == (b, t, k) and best.dtype == torch.float32
    for row, i in itertools.product(range(b), range(t)):
        expected = by_hand(full[row, i, : closed[i]].tolist(), k)
        assert entries[row, i].tolist() == expected + [-1] * (k - len(expected))
        assert torch.isneginf(best[row, i, len(expected) :]).all()
        assert torch.allclose(best[row, i, : len(expected)].double(), full[row, i, expected], atol=1e-4)


def test_scores_that_are_all_exactly_zero_select_the_first_entries():
    q, keys = -torch.ones(1, 4, 2, 3), torch.ones(1, 9, 3)  # every product is negative: relu makes 0
    for w in (torch.ones(1, 4, 2), -torch.ones(1, 4, 2)):  # negative weights make -0.0
        _, entries = select_entries(q, w, Rows(keys), torch.tensor([0, 2, 5, 9]), 3)
        assert entries[0].tolist() == [[-1, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 2]]


def test_zero_beats_negative_scores_and_loses_to_positive_ones():
    keys = Rows(torch.tensor([[[-1.0], [1.0], [-1.0], [2.0], [-3.0]]]))
    entries = [
        select_entries(torch.ones(1, 1, 1, 1), torch.tensor([[[w]]]), keys, torch.tensor([5]), 4).entries.flatten().tolist()
        for w in (1.0, -1.0)
    ]
    assert entries == [[3, 1, 0, 2], [0, 2, 4, 1]]


@pytest.mark.parametrize("topk", [0, -1])
def test_a_topk_below_one_is_refused(topk):
    with pytest.raises(InputError, match=f"topk must be positive, got {topk}"):
        select_entries(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), Rows(torch.ones(1, 2, 1)), torch.tensor([2]), topk)


def test_a_topk_beyond_the_entries_keeps_them_all():
    q, w, keys = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), torch.tensor([[[1.0], [3.0], [2.0]]])
    assert select_entries(q, w, Rows(keys), torch.tensor([3]), 99).entries.flatten().tolist() == [1, 2, 0]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_with_few_index_heads_and_many_ties_every_split_selects_the_same(heads, seed):
    """With one or two heads most scores are exactly 0, so the rule for ties decides what is attended to."""
    config = replace(CONFIG, index_n_heads=heads, layer_kinds=("csa", "csa"), mlp_kinds=("hash", "score"))
    model, ids = random_model(config, seed), random_ids(config, 1, 97, seed)
    slow = SlowV4(model)
    expected = slow.read(ids[0])
    tied = sum(
        len(query.selected) == 3 and (query.scores == query.scores[query.selected[-1]]).sum() > 1
        for layer in slow.seen
        for query in layer
    )
    assert tied > 20  # ties that decide, not ties among the rest
    for sizes in ([97], [1] * 97, random_pieces(97, seed)):
        assert np.abs(in_pieces(model, ids, sizes)[0].numpy() - expected).max() < 1e-4
    for layer, kept in selected_entries(model, ids).items():
        assert [[e for e in row if e >= 0] for row in kept[0].tolist()] == [query.selected for query in slow.seen[layer]]


def test_an_indexer_that_knows_nothing_keeps_the_oldest_entries():
    model, ids = random_model(), random_ids(CONFIG, 1, 61)
    with torch.no_grad():
        for block in model.blocks:
            if block.attn.kind == "csa":
                block.attn.indexer.weights_proj.weight.zero_()
    for kept in selected_entries(model, ids).values():
        for t, row in enumerate(kept[0].tolist()):
            visible = min(3, (t + 1) // CONFIG.csa_ratio)
            assert row == [*range(visible), *[-1] * (3 - visible)]
