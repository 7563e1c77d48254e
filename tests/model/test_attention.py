"""The whole backbone against the slow reference, and what must hold however a text is cut: order, causality, bounded memory."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.slow_reference import (
    CONFIG,
    ENGRAM,
    SlowV4,
    in_pieces,
    random_config,
    random_ids,
    random_model,
    random_pieces,
    softmax,
)
from workbench.errors import InputError
from workbench.model.attention.core import attend, window_rows
from workbench.model.layers import rotate

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 13, 29, 47, 61, 101, 149, 211, 300)
ROUNDING = 1e-4  # float32 over four layers gives about 5e-6; a wrong entry gives 1e-2 and more


@pytest.mark.parametrize("seed", range(30))
def test_prefill_equals_the_slow_reference_and_any_other_split(seed):
    config = random_config(seed)
    model, length = random_model(config, seed), LENGTHS[seed % len(LENGTHS)]
    ids = random_ids(config, 1, length, seed)
    expected = torch.from_numpy(SlowV4(model).read(ids[0]))
    with torch.inference_mode():
        once = model(ids)[0]
    assert once.std() > 0.3  # logits that say something
    assert (once - expected).abs().max() < ROUNDING
    splits = {"one by one": [1] * length, "at random": random_pieces(length, seed), "at once": [length]}
    for name, sizes in splits.items():
        assert (in_pieces(model, ids, sizes)[0] - once).abs().max() < ROUNDING, name


def test_one_row_of_an_odd_number_of_channels_turns_like_many():
    turns = torch.polar(torch.ones(2, 3), torch.tensor([[0.3, -1.1, 2.0], [0.7, 0.1, -0.4]]))
    rows = torch.arange(26.0).view(1, 2, 13)
    both = rotate(rows, turns)
    for t in range(2):
        assert (rotate(rows[:, t : t + 1], turns[t : t + 1]) - both[:, t : t + 1]).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_later_tokens_never_change_earlier_logits(seed):
    config = random_config(100 + seed)
    model, length = random_model(config, seed), 67
    ids = random_ids(config, 1, length, seed)
    with torch.inference_mode():
        before = model(ids)
        for cut in (1, 7, 31, 66):
            changed = ids.clone()
            changed[:, cut:] = (ids[:, cut:] + 1) % config.vocab_size
            after = model(changed)
            # The same numbers, but experts multiply other groups of tokens, which rounds differently.
            assert (after - before)[:, :cut].abs().max() < 1e-5
            assert (after - before)[:, cut:].abs().max() > 1e-2
            assert (model(ids[:, :cut]) - before[:, :cut]).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_sequences_of_a_batch_do_not_see_each_other(seed):
    config = random_config(200 + seed, engram=True)
    model, ids = random_model(config, seed), random_ids(config, 3, 41, seed)
    together = in_pieces(model, ids, random_pieces(41, seed))
    for row in range(3):
        with torch.inference_mode():
            alone = model(ids[row : row + 1])
        assert (together[row] - alone[0]).abs().max() < ROUNDING


@pytest.mark.parametrize("topk", [1, 2, 1000])
def test_another_topk_for_one_call_is_what_a_model_configured_so_computes(topk):
    model, ids = random_model(), random_ids(CONFIG, 1, 59)
    with torch.inference_mode():
        got = model(ids, topk=topk)[0]
    assert (got - torch.from_numpy(SlowV4(model, topk).read(ids[0]))).abs().max() < ROUNDING
    assert (in_pieces(model, ids, [1] * 59, topk=topk)[0] - got).abs().max() < ROUNDING


def test_last_logits_are_the_last_of_all():
    model, ids = random_model(), random_ids(CONFIG, 3, 23)
    with torch.inference_mode():
        last = model(ids, logits="last")
        assert last.shape == (3, 1, CONFIG.vocab_size) and last.dtype == torch.float32
        assert (last - model(ids)[:, -1:]).abs().max() < 1e-5


@pytest.mark.parametrize("made", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("read", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_cache_may_be_made_and_read_under_any_grad_mode(made, read):
    """A notebook may prefill under inference_mode and go on without it; no graph of an earlier call may stay alive."""
    model, ids = random_model(replace(CONFIG, engram=ENGRAM)), random_ids(CONFIG, 1, 53)
    with torch.inference_mode():
        expected = model(ids)
    with made():
        cache = model.new_cache()
        parts = [model(ids[:, :17], cache).detach()]
    with read():
        parts += [model(ids[:, t : t + 1], cache).detach() for t in range(17, 30)]
    with made():
        parts.append(model(ids[:, 30:], cache).detach())
    assert (torch.cat(parts, 1) - expected).abs().max() < ROUNDING
    stores = [store for layer in cache.layers for _, store in layer.parts()]
    assert not any(t.requires_grad for store in stores for t in vars(store).values() if isinstance(t, torch.Tensor))
    model.fetcher.close()


def test_a_model_that_has_run_can_be_copied():
    model, ids = random_model(replace(CONFIG, engram=ENGRAM)), random_ids(CONFIG, 1, 11)
    with torch.inference_mode():
        expected = model(ids)
        twin = copy.deepcopy(model)
        assert twin.fetcher is not model.fetcher and torch.equal(twin(ids), expected)
    model.fetcher.close()
    twin.fetcher.close()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shared", [True, False])
def test_attend_equals_one_softmax_per_query_and_head(seed, shared):
    draw = np.random.default_rng(seed)
    batch, heads, d = 2, int(draw.integers(1, 4)), 5
    window, t, start, s = (int(draw.integers(*span)) for span in ((1, 9), (1, 24), (0, 12), (0, 8)))
    g = torch.Generator().manual_seed(seed)
    q, keys = torch.randn(batch, t, heads, d, generator=g), torch.randn(batch, window - 1 + t, d, generator=g)
    entries = torch.randn(*((batch, s, d) if shared else (batch, t, s, d)), generator=g)
    visible = torch.rand(*((t, s) if shared else (batch, t, s)), generator=g) < 0.5
    sinks = torch.randn(heads, generator=g)
    done = attend(q, keys, window, start, entries, visible, sinks)
    straight = window_rows(done.window_probs, window)
    for b in range(batch):
        for i in range(t):
            near = [w for w in range(window) if start + i - (window - 1) + w >= 0]  # column w is that token
            seen = [e for e in range(s) if (visible[i, e] if shared else visible[b, i, e])]
            rows = [keys[b, i + w] for w in near] + [entries[b, e] if shared else entries[b, i, e] for e in seen]
            logits = torch.stack([*(q[b, i] @ row * d**-0.5 for row in rows), sinks], dim=1).double().numpy()
            probs = softmax(logits, axis=1)
            out = probs[:, :-1] @ torch.stack(rows).double().numpy()
            np.testing.assert_allclose(done.out[b, i], out, atol=1e-5)
            expected = np.zeros((heads, window))
            expected[:, near] = probs[:, : len(near)]
            np.testing.assert_allclose(straight[b, i], expected, atol=1e-6)
            far = np.zeros((heads, s))
            far[:, seen] = probs[:, len(near) : -1]
            np.testing.assert_allclose(done.entry_probs[b, i], far, atol=1e-6)
            np.testing.assert_allclose(done.sink_probs[b, i], probs[:, -1], atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that one tensor made in this block really holds (an expanded view holds its base's)."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                if held > self.numel:
                    self.numel, self.what = held, f"{func} {tuple(tensor.shape)}"
        return out


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_a_long_prefill_never_holds_queries_times_entries_times_heads(kind):
    length, ratio, heads = 4096, 2, 8
    config = replace(
        CONFIG,
        hidden_size=8,
        num_attention_heads=heads,
        head_dim=4,
        q_lora_rank=4,
        o_groups=1,
        layer_kinds=(kind,),
        mlp_kinds=("hash",),
        moe_intermediate_size=4,
        n_routed_experts=2,
        index_n_heads=4 * heads,
        index_head_dim=4,
        index_topk=512,
        csa_ratio=ratio,
        hca_ratio=ratio,
        hc_mult=1,
    )
    model, ids = random_model(config), random_ids(config, 1, length)
    with torch.inference_mode(), LargestTensor() as seen:
        model(ids, model.new_cache(), "last")
    entries = length // ratio
    # Chunks bound logits to 2**21 elements and index products to 2**22, whatever the length.
    assert seen.numel <= 2**22 + 2**16 < length * entries < length * entries * heads / 7, seen.what


def test_a_prefill_of_twice_the_length_makes_no_tensor_more_than_twice_as_large():
    model = random_model(replace(CONFIG, engram=ENGRAM))
    sizes = []
    for length in (1024, 2048):
        with torch.inference_mode(), LargestTensor() as seen:
            model(random_ids(CONFIG, 1, length), model.new_cache(), "last")
        sizes.append(seen.numel)
    assert sizes[1] <= 2 * sizes[0] + 2**12


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "non-empty integer tensor"),
        (torch.zeros(3, dtype=torch.int64), {}, "non-empty integer tensor"),
        (torch.zeros(1, 3), {}, "non-empty integer tensor"),
        ([[1, 2]], {}, "non-empty integer tensor"),
        (torch.tensor([[-1]]), {}, "must lie in 0..52"),
        (torch.tensor([[53]]), {}, "must lie in 0..52"),
        (torch.zeros(1, 8193, dtype=torch.int64), {}, "limit of 8192"),
        (torch.tensor([[1]]), {"logits": "first"}, "'all' or 'last'"),
        (torch.tensor([[1]]), {"topk": 0}, "topk must be positive"),
        (torch.tensor([[1]]), {"prefetch": "later"}, "choose one of"),
    ],
)
def test_unusable_calls_are_refused_in_one_line(ids, settings, message):
    with pytest.raises(InputError, match=message) as refused:
        random_model()(ids, **settings)
    assert "\n" not in str(refused.value)
