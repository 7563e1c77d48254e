"""Dense llama, plain MLA and V3.2 against ``transformers`` over random configurations, lengths, batches and cuts of the text.

Weights travel through a saved folder, so names and shapes are checked on the way.
"""

import random
from typing import Any

import pytest
import torch

from tests import oracles
from tests.slow_reference import in_pieces, random_pieces
from workbench.checkpoint import load
from workbench.model.plain import PlainModel

LENGTHS = (1, 2, 3, 7, 16, 17, 31, 47, 59, 67, 83, 101, 131)
TOLERANCE = 1e-4  # float32 rounding is about 1e-5 here; a wrong token, frequency or weight is 1e-2 and more
CLOSE = 1e-5  # index scores nearer than that may be ranked either way
SEEDS = range(24)


def drawn(seed: int, vocabulary: int) -> torch.Tensor:
    """ids [B, T] of one case."""
    shape = (random.Random(seed).choice([1, 3]), LENGTHS[seed % len(LENGTHS)])
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def certain(model: PlainModel, ids: torch.Tensor) -> torch.Tensor:
    """[B, T] True where no close call between the last token kept and the first left out can have changed the logits.

    A close call changes its own row, and through the rows that later layers cache every later query too.
    """
    sure = torch.ones(ids.shape, dtype=torch.bool)
    last = len(model.blocks) - 1
    for layer, block in enumerate(model.blocks):
        seen: list[Any] = []
        hook = block.attn.attention_tap.register_forward_hook(lambda _m, _i, record, to=seen: to.append(record))
        model(ids)
        hook.remove()
        for record in seen:
            if record.runner_up is None or not record.runner_up.scores.shape[-1]:
                continue
            close = record.selection.scores[..., -1] - record.runner_up.scores[..., 0] < CLOSE
            close &= record.runner_up.entries[..., 0] >= 0
            for row, t in close.nonzero().tolist():
                at = record.start + t
                sure[row, at : at + 1 if layer == last else None] = False
    return sure


def compare(theirs: Any, ours: PlainModel, ids: torch.Tensor, seed: int) -> float:
    """Largest difference of the logits at one go, in random pieces and token by token, where they are certain; returns how
    many are."""
    length = ids.shape[1]
    with torch.inference_mode():
        sure = certain(ours, ids)
        expected = theirs(ids, use_cache=False).logits
        assert expected.std() > 0.3  # logits that say something
        assert ((ours(ids) - expected).abs().amax(-1) * sure).max() < TOLERANCE
    for sizes in (random_pieces(length, seed), [1] * length):
        assert ((in_pieces(ours, ids, sizes) - expected).abs().amax(-1) * sure).max() < TOLERANCE, sizes
    return float(sure.float().mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_dense_logits_equal_however_the_text_is_cut(transformers_oracle, tmp_path, seed):
    config, theirs = oracles.llama_oracle(seed)
    theirs.save_pretrained(tmp_path)
    assert compare(theirs, load(tmp_path), drawn(seed, config.vocab_size), seed) == 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_v32_logits_equal_however_the_text_is_cut(transformers_oracle, tmp_path, seed):
    config, theirs = oracles.v32_oracle(100 + seed)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert compare(theirs, ours, drawn(seed, config.vocab_size), seed) > 0.5


@pytest.mark.parametrize("seed", range(8))
def test_plain_mla_logits_equal_those_of_v3(transformers_oracle, tmp_path, seed):
    config, theirs = oracles.v3_oracle(200 + seed)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert set(ours.config.layer_kinds) == {"mla"}
    assert compare(theirs, ours, drawn(5 + seed, config.vocab_size), seed) == 1.0


def test_the_cases_cover_what_they_should(transformers_oracle):
    settings = [oracles.random_v32_config(100 + seed) for seed in SEEDS]
    lengths = [LENGTHS[seed % len(LENGTHS)] for seed in SEEDS]
    left_out = [length > s["index_topk"] for s, length in zip(settings, lengths, strict=True)]
    assert left_out.count(True) >= 8 and left_out.count(False) >= 6
    assert {s["rope_parameters"]["rope_type"] for s in settings} == {"yarn", "default"}
    assert {s["n_group"] for s in settings} == {1, 2, 4} and any(s["topk_group"] < s["n_group"] for s in settings)
    assert {min(s["first_k_dense_replace"], 1) for s in settings} == {0, 1}
    heads = [(s["num_attention_heads"], s["num_key_value_heads"]) for s in map(oracles.random_llama_config, SEEDS)]
    assert any(q == kv > 1 for q, kv in heads) and any(q > kv > 1 for q, kv in heads) and any(kv == 1 for _, kv in heads)


@pytest.mark.parametrize("oracle", [oracles.llama_oracle, oracles.v32_oracle])
def test_every_layers_stream_equals(transformers_oracle, tmp_path, oracle):
    """Layer by layer, so that two mistakes cannot cancel."""
    config, theirs = oracle(3, num_hidden_layers=3)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    ids = torch.randint(0, config.vocab_size, (2, 53), generator=torch.Generator().manual_seed(3))
    streams: list[torch.Tensor] = []
    for block in ours.blocks:
        block.register_forward_pre_hook(lambda _module, inputs: streams.append(inputs[0]))
    with torch.inference_mode():
        sure = certain(ours, ids)
        streams.clear()
        expected = theirs(ids, use_cache=False, output_hidden_states=True).hidden_states
        ours(ids)
    assert len(streams) == 3 == len(expected) - 1
    for mine, other in zip(streams, expected[:-1], strict=True):
        assert ((mine - other).abs().amax(-1) * sure).max() < TOLERANCE


@pytest.mark.parametrize("oracle", [oracles.llama_oracle, oracles.v32_oracle, oracles.v3_oracle])
def test_transformers_reads_what_we_save(transformers_oracle, tmp_path, oracle):
    from workbench.checkpoint import save

    config, theirs = oracle(11, num_hidden_layers=2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    save(ours, tmp_path / "ours", dtype=torch.float32)
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = torch.randint(0, config.vocab_size, (1, 43), generator=torch.Generator().manual_seed(11))
    with torch.inference_mode():
        sure = certain(ours, ids)
        assert ((back.eval()(ids).logits - theirs(ids).logits).abs().amax(-1) * sure).max() < TOLERANCE
