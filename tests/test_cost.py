from dataclasses import replace

import pytest
import torch

from workbench.config import DenseConfig, EngramConfig, HybridConfig, LatentConfig
from workbench.config.parts import STORAGES
from workbench.cost import (
    PARTS,
    decode_bytes,
    decode_flops,
    dense_kv_bytes,
    extrapolated,
    formula,
    kv_bytes,
    kv_bytes_per_token,
    terms,
    units,
)
from workbench.errors import InputError
from workbench.model.transformer import V4Model
from workbench.presets import presets

MILLION = 1_048_576


def published(kinds, **sizes):
    """The published dimensions that cost depends on; the rest of the shape is irrelevant here."""
    shape = dict(
        vocab_size=129280, hidden_size=4096, num_attention_heads=64, head_dim=512, qk_rope_head_dim=64, q_lora_rank=1024,
        o_groups=8, o_lora_rank=1024, mlp_kinds=("score",) * len(kinds), n_routed_experts=256, num_experts_per_tok=6,
        moe_intermediate_size=2048, index_n_heads=64, index_head_dim=128, index_topk=512,
    )  # fmt: skip
    return HybridConfig(layer_kinds=tuple(kinds), **(shape | sizes))


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
    for no_model in ({"head_dim": 4}, None, DenseConfig):
        with pytest.raises(InputError, match="model.config, a preset or its name"):
            kv_bytes(no_model, 5)


def without_tail(preset, storage="released"):
    held = kv_bytes(preset, MILLION, storage)
    return held["total"] - held["tail"]


def test_presets_give_the_published_cache_sizes_at_a_million_tokens():
    """Published figures leave out the tail."""
    assert round(without_tail("v4-flash") / 1e9, 3) == 3.688 and f"{without_tail('v4-flash') / 2**30:.2f}" == "3.43"
    assert round(without_tail("v4-pro") / 1e9, 3) == 5.280 and f"{without_tail('v4-pro') / 2**30:.2f}" == "4.92"
    assert round(without_tail("v3.2") / 1e9, 2) == 50.40 and round(without_tail("v3.2", "bf16") / 1e9, 2) == 90.06
    assert round(without_tail("gqa-8") / 1e9) == 262 and round(without_tail("mha") / 1e9) == 4192
    assert f"{without_tail('v4-pro') / without_tail('v3.2'):.1%}" == "10.5%"
    assert f"{without_tail('v4-flash') / without_tail('v3.2'):.1%}" == "7.3%"
    assert f"{without_tail('v4-pro') / without_tail('gqa-8'):.1%}" == "2.0%"
    shallow = replace(presets["gqa-8"].config, num_hidden_layers=43)  # as many layers as V4-Flash
    assert f"{without_tail('v4-flash') / without_tail(shallow):.1%}" == "2.0%"
    assert (
        f"{without_tail('v4-flash', 'bf16') / 2**30:.2f}" == "6.72"
        and f"{without_tail('v4-pro', 'bf16') / 2**30:.3f}" == "9.625"
    )


def test_v41_holds_under_a_gib_at_a_million_tokens():
    """890 bytes a token, windows left out too, as its report counts."""
    held = kv_bytes("v4.1-flash", MILLION)
    assert held["compressed"] + held["index"] == 890 * MILLION and f"{890 * MILLION / 2**30:.3f}" == "0.869"
    assert held["window"] == 40 * 128 * 528 and held["tail"] == 0 and held["engram"] == 3 * 8


def test_plain_mla_has_no_index_and_reads_all_of_its_latents():
    plain = replace(presets["v3.2"].config, index_topk=0)
    held = kv_bytes(plain, MILLION)
    assert held["kv"] == held["total"] == 61 * 656 * MILLION and held["index"] == 0
    assert f"{decode_bytes(plain, MILLION)['total'] / 1e9:.1f}" == "42.0" and set(kv_bytes_per_token(plain)) == {"kv", "total"}
    assert f"{kv_bytes(plain, MILLION, 'bf16')['total'] / 1e9:.2f}" == "73.69"
    flops = decode_flops(plain, MILLION)
    assert int(flops["core"] / 1e9) == 17815 and flops["indexer"] == 0


def test_a_row_for_every_token_goes_on_beyond_the_trained_length_and_says_so():
    assert extrapolated("v3.2", MILLION) and not extrapolated("v3.2", 163840) and extrapolated("v3.2", 163841)
    assert not any(extrapolated(name, MILLION) for name in presets if name != "v3.2")
    assert kv_bytes("v3.2", 10 * MILLION)["total"] == 10 * kv_bytes("v3.2", MILLION)["total"]
    with pytest.raises(InputError, match="length.*-1"):
        extrapolated("v3.2", -1)


def test_bytes_per_token_are_those_of_the_v41_report():
    """They leave out tail and windows."""
    per_token = {name: kv_bytes_per_token(name)["total"] for name in ("v4.1-flash", "v4-flash", "v4-pro", "v3.2")}
    assert {name: int(n) for name, n in per_token.items()} == {
        "v4.1-flash": 890, "v4-flash": 3514, "v4-pro": 5031, "v3.2": 48068,
    }  # fmt: skip
    assert kv_bytes_per_token("v4.1-flash", "bf16")["total"] == 3200
    assert kv_bytes_per_token("gqa-8")["total"] == 61 * 4096


def test_a_shared_stream_is_held_once_and_opens_a_group_for_each_odd_token():
    even, odd = kv_bytes("v4.1-flash", 1000), kv_bytes("v4.1-flash", 1001)
    assert even["compressed"] == (3 * 500 + 1000) * 288 and even["index"] == (3 * 500 + 1000) * 68
    assert even["tail"] == 0 and odd["tail"] == 3 * 2 * 512 * 4  # value and gate of three streams of ratio 2
    assert even["window"] == 40 * 128 * 528 and kv_bytes("v4.1-flash", 2)["engram"] == 2 * 8


@pytest.mark.parametrize("name", presets)
@pytest.mark.parametrize("storage", ["released", "bf16", "fp32"])
def test_parts_add_up_start_at_nothing_and_grow_as_said(name, storage):
    assert kv_bytes(name, 0, storage)["total"] == decode_bytes(name, 0, storage)["total"] == 0
    near, far = kv_bytes(name, 512, storage), kv_bytes(name, 1024, storage)
    slope = kv_bytes_per_token(name, storage)
    for part in slope:
        fixed = {"window", "tail", "engram"} if part == "total" else set()
        growth = far[part] - near[part] - sum(far[p] - near[p] for p in fixed)
        assert growth / 512 == pytest.approx(slope[part])
    for counted in (far, decode_bytes(name, 1024, storage), decode_flops(name, 1024), slope):
        assert sum(counted.values()) == pytest.approx(2 * counted["total"])


@pytest.mark.parametrize("name", presets)
def test_a_config_its_preset_and_its_name_count_the_same(name):
    preset = presets[name]
    for count in (kv_bytes, decode_bytes):
        assert count(preset.config, 4099) == count(preset, 4099) == count(name, 4099)
    assert kv_bytes_per_token(preset.config) == kv_bytes_per_token(name)
    for weighting in ("plain", "fp8-equivalent"):
        counted, published = decode_flops(preset.config, 4099, weighting), decode_flops(name, 4099, weighting)
        assert counted["core"] == published["core"] and counted["indexer"] == published["indexer"]
        assert counted["projections"] == pytest.approx(published["projections"], rel=0.03)  # published to two digits


LATENT = LatentConfig(
    vocab_size=53, hidden_size=22, num_hidden_layers=3, num_attention_heads=5, q_lora_rank=7, kv_lora_rank=11,
    qk_nope_head_dim=9, qk_rope_head_dim=4, v_head_dim=13, intermediate_size=17, index_n_heads=3, index_head_dim=6,
    index_topk=3, first_k_dense_replace=1, n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=8, n_group=3,
    topk_group=2,
)  # fmt: skip
GROUPED = DenseConfig(
    vocab_size=53, hidden_size=22, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
    intermediate_size=17,
)  # fmt: skip
PLAIN = {"MLA and DSA": LATENT, "MLA": replace(LATENT, index_topk=0), "GQA": GROUPED}


def test_flops_of_plain_models_are_those_of_their_matrices_and_of_every_row_attended_to():
    seen, length = 3, 17  # rows that DSA keeps of so many
    dsa, plain, dense = (decode_flops(PLAIN[name], length) for name in PLAIN)
    assert dsa["core"] == 3 * seen * 5 * 2 * ((11 + 4) + 11) and dsa["indexer"] == 3 * length * 3 * 2 * 6
    assert plain["core"] == dsa["core"] / seen * length and plain["indexer"] == 0
    assert dense["core"] == 3 * length * 6 * 2 * (10 + 10)
    assert dense["projections"] == 2 * (53 * 22 + 3 * (22 * 10 * (6 + 2 + 2) + 6 * 10 * 22 + 3 * 22 * 17))
    assert dsa["projections"] - plain["projections"] == 2 * 3 * (7 * 3 * 6 + 22 * 6 + 22 * 3)  # the indexer's
    weighted = decode_flops(GROUPED, length, "fp8-equivalent")
    assert weighted["total"] == 2 * dense["total"]


def scored_layer_by_layer(config, length):
    """The slow way for V4.1: what each layer that chooses has to score."""
    scored = 0
    for layer, kind in enumerate(config.layer_kinds):
        if kind not in ("csa2-full", "csa2-reindex"):
            continue
        source = max(owner for owner in config.kv_source_layer_ids if owner <= layer)
        entries = len(range(config.compress_ratios[source], length + 1, config.compress_ratios[source]))
        pooled = layer != source and source == config.candidate_source_layer_id
        scored += min(entries, config.candidate_topk_blocks * config.candidate_block_size) if pooled else entries
    return scored


@pytest.mark.parametrize("pool", [20, 14, -1])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 101, 16384, 16385, 40001])
def test_v41_scores_a_whole_stream_where_it_is_made_and_a_pool_where_it_is_read_again(length, pool):
    config = replace(presets["v4.1-flash"].config, candidate_source_layer_id=pool)
    scored = scored_layer_by_layer(config, length)
    assert decode_bytes(config, length)["index"] == scored * 68
    assert decode_flops(config, length)["indexer"] == scored * 2 * 32 * 128


@pytest.mark.parametrize("name", presets)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_formula_reads_as_its_numbers_for_every_model(name, storage):
    config = presets[name].config
    lines = formula(config, 1001, storage)
    assert lines[0] == units(config, storage) and lines[-1] == f"total: {kv_bytes(config, 1001, storage)['total']:,} B"
    if name == "v3.2" and storage == "released":
        assert lines[0] == "E = 512 FP8 + 16 scale bytes + 64 BF16 = 656 B; I = 128 FP8 + 4 scale bytes = 132 B"
    if name == "v4.1-flash" and storage == "released":
        assert "E_window = 512 FP8 + 16 scale bytes = 528 B; E = 512 FP4 + 32 scale bytes = 288 B; I = 128 FP4 + 4" in lines[0]


def test_most_of_what_v4_reads_in_a_long_context_are_index_keys():
    """Capacity is not traffic."""
    held, read = kv_bytes("v4-flash", MILLION), decode_bytes("v4-flash", MILLION)
    assert round(held["total"] / 1e9, 2) == 3.69 and round(read["total"] / 1e9, 2) == 0.48
    assert read["index"] > 0.75 * read["total"] and held["index"] < 0.11 * held["total"]


def test_decode_bytes_are_those_of_the_reference():
    read = {name: decode_bytes(name, MILLION) for name in ("v4-flash", "v4-pro", "v3.2", "gqa-8", "v4.1-flash")}
    assert f"{read['v4-flash']['total'] / 1e9:.3f}" == "0.480" and f"{read['v4-pro']['total'] / 1e9:.3f}" == "0.706"
    assert f"{read['v3.2']['total'] / 1e9:.2f}" == "8.53" and read["gqa-8"] == kv_bytes("gqa-8", MILLION)
    assert 0.7 < read["v4-pro"]["index"] / read["v4-pro"]["total"] < 0.8  # "about 3/4 is the index-key scan"
    assert read["v4.1-flash"]["index"] == 2.5 * MILLION * 68 + 4 * 16384 * 68  # streams, and the pool of four layers


def attend_layer_by_layer(config, length):
    """The slow way: rows and keys one query meets, layer after layer."""
    rows = keys = 0
    for kind, ratio in zip(config.layer_kinds, config.compress_ratios, strict=True):
        rows += len(range(length)[-config.sliding_window :])
        entries = len(range(ratio, length + 1, ratio)) if ratio else 0
        keys += entries if kind == "csa" else 0
        rows += min(entries, config.index_topk) if kind == "csa" else entries
    return rows, keys


@pytest.mark.parametrize("length", [0, 1, 3, 7, 20, 97])
def test_a_step_reads_and_multiplies_what_each_layer_attends_to(length):
    config = replace(TINY, index_topk=5)
    rows, keys = attend_layer_by_layer(config, length)
    read, flops = decode_bytes(config, length, "fp32"), decode_flops(config, length)
    assert read["window"] + read["compressed"] == rows * 14 * 4 and read["index"] == keys * 10 * 4
    assert flops["core"] == rows * 2 * 2 * 4 * 14  # four heads: scores and values, a multiply and an add each
    assert flops["indexer"] == keys * 2 * 64 * 10


def test_decode_flops_reproduce_the_reports_factors():
    def share(name, weighting, length=MILLION):
        return decode_flops(name, length, weighting)["total"] / decode_flops("v3.2", length, weighting)["total"]

    assert f"{share('v4-pro', 'plain'):.1%}" == "26.2%" and f"{share('v4-flash', 'plain'):.1%}" == "12.1%"
    assert 0.26 < share("v4-pro", "fp8-equivalent") < 0.27  # published: 27 %, 3.7 times less
    assert round(share("v4-flash", "fp8-equivalent"), 2) == 0.10  # published: 10 %, 9.8 times less
    assert f"{share('v4-pro', 'fp8-equivalent', 10**6):.1%}" == "26.8%"
    assert round(share("v4-pro", "plain", 4096), 2) == 0.96  # the gain is one of long contexts
    grown = decode_flops("v4.1-flash", MILLION, "fp8-equivalent")["total"]
    assert 1.2 < grown / decode_flops("v4.1-flash", 4096, "fp8-equivalent")["total"] < 1.3  # "about one quarter more"


@pytest.mark.parametrize("length", [-1, 1.5, True, None])
@pytest.mark.parametrize("count", [kv_bytes, decode_bytes, decode_flops])
@pytest.mark.parametrize("name", presets)
def test_a_length_that_is_no_number_of_tokens_is_refused_for_every_model(name, count, length):
    with pytest.raises(InputError, match=f"length must be a whole number from 0.*{length}"):
        count(name, length)


@pytest.mark.parametrize("length", [MILLION + 1, 2**41])
@pytest.mark.parametrize("count", [kv_bytes, decode_bytes, decode_flops])
def test_a_length_beyond_a_preset_is_refused(count, length):
    with pytest.raises(InputError, match=f"0 to 1048576.*{length}"):
        count("v4.1-flash", length)


def test_other_bad_input_to_the_accounting_is_refused():
    with pytest.raises(InputError, match="v4-flash"):
        kv_bytes("v5", 5)
    with pytest.raises(InputError, match="int3"):
        kv_bytes_per_token("v3.2", "int3")
    with pytest.raises(InputError, match="int3"):
        decode_bytes("gqa-8", 5, "int3")
    with pytest.raises(InputError, match="fp8-equivalent.*heavy"):
        decode_flops("v4-pro", 5, "heavy")
