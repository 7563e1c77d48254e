"""Our V4.1 against ``nemo-automodel`` over random configurations: every layer mode, schedules, pools, Engram, batches, cuts.

Weights travel through a saved folder, so names and shapes are checked on the way. The other implementation breaks ties of index
scores its own way, which depends on the length; so what follows a near tie in its sequence is left out of the comparison.
"""

import pytest
import torch

from tests import oracles
from tests.slow_reference import in_pieces, random_pieces, settled
from workbench.checkpoint import load

TOLERANCE = 1e-4  # float32 rounding over eight layers gives about 1e-5; a wrong entry, weight or term gives 1e-3 and more
LENGTHS = (1, 2, 3, 7, 16, 29, 47, 61, 97, 128)
SEEDS = range(24)


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_equal_however_the_text_is_cut(nemo_oracle, tmp_path, seed):
    settings, theirs = oracles.v41_oracle(tmp_path, seed)
    ours = load(tmp_path)
    batch, length = 1 + 2 * (seed % 2), LENGTHS[seed % len(LENGTHS)]
    ids = torch.randint(0, settings["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
    compared = settled(ours, ids)
    assert compared.float().mean() > 0.6
    with torch.inference_mode():
        expected = theirs(ids).logits[compared]
        assert expected.std() > 0.3  # logits that say something
        assert (ours(ids)[compared] - expected).abs().max() < TOLERANCE
    for sizes in (random_pieces(length, seed), [1] * length):
        assert (in_pieces(ours, ids, sizes)[compared] - expected).abs().max() < TOLERANCE, sizes


def test_the_cases_cover_what_they_should():
    cases = [oracles.random_v41_config(seed) for seed in SEEDS]
    schedules = {tuple(case["compress_ratios"]) for case in cases}
    assert len(schedules) == len(oracles.V41_SCHEDULES) and {ratio for s in schedules for ratio in s} == {0, 1, 2, 3}
    assert {case["engram_max_ngram_size"] for case in cases if case["engram_layer_ids"]} == {2, 3, 4}
    assert any(not case["engram_layer_ids"] for case in cases) and any(case["candidate_source_layer_id"] < 0 for case in cases)
    for name in ("hc_sinkhorn_iters", "o_groups", "index_topk", "candidate_topk_blocks", "swiglu_limit", "sliding_window"):
        assert len({case[name] for case in cases}) > 1, name


@pytest.mark.parametrize("seed", [100, 104])
def test_every_layers_streams_equal(nemo_oracle, tmp_path, seed):
    """Layer by layer, so that two mistakes cannot cancel."""
    settings, theirs = oracles.v41_oracle(tmp_path, seed)
    ours = load(tmp_path)
    ids = torch.randint(0, settings["vocab_size"], (2, 53), generator=torch.Generator().manual_seed(seed))
    compared = settled(ours, ids)
    streams: list[torch.Tensor] = []
    for block in ours.blocks:
        block.register_forward_pre_hook(lambda _module, inputs: streams.append(inputs[0].streams))
    with torch.inference_mode():
        _, expected = theirs.model(ids, output_hidden_states=True)
        ours(ids)
    assert compared.float().mean() > 0.7 and len(streams) == settings["num_hidden_layers"] == len(expected)
    for mine, other in zip(streams, expected, strict=True):
        assert (mine - other)[compared].abs().max() < TOLERANCE


def test_masked_tokens_stop_engram_as_they_do_over_there(nemo_oracle, tmp_path):
    """Hashes and gates, beside images that nothing looks back across; the rest of an image is out of scope."""
    settings, theirs = oracles.v41_oracle(tmp_path, 8)
    assert settings["engram_layer_ids"]
    ids = torch.randint(0, 60, (2, 31), generator=torch.Generator().manual_seed(0))
    ids[0, 5:7] = ids[1, 0] = ids[1, 30] = 63
    ours = load(tmp_path)
    ours.config = type(ours.config).from_dict(ours.config.to_dict() | {"image_token_id": 63})
    x = torch.randn(2, 31, ours.config.hc_mult, ours.config.hidden_size)
    with torch.inference_mode():
        expected = theirs.model.engram_hash(ids, token_mask=ids != 63)
        canonical = ours.canonical_ids(ids)
        for number, layer in enumerate(ours.config.engram.layer_ids):
            engram = ours.blocks[layer].engram
            pad = int(ours.engram_canonical_ids[ours.config.engram.pad_token_id])
            for cut in (0, 6, 7, 20):  # and through a cache's look-back ids
                past = canonical[:, max(0, cut - engram.hash.orders + 1) : cut]
                rows = engram.hash(canonical[:, cut:], past, pad)
                assert torch.equal(rows, expected[:, cut:, number])
            rows = expected[:, :, number]
            after, _ = engram(x, rows, engram.table.gather(rows.flatten()).view(*rows.shape[:2], -1), masked=ids == 63)
            other = theirs.model.layers[str(layer)].engram(x, rows, token_mask=ids != 63)
            assert (after - other).abs().max() < 1e-5 and torch.equal(after[ids == 63], x[ids == 63])
