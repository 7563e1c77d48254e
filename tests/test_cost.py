from dataclasses import replace

import pytest
import torch

from workbench.config import EngramConfig, ModelConfig
from workbench.cost import PARTS, dense_kv_bytes, formula, kv_bytes, kv_bytes_per_token, terms
from workbench.errors import InputError
from workbench.model.transformer import V4Model

MILLION = 1_048_576


def published(kinds, **sizes):
    """The published dimensions that cost depends on; the rest of the shape is irrelevant here."""
    shape = dict(
        vocab_size=129280, hidden_size=4096, num_attention_heads=64, head_dim=512, qk_rope_head_dim=64, q_lora_rank=1024,
        o_groups=8, o_lora_rank=1024, mlp_kinds=("score",) * len(kinds), n_routed_experts=256, num_experts_per_tok=6,
        moe_intermediate_size=2048, index_n_heads=64, index_head_dim=128, index_topk=512,
    )  # fmt: skip
    return ModelConfig(layer_kinds=tuple(kinds), **(shape | sizes))


FLASH = published(["window"] * 2 + ["csa", "hca"] * 20 + ["csa"])
PRO = published(["hca", "hca"] + ["csa", "hca"] * 29 + ["csa"], hidden_size=7168, num_attention_heads=128, o_groups=16)
TINY = published(
    ["window", "csa", "hca", "csa"], hidden_size=22, num_attention_heads=4, head_dim=14, qk_rope_head_dim=6, o_groups=2,
    index_head_dim=10, csa_ratio=3, hca_ratio=7, sliding_window=5, hc_mult=2, max_position_embeddings=211,
)  # fmt: skip
WITH_ENGRAM = replace(
    TINY, engram=EngramConfig(layer_ids=(1, 2), vocab_size=101, compressed_vocab_size=97, max_ngram_size=3, conv_kernel_size=2)
)


def hold_token_by_token(config, length):
    """The slow way: keep every float the cache keeps, one token at a time, and count the bytes of what is left."""
    held = dict.fromkeys(PARTS, 0)
    for kind, ratio in zip(config.layer_kinds, config.compress_ratios, strict=True):
        window, entries, open_block, overlap = [], 0, [], 0
        for token in range(length):
            window = [*window, token][-config.sliding_window :]
            if not ratio:
                continue
            open_block.append(token)
            if len(open_block) == ratio:
                entries, open_block, overlap = entries + 1, [], ratio if kind == "csa" else 0
        series = 2 if kind == "csa" else 1
        widths = [config.head_dim] + [config.index_head_dim] * (kind == "csa")
        held["window"] += 4 * len(window) * config.head_dim
        held["compressed"] += 4 * entries * config.head_dim
        held["index"] += 4 * entries * config.index_head_dim * (kind == "csa")
        for width in widths:  # projected values and gate scores
            held["tail"] += 4 * 2 * (len(open_block) * series * width + overlap * width)
    return held


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 6, 7, 11, 20, 21, 22, 97])
def test_formula_counts_what_a_cache_fed_token_by_token_would_keep(length):
    held = kv_bytes(TINY, length, "fp32")
    assert held == hold_token_by_token(TINY, length) | {"total": sum(hold_token_by_token(TINY, length).values())}


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_formula_equals_what_a_live_cache_holds_after_every_call(storage):
    small = {"vocab_size": 101, "moe_intermediate_size": 8, "n_routed_experts": 7, "q_lora_rank": 10, "o_lora_rank": 6}
    config = replace(WITH_ENGRAM, **small, num_experts_per_tok=2, index_n_heads=2, index_topk=3)
    torch.manual_seed(0)
    model = V4Model(config).eval()
    cache = model.new_cache(storage=storage)
    assert cache.nbytes == 0
    with torch.inference_mode():
        for tokens in (1, 1, 1, 4, 13, 1, 2, 17, 1):
            model(torch.randint(101, (1, tokens)), cache, logits="last")
            expected = kv_bytes(config, cache.length, storage)
            assert cache.nbytes_by_part() == {part: expected[part] for part in PARTS}
            assert cache.nbytes == expected["total"]


def test_published_totals_come_out_at_a_million_tokens():
    flash, pro = kv_bytes(FLASH, MILLION), kv_bytes(PRO, MILLION)
    assert flash["index"] == 21 * 262144 * 68 and flash["window"] == 43 * 128 * 584
    assert round((flash["total"] - flash["tail"]) / 1e9, 3) == 3.688
    assert round((pro["total"] - pro["tail"]) / 1e9, 3) == 5.280
    bf16 = kv_bytes(PRO, MILLION, "bf16")
    assert round((bf16["total"] - bf16["tail"]) / 2**30, 3) == 9.625


def test_the_tail_is_fp32_in_every_storage():
    assert len({kv_bytes(FLASH, 1027, storage)["tail"] for storage in ("fp32", "bf16", "released")}) == 1


def test_a_fuller_open_block_never_exceeds_the_reference_buffers():
    """The released code reserves 11.6 MiB of tail for Flash; just before both blocks close, all but one row is in use."""
    reserved = 21 * 2 * 8 * (1024 + 256) * 4 + 20 * 2 * 128 * 512 * 4
    assert 0.7 * reserved < kv_bytes(FLASH, 128 * 9 - 1)["tail"] < reserved


def test_engram_holds_look_back_ids_once_and_conv_state_per_layer():
    plain, engram = kv_bytes(TINY, 50), kv_bytes(WITH_ENGRAM, 50)
    assert engram["engram"] == 2 * 8 + 2 * 3 * (2 * 22) * 4  # ids of two tokens; two layers, three positions, two streams
    assert kv_bytes(WITH_ENGRAM, 1)["engram"] == 8 + 2 * 1 * (2 * 22) * 4
    assert engram["total"] - engram["engram"] == plain["total"]


def test_bytes_per_token_are_the_slope_of_the_growing_parts():
    block = FLASH.csa_ratio * FLASH.hca_ratio
    near, far = kv_bytes(FLASH, 8 * block), kv_bytes(FLASH, 9 * block)
    slope = kv_bytes_per_token(FLASH)
    for part in ("compressed", "index", "total"):
        assert (far[part] - near[part]) / block == pytest.approx(slope[part])


def test_dense_baselines_count_keys_and_values_of_each_kv_head():
    assert dense_kv_bytes(PRO, MILLION, 128, "bf16") == 16 * dense_kv_bytes(PRO, MILLION, 8, "bf16")
    narrow = replace(PRO, head_dim=128)  # the published GQA-8 baseline has heads of 128
    assert round(dense_kv_bytes(narrow, MILLION, 8) / 1e9, 1) == 262.0
    assert dense_kv_bytes(TINY, 31, 8, "fp32") == 4 * 31 * 2 * TINY.num_attention_heads * 14 * 4  # only 4 heads to share


def test_formula_lines_show_symbols_numbers_and_results_that_add_up():
    lines = formula(WITH_ENGRAM, 50, "fp32")
    assert "compressed: n_csa × ⌊L/m⌋ × E = 2 × 16 × 56 = 1,792 B" in lines
    assert lines[-1] == f"total: {sum(t.nbytes for t in terms(WITH_ENGRAM, 50, 'fp32')):,} B"


@pytest.mark.parametrize("length", [-1, 2.0, True, "5", 212])
def test_a_length_the_model_cannot_have_is_refused_by_name(length):
    with pytest.raises(InputError, match=f"0 to 211.*{length}"):
        kv_bytes(TINY, length)


def test_other_bad_input_is_refused():
    with pytest.raises(InputError, match="int3"):
        kv_bytes(TINY, 5, "int3")
    with pytest.raises(InputError, match="kv_heads"):
        dense_kv_bytes(TINY, 5, 0)
    with pytest.raises(InputError, match="ModelConfig"):
        kv_bytes({"head_dim": 4}, 5)
