"""Our model against ``transformers`` over random configurations: lengths, schedules, both kinds of MLP, batches, heads.

Weights travel through a saved folder, so names and shapes are checked on the way. Ties of index scores may be broken either
way over there; so a configuration has 16 index heads or more, or keeps all entries, and the gap to the best entry left out is
asserted before anything is compared.
"""

import random
from typing import Any

import pytest
import torch

from tests import oracles
from tests.oracles import CSA, HCA, WINDOW
from tests.slow_reference import SlowV4, in_pieces, random_pieces
from workbench.checkpoint import load
from workbench.model.transformer import V4Model

LENGTHS = (1, 2, 3, 5, 7, 11, 16, 17, 31, 32, 33, 47, 59, 64, 67, 83, 97, 101, 127, 131, 173, 211, 257, 300)
TOLERANCE = 1e-4  # float32 against float64 differs by up to 1e-5, a wrong entry or weight by 1e-2 and more
LEAST_GAP = 1e-6  # of index scores that decide a selection; float32 rounding of a score is about 1e-7
SCHEDULES: tuple[list[str] | None, ...] = (
    None,
    [CSA, CSA],
    [HCA, HCA, HCA],
    [WINDOW],
    [CSA],
    [WINDOW, HCA],
    [HCA, CSA, WINDOW, CSA],
)


def case(seed: int) -> tuple[dict[str, Any], int, int]:
    """(overrides of the random configuration, batch, length) of one case."""
    draw = random.Random(9000 + seed)
    length = LENGTHS[seed % len(LENGTHS)]
    kinds = SCHEDULES[seed % len(SCHEDULES)] or oracles.random_v4_config(seed)["layer_types"]
    hashed = draw.randint(0, len(kinds))
    heads = draw.choice([2, 4, 6, 8])
    keeps_all = draw.random() < 0.3
    overrides = {
        "layer_types": kinds,
        "num_hidden_layers": len(kinds),
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (len(kinds) - hashed),
        "compress_rates": {CSA: draw.choice([3, 4, 5]), HCA: draw.choice([7, 11, 16])},
        "num_attention_heads": heads,
        "o_groups": draw.choice([1, 2, heads]),
        "sliding_window": draw.choice([3, 5, 8, 13, 64]),
        "index_topk": 200 if keeps_all else draw.choice([2, 3, 5, 8]),
        "index_n_heads": 3 if keeps_all else draw.choice([16, 20]),
        "hc_mult": draw.choice([2, 3, 4]),
        "tie_word_embeddings": False,
    }
    return overrides, draw.choice([1, 3]), length


def smallest_gap(model: V4Model, ids: torch.Tensor) -> float:
    """The least distance between the last index score kept and the first left out, over all layers and queries."""
    gaps = [torch.inf]

    def note(_module: Any, _inputs: Any, record: Any) -> None:
        if record.runner_up is not None and record.runner_up.scores.shape[-1]:
            gap = record.selection.scores[..., -1] - record.runner_up.scores[..., 0]
            gaps.extend(gap[record.runner_up.entries[..., 0] >= 0].tolist())

    hooks = [block.attn.attention_tap.register_forward_hook(note) for block in model.blocks if block.attn.kind == "csa"]
    model(ids)
    for hook in hooks:
        hook.remove()
    return min(gaps)


@pytest.mark.parametrize("seed", range(28))
def test_logits_equal_however_the_text_is_cut(transformers_oracle, tmp_path, seed):
    overrides, batch, length = case(seed)
    theirs_config, theirs = oracles.oracle_model(seed, **overrides)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    ids = torch.randint(0, theirs_config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = theirs(ids, use_cache=False).logits
        assert expected.std() > 0.3  # logits that say something
        assert smallest_gap(ours, ids) > LEAST_GAP
        assert (ours(ids) - expected).abs().max() < TOLERANCE
    for sizes in (random_pieces(length, seed), [1] * length if length < 100 else random_pieces(length, seed + 100)):
        assert (in_pieces(ours, ids, sizes) - expected).abs().max() < TOLERANCE, sizes


def test_the_cases_cover_what_they_should():
    cases = [case(seed) for seed in range(28)]
    layers = [kind for settings, _, _ in cases for kind in settings["layer_types"]]
    assert {WINDOW, CSA, HCA} == set(layers) and len({tuple(s["layer_types"]) for s, _, _ in cases}) >= 8
    assert {length for _, _, length in cases} == set(LENGTHS) and {batch for _, batch, _ in cases} == {1, 3}
    assert {s["num_attention_heads"] for s, _, _ in cases} == {2, 4, 6, 8}
    assert {kind for s, _, _ in cases for kind in s["mlp_layer_types"]} == {"hash_moe", "moe"}
    assert all(s["index_n_heads"] >= 16 or s["index_topk"] * s["compress_rates"][CSA] >= length for s, _, length in cases)


@pytest.mark.parametrize("seed", [40, 41, 42])
def test_every_layers_streams_equal(transformers_oracle, tmp_path, seed):
    """Layer by layer, so that two mistakes cannot cancel."""
    config, theirs = oracles.oracle_model(seed)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    ids = torch.randint(0, config.vocab_size, (2, 53), generator=torch.Generator().manual_seed(seed))
    streams: list[torch.Tensor] = []
    for block in ours.blocks:
        block.register_forward_pre_hook(lambda _module, inputs: streams.append(inputs[0]))
    with torch.inference_mode():
        expected = theirs(ids, use_cache=False, output_hidden_states=True).hidden_states
        ours(ids)
    assert len(streams) == config.num_hidden_layers == len(expected) - 1
    for mine, other in zip(streams, expected[:-1], strict=True):
        assert other.shape == mine.shape and (mine - other).abs().max() < TOLERANCE


@pytest.mark.parametrize("seed", [50, 51])
def test_the_slow_reference_agrees_with_transformers_too(transformers_oracle, tmp_path, seed):
    """So that the tests that run without ``transformers`` stand on the same ground."""
    config, theirs = oracles.oracle_model(seed)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, config.vocab_size, (1, 79), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = theirs(ids, use_cache=False).logits[0]
    assert (torch.from_numpy(SlowV4(load(tmp_path)).read(ids[0])) - expected).abs().max() < TOLERANCE


def test_greedy_generation_equals(transformers_oracle, tmp_path):
    config, theirs = oracles.oracle_model(60)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    ids = torch.randint(0, config.vocab_size, (1, 37), generator=torch.Generator().manual_seed(60))
    expected = theirs.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    cache, line, made = ours.new_cache(), ids, ids[0].tolist()
    with torch.inference_mode():
        for _ in range(24):
            made.append(int(ours(line, cache, "last").argmax()))
            line = torch.tensor([made[-1:]])
    assert made == expected
